"""The server of the search page: what it answers, and what it refuses, asked over HTTP as browsers and others would."""

import asyncio
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import soundfile

import search
from tests.project import ROOT
from tests.refusals import assert_told, refused
from tests.search.serving import LONG, RATE_HZ, Answer, Server, served, tone, write_sound
from trimodal.search import server as server_module
from trimodal.search import thumbnails
from trimodal.search.guard import Guard
from trimodal.search.index import Entry, Index, write_index
from trimodal.search.server import MAX_UPLOAD_BYTES, listen


@pytest.fixture(scope="module")
def server(index: Index, model: Any) -> Iterator[Server]:
    with served(index, model) as running:
        yield running


def names(answer: Answer, kind: str) -> list[str]:
    assert answer.status == 200, answer.line
    return [hit["name"] for hit in json.loads(answer.body)[kind]]


def number_of(index: Index, kind: str, path: str) -> int:
    return next(n for n, entry in enumerate(index.entries) if (entry.kind, entry.path) == (kind, path))


# ---- answers -----------------------------------------------------------------------------------------------------


def test_words_rank_each_kind_by_itself(server: Server, index: Index, model: Any) -> None:
    answer = server.ask("/api/search?text=a+low+tone")
    query_F = model.encode(texts=["a low tone"])[0]
    for kind in ("image", "audio"):
        hits = json.loads(answer.body)[kind]
        expected = index.search(query_F, kind, 96)
        assert [index.entries[hit["number"]] for hit in hits] == [hit.entry for hit in expected]
        assert [hit["score"] for hit in hits] == [round(hit.score, 4) for hit in expected]


def test_without_a_query_some_of_each_kind(server: Server, index: Index) -> None:
    found = json.loads(server.ask("/api/search").body)
    assert {kind: len(found[kind]) for kind in found} == {kind: len(index.by_kind[kind]) for kind in ("image", "audio")}
    assert {hit["score"] for hits in found.values() for hit in hits} == {None}


@pytest.mark.parametrize(("kind", "name"), [("image", "red.png"), ("image", "inner/scan.tif"), ("image", "film.webm"),
                                            ("audio", "low.wav"), ("audio", "film.webm")])
def test_a_file_that_is_uploaded_finds_itself(server: Server, index: Index, kind: str, name: str) -> None:
    """Also a video, by its middle picture and by its sound; the server is not told the file's name."""
    answer = server.ask(f"/api/search?kind={kind}", "POST", (index.folder / name).read_bytes())
    assert names(answer, kind)[0] == name
    assert json.loads(answer.body)[kind][0]["score"] == pytest.approx(1, abs=1e-4)


def test_what_a_recorder_of_a_browser_writes_is_heard(server: Server, tmp_path: Path) -> None:
    """WebM with Opus, its length not stated, as MediaRecorder makes it: the same answer as for the same sound."""
    recorded = write_sound(tmp_path / "recorded.webm", tone(600, 2, 48_000))
    assert server.ask("/api/search?kind=audio", "POST", recorded.read_bytes()).status == 200


def test_more_like_this_leaves_out_this(server: Server, index: Index) -> None:
    for kind, name in (("image", "red.png"), ("audio", "low.wav")):
        answer = server.ask(f"/api/search?like={number_of(index, kind, name)}")
        assert json.loads(answer.body)["like"]["name"] == name
        assert name not in names(answer, kind) and len(names(answer, kind)) == len(index.by_kind[kind]) - 1  # type: ignore[index]


