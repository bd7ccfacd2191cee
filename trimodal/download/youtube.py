"""Clips from YouTube, by yt-dlp, with a ledger of all that were tried: a rerun tries only what may come.

The ledger, youtube.csv in the set's folder, has a row a try: clip, status, detail, when. The last row of a clip counts.
Videos that were removed or are private are never tried again; those bound to an age or a country only with cookies.
"""

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from trimodal.download.http import Policy, TransferError
from trimodal.download.progress import in_threads
from trimodal.download.selection import Options, Selection
from trimodal.download.unpack import remove_below
from trimodal.errors import UserError
from trimodal.files import back_up, replace_with_backup, replacing
from trimodal.media import WITH_SOUND

LEDGER, STAGING = "youtube.csv", ".clips"
OURS = r"process-\d+"  # folders in that for staging
COLUMNS = ("clip", "status", "detail", "when")
CLIP_S = 10
TIMEOUT_S = 300
MOST_IN_A_ROW = {"bot": 20, "rate": 5}  # after so many of a kind the rest would fare no better
RATE_PAUSE_S = 60.0
GONE, BOUND = ("removed", "private"), ("age", "geo")

# The first that is found in what yt-dlp says decides: "Video unavailable" stands before many a reason.
_REASONS = tuple((status, re.compile(pattern, re.IGNORECASE)) for status, pattern in (
    ("bot", r"not a bot"),
    ("rate", r"\b429\b|too many requests|rate.?limit"),
    ("age", r"confirm your age|age.?restrict|inappropriate for some users"),
    ("geo", r"in your country|geo.?restrict|your location|blocked it on copyright grounds"),
    ("private", r"private video|members.?only|join this channel|is private"),
    ("removed", r"unavailable|removed|terminated|no longer available|does not exist|deleted|copyright claim"),
))


def fetch_clips(selection: Selection, policy: Policy) -> int:
    """Get what is missing in SPLIT/YOUTUBEID_START.flac of the set's folder; returns how many may still come in a later
    run.

    Raises:
        UserError: yt-dlp or ffmpeg is missing, or YouTube takes this address for a bot.
        TransferError: YouTube asks to slow down.
    """
    tool, folder, name = _find_tool(), selection.folder, selection.source.name
    ledger = read_ledger(folder / LEDGER)
    if not _is_ledger(folder / LEDGER):
        kept = back_up(folder / LEDGER)
        policy.progress.say(f"{name}: {folder / LEDGER} held other rows than those of this command; all of it is kept "
                            f"as {kept}")
    with replacing(folder / LEDGER, "w") as file:  # one row a clip again
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((clip, *row) for clip, row in ledger.items())
    remove_below(folder / STAGING, OURS)  # of processes that were killed
    try:
        counts = _fetch_all(tool, selection, list(_todo(selection, ledger)), policy)
    finally:
        remove_below(folder / STAGING, OURS)
    came = ", ".join(f"{status} {n:,}" for status, n in counts.items()) or "nothing left to try"
    policy.progress.say(f"{name}: from YouTube: {came}; all of it in {folder / LEDGER}")
    return sum(n for status, n in counts.items() if status not in ("ok", *GONE, *BOUND))


def any_left(selection: Selection) -> bool:
    """Whether a clip that is asked for is not there and may come, because it was never tried, or may fare better."""
    return next(_todo(selection, read_ledger(selection.folder / LEDGER)), None) is not None


