"""Sounds of every kind become the same 16 kHz mono and the same log-mel; useless ones become one kind of error."""

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests import trees
from tests.ranks import in_ranks
from tests.refusals import refused
from tests.small_runs import float64
from trimodal.data import audio, tracks
from trimodal.data.audio import decode_audio, log_mel
from trimodal.data.samples import BrokenSample


def melody(rate_hz: int, seconds: float = 2.0) -> np.ndarray:
    """Four tones below 2 kHz, one every half second, each fading in and out: the same at any rate above 4 kHz."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    tones = [np.sin(2 * np.pi * hz * t) * np.clip(np.sin(np.pi * (t / 0.5 - i)), 0, None) * (t // 0.5 == i)
             for i, hz in enumerate((220.0, 700.0, 1150.0, 1800.0))]
    return (0.3 * np.sum(tones, axis=0)).astype(np.float32)


def mel_difference(first: np.ndarray, second: np.ndarray, depth_db: float) -> np.ndarray:
    """Absolute difference in nats where the first is within `depth_db` of its loudest cell."""
    frames = min(len(first), len(second))
    loud = first[:frames] > first.max() - depth_db * math.log(10) / 10
    return np.abs(first[:frames] - second[:frames])[loud]


# ---- the same sound, however it is stored ------------------------------------------------------------------------


@pytest.mark.parametrize(("rate_hz", "depth_db"), [
    (5_000, 40), (8_000, 40), (11_025, 40), (22_050, 40), (32_000, 40), (44_100, 40), (48_000, 40), (192_000, 40),
    (11_127, 20), (22_254, 20),
])
def test_same_log_mel_at_any_rate(tmp_path: Path, rate_hz: int, depth_db: float) -> None:
    """To 0.05 nats (0.2 dB): the ripple of the filter, over all cells within 40 dB of the peak. The odd rates are taken
    0.02 % too fast or slow, 0.4 ms after 2 s: of a fade 16 ms old, 20 dB below its peak, that is 2.5 %."""
    reference = log_mel(decode_audio(trees.sound(tmp_path / "a.wav", melody(16_000))))
    mel = log_mel(decode_audio(trees.sound(tmp_path / "b.wav", melody(rate_hz), rate_hz)))
    assert abs(len(mel) - len(reference)) <= 1
    assert mel_difference(reference, mel, depth_db).max() < 0.05


@pytest.mark.parametrize(("name", "rate_hz", "channels"), [
    ("a.flac", 44_100, 2), ("a.ogg", 44_100, 1), ("a.ogg", 48_000, 2), ("a.mp3", 44_100, 2), ("a.m4a", 44_100, 1),
    ("a.m4a", 48_000, 2), ("a.mp4", 44_100, 2), ("a.mkv", 44_100, 1), ("a.webm", 48_000, 1), ("a.mov", 16_000, 1),
])
def test_same_log_mel_in_any_container(tmp_path: Path, name: str, rate_hz: int, channels: int) -> None:
    """Lossy coders at about 100 kbit/s leave noise some 30 dB below the tones: within 20 dB of the peak that is at most
    0.1 in amplitude, 0.2 nats in power; the encoder's delay has been taken off, or the onsets alone would differ by
    more than that."""
    reference = log_mel(decode_audio(trees.sound(tmp_path / "r.wav", melody(16_000))))
    mel = log_mel(decode_audio(trees.sound(tmp_path / name, melody(rate_hz), rate_hz, channels)))
    assert 0 <= len(mel) - len(reference) <= 7  # AAC fills its last block of 64 ms
    difference = mel_difference(reference, mel, 20)
    assert difference.max() < 0.2 and difference.mean() < 0.02


def test_same_log_mel_tolerances_can_fail(tmp_path: Path) -> None:
    reference = log_mel(melody(16_000))
    assert mel_difference(reference, log_mel(melody(16_000)[80:]), 20).max() > 0.2  # 5 ms of delay
    assert mel_difference(reference, log_mel(1.05 * melody(16_000)), 40).max() > 0.05  # half a decibel


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = trees.tone(hz=300), trees.tone(hz=900)
    for subtype in ("PCM_16", "PCM_24", "FLOAT", "PCM_U8"):
        soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype=subtype)
        step = 2.0**-7 if subtype == "PCM_U8" else 2.0**-15
        assert np.abs(decode_audio(tmp_path / "a.wav") - (left + right) / 2).max() <= step


def test_stereo_is_averaged_in_other_containers(tmp_path: Path) -> None:
    both = np.stack([trees.tone(hz=300), trees.tone(hz=900)], axis=1)
    spectrum = np.abs(np.fft.rfft(decode_audio(trees.sound(tmp_path / "a.m4a", both, channels=2))[:16_000])) / 8_000
    assert np.allclose(spectrum[[300, 900]], 0.125, atol=0.01)


def test_16_khz_passes_untouched(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 40_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    decoded = decode_audio(tmp_path / "a.wav")
    assert decoded.dtype == np.float32 and np.array_equal(decoded, samples)


def test_sound_of_a_video(tmp_path: Path) -> None:
    decoded = decode_audio(trees.video(tmp_path / "a.mp4", [(0, 0, 0)] * 25, trees.tone(1.0, 16_000, 440.0)))
    spectrum = np.abs(np.fft.rfft(decoded[:16_000]))
    assert spectrum.argmax() == 440


def test_tones_above_8_khz_do_not_fold_back(tmp_path: Path) -> None:
    trees.sound(tmp_path / "a.wav", trees.tone(1.0, 44_100, 1000.0) + trees.tone(1.0, 44_100, 12_000.0), 44_100)
    spectrum = np.abs(np.fft.rfft(decode_audio(tmp_path / "a.wav") * np.hanning(16_000)))
    assert spectrum[4_000] < 1e-3 * spectrum[1_000]  # 12 kHz would appear at 4 kHz


# ---- start and duration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.mp4"])
def test_excerpt_equals_the_same_part_of_the_whole(tmp_path: Path, name: str) -> None:
    """Tones that differ at each moment, so that a shift of 1 ms would show."""
    rate_hz = 44_100
    t = np.arange(4 * rate_hz) / rate_hz
    chirp = (0.3 * np.sin(2 * np.pi * (200 * t + 225 * t * t))).astype(np.float32)
    path = trees.sound(tmp_path / name, chirp, rate_hz)
    whole = decode_audio(path)
    for start_s, duration_s in ((0.0, 0.7), (0.5, 0.0), (0.5, 0.25), (2.1, 1.0), (3.9, 2.0)):
        excerpt = decode_audio(path, start_s, duration_s)
        first = round(start_s * 16_000)
        expected = whole[first: first + round(duration_s * 16_000)] if duration_s else whole[first:]
        assert abs(len(excerpt) - len(expected)) <= 1
        margin = 100  # the resampler sees silence beyond an excerpt, and sound beyond a part
        common = slice(margin, min(len(excerpt), len(expected)) - margin)
        assert np.abs(excerpt[common] - expected[common]).max() < 0.02, (start_s, duration_s)


def test_excerpt_past_the_end_is_shorter(tmp_path: Path) -> None:
    path = trees.sound(tmp_path / "a.wav", trees.tone(1.0))
    assert len(decode_audio(path, 0.75, 10.0)) == 4_000


def test_tiny_duration_is_not_the_whole_file(tmp_path: Path) -> None:
    path = trees.sound(tmp_path / "a.wav", np.full(16_000, 0.5, np.float32))
    assert len(decode_audio(path, 0.5, 1e-6)) == 1


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_start_after_the_end(tmp_path: Path, name: str) -> None:
    path = trees.sound(tmp_path / name, trees.tone(1.0))
    with refused(path, 5, error=BrokenSample):
        decode_audio(path, 5.0, 1.0)


# ---- broken sounds -----------------------------------------------------------------------------------------------


def write_raw(path: Path, samples: np.ndarray, rate_hz: int = 16_000, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, samples.astype(np.float32), rate_hz, subtype=subtype)
    return path


@pytest.mark.parametrize("name", ["a.wav", "a.ogg", "a.flac"])
def test_zero_length(tmp_path: Path, name: str) -> None:
    path = trees.sound(tmp_path / name, np.zeros(0, np.float32))
    with refused(path, 0, error=BrokenSample):  # no samples from 0 s on, or, of FLAC, a file of 0 bytes
        decode_audio(path)


@pytest.mark.parametrize("name", ["a.wav", "a.ogg", "a.m4a"])
def test_silence(tmp_path: Path, name: str) -> None:
    samples = np.zeros(12_000, np.float32)
    with refused(trees.sound(tmp_path / name, samples, 44_100), error=BrokenSample):
        decode_audio(tmp_path / name)
    trees.sound(tmp_path / name, samples + trees.tone(12_000 / 44_100, 44_100), 44_100)
    assert len(decode_audio(tmp_path / name)) > 4_000, "it is the silence that is refused"


def test_one_step_of_16_bits_is_not_silence(tmp_path: Path) -> None:
    samples = np.zeros(16_000)
    samples[8_000] = 2.0**-15
    assert decode_audio(write_raw(tmp_path / "a.wav", samples, subtype="PCM_16")).max() > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_values_that_are_not_sound(tmp_path: Path, value: float) -> None:
    samples = np.full(1_000, 0.1)
    samples[500] = value
    with refused(tmp_path / "a.wav", f"{value:g}", error=BrokenSample):
        decode_audio(write_raw(tmp_path / "a.wav", samples))


@pytest.mark.parametrize(("rate_hz", "good"), [(999, False), (1_000, True), (400_000, True), (400_001, False)])
def test_rate_bounds(tmp_path: Path, rate_hz: int, good: bool) -> None:
    path = write_raw(tmp_path / "a.wav", trees.tone(1.0, rate_hz, 100.0), rate_hz)
    if good:
        assert abs(len(decode_audio(path)) - 16_000) <= 1
    else:
        with refused(path, rate_hz, error=BrokenSample):
            decode_audio(path)


@pytest.mark.parametrize("name", ["a.wav", "a.m4a"])
def test_length_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = trees.sound(tmp_path / name, trees.tone(3.0))
    monkeypatch.setattr(tracks, "MAX_SOUND_S", 2.5)
    with refused(path, 2.5, error=BrokenSample):
        decode_audio(path)
    assert len(decode_audio(path, 1.0, 1.0)) == 16_000
    assert len(decode_audio(path, 1.0)) > 30_000  # what is read is bounded, not the file


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_length_is_checked_before_anything_is_read(tmp_path: Path, name: str) -> None:
    """Two hours of silence are 250 KB of FLAC: decoded they would be 460 MB. Here it is an hour and a second at 1 kHz,
    which would be 14 MB."""
    path = write_raw(tmp_path / name, np.zeros(3_601_000), 1_000, "PCM_U8" if name == "a.wav" else "PCM_16")
    tracemalloc.start()
    with refused(path, 3_600, error=BrokenSample):
        decode_audio(path)
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < 1_000_000


def test_high_rates_may_be_less_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks, "MAX_SAMPLES", 96_000)
    assert len(decode_audio(trees.sound(tmp_path / "a.wav", trees.tone(2.0, 48_000), 48_000))) == 32_000
    with refused(tmp_path / "a.wav", 1, error=BrokenSample):
        decode_audio(trees.sound(tmp_path / "a.wav", trees.tone(2.0, 96_000), 96_000))


@pytest.mark.parametrize(("channels", "good"), [(64, True), (65, False)])
def test_channel_bound(tmp_path: Path, channels: int, good: bool) -> None:
    path = trees.sound(tmp_path / "a.wav", trees.tone(0.1), channels=channels)
    if good:
        assert np.abs(decode_audio(path) - trees.tone(0.1)).max() < 1e-3
    else:
        with refused(path, 65, 1, 64, error=BrokenSample):
            decode_audio(path)


def test_what_lies_before_a_start_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a container cannot be jumped into, all before the start is decoded, but never held at once."""
    path = trees.sound(tmp_path / "a.mkv", trees.tone(20.0))
    monkeypatch.setattr(tracks, "SETTLE_S", 100.0)  # so nothing is jumped over
    decode_audio(path, 0.0, 0.1)  # loads what has to be loaded
    tracemalloc.start()
    assert len(decode_audio(path, 18.0, 0.5)) == 8_000
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < 500_000  # 20 s are 1.3 MB


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile other.mkv\n", "#EXTM3U\n#EXTINF:10,\nother.mkv\n"])
def test_a_playlist_opens_no_other_file(tmp_path: Path, text: str) -> None:
    trees.sound(tmp_path / "other.mkv", trees.tone())
    (tmp_path / "a.mp4").write_text(text)
    with refused(tmp_path / "a.mp4", error=BrokenSample):
        decode_audio(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["a.wav", "a.ogg", "a.m4a", "a.mp4", "a.png"])
