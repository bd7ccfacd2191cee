"""What the user asked for: the options of the command line; of a data set which items, from which addresses, and the
command that asks for it again."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

from trimodal.data.samples import SPLITS
from trimodal.download.http import Policy, Wanted
from trimodal.errors import UserError, similar
from trimodal.files import check_writable
from trimodal.redaction import command_line
from trimodal.sets import ALL, NEEDS_NOTHING
from trimodal.sets.base import GB, HF_HOST, MIRRORS, File, Item, Source

HF_MIRROR = "https://hf-mirror.com"
SOUNDS = ("mirror", "youtube")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    data_root: Path
    mirror: str = "auto"
    base_urls: Mapping[str, str] = field(default_factory=dict)
    local: Mapping[str, Path] = field(default_factory=dict)
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)  # by the name of their environment variable
    splits: tuple[str, ...] = ()  # () for all
    max_gb: float = 0.0  # to fetch of each set, 0 for no bound
    sample: int = 0  # files of each archive, 0 for all
    jobs: int = 0  # transfers at a time, 0 for what the source's servers bear
    sounds: str = "mirror"  # or "youtube", of sets with clips from there
    cookies: Path | None = None  # for YouTube
    keep_archives: bool = False
    skip_existing: bool = False
    insecure_tls: bool = False
    policy: Policy = field(default_factory=Policy)


def as_published(file: File, path: Path) -> Wanted:
    """`path`, to be compared with the published size and digests of `file`."""
    digest = f"sha256:{file.sha256}" if file.sha256 else f"md5:{file.md5}" if file.md5 else ""
    return Wanted(path=path, size=file.size, digests=tuple(filter(None, (digest, *file.also_good))))


def fetch_bytes(items: Iterable[Item]) -> int:
    """The bytes to download for these items: the published size of each, else its size when unpacked."""
    return sum(item.size or item.unpacked for item in items)


class Selection:
    """The items of one data set that were asked for, in the order of the table, and where they come from."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.folder = options.data_root / source.name
        self.local = options.local.get(source.name)
        self.key = options.keys.get(source.needs_key, "")
        self.secrets = (self.key,) if self.key else ()
        self.jobs = options.jobs or source.at_once
        self.asks_youtube = options.sounds == "youtube" and source.clips is not None
        wanted = [item for item in source.select(options.also.get(source.name, ()))
                  if not (options.splits and item.splits) or {*item.splits} & {*options.splits}]
        if options.sounds == "youtube":
            wanted = [item for item in wanted if item.kind != "parquet"]
        self.items = wanted if source.one_of or not options.max_gb else _within(wanted, round(options.max_gb * GB))
        self.left_out = [item for item in wanted if item not in self.items]

    @property
    def limited(self) -> bool:
        """Whether the user asked for a part of the set only."""
        return bool(self.left_out or self.options.sample or self.options.splits)

    def unlimited(self) -> "Selection":
        """All of the set."""
        return Selection(self.source, replace(self.options, splits=(), max_gb=0.0, sample=0))

    def peak_bytes(self, items: Iterable[Item]) -> int:
        """Largest number of bytes on the disk at any moment while `items` are downloaded and unpacked in order.

        At its peak the disk holds what is unpacked so far, the item that is being unpacked, its archive, and those of
        the next `jobs` items, which are downloaded at the same time.
        """
        if self.options.sample:
            return 0  # little, and its size is not known before it is downloaded
        items, held, peak = list(items), 0, 0
        archives = [0 if item.kind == "plain" else item.size or item.unpacked for item in items]
        for index, item in enumerate(items):
            peak = max(peak, held + sum(archives[index: index + 1 + self.jobs]) + item.unpacked)
            held += item.unpacked + (archives[index] if self.options.keep_archives else 0)
        return peak

    def addresses(self, file: File, *, hide_key: bool = False) -> tuple[str, ...]:
        """The URLs to download `file` from, in the order in which they are tried.

        With --base-url it is that address alone, followed by the file's name. Else they are the published URLs of the
        server that --mirror names, or, where the file has none there, those that --mirror auto would try. URLs that
        need a key are left out where the user gave none. Hugging Face's host is replaced by its mirror (--mirror
        hf-mirror) or by HF_ENDPOINT.

        `hide_key`: write *** in place of the key, to print the URLs. Empty where no URL is left.
        """
        if base := self.options.base_urls.get(self.source.name):
            return (f"{base}/{file.name}",)
        usable = [(name, url) for name, url in file.urls if self.key or "{key}" not in url]
        mirror, auto = self.options.mirror, self.source.auto_mirrors
        wanted = {"auto": auto, "hf-mirror": ("hf",)}.get(mirror, (mirror,))
        chosen = [url for name, url in usable if name in wanted] or [url for name, url in usable if name in auto]
        hub = HF_MIRROR if mirror == "hf-mirror" else os.environ.get("HF_ENDPOINT", "").rstrip("/") or HF_HOST
        chosen = [hub + url.removeprefix(HF_HOST) if url.startswith(HF_HOST) else url for url in chosen]
        return tuple(url.replace("{key}", "***" if hide_key else quote(self.key, safe="")) for url in chosen)

    def command(self) -> str:
        """The command that asks for this set in the same way."""
        options, name = self.options, self.source.name
        clips = self.source.clips is not None
        given = {"--mirror": [options.mirror] if options.mirror != "auto" else [],
                 "--base-url": [f"{name}={options.base_urls[name]}"] if name in options.base_urls else [],
                 "--local": [str(self.local)] if self.local else [],
                 "--also": [f"{name}:{subset}" for subset in options.also.get(name, ())],
                 "--splits": list(options.splits), "--max-gb": [f"{options.max_gb:g}"] if options.max_gb else [],
                 "--sample": [str(options.sample)] if options.sample else [],
                 "--jobs": [str(options.jobs)] if options.jobs else [],
                 "--sounds": [options.sounds] if clips and options.sounds != "mirror" else [],
                 "--cookies": [str(options.cookies)] if clips and options.cookies else []}
        flags = {"--keep-archives": options.keep_archives, "--skip-existing": options.skip_existing,
                 "--insecure-tls": options.insecure_tls}
        words = ["python", "download_datasets.py", "--datasets", name, "--data-root", str(options.data_root),
                 *(word for flag, values in given.items() if values for word in (flag, *values)),
                 *(flag for flag, is_given in flags.items() if is_given)]
        return command_line(words)


