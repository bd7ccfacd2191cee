"""Quality gates over the files of the project. Each gate is a function over sources, proved able to fail here too."""

import ast
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {module: set(others.split()) for module, others in {
    # settings and samples
    "strict_yaml": "", "checks": "", "config": "checks strict_yaml", "redaction": "", "arguments": "redaction",
    "openmp": "", "samples": "",
    "synthetic": "config samples", "same_files": "samples synthetic",
    "columns": "config media", "written_lists": "", "listed_files": "same_files",
    "manifest": "columns config listed_files samples splits written_lists",
    "splits": "same_files samples synthetic",
    "voxceleb": "inventory",
    "readers": "annotations config inventory media samples manifest synthetic voxceleb",
    "concepts": "config samples", "vocabulary": "config", "mirroring": "samples",
    "wording": "batches samples vocabulary",
    # pictures and sounds
    "media": "", "videos": "media", "tracks": "media sound_files", "sound_files": "", "metadata": "",
    "images": "config media metadata videos", "audio": "config media tracks", "workers": "config",
    "bad_samples": "config samples", "partial_fills": "",
    "prepare": "config samples images audio tracks synthetic files workers bad_samples partial_fills",
    "batches": "config samples images prepare vocabulary workers",
    "datasets": "config samples readers vocabulary concepts mirroring prepare batches workers bad_samples same_files "
                "splits",
    # mathematics
    "inputs": "config", "model": "config footprint checkpoint inputs",
    "steps": "distributed", "losses": "steps", "metrics": "",
    "optimization": "config steps",
    # the machine
    "shapes": "", "footprint": "shapes", "memory": "config", "budget": "config files footprint memory",
    "checkpoint": "files",
    "distributed": "config",
    # what a run writes
    "files": "", "plots": "", "report": "plots files redaction", "tracking": "files redaction",
    "outputs": "checkpoint files tracking",
    # runs
    "trials": "config",
    "protocols": "config datasets metrics memory splits trials",
    "planning": "config model datasets steps losses memory budget footprint shapes optimization",
    "runs": "config model datasets vocabulary memory checkpoint files distributed tracking report protocols "
            "redaction outputs splits",
    "resume": "config checkpoint runs tracking redaction", "interruption": "", "saving": "checkpoint interruption runs",
    "alarms": "",
    "stages": "config datasets steps losses checkpoint distributed optimization planning runs samples alarms",
    "forecast": "budget config datasets distributed memory planning samples stages vocabulary",
    "faults": "alarms arguments openmp redaction config datasets model steps losses checkpoint optimization runs "
              "stages",
    "training": "config datasets steps losses memory budget distributed optimization planning protocols runs stages "
                "faults fits interruption resume saving",
    "fits": "budget config memory planning runs stages",
    "run_training": "arguments config forecast interruption openmp training redaction doctor",
    "evaluate": "arguments config model datasets vocabulary metrics memory planning report protocols redaction files "
                "openmp",
    # what a run needs, tried before it starts
    "findings": "config memory", "environment": "config findings images audio vocabulary",
    "inspection": "config findings fits files images tracks workers datasets readers prepare protocols memory budget "
                  "model optimization planning resume runs saving stages wording",
    "rehearsal": "config findings inspection batches datasets prepare losses steps memory budget model planning "
                 "resume runs stages tracking training",
    "doctor": "config findings environment inspection rehearsal runs interruption redaction",
    # getting data
    "sources": "", "progress": "", "members": "", "pipeline": "", "annotations": "media",
    "answers": "", "arrivals": "files", "transfer": "answers arrivals config files progress redaction",
    "debian": "arrivals files transfer",
    "inventory": "files", "local_copies": "annotations config inventory media sources",
    "remote": "answers members transfer",
    "sampling": "annotations sources",
    "zip_stream": "members", "tar_stream": "members", "shards": "config members",
    "seven_zip": "config members progress remote",
    "archives": "config files members progress remote seven_zip shards tar_stream zip_stream",
    "staging": "config files sources",
    "selection": "redaction sources transfer",
    "holdings": "annotations config files inventory local_copies selection sources transfer",
    "local_files": "config local_copies selection sources transfer",
    "readiness": "annotations inventory redaction selection voxceleb",
    "clips": "annotations config files media pipeline selection transfer",
    "acquisition": "annotations archives arrivals clips config debian files holdings inventory local_copies "
                   "local_files members pipeline readiness redaction remote sampling selection sources staging "
                   "transfer",
    "verification": "acquisition archives images inventory media pipeline readiness selection sources "
                    "tracks transfer",
    "overview": "acquisition files redaction selection sources verification",
    "download_datasets": "acquisition annotations arguments config files overview redaction selection sources "
                         "transfer verification",
}.items()}
WITHOUT_TORCH = ("config", "arguments", "openmp", "redaction", "report", "sources", "transfer", "archives",
                 "download_datasets", "run_training", "evaluate", "doctor", "environment", "findings")
ONLY_WHERE_NEEDED = {"matplotlib", "av", "soundfile", "transformers", "py7zr", "pyarrow", "yt_dlp",
                     "requests"}  # inside functions, never on top
