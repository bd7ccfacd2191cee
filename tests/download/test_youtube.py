"""AudioCaps from YouTube: each clip has its reason in a ledger, a rerun tries only what may come. yt-dlp and ffmpeg
are stand-ins that the tests write: what they say about each video is what the real ones say."""

import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import download_datasets
from tests import miniature, trees
from tests.loopback import Loopback
from tests.refusals import assert_told
from trimodal import sets as all_sets
from trimodal.config import config_from_dict
from trimodal.download import youtube as youtube_module
from trimodal.download.http import Policy
from trimodal.sets import SOURCES, inventory
from trimodal.sets.base import Source

QUICK = Policy(failures=1, failures_to_connect=0, sleep=lambda seconds: None)
SAID = {
    "private": "ERROR: [youtube] x: Private video. Sign in if you've been granted access to this video",
    "members": "ERROR: [youtube] x: Join this channel to get access to members-only content like this video",
    "removed": "ERROR: [youtube] x: Video unavailable. This video has been removed by the uploader",
    "terminated": "ERROR: [youtube] x: Video unavailable. The YouTube account associated with this video has been "
                  "terminated.",
    "geo": "ERROR: [youtube] x: Video unavailable. The uploader has not made this video available in your country",
    "age": "ERROR: [youtube] x: Sign in to confirm your age. This video may be inappropriate for some users.",
    "bot": "ERROR: [youtube] x: Sign in to confirm you’re not a bot. Use --cookies-from-browser or --cookies",
    "rate": "ERROR: unable to download video data: HTTP Error 429: Too Many Requests",
    "session": "ERROR: [youtube] x: Video unavailable. This content isn't available, try again later. Your account has "
               "been rate-limited by YouTube for up to an hour",
    "network": "ERROR: unable to download webpage: timed out",
}

# plan/VIDEO says what happens: "ok", which it is without a plan, "silent", or one of SAID. Calls are lines of the log.
TOOL = r"""#!/bin/sh
here=${0%/*} cookies=false
for word; do
    case $before in --output) template=$word ;; --download-sections) span=$word ;; esac
    case $word in --cookies) cookies=true ;; --ignore-config) ignores=yes ;; esac
    last=$before before=$word
done
[ "$last" = -- ] && [ "$ignores" = yes ] && [ "${template%'.%(ext)s'}" != "$template" ] || exit 9
video=${word#'https://www.youtube.com/watch?v='}
path=$(printf '%s' "${template%'.%(ext)s'}" | sed 's/%%/%/g').flac
printf '["%s", "%s", %s, "%s"]\n' "$video" "$span" $cookies "${path%/*}" >> "$here/log"
what=$(cat "$here/plan/$video" 2>/dev/null || echo ok)
case $what in ok|silent) cp "$here/$what.flac" "$path" ;; *) cat "$here/said/$what" >&2; exit 1 ;; esac
"""
VIDEOS = {split: [video for video, _, _ in found] for split, found in trees.AUDIOCAPS.items()}


class YouTube:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in (("yt-dlp", TOOL), ("ffmpeg", "#!/bin/sh\n")):
            (folder / name).write_text(text, "utf-8")
            (folder / name).chmod(0o755)
        (folder / "said").mkdir()
        for what, text in SAID.items():
            (folder / "said" / what).write_text(text, "utf-8")
        trees.sound(folder / "ok.flac", trees.tone(0.5))
        trees.sound(folder / "silent.flac", trees.tone(0))
        self.plan({})

    def plan(self, plan: dict[str, str]) -> None:
        shutil.rmtree(self.folder / "plan", ignore_errors=True)
        (self.folder / "plan").mkdir()
        for video, what in plan.items():
            (self.folder / "plan" / video).write_text(what, "utf-8")
        (self.folder / "log").write_text("", "utf-8")

    def calls(self) -> list[list[Any]]:
        """[video, span, whether there were cookies, folder to write to] of each."""
        return [json.loads(line) for line in (self.folder / "log").read_text("utf-8").splitlines()]

    def asked(self) -> list[list[Any]]:
        return [call[:3] for call in self.calls()]


