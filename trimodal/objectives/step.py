"""One effective batch on its way through the model: its micro-batches, their exact encoding, and its ranks' shares.

Nothing here draws a random number: each one is in the batch, so rows that are encoded alone, in micro-batches, or all
at once have the same tokens and the same gradients.

Shape suffixes: B samples, C captions, K kept patches, N patches, Z depth.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from trimodal.distributed import World

PATH_NOISE = {"image": ("path", 0), "audio": ("path", 24), "text": ("path_text", 0)}  # of drop-path: name, first column

Rows = slice | Tensor  # a micro-batch, or an int64 index on the host


@dataclass(frozen=True)
class Share:
    """The rows of a whole effective batch that one process encodes, by tower ("text": captions, all others: samples),
    and the row of the first image or clip in its batch."""

    rows: Mapping[str, range]
    first_media: int


@dataclass
class Step:
    """One effective batch on its way through the model.

    `batch` stays on the host; `encode` brings the rows asked for to the device. `micro_batch` is how many rows of each
    tower are in memory at once. In evaluation (`train` False) all patches are seen and no path is dropped, save where
    hiding patches is the task itself.

    Rows are those of the whole effective batch, whichever process encodes them: `share` says which ones are ours, and
    `features` gathers those of the others.
    """

    model: Any
    batch: Any
    device: torch.device
    micro_batch: Mapping[str, int]
    autocast: Callable[[], AbstractContextManager[Any]]
    keep: Mapping[str, float] = field(default_factory=dict)
    drop_path: float = 0.0
    train: bool = True
    mask_id: int = 103
    num_concepts: int = 0
    world: World = field(default_factory=World)
    share: Share | None = None  # None: of one process, all rows
    stage: str = ""  # its name, for messages
    known_features: dict[str, Tensor] = field(default_factory=dict, init=False)  # by modality, without graphs
    tokens: dict[str, Any] = field(default_factory=dict, init=False)  # of the whole batch, where it is one micro-batch

    # ---- rows ----

    def num_rows(self, modality: str) -> int:
        return len(self.batch.input_ids) if modality == "text" else len(self.batch.sample_ids)

    def own_rows(self, modality: str) -> range:
        """The rows that this process encodes."""
        return range(self.num_rows(modality)) if self.share is None else self.share.rows[modality]

    def micro_batches(self, modality: str) -> list[slice]:
        """This process's rows, as many at a time as are in memory at once."""
        own, size = self.own_rows(modality), self.micro_batch[modality]
        return [slice(start, min(start + size, own.stop)) for start in range(own.start, own.stop, size)]

    @property
    def is_whole(self) -> bool:
        """This process's share is one micro-batch for each tower: encoded once, whatever the number of objectives."""
        return self.train and all(len(self.micro_batches(name)) == 1 for name in (*self.batch.inputs, "fusion"))

    # ---- from host to device ----

    def to_device(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True)

    def read(self, number: Tensor, most: int) -> int:
        """A number on the host that depends on the batch's values, at most `most`."""
        return int(number)

    def media(self, modality: str, rows: Rows) -> Tensor:
        """Images or audio of some rows, on the device. A slice of what lies in pinned memory is no copy, so it goes
        there while the host goes on."""
        values = self.batch.images if modality == "image" else self.batch.audio
        first = 0 if self.share is None else self.share.first_media
        return self.to_device(values[slice(rows.start - first, rows.stop - first) if isinstance(rows, slice)
                                     else rows - first])

    # ---- encoding ----

    def encode(self, modality: str, rows: Rows, *, hide: bool = False) -> Any:
        """Tokens of some rows of the batch. `hide` keeps patches by the stage's share even in evaluation.

        Tokens of the same rows are always the same, since nothing is drawn here; so where memory holds the whole batch
        they are kept for the step's other objectives.
        """
        whole = self.micro_batches(modality)[0]
        is_own = rows == whole if isinstance(rows, slice) else self.world.size == 1  # else some may be others' rows
        if not (is_own and self.is_whole and torch.is_grad_enabled()):
            return self._encode(modality, rows, hide)
        if modality not in self.tokens:
            self.tokens[modality] = self._encode(modality, whole, hide)
        return self.tokens[modality] if isinstance(rows, slice) else pick(self.tokens[modality], self.to_device(rows))

    def _encode(self, modality: str, rows: Rows, hide: bool) -> Any:
        encoder, batch, path = getattr(self.model, modality), self.batch, self.path_scales(modality, rows)
        if modality == "text":
            return encoder(self.to_device(batch.input_ids[rows]), self.to_device(batch.attention_mask[rows]), path)
        hides = (self.train or hide) and self.keep.get(modality, 1.0) < 1
        kept, valid = map(self.to_device, self.kept(modality, rows)) if hides else (None, None)
        if modality == "image":
            return encoder(self.media("image", rows), kept, path)
        return encoder(self.media("audio", rows), self.to_device(batch.audio_lengths[rows]), kept, valid, path)

    def kept(self, modality: str, rows: Rows) -> tuple[Tensor, Tensor]:
        """Indices (B, K) of the patches that the stage keeps of each row, and which of them are real; on the host."""
        return kept_patches(self.batch.noise[modality][rows], self.patch_counts(modality, rows),
                            self.keep.get(modality, 1.0), self.read)

    def patch_counts(self, modality: str, rows: Rows) -> Tensor:
        """How many patches of each row are real; int64, on the host."""
        uniform_BN = self.batch.noise[modality][rows]
        if modality == "image":
            return torch.full((len(uniform_BN),), uniform_BN.shape[1])
        audio = self.model.audio
        steps = (self.batch.audio_lengths[rows] + audio.patch_frames - 1).div(audio.patch_frames, rounding_mode="floor")
        return steps * audio.bands

    def path_scales(self, modality: str, rows: Rows) -> Tensor | None:
        """Scale of each residual branch (B, Z): 0 where dropped, else 1 / (1 - p), p rising linearly with the depth
        (arXiv:1603.09382); None where none is dropped."""
        if not self.train or self.drop_path == 0:
            return None
        depth = len(getattr(self.model, modality).blocks.blocks)
        name, first = PATH_NOISE[modality]
        p_Z = self.drop_path * torch.arange(1, depth + 1) / depth
        return self.to_device((self.batch.noise[name][rows][:, first:first + depth] >= p_Z) / (1 - p_Z))

    # ---- features ----

    def features(self, modality: str) -> Tensor:
        """L2-normalised features of all rows, (rows, F), those of this process in the graph; each micro-batch is
        recomputed in the backward pass if there are several.

        Raises:
            OutOfMemoryElsewhere: another process has run out of memory in this step.
        """
        def encode_features(rows: slice) -> Tensor:
            with self.autocast():
                return self.model.features(modality, self.encode(modality, rows))

        micro_batches = self.micro_batches(modality)
        if len(micro_batches) == 1 or not torch.is_grad_enabled():
            own = [encode_features(rows) for rows in micro_batches]
        else:
            own = [recompute(encode_features, rows, use_reentrant=False, preserve_rng_state=False)
                   for rows in micro_batches]
        features = self.gather(torch.cat(own), self.num_rows(modality))
        self.known_features[modality] = features.detach()
        return features

    @torch.no_grad()
    def detached_features(self, modality: str) -> Tensor:
        """Features of the whole batch as `features` returns them, without their graph. Those that an earlier objective
        of this step has computed are used again."""
        return self.known_features[modality] if modality in self.known_features else self.features(modality)

    def gather(self, features: Tensor, num_rows: int) -> Tensor:
        """The features of all processes, (num_rows, F)."""
        self.world.agree_on_memory()
        everyones = self.world.gather_rows(features)
        assert len(everyones) == num_rows, f"{len(everyones)} features of {num_rows} rows"
        return everyones