def _todo(selection: Selection, ledger: Mapping[str, tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    """(split, clip) of what is not there and may come, test and val first, as they are small."""
    options, folder, clips = selection.options, selection.folder, selection.source.clips
    assert clips
    closed = GONE if options.cookies else (*GONE, *BOUND)
    for split in ("test", "val", "train"):
        if options.splits and split not in options.splits:
            continue
        there = {path.stem for path in (folder / split).glob("[!.]*") if path.suffix in WITH_SOUND}
        open_clips = [clip for clip in clips(folder, split)
                      if clip not in there and ledger.get(clip, ("",))[0] not in closed]
        most = max(0, options.sample - len(there)) if options.sample else None
        yield from ((split, clip) for clip in open_clips[:most])


def _fetch_all(tool: list[str], selection: Selection, todo: list[tuple[str, str]], policy: Policy) -> Counter[str]:
    """Try all clips of `todo`, each with a row in the ledger; how many came to which status."""
    folder, options = selection.folder, selection.options
    counts: Counter[str] = Counter()
    in_a_row, last = 0, ""
    tasks = ((clip, partial(_fetch, tool, folder, split, clip, options)) for split, clip in todo)
    with ((folder / LEDGER).open("a", encoding="utf-8", newline="") as file,
          policy.progress.bar("clips from YouTube", len(todo), unit=" clips") as bar):
        writer = csv.writer(file, lineterminator="\n")
        for clip, done in in_threads(tasks, options.jobs or 1):
            status, detail = done.result()
            writer.writerow((clip, status, detail, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())))
            file.flush()
            counts[status] += 1
            in_a_row, last = in_a_row + 1 if status == last else 1, status
            bar.add(1)
            _give_up(status, in_a_row, policy)
    return counts


def _give_up(status: str, in_a_row: int, policy: Policy) -> None:
    if status == "rate":
        policy.pause(RATE_PAUSE_S * in_a_row)
    if in_a_row < MOST_IN_A_ROW.get(status, sys.maxsize):
        return
    if status == "bot":
        raise UserError(f"YouTube takes this address for a bot, {in_a_row} times in a row; give the cookies of a "
                        "browser that is signed in (--cookies FILE), or try from another network; what has come is "
                        "kept")
    raise TransferError(f"YouTube asks to slow down, {in_a_row} times in a row; what has come is kept, go on in some "
                        "hours")


def _fetch(tool: list[str], folder: Path, split: str, clip: str, options: Options) -> tuple[str, str]:
    """(status, detail) of one clip, which is in its place where the status is ok."""
    video, _, start = clip.rpartition("_")
    staging = folder / STAGING / f"process-{os.getpid()}"  # a tool that outlives a killed process is not in the way
    staging.mkdir(parents=True, exist_ok=True)
    cookies = ["--cookies", str(options.cookies)] if options.cookies else []
    template = str(staging / clip).replace("%", "%%") + ".%(ext)s"
    command = [*tool, "--ignore-config", "--no-playlist", "--no-warnings", "--quiet", *cookies,
               "--format", "bestaudio/best", "--extract-audio", "--audio-format", "flac",
               "--download-sections", f"*{start}-{int(start) + CLIP_S}", "--force-keyframes-at-cuts",
               "--output", template, "--", f"https://www.youtube.com/watch?v={video}"]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                                timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "failed", f"no end within {TIMEOUT_S} s"
    said = " ".join((result.stderr or result.stdout).split())
    path = staging / f"{clip}.flac"
    if result.returncode or not path.is_file():
        return status_of(said), said[-300:]
    if not _has_sound(path):
        return "failed", "holds no sound"
    (folder / split).mkdir(exist_ok=True)
    replace_with_backup(path, folder / split / path.name)
    return "ok", ""


def _has_sound(path: Path) -> bool:
    import soundfile

    try:
        return soundfile.info(path).frames > 0
    except soundfile.LibsndfileError:
        return False


def _find_tool() -> list[str]:
    """The command of yt-dlp: the program, else the package."""
    if shutil.which("yt-dlp"):
        tool = ["yt-dlp"]
    elif importlib.util.find_spec("yt_dlp"):
        tool = [sys.executable, "-m", "yt_dlp"]
    else:
        raise UserError("--sounds youtube: needs the optional program yt-dlp; run: pip install yt-dlp")
    if not shutil.which("ffmpeg"):
        raise UserError("--sounds youtube: yt-dlp cuts clips with ffmpeg, which is not on PATH; install it")
    return tool


def read_ledger(path: Path) -> dict[str, tuple[str, str, str]]:
    """Clip -> (status, detail, when); {} where there is none. A row that an interruption cut is left out."""
    rows = (row for row in _rows(path) if len(row) == len(COLUMNS) and row != list(COLUMNS))
    return {clip: (status, detail, when) for clip, status, detail, when in rows}


def _is_ledger(path: Path) -> bool:
    """Whether writing what `read_ledger` gives loses nothing: no file, or its head and then rows, the last one maybe
    cut."""
    rows = _rows(path)
    return (not path.is_symlink() and rows[:1] in ([], [list(COLUMNS)])
            and all(len(row) == len(COLUMNS) for row in rows[1:-1]))


def _rows(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return [*csv.reader(file)]
    except FileNotFoundError:
        return []


def status_of(said: str) -> str:
    """One of bot, rate, age, geo, private, removed, and failed, which may be anything else."""
    return next((status for status, pattern in _REASONS if pattern.search(said)), "failed")
