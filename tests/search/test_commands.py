"""The commands of search.py: what they print, and what they refuse in one line."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import search
from tests import trees
from tests.project import ROOT
from tests.refusals import assert_told, refused
from tests.search import things
from trimodal.arguments import columns_of
from trimodal.search import commands
from trimodal.search.build import build_index
from trimodal.search.index import FILE, Hit, Index, printable

SMALL_COMMAND = """
import sys
import search
from tests.search import things
from trimodal.arguments import exit_code
with things.small():
    sys.exit(exit_code(search.main))
"""


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with things.small():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of a folder beside it; not to be changed."""
    place = tmp_path_factory.mktemp("search")
    things.folder(place / "media")
    with things.small():
        assert run("index", place / "media", "--checkpoint", things.CHECKPOINT, "--index", place / "index") == 0
    return place


def run(*words: str | Path) -> int:
    return search.main([*map(str, words), "--device", "cpu"])


def columns(printed: str) -> list[str]:
    """The head lines of results."""
    return [line for line in printed.splitlines() if " best of " in line]


def test_index_says_what_it_did_and_what_comes_next(made: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    folder = things.folder(tmp_path / "media")
    (folder / "empty.png").touch()
    assert run("index", folder, "--checkpoint", things.CHECKPOINT, "--index", tmp_path / "new") == 0
    told = capsys.readouterr().out
    rows = {words[0]: words[1:] for line in told.splitlines() if (words := line.split())}
    assert (rows["pictures"], rows["sounds"]) == (["5", "5", "0"], ["3", "3", "0"])
    assert "empty.png" in told and "0 bytes" in told and f"--index {tmp_path / 'new'}" in told
    assert run("index", folder, "--index", tmp_path / "new") == 0, "by the same model"
    told = capsys.readouterr().out
    assert [line.split()[1:] for line in told.splitlines() if line.startswith("pictures")] == [["5", "0", "5"]]
    (folder / "red.png").unlink()
    assert run("index", folder, "--index", tmp_path / "new") == 0
    told = capsys.readouterr().out
    assert "1 video;" in told and "1 entry," in told and not re.search(r"(?<![\d.,/-])1 [a-z]+s\b", told)


def test_query_by_text_picture_and_sound(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for words in (["a red circle"], ["--image", made / "media/red.png"], ["--audio", made / "media/film.mp4"]):
        assert run("query", *words, "--index", made / "index", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert {kind: len(hits) for kind, hits in found.items()} == {"image": 5, "audio": 3}
        for hits in found.values():
            assert [hit["rank"] for hit in hits] == list(range(1, len(hits) + 1))
            assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
            assert all(Path(hit["file"]).is_file() for hit in hits)
    assert found["audio"][0]["path"] == "film.mp4" and found["audio"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert run("query", "--image", made / "media/red.png", "--index", made / "index", "--json", "--top", "1",
               "--kind", "image") == 0
    [(kind, [hit])] = json.loads(capsys.readouterr().out).items()
    assert (kind, hit["path"], hit["score"]) == ("image", "red.png", pytest.approx(1, abs=1e-5))


def test_kinds_stand_side_by_side_or_below_one_another(made: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "200")
    assert run("query", "a tone", "--index", made / "index", "--top", "2") == 0
    beside = capsys.readouterr().out
    [head] = columns(beside)
    assert head.count("best of") == 2 and len(beside.splitlines()) == 5
    monkeypatch.setenv("COLUMNS", "113")
    monkeypatch.setattr(Index, "search", lambda *given, search=Index.search: [
        hit._replace(entry=hit.entry._replace(path="很长的文件夹/" * 9 + hit.entry.path)) for hit in search(*given)])
    assert run("query", "a tone", "--index", made / "index", "--top", "2") == 0
    cut = capsys.readouterr().out.splitlines()[:3]
    assert [columns_of(line.split(" s)")[0]) <= 113 for line in cut] == [True] * 3 and cut[1].count("…") == 2
    monkeypatch.setenv("COLUMNS", "50")
    assert run("query", "a tone", "--index", made / "index", "--top", "2") == 0
    below = capsys.readouterr().out
    assert len(columns(below)) == 2
    for text in (beside, below):
        assert all(word in text for word in ("  1  ", "  2  ", " sd  ", " s)", "cosine"))
    assert columns_of("猫a\u0301") == 3


def test_what_cannot_be_done_is_told_in_one_line(made: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    of_red = trees.picture(tmp_path / "red.png")
    for words, named in (
            (("index", made / "media", "--index", tmp_path / "new"), ("--checkpoint", tmp_path / "new")),
            (("index", tmp_path / "gone", "--checkpoint", things.CHECKPOINT), (tmp_path / "gone",)),
            (("index", made / "media", "--checkpoint", tmp_path / "gone.pt", "--index", tmp_path / "new"),
             (tmp_path / "gone.pt",)),
            (("index", tmp_path, "--index", made / "index"), (tmp_path, made / "media", "--replace")),
            (("query", "a", "--index", tmp_path / "gone"), (tmp_path / "gone", "search.py")),
            (("query", "--image", tmp_path / "gone.png", "--index", made / "index"),
             ("--image", tmp_path / "gone.png")),
            (("query", "--audio", of_red, "--index", made / "index"), ("--audio", of_red)),
            (("query", "a", "--index", made / "index", "--checkpoint", tmp_path / "gone.pt"), (tmp_path / "gone.pt",)),
    ):
        assert run(*words) == 2, words
        told = capsys.readouterr().err
        assert_told(told, *named)
        assert "[0]" not in told, "a name of the API's"
    for mistaken in (["query"], ["query", "a", "--image", "b.png"], ["query", "a", "--top", "0"],
                     ["query", "a", "--kind", "video"], ["index", ""], ["index"], [], ["delete"]):
        with pytest.raises(SystemExit) as ended:
            search.main(mistaken)
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_questions_that_the_model_does_not_read_whole_are_told_by_their_option(
        made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("query", "a red circle " * 200, "--index", made / "index") == 0
    told = capsys.readouterr().err
    assert "TEXT" in told and told.count("\n") == 1 and "[0]" not in told
    monkeypatch.setattr(things.model(), "modalities", ("image",))
    monkeypatch.setattr(commands, "open_model", lambda *given: things.model())
    for words, named in ((["a"], "TEXT"), (["--audio", made / "media/low.wav"], "--audio")):
        assert run("query", *words, "--index", made / "index") == 2
        assert_told(capsys.readouterr().err, named, "image")


@pytest.mark.parametrize("words", [["index", "folder"], ["query", "a"], ["serve"]])
def test_only_an_indexing_that_is_interrupted_says_that_its_work_is_kept(
        words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, words[0], interrupted)
    assert run(*words) == 130
    assert ("kept" in capsys.readouterr().err) == (words[0] == "index")


def test_a_model_that_was_trained_on_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    """best_model.pt is written over by training: the index is then of weights that are gone."""
    capsys.readouterr()
    monkeypatch.setattr(type(things.model()), "digest", "ef" * 32)
    before = (made / "index" / FILE).stat()
    assert run("query", "a", "--index", made / "index") == 2
    known = Index.open(made / "index").model.digest[:12]
    assert_told(capsys.readouterr().err, made / "index", things.CHECKPOINT, "efefefefefef", known, "--replace")
    assert run("index", made / "media", "--index", made / "index") == 2
    assert_told(capsys.readouterr().err, made / "index", "efefefefefef", known, "--replace")
    assert (made / "index" / FILE).stat() == before


def test_names_of_models_mean_the_same_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    assert commands.lasting_name("best.pt") == str(tmp_path / "best.pt")
    assert commands.lasting_name("hub:clip") == f"hub:{tmp_path / 'clip'}"
    assert commands.lasting_name("hub:openai/clip-vit-base-patch32") == "hub:openai/clip-vit-base-patch32"


def test_texts_that_are_none_are_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "  ", os.fsdecode(b"a dog \xff")):
        with pytest.raises(SystemExit) as ended:
            search.main(["query", text])
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert_told(told, "TEXT")
        assert "path" not in told


def test_names_with_line_breaks_take_one_line_and_no_terminal_obeys_them(made: Path) -> None:
    assert printable("a\nb\x1b[2J\u2028.png") == "a\\nb\\x1b[2J\\u2028.png"
    assert printable("猫 狗's.png") == "猫 狗's.png"
    entry = Index.open(made / "index").by_kind["image"][0]
    assert "\n" not in commands._line(1, Hit(entry._replace(path="x\ny.png"), 0.5, 1.0), 0)


def test_what_is_printed_reaches_any_reader(made: Path, tmp_path: Path) -> None:
    things.folder(tmp_path / "声音")
    with things.small():
        assert run("index", tmp_path / "声音", "--checkpoint", things.CHECKPOINT, "--index", tmp_path / "index") == 0
    command = [sys.executable, "-c", SMALL_COMMAND, "query", "--image", str(tmp_path / "声音/red.png"), "--index",
               str(tmp_path / "index"), "--device", "cpu"]
    reading, writing = os.pipe()
    os.close(reading)  # as of a reader that has had enough
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    assert ended.returncode == 2
    assert_told(ended.stderr.decode(), os.strerror(errno.ENOSPC))
    ended = subprocess.run(command, capture_output=True, cwd=ROOT, check=False,
                           env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stderr) == (0, b"") and rb"\u58f0" in ended.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")
def test_what_another_user_may_not_read_or_write_is_told_in_one_line(tmp_path: Path) -> None:
    folder, model = things.folder(tmp_path / "media"), things.model()
    build_index(folder, tmp_path / "index", model, "a model", say=print)
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == 0 and len(above.parts) > 2:
            above.chmod(0o755)
    (tmp_path / "closed" / "inner").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    os.seteuid(65534)
    try:
        with refused(tmp_path / "index"):
            build_index(folder, tmp_path / "index", model, "a model", say=print)
        with refused(tmp_path / "closed/inner", "Permission denied"):
            build_index(tmp_path / "closed/inner", tmp_path / "new", model, "a model", say=print)
        with refused(tmp_path / "closed" / FILE, "Permission denied"):
            Index.open(tmp_path / "closed")
    finally:
        os.seteuid(0)
