"""What an objective sees of a step: which captions are right, which patches are kept, which words are hidden, and
features that do not depend on how a batch is split."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from model import TriModalModel
from tests.narrow import make_batch, narrow_model, plainly, step_of
from trimodal.data.batches import Batch
from trimodal.objectives.contrastive import Positives, positives_of
from trimodal.objectives.masked import TEXT_MASK_SHARE, hidden_tokens
from trimodal.objectives.step import Share, kept_patches

OWNER, IDS = [0, 0, 1, 2, 2, 3], [7, 8, 7, 9, 9, 5]  # samples 0 and 1 share a caption, 2 has the same one twice
RIGHT = [[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]


@pytest.fixture(scope="module")
def model() -> TriModalModel:
    return narrow_model()


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_micro_batches_are_views_of_what_was_read_and_other_rows_copies(model: TriModalModel, modality: str) -> None:
    """A view of pinned memory is pinned, so it goes to the device while the host goes on."""
    batch = make_batch(("image", "audio"), 10)
    given = batch.images if modality == "image" else batch.audio
    assert given is not None
    step = step_of(model, batch, 4)
    micro_batches = step.micro_batches(modality)
    assert micro_batches == [slice(0, 4), slice(4, 8), slice(8, 10)]
    for part in micro_batches:
        media = step.media(modality, part)
        assert torch.equal(media, given[part]) and media.data_ptr() == given[part.start].data_ptr()
    for rows in (torch.tensor([7, 0, 7]), torch.arange(4, 8)):
        media = step.media(modality, rows)
        assert torch.equal(media, given[rows]) and media.data_ptr() != given[rows[0]].data_ptr()


@pytest.mark.parametrize("size", [2, 100])
def test_a_share_of_a_batch_is_encoded_from_where_its_rows_begin(model: TriModalModel, size: int) -> None:
    batch = make_batch(("image",), 10)
    assert batch.images is not None
    own = dataclasses.replace(batch, images=batch.images[6:9])
    step = step_of(model, own, size, share=Share({"image": range(6, 9)}))
    found = torch.cat([step.media("image", rows) for rows in step.micro_batches("image")])
    assert torch.equal(found, batch.images[6:9]) and torch.equal(step.media("image", torch.tensor([8])), found[2:])


# ---- positives ---------------------------------------------------------------------------------------------------


def test_positives_share_a_sample_or_a_caption() -> None:
    positives = Positives.of(torch.tensor(OWNER), torch.tensor(IDS), torch.arange(4))
    right = torch.tensor(RIGHT).bool()
    assert torch.equal(positives.of_samples(torch.arange(4)), right)
    assert torch.equal(positives.of_captions(torch.arange(6)), right.T)
    rows = torch.tensor([3, 1])
    assert torch.equal(positives.of_samples(rows), right[rows])
    assert torch.equal(positives.of_captions(rows), right.T[rows])


def test_positives_of_many_captions_are_those_of_the_definition() -> None:
    batch = make_batch(("image", "text"), 40)
    owner, ids, files = batch.caption_owner, batch.caption_ids, batch.image_ids
    assert owner is not None and ids is not None and files is not None
    positives = positives_of(batch, ("image", "text"))
    right = positives.of_samples(torch.arange(40))
    for b, c in itertools.product(range(40), range(len(ids))):
        owners = (files == files[b]).nonzero()[:, 0]
        assert bool(right[b, c]) == (int(ids[c]) in ids[torch.isin(owner, owners)].tolist())
    assert (right.sum(0) > 1).any(), "some captions belong to several samples"
    assert torch.equal(positives.of_captions(torch.arange(len(ids))), right.T)
    assert positives.count() == int(right.sum())


FILES = {"one file": [3, 1, 3, 2], "other files": [0, 1, 2, 3]}


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_captions_of_one_file_are_right_for_all_its_samples(modality: str, files: str) -> None:
    """Samples 0 and 2 are the same file, listed twice: neither caption is wrong for either."""
    batch = Batch((modality, "text"), [], torch.arange(4), caption_owner=torch.tensor([0, 1, 2, 3]),
                  caption_ids=torch.tensor([10, 11, 12, 13]))
    setattr(batch, f"{modality}_ids", torch.tensor(FILES[files]))
    found = positives_of(batch, (modality, "text"))
    expected = torch.eye(4).bool()
    if files == "one file":
        expected[0, 2] = expected[2, 0] = True
    assert torch.equal(found.of_samples(torch.arange(4)), expected)
    assert torch.equal(found.of_captions(torch.arange(4)), expected.T) and found.count() == int(expected.sum())


def test_positives_move_to_the_device() -> None:
    moved = Positives.of(torch.tensor(OWNER), torch.tensor(IDS), torch.arange(4)).to(lambda t: t.to("meta"))
    assert moved.file_C.is_meta and moved.group_C.is_meta and moved.file_B.is_meta


def test_images_and_sounds_match_by_file() -> None:
    batch = make_batch(("image", "audio"), 5)
    assert batch.image_ids is not None and batch.audio_ids is not None
    batch.image_ids, batch.audio_ids = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 1, 2, 3, 0])
    positives = positives_of(batch, ("image", "audio"))
    expected = torch.eye(5).bool()
    expected[0, 4] = expected[4, 0] = True  # two visits of one sample
    expected[2, 3] = expected[3, 2] = True  # one picture with two sounds
    assert torch.equal(positives.of_samples(torch.arange(5)), expected)
    assert torch.equal(positives.of_captions(torch.arange(5)), expected.T)


# ---- what is kept, what is hidden --------------------------------------------------------------------------------


def test_kept_patches_are_those_of_the_smallest_draws() -> None:
    uniform = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([20, 15, 10, 5, 1, 3])
    index, valid = kept_patches(uniform, counts, 0.5)
    assert index.shape == valid.shape == (6, 10), "equal K"
    assert valid.sum(1).tolist() == [10, 8, 5, 3, 1, 2], "rounded up"
    for row, (count, u) in enumerate(zip(counts.tolist(), uniform, strict=True)):
        smallest = sorted(range(count), key=lambda i: float(u[i]))[:int(valid[row].sum())]
        assert index[row][valid[row]].tolist() == smallest


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]], ids=str)
def test_kept_patches_do_not_depend_on_the_split(sizes: list[int]) -> None:
    uniform = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([20, 15, 10, 5, 1, 3])

    def subsets(u: Tensor, c: Tensor) -> list[list[int]]:
        index, valid = kept_patches(u, c, 0.4)
        return [i[v].tolist() for i, v in zip(index, valid, strict=True)]

    parts = zip(uniform.split(sizes), counts.split(sizes), strict=True)
    assert [s for u, c in parts for s in subsets(u, c)] == subsets(uniform, counts)


def test_kept_patches_of_images_and_at_least_one() -> None:
    uniform = torch.rand(3, 9, generator=torch.Generator().manual_seed(0))
    index, valid = kept_patches(uniform, torch.tensor([9, 9, 9]), 0.25)
    assert index.shape == (3, 3) and valid.all()
    index, valid = kept_patches(torch.tensor([[0.5, 0.1]]), torch.tensor([1]), 0.01)
    assert index.tolist() == [[0]] and valid.tolist() == [[True]]


def real(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_hidden_tokens_are_inner_ones() -> None:
    lengths = [1, 2, 3, 4, 8, 9]
    hidden = hidden_tokens(real(lengths), torch.zeros(6, 9))
    assert hidden.sum(1).tolist() == [0, 0, 1, 2, 6, 7], "zeros hide whatever may be hidden"
    for row, length in zip(hidden.tolist(), lengths, strict=True):
        assert not row[0] and not any(row[length - 1:])
    assert not hidden_tokens(real(lengths), torch.full((6, 9), TEXT_MASK_SHARE)).any()


def test_the_stated_share_of_words_is_hidden() -> None:
    uniform = torch.rand(500, 22, generator=torch.Generator().manual_seed(0))
    hidden = hidden_tokens(real([22] * 500), uniform)
    assert hidden[:, 1:-1].float().mean() == pytest.approx(TEXT_MASK_SHARE, abs=0.02)
    assert torch.equal(hidden[:, 1:-1], uniform[:, 1:-1] < TEXT_MASK_SHARE)


# ---- features ----------------------------------------------------------------------------------------------------


def test_evaluation_sees_everything(model: TriModalModel) -> None:
    batch = make_batch(("image", "audio", "text"), 6)
    step = dataclasses.replace(plainly(model, batch), micro_batch=dict.fromkeys(("image", "audio", "text"), 4))
    with torch.no_grad():
        assert batch.images is not None and batch.audio is not None and batch.input_ids is not None
        expected = {"image": model.image_features(batch.images),
                    "audio": model.audio_features(batch.audio, batch.audio_lengths),
                    "text": model.text_features(batch.input_ids, batch.attention_mask)}
        for modality, features in expected.items():
            assert (step.features(modality) - features).abs().max() <= 1e-12


def test_paths_are_dropped_as_often_as_said_and_keep_the_mean(model: TriModalModel) -> None:
    uniform = torch.rand(4000, 64, generator=torch.Generator().manual_seed(0))
    batch = Batch(("audio",), [], torch.arange(4000), noise={"path": uniform})
    scale_BZ = step_of(model, batch, drop_path=0.4).path_scales("audio", slice(None))
    assert scale_BZ is not None and scale_BZ.shape == (4000, 2)
    assert torch.allclose((scale_BZ == 0).float().mean(0), torch.tensor([0.2, 0.4]), atol=0.03), "deeper, more often"
    assert torch.allclose(scale_BZ.max(0).values, 1 / (1 - torch.tensor([0.2, 0.4])))
    assert torch.equal(scale_BZ == 0, uniform[:, 24:26] < torch.tensor([0.2, 0.4])), "behind those of the images"


@pytest.mark.parametrize(("change", "inputs"), [({"keep": {}}, "image audio"), ({"drop_path": 0.0}, "image audio"),
                                                ({"drop_path": 0.0}, "audio text"), ({"train": False}, "image text")])
def test_dropping_is_on_in_training(model: TriModalModel, change: dict, inputs: str) -> None:
    batch = make_batch(inputs.split(), 24)
    dropped, other = step_of(model, batch), step_of(model, batch, **change)
    with torch.no_grad():
        for modality in inputs.split():
            differ = (dropped.features(modality) - other.features(modality)).abs().max() > 1e-3
            assert differ or (modality == "text" and "keep" in change)
