"""Looks at what is there of the data sets: --status and --dry-run, as data for --json and as text, and --verify."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from trimodal import media
from trimodal.download import acquire
from trimodal.download.acquire import ARCHIVES, DONE, FAILED, IN_PART, Job, Outcome, open_job
from trimodal.download.archives import crc32_of
from trimodal.download.http import Mismatch, check_file
from trimodal.download.progress import in_threads
from trimodal.download.selection import Options, as_published, fetch_bytes
from trimodal.download.state import contents_path, entries, missing
from trimodal.errors import counted
from trimodal.files import nearest_existing
from trimodal.redaction import without_secrets
from trimodal.sets import NEEDS_NOTHING, inventory
from trimodal.sets.base import Item, Source

FIRST_FRAME_TELLS = (*media.VIDEO_SUFFIXES, ".m4a")  # of what there may be a million
HAD = ("there", "in --local")  # states of what need not be fetched


# --- --status --------------------------------------------------------------------------------------------------------


def status(name: str, table: Mapping[str, Source], options: Options) -> dict[str, Any]:
    """The answer of --status for one set: what is on the disk of each part, by names and sizes, without reading files.

    Returns:
    {"name", "folder", "parts": [{"name", "state", "files", "bytes", "bytes_to_fetch", "estimated"}], "parts_there",
    "files", "bytes", "bytes_to_fetch", "estimated", "left_out"}; `estimated`: not all sizes are published, and
    `left_out` says what --local has and what cannot be taken of it, and why.
    """
    left_out: list[str] = []
    parts: list[dict[str, Any]] = []
    if name in table:
        job = open_job(table[name], options)
        left_out = acquire.look(job)
        parts = list(_parts(job))
    return {"name": name, "folder": str(options.data_root / name), "parts": parts,
            "parts_there": sum(part["state"] in HAD for part in parts),
            **{key: sum(part[key] for part in parts) for key in ("files", "bytes", "bytes_to_fetch")},
            "estimated": any(part["estimated"] for part in parts), "left_out": left_out}


def _parts(job: Job) -> Iterator[dict[str, Any]]:
    """The items asked for, all shards of a folder as one, and what else is linked."""
    for name, items in _grouped(job.selection.items).items():
        states = [_state(item, job) for item in items]
        absent = [item for item, state in zip(items, states, strict=True) if state.name not in HAD]
        yield {"name": name, "state": _state_of_all([state.name for state in states]),
               "files": sum(state.files for state in states), "bytes": sum(state.size for state in states),
               "bytes_to_fetch": fetch_bytes(absent),
               "estimated": not all(file.size for item in absent for file in item.files)}
    for place in job.state.further_links():
        sizes = [size for _, size in inventory.tree(job.folder / place)]
        yield {"name": place, "state": "there", "files": len(sizes), "bytes": sum(sizes), "bytes_to_fetch": 0,
               "estimated": False}


def _grouped(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by name, all shards of a folder in one group."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(f"shards of {item.into}" if item.kind == "parquet" else item.name, []).append(item)
    return groups


def _state_of_all(states: list[str]) -> str:
    had = [state for state in states if state in HAD]
    worst = [state for kind in ("broken", "differs", "arriving") for state in states if state.startswith(kind)]
    if worst or not had:
        return worst[0] if worst else states[0] if len(states) == 1 else "missing"
    return had[0] if len(had) == len(states) and len(set(had)) == 1 else f"{len(had)} of {len(states)}"


class _ItemState(NamedTuple):
    name: str
    files: int = 0
    size: int = 0  # bytes on the disk


def _state(item: Item, job: Job) -> _ItemState:
    state, record = job.state, job.state.records.get(item.name) or {}
    if item.kind == "plain" and state.differs(item):
        return _ItemState("differs", 1, (job.folder / item.into).stat().st_size)
    if state.present(item):
        return _ItemState("there", *state.extent(item))
    if record.get("damaged"):
        return _ItemState(f"broken: {len(record['damaged'])} damaged", record.get("files", 0), record.get("bytes", 0))
    if acquire.offers(job, item):
        return _ItemState("in --local")
    if record.get("sample"):
        return _ItemState(f"sample of {record['files']:,}", record["files"], record["bytes"])
    if record:
        lost = 1 if item.kind == "plain" else sum(
            1 for _ in missing(job.folder / item.into, contents_path(job.folder, item.name), sizes=True))
        return _ItemState(f"broken: {lost:,} missing or cut", record.get("files", 1) - lost)
    sizes = [path.stat().st_size for file in item.files for path in acquire.arrived(job, item, file) if path.is_file()]
    return _ItemState("arriving" if sizes else "missing", 0, sum(sizes))


def status_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of --status."""
    rows = [("data set", "part", "state", "files", "on disk", "to fetch")]
    for one in found:
        there = f"{one['parts_there']} of {len(one['parts'])} there"
        for part in (*one["parts"], {**one, "name": "all of it", "state": there}):
            files = f"{part['files']:,}" if part["files"] or part["name"] == "all of it" else ""
            about = "about " if part["estimated"] else ""
            rows.append((one["name"], part["name"], part["state"], files, _gb(part["bytes"], "0"),
                         about + _gb(part["bytes_to_fetch"], "0")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) if column < 3 else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
    yield from (f"{one['name']}: not linked: {sentence}" for one in found for sentence in one["left_out"])


# --- --dry-run -------------------------------------------------------------------------------------------------------


def plan(name: str, table: Mapping[str, Source], options: Options) -> dict[str, Any]:
    """The answer of --dry-run for one set: what a download would fetch, from where, and whether the disk has room.

    {"name", "title", "page", "licence", "note", "folder", "items": [{"name", "state": "there already", "in --local" or
    "to fetch", "bytes", "place", "urls"}], "left_out_by_max_gb", "left_out", "one_of", "sample", "files_to_fetch",
    "bytes_to_fetch", "bytes_needed", "bytes_free"}; bytes are 0 where no size is published, and of shards the first
    of each folder stands for the rest, whose number is `more_like_it`.
    """
    if name in NEEDS_NOTHING:
        return {"name": name, "note": NEEDS_NOTHING[name], "items": [], "files_to_fetch": 0, "bytes_to_fetch": 0}
    source, job = table[name], open_job(table[name], options)
    left_out = acquire.look(job)
    todo = job.state.todo()[: 1 if source.one_of else None]
    fetched = [item for item in todo if not acquire.offers(job, item)]
    unpacked = [item for item in todo if not job.state.linked(item, job.state.offered)]
    return {"name": name, "title": source.title, "page": source.page, "licence": source.licence, "note": source.note,
            "folder": str(job.folder),
            "items": [_item(items, job) for items in _grouped(job.selection.items).values()],
            "left_out_by_max_gb": [items[0].name for items in _grouped(job.selection.left_out).values()],
            "left_out": left_out, "one_of": source.one_of, "sample": options.sample, "files_to_fetch": len(fetched),
            "bytes_to_fetch": fetch_bytes(fetched), "bytes_needed": acquire.bytes_needed(job, unpacked),
            "bytes_free": shutil.disk_usage(nearest_existing(options.data_root)).free}


def _item(items: Sequence[Item], job: Job) -> dict[str, Any]:
    item = items[0]
    there, offered = job.state.present(item), acquire.offers(job, item)
    urls = [without_secrets(url) for file in item.files
            for url in job.selection.addresses(file, hide_key=True) or ("(needs a key)",)]
    return {"name": item.name, "state": "there already" if there else "in --local" if offered else "to fetch",
            "bytes": item.size, "place": str(job.folder / item.into), "urls": urls,
            "more_like_it": len(items) - 1}


def plan_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of --dry-run."""
    return chain.from_iterable(map(_lines_of_plan, found))


def _lines_of_plan(found: Mapping[str, Any]) -> Iterator[str]:
    if "title" not in found:
        yield f"{found['name']}: {found['note']}"
        return
    yield f"{found['name']}: {found['title']}, {found['page']}"
    yield f"  licence: {found['licence']}"
    if found["note"]:
        yield f"  note: {found['note']}"
    for item in found["items"]:
        more = f" and {item['more_like_it']} more like it" if item["more_like_it"] else ""
        yield f"  {item['name']}{more}: {_gb(item['bytes'])}, {item['state']}, to {item['place']}"
        yield from (f"    {url}" for url in item["urls"])
    yield from (f"  not linked: {sentence}" for sentence in found["left_out"])
    if found["left_out_by_max_gb"]:
        yield f"  left out by --max-gb: {', '.join(found['left_out_by_max_gb'])}"
    if found["one_of"]:
        yield "  one of these files is enough; they are tried in this order"
    part = f", a sample of {counted(found['sample'], 'file')} of each" if found["sample"] else ""
    size = _gb(found["bytes_to_fetch"]) if found["files_to_fetch"] else "0"
    files = counted(found["files_to_fetch"], "file or archive", "files or archives")
    yield (f"  to fetch: {files}{part}, {size}; space "
           f"needed: {_gb(found['bytes_needed'], '0')}, free: {_gb(found['bytes_free'])}")


def _gb(size: int, none: str = "size not published") -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB" if size else none


# --- --verify --------------------------------------------------------------------------------------------------------


class _Check(NamedTuple):
    """A file to look at. `compare` raises Mismatch or OSError where it differs from what came; None of the user's."""

    item: str
    name: str
    path: Path
    compare: Callable[[], Any] | None = None


def verify(source: Source, options: Options, threads: int = 0) -> Outcome:
    """Hash every file of the set again, and open it. Items with damage are marked: the next download mends them."""
    job = open_job(source, options)
    return acquire.reported(job, lambda: _verify(job, threads or os.cpu_count() or 1))


def _verify(job: Job, threads: int) -> Outcome:
    damaged: dict[str, list[str]] = {}  # item -> files that are not as they came
    unreadable: list[str] = []  # as they came, and no decoder opens them
    files = 0
    if not job.folder.is_dir():
        return _verdict(job, files, damaged, unreadable)
    with (acquire.one_at_a_time(job),
          job.policy.progress.bar(f"verifying {job.selection.source.name}", unit=" files") as bar):
        for check, done in in_threads(((check, partial(_look_at, check)) for check in _checks(job)), threads):
            bar.add(1)
            files += 1
            damage, problem = done.result()
            if damage and check.item:
                damaged.setdefault(check.item, []).append(check.name)
            elif damage or problem:
                unreadable.append(check.name)
            if damage or problem:
                job.say(f"{check.name}: {damage or problem}")
        _mark(job, damaged)
    return _verdict(job, files, damaged, unreadable)


def _look_at(check: _Check) -> tuple[str, str]:
    """(damage, why it cannot be opened), "" for neither."""
    try:
        if check.compare:
            check.compare()
    except Mismatch as error:
        return str(error), ""
    except OSError as error:
        return (error.strerror or str(error)).lower(), ""
    return "", problem_of(check.path)


def _checks(job: Job) -> Iterator[_Check]:
    """The checks to run, one for each file of a data set: lists, archives, unpacked files, and the user's."""
    state, folder = job.state, job.folder
    listed: set[str] = set()
    for item in job.selection.items:
        record = state.records.get(item.name)
        if item.kind == "plain":
            if record or state.differs(item):
                came = state.as_it_came(item)
                yield _Check(item.name, item.into, came.path, partial(check_file, came))
            continue
        for file in item.files:
            path = acquire.path_of(job, item, file)
            if path.is_file():
                published = as_published(file, path)
                yield _Check(item.name, f"{ARCHIVES}/{file.name}", path, partial(check_file, published))
        for name, size, crc32 in entries(contents_path(folder, item.name)) if record else ():
            place = f"{item.into}/{name}".lstrip("/")
            if item.kind == "parquet":
                listed.add(place)
            yield _Check(item.name, place, folder / place, partial(_compare_member, folder / place, size, crc32))
    further = (*job.selection.source.partly, *job.selection.source.made)
    for place in sorted({*state.marker.get("linked", {}), *(count.folder for count in further)}):
        for name, _ in inventory.tree(folder / place):
            if f"{place}/{name}" not in listed:
                yield _Check("", f"{place}/{name}", folder / place / name)


def _compare_member(path: Path, size: int, crc32: int | None) -> None:
    found = path.stat().st_size
    if found != size:
        raise Mismatch(f"has {found:,} bytes instead of {size:,}")
    if crc32 not in (None, crc32_of(path)):
        raise Mismatch("has other bytes than those that came (CRC-32)")


def _mark(job: Job, damaged: dict[str, list[str]]) -> None:
    """Write down what is damaged, and that what was so before no longer is."""
    records = job.state.records
    healed = [item.name for item in job.selection.items
              if item.name not in damaged and records.get(item.name, {}).pop("damaged", None)]
    for name, files in damaged.items():
        records.setdefault(name, {})["damaged"] = files[:100]
    if damaged or healed:
        job.state.save()


def _verdict(job: Job, files: int, damaged: Mapping[str, list[str]], unreadable: list[str]) -> Outcome:
    """Missing or damaged files are mended by a download; those that came as they are may be done without."""
    number = sum(map(len, damaged.values()))
    absent = [item.name for item in job.state.todo(sizes=False) if item.name not in damaged]
    detail = f"{counted(files - number, 'file')} right"
    detail += f", {number:,} damaged" if number else ""
    detail += f", {len(unreadable):,} cannot be opened" if unreadable else ""
    detail += f", missing: {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}" if absent else ""
    code = FAILED if number or absent else IN_PART if unreadable else DONE
    return Outcome(name=job.selection.source.name, detail=detail, code=code,
                   state="damaged" if number else "missing" if absent else "verified",
                   next_command=job.selection.command() if code == FAILED else job.state.next_command())


def problem_of(path: Path) -> str:
    """Why a picture, sound or video cannot be opened, "" where it can or is something else. Sounds are decoded to the
    end, of videos and AAC the first frame."""
    suffix = path.suffix.lower()
    wanted = "picture" if suffix in media.PICTURE_SUFFIXES else "sound"
    try:
        if wanted == "picture" or (suffix in FIRST_FRAME_TELLS and _is_picture(path)):
            from trimodal.data.images import decode_image

            decode_image(path)
        elif suffix in FIRST_FRAME_TELLS:
            return "" if _frames(path) else "holds neither sound nor picture"
        elif suffix in media.SOUND_SUFFIXES:
            from trimodal.data.tracks import count_samples

            return "" if count_samples(str(path)) else "holds no sound"
    except Exception as error:  # decoders raise whatever they like
        reason = media.reason_of(error, str(path))
        return media.kind_of(str(path), wanted) or f"cannot be opened ({reason[:120]})"
    return ""


def _is_picture(path: Path) -> bool:
    """Whether a file is an image by its first bytes, whatever its name says, as training reads it."""
    return not media.kind_of(str(path), "picture") and bool(media.kind_of(str(path), "sound"))


def _frames(path: Path) -> int:
    """How many of the first sound and the first video stream have a frame."""
    found = 0
    with media.open_container(str(path), media.SOUND_FORMATS) as container:
        for stream in [*container.streams.audio[:1], *container.streams.video[:1]]:
            container.seek(0)
            found += next(iter(container.decode(stream)), None) is not None
    return found
