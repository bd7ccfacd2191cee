"""Objectives: every way of splitting an effective batch gives the same loss and the same gradients, and each objective
learns from what it says and from nothing else."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import TriModalModel
from tests.narrow import VOCABULARY, largest_difference, make_batch, narrow_model, part_of, plainly, step_of
from trimodal.config import TaskConfig
from trimodal.data.batches import Batch
from trimodal.memory.tracker import PeakMemory
from trimodal.objectives import OBJECTIVES
from trimodal.objectives.base import Objective, learn
from trimodal.objectives.contrastive import pair_scale, positives_of
from trimodal.objectives.labels import TEXT_DROP_SHARE
from trimodal.objectives.masked import hidden_tokens
from trimodal.objectives.matching import hard_negatives
from trimodal.objectives.step import Step, first_keys
from trimodal.training.stage import Stage, compute_losses

B = 24
CASES = [("contrastive", "image text"), ("contrastive", "audio text"), ("contrastive", "image audio"),
         ("matching", "image text"), ("matching", "audio text"), ("matching", "image audio"),
         ("concepts", "image text"), ("concepts", "audio text"), ("concepts", "image audio text"), ("concepts", "text"),
         ("masked", "image"), ("masked", "audio"), ("masked", "text"), ("masked", "image audio text"),
         ("masked_words", "image text"), ("masked_words", "audio text"), ("contrastive words", "image text"),
         ("contrastive words", "audio text"), ("masked_words words", "image audio text"),
         ("speaker", "audio"), ("masked speaker", "audio"), ("contrastive matching concepts", "image text")]
ALONE = [("speaker", "audio"), ("contrastive matching concepts", "image text")]  # in parts of one sample as well
SPLITS: dict[str, int | dict[str, int]] = {
    "uneven towers": {"image": 24, "audio": 7, "text": 10, "fusion": 9}, "4 x 6": 6, "ragged 5": 5, "one by one": 1}


@pytest.fixture(scope="module")
def model() -> TriModalModel:
    return narrow_model()


def objective_of(model: TriModalModel, name: str, inputs: str) -> Any:
    torch.manual_seed(1)
    return OBJECTIVES[name](model, inputs.split(), 3).double()


def loss_of(objective: Objective, step: Step) -> float:
    with torch.no_grad():
        return sum(float(objective.loss(step, *rows)[0]) for rows in objective.micro_batches(step))


def gradients_of(step: Step, *objectives: Objective) -> dict[str, Tensor]:
    """Loss and gradients of the sum of some objectives, as training gets them."""
    both = nn.ModuleDict({"model": step.model, **{type(o).__name__: o for o in objectives}})
    both.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)

    def backward(loss: Tensor) -> None:
        total.add_(loss.detach())
        loss.backward()

    learn(step, [(1.0, objective) for objective in objectives], backward)
    return {"loss": total, **{name: p.grad.clone() for name, p in both.named_parameters() if p.grad is not None}}


# ---- splitting a batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "inputs", "split"), [
    pytest.param(*case, split, marks=() if split == "uneven towers" or (split == "one by one" and case in ALONE)
                 else pytest.mark.repetition) for case in CASES for split in SPLITS])
def test_every_split_gives_the_same_gradients(model: TriModalModel, names: str, inputs: str, split: str) -> None:
    objectives = [objective_of(model, name, inputs) for name in names.split()]
    batch = make_batch(inputs.split(), B)
    whole = gradients_of(step_of(model, batch), *objectives)
    parts = gradients_of(step_of(model, batch, SPLITS[split]), *objectives)
    assert largest_difference(whole, parts) <= 1e-9
    if "contrastive" in names:
        assert whole[f"model.logit_scale.{'_'.join(objectives[0].inputs)}"].abs() > 1e-3
    towers = {modality for modality in inputs.split() if whole[f"model.{modality}.embed.weight"].abs().max() > 1e-6}
    assert towers == set(inputs.split()), "the gradient reaches every tower"


@pytest.mark.parametrize("inputs", ["image text", "image audio"])
def test_plain_accumulation_is_another_loss(model: TriModalModel, inputs: str) -> None:
    """Why the batch is one loss: four losses over six samples each have fewer negatives, and other gradients."""
    objective, batch = objective_of(model, "contrastive", inputs), make_batch(inputs.split(), B)
    whole = gradients_of(step_of(model, batch), objective)
    parts = [gradients_of(step_of(model, part_of(batch, rows)), objective) for rows in torch.arange(B).split(6)]
    mean = {name: torch.stack([part[name] for part in parts]).mean(0) for name in whole}
    assert whole["loss"] - mean["loss"] > 1.0
    gradients = [(value, mean[name]) for name, value in whole.items() if name != "loss"]
    apart = torch.stack([(value - other).norm() for value, other in gradients]).norm()
    assert apart > 0.1 * torch.stack([value.norm() for value, _ in gradients]).norm()


def test_micro_batches_save_memory(model: TriModalModel) -> None:
    objective, batch = objective_of(model, "contrastive", "image text"), make_batch(("image", "text"), B)

    def peak(micro: int) -> int:
        model.zero_grad(set_to_none=True)
        with PeakMemory() as tracker:
            learn(step_of(model, batch, micro), [(1.0, objective)], Tensor.backward)
        return tracker.peak_bytes

    assert peak(4) < 0.6 * peak(1000)


def test_matching_looks_at_the_features_of_contrast(model: TriModalModel) -> None:
    batch = make_batch(("image", "text"), B)
    contrastive, matching = (objective_of(model, name, "image text") for name in ("contrastive", "matching"))
    alone = gradients_of(step_of(model, batch), matching)
    step = step_of(model, batch, 5)
    gradients_of(step, contrastive)
    known = step.known_features
    assert set(known) == {"image", "text"} and not any(features.requires_grad for features in known.values())
    assert largest_difference(alone, gradients_of(step, matching)) <= 1e-9


# ---- against naive formulas --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["text image", "audio text", "audio image"])
def test_contrast_goes_both_ways(model: TriModalModel, inputs: str) -> None:
    batch = make_batch(inputs.split(), B)
    objective, step = objective_of(model, "contrastive", inputs), plainly(model, batch)
    with torch.no_grad():
        loss, parts = objective.loss(step)
        query, key = (step.features(name) for name in objective.inputs)
        scale = model.logit_scale["_".join(objective.inputs)].exp()
        assert float(scale) == pytest.approx(1 / 0.07, rel=1e-6), "as all begin"
        scores = query @ key.T * scale
        right = positives_of(batch, objective.inputs).of_samples(torch.arange(B))
        sides = [-(s.log_softmax(1).masked_fill(~r, 0).sum(1) / r.sum(1)).mean()
                 for s, r in ((scores, right), (scores.T, right.T))]
    assert float(loss) == pytest.approx(float(sum(sides)) / 2, abs=1e-12)
    assert list(parts) == [f"contrastive_{'_'.join(objective.inputs)}"]


@pytest.mark.parametrize("name", ["image", "text", "audio"])
def test_masked_pretraining_drops_paths_of_every_modality(model: TriModalModel, name: str) -> None:
    batch, objective = make_batch((name,), 8), objective_of(model, "masked", name)
    without, half = (loss_of(objective, step_of(model, batch, drop_path=p)) for p in (0.0, 0.5))
    assert abs(without - half) > 1e-6 * abs(without)  # in float64, and nothing else differs


def test_a_temperature_at_its_bound_still_has_a_gradient(model: TriModalModel) -> None:
    scale = model.logit_scale["image_text"]
    before = scale.detach().clone()
    try:
        scale.data.fill_(9.0)
        model.bound_temperatures()
        step = plainly(model, make_batch(("image", "text"), 8))
        assert float(pair_scale(step, ("image", "text")).detach()) == pytest.approx(100)
        loss, _ = objective_of(model, "contrastive", "image text").loss(step)
        assert abs(float(torch.autograd.grad(loss, scale)[0])) > 1e-3
    finally:
        scale.data.copy_(before)


def test_matching_is_told_right_pairs_from_hard_wrong_ones(model: TriModalModel) -> None:
    batch = make_batch(("image", "text"), 8)
    objective, step = objective_of(model, "matching", "image text"), plainly(model, batch)
    with torch.no_grad():
        keys, queries, some = objective.negatives(step)
        first = first_keys(batch, objective.inputs)
        total = 0.0
        for b in range(8):
            pairs = [(b, int(first[b]), 1.0)]
            if some[b]:
                pairs += [(b, int(keys[b]), 0.0), (int(queries[b]), int(first[b]), 0.0)]
            for image, caption, target in pairs:
                given = {"image": step.tokens("image", torch.tensor([image])),
                         "text": step.tokens("text", torch.tensor([caption]))}
                logit = objective.head(model.fuse(given)[0])[0, 0]
                total += float(F.binary_cross_entropy_with_logits(logit, torch.tensor(target, dtype=torch.float64)))
    assert loss_of(objective, step) == pytest.approx(total, abs=1e-9) and some.any() and objective.count(step) == 24


@pytest.mark.parametrize("seed", range(10))
def test_no_right_pair_is_ever_called_wrong(model: TriModalModel, seed: int) -> None:
    """Few distinct captions: samples whose caption fits everywhere have no wrong partner, on one side or on both."""
    batch = make_batch(("image", "text"), 5, seed)
    assert batch.caption_ids is not None and batch.caption_owner is not None
    batch.caption_ids %= 3
    objective, step = objective_of(model, "matching", "image text"), plainly(model, batch)
    keys, queries, some = objective.negatives(step)
    right = positives_of(batch, objective.inputs).of_samples(torch.arange(5))
    first = first_keys(batch, objective.inputs)
    for b in range(5):
        if some[b]:
            assert not right[b, keys[b]] and not right[queries[b], first[b]]
        else:
            assert right[b].all() or right[:, first[b]].all()


def test_negatives_are_drawn_by_similarity_each_with_draws_of_its_own(model: TriModalModel) -> None:
    batch = make_batch(("image", "text"), B)
    objective, step = objective_of(model, "matching", "image text"), plainly(model, batch)
    keys, queries, _ = objective.negatives(step)
    first, uniform = first_keys(batch, objective.inputs), batch.noise["path"]
    positives, scale = positives_of(batch, objective.inputs), torch.tensor(1 / 0.07)
    image, text = (step.features(name).detach() for name in objective.inputs)
    expected = hard_negatives(image, text, scale, positives.of_samples, uniform[:, 62])[0]
    assert torch.equal(keys, expected)
    right = positives.of_captions(first)
    assert torch.equal(queries, hard_negatives(text[first], image, scale, lambda rows: right[rows], uniform[:, 63])[0])


def test_negatives_come_from_the_whole_batch(model: TriModalModel) -> None:
    batch = make_batch(("image", "audio"), B)
    objective = objective_of(model, "matching", "image audio")
    whole, parts = (objective.negatives(step_of(model, batch, micro)) for micro in (1000, 4))
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert (whole[0] // 4 != torch.arange(B) // 4).sum() > B // 2


@pytest.mark.parametrize("inputs", ["image text", "text"])
def test_concepts_are_read_without_most_texts(model: TriModalModel, inputs: str) -> None:
    batch = make_batch(inputs.split(), B)
    objective = objective_of(model, "concepts", inputs)
    seen = batch.noise["drop_text"] >= TEXT_DROP_SHARE if inputs != "text" else torch.ones(B).bool()
    assert seen.any() and (inputs == "text" or not seen.all())
    first = first_keys(batch, objective.inputs)
    total, used = 0.0, 10
    for b in range(B):
        given = {"images": batch.images[b:b + 1]} if batch.images is not None else {}
        if seen[b]:
            row = slice(int(first[b]), int(first[b]) + 1)
            given |= {"input_ids": batch.input_ids[row], "attention_mask": batch.attention_mask[row]}  # type: ignore[index]
        with torch.no_grad():
            logits = model(**given)["logits"][0, :used]
        target = batch.concepts[b, :used].double()  # type: ignore[index]
        total -= float((target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log()).sum())
    assert loss_of(objective, plainly(model, batch)) == pytest.approx(total, abs=1e-9)


def test_unused_classes_are_left_alone(model: TriModalModel) -> None:
    batch = make_batch(("image", "text"), B)
    objective = objective_of(model, "concepts", "image text")
    before = gradients_of(step_of(model, batch), objective)
    weight = before["model.classifier.weight"]
    assert not weight[10:].any() and weight[:10].abs().max(1).values.all()
    flipped = dataclasses.replace(batch, concepts=batch.concepts.clone())  # type: ignore[union-attr]
    flipped.concepts[:, 10:] ^= True  # type: ignore[index]
    count = objective.count(step_of(model, batch)) / objective.count(step_of(model, flipped))
    after = gradients_of(step_of(model, flipped), objective)
    assert float(before["loss"] * count) == pytest.approx(float(after["loss"]), abs=1e-12)


@pytest.mark.parametrize("train", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("name", ["image", "audio"])
def test_hidden_patches_are_not_seen(model: TriModalModel, name: str, train: bool) -> None:
    """Other values in a hidden patch change its target and nothing of what is predicted."""
    batch = make_batch((name,), 4)
    objective, step = objective_of(model, "masked", name), step_of(model, batch, train=train)
    media = batch.images if name == "image" else batch.audio
    lengths = [] if name == "image" else [batch.audio_lengths]
    encoder, rows = getattr(model, name), slice(0, 4)
    kept, kept_valid = step.kept(name, rows)

    def predict() -> tuple[Tensor, Tensor, Tensor]:
        patches, valid = encoder.patches(media, *lengths)
        tokens = step.encode(name, rows, hide=True)[0]
        step.forget(name)
        predicted, seen = objective.heads[name](tokens, kept, kept_valid, encoder.positions(media), valid)
        return predicted, seen, patches if valid is None else patches * valid[:, :, None]

    predicted, seen, patches = predict()
    hidden = ~seen & patches.any(2)
    assert hidden.sum() == objective.count(step)
    b, n = hidden.nonzero()[0].tolist()
    if name == "image":
        media[b, :, n // 3 * 16:n // 3 * 16 + 16, n % 3 * 16:n % 3 * 16 + 16] ^= 255  # type: ignore[index]
    else:
        media[b, n // 5 * 16:n // 5 * 16 + 16, n % 5 * 16:n % 5 * 16 + 16] += 3  # type: ignore[index]
    after, _, changed = predict()
    assert torch.equal(predicted, after)
    touched = (patches != changed).any(2).nonzero().tolist()
    assert touched == [[b, n]]


def test_padding_is_no_hidden_patch(model: TriModalModel) -> None:
    batch = make_batch(("audio",), 6)
    assert batch.audio is not None and batch.audio_lengths is not None
    batch.audio_lengths.clamp_(max=48)
    noise = {**batch.noise, "audio": batch.noise["audio"][:, :15]}
    short = dataclasses.replace(batch, audio=batch.audio[:, :48], noise=noise)
    objective = objective_of(model, "masked", "audio")
    results = [gradients_of(step_of(model, padded), objective) for padded in (batch, short)]
    assert largest_difference(*results) <= 1e-12


def test_words_are_predicted_from_the_table(model: TriModalModel) -> None:
    batch = make_batch(("text",), 12)
    objective, step = objective_of(model, "masked", "text"), plainly(model, batch)
    ids = batch.input_ids
    assert ids is not None and batch.attention_mask is not None
    hidden = hidden_tokens(batch.attention_mask, batch.noise["text"])
    with torch.no_grad():
        states = model.text(ids.masked_fill(hidden, 3), batch.attention_mask).tokens_BND
        total = 0.0
        for c, position in hidden.nonzero().tolist():
            word = objective.heads["text"](states[c, position])
            total -= float((model.text.words.weight @ word).log_softmax(0)[ids[c, position]])
    assert loss_of(objective, step) == pytest.approx(total, abs=1e-9) and objective.count(step) == int(hidden.sum()) > 0
    assert int(ids.max()) < VOCABULARY


def test_speakers_that_are_unknown_do_not_count(model: TriModalModel) -> None:
    batch = make_batch(("audio",), B)
    assert batch.speakers is not None
    known = (batch.speakers >= 0).nonzero()[:, 0]
    assert 0 < len(known) < B
    objective = objective_of(model, "speaker", "audio")
    whole = gradients_of(step_of(model, batch), objective)
    assert largest_difference(whole, gradients_of(step_of(model, part_of(batch, known)), objective)) <= 1e-12


# ---- nothing to learn --------------------------------------------------------------------------------------------


def without_labels(batch: Batch) -> Batch:
    assert batch.concepts is not None and batch.speakers is not None
    return dataclasses.replace(batch, concepts=batch.concepts & False, speakers=batch.speakers * 0 - 1)


NOTHING: list[tuple[str, str, int, dict]] = [
    ("contrastive", "image text", 1, {}), ("matching", "image text", 1, {}), ("concepts", "image text", 4, {}),
    ("concepts", "image", 4, {"num_concepts": 0}), ("speaker", "audio", 4, {}),
    ("masked", "image", 4, {"keep": {}}), ("masked", "audio", 4, {"keep": {}})]


def stage_of(tasks: dict[str, float], inputs: str, objectives: dict[str, Objective]) -> Stage:
    task = TaskConfig(inputs=tuple(inputs.split()), objectives=tasks)
    modules = nn.ModuleDict({f"0_{name}": objective for name, objective in objectives.items()})
    return Stage(None, [task], modules, None, None, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "inputs", "size", "settings"), NOTHING)
def test_nothing_to_learn_is_no_loss(model: TriModalModel, name: str, inputs: str, size: int, settings: dict) -> None:
    batch = make_batch(inputs.split(), size)
    step = step_of(model, batch if settings else without_labels(batch), **settings)
    objective = objective_of(model, name, inputs)
    assert objective.count(step) == 0
    model.zero_grad(set_to_none=True)
    losses = compute_losses(stage_of({name: 1.0}, inputs, {name: objective}), 0, step, Tensor.backward)
    assert losses == (None, {}) and all(p.grad is None for p in model.parameters())


def test_captions_too_short_hide_nothing(model: TriModalModel) -> None:
    batch = make_batch(("text",), 4)
    assert batch.attention_mask is not None
    batch.attention_mask[:, 2:] = False
    assert objective_of(model, "masked", "text").count(step_of(model, batch)) == 0


def test_where_every_caption_fits_matching_learns_from_right_pairs(model: TriModalModel) -> None:
    batch = make_batch(("image", "text"), 4)
    assert batch.caption_ids is not None
    batch.caption_ids[:] = 1
    objective = objective_of(model, "matching", "image text")
    result = gradients_of(step_of(model, batch), objective)
    assert all(value.isfinite().all() for value in result.values())
    assert result["Matching.head.bias"] < 0, "right pairs alone raise the logit"


@pytest.mark.parametrize("order", list(itertools.permutations(["matching", "contrastive", "concepts"])), ids="-".join)
def test_weights_and_counts_make_the_loss(model: TriModalModel, order: tuple[str, ...]) -> None:
    weights = dict(zip(("contrastive", "matching", "concepts"), (1.0, 0.5, 0.25), strict=True))
    objectives = {name: objective_of(model, name, "image text") for name in order}
    step = step_of(model, make_batch(("image", "text"), 6), 4)
    stage = stage_of({name: weights[name] for name in order}, "image text", objectives)
    encoded: list[str] = []
    total, parts = compute_losses(stage, 0, step, lambda loss: encoded.append(",".join(step.known_features)))
    expected = sum(weights[name] * float(gradients_of(step, objectives[name])["loss"]) for name in order)
    assert total is not None and float(total) == pytest.approx(expected, abs=1e-9)
    assert set(parts) == {"contrastive_image_text", "matching", "matching_accuracy", "concepts"}
    assert 0 <= float(parts["matching_accuracy"]) <= 1
    assert encoded[0] == "image,text", "contrast comes first"
