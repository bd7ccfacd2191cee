"""The search page: a server on this machine over one index and one model.

    with listen("127.0.0.1", 8000) as listener:
        serve(Index.open("my_index"), open_model("best_model.pt"), "127.0.0.1", listener)      # until Ctrl-C

    GET  /                           the page, whose files are in static/
    GET  /api/index                  what is in the index, and what an upload may be
    GET  /api/search                 some of the index; with ?text=WORDS or ?like=NUMBER what is most like that
    POST /api/search?kind=image      what is most like the picture (kind=audio: the sound) that is the body
    GET  /thumbnails/NUMBER          of an entry of the index, by its number; ?large=1 larger
    GET  /files/NUMBER               its file, in ranges as players ask for them; ?save=1 to save it

One thread calls the model, one request after the other, so that several browsers take no more memory than one.

Shape suffixes: F embed_dim.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import tempfile
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from trimodal.data import tracks
from trimodal.data.samples import BrokenSample, decoding
from trimodal.errors import UserError, counted
from trimodal.media import is_video
from trimodal.search import thumbnails
from trimodal.search.guard import Guard, Refused
from trimodal.search.index import KINDS, Entry, Index, printable

if TYPE_CHECKING:
    import uvicorn
    from torch import Tensor

    from trimodal.inference.open_model import OpenModel

STATIC = Path(__file__).with_name("static")
SHOWN = 96  # results of each kind; the page shows some of them at first
STARTING = 24  # of each kind, before anything has been asked
MAX_WAITING = 16  # requests that wait for the model
MAX_TEXT = 1_000  # characters; no text model reads more
MAX_UPLOAD_BYTES = 64 << 20
MAX_UPLOAD_S = 300.0  # of sound; pictures have the bounds of data/images.py
MAX_RECORDING_S = 30
MAX_CONNECTIONS = 128
TYPES = {  # that browsers show or play; others are offered to be saved
    ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".jfif": "image/jpeg", ".png": "image/png", ".webp": "image/webp",
    ".gif": "image/gif", ".bmp": "image/bmp", ".avif": "image/avif", ".wav": "audio/wav", ".flac": "audio/flac",
    ".ogg": "audio/ogg", ".oga": "audio/ogg", ".opus": "audio/ogg", ".mp3": "audio/mpeg", ".m4a": "audio/mp4",
    ".aac": "audio/aac", ".weba": "audio/webm", ".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4",
    ".webm": "video/webm", ".ogv": "video/ogg", ".mkv": "video/x-matroska"}


def serve(index: Index, model: "OpenModel", host: str, listener: socket.socket) -> None:
    """Answer requests at a socket that listens at `host`, until Ctrl-C."""
    app = application(index, model, host)
    print(f"Searching {counted(len(index.by_kind['image']), 'picture')} and "
          f"{counted(len(index.by_kind['audio']), 'sound')} of {printable(index.folder)} at "
          f"{address(host, listener)}; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        http_server(app).run(sockets=[listener])


def http_server(app: Guard) -> "uvicorn.Server":
    """A server for one application, which says nothing of its own; it ends within a second of being asked."""
    import uvicorn

    return uvicorn.Server(uvicorn.Config(
        app, loop="asyncio", http="h11", ws="none", lifespan="off", log_level="critical", server_header=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=1))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `host`:`port` (0: any free one).

    Raises:
        UserError: nothing can listen there.
    """
    where = f"--host {host} --port {port}"
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family)
        # asyncio does this for sockets whose proto is IPPROTO_TCP alone, and here it is 0; without it an answer's body
        # waits up to 40 ms for the browser to acknowledge its head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except PermissionError:
        raise UserError(f"{where}: only the system may listen there; take a port above 1023, or 0 for any free one"
                        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{where}: another program listens there; take another port, or 0 for any free one"
                            ) from None
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise UserError(f"{where}: cannot listen there ({reason}); --host takes an address of this machine: 127.0.0.1 "
                        "for itself alone, 0.0.0.0 for all that reach it") from None


