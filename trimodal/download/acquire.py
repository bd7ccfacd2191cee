"""Get one data set: see what is missing, fetch it, unpack it, and write down what is there.

Several files are fetched at a time; what is complete is unpacked meanwhile. Every step can be stopped at any moment;
the next run finds what is whole by the marker, the lists of contents and the .part files, and does only the rest.
"""

import contextlib
import errno
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trimodal.download import http, notes, unpack, youtube
from trimodal.download.archives import ArchiveError
from trimodal.download.debian import fetch_by_apt
from trimodal.download.http import Fetched, Mismatch, Policy, TransferError, Wanted
from trimodal.download.local import LocalFiles, link
from trimodal.download.progress import in_threads
from trimodal.download.remote import NoRange, RemoteFile
from trimodal.download.selection import Options, Selection, as_published, fetch_bytes
from trimodal.download.state import LICENCE, State, contents_path, write_contents
from trimodal.errors import UserError, counted
from trimodal.files import check_writable, locked, remove_left, replacing
from trimodal.redaction import without_secrets
from trimodal.sets import inventory
from trimodal.sets.base import File, Item, Source
from trimodal.sets.lists import row_count_note

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


class _NotAvailable(Exception):
    """The user's copy lacks it, and no server gives it without a key."""


@dataclass
class Job:
    """The work on one data set: what is asked for, what is on the disk, and what the user has elsewhere."""

    selection: Selection
    state: State
    local: LocalFiles
    policy: Policy
    unavailable: list[str] = field(default_factory=list)  # what neither the local copy nor a server has
    clips_to_come: int = 0  # that did not come this time

    @property
    def folder(self) -> Path:
        return self.selection.folder

    def say(self, text: str) -> None:
        selection = self.selection
        self.policy.progress.say(f"{selection.source.name}: {without_secrets(text, selection.secrets)}", sys.stdout)


def open_job(source: Source, options: Options) -> Job:
    selection = Selection(source, options)
    return Job(selection=selection, state=State(selection), local=LocalFiles(selection, selection.local),
               policy=replace(options.policy, stop=threading.Event()))


def acquire(source: Source, options: Options) -> Outcome:
    """Get what is missing of a set."""
    job = open_job(source, options)
    return reported(job, lambda: _get_missing(job))


def reported(job: Job, work: Callable[[], Outcome]) -> Outcome:
    """Run `work` and return its outcome; an error of the user, a server or the disk becomes an outcome "failed" whose
    detail is the error's message, without secrets."""
    selection = job.selection
    try:
        return work()
    except (UserError, TransferError, ArchiveError) as error:
        detail = without_secrets(str(error), selection.secrets)
        if selection.key and re.search(r"answered 40[13]|web page", detail):
            detail += f"; is {selection.source.needs_key} right and still valid?"
        code = MEND if isinstance(error, UserError) else FAILED
    except OSError as error:
        code, detail = MEND, f"{error.filename or job.folder}: {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            detail += "; what has arrived is kept, free some space and run again"
    finally:
        job.policy.stop.set()  # threads that are still at work end
    return Outcome(name=selection.source.name, state="failed", detail=detail, code=code,
                   next_command=selection.command())


@contextlib.contextmanager
def one_at_a_time(job: Job) -> Iterator[None]:
    """One download of a set at a time."""
    try:
        with locked(job.folder / LOCK) as held:
            if not held:
                job.say("this file system has no locks: see to it that no second download uses the folder")
            job.state.reread()
            yield
    except BlockingIOError:
        raise UserError(f"{job.folder}: another download is at work here; wait for it or stop it") from None


# --- The whole set ---------------------------------------------------------------------------------------------------


def _get_missing(job: Job) -> Outcome:
    selection, state, source = job.selection, job.state, job.selection.source
    for item in filter(state.kept, selection.items):
        job.say(f"{item.into}: differs from the published file, and is left as it is; rename it to have the published "
                "one fetched")
    if not job.local.path:
        state.check_links()
    if selection.options.skip_existing and _is_complete(job):
        return _outcome(job, "skipped")
    needs_key = source.needs_key and not selection.key and not job.local.path and any(
        not selection.addresses(file) for item in state.todo() for file in item.files)
    if needs_key:
        return Outcome(name=source.name, state="needs key", detail=source.key_help, code=MEND,
                       next_command=f"{source.needs_key}=YOUR_KEY {selection.command()}")
    try:
        check_writable(job.folder)
    except OSError as error:
        look(job)
        state.check_nothing_lacks(error)
        return _outcome(job, "skipped")
    with one_at_a_time(job):
        _fill(job)
        _finish(job)
    return _outcome(job, "done")


