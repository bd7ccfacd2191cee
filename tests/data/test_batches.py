"""Batches: what a sample draws is its own, what evaluation sees is fixed, and broken files cost one sample each."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import epoch_batches, load_data
from tests import trees
from tests.refusals import refused
from tests.small_runs import RECIPE
from trimodal.config import Config, load_config
from trimodal.data import bad_samples
from trimodal.data.batches import VISIT, Batch, BatchReader, Split, crop_sound, pool, spec_augment
from trimodal.data.images import fit_eval
from trimodal.data.samples import Sample, SampleTable, normalise_caption, stable_hash
from trimodal.objectives.contrastive import positives_of

VALIDATION = '{"id": "val", "text": "a text alone", "split": "val"}'  # so that none is cut from train
BOTH = [("image", "text"), ("audio", "text")]


def configured(folder: Path, *overrides: str) -> Config:
    return load_config(None, [
        "model.size=nano", f"model.word_embeddings={RECIPE['model']['word_embeddings']}", "model.image_size=32",
        "model.context_length=12", "data.datasets=[manifest]", "data.workers=0", "data.synthetic_images=128",
        "data.synthetic_sounds=128",
        f"data.manifest={folder}/manifest.jsonl", f"paths.data_root={folder}/data", "data.audio_max_s=0.4",
        f"paths.output_dir={folder}/outputs", *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a gradient, sounds of half a second, two captions each, no samples held out."""
    where = tmp_path_factory.mktemp("set")
    path = trees.manifest(where, 24)
    lines = [line.replace('"id"', '"split": "train", "id"') for line in path.read_text("utf-8").splitlines()]
    path.write_text("\n".join([*lines, VALIDATION]), "utf-8")
    for picture in (where / "pictures").iterdir():
        ramp = np.arange(40 * 60 * 3).reshape(40, 60, 3) // 30 % 251
        Image.fromarray((ramp + int(picture.stem) % 5).astype(np.uint8)).save(picture)
    return where


@pytest.fixture(scope="module")
def split(folder: Path) -> Split:
    return load_data(configured(folder)).splits["train"]


def read(split: Split, config: Config, rows: list[int], inputs: tuple[str, ...] = ("image", "text"), epoch: int = 1,
         train: bool = True) -> Batch:
    batch = BatchReader(split, [(0, np.array(rows))], [inputs], config, train, epoch)[0][0]
    assert batch is not None
    return batch


def test_split_knows_equal_files(tmp_path: Path) -> None:
    """One picture with two sounds: two samples, whose picture is one."""
    lines = [line.replace('"id"', '"split": "train", "id"') for line in
             trees.manifest(tmp_path, 4).read_text("utf-8").splitlines()]
    picture, sound = (next(tmp_path.rglob(f"*{suffix}")).relative_to(tmp_path) for suffix in (".png", ".wav"))
    lines += [f'{{"image": "{picture}", "audio": "{sound}", "start": {start}, "text": "t{start}", "split": "train"}}'
              for start in (0.1, 0.2)]
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, VALIDATION]), "utf-8")
    split = load_data(configured(tmp_path)).splits["train"]
    pictures, sounds = split.image_ids.tolist(), split.audio_ids.tolist()
    assert len(pictures) == len(sounds) == len(split.table)
    assert pictures[-1] == pictures[-2] and pictures.count(pictures[-1]) == 3
    assert len(set(pictures)) == len(pictures) - 2
    assert len(set(sounds)) == len(sounds)
    rows = [len(pictures) - 1, len(pictures) - 2]
    batch = read(split, configured(tmp_path), rows, ("image", "audio"))
    assert batch.image_ids is not None and batch.audio_ids is not None
    assert batch.image_ids.tolist() == split.image_ids[rows].tolist()
    assert batch.audio_ids.tolist() == split.audio_ids[rows].tolist()
    assert positives_of(batch, ("image", "audio")).count() == 4, "neither sound is wrong"


