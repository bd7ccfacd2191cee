"""Folders of the library transformers, of a hub or local: fetched, opened without code or pickles, built again.

A name of a hub becomes a folder of the hub's cache first (HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE are honoured);
everything else reads that folder alone. Of a checkpoint with two towers only the part that is asked for is taken.
"""

import importlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import nn

from trimodal.errors import WHOLE, UserError, counted, similar
from trimodal.towers.base import Input, PretrainedTower, describe

CONFIG, CARD = "config.json", "README.md"
SMALL_FILES = ("*.json", "*.txt", "*.model", CARD)
NOT_SETTINGS = ("model_type", "transformers_version", "dtype", "architectures", "auto_map", "_name_or_path")
MAX_LAYERS, MAX_SIZE = 1_000, 2**24  # a description from elsewhere does not fill time or memory
WEIGHTS = (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin"))  # the first kind


class Kind(NamedTuple):
    """How a tower of one `model_type` is opened by transformers."""

    model: str  # class that reads a checkpoint, whole or of this part
    config: str  # class of the settings of this part
    blocks: str  # path of its blocks in the part
    part: Callable[[Any], nn.Module] = lambda model: model  # of what `model` is
    part_model: str = ""  # class of the part, if another one
    options: Mapping[str, Any] = {}  # of both classes
    may_lack: tuple[str, ...] = ()  # parameters that files lack and the tower does not read, as patterns
    attention: str = "sdpa"


class HubTower(PretrainedTower):
    """A tower of transformers: `model` is the library's own."""

    def __init__(self, description: Mapping[str, Any], kind: Kind, model: Any, dim: int) -> None:
        stages = model.get_submodule(kind.blocks)
        blocks = [block for stage in stages for block in getattr(stage, "blocks", [stage])]
        super().__init__(description, dim, len(blocks), blocks)
        self.model = model
        number = {id(value): i + 1 for i, block in enumerate(blocks) for value in block.parameters()}
        found = [number.get(id(value), 0) for value in model.parameters()]
        first = next(i for i, layer in enumerate(found) if layer)
        self._layers = {name: layer or (0 if i < first else self.depth)
                        for i, ((name, _), layer) in enumerate(zip(model.named_parameters(), found, strict=True))}

    def layer_of(self, parameter_name: str) -> int:
        return self._layers[parameter_name.removeprefix("model.")]


# ---- folders -----------------------------------------------------------------------------------------------------


def fetch(name: str, where: str, *, whole: bool = True) -> Path:
    """The folder of a hub's model `OWNER/NAME` or `OWNER/NAME@REVISION`, fetched where the hub's cache lacks it; with
    its weights, if `whole`.

    Raises:
        UserError: it cannot be had; `where` names the key and value in the message.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    repository, _, revision = name.partition("@")
    at: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    try:
        if is_offline():
            folder = Path(hf_hub_download(**at, filename=CONFIG, local_files_only=True)).parent
            if whole and not has_weights(folder):
                raise ValueError(f"{folder} is without weights")
            return folder
        return Path(snapshot_download(**at, allow_patterns=_wanted(**at, whole=whole)))
    except Exception as error:  # the client of the hub raises nearly any type
        if isinstance(error, MemoryError):
            raise
        advice = ("HF_HUB_OFFLINE is set, and the hub's cache does not hold it: unset it once, or name a local folder"
                  if is_offline() else
                  "check the name; behind a mirror set HF_ENDPOINT; offline set HF_HUB_OFFLINE=1, which takes what was "
                  "fetched before; or name a local folder")
        raise UserError(f"{where}: cannot be fetched from {constants.ENDPOINT} ({reason_of(error)}); {advice}"
                        ) from None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) was set when the client of the hub was imported."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _wanted(repo_id: str, revision: str | None, *, whole: bool) -> list[str]:
    """Files to fetch: settings, tokenizers, the card, and if `whole` the weights in the safest format there is."""
    from huggingface_hub import HfApi

    # Asked first and once, since the client of the hub tries what follows for minutes where no server answers.
    there = [one.rfilename for one in HfApi().model_info(repo_id, revision=revision, timeout=30).siblings or []]
    for patterns in WEIGHTS:
        if found := [name for name in there if any(fnmatch(name, pattern) for pattern in patterns)]:
            return [*SMALL_FILES, "1_Pooling/config.json", *(found if whole else ())]
    raise ValueError(f"it holds no {' or '.join(pattern for patterns in WEIGHTS for pattern in patterns[:1])}")


def has_weights(folder: Path) -> bool:
    """Whether a folder of the hub's cache holds weights, and all parts of them."""
    for whole, part in WEIGHTS:
        parts = [path.name for path in folder.glob(part)]  # model-00001-of-00002.safetensors
        if (folder / whole).is_file() or (parts and f"-of-{len(parts):05d}." in parts[0]):
            return True
    return False


def torch_file(url: str) -> Path:
    """Where torch keeps what it fetches from an address of weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(urlsplit(url).path).name


def is_cached(repository: str, names: Sequence[str]) -> bool:
    """Whether the hub's cache holds a file of one of these names of `OWNER/NAME` or `OWNER/NAME@REVISION`."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision or None), str) for file in names)


def read_json(folder: Path, name: str, where: str) -> dict[str, Any]:
    """A file of settings, {} where there is none.

    Raises:
        UserError: it is damaged, or may not be read.
    """
    try:
        found = json.loads((folder / name).read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{where}: {folder / name} cannot be read ({error.strerror}); allow it, or name another folder"
                        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {folder / name} is damaged ({reason_of(error)}); {WHOLE}") from None


def kind_of(folder: Path, kinds: Mapping[str, Kind], modality: str, where: str) -> str:
    """The `model_type` of a folder, one of `kinds`.

    Raises:
        UserError: it has none, or another one.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{where}: {folder} holds no {CONFIG}, so it is no model of transformers or timm")
    found = read_json(folder, CONFIG, where).get("model_type")
    if found not in kinds:
        raise UserError(f"{where}: its {CONFIG} says model_type {found!r}, which is no tower for {modality} here. "
                        f"{similar(str(found), kinds)}")
    return str(found)


def licence_of(folder: Path) -> str:
    """The licence that a folder's card states, or "unknown"."""
    try:
        card = (folder / CARD).read_text("utf-8", errors="replace")
    except OSError:
        return "unknown"
    head = re.match(r"\A---\s*\n(.*?)\n---", card, re.DOTALL)
    found = {key: value.strip(" \"'") for key, value in re.findall(r"(?m)^(license|license_name):[ \t]*(.+)$",
                                                                     head[1] if head else "")}
    stated = found.get("license", "unknown")
    return found.get("license_name", stated) if stated == "other" else stated


# ---- models ------------------------------------------------------------------------------------------------------


def config_of(folder: Path, kind: Kind, where: str) -> Any:
    """The settings of the part that `kind` names, as the library reads them from a folder's config.json.

    Raises:
        UserError: they are damaged.
    """
    import transformers

    try:
        with quiet():
            return getattr(transformers, kind.config).from_pretrained(folder, local_files_only=True,
                                                                      trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # files made to deceive may provoke any
        raise UserError(f"{where}: {folder / CONFIG} is damaged ({reason_of(error)}); {WHOLE}") from None


def load(folder: Path, kind: Kind, config: Any, where: str) -> Any:
    """The part of the checkpoint in `folder` that `kind` names, of the settings `config`, in float32 and complete.

    Raises:
        UserError: a file is missing or damaged, holds code, or lacks a parameter that the tower reads.
    """
    import transformers

    model_class = getattr(transformers, kind.model)
    try:
        with quiet():
            model, found = model_class.from_pretrained(
                folder, config=config, dtype=torch.float32, trust_remote_code=False, local_files_only=True,
                weights_only=True, output_loading_info=True, attn_implementation=kind.attention, **kind.options)
    except MemoryError:
        raise
    except Exception as error:  # files made to deceive may provoke any
        raise UserError(f"{where}: {folder} cannot be loaded ({reason_of(error)}); {WHOLE}") from None
    missing = [name for name in found["missing_keys"] if not any(fnmatch(name, one) for one in kind.may_lack)]
    if missing or found["mismatched_keys"]:
        names = sorted([*missing, *(str(one[0]) for one in found["mismatched_keys"])])
        raise UserError(f"{where}: the weights in {folder} lack {counted(len(names), 'parameter')} of {kind.model} or "
                        f"have others in their place, such as {names[0]}; take a whole copy of them, or name the model "
                        "they belong to")
    return kind.part(model)


def rebuild(kind: Kind, config: Mapping[str, Any]) -> Any:
    """The part that `kind` names, with random weights."""
    import transformers

    if any(isinstance(value, int) and value > (MAX_LAYERS if "layers" in key else MAX_SIZE)
           for key, value in config.items()):
        raise UserError("a tower of absurd size, which is not built")
    settings = getattr(transformers, kind.config)(**config)
    settings._attn_implementation = kind.attention
    module, _, name = (kind.part_model or kind.model).rpartition(".")
    return getattr(importlib.import_module(f"transformers.{module}".rstrip(".")), name)(settings, **kind.options)


def described(tower_family: str, modality: str, source: str, folder: Path, taken: Input, model_type: str,
              config: Any) -> dict[str, Any]:
    """The description of a tower opened from `folder`; of its settings what differs from the library's defaults."""
    values = {key: value for key, value in json.loads(config.to_json_string(use_diff=True)).items()
              if key not in NOT_SETTINGS}
    return describe(tower_family, modality, source, licence_of(folder), taken, kind=model_type, config=values)


class quiet:
    """Inside, transformers prints no bars and no warnings: what they would say is checked here. Threads may be inside
    at the same time."""

    _lock, _inside = threading.Lock(), 0
    _before = (0, False)

    def __enter__(self) -> None:
        from transformers.utils import logging

        with quiet._lock:
            if not quiet._inside:
                quiet._before = logging.get_verbosity(), logging.is_progress_bar_enabled()
                logging.set_verbosity_error()
                logging.disable_progress_bar()
            quiet._inside += 1

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        with quiet._lock:
            quiet._inside -= 1
            if not quiet._inside:
                logging.set_verbosity(quiet._before[0])
                if quiet._before[1]:
                    logging.enable_progress_bar()


def reason_of(error: BaseException) -> str:
    """The message of a library's error on one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__
