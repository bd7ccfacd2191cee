"""`--plan` and `--doctor` know a pretrained tower by its small files: its weights are fetched by the run alone."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.loopback import Loopback
from tests.project import ROOT
from tests.refusals import assert_told
from tests.small_runs import RECIPE
from tests.towers.checks import GRID, made
from tests.towers.test_opening import COMMIT, NAME, hub_files

STAGE = {"name": "align", "share": 1, "trainable": [r"(?!image\.tower).*"],
         "tasks": [{"inputs": ["image", "text"], "objectives": {"contrastive": 1.0}}]}
SETTINGS = ("model.image.tower=hub:" + NAME, "training.epochs=1", "training.batch_size=8", "memory.micro_batch=auto")


def started(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """run_training.py on the model of a hub, in a process of its own: the hub's client reads its address once."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**copy.deepcopy(RECIPE), "stages": [STAGE]}), "utf-8")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    places = ["--data-root", str(folder / "data"), "--output-dir", str(folder / "out"), "--device", "cpu"]
    return subprocess.run([sys.executable, "run_training.py", "--config", str(recipe), *places, *flags, *SETTINGS],
                          cwd=ROOT, text=True, capture_output=True,
                          env={**kept, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                               "HF_HOME": str(folder / "cache"), **environment})


def plans(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out" / "plans").iterdir()}


def test_a_plan_and_the_doctor_fetch_no_weights_and_the_run_reads_their_plan(tmp_path: Path) -> None:
    made("CLIPVisionModel", "CLIPVisionConfig", **GRID).save_pretrained(tmp_path / "model")
    with Loopback(hub_files(tmp_path / "model")) as server:
        server.headers = {"X-Repo-Commit": COMMIT}

        def fetched(*flags: str, code: int = 0, **environment: str) -> tuple[str, set[str]]:
            server.requests.clear()
            done = started(tmp_path, *flags, HF_ENDPOINT=server.url(), **environment)
            assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
            files = {path.rpartition("/")[2] for path, _ in server.requests if "/resolve/" in path}
            return done.stderr if code else done.stdout, files

        said, files = fetched("--plan", code=2, HF_HUB_OFFLINE="1")
        assert not files
        assert_told(said, "model.image.tower", f"hub:{NAME}", "HF_HUB_OFFLINE")
        said, files = fetched("--plan")
        before = plans(tmp_path)
        assert files == {"config.json"} and "align" in said and before
        said, files = fetched("--doctor")
        [row] = [line for line in said.splitlines() if line.startswith("tower: image")]
        assert not files and "warn" in row and f"hub:{NAME}" in row, "random weights stand in"
        assert "step: align" in said and plans(tmp_path) == before
        said, files = fetched("--plan", HF_HUB_OFFLINE="1")
        assert not files and "align" in said, "the small files are here"
        said, files = fetched(code=2, HF_HUB_OFFLINE="1")
        assert_told(said, "model.image.tower", f"hub:{NAME}", "without weights")
        said, files = fetched()
        assert files == {"model.safetensors"} and plans(tmp_path) == before, "the run planned nothing anew"
        said, files = fetched("--doctor", "--overwrite")
        [row] = [line for line in said.splitlines() if line.startswith("tower: image")]
        assert not files and " ok " in row, "now they are here, and are what its steps take"
        [features] = [line for line in said.splitlines() if line.startswith("disk: features")]
        assert "all are in the cache" in features
