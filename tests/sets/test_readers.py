"""Each reader against a tiny tree in its set's exact layout, traps included; nothing stands on two sides."""

import json
import logging
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import trees
from tests.refusals import assert_names, refused
from trimodal.config import Config, load_config
from trimodal.data.audio import decode_audio, log_mel
from trimodal.data.images import decode_image
from trimodal.data.samples import SPLITS, BrokenSample, Sample, SampleTable, normalise_caption
from trimodal.sets import download_command, read_split
from trimodal.sets.reading import draw_splits


def setting(root: Path, **data: object) -> Config:
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    return load_config(None, [f"paths.data_root={json.dumps(str(root))}", *overrides])


def read(name: str, root: Path, **data: object) -> dict[str, list[Sample]]:
    config = setting(root, **data)
    return {split: list(read_split(name, split, config)) for split in SPLITS}


def keys(samples: list[Sample]) -> list[str]:
    return [sample.key for sample in samples]


def only_record(caplog: pytest.LogCaptureFixture) -> str:
    [record] = caplog.records
    return record.getMessage()


# ---- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [trees.coco, trees.clotho, trees.audiocaps, trees.voxceleb, trees.stamps])
def test_all_samples_are_whole(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """Unique keys, absolute paths of files that decode, captions with words, nothing on two sides."""
    root = write(tmp_path)
    found = read(root.name, tmp_path)
    seen: dict[str, str] = {}
    for split, samples in found.items():
        assert samples and len(set(keys(samples))) == len(samples)
        table = SampleTable.pack(samples)
        assert len(table) == len(samples)
        for i, sample in enumerate(samples):
            assert (sample.source, sample.split) == (root.name, split)
            assert len({normalise_caption(text) for text in sample.captions} - {""}) == len(table[i].captions)
            for path in {sample.image, sample.audio} - {""}:
                assert os.path.isabs(path) and seen.setdefault(path, split) == split
            if sample.image:
                assert decode_image(sample.image).ndim == 3
            if sample.audio:
                assert log_mel(decode_audio(sample.audio)).shape[1] == 80
    assert read(root.name, tmp_path) == found


@pytest.mark.parametrize("write", [trees.coco, trees.clotho, trees.audiocaps, trees.voxceleb, trees.stamps])
def test_hidden_files_are_none_of_the_samples(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    root = write(tmp_path)
    found = read(root.name, tmp_path)
    assert trees.with_shadows(root) > 10
    for place in ("voxceleb1/wav/.trash", "train/.trash", ".trash"):
        shutil.copytree(root, tmp_path / "copy", dirs_exist_ok=True)
        (tmp_path / "copy").rename(root / place) if (root / place).parent.is_dir() else None
    assert read(root.name, tmp_path) == found


@pytest.mark.parametrize("name", ["coco", "clotho", "audiocaps", "voxceleb", "stamps"])
@pytest.mark.parametrize("empty_folder", [False, True])
def test_missing_data_names_the_command(tmp_path: Path, name: str, empty_folder: bool) -> None:
    """Raised by the call, before anything is iterated."""
    root = tmp_path / "my data"
    (root / (name if empty_folder else "other")).mkdir(parents=True)
    command = f"python download_datasets.py --datasets {name} --data-root '{root}'"
    with refused(root / name if empty_folder else root, command):
        read_split(name, "train", setting(root))


def test_command_keeps_the_data_root_as_it_was_typed() -> None:
    assert (download_command("coco", Config())
            == "python download_datasets.py --datasets coco --data-root ./data")


def test_unknown_set_and_split(tmp_path: Path) -> None:
    with refused("data.datasets", "'cocoo'", "'coco'"):
        read_split("cocoo", "train", setting(tmp_path))
    with refused("split", "'dev'", *SPLITS):
        read_split("coco", "dev", setting(tmp_path))


def test_drawn_splits_are_the_same_for_everybody() -> None:
    drawn = draw_splits([f"unit {i}" for i in range(20)], 4, 2)
    assert {unit for unit, split in drawn.items() if split == "test"} == {"unit 13", "unit 19", "unit 4", "unit 9"}
    assert {unit for unit, split in drawn.items() if split == "val"} == {"unit 1", "unit 2"}
    assert draw_splits([f"unit {i}" for i in (*range(19, -1, -1), 3, 3)], 4, 2) == drawn
    assert draw_splits(["only"], 4, 2) == {"only": "test"} and draw_splits([], 1, 1) == {}


# ---- COCO --------------------------------------------------------------------------------------------------------


def test_coco_karpathy(tmp_path: Path) -> None:
    trees.coco(tmp_path)
    for asked in ("auto", "karpathy"):
        found = read("coco", tmp_path, coco_split=asked)
        for split, samples in found.items():
            of_side = ("train", "restval") if split == "train" else (split,)
            assert keys(samples) == [str(i) for i in (*trees.COCO_TRAIN, *trees.COCO_VAL)
                                     if trees.karpathy_side(i) in of_side]
        for split in ("val", "test"):  # each of them has images in both folders of 2017
            assert {Path(sample.image).parent.name for sample in found[split]} == {"train2017", "val2017"}


def test_coco_2017(tmp_path: Path) -> None:
    trees.coco(tmp_path)  # the list of Karpathy's split is there, and not used
    found = read("coco", tmp_path, coco_split="2017")
    assert keys(found["test"]) == [str(i) for i in trees.COCO_VAL]
    assert len(found["val"]) == 2 and len(found["train"]) == 38  # 5 % of 40
    assert sorted(map(int, keys(found["train"]) + keys(found["val"]))) == list(trees.COCO_TRAIN)


def test_coco_without_karpathy(tmp_path: Path) -> None:
    trees.coco(tmp_path, karpathy=False)
    assert read("coco", tmp_path, coco_split="auto") == read("coco", tmp_path, coco_split="2017")
    config = setting(tmp_path, coco_split="karpathy")
    with refused(tmp_path / "coco/annotations/dataset_coco.json", download_command("coco", config)):
        read_split("coco", "train", config)


def test_coco_2017_sides_do_not_depend_on_what_is_on_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = trees.coco(tmp_path, karpathy=False)
    before = read("coco", tmp_path)
    gone = before["train"][3]
    os.remove(gone.image)
    after = read("coco", tmp_path)
    assert after["val"] == before["val"] and after["train"] == [s for s in before["train"] if s != gone]
    assert_names(only_record(caplog), "coco", "train", 1, 38, Path(gone.image).name)
    for name in os.listdir(root / "train2017")[:5]:
        os.remove(root / "train2017" / name)
    gone_now = 38 - sum(os.path.exists(sample.image) for sample in before["train"])
    with refused("coco", "train", gone_now, 38, download_command("coco", setting(tmp_path)), "data.max_bad_pct", 5):
        list(read_split("coco", "train", setting(tmp_path)))


def test_coco_folder_that_is_missing_is_not_made_up_for_by_the_other(tmp_path: Path) -> None:
    """With val2017 alone, Karpathy's training images would shrink to a few without a word."""
    root = trees.coco(tmp_path)
    shutil.rmtree(root / "train2017")
    config = setting(tmp_path, max_bad_pct=100.0)
    with refused(root / "train2017", download_command("coco", config)):
        read_split("coco", "train", config)


def test_coco_labels_and_captions(tmp_path: Path) -> None:
    """Ids with gaps become names, a crowd counts, an image without instances has none, blanks go."""
    trees.coco(tmp_path)
    by_id = {int(sample.key): sample for samples in read("coco", tmp_path).values() for sample in samples}
    for image_id in trees.COCO_BARE:
        assert by_id[image_id].labels == ()
    assert by_id[9].labels == ("dog", "toothbrush")
    assert by_id[trees.COCO_CROWD].labels == ("person", "dog")
    first, on_a_table, double, blank, one = trees.coco_texts(9)
    assert normalise_caption(double) == normalise_caption(first) and not blank.strip()
    assert by_id[9].captions == (first, on_a_table, double.strip(), one)
    table = SampleTable.pack([by_id[9]])
    assert table[0].captions == (first, on_a_table, one) and table.caption_times.tolist() == [2, 1, 1]
    same = [sample for sample in by_id.values() if sample.captions == by_id[9].captions]
    assert len(same) > 1  # words that several images share are kept in each


def test_coco_pictures(tmp_path: Path) -> None:
    """Grey, CMYK and turned pictures are there, and decode."""
    trees.coco(tmp_path, broken=True)
    by_id = {int(sample.key): sample.image for samples in read("coco", tmp_path).values() for sample in samples}
    grey = decode_image(by_id[trees.COCO_GREY])
    assert (grey[..., 0] == grey[..., 1]).all() and grey.shape == (48, 64, 3)
    assert decode_image(by_id[trees.COCO_CMYK]).shape == (48, 64, 3)
    assert decode_image(by_id[trees.COCO_TURNED]).shape == (64, 48, 3)
    with refused(by_id[trees.COCO_TRUNCATED], error=BrokenSample):  # a reader decodes nothing: the loader finds it
        decode_image(by_id[trees.COCO_TRUNCATED])


def test_coco_labels_are_read_anew_when_the_file_changes(tmp_path: Path) -> None:
    root = trees.coco(tmp_path)
    before = read("coco", tmp_path)["train"][0]
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace('"person", "name": "person"', '"person", "name": "human"')
                    .replace('"supercategory": "person", "id": 1, "name": "person"',
                             '"supercategory": "person", "id": 1, "name": "human"'))
    os.utime(path, (1, 1))
    after = read("coco", tmp_path)["train"][0]
    assert "person" in before.labels and "human" in after.labels


def test_coco_damaged_list(tmp_path: Path) -> None:
    root = trees.coco(tmp_path)
    trees.truncate(root / "annotations" / "captions_val2017.json")
    with refused(root / "annotations/captions_val2017.json"):
        read_split("coco", "test", setting(tmp_path, coco_split="2017"))


# ---- Clotho ------------------------------------------------------------------------------------------------------


def test_clotho(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trees.clotho(tmp_path)
    found = read("clotho", tmp_path)
    shared = {trees.CLOTHO_SHARED_NAME, trees.CLOTHO_SHARED_ID}
    assert set(keys(found["train"])) == set(trees.CLOTHO["development"]) - shared
    assert keys(found["val"]) == list(trees.CLOTHO["validation"])
    assert keys(found["test"]) == list(trees.CLOTHO["evaluation"])
    assert {" Ambience Birds.wav", "KOOKABURRA..WAV.wav", "ópera.wav"} <= set(keys(found["train"]))
    assert_names(only_record(caplog), "clotho", "train", *shared)
    table = SampleTable.pack(found["test"])
    assert table[0].captions == (
        "Something is heard once at 0 in evaluation", "Something is heard twice, then stops at 0 in evaluation",
        "Something is heard far off at 0 in evaluation")
    assert table.caption_times[:3].tolist() == [2, 1, 1], "one stands there in capitals, too"


def test_clotho_unpacked_on_a_mac_and_in_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names with accents in another Unicode form; the first files that are not there are named."""
    root = trees.clotho(tmp_path)
    before = read("clotho", tmp_path)
    (root / "development" / "ópera.wav").rename(root / "development" / unicodedata.normalize("NFD", "ópera.wav"))
    assert keys(read("clotho", tmp_path)["train"]) == keys(before["train"])
    caplog.clear()
    os.remove(before["train"][0].audio)
    with refused("clotho", "train", 1, before["train"][0].key, "data.max_bad_pct"):
        list(read_split("clotho", "train", setting(tmp_path)))


def test_clotho_metadata_are_iso_8859_1(tmp_path: Path) -> None:
    root = trees.clotho(tmp_path)
    content = (root / "clotho_metadata_development.csv").read_bytes()
    with pytest.raises(UnicodeDecodeError):
        content.decode("utf-8")
    assert read("clotho", tmp_path)["train"]


@pytest.mark.parametrize("name", ["clotho_captions_development.csv", "clotho_metadata_evaluation.csv"])
def test_clotho_list_missing(tmp_path: Path, name: str) -> None:
    path = trees.clotho(tmp_path) / name
    os.remove(path)
    with refused(path, download_command("clotho", setting(tmp_path))):
        read_split("clotho", "train", setting(tmp_path))


def test_clotho_half_extracted(tmp_path: Path) -> None:
    root = trees.clotho(tmp_path)
    os.remove(root / "development" / "thing 1.wav")
    os.remove(root / "development" / "thing 2.wav")
    with refused("clotho", "train", 2, 12, download_command("clotho", setting(tmp_path)), "data.max_bad_pct"):
        list(read_split("clotho", "train", setting(tmp_path)))
    assert len(list(read_split("clotho", "train", setting(tmp_path, max_bad_pct=20.0)))) == 10


def test_list_with_wrong_columns_or_short_lines(tmp_path: Path) -> None:
    path = trees.clotho(tmp_path) / "clotho_captions_validation.csv"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace("caption_5", "caption_6"), encoding="utf-8")
    with refused(path, "'caption_5'"):
        read_split("clotho", "val", setting(tmp_path))
    path.write_text(whole + "cut off.wav,A sound\n", encoding="utf-8")
    with refused(path, "line 5", 2, 6):
        read_split("clotho", "val", setting(tmp_path))


# ---- AudioCaps ---------------------------------------------------------------------------------------------------


def test_audiocaps_finds_clips_under_each_naming(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trees.audiocaps(tmp_path)
    found = read("audiocaps", tmp_path)
    for split, clips in trees.AUDIOCAPS.items():
        expected = {f"{video}_{start}": name for video, start, name in clips if name}
        assert {s.key: Path(s.audio).relative_to(tmp_path / "audiocaps").as_posix() for s in found[split]} == expected
    assert found["train"][0].key.startswith("-")
    assert [len(sample.captions) for sample in found["train"]] == [1] * 7
    assert [len(sample.captions) for sample in found["test"]] == [5, 5]
    assert {(s.start_s, s.duration_s) for s in found["train"]} == {(0.0, 0.0)}  # a file is the clip, not the video
    train, test = (record.getMessage() for record in caplog.records)
    assert_names(train, "audiocaps", "train", 1, 8)
    assert_names(test, "audiocaps", "test", 1, 3)


def test_audiocaps_version_2(tmp_path: Path) -> None:
    trees.audiocaps(tmp_path, version=2)
    found = read("audiocaps", tmp_path, audiocaps_version=2)
    assert [len(sample.captions) for sample in found["train"]] == [2] * 7
    with refused(download_command("audiocaps", setting(tmp_path))) as caught:
        read_split("audiocaps", "train", setting(tmp_path))
    assert f"{tmp_path}/audiocaps/dataset/" in str(caught.value)


@pytest.mark.parametrize("suffix", [".webm", ".opus", ".MP4", ".mkv"])
def test_audiocaps_may_have_clips_of_any_kind_that_holds_sound(tmp_path: Path, suffix: str) -> None:
    root = trees.audiocaps(tmp_path)
    before = keys(read("audiocaps", tmp_path)["train"])
    clip = root / "train" / "-0a1B2c3D4e_30.flac"
    clip.rename(clip.with_suffix(suffix))
    assert keys(read("audiocaps", tmp_path)["train"]) == before


def test_audiocaps_never_takes_a_file_of_another_split(tmp_path: Path) -> None:
    root = trees.audiocaps(tmp_path)
    shutil.move(root / "train" / "-0a1B2c3D4e_30.flac", root / "test" / "-0a1B2c3D4e_30.flac")
    assert "-0a1B2c3D4e_30" not in keys(read("audiocaps", tmp_path)["train"])


def test_audiocaps_drops_training_clips_of_test_videos(tmp_path: Path) -> None:
    root = trees.audiocaps(tmp_path)
    with (root / "dataset" / "test.csv").open("a", encoding="utf-8") as file:
        file.write("9999,fG6h7I8j9k0,300,Another part of a training video\n")
    assert "fG6h7I8j9k0_70" not in keys(read("audiocaps", tmp_path)["train"])


def test_audiocaps_prefers_lossless(tmp_path: Path) -> None:
    root = trees.audiocaps(tmp_path)
    trees.sound(root / "train" / "fG6h7I8j9k0_70.mp3", trees.tone())
    trees.sound(root / "train" / "extra" / "fG6h7I8j9k0_70.wav", trees.tone())
    (sample,) = [s for s in read("audiocaps", tmp_path)["train"] if s.key == "fG6h7I8j9k0_70"]
    assert sample.audio.endswith(".wav")


# ---- VoxCeleb ----------------------------------------------------------------------------------------------------


def test_voxceleb_1(tmp_path: Path) -> None:
    trees.voxceleb(tmp_path, vox2=False)
    found = read("voxceleb", tmp_path)
    videos = trees.VOX1[:3]
    assert keys(found["train"]) == [f"vox1/{video}/00001" for video in videos]
    assert keys(found["val"]) == [f"vox1/{video}/00002" for video in videos]
    assert {sample.speaker for sample in found["test"]} == {"id10270", "id10309"} and len(found["test"]) == 6
    assert all(not sample.captions and not sample.image for samples in found.values() for sample in samples)


def test_voxceleb_1_test_speakers_are_never_trained_on(tmp_path: Path) -> None:
    """Not even without the metadata; and the metadata add to the known forty, typing error and all."""
    root = trees.voxceleb(tmp_path, vox2=False) / "voxceleb1"
    os.remove(root / "vox1_meta.csv")
    assert {s.speaker for s in read("voxceleb", tmp_path)["train"]} == {"id10001", "id10002"}
    trees.rows(root / "vox1_meta.csv", [("VoxCeleb1 ID", "Set"), ("id10002", "testo ")], delimiter="\t")
    assert {s.speaker for s in read("voxceleb", tmp_path)["train"]} == {"id10001"}


def test_voxceleb_1_without_its_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = trees.voxceleb(tmp_path, vox2=False) / "voxceleb1"
    os.remove(root / "iden_split.txt")
    found = read("voxceleb", tmp_path)
    assert len(found["train"]) + len(found["val"]) == 9 and len(found["test"]) == 6
    for record in caplog.records:
        assert_names(record.getMessage(), "voxceleb", root / "iden_split.txt", 5)
    assert caplog.records


def test_voxceleb_2_keeps_whole_videos_together(tmp_path: Path) -> None:
    root = trees.voxceleb(tmp_path, vox1=False, video_files=False) / "voxceleb2"
    for number in range(100):
        for utterance in ("00001.m4a", "00002.m4a"):
            path = root / "dev" / "aac" / "id00012" / f"video{number:06d}" / utterance
            path.parent.mkdir(exist_ok=True)
            path.touch()
    found = read("voxceleb", tmp_path)
    videos = {split: {key.rpartition("/")[0] for key in keys(samples)} for split, samples in found.items()}
    assert not videos["train"] & videos["val"]
    assert 1 <= len(videos["val"]) <= 15 and len(found["val"]) == 2 * len(videos["val"])


def test_voxceleb_2_as_wav(tmp_path: Path) -> None:
    """Alone, beside the m4a in one folder, and in a folder of its own beside those of m4a and video."""
    root = trees.voxceleb(tmp_path, vox1=False) / "voxceleb2"
    (root / "aac").rename(root / "test")  # as `--local` places it
    (root / "test/wav").mkdir(parents=True)
    for path in list((root / "test").glob("id*")):
        path.rename(root / "test/wav" / path.name)
    before = read("voxceleb", tmp_path)
    for path in list(root.rglob("*.m4a")):
        trees.sound(path.with_suffix(".wav"), trees.tone(0.5))
    both = read("voxceleb", tmp_path)
    assert {split: keys(samples) for split, samples in both.items()} == {
        split: keys(samples) for split, samples in before.items()}
    (root / "dev/aac").rename(root / "dev/wav")
    apart = read("voxceleb", tmp_path)
    for path in [*root.rglob("*.m4a"), *root.rglob("*.mp4")]:
        path.unlink()
    alone = read("voxceleb", tmp_path)
    for found in (apart, alone):
        assert {split: keys(samples) for split, samples in found.items()} == {
            split: keys(samples) for split, samples in before.items()}
        assert {s.audio[-4:] for samples in found.values() for s in samples} == {".wav"}
    assert {s.image[-4:] for s in [*apart["train"], *apart["val"]]} == {".mp4"}


def test_voxceleb_2_sound_and_video(tmp_path: Path) -> None:
    root = trees.voxceleb(tmp_path, vox1=False) / "voxceleb2"
    os.remove(root / "dev" / "aac" / "id00012" / "21Uxsk56VDQ" / "00001.m4a")
    os.remove(root / "dev" / "mp4" / "id00015" / "0fijmz4vTVU" / "00001.mp4")
    found = read("voxceleb", tmp_path)
    media = {s.key: (s.image[-4:], s.audio[-4:]) for samples in found.values() for s in samples}
    assert media == {
        "vox2/id00012/21Uxsk56VDQ/00001": (".mp4", ".mp4"),  # a frame and its sound
        "vox2/id00012/2DLq_Kkc1r8/00001": (".mp4", ".m4a"),
        "vox2/id00015/0fijmz4vTVU/00001": ("", ".m4a"),
        "vox2/id00016/padded000000/00001": (".mp4", ".m4a"),
        "vox2/id00017/01dfn2spqyE/00001": ("", ".m4a")}
    assert {s.speaker for s in found["test"]} == {"id00016", "id00017"}  # one by the padded list with its mark


def test_voxceleb_2_test_folder_under_either_name(tmp_path: Path) -> None:
    root = trees.voxceleb(tmp_path, vox1=False) / "voxceleb2"
    before = keys(read("voxceleb", tmp_path)["test"])
    (root / "test").mkdir()
    shutil.move(root / "aac", root / "test" / "aac")
    assert keys(read("voxceleb", tmp_path)["test"]) == before


# ---- stamps ------------------------------------------------------------------------------------------------------


def test_stamps(tmp_path: Path) -> None:
    root = trees.stamps(tmp_path, captions=20)
    found = {sample.key: sample for samples in read("stamps", tmp_path).values() for sample in samples}
    assert len(found) == 25
    assert {"animals/blank", "animals/wordless", "animals/quiet"} & found.keys() == set()
    for name in ("silent", "empty", "damaged"):
        assert found[f"animals/{name}"].audio == "" and found[f"animals/{name}"].image
    assert found["animals/drawn"].image == "" and found["animals/drawn"].audio == str(root / "animals/drawn.wav")
    first = found["animals/birds/red-apple-0"]
    assert first.captions == ("A red apple.",) and first.labels == ("animals",)
    assert first.image == str(root / "animals/birds/red-apple-0.png") and first.audio == first.image[:-4] + ".ogg"
    assert sum(bool(sample.audio) for sample in found.values()) == 6


def test_stamps_split_by_caption(tmp_path: Path) -> None:
    """20, 10 and 70 % of 24 captions; the two that say the same are together."""
    trees.stamps(tmp_path, captions=20)
    found = read("stamps", tmp_path)
    captions = {split: {normalise_caption(s.captions[0]) for s in samples} for split, samples in found.items()}
    assert {split: len(texts) for split, texts in captions.items()} == {"train": 17, "val": 2, "test": 5}
    side = {s.key: split for split, samples in found.items() for s in samples}
    assert side["animals/twin"] == side["animals/birds/red-apple-0"]


def test_each_stamp_is_test_in_one_fold_and_fold_0_is_the_usual_split(tmp_path: Path) -> None:
    trees.stamps(tmp_path, captions=23)  # 27 with the odd ones
    folds = [read("stamps", tmp_path, fold=fold, datasets=["stamps"]) for fold in range(5)]
    assert folds[0] == read("stamps", tmp_path)
    test = [{normalise_caption(sample.captions[0]) for sample in fold["test"]} for fold in folds]
    assert len(set().union(*test)) == sum(map(len, test)) == 27 and {len(part) for part in test} == {5, 6}
    for fold, part in zip(folds, test, strict=True):
        others = [{normalise_caption(sample.captions[0]) for sample in fold[name]} for name in ("val", "train")]
        assert len(others[0]) == 3 and sum(map(len, (part, *others))) == len(part.union(*others))


def test_stamps_have_chinese_captions_and_the_same_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trees.stamps(tmp_path, captions=20)
    (tmp_path / "stamps" / "animals" / "empty.txt").write_text("An empty nest.\n", "utf-8")
    english = read("stamps", tmp_path)
    assert not caplog.records
    both, chinese = (read("stamps", tmp_path, languages=names) for names in (["en", "zh"], ["zh"]))
    for split in SPLITS:
        assert [s.key for s in both[split]] == [s.key for s in chinese[split]] == [s.key for s in english[split]]
        for one, two, three in zip(english[split], both[split], chinese[split], strict=True):
            assert one.languages == ("en",) and set(two.languages) - {"en"} == set(three.languages) <= {"zh"}
            assert two.captions == one.captions + three.captions and len(set(two.captions)) == len(two.captions)
    told = {s.key: s.captions for samples in chinese.values() for s in samples}
    assert ("第3张图片",) in told.values() and told["animals/empty"] == ()
    (line,) = {record.getMessage() for record in caplog.records}
    assert_names(line, "stamps", "zh", sum(not captions for captions in told.values()))


def test_a_chinese_caption_stands_on_one_side(tmp_path: Path) -> None:
    """Two English ones may have one translation: it is not learnt from a picture and asked of another."""
    trees.stamps(tmp_path, captions=40)
    for path in (tmp_path / "stamps").rglob("*-[0-9]*.txt"):
        path.write_text(f"{path.read_text('utf-8').splitlines()[0]}\nzh_CN.utf8=图片{len(path.stem) % 3}\n", "utf-8")
    found = read("stamps", tmp_path, languages=["zh"])
    texts = [{text for sample in found[split] for text in sample.captions} for split in ("test", "val", "train")]
    assert texts[0] and not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_stamps_without_symbols_stay_on_their_sides(tmp_path: Path) -> None:
    trees.stamps(tmp_path)
    whole, part = read("stamps", tmp_path), read("stamps", tmp_path, stamps_symbols=False)
    for split in SPLITS:
        assert part[split] == [sample for sample in whole[split] if not sample.key.startswith("symbols/")]
    assert sum(map(len, part.values())) == sum(map(len, whole.values())) - 5


def test_stamps_sides_depend_neither_on_the_training_seed_nor_on_sounds(tmp_path: Path) -> None:
    root = trees.stamps(tmp_path)
    before = {s.key: s.split for samples in read("stamps", tmp_path).values() for s in samples}
    for path in root.rglob("*.ogg"):
        path.write_bytes(b"")
    config = load_config(None, [f"paths.data_root={tmp_path}", "training.seed=5"])
    after = {s.key: s.split for split in SPLITS for s in read_split("stamps", split, config)}
    assert after == before


# ---- drawn and own data ------------------------------------------------------------------------------------------


def test_synthetic_needs_no_files(tmp_path: Path) -> None:
    found = read("synthetic", tmp_path / "none", synthetic_images=256, synthetic_sounds=128)
    assert {split: len(samples) for split, samples in found.items()} == {"train": 192, "val": 96, "test": 96}


def test_manifest(tmp_path: Path) -> None:
    path = trees.manifest(tmp_path / "mine")
    found = read("manifest", tmp_path / "none", manifest=str(path))
    assert {split: len(samples) for split, samples in found.items()} == {"train": 15, "val": 2, "test": 3}
    assert all(sum(bool(getattr(one, kind)) for one in found["val"]) == 2 for kind in ("image", "audio"))
    with refused("data.manifest"):
        read_split("manifest", "train", setting(tmp_path))


def test_logging_is_quiet_where_nothing_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trees.coco(tmp_path)
    with caplog.at_level(logging.DEBUG):
        read("coco", tmp_path)
    assert caplog.text == ""
