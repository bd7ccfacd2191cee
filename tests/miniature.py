"""The real table of sources, with tiny archives in the true layouts in place of the real ones, and their sizes, digests
and counts in place of the published ones. Nothing else differs: the same code fetches, checks and unpacks them."""

import hashlib
import io
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tests import packing, trees
from trimodal.download.unpack import destination, safe_name
from trimodal.sets import SOURCES
from trimodal.sets.base import Count, Item, Source

Members = Mapping[str, bytes]


def shrink(name: str, contents: Mapping[str, Members], folder: Path) -> tuple[Source, dict[str, bytes]]:
    """The source `name` with the items of `contents` (by name: the members, or {"": bytes} of a plain file), and the
    files to serve, by the name of each. `folder` is for temporary files."""
    source, items = SOURCES[name], []
    served: dict[str, bytes] = {}
    for item in source.items:
        if item.name in contents:
            members = contents[item.name]
            data = _pack(item, members, folder)
            step = -(-len(data) // len(item.files))
            parts = [data[i * step: (i + 1) * step] for i in range(len(item.files))]
            served |= {file.name: part for file, part in zip(item.files, parts, strict=True)}
            files = tuple(replace(file, size=len(part), sha256=hashlib.sha256(part).hexdigest(), md5="", also_good=())
                          for file, part in zip(item.files, parts, strict=True))
            counts = tuple(replace(count, number=_count(item, members, count)) for count in item.counts)
            items.append(replace(item, files=files, counts=counts, unpacked=sum(map(len, members.values())),
                                 whole_md5=hashlib.md5(data).hexdigest() if item.whole_md5 else ""))
    return replace(source, items=tuple(items)), served


def _pack(item: Item, members: Members, folder: Path) -> bytes:
    if item.kind == "7z":
        root = folder / f"{item.name}.src"
        for name, data in members.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return packing.seven_zip_of(root, folder / item.name)
    if item.kind == "parquet":
        return _shard(members)
    if item.kind == "plain":
        return members[""]
    if item.kind == "zip":
        return packing.zip_of(members)
    return packing.tar_of(members) if item.kind == "tar" else packing.deb_of(members)


def _shard(members: Members) -> bytes:
    """Rows as in the mirror's shards: the clips twice, since each of val and test has several captions."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"audiocap_id": i, "youtube_id": name.rpartition("_")[0], "caption": "A sound",
             "start_time": int(name.rpartition("_")[2].split(".")[0]), "audio": {"bytes": data, "path": None}}
            for i, (name, data) in enumerate(members.items())]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows * 2), out)
    return out.getvalue()


def _count(item: Item, members: Members, count: Count) -> int:
    """Files that the rules of `item` let through, below count.folder."""
    places = [place for name in members if (place := destination(safe_name(name), item.rules))]
    below = "" if count.folder == "." else count.folder + "/"
    return sum(f"{item.into}/{place}".lstrip("/").startswith(below) and place.endswith(count.suffix)
               for place in places)


def files_of(folder: Path, below: str = "") -> dict[str, bytes]:
    """Name -> bytes of every file in `folder`/`below`, named from `folder`; hidden ones and ours are left out."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted((folder / below).rglob("*"))
            if path.is_file() and not any(step.startswith(".") for step in path.relative_to(folder).parts)
            and path.relative_to(folder).as_posix() != "LICENCE.txt"}


def coco(folder: Path) -> tuple[Source, dict[str, bytes]]:
    root = trees.coco(folder)
    noise = random.Random(0).randbytes(200_000)  # a picture that no list names, so that the archive is of some size
    (root / "train2017/000000999999.jpg").write_bytes(noise)
    lists = {name: data for name, data in files_of(root, "annotations").items() if not name.endswith("coco.json")}
    for part in ("train2017", "val2017"):
        (root / f"annotations/person_keypoints_{part}.json").write_bytes(b"{}")
        lists[f"annotations/person_keypoints_{part}.json"] = b"{}"
    karpathy = (root / "annotations/dataset_coco.json").read_bytes()
    return shrink("coco", {
        "annotations_trainval2017.zip": lists, "train2017.zip": files_of(root, "train2017"),
        "val2017.zip": files_of(root, "val2017"),
        "caption_datasets.zip": {"dataset_coco.json": karpathy, "dataset_flickr8k.json": b"{}"}}, folder)