def kept_patches(uniform_BN: Tensor, counts_B: Tensor, keep: float,
                 read: Callable[[Tensor, int], int] = lambda number, most: int(number)) -> tuple[Tensor, Tensor]:
    """The first ceil(keep * count) patches of each sample in the order of its uniforms, equal K by padding.

    `counts_B`: real patches of each sample, which come first. Returns indices (B, K) and valid (B, K).
    """
    N = uniform_BN.shape[1]
    kept_B = kept_counts(counts_B, keep)
    order_BN = uniform_BN.masked_fill(torch.arange(N) >= counts_B[:, None], 2.0).argsort(dim=1)
    K = read(kept_B.max(), max(math.ceil(keep * N), 1))
    return order_BN[:, :K], torch.arange(K) < kept_B[:, None]


def kept_counts(counts_B: Tensor, keep: float) -> Tensor:
    """How many of `counts_B` real patches to keep in each row: the share `keep`, rounded up, at least one; int64."""
    return (counts_B * keep).ceil().long().clamp(min=1)


def first_keys(batch: Any, inputs: Sequence[str]) -> Tensor:
    """Row of the first caption (or the sample's own row) of each sample; int64 [B], on the host."""
    samples = torch.arange(len(batch.sample_ids))
    return torch.searchsorted(batch.caption_owner, samples) if "text" in inputs else samples


def pick(tokens: Any, rows: Tensor) -> Any:
    """`tokens` (a tuple of tensors or None, such as Tokens), reduced to some rows of each tensor."""
    return type(tokens)(*(None if part is None else part.index_select(0, rows) for part in tokens))


# ---- several processes -------------------------------------------------------------------------------------------


def shared_batch(world: World, batch: Any, *, with_media: bool) -> tuple[Any, Share | None]:
    """The whole effective batch, gathered from the ranks that each read a part of it, and which rows `batch` is of it.

    Gathered are texts, labels, lengths and `noise`. Images and audio are gathered only `with_media`, for objectives
    that encode other ranks' samples; else the result holds this rank's own.
    """
    if world.size == 1:
        return batch, None
    media = [name for name in ("images", "audio") if getattr(batch, name) is not None]
    small = {f.name: value for f in fields(batch)
             if f.name not in media and isinstance(value := getattr(batch, f.name), Tensor)}
    everyones = world.gather_objects((small, batch.noise))
    starts = [sum(len(one["sample_ids"]) for one, _ in everyones[:rank]) for rank in range(world.size)]
    columns: dict[str, Any] = {name: concat_padded([one[name] for one, _ in everyones]) for name in small}
    noise = {name: concat_padded([uniforms[name] for _, uniforms in everyones]) for name in batch.noise}
    samples = range(starts[world.rank], starts[world.rank] + len(batch.sample_ids))
    rows = dict.fromkeys(("image", "audio", "fusion"), samples)
    if batch.caption_owner is not None:
        owners = [one["caption_owner"] + start for (one, _), start in zip(everyones, starts, strict=True)]
        columns["caption_owner"] = torch.cat(owners)
        before = sum(map(len, owners[:world.rank]))
        rows["text"] = range(before, before + len(owners[world.rank]))
    if with_media:
        columns |= {name: concat_padded(world.gather_objects(getattr(batch, name))) for name in media}
    return replace(batch, **columns, noise=noise), Share(rows, 0 if with_media else samples.start)


def concat_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; tensors with a shorter second one are padded with zeros at its end."""
    if tensors[0].ndim == 1:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    later_dimensions = (0,) * (2 * tensors[0].ndim - 4)  # F.pad names the last dimension first
    return torch.cat([F.pad(tensor, (*later_dimensions, 0, longest - tensor.shape[1])) for tensor in tensors])