def address(host: str, listener: socket.socket) -> str:
    """What a browser on this machine opens."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}/"


def application(index: Index, model: "OpenModel", host: str = "127.0.0.1") -> Guard:
    """The ASGI application of the page."""
    page = Page(index, model)
    routes = [
        Route("/", lambda request: FileResponse(STATIC / "index.html")),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/api/index", page.about), Route("/api/search", page.search, methods=["GET", "POST"]),
        Route("/thumbnails/{number:int}", page.thumbnail), Route("/files/{number:int}", page.file)]
    handlers: dict[Any, Any] = {Refused: lambda request, error: error.response(), HTTPException: _one_line,
                                Exception: _our_mistake}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host)


def _one_line(request: Request, error: HTTPException) -> Response:
    return PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)


def _our_mistake(request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    return PlainTextResponse(f"a mistake of the server, {type(error).__name__}; it has printed where\n", 500)


class Page:
    """What the routes answer."""

    def __init__(self, index: Index, model: "OpenModel"):
        self.index, self.model = index, model
        self.numbers = {entry[:2]: number for number, entry in enumerate(index.entries)}  # by kind and path
        self.thumbnails = thumbnails.Thumbnails()
        self.model_thread, self.turn, self.waiting = ThreadPoolExecutor(1, "model"), asyncio.Lock(), 0

    # ---- search ---------------------------------------------------------------------------------------------------

    async def about(self, request: Request) -> Response:
        return _json({
            "name": Path(self.index.folder).name, "counts": {kind: len(self.index.by_kind[kind]) for kind in KINDS},
            "modalities": list(self.model.modalities), "max_upload_bytes": MAX_UPLOAD_BYTES,
            "max_upload_s": MAX_UPLOAD_S, "max_recording_s": MAX_RECORDING_S})

    async def search(self, request: Request) -> Response:
        asked = request.query_params
        if request.method == "POST":
            kind = asked.get("kind", "")
            self._check_modality(kind, KINDS)
            async with _upload(request) as path:
                return _json(await self._in_turn(request, partial(self._like_upload, kind, path)))
        if "like" in asked:
            number = int(asked["like"]) if asked["like"].isdecimal() else -1
            self._entry(number)
            return _json(await self._in_turn(request, partial(self._like_entry, number)))
        if "text" not in asked:
            return _json(self._some())
        text = asked["text"].strip()
        if not 0 < len(text) <= MAX_TEXT:
            raise Refused(400, f"text: {len(text):,} characters; give 1 to {MAX_TEXT:,}")
        self._check_modality("text", ("text",))
        return _json(await self._in_turn(request, partial(self._like_text, text)))

    async def _in_turn(self, request: Request, call: Callable[[], Any]) -> Any:
        """The result of `call`, in the model's thread, after those that came before; it is left out where the browser
        has given up by then, as it does when another query is typed."""
        if self.waiting >= MAX_WAITING:
            raise Refused(503, f"{MAX_WAITING} requests are waiting for the model; try again")
        self.waiting += 1
        try:
            async with self.turn:
                if await request.is_disconnected():
                    raise Refused(499, "the browser has gone")
                return await asyncio.get_running_loop().run_in_executor(self.model_thread, call)
        finally:
            self.waiting -= 1

    def _like_text(self, text: str) -> dict[str, Any]:
        return self._ranked(self.model.encode(texts=[text], progress=False)[0])

    def _like_upload(self, kind: str, path: str) -> dict[str, Any]:
        try:
            if kind == "audio":
                with decoding(path, "sound"):
                    is_long = bool(tracks.read(path, MAX_UPLOAD_S, 0.1))
                if is_long:
                    raise Refused(413, f"the sound is over {MAX_UPLOAD_S:g} s long")
                found = self.model.encode(audio=[path], progress=False)
            else:
                found = self.model.encode(images=[path], progress=False)
        except (BrokenSample, UserError) as error:
            raise Refused(422, f"the file {_reason(error, path)}") from None
        return self._ranked(found[0])

    def _like_entry(self, number: int) -> dict[str, Any]:
        entry = self.index.entries[number]
        row = number if entry.kind == "image" else number - len(self.index.by_kind["image"])
        return {"like": self._shown(entry), **self._ranked(self.index.features(entry.kind)[row], but=entry)}

    def _ranked(self, query_F: "Tensor", but: Entry | None = None) -> dict[str, Any]:
        """The entries most like a query, of each kind by itself: cosines of different kinds do not compare."""
        return {kind: [self._shown(hit.entry, hit.score) for hit in self.index.search(query_F, kind, SHOWN)
                       if hit.entry is not but] for kind in KINDS}

    def _some(self) -> dict[str, Any]:
        """Entries from all over the index, to look at before anything has been asked."""
        return {kind: [self._shown(entries[at]) for at in _spread(len(entries), STARTING)]
                for kind, entries in self.index.by_kind.items()}

    def _shown(self, entry: Entry, score: float | None = None) -> dict[str, Any]:
        return {"number": self.numbers[entry[:2]], "kind": entry.kind, "name": entry.path, "digest": entry.digest[:16],
                "video": is_video(entry.path), "start_s": entry.start_s, "duration_s": entry.duration_s,
                "score": None if score is None else round(score, 4)}

    def _check_modality(self, name: str, known: Sequence[str]) -> None:
        if name not in known:
            raise Refused(400, f"kind: {name[:40]!r} is unknown. Known: {', '.join(known)}")
        if name not in self.model.modalities:
            raise Refused(400, f"this model reads no {name}; it reads {', '.join(self.model.modalities)}")

    # ---- files ----------------------------------------------------------------------------------------------------

    async def thumbnail(self, request: Request) -> Response:
        number, is_large = request.path_params["number"], "large" in request.query_params
        entry = self._entry(number)
        path = self._path(entry)
        if entry.kind == "image":
            make = partial(thumbnails.picture, path, thumbnails.LARGE_SIDE if is_large else thumbnails.SIDE)
        elif entry.duration_s <= thumbnails.WAVEFORM_MAX_S:
            make = partial(thumbnails.waveform, path, entry.start_s, entry.duration_s)
        else:
            raise Refused(404, f"entry {number} is too long for a waveform")
        try:
            content = await self.thumbnails.get((number, is_large), make)
        except BrokenSample as error:
            raise Refused(404, f"entry {number} {_reason(error, path)}") from None
        return Response(content, headers={"cache-control": "private, max-age=86400"},
                        media_type=thumbnails.type_of(content))

    async def file(self, request: Request) -> Response:
        path = self._path(self._entry(request.path_params["number"]))
        if not path.is_file():
            raise Refused(404, f"the file of entry {request.path_params['number']} is no longer there")
        media_type = TYPES.get(path.suffix.lower())
        is_saved = media_type is None or "save" in request.query_params
        name = path.name.encode("utf-8", "replace").decode()
        return FileResponse(path, media_type=media_type or "application/octet-stream", filename=name,
                            content_disposition_type="attachment" if is_saved else "inline",
                            headers={"content-security-policy": "sandbox; default-src 'none'; media-src 'self'"})

    def _entry(self, number: int) -> Entry:
        if not 0 <= number < len(self.index.entries):
            raise Refused(404, f"the index has no entry of this number; it has {len(self.index.entries):,}")
        return self.index.entries[number]

    def _path(self, entry: Entry) -> Path:
        """The file of an entry; refused where an index that others wrote names one outside its folder."""
        inner = PurePosixPath(entry.path)
        if inner.is_absolute() or ".." in inner.parts:
            raise Refused(403, "the index names a file outside its folder")
        return Path(self.index.folder) / inner


@contextlib.asynccontextmanager
async def _upload(request: Request) -> AsyncIterator[str]:
    """The path of a temporary file with the body of a request, which ends where it is longer than allowed."""
    too_large = Refused(413, f"the file is over {MAX_UPLOAD_BYTES >> 20} MiB")
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > MAX_UPLOAD_BYTES:
        raise too_large
    with tempfile.NamedTemporaryFile(prefix="search-") as file:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > MAX_UPLOAD_BYTES:
                raise too_large
            file.write(part)
        file.flush()
        yield file.name


def _reason(error: Exception, path: str | Path) -> str:
    """What is wrong with a file, without its path."""
    return str(error).rpartition(f"{path}: ")[2]


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0 to count - 1, evenly spaced."""
    return [at * count // most for at in range(most)] if count > most else list(range(count))


def _json(value: Any) -> Response:
    """Names of files may hold bytes that are no text; json escapes these, which Starlette's own response cannot."""
    return Response(json.dumps(value), media_type="application/json", headers={"cache-control": "no-store"})
