"""Making an index of a folder: what is new is encoded, what is known stays, what is gone is forgotten.

    summary = build_index(Path("photos"), Path("outputs/index"), model, source="best_model.pt")

A file is known by its content (SHA-256): one that was moved, or is there twice, is not encoded again. Whether the
content is still the same is told by size and time of change, and by reading it where these differ. All that is encoded
goes into a journal at once, and at the end with the earlier index into a new one.

Shape suffixes: N entries, F numbers of a feature.
"""

import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from trimodal import media
from trimodal.errors import UserError, counted
from trimodal.files import locked, remove_left, replacing
from trimodal.search.index import FILE, KINDS, Entry, Index, Kind, ModelName, check_name, write_index
from trimodal.search.journal import NAME, Journal, is_journal, read_journal
from trimodal.search.walk import CHANGED, File, Found, Skipped, digests, find, has_changed

SKIPPED = "skipped.jsonl"
ARGUMENTS: dict[Kind, str] = {"image": "images", "audio": "audio"}  # of encode
OF_SORT: dict[str, tuple[Kind, ...]] = {"pictures": ("image",), "sounds": ("audio",), "videos": KINDS}
SETTLED_NS = 2_000_000_000  # within this a file may change again without a later time of change
GROUP_S, FIRST_GROUP, LARGEST_GROUP = 5.0, 16, 1024  # files encoded between two records of the journal: about so long
Key = tuple[Kind, str]  # kind and digest


class Known(NamedTuple):
    """What is known of a content: its feature, and how long it lasts."""

    features_NF: np.ndarray
    row: int
    duration_s: float


@dataclass
class Summary:
    """What an indexing did."""

    files: Counter[str] = field(default_factory=Counter)  # found, by "pictures", "sounds" and "videos"
    entries: Counter[Kind] = field(default_factory=Counter)
    encoded: Counter[Kind] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    without: Counter[str] = field(default_factory=Counter)  # "videos without sound", ...: nothing is wrong with these
    num_others: int = 0
    num_forgotten: int = 0  # entries of the earlier index whose files are gone
    seconds: float = 0.0


def build_index(folder: Path, place: Path, model: Any, source: str, *, replace: bool = False,
                exclude: Sequence[str] = (), say: Callable[[str], None] = print) -> Summary:
    """Make or renew the index in `place` of what lies in `folder`, encoded by an OpenModel from `source`.

    Args:
        replace: an index of another folder or model may be there, and goes; what it holds of the same model is used.
        exclude: patterns of names and paths to leave out, see `find`.
        say: receives a line where another process has to be waited for.

    Raises:
        UserError: `folder` holds nothing that can be read, or `place` an index of another folder or model or a file of
            the user's by a name that is needed, or it cannot be written, or its name is no UTF-8.
    """
    check_name(place)
    begin_s, folder = time.perf_counter(), folder.resolve()
    found = find(folder, exclude)
    with contextlib.ExitStack() as held:
        with _writing(place):
            place.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(place / "index", lambda: say(f"{place}: another process is indexing into it; "
                                                                   "waiting")))
        _check_own(place)
        remove_left(place, "|".join(map(re.escape, (FILE, SKIPPED))))
        building = _Building(folder, place, model, ModelName.of(model, source), found)
        if not replace:
            building.check_same()
        building.run()
    building.summary.seconds = time.perf_counter() - begin_s
    return building.summary


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot be written ({error.strerror}); free space, or choose another --index; what "
                        "is encoded is kept") from None


def _check_own(place: Path) -> None:
    """Raise UserError where a file that would be written over is none that indexing has written. Of the index itself
    Index.open does so."""
    for name, is_own in ((NAME, is_journal), (SKIPPED, _is_list_of_skipped)):
        path = place / name
        if path.exists() and not (path.is_file() and is_own(path)):
            raise UserError(f"{path}: is no file of an index and would be written over; name another --index, or move "
                            "that file")


def _is_list_of_skipped(path: Path) -> bool:
    try:
        return all(json.loads(line).keys() == set(Skipped._fields) for line in path.read_text("utf-8").splitlines())
    except (ValueError, AttributeError):
        return False


