"""A search page on a loopback port over a small index, for tests that ask it as browsers do."""

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from trimodal.search.index import Index
from trimodal.search.server import application, http_server, listen

SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)<script>.png"  # a name that must stay a name
LONG = "a_very_long_name_" * 14 + ".jpg"
SECONDS, RATE_HZ = 3, 16_000


def tone(frequency_hz: float, seconds: float = SECONDS, rate_hz: int = RATE_HZ) -> np.ndarray:
    """A sound that swells and fades, float32 [S]."""
    times_S = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * frequency_hz * times_S) * np.sin(np.pi * times_S / seconds)).astype(np.float32)


def write_sound(path: Path, waveform_S: np.ndarray, codec: str = "libopus", rate_hz: int = 48_000) -> Path:
    """Encode a sound as a browser's recorder does: WebM with Opus, not seekable, its length not stated."""
    import av

    with av.open(path, "w", format="webm", options={"live": "1"}) as container:
        stream = container.add_stream(codec, rate_hz)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(waveform_S[None].astype(np.float32), "flt", "mono")
        frame.sample_rate = rate_hz
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_video(path: Path) -> Path:
    """Two seconds that turn from red to blue, with a tone: WebM, which every browser plays."""
    import av

    with av.open(path, "w") as container:
        video = container.add_stream("libvpx", 10)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        sound = container.add_stream("libopus", 48_000)
        sound.layout = "mono"
        for step in range(20):
            pixels = np.full((64, 96, 3), (255 - 12 * step, 40, 12 * step), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        frame = av.AudioFrame.from_ndarray(tone(700, 2, 48_000)[None], "flt", "mono")
        frame.sample_rate = 48_000
        container.mux(sound.encode(frame))
        container.mux([*video.encode(None), *sound.encode(None)])
    return path


def write_media(folder: Path) -> None:
    """Pictures of different formats, shapes and names, sounds, and a video."""
    import soundfile

    rng = np.random.default_rng(0)
    (folder / "inner").mkdir(parents=True)
    names = ("red.png", "inner/tall.jpg", "inner/scan.tif", LONG, SCRIPT, "wide.webp")
    for name, (height, width) in zip(names, ((90, 120), (400, 90), (60, 80), (50, 50), (64, 64), (60, 300)),
                                     strict=True):
        noise = rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / name)
    for n, name in enumerate(("low.wav", "inner/high.flac", "middle.ogg")):
        soundfile.write(folder / name, tone(200 * 3**n), RATE_HZ)
    write_video(folder / "film.webm")


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def line(self) -> str:
        return self.body.decode()


class Server:
    """A running page; `ask` sends one request with just the headers given."""

    def __init__(self, port: int):
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            sent = {"host": f"127.0.0.1:{self.port}"}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            if isinstance(body, bytes) and "transfer-encoding" not in sent:
                sent.setdefault("content-length", str(len(body)))
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(body if isinstance(body, bytes) else None)
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()},
                          response.read())


@contextlib.contextmanager
def served(index: Index, model: Any, host: str = "127.0.0.1") -> Iterator[Server]:
    """Run the page in a thread while the block runs."""
    with listen("127.0.0.1", 0) as listener:
        server = http_server(application(index, model, host))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Server(listener.getsockname()[1])
        server.should_exit = True
        thread.join(20)