def _is_complete(job: Job) -> bool:
    """The cheap look: the marker, that no file of the lists is missing, and no clip is left to try."""
    selection, state = job.selection, job.state
    return (bool(state.marker.get("complete")) and not state.todo(sizes=False)
            and all(row.found >= row.expected for row in state.made())
            and not (selection.asks_youtube and youtube.any_left(selection)))


def _fill(job: Job) -> None:
    selection, source = job.selection, job.selection.source
    job.say(f"{source.title} ({source.licence})")
    job.state.begin()
    for sentence in _look_in_own_folder(job, fetch_lists=True):
        job.say(f"not linked: {sentence}")
    if job.local.path:
        _link(job, job.local.path)
    todo = [item for item in job.state.todo() if item.name not in job.unavailable and not _adopted(job, item)]
    needed = bytes_needed(job, todo[:1] if source.one_of else todo)
    unpack.check_free(job.folder, needed, "archives and contents")
    (_obtain_one if source.one_of and todo else _obtain_all)(job, todo)
    if selection.asks_youtube:
        job.clips_to_come = youtube.fetch_clips(selection, job.policy)


def _finish(job: Job) -> None:
    """Write the marker and the licence, and remove what is needed no longer."""
    selection, state, folder = job.selection, job.state, job.folder
    if selection.source.finish and not state.todo(sizes=False):
        selection.source.finish(folder)
    everything = selection.unlimited()
    more = bool(State(everything, state.marker).todo(sizes=False)) or (
        selection.asks_youtube and youtube.any_left(everything))
    state.marker |= {"complete": not job.unavailable and not job.clips_to_come, "limited": selection.limited and more,
                     "counts": {row.name: row.found for row in state.rows(state.coverage())}}
    if not state.write_licence():
        job.say(f"{folder / LICENCE}: is a file of yours, and is left as it is")
    state.save()
    unpack.clear_staging(folder, selection.source)
    written = [folder / name for name in (inventory.MARKER, youtube.LEDGER, LICENCE)]
    for item in selection.items:
        if item.kind == "plain":
            written.append(folder / item.into)
            notes.remove_lock(folder / item.into)
        else:
            written.append(contents_path(folder, item.name))
            _remove_archives(job, item)
    for path in written:
        remove_left(path.parent, re.escape(path.name))
    with contextlib.suppress(OSError):
        (folder / ARCHIVES).rmdir()  # only when empty


def _outcome(job: Job, done: str) -> Outcome:
    selection, state = job.selection, job.state
    covered = state.coverage()
    rows = state.rows(covered)
    kept = [item.into for item in selection.items if state.kept(item)]
    lines = [f"{row.name} {row.found:,}" + (f" of {row.expected:,}" if row.found != row.expected else "")
             for row in rows]
    for one in covered if not selection.source.partly else ():
        more = ["..."] if one.found + len(one.absent) < one.listed else []
        lines += [f"not there: {', '.join([*one.absent, *more])}"] if one.absent else []
    for what, names in (("left as they are, not as published", kept),
                        ("not to be had", [*dict.fromkeys(job.unavailable)]),
                        ("left out by --max-gb", [item.name for item in selection.left_out])):
        lines += [f"{what}: {', '.join(names)}"] if names else []
    short, code = bool(job.unavailable) or any(row.found < row.expected for row in rows), DONE
    if short and not (selection.options.sample or selection.left_out):
        code = IN_PART if selection.source.partly or state.marker.get("linked") or kept else FAILED
    again = code == FAILED or job.clips_to_come
    return Outcome(name=selection.source.name, detail=", ".join(lines) or "all files are there", code=code,
                   state="partial" if done != "skipped" and (short or selection.left_out) else done,
                   next_command=selection.command() if again else state.next_command())


# --- What the user has -----------------------------------------------------------------------------------------------


