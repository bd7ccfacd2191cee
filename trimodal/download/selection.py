"""What the user asked for of a data set: which items, from which addresses, and the command that asks for it again."""

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from trimodal.download.http import Policy, Wanted, without_secrets
from trimodal.sets.base import GB, HF_HOST, File, Item, Source

HF_MIRROR = "https://hf-mirror.com"


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
    """What these items take to fetch; where no size is published, what they unpack to stands in."""
    return sum(item.size or item.unpacked for item in items)


class Selection:
    """The items of one data set that were asked for, in the order of the table, and where they come from."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.folder = options.data_root / source.name
        self.local = options.local.get(source.name)
        self.jobs = options.jobs or source.at_once
        wanted = [item for item in source.select(options.also.get(source.name, ())) if self._of_splits(item)]
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

    def _of_splits(self, item: Item) -> bool:
        return not self.options.splits or not item.splits or bool(set(item.splits) & set(self.options.splits))

    def peak_bytes(self, items: Iterable[Item]) -> int:
        """Disk that getting these items takes at most, archives included while they are needed: that of the item that
        is unpacked, and those that arrive meanwhile."""
        if self.options.sample:
            return 0  # little, and what it is shows only when it comes
        return peak_bytes(list(items), self.options.keep_archives, self.jobs)

    # --- Addresses -------------------------------------------------------------------------------------------------

    def addresses(self, file: File, *, hide_key: bool = False) -> tuple[str, ...]:
        """Where to ask, in order, under --base-url, --mirror and the key. For what the mirror lacks: as by `auto`."""
        if base := self.options.base_urls.get(self.source.name):
            return (f"{base}/{file.name}",)
        key = self.key
        usable = [(name, url) for name, url in file.urls if key or "{key}" not in url]
        mirror = self.options.mirror
        wanted = {"auto": self.source.auto_mirrors, "hf-mirror": ("hf",)}.get(mirror, (mirror,))
        chosen = ([url for name, url in usable if name in wanted]
                  or [url for name, url in usable if name in self.source.auto_mirrors])
        hub = HF_MIRROR if mirror == "hf-mirror" else os.environ.get("HF_ENDPOINT", "").rstrip("/") or HF_HOST
        chosen = [hub + url.removeprefix(HF_HOST) if url.startswith(HF_HOST) else url for url in chosen]
        return tuple(url.replace("{key}", "***" if hide_key else quote(key, safe="")) for url in chosen)

    @property
    def key(self) -> str:
        return self.options.keys.get(self.source.needs_key, "")

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.key,) if self.key else ()

    # --- Again -----------------------------------------------------------------------------------------------------

    def command(self) -> str:
        """The command that asks for this set in the same way."""
        options, name = self.options, self.source.name
        words = ["python", "download_datasets.py", "--datasets", name, "--data-root", str(options.data_root)]
        words += ["--mirror", options.mirror] if options.mirror != "auto" else []
        words += ["--base-url", f"{name}={options.base_urls[name]}"] if name in options.base_urls else []
        words += ["--local", str(self.local)] if self.local else []
        words += ["--also", *(f"{name}:{subset}" for subset in options.also[name])] if name in options.also else []
        words += ["--splits", *options.splits] if options.splits else []
        for flag, value in {"--max-gb": f"{options.max_gb:g}", "--sample": str(options.sample),
                            "--jobs": str(options.jobs)}.items():
            words += [flag, value] if value != "0" else []
        words += ["--sounds", options.sounds] if options.sounds != "mirror" and self.source.clips else []
        words += ["--cookies", str(options.cookies)] if options.cookies and self.source.clips else []
        flags = {"--keep-archives": options.keep_archives, "--skip-existing": options.skip_existing,
                 "--insecure-tls": options.insecure_tls}
        return without_secrets(shlex.join([*words, *(flag for flag, given in flags.items() if given)]))


def peak_bytes(items: list[Item], keep_archives: bool, ahead: int) -> int:
    """See `Selection.peak_bytes`; `ahead` archives may have arrived beside the one that is unpacked."""
    held = peak = 0
    sizes = [0 if item.kind == "plain" else item.size or item.unpacked for item in items]
    for place, (item, size) in enumerate(zip(items, sizes, strict=True)):
        peak = max(peak, held + sum(sizes[place: place + 1 + ahead]) + item.unpacked)
        held += item.unpacked + (size if keep_archives else 0)
    return peak


def _within(items: list[Item], allowed: int) -> list[Item]:
    """Those that come to no more than `allowed` bytes to fetch: lists and small archives first, of shards the first
    ones of each split in turn."""
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
