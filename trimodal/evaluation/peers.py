"""Models of others under this project's protocols.

    model = open_hub("hub:openai/clip-vit-base-patch32")
    encoded = encode(model, data, "test", config, setting)       # then protocols.score, as for a model of our own

They read the files themselves, not what the cache holds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets import Data
from trimodal.config import SAMPLE_RATE_HZ, Config
from trimodal.data import bad_samples
from trimodal.data.audio import decode_audio, resampled
from trimodal.data.generated import combination_of, generate_sound
from trimodal.data.images import decode_image
from trimodal.data.samples import BrokenSample
from trimodal.evaluation import protocols
from trimodal.evaluation.micro_batches import Setting
from trimodal.inference.hub_models import HubModel
from trimodal.inference.prepared import Prepared
from trimodal.memory.micro_batches import MicroBatches


def encode(model: HubModel, data: Data, split: str, config: Config, setting: Setting) -> protocols.Encoded:
    """Encode a split as `protocols.encode_split` does, by a model of others.

    Raises:
        UserError: too many broken files, or out of memory with one sample at a time.
    """
    rows_by_kind = protocols.chosen_rows(data, split, setting.limit, model.modalities)
    rows = np.sort(np.concatenate([np.empty(0, np.int64), *rows_by_kind.values()]))
    size = config.evaluation.batch_size
    encoder = _Encoder(model, data, split, setting.micro_batches(size))
    parts = np.array_split(rows, max(1, -(-len(rows) // size)))
    for part in tqdm(parts, desc=f"evaluating {split}", unit="batch", disable=None):
        encoder.add(part.tolist())
    if encoder.broken:
        bad_samples.record(encoder.broken, config)
        bad_samples.check("data", len(encoder.broken), len(rows), encoder.broken[0]["reason"], config)
    return protocols.encode_known(encoder.known, data, split, config, setting, model.modalities)


class _Encoder:
    """Reads samples and keeps their features, by modality and row; those with a broken file have none."""

    def __init__(self, model: HubModel, data: Data, split: str, micro_batches: MicroBatches):
        self.model, self.micro_batches = model, micro_batches
        self.table, self.store = data.tables[split], data.splits[split].store
        self.known: dict[str, dict[int, Tensor]] = {name: {} for name in model.modalities}
        self.broken: list[dict[str, str]] = []

    def add(self, rows: list[int]) -> None:
        has = {"image": self.table.has_image, "audio": self.table.has_audio, "text": self.table.has_text}
        media = self.model.modalities[0]
        read: dict[int, Prepared] = {}
        for row in [row for row in rows if has[media][row]]:
            try:
                read[row] = self._image(row) if media == "image" else self._sound(row)
            except BrokenSample as error:
                self.broken.append(self.store.record(row, str(error)))
                rows = [other for other in rows if other != row]
        if read:
            self.known[media] |= dict(zip(read, self._features(media, list(read.values())).split(1), strict=True))
        captions = {row: self.table.captions_of(row) for row in rows if has["text"][row]}
        if texts := [text for own in captions.values() for text in own]:
            features_CF = self._features("text", self.model.read_texts(texts))
            self.known["text"] |= dict(zip(captions, features_CF.split(list(map(len, captions.values()))), strict=True))

    def _features(self, modality: str, items: Sequence[Prepared]) -> Tensor:
        values = [item.value for item in items]
        return torch.cat(self.micro_batches.of(
            (modality,), len(values), lambda part: self.model.features(modality, values[part]),
            weight=max(item.weight for item in items)))

    def _image(self, row: int) -> Prepared:
        """The whole picture; of a generated sample what training reads."""
        return self.model.read_image(
            self.store.image(row) if self.store.is_generated(row) else decode_image(self.table.images[row]))

    def _sound(self, row: int) -> Prepared:
        """The sample's stretch of sound."""
        path, rate_hz = self.table.audio[row], self.model.rate_hz
        if self.store.is_generated(row):
            wave_S = generate_sound(combination_of(path), np.random.default_rng(0))
            return self.model.read_sound(resampled(wave_S, SAMPLE_RATE_HZ, rate_hz))
        stretch = float(self.table.start_s[row]), float(self.table.duration_s[row])
        return self.model.read_sound(decode_audio(path, *stretch, rate_hz))
