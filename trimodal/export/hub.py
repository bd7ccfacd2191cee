"""A folder to share a model: weights as safetensors, all that is needed to use them, and a model card.

    python -m trimodal.export hub outputs/demo my-model        # then model.open_model("my-model")

FOLDER/model.safetensors, config.json         weights; settings, towers, concepts
FOLDER/tokenizer.json, preprocessing.json     how texts, images and sounds are prepared, for other programs
FOLDER/README.md                              the model card

What is written is chosen by name, so that no path, user or machine gets into it: of the settings those that decide the
features, and no name that is a path.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from model import load_model
from trimodal import checkpoint
from trimodal.config import MODALITIES
from trimodal.errors import UserError
from trimodal.export.card import model_card
from trimodal.export.onnx import write_rules
from trimodal.export.public import is_public, public_name
from trimodal.inference.opening import WEIGHTS, checkpoint_in

STATE = ("schema", "modalities", "concepts", "attention_kernel", "normalisation", "stage", "epoch", "loss")
SETTINGS = {"data": ("datasets", "fit", "cache", "audio_max_s"), "training": ("use_amp",)}  # others stay the defaults


def write(source: str, folder: Path) -> None:
    """Write the model of a checkpoint, or of a run's output folder, to a new folder.

    Raises:
        UserError: there is no model, or the folder is there already.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder}: is there already, and nothing is written over it; name a new folder")
    path = checkpoint_in(source)
    model, state = load_model(path)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as staging:
            made = Path(staging) / "made"
            made.mkdir()
            checkpoint.export(public_state(model, state), made / WEIGHTS)
            write_rules(model, state, "uint8", made)
            (made / "README.md").write_text(model_card(path, model, state), "utf-8")
            os.rename(made, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); free space, or name another folder") from None
    print(f"{folder}: written; read {folder / 'README.md'} before you publish it", flush=True)


def public_state(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds that its use needs, the tokenizer as the name of its file."""
    towers = {name: {**tower.description, "source": public_name(tower.source)} for name, tower in model.towers.items()}
    for description in towers.values():
        if description["input"].get("tokenizer") == state["tokenizer"]:
            description["input"] = {**description["input"], "tokenizer": {"file": checkpoint.TOKENIZER}}
    return {**{key: state[key] for key in STATE if key in state}, "speakers": [], "towers": towers,
            "config": public_settings(state["config"]),
            "tokenizer": {"file": checkpoint.TOKENIZER}, "model_state_dict": model.state_dict()}


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of a run that decide features, and its stages, which say what of the towers it trained."""
    found = {section: {key: settings[section][key] for key in keys if key in settings.get(section, {})}
             for section, keys in SETTINGS.items()}
    stages = {"stages": settings["stages"]} if "stages" in settings else {}
    return {"model": public_model(settings["model"]), **found, **stages}


def public_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model without the folders and files that its towers and words came from."""
    found = dict(settings)
    for name in MODALITIES:
        if name in found and found[name]["tower"] != "own":
            found[name] = {**found[name], "tower": public_name(found[name]["tower"]), "weights": "auto"}
    if (words := found.get("word_embeddings", "minilm")) not in ("minilm", "random"):
        found["word_embeddings"] = words if is_public(words) else "random"
    return found
