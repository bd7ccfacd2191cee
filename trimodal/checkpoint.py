"""Checkpoints: written whole or not at all, recognised when damaged, loaded without running code. Plain data only.

A file is what `torch.save` writes, a zip, with the SHA-256 of all bytes before it as its closing comment. The digest is
inside the file, not beside it, so that one rename moves both. To torch it is an ordinary file, for `torch.load(path)`.

    save({"model_state_dict": model.state_dict()}, "outputs/checkpoints/best_model.pt")
    state = load("outputs/checkpoints/best_model.pt")
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch

from trimodal import __version__
from trimodal.errors import CheckpointError
from trimodal.files import replacing, set_aside

SCHEMA = 1  # raised when a reader of the older layout would misread the newer one
ROOM = 1.02  # times the bytes of the tensors

_MARK = b"trimodal checkpoint, sha256 of the bytes before this line: "
_COMMENT_BYTES = len(_MARK) + 64
TOKENIZER = "tokenizer.json"  # may lie beside config.json, where {"file": TOKENIZER} stands for its text
_BESIDE = {"int64": "<i8", "float32": "<f4", "float64": "<f8"}  # tensors in config.json, and their bytes
_EPOCH_FILE = re.compile(r"checkpoint_epoch_(\d+)(?:_step_(\d+))?\.pt")


# ---- writing -----------------------------------------------------------------------------------------------------


def save(state: Mapping[str, Any], path: str | Path) -> None:
    """Write `state` at `path`, whole or not at all; an earlier file stays until the new one is safely on the disk.

    Tensors are saved as CPU tensors. The schema and the version of the project are added where `state` has none. A file
    there that `save` did not write is set aside first, and a line says so.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the temporary file is gone.
        TypeError: `state` holds something that a safe load would refuse (named by its keys).
    """
    path = Path(path)
    content = {"schema": SCHEMA, "version": __version__} | plain(state)
    with _errors_as_checkpoint_error(path), replacing(path, "w+b") as file:
        write_with_digest(content, cast(BinaryIO, file))
        if os.path.lexists(path) and not is_own(path):
            set_aside(path)


def write_with_digest(content: Mapping[str, Any], file: BinaryIO) -> None:
    """Write `content` with `torch.save`, and the SHA-256 of these bytes as the comment of the zip. `file` is open for
    writing and reading; unlike `save`, this does not check that `content` can be loaded safely."""
    try:
        torch.save(content, cast(IO[bytes], file))
    except RuntimeError as error:  # torch hides a full disk behind a complaint about positions
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    file.seek(-2, os.SEEK_END)  # the length of the zip's comment ends the file
    file.write(_COMMENT_BYTES.to_bytes(2, "little") + _MARK)
    file.write(_sha256(file, file.tell()).encode())


def export(state: Mapping[str, Any], path: str | Path) -> None:
    """Write the weights of a state as safetensors at `path`, and all else of it as JSON in `config.json` beside it.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier files are unchanged.
    """
    import safetensors.torch

    path, others = Path(path), plain({"version": __version__, **state})
    weights = {name: value.contiguous() for name, value in others.pop("model_state_dict").items()}
    text = json.dumps(others, ensure_ascii=False, indent=1, default=_written_tensor)
    with _errors_as_checkpoint_error(path):
        with replacing(path) as file:
            file.write(safetensors.torch.save(weights, {"format": "pt"}))
        with replacing(path.with_name("config.json"), "w") as file:
            file.write(text)


def _written_tensor(value: Any) -> dict[str, Any]:
    """A small tensor as JSON: what a state holds beside its weights. `shape` is left out where it is [n]."""
    name = str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""
    if name not in _BESIDE:
        raise TypeError(f"config.json holds no {name or type(value).__name__}; of tensors {', '.join(_BESIDE)}")
    values = {name: base64.b64encode(value.numpy().astype(_BESIDE[name]).tobytes()).decode("ascii")}
    return values if value.ndim == 1 else values | {"shape": list(value.shape)}


def _read_value(value: dict[str, Any], folder: Path) -> Any:
    """What stands in config.json for a small tensor, or for the text of the tokenizer's file beside it."""
    if value != {"file": TOKENIZER}:
        return _read_tensor(value)
    with _part(folder / TOKENIZER):
        text = (folder / TOKENIZER).read_text("utf-8")
        json.loads(text)  # a file that was cut off is told here, by its name
    return text


def _read_tensor(value: dict[str, Any]) -> Any:
    (name, *others) = sorted(value, key=lambda key: key == "shape") or [""]
    if name not in _BESIDE or others not in ([], ["shape"]) or not isinstance(value[name], str):
        return value
    values = np.frombuffer(base64.b64decode(value[name], validate=True), _BESIDE[name])
    return torch.from_numpy(values.astype(name).reshape(value.get("shape", -1)))


