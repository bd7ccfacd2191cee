"""Getting one data set: what is there already, what is missing, fetch, unpack, count, write the marker.

Several files are fetched at a time; what is complete is unpacked meanwhile. Every step can be stopped at any moment;
the next run finds what is whole by the marker, the lists of contents and the .part files, and does only the rest.
"""

import contextlib
import errno
import importlib.util
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trimodal.download import http, local_copies, notes, pipeline, readiness, unpack, youtube
from trimodal.download.archives import ArchiveError, Part
from trimodal.download.debian import fetch_by_apt
from trimodal.download.holdings import LICENCE, Holdings
from trimodal.download.http import Fetched, Mismatch, TransferError, Wanted, without_secrets
from trimodal.download.local_files import LocalFiles
from trimodal.download.remote import NoRange, RemoteFile
from trimodal.download.selection import Options, Selection, as_published, fetch_bytes
from trimodal.errors import UserError
from trimodal.files import check_writable, locked, remove_left, replacing
from trimodal.sets import inventory
from trimodal.sets.base import File, Item, Source
from trimodal.sets.lists import other_rows

PACKAGES = {"parquet": "pyarrow", "7z": "py7zr"}  # what the standard library cannot unpack
ARCHIVES, LOCK = "archives", ".download"
MOST_PROBLEMS = 3  # files that no server gives, after which no further one is tried
DONE, FAILED, MEND, IN_PART = 0, 1, 2, 3  # exit codes: of these the first of 1, 2, 3 that any set has


@dataclass(frozen=True, kw_only=True)
class Outcome:
    name: str
    state: str  # done, skipped, partial, needs key or failed
    detail: str
    next_command: str = ""
    code: int = DONE