def parts(batch: Batch, b: int) -> dict[str, torch.Tensor]:
    """All that belongs to sample b, without the padding that its neighbours ask for."""
    found = {"id": batch.sample_ids[b], "path": batch.noise["path"][b], "drop_text": batch.noise["drop_text"][b]}
    if batch.images is not None:
        found |= {"image": batch.images[b], "image noise": batch.noise["image"][b]}
    if batch.audio is not None and batch.audio_lengths is not None:
        length = int(batch.audio_lengths[b])
        found |= {"audio": batch.audio[b, :length], "audio noise": batch.noise["audio"][b, :-(-length // 16) * 5]}
    if batch.input_ids is not None and batch.attention_mask is not None:
        own = batch.caption_owner == b
        length = int(batch.attention_mask[own].sum(1).max())
        found |= {"ids": batch.input_ids[own, :length], "text noise": batch.noise["text"][own, :length],
                  "path text": batch.noise["path_text"][own]}
    return found


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def first(split: Split, inputs: tuple[str, ...], number: int = 6) -> list[int]:
    return pool(split.table, inputs)[:number].tolist()


@pytest.mark.parametrize("inputs", [("image", "text"), ("audio", "text"), ("image", "audio", "text"), ("text",)])
def test_what_a_sample_draws_does_not_depend_on_its_neighbours(split: Split, folder: Path, inputs) -> None:
    config, rows = configured(folder), first(split, inputs)
    together = read(split, config, rows, inputs)
    for b, row in enumerate(rows):
        assert_equal(parts(read(split, config, [row], inputs), 0), parts(together, b))
    backwards = read(split, config, rows[::-1], inputs)
    assert_equal(parts(backwards, 0), parts(together, len(rows) - 1))


@pytest.mark.parametrize("change", ["epoch", "seed", "visit"])
def test_draws_differ_between_epochs_seeds_and_visits(split: Split, folder: Path, change: str) -> None:
    inputs = ("image", "audio", "text")
    row = first(split, inputs)[0]
    one = parts(read(split, configured(folder), [row], inputs), 0)
    config = configured(folder, "training.seed=1") if change == "seed" else configured(folder)
    index, epoch = row + VISIT * (change == "visit"), 2 if change == "epoch" else 1
    other = parts(read(split, config, [index], inputs, epoch), 0)
    assert one.pop("id") == other.pop("id") == row
    for name in ("path", "image", "image noise", "audio", "text noise"):
        assert one[name].shape != other[name].shape or not torch.equal(one[name], other[name]), name


def test_the_whole_batch_has_the_promised_types_and_shapes(split: Split, folder: Path) -> None:
    config = configured(folder, "training.captions_per_visit=2")
    batch = read(split, config, first(split, ("image", "audio", "text"), 3), ("image", "audio", "text"))
    assert batch.images is not None and batch.audio is not None and batch.input_ids is not None
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (3, 3, 32, 32))
    assert (batch.audio.dtype, batch.audio.shape) == (torch.float16, (3, 48, 80))
    assert batch.audio_lengths is not None and batch.audio_lengths.tolist() == [40, 40, 40]
    assert not batch.audio[:, 40:].any() and batch.audio[:, :40].any()
    captions, longest = batch.input_ids.shape
    assert captions == 6 and batch.attention_mask is not None
    assert batch.attention_mask.sum(1).max() == longest <= 12
    assert batch.caption_owner is not None and batch.caption_owner.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.concepts is not None and batch.concepts.shape == (3, 1000)
    assert batch.speakers is not None and batch.speakers.tolist() == [-1, -1, -1]
    shapes = {"image": (3, 4), "audio": (3, 15), "text": (6, longest), "path": (3, 64), "path_text": (6, 64),
              "drop_text": (3,)}
    assert {name: tuple(values.shape) for name, values in batch.noise.items()} == shapes
    for values in batch.noise.values():
        assert values.dtype == torch.float32 and (values >= 0).all() and (values < 1).all()
    assert batch.keys == [f"manifest/{split.table.keys[i]}" for i in batch.sample_ids.tolist()]


def test_what_the_inputs_lack_is_none(split: Split, folder: Path) -> None:
    text = read(split, configured(folder), [0, 1], ("text",))
    assert text.images is None and text.audio is None and text.audio_lengths is None and text.speakers is None
    assert set(text.noise) == {"path", "path_text", "text", "drop_text"}
    image = read(split, configured(folder), first(split, ("image",)), ("image",))
    assert image.input_ids is None and image.caption_ids is None and set(image.noise) == {"path", "drop_text", "image"}


def test_captions_are_drawn_in_training_and_all_there_in_evaluation(split: Split, folder: Path) -> None:
    config, row = configured(folder), first(split, ("image", "text"))[0]
    texts = split.table.captions_of(row)
    hashes = [stable_hash(normalise_caption(text)) for text in texts]
    assert len(texts) == 2
    batch = read(split, config, [row], train=False)
    assert batch.caption_ids is not None and batch.caption_ids.tolist() == hashes
    drawn = [read(split, config, [row], epoch=epoch).caption_ids for epoch in range(1, 13)]
    assert {int(ids[0]) for ids in drawn if ids is not None} == set(hashes)
    assert all(len(ids) == 1 for ids in drawn if ids is not None)


def test_evaluation_is_the_plain_file_whatever_seed_and_epoch(split: Split, folder: Path) -> None:
    inputs = ("image", "audio", "text")
    row = first(split, inputs)[0]
    batch = read(split, configured(folder), [row], inputs, train=False)
    assert batch.images is not None and batch.audio is not None and batch.audio_lengths is not None
    expected = fit_eval(split.store.image(row), 32, "crop")
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), expected)
    assert int(batch.audio_lengths[0]) == 50 == len(split.store.mel(row))  # longer than audio_max_s: no crop
    assert np.array_equal(batch.audio[0, :50].numpy(), split.store.mel(row))
    other = read(split, configured(folder, "training.seed=5"), [row], inputs, train=False, epoch=9)
    assert_equal(parts(batch, 0), parts(other, 0))


