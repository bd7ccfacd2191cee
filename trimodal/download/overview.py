"""What is there of the data sets and what would be fetched: data for --json, and the text of --status and --dry-run."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimodal.download import verify
from trimodal.download.acquire import Acquisition
from trimodal.download.http import without_secrets
from trimodal.download.selection import Options, fetch_bytes
from trimodal.files import nearest_existing
from trimodal.sets import NEEDS_NOTHING
from trimodal.sets.base import Item, Source


def status(name: str, table: Mapping[str, Source], options: Options) -> dict[str, Any]:
    """What is there of one set, part by part; sizes and names are looked at, contents are not.

    {"name", "folder", "parts": [{"name", "state", "files", "bytes", "bytes_to_fetch", "estimated"}], "parts_there",
    "files", "bytes", "bytes_to_fetch", "estimated", "left_out"}; `estimated`: not all sizes are published, and
    `left_out` says what --local has and what cannot be taken of it, and why.
    """
    left_out: list[str] = []
    parts: list[verify.Part] = []
    if name in table:
        work = Acquisition(table[name], options)
        left_out = work.look()
        parts = verify.parts(work)
    return {"name": name, "folder": str(options.data_root / name), "parts": [
        {"name": part.name, "state": part.state, "files": part.files, "bytes": part.size, "bytes_to_fetch": part.left,
         "estimated": bool(part.about)} for part in parts],
        "parts_there": sum(part.state in verify.HAD for part in parts),
        "files": sum(part.files for part in parts), "bytes": sum(part.size for part in parts),
        "bytes_to_fetch": sum(part.left for part in parts),
        "estimated": any(part.about for part in parts), "left_out": left_out}


def status_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of --status."""
    rows = [("data set", "part", "state", "files", "on disk", "to fetch")]
    for one in found:
        rows += [(one["name"], part["name"], part["state"], f"{part['files']:,}" if part["files"] else "",
                  gb(part["bytes"], "0"), _about(part) + gb(part["bytes_to_fetch"], "0")) for part in one["parts"]]
        rows.append((one["name"], "all of it", f"{one['parts_there']} of {len(one['parts'])} there",
                     f"{one['files']:,}", gb(one["bytes"], "0"), _about(one) + gb(one["bytes_to_fetch"], "0")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) if column < 3 else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
    yield from (f"{one['name']}: not linked: {sentence}" for one in found for sentence in one["left_out"])


def _about(one: Mapping[str, Any]) -> str:
    return "about " if one["estimated"] else ""


def plan(name: str, table: Mapping[str, Source], options: Options) -> dict[str, Any]:
    """What getting one set would do.

    {"name", "title", "page", "licence", "note", "folder", "items": [{"name", "state": "there already", "in --local" or
    "to fetch", "bytes", "place", "urls"}], "left_out_by_max_gb", "left_out", "one_of", "sample", "files_to_fetch",
    "bytes_to_fetch", "bytes_needed", "bytes_free"}; bytes are 0 where no size is published, and of many shards the
    first of each folder stands for the rest, whose number is `more_like_it`.
    """
    if name in NEEDS_NOTHING:
        return {"name": name, "note": NEEDS_NOTHING[name], "items": [], "files_to_fetch": 0, "bytes_to_fetch": 0}
    source = table[name]
    work = Acquisition(source, options)
    left_out = work.look()
    items, todo = work.selection.items, work.holdings.todo()
    todo = todo[:1] if source.one_of else todo
    fetched = [item for item in todo if not work.offers(item)]
    unpacked = [item for item in todo if not work.holdings.linked(item, work.holdings.offered)]
    shown = items if len(items) < 40 else few(items)
    return {"name": name, "title": source.title, "page": source.page, "licence": source.licence, "note": source.note,
            "folder": str(work.folder), "items": [_item(item, work) for item in shown],
            "left_out_by_max_gb": [item.name for item in few(work.selection.left_out)], "left_out": left_out,
            "one_of": source.one_of, "sample": options.sample, "files_to_fetch": len(fetched),
            "bytes_to_fetch": fetch_bytes(fetched), "bytes_needed": work.bytes_needed(unpacked),
            "bytes_free": shutil.disk_usage(nearest_existing(options.data_root)).free}


def _item(item: Item, work: Acquisition) -> dict[str, Any]:
    shards = sum(other.kind == "parquet" and other.into == item.into for other in work.selection.items)
    state = "there already" if work.holdings.present(item, True) else "in --local" if work.offers(item) else "to fetch"
    urls = [without_secrets(url) for file in item.files
            for url in work.selection.addresses(file, hide_key=True) or ("(needs a key)",)]
    return {"name": item.name, "state": state, "bytes": item.size, "place": str(work.folder / item.into), "urls": urls,
            "more_like_it": shards - 1 if item.kind == "parquet" else 0}


def few(items: Sequence[Item]) -> list[Item]:
    """Of many shards the first one of each folder stands for the rest."""
    firsts = {(item.kind, item.into): item for item in reversed(items) if item.kind == "parquet"}
    return [item for item in items if item.kind != "parquet" or firsts[item.kind, item.into] is item]


def plan_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of --dry-run for one set."""
    if "title" not in found:
        yield f"{found['name']}: {found['note']}"
        return
    yield f"{found['name']}: {found['title']}, {found['page']}"
    yield f"  licence: {found['licence']}"
    yield from (f"  note: {note}" for note in filter(None, [found["note"]]))
    for item in found["items"]:
        more = f" and {item['more_like_it']} more like it" if item["more_like_it"] else ""
        yield f"  {item['name']}{more}: {gb(item['bytes'])}, {item['state']}, to {item['place']}"
        yield from (f"    {url}" for url in item["urls"])
    yield from (f"  not linked: {sentence}" for sentence in found["left_out"])
    if found["left_out_by_max_gb"]:
        yield f"  left out by --max-gb: {', '.join(found['left_out_by_max_gb'])}"
    if found["one_of"]:
        yield "  one of these files is enough; they are tried in this order"
    part = f", a sample of {found['sample']} files of each" if found["sample"] else ""
    size = gb(found["bytes_to_fetch"]) if found["files_to_fetch"] else "0"
    yield (f"  to fetch: {found['files_to_fetch']} files or archives{part}, {size}; space "
           f"needed: {gb(found['bytes_needed'], '0')}, free: {gb(found['bytes_free'])}")


def gb(size: int, none: str = "size not published") -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB" if size else none
