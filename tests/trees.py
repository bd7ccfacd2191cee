"""Writes tiny data sets in the exact layouts of the official ones, with their traps in them.

    trees.coco(tmp_path); trees.stamps(tmp_path)     # tmp_path is then a data root

Files are good unless `broken=True` adds a truncated picture or an empty sound to the training split. Sounds of pure
silence and without length always stand in `stamps`, whose reader tells them.
"""

import csv
import fractions
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (230, 210, 40),
           "grey": (128, 128, 128), "brown": (120, 80, 40), "pink": (240, 150, 190), "purple": (140, 50, 170)}
THINGS = ("apple", "boat", "cup", "dog", "egg", "frog", "goat", "hat")


# --- single files ----------------------------------------------------------------------------------------------------


def picture(path: Path, colour: Sequence[int] = (220, 40, 40), size: tuple[int, int] = (40, 30), mode: str = "RGB",
            orientation: int = 1) -> Path:
    """A plain picture of `size` (width, height) in `mode`; the format is the suffix's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, tuple(colour)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def noise(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    """A picture of `size` (width, height) that no compression makes small; the format is the suffix's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
    return path


def truncate(path: Path, keep: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def tone(seconds: float = 1.0, rate_hz: int = 16_000, hz: float = 440.0) -> np.ndarray:
    """A sine of a quarter of full scale, float32 [S]."""
    return (0.25 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def sound(path: Path, samples: np.ndarray, rate_hz: int = 16_000, channels: int = 1) -> Path:
    """`samples` [S] on every channel, or [S, channels]: wav, flac, ogg or mp3, else AAC, or Opus in webm."""
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    planes = samples if samples.ndim == 2 else np.tile(samples[:, None], (1, channels))
    if path.suffix in (".wav", ".flac", ".ogg", ".mp3"):
        soundfile.write(path, planes, rate_hz)
    else:
        _media(path, [], planes, rate_hz)
    return path


def video(path: Path, frames: Iterable[Sequence[int]], samples: np.ndarray | None = None, size: int = 32,
          rate_hz: int = 16_000) -> Path:
    """One plain frame for each colour of `frames` at 25 per second, with a sound where `samples` are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _media(path, [np.full((size, 2 * size, 3), colour, np.uint8) for colour in frames],
           None if samples is None else samples[:, None], rate_hz)
    return path


def _media(path: Path, frames: Sequence[np.ndarray], planes: np.ndarray | None, rate_hz: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        codec = "libopus" if path.suffix == ".webm" else "aac"
        layout = "stereo" if planes is not None and planes.shape[1] == 2 else "mono"
        pictures = container.add_stream("mpeg4", rate=25) if frames else None
        voice = container.add_stream(codec, rate=rate_hz, layout=layout) if planes is not None else None
        if pictures is not None:
            pictures.height, pictures.width = frames[0].shape[:2]
            for array in frames:
                container.mux(pictures.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(pictures.encode(None))
        if voice is not None and planes is not None:
            voice.bit_rate = 128_000
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(planes.T, np.float32), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, fractions.Fraction(1, rate_hz)
            to_codec = av.AudioResampler(format=voice.format, layout=layout, rate=rate_hz)
            for part in [*to_codec.resample(frame), *to_codec.resample(None)]:
                container.mux(voice.encode(part))
            container.mux(voice.encode(None))


def rows(path: Path, table: Iterable[Sequence[object]], encoding: str = "utf-8", delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(table)
    return path


# --- COCO: 40 images of train2017 (ids 9, 18, ... 360), 8 of val2017 (ids 1009, 1018, ...) ---------------------------

COCO_TRAIN = tuple(range(9, 361, 9))
COCO_VAL = tuple(range(1009, 1081, 9))
COCO_CATEGORIES = {1: ("person", "person"), 18: ("animal", "dog"), 90: ("indoor", "toothbrush")}  # ids with gaps
COCO_BARE = (90, 180)  # images without instances
COCO_GREY, COCO_CMYK, COCO_TURNED, COCO_TRUNCATED = 18, 27, 36, 45
COCO_CROWD = 54


def coco(data_root: Path, karpathy: bool = True, broken: bool = False) -> Path:
    root = data_root / "coco"
    for part, ids in (("train2017", COCO_TRAIN), ("val2017", COCO_VAL)):
        for image_id in ids:
            mode = {COCO_GREY: "L", COCO_CMYK: "CMYK"}.get(image_id, "RGB")
            path = picture(root / part / f"{image_id:012d}.jpg", _colour(image_id)[1], (64, 48), mode,
                           6 if image_id == COCO_TURNED else 1)
            if broken and image_id == COCO_TRUNCATED:
                truncate(path)
        _write(root / "annotations" / f"captions_{part}.json", _coco_captions(ids))
        _write(root / "annotations" / f"instances_{part}.json", _coco_instances(ids))
    if karpathy:
        _write(root / "annotations" / "dataset_coco.json", _karpathy())
    return root


def _coco_image(image_id: int) -> dict[str, object]:
    return {"license": 1, "file_name": f"{image_id:012d}.jpg", "coco_url": "http://example.org/1.jpg", "height": 48,
            "width": 64, "date_captured": "2013-11-14 17:02:52", "flickr_url": "http://example.org/1.jpg",
            "id": image_id}


def coco_texts(image_id: int) -> list[str]:
    """Five captions: two of them the same but for case and point, one of blanks alone."""
    name = _colour(image_id)[0]
    thing = THINGS[image_id // 9 % len(THINGS)]
    return [f"A {name} {thing}.", f"A {name} {thing} on a table", f"a {name}  {thing}", "  ", f"One {thing} in {name}."]


def _coco_captions(ids: Sequence[int]) -> dict[str, object]:
    notes = [{"image_id": image_id, "id": 10 * image_id + i, "caption": text}
             for i in range(5) for image_id in ids for text in [coco_texts(image_id)[i]]]
    return {"info": {"year": 2017}, "licenses": [{"url": "", "id": 1, "name": "CC"}],
            "images": [_coco_image(image_id) for image_id in ids], "annotations": notes}


def _coco_instances(ids: Sequence[int]) -> dict[str, object]:
    numbers = tuple(COCO_CATEGORIES)
    notes = []
    for image_id in ids:
        for i in range(0 if image_id in COCO_BARE else 3):  # two of one category, one of the next
            category = numbers[(image_id // 9 + i // 2) % 3]
            crowd = image_id == COCO_CROWD and i == 2
            outline: object = {"counts": [272, 2, 4, 4], "size": [48, 64]} if crowd else [[1.5, 2, 30.25, 2, 30, 20.5]]
            notes.append({"segmentation": outline, "area": 10.5, "iscrowd": int(crowd), "image_id": image_id,
                          "bbox": [1.5, 2, 30, 20], "category_id": category,
                          "id": 900_000_000_000 + image_id if crowd else 100 * image_id + i})
    kinds = [{"supercategory": kind, "id": number, "name": name} for number, (kind, name) in COCO_CATEGORIES.items()]
    return {"info": {}, "licenses": [], "images": [_coco_image(i) for i in ids], "annotations": notes,
            "categories": kinds}


def karpathy_side(image_id: int) -> str:
    """Test and val lie in both folders of 2017, as they do in the real split."""
    if image_id % 2:
        return {9: "val", 27: "test", 1009: "val", 1027: "test"}.get(image_id, "train")
    return "restval"


def _karpathy() -> dict[str, object]:
    images = []
    for number, image_id in enumerate((*COCO_TRAIN, *COCO_VAL)):
        side = karpathy_side(image_id)
        folder = "train2014" if side == "train" else "val2014"
        sentences = [{"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 5 * number + i}
                     for i, text in enumerate(coco_texts(image_id))]
        images.append({"filepath": folder, "filename": f"COCO_{folder}_{image_id:012d}.jpg", "imgid": number,
                       "cocoid": image_id, "split": side, "sentids": [s["sentid"] for s in sentences],
                       "sentences": sentences})
    return {"images": images, "dataset": "coco"}


# --- Clotho ----------------------------------------------------------------------------------------------------------

CLOTHO_SHARED_NAME = "City Ambience w_ Car Passing_1-2.wav"  # in development and validation
CLOTHO_SHARED_ID = "shared recording.wav"  # in development; evaluation has its Freesound id under another name
CLOTHO = {
    "development": (" Ambience Birds.wav", "KOOKABURRA..WAV.wav", "20061208.waves.02.wav", "ópera.wav",
                    CLOTHO_SHARED_NAME, CLOTHO_SHARED_ID, *(f"thing {i}.wav" for i in range(8))),
    "validation": (" e ieio ieai.wav", CLOTHO_SHARED_NAME, "door.wav"),
    "evaluation": ("rain.wav", "the same recording.wav", "wind.wav"),
}


def clotho(data_root: Path, broken: bool = False) -> Path:
    root = data_root / "clotho"
    for folder, names in CLOTHO.items():
        captions: list[Sequence[object]] = [("file_name", *(f"caption_{i}" for i in range(1, 6)))]
        metadata: list[Sequence[object]] = [("file_name", "keywords", "sound_id", "sound_link", "start_end_samples",
                                             "manufacturer", "license")]
        for i, name in enumerate(names):
            rate_hz = 48_000 if i == 1 else 44_100
            sound(root / folder / name, tone(0.6, rate_hz, 200.0 * (i + 1)), rate_hz, channels=1 + (i == 2))
            texts = [f"Something is heard {how} at {i} in {folder}" for how in ("once", "twice, then stops", "far off")]
            captions.append((name, *texts, "   ", texts[0].upper() + "."))
            shared = name in (CLOTHO_SHARED_ID, "the same recording.wav")
            number = "86163" if shared else "Not found" if i == 0 else f"{list(CLOTHO).index(folder) + 1}00{i:02d}"
            metadata.append((name, "birds;Álamo", number, "http://example.org", "Not found", "someone", "CC0"))
        if broken and folder == "development":
            (root / folder / names[-1]).write_bytes(b"")
        rows(root / f"clotho_captions_{folder}.csv", captions)
        rows(root / f"clotho_metadata_{folder}.csv", metadata, encoding="iso-8859-1")
    return root


# --- AudioCaps -------------------------------------------------------------------------------------------------------

AUDIOCAPS = {  # (youtube id, start, name on disk below the set's folder or "" where the clip is gone)
    "train": (("-0a1B2c3D4e", 30, "train/-0a1B2c3D4e_30.flac"), ("_bC2d3E4f5g", 0, "train/Y_bC2d3E4f5g.wav"),
              ("cD3e4F5g6h7", 110, "train/1003.ogg"), ("dE4f5G6h7i8", 20, ""), ("eF5g6H7i8j9", 5, "eF5g6H7i8j9_5.wav"),
              ("fG6h7I8j9k0", 70, "train/fG6h7I8j9k0_70.flac"), ("gH7i8J9k0l1", 8, "train/gH7i8J9k0l1_8.flac"),
              ("hI8j9K0l1m2", 9, "train/hI8j9K0l1m2_9.flac")),
    "val": (("iJ9k0L1m2n3", 40, "val/iJ9k0L1m2n3_40.flac"), ("jK0l1M2n3o4", 41, "val/YjK0l1M2n3o4.wav")),
    "test": (("kL1m2N3o4p5", 50, "test/kL1m2N3o4p5_50.flac"), ("lM2n3O4p5q6", 51, ""),
             ("mN3o4P5q6r7", 52, "test/mN3o4P5q6r7_52.wav")),
}


def audiocaps(data_root: Path, version: int = 1, broken: bool = False) -> Path:
    root = data_root / "audiocaps"
    for split, clips in AUDIOCAPS.items():
        table: list[Sequence[object]] = [("audiocap_id", "youtube_id", "start_time", "caption")]
        for i, (video_id, start, name) in enumerate(clips):
            each = 5 if split != "train" else version  # captions a clip
            first_id = {"train": 1000, "val": 2000, "test": 3000}[split] + i + 1
            table += [(first_id + 100 * j, video_id, start, f"Sound {i} of {split}, told {j}") for j in range(each)]
            if name:
                rate_hz = (32_000, 48_000, 22_050, 8_000)[i % 4]
                sound(root / name, tone(0.8, rate_hz, 150.0 * (i + 1)), rate_hz, channels=1 + i % 2)
        if broken and split == "train":
            truncate(root / "train/hI8j9K0l1m2_9.flac", 0.01)
        rows(root / ("dataset" if version == 1 else "dataset2.0") / f"{split}.csv", table)
    return root


# --- VoxCeleb --------------------------------------------------------------------------------------------------------

VOX1 = ("id10001/1zcIwhmdeo4", "id10001/7gWzIy6yIIk", "id10002/0_laIeN-Q44", "id10270/5r0dWxy17C8",
        "id10309/0cYFdtyWVds")
VOX2_DEV = ("id00012/21Uxsk56VDQ", "id00012/2DLq_Kkc1r8", "id00015/0fijmz4vTVU", "id00016/padded000000")
VOX2_TEST = ("id00017/01dfn2spqyE",)


def voxceleb(data_root: Path, vox1: bool = True, vox2: bool = True, video_files: bool = True) -> Path:
    root = data_root / "voxceleb"
    if vox1:
        _vox1(root / "voxceleb1")
    if vox2:
        _vox2(root / "voxceleb2", video_files)
    return root


def _vox1(root: Path) -> None:
    lines = []
    for i, video_id in enumerate(VOX1):
        for utterance in range(1, 4):  # one each for training, development and test of identification
            sound(root / "wav" / video_id / f"{utterance:05d}.wav", tone(0.5, 16_000, 100.0 * (i + 1)))
            lines.append(f"{utterance} {video_id}/{utterance:05d}.wav\n")
    (root / "iden_split.txt").write_text("".join(lines), encoding="utf-8")
    rows(root / "vox1_meta.csv", [
        ("VoxCeleb1 ID", "VGGFace1 ID", "Gender", "Nationality", "Set"),
        ("id10001", "A.J._Buckley", "m", "Ireland", "dev"), ("id10002", "A.R._Rahman", "m", "India", "dev"),
        ("id10270", "Eartha_Kitt", "f", "USA", "test"), ("id10309", "Ernest_Borgnine", "m", "USA", "testo ")],
        delimiter="\t")


def _vox2(root: Path, video_files: bool) -> None:
    speech = tone(0.5, 16_000, 300.0)
    for video_id in VOX2_DEV:
        sound(root / "dev" / "aac" / video_id / "00001.m4a", speech)
        if video_files:
            video(root / "dev" / "mp4" / video_id / "00001.mp4", [(200, 40, 40)] * 5, speech)
    for video_id in VOX2_TEST:
        sound(root / "aac" / video_id / "00001.m4a", speech)  # as the archive unpacks, without a folder test/
    rows(root / "vox2_meta.csv", [
        ("VoxCeleb2 ID ", "VGGFace2 ID ", "Gender ", "Set "), ("id00012 ", "n000012 ", "m ", "dev "),
        ("id00015 ", "n000015 ", "m ", "dev "), ("id00016 ", "n000016 ", "f ", "test "),
        ("id00017 ", "n000017 ", "m ", "test ")], encoding="utf-8-sig")


def with_shadows(folder: Path) -> int:
    """What macOS leaves on disks of other systems: ._NAME beside each file below `folder`, the returned number of them,
    and .DS_Store in each folder."""
    names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in names:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(60))
    for path in {path.parent for path in names}:
        (path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return len(names)


# --- stamps ----------------------------------------------------------------------------------------------------------

STAMP_FOLDERS = ("animals/birds", "food", "household", "symbols/letters")
STAMP_MODES = ("RGBA", "LA", "P", "RGB")


def stamps(data_root: Path, captions: int = 20) -> Path:
    """`captions` stamps with captions of their own, each fourth with a sound; and the odd ones of the real set."""
    root = data_root / "stamps"
    for i in range(captions):
        (name, colour), thing = _colour(i), THINGS[i // len(COLOURS) % len(THINGS)]
        where = root / STAMP_FOLDERS[i % 4] / f"{name}-{thing}-{i}"
        english = f"A {name} {thing}{'' if i < 64 else f' {i}'}."
        stamp(where, english, colour, STAMP_MODES[i // 4 % 4], chinese=f"第{i}张图片")
        if i % 4 == 0:
            rate_hz = (5_000, 11_025, 22_254, 44_100, 48_000)[i // 4 % 5]
            sound(where.with_suffix(".ogg"), tone(0.6, rate_hz, 100.0 * (i + 1)), rate_hz, channels=1 + i // 4 % 2)
    stamp(root / "animals" / "twin", "a RED  apple", (200, 0, 0))  # the words of another stamp
    stamp(root / "animals" / "silent", "A silent wombat.", (90, 90, 90))
    sound(root / "animals" / "silent.ogg", np.zeros(8_000, np.float32))
    stamp(root / "animals" / "empty", "An empty nest.", (90, 60, 30))
    sound(root / "animals" / "empty.wav", np.zeros(0, np.float32))
    stamp(root / "animals" / "damaged", "A damaged crate.", (90, 60, 90))
    (root / "animals" / "damaged.ogg").write_bytes(b"OggS" + bytes(40))
    sound(root / "animals" / "silent_desc.ogg", tone())  # speech, not an effect
    stamp(root / "animals" / "blank", "   ", (1, 2, 3))
    picture(root / "animals" / "wordless.png")
    picture(root / "animals" / "drawn.png").rename(root / "animals" / "drawn.svg")
    (root / "animals" / "drawn.txt").write_text("A drawn whistle.\n", encoding="utf-8")
    sound(root / "animals" / "drawn.wav", tone(0.4, 8_000))
    (root / "animals" / "quiet.svg").write_text("<svg/>", encoding="utf-8")
    (root / "animals" / "quiet.txt").write_text("A drawing that makes no sound.\n", encoding="utf-8")
    return root


def stamp(where: Path, caption: str, colour: Sequence[int], mode: str = "RGBA", chinese: str = "图片") -> None:
    """X.png with a transparent frame, X.txt with a Chinese line below the English one, and X.dat."""
    where.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (36, 30), (0, 0, 0, 0))
    image.paste(Image.new("RGBA", (24, 18), (*colour, 255)), (6, 6))
    image.convert(mode).save(where.with_name(where.name + ".png"))
    text = f"{caption}\nzh_TW.utf8=圖\nzh_CN.utf8={chinese}\nfr.utf8=Une image.\n"
    where.with_name(where.name + ".txt").write_text(text, encoding="utf-8")
    where.with_name(where.name + ".dat").write_text("colorable\n", encoding="utf-8")


# --- manifest --------------------------------------------------------------------------------------------------------


def manifest(folder: Path, samples: int = 20) -> Path:
    """A JSONL without a column `split`: each line a picture, a sound or both, with one or two texts."""
    lines = []
    for i in range(samples):
        name, colour = _colour(i)
        line: dict[str, object] = {"id": f"sample {i}", "text": [f"a {name} thing", f"number {i}"], "labels": name}
        if i % 3 < 2:
            line["image"] = picture(folder / "pictures" / f" {i}.png", colour).relative_to(folder).as_posix()
        if i % 3 > 0:
            line |= {"audio": f"sounds/{i}.wav", "start": 0.2, "duration": 0.5}
            sound(folder / "sounds" / f"{i}.wav", tone(1.0, 16_000, 100.0 * (i + 1)))
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path = folder / "manifest.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _colour(number: int) -> tuple[str, tuple[int, int, int]]:
    return list(COLOURS.items())[number % len(COLOURS)]


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