@pytest.mark.parametrize("content", [b"", b"no sound at all", bytes(4096)])
def test_not_a_sound(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with refused(tmp_path / name, error=BrokenSample):
        decode_audio(tmp_path / name)


def test_picture_missing_file_and_folder(tmp_path: Path) -> None:
    trees.picture(tmp_path / "a.png")
    trees.video(tmp_path / "a.mp4", [(9, 9, 9)] * 3)
    for path in (tmp_path / "a.png", tmp_path / "a.mp4", tmp_path / "a.wav", tmp_path):
        with refused(path, error=BrokenSample):
            decode_audio(path)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.m4a"])
def test_damage_at_any_place_raises_nothing_but_broken_sound(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    path = trees.sound(tmp_path / name, trees.tone(0.3))
    whole = path.read_bytes()
    outcomes = set()
    for i in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if i % 2 else whole)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            decode_audio(path)
            outcomes.add("decoded")
        except BrokenSample as error:
            assert str(error).startswith(f"{path}: ")
            outcomes.add("broken")
    assert "broken" in outcomes


# ---- log-mel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 255, 256, 400, 16_000, 16_001, 480_001, 960_000])
def test_one_frame_every_10_ms(samples: int) -> None:
    mel = log_mel(np.full(samples, 0.1, np.float32))
    assert mel.shape == (math.ceil(samples / 160), 80) and mel.dtype == np.float32
    assert np.isfinite(mel).all()


def slaney_filters() -> np.ndarray:
    """[80, 257], straight from the definition: linear below 1 kHz, logarithmic above, triangles of height 1."""
    def to_mel(hz: float) -> float:
        return 3 * hz / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)

    def to_hz(mel: float) -> float:
        return 200 * mel / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    hz_of = np.array([to_hz(mel) for mel in np.linspace(0, to_mel(8000), 82)])
    hz = np.linspace(0, 8000, 257)
    rising = (hz - hz_of[:-2, None]) / (hz_of[1:-1] - hz_of[:-2])[:, None]
    falling = (hz_of[2:, None] - hz) / (hz_of[2:] - hz_of[1:-1])[:, None]
    return np.clip(np.minimum(rising, falling), 0, None)


