"""Sound tracks: the samples of any stretch of any file, mono, at the file's own rate.

    for piece in read("dog.ogg", start_s=2.0, duration_s=5.0): piece.samples, piece.rate_hz      # nearly always one

Second 0 is where a player begins: the earliest start of any picture or sound track of the file. libsndfile reads first;
where it gives nothing, less than the file states, or cannot jump, FFmpeg's libraries are tried.

Legend: N samples, C channels.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trimodal import media
from trimodal.data import sound_files
from trimodal.data.samples import BrokenSample
from trimodal.data.sound_files import Source

if TYPE_CHECKING:
    import soundfile

# What may be decoded. Rate and channels, and the length where the file says it, are checked before anything is read.
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 400_000
MAX_CHANNELS = 64  # seventh-order ambisonics; the mean of more is no sound that anybody recorded
MAX_SOUND_S = 3_600.0
MAX_SAMPLES = 3_600 * 48_000  # of one sound at its own rate: 0.7 GB. At higher rates less than an hour
SETTLE_S = 1.0  # compressed sound is decoded from this long before a start, until its predictors have settled
GAP_S = 0.1  # time stamps may be so far off; beyond it the track has a gap, which is silent
JUMP_S = 10.0  # further on no gap, but another clock, where a format may change it within a file
CANCELLED = 0.01  # of the loudest channel's energy: a mean below it holds no sound, its channels cancel each other

_BLOCK_VALUES = 1 << 20  # read at once, over all channels
_SEEK_IS_WRONG = ("VORBIS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")  # in libsndfile 1.2: read from the start
_HANDED_OVER = 1 << 15  # samples of each channel, by FFmpeg's libraries at once
_OPUS_ROUNDED_HZ = (8_000, 12_000)  # what libsndfile takes for a rate that an Opus file does not state, too


class BrokenSound(BrokenSample):
    """A file that holds no usable sound. The message begins with the path."""


class _Unreliable(Exception):
    """libsndfile opens a file and reads it wrongly."""


class _Lost(Exception):
    """A jump led to an unknown place."""


class _Damaged(Exception):
    """libsndfile failed amid a stretch of so many seconds."""

    def __init__(self, stretch_s: float, error: Exception) -> None:
        super().__init__(stretch_s, error)
        self.stretch_s, self.error = stretch_s, error


@dataclass(frozen=True)
class Piece:
    """A part of a sound: float32 [N], mono."""

    samples: np.ndarray
    rate_hz: int


class Count:
    """Takes in blocks [N, C] and counts their samples."""

    def __init__(self) -> None:
        self.count, self.rate_hz = 0, 0

    def expect(self, count: int, rate_hz: int) -> None:
        """Raise BrokenSound where `count` samples are too many."""

    def add(self, block_NC: np.ndarray, rate_hz: int) -> None:
        self.count, self.rate_hz = self.count + len(block_NC), rate_hz

    def be_silent(self, count: int, rate_hz: int) -> None:
        """As `add` of zeros."""
        self.count, self.rate_hz = self.count + count, rate_hz


class Energies(Count):
    """Takes in blocks and holds the energy of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.of_channels = np.zeros(MAX_CHANNELS)

    def add(self, block_NC: np.ndarray, rate_hz: int) -> None:
        super().add(block_NC, rate_hz)
        self.of_channels[: block_NC.shape[1]] += (block_NC.astype(np.float64) ** 2).sum(axis=0)


class Mono(Count):
    """Takes in blocks and holds the mean of their channels, or one channel, with the energies that tell whether the
    channels cancel each other."""

    def __init__(self, channel: int | None = None) -> None:
        super().__init__()
        self.channel = channel
        self.blocks: list[np.ndarray] = []
        self.energy = self.energy_of_all = 0.0  # of the mean, and of all channels

    def expect(self, count: int, rate_hz: int) -> None:
        most_s = min(MAX_SOUND_S, MAX_SAMPLES / rate_hz)
        if count > most_s * rate_hz:
            raise BrokenSound(f"is over {most_s:g} s long: give a start and a duration")

    def add(self, block_NC: np.ndarray, rate_hz: int) -> None:
        super().add(block_NC, rate_hz)
        self.expect(self.count, rate_hz)
        channels = block_NC.shape[1]
        if self.channel is not None:
            self.blocks.append(block_NC[:, min(self.channel, channels - 1)].copy())
            return
        mean_N = block_NC.mean(axis=1) if channels > 1 else block_NC[:, 0].copy()
        self.blocks.append(mean_N)
        if channels > 1:
            self.energy += float(mean_N @ mean_N)
            values = block_NC.ravel("K")  # without a copy
            self.energy_of_all += float(values @ values)

    def be_silent(self, count: int, rate_hz: int) -> None:
        super().be_silent(count, rate_hz)
        self.expect(self.count, rate_hz)
        self.blocks.append(np.zeros(count, np.float32))

    def piece(self) -> Piece:
        samples = np.concatenate(self.blocks) if self.blocks else np.empty(0, np.float32)
        return Piece(samples.astype(np.float32, copy=False), self.rate_hz)


