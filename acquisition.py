"""Getting one data set: what is there already, what is missing, fetch, unpack, count, write the marker.

Every step can be stopped at any moment; the next run finds what is whole by the marker, the lists of contents and the
.part files, and does only the rest.
"""

import contextlib
import csv
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import archives
import inventory
import local_copies
import transfer
from archives import ArchiveError
from config import UserError
from redaction import command_line, redact
from sources import HF_HOST, File, Item, Source
from transfer import Fetched, Mismatch, Policy, TransferError, Wanted

HF_MIRROR = "https://hf-mirror.com"
PACKAGES = {"parquet": "pyarrow", "7z": "py7zr"}  # what the standard library cannot unpack
ARCHIVES, STAGING, LOCK, LICENCE = "archives", ".unpacking", ".lock", "LICENCE.txt"
APT_TIMEOUT_S = 3600


@dataclass(frozen=True, kw_only=True)
class Options:
    data_root: Path
    mirror: str = "auto"
    base_urls: Mapping[str, str] = field(default_factory=dict)
    local: Mapping[str, Path] = field(default_factory=dict)
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)  # by the name of their environment variable
    keep_archives: bool = False
    skip_existing: bool = False
    insecure_tls: bool = False
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    name: str
    state: str  # done, skipped, partial, needs key or failed
    detail: str
    next_command: str = ""
    code: int = 0


def peak_bytes(items: Iterable[Item], options: Options) -> int:
    """Disk that getting these items one after another takes at most, archives included while they are needed."""
    held = peak = 0
    for item in items:
        archive = 0 if item.kind == "plain" else item.size or item.unpacked
        peak = max(peak, held + archive + item.unpacked)
        held += item.unpacked + (archive if options.keep_archives else 0)
    return peak


