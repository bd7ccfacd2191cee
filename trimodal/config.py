"""Settings: sections as pydantic dataclasses, size presets, YAML, overrides. Loads no torch, so `--help` is instant.

Order of precedence: the defaults below < config.yaml < flags and `section.key=value` on the command line.

    config = load_config("config.yaml", ["model.size=tiny", "training.epochs=3"])
    shorter = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=1))
"""

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from trimodal.errors import ConfigError, similar

T = TypeVar("T")

MODALITIES = ("image", "text", "audio")
OBJECTIVES = ("masked", "contrastive", "matching", "concepts", "speaker", "words", "masked_words")
OF_PAIRS = ("contrastive", "matching")  # two inputs, compared with those of other samples
OF_WORDS = ("words", "masked_words")  # the words of a caption, told from its image or sound

LANGUAGES = ("en", "zh")  # of captions
FOLDS = 5  # of stamps
SAMPLE_RATE_HZ = 16_000
FRAME_RATE_HZ = 100  # one log-mel frame every 10 ms
NUM_MELS = 80
OWN_IMAGE_SIDE, IMAGE_PATCH = 224, 16  # pixels
AUDIO_WINDOW_FRAMES = 1024  # the audio encoder reads at most this many frames (10.24 s) at once


@dataclasses.dataclass(frozen=True)
class Preset:
    """Width and depth of the towers of one size; head width is 64 in all that users train."""

    dim: int
    num_heads: int
    image_depth: int
    text_depth: int
    audio_depth: int
    fusion_depth: int
    word_rank: int  # width of the word table before its projection to `dim`
    budget_gb: float  # default memory budget for training


PRESETS = {  #    dim heads image text audio fusion word  budget; tests pin the parameters in all
    "tiny": Preset(192, 3, 12, 4, 6, 2, 128, 4.0),
    "small": Preset(320, 5, 12, 4, 6, 2, 160, 8.0),
    "base": Preset(448, 7, 12, 5, 7, 3, 384, 12.0),
    "large": Preset(640, 10, 17, 7, 10, 4, 384, 20.0),
    "nano": Preset(8, 2, 2, 2, 2, 1, 4, 4.0),  # quick, and too small to learn: for tests, and not offered
}
SIZES = ("tiny", "small", "base", "large")


# ---- what a value may be -----------------------------------------------------------------------------------------


def _one_of(known: Iterable[str], offered: Iterable[str] = ()) -> AfterValidator:
    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"is unknown. {similar(name, offered or known)}")
        return name

    return AfterValidator(check)


