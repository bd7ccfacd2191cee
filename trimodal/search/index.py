"""An index of a folder's pictures and sounds: what they are and their features, in one file; and the search in it.

    index = Index.open(Path("outputs/index"))
    for hit in index.search(model.encode(texts=["a dog barks"])[0], "image", top=10):
        print(index.folder / hit.entry.path, hit.score)

The file is safetensors: float32 features by kind, one row for each entry, and the entries as JSON in bytes. It appears
whole or not at all, and is mapped, not read: a search of 100,000 features of 512 numbers reads 205 MB of memory.

Shape suffixes: N entries of one kind, K candidates, F numbers of a feature.
"""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimodal.errors import UserError
from trimodal.files import replacing

Kind = Literal["image", "audio"]
KINDS: tuple[Kind, ...] = ("image", "audio")
FILE = "index.safetensors"
SCHEMA = 1
_ENTRIES, _ABOUT = "entries", "index"  # names within the file: of a tensor, and of the metadata
_ROWS = 4096  # of features written, or computed in float64, at once


class Entry(NamedTuple):
    """A picture or a sound: a file, or of a video its middle frame or its sound track."""

    kind: Kind
    path: str  # from the folder that is indexed, with "/"
    digest: str  # SHA-256 of the file
    start_s: float  # of the stretch of sound; 0 of pictures
    duration_s: float
    size: int  # of the file, and when it was changed last: while both stay, it is not read again; 0: not to be trusted
    changed_ns: int


class Hit(NamedTuple):
    """An entry that was found."""

    entry: Entry
    score: float  # cosine
    deviations: float  # by how many standard deviations of all scores of the kind this one is above their mean


@dataclass(frozen=True)
class ModelName:
    """Which model made the features: its weights by `digest`, and where they were."""

    source: str
    digest: str
    embed_dim: int
    modalities: tuple[str, ...]

    @classmethod
    def of(cls, model: Any, source: str) -> "ModelName":
        """That of an open model."""
        return cls(source, model.digest, model.embed_dim, tuple(model.modalities))


@dataclass(frozen=True)
class Index:
    """Entries by kind in the order of their paths, and a row of features for each."""

    place: Path  # the folder of the index
    folder: Path  # the folder that is indexed, absolute
    model: ModelName
    by_kind: dict[Kind, list[Entry]]
    tensors: dict[Kind, Tensor]

    @classmethod
    def open(cls, place: str | Path) -> "Index":
        """Open the index in the folder `place`; its features are mapped into memory.

        Raises:
            UserError: there is none, or it cannot be read, is damaged or of a later release; or see check_name.
        """
        check_name(place)
        path = Path(place) / FILE
        try:
            path.open("rb").close()  # the library says of a file that may not be read that it is not there
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise UserError(f"{place}: holds no index; make it with: python search.py index FOLDER --checkpoint FILE "
                            f"--index {shlex.quote(str(place))}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); allow it, or name another --index") from None
        try:
            return cls._read(path)
        except UserError:
            raise
        except Exception as error:  # damage makes the library, and the lines below, raise any
            raise UserError(f"{path}: is damaged, or no index ({error}); remove it or name another --index, and index "
                            "again") from None

    @classmethod
    def _read(cls, path: Path) -> "Index":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            if about["schema"] != SCHEMA:
                raise UserError(f"{path}: is of schema {about['schema']}, this release reads {SCHEMA}; index again, "
                                "with another --index")
            tensors = {kind: file.get_tensor(kind) for kind in KINDS}
            entries = [Entry(*row) for row in json.loads(file.get_tensor(_ENTRIES).numpy().tobytes())]
        model = ModelName(**{**about["model"], "modalities": tuple(about["model"]["modalities"])})
        by_kind = {kind: [entry for entry in entries if entry.kind == kind] for kind in KINDS}
        for kind, features in tensors.items():
            if (features.shape, features.dtype) != ((len(by_kind[kind]), model.embed_dim), torch.float32):
                raise ValueError(f"its features of kind {kind} are not those of its entries")
        return cls(path.parent, Path(about["folder"]), model, by_kind, tensors)

    @cached_property
    def entries(self) -> list[Entry]:
        """All entries: pictures, then sounds."""
        return [entry for kind in KINDS for entry in self.by_kind[kind]]

    def features(self, kind: Kind) -> Tensor:
        """Features of the entries of one kind, float32 [N, F], L2-normalised; row i is that of `by_kind[kind][i]`."""
        return self.tensors[kind]

    def search(self, query_F: Tensor, kind: Kind, top: int = 10) -> list[Hit]:
        """The `top` entries of one kind whose features have the highest cosine with an L2-normalised vector, as exact
        as float64; equal ones in the order of the entries."""
        found = nearest(self.features(kind), query_F, top)
        return [Hit(self.by_kind[kind][row], score, deviations) for row, score, deviations in found]


