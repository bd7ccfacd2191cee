"""Pretrained towers: what a tower takes, gives and says of itself. `opening.py` opens one by name.

Whatever its library, a tower is in eval mode, always: batch statistics, dropout and dropped layers would let samples of
a batch change each other, or draw random numbers. Its tokens stand in the order of the rows of an image, of time, or of
words; class tokens, registers and the like are left out.

Shape suffixes: B samples, N tokens, D width, S pixels of a side or samples of a sound, L token ids, T frames, M bins of
a frame.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

# ---- what a tower takes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageInput:
    """Images as the tower was trained on them: uint8, or floats in 0..1, [B, 3, size, size]; the tower standardises.

    `fit` "crop": the shorter side is resized to size / crop_pct, then the middle is cut out; "squash": both sides are
    resized to `size`. `filter` is Pillow's, by its name in small letters.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["crop", "squash"]
    crop_pct: float
    filter: Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class TextInput:
    """Token ids [B, L] of `tokenizer`, a tokenizer.json's text, cut to `max_length`, and which of them are real.

    `pad_to`: every text is padded with `pad_id` to so many ids; None: to the longest of its batch. Where not `masked`,
    the tower was trained to read padding as well: all ids count as real.
    """

    tokenizer: str
    max_length: int
    pad_to: int | None
    pad_id: int
    masked: bool


@dataclass(frozen=True)
class SoundInput:
    """Frames [B, T, num_bins] that `features_of` makes of a waveform at `rate_hz`, and how many of them are real.

    The tower reads `window_frames` at a time. Where `whole_windows`, T is a multiple of it: the front end fills a short
    sound up as the tower's library does, with more than zeros. `settings` are those of the front end.
    """

    rate_hz: int
    front_end: str
    num_bins: int
    frames_per_s: float
    window_frames: int
    whole_windows: bool
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


Input = ImageInput | TextInput | SoundInput
INPUTS: dict[str, type[Input]] = {"image": ImageInput, "text": TextInput, "audio": SoundInput}


class Encoded(NamedTuple):
    """Output of a tower: the tokens of its map, which of them are real (None: all), and its own pooled feature."""

    tokens_BND: Tensor
    valid_BN: Tensor | None
    pooled_BD: Tensor


# ---- a tower -----------------------------------------------------------------------------------------------------


class PretrainedTower(nn.Module):
    """A pretrained encoder of one modality behind one protocol; see the module.

    Attributes:
        modality: "image", "text" or "audio".
        dim: width D of the tokens and of the pooled feature.
        depth: its last layer, as `layer_of` counts them.
        input: how images, texts or sounds are prepared for it.
        source: the name it was opened by. licence: as its source states it, or "unknown".
        digest: sha256 of the weights it was opened with; empty where it was opened without.
        description: plain data from which `build_tower` makes the same architecture.
    """

    modality: ClassVar[str]

    def __init__(self, description: Mapping[str, Any], dim: int, depth: int, blocks: Sequence[nn.Module]) -> None:
        """`blocks` are what is recomputed one by one."""
        super().__init__()
        self.description = dict(description)
        self.source, self.licence = str(description["source"]), str(description["licence"])
        self.digest = str(description["digest"])
        self.input = input_of(description)
        self.dim, self.depth, self.recompute_every = dim, depth, 0
        if isinstance(self.input, ImageInput):
            self.register_buffer("mean", torch.tensor(self.input.mean), persistent=False)
            self.register_buffer("std", torch.tensor(self.input.std), persistent=False)
        self.blocks = tuple(blocks)  # no ModuleList: their names in the state dict are the library's
        for i, block in enumerate(blocks):
            block.forward = functools.partial(self._run_block, i, block.forward)

    def train(self, mode: bool = True) -> "PretrainedTower":
        """Stays in eval mode whatever `mode`: see the module."""
        return super().train(False)

    def set_recompute(self, every: int) -> None:
        """Compute the activations of every n-th block again in the backward pass (1: of all, 0: of none)."""
        self.recompute_every = every

    def _run_block(self, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if self.recompute_every and number % self.recompute_every == 0 and torch.is_grad_enabled():
            return recompute(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Encoded:
        """Encode a batch of what `input` describes.

        Args:
            inputs: images [B, 3, S, S], token ids [B, L], or frames of sounds [B, T, M].
            valid: of texts, bool [B, L]; of sounds, int64 [B], how many frames are real. None: all are.
        """
        raise NotImplementedError

    def layer_of(self, parameter_name: str) -> int:
        """Layer of a parameter: 0 for what comes before the blocks, then 1 to `depth`; what follows the last block
        counts with it, or as a layer of its own."""
        raise NotImplementedError

    def standardised(self, images: Tensor) -> Tensor:
        """uint8 or floats in 0..1 [B, 3, S, S] -> floats less the tower's mean, by its standard deviation."""
        mean, std = (getattr(self, name)[:, None, None] for name in ("mean", "std"))
        values = images.to(mean.dtype)
        return ((values / 255 if images.dtype == torch.uint8 else values) - mean) / std


def input_of(description: Mapping[str, Any]) -> Input:
    """The input that a description states."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                              for key, value in description["input"].items()}
    return INPUTS[description["modality"]](**values)


def describe(family: str, modality: str, source: str, licence: str, taken: Input, **architecture: Any
             ) -> dict[str, Any]:
    """A description without the digest, which is known once the weights are there."""
    return {"family": family, "modality": modality, "source": source, "licence": licence, "digest": "",
            "input": dataclasses.asdict(taken), **architecture}


def digest_of(module: nn.Module) -> str:
    """sha256 of the names, types, shapes and bytes of all weights, in the order of their names."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def sealed(tower: PretrainedTower) -> PretrainedTower:
    """A tower whose weights have been loaded, in float32 and eval mode, with their digest written down."""
    tower.float().eval()
    tower.digest = tower.description["digest"] = digest_of(tower)
    return tower


class Source(NamedTuple):
    """What a name of a tower stands for, as far as small files tell, and how the weights are read."""

    description: dict[str, Any]
    load: Callable[[], PretrainedTower]  # with its weights, fetched where they are missing
    is_here: bool = True  # whether this machine has the weights


Load = Literal["always", "if here", "never"]
