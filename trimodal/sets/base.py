"""What a data set is made of: where its files come from, how they lie on the disk, and how they are read.

A module of this folder that has a `SET` is a data set; the registry finds it, and nothing else knows it by name. Sizes
are bytes, 0 where none is published; digests are lower-case hex. An address is a pair (mirror, URL); URLs of the mirror
"hf" follow HF_ENDPOINT, "{key}" stands for the user's key, and "apt:PACKAGE=VERSION" is fetched by the system's package
tool.
"""

import hashlib
import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimodal.config import Config, DataConfig
from trimodal.data.samples import Sample

MIRRORS = ("auto", "official", "hf", "hf-mirror", "modelscope")
HF_HOST = "https://huggingface.co"
GB = 1_000_000_000
MEDIA = (".jpg", ".wav", ".m4a", ".mp4")  # suffixes of files of which a few make a small start

Choose = Callable[[Iterable[str]], Collection[str]]  # names in an archive -> those to take


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file on one or more servers. `md5` stands in where no `sha256` is published."""

    name: str
    urls: tuple[tuple[str, str], ...]
    size: int = 0
    sha256: str = ""
    md5: str = ""
    also_good: tuple[str, ...] = ()  # "md5:..." or "sha256:..." of other editions of the same list
    lines: int = 0  # rows of a list, less the header of a csv file; looked at where no digest is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """After unpacking, `folder` (and what is below it) holds `number` files that end in `suffix` (0: not published)."""

    folder: str
    suffix: str
    number: int = 0
    instead: tuple[tuple[str, str], ...] = ()  # (folder, suffix) of the files in another form, as other tools make them
    holds: Callable[[str], bool] | None = None  # path below `folder` -> whether it is counted; None: all are

    @property
    def places(self) -> tuple[tuple[str, str], ...]:
        """(folder, suffix) of each form."""
        return ((self.folder, self.suffix), *self.instead)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How the rows of a parquet table hold files: the columns to read, and what gives the (name, bytes) of a row's."""

    columns: tuple[str, ...]
    file_of: Callable[[dict[str, Any]], tuple[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to have: a plain file, or an archive (in one or more parts) and what becomes of it."""

    name: str
    kind: str  # plain, zip, tar, deb, 7z or parquet
    into: str  # path of a plain file, or the folder that an archive is unpacked into, below the set's folder
    files: tuple[File, ...]
    subset: str = ""
    splits: tuple[str, ...] = ()  # whose samples it holds; () for what all need
    rules: tuple[tuple[str, str], ...] = ()  # what is taken: (leading folders or file name, where it goes below `into`)
    # with * for any one folder; no rules: everything, as it stands
    rows: Rows | None = None  # of a parquet table
    counts: tuple[Count, ...] = ()
    unpacked: int = 0  # bytes, estimated where no figure is known
    needed: tuple[str, ...] = ()  # files below the set's folder that are enough, where somebody else unpacked it
    whole_md5: str = ""  # of the parts put together, as some people keep them
    with_links_to: str = ""  # a list that is fetched as well where a folder below this one is linked

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def is_sampled(self) -> bool:
        """Whether `--sample` takes a part of it; lists and annotations are taken whole."""
        return self.kind == "parquet" or any(count.suffix in MEDIA for count in self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileList:
    """A list of a set: `names(path)` gives the files, below the folder `place`, that the list at `path` names."""

    place: str
    path: str  # below the set's folder
    names: Callable[[Path], Iterable[str]]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What a copy that the user has holds of a set, under the names that other tools give it."""

    links: tuple[tuple[Path, str], ...] = ()  # (file or folder of the user, its place below the set's folder)
    numbers: Mapping[str, int] = field(default_factory=dict)  # how many files, clips or speakers by place
    left_out: tuple[str, ...] = ()  # what is not linked, and why, a sentence each


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a set comes from and what makes it complete.

    `defaults` are the subsets fetched unless `--also` adds others. Functions take the set's folder; `lists` takes the
    splits asked for.
    """

    name: str
    title: str
    page: str
    licence: str
    items: tuple[Item, ...]
    defaults: tuple[str, ...]
    in_all: bool = True  # whether `--datasets all` means it, too
    one_of: bool = False  # the items are alternatives: the first that can be had is enough
    partly: tuple[Count, ...] = ()  # what would be complete; a set that falls short of these is of use all the same
    needs_key: str = ""  # environment variable that holds the user's key
    key_help: str = ""
    auto_mirrors: tuple[str, ...] = ("official", "hf", "modelscope")  # third-party copies can be left out here
    at_once: int = 4  # transfers at a time that the servers bear
    note: str = ""
    recipe: str = ""  # with which it is trained alone, where the default stages cannot
    required: tuple[str, ...] = ()  # lists that training opens, whatever the split
    lists: Callable[[Collection[str]], Sequence[FileList]] | None = None
    training_files: Callable[[Path], Iterable[str]] | None = None  # what is there to train on, by name, cheaply
    sample: Callable[[Path, int], Choose | None] | None = None  # a small start; None: files at random
    find_copies: Callable[[Path, Sequence[tuple[str, Path]]], Copies] | None = None  # (local, lists by split); None:
    # folders and lists are found by the names in `items`
    clips: Callable[[Path, str], Iterator[str]] | None = None  # (folder, split): YOUTUBEID_START of what YouTube has
    finish: Callable[[Path], None] | None = None  # makes `made` from what came; may be stopped and called again
    made: tuple[Count, ...] = ()

    @property
    def subsets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item.subset for item in self.items))

    def select(self, also: Iterable[str] = ()) -> tuple[Item, ...]:
        """The items of the default subsets and of those named in `also`, in the order of the table."""
        wanted = {*self.defaults, *also}
        return tuple(item for item in self.items if item.subset in wanted)

    def choose(self, item: Item, folder: Path, number: int) -> Choose:
        """Which `number` files of an archive make a small start; the same ones on every machine."""
        if item.kind in ("7z", "parquet"):  # solid, or in the order of the list: the first ones are the cheapest
            return lambda names: set(itertools.islice(names, number))
        own = self.sample(folder, number) if self.sample else None
        return own or (lambda names: set(heapq.nsmallest(number, names, key=rank)))


def rank(text: str) -> bytes:
    """Orders names at random, the same way on every machine."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """Published pairs of utterances for verification."""

    lists: tuple[str, ...]  # below the set's folder; the first that names an utterance is taken
    key: Callable[[str], str]  # name of a file in a list -> key of its sample


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A set as training and evaluation see it.

    `read(root, splits, config)` yields the samples of the splits, one split after the other, from the set's folder
    `root`. It decodes nothing; no recording or picture is on two sides.
    """

    name: str
    order: int  # where it stands in lists for people
    splits: str  # what train, val and test are, in a line
    licence: str
    read: Callable[[Path, Sequence[str], Config], Iterable[Sample]]
    source: Source | None = None  # None: nothing to download
    note: str = ""  # why there is nothing to download
    english: bool = True  # whether its captions are; of those that may be in any language, false
    also_in: tuple[str, ...] = ()  # further languages in which it has captions
    problems: Callable[[DataConfig], list[str]] | None = None  # what is wrong with its settings
    listed: Callable[[Path, str, Config], int] | None = None  # samples of a split when whole; of sets that never are
    state: Callable[[Config], str] | None = None  # digest of all that `read` depends on but the files of its samples,
    # so that what it reads may be kept; raises OSError. None: it is read at each start
    reads_at_once: bool = False  # its samples are known from the settings or one list, without a download
    speakers: int = 0  # at most, in training
    without_label: Mapping[str, str] = field(default_factory=dict)  # further rows of figures: name -> label left out
    folds: tuple[int, int] | None = None  # (number, size): a split of so many samples is also reported in such parts
    trials: Trials | None = None