def read(path: str, start_s: float = 0.0, duration_s: float = 0.0) -> list[Piece]:
    """The mean of the channels from `start_s` for `duration_s` (0: to the end); where that has below 1 % of the loudest
    channel's energy within the stretch, this channel. Silence stands before a track that begins late and in its gaps.
    Several pieces, each with its rate, where parts of a chained Ogg or a joined MP3 file are; none where nothing is.

    Raises:
        BrokenSound: beyond the bounds above, without sound track; without the path in the message.
        Exception: what decoders raise for damage.
    """
    return [one.piece() for one in _mono(path, start_s, duration_s) if one.count]


def _mono(path: str, start_s: float, duration_s: float) -> list[Mono]:
    """One for each part of the file; `channel` is given where the channels cancel each other."""
    found: list[Mono] = _read(path, start_s, duration_s, Mono)
    of_mean = sum(one.energy for one in found)
    if of_mean < CANCELLED * sum(one.energy_of_all for one in found):  # perhaps: all channels may have the energy of 64
        parts = _read(path, start_s, duration_s, Energies)
        energies = np.sum([one.of_channels for one in parts], axis=0)
        if of_mean < CANCELLED * energies.max():
            return _read(path, start_s, duration_s, lambda: Mono(int(energies.argmax())))
    return found


def count_samples(path: str) -> int:
    """How many samples can be decoded, however long the file is, in little memory."""
    return sum(one.count for one in _read(path, 0.0, 0.0, Count))


def peak(pieces: Sequence[Piece]) -> float:
    """The largest value, not a number where one is none; without a copy."""
    return float(np.max([0.0, *(np.maximum(one.samples.max(), -one.samples.min()) for one in pieces)]))


def oddities(path: str, start_s: float, duration_s: float) -> tuple[float, bool]:
    """What strikes about a stretch that can be read: its largest value where the file stores floating-point numbers, 0
    of all others; whether its channels cancel each other, so that one of them is taken."""
    import soundfile

    try:
        stores_floats = soundfile.info(path).subtype in ("FLOAT", "DOUBLE")
    except soundfile.LibsndfileError:
        stores_floats = False
    found = _mono(path, start_s, duration_s)
    cancel = any(one.channel is not None for one in found)
    return peak([one.piece() for one in found if one.count]) if stores_floats else 0.0, cancel


# ---- choice of the decoder -----------------------------------------------------------------------------------------


def _read(path: str, start_s: float, duration_s: float, new: Callable[[], Any]) -> list[Any]:
    """A sink made by `new` for each part of the file that the stretch touches, filled."""
    ogg = sound_files.ogg(path)
    links = ogg.links(os.path.getsize(path)) or sound_files.joined_mp3(path)
    if not links:
        return [_read_link(path, start_s, duration_s, new, has_holes=ogg.has_holes)]
    found, at_s, end_s = [], 0.0, start_s + duration_s if duration_s else math.inf
    for first, last in links:
        link = sound_files.Stretch(path, first, last)
        length_s = _length_s(link)
        if at_s + length_s > start_s:
            own_start_s = max(0.0, start_s - at_s)
            own_end_s = min(end_s - at_s, length_s)
            own_duration_s = 0.0 if own_end_s == length_s else own_end_s - own_start_s
            found.append(_read_link(link, own_start_s, own_duration_s, new, has_holes=ogg.has_holes))
            rate_hz = max(1, found[-1].rate_hz)
            found[-1].expect(round(sum(map(_seconds, found)) * rate_hz), rate_hz)
        at_s += length_s
        if at_s >= end_s:
            break
    return found


def _length_s(link: Source) -> float:
    import soundfile

    try:
        found = soundfile.info(_rewound(link))
        return float(found.frames / found.samplerate)
    except soundfile.LibsndfileError:
        count = _read_link(link, 0.0, 0.0, Count)
        return _seconds(count)