def look(job: Job) -> list[str]:
    """Count as there what a run would link or take over; nothing is changed. Returns what is left out, and why."""
    passed_over = _look_in_own_folder(job)
    copies = job.local.copies()
    job.state.look(copies.numbers)
    return [*passed_over, *copies.left_out]


def offers(job: Job, item: Item) -> bool:
    """Whether --local has the item, as archive or list, or, after `look`, as a folder to link."""
    return job.state.linked(item, job.state.offered) or (bool(job.local.path) and job.local.has(item))


def _look_in_own_folder(job: Job, fetch_lists: bool = False) -> Sequence[str]:
    """Use sounds that the user put into the set's folder as if --local had named that folder, if they are most of a
    split. Returns a sentence for each split that has too few."""
    if job.local.path or job.selection.asks_youtube or not job.state.has_sounds_by_hand(youtube.LEDGER):
        return ()
    own = LocalFiles(job.selection, job.folder.resolve(), by_hand=True)
    copies = own.copies()
    if not copies.numbers and fetch_lists:
        _obtain(job, [item for item in job.state.todo() if item.kind == "plain"])
        copies = own.copies()
    if copies.numbers:
        job.local = own
    return () if copies.numbers else copies.left_out


def _link(job: Job, local: Path) -> None:
    """Link the user's copy, where the set has a layout of files or folders to link."""
    state, source = job.state, job.selection.source
    if source.clips and local.is_dir():
        _obtain_lists(job)
    copies = job.local.copies()
    kept = link(copies, job.folder, state.note_origin(local))
    numbers = {place: number for place, number in copies.numbers.items() if place not in kept}
    state.marker["linked"] |= numbers
    more = f", and so are {len(kept) - 1:,} more" if kept[1:] else ""
    for sentence in (*copies.left_out, *([f"{job.folder / kept[0]}: is there already{more}"] if kept else [])):
        job.say(f"not linked: {sentence}")
    if numbers:
        job.say(f"linked from {local}: " + ", ".join(f"{place} {n:,}" for place, n in numbers.items()))
    elif not any(map(job.local.has, job.selection.items)) and not kept:
        left_out = f" ({copies.left_out[0]})" if copies.left_out else ""
        raise UserError(f"--local {local}: holds neither files nor archives of {source.title} under the names that "
                        f"they have there{left_out}")
    _obtain(job, [item for item in source.items if item.with_links_to and not state.present(item)
                  and any(place.startswith(f"{item.with_links_to}/") for place in numbers)])


def _obtain_lists(job: Job) -> None:
    """The lists that name clips, without which no sound has a caption: the user's, or from the server."""
    wanted = [item for item in job.selection.items if item.kind == "plain"]
    _obtain(job, [item for item in wanted if not job.state.present(item)])
    absent = {version: [item.into for item in wanted if item.subset == version
                        and not (job.folder / item.into).is_file()] for version in (item.subset for item in wanted)}
    if all(absent.values()):
        first = ", ".join(next(iter(absent.values()), []))
        raise UserError(f"--local {job.local.path}: the published lists of captions are neither there nor to be had "
                        f"from a server; put {first} into {job.folder}")


def _adopted(job: Job, item: Item) -> bool:
    if number := job.state.adopt(item):
        job.say(f"{item.name}: {counted(number, 'file')} here, as many as published; taken over, contents not checked")
    return bool(number)


# --- Items -----------------------------------------------------------------------------------------------------------


def _obtain(job: Job, items: Sequence[Item]) -> None:
    """Fetch these items, several files at a time, and unpack each as soon as all of it is there.

    After an error the other files are still fetched, until there are MOST_PROBLEMS errors.

    Raises:
        TransferError: some files could not be fetched or unpacked; holds the messages of all errors.
    """
    for item in items:
        unpack.check_package(item)
        job.state.check_places(item)
    problems: list[str] = []
    calls = {item.name: _calls(job, item) for item in items}
    arrived: dict[str, dict[int, Fetched]] = {item.name: {} for item in items}
    tasks = (((item, number), call) for item in items for number, call in enumerate(calls[item.name])
             if len(problems) < MOST_PROBLEMS)
    with job.policy.progress.overall(job.selection.source.name, fetch_bytes(items)):
        for (item, number), done in in_threads(tasks, job.selection.jobs):
            try:
                arrived[item.name][number] = done.result()
                if len(arrived[item.name]) == len(calls[item.name]):
                    _complete_item(job, item, [fetched for _, fetched in sorted(arrived[item.name].items())])
            except _NotAvailable:
                job.unavailable.append(item.name)
            except (TransferError, ArchiveError) as error:
                job.say(str(error))
                if job.local.path and item.kind == "plain":  # does not spoil the recordings that the user has
                    job.unavailable.append(item.name)
                else:
                    problems.append(str(error))
    if problems:
        tried = "" if len(problems) < MOST_PROBLEMS else "; others were not tried any more"
        raise TransferError("; ".join(problems) + tried)