class _Building:
    """One indexing, under its lock."""

    def __init__(self, folder: Path, place: Path, model: Any, about: ModelName, found: Found):
        self.folder, self.place, self.model, self.about, self.found = folder, place, model, about, found
        self.begin_ns = time.time_ns()
        self.summary = Summary(skipped=list(found.skipped), num_others=found.num_others)
        self.earlier = Index.open(place) if (place / FILE).exists() else None

    def check_same(self) -> None:
        """Raise UserError where the index, or the journal of one that was killed, is of another folder or model."""
        earlier = self.earlier
        if earlier is not None and earlier.folder != self.folder:
            raise UserError(f"{self.place}: is an index of {earlier.folder}, not of {self.folder}; name another "
                            "--index, or add --replace, and this folder takes its place")
        digest = earlier.model.digest if earlier is not None else read_journal(self.place / NAME)[0]
        if digest not in (self.about.digest, ""):
            raise UserError(f"{self.place}: was made by a model with other weights ({digest:.12}) than those of "
                            f"{self.about.source} ({self.about.digest:.12}); name another --index, or add --replace, "
                            "and all is encoded anew")

    def run(self) -> None:
        digest_by_path = self._digests()
        wanted = self._wanted(digest_by_path)
        known = self._known()
        missing: dict[Key, list[File]] = {}
        for file, key in wanted:
            if key not in known:
                missing.setdefault(key, []).append(file)
        if missing:
            self._encode(missing)
            known = self._known()
        entries = self._entries(wanted, known)
        if not entries:
            raise UserError(f"{self.folder}: none of its {counted(len(self.found.files), 'file')} can be read"
                            + "".join(f", such as {path} ({reason})" for path, reason in self.summary.skipped[:1]))
        self._write(entries, known)

    # ---- what is there -------------------------------------------------------------------------------------------

    def _digests(self) -> dict[str, str]:
        """The digest of each file by its path, without those that cannot be read."""
        entries = self.earlier.entries if self.earlier is not None and self.earlier.folder == self.folder else ()
        earlier = {File(entry.path, entry.size, entry.changed_ns): entry.digest for entry in entries}
        found = {file.path: earlier[file] for file in self.found.files if file in earlier}
        new = [file for file in self.found.files if file.path not in found]
        bar = tqdm(digests(self.folder, new), "reading", len(new), unit="file", disable=None, delay=1.0)
        for file, digest in zip(new, bar, strict=True):
            if isinstance(digest, Skipped):
                self.summary.skipped.append(digest)
            else:
                found[file.path] = digest
        return found

    def _wanted(self, digest_by_path: Mapping[str, str]) -> list[tuple[File, Key]]:
        """The entries that the index should have: pictures, then sounds."""
        kinds = {file.path: self._kinds(file) for file in self.found.files}
        return [(file, (kind, digest_by_path[file.path])) for kind in KINDS for file in self.found.files
                if kind in kinds[file.path] and file.path in digest_by_path]

    def _kinds(self, file: File) -> tuple[Kind, ...]:
        """What the model reads of a file: of a video both kinds, where it has both tracks."""
        self.summary.files[file.sort] += 1
        kinds = tuple(kind for kind in OF_SORT[file.sort] if kind in self.model.modalities)
        if not kinds:
            self.summary.without[f"{file.sort} that the model does not read"] += 1
        return kinds

    def _known(self) -> dict[Key, Known]:
        """The features of this model in the earlier index and in the journal."""
        known: dict[Key, Known] = {}
        if self.earlier is not None and self.earlier.model.digest == self.about.digest:
            for kind in KINDS:
                features_NF = self.earlier.features(kind).numpy()
                known |= {(kind, entry.digest): Known(features_NF, row, entry.duration_s)
                          for row, entry in enumerate(self.earlier.by_kind[kind])}
        digest, records, _ = read_journal(self.place / NAME)
        for record in records if digest == self.about.digest else ():
            known |= {(entry.kind, entry.digest): Known(record.features_NF, row, entry.duration_s)
                      for row, entry in enumerate(record.entries)}
        return known

    # ---- encoding ------------------------------------------------------------------------------------------------

    def _encode(self, missing: Mapping[Key, list[File]]) -> None:
        """Encode one file of each content into the journal, as many at a time as take some seconds."""
        with _writing(self.place):
            journal = Journal(self.place / NAME, self.about.digest)
        bar = tqdm(total=len(missing), desc="indexing", unit="file", disable=None)
        with contextlib.closing(journal), bar:
            for kind in KINDS:
                contents = [(digest, files) for (own, digest), files in missing.items() if own == kind]
                first, size = 0, FIRST_GROUP
                while group := contents[first:first + size]:
                    begin_s = time.perf_counter()
                    self._encode_group(kind, group, journal)
                    bar.update(len(group))
                    first += size
                    faster = GROUP_S / (time.perf_counter() - begin_s)
                    size = round(min(max(size * min(faster, 4.0), 1), LARGEST_GROUP))

    def _encode_group(self, kind: Kind, group: Sequence[tuple[str, list[File]]], journal: Journal) -> None:
        """Encode the first file of each (digest, files)."""
        group = [(digest, files) for digest, files in group if self._has_track(kind, files)]
        if not group:
            return
        paths = [str(self.folder / files[0].path) for _, files in group]
        reasons: dict[int, str] = {}
        features_NF = self.model.encode(**{ARGUMENTS[kind]: paths}, progress=False,
                                        on_broken=lambda number, reason: reasons.setdefault(number, reason)).numpy()
        entries, rows = list[Entry](), list[int]()
        for row, (digest, files) in enumerate(group):
            reason = reasons.get(row, "").removeprefix(f"{paths[row]}: ")
            if not reason and not np.isfinite(features_NF[row]).all():
                reason = "the model makes numbers of it that are not finite"
            if has_changed(self.folder, files[0]):
                reason = CHANGED
            if reason:
                self.summary.skipped += [Skipped(file.path, reason) for file in files]
                continue
            duration_s = media.duration_s(paths[row]) if kind == "audio" else 0.0
            entries.append(Entry(kind, files[0].path, digest, 0.0, duration_s, files[0].size, 0))
            rows.append(row)
        self.summary.encoded[kind] += len(entries)
        if entries:
            with _writing(self.place):
                journal.add(entries, features_NF[rows])

    def _has_track(self, kind: Kind, files: Sequence[File]) -> bool:
        """Whether a file can have what is asked for; a video that has the other track alone is not broken."""
        if not files[0].is_video or kind in (tracks := media.kinds_in(str(self.folder / files[0].path))) or not tracks:
            return True
        self.summary.without[f"videos without {'a picture' if kind == 'image' else 'sound'}"] += len(files)
        return False

    # ---- writing -------------------------------------------------------------------------------------------------

    def _entries(self, wanted: Sequence[tuple[File, Key]], known: Mapping[Key, Known]) -> list[Entry]:
        """Entries of all that is known, pictures then sounds, by path; with those that may still be there."""
        entries = []
        for file, key in wanted:
            if key in known:
                is_settled = self.begin_ns - file.changed_ns > SETTLED_NS
                entries.append(Entry(*key[:1], file.path, key[1], 0.0, known[key].duration_s, file.size,
                                     file.changed_ns if is_settled else 0))
        if self.earlier is not None and self.earlier.folder == self.folder:
            entries += [entry for entry in self.earlier.entries
                        if self.found.may_hold(entry.path) and (entry.kind, entry.digest) in known]
        return sorted(entries, key=lambda entry: (KINDS.index(entry.kind), entry.path))

    def _write(self, entries: Sequence[Entry], known: Mapping[Key, Known]) -> None:
        """Write the index, if it is another one than before, and the list of what was skipped; end the journal."""
        earlier, summary = self.earlier, self.summary
        summary.skipped = list({one.path: one for one in summary.skipped}.values())  # a video fails twice
        summary.entries.update(entry.kind for entry in entries)
        names = {(entry.kind, entry.path) for entry in entries}
        if earlier is not None:
            summary.num_forgotten = sum((entry.kind, entry.path) not in names for entry in earlier.entries)
        with _writing(self.place):
            new = (self.folder, self.about, entries)
            if earlier is None or (earlier.folder, earlier.model, earlier.entries) != new:
                found = (known[entry.kind, entry.digest] for entry in entries)
                write_index(self.place, self.folder, self.about, entries, (one.features_NF[one.row] for one in found))
            with replacing(self.place / SKIPPED, "w") as file:
                file.writelines(json.dumps(one._asdict()) + "\n" for one in summary.skipped)
            (self.place / NAME).unlink(missing_ok=True)