class Acquisition:
    """The work on one data set in `data_root`/NAME."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source = source
        self.options = options
        self.folder = options.data_root / source.name
        self.items = source.select(options.also.get(source.name, ()))
        self.local = options.local.get(source.name)
        self.marker = inventory.read_marker(self.folder)
        self.unavailable: list[str] = []  # what neither the local copy nor a server has

    # --- The whole set ---------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Get what is missing. Never raises for what a user or a server did: the outcome says it."""
        try:
            if self.options.skip_existing and self.marker.get("complete") and not self.todo(sizes=False):
                return self._outcome("skipped")
            if self._needs_key():
                return Outcome(name=self.source.name, state="needs key", detail=self.source.key_help, code=2,
                               next_command=f"{self.source.needs_key}=YOUR_KEY {self._command()}")
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._fill()
            return self._outcome("done")
        except (UserError, TransferError, ArchiveError) as error:
            detail = redact(str(error), self._secrets())
            if self._key() and re.search(r"answered 40[13]|web page", detail):
                detail += f"; is {self.source.needs_key} right and still valid?"
            return Outcome(name=self.source.name, state="failed", detail=detail, next_command=self._command(),
                           code=2 if isinstance(error, UserError) else 1)
        except OSError as error:
            detail = f"{error.filename or self.folder}: {error.strerror or error}"
            return Outcome(name=self.source.name, state="failed", detail=detail, next_command=self._command(), code=2)

    def todo(self, *, sizes: bool = True) -> list[Item]:
        """Items that are not there. Of alternatives: none as soon as one is there."""
        absent = [item for item in self.items if not self._present(item, sizes)]
        return [] if self.source.one_of and len(absent) < len(self.items) else absent

    def state_of(self, item: Item) -> str:
        return "there already" if self._present(item, True) else "to fetch"

    def _fill(self) -> None:
        self._say(f"{self.source.title} ({self.source.licence})")
        self.marker = {"set": self.source.name, "title": self.source.title, "licence": self.source.licence,
                       "complete": False, "items": self.marker.get("items", {}),
                       "linked": {place: number for place, number in self.marker.get("linked", {}).items()
                                  if (self.folder / place).is_dir() or not number}}
        if self.local:
            self._link()
        todo = [item for item in self.todo() if not self._adopt(item)]
        self._check_space(todo)
        if self.source.one_of and todo:
            self._obtain_one(todo)
        else:
            for item in todo:
                self._obtain_or_note(item)
        self.marker |= {"complete": not self.unavailable, "counts": {place: n for place, n, _ in self._counts()}}
        inventory.write_marker(self.folder, self.marker)
        (self.folder / LICENCE).write_text(f"{self.source.title}\n{self.source.page}\n\n{self.source.licence}\n"
                                           f"{self.source.note}\n", encoding="utf-8")
        self._clear()

    def _clear(self) -> None:
        """Remove what a complete set needs no more, that of interrupted runs too."""
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)
        if not self.options.keep_archives:
            for file in (file for item in self.items for file in item.files):
                for suffix in ("", ".part", ".part.json"):
                    (self.folder / ARCHIVES / (file.name + suffix)).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self.folder / ARCHIVES).rmdir()  # only when empty

    def _obtain_or_note(self, item: Item) -> None:
        """A list that no server gives does not spoil the recordings that the user has."""
        try:
            self._obtain(item)
        except TransferError as error:
            if not (self.local and item.kind == "plain"):
                raise
            self._say(str(error))
            self.unavailable.append(item.name)

    def _obtain_one(self, items: list[Item]) -> None:
        """The first of the alternatives that can be had, or the one that the user has."""
        if self.local and self.local.is_file():
            items = [self._local_alternative(items)]
        problems = []
        for item in items:
            try:
                return self._obtain(item)
            except (TransferError, ArchiveError) as error:
                self._say(str(error))
                problems.append(str(error))
        names = " or ".join(item.name for item in items)
        raise TransferError(f"{'; '.join(problems)}; get {names} yourself and name it: --local FILE")

    def _local_alternative(self, items: list[Item]) -> Item:
        for item in items:
            with contextlib.suppress(Mismatch):
                transfer.check_file(self._wanted(item.files[0], Path(str(self.local)), ()))
                return item
        known = ", ".join(f"{item.name} (sha256 {item.files[0].sha256})" for item in items)
        raise UserError(f"{self.local}: is another release than those that were verified, or damaged; known: {known}")

    def _outcome(self, state: str) -> Outcome:
        counts = self._counts()
        lines = [f"{place} {found:,}" + (f" of {number:,}" if found != number else "")
                 for place, found, number in counts]
        short = [place for place, found, number in counts if found < number] or self.unavailable
        if self.unavailable:
            lines.append("not to be had: " + ", ".join(self.unavailable))
        usable = not short or bool(self.source.partly or self.marker.get("linked"))
        train = shlex.join(["python", "run_training.py", "--datasets", self.source.name,
                            "--data-root", str(self.options.data_root)])
        return Outcome(name=self.source.name, state="partial" if short and state != "skipped" else state,
                       detail=", ".join(lines) or "all files are there", code=0 if usable else 1,
                       next_command=train if usable else self._command())

    def _counts(self) -> list[tuple[str, int, int]]:
        """(place, files found, files published) of the items that are there, and of what may fall short."""
        expected: dict[tuple[str, str], int] = {}
        held = [item for item in self.items if item.name in self.marker.get("items", {}) or self._linked(item)]
        for count in (*(count for item in held for count in item.counts if count.number), *self.source.partly):
            expected[count.folder, count.suffix] = expected.get((count.folder, count.suffix), 0) + count.number
        return [(f"{folder.rstrip('.')} {suffix}".strip(), inventory.count(self.folder / folder, suffix), number)
                for (folder, suffix), number in expected.items()]

    # --- What is there already -------------------------------------------------------------------------------------

    def _present(self, item: Item, sizes: bool) -> bool:
        if self._linked(item):
            return True
        record = self.marker.get("items", {}).get(item.name)
        if item.kind == "plain":
            return bool(record) and self._plain_is_right(self.folder / item.into, record, sizes)
        contents = inventory.contents_path(self.folder, item.name)
        if not inventory.missing(self.folder / item.into, contents, sizes=sizes):
            if not record:  # stopped between the last rename and the marker
                self.marker.setdefault("items", {})[item.name] = inventory.read_record(contents)
            return True
        return False

    @staticmethod
    def _plain_is_right(path: Path, record: Mapping[str, Any], thorough: bool) -> bool:
        if not path.is_file() or path.stat().st_size != record.get("bytes"):
            return False
        with contextlib.suppress(Mismatch, KeyError, IndexError):
            return not thorough or bool(transfer.check_file(Wanted(path=path, urls=(), sha256=record["sha256"][0])))
        return False

    def _linked(self, item: Item) -> bool:
        linked = self.marker.get("linked", {})
        return (item.kind == "parquet" and item.into in linked) or any(count.folder in linked for count in item.counts)

    def _link(self) -> None:
        """Link the user's copy, where the set has a layout of single files to link."""
        assert self.local
        linked: dict[str, int] = {}
        if self.local.is_dir() and self.source.name == "voxceleb":
            linked = local_copies.link_voxceleb(self.local, self.folder)
        if self.local.is_dir() and self.source.name == "audiocaps":
            for item in self.items:
                if item.kind == "plain" and not self._present(item, True):
                    self._obtain(item)
            linked = local_copies.link_audiocaps(self.local, self.folder, self.folder / "dataset")
            linked = linked if any(linked.values()) else {}
        self.marker["linked"] = linked
        if linked:
            numbers = ", ".join(f"{place} {number:,}" for place, number in linked.items())
            self._say(f"linked from {self.local}: {numbers}")

        elif not any(self._in_local(file.name) or self._in_local(item.name)
                     for item in self.items for file in item.files):
            raise UserError(f"--local {self.local}: holds neither files nor archives of {self.source.title} under the "
                            "names that they have there")

    def _adopt(self, item: Item) -> bool:
        """Take over what somebody else unpacked: as many files as published, none empty, of a likely size in all."""
        if self.source.one_of or not item.counts or not all(count.number for count in item.counts):
            return False
        files: list[tuple[str, int]] = []
        for count in item.counts:
            found = list(inventory.tree(self.folder / count.folder, count.suffix))
            if len(found) != count.number or not all(size for _, size in found):
                return False
            below = Path(count.folder).relative_to(item.into)
            files += [((below / name).as_posix(), size) for name, size in found]
        if 2 * sum(size for _, size in files) < item.unpacked:
            return False
        record: dict[str, Any] = {"sha256": [], "checked": [], "url": [], "adopted": True}
        inventory.write_contents(inventory.contents_path(self.folder, item.name), record, iter(files))
        self.marker["items"][item.name] = record
        self._say(f"{item.name}: {len(files):,} files are here, as many as published; taken over, contents not checked")
        return True

    # --- One item --------------------------------------------------------------------------------------------------

    def _obtain(self, item: Item) -> None:
        """Fetch and unpack one item, and write it into the marker."""
        self._check_package(item)
        paths = ([self.folder / item.into] if item.kind == "plain"
                 else [self.folder / ARCHIVES / file.name for file in item.files])
        try:
            fetched = self._whole_archive(item) or list(map(self._get, item.files, paths))
        except _NotAvailable:
            self.unavailable.append(item.name)
            return
        record: dict[str, Any] = {
            "sha256": [file.sha256 for file in fetched], "checked": [file.checked for file in fetched],
            "url": [file.url for file in fetched], "files": 1, "bytes": sum(file.size for file in fetched)}
        if item.kind != "plain":
            self._unpack(item, [file.path for file in fetched], record)
        else:
            self._look_at_rows(item, fetched[0])
        self.marker["items"][item.name] = record
        inventory.write_marker(self.folder, self.marker)
        if item.kind != "plain" and not self.options.keep_archives:
            for path in paths:
                path.unlink(missing_ok=True)
        checked = "digest right" if all(record["checked"]) else "no digest is published"
        self._say(f"{item.name}: {checked}, {record['files']:,} files, {record['bytes'] / 1e6:,.1f} MB")

    def _unpack(self, item: Item, parts: list[Path], record: dict[str, Any]) -> None:
        self._check_free(archives.declared_size(parts, item.kind), item.name)
        published = sum(count.number for count in item.counts)
        expected = archives.Expected(rules=item.rules, files=2 * published + 10_000 if published else 2_000_000,
                                     size=3 * item.unpacked + 1_000_000_000)
        contents = inventory.contents_path(self.folder, item.name)
        archives.unpack(parts, item.kind, self.folder / item.into, self.folder / STAGING / item.name, expected,
                        lambda staged: inventory.write_contents(contents, record, inventory.tree(staged)))

    def _look_at_rows(self, item: Item, fetched: Fetched) -> None:
        """Where no digest is published, a list of another length is worth a word."""
        wanted = item.files[0].lines
        if fetched.checked or not wanted:
            return
        with fetched.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            try:
                rows = sum(1 for _ in csv.reader(file)) - 1 if item.name.endswith(".csv") else sum(1 for _ in file)
            except csv.Error:
                rows = 0
        if rows != wanted:
            self._say(f"note: {item.name} has {rows:,} rows, {wanted:,} are published")

    def _whole_archive(self, item: Item) -> list[Fetched] | None:
        """The user's copy of a multi-part archive that is put together already."""
        path = self._in_local(item.name) if item.whole_md5 else None
        return [self._check_local(Wanted(path=path, urls=(), md5=item.whole_md5))] if path else None

    def _get(self, file: File, path: Path) -> Fetched:
        """The file from the user's copy, the system's package tool or a server, checked."""
        if local := self._in_local(file.name):
            fetched = self._check_local(self._wanted(file, local, ()))
            if path.parent.name == ARCHIVES:
                return fetched
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(local, path)
            return replace(fetched, path=path)
        urls = self.addresses(file)
        if not urls and self.local:
            raise _NotAvailable
        wanted = self._wanted(file, path, tuple(url for url in urls if not url.startswith("apt:")))
        if path.exists() and not wanted.pinned:
            path.unlink()  # not in the marker, and nothing to check it by
        if urls and urls[0].startswith("apt:"):
            return _fetch_by_apt(urls[0].removeprefix("apt:"), wanted)
        return transfer.fetch(wanted, self.options.policy)

    def _wanted(self, file: File, path: Path, urls: tuple[str, ...]) -> Wanted:
        keyed = tuple(urlsplit(url).hostname or "" for _, url in file.urls if "{key}" in url)
        return Wanted(path=path, urls=urls, size=file.size, sha256=file.sha256, md5=file.md5, also_good=file.also_good,
                      secrets=self._secrets(), unverified_hosts=keyed if self.options.insecure_tls else ())

    def _check_local(self, wanted: Wanted) -> Fetched:
        try:
            return transfer.check_file(wanted)
        except Mismatch as error:
            raise UserError(f"{wanted.path}: {error}; it is damaged or another release") from None

    def _in_local(self, name: str) -> Path | None:
        """`name` in the user's copy: there or one folder below."""
        if not self.local:
            return None
        if self.local.is_file():
            return self.local
        places = (self.local / name, *sorted(self.local.glob(f"*/{name}")))
        return next((path for path in places if path.is_file()), None)

    # --- Addresses -------------------------------------------------------------------------------------------------

    def addresses(self, file: File, *, hide_key: bool = False) -> tuple[str, ...]:
        """Where to ask, in order, under --base-url, --mirror and the key. For what the mirror lacks: as by `auto`."""
        if base := self.options.base_urls.get(self.source.name):
            return (f"{base}/{file.name}",)
        key = self._key()
        usable = [(name, url) for name, url in file.urls if key or "{key}" not in url]
        mirror = self.options.mirror
        wanted = {"auto": self.source.auto_mirrors, "hf-mirror": ("hf",)}.get(mirror, (mirror,))
        chosen = ([url for name, url in usable if name in wanted]
                  or [url for name, url in usable if name in self.source.auto_mirrors])
        hub = HF_MIRROR if mirror == "hf-mirror" else os.environ.get("HF_ENDPOINT", "").rstrip("/") or HF_HOST
        chosen = [hub + url.removeprefix(HF_HOST) if url.startswith(HF_HOST) else url for url in chosen]
        return tuple(url.replace("{key}", "***" if hide_key else quote(key, safe="")) for url in chosen)

    def _key(self) -> str:
        return self.options.keys.get(self.source.needs_key, "")

    def _secrets(self) -> tuple[str, ...]:
        return (self._key(),) if self._key() else ()

    def _needs_key(self) -> bool:
        """Whether a server that wants a key is the only way to something that is missing."""
        if not self.source.needs_key or self._key() or self.local:
            return False
        return any(not self.addresses(file) for item in self.todo() for file in item.files)

    def _command(self) -> str:
        options, name = self.options, self.source.name
        words = ["python", "download_datasets.py", "--datasets", name, "--data-root", str(options.data_root)]
        words += ["--mirror", options.mirror] if options.mirror != "auto" else []
        words += ["--base-url", f"{name}={options.base_urls[name]}"] if name in options.base_urls else []
        words += ["--local", str(self.local)] if self.local else []
        words += ["--also", *(f"{name}:{subset}" for subset in options.also[name])] if name in options.also else []
        flags = {"--keep-archives": options.keep_archives, "--skip-existing": options.skip_existing,
                 "--insecure-tls": options.insecure_tls}
        return command_line([*words, *(flag for flag, given in flags.items() if given)])

    # --- Checks beforehand -----------------------------------------------------------------------------------------

    def _check_package(self, item: Item) -> None:
        package = PACKAGES.get(item.kind)
        if package and importlib.util.find_spec(package) is None:
            hint = ", or name sounds that you have: --local FOLDER" if item.kind == "parquet" else ""
            raise UserError(f"{item.name} is unpacked by the optional package {package}: pip install {package}{hint}")

    def _check_space(self, items: list[Item]) -> None:
        self._check_free(peak_bytes(items[:1] if self.source.one_of else items, self.options), "archives and contents")

    def _check_free(self, needed: int, what: str) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(f"{self.folder}: {needed / 1e9:,.1f} GB are needed for {what}, {free / 1e9:,.1f} GB are "
                            "free; free some, or give another --data-root")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One download of a set at a time; the lock goes with the process, however it ends."""
        import fcntl

        with (self.folder / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: another download is at work here; wait for it or stop it") from None
            self.marker = inventory.read_marker(self.folder)
            yield

    def _say(self, text: str) -> None:
        print(f"{self.source.name}: {redact(text, self._secrets())}", flush=True)


class _NotAvailable(Exception):
    """The user's copy lacks it, and no server gives it without a key."""