def test_a_file_comes_in_ranges(server: Server, index: Index) -> None:
    path = f"/files/{number_of(index, 'audio', 'film.webm')}"
    content = (index.folder / "film.webm").read_bytes()
    whole = server.ask(path)
    assert (whole.status, whole.body, whole.headers["content-type"]) == (200, content, "video/webm")
    part = server.ask(path, range="bytes=10-19")
    assert (part.status, part.body) == (206, content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
    assert server.ask(path, range=f"bytes={len(content) - 5}-").body == content[-5:]
    assert server.ask(path, range="bytes=99999999-").status == 416
    assert "attachment" in server.ask(f"{path}?save=1").headers["content-disposition"]


def test_a_kind_of_file_that_browsers_do_not_know_is_saved_and_not_shown(server: Server, index: Index) -> None:
    found = server.ask(f"/files/{number_of(index, 'image', 'inner/scan.tif')}")
    assert found.headers["content-type"] == "application/octet-stream"
    assert found.headers["content-disposition"].startswith("attachment")


def test_a_name_that_is_no_text_comes_as_it_is(index: Index, model: Any, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    (tmp_path / odd).write_bytes((index.folder / "red.png").read_bytes())
    with served(_index_of(tmp_path, [odd], model), model) as server:
        assert names(server.ask("/api/search?text=x"), "image") == [odd]
        assert server.ask("/files/0").body == (tmp_path / odd).read_bytes()


def _index_of(folder: Path, paths: list[str], model: Any) -> Index:
    """An index of pictures that says what no indexing would write."""
    from trimodal.search.index import ModelName

    place = folder / "index"
    place.mkdir()
    entries = [Entry("image", path, "00" * 32, 0.0, 0.0, 1, 1) for path in paths]
    features = model.encode(texts=["x"] * len(paths)).numpy()
    write_index(place, folder, ModelName("m", model.digest, model.embed_dim, model.modalities), entries, features)
    return Index.open(place)


# ---- thumbnails --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name", "size"), [
    ("image", "wide.webp", (300, 60)), ("image", "inner/tall.jpg", (90, 400)), ("image", "inner/scan.tif", (80, 60)),
    ("image", "film.webm", (96, 64)), ("audio", "low.wav", (384, 64)), ("audio", "film.webm", (384, 64))])
def test_thumbnails_of_pictures_videos_and_sounds(server: Server, index: Index, kind: str, name: str,
                                                  size: tuple[int, int]) -> None:
    from PIL import Image

    answer = server.ask(f"/thumbnails/{number_of(index, kind, name)}")
    with Image.open(io.BytesIO(answer.body)) as picture:
        assert picture.size == size and answer.headers["content-type"] == f"image/{(picture.format or '').lower()}"


