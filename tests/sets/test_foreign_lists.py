"""Lists as other programs write them: lists in cells, a line a caption, usual names of columns, missing files."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets import Loader, load_data
from tests.data.test_batches import configured
from tests.refusals import assert_names, refused
from tests.sets.test_manifest import assert_refused, everything, jsonl, many, media, sides, table
from trimodal.data import bad_samples
from trimodal.data.samples import SPLITS, SampleTable
from trimodal.sets.manifest import read_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return media(tmp_path)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A list of these rows, as pandas writes it: a CSV without an index, or JSON lines."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


LIST_CELLS = ["['a dog', \"a dog's bone\"]", "['a dog' \"a dog's bone\"]", '[ "a dog", "a dog\'s bone" ]',
              "[np.str_('a dog'), np.str_(\"a dog's bone\")]", "('a dog', \"a dog's bone\")",
              "['a dog'\n \"a dog's bone\"]", '["a dog", "a dog\'s bone"]']


@pytest.mark.parametrize("column", ["text", "labels"])
@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
@pytest.mark.parametrize("cell", LIST_CELLS)
def test_a_list_that_pandas_or_numpy_wrote_into_a_cell_is_a_list(folder: Path, cell: str, name: str,
                                                                 column: str) -> None:
    row = {"image": "pictures/a.png", column: cell, "split": "train"}
    path = written(folder / name, [row, {"image": "pictures/c d.png", column: "[]", "split": "train"}])
    first, second = everything(path)
    found = [(sample.captions if column == "text" else sample.labels) for sample in (first, second)]
    assert found == [("a dog", "a dog's bone"), ()], "and an empty list is none"


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
@pytest.mark.parametrize("column", ["text", "labels"])
@pytest.mark.parametrize("cell", ["['a dog', 'a dog's bone']", "['a' 'b' ... 'c']", "[['a'], ['b']]", '["a", 1]'])
def test_a_list_that_cannot_be_read_is_refused_wherever_it_stands(folder: Path, cell: str, name: str,
                                                                  column: str) -> None:
    rows = [{"image": "pictures/a.png", column: text, "split": "train"} for text in (LIST_CELLS[0], cell)]
    assert_refused(written(folder / name, rows), 2 + name.endswith("csv"), column, "JSON")


def test_a_list_within_a_list_of_json_is_refused(folder: Path) -> None:
    for inner in (["a"], "['a']", '["a"]'):
        assert_refused(jsonl(folder, {"image": "pictures/a.png", "text": ["good", inner]}), 1, "text")


# ---- lines of one file -------------------------------------------------------------------------------------------

CAPTIONS = [f"caption {i}" for i in range(5)]


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl"])
def test_lines_that_name_the_same_file_are_one_sample(folder: Path, name: str,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    """As lists of one caption a line are written; the grouped list says the same."""
    by_line = written(folder / name, [{"image": image, "text": text, "labels": label, "split": "train"}
                                      for text, label in zip(CAPTIONS, "aabcb", strict=True)
                                      for image in ("pictures/a.png", "pictures/c d.png")])
    grouped = jsonl(folder, *({"image": image, "text": CAPTIONS, "labels": ["a", "b", "c"], "split": "train"}
                              for image in ("pictures/a.png", "pictures/c d.png"))) if name != "mine.jsonl" else None
    found = everything(by_line)
    assert [sample.captions for sample in found] == [tuple(CAPTIONS)] * 2
    assert [sample.labels for sample in found] == [("a", "b", "c")] * 2
    assert [sample.key for sample in found] == ["pictures/a.png", "pictures/c d.png"]
    assert not grouped or found == everything(grouped)
    (line,) = [record.getMessage() for record in caplog.records]
    assert_names(line, "manifest", "10 lines", "2 files")


@pytest.mark.parametrize("way", ["other path", "absolute", "link", "hard link"])
def test_a_file_is_the_same_whatever_path_leads_there(folder: Path, way: str) -> None:
    (folder / "link.png").symlink_to("pictures/a.png")
    os.link(folder / "pictures/a.png", folder / "hard.png")
    other = {"other path": "sounds/../pictures/a.png", "absolute": str(folder / "pictures/a.png"), "link": "link.png",
             "hard link": "hard.png"}[way]
    (sample,) = everything(jsonl(folder, {"image": "pictures/a.png", "text": "one"}, {"image": other, "text": "two"}))
    assert sample.captions == ("one", "two") and sample.image == str(folder / "pictures/a.png")


def test_only_the_same_stretch_and_the_same_files_are_one_sample(folder: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"audio": "sounds/a.wav"}, {"audio": "sounds/a.wav", "start": 1}, {"audio": "sounds/a.wav", "duration": 1},
        {"audio": "sounds/b.wav"}, {"image": "pictures/a.png"}, {"image": "pictures/a.png", "audio": "sounds/a.wav"},
        {"image": "pictures/c d.png", "audio": "sounds/a.wav"}, {"image": "pictures/a.png", "audio": "sounds/b.wav"},
        {"text": "words"}, {"text": "words"}]
    assert len(everything(jsonl(folder, *({**line, "split": "train"} for line in lines)))) == len(lines)
    doubled = [{**line, "split": "train", "text": f"{i} {times}"} for times in range(2) for i, line in enumerate(lines)]
    found = everything(jsonl(folder, *doubled))
    assert len(found) == len(lines) + 2, "a text alone is never the same sample as another"
    assert [sample.captions for sample in found[:8]] == [(f"{i} 0", f"{i} 1") for i in range(8)]
    whole = jsonl(folder, {"audio": "sounds/a.wav", "text": "x"}, {"audio": "sounds/a.wav", "start": 0, "text": "y"})
    assert [sample.captions for sample in everything(whole)] == [("x", "y")]


def test_equal_captions_of_one_file_are_counted(folder: Path) -> None:
    path = jsonl(folder, *({"image": "pictures/a.png", "text": text} for text in ("A dog.", "a cat", "a dog")))
    packed = SampleTable.pack(everything(path))
    assert packed[0].captions == ("A dog.", "a cat") and packed.caption_times.tolist() == [2, 1]


def test_the_id_of_lines_of_one_file_is_the_first(folder: Path) -> None:
    lines: list[dict[str, Any]] = [{"image": "pictures/a.png", "id": "x"}, {"image": "pictures/a.png", "id": "y"},
                                   {"image": "pictures/c d.png", "id": "z"}, {"image": "pictures/c d.png", "id": "z"}]
    assert {sample.key for sample in everything(jsonl(folder, *lines))} == {"x", "z"}
    assert_refused(jsonl(folder, *lines, {"audio": "sounds/a.wav", "id": "y"}), 5, "id", "'y'", "line 2")


@pytest.mark.parametrize("column", ["split", "speaker"])
def test_lines_of_one_file_that_contradict_each_other_are_refused(folder: Path, column: str) -> None:
    lines = [{"audio": "sounds/a.wav", "split": "train", "speaker": "anna", "text": "one"}] * 2
    values = ["train", "val"] if column == "split" else ["anna", "ben"]
    path = jsonl(folder, lines[0], {"audio": "sounds/b.wav", "split": "train"}, {**lines[1], column: values[1]})
    assert_refused(path, 3, column if column == "speaker" else "audio", *map(repr, values), "line 1")
    (first, _) = everything(jsonl(folder, {**lines[0], "speaker": ""}, {"audio": "sounds/b.wav", "split": "train"},
                                  lines[1]))
    assert first.speaker == "anna", "what one line leaves open another one says"


def test_repeated_lines_change_no_side_and_no_id(folder: Path) -> None:
    lines = [{"image": line["image"], "text": "one"} for line in many(folder, range(50))]
    drawn = sides(jsonl(folder, *lines))
    assert sides(jsonl(folder, *lines, *({**line, "text": "two"} for line in reversed(lines)))) == drawn
    assert [key for key, split in drawn.items() if split == "test"] == [
        "many/9.png", "many/13.png", "many/19.png", "many/42.png", "many/46.png"], "as ever"


@pytest.mark.parametrize("name", ["mine.csv", "mine.jsonl"])
def test_splits_may_be_called_what_they_are_called_elsewhere(folder: Path, name: str) -> None:
    for written_as, meant in (("Train", "train"), ("training", "train"), ("validation", "val"), ("VALID", "val"),
                              ("Testing", "test"), (" test ", "test")):
        (sample,) = everything(written(folder / name, [{"image": "pictures/a.png", "split": written_as}]))
        assert sample.split == meant
    for unclear in ("dev", "eval", "restval", "train2017", "0"):
        path = written(folder / name, [{"image": "pictures/a.png", "split": unclear}])
        assert_refused(path, 1 + name.endswith("csv"), "split", repr(unclear), *SPLITS)


# ---- cells and their quotes ----------------------------------------------------------------------------------------

ROWS = [("pictures/a.png", "a dog"), ("pictures/c d.png", 'a cat, a "hat" and, "a mat", ')]


@pytest.mark.parametrize("header", ["image, text, split", "image,text,split", " image,\ttext, split"])
@pytest.mark.parametrize("gap", ["", " ", "  "])
@pytest.mark.parametrize("quoted", ["all", "needed"])
def test_blanks_behind_commas_never_make_quotes_a_part_of_a_caption(folder: Path, header: str, gap: str,
                                                                    quoted: str) -> None:
    """Of lists written by hand: where the first line has them they belong to no cell, else an error names the line."""
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if quoted == "all" or "," in text else text

    lines = [f",{gap}".join(map(cell, (*row, "train"))) for row in ROWS]
    path = folder / "mine.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    if gap and header != "image, text, split":
        assert_refused(path, 2 if quoted == "all" else 3)
    else:
        assert [(Path(one.image).name, one.captions) for one in everything(path)] == [
            ("a.png", ("a dog",)), ("c d.png", ('a cat, a "hat" and, "a mat",',))]


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv"])
@pytest.mark.parametrize("column", ["image", "filename"])
def test_a_quote_that_is_never_closed_swallows_no_lines(folder: Path, name: str, column: str) -> None:
    sign = "," if name == "mine.csv" else "\t"
    path = folder / name
    rows = [f"{column},text", "pictures/a.png,a dog", 'pictures/a.png,"big screen', "pictures/c d.png,a cat",
            'pictures/a.png,a dog of 24"', "pictures/c d.png,two cats"]
    path.write_text("\n".join(rows).replace(",", sign) + "\n")
    assert_refused(path, 3)
    whole = '"a dog,\non grass, a.png is its name,\nor so"'.replace(",", sign)
    path.write_text(f"{column},text\npictures/a.png,".replace(",", sign) + whole + "\n")
    assert len(everything(path)) == 1, "line breaks alone are part of a caption"


@pytest.mark.parametrize(("row", "named"), [
    ({"labels": "dog,cat"}, ["2 labels", "'dog,cat'"]), ({"labels": "dog|cat"}, ["2 labels", "'dog|cat'"]),
    ({"labels": "nan"}, ["2 labels", "'nan'"]), ({"speaker": "None"}, ["2 labels", "'None'"]),
    ({"labels": "dog;cat"}, []), ({"labels": '["dog", "cat"]', "speaker": "anna"}, [])])
def test_labels_and_speakers_that_can_hardly_be_meant_are_told(folder: Path, row: dict[str, Any], named: list[str],
                                                               caplog: pytest.LogCaptureFixture) -> None:
    everything(written(folder / "mine.csv", [{"audio": f"sounds/{one}.wav", **row, "split": "train"} for one in "ab"]))
    told = [line for record in caplog.records if " labels " in (line := record.getMessage())]
    assert len(told) == bool(named)
    for line in told:
        assert_names(line, "manifest", *named)


# ---- names of columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [
    ["image", "text"], ["filepath", "title"], ["file_name", "caption"], ["Image", "Captions"], ["img", "sentence"],
    ["image_path", "prompt"], ["path", "description"], ["FileName", "transcript"]], ids=" ".join)
@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "mine.jsonl"])
def test_usual_names_of_columns_are_understood_and_told(folder: Path, name: str, header: list[str],
                                                        caplog: pytest.LogCaptureFixture) -> None:
    header = [column.replace("FileName", "filename") for column in header]
    path = written(folder / name, [dict(zip(header, ["pictures/a.png", "a dog"], strict=True)) | {"split": "test"}])
    (sample,) = everything(path)
    assert (sample.image, sample.captions) == (str(folder / "pictures/a.png"), ("a dog",))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (header[0].lower() != "image" or header[1].lower() not in ("text",))
    for line in told:
        assert_names(line, "manifest", *(f"{column!r} as {meaning}" for column, meaning in zip(
            header, ("image", "text"), strict=True) if column.lower() != meaning))


@pytest.mark.parametrize("column", ["wav", "audio_path", "path", "file_name", "filename"])
def test_a_column_of_files_is_what_the_files_are(folder: Path, column: str) -> None:
    lines = [{column: "sounds/a.wav", "sentence": "a sound"}, {column: "pictures/a.png", "sentence": "a picture"}]
    if column in ("wav", "audio_path"):
        del lines[1]
    found = everything(written(folder / "mine.csv", lines))
    assert {(sample.audio or sample.image, bool(sample.audio)) for sample in found} == {
        (str(folder / line[column]), "wav" in line[column]) for line in lines}


def test_numbered_captions_are_all_taken(folder: Path) -> None:
    columns = [f"caption_{i}" for i in range(1, 6)]
    path = written(folder / "mine.csv", [{"file_name": "sounds/a.wav", **dict(zip(columns, CAPTIONS, strict=True))}])
    (sample,) = everything(path)
    assert sample.audio == str(folder / "sounds/a.wav") and sample.captions == tuple(CAPTIONS)


@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
def test_the_index_that_pandas_writes_is_left_out_and_told(folder: Path, index: str,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    rows = [{index: i, "image": image, "text": "x"} for i, image in enumerate(["pictures/a.png", "pictures/c d.png"])]
    found = everything(written(folder / "mine.csv", rows))
    assert {sample.key for sample in found} == {"pictures/a.png", "pictures/c d.png"}
    assert_names(caplog.records[0].getMessage(), "manifest", "pandas")
    rows[1][index] = "row two"
    assert_refused(written(folder / "mine.csv", rows), 3, "'row two'", "index=False")


@pytest.mark.parametrize(("text", "name"), [
    ("image;text\npictures/a.png;a dog, a cat\n", "mine.csv"),
    ("image\ttext\npictures/a.png\ta dog, a cat\n", "mine.csv"),
    ("image|text\npictures/a.png|a dog, a cat\n", "mine.csv"),
    ('image,text\npictures/a.png,"a dog, a cat"\n', "mine.tsv"),
    ("image, text,\npictures/a.png,\"a dog, a cat\",\n", "mine.csv")])
def test_another_delimiter_is_seen_in_the_first_line(folder: Path, text: str, name: str,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    (sample,) = everything(table(folder, text, name))
    assert sample.image == str(folder / "pictures/a.png") and sample.captions == ("a dog, a cat",)
    assert len(caplog.records) == (", text," not in text), "told where it is not what the file's name says"


@pytest.mark.parametrize(("header", "named"), [
    ("image,caption,title", ["'caption'", "'title'", "text"]), ("image,text,caption", ["'text'", "'caption'", "text"]),
    ("image,img", ["'image'", "'img'", "image"]), ("image,label,category", ["'label'", "'category'", "labels"]),
    ("image,caption,caption_1", ["'caption'", "'caption_1'"]), ("image,xyz", ["'xyz'", "image", "id"]),
    ("pictures/a.png,a dog", ["'pictures/a.png'", "image", "text"]),
    ("image;xyz", ["';'"]), ("audio,start,end", ["'end'", "duration"]), ("image,cpation", ["'cpation'", "'caption'"])])
def test_a_header_that_cannot_be_understood_is_refused_at_line_1(folder: Path, header: str, named: list[str]) -> None:
    assert_refused(table(folder, f"{header}\n"), 1, *named)


def test_two_columns_that_name_pictures_are_refused(folder: Path) -> None:
    path = written(folder / "mine.csv", [{"image": "pictures/a.png", "file_name": "pictures/c d.png"}])
    assert_refused(path, 2, "'image'", "'file_name'", "image")
    (sample,) = everything(written(folder / "mine.csv", [{"image": "pictures/a.png", "file_name": "sounds/a.wav"}]))
    assert sample.audio == str(folder / "sounds/a.wav")


def test_numbers_are_no_names_of_classes(folder: Path) -> None:
    path = written(folder / "mine.csv", [{"image": "pictures/a.png", "label": "3"}])
    assert_refused(path, 2, "'label'", "labels")
    (sample,) = everything(written(folder / "mine.csv", [{"image": "pictures/a.png", "class": "dog; cat"}]))
    assert sample.labels == ("dog", "cat")


# ---- files that are not there ------------------------------------------------------------------------------------


def some_missing(folder: Path, missing: int, of: int) -> Path:
    lines = many(folder, range(of))
    for i in range(missing):
        (folder / "many" / f"{3 * i}.png").unlink()
    return jsonl(folder, *lines)


def test_few_missing_files_are_samples_that_cannot_be_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = some_missing(folder, 2, 51)
    found = sorted(read_manifest(path, max_missing_pct=4), key=lambda sample: SPLITS.index(sample.split))
    assert len(found) == 51 and {sample.key: sample.split for sample in found} == sides(
        jsonl(folder, *many(folder, range(51)))), "and they change no side"
    (line,) = {record.getMessage() for record in caplog.records}
    assert_names(line, "manifest", "2 of 51", "not there", "line 1", "line 4", str(folder / "many" / "0.png"))


def test_many_missing_files_are_counted_and_the_first_named(folder: Path) -> None:
    path = some_missing(folder, 12, 51)
    with refused(path, "12 of 51", "data.max_bad_pct=5", "line 1", "line 4", "line 7", "9 more",
                 str(folder / "many" / "0.png")):
        read_manifest(path, max_missing_pct=5)


@pytest.mark.parametrize("cache", [True, False])
def test_a_missing_file_costs_one_sample_and_is_recorded_as_a_broken_one(folder: Path, cache: bool) -> None:
    lines = [{**line, "split": "train", "text": f"number {i}"} for i, line in enumerate(many(folder, range(40)))]
    (folder / "many" / "7.png").unlink()
    jsonl(folder, *lines, {"id": "val", "text": "a text alone", "split": "val"}).rename(folder / "manifest.jsonl")
    config = configured(folder, f"data.cache={str(cache).lower()}")
    data = load_data(config)
    assert len(data.tables["train"]) == 40
    jobs = [(0, rows) for rows in np.arange(40).reshape(2, 20)]
    batches = list(Loader(data, "train", jobs, config, inputs=[("image", "text")], train=True, epoch=1))
    assert len(batches[0].keys) == 20 and "manifest/sample 7" not in batches[0].keys, "another one stands in"
    (record,) = [json.loads(line) for line in bad_samples.path_of(config).read_text("utf-8").splitlines()]
    assert record["key"] == "manifest/sample 7" and str(folder / "many" / "7.png") in record["reason"]
