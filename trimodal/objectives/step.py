"""One effective batch on its way through the model: its micro-batches, their exact encoding, and its ranks' shares.

Nothing here draws a random number: each one is in the batch, so rows that are encoded alone, in micro-batches, or all
at once have the same tokens and the same gradients.

A tower encodes the whole batch once, whatever the number of objectives (`Encoding`). Objectives read its features and
tokens as leaves of their own graphs, and leave gradients there; then `passed_on` takes those back into the tower, one
micro-batch at a time, which is run again for it. A tower whose rows are a single micro-batch keeps its graph instead.
This is gradient caching (arXiv:2101.06983), with tokens beside the features.

A frozen tower has no graph, so it runs once for each row: what it has made of this process's rows is held, and only
what is trained over it is run again. Where the cache has kept that, the batch holds it, and the tower does not run.

Shape suffixes: B samples or rows of a batch, C captions, D width, F embed_dim, K kept patches, N patches or tokens,
Z depth.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimodal.blocks import Tokens
from trimodal.distributed import World
from trimodal.towers.encoder import PretrainedEncoder

PATH_NOISE = {"image": ("path", 0), "audio": ("path", 24), "text": ("path_text", 0)}  # of drop-path: name, first column
GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, as a signed number
FEATURE_NOISE = {"image": ("path", 58), "audio": ("path", 60), "text": ("path_text", 60)}  # of dropout: two columns

Rows = slice | Tensor  # a micro-batch, or an int64 index on the host


@dataclass(frozen=True)
class Share:
    """The rows of a whole effective batch that one process encodes, by tower ("text": captions, all others: samples).

    `has_all`: its batch holds the images, sounds and towers' tokens of all rows, not those of its own alone.
    """

    rows: Mapping[str, range]
    has_all: bool = False


@dataclass
class Encoding:
    """What a tower has made of this process's rows: leaves of the graphs that objectives build on them."""

    features_BF: Tensor
    tokens_BND: Tensor | None  # None: no objective reads them, or memory does not hold them
    learns: bool  # the tower has parameters to train
    valid_BN: Tensor | None = None  # of a pretrained tower; our own have theirs from the batch
    gradient_BND: Tensor | None = None  # of the loss with respect to the tokens, as far as it is known

    def pick(self, rows: Tensor, longest: int) -> Tensor:
        """The first tokens of some rows, whose gradient is added to `gradient_BND` in the backward pass."""
        assert self.tokens_BND is not None
        picked_BND = self.tokens_BND[:, :longest].index_select(0, rows)
        if self.learns and torch.is_grad_enabled():
            picked_BND.requires_grad_().register_hook(lambda gradient_BND: self._add(rows, gradient_BND))
        return picked_BND

    def _add(self, rows: Tensor, gradient_BND: Tensor) -> None:
        if self.gradient_BND is None:
            assert self.tokens_BND is not None
            dtype = torch.promote_types(self.tokens_BND.dtype, torch.float32)  # many gradients add up
            self.gradient_BND = torch.zeros_like(self.tokens_BND, dtype=dtype)
        sum_BND = self.gradient_BND[:, :gradient_BND.shape[1]]
        sum_BND.index_add_(0, rows, gradient_BND.to(sum_BND.dtype))


