"""Quality gates over the files of the project. Each gate is a function over sources, proved able to fail here too."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.project import ROOT, module_name, product_files

WITHOUT_TORCH = ("trimodal.config", "trimodal.errors", "trimodal.arguments", "trimodal.openmp",
                 "trimodal.evaluation.report", "trimodal.sets", "trimodal.download.http",
                 "trimodal.download.unpack", "trimodal.doctor",
                 "download_datasets", "run_training", "evaluate", "search")
ONLY_WHERE_NEEDED = {"matplotlib", "av", "soundfile", "transformers", "py7zr", "pyarrow", "yt_dlp",
                     "requests", "timm", "onnx", "onnxruntime", "onnxscript"}  # inside functions, never on top
PROGRAMS = {"trimodal.export.example"}  # given to users, and imported by nothing here
COLLIDING = {"datasets", "sentence-transformers", "evaluate", "trl", "setfit", "mteb"}  # break beside our datasets.py

MAX_FILE_BYTES = 1_000_000


def tracked() -> list[Path]:
    """Files of the project: what git tracks, and what it would not ignore."""
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout
    return sorted({ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()})


def python_files() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def modules() -> dict[str, str]:
    """Source of each module of the product by its dotted name."""
    return {module_name(path): path.read_text("utf-8") for path in product_files()}


# ---- imports: those within the package are import-linter's (pyproject.toml) ---------------------------------------

COMMANDS = {"run_training", "download_datasets", "evaluate", "search"}
# what of the package each may use
BELOW = {"model": {"blocks", "config", "errors", "checkpoint", "files", "inference", "inputs", "memory", "towers"},
         "datasets": {"config", "errors", "checkpoint", "files", "sets", "data", "memory"}}


def root_problems(name: str, source: str) -> list[str]:
    """Imports that a file of the root, or of the package (by its dotted name), may not have."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if not node.level else ["."]
        for imported in names:
            top, _, rest = imported.partition(".")
            part = rest.split(".")[0]
            if top in COMMANDS or top == "" or (name in BELOW and top in BELOW):
                found.append(f"{name} may not import {top or 'relatively'}")
            elif name in BELOW and top == "trimodal" and part not in BELOW[name]:
                found.append(f"{name} may not import trimodal.{part}")
    return found


def test_root_files_import_downwards() -> None:
    assert [problem for name, source in modules().items() for problem in root_problems(name, source)] == []


@pytest.mark.parametrize(("name", "source", "problem"), [
    ("model", "def f():\n    from trimodal.training import planner", "model may not import trimodal.training"),
    ("datasets", "import model", "datasets may not import model"),
    ("trimodal.files", "from run_training import parse", "trimodal.files may not import run_training"),
    ("trimodal.files", "from . import config", "trimodal.files may not import relatively"),
])
def test_root_gate_can_fail(name: str, source: str, problem: str) -> None:
    assert root_problems(name, source) == [problem]


def imports_on_top(source: str) -> set[str]:
    """Top-level names of the packages that `source` imports outside functions."""
    nodes = list(_outside_functions(ast.parse(source)))
    return ({alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)})


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        only_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not only_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _outside_functions(node)


def test_optional_packages_are_imported_where_needed() -> None:
    assert {name: found for name, source in modules().items() if name not in PROGRAMS
            and (found := imports_on_top(source) & ONLY_WHERE_NEEDED)} == {}
    assert imports_on_top("if True:\n    import av.codec\ndef f():\n    import py7zr") == {"av"}


# ---- what an import does -----------------------------------------------------------------------------------------

# Imports one module after the other with torch loaded, and prints what each import changed.
WATCH_IMPORTS = r"""
import contextlib, io, json, logging, os, sys, warnings
import numpy, torch
sys.path[:0] = folders = sys.argv[1].split(os.pathsep)

def names():  # caches of tools come and go beside the modules
    beside = [sorted(n for n in os.listdir(folder) if n[0] != "." and n != "__pycache__") for folder in folders]
    return [sorted(os.listdir(".")), *beside]

def state():
    return {"printed": printed.getvalue(), "files": names(), "environment": dict(os.environ),
            "threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()),
            "device": str(torch.get_default_device()), "grad": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.benchmark,
            "seed": torch.initial_seed(), "random": numpy.random.get_state()[1].tolist(),
            "torch_random": torch.get_rng_state().tolist(), "sharing": torch.multiprocessing.get_sharing_strategy(),
            "logging": [logging.root.level, len(logging.root.handlers)], "warnings": len(warnings.filters)}

results = {}
for name in sys.argv[2:]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        before = state()
        try:
            __import__(name)
            after = state()
            results[name] = [key for key in before if before[key] != after[key]]
        except Exception:
            results[name] = ["it raised"]
print(json.dumps(results))
"""
BAD_MODULES = {
    "prints": "print(1)", "writes": "open('left', 'w').close()",
    "writes_beside": "open(__file__ + '.txt', 'w').close()", "seeds": "import torch; torch.manual_seed(1)",
    "threads": "import torch; torch.set_num_threads(torch.get_num_threads() + 1)", "breaks": "1 / 0"}