def _fetch_by_apt(package: str, wanted: Wanted) -> Fetched:
    """Let the system's package tool fetch PACKAGE=VERSION (that needs no root), and check what came."""
    with contextlib.suppress(FileNotFoundError, Mismatch):
        return transfer.check_file(wanted)
    if not shutil.which("apt-get"):
        raise TransferError(f"{wanted.path.name}: this system has no apt-get")
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wanted.path.parent) as folder:
        try:
            result = subprocess.run(["apt-get", "download", package], cwd=folder, stdin=subprocess.DEVNULL,
                                    capture_output=True, text=True, errors="replace", timeout=APT_TIMEOUT_S,
                                    env={**os.environ, "LC_ALL": "C"})
        except subprocess.TimeoutExpired:
            raise TransferError(f"{wanted.path.name}: apt-get did not end within {APT_TIMEOUT_S} s") from None
        found = list(Path(folder).glob("*.deb"))
        if result.returncode or len(found) != 1:
            said = "; ".join(line for line in result.stderr.splitlines() if line.startswith("E:"))
            raise TransferError(f"{wanted.path.name}: apt-get does not give {package} ({said or 'no file came'})")
        os.replace(found[0], wanted.path)
    try:
        return replace(transfer.check_file(wanted), url=f"apt:{package}")
    except Mismatch as error:
        wanted.path.unlink()
        raise TransferError(f"{wanted.path.name}: apt-get gives another release than the one verified here: it {error}"
                            ) from None
