"""Samples as files, and the same samples as the shards of others: webdataset's tars and the Hub's parquet."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests import trees
from trimodal.config import Config
from trimodal.data.samples import Sample
from trimodal.sets import SETS

PER_SHARD = 16


def files(folder: Path, samples: int = 40) -> Path:
    """A tree as img2dataset's output_format=files: 00000/0000007.jpg with .txt and .json; every third has a sound as
    well or alone, and no picture."""
    for number in range(samples):
        shard, key = f"{number // PER_SHARD:05}", f"{number // PER_SHARD:05}{number % PER_SHARD:02}"
        stem = folder / shard / key
        kind, caption = number % 3, f"a {trees.THINGS[number % 8]} thing, number {number}"
        if kind < 2:
            trees.noise(stem.with_suffix(".jpg"), (40 + number % 5, 30), number)
        if kind:
            trees.sound(stem.with_suffix(".flac"), trees.tone(0.6 + 0.01 * number, hz=100.0 * (1 + number % 30)))
        stem.with_suffix(".txt").write_text(caption)
        stem.with_suffix(".json").write_text(json.dumps(described(key, caption, f"class {number % 4}"), indent=4))
    return folder


def described(key: str, caption: str | None, label: str = "dog") -> dict[str, Any]:
    """The .json of img2dataset 1.47."""
    return {"label": label, "caption": caption, "url": f"http://127.0.0.1/{key}.png", "key": key, "status": "success",
            "error_message": None, "width": 128, "height": 128, "original_width": 300, "original_height": 200,
            "exif": "{}", "sha256": "0" * 64}


def tar(path: Path, content: Mapping[str, bytes] | Sequence[tuple[str, bytes]], **settings: Any) -> Path:
    """A tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **settings) as archive:
        for name, data in content.items() if isinstance(content, Mapping) else content:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples_of(folder: Path) -> Iterator[tuple[str, list[tuple[str, dict[str, bytes]]]]]:
    """Name of each shard, and its samples: key and content by suffix."""
    for shard in sorted(path for path in folder.iterdir() if path.is_dir()):
        keys = sorted({path.stem for path in shard.iterdir()})
        yield shard.name, [(key, {path.suffix[1:]: path.read_bytes() for path in sorted(shard.glob(f"{key}.*"))})
                           for key in keys]


def as_webdataset(folder: Path, shards: Path) -> Path:
    """By the writer of the package webdataset, samples as they come in and not by key, as img2dataset writes them."""
    import webdataset

    shards.mkdir(parents=True)
    for name, samples in samples_of(folder):
        with webdataset.TarWriter(str(shards / f"{name}.tar"), encoder=False) as writer:
            for key, content in samples[1::2] + samples[::2]:
                writer.write({"__key__": key, **content})
    return shards


def as_parquet(folder: Path, shards: Path) -> Path:
    """As datasets.Dataset.to_parquet writes features Image and Audio; a caption is a list, rows are in no order."""
    shards.mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "audio": {"_type": "Audio", "sampling_rate": 16_000},
                "label": {"names": [f"class {number}" for number in range(4)], "_type": "ClassLabel"}}
    for name, samples in samples_of(folder):
        rows = [{"key": key, "image": cell(content, "jpg"), "audio": cell(content, "flac"),
                 "captions": [content["txt"].decode()], "label": int(json.loads(content["json"])["label"][-1])}
                for key, content in samples[1::2] + samples[::2]]
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})})
        pyarrow.parquet.write_table(table, shards / f"{name}.parquet", row_group_size=6)
    return shards


def cell(content: Mapping[str, bytes], suffix: str) -> dict[str, Any] | None:
    return {"bytes": content[suffix], "path": f"x.{suffix}"} if suffix in content else None


def read_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the set of shards read `data.folder` as files: all that is random about a sample follows from the name of its
    set and from its place there."""
    of_files = SETS["folder"].read

    def read(root: Path, splits: Sequence[str], config: Config) -> Iterator[Sample]:
        return (dataclasses.replace(sample, source="shards") for sample in of_files(root, splits, config))

    monkeypatch.setitem(SETS, "shards", dataclasses.replace(SETS["shards"], read=read, state=SETS["folder"].state))