@pytest.fixture
def youtube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> YouTube:
    found = YouTube(tmp_path / "bin % x")
    monkeypatch.setenv("PATH", f"{found.folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return found


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def run(folder: Path, server: Loopback, *words: str, policy: Policy = QUICK) -> int:
    source, served = miniature.audiocaps(folder / "true")
    server.files |= {f"/audiocaps/{name}": data for name, data in served.items()}
    return get(source, folder, server, *words, policy=policy)


def get(source: Source, folder: Path, server: Loopback, *words: str, policy: Policy = QUICK) -> int:
    return download_datasets.main(
        ["--datasets", "audiocaps", "--data-root", str(folder / "data"), "--base-url",
         f"audiocaps={server.url('/audiocaps')}", "--sounds", "youtube", *words],
        table={**SOURCES, "audiocaps": source}, policy=policy)


def ledger(folder: Path) -> dict[str, str]:
    found = youtube_module.read_ledger(folder / "data/audiocaps/youtube.csv")
    return {clip.rpartition("_")[0]: status for clip, (status, _, _) in found.items()}


def there(folder: Path) -> dict[str, int]:
    """Clips on the disk."""
    return {split: len(list((folder / "data/audiocaps" / split).glob("*"))) for split in VIDEOS}


def test_every_clip_has_its_status_and_a_rerun_tries_only_what_may_come(
        youtube: YouTube, server: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = dict(zip(VIDEOS["train"], ("private", "removed", "geo", "age", "rate", "silent", "ok", "network"),
                    strict=True))
    youtube.plan(plan)
    assert run(tmp_path, server) == 3
    status = {"silent": "failed", "network": "failed"}
    assert {video: ledger(tmp_path)[video] for video in plan} == {v: status.get(w, w) for v, w in plan.items()}
    assert {ledger(tmp_path)[video] for video in VIDEOS["val"] + VIDEOS["test"]} == {"ok"}
    assert len(youtube.asked()) == 13 and ["-0a1B2c3D4e", "*30-40", False] in youtube.asked()
    output = capsys.readouterr()
    assert there(tmp_path) == {"train": 1, "val": 2, "test": 3} and "--sounds youtube" in output.out, "the next command"
    assert "private 1" in output.err and "youtube.csv" in output.err

    youtube.plan({})
    assert run(tmp_path, server, "--skip-existing") == 3
    assert {video for video, _, _ in youtube.asked()} == {
        v for v, w in plan.items() if w in ("rate", "silent", "network")}
    assert there(tmp_path)["train"] == 4
    youtube.plan({})
    (tmp_path / "cookies.txt").touch()
    assert run(tmp_path, server, "--cookies", str(tmp_path / "cookies.txt")) == 3
    assert {(video, cookies) for video, _, cookies in youtube.asked()} == {
        (v, True) for v, w in plan.items() if w in ("geo", "age")}
    youtube.plan({})
    assert run(tmp_path, server) == 3 and youtube.asked() == [], "the rest is gone for ever"
    with (tmp_path / "data/audiocaps/youtube.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(youtube_module.COLUMNS) and len(rows) == 14, "one row a clip"


def test_clips_that_the_mirror_brought_are_not_asked_for(youtube: YouTube, server: Loopback, tmp_path: Path) -> None:
    place = tmp_path / "data/audiocaps/val" / f"{VIDEOS['val'][0]}_40.flac"
    trees.sound(place, trees.tone(0.1))
    assert run(tmp_path, server, "--splits", "val") == 0
    assert [video for video, _, _ in youtube.asked()] == VIDEOS["val"][1:]


def test_each_process_has_a_place_of_its_own_for_what_is_not_whole(youtube: YouTube, server: Loopback,
                                                                   tmp_path: Path) -> None:
    """A tool that outlives a killed process writes where nobody looks."""
    assert run(tmp_path, server, "--splits", "val") == 0
    assert {place for *_, place in youtube.calls()} == {str(tmp_path / f"data/audiocaps/.clips/process-{os.getpid()}")}


def test_a_bot_check_ends_the_run_early_and_says_what_to_do(
        youtube: YouTube, server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(youtube_module.MOST_IN_A_ROW, "bot", 4)
    youtube.plan(dict.fromkeys(VIDEOS["train"], "bot"))
    assert run(tmp_path, server) == 2
    assert "--cookies" in capsys.readouterr().err
    assert len([video for video, _, _ in youtube.asked() if video in VIDEOS["train"]]) <= 5
    assert sum(status == "ok" for status in ledger(tmp_path).values()) == 5, "what came before is kept"


def test_a_request_to_slow_down_is_heeded_and_then_ends_the_run(youtube: YouTube, server: Loopback,
                                                                tmp_path: Path) -> None:
    slept: list[float] = []
    youtube.plan(dict.fromkeys(VIDEOS["train"], "rate"))
    assert run(tmp_path, server, policy=Policy(failures=0, sleep=slept.append)) == 1
    assert slept == [60, 120, 180, 240, 300]


def test_a_sample_is_as_many_clips_of_each_split(youtube: YouTube, server: Loopback, tmp_path: Path) -> None:
    youtube.plan({VIDEOS["train"][0]: "removed"})
    assert run(tmp_path, server, "--sample", "2") == 0
    assert there(tmp_path) == {"train": 1, "val": 2, "test": 2}
    assert run(tmp_path, server, "--sample", "2") == 0
    assert there(tmp_path)["train"] == 2


@pytest.mark.parametrize("before", [["--splits", "val"], ["--sample", "1"], ["--sounds", "mirror"]], ids=" ".join)
def test_what_was_never_tried_is_not_skipped(youtube: YouTube, server: Loopback, tmp_path: Path,
                                             before: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever an earlier run was limited to, or where its sounds came from."""
    everything = {video for videos in VIDEOS.values() for video in videos}
    run(tmp_path, server, *before)
    first = {video for video, _, _ in youtube.asked()}
    youtube.plan({VIDEOS["train"][3]: "removed"})
    assert run(tmp_path, server, "--skip-existing") == 3
    assert {video for video, _, _ in youtube.asked()} == everything - first != set()
    youtube.plan({})
    capsys.readouterr()
    assert run(tmp_path, server, "--skip-existing") == 3
    assert youtube.asked() == [] and "skipped" in capsys.readouterr().out, "the one that is gone keeps nobody"


def test_a_split_alone_is_a_part_on_purpose(youtube: YouTube, server: Loopback, tmp_path: Path) -> None:
    """Training takes it as it is: the reader of another split finds none of its clips, and says so without an error."""
    run(tmp_path, server, "--splits", "train")
    config = config_from_dict({"paths": {"data_root": str(tmp_path / "data")}})
    assert {split: len(list(all_sets.read_split("audiocaps", split, config))) for split in VIDEOS} == {
        "train": 8, "val": 0, "test": 0}
    run(tmp_path, server)
    assert not inventory.read_marker(tmp_path / "data/audiocaps")["limited"]


def test_clips_of_the_second_version_are_tried_as_well(youtube: YouTube, server: Loopback, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    source, served = miniature.with_another_clip(tmp_path / "true", "newclip0001", 30)
    server.files |= {f"/audiocaps/{name}": data for name, data in served.items()}
    youtube.plan({"newclip0001": "removed"})
    assert get(source, tmp_path, server, "--splits", "train") == 3
    assert ["newclip0001", "*30-40", False] in youtube.asked() and len(youtube.asked()) == 9
    assert ledger(tmp_path)["newclip0001"] == "removed"
    assert there(tmp_path)["train"] == 8
    assert re.search(r"dataset2\.0/train\.csv\D+0\D+1$", capsys.readouterr().out, re.MULTILINE)
    youtube.plan({})
    assert get(source, tmp_path, server, "--splits", "train") == 3 and youtube.asked() == []
    (tmp_path / "data/audiocaps/youtube.csv").unlink()
    assert get(source, tmp_path, server, "--splits", "train") == 0
    assert (tmp_path / "data/audiocaps/train/newclip0001_30.flac").exists()


def test_what_the_user_has_under_our_names_stays(youtube: YouTube, server: Loopback, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data/audiocaps"
    own = {"youtube.csv": b"url;note\nhttps://x;mine\nhttps://y;mine\n", ".clips/mine/a.txt": b"a", ".clips/17/a": b"a"}
    for name, data in own.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert run(tmp_path, server, "--splits", "val") == 0
    (aside,) = folder.glob("youtube.csv.before_*")
    assert aside.read_bytes() == own.pop("youtube.csv") and str(aside) in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in own} == own
    tried = ledger(tmp_path)
    assert run(tmp_path, server, "--splits", "val") == 0 and ledger(tmp_path) == tried
    assert len([*folder.glob("youtube.csv*")]) == 2, "ours is written again"


@pytest.mark.parametrize(("said", "status"), [
    ("private", "private"), ("members", "private"), ("removed", "removed"), ("terminated", "removed"), ("geo", "geo"),
    ("age", "age"), ("bot", "bot"), ("rate", "rate"), ("session", "rate"), ("network", "failed")])
def test_reasons_are_told_apart(said: str, status: str) -> None:
    assert youtube_module.status_of(SAID[said]) == status


def test_a_row_that_was_cut_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("clip,status,detail,when\na_1,ok,,t\nb_2,removed,\"x, y\",t\nc_3,remo", "utf-8")
    assert youtube_module.read_ledger(tmp_path / "l") == {"a_1": ("ok", "", "t"), "b_2": ("removed", "x, y", "t")}
    assert youtube_module.read_ledger(tmp_path / "absent") == {}


def test_what_is_missing_is_named(tmp_path: Path, server: Loopback, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "yt_dlp", None)
    assert run(tmp_path, server) == 2
    assert_told(capsys.readouterr().err, "audiocaps", "--sounds", "pip install yt-dlp")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/yt-dlp").write_text("#!/bin/sh\n")
    (tmp_path / "bin/yt-dlp").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert run(tmp_path, server) == 2
    assert_told(capsys.readouterr().err, "audiocaps", "--sounds", "ffmpeg", "PATH")
