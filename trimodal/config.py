"""Configuration: frozen dataclasses, size presets, strict YAML, overrides. Loads no torch, so `--help` is instant.

Order of precedence: the defaults below < config.yaml < flags and `section.key=value` on the command line.

    config = load_config("config.yaml", ["model.size=tiny", "training.epochs=3"])
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trimodal import checks, strict_yaml
from trimodal.errors import ConfigError

MODALITIES = ("image", "text", "audio")
OBJECTIVES = ("masked", "contrastive", "matching", "concepts", "speaker")
MAX_PASSES = 1_000  # the order of all visits of an epoch is in memory
OF_PAIRS = ("contrastive", "matching")  # two inputs, compared with those of other samples
DATASETS = ("coco", "clotho", "audiocaps", "voxceleb", "stamps", "synthetic", "manifest")

SAMPLE_RATE_HZ = 16_000
FRAME_RATE_HZ = 100  # one log-mel frame every 10 ms
NUM_MELS = 80
AUDIO_WINDOW_FRAMES = 1024  # the audio encoder reads at most this many frames (10.24 s) at once


@dataclass(frozen=True, kw_only=True)
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


#                        dim heads image text audio fusion word  budget   parameters in all (tests pin them)
PRESETS: dict[str, Preset] = {
    name: Preset(**dict(zip([f.name for f in fields(Preset)], row, strict=True)))  # type: ignore[arg-type]
    for name, row in {
        "tiny": (192, 3, 12, 4, 6, 2, 128, 4.0),
        "small": (320, 5, 12, 4, 6, 2, 160, 8.0),
        "base": (448, 7, 12, 5, 7, 3, 384, 12.0),
        "large": (640, 10, 17, 7, 10, 4, 384, 20.0),
        "nano": (8, 2, 2, 2, 2, 1, 4, 4.0),
    }.items()
}
TEST_SIZE = "nano"  # quick, and too small to learn: for tests, and not offered
SIZES = tuple(name for name in PRESETS if name != TEST_SIZE)
MAX_SIZES = {  # of a model; a checkpoint that asks for more was made to fill the memory
    "embed_dim": 8_192, "num_classes": 100_000, "image_size": 2_048, "context_length": 4_096, "vocab_size": 1_000_000}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    size: Literal["tiny", "small", "base", "large", "nano"] = "base"
    embed_dim: int = 512
    use_checkpoint: bool = True
    num_classes: int = 1000
    image_size: int = 224
    context_length: int = 64
    word_embeddings: str = "minilm"
    vocab_size: int = 30522
    attention_chunk: int | Literal["auto"] = "auto"

    @property
    def preset(self) -> Preset:
        return PRESETS[self.size]

    def problems(self) -> list[str]:
        found = checks.below("model", self, embed_dim=1, num_classes=1, image_size=16, context_length=4,
                             vocab_size=1)
        found += checks.above("model", self, **MAX_SIZES)
        if self.image_size % 16:
            found.append(f"model.image_size: {self.image_size} is not a multiple of the patch, 16")
        if self.word_embeddings not in ("minilm", "random") and not self.word_embeddings.startswith(("hub:", "file:")):
            found.append(f"model.word_embeddings: {self.word_embeddings!r} is not 'minilm', 'random', 'hub:NAME' or "
                         "'file:PATH'")
        if isinstance(self.attention_chunk, int) and self.attention_chunk < 1:
            found.append(f"model.attention_chunk: {self.attention_chunk} is below 1; 'auto' lets the kernel decide")
        return found


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    epochs: int = 100
    batch_size: int = 8
    gradient_accumulation_steps: int = 4
    contrastive_loss: Literal["infonce", "sigmoid"] = "infonce"
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 1.0e-4
    use_amp: bool = True
    weight_decay: float = 0.05
    warmup_pct: float = 5.0
    min_lr_pct: float = 1.0
    grad_clip_norm: float = 1.0
    ema_decay: float = 0.0
    captions_per_visit: int = 1
    seed: int = 0
    save_every_epochs: int = 1
    save_every_minutes: float = 10.0
    keep_checkpoints: int = 3
    log_every_steps: int = 10
    max_bad_steps: int = 10
    deterministic: bool = False

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    def problems(self) -> list[str]:
        found = checks.below("training", self, epochs=1, batch_size=1, gradient_accumulation_steps=1,
                             captions_per_visit=1, log_every_steps=1, keep_checkpoints=1, save_every_epochs=1,
                             save_every_minutes=0, weight_decay=0, grad_clip_norm=0, max_bad_steps=1, warmup_pct=0,
                             min_lr_pct=0, seed=0)
        found += checks.above("training", self, warmup_pct=100, min_lr_pct=100)
        if not self.learning_rate > 0:
            found.append(f"training.learning_rate: {self.learning_rate} is not above 0")
        if not 0 <= self.ema_decay < 1:
            found.append(f"training.ema_decay: {self.ema_decay} is outside [0, 1)")
        return found


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One pool of samples (those that have all `inputs`) and the weighted objectives trained on it."""

    inputs: tuple[str, ...]
    objectives: dict[str, float]
    passes: float = 1.0  # visits of every sample per epoch

    def problems(self, where: str) -> list[str]:
        found = [f"{where}.inputs: {name!r} is not one of {', '.join(MODALITIES)}"
                 for name in self.inputs if name not in MODALITIES]
        found += [f"{where}.objectives: {checks.unknown(name, OBJECTIVES)}" for name in self.objectives
                  if name not in OBJECTIVES]
        found += [f"{where}.objectives.{name}: {weight} is not above 0; remove what is not to be trained"
                  for name, weight in self.objectives.items() if weight <= 0]
        if not self.inputs or not self.objectives:
            found.append(f"{where}: needs at least one entry in inputs and in objectives")
        found += checks.twice(f"{where}.inputs", self.inputs)
        if not 0 < self.passes <= MAX_PASSES:
            found.append(f"{where}.passes: {self.passes} is outside (0, {MAX_PASSES}]")
        pairs = [name for name in OF_PAIRS if name in self.objectives]
        if pairs and len(set(self.inputs)) != 2:
            found.append(f"{where}: {pairs[0]} needs exactly two inputs, got {', '.join(self.inputs)}")
        if "speaker" in self.objectives and "audio" not in self.inputs:
            found.append(f"{where}: speaker needs audio among its inputs")
        return found


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of training. Stages share `training.epochs` in proportion to `share`."""

    name: str
    share: float
    tasks: tuple[TaskConfig, ...]
    lr_factor: float = 1.0
    effective_batch: int | None = None  # None: batch_size * gradient_accumulation_steps
    image_keep: float = 1.0  # part of the patches that the image encoder sees in training
    audio_keep: float = 1.0
    drop_path: float = 0.0
    trainable: tuple[str, ...] = (".*",)  # regular expressions over parameter names; the rest is frozen

    @property
    def compares(self) -> bool:
        return any(name in task.objectives for task in self.tasks for name in OF_PAIRS)

    def problems(self, where: str) -> list[str]:
        found = [p for i, task in enumerate(self.tasks) for p in task.problems(f"{where}.tasks[{i}]")]
        for name in ("image_keep", "audio_keep"):
            if not 0 < getattr(self, name) <= 1:
                found.append(f"{where}.{name}: {getattr(self, name)} is outside (0, 1]")
        for task in self.tasks:
            if "masked" in task.objectives:
                found += [f"{where}.{name}_keep: masked pretraining needs it below 1" for name in ("image", "audio")
                          if name in task.inputs and getattr(self, f"{name}_keep") == 1]
        if not 0 <= self.drop_path < 1:
            found.append(f"{where}.drop_path: {self.drop_path} is outside [0, 1)")
        if self.share <= 0 or self.lr_factor <= 0:
            found.append(f"{where}: share and lr_factor must be above 0")
        if not self.tasks:
            found.append(f"{where}.tasks: a stage needs at least one task")
        found += checks.patterns(f"{where}.trainable", self.trainable)
        if self.effective_batch is not None and self.effective_batch < 2:
            found.append(f"{where}.effective_batch: {self.effective_batch} is below 2")
        return found


def _task(inputs: str, passes: float = 1.0, **objectives: float) -> TaskConfig:
    return TaskConfig(inputs=tuple(inputs.split("+")), objectives=objectives, passes=passes)


DEFAULT_STAGES = (
    StageConfig(name="pretrain", share=0.2, image_keep=0.25, audio_keep=0.25, tasks=(
        _task("image", masked=1.0), _task("audio", masked=1.0, speaker=1.0), _task("text", masked=1.0))),
    StageConfig(name="align", share=0.6, image_keep=0.5, audio_keep=0.5, drop_path=0.1, tasks=(
        _task("image+text", contrastive=1.0), _task("audio+text", contrastive=1.0),
        _task("image+audio", contrastive=0.5))),
    StageConfig(name="finetune", share=0.2, lr_factor=0.3, drop_path=0.1, tasks=(
        _task("image+text", contrastive=1.0, matching=0.5, concepts=0.5),
        _task("audio+text", contrastive=1.0, matching=0.5, concepts=0.5),
        _task("image+audio", contrastive=0.5))),
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    datasets: tuple[str, ...] = ("coco", "clotho", "audiocaps")
    workers: int | Literal["auto"] = "auto"
    cache: bool = True
    cache_dir: str | None = None
    cache_max_gb: float = 60.0
    fit: Literal["crop", "pad"] = "crop"
    min_crop: float = 0.5
    flip: bool = True
    audio_max_s: float = 10.0
    spec_augment: bool = True
    max_bad_pct: float = 5.0
    timeout_s: float = 120.0
    manifest: str | None = None
    manifest_root: str | None = None
    coco_split: Literal["auto", "karpathy", "2017"] = "auto"
    audiocaps_version: Literal[1, 2] = 1
    stamps_symbols: bool = True
    synthetic_images: int = 1800
    synthetic_sounds: int = 384

    def problems(self) -> list[str]:
        found = [f"data.datasets: {checks.unknown(name, DATASETS)}" for name in self.datasets if name not in DATASETS]
        if not self.datasets:
            found.append("data.datasets: name at least one set")
        found += checks.twice("data.datasets", self.datasets)
        if "manifest" in self.datasets and not self.manifest:
            found.append("data.manifest: the set 'manifest' needs the path of your JSONL or CSV file here")
        if self.audio_max_s * FRAME_RATE_HZ > AUDIO_WINDOW_FRAMES or self.audio_max_s < 0.1:
            found.append(f"data.audio_max_s: {self.audio_max_s} is outside 0.1 to {AUDIO_WINDOW_FRAMES / FRAME_RATE_HZ}"
                         " s (one window of the audio encoder; longer sounds are cropped in training only)")
        if not 0 < self.min_crop <= 1:
            found.append(f"data.min_crop: {self.min_crop} is outside (0, 1]")
        if isinstance(self.workers, int) and self.workers < 0:
            found.append(f"data.workers: {self.workers} is below 0")
        found += checks.below("data", self, cache_max_gb=0)
        found += checks.blank("data", self, "cache_dir", "manifest_root")
        if not 0 <= self.max_bad_pct <= 100:
            found.append(f"data.max_bad_pct: {self.max_bad_pct} is outside 0 to 100")
        if not 0 <= self.timeout_s < math.inf:
            found.append(f"data.timeout_s: {self.timeout_s} is below 0, or infinite; 0 waits for ever")
        if not 128 <= self.synthetic_images <= 1800 or not 128 <= self.synthetic_sounds <= 384:
            found.append("data.synthetic_images must be 128 to 1800 and data.synthetic_sounds 128 to 384")
        return found


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    budget_gb: float | Literal["auto"] = "auto"
    micro_batch: int | Literal["auto"] = "auto"

    def problems(self) -> list[str]:
        return [f"memory.{f.name}: {value} is not above 0" for f in fields(self)
                if not isinstance(value := getattr(self, f.name), str) and value <= 0]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    batch_size: int = 64
    tile: int = 1024
    max_validation: int = 1000
    resamples: int = 1000

    def problems(self) -> list[str]:
        return checks.below("evaluation", self, batch_size=1, tile=1, max_validation=2, resamples=0)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    language: Literal["zh", "en"] = "zh"
    gallery_queries: int = 8

    def problems(self) -> list[str]:
        return checks.below("report", self, gallery_queries=0) + checks.above("report", self, gallery_queries=100)


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    data_root: str = "./data"
    output_dir: str = "./outputs"

    def problems(self) -> list[str]:
        return checks.blank("paths", self, "data_root", "output_dir")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stages: tuple[StageConfig, ...] = DEFAULT_STAGES
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def __post_init__(self) -> None:
        sections = (self.model, self.training, self.data, self.memory, self.evaluation, self.report, self.paths)
        found = [p for section in sections for p in section.problems()]
        found += [p for i, stage in enumerate(self.stages) for p in stage.problems(f"stages[{i}]")]
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            found.append("stages: needs at least one stage, each with a name of its own")
        found += [f"stages[{i}].effective_batch: 1 (training.batch_size * gradient_accumulation_steps) is below 2, so "
                  "that no sample has another to be compared with" for i, stage in enumerate(self.stages)
                  if stage.compares and stage.effective_batch is None and self.training.effective_batch == 1]
        if found:
            raise ConfigError("; ".join(found))

    @property
    def budget_gb(self) -> float:
        return self.model.preset.budget_gb if self.memory.budget_gb == "auto" else self.memory.budget_gb

    def effective_batch(self, stage: StageConfig) -> int:
        return stage.effective_batch or self.training.effective_batch

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (tuples as lists), as saved in the run folder and in every checkpoint."""
        return _plain(dataclasses.asdict(self))


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (None: defaults only), apply `section.key=value` overrides, check everything.

    Raises:
        ConfigError: names the file and key, what was given, and what is allowed.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        raw = _read_yaml(Path(path))
    return config_from_dict(raw, overrides)


