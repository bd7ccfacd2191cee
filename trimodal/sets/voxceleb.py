"""The folders of VoxCeleb: SPEAKER/VIDEO/UTTERANCE, of VoxCeleb 2 as m4a, wav and video, one form or several."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from trimodal.sets import inventory

FOLDERS = {"mp4": (".mp4",), "aac": (".m4a", ".wav"), "wav": (".wav", ".m4a")}  # of VoxCeleb 2, and what each may hold


def recordings(part: Path) -> Iterator[tuple[str, str, str, str]]:
    """(speaker, "speaker/video/utterance", path of the video or "", path of the sound) of each utterance below one or
    more of `part`/{mp4,aac,wav}, once. The sound is wav where there is one, else m4a, else that of the video."""
    folders = [(os.path.join(part, kind, ""), suffixes) for kind, suffixes in FOLDERS.items() if (part / kind).is_dir()]
    for place, (folder, suffixes) in enumerate(folders):
        for speaker, name in utterances(Path(folder), suffixes):
            stem, suffix = os.path.splitext(name)
            if not _first(folders[:place], stem):
                video = folder + name if suffix == ".mp4" else ""
                yield speaker, stem, video, _first(folders[:place:-1], stem) or folder + name


def utterances(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(speaker, "speaker/video/utterance.suffix") in order, one speaker's folder in memory at a time. Of files that
    differ in their suffix alone the one whose suffix stands first in `suffixes` is taken."""
    for speaker in _names(folder):
        for video in _names(folder / speaker):
            there = set(_names(folder / speaker / video))
            for name in sorted(there):
                stem, suffix = os.path.splitext(name)
                if suffix in suffixes and not any(stem + other in there for other in suffixes[:suffixes.index(suffix)]):
                    yield speaker, f"{speaker}/{video}/{name}"


def _first(folders: Iterable[tuple[str, tuple[str, ...]]], stem: str) -> str:
    paths = (folder + stem + suffix for folder, suffixes in folders for suffix in suffixes)
    return next(filter(os.path.exists, paths), "")


def _names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not inventory.is_hidden(name)) if folder.is_dir() else []