def check_room(folder: Path, *contents: Any) -> None:
    """Raise CheckpointError where `folder` has no room for the tensors of all these contents."""
    need, free = ROOM * sum(map(tensor_bytes, contents)), shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(f"{folder}: the next checkpoint takes {need / 1e9:.2f} GB, {free / 1e9:.2f} are free; "
                              "earlier ones are unchanged. Free space there")


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def plain(value: Any, copy: bool = False, where: str = "state") -> Any:
    """`value` as plain dicts, lists, tuples, numbers, strings and detached CPU tensors, as a safe load accepts them.

    A tensor that is a view of a larger storage is cloned, since the file would hold all of that storage. With `copy`
    every tensor is: a snapshot, which later steps of training do not change.

    Raises:
        TypeError: names the keys that lead to a value of another kind.
    """
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, copy)
    if isinstance(value, Mapping):
        if odd := [key for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{where}: the key {odd[0]!r} is a {type(odd[0]).__name__}; keys are text or whole numbers")
        return {key: plain(item, copy, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item, copy, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where}: a checkpoint holds tensors, numbers, text, lists, dicts; not a {type(value).__name__}")


def _plain_tensor(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    host = tensor.detach().cpu()
    drags_storage = host.untyped_storage().nbytes() != host.numel() * host.element_size()
    moved = host.device != tensor.device  # then `cpu()` has copied already
    return host.clone() if drags_storage or (copy and not moved) else host


@contextlib.contextmanager
def _errors_as_checkpoint_error(path: Path) -> Iterator[None]:
    """Make the folder of `path` and run the block, which writes there. An OSError of either is raised again as a
    CheckpointError that names `path` and says what to do."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be saved ({_reason(error)}); an earlier file there is unchanged. "
                              "Free space there") from None


# ---- reading -----------------------------------------------------------------------------------------------------


def load(path: str | Path) -> dict[str, Any]:
    """The dict that `save` wrote, its tensors on the CPU. Holds plain data only: no code of the file is run.

    A file without our digest, as torch.save writes one, is opened too, and a line says that damage would not be
    noticed.

    Raises:
        CheckpointError: not there, not ours, truncated, changed since it was written, of a newer schema, or more than
            plain data.
    """
    path = Path(path)
    with _opened(path) as file:
        has_digest = _check(path, file)
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # a file made to deceive may provoke any error inside torch.load
            raise CheckpointError(f"{path}: refused, it holds more than tensors and numbers, or is damaged "
                                  f"({_reason(error)}); take another one") from None
    if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
        raise CheckpointError(f"{path}: not a checkpoint of this project (it names no schema)")
    if state["schema"] > SCHEMA:
        raise CheckpointError(f"{path}: written by a newer version of the project ({state.get('version')}, schema "
                              f"{state['schema']}; this is {__version__}, schema {SCHEMA}); update the project")
    if not has_digest:
        print(f"{path}: has no digest of this project, so damage to it would not be noticed", flush=True)
    return state


def load_export(path: str | Path) -> dict[str, Any]:
    """Read the weights that `export` wrote to `path` (safetensors) and the config.json beside them, as one dict.

    The weights are under "model_state_dict".

    Raises:
        CheckpointError: a file is missing or damaged; the line names this one.
    """
    from safetensors.torch import load_file

    path = Path(path)
    with _part(path):
        weights = load_file(path)
    with _part(path.with_name("config.json")):
        others = json.loads(path.with_name("config.json").read_text("utf-8"),
                            object_hook=lambda value: _read_value(value, path.parent))
        return {**others, "model_state_dict": weights}


@contextlib.contextmanager
def _part(path: Path) -> Iterator[None]:
    """What cannot be read within is the file `path` of an exported folder."""
    from safetensors import SafetensorError

    try:
        yield
    except CheckpointError:  # of another file
        raise
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({_reason(error)})"
        raise CheckpointError(f"{path}: {reason}; take a whole copy of its folder") from None


def verify(path: str | Path) -> None:
    """Read the whole file and compare its digest; touches no pickle.

    Raises:
        CheckpointError: not there, truncated, changed since it was written, or without our digest.
    """
    with _opened(Path(path)) as file:
        if not _check(Path(path), file):
            raise CheckpointError(f"{path}: has no digest of this project, so damage to it would not be noticed; name "
                                  "it (--resume PATH) to take it all the same")


def is_own(path: str | Path) -> bool:
    """Whether a file, and no link to one, ends as `save` ends its files; the rest of it is not looked at."""
    path = Path(path)
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.startswith(_MARK)
    except Exception:  # whatever zipfile says of a file that is no whole zip
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        there = sorted(p.name for p in path.parent.glob("*.pt"))
        others = f"; {path.parent} has {', '.join(there[-5:])}" if there else ""
        raise CheckpointError(f"{path}: no such checkpoint{others}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)})") from None


def _check(path: Path, file: BinaryIO) -> bool:
    """Whether an open file has our digest, which then is right.

    Raises:
        CheckpointError: no whole zip, changed since it was written, or with parts that claim more bytes than it has,
            though torch compresses none.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            comment, claimed = archive.comment, sum(part.file_size for part in archive.infolist())
    except Exception:  # whatever zipfile says of a file that is no whole zip
        raise CheckpointError(f"{path}: no checkpoint of this project, or truncated or damaged: it ends after {size} "
                              "bytes; take another one") from None
    if claimed > size:
        raise CheckpointError(f"{path}: refused, its parts claim {claimed:,} bytes, more than the file has")
    file.seek(-2, os.SEEK_END)  # of a zip without a comment this is its length, 0: as torch.save writes it
    if not comment and file.read() == b"\0\0":
        return False
    if not comment.startswith(_MARK) or _sha256(file, size - 64).encode() != comment[len(_MARK):]:
        raise CheckpointError(f"{path}: damaged, its {size} bytes are not what was written (the digest "
                              "differs); take another one")
    return True


def _sha256(file: BinaryIO, size: int) -> str:
    """SHA-256, in hex, of the first `size` bytes of a file; its position is behind them afterwards."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (block := file.read(min(size, 1 << 22))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((text or type(error).__name__).split())[:200]


# ---- the files of a run ------------------------------------------------------------------------------------------


def find_latest(folder: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole `checkpoint_epoch_*.pt`, or None; `say` gets one line for each other one that is passed over."""
    for path in by_age(folder):
        try:
            verify(path)
        except CheckpointError as error:
            say(f"skipped {error}")
        else:
            return path
    return None


def rotate(folder: str | Path, keep_last: int, keep_every: int = 10) -> list[Path]:
    """Delete all `checkpoint_epoch_*.pt` but the newest `keep_last` and every `keep_every`-th epoch (0: none of these).

    Other files (best_model.pt, final_model.pt, what `save` did not write) are never touched. Returns what was deleted.
    """
    removed = []
    for path in [path for path in by_age(folder) if is_own(path)][keep_last:]:
        epoch, step = _position(path)
        whole_epoch = step == float("inf")
        if not (keep_every and whole_epoch and epoch % keep_every == 0):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def later_than(path: str | Path) -> list[Path]:
    """The `checkpoint_epoch_*.pt` beside `path` that this project wrote and whose epoch or step is later."""
    path = Path(path)
    return [other for other in by_age(path.parent) if _position(other) > _position(path) and is_own(other)]


def by_age(folder: str | Path) -> list[Path]:
    """All `checkpoint_epoch_N.pt` and `checkpoint_epoch_N_step_M.pt`, newest first; times of files say nothing here."""
    found = [path for path in Path(folder).glob("checkpoint_epoch_*") if _EPOCH_FILE.fullmatch(path.name)]
    return sorted(found, key=_position, reverse=True)


def _position(path: Path) -> tuple[int, float]:
    """(epoch, step) of a file name; the file of a whole epoch comes after those of its steps."""
    match = _EPOCH_FILE.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), float(match[2]) if match[2] else float("inf")


# ---- weights that do not fit -------------------------------------------------------------------------------------


def has_tower(state: Mapping[str, Any], modality: str) -> bool:
    """Whether a checkpoint holds the weights of a pretrained tower: those to resume from may leave out frozen ones."""
    return any(name.startswith(f"{modality}.tower.") for name in state["model_state_dict"])


def describe_mismatch(state_dict: Mapping[str, Any], model_state_dict: Mapping[str, Any]) -> str | None:
    """One line on how a file's weights differ from a model's, by prefix and at most 5 names each; None if they fit."""
    missing = [name for name in model_state_dict if name not in state_dict]
    unexpected = [name for name in state_dict if name not in model_state_dict]
    reshaped = [f"{name} {list(value.shape)} in the file, {list(model_state_dict[name].shape)} in the model"
                for name, value in state_dict.items()
                if name in model_state_dict and value.shape != model_state_dict[name].shape]
    groups = [f"{title}: {_by_prefix(names)}" for title, names in
              (("missing", missing), ("unexpected", unexpected), ("other shape", reshaped)) if names]
    return "; ".join(groups) or None


def _by_prefix(names: Iterable[str], shown: int = 5) -> str:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".", 1)[0], []).append(name)
    return " | ".join(f"{prefix} ({len(group)}): {', '.join(group[:shown])}"
                      + (f" and {len(group) - shown} more" if len(group) > shown else "")
                      for prefix, group in groups.items())