def config_from_dict(raw: Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Build a checked Config from a nested dict (the inverse of `Config.to_dict`) and `section.key=value` overrides."""
    changed: Any = _plain(raw)  # a copy
    for override in overrides:
        _apply_override(changed, override)
    return _build(Config, changed, "")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            raw = strict_yaml.parse(file.read(strict_yaml.MAX_CHARS + 1))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --config takes the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:', got {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or "." not in dotted:
        raise ConfigError(f"{override!r}: an override looks like section.key=value, for example training.seed=1")
    try:
        value = strict_yaml.parse(text)
    except yaml.YAMLError:
        value = text
    *sections, key = dotted.split(".")
    node: Any = raw
    for depth, name in enumerate(sections):
        node = _step_into(node, name, ".".join(sections[: depth + 1]))
    if not isinstance(node, dict):
        raise ConfigError(f"{'.'.join(sections)}: is a list; name an entry of it and one of its keys")
    node[key] = value


def _step_into(node: Any, name: str, where: str) -> Any:
    """The mapping under `name`; a list of stages or tasks is addressed by name or position."""
    if isinstance(node, list):
        entries = [item if isinstance(item, dict) else {} for item in node]
        found = [item for i, item in enumerate(entries) if name in (str(i), item.get("name"))]
        if not found:
            have = ", ".join(str(item.get("name")) for item in entries)
            raise ConfigError(f"{where}: no entry {name!r}; have {have}")
        return found[0]
    if name == "stages" and name not in node:
        node[name] = _plain([dataclasses.asdict(stage) for stage in DEFAULT_STAGES])
    if node.get(name) is None:
        node[name] = {}
    if not isinstance(node[name], dict | list):
        raise ConfigError(f"{where}: is a value, not a section")
    return node[name]


def _build(cls: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where or 'config'}: expected a section of keys, got {raw!r}")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in raw:
        if key not in hints:
            raise ConfigError(f"{prefix}{key}: unknown key. {checks.unknown(str(key), hints).split('. ', 1)[1]}")
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in raw.items()}
    missing = [f.name for f in fields(cls) if f.name not in values
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return _build(hint, {} if value is None else value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise ConfigError(f"{where}: {value!r:.100} is not one of {', '.join(str(a) for a in args if a != TEST_SIZE)}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r:.100}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected name: number pairs, got {value!r:.100}")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in args:
        return None
    for arg in args:
        if arg is types.NoneType:
            continue
        try:
            return _convert(arg, value, where)
        except ConfigError:
            pass
    allowed = [", ".join(map(repr, typing.get_args(a))) or getattr(a, "__name__", str(a)) for a in args]
    raise ConfigError(f"{where}: expected {' or '.join(allowed)}, got {value!r:.100}")


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
    if type(value) is not hint:
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r:.100}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a number, got {value}")
    if hint is int and abs(value) >= 2**63:
        raise ConfigError(f"{where}: {value!r:.100} is beyond 63 bits")
    return value
