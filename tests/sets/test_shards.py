"""Shards are read as those who wrote them meant them; what is lost or left out is said, with where it is."""

import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from datasets import load_data, read_tables
from tests import trees
from tests.refusals import refused
from tests.shard_files import cell, described, tar
from tests.small_runs import RECIPE
from trimodal import members
from trimodal.config import Config, config_from_dict
from trimodal.data import prepared
from trimodal.data.audio import decode_audio
from trimodal.data.images import decode_image
from trimodal.data.samples import SPLITS, BrokenSample, Sample
from trimodal.errors import ConfigError
from trimodal.sets import read_splits, tars


@pytest.fixture
def jpg(tmp_path: Path) -> bytes:
    return trees.picture(tmp_path / "of" / "a.jpg").read_bytes()


@pytest.fixture
def flac(tmp_path: Path) -> bytes:
    return trees.sound(tmp_path / "of" / "a.flac", trees.tone(0.3)).read_bytes()


def config_of(folder: Path, shards: object = None, *overrides: str) -> Config:
    given = [] if shards is None else [f"data.shards={json.dumps(shards, default=str)}"]
    return config_from_dict(RECIPE, [f"paths.data_root={folder}", f"paths.output_dir={folder}/out",
                                     "data.datasets=[shards]", *given, *overrides])


def read(folder: Path, shards: object = None, *overrides: str, splits: Sequence[str] = SPLITS) -> list[Sample]:
    return sorted(read_splits("shards", splits, config_of(folder, shards, *overrides)), key=lambda one: one.key)


def keys(samples: Sequence[Sample]) -> list[str]:
    return [one.key for one in samples]