def check_name(place: str | Path) -> None:
    """Raise UserError where an index's folder has a name that is no UTF-8, which the library that maps files wants."""
    try:
        os.fspath(place).encode()
    except UnicodeEncodeError:
        raise UserError(f"{printable(place)}: is no UTF-8, as the name of an index must be; choose another --index"
                        ) from None


# ---- searching ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def nearest(features_NF: Tensor, query_F: Tensor, top: int) -> list[tuple[int, float, float]]:
    """(row, cosine, deviations) of the `top` rows with the highest cosines, as if all were computed in float64.

    One product in float32 tells which rows can be among them: a sum of F products of L2-normalised vectors is off by
    less than F * 2**-24 (N. Higham, Accuracy and Stability of Numerical Algorithms, 3.1). These rows are computed in
    float64, and stand in that order.
    """
    top = min(top, len(features_NF))
    if top <= 0:
        return []
    query_F = query_F.detach().to("cpu", torch.float32)
    scores_N = torch.mv(features_NF, query_F)
    off_by = len(query_F) * torch.finfo(torch.float32).eps  # eps is 2**-23: twice as much, since norms are rounded too
    rows_K = (scores_N >= scores_N.topk(top).values[-1] - 2 * off_by).nonzero()[:, 0]
    exact_K = torch.cat([(features_NF[part].double() * query_F.double()).sum(1) for part in rows_K.split(_ROWS)])
    order = torch.argsort(exact_K, descending=True, stable=True)[:top]
    mean, deviation = scores_N.mean().item(), scores_N.std(correction=0).item()
    return [(row, score, (score - mean) / deviation if deviation > off_by else 0.0)
            for row, score in zip(rows_K[order].tolist(), exact_K[order].tolist(), strict=True)]


# ---- writing -----------------------------------------------------------------------------------------------------


def write_index(place: Path, folder: Path, model: ModelName, entries: Sequence[Entry],
                features: Iterable[np.ndarray]) -> None:
    """Write an index over the one that is there. `entries` are pictures, then sounds; `features` are theirs in this
    order, float32 [F] each, and are taken as they are written: they need not fit into memory.

    The library that reads safetensors writes only what is in memory as a whole, so the file, a header and the bytes of
    the tensors, is written here.
    """
    listed = json.dumps(entries).encode("ascii")  # odd bytes of file names become escapes
    shapes = {kind: (sum(entry.kind == kind for entry in entries), model.embed_dim) for kind in KINDS}
    with replacing(place / FILE) as file:
        file.write(_header(shapes, len(listed), {"schema": SCHEMA, "folder": str(folder), "model": vars(model)}))
        for block in _blocks(features):
            file.write(np.stack(block).astype("<f4", copy=False).tobytes())
        file.write(listed)


def _header(shapes: dict[Kind, tuple[int, int]], listed_bytes: int, about: dict[str, Any]) -> bytes:
    """How a safetensors file begins: the length of its header in 8 bytes, and the header, which is JSON, padded so that
    the numbers lie as vector units like them."""
    header: dict[str, Any] = {"__metadata__": {_ABOUT: json.dumps(about)}}
    end = 0
    for kind, (rows, width) in shapes.items():
        begin, end = end, end + 4 * rows * width
        header[kind] = {"dtype": "F32", "shape": [rows, width], "data_offsets": [begin, end]}
    header[_ENTRIES] = {"dtype": "U8", "shape": [listed_bytes], "data_offsets": [end, end + listed_bytes]}
    text = json.dumps(header).encode("ascii")
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _blocks(features: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    block: list[np.ndarray] = []
    for feature in features:
        block.append(feature)
        if len(block) == _ROWS:
            yield block
            block = []
    if block:
        yield block


def printable(path: str | os.PathLike[str]) -> str:
    """A path as a terminal can show it in one line, whatever bytes it is made of."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
