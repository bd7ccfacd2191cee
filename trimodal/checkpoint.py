"""Checkpoints: written whole or not at all, recognised when damaged, loaded without running code. Plain dicts only.

A file is what `torch.save` writes, a zip, with the SHA-256 of all bytes before it as its closing comment. The digest is
inside the file, not beside it, so that one rename moves both: at no moment does a good file stand beside the digest
of another one, and a copied file keeps its own. To torch it is an ordinary file: `torch.load(path)` works.

    save({"schema": 1, "model_state_dict": model.state_dict()}, "outputs/checkpoints/best_model.pt")
    state = load("outputs/checkpoints/best_model.pt")
"""

import base64
import hashlib
import json
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch

from trimodal.errors import CheckpointError
from trimodal.files import replacing, set_aside

SCHEMA = 1  # raised when a reader of the older layout would misread the newer one
ROOM = 1.02  # times the bytes of the tensors

_ZIP_START = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22  # the end record of a zip without a comment; its last two bytes are the comment's length
_MARK = b"trimodal checkpoint, sha256 of the bytes before this line: "
_FOOTER_BYTES = len(_MARK) + 64
_CALLS = re.compile(r"collections OrderedDict|torch \w+|torch\._utils _rebuild_tensor_v[23]|"
                    r"torch\.storage UntypedStorage")  # of tensors
_EPOCH_FILE = re.compile(r"checkpoint_epoch_(\d+)(?:_step_(\d+))?\.pt")


def save(state: Mapping[str, Any], path: str | Path) -> None:
    """Write `state` at `path`, whole or not at all; an earlier file stays until the new one is safely on the disk.

    Tensors are saved as CPU tensors. A "schema" key is added where `state` has none. A file there that `save` did not
    write is set aside first, and a line says so.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the temporary file is gone.
        TypeError: `state` holds something that a safe load would refuse (named by its keys).
    """
    path = Path(path)
    content = {"schema": SCHEMA} | plain(state)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            write_with_digest(content, cast(BinaryIO, file))
            if os.path.lexists(path) and not is_own(path):
                set_aside(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be saved ({_reason(error)}); an earlier file there is unchanged. "
                              "Free space there") from None


def export(state: Mapping[str, Any], path: str | Path) -> None:
    """The weights of a state as safetensors at `path`, and all else of it as JSON in `config.json` beside.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; earlier files are unchanged.
    """
    path = Path(path)
    weights, others = exported(state)
    try:
        with replacing(path) as file:
            file.write(weights)
        with replacing(path.with_name("config.json")) as file:
            file.write(others)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be saved ({_reason(error)})") from None


