"""Get the data sets: fetched, checked, unpacked into the layout that training reads. Run it again, and it goes on.

    python download_datasets.py --datasets coco clotho audiocaps --data-root ./data
"""

import argparse
import difflib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from acquisition import Acquisition, Options, Outcome, peak_bytes
from arguments import Parser
from config import UserError
from redaction import redact
from sources import ALL, MIRRORS, NEEDS_NOTHING, SOURCES, Item, Source
from transfer import Policy

EXAMPLES = """examples:
  python download_datasets.py --datasets stamps
  python download_datasets.py --datasets all --skip-existing
  python download_datasets.py --datasets coco --mirror modelscope --dry-run
  VOXCELEB_KEY=... python download_datasets.py --datasets voxceleb --also voxceleb:vox2-aac
  python download_datasets.py --datasets audiocaps --local /sounds/audiocaps
exit code: 0 all that was asked for is there, 1 a transfer failed, 2 something for you to mend"""


T = TypeVar("T")


def main(argv: Sequence[str] | None = None, *, table: Mapping[str, Source] = SOURCES,
         policy: Policy | None = None) -> int:
    try:
        names, options, dry_run = _read_arguments(argv, table, policy or Policy())
        if dry_run:
            _print_plan(names, table, options)
            return 0
        outcomes = [_get(name, table, options) for name in names]
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what has arrived is kept, the same command goes on from there", file=sys.stderr)
        return 130
    _print_outcomes(outcomes)
    codes = [outcome.code for outcome in outcomes]
    return 1 if 1 in codes else max(codes)


def _read_arguments(argv: Sequence[str] | None, table: Mapping[str, Source],
                    policy: Policy) -> tuple[list[str], Options, bool]:
    arguments = _parser().parse_args(argv)
    names = _names(arguments.datasets, [*table, *NEEDS_NOTHING])
    if arguments.mirror not in MIRRORS:
        raise UserError(f"--mirror: {_unknown(arguments.mirror, MIRRORS)}")
    options = Options(
        data_root=arguments.data_root, mirror=arguments.mirror, keep_archives=arguments.keep_archives,
        skip_existing=arguments.skip_existing, insecure_tls=arguments.insecure_tls, policy=policy,
        base_urls=_pairs("--base-url", arguments.base_url, names, _address),
        local=_pairs("--local", _with_name(arguments.local, names, table), names, _existing),
        also=_subsets(arguments.also, table),
        keys={source.needs_key: os.environ.get(source.needs_key, "").strip() for source in table.values()
              if source.needs_key})
    if not arguments.dry_run:
        _check_writable(arguments.data_root)
    return names, options, arguments.dry_run


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Get data sets: fetched, checked, unpacked.", EXAMPLES)
    add = parser.add_argument
    add("--datasets", nargs="+", required=True, metavar="NAME",
        help=f"{', '.join(SOURCES)}, or all ({' '.join(ALL)}); {', '.join(NEEDS_NOTHING)} need no download")
    add("--data-root", type=Path, default=Path("./data"), metavar="DIR", help="where the sets go (default: ./data)")
    add("--skip-existing", action="store_true", help="trust a complete set after a quick look; without this flag every "
        "file of it is looked at, and fetched again only if it is missing or wrong")
    add("--dry-run", action="store_true", help="print files, bytes, servers and space needed; fetch nothing")
    add("--mirror", default="auto", metavar="WHICH", help=f"{', '.join(MIRRORS)} (default: auto, the official server "
        "first; hf obeys HF_ENDPOINT)")
    add("--base-url", action="append", default=[], metavar="NAME=URL", help="fetch the files of a set from URL/FILE")
    add("--local", action="append", default=[], metavar="[NAME=]PATH", help="what you have already: a folder of "
        "VoxCeleb or AudioCaps (linked, not copied), a folder of archives, or the stamps' .deb or .tar.gz")
    add("--also", nargs="+", action="extend", default=[], metavar="NAME:SUBSET", help="more of a set than its default: "
        + ", ".join(f"{name}:{subset}" for name, source in SOURCES.items() for subset in source.subsets
                    if subset not in source.defaults))
    add("--keep-archives", action="store_true", help="keep archives in NAME/archives after unpacking")
    add("--insecure-tls", action="store_true", help="do not verify the certificate of VoxCeleb's own server, which is "
        "at times out of date; digests are checked all the same")
    return parser


