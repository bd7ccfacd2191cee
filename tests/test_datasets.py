"""Data as a whole: splits that share nothing, an order without state, equal batches from any number of workers."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import Data, Loader, epoch_batches, load_data, worker_count
from tests import trees
from tests.refusals import refused
from tests.small_runs import RECIPE
from trimodal.config import Config, load_config
from trimodal.data.batches import VISIT, Batch, pool
from trimodal.data.samples import Sample, SampleTable

BOTH = [("image", "text"), ("audio", "text"), ("text",)]


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(None, [
        "model.size=nano", f"model.word_embeddings={RECIPE['model']['word_embeddings']}", "model.image_size=32",
        "data.datasets=[manifest]", "data.audio_max_s=0.4", "data.workers=0",
        f"data.manifest={folder}/manifest.jsonl", f"paths.data_root={folder}/data",
        f"paths.output_dir={folder}/outputs", *overrides])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Config]:
    """Files and drawn samples."""
    folder = tmp_path_factory.mktemp("mixed")
    trees.manifest(folder, 40)
    config = configured(folder, "data.datasets=[manifest, synthetic]", "data.synthetic_images=128",
                        "data.synthetic_sounds=128")
    return load_data(config), config


# ---- the order of an epoch ----------------------------------------------------------------------------------------


def test_every_sample_of_each_pool_is_visited_once_a_pass_in_even_batches() -> None:
    pools = [np.arange(0, 67), np.arange(100, 110), np.empty(0, np.int64)]
    jobs = epoch_batches(pools, [1.0, 3.0, 1.0], 16, seed=1, epoch=4)
    sizes = {task: Counter(len(indices) for t, indices in jobs if t == task) for task in range(3)}
    assert sizes == {0: {14: 2, 13: 3}, 1: {10: 3}, 2: {}}
    for task, members in enumerate(pools[:2]):
        visited = np.concatenate([indices for t, indices in jobs if t == task])
        rows = Counter((visited % VISIT).tolist())
        assert rows == dict.fromkeys(members.tolist(), 1 if task == 0 else 3)
        assert len(set(visited.tolist())) == len(visited)
    visits = [set((indices // VISIT).tolist()) for t, indices in jobs if t == 1]
    assert visits == [{0}, {1}, {2}]


def test_a_part_of_a_pass_takes_that_part_and_another_one_each_epoch() -> None:
    parts = [np.concatenate([i for _, i in epoch_batches([np.arange(100)], [1.5], 7, 0, epoch)]) for epoch in (1, 2)]
    halves = [set((part[part >= VISIT] % VISIT).tolist()) for part in parts]
    assert [len(part) for part in parts] == [150, 150] and [len(half) for half in halves] == [50, 50]
    assert halves[0] != halves[1]


def test_the_order_is_a_function_of_seed_and_epoch_and_mixes_tasks() -> None:
    def flat(seed: int, epoch: int) -> list[tuple[int, list[int]]]:
        jobs = epoch_batches([np.arange(160), np.arange(160)], [1.0, 1.0], 8, seed, epoch)
        return [(task, indices.tolist()) for task, indices in jobs]
    assert flat(0, 1) == flat(0, 1)
    assert len({str(flat(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4
    tasks = [task for task, _ in flat(0, 1)]
    assert sum(one != other for one, other in itertools.pairwise(tasks)) > 8
    assert [i for task, i in flat(0, 1) if task == 0] != [i for task, i in flat(0, 1) if task == 1]


def test_pools_hold_the_samples_that_have_all_inputs() -> None:
    table = SampleTable.pack([Sample(key="0", source="s", split="train", image="a", captions=("x",)),
                              Sample(key="1", source="s", split="train", image="a", audio="b"),
                              Sample(key="2", source="s", split="train", captions=("x",), audio="b")])
    expected = {("image",): [0, 1], ("image", "audio"): [1], ("audio", "text"): [2], ("text",): [0, 2]}
    assert {inputs: pool(table, inputs).tolist() for inputs in expected} == expected
    assert pool(table, ("image", "text", "audio")).dtype == np.int64


# ---- the loader ---------------------------------------------------------------------------------------------------


def train_jobs(data: Data, epoch: int = 1) -> list[tuple[int, np.ndarray]]:
    pools = [pool(data.tables["train"], inputs) for inputs in BOTH]
    return epoch_batches(pools, [2.0, 1.0, 0.2], 16, seed=0, epoch=epoch)


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in Batch.__dataclass_fields__:
            mine, yours = getattr(a, name), getattr(b, name)
            if isinstance(mine, torch.Tensor):
                assert mine.dtype == yours.dtype and torch.equal(mine, yours), name
            elif isinstance(mine, dict):
                assert mine.keys() == yours.keys()
                assert all(torch.equal(mine[key], yours[key]) for key in mine), name
            else:
                assert mine == yours, name


def test_batches_are_bit_identical_for_any_number_of_workers_and_threads(mixed: tuple[Data, Config]) -> None:
    data, config = mixed
    jobs = train_jobs(data)
    assert {task for task, _ in jobs} == {0, 1, 2} and max(int(i.max()) for _, i in jobs) >= VISIT
    before, runs = torch.get_num_threads(), []
    try:
        for threads, workers in ((1, 0), (2, 0), (1, 1), (2, 3)):
            torch.set_num_threads(threads)
            runs.append(list(Loader(data, "train", jobs, config, inputs=BOTH, train=True, epoch=1, workers=workers)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [batch.inputs for batch in runs[0]] == [BOTH[task] for task, _ in jobs]
    assert all(batch.sample_ids.tolist() == (indices % VISIT).tolist()
               for batch, (_, indices) in zip(runs[0], jobs, strict=True))
    for other in runs[1:]:
        assert_equal(runs[0], other)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_job_is_skipping_those_before_it(mixed: tuple[Data, Config], workers: int) -> None:
    data, config = mixed
    jobs = train_jobs(data)
    everything = list(Loader(data, "train", jobs, config, inputs=BOTH, train=True, epoch=1, workers=0))
    rest = Loader(data, "train", jobs, config, inputs=BOTH, train=True, epoch=1, workers=workers, start=5)
    assert len(rest) == len(jobs) - 5
    assert_equal(everything[5:], list(rest))


def test_further_visits_and_further_epochs_draw_anew(mixed: tuple[Data, Config]) -> None:
    data, config = mixed
    row = int(pool(data.tables["train"], ("image", "text"))[-1])
    assert data.tables["train"].sources[row] == "synthetic"
    jobs = [(0, np.array([row, row + VISIT]))]
    one, two = (next(iter(Loader(data, "train", jobs, config, inputs=BOTH, train=True, epoch=epoch, workers=0)))
                for epoch in (1, 2))
    assert one.images is not None and two.images is not None
    pictures = [*one.images, *two.images]
    assert len({picture.numpy().tobytes() for picture in pictures}) == 4


def test_iterating_leaves_the_random_numbers_of_torch_and_numpy_alone(mixed: tuple[Data, Config]) -> None:
    data, config = mixed
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    for workers in (0, 1):
        list(Loader(data, "train", train_jobs(data)[:3], config, inputs=BOTH, train=True, epoch=1, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], legacy)  # type: ignore[index]


def test_pinning_moves_every_tensor(mixed: tuple[Data, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = mixed
    jobs = [(0, np.arange(2))]
    batch, = Loader(data, "train", jobs, config, inputs=[("text",)], train=True, epoch=1, workers=0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())  # there may be no GPU here
    pinned = batch.pin_memory()
    assert_equal([batch], [pinned])
    for name in ("sample_ids", "input_ids", "attention_mask", "caption_owner", "caption_ids", "concepts"):
        assert getattr(pinned, name).data_ptr() != getattr(batch, name).data_ptr()
    assert all(pinned.noise[name].data_ptr() != batch.noise[name].data_ptr() for name in batch.noise)


def broken_set(folder: Path, broken: int) -> None:
    lines = []
    for i in range(20):
        path = trees.picture(folder / f"{i}.png", size=(64, 64))
        if i < broken:
            trees.truncate(path)
        lines.append(json.dumps({"id": str(i), "image": path.name, "text": f"picture {i}", "split": "train"}))
    lines.append(json.dumps({"id": "v", "text": "a text alone", "split": "val"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_met_live_are_recorded_once_and_replaced(tmp_path: Path, workers: int) -> None:
    broken_set(tmp_path, 2)
    config = configured(tmp_path, "data.cache=false", "data.max_bad_pct=10")
    data = load_data(config)
    jobs = epoch_batches([np.arange(20)], [3.0], 5, 0, 1)
    batches = list(Loader(data, "train", jobs, config, inputs=BOTH[:1], train=True, epoch=1, workers=workers))
    assert [len(batch.keys) for batch in batches] == [5] * 12
    assert {key for batch in batches for key in batch.keys} == {f"manifest/{i}" for i in range(2, 20)}
    lines = (tmp_path / "outputs/logs/bad_samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["manifest/0", "manifest/1"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_files_met_live_end_the_run_in_one_line(tmp_path: Path, workers: int) -> None:
    broken_set(tmp_path, 3)
    config = configured(tmp_path, "data.cache=false", "data.max_bad_pct=10")
    data = load_data(config)
    jobs = epoch_batches([np.arange(20)], [1.0], 5, 0, 1)
    listed = tmp_path / "outputs/logs/bad_samples.jsonl"
    with refused("data.max_bad_pct=10", 3, 20, listed) as caught:
        list(Loader(data, "train", jobs, config, inputs=BOTH[:1], train=True, epoch=1, workers=workers))
    assert any(str(tmp_path / f"{i}.png") in str(caught.value) for i in range(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_all_broken_is_an_error_even_where_any_share_is_allowed(tmp_path: Path, workers: int) -> None:
    broken_set(tmp_path, 20)
    config = configured(tmp_path, "data.cache=false", "data.max_bad_pct=100")
    data = load_data(config)
    jobs = epoch_batches([np.arange(20)], [1.0], 5, 0, 1)
    with refused("data", 20, "image", "text"):
        list(Loader(data, "train", jobs, config, inputs=BOTH[:1], train=True, epoch=1, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_in_evaluation_a_broken_file_never_makes_its_neighbour_count_twice(tmp_path: Path, workers: int) -> None:
    broken_set(tmp_path, 2)
    config = configured(tmp_path, "data.cache=false", "data.max_bad_pct=10")
    data = load_data(config)
    jobs = [(i % 2, np.array([i])) for i in range(20)]  # one at a time, so that two of the batches have no good one
    batches = list(Loader(data, "train", jobs, config, inputs=BOTH[:1] * 2, train=False, epoch=0, workers=workers))
    assert [(batch.keys, batch.task) for batch in batches] == [([f"manifest/{i}"], i % 2) for i in range(2, 20)]


def test_an_evaluation_of_nothing_but_broken_files_is_an_error(tmp_path: Path) -> None:
    broken_set(tmp_path, 20)
    config = configured(tmp_path, "data.cache=false", "data.max_bad_pct=100")
    data = load_data(config)
    jobs = [(0, np.arange(5)), (0, np.arange(5, 20))]
    with refused("data", 20):
        list(Loader(data, "train", jobs, config, inputs=BOTH[:1], train=False, epoch=0, workers=0))


def test_workers_follow_the_setting_the_cores_and_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(cores: int, jobs: int = 100, *overrides: str) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        return worker_count(load_config(None, list(overrides)), jobs)
    assert [count(cores) for cores in (1, 2, 3, 6, 64)] == [1, 1, 2, 5, 8]
    assert count(64, 3) == 3 and count(64, 0) == 0
    assert count(2, 100, "data.workers=5") == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [count(cores) for cores in (2, 8, 16)] == [1, 1, 3]


# ---- reading ------------------------------------------------------------------------------------------------------


def test_data_describes_itself_in_plain_json(mixed: tuple[Data, Config]) -> None:
    data, _ = mixed
    described = json.loads(json.dumps(data.describe()))
    assert described["counts"]["synthetic"] == {
        "train": {"audio+text": 64, "image+text": 64, "captions": 256},
        "val": {"audio+text": 32, "image+text": 32, "captions": 128},
        "test": {"audio+text": 32, "image+text": 32, "captions": 128}}
    own = [described["counts"]["manifest"][split] for split in ("train", "val", "test")]
    assert sum(sum(n for kind, n in counts.items() if kind != "captions") for counts in own) == 40
    assert described["digests"]["train"] == data.tables["train"].digest()
    assert set(described["licences"]) == {"manifest", "synthetic"} == set(data.names())
    assert described["concepts"] == len(data.concepts) > 20


def test_load_data_carves_only_where_validation_is_missing(tmp_path: Path) -> None:
    def write(*splits: str) -> Data:
        lines = [{"id": str(i), "text": f"text number {i}", "split": split} for i, split in enumerate(splits)]
        (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        return load_data(configured(tmp_path))
    assert [len(table) for table in write(*["train"] * 40, "val").tables.values()] == [40, 1, 0]
    train, val, test = write(*["train"] * 40, "test").tables.values()
    assert len(train) + len(val) == 40 and 0 < len(val) < 10 and len(test) == 1
    with refused("data.datasets", "manifest", "'train'"):
        write("val", "test")


def test_one_split_may_be_loaded_with_the_names_of_a_checkpoint(mixed: tuple[Data, Config]) -> None:
    data, config = mixed
    test = load_data(config, ["test"], tokenizer=data.tokenizer, concepts=data.concepts, speakers=["a", "b"])
    assert list(test.splits) == ["test"] and test.concepts == data.concepts and test.speakers == ("a", "b")
    assert test.tables["test"].digest() == data.tables["test"].digest()
    assert np.array_equal(test.splits["test"].concept_ids, data.splits["test"].concept_ids)


def test_speakers_are_numbered_by_those_of_training(tmp_path: Path) -> None:
    paths = {split: str(trees.sound(tmp_path / f"{split}.wav", trees.tone())) for split in ("train", "val")}
    lines = [{"id": f"{split}{i}", "audio": paths[split], "start": i / 10, "split": split, "speaker": speaker}
             for split, names in (("train", "bab"), ("val", "cb")) for i, speaker in enumerate(names)]
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = load_data(configured(tmp_path))
    assert data.speakers == ("a", "b")
    assert data.splits["train"].speakers.tolist() == [1, 0, 1] and data.splits["val"].speakers.tolist() == [-1, 1]
    jobs = [(0, np.arange(3))]
    batch = next(iter(Loader(data, "train", jobs, configured(tmp_path), inputs=[("audio",)], train=True, epoch=1)))
    assert batch.speakers is not None and batch.speakers.tolist() == [1, 0, 1]


def test_speakers_and_labels_without_training_samples_are_no_classes(tmp_path: Path) -> None:
    """Neither those of samples that were held out, nor a speaker who is only seen: nothing would train their class."""
    lines = [{"id": str(i), "audio": trees.sound(tmp_path / f"{i}.wav", trees.tone(100 + i)).name, "split": "train",
              "speaker": f"s{i}", "labels": [f"l{i}"]} for i in range(20)]
    lines.append({"id": "seen", "image": trees.picture(tmp_path / "p.png").name, "split": "train", "speaker": "seen"})
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = load_data(configured(tmp_path))
    held_out = {data.tables["val"].keys[row] for row in range(len(data.tables["val"]))}
    assert len(held_out) >= 2
    heard = {str(i) for i in range(20)} - held_out
    assert set(data.speakers) == {f"s{i}" for i in heard} and set(data.concepts) == {f"l{i}" for i in heard}
    assert data.splits["train"].speakers.max() == len(heard) - 1 and (data.splits["val"].speakers == -1).all()


def test_more_labels_than_classes_are_an_error(tmp_path: Path) -> None:
    trees.manifest(tmp_path, 20)
    with refused("model.num_classes", 2, 7):
        load_data(configured(tmp_path, "model.num_classes=2"))


@pytest.mark.parametrize("name", ["coco", "clotho", "audiocaps", "voxceleb", "stamps"])
def test_every_official_layout_loads_and_reads(tmp_path: Path, name: str) -> None:
    getattr(trees, name)(tmp_path / "data")
    config = configured(tmp_path, f"data.datasets=[{name}]", "data.max_bad_pct=50")
    data = load_data(config)
    inputs = [i for i in (("image", "text"), ("audio", "text"), ("audio",)) if len(pool(data.tables["train"], i))]
    jobs = epoch_batches([pool(data.tables["train"], i) for i in inputs], [1.0] * len(inputs), 4, 0, 1)
    batches = list(Loader(data, "train", jobs, config, inputs=inputs, train=True, epoch=1, workers=0))
    assert len(batches) == len(jobs) > 0
    assert all(len(table) for table in data.tables.values())
    assert data.licences()[name]