def _obtain_all(job: Job, items: list[Item]) -> None:
    """All items, or a sample of those that can be taken in part, after the lists that choose it."""
    sampled = [item for item in items if job.selection.options.sample and item.is_sampled]
    _obtain(job, [item for item in items if item not in sampled])
    for item in sampled:
        if job.state.present(item, False):
            continue  # shards: those before it had enough clips
        try:
            if job.local.path or item.kind not in ("zip", "7z"):
                raise NoRange
            unpack.check_package(item)
            _complete_item(job, item, [RemoteFile(_wanted(job, file, Path(file.name)), job.policy)
                                       for file in item.files])
        except NoRange:
            _obtain(job, [item])


def _obtain_one(job: Job, items: list[Item]) -> None:
    """The first of the alternatives that can be had, or the one that the user has."""
    if job.local.path and job.local.path.is_file():
        items = [job.local.alternative()]
    problems = []
    for item in items:
        try:
            return _obtain(job, [item])
        except TransferError as error:
            problems.append(str(error))
    names = " or ".join(item.name for item in items)
    raise TransferError(f"{'; '.join(problems)}; get {names} yourself and name it: --local FILE")


def _complete_item(job: Job, item: Item, fetched: Sequence[Fetched | RemoteFile]) -> None:
    """All files of the item are there, or can be read where they are: unpack it, and write it into the marker."""
    here = [file for file in fetched if isinstance(file, Fetched)]
    record: dict[str, Any] = {"sha256": [file.sha256 for file in here], "checked": [file.checked for file in here],
                              "files": 1, "bytes": sum(file.size for file in here)}
    if item.kind != "plain":
        record = _unpack(job, item, [file.path if isinstance(file, Fetched) else file for file in fetched], record)
    elif note := row_count_note(here[0].path, 0 if here[0].checked else item.files[0].lines):
        job.say(f"note: {item.name} {note}")
    job.state.records[item.name] = record
    job.state.save()
    _remove_archives(job, item, here)
    checked = "digest right" if all(record["checked"]) else "no digest is published"
    checked = "a sample, read in pieces" if len(here) < len(fetched) else checked
    job.say(f"{item.name}: {checked}, {counted(record['files'], 'file')}, {record['bytes'] / 1e6:,.1f} MB")


def _unpack(job: Job, item: Item, parts: Sequence[Path | RemoteFile], record: dict[str, Any]) -> dict[str, Any]:
    """The record with the number of files and bytes that the archive brought."""
    choose, archive, number = None, "".join(record["sha256"])[:16], job.selection.options.sample
    if number and item.is_sampled:
        record["sample"], archive = number, f"{archive}-{number}"
        if item.kind == "parquet":
            number -= inventory.count(job.folder / item.into, "")
        choose = job.selection.source.choose(item, job.folder, number)
    published = sum(count.number for count in item.counts)
    contents = unpack.Contents(
        max_files=2 * published + 10_000 if published else 2_000_000, max_bytes=3 * item.unpacked + 1_000_000_000,
        rules=item.rules, choose=choose, rows=item.rows)
    staging = unpack.staging_folder(job.folder, item, archive)
    record = write_contents(job.folder, item.name, unpack.extract(
        parts, item.kind, staging, contents, job.policy.progress), record)
    kept: list[Path] = []
    try:
        unpack.move_into(staging, job.folder.resolve() / item.into, announce=kept.append)
    finally:
        if kept:
            job.say(f"{item.name}: {counted(len(kept), 'file')} there before, not as its own and so kept, the first as "
                    f"{kept[0]}")
    return record