def _names(given: Iterable[str], known: Iterable[str]) -> list[str]:
    names: list[str] = []
    for name in given:
        if name != "all" and name not in known:
            raise UserError(f"--datasets: {_unknown(name, ['all', *known])}")
        names += ALL if name == "all" else (name,)
    return list(dict.fromkeys(names))


def _unknown(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"{name!r} is unknown; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")


def _with_name(given: Iterable[str], names: list[str], table: Mapping[str, Source]) -> list[str]:
    """`--local PATH` without a name is for the only set that is asked for."""
    downloads = [name for name in names if name in table]
    full = []
    for text in given:
        if text.partition("=")[0] in table:
            full.append(text)
        elif len(downloads) == 1:
            full.append(f"{downloads[0]}={text}")
        else:
            raise UserError(f"--local {text}: which set is it? Write --local NAME={text}")
    return full


def _pairs(flag: str, given: Iterable[str], names: list[str], convert: Callable[[str, str], T]) -> dict[str, T]:
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        if not value or name not in names:
            raise UserError(f"{flag} {text}: expected NAME=..., NAME one of the sets asked for ({', '.join(names)})")
        found[name] = convert(f"{flag} {text}", value)
    return found


def _address(where: str, value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise UserError(f"{where}: an address begins with http:// or https://")
    return value.rstrip("/")


def _existing(where: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f"{where}: no such file or folder")
    return path


def _subsets(given: Iterable[str], table: Mapping[str, Source]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, _, subset = text.partition(":")
        known = [f"{source.name}:{other}" for source in table.values() for other in source.subsets]
        if text not in known:
            raise UserError(f"--also: {_unknown(text, known)}")
        found[name] = (*found.get(name, ()), subset)
    return found


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--data-root {folder}: cannot be written ({error.strerror or error})") from None


def _get(name: str, table: Mapping[str, Source], options: Options) -> Outcome:
    if name in NEEDS_NOTHING:
        print(f"{name}: {NEEDS_NOTHING[name]}")
        return Outcome(name=name, state="done", detail=NEEDS_NOTHING[name])
    outcome = Acquisition(table[name], options).run()
    if outcome.code:
        print(f"error: {name}: {outcome.detail}", file=sys.stderr)
    return outcome


def _print_outcomes(outcomes: list[Outcome]) -> None:
    width = max(len("data set"), *(len(outcome.name) for outcome in outcomes))
    print(f"\n{'data set':<{width}}  {'state':<9}  next command")
    for outcome in outcomes:
        print(f"{outcome.name:<{width}}  {outcome.state:<9}  {outcome.next_command}")
        print(f"{'':<{width}}  {outcome.detail}")


def _print_plan(names: list[str], table: Mapping[str, Source], options: Options) -> None:
    for name in names:
        if name in NEEDS_NOTHING:
            print(f"{name}: {NEEDS_NOTHING[name]}")
            continue
        source = table[name]
        acquisition = Acquisition(source, options)
        print(f"{name}: {source.title}, {source.page}\n  licence: {source.licence}")
        for line in filter(None, [source.note]):
            print(f"  note: {line}")
        items = acquisition.items
        for item in items if len(items) < 40 else _few(items):
            _print_item(item, acquisition)
        todo = acquisition.todo()
        if source.one_of:
            todo = todo[:1]
            print("  one of these files is enough; they are tried in this order")
        print(f"  to fetch: {len(todo)} files or archives; space needed: {_gb(peak_bytes(todo, options))}, free: "
              f"{_gb(_free_bytes(options.data_root))}")


def _few(items: Sequence[Item]) -> list[Item]:
    """Of many shards the first one of each folder stands for the rest."""
    firsts = {(item.kind, item.into): item for item in reversed(items) if item.kind == "parquet"}
    return [item for item in items if item.kind != "parquet" or firsts[item.kind, item.into] is item]


def _print_item(item: Item, acquisition: Acquisition) -> None:
    shards = sum(other.kind == "parquet" and other.into == item.into for other in acquisition.items)
    more = f" and {shards - 1} more like it" if item.kind == "parquet" and shards > 1 else ""
    print(f"  {item.name}{more}: {_gb(item.size)}, {acquisition.state_of(item)}, to {acquisition.folder / item.into}")
    for file in item.files:
        for url in acquisition.addresses(file, hide_key=True) or ("(needs a key)",):
            print(f"    {redact(url)}")


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB" if size else "size not published"


if __name__ == "__main__":
    sys.exit(main())