def test_training_crops_pictures_and_sounds(split: Split, folder: Path) -> None:
    config, inputs = configured(folder, "data.spec_augment=false"), ("image", "audio", "text")
    row = first(split, inputs)[0]
    mel = split.store.mel(row)
    starts = set()
    for epoch in range(1, 9):
        batch = read(split, config, [row], inputs, epoch)
        assert batch.audio is not None
        cut = batch.audio[0, :40].numpy()
        starts |= {start for start in range(11) if np.array_equal(mel[start:start + 40], cut)}
    assert len(starts) > 2
    whole = torch.from_numpy(fit_eval(split.store.image(row), 32, "crop")).permute(2, 0, 1)
    assert not any(torch.equal(read(split, config, [row], inputs, epoch).images[0], whole)  # type: ignore[index]
                   for epoch in range(1, 5))


def test_sounds_are_masked_in_training_only_where_asked(split: Split, folder: Path) -> None:
    inputs = ("audio", "text")
    row = first(split, inputs)[0]
    plain = read(split, configured(folder, "data.spec_augment=false"), [row], inputs).audio
    masked = read(split, configured(folder), [row], inputs).audio
    assert plain is not None and masked is not None
    assert plain.shape == masked.shape and not torch.equal(plain, masked)


def test_masks_are_bounded_and_filled_with_the_mean() -> None:
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(300, 80)).astype(np.float16)
    before, widths = mel.copy(), []
    for _ in range(50):
        masked = spec_augment(mel, rng)
        changed = masked != mel
        frames, bands = changed.all(1).sum(), changed.all(0).sum()
        widths.append((frames, bands))
        assert frames <= 2 * 45 and bands <= 2 * 16
        assert np.unique(masked[changed]).tolist() in ([], [np.float16(mel.mean(dtype=np.float32))])
    assert np.array_equal(mel, before) and np.max(widths, 0).min() > 16
    assert spec_augment(mel[:3], rng).shape == (3, 80)


def test_crops_reach_both_ends_and_leave_short_sounds_alone() -> None:
    rng, mel = np.random.default_rng(0), np.arange(12)[:, None]
    starts = {int(crop_sound(mel, 9, rng)[0, 0]) for _ in range(100)}
    assert starts == {0, 1, 2, 3} and crop_sound(mel, 12, rng) is mel and len(crop_sound(mel, 9, rng)) == 9


