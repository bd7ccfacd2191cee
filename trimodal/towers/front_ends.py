"""Front ends of sound towers: a waveform to the frames that a tower reads, by transformers' own extractors.

    frames_TM = features_of(tower.input, waveform)         # float32
    real = real_frames(tower.input, len(waveform))         # of T, what is no padding

A sound longer than the tower's window is cut into windows before anything else, since an extractor cuts off what is
longer, or takes a random stretch of it, and scales by what it sees. Each sound is done by itself: side by side some
extractors give other values.

Shape suffixes: S samples, T frames, M bins.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from trimodal.errors import UserError
from trimodal.towers.base import SoundInput
from trimodal.towers.hub import quiet

MIN_SAMPLES = 400  # 25 ms at 16 kHz: less gives some extractors and towers no frame
EXTRACTORS = {"ast": "ASTFeatureExtractor", "clap": "ClapFeatureExtractor", "whisper": "WhisperFeatureExtractor",
              "wave": "Wav2Vec2FeatureExtractor"}
SETTINGS = {  # of preprocessor_config.json; all others stay the library's
    "ast": ("feature_size", "sampling_rate", "num_mel_bins", "max_length", "do_normalize", "mean", "std"),
    "clap": ("feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size", "frequency_min",
             "frequency_max", "top_db", "padding"),
    "whisper": ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft"),
    "wave": ("sampling_rate", "do_normalize")}


def features_of(taken: SoundInput, waveform_S: np.ndarray) -> np.ndarray:
    """Frames float32 [T, M] of a waveform at `taken.rate_hz`; T is a multiple of the window where `whole_windows`."""
    window = window_samples(taken)
    starts = range(0, max(1, len(waveform_S)), window)
    return np.concatenate([_window(taken, waveform_S[start:start + window]) for start in starts])


def window_samples(taken: SoundInput) -> int:
    """Samples of a whole window."""
    return round(taken.window_frames * taken.rate_hz / taken.frames_per_s)


def real_frames(taken: SoundInput, num_samples: int) -> int:
    """How many frames a sound of so many samples has without padding, at least one."""
    whole, rest = divmod(num_samples, window_samples(taken))
    return max(1, whole * taken.window_frames
               + min(taken.window_frames, math.ceil(rest * taken.frames_per_s / taken.rate_hz)))


def _window(taken: SoundInput, part_S: np.ndarray) -> np.ndarray:
    """Frames of at most one window."""
    extract, padding = _extractor(taken.front_end, json.dumps(taken.settings, sort_keys=True)), {}
    if len(part_S) < MIN_SAMPLES:
        part_S = np.pad(part_S, (0, MIN_SAMPLES - len(part_S)))
    if taken.front_end == "clap":
        padding = {"truncation": "rand_trunc"}  # the filters of unfused towers; nothing is longer here than a window
    with quiet():
        found = extract(part_S.astype(np.float32), sampling_rate=taken.rate_hz, return_tensors="np", **padding)
    values = np.asarray(found[extract.model_input_names[0]], np.float32)[0]
    if taken.front_end == "whisper":
        return np.ascontiguousarray(values.T)
    return values[0] if taken.front_end == "clap" else values.reshape(-1, taken.num_bins)


@lru_cache(maxsize=4)
def _extractor(front_end: str, settings: str) -> Any:
    import transformers

    return getattr(transformers, EXTRACTORS[front_end])(**json.loads(settings))


def settings_of(front_end: str, stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a preprocessor_config.json states of this front end.

    Raises:
        UserError: it is that of another front end, or of what is not done here.
    """
    made_for = stated.get("feature_extractor_type", EXTRACTORS[front_end])
    if made_for != EXTRACTORS[front_end]:
        raise UserError(f"{where}: its preprocessor_config.json is for {made_for}, expected {EXTRACTORS[front_end]}")
    if stated.get("padding") not in (None, "repeatpad") and front_end == "clap":
        raise UserError(f"{where}: its preprocessor_config.json states padding: {stated['padding']!r}, and only "
                        "'repeatpad' is done here")
    return {key: stated[key] for key in SETTINGS[front_end] if key in stated}
