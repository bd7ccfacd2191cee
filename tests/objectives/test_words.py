"""Words of captions told from images and sounds: the formulas, what is seen of a caption, and what a run keeps."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import TriModalModel
from tests.narrow import VOCABULARY, make_batch, narrow_model, plainly, step_of
from tests.refusals import refused
from tests.small_runs import SmallRuns, differing
from trimodal.blocks import masked_mean
from trimodal.checkpoint import load
from trimodal.config import TaskConfig
from trimodal.errors import ConfigError
from trimodal.objectives.masked import hidden_tokens
from trimodal.objectives.step import first_keys
from trimodal.objectives.words import WORD_MASK_SHARE, MaskedWords, Words, inverse_document_frequency

B = 12


@pytest.fixture(scope="module")
def model() -> TriModalModel:
    return narrow_model()


def words_of(model: TriModalModel, inputs: str) -> Words:
    torch.manual_seed(1)
    objective = Words(model, inputs.split(), 0).double()
    objective.idf_V = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    objective.idf_V[5:15] = 0.0  # words that all captions have
    return objective


def loss_of(objective: Any, step: Any) -> float:
    with torch.no_grad():
        return sum(float(objective.loss(step, *rows)[0]) for rows in objective.micro_batches(step))


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["image text", "audio text"])
@pytest.mark.parametrize("size", [1000, 5])
def test_words_are_told_in_proportion_to_how_rare_they_are(model: TriModalModel, inputs: str, size: int) -> None:
    batch, objective = make_batch(inputs.split(), B), words_of(model, inputs)
    assert batch.input_ids is not None and batch.attention_mask is not None and batch.caption_owner is not None
    batch.input_ids[0] = batch.input_ids[1]  # a word is told once, however often it comes
    name = inputs.split()[0]
    given = [batch.images] if name == "image" else [batch.audio, batch.audio_lengths]
    total = 0.0
    with torch.no_grad():
        logits = objective.heads[name](masked_mean(*getattr(model, name)(*given))).log_softmax(1)
    for b in range(B):
        own = (batch.caption_owner == b).nonzero()[:, 0].tolist()
        words = {int(batch.input_ids[c, i]) for c in own for i in range(9) if batch.attention_mask[c, i]}
        rarity = {word: float(objective.idf_V[word]) for word in words}
        total -= sum(rarity[word] * float(logits[b, word]) for word in words) / sum(rarity.values())
    step = dataclasses.replace(plainly(model, batch), micro_batch=dict.fromkeys(("image", "audio", "text"), size))
    assert loss_of(objective, step) == pytest.approx(total, abs=1e-9) and objective.count(step) == B


def test_samples_whose_words_all_captions_have_do_not_count(model: TriModalModel) -> None:
    batch, objective = make_batch(("image", "text"), 4), words_of(model, "image text")
    assert batch.input_ids is not None and batch.caption_owner is not None
    step = plainly(model, batch)
    batch.input_ids[batch.caption_owner == 1] = 7
    assert objective.count(step) == 3
    batch.input_ids[:] = 7
    assert objective.count(step) == 0 and loss_of(objective, step) == 0.0


def test_rarity_counts_the_captions_with_a_word_each_once() -> None:
    captions = [[101, 5, 5, 102], [101, 5, 7, 102], [101, 102], [101, 9, 102]]
    offsets = np.cumsum([0, *map(len, captions)])
    found = inverse_document_frequency(np.concatenate(captions).astype(np.int32), offsets, 103)
    for word, number in {101: 4, 102: 4, 5: 2, 7: 1, 9: 1, 8: 0}.items():
        assert float(found[word]) == pytest.approx(math.log(5 / (1 + number))), word
    assert found[101] == 0, "what begins every caption tells nothing"


@pytest.mark.parametrize("name", ["words", "masked_words"])
@pytest.mark.parametrize("inputs", ["text", "image", "image audio"])
def test_words_need_a_caption_and_something_to_tell_it_from(name: str, inputs: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs text and image or audio, got {inputs.replace(' ', ', ')}"):
        TaskConfig(inputs=tuple(inputs.split()), objectives={name: 1.0})


# ---- masked words ----------------------------------------------------------------------------------------------------


def masked_words_of(model: TriModalModel, inputs: str) -> MaskedWords:
    torch.manual_seed(1)
    return MaskedWords(model, inputs.split(), 0).double()


@pytest.mark.parametrize("inputs", ["image text", "audio text", "image audio text"])
def test_masked_words_are_predicted_through_the_fusion(model: TriModalModel, inputs: str) -> None:
    batch, objective = make_batch(inputs.split(), B), masked_words_of(model, inputs)
    step, ids, mask = plainly(model, batch), batch.input_ids, batch.attention_mask
    assert ids is not None and mask is not None
    total, number = 0.0, 0
    with torch.no_grad():
        for b, caption in enumerate(first_keys(batch, objective.inputs).tolist()):
            hidden = hidden_tokens(mask[caption:caption + 1], batch.noise["text"][caption:caption + 1], WORD_MASK_SHARE)
            shown = model.text(ids[caption:caption + 1].masked_fill(hidden, 3), mask[caption:caption + 1])
            given = {"text": shown, **{name: step.tokens(name, torch.tensor([b])) for name in objective.towers}}
            states = model.fusion.states(given, 10)[0, 1:]
            for position in hidden[0].nonzero()[:, 0].tolist():
                word = objective.head(states[position])
                total -= float((model.text.words.weight @ word).log_softmax(0)[ids[caption, position]])
                number += 1
    assert loss_of(objective, step) == pytest.approx(total, abs=1e-9) and objective.count(step) == number > B


def test_most_words_are_hidden_and_what_is_hidden_is_not_seen(model: TriModalModel) -> None:
    batch, objective = make_batch(("image", "text"), B), masked_words_of(model, "image text")
    assert batch.input_ids is not None and batch.attention_mask is not None
    hidden = hidden_tokens(batch.attention_mask, batch.noise["text"], WORD_MASK_SHARE)
    inner = hidden_tokens(batch.attention_mask, batch.noise["text"] * 0, WORD_MASK_SHARE)
    assert float(hidden.sum() / inner.sum()) == pytest.approx(0.8, abs=0.1)
    read: list[Tensor] = []
    hook = objective.head.register_forward_hook(lambda _, given, predicted: read.append(predicted))
    for _ in range(2):
        loss_of(objective, plainly(model, batch))
        batch.input_ids[hidden] = 6
    hook.remove()
    assert torch.equal(*read)


def test_the_picture_is_read_by_the_words_that_are_told(model: TriModalModel) -> None:
    """And the gradient reaches both towers."""
    batch, objective = make_batch(("image", "text"), B), masked_words_of(model, "image text")
    before = loss_of(objective, plainly(model, batch))
    assert batch.images is not None
    other = dataclasses.replace(batch, images=batch.images.flip(0))
    assert abs(before - loss_of(objective, plainly(model, other))) > 1e-3
    model.zero_grad(set_to_none=True)
    step = step_of(model, batch)
    with step.sharing({"image"}):
        objective.loss(step, slice(0, B))[0].backward()
        gradient = step.encoding("image").gradient_BND
    assert gradient is not None and gradient.norm() > 1e-3 and model.text.embed.weight.grad is not None
    model.zero_grad(set_to_none=True)


# ---- a run -----------------------------------------------------------------------------------------------------------

WORDS = [f"stages.align.tasks.{task}.objectives={{contrastive: 1.0, masked_words: 0.5, words: 0.5}}" for task in (0, 1)]


def test_a_run_that_goes_on_has_the_same_bits_and_its_model_no_heads(small: SmallRuns, tmp_path: Path) -> None:
    quick = ("report.gallery_queries=0", "evaluation.max_validation=8", "training.epochs=5", *WORDS)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    small.train(whole, *quick)
    small.train(parted, *quick)
    for name in ("checkpoint_epoch_3.pt", "checkpoint_epoch_4.pt", "checkpoint_epoch_5.pt"):
        if (parted / "checkpoints" / name).exists() and name != "checkpoint_epoch_3.pt":
            (parted / "checkpoints" / name).unlink()
    small.train(parted, *quick, resume=str(parted / "checkpoints" / "checkpoint_epoch_3.pt"))
    first, second = (load(folder / "checkpoints" / "checkpoint_epoch_5.pt") for folder in (whole, parted))
    assert differing(first["model_state_dict"], second["model_state_dict"]) == []
    middle = load(whole / "checkpoints" / "checkpoint_epoch_3.pt")
    assert middle["stage"] == "align" and any("words.heads" in name for name in middle["stage_state"]["objectives"])
    assert not any("words" in name and "text.words" not in name for name in middle["model_state_dict"])


def test_rarity_is_that_of_the_training_split(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path, *WORDS)
    stage, train = small.stage(run, "align"), run.data.splits["train"]
    captions = [set(train.token_ids[start:stop].tolist()) for start, stop in
                zip(train.token_offsets[:-1], train.token_offsets[1:], strict=True)]
    objective = stage.objectives["0_words"]
    assert isinstance(objective, Words)
    idf = objective.idf_V
    for word in range(0, len(idf), 7):
        assert float(idf[word]) == pytest.approx(
            math.log((1 + len(captions)) / (1 + sum(word in one for one in captions))), abs=1e-6)


def test_a_task_that_cannot_tell_words_is_refused_with_its_key(small: SmallRuns, tmp_path: Path) -> None:
    with refused("stages[0].tasks[0]", "inputs", "words needs text", error=ConfigError):
        small.config(tmp_path, "stages.pretrain.tasks.0.objectives={words: 1.0}")