@pytest.fixture(scope="module")
def effects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the import of each module changes, and that of the bad ones."""
    folder = tmp_path_factory.mktemp("bad")
    for name, source in BAD_MODULES.items():
        (folder / f"{name}.py").write_text(source)
    (folder / "cwd").mkdir()
    names = [*modules(), *BAD_MODULES]
    run = subprocess.run([sys.executable, "-B", "-c", WATCH_IMPORTS, f"{ROOT}{os.pathsep}{folder}", *names],
                         cwd=folder / "cwd", capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_a_module_changes_nothing(effects: dict[str, list[str]]) -> None:
    assert {name: changed for name, changed in effects.items() if changed and name not in BAD_MODULES} == {}
    assert modules().keys() <= effects.keys()


def test_import_effects_gate_can_fail(effects: dict[str, list[str]]) -> None:
    assert {name: effects[name][0] for name in BAD_MODULES} == {
        "prints": "printed", "writes": "files", "writes_beside": "files", "seeds": "seed", "threads": "threads",
        "breaks": "it raised"}


# Imports modules and runs scripts with --help, and prints which of them first loaded torch, and each script's help.
WATCH_TORCH = r"""
import contextlib, io, json, runpy, sys
loaded, helps = {}, {}
for name in sys.argv[1:]:
    said = io.StringIO()
    if name.endswith(".py"):
        sys.argv = [name, "--help"]
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            runpy.run_path(name, run_name="__main__")
        helps[name] = said.getvalue()
    else:
        __import__(name)
    loaded[name] = sys.modules.pop("torch", None) is not None
print(json.dumps([loaded, helps]))
"""
FLAGS = {
    "run_training.py": "--data-root --output-dir --model-size --batch-size --epochs --lr --resume --config --datasets"
                       " --device --plan --doctor --overwrite",
    "download_datasets.py": "--datasets --data-root --skip-existing",
    "evaluate.py": "--checkpoint --datasets"}


def loading_torch(names: Iterable[str], cwd: Path) -> tuple[dict[str, bool], dict[str, str]]:
    """Whether each module, and each script with --help, is the first to load torch; and what the scripts print."""
    run = subprocess.run([sys.executable, "-c", WATCH_TORCH, *names], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)[0], json.loads(run.stdout)[1]


def test_light_modules_and_help_load_no_torch_and_help_names_every_flag() -> None:
    loaded, helps = loading_torch([*WITHOUT_TORCH, *FLAGS], ROOT)
    assert loaded == dict.fromkeys([*WITHOUT_TORCH, *FLAGS], False)
    for script, flags in FLAGS.items():
        text = helps[script]
        assert [flag for flag in flags.split() if not re.search(rf"^ +(-\w, )?{flag}\b", text, re.MULTILINE)] == []


def test_torch_gate_can_fail(tmp_path: Path) -> None:
    for name, source in {"torch": "", "light": "", "heavy": "import torch", "late.py": "import heavy, torch"}.items():
        (tmp_path / f"{name.removesuffix('.py')}.py").write_text(source)
    assert loading_torch(["light", "heavy", "late.py"], tmp_path)[0] == {"light": False, "heavy": True, "late.py": True}


# ---- size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "is_linted"), [("data/x.py", False), ("outputs/x.py", False),
                                                 ("trimodal/data/x.py", True), ("tests/data/x.py", True)])
def test_folders_of_the_root_alone_are_left_out_of_the_checks(name: str, is_linted: bool) -> None:
    ruff = subprocess.run([sys.executable, "-m", "ruff", "check", "--force-exclude", "--stdin-filename", name, "-"],
                          cwd=ROOT, input="import os\n", capture_output=True, text=True, check=False)
    assert (ruff.returncode == 1) == is_linted, ruff.stderr
    [excluded] = re.findall(r"^exclude = (\[.*\])$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert any(re.search(pattern, name) for pattern in json.loads(excluded)) != is_linted, "mypy's"


def test_commands_parse_call_and_return() -> None:
    """What they do stands in the package."""
    assert {name: lines for name in sorted(COMMANDS) if (ROOT / f"{name}.py").exists()
            and (lines := (ROOT / f"{name}.py").read_text("utf-8").count("\n")) >= 150} == {}


def test_every_command_ends_well_where_its_output_cannot_be_written() -> None:
    """They all go through the one function that sees to it. model.py's lines are those of a module."""
    started = {path.relative_to(ROOT).as_posix(): end[1].strip() for path in product_files()
               if len(end := path.read_text("utf-8").split('if __name__ == "__main__":\n')) == 2}
    assert {name for name, end in started.items() if end != "sys.exit(exit_code(main))"} == {
        "model.py", "trimodal/export/example.py"} and len(started) == 8