def test_a_waveform_shows_where_a_sound_is_loud(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    path = tmp_path / "late.wav"
    soundfile.write(path, np.concatenate([np.zeros(RATE_HZ), np.ones(RATE_HZ) * 0.5]), RATE_HZ)
    with Image.open(io.BytesIO(thumbnails.waveform(path, 0.0, 0.0))) as picture:
        opaque_W = (np.asarray(picture.getchannel("A")) > 0).sum(0)
    bars = opaque_W[::thumbnails.BAR_WIDTH]
    assert bars[:40].max() <= 4 and bars[-40:].min() == thumbnails.WAVEFORM_HEIGHT


def test_a_thumbnail_is_made_once_and_memory_is_bounded() -> None:
    made = list[int]()

    def make(number: int) -> bytes:
        made.append(number)
        time.sleep(0.02)
        return bytes(100)

    async def ask() -> None:
        kept = thumbnails.Thumbnails(max_bytes=250)
        await asyncio.gather(*(kept.get(1, lambda: make(1)) for _ in range(5)))
        assert made == [1]
        await kept.get(2, lambda: make(2))
        await kept.get(1, lambda: make(1))  # used again: number 2 goes first
        await kept.get(3, lambda: make(3))
        assert list(kept.kept) == [1, 3] and kept.kept_bytes == 200 and made == [1, 2, 3]
        with pytest.raises(ZeroDivisionError):
            await kept.get(4, lambda: bytes(1 // 0))
        assert await kept.get(4, lambda: make(4)) == bytes(100)

    asyncio.run(ask())


def test_a_file_that_has_gone_is_told(index: Index, model: Any, tmp_path: Path) -> None:
    with served(_index_of(tmp_path, ["gone.png"], model), model) as server:
        for path in ("/files/0", "/thumbnails/0"):
            assert_refused(server.ask(path), 404)


# ---- refusals ----------------------------------------------------------------------------------------------------


def assert_refused(answer: Answer, status: int) -> None:
    """A status, and one line that holds no path of this machine."""
    assert answer.status == status, answer
    assert answer.line.endswith("\n") and answer.line.count("\n") == 1 and len(answer.line) > 5, answer
    assert "/tmp" not in answer.line and "Traceback" not in answer.line
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(("path", "headers", "status"), [
    ("/", {"host": "evil.example"}, 421), ("/api/index", {"host": "evil.example:80"}, 421),
    ("/", {"host": "localhost.evil.example"}, 421), ("/", {"host": "127.0.0.1.evil.example"}, 421),
    ("/", {"host": "10.0.0.1"}, 421), ("/", {"host": "[::1"}, 421), ("/", {"host": ""}, 421),
    ("/api/search?text=x", {"origin": "http://evil.example"}, 403), ("/api/search?text=x", {"origin": "null"}, 403),
    ("/api/search?text=x", {"origin": "http://127.0.0.1:1"}, 403),
    ("/thumbnails/0", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
    ("/files/0", {"sec_fetch_site": "same-site"}, 403),
    ("/files/0", {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 403),
    ("/files/999", {}, 404), ("/thumbnails/999", {}, 404), ("/files/-1", {}, 404), ("/files/1e1", {}, 404),
    ("/files/99999999999999999999999999", {}, 404), ("/files/low.wav", {}, 404),
    ("/files/..%2f..%2fetc%2fpasswd", {}, 404),
    ("/files/../../../etc/passwd", {}, 404), ("/static/../server.py", {}, 404), ("/static/..%2fserver.py", {}, 404),
    ("/static/", {}, 404), ("/api/search?text=", {}, 400), ("/api/search?text=%20", {}, 400),
    (f"/api/search?text={'x' * 1001}", {}, 400), ("/api/search?like=999", {}, 404), ("/api/search?like=-1", {}, 404),
    ("/api/search?like=%C2%B2", {}, 404), ("/api/search?like=0x1", {}, 404)])
def test_what_is_refused(server: Server, path: str, headers: dict[str, str], status: int) -> None:
    assert_refused(server.ask(path, **headers), status)


@pytest.mark.parametrize("headers", [
    {"host": "localhost"}, {"host": "LOCALHOST:1234"}, {"host": "[::1]:80"}, {"host": "127.9.9.9"},
    {"sec_fetch_site": "none"}, {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}])
def test_what_is_not_refused(server: Server, headers: dict[str, str]) -> None:
    """A link on another site may lead to the page."""
    assert server.ask("/", **headers).status == 200


def test_on_a_network_addresses_and_the_own_name_are_ours() -> None:
    async def app(*_: Any) -> None:
        pass

    guard = Guard(app, "0.0.0.0")
    names = ("192.168.0.7:8000", "localhost:8000", "evil.example")
    assert [guard.is_ours(name) for name in names] == [True, True, False]
    assert Guard(app, "search.lan").is_ours("Search.LAN:8000")


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in some kilobytes."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    head = chunk(b"IHDR", (30_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(3_751_000))) + chunk(b"IEND", b"")


REFUSED_UPLOADS = {  # kind, body, status
    "no picture": ("image", b"", 422), "no sound": ("audio", b"", 422), "word": ("image", b"hello", 422),
    "noise": ("audio", random.Random(0).randbytes(4000), 422), "page": ("image", b"<html></html>", 422),
    "bomb": ("image", bomb(), 422), "cut picture": ("image", b"\x89PNG\r\n\x1a\n" + bytes(99), 422),
    "cut sound": ("audio", b"RIFF\xff\xff\xff\xffWAVEfmt " + bytes(99), 422),
    "playlist": ("audio", b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n", 422),
    "vector graphics": ("image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422),
    "text": ("text", b"a dog", 400), "no kind": ("", b"a dog", 400)}


@pytest.mark.parametrize(("kind", "body", "status"), REFUSED_UPLOADS.values(), ids=REFUSED_UPLOADS)
def test_uploads_that_are_refused(server: Server, kind: str, body: bytes, status: int) -> None:
    assert_refused(server.ask(f"/api/search?kind={kind}", "POST", body), status)


def test_an_upload_is_bounded_in_bytes_and_seconds(server: Server, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(server.ask("/api/search?kind=image", "POST", content_length=str(MAX_UPLOAD_BYTES + 1)), 413)
    monkeypatch.setattr(server_module, "MAX_UPLOAD_BYTES", 100_000)
    chunks = b"".join(b"c350\r\n" + bytes(50_000) + b"\r\n" for _ in range(3)) + b"0\r\n\r\n"
    answer = server.ask("/api/search?kind=image", "POST", chunks, transfer_encoding="chunked")
    assert_refused(answer, 413)
    monkeypatch.undo()
    monkeypatch.setattr(server_module, "MAX_UPLOAD_S", 2.0)
    soundfile.write(tmp_path / "long.wav", tone(300, 2.5), RATE_HZ)
    assert_refused(server.ask("/api/search?kind=audio", "POST", (tmp_path / "long.wav").read_bytes()), 413)
    soundfile.write(tmp_path / "short.wav", tone(300, 2.0), RATE_HZ)
    assert server.ask("/api/search?kind=audio", "POST", (tmp_path / "short.wav").read_bytes()).status == 200


def test_other_methods_are_refused(server: Server) -> None:
    for path in ("/api/search", "/files/0", "/"):
        assert_refused(server.ask(path, "DELETE"), 405)


@pytest.mark.parametrize("path", ["../secret.png", "inner/../../secret.png", "/etc/passwd"])
def test_an_index_that_names_files_outside_its_folder_shows_none_of_them(model: Any, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with served(_index_of(tmp_path / "folder", [path], model), model) as server:
        for place in ("/files/0", "/thumbnails/0"):
            assert_refused(server.ask(place), 403)


# ---- the model ---------------------------------------------------------------------------------------------------


class Watched:
    """A model that counts how many calls run at once, and waits within them."""

    def __init__(self, model: Any):
        self.model, self.modalities = model, model.modalities
        self.at_once = self.most = 0
        self.asked = list[Any]()
        self.go_on = threading.Event()

    def encode(self, **given: Any) -> Any:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.asked += [value for name, value in given.items() if name != "progress"]
        self.go_on.wait(30)
        self.at_once -= 1
        return self.model.encode(**given)


def test_one_call_of_the_model_at_a_time_and_none_for_browsers_that_have_gone(index: Index, model: Any,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_WAITING", 5)
    watched = Watched(model)
    with served(index, watched) as server, ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.ask, "/api/search?text=first")
        while not watched.asked:
            time.sleep(0.01)
        gone = socket.create_connection(("127.0.0.1", server.port))
        gone.sendall(f"GET /api/search?text=gone HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        time.sleep(0.2)
        others = [pool.submit(server.ask, f"/api/search?text={n}") for n in range(3)]
        time.sleep(0.5)
        assert_refused(server.ask("/api/search?text=one+too+many"), 503)
        gone.close()
        time.sleep(0.2)
        watched.go_on.set()
        assert [one.result().status for one in [first, *others]] == [200] * 4
    assert watched.most == 1
    assert sorted(text for [text] in watched.asked) == ["0", "1", "2", "first"]


def test_what_the_model_does_not_read_is_refused(index: Index, model: Any) -> None:
    watched = Watched(model)
    watched.modalities = ("image", "text")
    with served(index, watched) as server:
        assert json.loads(server.ask("/api/index").body)["modalities"] == ["image", "text"]
        assert_refused(server.ask("/api/search?kind=audio", "POST", b"x"), 400)


def test_a_port_in_use_is_told_in_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with refused("--port", port, "127.0.0.1"):
            listen("127.0.0.1", port)
    with refused("--host", "192.0.2.1", "127.0.0.1", "0.0.0.0"):  # of no machine
        listen("192.0.2.1", 0)


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        with listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_index_says_what_is_there(server: Server, index: Index) -> None:
    about = json.loads(server.ask("/api/index").body)
    assert about["name"] == "my media" and about["counts"] == {"image": 7, "audio": 4}
    assert LONG in names(server.ask("/api/search"), "image")


# ---- the command -------------------------------------------------------------------------------------------------


def test_serve_refuses_in_one_line(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert search.main(["serve", "--index", str(index.place), "--port", str(port)]) == 2
        assert_told(capsys.readouterr().err, "--host", "127.0.0.1", "--port", port, 0)
    assert search.main(["serve", "--index", str(tmp_path)]) == 2
    assert_told(capsys.readouterr().err, tmp_path)
    with pytest.raises(SystemExit) as ended:
        search.main(["serve", "--port", "65536"])
    assert ended.value.code == 2
    assert_told(capsys.readouterr().err, "--port", 65536, 65535)


@pytest.mark.timed
def test_ctrl_c_ends_quietly_while_a_browser_waits_for_a_file(index: Index, tmp_path: Path) -> None:
    """The program of the command, in a process of its own, as a terminal interrupts it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "large.wav").write_bytes(bytes(50 << 20))
    entries = [Entry("audio", "large.wav", "00" * 32, 0.0, 1.0, 1, 1)]
    (tmp_path / "index").mkdir()
    write_index(tmp_path / "index", folder, index.model, entries, index.features("audio")[:1].numpy())
    program = ("import sys\nfrom tests.search import things\nimport search\n"
               "with things.small():\n    sys.exit(search.main(sys.argv[1:]))")
    words = ["serve", "--index", str(tmp_path / "index"), "--port", "0", "--device", "cpu"]
    with subprocess.Popen([sys.executable, "-c", program, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        told = next(line for line in process.stdout if "http://" in line)
        port = int(re.findall(r"http://127\.0\.0\.1:(\d+)/", told)[0])
        with socket.create_connection(("127.0.0.1", port)) as browser:  # which reads nothing
            browser.sendall(b"GET /files/0 HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert Server(port).ask("/api/search?like=0").status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("", "")
