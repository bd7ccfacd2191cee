"""The shell scripts: lint, flags, decisions of the set-up, and what run_all.sh hands to whom.

Nothing is installed or downloaded here: the set-up is asked what it would do, and run_all.sh runs in a folder whose
other scripts only record how they were called.
"""

import functools
import http.server
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("setup_environment.sh", "run_all.sh", "tests/run.sh", ".ci/run")
NOBODY = "http://127.0.0.1:9/"  # the discard port: refuses at once


def bash(script: str | Path, *arguments: str, cwd: Path = ROOT,
         env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("TORCH_VERSION", "VENV_DIR", "PYTHON")}
    return subprocess.run(["bash", str(script), *arguments], cwd=cwd, env=clean | dict(env or {}), capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)


def executable(path: Path, commands: str) -> Path:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def roomy_disk(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `df` that finds 90 GB free: what the set-up decides here must not depend on the disk of the machine."""
    folder = tmp_path_factory.mktemp("disk")
    executable(folder / "df", "echo header\necho disk 9 9 94371840 9% /")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script: str) -> None:
    assert subprocess.run(["bash", "-n", script], cwd=ROOT).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    run = subprocess.run([shellcheck, script], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stop_at_the_first_failure(script: str) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text("utf-8")


@pytest.mark.parametrize(("script", "words"), [
    ("setup_environment.sh", ["--dev", "--torch-version", "--dry-run", "Disk:", "Time:", "Network:"]),
    ("run_all.sh", ["--demo", "--model-size", "--batch-size", "--epochs", "--datasets", "--data-root", "Time:"])])
def test_help(script: str, words: list[str], tmp_path: Path) -> None:
    run = bash(ROOT / script, "--help", cwd=tmp_path)
    assert run.returncode == 0 and [word for word in words if word not in run.stdout] == []
    assert "set -euo" not in run.stdout and os.listdir(tmp_path) == []


# ---- setup_environment.sh ----------------------------------------------------------------------------------------


def plan(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the set-up would do for an environment that does not exist, on a machine without nvidia-smi."""
    return bash("setup_environment.sh", "--dry-run", *arguments,
                env={"VENV_DIR": str(folder / "none"), "PATH": path_without_gpu(folder), **variables})


def path_without_gpu(folder: Path) -> str:
    """A PATH of links to the few commands that the script needs."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "df", "awk", "sed", "grep", "cat", "timeout"):
        if not (tools / name).exists():
            (tools / name).symlink_to(str(shutil.which(name)))
    if not (tools / "python3").exists():
        executable(tools / "python3", f'exec "{sys.executable}" "$@"')
    return str(tools)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """A package index on this machine that lists torch."""
    (tmp_path / "index" / "torch").mkdir(parents=True)
    (tmp_path / "index" / "torch" / "index.html").write_text("<html></html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_cpu_index_is_taken_where_it_answers(tmp_path: Path, index: str) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL=index, no_proxy="127.0.0.1")
    assert run.returncode == 0
    assert f"torch from the cpu index: there is no NVIDIA GPU, and {index} answers" in run.stdout
    assert "needs about 2 GB of disk" in run.stdout and "would install now" in run.stdout


def test_an_index_without_torch_is_no_answer(tmp_path: Path, index: str) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL=f"{index}/other", no_proxy="127.0.0.1")
    assert "torch from the default index" in run.stdout


def test_unreachable_cpu_index_falls_back_and_says_so(tmp_path: Path) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL=NOBODY, no_proxy="127.0.0.1")
    assert run.returncode == 0
    assert f"torch from the default index: there is no NVIDIA GPU, but {NOBODY} gave no answer" in run.stdout
    assert "needs about 7 GB of disk" in run.stdout


def test_a_silent_index_is_given_up(tmp_path: Path) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        run = plan(tmp_path, TORCH_INDEX_URL=f"http://127.0.0.1:{silent.server_address[1]}", no_proxy="127.0.0.1")
    assert "torch from the default index" in run.stdout and "gave no answer within 5 s" in run.stdout


def test_empty_index_asks_nobody(tmp_path: Path) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL="")
    assert "torch from the default index: there is no NVIDIA GPU, and TORCH_INDEX_URL is empty" in run.stdout


def test_a_password_of_the_index_is_not_shown(tmp_path: Path) -> None:
    assert "secret" not in plan(tmp_path, TORCH_INDEX_URL="http://me:secret@127.0.0.1:9/").stdout


def test_gpu_takes_the_default_index(tmp_path: Path, index: str) -> None:
    smi = executable(Path(path_without_gpu(tmp_path)) / "nvidia-smi", "echo 'GPU 0: Some Card (UUID: 1)'")
    assert "torch from the default index: there is an NVIDIA GPU" in plan(tmp_path, TORCH_INDEX_URL=index).stdout
    executable(smi, "echo 'No devices were found' >&2; exit 6")
    assert "torch from the cpu index" in plan(tmp_path, TORCH_INDEX_URL=index, no_proxy="127.0.0.1").stdout


def test_dry_run_leaves_nothing(tmp_path: Path) -> None:
    plan(tmp_path, TORCH_INDEX_URL="")
    assert os.listdir(tmp_path) == ["tools"]


@pytest.mark.parametrize(("arguments", "shown"), [
    (["--torch-version", "2.11"], "torch 2.11.0 from"), (["--torch-version=2.14.1"], "torch 2.14.1 from")])
def test_torch_version(tmp_path: Path, arguments: list[str], shown: str) -> None:
    assert shown in plan(tmp_path, *arguments, TORCH_INDEX_URL="").stdout
    assert shown in plan(tmp_path, TORCH_INDEX_URL="", TORCH_VERSION=arguments[-1].split("=")[-1]).stdout


@pytest.mark.parametrize(("arguments", "shown"), [
    (["--cuda"], "unknown flag '--cuda'; known: --dev"), (["extra"], "unknown flag 'extra'"),
    (["--torch-version"], "is no version"), (["--torch-version", "newest"], "'newest' is no version")])
def test_setup_mistakes(arguments: list[str], shown: str) -> None:
    run = bash("setup_environment.sh", *arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert shown in run.stderr and run.stderr.count("\n") == 1


def test_no_fitting_python(tmp_path: Path) -> None:
    old = executable(tmp_path / "python3", "exit 1")
    run = plan(tmp_path, PYTHON=f"{old} python-that-is-not-there")
    assert run.returncode == 2 and "needs Python 3.10 to 3.13" in run.stderr and run.stderr.count("\n") == 1


def test_a_python_without_venv_is_named(tmp_path: Path) -> None:
    bare = executable(tmp_path / "bare", f'case "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"')
    run = plan(tmp_path, PYTHON=str(bare))
    assert run.returncode == 2 and f"{bare} has no venv module" in run.stderr


def test_a_full_disk_is_told_before_the_download(tmp_path: Path) -> None:
    executable(tmp_path / "df", "echo header\necho disk 9 9 3145728 9% /")  # 3 GB free
    run = plan(tmp_path, TORCH_INDEX_URL="", PATH=f"{tmp_path}:{path_without_gpu(tmp_path)}")
    assert run.returncode == 2 and "has 3 GB free" in run.stdout and "not enough disk" in run.stderr


def test_a_folder_with_other_things_is_not_emptied(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter").write_text("x")
    run = bash("setup_environment.sh", env={"VENV_DIR": str(precious), "TORCH_INDEX_URL": ""})
    assert run.returncode == 2 and "holds other things" in run.stderr
    assert os.listdir(precious) == ["letter"]


def test_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    here = {"VENV_DIR": sys.prefix, "TORCH_INDEX_URL": NOBODY}
    if not (Path(sys.prefix) / "setup_environment.stamp").exists():
        pytest.skip("this environment was not made by setup_environment.sh")
    dry = bash(ROOT / "setup_environment.sh", "--dev", "--dry-run", cwd=tmp_path, env=here)
    assert "dry run: nothing to do" in dry.stdout, "requirements changed: run bash setup_environment.sh --dev"
    run = bash(ROOT / "setup_environment.sh", "--dev", cwd=tmp_path, env=here)
    assert run.returncode == 0 and run.stdout.startswith("setup: nothing to do") and run.stdout.count("\n") == 1
    other = bash("setup_environment.sh", "--dry-run", "--torch-version", "2.12.0", env=here)
    assert "torch 2.12.0 from the default index" in other.stdout and "would install now" in other.stdout


# ---- run_all.sh --------------------------------------------------------------------------------------------------

RECORD = """
import os, sys
with open("calls", "a") as calls:
    print(os.path.basename(__file__), *sys.argv[1:], file=calls)
"""


MAIN = 'if __name__ == "__main__":\n'
RECORD_AND_REPORT = """
    with open("calls", "a") as calls:
        print("run_training.py", *sys.argv[1:], file=calls)
    reports = Path(configuration(parse(sys.argv[1:])).paths.output_dir, "reports")
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "report_1.md").touch()
    sys.exit(0)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The real run_all.sh and modules, beside scripts that only record their arguments."""
    for path in (ROOT / "run_all.sh", ROOT / "config.yaml", *ROOT.glob("*.py")):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "setup_environment.sh").write_text("echo setup_environment.sh $* >>calls")
    ends = "sys.exit(1 if 'clotho' in sys.argv else 3 if 'audiocaps' in sys.argv else 0)"
    (tmp_path / "download_datasets.py").write_text(f"{RECORD}\n{ends}\n")
    training = (tmp_path / "run_training.py").read_text("utf-8")
    assert training.count(MAIN) == 1
    (tmp_path / "run_training.py").write_text(training.replace(MAIN, MAIN + RECORD_AND_REPORT))
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    executable(tmp_path / "venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    return tmp_path


def run_all(project: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    other = project / "elsewhere"
    other.mkdir(exist_ok=True)
    run = bash(project / "run_all.sh", *arguments, cwd=other)
    calls = project / "calls"
    return run, calls.read_text().splitlines() if calls.exists() else []


def test_run_all_hands_everything_on(project: Path) -> None:
    run, calls = run_all(project, "--model-size", "small", "--datasets", "coco", "stamps", "--data-root", "./d",
                         "--epochs=3", "training.seed=4")
    assert run.returncode == 0, run.stderr
    flags = "--model-size small --datasets coco stamps --data-root ./d --epochs=3 training.seed=4"
    assert calls == ["setup_environment.sh",
                     "download_datasets.py --datasets coco stamps --data-root ./d --skip-existing",
                     f"run_training.py {flags} --resume auto"]
    assert [line for line in run.stdout.splitlines() if "/5]" in line][::4] == [
        "run_all: [1/5] environment", "run_all: [5/5] done"]
    assert "./outputs/reports/report_1.md" in run.stdout
    assert "tensorboard --logdir=./outputs/logs/tensorboard" in run.stdout


def test_run_all_demo(project: Path) -> None:
    run, calls = run_all(project, "--demo", "--epochs", "2")
    assert run.returncode == 0, run.stderr
    assert calls[1:] == ["download_datasets.py --datasets stamps --data-root ./data --skip-existing",
                         "run_training.py --config recipes/demo.yaml --model-size tiny --epochs 2 --resume auto"]
    assert "./outputs/demo/reports/report_1.md" in run.stdout


def test_run_all_alone_stops_where_data_is_missing(project: Path) -> None:
    run, calls = run_all(project)
    assert run.returncode == 1
    assert calls == ["setup_environment.sh",
                     "download_datasets.py --datasets coco clotho audiocaps --data-root ./data --skip-existing"]


def test_run_all_goes_on_with_a_set_that_can_be_used_in_part(project: Path) -> None:
    run, calls = run_all(project, "--datasets", "audiocaps")
    assert run.returncode == 0 and "some files are not to be had any more" in run.stdout
    assert calls[-1] == "run_training.py --datasets audiocaps --resume auto"


@pytest.mark.parametrize("flags", [["--overwrite"], ["--resume", "auto"], ["--resume=auto"]])
def test_run_all_leaves_the_choice_of_a_start(project: Path, flags: list[str]) -> None:
    _, calls = run_all(project, "--datasets", "coco", *flags)
    assert calls[-1] == " ".join(["run_training.py --datasets coco", *flags])


@pytest.mark.parametrize("flag", ["--plan", "--doctor"])
def test_run_all_plan_and_doctor_fetch_nothing(project: Path, flag: str) -> None:
    run, calls = run_all(project, flag)
    assert run.returncode == 0 and calls == ["setup_environment.sh", f"run_training.py {flag}"]


@pytest.mark.parametrize(("arguments", "shown"), [
    (["--epoch", "3"], "unknown flag '--epoch'"), (["-x"], "unknown flag '-x'"),
    (["--epochs", "3", "--demo"], "--demo comes first"),
    (["--demo", "--config", "config.yaml"], "--demo brings its own --config")])
def test_run_all_refuses_flags_before_the_set_up(project: Path, arguments: list[str], shown: str) -> None:
    run, calls = run_all(project, *arguments)
    assert (run.returncode, calls) == (2, []) and shown in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "shown"), [
    (["--model-size", "huge"], "'huge'"), (["--epochs", "none"], "training.epochs"), (["training.epoch=3"], "'epochs'"),
    (["--datasets", "cocoa"], "'cocoa'"), (["--config", "none.yaml"], "no such file"), (["word"], "'word'")])
def test_run_all_refuses_values_before_the_download(project: Path, arguments: list[str], shown: str) -> None:
    run, calls = run_all(project, *arguments)
    assert (run.returncode, calls) == (2, ["setup_environment.sh"])
    assert shown in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "shown"), [
    (["--device", "tpu"], "--device: 'tpu' is not in this machine"),
    (["--resume", "none.pt"], "--resume: none.pt: no such checkpoint"),
    (["--overwrite", "--resume", "auto"], "--overwrite deletes the run that --resume would go on with"),
    (["--output-dir", "run_all.sh/out"], "run_all.sh/out: cannot be written (Not a directory)"),
    (["--output-dir", ""], "paths.output_dir: is empty"),
    (["--output-dir", "used", "--resume", "elsewhere.pt"], "used: holds an earlier run"),
    (["--datasets", "manifest", "data.manifest=none.jsonl"], "/none.jsonl: no such file"),
    (["--datasets", "manifest", "data.manifest=wrong.csv"], "wrong.csv, line 2: unknown column 'imgae'")])
def test_run_all_refuses_what_training_would_before_the_download(project: Path, arguments: list[str],
                                                                 shown: str) -> None:
    (project / "wrong.csv").write_text("imgae\na.png\n")
    (project / "used" / "checkpoints").mkdir(parents=True)
    (project / "used" / "checkpoints" / "checkpoint_epoch_1.pt").write_bytes(b"x")
    run, calls = run_all(project, *arguments)
    assert (run.returncode, calls) == (2, ["setup_environment.sh"])
    assert shown in run.stderr and run.stderr.count("\n") == 1


def test_run_all_knows_every_flag_of_training() -> None:
    run = subprocess.run([sys.executable, "run_training.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    flags = {word.strip("[],") for word in run.stdout.split() if word.strip("[]").startswith("--")} - {"--help"}
    source = (ROOT / "run_training.py").read_text("utf-8")
    assert len(flags) > 10 and [flag for flag in flags if f'"{flag}"' not in source] == []