def test_no_large_file() -> None:
    assert [str(path) for path in tracked() if path.stat().st_size > MAX_FILE_BYTES] == []


# ---- the name `datasets` -----------------------------------------------------------------------------------------


def closure(requirements: Iterable[str], needs: Callable[[str], list[str] | None]) -> set[str]:
    """Canonical names of all distributions that `requirements` pull in here, installed or not."""
    found: set[str] = set()
    waiting = [(line, "") for line in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        new = name not in found
        found.add(name)
        extras = [*requirement.extras] + ([""] if new else [])
        waiting += [(line, extra) for extra in extras for line in needs(name) or []]
    return found


def requirement_lines(name: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text("utf-8").splitlines()]
    return [line for line in lines if line]


def installed_needs(name: str) -> list[str] | None:
    try:
        return importlib.metadata.requires(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_no_dependency_collides_with_our_datasets() -> None:
    names = closure(requirement_lines("requirements.txt") + requirement_lines("requirements-dev.txt"), installed_needs)
    assert {"torch", "transformers", "numpy"} <= names
    assert names & COLLIDING == set()
    assert importlib.metadata.packages_distributions().get("datasets", []) == []


def test_closure_gate_can_fail() -> None:
    needs = {"a": ['b; python_version >= "3"', 'datasets; extra == "hub"', 'c; python_version < "3"'], "b": ["a[hub]"]}
    assert closure(["a"], needs.get) == {"a", "b", "datasets"}
    assert closure(["a"], {"a": needs["a"]}.get) == {"a", "b"}


def test_datasets_is_ours() -> None:
    spec = importlib.util.find_spec("datasets")
    assert spec is not None and spec.origin is not None and Path(spec.origin) == ROOT / "datasets.py"


def bound_names(source: str) -> set[str]:
    tree = ast.parse(source)
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {alias.asname or alias.name for node in ast.walk(tree)
                    if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}


def test_datasets_binds_no_name_of_the_hub_library() -> None:
    taken = {"Dataset", "IterableDataset", "DatasetDict", "load_dataset"}
    assert bound_names(modules()["datasets"]) & taken == set()
    assert bound_names("from torch.utils.data import Dataset") & taken == {"Dataset"}


# ---- words -------------------------------------------------------------------------------------------------------

CPU_INDEX = "download" + ".pytorch.org"
FORBIDDEN = {
    "a host of a package registry": "|".join(re.escape(host) for host in (
        "py" + "pi.org", "python" + "hosted.org", CPU_INDEX, "registry." + "npmjs", "deb." + "debian.org",
        "archive." + "ubuntu.com", "crates" + ".io", "conda" + ".anaconda.org", "proxy." + "golang.org")),
    "a path of one machine": r"(?<![\w.~/-])/" + r"(?:work|root|home/\w+|Users/\w+)(?:/|\b(?![\w.-]))",
    "a document that is not in the project": r"\bDES" + r"IGN\b|\bCONT" + r"RACT\.md|\bshared" + "/",
    "an exported PYTHONPATH": r"export +(?:\w+=\S* +)*PYTHON" + "PATH",
}


def word_problems(name: str, text: str) -> list[str]:
    return [f"{name}: {what}: {found.group()}" for what, pattern in FORBIDDEN.items()
            for found in re.finditer(pattern, text)
            if (name, found.group()) != ("setup_environment.sh", CPU_INDEX)]


def texts() -> Iterator[tuple[str, str]]:
    for path in tracked():
        try:
            yield str(path.relative_to(ROOT)), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a picture


def test_no_forbidden_words() -> None:
    assert [problem for name, text in texts() for problem in word_problems(name, text)] == []


@pytest.mark.parametrize("text", [
    f"see https://{CPU_INDEX}/whl", "https://py" + "pi.org/simple", "cd /wo" + "rk/main", "('/ro" + "ot')",
    "as DES" + "IGN 2 says", "export PYTHON" + "PATH=."])
def test_word_gate_can_fail(text: str) -> None:
    assert len(word_problems("README.md", text)) == 1


def test_word_gate_lets_other_words_be() -> None:
    assert word_problems("README.md", "frame/work, ./work, a network/root, rooted, https://x.org/work/1, design") == []
    assert word_problems("setup_environment.sh", f"https://{CPU_INDEX}/whl/cpu") == []
