"""`pip install .`: models in use beside the Hub's library `datasets`, from any folder, by the lines of the README."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from packaging.requirements import Requirement
from PIL import Image

from model import create_model
from tests.project import ROOT
from tests.test_docs import CHINESE, blocks
from tests.test_layout import requirement_lines, tracked
from trimodal.checkpoint import save
from trimodal.config import config_from_dict
from trimodal.data.tokenizer import load_tokenizer

# Stands where the Hub's library would; fails where its names are taken for those of our file.
OTHER_DATASETS = '''
class Dataset: pass
def __getattr__(name):
    if name in ("Data", "Loader", "load_data", "epoch_batches"):
        raise AssertionError(f"taken for ours: {name}")
    raise AttributeError(name)
'''
OFFLINE = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy of the project, which tools leave files in."""
    folder = tmp_path_factory.mktemp("build")
    for path in tracked():
        name = path.relative_to(ROOT)
        if name.parts[0] in ("trimodal", "model.py", "datasets.py", "pyproject.toml", "requirements.txt"):
            (folder / "project" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "project" / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(folder / "project"), "--no-build-isolation",
                    "--wheel-dir", str(folder), *OFFLINE], check=True)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed beside a library called datasets."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", str(wheel), "--target", str(folder), *OFFLINE], check=True)
    (folder / "datasets").mkdir()
    (folder / "datasets" / "__init__.py").write_text(OTHER_DATASETS)
    return folder


def run(code: str, site: Path, cwd: Path) -> str:
    """What Python prints that finds the installed package, and nothing of this project's folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": str(site)}, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_the_model_and_no_datasets(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"trimodal", "model.py"}
    within = {path.relative_to(ROOT).as_posix() for path in tracked() if path.is_relative_to(ROOT / "trimodal")}
    left_out = {name for name in within if name.startswith(("trimodal/training/", "trimodal/evaluation/"))
                or name.endswith(".sh")}  # of the scripts
    assert names == within - left_out | {"model.py"}, "package-data in pyproject.toml names all other files"


def test_it_needs_what_the_requirements_name(site: Path) -> None:
    [found] = importlib.metadata.distributions(path=[str(site)])
    expected = [Requirement(line.split("#")[0]) for line in requirement_lines("requirements.txt")]
    assert {str(Requirement(line)) for line in found.requires or []} == {str(line) for line in expected}


def test_all_that_is_installed_can_be_imported(site: Path, tmp_path: Path) -> None:
    names = [".".join(path.relative_to(site).with_suffix("").parts) for path in sorted(site.glob("trimodal/**/*.py"))
             if path.name not in ("__init__.py", "__main__.py", "doctor.py")]  # the doctor tries a training run
    assert len(names) > 50
    run("import importlib, sys, datasets\n"
        f"for name in {[*names, 'model']!r}: importlib.import_module(name)\n"
        "assert datasets.__file__.endswith('__init__.py')", site, tmp_path)


def test_the_lines_of_the_readme_run_from_any_folder(site: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    write_checkpoint(tmp_path / "outputs" / "demo" / "checkpoints" / "best_model.pt", "nano")
    [block] = (block for block in blocks(CHINESE.read_text("utf-8")) if block.language == "python")
    assert "from model import open_model" in block.lines and len(block.lines) <= 10
    code = "\n".join([*block.lines, "import datasets", "print([*images.shape, *fused.shape, datasets.Dataset])"])
    printed = run(code, site, tmp_path)
    assert "[2, 512, 1, 512, <class 'datasets.Dataset'>]" in printed and printed.count("tensor(") == 2


def write_inputs(folder: Path) -> None:
    """The files that the manuals name: two pictures, a sound, a list of captions."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for name in ("dog.jpg", "cat.png", "photos/1.jpg"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / name)
    soundfile.write(folder / "dog.wav", rng.normal(0, 0.1, 30_000), 22_050)
    (folder / "captions.txt").write_text("a dog barks\na cat\n")


def write_checkpoint(path: Path, size: str) -> None:
    """An untrained model of the default settings."""
    torch.manual_seed(0)
    config = config_from_dict({"model": {"size": size}})
    save({"config": config.to_dict(), "tokenizer": load_tokenizer(config.model).to_json(), "stage": "align", "epoch": 1,
          "concepts": ["dog", "cat", "bird", "tree", "car", "sea"], "speakers": [], "loss": 1.0,
          "model_state_dict": create_model(size).state_dict()}, path)
