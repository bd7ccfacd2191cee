"""What search.py does: `index` makes the index of a folder, `query` prints what is found in it, `serve` opens a page.

Shape suffix: F numbers of a feature.
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from model import open_model
from trimodal.arguments import columns_of
from trimodal.data.probe import by_reason
from trimodal.errors import UserError, counted
from trimodal.inference.open_model import TextsCut
from trimodal.memory import devices
from trimodal.search.build import SKIPPED, Summary, build_index
from trimodal.search.index import FILE, KINDS, Hit, Index, Kind, printable

NAMES: dict[Kind, str] = {"image": "pictures", "audio": "sounds"}
FLAGS = {"texts": "TEXT", "images": "--image", "audio": "--audio"}  # of query, by the arguments of encode
DEFAULT = "outputs/index"
BETWEEN, NARROWEST = 3, 55  # letters between two columns of results, and of a column, 30 of them for the name


# ---- index -------------------------------------------------------------------------------------------------------


def index(options: argparse.Namespace) -> None:
    """Make or renew the index of options.folder, and print what was done.

    Raises:
        UserError: see build_index; or the checkpoint cannot be opened.
    """
    device = chosen_device(options.device)
    place, source = Path(options.index), options.checkpoint
    if source is None:
        if not os.path.exists(place / FILE):
            raise UserError(f"--checkpoint: is needed for a new index ({place} holds none); name the model to encode "
                            "with, such as outputs/checkpoints/best_model.pt or hub:openai/clip-vit-base-patch32")
        source = Index.open(place).model.source
    model = open_model(source, device)
    print(f"Model: {printable(source)}, which reads {', '.join(model.modalities)}; device: {model.device}")
    summary = build_index(Path(options.folder), place, model, lasting_name(source), replace=options.replace,
                          exclude=options.exclude)
    print(describe(summary, place))


def lasting_name(source: str) -> str:
    """A model's name that means the same in every folder."""
    if source.startswith("hub:"):
        name = source.removeprefix("hub:")
        place = os.path.abspath(os.path.expanduser(name))
        return f"hub:{place}" if os.path.isdir(place) else source
    return os.path.abspath(os.path.expanduser(source))


def describe(summary: Summary, place: Path) -> str:
    """What an indexing did: counts by kind, what was skipped and why, speed, and what to do next."""
    rows = [("", "entries", "encoded", "reused")]
    for kind, name in NAMES.items():
        total, new = summary.entries[kind], summary.encoded[kind]
        rows.append((name, f"{total:,}", f"{new:,}", f"{total - new:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:],
                                                                                           strict=True))])
             for row in rows]
    files = sum(summary.files.values())
    sorts = ", ".join(counted(count, name[:-1]) for name, count in sorted(summary.files.items()))
    lines.append(f"Files: {sorts}; {summary.num_others:,} of other kinds")
    lines += [f"  {counted(count, what.replace('s ', ' ', 1), what)}"
              for what, count in sorted(summary.without.items())]
    if summary.skipped:
        lines.append(f"Skipped: {len(summary.skipped):,}, listed in {place / SKIPPED}:")
        lines += [f"  {printable(line)}" for line in by_reason(summary.skipped)]
    if summary.num_forgotten:
        lines.append(f"Forgotten: {counted(summary.num_forgotten, 'entry', 'entries')}, gone or no longer to be read")
    lines.append(f"Time: {summary.seconds:.1f} s, {files / max(summary.seconds, 1e-9):,.1f} files/s; "
                 f"{(place / FILE).stat().st_size / 1e6:,.1f} MB in {place / FILE}")
    lines.append(f'Next: {command_for("query", place)} "a dog barks", or {command_for("serve", place)}')
    return "\n".join(lines)


def command_for(name: str, place: Path) -> str:
    """The words that start a command on the index in `place`."""
    return f"python search.py {name}" + ("" if str(place) == DEFAULT else f" --index {shlex.quote(str(place))}")


# ---- query -------------------------------------------------------------------------------------------------------


def query(options: argparse.Namespace) -> None:
    """Print the entries that are most like a text, a picture or a sound.

    Raises:
        UserError: the index or its model cannot be opened, or the question cannot be read.
    """
    device = chosen_device(options.device)
    found = Index.open(options.index)
    kinds = [options.kind] if options.kind else [kind for kind in KINDS if found.by_kind[kind]]
    if empty := [kind for kind in kinds if not found.by_kind[kind]]:
        raise UserError(f"--kind {empty[0]}: {options.index} holds no {NAMES[empty[0]]}")
    model = model_of(found, options.checkpoint, device)
    [(name, value)] = [(name, value) for name in ("texts", "images", "audio")
                       if (value := getattr(options, name)) is not None]
    query_F = encode_question(model, name, value)
    hits = {kind: found.search(query_F, kind, options.top) for kind in kinds}
    print(as_json(found, hits) if options.json else as_columns(found, hits))


