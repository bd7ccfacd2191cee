"""A folder to share a model: its weights as safetensors, and all that is needed to use it, as plain files."""

from pathlib import Path

from model import load_model
from trimodal import checkpoint
from trimodal.errors import UserError
from trimodal.inference.opening import checkpoint_in


def write(source: str, folder: Path) -> None:
    """Write the model of a checkpoint or run to a new folder.

    Raises:
        UserError: there is no model, or the folder exists.
    """
    path = checkpoint_in(source)
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    model, state = load_model(path)
    checkpoint.export({**state, "model_state_dict": model.state_dict()}, folder / "model.safetensors")
    print(f"Written: {folder}")
