"""Opening a model for use: which file a folder's model is in, the device, and what the model says of itself."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trimodal.arguments import reading
from trimodal.checkpoint import by_age
from trimodal.errors import UserError
from trimodal.inference.checkpoint_model import CheckpointModel
from trimodal.inference.hub_models import open_hub
from trimodal.inference.open_model import OpenModel
from trimodal.memory import devices
from trimodal.towers import hub

BEST, WEIGHTS = "best_model.pt", "model.safetensors"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

Load = Callable[[Path], tuple[Any, dict[str, Any]]]


def opened_checkpoint(source: str | Path, device: str, precision: str, load: Load) -> OpenModel:
    """The model of a file or folder; `load` is model.load_model."""
    place, amp = _setting(device, precision)
    path = checkpoint_in(source)
    model, state = load(path)
    return OpenModel(CheckpointModel(model.to(place), state), place, amp, _description(path, model, state))


def opened_hub(name: str, device: str, precision: str) -> OpenModel:
    """The model of others that `hub:NAME` names."""
    place, amp = _setting(device, precision)
    model = open_hub(name).to(place)
    return OpenModel(model, place, amp, {"source": name, "kind": model.kind, "parameters": _parameters(model.model)})


def _setting(device: str, precision: str) -> tuple[torch.device, torch.dtype | None]:
    if not isinstance(device, str | torch.device):
        raise UserError(f"device: {device!r}; expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    place = devices.choose_device(str(device), "device")
    if precision == "auto":
        return place, devices.choose_precision(place, use_amp=True).dtype
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}, auto")
    return place, PRECISIONS[precision]


def _description(path: Path, model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    return {"source": str(path), "kind": "checkpoint", "version": state.get("version"), "size": model.config.size,
            "parameters": _parameters(model), "towers": {
                name: {"source": tower.source, "licence": tower.licence} for name, tower in model.towers.items()},
            "datasets": list(state["config"]["data"]["datasets"]), "stage": state.get("stage"),
            "epoch": state.get("epoch"), "concepts": list(state.get("concepts", ()))}


def _parameters(model: torch.nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


# ---- files ---------------------------------------------------------------------------------------------------------


def checkpoint_in(source: str | Path) -> Path:
    """The file to load: `source` itself, or best_model.pt of a run's folder, or model.safetensors of an export.

    Raises:
        UserError: the folder holds none or several of them, and the line names what is there; or it cannot be read.
    """
    path = Path(os.path.expanduser(source))
    with reading(source):
        if not path.is_dir():
            return path  # loading says what is wrong with it
        for folder in (path, path / "checkpoints"):
            if (folder / BEST).is_file():
                return folder / BEST
        if (path / WEIGHTS).is_file() and "model_type" not in hub.read_json(path, hub.CONFIG, str(source)):
            return path / WEIGHTS
        raise UserError(f"{source}: {_instead(path)}")


def _instead(path: Path) -> str:
    """Why a folder has no model that is meant beyond doubt, and what to do."""
    if "model_type" in hub.read_json(path, hub.CONFIG, str(path)):
        return f"is a folder of transformers; open it as hub:{path}"
    if newest_first := by_age(path / "checkpoints") or by_age(path):
        return f"has no {BEST} yet; name one of its checkpoints, such as {newest_first[0]}"
    if runs := sorted(str(best.parent.parent) for best in path.glob(f"*/checkpoints/{BEST}")):
        return f"holds {len(runs)} run{'s' * (len(runs) > 1)}; name one: {', '.join(runs[:5])}"
    return ("is empty" if not any(path.iterdir()) else f"holds neither {BEST} nor {WEIGHTS}") + (
        "; name the output folder of a run, or an exported folder")