def test_pictures_are_mirrored_unless_a_caption_tells_sides_or_is_not_english(tmp_path: Path) -> None:
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, :32] = 255
    texts = ["a dog", "a dog on the left", "upright things", "un chien"]
    for i in range(len(texts)):
        Image.fromarray(half).save(tmp_path / f"{i}.png")
    lines = [f'{{"id": "{i}", "image": "{i}.png", "text": ["a thing", "{text}"], "split": "train"}}'
             for i, text in enumerate(texts)]
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, VALIDATION]))
    config = configured(tmp_path)
    split = load_data(config).splits["train"]
    assert len(split.table) == 4
    mirrored = torch.zeros(4)
    for epoch in range(1, 31):
        images = read(split, config, [0, 1, 2, 3], epoch=epoch).images
        assert images is not None
        mirrored += images[:, 0, :, 0].float().mean(1) < images[:, 0, :, -1].float().mean(1)
    assert mirrored[1] == mirrored[3] == 0 and 5 < mirrored[0] < 25 and 5 < mirrored[2] < 25
    images = read(split, configured(tmp_path, "data.flip=false"), [0] * 8).images
    assert images is not None and (images[:, 0, :, 0].float().mean(1) >= images[:, 0, :, -1].float().mean(1)).all()


@pytest.mark.parametrize("inputs", BOTH)
def test_drawn_samples_are_not_augmented(tmp_path: Path, inputs: tuple[str, ...]) -> None:
    """Crops, mirrors and masks would show what their captions do not say."""
    on = configured(tmp_path, "data.datasets=[synthetic]", "data.min_crop=0.3", "data.audio_max_s=9")
    off = configured(tmp_path, "data.datasets=[synthetic]", "data.min_crop=1", "data.flip=false", "data.audio_max_s=9",
                     "data.spec_augment=false")
    split = load_data(on).splits["train"]
    rows = first(split, inputs)
    one, other = read(split, on, rows, inputs), read(split, off, rows, inputs)
    for b in range(len(rows)):
        assert_equal(parts(one, b), parts(other, b))


def test_concepts_are_those_of_labels_and_captions(folder: Path) -> None:
    data = load_data(configured(folder))
    split, names = data.splits["train"], data.concepts
    batch = read(split, configured(folder), first(split, ("image", "text")), train=False)
    assert batch.concepts is not None
    for b, row in enumerate(batch.sample_ids.tolist()):
        sample = split.table[row]
        words = {*sample.labels, *" ".join(sample.captions).split()}
        assert {names[i] for i in torch.nonzero(batch.concepts[b]).flatten().tolist()} == words & set(names) != set()


def test_a_pickled_reader_reads_the_same_and_is_small(split: Split, folder: Path) -> None:
    reader = BatchReader(split, [(0, np.array(first(split, BOTH[0])))], BOTH, configured(folder), True, 3)
    one, other = reader[0][0], pickle.loads(pickle.dumps(reader))[0][0]
    assert one is not None and other is not None
    assert_equal(parts(one, 2), parts(other, 2))


# ---- broken files -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cached", "live"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Split, Config]:
    """Eight pictures, of which 2, 3 and 7 are broken."""
    for i in range(8):
        path = trees.picture(tmp_path / f"{i}.png", (30 * i, 0, 0), size=(64, 64))
        if i in (2, 3, 7):
            trees.truncate(path)
    lines = [f'{{"id": "{i}", "image": "{i}.png", "text": "picture {i}", "split": "train"}}\n' for i in range(8)]
    (tmp_path / "manifest.jsonl").write_text("".join(lines) + VALIDATION)
    config = configured(tmp_path, "data.max_bad_pct=50", f"data.cache={str(request.param == 'cached').lower()}")
    split = load_data(config).splits["train"]
    assert len(split.table) == 8
    return split, config


def test_other_good_samples_stand_in_for_broken_ones(damaged: tuple[Split, Config]) -> None:
    split, config = damaged
    batch, broken = BatchReader(split, [(0, np.array([1, 2, 7, 3]))], BOTH, config, True, 1)[0]
    assert batch is not None and batch.sample_ids.tolist() == [1, 5, 6, 0]
    assert [record["key"] for record in broken] == ["manifest/2", "manifest/7", "manifest/3"]
    assert all(record["split"] == "train" and ".png" in record["reason"] for record in broken)


def test_evaluation_leaves_broken_samples_out(damaged: tuple[Split, Config]) -> None:
    split, config = damaged
    reader = BatchReader(split, [(0, np.array([1, 2, 7])), (0, np.array([2, 3]))], BOTH, config, False, 0)
    (first, broken), (second, others) = reader[0], reader[1]
    assert first is not None and first.sample_ids.tolist() == [1]
    assert second is None, "a batch of broken ones alone is left out with them"
    assert [len(broken), len(others)] == [2, 2]


