"""A checkpoint of this project, prepared for use: images, texts and sounds are read as its evaluation reads them.

Shape suffixes: H, W and S pixels, S samples of a sound, L token ids, B items, F embed_dim.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimodal.blocks import Tokens
from trimodal.config import AUDIO_WINDOW_FRAMES, MODALITIES, SAMPLE_RATE_HZ, config_from_dict
from trimodal.data import codecs
from trimodal.data.audio import log_mel
from trimodal.data.batches import PATCH, evaluated, pad_sounds
from trimodal.data.cache import cache_side
from trimodal.data.images import resize_for_cache
from trimodal.data.tokenizer import Tokenizer, pad_rows
from trimodal.inference.prepared import Prepared
from trimodal.towers.settings import inputs_of

ARGUMENTS = {"image": ("images",), "text": ("input_ids", "attention_mask"), "audio": ("audio", "audio_lengths")}
WINDOWS_AT_ONCE = 32  # of a long sound
TOKENS = 16  # texts whose lengths differ by less are encoded side by side


class CheckpointModel:
    """A TriModalModel with the preprocessing that its checkpoint states; features are L2-normalised, (B, F)."""

    fuses = True

    def __init__(self, model: Any, state: Mapping[str, Any]):
        """`model` and `state` as model.load_model gives them."""
        self.model = model
        self.modalities = tuple(state.get("modalities") or MODALITIES)  # those that training has compared
        self.config = replace(config_from_dict(dict(state["config"])), model=model.config)
        self.embed_dim = int(model.config.embed_dim)
        self.tokenizer = Tokenizer.from_json(state["tokenizer"])
        self.inputs = inputs_of(model.towers)
        sound = self.inputs.get("audio")
        self.rate_hz = int(sound.rate_hz if sound else SAMPLE_RATE_HZ)
        self.window_frames = int(sound.taken.window_frames if sound else AUDIO_WINDOW_FRAMES)

    def read_image(self, picture_HW3: np.ndarray) -> Prepared:
        """A picture, uint8; with `data.cache` as the cache gives it."""
        shrunk = np.ascontiguousarray(resize_for_cache(picture_HW3, cache_side(self.config.model.image_side)))
        if self.config.data.cache:
            shrunk = codecs.decode("image", codecs.encode("image", shrunk))
        return Prepared(evaluated(shrunk, self.config, self.inputs.get("image")))

    def read_sound(self, wave_S: np.ndarray) -> Prepared:
        """A sound at `rate_hz`, of any length."""
        if taken := self.inputs.get("audio"):
            frames_TM, length = taken.frames(wave_S)
        else:
            frames_TM = log_mel(wave_S).astype(np.float16)
            length = len(frames_TM)
        windows = math.ceil(len(frames_TM) / self.window_frames)
        return Prepared((frames_TM, length), windows, windows)

    def read_texts(self, texts: Sequence[str]) -> list[Prepared]:
        longest = self.config.model.context_length
        lengths = self.tokenizer.lengths(texts)
        ids, offsets = self.tokenizer.encode_flat(texts, longest)
        return [Prepared(ids[first:last], math.ceil((last - first) / TOKENS), is_cut=bool(length > longest))
                for first, last, length in zip(offsets[:-1], offsets[1:], lengths, strict=True)]

    def features(self, modality: str, values: Sequence[Any]) -> Tensor:
        """(B, F) of prepared values; of "fused" a value holds those of an item by modality."""
        if modality == "fused":
            inputs = {key: value for name in values[0]
                      for key, value in self._inputs(name, [one[name] for one in values]).items()}
            return self.model(**inputs)["fused_features"]
        inputs = self._inputs(modality, values)
        if modality == "audio" and "audio" not in self.inputs:
            return self._sound_features(*inputs.values())
        found: Tensor = getattr(self.model, f"{modality}_features")(*inputs.values())
        return found

    def _sound_features(self, audio_BTM: Tensor, lengths_B: Tensor) -> Tensor:
        """Features of sounds of as many windows, so many of these at a time: an hour of sound takes no more memory than
        a few minutes. Windows are encoded alone in any case."""
        at_once = WINDOWS_AT_ONCE * self.window_frames
        parts = [self.model.audio(part_BTM, (lengths_B - n * at_once).clamp(max=part_BTM.shape[1]))
                 for n, part_BTM in enumerate(audio_BTM.split(at_once, 1))]
        tokens_BND, valid_BN = (torch.cat(list(values), 1) for values in zip(*parts, strict=True))
        return self.model.features("audio", Tokens(tokens_BND, valid_BN))

    def _inputs(self, modality: str, values: Sequence[Any]) -> dict[str, Tensor]:
        """Arguments of the model's `forward` for one modality."""
        arrays: tuple[np.ndarray, ...]
        if modality == "image":
            arrays = (np.ascontiguousarray(np.stack(values).transpose(0, 3, 1, 2)),)
        elif modality == "audio":
            arrays = pad_sounds(values, 1 if "audio" in self.inputs else PATCH)
        else:
            offsets = np.cumsum([0, *map(len, values)])
            arrays = pad_rows(np.concatenate(values), offsets, np.arange(len(values)), self.tokenizer.pad_id)
        return {name: torch.from_numpy(array).to(self.device) for name, array in
                zip(ARGUMENTS[modality], arrays, strict=True)}

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    def scale(self, modality: str) -> float:
        """What cosines of images, or of sounds, with texts were multiplied by in training."""
        return float(self.model.logit_scale[f"{modality}_text"].detach().exp())
