"""The two lists of a comparison hold the same pairs, and what a run has used is seen from outside."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.beside_open_clip import cpu_s, fill_cache, synthetic_pairs, watch, write_lists

PICTURE = np.full((8, 8, 3), 200, np.uint8)


def test_both_lists_hold_the_same_pairs_in_the_same_splits(tmp_path: Path) -> None:
    pairs = {"train": [(PICTURE, "one"), (PICTURE, 'two "x"')], "val": [(PICTURE, "three")]}
    assert write_lists(tmp_path / "lists", pairs) == {"train": 2, "val": 1}
    manifest = [json.loads(line) for line in (tmp_path / "lists" / "manifest.jsonl").read_text("utf-8").splitlines()]
    for split in pairs:
        with open(tmp_path / "lists" / f"{split}.tsv", newline="", encoding="utf-8") as file:
            rows = [tuple(row) for row in csv.reader(file, delimiter="\t")][1:]
        assert rows == [(one["image"], one["text"]) for one in manifest if one["split"] == split]
        assert all(np.array_equal(np.asarray(Image.open(path)), PICTURE) for path, _ in rows)


def test_no_caption_of_generated_shapes_is_on_two_sides() -> None:
    found = {split: [caption for _, caption in pairs] for split, pairs in synthetic_pairs(16).items()}
    assert len(set(found["val"])) == len(found["val"]) == 128
    assert not set(found["train"]) & set(found["val"])


def test_an_epoch_is_seen_when_its_record_is_written_and_ends_the_run_at_the_recall_asked_for(tmp_path: Path) -> None:
    record = tmp_path / "record"
    program = f"import time; open({str(record)!r}, 'w').write('0.5'); time.sleep(600)"
    seen = watch([sys.executable, "-c", program], lambda: [0.5] if record.exists() else [], tmp_path / "log",
                 until=0.5)
    assert [epoch.recall for epoch in seen.epochs] == [0.5] and seen.peak_gib > 0


def test_a_run_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="why it failed"):
        watch([sys.executable, "-c", "raise SystemExit('why it failed')"], list, tmp_path / "log")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="CPU seconds of others are asked of /proc")
@pytest.mark.timed
def test_cpu_seconds_hold_those_of_children() -> None:
    """The system counts in ticks of 10 ms, and drops what is less: so a child that takes 0.5 s shows 0.4 at least."""
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    process.stdout.readline()
    assert cpu_s(process.pid) >= 0.4
    process.communicate(b"\n")
    assert cpu_s(process.pid) == 0.0, "it has ended"


def test_the_cache_is_filled_before_a_clock_runs(tmp_path: Path) -> None:
    write_lists(tmp_path / "lists", {"train": [(PICTURE, "one"), (PICTURE, "two")], "val": [(PICTURE, "three")]})
    fill_cache(tmp_path / "lists", "model.image_size=16", "model.word_embeddings=random")
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "lists" / "data").rglob("*") if path.is_file()}
    assert entries
    fill_cache(tmp_path / "lists", "model.image_size=16", "model.word_embeddings=random")
    assert entries.items() <= {path: path.stat().st_mtime_ns for path in entries}.items()
