"""A model narrow enough for float64 on a CPU, and hand-made batches with seeded noise, for tests of the mathematics."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from model import TriModalModel
from trimodal.config import ModelConfig, Preset, TrainingConfig
from trimodal.data.batches import Batch
from trimodal.objectives.step import Step

VOCABULARY = 60
CLASSES = 12


@dataclass(frozen=True, kw_only=True)
class NarrowConfig(ModelConfig):
    """Everything as in the real sizes, save the width."""

    num_classes: int = CLASSES
    embed_dim: int = 24
    vocab_size: int = VOCABULARY
    image_size: int = 48

    @property
    def preset(self) -> Preset:
        return Preset(dim=32, num_heads=2, image_depth=2, text_depth=2, audio_depth=2, fusion_depth=2, word_rank=16,
                      budget_gb=1.5)


def narrow_model(**settings) -> TriModalModel:
    """float64, the same weights at every call."""
    torch.manual_seed(0)
    return TriModalModel(NarrowConfig(**settings)).double()


def make_batch(inputs: Sequence[str], size: int, seed: int = 0, captions: int = 3) -> Batch:
    """1 to `captions` captions a sample, some of them worded alike; sounds and captions of many lengths; one sample in
    four without a speaker; two visits of the same sample; two samples with one picture, two with one sound."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    batch = Batch(tuple(inputs), [f"set/{i}" for i in range(size)], torch.arange(size))
    batch.sample_ids[-1] = 0
    if "image" in inputs:
        batch.image_ids = batch.sample_ids.clone()
        batch.image_ids[size // 2] = batch.image_ids[size // 3]
    if "audio" in inputs:
        batch.audio_ids = batch.sample_ids.clone()
        batch.audio_ids[2 * size // 3] = batch.audio_ids[size // 4]
    batch.concepts = torch.rand(size, CLASSES, generator=g) < 0.3
    batch.speakers = integers(-1, 3, size)
    batch.noise = {"path": torch.rand(size, 64, generator=g), "drop_text": torch.rand(size, generator=g)}
    if "image" in inputs:
        batch.images = integers(0, 256, size, 3, 48, 48).to(torch.uint8)
        batch.noise["image"] = torch.rand(size, 9, generator=g)
    if "audio" in inputs:
        batch.audio_lengths = integers(5, 65, size)
        real_BT1 = torch.arange(64)[None, :, None] < batch.audio_lengths[:, None, None]
        batch.audio = ((torch.randn(size, 64, 80, generator=g) * 4 - 6) * real_BT1).half()
        batch.noise["audio"] = torch.rand(size, 4 * 5, generator=g)
    if "text" in inputs:
        batch.caption_owner = torch.arange(size).repeat_interleave(integers(1, captions + 1, size))
        count = len(batch.caption_owner)
        batch.caption_ids = integers(0, 2 * count, count)
        batch.caption_ids[1::7] = batch.caption_ids[0]
        vectors = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))  # all somewhat alike
        batch.caption_vectors = torch.nn.functional.normalize(vectors, dim=1).half()
        batch.input_ids = integers(5, VOCABULARY, count, 9)
        batch.attention_mask = torch.arange(9) < integers(3, 10, count)[:, None]
        batch.noise |= {"text": torch.rand(count, 9, generator=g), "path_text": torch.rand(count, 64, generator=g)}
    return batch


def settings_of(loss: str) -> TrainingConfig:
    """Of `infonce` or `sigmoid`; with `soft` behind it, contrast looks at how alike captions are."""
    kind, *soft = loss.split()
    return TrainingConfig(contrastive_loss=kind, **{"soft_targets": 0.3, "false_negatives": 0.95} if soft else {})  # type: ignore[arg-type]


def part_of(batch: Batch, rows: Tensor) -> Batch:
    """The batch of some of the samples (ascending), with their captions."""
    captions = batch.caption_owner
    lines = None if captions is None else torch.isin(captions, rows).nonzero()[:, 0]
    of_captions = {"input_ids", "attention_mask", "caption_owner", "caption_ids", "caption_vectors"}
    part: dict[str, Any] = {f.name: value[lines if f.name in of_captions else rows] for f in fields(batch)
                            if isinstance(value := getattr(batch, f.name), Tensor)}
    if captions is not None:
        part["caption_owner"] = torch.searchsorted(rows, part["caption_owner"])
    noise = {name: value[lines if name in ("text", "path_text") else rows] for name, value in batch.noise.items()}
    return replace(batch, **part, keys=[batch.keys[i] for i in rows.tolist()], noise=noise)


def small_inputs(subset: set[str], batch: int = 2) -> dict[str, Tensor]:
    """Small inputs: 32 pixels, 5 tokens, 40 frames; one caption and one sound have padding."""
    g = torch.Generator().manual_seed(0)
    given = {}
    if "image" in subset:
        given["images"] = torch.randint(0, 256, (batch, 3, 32, 32), generator=g).to(torch.uint8)
    if "text" in subset:
        given["input_ids"] = torch.randint(0, 50, (batch, 5), generator=g)
        given["attention_mask"] = torch.arange(5) < torch.tensor([5, 3])[:, None]
    if "audio" in subset:
        given["audio"] = torch.randn(batch, 40, 80, generator=g) * 4 - 6
        given["audio_lengths"] = torch.tensor([40, 23])
    return given


def weighted_sum(outputs: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient reaches every output in every direction."""
    g = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for value in outputs.values():
        total = total + (value * torch.randn(value.shape, generator=g)).sum()
    return total


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return float(torch.stack([(one[name] - other[name]).detach().abs().max().double() for name in one]).max())  # or NaN


def step_of(model: TriModalModel, batch: Batch, micro: int | dict[str, int] = 1000, **settings: Any) -> Step:
    """With token dropping and drop-path, as in training."""
    sizes = micro if isinstance(micro, dict) else dict.fromkeys(("image", "audio", "text", "fusion"), micro)
    usual: dict[str, Any] = {"keep": {"image": 0.5, "audio": 0.5}, "drop_path": 0.3, "num_concepts": 10,
                             "device": torch.device("cpu"), "autocast": contextlib.nullcontext}
    return Step(model=model, batch=batch, micro_batch=sizes, mask_id=3, **usual | settings)


def plainly(model: TriModalModel, batch: Batch) -> Step:
    """As in validation: all patches, all paths."""
    return step_of(model, batch, train=False)
