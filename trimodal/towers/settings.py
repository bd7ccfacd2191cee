"""The pretrained towers that a configuration names: opened, and what follows from them for other settings."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from trimodal.config import Config, ModelConfig, StageConfig
from trimodal.data.codecs import KINDS, Kind
from trimodal.data.tokenizer import Tokenizer
from trimodal.errors import ConfigError
from trimodal.towers.base import ImageInput, Load, PretrainedTower, SoundInput, TextInput
from trimodal.towers.opening import open_tower


def open_towers(config: ModelConfig, names: Collection[str] | None = None, *,
                load: Load = "always") -> dict[str, PretrainedTower]:
    """The towers of the modalities whose encoder is not our own (or of those of `names`), with their weights, as far as
    `load` of `open_tower` says.

    Raises:
        UserError: one cannot be had; the message says what and what mends it.
    """
    size = None if config.image_size == "auto" else config.image_size
    rows = {name: config.tower(name) for name in config.pretrained if names is None or name in names}
    return {name: open_tower(row.tower, name, weights=row.weights, size=size if name == "image" else None, load=load)
            for name, row in rows.items()}


def with_towers(config: ModelConfig, towers: Mapping[str, PretrainedTower]) -> ModelConfig:
    """`config` with the size of images that its tower reads, where that is "auto".

    Raises:
        ConfigError: a tower that it names is missing, reads fewer words, or images of another size.
    """
    if missing := [name for name in config.pretrained if name not in towers]:
        raise ConfigError(f"model.{missing[0]}.tower: {config.tower(missing[0]).tower} is named, but not described in "
                          "this file; take one that this project wrote whole")
    for name, tower in towers.items():
        if tower.modality != name or config.tower(name).is_own:
            raise ConfigError(f"model.{name}.tower: {config.tower(name).tower} is named, but given is {tower.source}, "
                              f"a tower of {tower.modality}")
        if isinstance(tower.input, ImageInput):
            if config.image_size not in ("auto", tower.input.size):
                raise ConfigError(f"model.image_size: {config.image_size}, but {tower.source} reads "
                                  f"{tower.input.size}; set it to auto")
            config = dataclasses.replace(config, image_size=tower.input.size)
        elif isinstance(tower.input, TextInput) and config.context_length > tower.input.max_length:
            raise ConfigError(f"model.context_length: {config.context_length} tokens, but {tower.source} reads at most "
                              f"{tower.input.max_length}; set it to that or less")
    return config


class SoundReader:
    """How a pretrained tower reads a sound: from samples at `rate_hz`."""

    def __init__(self, taken: SoundInput) -> None:
        self.taken, self.rate_hz = taken, taken.rate_hz

    def frames(self, wave_S: np.ndarray) -> tuple[np.ndarray, int]:
        """Frames float32 [T, M] of samples [S], and how many of them are real."""
        from trimodal.towers.front_ends import features_of, real_frames

        return features_of(self.taken, wave_S), real_frames(self.taken, len(wave_S))


def inputs_of(towers: Mapping[str, PretrainedTower]) -> dict[str, Any]:
    """How the files and captions of pretrained towers are read, by modality."""
    return {name: SoundReader(tower.input) if isinstance(tower.input, SoundInput) else tower.input
            for name, tower in towers.items()}


def tokenizer_of(towers: Mapping[str, PretrainedTower]) -> Tokenizer | None:
    """The tokenizer of the text tower; None where that is our own, whose words `model.word_embeddings` names."""
    taken = towers["text"].input if "text" in towers else None
    return Tokenizer.from_json(taken.tokenizer) if isinstance(taken, TextInput) else None


def tower_facts(towers: Mapping[str, PretrainedTower], stages: Sequence[StageConfig]) -> dict[str, dict[str, Any]]:
    """What a report tells of each tower, by modality, as plain JSON."""
    return {name: {"source": tower.source, "licence": tower.licence, "digest": tower.digest,
                   "parameters": sum(p.numel() for p in tower.parameters()),
                   "frozen": [row.name for row in stages if not trains(row, name, tower)],
                   "trained": [row.name for row in stages if trains(row, name, tower)]}
            for name, tower in towers.items()}


def trains(row: StageConfig, modality: str, tower: PretrainedTower) -> bool:
    """Whether a stage trains a parameter of a tower."""
    return any(re.fullmatch(pattern, f"{modality}.tower.{name}")
               for pattern in row.trainable for name, _ in tower.named_parameters())


def frozen_until(config: Config, towers: Mapping[str, PretrainedTower]) -> dict[str, set[str]]:
    """By stage, the modalities whose towers it and all stages before it leave as they are: features of the weights that
    a run begins with stay true there."""
    kept, found = set(towers), {}
    for row in config.stages:
        found[row.name] = kept = {name for name in kept if not trains(row, name, towers[name])}
    return found


def live_towers(config: Config, towers: Mapping[str, PretrainedTower],
                lacking: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """By stage, the modalities whose towers it leaves as they are, and runs in each step all the same: features of
    those that an earlier stage trains are in no cache, nor are those of `lacking`, nor any without `data.cache`."""
    cached = frozen_until(config, towers) if config.data.cache else {}
    return {row.name: tuple(name for name in sorted(towers) if not trains(row, name, towers[name])
                            and (name in lacking or name not in cached.get(row.name, ()))) for row in config.stages}


def decoded_kinds(config: Config, towers: Mapping[str, PretrainedTower]) -> tuple[Kind, ...]:
    """The kinds of files that steps read themselves: not those of which they read features alone, nor sounds of
    pretrained towers, whose front ends read no log-mels."""
    always = set.intersection(*frozen_until(config, towers).values())
    unread = {"image"} & always | {"audio"} & set(towers)
    return tuple(kind for kind, name in zip(KINDS, ("image", "audio"), strict=True) if name not in unread)
