"""Every command bounds how long OpenMP's threads wait, before torch is loaded and unless the user has chosen."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import ROOT
from tests.refusals import assert_names
from trimodal import openmp

COMMANDS = {  # with arguments at which they load torch; the others load it on top, if at all
    "run_training.py": [["--datasets", "synthetic"], ["--plan"], ["--plan", "--json"], ["--doctor"]],
    "evaluate.py": [["--checkpoint", "none.pt"]],
    "search.py": [["index", "none", "--checkpoint", "none.pt"], ["query", "a dog", "--json"], ["serve"]],
    "download_datasets.py": [["--datasets", "stamps", "--dry-run"], ["--datasets", "stamps", "--status"]]}
COMPUTE_NOTHING = {"model.py", "benchmarks/suite.py"}  # count parameters; start the tests, which choose themselves

# In the place of torch: what is set as it is loaded goes to a file, and the process ends.
TORCH = """import os
with open(os.environ["LOADED"], "w") as file:
    print(*(f"{name}={os.environ.get(name)}" for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")), file=file)
os._exit(7)
"""


def scripts() -> list[str]:
    """All files that are commands, from the root."""
    found = [path for folder in (".", "benchmarks") for path in (ROOT / folder).glob("*.py")
             if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
                    for node in ast.parse(path.read_text("utf-8")).body)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def as_torch_loads(folder: Path, *command: str, **own: str) -> tuple[str | None, str, str]:
    """What is set when `command` loads torch (None: it does not), and what it has printed by then."""
    (folder / "beside").mkdir(exist_ok=True)
    (folder / "beside" / "torch.py").write_text(TORCH)
    environment = {name: value for name, value in os.environ.items() if name not in openmp.OWN}
    environment |= {"PYTHONPATH": str(folder / "beside"), "PYTHONUNBUFFERED": "1", "LOADED": str(folder / "loaded")}
    environment |= own
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    loaded = folder / "loaded"
    assert (run.returncode == 7) == loaded.exists(), run.stderr
    return loaded.read_text() if loaded.exists() else None, run.stdout, run.stderr


CASES = [(script, arguments) for script in scripts() if script not in COMPUTE_NOTHING
         for arguments in COMMANDS.get(script, [["--help"]])]


@pytest.mark.parametrize(("script", "arguments"), CASES, ids=[" ".join([name, *words]) for name, words in CASES])
def test_a_command_has_bounded_the_waiting_when_it_loads_torch(tmp_path: Path, script: str,
                                                              arguments: list[str]) -> None:
    folder = ["--output-dir", str(tmp_path / "run")] if script == "run_training.py" else []
    set_now, out, err = as_torch_loads(tmp_path, script, *arguments, *folder)
    if set_now is None:
        assert script.startswith(("benchmarks/", "download_datasets")), "it computes, so it has to load torch"
        return
    assert set_now == "GOMP_SPINCOUNT=2000 KMP_BLOCKTIME=1\n"
    if arguments[0] in ("--plan", "query", "serve"):
        assert out + err == "", "a plan or an answer, and nothing else"
        return
    said = [line for line in out.splitlines() if line.startswith("OpenMP: ")]
    assert len(said) == 1
    assert_names(said[0], "GOMP_SPINCOUNT=2000", "KMP_BLOCKTIME=1", *openmp.OWN)


def test_the_gate_sees_a_command_that_loads_torch_first(tmp_path: Path) -> None:
    late = tmp_path / "late.py"
    late.write_text("import torch\nfrom openmp import bound_waiting\nbound_waiting()\n")
    assert as_torch_loads(tmp_path, str(late))[0] == "GOMP_SPINCOUNT=None KMP_BLOCKTIME=None\n"
    assert {"run_training.py", "evaluate.py", "benchmarks/plans.py"} <= set(scripts())


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE"),
                                             ("KMP_BLOCKTIME", "infinite")])
def test_what_the_user_has_chosen_stays(tmp_path: Path, name: str, value: str) -> None:
    set_now, out, _ = as_torch_loads(tmp_path, "evaluate.py", "--checkpoint", "none.pt", **{name: value})
    own = {"GOMP_SPINCOUNT": None, "KMP_BLOCKTIME": None, name: value}
    assert set_now == f"GOMP_SPINCOUNT={own['GOMP_SPINCOUNT']} KMP_BLOCKTIME={own['KMP_BLOCKTIME']}\n" and out == ""


def test_of_several_processes_all_bound_it_and_the_first_says_so(tmp_path: Path) -> None:
    for rank, says in (("0", 1), ("1", 0)):
        set_now, out, _ = as_torch_loads(tmp_path, "evaluate.py", "--checkpoint", "none.pt", RANK=rank)
        assert set_now is not None and "GOMP_SPINCOUNT=2000" in set_now and out.count("OpenMP: ") == says


def test_nothing_is_claimed_once_torch_is_loaded() -> None:
    """It has read its variables by then."""
    said: list[str] = []
    environment: dict[str, str] = {}
    assert "torch" in sys.modules or __import__("torch")
    openmp.bound_waiting(said.append, environment)
    assert said == [] and environment == {}
