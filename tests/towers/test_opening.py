"""Names of towers, what stands behind them, and what is refused: one line each, nothing executed, nothing asked of a
network that was not to be asked."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.loopback import Loopback
from tests.project import ROOT
from tests.refusals import assert_names, refused
from tests.test_safety import as_pickle, as_torch_file, unsprung
from tests.towers.checks import GRID, close, edit_json, made
from trimodal.errors import ConfigError, UserError
from trimodal.towers.opening import build_tower, open_tower

NAME, COMMIT = "somebody/tiny", "0" * 40


def saved(folder: Path) -> Any:
    model = made("CLIPVisionModel", "CLIPVisionConfig", **GRID)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("name", "modality"), [
    ("hub:no such", "image"), ("hub:/nowhere/at/all", "image"), ("/nowhere/at/all", "text"), ("somebody/tiny", "audio"),
    ("timm:resnet50", "text"), ("torchvision:resnet18", "audio"), ("nonsense", "image")])
def test_names_that_name_nothing(name: str, modality: str) -> None:
    with refused(f"model.{modality}.tower", name, error=ConfigError):
        open_tower(name, modality)


def test_a_file_alone_does_not_say_of_what_it_is(tmp_path: Path) -> None:
    saved(tmp_path)
    with refused(tmp_path / "model.safetensors", "timm:NAME", error=ConfigError):
        open_tower(str(tmp_path / "model.safetensors"), "image")
    with refused("model.image.weights", "other.pth", error=ConfigError):
        open_tower(str(tmp_path), "image", weights="other.pth")
    (tmp_path / "config.json").unlink()
    with refused(tmp_path, "config.json"):
        open_tower(str(tmp_path), "image")


def test_a_folder_needs_no_prefix(tmp_path: Path) -> None:
    saved(tmp_path)
    assert open_tower(str(tmp_path), "image", size=32).source == str(tmp_path)


@pytest.mark.parametrize("modality", ["text", "audio"])
def test_a_tower_of_another_modality_is_named(modality: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with refused(f"model.{modality}.tower", f"hub:{tmp_path}", "clip_vision_model"):
        open_tower(f"hub:{tmp_path}", modality)


def test_a_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    """The library fills it with random numbers and says so in its log alone."""
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    [lost] = [key for key in state if key.endswith("layers.1.mlp.fc1.weight")]
    save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "model.safetensors",
              {"format": "pt"})
    with refused(f"hub:{tmp_path}", "encoder.layers.1.mlp.fc1.weight", 1):
        open_tower(f"hub:{tmp_path}", "image")
    save_file({**state, lost: torch.zeros(3, 3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with refused(f"hub:{tmp_path}"):
        open_tower(f"hub:{tmp_path}", "image")


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1000], "empty": b"", "text": b"<html>" * 100}[damage])
    with refused(f"hub:{tmp_path}", tmp_path):
        open_tower(f"hub:{tmp_path}", "image")
    path.write_bytes(content)
    (tmp_path / "config.json").write_text("{", "utf-8")
    with refused(f"hub:{tmp_path}", "config.json"):
        open_tower(f"hub:{tmp_path}", "image")


@pytest.mark.parametrize("make", [as_pickle, as_torch_file])
def test_weights_and_folders_run_no_code(make: Any, tmp_path: Path) -> None:
    marker = tmp_path / "SPRUNG"
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    make(tmp_path / "pytorch_model.bin", marker)
    with unsprung(marker, f"hub:{tmp_path}"):
        open_tower(f"hub:{tmp_path}", "image")
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\n", "utf-8")
    edit_json(tmp_path / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    with unsprung(marker, f"hub:{tmp_path}"):
        open_tower(f"hub:{tmp_path}", "image")


def test_plain_torch_files_are_read(tmp_path: Path) -> None:
    model = saved(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    tower = open_tower(f"hub:{tmp_path}", "image", size=32)
    for key, value in model.state_dict().items():
        close(tower.state_dict()[f"model.{key}"], value)


@pytest.mark.parametrize(("card", "licence"), [
    ("---\nlicense: apache-2.0\n---\n# It", "apache-2.0"), ("# It", "unknown"), (None, "unknown"),
    ("---\ntags: [a]\nlicense: other\nlicense_name: dinov3-license\n---\n", "dinov3-license")])
def test_the_licence_is_that_of_the_card(card: str | None, licence: str, tmp_path: Path) -> None:
    saved(tmp_path)
    if card is not None:
        (tmp_path / "README.md").write_text(card, "utf-8")
    assert open_tower(f"hub:{tmp_path}", "image", size=32).licence == licence


@pytest.mark.parametrize("changes", [
    {"family": "nonsense"}, {"kind": "nonsense"}, {"config": {"num_hidden_layers": 10**9}},
    {"config": {"hidden_size": 2**40}}, {"config": {**GRID, "num_attention_heads": 7}}, {"input": {}},
    {"config": {**GRID, "hidden_size": 2**16, "num_hidden_layers": 9, "num_attention_heads": 1}}])
def test_descriptions_from_elsewhere_are_bounded(changes: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path)
    description = open_tower(f"hub:{tmp_path}", "image", size=32).description
    with pytest.raises(UserError):
        build_tower({**description, **changes})


# ---- a hub ---------------------------------------------------------------------------------------------------------


def hub_files(folder: Path) -> dict[str, bytes]:
    """What a hub answers for a repository of the files of `folder`."""
    names, commit = [path.name for path in folder.iterdir()], COMMIT
    info = {"id": NAME, "sha": commit, "siblings": [{"rfilename": name} for name in names], "private": False,
            "tags": [], "downloads": 0, "likes": 0}
    files = {f"/{NAME}/resolve/{commit}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    for revision in ("main", commit):
        files[f"/api/models/{NAME}/revision/{revision}"] = json.dumps(info).encode()
        tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name.encode().hex()}
                for path in folder.iterdir()]
        files[f"/api/models/{NAME}/tree/{revision}"] = json.dumps(tree).encode()
    return {**files, f"/api/models/{NAME}": json.dumps(info).encode()}


def of_an_address() -> str:
    """A model of timm whose weights are not of a hub."""
    timm: Any = importlib.import_module("timm")
    return next(name for name in timm.list_pretrained() if not timm.get_pretrained_cfg(name).hf_hub_id)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    head = "from trimodal.towers.opening import open_tower\nfrom trimodal.errors import UserError\n"
    return subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, text=True, capture_output=True,
                          env={**kept, **environment, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})


OPEN = f"print(open_tower('hub:{NAME}', 'image', size=32).digest)\n"
TRY = ("try:\n    open_tower('hub:somebody/other', 'image')\n"
       "except UserError as error:\n    print(error)\n")

TIMM = ("for name in ('test_vit.r160_in1k', NAME):\n    try:\n        open_tower('timm:' + name, 'image')\n"
        "    except UserError as error:\n        print(error)\n")


def test_a_hub_is_asked_at_the_address_that_is_set_and_not_at_all_offline(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    (tmp_path / "model" / "flax_model.msgpack").write_bytes(b"large")
    expected = open_tower(f"hub:{tmp_path / 'model'}", "image", size=32).digest
    with Loopback(hub_files(tmp_path / "model")) as server:
        server.headers = {"X-Repo-Commit": COMMIT}
        places = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": server.url()}
        first = run(OPEN + TRY, **places)
        digest, *refusal = first.stdout.splitlines()
        assert digest == expected, first.stderr[-2000:]
        assert_names("\n".join(refusal), "hub:somebody/other", server.url(), "HF_ENDPOINT", 404)
        assert not any("msgpack" in path for path, _ in server.requests)
        server.requests.clear()
        elsewhere = of_an_address()
        offline = run(OPEN + TRY + TIMM.replace("NAME", repr(elsewhere)), **places, HF_HUB_OFFLINE="1")
        digest, *refusals = offline.stdout.splitlines()
        assert digest == expected and not server.requests, offline.stderr[-2000:]
        for line, name in zip(refusals, ("hub:somebody/other", "timm:test_vit.r160_in1k", f"timm:{elsewhere}"),
                                 strict=True):
            assert_names(line, name)
