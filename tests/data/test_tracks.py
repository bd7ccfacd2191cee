"""Sound and time belong together in every container, nothing that a file holds is lost, channels never cancel."""

import fractions
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests import trees
from tests.refusals import refused
from trimodal.data import sound_files, tracks
from trimodal.data.audio import decode_audio
from trimodal.data.samples import BrokenSample

RATE_HZ = 48_000
SECONDS = 8


def tones(seconds: float = SECONDS, rate_hz: int = RATE_HZ) -> np.ndarray:
    """300 Hz in second 0, 400 in second 1, and so on: the tone tells the second."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.3 * np.sin(2 * np.pi * (300 + 100 * np.floor(t)) * t)).astype(np.float32)


def seconds_of(wave_S: np.ndarray) -> list[float]:
    """The second that each half second of 16 kHz tells, -1 where it is silent."""
    told = []
    for part in (wave_S[at: at + 8_000] for at in range(0, len(wave_S) - 7_999, 8_000)):
        spectrum = np.abs(np.fft.rfft(part * np.hanning(8_000)))
        told.append(round((float(spectrum.argmax()) * 2 - 300) / 100, 1) if spectrum.max() > 40 else -1.0)
    return told


def container(path: Path, codec: str, *, picture: str = "", clock_s: float = 0.0, late_s: float = 0.0,
              hole: tuple[float, float] = (0.0, 0.0)) -> Path:
    """`tones` in a container whose clock begins at `clock_s`; the track sets in `late_s` later, and its packets of the
    seconds `hole` are missing. With `picture`, a video of SECONDS from the beginning on."""
    import av

    with av.open(str(path), "w") as file:
        video = file.add_stream(picture, rate=25) if picture else None
        voice = file.add_stream(codec, rate=RATE_HZ, layout="mono")
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
            for number in range(25 * SECONDS):
                frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), number, np.uint8), format="rgb24")
                frame.pts, frame.time_base = number + round(25 * clock_s), fractions.Fraction(1, 25)
                file.mux(video.encode(frame))
            file.mux(video.encode(None))
        whole = av.AudioFrame.from_ndarray(tones()[None], format="fltp", layout="mono")
        whole.sample_rate, whole.time_base = RATE_HZ, fractions.Fraction(1, RATE_HZ)
        whole.pts = round((clock_s + late_s) * RATE_HZ)
        cut = av.AudioResampler(format=voice.format, layout="mono", rate=RATE_HZ,
                                frame_size=voice.codec_context.frame_size)
        packets = [packet for part in [*cut.resample(whole), *cut.resample(None)] for packet in voice.encode(part)]
        for packet in [*packets, *voice.encode(None)]:
            if not hole[0] < float(packet.pts * packet.time_base) - clock_s - late_s < hole[1]:
                file.mux(packet)
    return path


# ---- second 0 ----------------------------------------------------------------------------------------------------


CLOCKS = [("a.ts", "aac", "mpeg2video", 1.4), ("a.ts", "aac", "", 3600.0), ("a.webm", "libopus", "", 30.0),
          ("a.mkv", "aac", "mpeg4", 30.0), ("a.mkv", "aac", "", 0.0), ("a.mp4", "aac", "mpeg4", 0.0),
          ("a.m4a", "aac", "", 0.0), ("a.mpg", "mp2", "mpeg2video", 0.0), ("a.avi", "mp3", "mpeg4", 0.0),
          ("a.mp3", "mp3", "", 0.0), ("a.ogg", "libopus", "", 0.0), ("a.flac", "flac", "", 0.0)]


@pytest.mark.parametrize(("name", "codec", "picture", "clock_s"), CLOCKS)
def test_a_start_counts_from_the_beginning_of_the_file(
        tmp_path: Path, name: str, codec: str, picture: str, clock_s: float) -> None:
    path = container(tmp_path / name, codec, picture=picture, clock_s=clock_s)
    whole = decode_audio(path)
    assert 0 <= len(whole) - SECONDS * 16_000 < 1_000  # AAC and MP2 fill their last blocks
    assert seconds_of(whole)[:16] == pytest.approx(sorted([*range(8)] * 2), abs=0.15)
    for start_s in (0.0, 0.5, 2.0, 5.5):
        excerpt = decode_audio(path, start_s, 1.5)
        assert len(excerpt) == 24_000
        assert seconds_of(excerpt) == pytest.approx([(start_s + k / 2) // 1 for k in range(3)], abs=0.15)


@pytest.mark.parametrize(("name", "codec", "picture", "clock_s"),
                         [("a.mp4", "aac", "mpeg4", 0.0), ("a.mkv", "aac", "mpeg4", 0.0),
                          ("a.mkv", "libopus", "mpeg4", 30.0), ("a.ts", "aac", "mpeg2video", 10.0)])
def test_before_a_track_that_begins_late_there_is_silence(
        tmp_path: Path, name: str, codec: str, picture: str, clock_s: float) -> None:
    path = container(tmp_path / name, codec, picture=picture, clock_s=clock_s, late_s=3.0)
    whole = decode_audio(path)
    assert abs(len(whole) / 16_000 - 3 - SECONDS) < 0.06
    assert seconds_of(np.pad(whole, (0, 100)))[:22] == pytest.approx([-1.0] * 6 + sorted([*range(8)] * 2), abs=0.15)
    assert np.flatnonzero(np.abs(whole) > 0.05)[0] / 16_000 == pytest.approx(3.0, abs=0.03)
    assert seconds_of(decode_audio(path, 2.0, 2.0)) == pytest.approx([-1, -1, 0, 0], abs=0.15)
    assert seconds_of(decode_audio(path, 5.0, 1.0)) == pytest.approx([2, 2], abs=0.15)


def test_the_start_of_a_late_track_is_exact(tmp_path: Path) -> None:
    """To a sample of MPEG-TS's clock: AAC in blocks of 1,024 sets in 3 s and a third of a sample after the video."""
    path = container(tmp_path / "a.ts", "aac", picture="mpeg2video", clock_s=2.0, late_s=3.0)
    late = tracks.read(str(path))[0].samples
    alone = tracks.read(str(container(tmp_path / "b.ts", "aac")))[0].samples
    first = int(np.flatnonzero(late)[0]) - int(np.flatnonzero(alone)[0])
    assert np.array_equal(late[first:], alone)
    assert first == 3 * RATE_HZ - 1024  # the encoder's own delay, which MPEG-TS cannot say


