"""A manifest is read as its author meant it, or refused with the file, the line, and what would be right."""

import csv
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests import trees
from tests.refusals import assert_names, refused
from trimodal.config import load_config
from trimodal.data.samples import SPLITS, Sample, SampleTable
from trimodal.sets import manifest, read_splits
from trimodal.sets.manifest import read_manifest, worded_captions


def media(folder: Path) -> Path:
    """The folder, with a few pictures and sounds."""
    for name in ("a.png", " b.png", "c d.png"):
        trees.picture(folder / "pictures" / name)
    for name in ("a.wav", "b.wav"):
        trees.sound(folder / "sounds" / name, trees.tone(0.1))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return media(tmp_path)


def jsonl(folder: Path, *lines: Any) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) + "\n"
                            for line in lines), encoding="utf-8")
    return path


def table(folder: Path, text: str, name: str = "mine.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text(text, encoding=encoding, newline="")
    return path


def everything(path: Path) -> list[Sample]:
    return sorted(read_manifest(path), key=lambda sample: SPLITS.index(sample.split))


def assert_refused(path: Path, line: int, *named: str | int) -> str:
    """The list is refused at that line (0: as a whole), with what else is named; the message."""
    with refused(path, *([f"line {line}"] if line else []), *named) as caught:
        everything(path)
    return str(caught.value)


FULL = {"id": "one", "image": "pictures/a.png", "audio": "sounds/a.wav", "start": 0.5, "duration": 2,
        "text": ["A dog.", "一只狗"], "labels": ["dog", "pet"], "speaker": 7, "split": "val"}


# ---- what is read ------------------------------------------------------------------------------------------------


def test_every_key(folder: Path) -> None:
    assert everything(jsonl(folder, FULL)) == [Sample(
        key="one", source="manifest", split="val", image=str(folder / "pictures/a.png"),
        audio=str(folder / "sounds/a.wav"), start_s=0.5, duration_s=2.0, captions=("A dog.", "一只狗"),
        labels=("dog", "pet"), speaker="7")]


@pytest.mark.parametrize(("name", "encoding"), [("m.csv", "utf-8"), ("m.csv", "utf-8-sig"), ("m.TSV", "utf-8")])
def test_csv_says_the_same_as_jsonl(folder: Path, name: str, encoding: str) -> None:
    """A byte-order mark, padded names of columns, \\r\\n, quoted cells with delimiters and line breaks in them."""
    tab = "\t" if name.endswith("TSV") else ","
    cells = ["one", "pictures/a.png", "sounds/a.wav", " 0.5", "2 ", '"[""A dog."", ""一只狗""]"', "dog; pet;", "7",
             "val"]
    header = ["id ", " image", "audio", "start", "duration", "text", "labels", "speaker", "split"]
    second = ["two", "pictures/c d.png", "", "", "", f'"A cup{tab} two lines,\nof it"', "", "", "test"]
    text = "\r\n".join(tab.join(row) for row in (header, cells, second)) + "\r\n\r\n"
    found = everything(table(folder, text, name, encoding))
    assert found[0] == everything(jsonl(folder, FULL))[0]
    assert found[1].captions == (f"A cup{tab} two lines,\nof it",) and found[1].split == "test"
    assert found[1].image == str(folder / "pictures/c d.png") and found[1].audio == ""


def test_jsonl_with_byte_order_mark_and_empty_lines(folder: Path) -> None:
    path = folder / "mine.jsonl"
    path.write_text("\n" + json.dumps(FULL) + "\n\n  \n", encoding="utf-8-sig")
    assert len(everything(path)) == 1


def test_a_caption_in_brackets_is_a_caption(folder: Path) -> None:
    path = table(folder, 'image,text,split\npictures/a.png,[applause] and music,train\n')
    assert everything(path)[0].captions == ("[applause] and music",)


def test_leading_blanks_of_file_names_are_real(folder: Path) -> None:
    trees.picture(folder / " b.png")
    path = table(folder, "image,split\n b.png,train\npictures/ b.png,train\n")
    assert [sample.image for sample in everything(path)] == [str(folder / " b.png"), str(folder / "pictures/ b.png")]


def test_paths_start_at_the_manifest_and_absolute_ones_stand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lists").mkdir()
    lines = ({"image": "../pictures/a.png"}, {"image": str(folder / "pictures/c d.png")})
    monkeypatch.chdir(folder / "sounds")
    path = jsonl(folder / "lists", *lines)
    images = {sample.image for sample in read_manifest(path, str(folder))}
    assert images == {str(folder / "pictures/a.png"), str(folder / "pictures/c d.png")}


def test_text_alone_is_a_sample(folder: Path) -> None:
    (sample,) = everything(jsonl(folder, {"text": "only words", "split": "train"}))
    assert (sample.image, sample.audio, sample.captions, sample.key) == ("", "", ("only words",), "only words")


def test_captions_without_words_are_dropped_and_doubles_counted(folder: Path) -> None:
    texts = ["  ", "A dog. ", "a  DOG", "", "...", "A cat"]
    line = {"image": "pictures/a.png", "text": texts, "labels": ["x", "x", " "]}
    (sample,) = everything(jsonl(folder, line))
    assert sample.captions == ("A dog.", "a  DOG", "A cat") and sample.labels == ("x",)
    table = SampleTable.pack([sample])
    assert table[0].captions == ("A dog.", "A cat") and table.caption_times.tolist() == [2, 1]
    assert worded_captions([" ", "!"], "here") == ()


def test_texts_in_wanted_languages_are_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[dict[str, Any]] = [
        {"image": "pictures/a.png", "text": ["a dog", "one dog"], "language": "en_US"},
        {"image": "pictures/a.png", "text": "一只狗", "lang": "zh-CN"},
        {"image": "pictures/c d.png", "text": "un chien", "lang": "fr"},
        {"image": "pictures/c d.png", "text": "of no told language"}, {"text": "chat", "language": "fr"}]
    path = jsonl(folder, *lines)

    def read(*names: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        config = load_config(None, ["data.datasets=[manifest]", f"data.manifest={str(path)!r}",
                                    f"data.languages=[{', '.join(names)}]"])
        return {s.key: (s.captions, s.languages) for s in read_splits("manifest", SPLITS, config)}

    assert read("zh", "en") == {"pictures/a.png": (("a dog", "one dog", "一只狗"), ("en", "en", "zh")),
                                "pictures/c d.png": (("of no told language",), ("",))}
    assert read("zh")["pictures/a.png"] == (("一只狗",), ("zh",))
    assert_names(caplog.records[-1].getMessage(), "data.languages", "zh", "en, fr", 4)
    jsonl(folder, lines[2])
    with refused("data.languages", "fr", path, "language"):
        read("en")
    assert_refused(jsonl(folder, {**lines[0], "language": "English words"}), 1, "language", "'English words'")


def test_ids_are_file_name_and_start_unless_given(folder: Path) -> None:
    lines = [{"image": "pictures/a.png", "text": "one"}, {"image": "pictures/a.png", "audio": "sounds/a.wav"},
             {"audio": "sounds/a.wav", "start": 1.50, "duration": 1}, {"image": "pictures/c d.png", "id": 5},
             {"audio": "sounds/b.wav"}, {"text": "named like a file", "id": "sounds/b.wav"}]
    assert {sample.key for sample in everything(jsonl(folder, *lines))} == {
        "pictures/a.png", "pictures/a.png#2", "sounds/a.wav@1.5", "5", "sounds/b.wav#2", "sounds/b.wav"}


# ---- splits ------------------------------------------------------------------------------------------------------


def many(folder: Path, numbers: Iterable[int]) -> list[dict[str, Any]]:
    for i in numbers:
        trees.picture(folder / "many" / f"{i}.png", size=(1, 1))
    return [{"image": f"many/{i}.png", "id": f"sample {i}"} for i in numbers]


def sides(path: Path) -> dict[str, str]:
    return {sample.key: sample.split for sample in everything(path)}


def test_without_a_split_10_pct_are_test_and_10_pct_val(folder: Path) -> None:
    lines = many(folder, range(50))
    drawn = sides(jsonl(folder, *lines))
    counts = {split: list(drawn.values()).count(split) for split in SPLITS}
    assert counts == {"train": 40, "val": 5, "test": 5}
    assert {key for key, split in drawn.items() if split == "test"} == {
        "sample 5", "sample 45", "sample 1", "sample 20", "sample 13"}  # the same for everybody, for ever
    assert sides(jsonl(folder, *reversed(lines))) == drawn


def test_drawn_are_two_of_each_kind_or_none_to_test_and_to_validate_on(folder: Path) -> None:
    for number in (1, 4, 5, 9, 10, 11, 14, 15, 19, 24, 25, 30, 99):
        lines = many(folder, range(number))
        sounds = [{"id": f"sound {i}", "audio": f"sounds/{'ab'[i % 2]}.wav", "text": f"sound {i}"} for i in range(2)]
        texts = [{"id": f"text {i}", "text": f"words {i}"} for i in range(number)]
        for more in ([], texts, [*texts, *sounds]):
            drawn = everything(jsonl(folder, *lines, *more))
            for split in ("test", "val"):
                held = [sample for sample in drawn if sample.split == split]
                pictures, said = sum(bool(one.image) for one in held), sum(bool(one.captions) for one in held)
                assert pictures in (0, 2) if number < 10 else max(2, number // 10 - 2) <= pictures <= number // 5 + 3
                assert said != 1 and (said or not more or number < 10)
                assert not any(one.audio for one in held), "two sounds are too few to hold any out"


def test_more_lines_move_few_samples(folder: Path) -> None:
    before = sides(jsonl(folder, *many(folder, range(50))))
    after = sides(jsonl(folder, *many(folder, range(55))))
    assert sum(before[key] != after[key] for key in before) <= 4


def test_what_belongs_together_stays_on_one_side(folder: Path) -> None:
    """Two lines share a picture, one of them shares a sound with a third: all three are one unit, thirty times."""
    lines: list[dict[str, Any]] = []
    for i in range(30):
        trees.picture(folder / "many" / f"{i}.png", size=(1, 1))
        trees.sound(folder / "many" / f"{i}.wav", trees.tone(0.01))
        lines += [{"id": f"{i} a", "image": f"many/{i}.png"}, {"id": f"{i} c", "audio": f"many/{i}.wav"},
                  {"id": f"{i} b", "image": f"many/{i}.png", "audio": f"many/{i}.wav"}]
    drawn = sides(jsonl(folder, *lines[::3], *lines[2::3], *lines[1::3]))
    assert all(len({drawn[f"{i} {letter}"] for letter in "abc"}) == 1 for i in range(30))
    assert list(drawn.values()).count("test") == 9


def test_parts_of_one_recording_are_samples_of_one_side(folder: Path) -> None:
    for i in range(20):
        trees.sound(folder / "many" / f"{i}.wav", trees.tone(0.01))
    lines = [{"audio": f"many/{i}.wav", "start": start, "duration": 5} for i in range(20) for start in (0, 1, 50)]
    drawn = sides(jsonl(folder, *lines))
    assert [list(drawn.values()).count(split) for split in SPLITS] == [48, 6, 6]
    assert all(len({drawn[f"many/{i}.wav@{start}"] for start in (0, 1, 50)}) == 1 for i in range(20))


def test_parts_of_one_recording_on_two_sides_are_refused(folder: Path) -> None:
    lines = [{"audio": "sounds/a.wav", "start": i, "duration": 5, "split": split}
             for i, split in enumerate(("train", "train", "val"))]
    assert_refused(jsonl(folder, *lines), 3, "audio", str(folder / "sounds/a.wav"), "'val'", "'train'", "line 1")


def test_a_video_is_one_file_as_a_picture_and_as_a_sound(folder: Path) -> None:
    path = jsonl(folder, {"image": "sounds/a.wav", "split": "train"}, {"audio": "sounds/a.wav", "split": "test"})
    assert_refused(path, 2, "audio", str(folder / "sounds/a.wav"), "'test'", "'train'", "line 1")


def test_one_picture_on_two_sides_is_refused(folder: Path) -> None:
    lines = [{"image": "pictures/a.png", "split": "train"}, {"image": "pictures/../pictures/a.png", "split": "test"}]
    assert_refused(jsonl(folder, *lines), 2, "image", str(folder / "pictures/a.png"), "'test'", "'train'", "line 1")


def test_splits_on_some_lines_only_are_refused(folder: Path) -> None:
    path = table(folder, "image,split\npictures/a.png,train\npictures/c d.png,\n")
    assert_refused(path, 3, "split", *SPLITS)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "named"), [
    ({"imgae": "a.png"}, ["'imgae'", "'image'"]),
    ({"xyz": 1}, ["'xyz'", "image", "audio", "start", "duration", "text", "labels", "speaker", "split", "id"]),
    ({"image": "pictures/none.png"}, ["image", "pictures/none.png"]),
    ({"image": "pictures"}, ["image", "pictures"]),
    ({"image": 5}, ["image", 5]),
    ({"audio": "sounds/a.wav", "start": -1}, ["start", "-1"]),
    ({"audio": "sounds/a.wav", "duration": "long"}, ["duration", "'long'"]),
    ({"audio": "sounds/a.wav", "start": True}, ["start", "True"]),
    ({"audio": "sounds/a.wav", "start": float("nan")}, ["start", "nan"]),
    ({"audio": "sounds/a.wav", "start": float("inf")}, ["start", "inf"]),
    ({"image": "pictures/a.png", "start": 1}, ["start", "duration", "audio"]),
    ({"image": "pictures/a.png", "text": {"en": "dog"}}, ["text", "{'en': 'dog'}"]),
    ({"image": "pictures/a.png", "text": ["dog", 1]}, ["text", "['dog', 1]"]),
    ({"image": "pictures/a.png", "labels": 3}, ["labels", 3]),
    ({"image": "pictures/a.png", "speaker": ["x"]}, ["speaker", "['x']"]),
    ({"image": "pictures/a.png", "split": "dev"}, ["split", "'dev'", *SPLITS]),
    ({"image": "pictures/a.png", "id": 1.5}, ["id", "1.5"]),
    ({"text": "  "}, ["image", "audio", "text"]),
    ({}, ["image", "audio", "text"]),
    ('{"image": "pictures/a.png"\n', ["JSON", "column 27"]),
    ('["pictures/a.png"]\n', ['["pictures/a.png"]']),
    ('{"text": "a", "text": "b"}\n', ["'text'"]),
])
def test_wrong_line_of_jsonl(folder: Path, line: Any, named: list[str | int]) -> None:
    assert_refused(jsonl(folder, {"image": "pictures/a.png", "text": "good"}, "\n", line), 3, *named)


@pytest.mark.parametrize(("rows", "line", "named"), [
    ("image,txt\npictures/a.png,dog\n", 1, ["'txt'", "'text'"]),
    ("image;txt\npictures/a.png;dog\n", 1, ["'image;txt'", "';'"]),
    ("image,text,image\nx,y,z\n", 1, ["'image'"]),
    ("image,text\npictures/a.png,a dog, on grass\n", 2, [3, 2]),
    ("image,text\npictures/a.png\n", 2, [1, 2]),
    ('image,text\npictures/a.png,"two\nlines"\npictures/none.png,x\n', 4, ["image", "pictures/none.png"]),
    ('image,text\n\npictures/none.png,"two\nlines"\n', 3, ["image", "pictures/none.png"]),
    ('image,text\npictures/a.png,"[""one"", ""two]"\n', 2, ["text", "JSON"]),
    ('image,text\npictures/a.png,"never closed\n', 2, ["CSV"]),
    ("audio,start\nsounds/a.wav,1;5\n", 2, ["start", "'1;5'"]),
])
def test_wrong_line_of_csv(folder: Path, rows: str, line: int, named: list[str | int]) -> None:
    assert_refused(table(folder, rows), line, *named)


# ---- what is too much --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "named"), [
    ("[" * 100_000 + "\n", []),
    ('{"text": ' + '{"a":' * 50_000 + "\n", []),
    ('{"id": ' + "9" * 5_000 + "}\n", []),
    ({"text": "x" * 10_001}, ["10,001", "10,000"]),
    ({"text": ["good", "x" * 10_001]}, ["10,001", "10,000"]),
    ({"text": "\ud800"}, ["text"]),
    ({"text": "a", "id": "\udfff"}, ["id"]),
    ({"text": "a", "labels": ["\ud800"]}, ["labels"]),
    ({"image": "pictures/a.png\0"}, ["image"]),
    ({"audio": "sounds/a.wav", "start": 10**400}, ["start"]),
    ({"audio": "sounds/a.wav", "duration": 1e300}, ["duration", "1e+07"]),
    ({"x" * 500_000: 1}, []),
])
def test_absurd_lines_are_refused_in_a_short_line(folder: Path, line: Any, named: list[str]) -> None:
    path = folder / "mine.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line), encoding="utf-8")
    assert len(assert_refused(path, 1, *named)) < len(str(path)) + 400


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.csv"])
def test_no_line_is_read_further_than_it_may_go(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(manifest, "MAX_LINE_CHARS", 1_000)
    path = folder / name
    with path.open("w") as file:
        file.truncate(9_000_000)  # one line of zeros
    tracemalloc.start()
    assert_refused(path, 1, "1,000")
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < 1_000_000


def test_gigantic_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(folder, *[{"text": f"a {i}"} for i in range(3)])
    monkeypatch.setattr(manifest, "MAX_BYTES", path.stat().st_size)
    monkeypatch.setattr(manifest, "MAX_LINES", 3)
    assert len(everything(path)) == 3
    monkeypatch.setattr(manifest, "MAX_LINES", 2)
    assert_refused(path, 3, 2)
    monkeypatch.setattr(manifest, "MAX_LINES", 3)
    monkeypatch.setattr(manifest, "MAX_BYTES", path.stat().st_size - 1)
    assert_refused(path, 0, f"{(path.stat().st_size - 1) / 1e9:g} GB")


def test_a_row_of_csv_over_many_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(folder / "mine.csv", csv.field_size_limit()):
        everything(table(folder, 'text\n"' + "never closed\n" * 20_000))
    monkeypatch.setattr(manifest, "MAX_LINE_CHARS", 1_000)
    with refused(folder / "mine.csv", "1,000"):
        everything(table(folder, "text\n" + '"a\n",' * 400))
    assert len(everything(table(folder, "text\n" + "".join(f"word {i}\n" for i in range(400))))) == 400


# ---- what lies elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["absolute", "..", "link", "folder link", "beside"])
def test_a_manifest_reaches_nothing_outside_its_folder(folder: Path, way: str) -> None:
    inside, outside = folder / "lists", folder / "pictures" / "a.png"
    trees.picture(inside / "own" / "a.png")
    trees.picture(folder / "lists2" / "a.png")  # whose name begins like the folder's
    (inside / "link.png").symlink_to(outside)
    (inside / "pictures").symlink_to(folder / "pictures")
    (inside / "good.png").symlink_to(inside / "own" / "a.png")
    named = {"absolute": str(outside), "..": "own/../../pictures/a.png", "link": "link.png",
             "folder link": "pictures/a.png", "beside": "../lists2/a.png"}[way]
    path = jsonl(inside, {"image": "good.png"}, {"image": str(inside / "own" / "a.png")}, {"image": named})
    assert_refused(path, 3, "image", str(inside), "data.manifest_root=FOLDER")
    assert len(list(read_manifest(path, str(folder)))) == 2, "two name one file"


def test_a_manifest_that_is_itself_behind_a_link(folder: Path) -> None:
    """Its folder is the one it is named by, and may be a link."""
    (folder / "by link").symlink_to(folder / "pictures")
    assert len(everything(jsonl(folder / "by link", {"image": "a.png"}))) == 1


def test_an_id_used_twice(folder: Path) -> None:
    path = jsonl(folder, {"id": 1, "text": "a"}, {"id": "2", "text": "b"}, {"id": "1", "text": "c"})
    assert_refused(path, 3, "id", "'1'", "line 1")


def test_wrong_files(folder: Path) -> None:
    (folder / "folder.csv").mkdir()
    for path in (folder / "none.csv", folder / "folder.csv"):
        assert_refused(path, 0, "data.manifest")
    assert_refused(table(folder, "", "mine.xlsx"), 0, "data.manifest", ".jsonl", ".csv", ".tsv")
    assert_refused(table(folder, "image,text\n"), 0)
    assert_refused(table(folder, "", "mine.jsonl"), 0)
    text = "image,text\npictures/a.png,caf\xe9\n"
    assert_refused(table(folder, text, encoding="latin-1"), 0, "UTF-8", text.index("\xe9"))


def test_the_whole_file_is_checked_whichever_split_is_asked_for(folder: Path) -> None:
    path = jsonl(folder, FULL, {**FULL, "id": "two", "split": "train", "image": "none.png"})
    with refused(path, "line 2", "image"):
        read_manifest(path)


def test_small_tree(tmp_path: Path) -> None:
    found = everything(trees.manifest(tmp_path, 20))
    assert len(found) == 20 and {sample.split for sample in found} == set(SPLITS)
