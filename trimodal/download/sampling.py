"""Which files of an archive make a small, useful start: some of each split, and several of each speaker."""

import hashlib
import heapq
import itertools
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from trimodal.sets import annotations
from trimodal.sets.sources import Item

MEDIA = (".jpg", ".wav", ".m4a", ".mp4")
BY_SPEAKER = 10  # recordings of a speaker at most, so that there are several

Choose = Callable[[Iterable[str]], Collection[str]]  # names in the archive -> those to take


def is_sampled(item: Item) -> bool:
    """Lists and annotations are taken whole."""
    return item.kind == "parquet" or any(count.suffix in MEDIA for count in item.counts)


def chooser(name: str, item: Item, folder: Path, number: int) -> Choose:
    """The rule for an archive of the set `name` whose lists lie in `folder`; the same files on every machine."""
    if item.kind in ("7z", "parquet"):  # solid, or in the order of the list: the first ones are the cheapest
        return lambda names: set(itertools.islice(names, number))
    if name == "coco":
        wanted = _of_karpathy(folder / "annotations" / "dataset_coco.json", number)
        if wanted:
            return lambda names: {place for place in names if place.rpartition("/")[2] in wanted}
    if name == "voxceleb":
        return lambda names: _of_speakers(names, number)
    return lambda names: set(heapq.nsmallest(number, names, key=_rank))


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _of_karpathy(path: Path, number: int) -> set[str]:
    """File names of `number` pictures of each of train (with restval), val and test."""
    if not path.is_file():
        return set()
    sides: dict[str, list[int]] = {}
    for image, split in annotations.karpathy(path):
        sides.setdefault("train" if split == "restval" else split, []).append(image)
    return {f"{image:012d}.jpg" for images in sides.values()
            for image in heapq.nsmallest(number, images, key=lambda image: _rank(str(image)))}


def _of_speakers(names: Iterable[str], number: int) -> set[str]:
    """`number` recordings of as few speakers as BY_SPEAKER allows."""
    speakers: dict[str, list[str]] = {}
    for place in names:
        own = speakers.setdefault(place.rsplit("/", 2)[0], [])
        heapq.heappush(own, place)
        if len(own) > BY_SPEAKER:
            own.remove(max(own))
            heapq.heapify(own)
    ordered = sorted(speakers, key=_rank)
    return set(itertools.islice((place for speaker in ordered for place in sorted(speakers[speaker])), number))
