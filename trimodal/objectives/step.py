"""What an objective sees of a training step: one effective batch, its micro-batches, and how to encode them exactly.

Nothing here draws: every random number is in the batch, so rows encoded alone, in parts, or all at once have the same
tokens and the same gradients.

Shape suffixes: B samples, C captions, K kept patches, N patches, L text tokens, U distinct captions, Z depth.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from trimodal.distributed import World

TEXT_MASK_PART = 0.25  # part of the words hidden in masked pretraining
AUDIO_PATH_COLUMN = 24  # "path" uniforms: the image encoder takes the first columns, the audio encoder those from here

Term = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Positives:
    """Which keys are right for which queries: those that share a group, of which a query may have several.

    `item_B` numbers the different files among the samples, `owner_C` names the file of each caption, `group_C` the
    caption's group. Masks are made for the rows asked for, so that nothing here grows with B * C.
    """

    owner_C: Tensor
    group_C: Tensor
    item_B: Tensor
    num_items: int
    num_groups: int

    @staticmethod
    def of(owner_C: Tensor, ids_C: Tensor, files_B: Tensor) -> "Positives":
        """Caption c belongs to sample owner_C[c]; captions of equal id are the same caption, whoever owns them, and
        samples of equal id in `files_B` the same file: what one of them owns, all own."""
        unique_U, group_C = ids_C.unique(return_inverse=True)
        items_U, item_B = files_B.unique(return_inverse=True)
        return Positives(item_B[owner_C], group_C, item_B, len(items_U), len(unique_U))

    def to(self, move: Callable[[Tensor], Tensor]) -> "Positives":
        return replace(self, owner_C=move(self.owner_C), group_C=move(self.group_C), item_B=move(self.item_B))

    def of_samples(self, rows: Tensor) -> Tensor:
        """(Q, C) for samples as queries: captions of a group of which the sample's file owns one."""
        own_QC = self.owner_C == self.item_B[rows][:, None]
        return _some(own_QC, self.group_C, self.num_groups)[:, self.group_C]

    def of_captions(self, rows: Tensor) -> Tensor:
        """(Q, B) for captions as queries: samples whose file owns a caption of the same group."""
        same_QC = self.group_C == self.group_C[rows][:, None]
        return _some(same_QC, self.owner_C, self.num_items)[:, self.item_B]

    def count(self) -> int:
        """Right pairs of all samples and captions."""
        owned = torch.stack([self.owner_C, self.group_C]).unique(dim=1)  # one of each group that a file owns
        samples, captions = self.item_B.bincount(), self.group_C.bincount()
        return int((samples[owned[0]] * captions[owned[1]]).sum())


def positives_of(batch: Any, inputs: Sequence[str]) -> Positives:
    """Which of the second input belong to which of the first: captions are told by their text, pictures and sounds by
    their file, and where a batch does not say which that is by their sample. On the host."""
    def files(name: str) -> Tensor:
        found = batch.image_ids if name == "image" else batch.audio_ids
        return batch.sample_ids if found is None else found

    if "text" in inputs:
        first = next(name for name in inputs if name != "text")
        return Positives.of(batch.caption_owner, batch.caption_ids, files(first))
    return Positives.of(torch.arange(len(batch.sample_ids)), files(inputs[1]), files(inputs[0]))


def _some(flag_QC: Tensor, place_C: Tensor, count: int) -> Tensor:
    """(Q, count): whether a flag is up among those of each place."""
    sums = torch.zeros(len(flag_QC), count, dtype=torch.int32, device=flag_QC.device)
    return sums.index_add_(1, place_C, flag_QC.int()) > 0


@dataclass(frozen=True)
class Share:
    """The rows of a whole effective batch that one process encodes, and the row of the first picture or sound that it
    holds."""

    samples: range
    captions: range
    first_media: int