@dataclass
class Step:
    """One effective batch on its way through the model.

    `batch` stays on the host; `encode` brings the rows asked for to the device. `micro_batch` is how many rows of each
    tower are in memory at once; `keep_tokens`, whether the tokens of all rows are. In evaluation (`train` False) all
    patches are seen and no path is dropped, save where hiding patches is the task itself.

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
    feature_dropout: float = 0.0
    train: bool = True
    mask_id: int = 103
    num_concepts: int = 0
    world: World = field(default_factory=World)
    share: Share | None = None  # None: of one process, all rows
    keep_tokens: bool = True  # False: each objective that reads them has them encoded again, in its micro-batches
    stage: str = ""  # its name, for messages
    known_features: dict[str, Tensor] = field(default_factory=dict, init=False)  # by modality, without graphs
    _shared: Collection[str] = field(default=(), init=False)  # towers whose tokens several micro-batches may read
    _encodings: dict[str, Encoding] = field(default_factory=dict, init=False)
    _frozen: dict[str, Tokens] = field(default_factory=dict, init=False)  # by modality, of this process's rows
    _live: dict[tuple[Any, ...], Tokens] = field(default_factory=dict, init=False)  # tokens of micro-batches in memory

    # ---- rows ----

    def num_rows(self, modality: str) -> int:
        return len(self.batch.caption_owner) if modality == "text" else len(self.batch.sample_ids)

    def own_rows(self, modality: str) -> range:
        """The rows that this process encodes."""
        return range(self.num_rows(modality)) if self.share is None else self.share.rows[modality]

    def micro_batches(self, modality: str) -> list[slice]:
        """This process's rows, as many at a time as are in memory at once."""
        own, size = self.own_rows(modality), self.micro_batch[modality]
        return [slice(start, min(start + size, own.stop)) for start in range(own.start, own.stop, size)]

    def buffer_rows(self, modality: str) -> int:
        """Of how many rows tokens are kept."""
        return len(self.own_rows(modality))

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
        return self.to_device(values[self.held(modality, rows)])

    def inputs(self, modality: str, rows: Rows) -> list[Tensor]:
        """What a tower reads of some rows, on the device."""
        if modality == "text":
            return [self.to_device(self.batch.input_ids[rows]), self.to_device(self.batch.attention_mask[rows])]
        media = self.media(modality, rows)
        return [media] if modality == "image" else [media, self.to_device(self.batch.audio_lengths[rows])]

    def held(self, modality: str, rows: Rows) -> Rows:
        """Where some rows are in what the batch holds of a modality."""
        first = 0 if self.share is None or self.share.has_all else self.share.rows[modality].start
        return slice(rows.start - first, rows.stop - first) if isinstance(rows, slice) else rows - first

    # ---- encoding ----

    def encode(self, modality: str, rows: slice, *, hide: bool = False) -> Tokens:
        """Tokens of a micro-batch of this process's rows; `hide` keeps patches by the stage's share even in evaluation.

        Several calls give the same tokens, until `forget`: all that looks at a micro-batch shares one graph.
        """
        key = (modality, rows.start, rows.stop, self.hides(modality, hide))
        if key not in self._live:
            self._live[key] = self._encode(modality, rows, hide)
        return self._live[key]

    def forget(self, modality: str) -> None:
        """Let go of the micro-batch of a tower that is in memory."""
        self._live = {key: tokens for key, tokens in self._live.items() if key[0] != modality}

    def hides(self, modality: str, hide: bool = False) -> bool:
        """Whether a part of the patches is hidden from the encoder."""
        return modality != "text" and (self.train or hide) and self.keep.get(modality, 1.0) < 1

    def _encode(self, modality: str, rows: Rows, hide: bool) -> Tokens:
        encoder, path = getattr(self.model, modality), self.path_scales(modality, rows)
        if isinstance(encoder, PretrainedEncoder):  # takes all patches
            return encoder.adapt(self._tower_tokens(modality, rows), path, self.feature_scales(modality, rows))
        inputs = self.inputs(modality, rows)
        if modality == "text":
            return encoder(*inputs, path)
        hides = self.hides(modality, hide)
        kept, valid = map(self.to_device, self.kept(modality, rows)) if hides else (None, None)
        return encoder(*inputs, kept, path) if modality == "image" else encoder(*inputs, kept, valid, path)

    def _tower_tokens(self, modality: str, rows: Rows) -> Tokens:
        """What a pretrained tower makes of some rows. Of a frozen one that is at hand, from the cache or from earlier
        in this step; it runs anew for rows of other processes alone."""
        if modality in self.batch.tokens:
            held = self.held(modality, rows)
            return Tokens(*(self.to_device(part[held]) for part in self.batch.tokens[modality]))
        if not self._runs_once(modality):
            return self._run_tower(modality, rows)
        frozen, first = self._frozen_tokens(modality), self.own_rows(modality).start
        if isinstance(rows, slice):
            return Tokens(*(None if part is None else part[rows.start - first:rows.stop - first]
                            for part in frozen))  # type: ignore[arg-type]
        return self._gathered(modality, rows, lambda own: pick(frozen, self.to_device(own - first)),
                              lambda others: self._run_tower(modality, others))

    def _runs_once(self, modality: str) -> bool:
        """Whether a tower is frozen and its rows are several micro-batches: a single one is in memory anyway."""
        return len(self.micro_batches(modality)) > 1 and not is_trained(getattr(self.model, modality).tower)

    def _frozen_tokens(self, modality: str) -> Tokens:
        """What a frozen tower makes of this process's rows, by its micro-batches."""
        if modality not in self._frozen:
            first, held = self.own_rows(modality).start, list[Tensor | None]()
            for rows in self.micro_batches(modality):
                found = self._run_tower(modality, rows)
                held = held or [None if part is None else part.new_zeros(self.buffer_rows(modality), *part.shape[1:])
                                for part in found]
                for buffer, part in zip(held, found, strict=True):
                    if buffer is not None and part is not None:
                        buffer[rows.start - first:rows.stop - first] = part
            self._frozen[modality] = Tokens(*held)  # type: ignore[arg-type]
        return self._frozen[modality]

    def _run_tower(self, modality: str, rows: Rows) -> Tokens:
        return getattr(self.model, modality).tower_tokens(*self.inputs(modality, rows))

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
        depth = getattr(self.model, modality).depth  # of a pretrained tower: of the blocks over it
        if not self.train or self.drop_path == 0 or depth == 0:
            return None
        name, first = PATH_NOISE[modality]
        p_Z = self.drop_path * torch.arange(1, depth + 1) / depth
        return self.to_device((self.batch.noise[name][rows][:, first:first + depth] >= p_Z) / (1 - p_Z))

    def feature_scales(self, modality: str, rows: Rows) -> Tensor | None:
        """Of a pretrained tower in training: the scale of each feature (B, D), 0 where it is dropped, else 1 / (1 - p),
        the same for all tokens of a row. None where none is dropped."""
        p = self.feature_dropout
        if not self.train or p == 0:
            return None
        name, first = FEATURE_NOISE[modality]
        high_B, low_B = (self.to_device(self.batch.noise[name][rows][:, first:first + 2]) * 2**24).long().unbind(1)
        return (uniforms_of(high_B << 24 | low_B, getattr(self.model, modality).tower.dim) >= p) / (1 - p)

    def token_counts(self, modality: str, rows: Rows) -> Tensor:
        """How many tokens that our own tower makes of each row are real, which come first; int64, on the host."""
        if modality == "text":
            return self.batch.attention_mask[rows].sum(1)
        counts_B = self.patch_counts(modality, rows)
        return kept_counts(counts_B, self.keep[modality]) if self.hides(modality) else counts_B

    # ---- the whole batch ----

    @contextmanager
    def sharing(self, modalities: Collection[str]) -> Iterator[None]:
        """In the block each tower encodes this process's rows once, and the tokens of `modalities` are kept for
        `tokens`, as memory allows. They are encoded before the block: within an objective's autocast the weights that
        it casts without a gradient would be used again where there is one."""
        self._shared = modalities
        try:
            for modality in filter(self.keeps, self.batch.inputs):
                self.encoding(modality)
            yield
        finally:
            self._shared = ()
            self._encodings.clear()
            self._frozen.clear()
            self._live.clear()

    def keeps(self, modality: str) -> bool:
        """Whether the tokens of all rows are kept: always those of a single micro-batch, which are in memory anyway."""
        return modality in self._shared and (self.keep_tokens or len(self.micro_batches(modality)) == 1)

    def encoding(self, modality: str) -> Encoding:
        """What the tower has made of this process's rows, by its micro-batches. Only the graph of a single one is kept:
        others are run again for their backward pass."""
        if modality not in self._encodings:
            self._encodings[modality] = self._encode_all(modality)
        return self._encodings[modality]

    def _encode_all(self, modality: str) -> Encoding:
        micro_batches, first = self.micro_batches(modality), self.own_rows(modality).start
        is_single = len(micro_batches) == 1
        features, valids, kept_BND = list[Tensor](), list[Tensor | None](), None
        for rows in micro_batches:
            with torch.set_grad_enabled(is_single and self.train), self.autocast():
                encoded = self.encode(modality, rows) if is_single else self._encode(modality, rows, hide=False)
            with torch.no_grad(), self.autocast():
                features.append(self.model.features(modality, encoded))
                if self.keeps(modality):
                    tokens_BND = encoded[0]
                    if kept_BND is None:
                        kept_BND = self._buffer(modality, tokens_BND)
                    kept_BND[rows.start - first:rows.stop - first, :tokens_BND.shape[1]] = tokens_BND
                    valids.append(encoded[1])
        tower, projection = getattr(self.model, modality), self.model.projections[modality]
        features_BF = torch.cat(features).requires_grad_(self.train and is_trained(tower, projection))
        valid = [part for part in valids if part is not None] if isinstance(tower, PretrainedEncoder) else []
        return Encoding(features_BF, kept_BND, is_trained(tower), torch.cat(valid) if valid else None)

    def _buffer(self, modality: str, like_BND: Tensor) -> Tensor:
        """Zeros for the tokens of all rows, in the dtype in which the fusion computes: every fit rounds alike."""
        if isinstance(getattr(self.model, modality), PretrainedEncoder):
            most = like_BND.shape[1]  # as many of each row
        elif not self.hides(modality):
            most = self.batch.noise[modality].shape[1]
        else:
            most = max(math.ceil(self.keep[modality] * self.batch.noise[modality].shape[1]), 1)
        kind = like_BND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like_BND.dtype
        return like_BND.new_zeros(self.buffer_rows(modality), most, like_BND.shape[2], dtype=dtype)

    def tokens(self, modality: str, rows: Rows) -> Tokens:
        """Tokens of a micro-batch of the fusion: a slice of this process's rows, or any rows of the whole batch.

        Rows that are kept are taken from there. The others, of other processes or where memory does not hold them, are
        encoded here, as a part of the micro-batch's graph.
        """
        if not self.keeps(modality):
            return self._encode(modality, rows, hide=False)
        return self._gathered(modality, rows, lambda own: self._kept(modality, own),
                              lambda others: self._encode(modality, others, hide=False))

    def _gathered(self, modality: str, rows: Rows, ours: Callable[[Tensor], Tokens],
                  theirs: Callable[[Tensor], Tokens]) -> Tokens:
        """Tokens of some rows of the whole batch, from two sources: of rows of this process, and of those of others."""
        own, others, order = self.split(modality, rows)
        if not len(others):
            return ours(own)
        if not len(own):
            return theirs(others)
        return pick(join([ours(own), theirs(others)]), self.to_device(order))

    def split(self, modality: str, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Those of `rows` that this process encodes, the others, and where each row is in the two together."""
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop)
        if self.world.size == 1:
            return rows, rows[:0], torch.arange(len(rows))
        own = self.own_rows(modality)
        is_own = (rows >= own.start) & (rows < own.stop)
        return rows[is_own], rows[~is_own], (~is_own).long().argsort(stable=True).argsort()

    def _kept(self, modality: str, rows: Tensor) -> Tokens:
        encoding, place_B = self.encoding(modality), self.to_device(rows - self.own_rows(modality).start)
        if isinstance(getattr(self.model, modality), PretrainedEncoder):
            assert encoding.tokens_BND is not None
            valid_BN = None if encoding.valid_BN is None else encoding.valid_BN.index_select(0, place_B)
            return Tokens(encoding.pick(place_B, encoding.tokens_BND.shape[1]), valid_BN)
        counts_B = self.token_counts(modality, rows)
        longest = self.read(counts_B.max(), self.batch.noise[modality].shape[1])
        tokens_BND = encoding.pick(place_B, longest)
        N = tokens_BND.shape[1]
        valid_BN = None if modality == "image" else self.to_device(torch.arange(N) < counts_B[:, None])
        return Tokens(tokens_BND, valid_BN)

    def passed_on(self, modality: str, rows: slice) -> list[Tensor]:
        """A zero whose gradients with respect to features and tokens of a micro-batch are those that objectives have
        left in the step; nothing where there are none."""
        encoding = self._encodings.get(modality)
        if encoding is None:
            return []
        features_BF, tokens_BND = encoding.features_BF.grad, encoding.gradient_BND
        if features_BF is None and tokens_BND is None:
            return []
        first = self.own_rows(modality).start
        part = slice(rows.start - first, rows.stop - first)
        with self.autocast():
            encoded = self.encode(modality, rows)
            given = [] if tokens_BND is None else [(encoded[0], tokens_BND[part, :encoded[0].shape[1]])]
            if features_BF is not None:
                given.append((self.model.features(modality, encoded), features_BF[part]))
        values, gradients = zip(*given, strict=True)
        return [PassOn.apply(gradients, *values)]

    # ---- features ----

    def features(self, modality: str) -> Tensor:
        """L2-normalised features of all rows, (rows, F), those of this process as a leaf; in evaluation those that are
        known.

        Raises:
            OutOfMemoryElsewhere: another process has run out of memory in this step.
        """
        if not self.train and modality in self.known_features:
            return self.known_features[modality]
        features = self.gather(self.encoding(modality).features_BF, self.num_rows(modality))
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


def uniforms_of(keys_B: Tensor, count: int) -> Tensor:
    """So many uniforms in [0, 1) for each key (48 bits), float32 [B, count]: splitmix64, a function of the key and the
    place alone, and the same on every device."""
    x = keys_B[:, None] + torch.arange(1, count + 1, device=keys_B.device) * GOLDEN
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    return (x >> 40 & 0xFFFFFF) * 2.0**-24  # bits of the highest quality


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


def pick(tokens: Tokens, rows: Tensor) -> Tokens:
    """Some rows of `tokens`."""
    return Tokens(*(None if part is None else part.index_select(0, rows) for part in tokens))  # type: ignore[arg-type]


def join(several: Sequence[Tokens]) -> Tokens:
    """The rows of several as one, padded to the longest."""
    longest = max(tokens_BND.shape[1] for tokens_BND, _ in several)

    def padded(part: Tensor) -> Tensor:
        missing = longest - part.shape[1]
        return F.pad(part, (0, 0) * (part.ndim - 2) + (0, missing)) if missing else part

    valids = [padded(valid_BN) for _, valid_BN in several if valid_BN is not None]
    return Tokens(torch.cat([padded(tokens_BND) for tokens_BND, _ in several]), torch.cat(valids) if valids else None)


def is_trained(*modules: nn.Module) -> bool:
    """Whether one of their parameters is not frozen."""
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


class PassOn(torch.autograd.Function):
    """A scalar zero whose gradients with respect to `values` are given: where the backward pass goes on from gradients
    that were computed before, and have been scaled as the loss was then."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *values: Tensor) -> Tensor:
        ctx.gradients = [gradient.to(value.dtype) for gradient, value in zip(gradients, values, strict=True)]
        return values[0].new_zeros((), dtype=torch.promote_types(values[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *ctx.gradients


# ---- several processes -------------------------------------------------------------------------------------------


def shared_batch(world: World, batch: Any, *, with_media: bool) -> tuple[Any, Share | None]:
    """The whole effective batch, gathered from the ranks that each read a part of it, and which rows `batch` is of it.

    Gathered are texts, labels, lengths and `noise`. Images, audio and tokens of frozen towers are gathered only
    `with_media`, for objectives that encode other ranks' samples; else the result holds this rank's own.
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
        columns["tokens"] = {name: tuple(map(concat_padded, zip(*world.gather_objects(parts), strict=True)))
                             for name, parts in batch.tokens.items()}
    return replace(batch, **columns, noise=noise), Share(rows, with_media)


def concat_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; tensors with a shorter second one are padded with zeros at its end."""
    if tensors[0].ndim == 1:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    later_dimensions = (0,) * (2 * tensors[0].ndim - 4)  # F.pad names the last dimension first
    return torch.cat([F.pad(tensor, (*later_dimensions, 0, longest - tensor.shape[1])) for tensor in tensors])
