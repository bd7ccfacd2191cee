"""Looks at what is there of a data set: a quick table of its parts (--status), or every byte of it (--verify)."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trimodal import media
from trimodal.download import archives, http, pipeline, readiness
from trimodal.download.acquire import ARCHIVES, DONE, FAILED, IN_PART, Acquisition, Outcome
from trimodal.download.http import Mismatch, Wanted
from trimodal.download.selection import as_published, fetch_bytes
from trimodal.sets import inventory
from trimodal.sets.base import File, Item

FIRST_FRAME_TELLS = (*media.VIDEO_SUFFIXES, ".m4a")  # of what there may be a million
HAD = ("there", "in --local")  # states of what need not be fetched
Check = Callable[[], tuple[str, str]]  # (damage, why it cannot be opened), "" for neither


@dataclass(frozen=True, kw_only=True)
class Part:
    """A row of --status: an item, all shards of one folder, or a folder of links."""

    name: str
    state: str  # there, in --local, missing, arriving, in part, broken, differs: not as published
    files: int
    size: int  # bytes that are on the disk
    left: int  # bytes to fetch
    about: str  # "about " where no size is published, and `left` is an estimate


def parts(work: Acquisition) -> list[Part]:
    """The items asked for, and what else is linked; sizes and names are looked at, contents are not."""
    groups: dict[str, list[Item]] = {}
    for item in work.selection.items:
        groups.setdefault(f"shards of {item.into}" if item.kind == "parquet" else item.name, []).append(item)
    sizes = {place: [size for _, size in inventory.tree(work.folder / place)]
             for place in work.holdings.further_links()}
    return [*(_part(name, items, work) for name, items in groups.items()),
            *(Part(name=place, state="there", files=len(found), size=sum(found), left=0, about="")
              for place, found in sizes.items())]


def _part(name: str, items: list[Item], work: Acquisition) -> Part:
    states = [_state(item, work) for item in items]
    had = [state for state, _, _ in states if state in HAD]
    worst = next((state for wanted in ("broken", "differs", "arriving") for state, _, _ in states
                  if state.startswith(wanted)), "")
    state = worst or (had[0] if len(set(had)) == 1 and len(had) == len(items) else "missing" if not had
                      else f"{len(had)} of {len(items)}")
    absent = [item for item, (held, _, _) in zip(items, states, strict=True) if held not in HAD]
    return Part(name=name, state=state, files=sum(files for _, files, _ in states),
                size=sum(size for _, _, size in states), left=fetch_bytes(absent),
                about="" if all(file.size for item in absent for file in item.files) else "about ")


def _state(item: Item, work: Acquisition) -> tuple[str, int, int]:
    """(state, files, bytes on the disk)."""
    holdings = work.holdings
    if item.kind == "plain" and holdings.differs(item):
        return "differs", 1, (work.folder / item.into).stat().st_size
    if holdings.present(item, True):
        return "there", *holdings.extent(item)
    record = holdings.items.get(item.name) or {}
    if record.get("damaged"):
        return f"broken: {len(record['damaged'])} damaged", record.get("files", 0), record.get("bytes", 0)
    if work.offers(item):
        return "in --local", 0, 0
    if record.get("sample"):
        return f"sample of {record['files']:,}", record["files"], record["bytes"]
    if record:
        number = sum(1 for _ in _lost(item, work))
        return f"broken: {number:,} missing or cut", record.get("files", 1) - number, 0
    sizes = [path.stat().st_size for file in item.files for path in work.arrived(item, file) if path.is_file()]
    return ("arriving" if sizes else "missing"), 0, sum(sizes)


def _lost(item: Item, work: Acquisition) -> Iterator[str]:
    if item.kind == "plain":
        yield item.into
    else:
        yield from inventory.missing(work.folder / item.into, inventory.contents_path(work.folder, item.name),
                                     sizes=True)


# --- Every byte ------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    files: int = 0
    damaged: dict[str, list[str]] = field(default_factory=dict)  # item -> files that are not as they came
    unreadable: list[str] = field(default_factory=list)  # as they came, and no decoder opens them


def verify(work: Acquisition, threads: int = 0) -> Outcome:
    """Hash every file of the set again, and open it. Items with damage are marked: the next download mends them."""
    return work.told(partial(_verify, work, threads or os.cpu_count() or 1))


def _verify(work: Acquisition, threads: int) -> Outcome:
    findings = Findings()
    if not work.folder.is_dir():
        return _verdict(work, findings)
    with work.locked(), work.policy.progress.bar(f"verifying {work.source.name}", unit=" files") as bar:
        for (item, name), result in pipeline.results(_checks(work), threads):
            if isinstance(result, BaseException):
                raise result
            bar.add(1)
            findings.files += 1
            damage, problem = result
            if damage and item:
                findings.damaged.setdefault(item, []).append(name)
            elif damage or problem:
                findings.unreadable.append(name)
            if damage or problem:
                work.say(f"{name}: {damage or problem}")
        _mark(work, findings.damaged)
    return _verdict(work, findings)


def _mark(work: Acquisition, damaged: dict[str, list[str]]) -> None:
    """Write down what is damaged, and that what was so before no longer is."""
    records = work.holdings.items
    healed = [item.name for item in work.selection.items
              if item.name not in damaged and records.get(item.name, {}).pop("damaged", None)]
    for name, files in damaged.items():
        records.setdefault(name, {})["damaged"] = files[:100]
    if damaged or healed:
        inventory.write_marker(work.folder, work.holdings.marker)


def _verdict(work: Acquisition, findings: Findings) -> Outcome:
    """Missing or damaged files are mended by a download; those that came as they are may be done without."""
    number = sum(map(len, findings.damaged.values()))
    absent = [item.name for item in work.holdings.todo(sizes=False) if item.name not in findings.damaged]
    detail = f"{findings.files - number:,} files are right"
    detail += f", {number:,} damaged" if number else ""
    detail += f", {len(findings.unreadable):,} cannot be opened" if findings.unreadable else ""
    detail += f", missing: {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}" if absent else ""
    code = FAILED if number or absent else IN_PART if findings.unreadable else DONE
    return Outcome(name=work.source.name, detail=detail, code=code,
                   state="damaged" if number else "missing" if absent else "verified",
                   next_command=work.selection.command() if code == FAILED else readiness.next_command(work.selection))


def _checks(work: Acquisition) -> Iterator[tuple[tuple[str, str], Check]]:
    """((item, name of the file), check) of all files: those that an item brought, and those of the user."""
    listed: set[str] = set()
    for item in work.selection.items:
        record = work.holdings.items.get(item.name)
        if item.kind == "plain" and (record or work.holdings.differs(item)):
            yield (item.name, item.into), partial(_check_plain, work.folder / item.into, record or {}, item.files[0])
        for file in item.files if item.kind != "plain" else ():
            path, _ = work.arrived(item, file)
            if path.is_file():
                yield (item.name, f"{ARCHIVES}/{file.name}"), partial(_check_archive, path, file)
        if item.kind != "plain" and record:
            for name, size, crc32 in inventory.entries(inventory.contents_path(work.folder, item.name)):
                place = f"{item.into}/{name}".lstrip("/")
                if item.kind == "parquet":
                    listed.add(place)
                yield (item.name, place), partial(_check_file, work.folder / place, size, crc32)
    counts = (*work.source.partly, *work.source.made)
    places = set(work.holdings.marker.get("linked", {})) | {count.folder for count in counts}
    for place in sorted(places):
        for name, _ in inventory.tree(work.folder / place):
            if f"{place}/{name}" not in listed:
                yield ("", f"{place}/{name}"), partial(_check_own, work.folder / place / name)


def _check_plain(path: Path, record: dict[str, Any], file: File) -> tuple[str, str]:
    came = Wanted(path=path, size=record["bytes"], digests=(f"sha256:{record['sha256'][0]}",)) if record.get(
        "sha256") else as_published(file, path)
    try:
        http.check_file(came)
    except (Mismatch, OSError) as error:
        return _why(error), ""
    return "", ""


def _check_archive(path: Path, file: File) -> tuple[str, str]:
    with contextlib.suppress(FileNotFoundError):
        try:
            http.check_file(as_published(file, path))
        except Mismatch as error:
            return str(error), ""
    return "", ""


def _check_file(path: Path, size: int, crc32: int | None) -> tuple[str, str]:
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes instead of {size:,}", ""
        if crc32 is not None and archives.crc32_of(path) != crc32:
            return "has other bytes than those that came (CRC-32)", ""
    except OSError as error:
        return _why(error), ""
    return "", problem_of(path)


def _check_own(path: Path) -> tuple[str, str]:
    return "", problem_of(path)


def _why(error: Exception) -> str:
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)


def problem_of(path: Path) -> str:
    """Why a picture, sound or video cannot be opened, "" where it can or is something else. Sounds are decoded to the
    end, of videos and AAC the first frame."""
    suffix = path.suffix.lower()
    wanted = "picture" if suffix in media.PICTURE_SUFFIXES else "sound"
    try:
        if wanted == "picture" or (suffix in FIRST_FRAME_TELLS and _is_picture(path)):
            _open_picture(path)
        elif suffix in FIRST_FRAME_TELLS:
            return "" if _frames(path) else "holds neither sound nor picture"
        elif suffix in media.SOUND_SUFFIXES:
            return "" if _samples(path) else "holds no sound"
    except Exception as error:  # decoders raise whatever they like
        reason = media.reason_of(error, str(path))
        return media.kind_of(str(path), wanted) or f"cannot be opened ({reason[:120]})"
    return ""


def _is_picture(path: Path) -> bool:
    """By its first bytes, whatever its name says, as in training."""
    return not media.kind_of(str(path), "picture") and bool(media.kind_of(str(path), "sound"))


def _open_picture(path: Path) -> None:
    from trimodal.data.images import decode_image

    decode_image(path)


def _samples(path: Path) -> int:
    from trimodal.data.tracks import count_samples

    return count_samples(str(path))


def _frames(path: Path) -> int:
    with media.open_container(str(path), media.SOUND_FORMATS) as container:
        streams = [*container.streams.audio[:1], *container.streams.video[:1]]
        return sum(1 for stream in streams for _ in _first(container, stream))


def _first(container: Any, stream: Any) -> Iterator[Any]:
    container.seek(0)
    for frame in container.decode(stream):
        yield frame
        return