def clotho(folder: Path) -> tuple[Source, dict[str, bytes]]:
    root = trees.clotho(folder)
    contents: dict[str, Members] = {path.name: {"": path.read_bytes()} for path in root.glob("*.csv")}
    for split in ("development", "validation", "evaluation"):
        contents[f"clotho_audio_{split}.7z"] = files_of(root, split)
    return shrink("clotho", contents, folder)


def audiocaps(folder: Path, shards: bool = False) -> tuple[Source, dict[str, bytes]]:
    """The captions, and with `shards` the first shard of each split with the sounds that are named YOUTUBEID_START."""
    root = trees.audiocaps(folder)
    trees.audiocaps(folder, version=2)
    contents: dict[str, Members] = {name: {"": data} for name, data in files_of(root).items() if name.endswith(".csv")}
    for split, shard in (("train", "train-00000-of-00412"), ("val", "validation-00000-of-00020"),
                         ("test", "test-00000-of-00041")) if shards else ():
        clips = {f"{video}_{start}" for video, start, _ in trees.AUDIOCAPS[split]}
        contents[f"{shard}.parquet"] = {Path(name).name: data for name, data in files_of(root, split).items()
                                        if Path(name).stem in clips}
    source, served = shrink("audiocaps", contents, folder)
    numbers = {split: len(clips) for split, clips in trees.AUDIOCAPS.items()}
    partly = tuple(replace(count, number=numbers[count.folder]) for count in source.partly)
    return replace(source, partly=partly), served


def with_another_clip(folder: Path, video: str, start_s: int) -> tuple[Source, dict[str, bytes]]:
    """`audiocaps`, and a clip that only the training list of version 2 names."""
    source, served = audiocaps(folder)
    name = "dataset2.0/train.csv"
    served[name] += f"777,{video},{start_s},A sound of version 2 alone\n".encode()
    items = [replace(item, files=(replace(item.files[0], size=len(served[name]), lines=0,
                                          sha256=hashlib.sha256(served[name]).hexdigest()),))
             if item.name == name else item for item in source.items]
    return replace(source, items=tuple(items)), served


def voxceleb(folder: Path) -> tuple[Source, dict[str, bytes]]:
    root = trees.voxceleb(folder, video_files=False)
    wavs = {name.removeprefix("voxceleb1/"): data for name, data in files_of(root, "voxceleb1/wav").items()}
    second = {name.removeprefix("voxceleb2/"): data for name, data in files_of(root, "voxceleb2").items()}
    lists = {name: root / f"voxceleb{name[3] if name[3].isdigit() else 1}" / name
             for name in ("vox1_meta.csv", "vox2_meta.csv", "iden_split.txt")}
    test = {name for name in wavs if name.startswith(("wav/id10270", "wav/id10309"))}
    return shrink("voxceleb", {
        **{name: {"": path.read_bytes()} for name, path in lists.items()}, "veri_test2.txt": {"": b"1 a b\n"},
        "vox1_test_wav.zip": {name: wavs[name] for name in test},
        "vox1_dev_wav.zip": {name: data for name, data in wavs.items() if name not in test},
        "vox2_test_aac.zip": {name: data for name, data in second.items() if name.startswith("aac/")},
        "vox2_dev_aac.zip": {name: data for name, data in second.items() if name.startswith("dev/aac/")}}, folder)


def stamps(folder: Path) -> tuple[Source, dict[str, bytes]]:
    root = trees.stamps(folder)
    files = files_of(root)
    deb, tarball = (item.name for item in SOURCES["stamps"].items)
    return shrink("stamps", {
        deb: {"./usr/share/doc/tuxpaint-stamps-default/copyright": b"GPL-2",
              **{f"./usr/share/tuxpaint/stamps/{name}": data for name, data in files.items()}},
        tarball: {"tuxpaint-stamps-2022.06.04/docs/COPYING.txt": b"GPL-2",
                  **{f"tuxpaint-stamps-2022.06.04/stamps/{name}": data for name, data in files.items()}}}, folder)