def _read_link(source: Source, start_s: float, duration_s: float, new: Callable[[], Any], *,
               has_holes: bool = False) -> Any:
    """By libsndfile, or by FFmpeg's libraries where it cannot, gives less than they do, or would close `has_holes`."""
    import soundfile

    first, damage = new(), None
    try:
        if _with_soundfile(source, start_s, duration_s, first) and not has_holes:
            return first
    except _Damaged as error:
        damage = error
    except (soundfile.LibsndfileError, _Unreliable):
        first = None
    try:
        second, heard_s = _with_av(source, start_s, duration_s, new)
    except Exception:
        if damage:
            raise damage.error from None
        if first is None:
            raise
        return first
    if damage and heard_s < damage.stretch_s - GAP_S:
        raise damage.error
    return first if first and not damage and not has_holes and _seconds(first) >= _seconds(second) else second


def _seconds(sink: Count) -> float:
    return sink.count / max(1, sink.rate_hz)


def _rewound(source: Source) -> Source:
    if not isinstance(source, str):
        source.seek(0)
    return source


def _check_sound(rate_hz: int, channels: int) -> None:
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise BrokenSound(f"has a sample rate of {rate_hz} Hz, outside {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise BrokenSound(f"has {channels} channels, outside 1 to {MAX_CHANNELS}")


def _bounds(start_s: float, duration_s: float, rate_hz: int) -> tuple[int, float]:
    """Number of the first sample of a stretch, and of the one after its last."""
    first = round(start_s * rate_hz)
    return first, first + max(1, round(duration_s * rate_hz)) if duration_s else math.inf


# ---- libsndfile ----------------------------------------------------------------------------------------------------


def _with_soundfile(source: Source, start_s: float, duration_s: float, sink: Count) -> bool:
    """Fill `sink`; False where the file states more samples than came, or none at all."""
    import soundfile

    with soundfile.SoundFile(sound_files.mended(_rewound(source))) as file:
        if not file.frames:
            return False
        if file.subtype == "OPUS" and file.samplerate in _OPUS_ROUNDED_HZ:
            raise _Unreliable("its rate is not known")
        first, last = _bounds(start_s, duration_s, file.samplerate)
        last = int(min(last, file.frames))
        if first >= last:
            return True
        _check_sound(file.samplerate, file.channels)
        sink.expect(last - first, file.samplerate)
        if file.subtype not in _SEEK_IS_WRONG:
            try:
                file.seek(first)
            except soundfile.LibsndfileError:
                return _from_its_start(source, first, last, sink)
        return _take(file, first, last, sink)


def _from_its_start(source: Source, first: int, last: int, sink: Count) -> bool:
    import soundfile

    with soundfile.SoundFile(_rewound(source)) as file:
        return _take(file, first, last, sink)


def _take(file: "soundfile.SoundFile", first: int, last: int, sink: Count) -> bool:
    import soundfile

    position = file.tell()
    while position < last:
        size = min(last - position, max(1, _BLOCK_VALUES // file.channels))
        try:
            block_NC = file.read(size, "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise _Damaged((last - first) / file.samplerate, error) from None
        own_NC = block_NC[max(0, first - position):]
        if len(own_NC):
            sink.add(own_NC, file.samplerate)
        position += len(block_NC)
        if len(block_NC) < size:  # to read on would give the last samples once more
            return False
    return True


# ---- FFmpeg's libraries ----------------------------------------------------------------------------------------------


def _with_av(source: Source, start_s: float, duration_s: float, new: Callable[[], Any]) -> tuple[Any, float]:
    """A sink, filled, and how many seconds in it were decoded and are not the silence of a gap."""
    import av

    if start_s > SETTLE_S:
        with contextlib.suppress(av.FFmpegError, _Lost):  # some formats can be jumped in only amid a block
            return _decoded(source, start_s, duration_s, new(), jump=True)
    return _decoded(source, start_s, duration_s, new(), jump=False)


def _decoded(source: Source, start_s: float, duration_s: float, sink: Any, *, jump: bool) -> tuple[Any, float]:
    with media.open_container(_rewound(source), media.SOUND_FORMATS) as container:
        if not container.streams.audio:
            raise BrokenSound("has no sound track")
        stream = container.streams.audio[0]
        _check_sound(stream.codec_context.sample_rate, stream.codec_context.channels)
        track = _Track(container, stream, sink)
        track.take(start_s, duration_s, jump=jump)
        return sink, track.heard_s


class _Track:
    """A sound track, decoded along the clock of its container."""

    def __init__(self, container: Any, stream: Any, sink: Count) -> None:
        self.container, self.stream, self.sink = container, stream, sink
        self.zero_s = 0.0  # the clock at second 0
        self.position: int | None = None  # of the next sample; None: not known, after a jump
        self.first, self.end = 0, math.inf  # of the stretch
        self.heard_s = 0.0  # decoded of the stretch
        self.kept: list[np.ndarray] = []  # [C, N], not handed over yet
        self.num_kept = 0
        self.changes_clock = container.format.name in ("mpegts", "mpeg")
        self.resampler: tuple[Any, Any] = (None, None)  # and what it takes

    def take(self, start_s: float, duration_s: float, *, jump: bool) -> None:
        """Fill the sink. Raises _Lost where the jump to the start led behind it."""
        frames = self.container.decode(self.stream)
        head = next(frames, None)
        if head is None:
            return
        rate_hz = head.sample_rate
        _check_sound(rate_hz, head.layout.nb_channels)
        self.zero_s = media.second_0(self.container, head.time)
        self.first, self.end = _bounds(start_s, duration_s, rate_hz)
        if jump and self._at(head, 0) < self.first:
            self.container.seek(int((self.zero_s + start_s - SETTLE_S) / self.stream.time_base), stream=self.stream)
            frames = self.container.decode(self.stream)
        else:
            frames, self.position = itertools.chain([head], frames), 0
        for frame in frames:
            if frame.sample_rate != rate_hz:
                raise BrokenSound(f"changes its sample rate from {rate_hz} to {frame.sample_rate} Hz")
            if self.position is None:
                self.position = self._at(frame, self.first + 1)
                if self.position > self.first:
                    raise _Lost
            if not self._add(frame):
                break
        self.hand_over(rate_hz)

    def _at(self, frame: Any, otherwise: int) -> int:
        """Number of a frame's first sample, by the clock."""
        return otherwise if frame.time is None else round((frame.time - self.zero_s) * frame.sample_rate)

    def _add(self, frame: Any) -> bool:
        """Take what the stretch needs of a frame, and of silence before it; False where it needs no more."""
        assert self.position is not None
        rate_hz, late = frame.sample_rate, self._at(frame, self.position) - self.position
        if (late > 0 and not self.position) or late > GAP_S * rate_hz:
            if self.position and self.changes_clock and late > JUMP_S * rate_hz:
                self.zero_s += late / rate_hz
            else:
                self._be_silent(late, frame)
        elif late < -GAP_S * rate_hz:
            self.zero_s += late / rate_hz  # another part follows, whose clock begins anew
        for block_CN in self._blocks(frame):
            first, last = self._overlap(block_CN.shape[1])
            if last > first:
                self._keep(block_CN[:, first:last], rate_hz)
            self.position += block_CN.shape[1]
        return self.position < self.end

    def _keep(self, block_CN: np.ndarray, rate_hz: int) -> None:
        """Hand over what the sink needs, many frames at once: each call costs more than a frame's numbers."""
        if self.kept and len(self.kept[0]) != len(block_CN):
            self.hand_over(rate_hz)
        self.kept.append(block_CN)
        self.num_kept += block_CN.shape[1]
        if self.num_kept >= _HANDED_OVER:
            self.hand_over(rate_hz)

    def hand_over(self, rate_hz: int) -> None:
        if self.kept:
            self.heard_s += self.num_kept / rate_hz
            self.sink.add(np.concatenate(self.kept, axis=1).T, rate_hz)
            self.kept, self.num_kept = [], 0

    def _blocks(self, frame: Any) -> list[np.ndarray]:
        """Float32 [C, N]; a track may change its layout within."""
        import av

        form = (frame.format.name, frame.layout.name)
        if self.resampler[1] != form:
            self.resampler = av.AudioResampler(format="fltp"), form
        return [part.to_ndarray() for part in self.resampler[0].resample(frame)]

    def _be_silent(self, count: int, frame: Any) -> None:
        assert self.position is not None
        first, last = self._overlap(count)
        if last > first:
            self.hand_over(frame.sample_rate)
            self.sink.be_silent(last - first, frame.sample_rate)
        self.position += count

    def _overlap(self, count: int) -> tuple[int, int]:
        """Which of `count` samples at the position belong to the stretch."""
        assert self.position is not None
        return max(0, self.first - self.position), max(0, int(min(self.end, self.position + count)) - self.position)