def test_a_gap_in_a_track_is_silent(tmp_path: Path) -> None:
    path = container(tmp_path / "a.mkv", "flac", hole=(3.0, 5.0))
    whole = seconds_of(decode_audio(path))
    assert whole == pytest.approx([0, 0, 1, 1, 2, 2, -1, -1, -1, -1, 5, 5, 6, 6, 7, 7], abs=0.15)
    assert seconds_of(decode_audio(path, 5.5, 1.0)) == pytest.approx([5, 6], abs=0.15)


def test_a_clock_that_begins_anew_amid_a_file_makes_no_gap(tmp_path: Path) -> None:
    """MPEG-TS may be put together from several files."""
    first, second = container(tmp_path / "a.ts", "aac"), container(tmp_path / "b.ts", "aac", clock_s=500.0)
    for order in ((first, second), (second, first)):
        (tmp_path / "c.ts").write_bytes(b"".join(path.read_bytes() for path in order))
        assert len(decode_audio(tmp_path / "c.ts")) / 16_000 == pytest.approx(2 * SECONDS, abs=0.1)


# ---- all that a file holds ---------------------------------------------------------------------------------------


def wav_stating(path: Path, samples: np.ndarray, stated_bytes: int, tail: bytes = b"", subtype: str = "PCM_16") -> Path:
    """A WAV whose header states so many bytes of samples, as that of a recorder that was killed does."""
    soundfile.write(path, samples, 16_000, subtype=subtype)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at: at + 4] = stated_bytes.to_bytes(4, "little")
    content[4:8] = (at - 4 + stated_bytes if stated_bytes else 0).to_bytes(4, "little")
    path.write_bytes(bytes(content) + tail)
    return path


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "IMA_ADPCM"])
@pytest.mark.parametrize("stated_bytes", [0, 4096])
def test_a_wav_whose_writer_was_killed_is_read_to_its_end(tmp_path: Path, stated_bytes: int, subtype: str) -> None:
    path = wav_stating(tmp_path / "a.wav", tones(4, 16_000), stated_bytes, subtype=subtype)
    assert len(decode_audio(path)) / 16_000 == pytest.approx(4, abs=0.05)
    assert seconds_of(decode_audio(path, 2.0, 2.0)) == pytest.approx([2, 2, 3, 3], abs=0.15)