class Acquisition:
    """The work on one data set in `data_root`/NAME."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.selection = Selection(source, options)
        self.folder, self.local = self.selection.folder, self.selection.local
        self.holdings = Holdings(self.selection)
        self.own = LocalFiles(source, source.items, self.local)
        self.policy = replace(options.policy, stop=threading.Event())
        self.unavailable: list[str] = []  # what neither the local copy nor a server has
        self.may_come = 0  # clips that did not come this time

    # --- The whole set ---------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Get what is missing."""
        return self.told(self._get_missing)

    def told(self, work: Callable[[], Outcome]) -> Outcome:
        """What `work` gives. Never raises for what a user, a server or a disk did: the outcome says it."""
        again = self.selection.command()
        try:
            return work()
        except (UserError, TransferError, ArchiveError) as error:
            detail = without_secrets(str(error), self.selection.secrets)
            if self.selection.key and re.search(r"answered 40[13]|web page", detail):
                detail += f"; is {self.source.needs_key} right and still valid?"
            return Outcome(name=self.source.name, state="failed", detail=detail, next_command=again,
                           code=MEND if isinstance(error, UserError) else FAILED)
        except OSError as error:
            detail = f"{error.filename or self.folder}: {error.strerror or error}"
            detail += "; what has arrived is kept, free some space and run again" if error.errno == errno.ENOSPC else ""
            return Outcome(name=self.source.name, state="failed", detail=detail, next_command=again, code=MEND)
        finally:
            self.policy.stop.set()  # threads that are still at work end

    def _get_missing(self) -> Outcome:
        for item in filter(self.holdings.kept, self.selection.items):
            why = "" if self.options.skip_existing else ", in a folder behind a link of yours"
            self.say(f"{item.into}: differs from the published file{why}, and is left as it is; rename it to have the "
                     "published one fetched")
        if not self.local:
            self.holdings.check_links()
        if self.options.skip_existing and self._complete():
            return self._outcome("skipped")
        if self._needs_key():
            return Outcome(name=self.source.name, state="needs key", detail=self.source.key_help, code=MEND,
                           next_command=f"{self.source.needs_key}=YOUR_KEY {self.selection.command()}")
        try:
            check_writable(self.folder)
        except OSError as error:
            self.look()
            self.holdings.check_nothing_lacks(error)
            return self._outcome("skipped")
        with self.locked():
            self._fill()
        return self._outcome("done")

    def _complete(self) -> bool:
        """The cheap look: the marker, that no file of the lists is missing, and no clip is left to try."""
        if not self.holdings.marker.get("complete") or self.holdings.todo(sizes=False):
            return False
        if any(found < number for _, found, number in self.holdings.made()):
            return False
        return not (self._asks_youtube() and youtube.any_left(self.source, self.folder, self.options))

    def _asks_youtube(self) -> bool:
        return self.options.sounds == "youtube" and self.source.clips is not None

    def _needs_key(self) -> bool:
        """Whether a server that wants a key is the only way to something that is missing."""
        if not self.source.needs_key or self.selection.key or self.local:
            return False
        return any(not self.selection.addresses(file) for item in self.holdings.todo() for file in item.files)

    def _fill(self) -> None:
        self.say(f"{self.source.title} ({self.source.licence})")
        before = self.holdings.marker
        self.holdings.marker = {
            "set": self.source.name, "title": self.source.title, "licence": self.source.licence, "complete": False,
            "items": before.get("items", {}), "licence_sha256": before.get("licence_sha256", ""),
            "linked_from": before.get("linked_from") or self.holdings.origins_of_lost_links(),
            "linked": {place: number for place, number in before.get("linked", {}).items()
                       if (self.folder / place).exists() or not number}}
        self._look_in_own_folder(fetch_lists=True)
        if self.local:
            self._link()
        todo = [item for item in self.holdings.todo() if item.name not in self.unavailable and not self._adopted(item)]
        alternatives = bool(self.source.one_of and todo)
        needed = self.bytes_needed(todo[:1] if alternatives else todo)
        unpack.check_free(self.folder, needed, "archives and contents")
        (self._obtain_one if alternatives else self._obtain_all)(todo)
        if self._asks_youtube():
            self.may_come = youtube.fetch_clips(self.source, self.folder, self.options, self.policy)
        self._finish_set()

    def _finish_set(self) -> None:
        if self.source.finish and not self.holdings.todo(sizes=False):
            self.source.finish(self.folder)
        marker = self.holdings.marker
        marker |= {"complete": not self.unavailable and not self.may_come,
                   "limited": self.selection.limited and self._more_without_limits(),
                   "counts": {place: found for place, found, _ in self.holdings.counts(self.holdings.coverage())}}
        if not self.holdings.write_licence():
            self.say(f"{self.folder / LICENCE}: is a file of yours, and is left as it is")
        inventory.write_marker(self.folder, marker)
        unpack.clear_staging(self.folder, self.source)
        lists = [item.into for item in self.selection.items if item.kind == "plain"]
        for name in (inventory.MARKER, youtube.LEDGER, LICENCE, *lists):
            remove_left((self.folder / name).parent, re.escape(Path(name).name))
        for item in self.selection.items:
            self._part_with_archives(item)
        with contextlib.suppress(OSError):
            (self.folder / ARCHIVES).rmdir()  # only when empty

    def _more_without_limits(self) -> bool:
        everything = self.selection.unlimited()
        return (bool(Holdings(everything, self.holdings.marker).todo(sizes=False))
                or (self._asks_youtube() and youtube.any_left(self.source, self.folder, everything.options)))

    def _part_with_archives(self, item: Item, fetched: Sequence[Fetched] = ()) -> None:
        """Remove the archives of an item that came by this command, or with --keep-archives give them to the user."""
        digests = {file.path: file.sha256 for file in fetched}
        for file in item.files if item.kind != "plain" else ():
            path = self.folder / ARCHIVES / file.name
            if self.options.keep_archives:
                notes.keep_archive(path)
            elif notes.remove_archive(path, digests.get(path, "")) and path in digests:
                self.say(f"{path}: is yours, and is left there")

    def _outcome(self, state: str) -> Outcome:
        covered = self.holdings.coverage()
        counts = self.holdings.counts(covered)
        lines = [f"{place} {found:,}" + (f" of {number:,}" if found != number else "")
                 for place, found, number in counts]
        for row in covered if not self.source.partly else ():
            more = ["..."] if row.found + len(row.absent) < row.listed else []
            lines += [f"not there: {', '.join([*row.absent, *more])}"] if row.absent else []
        lines += [f"{what}: {', '.join(names)}" for what, names in (
            ("left as they are, not as published", [i.into for i in self.selection.items if self.holdings.kept(i)]),
            ("not to be had", [*dict.fromkeys(self.unavailable)]),
            ("left out by --max-gb", [i.name for i in self.selection.left_out]))
                  if names]
        short = bool(self.unavailable) or any(found < number for _, found, number in counts)
        code = DONE
        if short and not (self.options.sample or self.selection.left_out):
            ours = not (self.source.partly or self.holdings.marker.get("linked")
                        or any(map(self.holdings.kept, self.selection.items)))
            code = FAILED if ours else IN_PART
        again = code == FAILED or self.may_come
        return Outcome(name=self.source.name, detail=", ".join(lines) or "all files are there", code=code,
                       state="partial" if state != "skipped" and (short or self.selection.left_out) else state,
                       next_command=self.selection.command() if again else readiness.next_command(self.selection))

    # --- What the user has -----------------------------------------------------------------------------------------

    def look(self) -> list[str]:
        """Count as there what a run would link or take over; nothing is changed. Returns what is left out, and why."""
        self._look_in_own_folder()
        copies = self.own.copies(self.selection.items, self.folder)
        self.holdings.look(copies.numbers)
        return list(copies.left_out)

    def offers(self, item: Item) -> bool:
        """Whether --local has the item, as archive or list, or, after `look`, as a folder to link."""
        return self.holdings.linked(item, self.holdings.offered) or (bool(self.local) and self.own.has(item))

    def _look_in_own_folder(self, fetch_lists: bool = False) -> None:
        """Sounds that somebody put into the set's folder count as if --local named it; see LocalFiles."""
        if self.local or self._asks_youtube() or not self.holdings.has_sounds_by_hand(youtube.LEDGER):
            return
        if not self.own.use_folder(self.folder) and fetch_lists:
            self._obtain([item for item in self.holdings.todo() if item.kind == "plain"])
            self.own.use_folder(self.folder)
        self.local = self.own.local
        for sentence in self.own.passed_over if fetch_lists else ():
            self.say(f"not linked: {sentence}")

    def _link(self) -> None:
        """Link the user's copy, where the set has a layout of files or folders to link."""
        assert self.local
        if self.source.clips and self.local.is_dir():
            self._obtain_lists()
        copies = self.own.copies(self.selection.items, self.folder)
        kept = local_copies.link(copies, self.folder, self.holdings.earlier_copies(self.local))
        numbers = {place: number for place, number in copies.numbers.items() if place not in kept}
        self.holdings.marker["linked"] |= numbers
        more = f", and so are {len(kept) - 1:,} more" if kept[1:] else ""
        stay = [f"{self.folder / kept[0]}: is there already{more}"] if kept else []
        for sentence in (*copies.left_out, *stay):
            self.say(f"not linked: {sentence}")
        if numbers:
            self.say(f"linked from {self.local}: " + ", ".join(f"{place} {n:,}" for place, n in numbers.items()))
        elif not any(map(self.own.has, self.selection.items)) and not kept:
            left_out = f" ({copies.left_out[0]})" if copies.left_out else ""
            raise UserError(f"--local {self.local}: holds neither files nor archives of {self.source.title} under the "
                            f"names that they have there{left_out}")
        self._obtain([item for item in self.source.items if item.with_links_to
                      and any(place.startswith(f"{item.with_links_to}/") for place in numbers)
                      and not self.holdings.present(item, True)])

    def _obtain_lists(self) -> None:
        """The lists that name clips, without which no sound has a caption: the user's, or from the server."""
        wanted = [item for item in self.selection.items if item.kind == "plain"]
        self._obtain([item for item in wanted if not self.holdings.present(item, True)])
        versions = dict.fromkeys(item.subset for item in wanted)
        by_version = [[item.into for item in wanted if item.subset == version] for version in versions]
        absent = [[place for place in places if not (self.folder / place).is_file()] for places in by_version]
        if all(absent):
            raise UserError(f"--local {self.local}: the published lists of captions are neither there nor to be had "
                            f"from a server; put {', '.join(absent[0])} into {self.folder}")

    def _adopted(self, item: Item) -> bool:
        number = self.holdings.adopt(item)
        if number:
            self.say(f"{item.name}: {number:,} files are here, as many as published; taken over, contents not checked")
        return bool(number)

    def _from_local(self, wanted: Wanted, path: Path) -> Fetched:
        """A file of the user's copy, checked: an archive is read where it is, a list is copied to `path`."""
        fetched = self._check_local(wanted)
        if path.parent.name == ARCHIVES:
            return fetched
        path.parent.mkdir(parents=True, exist_ok=True)
        to = replace(wanted, path=path)
        with wanted.path.open("rb") as source, replacing(
                path, rename=lambda copy, _: http.put(copy, to, self.policy.progress.say)) as copy:
            shutil.copyfileobj(source, copy)
        return replace(fetched, path=path)

    def _check_local(self, wanted: Wanted) -> Fetched:
        try:
            return http.check_file(wanted, self.policy.progress)
        except Mismatch as error:
            raise UserError(f"{wanted.path}: {error}; it is damaged or another release") from None

    # --- Items -----------------------------------------------------------------------------------------------------

    def _obtain(self, items: Sequence[Item]) -> None:
        """Fetch these items, several files at a time, and unpack each as soon as all of it is there.

        What no server gives is told at the end: the others are fetched before, up to MOST_PROBLEMS.
        """
        for item in items:
            self._check_package(item)
            self.holdings.check_places(item)
        problems: list[str] = []
        arrived: dict[str, dict[int, Fetched]] = {}
        with self.policy.progress.overall(self.source.name, fetch_bytes(items)):
            for (item, number), result in pipeline.results(self._tasks(items, problems), self.selection.jobs):
                with self._noted(item, problems):
                    if isinstance(result, BaseException):
                        raise result
                    parts = arrived.setdefault(item.name, {})
                    parts[number] = result
                    if len(parts) == len(self._calls(item)):
                        self._complete_item(item, [parts[i] for i in sorted(parts)])
        if problems:
            tried = "" if len(problems) < MOST_PROBLEMS else "; others were not tried any more"
            raise TransferError("; ".join(problems) + tried)

    def _tasks(self, items: Sequence[Item],
               problems: list[str]) -> Iterator[tuple[tuple[Item, int], Callable[[], Fetched]]]:
        for item in items:
            for number, call in enumerate(self._calls(item)):
                if len(problems) < MOST_PROBLEMS:
                    yield (item, number), call

    @contextlib.contextmanager
    def _noted(self, item: Item, problems: list[str]) -> Iterator[None]:
        """A list that no server gives does not spoil the recordings that the user has; other problems come at the
        end."""
        try:
            yield
        except _NotAvailable:
            self.unavailable.append(item.name)
        except (TransferError, ArchiveError) as error:
            self.say(str(error))
            if self.local and item.kind == "plain":
                self.unavailable.append(item.name)
            else:
                problems.append(str(error))

    def _obtain_all(self, items: list[Item]) -> None:
        """All items, or a sample of those that can be taken in part, after the lists that choose it."""
        sampled = [item for item in items if self.options.sample and item.is_sampled]
        self._obtain([item for item in items if item not in sampled])
        for item in sampled:
            if self.holdings.present(item, False):
                continue  # shards: those before it had enough clips
            try:
                self._complete_item(item, self._remote_parts(item))
            except NoRange:
                self._obtain([item])

    def _remote_parts(self, item: Item) -> list[RemoteFile]:
        if self.local or item.kind not in ("zip", "7z"):
            raise NoRange
        self._check_package(item)
        return [RemoteFile(self._wanted(file, Path(file.name), self.selection.addresses(file)), self.policy)
                for file in item.files]

    def _obtain_one(self, items: list[Item]) -> None:
        """The first of the alternatives that can be had, or the one that the user has."""
        if self.local and self.local.is_file():
            items = [self.own.alternative()]
        problems = []
        for item in items:
            try:
                return self._obtain([item])
            except TransferError as error:
                problems.append(str(error))
        names = " or ".join(item.name for item in items)
        raise TransferError(f"{'; '.join(problems)}; get {names} yourself and name it: --local FILE")

    def _calls(self, item: Item) -> list[Callable[[], Fetched]]:
        """What has to be done to have the files of an item."""
        whole = self.own.whole(item)
        if whole:
            return [partial(self._check_local, Wanted(path=whole, digests=(f"md5:{item.whole_md5}",)))]
        return [partial(self._get, item, file) for file in item.files]

    def _complete_item(self, item: Item, fetched: Sequence[Fetched | RemoteFile]) -> None:
        """All files of the item are there, or can be read where they are: unpack it, and write it into the marker."""
        here = [file for file in fetched if isinstance(file, Fetched)]
        record: dict[str, Any] = {
            "sha256": [file.sha256 for file in here], "checked": [file.checked for file in here],
            "files": 1, "bytes": sum(file.size for file in here)}
        if item.kind != "plain":
            parts = [file.path if isinstance(file, Fetched) else file for file in fetched]
            record = self._unpack(item, parts, record)
        elif note := other_rows(here[0].path, 0 if here[0].checked else item.files[0].lines):
            self.say(f"note: {item.name} {note}")
        self.holdings.items[item.name] = record
        inventory.write_marker(self.folder, self.holdings.marker)
        self._part_with_archives(item, here)
        checked = "digest right" if all(record["checked"]) else "no digest is published"
        checked = "a sample, read in pieces" if len(here) < len(fetched) else checked
        self.say(f"{item.name}: {checked}, {record['files']:,} files, {record['bytes'] / 1e6:,.1f} MB")

    def _unpack(self, item: Item, parts: Sequence[Part], record: dict[str, Any]) -> dict[str, Any]:
        choose, archive = None, "".join(record["sha256"])[:16]
        if self.options.sample and item.is_sampled:
            number = self.options.sample
            record["sample"], archive = number, f"{archive}-{number}"
            if item.kind == "parquet":
                number -= inventory.count(self.folder / item.into, "")
            choose = self.source.choose(item, self.folder, number)
        published = sum(count.number for count in item.counts)
        contents = unpack.Contents(
            max_files=2 * published + 10_000 if published else 2_000_000, max_bytes=3 * item.unpacked + 1_000_000_000,
            rules=item.rules, choose=choose, rows=item.rows)
        staging = unpack.staging_folder(self.folder, item, archive)
        with inventory.Listing(inventory.contents_path(self.folder, item.name), record) as listing:
            for file in unpack.extract(parts, item.kind, staging, contents, self.policy.progress):
                listing.add(file.name, file.size, file.crc32)
            listing.finish()
        kept: list[Path] = []
        try:
            unpack.move_into(staging, self.folder.resolve() / item.into, tell=kept.append)
        finally:
            if kept:
                self.say(f"{item.name}: {len(kept):,} files that were there differ from its own and are kept, the "
                         f"first as {kept[0]}")
        return listing.record

    def _get(self, item: Item, file: File) -> Fetched:
        """The file from the user's copy, the system's package tool or a server, checked."""
        path, _ = self.arrived(item, file)
        came = (self.holdings.items.get(item.name) or {}).get("sha256") if item.kind == "plain" else None
        if item.kind == "plain" and self.holdings.is_published(item):
            notes.forget(path)  # of a run that was killed just before it did so
            return http.check_file(self._wanted(file, path, ()), self.policy.progress)
        local = self.own.file(item, file)
        if file.name in self.own.differing:
            self.say(f"{self.own.differing[file.name]}: differs from the published list, which is taken instead")
        if local and path.exists() and local.samefile(path):  # the set's own folder was named
            with contextlib.suppress(Mismatch):
                return http.check_file(self._wanted(file, path, ()), self.policy.progress)
        elif local:
            return self._from_local(replace(self._wanted(file, local, ()), replaces=(came or [""])[0]), path)
        urls = self.selection.addresses(file)
        if not urls and self.local:
            raise _NotAvailable
        wanted = replace(self._wanted(file, path, tuple(url for url in urls if not url.startswith("apt:"))),
                         replaces=(came or [""])[0], keep_note=item.kind != "plain")
        if urls and urls[0].startswith("apt:"):
            return fetch_by_apt(urls[0].removeprefix("apt:"), wanted)
        return http.fetch(wanted, self.policy) if wanted.digests else self._get_unpinned(wanted)

    def _get_unpinned(self, wanted: Wanted) -> Fetched:
        """A file without a published digest: what is there counts only by the one that was noted when it came."""
        noted = notes.whole_sha256(wanted.path)
        with contextlib.suppress(FileNotFoundError, Mismatch):
            if noted:
                fetched = http.check_file(replace(wanted, digests=(f"sha256:{noted}",)), self.policy.progress)
                return replace(fetched, checked="")
        return http.fetch(wanted, self.policy)

    def _wanted(self, file: File, path: Path, urls: tuple[str, ...]) -> Wanted:
        keyed = tuple(urlsplit(url).hostname or "" for _, url in file.urls if "{key}" in url)
        return replace(as_published(file, path), urls=urls, secrets=self.selection.secrets,
                       unverified_hosts=keyed if self.options.insecure_tls else ())

    # --- Checks beforehand -----------------------------------------------------------------------------------------

    def _check_package(self, item: Item) -> None:
        package = PACKAGES.get(item.kind)
        if package and importlib.util.find_spec(package) is None:
            hint = ", or name sounds that you have: --local FOLDER" if item.kind == "parquet" else ""
            raise UserError(f"{item.name} is unpacked by the optional package {package}: pip install {package}{hint}")

    def bytes_needed(self, items: list[Item]) -> int:
        """Disk that getting these items takes at most, beside what has arrived or was unpacked by an earlier run."""
        paths = [path for item in items for file in item.files for path in self.arrived(item, file)]
        there = sum(path.stat().st_size for path in paths if path.is_file())
        return max(0, self.selection.peak_bytes(items) - there - unpack.staged_bytes(self.folder, self.source))

    def arrived(self, item: Item, file: File) -> tuple[Path, Path]:
        """Where a file of an item lies, and the part of it that has come."""
        path = self.folder / item.into if item.kind == "plain" else self.folder / ARCHIVES / file.name
        return path, notes.part_of(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One download of a set at a time."""
        try:
            with locked(self.folder / LOCK) as held:
                if not held:
                    self.say("this file system has no locks: see to it that no second download uses the folder")
                self.holdings.reread()
                yield
        except BlockingIOError:
            raise UserError(f"{self.folder}: another download is at work here; wait for it or stop it") from None

    def say(self, text: str) -> None:
        self.policy.progress.say(f"{self.source.name}: {without_secrets(text, self.selection.secrets)}", sys.stdout)


class _NotAvailable(Exception):
    """The user's copy lacks it, and no server gives it without a key."""
