"""Sounds: any common file to 16 kHz mono, and from there to the log-mel that the audio encoder reads.

    waveform = decode_audio("dog.flac", start_s=2.0, duration_s=5.0)   # float32 [S]
    mel = log_mel(waveform)                                            # float32 [T, 80]

Legend: S samples at 16 kHz, T mel frames (10 ms).
"""

import math
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchaudio.transforms

from config import NUM_MELS, SAMPLE_RATE_HZ

if TYPE_CHECKING:
    import soundfile

HOP = 160  # samples: 10 ms
WINDOW = 400  # samples: 25 ms
FFT = 512  # the window, padded with zeros: bins of 31 Hz, so that each of the 80 filters covers one
LOG_FLOOR = 1e-6  # mel power below the noise of 8-bit and above that of 16-bit recordings

# What may be decoded. Rate and channels, and the length where the file says it, are checked before anything is read.
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 400_000
MAX_CHANNELS = 64  # seventh-order ambisonics; the mean of more is no sound that anybody recorded
MAX_SOUND_S = 3_600.0
MAX_SAMPLES = 3_600 * 48_000  # of one sound at its own rate: 0.7 GB. At higher rates less than an hour
# FFmpeg tries no other formats: some are playlists, and it opens the files and addresses that these name.
AV_FORMATS = "mov,matroska,avi,mpegts,asf,flv,ogg,wav,w64,aiff,au,caf,flac,mp3,aac,ac3,amr,ape,wv,tta"
SILENCE_PEAK = 1e-5  # a third of the smallest step of 16 bits
MAX_PEAK = 1e6  # floating-point files may pass 1; beyond this, or not a number, is damage

_BLOCK_VALUES = 1 << 20  # read at once, over all channels
_KERNEL_TAPS = 4_000_000  # the largest resampling kernel that is built (16 MB)
SETTLE_S = 1.0  # compressed sound is decoded from this long before a start, until its predictors have settled
_SEEK_IS_WRONG = ("VORBIS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")  # in libsndfile 1.2: read from the start
_MEL_BLOCK = 3_000  # frames transformed at once: bounds memory for long sounds


class BrokenSound(ValueError):
    """A file that holds no usable sound. The message begins with the path."""


def decode_audio(path: str | Path, start_s: float = 0.0, duration_s: float = 0.0) -> np.ndarray:
    """Decode `path` from `start_s` for `duration_s` (0: to the end) to float32 [S], mono (mean of channels), 16 kHz.

    wav, flac, ogg and mp3 are read by libsndfile, everything else (m4a, and the sound of mp4, webm, mkv) by FFmpeg's
    libraries through PyAV. Where the file ends before `duration_s`, the result is shorter.

    Raises:
        BrokenSound: no such file, not a sound, no samples from `start_s` on, silent, not finite, or beyond the bounds
            above (1 to 400 kHz, 64 channels, an hour, 173 million samples).
    """
    if not os.path.isfile(path):
        raise BrokenSound(f"{path}: no such file")
    try:
        samples, rate_hz = _read(str(path), start_s, duration_s)
        _check_samples(samples, start_s)
    except BrokenSound as error:
        raise BrokenSound(f"{path}: {error}") from None
    except Exception as error:  # damaged files make the decoders raise nearly any type
        if isinstance(error, MemoryError) and not type(error).__module__.startswith("av."):
            raise  # FFmpeg's own says that the file asks for absurd sizes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenSound(f"{path}: cannot be decoded ({reason})") from None
    return _resample(samples, rate_hz)


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


def _read(path: str, start_s: float, duration_s: float) -> tuple[np.ndarray, int]:
    """Samples [n] at the file's own rate, and that rate."""
    import soundfile

    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError:
        return _read_with_av(path, start_s, duration_s)
    with file:
        return _read_with_soundfile(file, start_s, duration_s), file.samplerate