@pytest.mark.parametrize(("form", "mark", "places"), [
    ("RF64", b"ds64", range(8, 32)), ("AU", b".snd", range(8, 12)), ("AIFF", b"COMM", range(10, 14)),
    ("W64", b"data", range(16, 24))])
def test_other_files_whose_writer_was_killed_are_read_to_their_end(
        tmp_path: Path, form: str, mark: bytes, places: range) -> None:
    soundfile.write(tmp_path / "a.sound", tones(4, 16_000), 16_000, format=form, subtype="PCM_16")
    content = bytearray((tmp_path / "a.sound").read_bytes())
    for place in places:
        content[content.index(mark) + place] = 0
    if form == "AIFF":
        at = content.index(b"SSND") + 4
        content[at: at + 4] = bytes(4)
    (tmp_path / "a.sound").write_bytes(content)
    assert len(decode_audio(tmp_path / "a.sound")) == pytest.approx(64_000, abs=9)
    assert seconds_of(decode_audio(tmp_path / "a.sound", 2.0, 2.0)) == pytest.approx([2, 2, 3, 3], abs=0.15)


@pytest.mark.parametrize("tail", [b"LIST" + (8_000).to_bytes(4, "little") + bytes(8_000), b"ID3\3" + b"x" * 9_000,
                                  bytes(9_000), b"\1\2\3\4" * 99])
def test_what_follows_the_samples_of_a_wav_is_no_sound(tmp_path: Path, tail: bytes) -> None:
    path = wav_stating(tmp_path / "a.wav", tones(1, 16_000), 32_000, tail)
    assert len(decode_audio(path)) == 16_000


@pytest.mark.parametrize("padding", [b"", b"\0"])
def test_a_chunk_behind_an_odd_number_of_bytes_is_no_sound(tmp_path: Path, padding: bytes) -> None:
    """Some writers leave out the byte that makes the length even."""
    path = wav_stating(tmp_path / "a.wav", tones(1, 16_000)[:15_999], 15_999, subtype="PCM_U8")
    content = path.read_bytes()
    noise = np.random.default_rng(0).bytes(9_000)
    whole = content[: content.index(b"data") + 8 + 15_999]
    path.write_bytes(whole + padding + b"iXML" + (9_000).to_bytes(4, "little") + noise)
    assert len(decode_audio(path)) == 15_999


def test_a_very_long_wav_whose_writer_was_killed_takes_no_memory(tmp_path: Path) -> None:
    path = wav_stating(tmp_path / "a.wav", tones(8, 16_000), 0)
    with path.open("r+b") as file:
        file.truncate(500_000_000)
    tracemalloc.start()
    try:
        assert seconds_of(decode_audio(path, 2.0, 1.0)) == pytest.approx([2, 2], abs=0.15)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate_hz", [8_000, 12_000])