def _within(items: list[Item], allowed: int) -> list[Item]:
    """The items to download within a total of `allowed` bytes, in their given order.

    Chosen greedily: lists first, then archives by size and the shards of each split from the first one on. An item that
    is too large for what is left is skipped.
    """
    def rank(item: Item) -> tuple[int, int]:
        if item.kind == "parquet":
            return 1, sum(other.into == item.into for other in items[: items.index(item)])
        return (0 if item.kind == "plain" else 1), fetch_bytes([item])

    kept: set[str] = set()
    for item in sorted(items, key=rank):
        if fetch_bytes([item]) <= allowed:
            allowed -= fetch_bytes([item])
            kept.add(item.name)
    return [item for item in items if item.name in kept]


# --- The command line ------------------------------------------------------------------------------------------------


def read_options(arguments: argparse.Namespace, table: Mapping[str, Source],
                 policy: Policy) -> tuple[list[str], Options]:
    """The names of the sets, and what is asked of them.

    Raises:
        UserError: a value that there is not, or that does not fit.
    """
    names = _names(arguments.datasets, [*table, *NEEDS_NOTHING])
    for flag, values, known in (("--mirror", [arguments.mirror], MIRRORS), ("--splits", arguments.splits, SPLITS),
                                ("--sounds", [arguments.sounds], SOUNDS)):
        for value in values:
            if value not in known:
                raise UserError(f"{flag}: {value!r} is unknown. {similar(value, known)}")
    if arguments.json and not (arguments.dry_run or arguments.status):
        raise UserError("--json: goes with --status or --dry-run, whose answer it prints as JSON")
    if not (arguments.dry_run or arguments.status):
        try:
            check_writable(arguments.data_root)
        except OSError as error:
            raise UserError(f"--data-root {arguments.data_root}: cannot be written ({error.strerror or error})"
                            ) from None
    given = {name: getattr(arguments, name) for name in ("data_root", "mirror", "sounds", "keep_archives",
                                                         "skip_existing", "insecure_tls")}
    return names, Options(
        **given, policy=policy, splits=tuple(dict.fromkeys(arguments.splits)),
        max_gb=_positive("--max-gb", arguments.max_gb, float), sample=_positive("--sample", arguments.sample, int),
        jobs=_positive("--jobs", arguments.jobs, int),
        cookies=_existing(f"--cookies {arguments.cookies}", arguments.cookies) if arguments.cookies else None,
        base_urls=_pairs("--base-url", arguments.base_url, names, _address),
        local=_pairs("--local", _with_name(arguments.local, names, table), names, _existing),
        also=_subsets(arguments.also, table),
        keys={source.needs_key: os.environ.get(source.needs_key, "").strip() for source in table.values()
              if source.needs_key})


def _names(given: Iterable[str], known: Iterable[str]) -> list[str]:
    names: list[str] = []
    for name in given:
        if name != "all" and name not in known:
            raise UserError(f"--datasets: {name!r} is unknown. {similar(name, ['all', *known])}")
        names += ALL if name == "all" else (name,)
    return list(dict.fromkeys(names))


def _with_name(given: Iterable[str], names: list[str], table: Mapping[str, Source]) -> list[str]:
    """NAME=PATH of each --local; a PATH alone is for the only set that is asked for."""
    downloads = [name for name in names if name in table]
    for text in given:
        if text.partition("=")[0] not in table and len(downloads) != 1:
            raise UserError(f"--local {text}: which set is it? Write --local NAME={text}")
    return [text if text.partition("=")[0] in table else f"{downloads[0]}={text}" for text in given]


def _pairs(flag: str, given: Iterable[str], names: list[str], convert: Callable[[str, str], T]) -> dict[str, T]:
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        if not value or name not in names:
            raise UserError(f"{flag} {text}: expected NAME=..., NAME one of the sets asked for ({', '.join(names)})")
        found[name] = convert(f"{flag} {text}", value)
    return found


def _address(where: str, value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        usable = False
    if not usable:
        raise UserError(f"{where}: an address is http:// or https://, a host, and a path where there is one")
    return value.rstrip("/")


def _positive(flag: str, text: str, convert: Callable[[str], T]) -> T:
    try:
        number = convert(text or "0")
    except ValueError:
        number = convert("-1")
    if text and not 0 < float(str(number)) < float("inf"):
        raise UserError(f"{flag} {text}: expected a {'whole ' if convert is int else ''}number above 0")
    return number


def _existing(where: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f"{where}: no such file or folder")
    return path


def _subsets(given: Iterable[str], table: Mapping[str, Source]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    known = [f"{source.name}:{subset}" for source in table.values() for subset in source.subsets]
    for text in given:
        if text not in known:
            raise UserError(f"--also: {text!r} is unknown. {similar(text, known)}")
        name, _, subset = text.partition(":")
        found[name] = (*found.get(name, ()), subset)
    return found
