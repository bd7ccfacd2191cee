"""The shell scripts: lint, flags, decisions of the set-up, and what run_all.sh hands to whom.

Nothing is installed or downloaded here: the set-up is asked what it would do, or its pip only records what it was
asked for; run_all.sh runs in a folder whose scripts, and mostly whose Python, only record how they were called.
"""

import functools
import http.server
import os
import re
import shlex
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import search
from tests import constraints, trees
from tests.project import ROOT
from tests.refusals import assert_names, assert_told
from tests.search import things

SCRIPTS = ("setup_environment.sh", "run_all.sh", "tests/run.sh", ".ci/run", "benchmarks/gpu.sh")
MESSAGES = "trimodal/messages.sh"
NOBODY = "http://127.0.0.1:9/"  # the discard port: refuses at once
Done = subprocess.CompletedProcess[str]


def bash(script: str | Path, *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Done:
    own = ("TORCH_VERSION", "VENV_DIR", "PYTHON", "PROBE_S", "LATEST")
    clean = {key: value for key, value in os.environ.items() if key not in own}
    return subprocess.run(["bash", str(script), *arguments], cwd=cwd, env=clean | dict(env or {}), capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)


def executable(path: Path, commands: str) -> Path:
    path.write_text(f"#!/bin/sh\n{commands}\n")
    path.chmod(0o755)
    return path


def names(text: str, *named: str | int | Path) -> bool:
    """Whether one line of `text` names all of these, each as a whole word."""
    return any(all(re.search(rf"(?<!\w){re.escape(str(one))}(?!\w)", line) for one in named)
               for line in text.splitlines())


def assert_refused(run: Done, *named: str | int | Path) -> None:
    """Exit code 2 and one line on stderr that names all of these."""
    assert run.returncode == 2, run.stderr
    assert_names(run.stderr.removesuffix("\n"), *named)


@pytest.fixture(autouse=True)
def roomy_disk(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `df` that finds 90 GB free: what the set-up decides here must not depend on the disk of the machine."""
    folder = tmp_path_factory.mktemp("disk")
    executable(folder / "df", "echo header\necho disk 9 9 94371840 9% /")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize("script", [*SCRIPTS, MESSAGES])
def test_scripts_are_clean(script: str) -> None:
    assert subprocess.run(["bash", "-n", script], cwd=ROOT).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    run = subprocess.run([shellcheck, script], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")
    assert os.access(ROOT / script, os.X_OK) == (script != MESSAGES), "which is not run, but read"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stop_at_the_first_failure(script: str) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text("utf-8")


@pytest.mark.parametrize(("script", "words"), [
    ("setup_environment.sh", ["--dev", "--latest", "--torch-version", "--dry-run", "Disk:", "Time:", "Network:"]),
    ("run_all.sh", ["--demo", "--model-size", "--batch-size", "--epochs", "--datasets", "--data-root", "Time:"])])
def test_help(script: str, words: list[str], tmp_path: Path) -> None:
    run = bash(ROOT / script, "--help", cwd=tmp_path)
    assert run.returncode == 0 and [word for word in words if word not in run.stdout] == []
    assert "set -euo" not in run.stdout and os.listdir(tmp_path) == []


# ---- what they say -----------------------------------------------------------------------------------------------


def sentences() -> dict[str, tuple[str, str]]:
    """English and Chinese by key."""
    rows = re.findall(r"""^        (\w+)\)\n +en=(["'])(.*)\2\n +zh=(["'])(.*)\4 ;;$""",
                      (ROOT / MESSAGES).read_text("utf-8"), re.MULTILINE)
    return {key: (english, chinese) for key, _, english, _, chinese in rows}


def test_each_sentence_stands_in_both_languages_and_is_said() -> None:
    table, scripts = sentences(), "".join((ROOT / name).read_text("utf-8") for name in SCRIPTS[:2])
    assert len(table) == (ROOT / MESSAGES).read_text("utf-8").count(" zh=") - 1 > 40, "all but that of an unknown key"
    said = re.findall(r"\b(?:say|die|text) (\w+)", re.sub(r"(^| )#.*", "", scripts, flags=re.MULTILINE))
    assert set(said) == table.keys()
    for key, (english, chinese) in table.items():
        assert english.count("%") == english.count("%s") == chinese.count("%s") == chinese.count("%"), key
        assert english.isascii() and (re.search(r"[\u4e00-\u9fff]", chinese)), key


@pytest.mark.parametrize(("variables", "is_chinese"), [
    ({"LC_ALL": "", "LANG": "zh_CN.UTF-8"}, True), ({"LC_ALL": "C.UTF-8", "LANG": "zh_CN.UTF-8"}, False),
    ({"LC_ALL": "zh_TW.UTF-8", "LANG": "C"}, True), ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": ""}, False)])
def test_they_speak_chinese_where_the_locale_is(variables: dict[str, str], is_chinese: bool) -> None:
    run = bash("run_all.sh", "--demo", "--config", "own.yaml", env=variables)
    assert run.returncode == 2 and sentences()["demo_config"][is_chinese] in run.stderr
    run = bash("setup_environment.sh", "--never", env=variables)
    assert run.returncode == 2 and sentences()["unknown_flag"][is_chinese].replace("%s", "--never") in run.stderr


# ---- setup_environment.sh: what it would do ----------------------------------------------------------------------


def plan(folder: Path, *arguments: str, **variables: str) -> Done:
    """What the set-up would do for an environment that does not exist, on a machine without nvidia-smi."""
    return bash("setup_environment.sh", "--dry-run", *arguments,
                env={"VENV_DIR": str(folder / "none"), "PATH": path_without_gpu(folder), **variables})


def path_without_gpu(folder: Path) -> str:
    """A PATH of links to the few commands that the script needs."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "df", "awk", "sed", "grep", "cat", "timeout", "mv", "ls", "date"):
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
        threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_cpu_index_is_taken_where_it_answers(tmp_path: Path, index: str) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL=index, no_proxy="127.0.0.1")
    assert run.returncode == 0
    assert names(run.stdout, "cpu", index) and not names(run.stdout, "default")
    assert names(run.stdout, "2 GB", "90 GB"), "needed and free"


def test_an_index_without_torch_is_no_answer(tmp_path: Path, index: str) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL=f"{index}/other", no_proxy="127.0.0.1")
    assert names(run.stdout, "default", f"{index}/other")


def test_unreachable_cpu_index_falls_back_and_says_so(tmp_path: Path) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL=NOBODY, no_proxy="127.0.0.1")
    assert run.returncode == 0
    assert names(run.stdout, "default", NOBODY) and names(run.stdout, "7 GB", "90 GB")


def test_a_silent_index_is_given_up(tmp_path: Path) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        url = f"http://127.0.0.1:{silent.server_address[1]}"
        run = plan(tmp_path, TORCH_INDEX_URL=url, no_proxy="127.0.0.1", PROBE_S="0.3")
    assert names(run.stdout, "default", url, "0.3")


def test_empty_index_asks_nobody(tmp_path: Path) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL="")
    assert names(run.stdout, "default", "TORCH_INDEX_URL")


def test_a_password_of_the_index_is_not_shown(tmp_path: Path) -> None:
    run = plan(tmp_path, TORCH_INDEX_URL="http://me:secret@127.0.0.1:9/")
    assert names(run.stdout, "127.0.0.1:9") and "secret" not in run.stdout + run.stderr


def test_gpu_takes_the_default_index(tmp_path: Path, index: str) -> None:
    smi = executable(Path(path_without_gpu(tmp_path)) / "nvidia-smi", "echo 'GPU 0: Some Card (UUID: 1)'")
    found = plan(tmp_path, TORCH_INDEX_URL=index, no_proxy="127.0.0.1").stdout
    assert names(found, "default", "GPU") and not names(found, index)
    executable(smi, "echo 'No devices were found' >&2; exit 6")
    assert names(plan(tmp_path, TORCH_INDEX_URL=index, no_proxy="127.0.0.1").stdout, "cpu", index)


def test_dry_run_leaves_nothing(tmp_path: Path) -> None:
    plan(tmp_path, TORCH_INDEX_URL="")
    assert os.listdir(tmp_path) == ["tools"]


@pytest.mark.parametrize(("arguments", "shown"), [
    (["--torch-version", "2.11"], "2.11.0"), (["--torch-version=2.14.1"], "2.14.1")])
def test_torch_version(tmp_path: Path, arguments: list[str], shown: str) -> None:
    assert names(plan(tmp_path, *arguments, TORCH_INDEX_URL="").stdout, "torch", shown, "default")
    by_variable = plan(tmp_path, TORCH_INDEX_URL="", TORCH_VERSION=arguments[-1].split("=")[-1])
    assert names(by_variable.stdout, "torch", shown, "default")


@pytest.mark.parametrize(("arguments", "named"), [
    (["--cuda"], ["--cuda", "--dev"]), (["extra"], ["extra"]),
    (["--torch-version"], ["--torch-version"]), (["--torch-version", "newest"], ["--torch-version", "newest"])])
def test_setup_mistakes(arguments: list[str], named: list[str]) -> None:
    run = bash("setup_environment.sh", *arguments)
    assert run.stdout == ""
    assert_refused(run, *named)


def test_no_fitting_python(tmp_path: Path) -> None:
    old = executable(tmp_path / "python3", "exit 1")
    run = plan(tmp_path, PYTHON=f"{old} python-that-is-not-there")
    assert_refused(run, "3.10", "3.13", old, "python-that-is-not-there", "PYTHON")


def test_a_python_without_venv_is_named(tmp_path: Path) -> None:
    bare = executable(tmp_path / "bare", f'case "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"')
    assert_refused(plan(tmp_path, PYTHON=str(bare)), bare, "venv", "apt-get install python3-venv")


def test_a_full_disk_is_told_before_the_download(tmp_path: Path) -> None:
    executable(tmp_path / "df", "echo header\necho disk 9 9 3145728 9% /")  # 3 GB free
    run = plan(tmp_path, TORCH_INDEX_URL="", PATH=f"{tmp_path}:{path_without_gpu(tmp_path)}")
    assert names(run.stdout, "7 GB", "3 GB")
    assert_refused(run, "VENV_DIR")


def test_a_folder_with_other_things_is_not_emptied(tmp_path: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter").write_text("x")
    run = bash("setup_environment.sh", env={"VENV_DIR": str(precious), "TORCH_INDEX_URL": ""})
    assert_refused(run, precious, "VENV_DIR")
    assert os.listdir(precious) == ["letter"]


@pytest.mark.parametrize("ours", [False, True])
def test_an_environment_that_this_script_did_not_finish_is_kept(tmp_path: Path, ours: bool) -> None:
    """It does not run here: only one with our stamp is made anew in its place."""
    venv = tmp_path / "venv"
    venv.mkdir()
    for name in ("pyvenv.cfg", "own.txt", *(["setup_environment.stamp"] if ours else [])):
        (venv / name).write_text("of the user")
    made = executable(tmp_path / "maker", f'case "$2" in venv) echo "$@" >"{tmp_path}/asked"; exit 1 ;; esac\n'
                                          f'exec "{sys.executable}" "$@"')
    run = plan(tmp_path, VENV_DIR=str(venv), PYTHON=str(made), TORCH_INDEX_URL="")
    assert run.returncode == 0 and (venv / "own.txt").exists(), "only asked what it would do"
    run = bash("setup_environment.sh", env={"VENV_DIR": str(venv), "PYTHON": str(made), "TORCH_INDEX_URL": "",
                                            "PATH": path_without_gpu(tmp_path)})
    assert run.returncode != 0 and "-m venv --clear" in (tmp_path / "asked").read_text()
    kept = [path for path in tmp_path.glob("venv.before_*") if (path / "own.txt").read_text() == "of the user"]
    assert len(kept) == (0 if ours else 1) and all(names(run.stdout, path) for path in kept), run.stdout + run.stderr


@pytest.mark.parametrize("end", ["", "/"])
def test_an_environment_behind_a_link_is_never_emptied(tmp_path: Path, end: str) -> None:
    """It is that of another copy of the project, finished, and does not run any more."""
    (tmp_path / "other").mkdir()
    for name in ("pyvenv.cfg", "own.txt", "setup_environment.stamp"):
        (tmp_path / "other" / name).write_text("of the user")
    (tmp_path / "venv").symlink_to("other", target_is_directory=True)
    made = executable(tmp_path / "maker", f'case "$2" in venv) echo "$@" >"{tmp_path}/asked"; exit 1 ;; esac\n'
                                          f'exec "{sys.executable}" "$@"')
    bash("setup_environment.sh", env={"VENV_DIR": f"{tmp_path}/venv{end}", "PYTHON": str(made), "TORCH_INDEX_URL": "",
                                      "PATH": path_without_gpu(tmp_path)})
    assert (tmp_path / "asked").exists() and not (tmp_path / "venv").exists()
    assert sorted(os.listdir(tmp_path / "other")) == ["own.txt", "pyvenv.cfg", "setup_environment.stamp"]


# ---- setup_environment.sh: what it does --------------------------------------------------------------------------

REQUIRED = ("requirements.txt", "requirements-embeddings.txt", "requirements-towers.txt", "requirements-dev.txt")


def installed(folder: Path) -> Path:
    """The set-up beside an environment whose packages are those of this one, whose pip only records its work, and
    whose torch packages are imported in no time."""
    (folder / "trimodal").mkdir()
    for name in ("setup_environment.sh", "trimodal/messages.sh", "constraints.txt", *REQUIRED):
        shutil.copy(ROOT / name, folder / name)
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "activate").write_text(f"VIRTUAL_ENV={folder}/venv\n")
    executable(folder / "venv" / "bin" / "python",
               f'case "$1 $2" in "-m pip") echo "$@" >>"{folder}/pip"; exit 0 ;; esac\nexec "{sys.executable}" "$@"')
    (folder / "quick").mkdir()
    for name in ("torch", "torchaudio", "torchvision"):
        (folder / "quick" / f"{name}.py").write_text("__version__ = '0'\nclass cuda: is_available = bool\n")
    return folder


def set_up(folder: Path, *arguments: str) -> Done:
    return bash(folder / "setup_environment.sh", *arguments, env={
        "PATH": path_without_gpu(folder), "PYTHONPATH": str(folder / "quick"), "TORCH_INDEX_URL": ""})


def test_torch_packages_that_cannot_be_imported_are_no_environment(tmp_path: Path) -> None:
    (installed(tmp_path) / "quick" / "torchaudio.py").write_text("raise ImportError")
    run = set_up(tmp_path)
    assert run.returncode == 2 and names(run.stderr, tmp_path / "venv")
    assert not (tmp_path / "venv" / "setup_environment.stamp").exists()


def test_a_second_run_has_nothing_to_do_until_something_changes(tmp_path: Path) -> None:
    folder, pip = installed(tmp_path), tmp_path / "pip"
    first = set_up(folder, "--dev")
    assert first.returncode == 0, first.stderr
    asked = pip.read_text()
    assert [name for name in REQUIRED if f"-r {name}" not in asked] == [] and "torch" not in asked, "torch stays"
    assert asked.count(f"-c {folder}/venv/constraints.txt") == 2, "tested versions, of all but the words and torch"
    pip.unlink()
    second = set_up(folder, "--dev")
    assert second.returncode == 0 and second.stdout.count("\n") == 1, second.stdout
    dry = set_up(folder, "--dev", "--dry-run").stdout
    assert names(dry, "torch") and not names(dry, "default") and not names(dry, "cpu", "index")
    assert names(set_up(folder, "--dry-run", "--torch-version", "2.12.0").stdout, "2.12.0", "default")
    assert not pip.exists(), "nothing of this asks pip for anything"
    with (folder / "requirements-dev.txt").open("a") as file:
        file.write("# changed\n")
    assert set_up(folder).returncode == 0 and not pip.exists(), "not asked for"
    assert set_up(folder, "--dev").returncode == 0 and "-r requirements-dev.txt" in pip.read_text()


def test_the_tested_versions_can_be_left_out(tmp_path: Path) -> None:
    folder, pip = installed(tmp_path), tmp_path / "pip"
    assert set_up(folder, "--latest").returncode == 0
    assert "-r requirements.txt" in pip.read_text() and "-c " not in pip.read_text()
    pip.unlink()
    for arguments in (["--latest"], []):
        assert set_up(folder, *arguments).stdout.count("\n") == 1 and not pip.exists(), "it stays so"
    with (folder / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert set_up(folder).returncode == 0 and "-c " in pip.read_text()
    pip.unlink()
    with (folder / "constraints.txt").open("a") as file:
        file.write("# renewed\n")
    assert set_up(folder).returncode == 0 and "-c " in pip.read_text()


def test_where_the_tested_versions_are_not_to_be_had_the_ranges_are_taken(tmp_path: Path) -> None:
    folder, pip = installed(tmp_path), tmp_path / "pip"
    python = folder / "venv" / "bin" / "python"
    python.write_text(python.read_text().replace('exit 0', 'case "$*" in *"-c "*) exit 1 ;; esac; exit 0'))
    run = set_up(folder)
    assert run.returncode == 0 and names(run.stdout, "constraints.txt", "requirements*.txt")
    assert [("-c " in line) for line in pip.read_text().splitlines() if "-r requirements.txt" in line] == [True, False]


def test_constraints_hold_all_that_is_required_within_its_range() -> None:
    pins = {canonicalize_name(pin.name): pin for line in constraints.CONSTRAINTS.read_text("utf-8").splitlines()
            if line and not line.startswith("#") for pin in [Requirement(line)]}
    for wanted in constraints.required():
        (pin,) = pins[canonicalize_name(wanted.name)].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), f"{wanted}: renew constraints.txt"
    assert not [name for name in pins if constraints.OF_CUDA.match(name)]


def test_an_environment_behind_a_link_is_used(tmp_path: Path) -> None:
    folder = installed(tmp_path)
    (folder / "venv").rename(folder / "one")
    (folder / "one/bin/activate").write_text(f"VIRTUAL_ENV={folder}/one\n")
    (folder / "venv").symlink_to("one", target_is_directory=True)
    for _ in range(2):
        run = set_up(folder)
        assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1 and (folder / "venv").is_symlink()


# ---- run_all.sh --------------------------------------------------------------------------------------------------

MAIN = 'if __name__ == "__main__":\n'
RECORD_AND_REPORT = """
    if "--check" in sys.argv:
        sys.exit(main())
    with open("calls", "a") as calls:
        print("run_training.py", *sys.argv[1:], file=calls)
    reports = Path(configuration(parse(sys.argv[1:])).paths.output_dir, "reports")
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "report_1.md").touch()
    sys.exit(0)
"""
RECORDING = """
case "$1 $2" in
    -c*) exec PYTHON "$@" ;;
    "run_training.py --check") echo "$@" >>calls; cat answers; exit "$(cat refuses)" ;;
    *) echo "$@" >>calls; mkdir -p out/reports; : >out/reports/report_1.md ;;