def test_a_pool_without_any_good_sample_is_a_problem(damaged: tuple[Split, Config]) -> None:
    split, config = damaged
    only_broken = dataclasses.replace(split, table=SampleTable.pack([
        dataclasses.replace(split.table[i], image=split.table[i].image if i in (2, 3, 7) else "") for i in range(8)]))
    only_broken = dataclasses.replace(only_broken, store=dataclasses.replace(split.store, table=only_broken.table))
    with refused(3, "image", "text", only_broken.table.images[2]):
        BatchReader(only_broken, [(0, np.array([2]))], BOTH, config, True, 1)[0]
    assert "manifest/2" in bad_samples.path_of(config).read_text("utf-8")


def test_adding_a_set_does_not_change_what_others_draw(folder: Path, tmp_path: Path) -> None:
    alone, both = configured(folder), configured(folder, "data.datasets=[synthetic, manifest]")
    one, other = (load_data(config).splits["train"] for config in (alone, both))
    shift = len(other.table) - len(one.table)
    assert shift == 128 and isinstance(one.table[0], Sample)
    a, b = parts(read(one, alone, [3]), 0), parts(read(other, both, [3 + shift]), 0)
    assert a.pop("id") + shift == b.pop("id")
    assert_equal(a, b)


def half_broken(folder: Path, number: int, broken: int) -> tuple[Split, Config]:
    """Pictures with two captions each, the first of which cannot be read."""
    lines = [VALIDATION]
    for i in range(number):
        path = trees.picture(folder / f"{i}.png", (9 * i, 99, 250 - 9 * i), size=(48, 40))
        if i < broken:
            trees.truncate(path)
        lines.append(f'{{"id": "{i}", "image": "{i}.png", "text": ["a {i}", "the {i}"], "split": "train"}}')
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    config = configured(folder, "data.cache=false", "data.max_bad_pct=100")
    return load_data(config).splits["train"], config


def test_no_sample_stands_twice_in_a_training_batch_whatever_is_broken(tmp_path: Path) -> None:
    split, config = half_broken(tmp_path, 20, 9)
    for seed in range(4):
        jobs = epoch_batches([np.arange(20)], [2.5], 4, seed=seed, epoch=1)
        for k in range(len(jobs)):
            batch = BatchReader(split, jobs, BOTH[:1], config, True, 1)[k][0]
            assert batch is not None and len(batch.keys) == len(set(batch.keys)) == len(jobs[k][1])
            assert all(row >= 9 for row in batch.sample_ids.tolist())
            good = [row for row in (jobs[k][1] % VISIT).tolist() if row >= 9]
            assert [row for row in batch.sample_ids.tolist() if row in good] == good, "they keep their order"


def test_a_training_batch_is_smaller_where_nobody_is_left_to_stand_in(tmp_path: Path) -> None:
    split, config = half_broken(tmp_path, 12, 3)
    for size, expected in ((12, 9), (8, 8), (6, 6)):
        jobs = epoch_batches([np.arange(12)], [1.0], size, seed=0, epoch=1)
        batches = [BatchReader(split, jobs, BOTH[:1], config, True, 1)[k][0] for k in range(len(jobs))]
        keys = [batch.keys for batch in batches if batch is not None]
        assert len(keys) == len(jobs) and all(len(set(own)) == len(own) for own in keys)
        assert [len(own) for own in keys][:1] == [min(expected, len(jobs[0][1]))]


def test_processes_that_share_a_batch_take_different_stand_ins_those_of_a_single_one(tmp_path: Path) -> None:
    split, config = half_broken(tmp_path, 20, 7)
    jobs = epoch_batches([np.arange(20)], [3.0], 5, seed=0, epoch=1)
    shares = [[(task, indices[part]) for task, indices in jobs] for part in (slice(0, 2), slice(2, 5))]
    for k in range(len(jobs)):
        alone = BatchReader(split, jobs, BOTH[:1], config, True, 1)[k][0]
        parts_ = [BatchReader(split, own, BOTH[:1], config, True, 1, whole=jobs)[k][0] for own in shares]
        assert alone is not None and len(set(alone.keys)) == 5
        assert alone.keys == [key for part in parts_ if part is not None for key in part.keys]