def encode_question(model: Any, name: str, value: str) -> Tensor:
    """The feature of what a query asks for, [F]. `name`: of the argument of encode.

    Raises:
        UserError: the model does not read its kind, or the file cannot be read.
    """
    if (kind := {"images": "image", "texts": "text"}.get(name, name)) not in model.modalities:
        raise UserError(f"{FLAGS[name]}: this model reads no {kind}, but {' and '.join(model.modalities)}")

    def refuse(number: int, reason: str) -> None:
        raise UserError(f"{FLAGS[name]}: {reason}")

    with warnings.catch_warnings(record=True) as said:
        features_NF = model.encode(**{name: [value]}, on_broken=refuse)
    for one in said:
        if one.category is TextsCut:
            print(f"{FLAGS[name]}: is longer than the model reads and was cut, as in training", file=sys.stderr)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return features_NF[0]


def serve(options: argparse.Namespace) -> None:
    """Answer a browser's searches in an index until Ctrl-C.

    Raises:
        UserError: the index or its model cannot be opened, or nothing can listen there.
    """
    from trimodal.search import server  # needs packages that the other commands do without

    device = chosen_device(options.device)
    found = Index.open(options.index)
    with server.listen(options.host, options.port) as listener:  # before the model is loaded, which takes a while
        server.serve(found, model_of(found, options.checkpoint, device), options.host, listener)


def chosen_device(name: str) -> str:
    """The device that --device names, which is in this machine; the process is made ready for it."""
    devices.prepare_process()
    return str(devices.choose_device(name))


def model_of(found: Index, source: str | None, device: str) -> Any:
    """The model that made an index, opened.

    Raises:
        UserError: it cannot be opened, or has other weights now.
    """
    source = source or found.model.source
    model = open_model(source, device)
    if model.digest != found.model.digest:
        again = ["index", str(found.folder), "--index", str(found.place), "--checkpoint", source, "--replace"]
        raise UserError(f"{found.place}: {source} has other weights ({model.digest:.12}) than the model that made the "
                        f"index ({found.model.digest:.12}); name that one with --checkpoint, or index again: python "
                        f"search.py {shlex.join(again)}")
    return model


def as_json(found: Index, hits: dict[Kind, list[Hit]]) -> str:
    """One object: by kind, a list of hits with all that is known of them."""
    return json.dumps({kind: [{"rank": rank, "score": hit.score, "deviations": hit.deviations,
                               "file": str(found.folder / hit.entry.path), **hit.entry._asdict()}
                              for rank, hit in enumerate(own, 1)] for kind, own in hits.items()}, indent=1)


def as_columns(found: Index, hits: dict[Kind, list[Hit]]) -> str:
    """Kinds side by side where the terminal is wide enough, else one below the other: cosines of two kinds cannot be
    compared, so they are never one list."""
    width = shutil.get_terminal_size((0, 0)).columns  # 0: it is no terminal
    room = (width - BETWEEN * (len(hits) - 1)) // len(hits)
    is_wide = len(hits) > 1 and room >= NARROWEST
    columns = [[f"{NAMES[kind]}, best of {len(found.by_kind[kind]):,}",
                *(_line(rank, hit, room if is_wide else 0) for rank, hit in enumerate(own, 1))]
               for kind, own in hits.items()]
    legend = (f"score: cosine, and by how many standard deviations it is above the mean of its column; in "
              f"{printable(found.folder)}")
    if not is_wide:
        return "\n".join([*itertools.chain.from_iterable([*column, ""] for column in columns), legend])
    lines = [(" " * BETWEEN).join(cell + " " * (room - columns_of(cell)) for cell in cells).rstrip()
             for cells in itertools.zip_longest(*columns, fillvalue="")]
    return "\n".join([*lines, "", legend])


def _line(rank: int, hit: Hit, room: int) -> str:
    """A hit in one line; of a path that has no room the end is shown. `room` 0: any."""
    name = printable(hit.entry.path) + (f" ({hit.entry.duration_s:.1f} s)" if hit.entry.duration_s else "")
    line = f"{rank:3}  {hit.score:6.3f}  {hit.deviations:+5.1f} sd  "
    if room and len(line) + columns_of(name) > room:
        while len(line) + 1 + columns_of(name) > room:
            name = name[1:]
        name = f"…{name}"
    return line + name