@dataclass
class Step:
    """One effective batch on its way through the model.

    `batch` stays on the host; `encode` brings the rows asked for to the device. `micro_batch` is how many samples of
    each tower are in memory at once. In evaluation (`train` False) all patches are seen and no path is dropped,
    save where hiding patches is the task itself.

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
    detached: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    cut: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    spans: dict[int, slice] = field(default_factory=dict)  # rows of each part, by its identity: `cut` keeps it alive

    def rows(self, modality: str) -> int:
        return len(self.batch.input_ids) if modality == "text" else len(self.batch.sample_ids)

    def own(self, modality: str) -> range:
        """The rows that this process encodes."""
        if self.share is None:
            return range(self.rows(modality))
        return self.share.captions if modality == "text" else self.share.samples

    def parts(self, modality: str) -> tuple[Tensor, ...]:
        """Row indices of this tower's micro-batches, on the host."""
        if modality not in self.cut:
            own, size = self.own(modality), self.micro_batch[modality]
            everything = torch.arange(own.start, own.stop)
            parts = (everything,) if len(everything) <= size else everything.split(size)
            self.spans |= {id(part): slice(own.start + i * size, own.start + i * size + len(part))
                          for i, part in enumerate(parts)}
            self.cut[modality] = parts
        return self.cut[modality]

    def media(self, modality: str, rows: Tensor) -> Tensor:
        """Pictures or sounds of some rows, on the device."""
        values = self.batch.images if modality == "image" else self.batch.audio
        first = 0 if self.share is None else self.share.first_media
        span = self.spans.get(id(rows))
        return self.to_device(values[rows - first] if span is None else self.view(values, span, first))

    def view(self, values: Tensor, span: slice, first: int) -> Tensor:
        """Rows that follow each other, of values whose first is row `first`. No copy: what lies in pinned memory stays
        there, so it goes to the device while the host goes on."""
        return values[span.start - first:span.stop - first]

    def to_device(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True)

    def to_host(self, value: Tensor) -> Tensor:
        return value.cpu()

    @property
    def is_whole(self) -> bool:
        """This process's share is one micro-batch for each tower: encoded once, whatever the number of objectives."""
        return self.train and len(self.parts("fusion")) == 1 and all(
            len(self.parts(name)) == 1 for name in self.batch.inputs)

    def encode(self, modality: str, rows: Tensor, *, hide: bool = False) -> Any:
        """Tokens of some rows of the batch. `hide` keeps patches by the stage's share even in evaluation.

        Tokens of the same rows are always the same, since nothing is drawn here; so where memory holds the whole batch
        they are kept for the step's other objectives.
        """
        if not (self.is_whole and torch.is_grad_enabled()):
            return self._encode(modality, rows, hide)
        everything = self.parts(modality)[0]
        if self.world.size > 1 and rows is not everything:  # some may be rows of other processes
            return self._encode(modality, rows, hide)
        if modality not in self.tokens:
            self.tokens[modality] = self._encode(modality, everything, hide)
        return self.tokens[modality] if rows is everything else pick(self.tokens[modality], self.to_device(rows))

    def _encode(self, modality: str, rows: Tensor, hide: bool) -> Any:
        encoder, noise = getattr(self.model, modality), self.batch.noise
        keep = self.keep.get(modality, 1.0) if self.train or hide else 1.0
        if modality == "text":
            path = self.path_scales(noise["path_text"][rows], 0, encoder)
            return encoder(self.to_device(self.batch.input_ids[rows]),
                           self.to_device(self.batch.attention_mask[rows]), path)
        path = self.path_scales(noise["path"][rows], AUDIO_PATH_COLUMN if modality == "audio" else 0, encoder)
        kept, valid = (None, None) if keep == 1 else map(self.to_device, self.kept(modality, rows))
        if modality == "image":
            return encoder(self.media("image", rows), kept, path)
        return encoder(self.media("audio", rows), self.to_device(self.batch.audio_lengths[rows]), kept, valid, path)

    def kept(self, modality: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (B, K) of the patches that the stage keeps of each row, and which of them are real; on the host."""
        counts = self.valid_patches(rows) if modality == "audio" else None
        return kept_patches(self.batch.noise[modality][rows], counts, self.keep.get(modality, 1.0))

    def positives(self, inputs: Sequence[str]) -> Positives:
        """Which of the second input belong to which of the first, on the device."""
        return positives_of(self.batch, inputs).to(self.to_device)

    def hidden_words(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that masked pretraining hides, drawn among the real ones between the first and the last: a mask
        (C, L), and their places (M, 2); on the host."""
        hidden = hidden_words(self.batch)[rows]
        return hidden, hidden.nonzero()

    def with_speaker(self, rows: Tensor) -> Tensor:
        return rows[self.batch.speakers[rows] >= 0]

    def valid_patches(self, rows: Tensor) -> Tensor:
        """How many audio patches of each row are real; int64, on the host."""
        audio = self.model.audio
        steps = (self.batch.audio_lengths[rows] + audio.patch_frames - 1).div(audio.patch_frames, rounding_mode="floor")
        return steps * audio.bands

    def path_scales(self, uniform: Tensor, column: int, encoder: Any) -> Tensor | None:
        """Scale of each residual branch: 0 where dropped, else 1 / (1 - p), p rising linearly (arXiv:1603.09382)."""
        if not self.train or self.drop_path == 0:
            return None
        depth = len(encoder.blocks.blocks)
        p_Z = self.drop_path * torch.arange(1, depth + 1) / depth
        return self.to_device((uniform[:, column: column + depth] >= p_Z) / (1 - p_Z))

    def features(self, modality: str) -> Tensor:
        """L2-normalised features of all rows, (rows, F), those of this process in the graph; each micro-batch is
        recomputed in the backward pass if there are several.

        Raises:
            OutOfMemoryElsewhere: another process has run out of memory in this step.
        """
        def part_features(rows: Tensor) -> Tensor:
            with self.autocast():
                return self.model.features(modality, self.encode(modality, rows))

        parts = self.parts(modality)
        if len(parts) == 1 or not torch.is_grad_enabled():
            features = torch.cat([part_features(rows) for rows in parts])
        else:
            features = torch.cat([recompute(part_features, rows, use_reentrant=False, preserve_rng_state=False)
                                  for rows in parts])
        features = self.gather(features, self.rows(modality))
        self.detached[modality] = features.detach()
        return features

    def gather(self, features: Tensor, num_rows: int) -> Tensor:
        """The features of all processes, (num_rows, F)."""
        self.world.agree_on_memory()
        everyones = self.world.gather_rows(features)
        assert len(everyones) == num_rows, f"{len(everyones)} features of {num_rows} rows"
        return everyones


def shared_batch(world: World, batch: Any, *, with_media: bool) -> tuple[Any, Share | None]:
    """The whole effective batch, of which `batch` holds this process's samples, and which rows those are.

    All that is small is gathered: texts, labels, lengths, draws. Pictures and sounds only `with_media`, for objectives
    that encode other processes' samples; else they stay this process's own.
    """
    if world.size == 1:
        return batch, None
    media = [name for name in ("images", "audio") if getattr(batch, name) is not None]
    small = {f.name: value for f in fields(batch)
             if f.name not in media and isinstance(value := getattr(batch, f.name), Tensor)}
    everyones = world.gather_objects((small, batch.noise))
    starts = [sum(len(one["sample_ids"]) for one, _ in everyones[:rank]) for rank in range(world.size)]
    columns: dict[str, Any] = {name: joined([one[name] for one, _ in everyones]) for name in small}
    noise = {name: joined([draws[name] for _, draws in everyones]) for name in batch.noise}
    own = range(starts[world.rank], starts[world.rank] + len(batch.sample_ids))
    captions = own
    if batch.caption_owner is not None:
        owners = [one["caption_owner"] + start for (one, _), start in zip(everyones, starts, strict=True)]
        columns["caption_owner"] = torch.cat(owners)
        before = sum(map(len, owners[:world.rank]))
        captions = range(before, before + len(owners[world.rank]))
    if with_media:
        columns |= {name: joined(world.gather_objects(getattr(batch, name))) for name in media}
    return replace(batch, **columns, noise=noise), Share(own, captions, 0 if with_media else own.start)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of all parts; where the second dimension differs, the shorter ones are padded with zeros."""
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    padding = (0,) * (2 * parts[0].ndim - 4)
    return torch.cat([F.pad(part, (*padding, 0, longest - part.shape[1])) for part in parts])


def kept_patches(uniform_BN: Tensor, counts_B: Tensor | None, keep: float) -> tuple[Tensor, Tensor]:
    """The first ceil(keep * count) patches of each sample in the order of its uniforms, equal K by padding.

    `counts_B`: real patches of each sample, which come first (None: all N). Returns indices (B, K) and valid (B, K).
    """
    B, N = uniform_BN.shape
    counts_B = torch.full((B,), N) if counts_B is None else counts_B
    kept_B = (counts_B * keep).ceil().long().clamp(min=1)
    order_BN = uniform_BN.masked_fill(torch.arange(N) >= counts_B[:, None], 2.0).argsort(dim=1)
    K = int(kept_B.max())
    return order_BN[:, :K], torch.arange(K) < kept_B[:, None]


def accumulate(step: Step, terms: Iterable[Term], backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
    """The sum of each part over all terms. `backward` is called on each term, whose graph is then freed; once, on their
    sum, where the objectives share the tokens of the whole batch."""
    shared: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for loss, parts in terms:
        if step.is_whole:
            shared.append(loss)
        else:
            backward(loss)
        for name, value in parts.items():
            sums[name] = sums[name] + value if name in sums else value
    if shared:
        backward(torch.stack(shared).sum())
    return sums


def pick(tokens: Any, rows: Tensor) -> Any:
    """The same Tokens, of some rows."""
    return type(tokens)(*(None if part is None else part.index_select(0, rows) for part in tokens))


def hidden_words(batch: Any) -> Tensor:
    """Mask of the tokens of the whole batch that masked pretraining hides; (C, L)."""
    mask = batch.attention_mask
    inner = mask & F.pad(mask[:, 1:], (0, 1))  # a real token follows
    inner[:, 0] = False
    return inner & (batch.noise["text"] < TEXT_MASK_PART)