def _number(value: Any) -> Any:
    """The number that a text names: YAML 1.1 reads 1e-4 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _switch(value: Any) -> Any:
    """The word that YAML 1.1 reads as true or false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _not_empty(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if not entries:
        raise ValueError("needs at least one entry")
    return entries


def _not_repeated(names: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names {repeated[0]!r} {names.count(repeated[0])} times; once is enough")
    return names


def _not_blank(path: str) -> str:
    if not path.strip():
        raise ValueError("is empty; name a path ('.' is the folder you are in)")
    return path


def _with_place(sentence: str) -> str:
    if sentence.count("{}") != 1:
        raise ValueError("needs {} once, where the name of the class goes; write for example 'a photo of a {}'")
    return sentence


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression ({error}); write for example 'image.*'") from None
    return pattern


TOWER_KINDS = {  # prefix of model.MODALITY.tower -> the modalities that it has encoders of
    "timm:": ("image",), "torchvision:": ("image",), "hub:": MODALITIES, "package:": ("image", "text")}
TOWER_NAMES = f"own, {', '.join(f'{kind}NAME' for kind in TOWER_KINDS)}, or a path with a slash in it"


def _tower(name: str) -> str:
    kind, _, rest = name.partition(":")
    if name != "own" and not (rest.strip() if f"{kind}:" in TOWER_KINDS else "/" in name):
        raise ValueError(f"names no tower. Write {TOWER_NAMES}")
    return name


def _factor(value: Any) -> Any:
    """A number alone is a factor; one that YAML 1.1 reads as a text, too."""
    return {"factor": value} if isinstance(value, int | float | str) else value


Auto = Literal["auto"]
Int = Annotated[int, Strict(), Field(lt=2**63)]
Count = Annotated[Int, Field(ge=1)]
CountOr0 = Annotated[Int, Field(ge=0)]
Float = Annotated[float, Strict(), BeforeValidator(_number)]
Positive = Annotated[Float, Field(gt=0)]
PositiveOr0 = Annotated[Float, Field(ge=0)]
Percent = Annotated[Float, Field(ge=0, le=100)]
Part = Annotated[Float, Field(gt=0, le=1)]
Below1 = Annotated[Float, Field(ge=0, lt=1)]
Switch = Annotated[Literal["on", "off"], BeforeValidator(_switch)]
NotEmpty, NotRepeated = AfterValidator(_not_empty), AfterValidator(_not_repeated)
Pattern = Annotated[str, AfterValidator(_regular_expression)]
FolderOrFile = Annotated[str, AfterValidator(_not_blank)]
Patterns = FolderOrFile | Annotated[tuple[FolderOrFile, ...], NotEmpty]

_RULES = ConfigDict(extra="forbid", allow_inf_nan=False)


# ---- sections ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TowerConfig:
    """The encoder of one modality: our own of `model.size`, or a pretrained one by name."""

    tower: Annotated[str, AfterValidator(_tower)] = "own"
    weights: FolderOrFile = "auto"  # of timm: and torchvision: those of the name, package:NAME, or a file
    keep_tokens: Annotated[CountOr0, Field(le=65_536)] | Literal["all"] = 0  # beside the pooled feature
    adapter_depth: Annotated[CountOr0, Field(le=16)] = 0  # trained blocks over these tokens

    @property
    def is_own(self) -> bool:
        return self.tower == "own"

    @model_validator(mode="after")
    def _check(self) -> "TowerConfig":
        if self.is_own:
            for field in dataclasses.fields(self)[1:]:
                if (value := getattr(self, field.name)) != field.default:
                    raise ValueError(f"{field.name}: {value!r} is for a pretrained tower, and tower is 'own'; name one "
                                     f"({TOWER_NAMES}), or leave it out")
        elif self.weights != "auto" and not self.tower.startswith(("timm:", "torchvision:")):
            raise ValueError(f"weights: {self.weights!r} is for towers of timm: or torchvision:, which name an "
                             f"architecture; {self.tower} brings its own: leave it out")
        return self


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ModelConfig:
    """The upper bounds keep a checkpoint from elsewhere from filling the memory."""

    size: Annotated[str, _one_of(PRESETS, SIZES)] = "base"
    embed_dim: Annotated[Count, Field(le=8_192)] = 512
    use_checkpoint: StrictBool = True
    num_classes: Annotated[Count, Field(le=100_000)] = 1000
    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()
    audio: TowerConfig = TowerConfig()
    image_size: Annotated[Int, Field(ge=16, le=2_048)] | Auto = "auto"
    context_length: Annotated[Int, Field(ge=4, le=4_096)] = 64
    word_embeddings: Annotated[str, Field(pattern="^(minilm|random|hub:.+|file:.+)$")] = "minilm"
    vocab_size: Annotated[Count, Field(le=1_000_000)] = 30522
    attention_chunk: Count | Auto = "auto"

    @property
    def preset(self) -> Preset:
        return PRESETS[self.size]

    def tower(self, modality: str) -> TowerConfig:
        return getattr(self, modality)

    @property
    def pretrained(self) -> tuple[str, ...]:
        """The modalities whose tower is not our own."""
        return tuple(name for name in MODALITIES if not self.tower(name).is_own)

    @property
    def image_side(self) -> int:
        """Pixels of an image's side; of a pretrained tower once `image_size` is no longer "auto"."""
        if self.image_size != "auto":
            return self.image_size
        assert self.image.is_own, "image_size of a pretrained tower is known once the tower is open"
        return OWN_IMAGE_SIDE

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.image.is_own and self.image_size != "auto" and self.image_size % IMAGE_PATCH:
            raise ValueError(f"image_size: {self.image_size} should be a multiple of {IMAGE_PATCH}")
        if self.image.keep_tokens != "all" and math.isqrt(self.image.keep_tokens) ** 2 != self.image.keep_tokens:
            raise ValueError(f"image.keep_tokens: {self.image.keep_tokens} makes no square grid; write 1, 4, 9, 16, "
                             "25, 36, 49 or another square, 0 or 'all'")
        for name in self.pretrained:
            for kind, modalities in TOWER_KINDS.items():
                if self.tower(name).tower.startswith(kind) and name not in modalities:
                    raise ValueError(f"{name}.tower: {self.tower(name).tower!r} is of {' or '.join(modalities)}; "
                                     f"of {name} take own, hub:NAME or a folder")
        return self


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TrainingConfig:
    epochs: Count = 100
    max_hours: Positive | None = None
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 4
    contrastive_loss: Literal["infonce", "sigmoid"] = "infonce"
    soft_targets: Below1 = 0.0
    false_negatives: Part | None = None
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: Positive = 1.0e-4
    use_amp: StrictBool = True
    compile: Switch | Auto = "auto"
    weight_decay: PositiveOr0 = 0.05
    warmup_pct: Percent = 5.0
    min_lr_pct: Percent = 1.0
    grad_clip_norm: PositiveOr0 = 1.0
    ema_decay: Below1 = 0.0
    captions_per_visit: Count = 1
    seed: CountOr0 = 0
    save_every_epochs: Count = 1
    save_every_minutes: PositiveOr0 = 10.0
    keep_checkpoints: Count = 3
    log_every_steps: Count = 10
    max_bad_steps: Count = 10
    deterministic: StrictBool = False

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def compares_captions(self) -> bool:
        """Whether contrast looks at how alike captions are."""
        return self.soft_targets > 0 or self.false_negatives is not None


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TaskConfig:
    """One pool of samples (those that have all `inputs`) and the weighted objectives trained on it."""

    inputs: Annotated[tuple[Annotated[str, _one_of(MODALITIES)], ...], NotEmpty, NotRepeated]
    objectives: Annotated[dict[Annotated[str, _one_of(OBJECTIVES)], Positive], Field(min_length=1)]
    passes: Annotated[Float, Field(gt=0, le=1_000)] = 1.0  # visits of every sample per epoch; their order is in memory

    @model_validator(mode="after")
    def _check(self) -> "TaskConfig":
        pairs = [name for name in OF_PAIRS if name in self.objectives]
        if pairs and len(self.inputs) != 2:
            raise ValueError(f"inputs: {pairs[0]} needs exactly two, got {', '.join(self.inputs)}")
        if "speaker" in self.objectives and "audio" not in self.inputs:
            raise ValueError(f"inputs: speaker needs audio among them, got {', '.join(self.inputs)}")
        of_words = [name for name in OF_WORDS if name in self.objectives]
        if of_words and ("text" not in self.inputs or len(self.inputs) == 1):
            raise ValueError(f"inputs: {of_words[0]} needs text and image or audio, got {', '.join(self.inputs)}")
        return self


@dataclass(frozen=True, kw_only=True, config=_RULES)
class LrFactor:
    """What multiplies the learning rate of some parameters: `factor` in a tower's last layer, and in each layer below
    `layer_decay` times as much as in the one above."""

    factor: Positive = 1.0
    layer_decay: Part = 1.0


@dataclass(frozen=True, kw_only=True, config=_RULES)
class StageConfig:
    """A stage of training. Stages share `training.epochs` in proportion to `share`."""

    name: str
    share: Positive
    tasks: Annotated[tuple[TaskConfig, ...], NotEmpty]
    lr_factor: Positive = 1.0
    effective_batch: Annotated[Int, Field(ge=2)] | None = None  # None: batch_size * gradient_accumulation_steps
    image_keep: Part = 1.0  # part of the patches that the image encoder sees in training
    audio_keep: Part = 1.0
    drop_path: Below1 = 0.0
    feature_dropout: Below1 = 0.0  # of what pretrained towers give
    trainable: tuple[Pattern, ...] = (".*",)  # over parameter names, as are those of `lr_factors`
    lr_factors: dict[Pattern, Annotated[LrFactor, BeforeValidator(_factor)]] = field(default_factory=dict)

    @property
    def compares(self) -> bool:
        return any(name in task.objectives for task in self.tasks for name in OF_PAIRS)

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        masked = {name for task in self.tasks if "masked" in task.objectives for name in task.inputs}
        for name in sorted(masked - {"text"}):
            if getattr(self, f"{name}_keep") == 1:
                raise ValueError(f"{name}_keep: 1.0 hides nothing; masked pretraining needs it below 1")
        return self


def _task(inputs: str, **objectives: float) -> TaskConfig:
    return TaskConfig(inputs=tuple(inputs.split("+")), objectives=objectives)


DEFAULT_STAGES = (
    StageConfig(name="pretrain", share=0.06, image_keep=0.25, audio_keep=0.25, tasks=(
        _task("image", masked=1.0), _task("audio", masked=1.0, speaker=1.0), _task("text", masked=1.0))),
    StageConfig(name="align", share=0.74, image_keep=0.5, audio_keep=0.5, drop_path=0.1, tasks=(
        _task("image+text", contrastive=1.0), _task("audio+text", contrastive=1.0),
        _task("image+audio", contrastive=0.5))),
    StageConfig(name="finetune", share=0.2, lr_factor=0.3, drop_path=0.1, tasks=(
        _task("image+text", contrastive=1.0, matching=0.5, concepts=0.5),
        _task("audio+text", contrastive=1.0, matching=0.5, concepts=0.5),
        _task("image+audio", contrastive=0.5))),
)


@dataclass(frozen=True, kw_only=True, config=_RULES)
class DataConfig:
    datasets: Annotated[tuple[str, ...], NotEmpty, NotRepeated] = ("coco", "clotho", "audiocaps")  # see sets
    languages: Annotated[tuple[Annotated[str, _one_of(LANGUAGES)], ...], NotEmpty, NotRepeated] = ("en",)
    workers: CountOr0 | Auto = "auto"
    cache: StrictBool = True
    cache_dir: FolderOrFile | None = None
    cache_max_gb: PositiveOr0 = 60.0
    fit: Literal["crop", "pad"] = "crop"
    min_crop: Part = 0.5
    flip: StrictBool = True
    views: Annotated[Int, Field(ge=1, le=100)] = 1  # of what frozen towers read
    audio_max_s: Annotated[Float, Field(ge=0.1, le=AUDIO_WINDOW_FRAMES / FRAME_RATE_HZ)] = 10.0  # at most one window
    spec_augment: StrictBool = True
    max_bad_pct: Percent = 5.0
    timeout_s: PositiveOr0 = 120.0
    manifest: str | None = None
    manifest_root: FolderOrFile | None = None
    shards: Patterns | dict[Literal["train", "val", "test"], Patterns] | None = None
    shards_captions: tuple[str, ...] | Auto = "auto"  # names of fields
    folder: FolderOrFile | None = None
    folder_caption: Annotated[str, AfterValidator(_with_place)] | None = None  # of files without one, by their class
    coco_split: Literal["auto", "karpathy", "2017"] = "auto"
    audiocaps_version: Literal[1, 2] = 1
    stamps_symbols: StrictBool = True
    fold: Annotated[CountOr0, Field(lt=FOLDS)] = 0
    emoji_language: Literal["en", "zh"] = "en"
    synthetic_images: Annotated[Int, Field(ge=128, le=1800)] = 1800
    synthetic_sounds: Annotated[Int, Field(ge=128, le=384)] = 384


@dataclass(frozen=True, kw_only=True, config=_RULES)
class MemoryConfig:
    budget_gb: Positive | Auto = "auto"
    micro_batch: Count | Auto = "auto"


@dataclass(frozen=True, kw_only=True, config=_RULES)
class EvaluationConfig:
    batch_size: Count = 64
    tile: Count = 1024
    max_validation: Annotated[Int, Field(ge=2)] = 1000
    resamples: CountOr0 = 1000
    rerank: CountOr0 = 0


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ReportConfig:
    language: Literal["zh", "en"] = "zh"
    gallery_queries: Annotated[Int, Field(ge=0, le=100)] = 8


@dataclass(frozen=True, kw_only=True, config=_RULES)
class PathsConfig:
    data_root: FolderOrFile = "./data"
    output_dir: FolderOrFile = "./outputs"


@dataclass(frozen=True, kw_only=True, config=_RULES)
class Config:
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    stages: Annotated[tuple[StageConfig, ...], NotEmpty] = DEFAULT_STAGES
    data: DataConfig = DataConfig()
    memory: MemoryConfig = MemoryConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    paths: PathsConfig = PathsConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError(f"stages: each needs a name of its own, got {', '.join(row.name for row in self.stages)}")
        alone = [i for i, stage in enumerate(self.stages) if stage.compares and self.effective_batch(stage) == 1]
        if unfit := [line for i, stage in enumerate(self.stages) for line in self._unfit(f"stages[{i}]", stage)]:
            raise ValueError("; ".join(unfit))
        if alone:
            raise ValueError("; ".join(
                f"stages[{i}].effective_batch: 1 (training.batch_size * gradient_accumulation_steps) is below 2, so "
                "that no sample has another to be compared with" for i in alone))
        return self

    def _unfit(self, where: str, stage: StageConfig) -> Iterator[str]:
        """What a stage asks of a pretrained tower that only our own can do, a line each."""
        for name in self.model.pretrained:
            tower = f"{self.model.tower(name).tower} (model.{name}.tower)"
            if any("masked" in task.objectives and name in task.inputs for task in stage.tasks):
                yield (f"{where}.tasks: masked hides parts of what own towers read, which {tower} does not; leave "
                       f"masked out for {name}, or set model.{name}.tower=own")
            of_words = [word for task in stage.tasks for word in OF_WORDS if word in task.objectives]
            if name == "text" and of_words:
                yield (f"{where}.tasks: {of_words[0]} tells the words that our own encoder of text reads, not {tower}; "
                       "leave it out, or set model.text.tower=own")
            if name != "text" and (keep := getattr(stage, f"{name}_keep")) < 1:
                yield f"{where}.{name}_keep: {keep:g} hides patches, but {tower} reads all of them; set it to 1.0"
        used = {name for task in stage.tasks for name in task.inputs}
        if stage.feature_dropout and not used & set(self.model.pretrained):
            yield (f"{where}.feature_dropout: {stage.feature_dropout:g} drops features of pretrained towers, and the "
                   "towers of this stage are all our own; set it to 0")
        blocks = any(self.model.tower(name).is_own or self.model.tower(name).adapter_depth for name in used)
        if stage.drop_path and not blocks:
            yield (f"{where}.drop_path: {stage.drop_path:g} drops blocks of own towers and adapters, and the towers of "
                   f"this stage have neither; set it to 0, or a model.MODALITY.adapter_depth above 0")

    @property
    def budget_gb(self) -> float:
        return self.model.preset.budget_gb if self.memory.budget_gb == "auto" else self.memory.budget_gb

    def effective_batch(self, stage: StageConfig) -> int:
        return stage.effective_batch or self.training.effective_batch

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (tuples as lists), as saved in the run folder and in every checkpoint."""
        return TypeAdapter(Config).dump_python(self, mode="json")


# ---- reading -----------------------------------------------------------------------------------------------------


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (None: defaults only), apply `section.key=value` overrides, check everything.

    Raises:
        ConfigError: names the file and key, what was given, and what is allowed.
    """
    return config_from_dict({} if path is None else _read_yaml(Path(path)), overrides)


def config_from_dict(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Build a checked Config from a nested dict (the inverse of `Config.to_dict`) and `section.key=value` overrides.

    Raises:
        ConfigError: all problems, each with its key, what was given, and what is allowed.
    """
    values = copy.deepcopy(raw)
    for override in overrides:
        _apply_override(values, override)
    return _checked(Config, values)


def model_config_from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """Build a checked ModelConfig from the keys of the section `model`, whatever stages there may be.

    Raises:
        ConfigError: as `config_from_dict`.
    """
    return _checked(_ModelAlone, {"model": copy.deepcopy(raw)}).model


@dataclass(frozen=True, config=_RULES)
class _ModelAlone:
    model: ModelConfig


def _checked(kind: type[T], values: Any) -> T:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_problems(error, values))) from None


def _problems(error: ValidationError, values: Any) -> list[str]:
    """One line for each key that is wrong."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        key, text = _problem(problem, values)
        if key not in found:
            found[key] = text
        elif problem["type"] == "literal_error":  # of several alternatives each comes by itself: a number, then 'auto'
            found[key] += f" or {problem['ctx']['expected']}"
    return [f"{key}: {text}" for key, text in found.items()]


def _problem(problem: Mapping[str, Any], values: Any) -> tuple[str, str]:
    """A key, and what is wrong with it. Our own checks of a whole section begin their text with the key."""
    key, value = "", values
    for name in problem["loc"]:
        try:
            value = value[name]
        except (LookupError, TypeError):  # a missing key, or the name that pydantic gives to an alternative
            break
        key += f"[{name}]" if isinstance(name, int) else f".{name}"
    if problem["loc"][-1:] == ("[key]",):  # of a dict whose keys are checked
        value = problem["loc"][-2]
        key = key.removesuffix(f".{value}")
    key, kind, text = key.removeprefix("."), problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "unexpected_keyword_argument":
        return key, f"unknown key. {similar(str(problem['loc'][-1]), _keys_of(problem['loc'][:-1]))}"
    if kind == "missing":
        return f"{key}.{problem['loc'][-1]}", "is missing"
    if kind == "value_error" and isinstance(value, dict):
        key, _, text = f"{key}.{text}".removeprefix(".").partition(": ")
        return key, text
    if kind == "dataclass_type":
        text = "should be a section of keys"
    return key or "settings", f"{_shown(value)} {text[max(text.find('should'), 0):].replace('tuple', 'list')}"


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.100}"
    except ValueError:
        return "a whole number of more digits than Python prints"


def _keys_of(section: Sequence[str | int]) -> list[str]:
    if "lr_factors" in section:
        return [one.name for one in dataclasses.fields(LrFactor)]
    found: Any = Config().to_dict()
    for name in section:
        found = found[0 if isinstance(name, int) else name]
    return list(found)


# PyYAML lets through what its constructors raise, for impossible dates for example
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before `<<` merges keys that may be given again
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(str(key.value))
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a YAML file of settings") from None
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{path}: should hold sections such as 'model:', not a {type(raw).__name__}")
    return {section: value for section, value in (raw or {}).items() if value is not None}


def _apply_override(values: Any, override: str) -> None:
    """Set one key; an entry of a list is addressed by its name or position."""
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.split(".")
    if not equals or not sections:
        raise ConfigError(f"{override!r}: an override looks like section.key=value, for example training.seed=1")
    if sections[0] == "stages":
        values.setdefault("stages", Config().to_dict()["stages"])
    node = values
    for depth, name in enumerate(sections, start=1):
        node = _entry(node, name, ".".join(sections[:depth]))
    if not isinstance(node, dict):
        raise ConfigError(f"{'.'.join(sections)}: is no section of keys; {override!r} cannot set one there")
    try:
        node[key] = yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS:
        node[key] = text


def _entry(node: Any, name: str, where: str) -> Any:
    if isinstance(node, dict):
        return node.setdefault(name, {})
    names = [str(one.get("name")) for one in node if isinstance(one, dict)] if isinstance(node, list) else []
    if name in names:
        return node[names.index(name)]
    if name.isdecimal() and int(name) < len(names):
        return node[int(name)]
    raise ConfigError(f"{where}: no entry {name!r}; have {', '.join(names) or 'none'}")