COLLIDING = {"datasets", "sentence-transformers", "evaluate", "trl", "setfit", "mteb"}  # break beside our datasets.py

MAX_FUNCTION, MAX_MEDIAN_FUNCTION, MAX_FILE, MAX_PARAMETERS = 60, 15, 500, 6  # lines; a count
MAX_FILE_BYTES = 1_000_000


def tracked() -> list[Path]:
    """Files of the project: what git tracks, and what it would not ignore."""
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout
    return sorted({ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()})


def python_files() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def modules() -> dict[str, str]:
    """Source of each top-level module by name."""
    return {path.stem: path.read_text("utf-8") for path in python_files() if path.parent == ROOT}


# ---- imports -----------------------------------------------------------------------------------------------------


def imports(source: str, *, on_top: bool = False) -> set[str]:
    """Top-level names that `source` imports, inside functions and by name in a string too unless `on_top`."""
    names = set()
    for node in (_outside_functions(ast.parse(source)) if on_top else ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value.split(".")[0] for arg in node.args[:1]
                      if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        only_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not only_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _outside_functions(node)


def import_problems(sources: dict[str, str]) -> list[str]:
    graph = {name: imports(source) & (sources.keys() | {"."}) - {name} for name, source in sources.items()}
    found = [f"{name} is not in the table of modules" for name in sources if name not in MAY_IMPORT]
    found += [f"{name} may not import {other}" for name, others in graph.items()
              for other in sorted(others - MAY_IMPORT.get(name, others))]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {' <- '.join(error.args[1])}")
    return found


def test_imports_follow_the_table() -> None:
    assert import_problems(modules()) == []


def test_table_names_only_modules_that_exist() -> None:
    assert MAY_IMPORT.keys() == modules().keys()


def test_table_has_no_cycle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()


@pytest.mark.parametrize(("sources", "expected"), [
    ({"losses": "def f():\n    import model", "model": ""}, "losses may not import model"),
    ({"losses": "from model import x", "model": ""}, "losses may not import model"),
    ({"losses": "import importlib\nimportlib.import_module('model')", "model": ""}, "losses may not import model"),
    ({"losses": "from . import model", "model": ""}, "losses may not import ."),
    ({"utils": ""}, "utils is not in the table of modules"),
    ({"new": "import other", "other": "import new"}, "cycle: new <- other <- new"),
])
def test_import_gate_can_fail(sources: dict[str, str], expected: str) -> None:
    assert expected in import_problems(sources)


def test_optional_packages_are_imported_where_needed() -> None:
    assert {name: found for name, source in modules().items()
            if (found := imports(source, on_top=True) & ONLY_WHERE_NEEDED)} == {}
    assert imports("if True:\n    import av.codec\ndef f():\n    import py7zr", on_top=True) == {"av"}


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
    """What the import of each module changes, and that of the bad ones: each after those that it imports, so that what
    is found is its own."""
    folder = tmp_path_factory.mktemp("bad")
    for name, source in BAD_MODULES.items():
        (folder / f"{name}.py").write_text(source)
    (folder / "cwd").mkdir()
    names = [*TopologicalSorter(MAY_IMPORT).static_order(), *BAD_MODULES]
    run = subprocess.run([sys.executable, "-B", "-c", WATCH_IMPORTS, f"{ROOT}{os.pathsep}{folder}", *names],
                         cwd=folder / "cwd", capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_a_module_changes_nothing(effects: dict[str, list[str]]) -> None:
    assert {name: changed for name, changed in effects.items() if changed and name not in BAD_MODULES} == {}
    assert MAY_IMPORT.keys() <= effects.keys()


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


@functools.cache
def functions(source: str) -> tuple[tuple[str, int, int], ...]:
    """(name, lines, parameters without self and cls) of every function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(p.arg not in ("self", "cls") for p in parameters)
            found.append((node.name, (node.end_lineno or node.lineno) - node.lineno + 1, count))
    return tuple(found)


def size_problems(name: str, source: str) -> list[str]:
    lines = source.count("\n") + (not source.endswith("\n"))
    found = [f"{name}: {lines} lines"] if lines > MAX_FILE else []
    found += [f"{name}: {function} has {length} lines" for function, length, _ in functions(source)
              if length > MAX_FUNCTION]
    return found + [f"{name}: {function} has {count} parameters" for function, _, count in functions(source)
                    if count > MAX_PARAMETERS]


def test_files_and_functions_are_short() -> None:
    assert [p for path in python_files()
            for p in size_problems(str(path.relative_to(ROOT)), path.read_text("utf-8"))] == []


def test_most_functions_are_very_short() -> None:
    lengths = [length for source in modules().values() for _, length, _ in functions(source)]
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION


def test_size_gate_can_fail() -> None:
    long = "def f(a, b, c, d, e, g, h):\n" + "    pass\n" * MAX_FUNCTION
    assert size_problems("x", long) == ["x: f has 61 lines", "x: f has 7 parameters"]
    assert size_problems("x", "\n" * 501) == ["x: 501 lines"]
    assert size_problems("x", "def f(self, a, b, c, d, e, g):\n" + "    pass\n" * (MAX_FUNCTION - 1)) == []


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
