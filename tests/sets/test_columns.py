"""Headers as other programs write them mean what they say, one column for each meaning, or are refused."""

import pytest

from tests.refusals import assert_names, refused
from trimodal.sets.columns import COLUMNS, delimiter_of, describe, meaning_of, understand


@pytest.mark.parametrize(("meaning", "names"), [
    ("text", "text caption captions title sentence sentences prompt transcript description Caption CAPTIONS caption_1"),
    ("image", "image image_path img image_file Image"), ("audio", "audio wav audio_path WAV audio-file"),
    ("labels", "labels label class category"), ("file", "path filepath file_name filename File_Name"),
    ("start", "start start_time"), ("duration", "duration"), ("speaker", "speaker"), ("split", "split"), ("id", "id")])
def test_usual_names(meaning: str, names: str) -> None:
    for name in [*names.split(), f" {names.split()[0]} "]:
        assert meaning_of(name) == meaning


def test_other_names_mean_nothing() -> None:
    assert [meaning_of(name) for name in ("xyz", "url", "width", "end", "caption_x", "1", "x" * 500_000, "1" * 500_000,
                                          "label_1")] == [None] * 9
    assert [meaning_of(name) for name in ("", " ", "Unnamed: 0", "Unnamed: 0.1")] == [""] * 4
    assert all(meaning_of(name) == name for name in COLUMNS)


@pytest.mark.parametrize(("name", "value", "column"), [
    ("path", "a.WAV", "audio"), ("path", "a.jpg", "image"), ("path", "a.mp4", "audio"), ("path", "a", "audio"),
    ("file_name", "a.flac", "audio"), ("file_name", "a.jpeg", "image"), ("filepath", "a.mp4", "image"),
    ("filename", "a", "image")])
def test_what_a_file_is_tells_its_ending(name: str, value: str, column: str) -> None:
    columns = understand([name], "here")
    assert columns.given({name: value}) == {column: value}
    assert_names(describe([columns])[0], f"{name!r} as {column}")


def test_what_was_taken_is_told_once_for_all_lines() -> None:
    mixed, plain = understand(["path", "Caption"], "here"), understand(["image", "text"], "here")
    for _ in range(3):
        mixed.given({"path": "a.wav", "Caption": "x"})
    mixed.given({"path": "a.png", "Caption": ""})
    plain.given({"image": "a.png", "text": "x"})
    (line,) = describe([mixed, plain])
    assert_names(line, "'path' as audio (3 lines", "'path' as image (1 line", "'Caption' as text")
    assert describe([plain]) == []


@pytest.mark.parametrize(("header", "usual", "delimiter"), [
    ("image,text", ",", ","), ("image;text", ",", ";"), ("image\ttext", ",", "\t"), ("image|text", ",", "|"),
    ("image,text", "\t", ","), ("text", ",", ","), ("image;xyz", ",", ","), ("a;b", ",", ","), ("", ",", ","),
    (",image,text", ",", ","), (";image;text", ",", ";"), ("image,a;text", ",", ","), ('"image', ",", ",")])
def test_the_delimiter_is_the_usual_one_unless_the_header_says_another(header: str, usual: str, delimiter: str) -> None:
    assert delimiter_of(header, usual) == delimiter


def test_two_columns_of_one_meaning_are_refused() -> None:
    with refused("here", "'caption'", "'title'", "text"):
        understand(["caption", "title"], "here")
    with refused("'image'", "'file_name'", error=ValueError):
        understand(["image", "file_name"], "here").given({"image": "a.png", "file_name": "b.png"})
    given = understand(["image", "path"], "here").given({"image": "a.png", "path": "b.wav"})
    assert given == {"image": "a.png", "audio": "b.wav"}