def _remove_archives(job: Job, item: Item, fetched: Sequence[Fetched] = ()) -> None:
    """Remove the archives of an item that came by this command, or with --keep-archives give them to the user."""
    digests = {file.path: file.sha256 for file in fetched}
    for file in item.files if item.kind != "plain" else ():
        path = path_of(job, item, file)
        if job.selection.options.keep_archives:
            notes.keep_archive(path)
        elif notes.remove_archive(path, digests.get(path, "")) and path in digests:
            job.say(f"{path}: is yours, and is left there")


# --- Files -----------------------------------------------------------------------------------------------------------


def path_of(job: Job, item: Item, file: File) -> Path:
    """Where a file of an item lies when it has arrived."""
    return job.folder / item.into if item.kind == "plain" else job.folder / ARCHIVES / file.name


def _calls(job: Job, item: Item) -> list[Callable[[], Fetched]]:
    """One call for each file of an item, which gets the file and checks it; a single one where the user has the item
    whole."""
    if whole := job.local.whole(item):
        return [partial(_check_local, job, Wanted(path=whole, digests=(f"md5:{item.whole_md5}",)))]
    return [partial(_get, job, item, file) for file in item.files]


def _get(job: Job, item: Item, file: File) -> Fetched:
    """The file from the user's copy, the system's package tool or a server, checked."""
    path, progress = path_of(job, item, file), job.policy.progress
    wanted = _wanted(job, file, path)
    if item.kind == "plain":
        if job.state.is_published(item):
            notes.forget(path)  # of a run that was killed just before it did so
            return http.check_file(wanted, progress)
        came = (job.state.records.get(item.name) or {}).get("sha256") or [""]
        wanted = replace(wanted, replaces=came[0])
    local = job.local.file(item, file)
    if file.name in job.local.differing:
        job.say(f"{job.local.differing[file.name]}: differs from the published list, which is taken instead")
    if local and path.exists() and local.samefile(path):  # the set's own folder was named
        with contextlib.suppress(Mismatch):
            return http.check_file(wanted, progress)
    elif local:
        fetched = _check_local(job, replace(wanted, path=local))
        return _copied(job, fetched, wanted) if item.kind == "plain" else fetched
    if not wanted.urls and job.local.path:
        raise _NotAvailable
    wanted = replace(wanted, keep_note=item.kind != "plain")
    if wanted.urls and wanted.urls[0].startswith("apt:"):
        return fetch_by_apt(wanted.urls[0].removeprefix("apt:"), wanted)
    noted = "" if wanted.digests else notes.whole_sha256(path)
    with contextlib.suppress(FileNotFoundError, Mismatch):
        if noted:  # no digest is published, but it came by this command
            return replace(http.check_file(replace(wanted, digests=(f"sha256:{noted}",)), progress), checked="")
    return http.fetch(wanted, job.policy)


def _wanted(job: Job, file: File, path: Path) -> Wanted:
    keyed = tuple(urlsplit(url).hostname or "" for _, url in file.urls if "{key}" in url)
    return replace(as_published(file, path), urls=job.selection.addresses(file), secrets=job.selection.secrets,
                   unverified_hosts=keyed if job.selection.options.insecure_tls else ())


def _check_local(job: Job, wanted: Wanted) -> Fetched:
    try:
        return http.check_file(wanted, job.policy.progress)
    except Mismatch as error:
        raise UserError(f"{wanted.path}: {error}; it is damaged or another release") from None


def _copied(job: Job, found: Fetched, wanted: Wanted) -> Fetched:
    """The user's list, copied to where it belongs; archives are read where they are."""
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    with found.path.open("rb") as source, replacing(
            wanted.path, rename=lambda copy, _: http.put(copy, wanted, job.policy.progress.say)) as copy:
        shutil.copyfileobj(source, copy)
    return replace(found, path=wanted.path)


# --- Checks beforehand -----------------------------------------------------------------------------------------------


def bytes_needed(job: Job, items: list[Item]) -> int:
    """Disk that getting these items takes at most, beside what has arrived or was unpacked by an earlier run."""
    there = sum(inventory.size_of(path) for item in items for file in item.files for path in arrived(job, item, file))
    return max(0, job.selection.peak_bytes(items) - there - unpack.staged_bytes(job.folder, job.selection.source))


def arrived(job: Job, item: Item, file: File) -> tuple[Path, Path]:
    """Where a file of an item lies, and the part of it that has come."""
    path = path_of(job, item, file)
    return path, notes.part_of(path)