def test_log_mel_equals_its_definition() -> None:
    waveform = np.random.default_rng(0).normal(0, 0.1, 5_000).astype(np.float32)
    mel = log_mel(waveform)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    padded = np.pad(waveform.astype(np.float64), 1_000)
    for t in (0, 1, 17, 31):
        centre = 1_000 + 160 * t
        power = np.abs(np.fft.rfft(padded[centre - 200: centre + 200] * hann, 512)) ** 2
        assert np.allclose(mel[t], np.log(slaney_filters() @ power + 1e-6), atol=2e-3)


def first_log_mel_in_float64(waveform_S: np.ndarray) -> torch.Tensor:
    with float64():
        return torch.from_numpy(log_mel(waveform_S))


def test_log_mel_does_not_depend_on_torchs_default_type() -> None:
    """In a process of its own: the filters are made once, and kept."""
    waveform_S = trees.tone(0.5) + np.random.default_rng(0).normal(0, 0.01, 8000).astype(np.float32)
    [fresh] = in_ranks(1, first_log_mel_in_float64, waveform_S)
    assert fresh.value.dtype == torch.float32 and torch.equal(fresh.value, torch.from_numpy(log_mel(waveform_S)))


def test_log_mel_of_silence_is_the_floor() -> None:
    assert np.allclose(log_mel(np.zeros(1_600, np.float32)), math.log(1e-6))


def test_frames_depend_only_on_their_window() -> None:
    """What comes 12.5 ms after the centre of a frame changes nothing, across the blocks of long sounds too."""
    waveform = np.random.default_rng(0).normal(0, 0.1, 160 * 7_000).astype(np.float32)
    whole = log_mel(waveform)
    part = log_mel(waveform[160 * 2_900: 160 * 3_100])
    assert np.allclose(whole[2_902: 3_098], part[2: 198], atol=1e-4)


def test_rates_of_a_simple_ratio_are_exact_and_others_near() -> None:
    for rate_hz in (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000):
        assert audio.near_rate(rate_hz) == rate_hz
    errors = {rate_hz: abs(audio.near_rate(rate_hz) / rate_hz - 1) for rate_hz in range(1_000, 400_000, 97)}
    assert max(errors.values()) < 0.002
    assert max(error for rate_hz, error in errors.items() if rate_hz > 4_000) < 0.001
    for rate_hz in errors:
        near_hz = audio.near_rate(rate_hz)
        ratio = math.gcd(near_hz, 16_000)
        assert (16_000 // ratio) * (near_hz // ratio) <= 4_000_000
