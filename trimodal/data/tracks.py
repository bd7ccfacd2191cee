"""Sound tracks: the samples of any stretch of any file, mono, at the file's own rate.

    for piece in read("dog.ogg", start_s=2.0, duration_s=5.0): piece.samples, piece.rate_hz      # nearly always one

Second 0 is where a player begins: the earliest start of any picture or sound track of the file. libsndfile decodes
first; where it opens nothing, delivers less than the file holds, or cannot jump, FFmpeg's libraries do:

    chained Ogg, joined MP3          each part by itself, for libsndfile stops after the first
    Ogg with lost pages              FFmpeg: libsndfile closes the gap
    WAV whose writer was killed      FFmpeg, which can ignore the length in the header
    Opus of an unstated rate         FFmpeg: libsndfile rounds it
    Vorbis, MP3                      libsndfile from the start: its jumps are wrong
    all else                         libsndfile, and FFmpeg where that fails or delivers less

Legend: N samples, C channels.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trimodal import media, members
from trimodal.data.samples import BrokenSample
from trimodal.data.sound_files import joined_mp3, mended_au, ogg_links, states_too_few_samples
from trimodal.members import Source, Stretch

if TYPE_CHECKING:
    import soundfile

# What may be decoded. Rate and channels, and the length where the file states it, are checked before anything is read.
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 400_000
MAX_CHANNELS = 64  # seventh-order ambisonics; the mean of more is no sound that anybody recorded
MAX_SOUND_S = 3_600.0
MAX_SAMPLES = 3_600 * 48_000  # of one sound at its own rate: 0.7 GB. At higher rates less than an hour
SETTLE_S = 1.0  # compressed sound is decoded from this long before a start, until its predictors have settled
GAP_S = 0.1  # time stamps may be so far off; beyond it the track has a gap, which is silent
JUMP_S = 10.0  # further on no gap, but another clock, where a format may change it within a file
CANCELLED = 0.01  # of the loudest channel's energy: a mean below it holds no sound, its channels cancel each other

_BLOCK_VALUES = 1 << 20  # read by libsndfile at once, over all channels
_BATCH = 1 << 15  # samples of FFmpeg's short frames that are passed on at once
_SEEK_IS_WRONG = ("VORBIS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")  # in libsndfile 1.2: read from the start
_OPUS_ROUNDED_HZ = (8_000, 12_000)  # what libsndfile takes for a rate that an Opus file does not state, too


class _Unreliable(Exception):
    """libsndfile opens a file and reads it wrongly."""


class _JumpedTooFar(Exception):
    """A jump led behind the start."""


class _Damaged(Exception):
    """libsndfile failed within a stretch of so many seconds."""

    def __init__(self, stretch_s: float, error: Exception) -> None:
        super().__init__(stretch_s, error)
        self.stretch_s, self.error = stretch_s, error


@dataclass(frozen=True)
class Piece:
    """A part of a sound: float32 [N], mono."""

    samples: np.ndarray
    rate_hz: int


class Sink:
    """Collects the decoded blocks of a file, or of one part of it, as one mono signal.

    That is the mean of all channels, or channel number `channel` (the last one where a block has fewer). With `keep`
    false, samples are counted but not stored.
    """

    def __init__(self, channel: int | None = None, *, keep: bool = True) -> None:
        self.channel, self.keep = channel, keep
        self.count, self.rate_hz = 0, 0  # samples of the mono signal so far
        self.blocks: list[np.ndarray] = []  # float32 [N] each
        # Sums of squares of the mean and of each channel, as channels of opposite phase cancel out in the mean.
        self.mean_energy = 0.0
        self.channel_energies = np.zeros(MAX_CHANNELS)

    @property
    def seconds(self) -> float:
        return self.count / max(1, self.rate_hz)

    def expect(self, count: int, rate_hz: int) -> None:
        """Raise BrokenSample where `count` samples at `rate_hz` are more than may be kept in memory."""
        most_s = min(MAX_SOUND_S, MAX_SAMPLES / rate_hz)
        if self.keep and count > most_s * rate_hz:
            raise BrokenSample(f"is over {most_s:g} s long: give a start and a duration")

    def add(self, block_NC: np.ndarray, rate_hz: int) -> None:
        """Append a decoded float32 block of N samples of C channels."""
        self.count, self.rate_hz = self.count + len(block_NC), rate_hz
        self.expect(self.count, rate_hz)
        if not self.keep:
            return
        channels = block_NC.shape[1]
        if self.channel is not None:
            self.blocks.append(block_NC[:, min(self.channel, channels - 1)].copy())
            return
        self.blocks.append(block_NC.mean(axis=1) if channels > 1 else block_NC[:, 0].copy())
        if channels > 1:
            mean_N = self.blocks[-1]
            self.mean_energy += float(mean_N @ mean_N)
            self.channel_energies[:channels] += np.einsum("nc,nc->c", block_NC, block_NC, dtype=np.float64)

    def add_silence(self, count: int, rate_hz: int) -> None:
        self.count, self.rate_hz = self.count + count, rate_hz
        self.expect(self.count, rate_hz)
        if self.keep:
            self.blocks.append(np.zeros(count, np.float32))

    def piece(self) -> Piece:
        samples = np.concatenate(self.blocks) if self.blocks else np.empty(0, np.float32)
        return Piece(samples.astype(np.float32, copy=False), self.rate_hz)


def read(path: str, start_s: float = 0.0, duration_s: float = 0.0) -> list[Piece]:
    """Decode a file from `start_s` for `duration_s` (0: to the end) to mono.

    Mono is the mean of the channels; where the mean has below 1 % of the energy of the loudest channel, it is that
    channel. A track that begins late gets silence before it, and a gap in it silence for its length. The list has one
    piece for each part of a chained Ogg or joined MP3 file that the stretch touches, as each has its own sampling rate,
    and none where the file has no samples there.

    Raises:
        BrokenSample: beyond the bounds above, without sound track; without the path in the message.
        Exception: what decoders raise for damage.
    """
    return [sink.piece() for sink in _read_mono(path, start_s, duration_s) if sink.count]


def mixed(samples_NC: np.ndarray, rate_hz: int) -> Piece:
    """The mono signal of float32 samples of C channels, as `read` makes it.

    Raises:
        BrokenSample: beyond the bounds above.
    """
    _check_sound(rate_hz, samples_NC.shape[1])

    def fill(new_sink: Callable[[], Sink]) -> list[Sink]:
        sink = new_sink()
        sink.add(samples_NC, rate_hz)
        return [sink]

    return _mono(fill)[0].piece()


def _read_mono(path: str, start_s: float, duration_s: float) -> list[Sink]:
    """One sink of samples for each part of the file."""
    return _mono(lambda new_sink: _read(path, start_s, duration_s, new_sink))


def _mono(fill: Callable[[Callable[[], Sink]], list[Sink]]) -> list[Sink]:
    """The sinks that `fill` fills; sinks of a single channel where the mean cancels it out."""
    found = fill(Sink)
    energies = np.sum([sink.channel_energies for sink in found], axis=0)
    if sum(sink.mean_energy for sink in found) < CANCELLED * np.max(energies, initial=0.0):
        return fill(lambda: Sink(int(energies.argmax())))
    return found


def count_samples(path: str) -> int:
    """How many samples can be decoded, however long the file is, in little memory."""
    return sum(sink.count for sink in _read(path, 0.0, 0.0, lambda: Sink(keep=False)))


def peak(pieces: Sequence[Piece]) -> float:
    """The largest absolute value, NaN where one is NaN; without a copy."""
    return float(np.max([0.0, *(np.maximum(one.samples.max(), -one.samples.min()) for one in pieces)]))


def oddities(path: str, start_s: float, duration_s: float) -> tuple[float, bool]:
    """Two things worth a warning about a sound that can be decoded: its largest absolute value where the file stores
    floating-point samples, which may be above 1 (0.0 for other files), and whether `read` takes a single channel of it,
    as the mean of the channels cancels out."""
    import soundfile

    try:
        stores_floats = soundfile.info(members.source(path)).subtype in ("FLOAT", "DOUBLE")
    except soundfile.LibsndfileError:
        stores_floats = False
    found = _read_mono(path, start_s, duration_s)
    cancel = any(sink.channel is not None for sink in found)
    return peak([sink.piece() for sink in found if sink.count]) if stores_floats else 0.0, cancel


# ---- choice of the decoder -----------------------------------------------------------------------------------------


def _read(path: str, start_s: float, duration_s: float, new_sink: Callable[[], Sink]) -> list[Sink]:
    """A filled sink for each part of the file that the stretch touches."""
    links, has_holes = ogg_links(path)
    links = links or joined_mp3(path)
    if not links:
        return [_read_link(mended_au(path), start_s, duration_s, new_sink, has_holes=has_holes,
                           is_cut=states_too_few_samples(path))]
    found, at_s, end_s = list[Sink](), 0.0, start_s + duration_s if duration_s else math.inf
    for first, last in links:
        link = Stretch(path, first, last)
        length_s = _length_s(link)
        if at_s + length_s > start_s:
            own_start_s = max(0.0, start_s - at_s)
            own_end_s = min(end_s - at_s, length_s)
            own_duration_s = 0.0 if own_end_s == length_s else own_end_s - own_start_s
            found.append(_read_link(link, own_start_s, own_duration_s, new_sink, has_holes=has_holes))
            rate_hz = max(1, found[-1].rate_hz)
            found[-1].expect(round(sum(sink.seconds for sink in found) * rate_hz), rate_hz)
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
        return _read_link(link, 0.0, 0.0, lambda: Sink(keep=False)).seconds


def _read_link(source: Source, start_s: float, duration_s: float, new_sink: Callable[[], Sink], *,
               has_holes: bool = False, is_cut: bool = False) -> Sink:
    """Decode one part by libsndfile, or by FFmpeg where that cannot, delivers less, or would close `has_holes`; a file
    that `is_cut` by FFmpeg alone."""
    import soundfile

    first = None if is_cut else new_sink()
    damage = None
    try:
        if first is not None and _with_soundfile(source, start_s, duration_s, first) and not has_holes:
            return first
    except _Damaged as error:
        damage = error
    except (soundfile.LibsndfileError, _Unreliable):
        first = None
    try:
        second, decoded_s = _with_av(source, start_s, duration_s, new_sink, is_cut)
    except Exception:
        if damage:
            raise damage.error from None
        if first is None:
            raise
        return first
    if damage and decoded_s < damage.stretch_s - GAP_S:
        raise damage.error
    return first if first and not damage and not has_holes and first.seconds >= second.seconds else second


def _rewound(source: Source) -> Source:
    if not isinstance(source, str):
        source.seek(0)
    return source


def _check_sound(rate_hz: int, channels: int) -> None:
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise BrokenSample(f"has a sample rate of {rate_hz} Hz, outside {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise BrokenSample(f"has {channels} channels, outside 1 to {MAX_CHANNELS}")


def _bounds(start_s: float, duration_s: float, rate_hz: int) -> tuple[int, float]:
    """Number of the first sample of a stretch, and of the one after its last."""
    first = round(start_s * rate_hz)
    return first, first + max(1, round(duration_s * rate_hz)) if duration_s else math.inf


# ---- libsndfile ----------------------------------------------------------------------------------------------------


def _with_soundfile(source: Source, start_s: float, duration_s: float, sink: Sink) -> bool:
    """Fill `sink`; False where the file states more samples than came, or none at all."""
    import soundfile

    with soundfile.SoundFile(_rewound(source)) as file:
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
        if file.subtype in _SEEK_IS_WRONG:
            return _take(file, first, last, sink)
        try:
            file.seek(first)
            return _take(file, first, last, sink)
        except soundfile.LibsndfileError:
            pass
    with soundfile.SoundFile(_rewound(source)) as file:
        return _take(file, first, last, sink)


def _take(file: "soundfile.SoundFile", first: int, last: int, sink: Sink) -> bool:
    """Read from where the file is to `last`, and keep what is from `first` on."""
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


def _with_av(source: Source, start_s: float, duration_s: float, new_sink: Callable[[], Sink],
             is_cut: bool) -> tuple[Sink, float]:
    """A filled sink, and how many seconds of it were decoded and are not the silence of a gap."""
    import av

    if start_s > SETTLE_S:
        with contextlib.suppress(av.FFmpegError, _JumpedTooFar):  # some formats can be jumped in only amid a block
            return _decode(source, start_s, duration_s, new_sink(), is_cut, jump=True)
    return _decode(source, start_s, duration_s, new_sink(), is_cut, jump=False)


def _decode(source: Source, start_s: float, duration_s: float, sink: Sink, is_cut: bool, *,
            jump: bool) -> tuple[Sink, float]:
    options = {"ignore_length": "1"} if is_cut else {}
    with media.open_container(_rewound(source), media.SOUND_FORMATS, **options) as container:
        if not container.streams.audio:
            raise BrokenSample("has no sound track")
        stream = container.streams.audio[0]
        _check_sound(stream.codec_context.sample_rate, stream.codec_context.channels)
        track = _Track(container, stream, sink)
        track.take(start_s, duration_s, jump=jump)
        return sink, track.decoded_s


class _Track:
    """A sound track, decoded along the clock of its container."""

    def __init__(self, container: Any, stream: Any, sink: Sink) -> None:
        self.container, self.stream, self.sink = container, stream, sink
        self.zero_s = 0.0  # the clock at second 0
        self.position: int | None = None  # of the next sample; None: not known, after a jump
        self.first, self.end = 0, math.inf  # of the stretch
        self.decoded_s = 0.0  # of the stretch
        self.batch: list[np.ndarray] = []  # [C, N], not passed on yet
        self.changes_clock = container.format.name in ("mpegts", "mpeg")
        self.resampler: tuple[Any, Any] = (None, None)  # and the format and layout that it takes

    def take(self, start_s: float, duration_s: float, *, jump: bool) -> None:
        """Fill the sink. Raises _JumpedTooFar where the jump to the start led behind it."""
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
                raise BrokenSample(f"changes its sample rate from {rate_hz} to {frame.sample_rate} Hz")
            if self.position is None:
                self.position = self._at(frame, self.first + 1)
                if self.position > self.first:
                    raise _JumpedTooFar
            if not self._add(frame):
                break
        self._pass_on(rate_hz)

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
                self._add_silence(late, rate_hz)
        elif late < -GAP_S * rate_hz:
            self.zero_s += late / rate_hz  # another part follows, whose clock begins anew
        for block_CN in self._blocks(frame):
            first, last = self._overlap(block_CN.shape[1])
            if last > first:
                if self.batch and len(self.batch[0]) != len(block_CN):
                    self._pass_on(rate_hz)
                self.batch.append(block_CN[:, first:last])
                if sum(block.shape[1] for block in self.batch) >= _BATCH:
                    self._pass_on(rate_hz)
            self.position += block_CN.shape[1]
        return self.position < self.end

    def _add_silence(self, count: int, rate_hz: int) -> None:
        assert self.position is not None
        first, last = self._overlap(count)
        if last > first:
            self._pass_on(rate_hz)
            self.sink.add_silence(last - first, rate_hz)
        self.position += count

    def _pass_on(self, rate_hz: int) -> None:
        """Give the sink many frames at once: each call costs more than a frame's numbers."""
        if self.batch:
            block_NC = np.concatenate(self.batch, axis=1).T
            self.decoded_s += len(block_NC) / rate_hz
            self.sink.add(block_NC, rate_hz)
            self.batch = []

    def _blocks(self, frame: Any) -> list[np.ndarray]:
        """Float32 [C, N]; a track may change its layout within."""
        import av

        form = (frame.format.name, frame.layout.name)
        if self.resampler[1] != form:
            self.resampler = av.AudioResampler(format="fltp"), form
        return [part.to_ndarray() for part in self.resampler[0].resample(frame)]

    def _overlap(self, count: int) -> tuple[int, int]:
        """Which of `count` samples at the position belong to the stretch."""
        assert self.position is not None
        return max(0, self.first - self.position), max(0, int(min(self.end, self.position + count)) - self.position)