def _read_with_soundfile(file: "soundfile.SoundFile", start_s: float, duration_s: float) -> np.ndarray:
    first = round(start_s * file.samplerate)
    if first >= file.frames:
        return np.empty(0, np.float32)
    _check_sound(file.samplerate, file.channels)
    if file.subtype not in _SEEK_IS_WRONG:
        file.seek(first)
    position = file.tell()
    last = first + max(1, round(duration_s * file.samplerate)) if duration_s else file.frames
    _check_length(min(last, file.frames) - first, file.samplerate)
    pieces = []
    while position < last:
        size = min(last - position, max(1, _BLOCK_VALUES // file.channels))
        block = file.read(size, dtype="float32", always_2d=True)
        if not len(block):
            break
        pieces.append(block[max(0, first - position):].mean(axis=1))
        position += len(block)
        _check_length(position - first, file.samplerate)
    return np.concatenate(pieces) if pieces else np.empty(0, np.float32)


def _read_with_av(path: str, start_s: float, duration_s: float) -> tuple[np.ndarray, int]:
    import av

    try:
        opened = av.open(path, metadata_errors="ignore", options={"format_whitelist": AV_FORMATS})
    except av.ArgumentError:  # which a format that is not in the list gets
        raise BrokenSound("cannot be decoded (of a format that is not read here)") from None
    with opened as container:
        if not container.streams.audio:
            raise BrokenSound("has no sound track")
        return _decode_stream(container, container.streams.audio[0], start_s, duration_s)


def _decode_stream(container, stream, start_s: float, duration_s: float) -> tuple[np.ndarray, int]:
    import av

    rate_hz = stream.codec_context.sample_rate
    _check_sound(rate_hz, stream.codec_context.channels)
    if start_s > SETTLE_S:
        container.seek(int((start_s - SETTLE_S) / stream.time_base), stream=stream)
    to_float = av.AudioResampler(format="fltp")
    first = round(start_s * rate_hz)
    end = round((start_s + duration_s) * rate_hz) if duration_s else math.inf
    pieces: list[np.ndarray] = []
    position: int | None = None if start_s else 0  # in samples from the beginning of the file; after a seek not known
    for frame in container.decode(stream):
        if position is None:
            position = round((frame.time or 0.0) * rate_hz)
        for part in to_float.resample(frame):
            mono = part.to_ndarray().mean(axis=0)
            wanted = mono[max(0, first - position): max(0, int(min(end, position + len(mono))) - position)]
            if len(wanted):  # an empty view would keep all that it is a view of
                pieces.append(wanted)
            position += len(mono)
        _check_length(position - first, rate_hz)
        if position >= end:
            break
    samples = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    return samples.astype(np.float32, copy=False), rate_hz


def _check_samples(samples: np.ndarray, start_s: float) -> None:
    peak = float(np.maximum(samples.max(initial=0.0), -samples.min(initial=0.0)))  # without a copy
    if not len(samples):
        raise BrokenSound(f"holds no samples from {start_s:g} s on")
    if not peak <= MAX_PEAK:
        raise BrokenSound(f"holds values that are not sound (peak {peak:g})")
    if peak < SILENCE_PEAK:
        raise BrokenSound("is silent")


def _check_sound(rate_hz: int, channels: int) -> None:
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise BrokenSound(f"has a sample rate of {rate_hz} Hz, outside {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise BrokenSound(f"has {channels} channels, outside 1 to {MAX_CHANNELS}")


def _check_length(num_samples: int, rate_hz: int) -> None:
    if num_samples > min(MAX_SOUND_S * rate_hz, MAX_SAMPLES):
        raise BrokenSound(f"is over {min(MAX_SOUND_S, MAX_SAMPLES / rate_hz):g} s long: give a start and a duration")


def _resample(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    near_hz = near_rate(rate_hz)
    if near_hz == SAMPLE_RATE_HZ:
        return np.ascontiguousarray(samples, np.float32)
    with torch.inference_mode():
        return _resampler(near_hz)(torch.from_numpy(np.ascontiguousarray(samples, np.float32))).numpy()


def near_rate(rate_hz: int) -> int:
    """`rate_hz`, or the nearest rate whose ratio to 16 kHz is simple enough for a kernel of bounded size.

    A polyphase kernel has one row per output phase and about one column per input phase: 8,000 x 11,127 for 22,254 Hz.
    Reading such a file as 22,250 Hz shifts its pitch by 0.02 %, a third of a cent; the worst rate, near 1 kHz, moves by
    0.2 %.
    """
    exact = math.gcd(rate_hz, SAMPLE_RATE_HZ)
    for step in (d for d in range(exact, SAMPLE_RATE_HZ + 1) if SAMPLE_RATE_HZ % d == 0):
        near_hz = rate_hz if step == exact else round(rate_hz / step) * step
        if (SAMPLE_RATE_HZ // step) * (near_hz // step) <= _KERNEL_TAPS:
            return near_hz
    raise AssertionError("a step of 16 kHz makes a kernel of at most 25 taps")


@lru_cache(maxsize=16)
def _resampler(rate_hz: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate_hz, SAMPLE_RATE_HZ, lowpass_filter_width=16)


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