esac
case "$*" in download*clotho*) exit 1 ;; download*audiocaps*) exit 3 ;; esac
"""


def beside_run_all(folder: Path, python: str) -> Path:
    """run_all.sh in `folder`, beside a set-up that only records its call and an environment with this `python`."""
    shutil.copy(ROOT / "run_all.sh", folder)
    (folder / "setup_environment.sh").write_text("echo setup_environment.sh $* >>calls")
    (folder / "venv" / "bin").mkdir(parents=True)
    executable(folder / "venv" / "bin" / "python", python)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """run_all.sh with a Python that records its calls: its answers are those of a run of `coco` in `out`."""
    for name in ("answers", "refuses"):
        (tmp_path / name).write_text({"answers": "./data\n./out\ncoco\n", "refuses": "0"}[name])
    for name in ("run_training.py", "trimodal"):
        (tmp_path / name).symlink_to(ROOT / name)
    return beside_run_all(tmp_path, RECORDING.replace("PYTHON", sys.executable))


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """run_all.sh with Python and the modules, beside a download and a training that only record their arguments."""
    for path in (ROOT / "config.yaml", *ROOT.glob("*.py")):
        shutil.copy(path, tmp_path)
    for folder in ("recipes", "trimodal"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "download_datasets.py").write_text(
        'import sys\nprint("download_datasets.py", *sys.argv[1:], file=open("calls", "a"))\n')
    training = (tmp_path / "run_training.py").read_text("utf-8")
    assert training.count(MAIN) == 1
    (tmp_path / "run_training.py").write_text(training.replace(MAIN, MAIN + RECORD_AND_REPORT))
    return beside_run_all(tmp_path, f'exec "{sys.executable}" "$@"')


def run_all(project: Path, *arguments: str) -> tuple[Done, list[str]]:
    """What it did, called from another folder, and the calls that it made."""
    other = project / "elsewhere"
    other.mkdir(exist_ok=True)
    run = bash(project / "run_all.sh", *arguments, cwd=other)
    calls = project / "calls"
    return run, calls.read_text().splitlines() if calls.exists() else []


def test_run_all_hands_everything_on(real: Path) -> None:
    run, calls = run_all(real, "--model-size", "small", "--datasets", "coco", "stamps", "--data-root", "./d",
                         "--epochs=3", "training.seed=4")
    assert run.returncode == 0, run.stderr
    flags = "--model-size small --datasets coco stamps --data-root ./d --epochs=3 training.seed=4"
    assert calls == ["setup_environment.sh",
                     "download_datasets.py --datasets coco stamps --data-root ./d --skip-existing",
                     f"run_training.py {flags} --resume auto"]
    assert re.findall(r"\[(\d)/5\]", run.stdout) == list("12345")
    assert "./outputs/reports/report_1.md" in run.stdout
    assert "tensorboard --logdir=./outputs/logs/tensorboard" in run.stdout


def test_run_all_refuses_before_the_download(real: Path) -> None:
    run, calls = run_all(real, "--device", "tpu")
    assert (run.returncode, calls) == (2, ["setup_environment.sh"])
    assert_told(run.stderr, "--device", "tpu")


def test_run_all_demo(project: Path) -> None:
    run, calls = run_all(project, "--demo", "--epochs", "2")
    assert run.returncode == 0, run.stderr
    flags = "--config recipes/demo.yaml --model-size tiny --epochs 2 --resume auto"
    assert calls == ["setup_environment.sh", f"run_training.py --check {flags}",
                     "download_datasets.py --datasets coco --data-root ./data --skip-existing",
                     f"run_training.py {flags}"]
    assert "./out/reports/report_1.md" in run.stdout


def test_run_all_ends_with_the_page_of_the_report(project: Path) -> None:
    (project / "out" / "reports").mkdir(parents=True)
    (project / "out" / "reports" / "report_1.html").touch()
    run, _ = run_all(project, "--demo")
    assert run.returncode == 0 and "./out/reports/report_1.html" in run.stdout and ".md" not in run.stdout


@pytest.mark.parametrize("kind", ["pretrained", "bilingual"])
def test_run_all_demo_on_pretrained_towers(project: Path, kind: str) -> None:
    run, calls = run_all(project, "--demo", f"--{kind}", "--epochs", "2")
    assert run.returncode == 0, run.stderr
    flags = f"--config recipes/demo_{kind}.yaml --model-size tiny --epochs 2 --resume auto"
    assert calls[1:] == [f"run_training.py --check {flags}",
                         "download_datasets.py --datasets coco --data-root ./data --skip-existing",
                         f"run_training.py {flags}"]


def test_the_demo_ends_with_commands_that_search_its_pictures_and_sounds(
        project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "answers").write_text("./data\n./out\nstamps\n")
    run, _ = run_all(project, "--demo")
    lines = [line.strip().split("    ")[0] for line in run.stdout.splitlines()]
    named = [shlex.split(line) for line in lines if line.startswith("python search.py ")]
    assert [words[2] for words in named] == ["index", "query", "serve"]
    assert run.stdout.splitlines()[-1].split()[:2] == ["python", "search.py"]
    search.parse(named[2][2:])
    monkeypatch.chdir(project)
    trees.stamps(project / "data")
    (project / "out" / "checkpoints").mkdir()
    shutil.copy(things.CHECKPOINT, project / "out" / "checkpoints")
    with things.small():
        for words in named[:2]:
            assert search.main([*words[2:], "--device", "cpu"]) == 0
    found = capsys.readouterr().out
    assert found.count(".ogg (0.6 s)") == 5 and ".png\n" in found and "_desc" not in found
    (project / "answers").write_text("./data\n./out\ncoco\n")
    assert "search.py" not in run_all(project, "--demo")[0].stdout, "no such commands for other sets"


def test_run_all_stops_where_its_settings_are_refused_or_data_are_missing(project: Path) -> None:
    (project / "answers").write_text("./d\n./out\ncoco clotho\n")
    run, calls = run_all(project)
    assert run.returncode == 1
    assert calls[2:] == ["download_datasets.py --datasets coco clotho --data-root ./d --skip-existing"]
    (project / "refuses").write_text("2")
    (project / "calls").unlink()
    run, calls = run_all(project)
    assert (run.returncode, calls) == (2, ["setup_environment.sh", "run_training.py --check --resume auto"])


def test_run_all_goes_on_with_a_set_that_can_be_used_in_part(project: Path) -> None:
    (project / "answers").write_text("./data\n./out\naudiocaps\n")
    run, calls = run_all(project, "--datasets", "audiocaps")
    assert run.returncode == 0 and calls[-1] == "run_training.py --datasets audiocaps --resume auto"
    (project / "answers").write_text("./data\n./out\ncoco\n")
    whole, _ = run_all(project, "--datasets", "coco")
    assert len(run.stdout.splitlines()) == len(whole.stdout.splitlines()) + 1, "it is told"


@pytest.mark.parametrize("flags", [["--overwrite"], ["--resume", "auto"], ["--resume=auto"],
                                   ["--init", "old/checkpoints"]])
def test_run_all_leaves_the_choice_of_a_start(project: Path, flags: list[str]) -> None:
    _, calls = run_all(project, "--datasets", "coco", *flags)
    assert calls[-1] == " ".join(["run_training.py --datasets coco", *flags])


@pytest.mark.parametrize("flag", ["--check", "--plan", "--doctor"])
def test_run_all_check_plan_and_doctor_fetch_nothing(project: Path, flag: str) -> None:
    run, calls = run_all(project, flag)
    assert run.returncode == 0 and calls == ["setup_environment.sh", f"run_training.py {flag}"], run.stderr


@pytest.mark.parametrize(("arguments", "named"), [
    (["--epoch", "3"], ["--epoch"]), (["-x"], ["-x"]), (["--epochs", "3", "--demo"], ["--demo"]),
    (["--demo", "--config", "config.yaml"], ["--demo", "--config"]),
    (["--pretrained"], ["--pretrained", "--demo"]), (["--demo", "--epochs", "3", "--pretrained"], ["--pretrained"]),
    (["--demo", "--pretrained", "--bilingual"], ["--bilingual"])])
def test_run_all_refuses_flags_before_the_set_up(project: Path, arguments: list[str], named: list[str]) -> None:
    for _ in range(2):
        run, calls = run_all(project, *arguments)
        assert calls == []
        assert_refused(run, *named)
        shutil.rmtree(project / "venv", ignore_errors=True)  # the second time there is no environment yet