def exported(state: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """What `export` writes: the weights, and all else."""
    import safetensors.torch

    others = plain({name: value for name, value in state.items() if name != "model_state_dict"})
    weights = {name: value.contiguous() for name, value in plain(state["model_state_dict"]).items()}
    text = json.dumps(others, ensure_ascii=False, indent=1, default=_written_tensor)
    return safetensors.torch.save(weights, {"format": "pt"}), text.encode()


def _written_tensor(value: Any) -> dict[str, str]:
    """A tensor of whole numbers as JSON: what a state holds beside its weights."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or value.ndim != 1:
        raise TypeError(f"config.json holds no {type(value).__name__}, and of tensors only int64 [n]")
    return {"int64": base64.b64encode(value.numpy().astype("<i8").tobytes()).decode("ascii")}


def _read_tensor(value: dict[str, Any]) -> Any:
    if value.keys() == {"int64"} and isinstance(value["int64"], str):
        return torch.from_numpy(np.frombuffer(base64.b64decode(value["int64"], validate=True), "<i8").astype(np.int64))
    return value


def check_room(folder: Path, *contents: Any) -> None:
    """Raises CheckpointError where `folder` has no room for the tensors of all these contents."""
    need, free = ROOM * sum(map(tensor_bytes, contents)), shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(f"{folder}: the next checkpoint takes {need / 1e9:.2f} GB, {free / 1e9:.2f} are free; "
                              "earlier ones are unchanged. Free space there")


def tensor_bytes(value: Any) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def load_export(path: str | Path) -> dict[str, Any]:
    """What `export` wrote, as one dict. Raises CheckpointError where one of the two files is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        others = json.loads(Path(path).with_name("config.json").read_text("utf-8"), object_hook=_read_tensor)
        return {**others, "model_state_dict": load_file(path)}
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read, with the config.json beside it ({_reason(error)})") from None


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The dict that `save` wrote. Holds plain data only: no code of the file is run.

    Raises:
        CheckpointError: not there, not ours, truncated, changed since it was written, of a newer schema, or made to
            run code or to fill the memory.
    """
    path = Path(path)
    verify(path)
    _check_parts(path)
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a file made to deceive may provoke any error inside torch.load
        raise CheckpointError(f"{path}: refused, it holds more than tensors and numbers ({_reason(error)})") from None
    if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
        raise CheckpointError(f"{path}: not a checkpoint of this project (it names no schema)")
    if state["schema"] > SCHEMA:
        raise CheckpointError(f"{path}: written by a newer version (schema {state['schema']}, this one reads up to "
                              f"{SCHEMA}); update the project to open it")
    return state


def is_own(path: str | Path) -> bool:
    """Whether a file, and no link to one, ends as `save` ends its files; the rest of it is not looked at."""
    path = Path(path)
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return _read_at(file, file.seek(0, os.SEEK_END) - _FOOTER_BYTES, _FOOTER_BYTES).startswith(_MARK)
    except OSError:
        return False


def verify(path: str | Path) -> None:
    """Read the whole file and compare its digest; touches no pickle.

    Raises:
        CheckpointError: not there, not ours, truncated, or changed since it was written.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            problem = _problem(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint{_neighbours(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)})") from None
    if problem:
        raise CheckpointError(f"{path}: {problem}")


def find_latest(folder: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole `checkpoint_epoch_*.pt`, or None; `say` hears one line for each damaged one passed over."""
    for path in _by_age(folder):
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
    for path in [path for path in _by_age(folder) if is_own(path)][keep_last:]:
        epoch, step = _position(path)
        whole_epoch = step == float("inf")
        if not (keep_every and whole_epoch and epoch % keep_every == 0):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def later_than(path: str | Path) -> list[Path]:
    """Each `checkpoint_epoch_*.pt` of ours beside `path` that lies further on than it."""
    path = Path(path)
    return [other for other in _by_age(path.parent) if _position(other) > _position(path) and is_own(other)]


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
        return {_plain_key(key, where): plain(item, copy, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item, copy, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where}: a checkpoint holds tensors, numbers, text, lists, dicts; not a {type(value).__name__}")


def describe_mismatch(state_dict: Mapping[str, Any], model_state_dict: Mapping[str, Any]) -> str | None:
    """One line on how a file's weights differ from a model's, by prefix and at most 5 names each; None if they fit."""
    missing = [name for name in model_state_dict if name not in state_dict]
    unexpected = [name for name in state_dict if name not in model_state_dict]
    reshaped = [f"{name} {list(value.shape)} in the file, {list(model_state_dict[name].shape)} in the model"
                for name, value in state_dict.items()
                if name in model_state_dict and value.shape != model_state_dict[name].shape]
    parts = [f"{title}: {_by_prefix(names)}" for title, names in
             (("missing", missing), ("unexpected", unexpected), ("other shape", reshaped)) if names]
    return "; ".join(parts) or None


def _by_prefix(names: Iterable[str], shown: int = 5) -> str:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".", 1)[0], []).append(name)
    return " | ".join(f"{prefix} ({len(group)}): {', '.join(group[:shown])}"
                      + (f" and {len(group) - shown} more" if len(group) > shown else "")
                      for prefix, group in groups.items())


def _plain_key(key: Any, where: str) -> str | int:
    if type(key) in (str, int):
        return key
    raise TypeError(f"{where}: the key {key!r} is a {type(key).__name__}; keys are text or whole numbers")


def _plain_tensor(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    host = tensor.detach().cpu()
    drags_storage = host.untyped_storage().nbytes() != host.numel() * host.element_size()
    moved = host.device != tensor.device  # then `cpu()` has copied already
    return host.clone() if drags_storage or (copy and not moved) else host


class _DigestWriter:
    """Takes what torch.save writes, in order, and hashes it on the way; keeps the end record back to add a comment."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()
        self.tail = b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = len(data)
        if size >= _ZIP_END_BYTES:  # the common case copies no more than the last 22 bytes
            self._pass_on(self.tail)
            self._pass_on(data[:-_ZIP_END_BYTES])
            self.tail = bytes(data[-_ZIP_END_BYTES:])
        else:
            joined = self.tail + bytes(data)
            self._pass_on(joined[:-_ZIP_END_BYTES])
            self.tail = joined[-_ZIP_END_BYTES:]
        return size

    def flush(self) -> None:
        self.file.flush()

    def finish(self) -> None:
        assert self.tail.startswith(_ZIP_END) and self.tail.endswith(b"\0\0"), "torch.save ends as a zip, uncommented"
        self._pass_on(self.tail[:-2] + _FOOTER_BYTES.to_bytes(2, "little"))
        self._pass_on(_MARK)
        self.file.write(self.digest.hexdigest().encode())

    def _pass_on(self, data: Any) -> None:
        self.digest.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def write_with_digest(content: Mapping[str, Any], file: BinaryIO) -> None:
    """What `save` puts into a file, whatever `content` holds."""
    writer = _DigestWriter(file)
    try:
        torch.save(content, cast(IO[bytes], writer))  # it asks for write and flush only
    except RuntimeError:
        if writer.error is None:
            raise
        raise writer.error from None  # torch hides a full disk behind a complaint about positions
    writer.finish()


def _problem(file: BinaryIO) -> str | None:
    """What is wrong with an open file, or None."""
    size = file.seek(0, os.SEEK_END)
    footer = _read_at(file, size - _FOOTER_BYTES, _FOOTER_BYTES)
    if footer.startswith(_MARK):
        if _sha256(file, size - 64) == footer[len(_MARK):].decode("ascii", "replace"):
            return None
        return "damaged: its content is not what was written (the digest differs)"
    start = _read_at(file, 0, len(_ZIP_START))
    if start != _ZIP_START[: len(start)]:
        return "not a checkpoint of this project"
    if _read_at(file, size - _ZIP_END_BYTES, len(_ZIP_END)) == _ZIP_END:
        return "not a checkpoint of this project (a file of torch or a zip, without our digest)"
    return f"truncated or damaged: it ends after {size} bytes without its digest"


def _check_parts(path: Path) -> None:
    """Refuse a zip whose parts claim more than the file holds, since torch compresses none, and a pickle that calls for
    more than tensors take: torch's safe load would let it make a bytearray of any length."""
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(part.file_size for part in archive.infolist())
            if claimed > path.stat().st_size:
                raise CheckpointError(f"{path}: refused, its parts claim {claimed:,} bytes, more than the file has")
            calls = [call for part in archive.infolist() if part.filename.endswith(".pkl")
                     for call in _calls(archive.read(part))]
    except CheckpointError:
        raise
    except Exception as error:  # a file made to deceive may provoke any error in zipfile and pickletools
        raise CheckpointError(f"{path}: refused, it is no whole zip of pickles ({_reason(error)})") from None
    if others := [call for call in calls if not _CALLS.fullmatch(call)]:
        raise CheckpointError(f"{path}: refused, it holds more than tensors and numbers ({others[0]})")


def _calls(pickled: bytes) -> list[str]:
    """Names that a pickle looks up; those of newer protocols, which torch does not write, have none here."""
    return [str(name) for code, name, _ in pickletools.genops(pickled)
            if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")]


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(max(offset, 0))
    return file.read(size)


def _sha256(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while size and (block := file.read(min(size, 1 << 22))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _position(path: Path) -> tuple[int, float]:
    """(epoch, step) of a file name; the file of a whole epoch comes after those of its steps."""
    match = _EPOCH_FILE.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), float(match[2]) if match[2] else float("inf")


def _by_age(folder: str | Path) -> list[Path]:
    """All `checkpoint_epoch_N.pt` and `checkpoint_epoch_N_step_M.pt`, newest first; times of files say nothing here."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _EPOCH_FILE.fullmatch(p.name)), key=_position, reverse=True)


def _neighbours(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
    return f"; {path.parent} has {', '.join(there[-5:])}" if there else ""


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((text or type(error).__name__).split())[:200]