def table(path: Path, rows: Sequence[dict[str, Any]], features: dict[str, Any] | None = None, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pyarrow.Table.from_pylist(list(rows))
    if features:
        content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(content, path, **settings)
    return path


# ---- what a sample is ---------------------------------------------------------------------------------------------


def test_the_layout_of_img2dataset(tmp_path: Path, jpg: bytes) -> None:
    """Members in the order in which downloads ended, floating-point dates in headers of their own (pax), and beside
    each tar a table of all addresses that were tried, and statistics."""
    folder = tmp_path / "shards"
    content = [(f"0000{n:03}.{end}", data) for n in (2, 0, 1) for end, data in (
        ("jpg", jpg), ("json", json.dumps(described(f"0000{n:03}", f"number {n}"), indent=4).encode()),
        ("txt", f"number {n}".encode()))]
    with tarfile.open(tar(folder / "00000.tar", content), "a", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("0000003.jpg")
        member.size, member.mtime = 0, 1795945584.443842
        archive.addfile(member)
    table(folder / "00000.parquet", [described(f"0000{n:03}", "x") for n in range(4)])
    (folder / "00000_stats.json").write_text("{}")
    found = read(tmp_path)
    assert keys(found) == [f"00000/0000{n:03}" for n in range(4)]
    assert [one.captions for one in found] == [("number 0",), ("number 1",), ("number 2",), ()]
    assert {one.labels for one in found} == {("dog",), ()}
    with tarfile.open(folder / "00000.tar") as archive:
        for one in found:
            with members.open_bytes(one.image) as file:
                whole = archive.extractfile(members.name_of(one.image))
                assert whole and file.read() == whole.read()


def test_the_parquet_of_img2dataset(tmp_path: Path, jpg: bytes) -> None:
    """Bytes in a column of its own, and rows whose download failed."""
    rows = [described(f"00000{n}", f"number {n}") | {"jpg": jpg} for n in (1, 0)]
    rows += [described("000002", "", "cat") | {"status": "failed_to_download", "jpg": None}]
    table(tmp_path / "shards" / "00000.parquet", rows)
    found = read(tmp_path)
    assert keys(found) == ["00000/000000", "00000/000001"] and found[0].captions == ("number 0",)
    assert members.shown(found[0].image).endswith("00000.parquet: 000000.jpg")
    assert np.array_equal(decode_image(found[0].image), decode_image(tmp_path / "of" / "a.jpg"))


def test_the_layout_of_laion_clap(tmp_path: Path, flac: bytes) -> None:
    text = {"text": ["a dog barks", "barking"], "tag": ["dog", "animal"], "original_data": {"title": "x"}}
    tar(tmp_path / "shards" / "0.tar", {"7.flac": flac, "7.json": json.dumps(text).encode(),
                                       "8.flac": flac, "8.json": b'{"text": "rain"}'})
    one, other = read(tmp_path)
    assert (one.captions, one.labels, one.image) == (("a dog barks", "barking"), ("dog", "animal"), "")
    assert other.captions == ("rain",)
    assert np.array_equal(decode_audio(one.audio), decode_audio(tmp_path / "of" / "a.flac"))


def test_zero_shot_shards_with_numbers_for_classes(tmp_path: Path, jpg: bytes,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    tar(tmp_path / "shards" / "test" / "0.tar", {"s0.jpg": jpg, "s0.cls": b"1", "s1.jpg": jpg, "s1.cls": b"0\n",
                                                "s2.jpg": jpg, "s2.cls": b"9"})
    (tmp_path / "shards" / "classnames.txt").write_text("tabby cat\ngolden dog\n")
    found = read(tmp_path)
    assert [(one.split, one.labels) for one in found] == [
        ("test", ("golden dog",)), ("test", ("tabby cat",)), ("test", ("9",))]
    assert "classnames.txt" in caplog.text and "test/0/s2" in caplog.text


def test_an_export_of_the_hub(tmp_path: Path, jpg: bytes, flac: bytes) -> None:
    """Structs of bytes and path, numbers with names in the table's own description, texts as lists, a mask beside."""
    rows: list[dict[str, Any]] = [
        {"image": cell({"jpg": jpg}, "jpg"), "label": 1, "mask": cell({"jpg": jpg}, "jpg"), "caption": ["a", "b"]},
        {"image": None, "label": 0, "mask": None, "caption": []}]
    features = {"image": {"_type": "Image"}, "mask": {"_type": "Image"},
                "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table(tmp_path / "shards" / "train-00000-of-00001.parquet", rows, features)
    table(tmp_path / "shards" / "validation-00000-of-00001.parquet",
          [{"audio": cell({"flac": flac}, "flac"), "sentence": "rain", "speaker_id": 7}])
    train, val = read(tmp_path)
    assert (train.key, train.split, train.captions, train.labels) == (
        "train-00000-of-00001/000000", "train", ("a", "b"), ("dog",))
    assert members.shown(train.image).endswith(".parquet: row 0, x.jpg")
    assert (val.split, val.captions, val.speaker, val.image) == ("val", ("rain",), "7", "")
    assert np.array_equal(decode_audio(val.audio), decode_audio(tmp_path / "of" / "a.flac"))


def test_a_video_is_a_picture_and_the_sound_that_it_has(tmp_path: Path) -> None:
    colours = [(200, 20, 20), (20, 200, 20)]
    loud = trees.video(tmp_path / "a.mp4", colours, trees.tone(0.2)).read_bytes()
    mute = trees.video(tmp_path / "b.mp4", colours).read_bytes()
    tar(tmp_path / "shards" / "0.tar", {"1.mp4": loud, "2.mp4": mute, "2.txt": b"quiet", "3.mp4": b"no video"})
    found = read(tmp_path)
    assert [(bool(one.image), bool(one.audio)) for one in found] == [(True, True), (True, False), (True, False)]
    assert found[0].image == found[0].audio


@pytest.mark.parametrize(("texts", "captions", "expected"), [
    ({"txt": b"one"}, "auto", ("one",)), ({"txt": b" \n", "json": b'{"caption": "two"}'}, "auto", ("two",)),
    ({"txt": b"one", "json": b'{"caption": "two", "title": "three"}'}, "auto", ("one",)),
    ({"json": b'{"title": "three", "captions": ["a", "b", ""]}'}, "auto", ("a", "b")),
    ({"json": b'{"caption_1": "a", "caption_2": "b", "description": "c"}'}, "auto", ("a", "b")),
    ({"json": b"{'no json'"}, "auto", ()), ({"json": b'["a", "b"]'}, "auto", ()),
    ({"txt": b"caf\xe9"}, "auto", ("caf\ufffd",)),
    ({"json": b'{"caption": "\\ud800"}'}, "auto", ()), ({"txt": b"x" * 10_001}, "auto", ()),
    ({"txt": b"one", "json": b'{"title": "three"}'}, "[title, txt]", ("three", "one")),
    ({"txt": b"one", "en.txt": b"two"}, "[en.txt]", ("two",))])
def test_where_captions_come_from(tmp_path: Path, jpg: bytes, texts: dict[str, bytes], captions: str,
                                  expected: tuple[str, ...]) -> None:
    tar(tmp_path / "shards" / "0.tar", {"1.jpg": jpg, **{f"1.{end}": text for end, text in texts.items()}})
    (found,) = read(tmp_path, None, f"data.shards_captions={captions}")
    assert found.captions == expected


def test_fields_for_captions_that_are_nowhere_are_refused_with_those_that_are(tmp_path: Path, jpg: bytes) -> None:
    tar(tmp_path / "shards" / "0.tar", {"1.jpg": jpg, "1.json": b'{"title": "one", "url": "a"}', "1.txt": b"a text"})
    tar(tmp_path / "shards" / "1.tar", {"1.jpg": jpg, "1.json": b'{"subtitle": "two"}'})
    assert len(read(tmp_path, None, "data.shards_captions=[subtitle,title]")) == 2, "not in every shard"
    for _ in range(2):  # from what is kept of the shards
        with refused("data.shards_captions", "nope", "subtitle", "title", "txt", "url"):
            read(tmp_path, None, "data.shards_captions=[title,nope]")
    table(tmp_path / "table" / "0.parquet", [{"jpg": jpg, "words": "a text", "width": 7}])
    with refused("data.shards_captions", "nope", "width", "words"):
        read(tmp_path, tmp_path / "table", "data.shards_captions=[nope]")
    tar(tmp_path / "bare" / "0.tar", {"1.jpg": jpg})
    with refused("data.shards_captions", "nope", "auto"):
        read(tmp_path, tmp_path / "bare", "data.shards_captions=[nope]")


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "expected"), [
    (["a.jpg", "a.txt", "b.JPG", "b.Txt"], {"a": 1, "b": 1}),
    (["d/e.f/1.jpg", "d/e.f/1.txt", "./d/1.jpg"], {"d/e.f/1": 1, "d/1": 0}),
    (["dog. bark 1.jpg", "dog. bark 1.txt", "dog. bark 2.jpg", "dog. bark 2.txt"],
     {"dog. bark 1": 1, "dog. bark 2": 1}),
    (["dog.jpg", "dog.txt", "dog.2.jpg", "dog.2.txt"], {"dog": 1, "dog.2": 1}),
    (["i.1.jpg", "i.2.jpg"], {"i.1": 0, "i.2": 0}), (["i.1.jpg", "i.2.jpg", "i.txt"], {"i.1": 1, "i.2": 1}),
    (["a.jpg", "a.seg.png", "a.txt", "a.depth.png"], {"a": 1}),
    (["._a.jpg", "__meta__/x.jpg", "noending", "a.jpg"], {"a": 0}),
    (["1.jpg", "2.jpg", "1.txt", "2.txt"], {"1": 1, "2": 1})])
def test_names_with_several_dots_stay_apart(tmp_path: Path, jpg: bytes, names: list[str],
                                            expected: dict[str, int]) -> None:
    tar(tmp_path / "shards" / "0.tar", {name: jpg if name.lower().endswith(("jpg", "png")) else name.encode()
                                       for name in names})
    assert {one.key.removeprefix("0/"): len(one.captions) for one in read(tmp_path)} == expected


def test_keys_and_extensions_are_those_of_webdataset(tmp_path: Path, jpg: bytes) -> None:
    """Whatever webdataset reads of names without further dots is read here, under the same key."""
    import webdataset

    names = ["a/1.jpg", "a/b.c/2.jpg", "3.JPG", ".4.jpg", "5", "6 x.jpg", "7.jpg"]
    path = tar(tmp_path / "shards" / "0.tar", dict.fromkeys(names, jpg))
    theirs = [one["__key__"] for one in webdataset.WebDataset(str(path), shardshuffle=False) if "jpg" in one]
    assert sorted(keys(read(tmp_path))) == sorted(f"0/{key}" for key in theirs)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names(tmp_path: Path, jpg: bytes, form: int) -> None:
    long = "/".join(["folder"] * 12) + "/" + "k" * 90
    tar(tmp_path / "shards" / "0.tar", {f"{long}.jpg": jpg, f"{long}.txt": b"long"}, format=form)
    (found,) = read(tmp_path)
    assert found.key == f"0/{long}" and found.captions == ("long",)
    assert np.array_equal(decode_image(found.image), decode_image(tmp_path / "of" / "a.jpg"))


# ---- what is lost ------------------------------------------------------------------------------------------------


def notes(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_what_is_left_out_is_named(tmp_path: Path, jpg: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "shards" / "0.tar"
    tar(path, [("1.jpg", b"former"), ("1.txt", b"one"), ("2.txt", b"alone"), ("1.jpg", jpg), ("3.jpg", jpg),
               ("3.npy", b"")])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "shards" / "1.tar").touch()
    tar(tmp_path / "shards" / "2.tar", {})
    found = read(tmp_path)
    assert keys(found) == ["0/1", "0/3"]
    assert np.array_equal(decode_image(found[0].image), decode_image(tmp_path / "of" / "a.jpg")), "the last of a name"
    said = notes(caplog)
    for named in ("0/2", "0/3", "1.jpg", "3.npy", "4.jpg", "1.tar"):
        assert named in said


def test_a_tar_that_was_cut_gives_what_it_holds(tmp_path: Path, jpg: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The member within which it ends is a broken sample, with its name; what stood behind it is said to be gone."""
    path = tar(tmp_path / "shards" / "0.tar", {f"{n}.jpg": jpg for n in range(6)})
    with tarfile.open(path) as archive:
        cut = archive.getmember("4.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    found = read(tmp_path)
    assert keys(found) == [f"0/{n}" for n in range(5)]
    assert "0.tar" in notes(caplog) and "4.jpg" in notes(caplog) and "not there" in notes(caplog)
    with pytest.raises(BrokenSample, match=r"0\.tar: 4\.jpg: "):
        decode_image(found[4].image)
    config = config_of(tmp_path, None, "data.max_bad_pct=30")
    load_data(config)
    (line,) = (tmp_path / "out" / "logs" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "shards/0/4" and "0.tar: 4.jpg" in json.loads(line)["reason"]


def test_a_tar_without_its_end_mark_is_named(tmp_path: Path, jpg: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """As one of a writer that was killed between two samples: tarfile alone says nothing."""
    path = tar(tmp_path / "shards" / "0.tar", {f"{n}.jpg": jpg for n in range(3)})
    with tarfile.open(path) as archive:
        path.write_bytes(path.read_bytes()[:archive.getmember("2.jpg").offset])
    assert keys(read(tmp_path)) == ["0/0", "0/1"]
    assert "0.tar" in notes(caplog) and "1.jpg" in notes(caplog)


def test_damage_within_a_tar_costs_what_it_hits(tmp_path: Path, jpg: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """tarfile alone would end there, silently."""
    path = tar(tmp_path / "shards" / "0.tar", {f"{n}.jpg": jpg for n in range(6)})
    with tarfile.open(path) as archive:
        header = archive.getmember("2.jpg").offset
    content = bytearray(path.read_bytes())
    content[header: header + 300] = bytes(range(200, 250)) * 6
    path.write_bytes(bytes(content))
    assert keys(read(tmp_path)) == [f"0/{n}" for n in (0, 1, 3, 4, 5)]
    assert "0.tar" in notes(caplog) and "1.jpg" in notes(caplog)


def test_a_row_without_bytes_is_left_out_and_a_broken_one_costs_one_sample(tmp_path: Path, jpg: bytes) -> None:
    rows = [{"image": {"bytes": content, "path": None}} for content in (jpg, None, b"broken", b"")]
    table(tmp_path / "shards" / "0.parquet", rows)
    found = read(tmp_path)
    assert keys(found) == ["0/000000", "0/000002"]
    with pytest.raises(BrokenSample, match=r"0\.parquet: row 2: "):
        decode_image(found[1].image)


# ---- which shards, which split -----------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path, jpg: bytes) -> Path:
    for name in ("a-train-0.tar", "a-train-1.tar", "a-val-0.tar"):
        tar(tmp_path / "s" / name, {"1.jpg": jpg})
    tar(tmp_path / "s" / "test" / "0.tar", {"1.jpg": jpg})
    return tmp_path / "s"


@pytest.mark.parametrize(("given", "expected"), [
    ("s", {"train": 2, "val": 1, "test": 1}), ("s/a-train-{0..1}.tar", {"train": 2}), ("s/a-train-?.tar", {"train": 2}),
    ("s/a-{train,val}-0.tar", {"train": 1, "val": 1}), ("s/*/*.tar", {"train": 1}), ("s/a-val-0.tar", {"val": 1}),
    (["s/a-val-0.tar", "s/test"], {"val": 1, "test": 1}), ("s/**/*.tar", {"train": 2, "val": 1, "test": 1}),
    ({"train": "s/test", "test": ["s/a-train-0.tar", "s/a-val-0.tar"]}, {"train": 1, "test": 2})])
def test_shards_by_name_and_split(three: Path, given: object, expected: dict[str, int],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(three.parent)
    assert Counter(one.split for one in read(three.parent, given)) == expected


def test_splits_are_drawn_where_no_shard_has_one(tmp_path: Path, jpg: bytes) -> None:
    """By keys alone: neither the order of shards nor that of members matters, and a held-out sample stays one."""
    for shard in range(2):
        tar(tmp_path / "shards" / f"{shard}.tar", {f"{n}.jpg": jpg for n in range(50)})
    before = {one.key: one.split for one in read(tmp_path)}
    assert Counter(before.values()) == {"train": 80, "val": 10, "test": 10}
    tar(tmp_path / "shards" / "2.tar", {f"{n}.jpg": jpg for n in reversed(range(10))})
    after = {one.key: one.split for one in read(tmp_path)}
    assert sum(after[key] != split for key, split in before.items()) <= 4


@pytest.mark.parametrize(("given", "named"), [
    ("s/none.tar", ["data.shards", "s/none.tar"]), ("s/a-train-{0..3}.tar", ["data.shards", "s/a-train-2.tar"]),
    ("of", ["of", ".tar", ".parquet", "data.shards"]), ("of/a.jpg", ["data.shards", "a.jpg", ".tar"]),
    (["s/a-val-0.tar", "of/z.tar"], ["z.tar", "data.shards"]),
    (["twice/0.tar", "twice/0.parquet"], ["0.tar", "0.parquet"]),
    ("split/train-test.tar", ["train-test.tar", "data.shards"]), ("gz/0.tar.gz", ["0.tar.gz", "gunzip"]),
    ("gz", ["0.tar.gz", "gunzip"]), ("hidden/0.tar", ["0.tar", "gunzip"]), ("html/0.tar", ["0.tar"]),
    ("broken/0.parquet", ["0.parquet"]), ("urls/0.parquet", ["0.parquet", "url", "img2dataset"]),
    ("empty/0.tar", ["0.tar"])])
def test_what_cannot_be_read_is_refused_in_one_line(three: Path, jpg: bytes, given: object, named: list[str],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    root = three.parent
    monkeypatch.chdir(root)
    tar(root / "of" / "z.tar", {"1.jpg": jpg})
    shutil.move(root / "of" / "z.tar", root / "z.tar")
    (root / "of" / "b").mkdir()
    for path in ("of", "twice", "split", "gz", "hidden", "html", "broken", "urls", "empty"):
        (root / path).mkdir(exist_ok=True)
    shutil.copy(root / "z.tar", root / "split" / "train-test.tar")
    shutil.copy(root / "z.tar", root / "twice" / "0.tar")
    table(root / "twice" / "0.parquet", [{"jpg": jpg}])
    with tarfile.open(root / "gz" / "0.tar.gz", "w:gz") as archive:
        archive.add(root / "z.tar", "1.jpg")
    shutil.copy(root / "gz" / "0.tar.gz", root / "hidden" / "0.tar")
    (root / "html" / "0.tar").write_text("<html>gone</html>" * 99)
    (root / "broken" / "0.parquet").write_bytes(b"PAR1 and no more")
    table(root / "urls" / "0.parquet", [{"url": "http://127.0.0.1/1.jpg", "caption": "a"}])
    (root / "empty" / "0.tar").touch()
    if given == ["s/a-val-0.tar", "of/z.tar"]:
        shutil.copy(root / "z.tar", root / "of" / "z.tar")
    with refused(*named):
        read(root, given)


@pytest.mark.parametrize("given", ["''", "[]", "{training: a}", "7", "{train: []}"])
def test_settings_that_name_no_shards(given: str) -> None:
    with refused("data.shards", error=ConfigError):
        config_from_dict(RECIPE, [f"data.shards={given}"])


# ---- the index ---------------------------------------------------------------------------------------------------


def test_a_shard_is_looked_through_once(tmp_path: Path, jpg: bytes, monkeypatch: pytest.MonkeyPatch,
                                        caplog: pytest.LogCaptureFixture) -> None:
    """Also where the first start was killed after some of the shards; what changed is looked through again."""
    for shard in range(3):
        tar(tmp_path / "shards" / f"{shard}.tar", {"1.jpg": jpg, "2.txt": b"alone"})
    looked, whole = [], tars._members

    def counted(file: Any, path: str, found: Any) -> Any:
        looked.append(Path(path).name)
        if len(looked) == 2:
            raise KeyboardInterrupt
        return whole(file, path, found)

    monkeypatch.setattr(tars, "_members", counted)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path)
    first = read(tmp_path)
    assert looked == ["0.tar", "1.tar", "1.tar", "2.tar"]
    said = notes(caplog)
    caplog.clear()
    assert read(tmp_path) == first and len(looked) == 4
    assert notes(caplog) == said and "left out: 3" in said, "what was left out is said at each start"
    tar(tmp_path / "shards" / "1.tar", {"1.jpg": jpg, "9.jpg": jpg})
    assert "1/9" in keys(read(tmp_path)) and looked[4:] == ["1.tar"]
    assert len(read(tmp_path, None, "data.shards_captions=[txt]")) == len(first) + 1
    assert looked[5:] == ["0.tar", "1.tar", "2.tar"]


def test_the_table_of_many_samples_is_kept_as_long_as_its_shards_stay(tmp_path: Path, jpg: bytes,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MANY", 1)
    tar(tmp_path / "shards" / "0.tar", {f"{n}.jpg": jpg for n in range(20)})
    first = read_tables(config_of(tmp_path), SPLITS)
    monkeypatch.setattr("trimodal.sets.shards.read_shards", lambda *_: pytest.fail("read again"))
    second = read_tables(config_of(tmp_path), SPLITS)
    assert {split: table.digest() for split, table in first.items()} == {
        split: table.digest() for split, table in second.items()}
    monkeypatch.undo()
    tar(tmp_path / "shards" / "0.tar", {f"{n}.jpg": jpg for n in range(30)})
    assert sum(map(len, read_tables(config_of(tmp_path), SPLITS).values())) == 30
