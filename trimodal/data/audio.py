"""Sounds: any common file to 16 kHz mono, and from there to the log-mel that the audio encoder reads.

    waveform = decode_audio("dog.flac", start_s=2.0, duration_s=5.0)   # float32 [S]
    mel = log_mel(waveform)                                            # float32 [T, 80]

Legend: S samples at 16 kHz, T mel frames (10 ms).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchaudio.transforms

from trimodal.config import NUM_MELS, SAMPLE_RATE_HZ
from trimodal.data import tracks
from trimodal.data.samples import BrokenSample, decoding
from trimodal.data.tracks import Piece

HOP = 160  # samples: 10 ms
WINDOW = 400  # samples: 25 ms
FFT = 512  # the window, padded with zeros: bins of 31 Hz, so that each of the 80 filters covers one
LOG_FLOOR = 1e-6  # mel power below the noise of 8-bit and above that of 16-bit recordings

SILENCE_PEAK = 1e-5  # a third of the smallest step of 16 bits
MAX_PEAK = 1e6  # floating-point files may pass 1; beyond this, or not a number, is damage

_KERNEL_TAPS = 4_000_000  # the largest resampling kernel that is built (16 MB)
_MEL_BLOCK = 3_000  # frames transformed at once: bounds memory for long sounds


def decode_audio(path: str | Path, start_s: float = 0.0, duration_s: float = 0.0,
                 rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """Decode `path` from `start_s` for `duration_s` (0: to the end) to float32 [S], mono, at `rate_hz`.

    Second 0 is that of a player: the earliest start of any picture or sound track of the file; a track that begins
    later has silence before it. Mono is the mean of the channels; where this has below 1 % of the loudest channel's
    energy within the stretch, since they cancel each other, it is that channel. Where the file ends before
    `duration_s`, the result is shorter.

    Raises:
        BrokenSample: no such file, not a sound, no samples from `start_s` on, silent, not finite, or beyond the bounds
            of `tracks` (1 to 400 kHz, 64 channels, an hour, 173 million samples).
    """
    with decoding(str(path), "sound"):
        pieces = tracks.read(str(path), start_s, duration_s)
        _check_samples(pieces, start_s)
    parts = [resampled(piece.samples, piece.rate_hz, rate_hz) for piece in pieces]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def waveform_of(samples_NC: np.ndarray, rate_hz: int, to_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """What `decode_audio` gives of a file with these samples of C channels, float32 [S] at `to_hz`.

    Raises:
        BrokenSample: none, silent, not finite, or beyond the bounds of `tracks`.
    """
    pieces = [tracks.mixed(np.asarray(samples_NC, np.float32), rate_hz)] if len(samples_NC) else []
    _check_samples(pieces, 0.0)
    return resampled(pieces[0].samples, rate_hz, to_hz)


def log_mel(waveform: np.ndarray) -> np.ndarray:
    """Natural log of (mel power + 1e-6) of a 16 kHz waveform [S]: float32 [T, 80] with T = ceil(S / 160).

    Frame t is a 25 ms Hann window centred on sample 160 t, zeros beyond both ends; 80 triangles of height 1, evenly
    spaced on Slaney's mel scale from 0 to 8 kHz (M. Slaney, Auditory Toolbox, 1998). Not standardised: the model does.
    """
    num_frames = math.ceil(len(waveform) / HOP)
    padded = np.zeros((num_frames - 1) * HOP + FFT, np.float32)
    kept = waveform[: len(padded) - FFT // 2]
    padded[FFT // 2: FFT // 2 + len(kept)] = kept
    mel = np.empty((num_frames, NUM_MELS), np.float32)
    with torch.inference_mode():
        for first in range(0, num_frames, _MEL_BLOCK):
            last = min(first + _MEL_BLOCK, num_frames)
            block = torch.from_numpy(padded[first * HOP: (last - 1) * HOP + FFT])
            mel[first:last] = _mel_transform()(block).add_(LOG_FLOOR).log_().T.numpy()
    return mel


def mel_filters() -> torch.Tensor:
    """How much of the power of each of the 257 bins of a spectrum goes to each mel, float32 [257, 80]."""
    filters: torch.Tensor = _mel_transform().mel_scale.fb
    return filters.clone()


def _check_samples(pieces: Sequence[Piece], start_s: float) -> None:
    if not pieces:
        raise BrokenSample(f"holds no samples from {start_s:g} s on")
    peak = tracks.peak(pieces)
    if not peak <= MAX_PEAK:
        raise BrokenSample(f"holds values that are not sound (peak {peak:g})")
    if peak < SILENCE_PEAK:
        raise BrokenSample("is silent")


def resampled(samples: np.ndarray, rate_hz: int, to_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """A waveform [S] at another rate, float32."""
    near_hz = near_rate(rate_hz, to_hz)
    if near_hz == to_hz:
        return np.ascontiguousarray(samples, np.float32)
    with torch.inference_mode():
        return _resampler(near_hz, to_hz)(torch.from_numpy(np.ascontiguousarray(samples, np.float32))).numpy()


def near_rate(rate_hz: int, to_hz: int = SAMPLE_RATE_HZ) -> int:
    """`rate_hz`, or the nearest rate whose ratio to `to_hz` is simple enough for a kernel of bounded size.

    A polyphase kernel has one row per output phase and about one column per input phase: 8,000 x 11,127 for 22,254 Hz.
    Reading such a file as 22,250 Hz shifts its pitch by 0.02 %, a third of a cent; the worst rate, near 1 kHz, moves by
    0.2 %.
    """
    exact = math.gcd(rate_hz, to_hz)
    for step in (d for d in range(exact, to_hz + 1) if to_hz % d == 0):
        near_hz = rate_hz if step == exact else round(rate_hz / step) * step
        if (to_hz // step) * (near_hz // step) <= _KERNEL_TAPS:
            return near_hz
    raise AssertionError("a step of the whole rate makes a kernel of few taps")


@lru_cache(maxsize=16)
def _resampler(rate_hz: int, to_hz: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate_hz, to_hz, lowpass_filter_width=16)


@lru_cache(maxsize=1)
def _mel_transform() -> torchaudio.transforms.MelSpectrogram:
    """Made in float32 whatever torch's default type is: its filters would differ in their last bits, and be kept."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return torchaudio.transforms.MelSpectrogram(SAMPLE_RATE_HZ, n_fft=FFT, win_length=WINDOW, hop_length=HOP,
                                                    n_mels=NUM_MELS, center=False, mel_scale="slaney")
    finally:
        torch.set_default_dtype(default)