def test_opus_of_an_unspecified_rate_keeps_its_high_tones(tmp_path: Path, rate_hz: int) -> None:
    path = tmp_path / "a.opus"
    soundfile.write(path, trees.tone(1.0, 48_000, 6_500.0), 48_000, format="OGG", subtype="OPUS")
    content = bytearray(path.read_bytes())
    at = content.index(b"OpusHead") + 12
    content[at: at + 4] = (0 if rate_hz == 8_000 else rate_hz).to_bytes(4, "little")
    length = 27 + content[26] + sum(content[27: 27 + content[26]])
    content[22:26] = bytes(4)
    content[22:26] = ogg_checksum(bytes(content[:length])).to_bytes(4, "little")
    path.write_bytes(content)
    wave = decode_audio(path)
    assert len(wave) == 16_000 and np.abs(np.fft.rfft(wave)).argmax() == 6_500


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of Ogg: polynomial 0x04c11db7, not reflected."""
    found = 0
    for byte in page:
        found ^= byte << 24
        for _ in range(8):
            found = (found << 1 ^ (0x04C11DB7 if found >> 31 else 0)) & 0xFFFFFFFF
    return found


def ogg(samples: np.ndarray, rate_hz: int, subtype: str = "VORBIS") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, format="OGG", subtype=subtype)
    return file.getvalue()


def test_all_parts_of_a_chained_ogg_are_read(tmp_path: Path) -> None:
    path, wave = tmp_path / "a.ogg", tones(8, 44_100)
    parts = [ogg(wave[: 3 * 44_100], 44_100), ogg(tones(8, 16_000)[48_000: 80_000], 16_000),
             ogg(tones(8, 48_000)[5 * 48_000:], 48_000, "OPUS")]
    path.write_bytes(b"".join(parts))
    assert seconds_of(decode_audio(path)) == pytest.approx(sorted([*range(8)] * 2), abs=0.15)
    for start_s in (1.0, 2.0, 3.0, 4.5, 6.0):
        excerpt = decode_audio(path, start_s, 1.5)
        assert abs(len(excerpt) - 24_000) <= 1
        told = [(start_s + k / 2) // 1 for k in range(3)]
        assert seconds_of(np.pad(excerpt, (0, 1))) == pytest.approx(told, abs=0.15)
    path.write_bytes(parts[1])
    assert len(decode_audio(path)) == 32_000


@pytest.mark.parametrize("kind", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("tag", [b"", b"ID3\3\0\0\0\0\0\x0a" + bytes(10)])
def test_all_of_joined_mp3_files_is_read(tmp_path: Path, kind: str, tag: bytes) -> None:
    """As of podcasts: the header of the first states its own length."""
    path, parts = tmp_path / "a.mp3", list[bytes]()
    for first in (0, 3):
        soundfile.write(path, tones()[first * RATE_HZ: (first + 3) * RATE_HZ], RATE_HZ, bitrate_mode=kind)
        parts.append(tag + path.read_bytes())
        path.write_bytes(parts[-1] + b"TAG" + bytes(125))
        assert sound_files.joined_mp3(str(path)) == []
    path.write_bytes(b"".join(parts) + b"TAG" + bytes(125))
    assert seconds_of(decode_audio(path)) == pytest.approx(sorted([*range(6)] * 2), abs=0.15)
    for start_s, told in ((1.5, [1, 2, 2]), (2.5, [2, 3, 3]), (4.0, [4, 4, 5])):
        assert seconds_of(decode_audio(path, start_s, 1.5)) == pytest.approx(told, abs=0.15)


def test_all_parts_of_a_chained_ogg_together_may_be_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.ogg").write_bytes(ogg(tones(3, 16_000), 16_000) * 3)
    monkeypatch.setattr(tracks, "MAX_SOUND_S", 5.0)
    with refused(tmp_path / "a.ogg", "over 5 s", error=BrokenSample):
        decode_audio(tmp_path / "a.ogg")
    assert len(decode_audio(tmp_path / "a.ogg", 2.0, 5.0)) == 80_000
    assert tracks.count_samples(str(tmp_path / "a.ogg")) == 144_000


def test_a_clock_that_leaps_by_years_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    path = container(tmp_path / "a.mkv", "pcm_s16le", picture="mpeg4", late_s=3e8)
    assert tracks.count_samples(str(path)) == (3e8 + SECONDS) * RATE_HZ
    with refused(path, "over 3600 s", error=BrokenSample):
        decode_audio(path)


def test_a_hole_in_an_ogg_does_not_move_what_follows(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 8 * 16_000).astype(np.float32)
    content = bytearray(ogg(tones(8, 16_000) + noise, 16_000))
    content[len(content) // 2: len(content) // 2 + 300] = bytes(300)  # its page is lost
    (tmp_path / "a.ogg").write_bytes(content)
    wave = decode_audio(tmp_path / "a.ogg")
    assert len(wave) == 8 * 16_000 and seconds_of(wave)[-4:] == pytest.approx([6, 6, 7, 7], abs=0.15)
    assert seconds_of(decode_audio(tmp_path / "a.ogg", 6.0, 1.5)) == pytest.approx([6, 6, 7], abs=0.15)


def test_flac_behind_a_large_tag_can_be_begun_anywhere(tmp_path: Path) -> None:
    trees.sound(tmp_path / "a.flac", tones(4, 16_000))
    size = 300_000
    tag = b"ID3\3\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(size)
    (tmp_path / "a.flac").write_bytes(tag + (tmp_path / "a.flac").read_bytes())
    assert len(decode_audio(tmp_path / "a.flac")) == 64_000
    assert seconds_of(decode_audio(tmp_path / "a.flac", 2.5, 1.5)) == pytest.approx([2, 3, 3], abs=0.15)


# ---- channels ----------------------------------------------------------------------------------------------------


def write_channels(path: Path, planes: list[np.ndarray], subtype: str) -> Path:
    soundfile.write(path, np.stack(planes, axis=1), 16_000, subtype=subtype)
    return path


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_channels_that_cancel_each_other_leave_the_loudest(tmp_path: Path, subtype: str) -> None:
    wave, path = tones(2, 16_000), tmp_path / "a.wav"
    assert np.abs(decode_audio(write_channels(path, [0.9 * wave, -wave], subtype)) + wave).max() < 1e-4
    assert np.abs(decode_audio(path, 0.5, 0.5) + wave[8_000:16_000]).max() < 1e-4
    for factor, cancels in ((-0.79, False), (-0.81, True)):  # the mean has 1.1 % or 0.9 % of the energy
        found = decode_audio(write_channels(path, [wave, factor * wave], subtype))
        assert np.abs(found - (wave if cancels else (1 + factor) / 2 * wave)).max() < 1e-4


def test_channels_that_cancel_each_other_in_other_containers(tmp_path: Path) -> None:
    wave = tones(2, 48_000)
    path = trees.sound(tmp_path / "a.m4a", np.stack([wave, -wave], axis=1), 48_000, channels=2)
    assert seconds_of(decode_audio(path))[:4] == pytest.approx([0, 0, 1, 1], abs=0.15)


@pytest.mark.parametrize("channels", [2, 6, 8])
def test_one_channel_among_silent_ones_is_averaged(tmp_path: Path, channels: int) -> None:
    wave = tones(1, 16_000)
    planes = [wave] + [np.zeros_like(wave)] * (channels - 1)
    found = decode_audio(write_channels(tmp_path / "a.wav", planes, "FLOAT"))
    assert np.abs(found - wave / channels).max() < 1e-6


# ---- other questions ---------------------------------------------------------------------------------------------


def test_samples_are_counted_without_being_kept(tmp_path: Path) -> None:
    assert tracks.count_samples(str(trees.sound(tmp_path / "a.wav", trees.tone(2.0)))) == 32_000
    assert tracks.count_samples(str(trees.sound(tmp_path / "a.mkv", trees.tone(2.0)))) >= 32_000
    assert tracks.count_samples(str(trees.sound(tmp_path / "b.wav", np.zeros(0, np.float32)))) == 0


@pytest.mark.parametrize(("subtype", "write", "expected"), [
    ("FLOAT", lambda x: 16_400 * x, 16_400), ("DOUBLE", lambda x: 3 * x, 3), ("PCM_16", lambda x: x, 0)])
def test_peak_of_floating_point_sounds(
        tmp_path: Path, subtype: str, write: Callable[[np.ndarray], np.ndarray], expected: float) -> None:
    soundfile.write(tmp_path / "a.wav", write(trees.tone() * 4), 16_000, subtype=subtype)
    assert tracks.oddities(str(tmp_path / "a.wav"), 0.0, 0.0)[0] == pytest.approx(expected, rel=0.01)
    assert tracks.oddities(str(trees.sound(tmp_path / "a.m4a", trees.tone())), 0.0, 0.0) == (0, False)
