"""What do transfers and unpacking take in memory at most?

    python benchmarks/download_memory.py [--only zip tar]

Each row is a process of its own that fetches from a server of another process, or unpacks, as download_datasets.py does
it; `peak` is the most that it held (VmHWM), all libraries included. Transfers have a limit, which does not grow with
the file; the libraries that read archives hold a zip's directory and a parquet table's row groups whole. Linux only.
"""

import argparse
import io
import multiprocessing
import os
import random
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

LIMIT_MB = 200.0  # of a transfer
MB = 1_000_000


class _Zeros(BaseHTTPRequestHandler):
    """/NAME/BYTES: so many zeros."""

    def do_GET(self) -> None:
        left = int(self.path.rpartition("/")[2])
        self.send_response(200)
        self.send_header("Content-Length", str(left))
        self.end_headers()
        block = bytes(1 << 20)
        while left > 0:
            self.wfile.write(block[: min(left, len(block))])
            left -= len(block)

    def log_message(self, format: str, *args: Any) -> None: ...


def _serve(port: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Zeros)
    port.send(server.server_port)
    server.serve_forever()


def transfer_of(files: int, size: int) -> Callable[[Path], Callable[[], None]]:
    def prepare(folder: Path) -> Callable[[], None]:
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.Process(target=_serve, args=(theirs,), daemon=True)
        server.start()
        port = ours.recv()

        def work() -> None:
            from functools import partial

            from trimodal.download import http
            from trimodal.download.progress import in_threads

            tasks = ((i, partial(http.fetch, http.Wanted(
                path=folder / f"{i}", urls=(f"http://127.0.0.1:{port}/{i}/{size}",), size=size))) for i in range(files))
            for _, done in in_threads(tasks, files):
                done.result()
        return work
    return prepare


def unpacking_of(kind: str, make: Callable[[Path], None]) -> Callable[[Path], Callable[[], None]]:
    def prepare(folder: Path) -> Callable[[], None]:
        path = folder / "archive"
        process = multiprocessing.Process(target=make, args=(path,))
        process.start()
        process.join()

        def work() -> None:
            from trimodal.download import unpack
            from trimodal.download.state import write_contents
            from trimodal.sets.audiocaps import ROWS

            contents = unpack.Contents(max_files=10**7, max_bytes=10**12, rows=ROWS)
            write_contents(folder, "x", unpack.extract([path], kind, folder / "staging", contents), {})
            unpack.move_into(folder / "staging", folder / "out")
        return work
    return prepare


def zip_of(files: int, size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for i in range(files):
                with archive.open(f"{i // 1000:05d}/{i:09d}.m4a", "w", force_zip64=True) as file:
                    for _ in range(0, size, MB):
                        file.write(bytes(min(size, MB)))
    return make


def tar_of(files: int, size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for i in range(files):
                info = tarfile.TarInfo(f"{i // 1000:05d}/{i:09d}.wav")
                info.size = size
                archive.addfile(info, io.BytesIO(bytes(size)))
    return make


def seven_zip_of(files: int, size: int, dictionary: int) -> Callable[[Path], None]:
    """With a dictionary of so many bytes, which unpacking has to hold."""
    def make(path: Path) -> None:
        import py7zr

        filters = [{"id": py7zr.FILTER_LZMA2, "preset": 6, "dict_size": dictionary}]
        with py7zr.SevenZipFile(path, "w", filters=filters) as archive:
            for i in range(files):
                archive.writestr(random.Random(i).randbytes(size), f"development/{i:05d}.wav")
    return make


def shard_of(rows: int, size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([
            {"audiocap_id": i, "youtube_id": f"id{i:09d}", "start_time": 30, "caption": "a sound",
             "audio": {"bytes": b"fLaC" + random.Random(i).randbytes(size), "path": None}} for i in range(rows)])
        pyarrow.parquet.write_table(table, path, row_group_size=100)
    return make


CASES: dict[str, Callable[[Path], Callable[[], None]]] = {
    "transfer: 4 files at a time, 100 MB each": transfer_of(4, 100 * MB),
    "transfer: 4 files at a time, 500 MB each": transfer_of(4, 500 * MB),
    "zip: 100,000 files": unpacking_of("zip", zip_of(100_000, 10)),
    "zip: 1,000,000 files": unpacking_of("zip", zip_of(1_000_000, 10)),
    "zip: one file of 1,000 MB": unpacking_of("zip", zip_of(1, 1000 * MB)),
    "tar.gz: 20,000 files": unpacking_of("tar", tar_of(20_000, 10)),
    "7z: 40 files of 2 MB, dictionary 16 MiB": unpacking_of("7z", seven_zip_of(40, 2 * MB, 1 << 24)),
    "7z: 40 files of 2 MB, dictionary 64 MiB": unpacking_of("7z", seven_zip_of(40, 2 * MB, 1 << 26)),
    "parquet: 90 MB, 110 sounds, as the mirror": unpacking_of("parquet", shard_of(110, 800_000)),
    "parquet: 500 MB, 625 sounds, groups of 100": unpacking_of("parquet", shard_of(625, 800_000)),
}


def measure(prepare: Callable[[Path], Callable[[], None]], folder: Path) -> float:
    """MB at the peak of a fresh process."""
    ours, theirs = multiprocessing.Pipe()
    work = prepare(folder)
    process = multiprocessing.Process(target=_measured, args=(work, theirs))
    process.start()
    process.join()
    assert process.exitcode == 0, f"ended with {process.exitcode}"
    return ours.recv() / 1e3


def _measured(work: Callable[[], None], answer: Any) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of a fork is its parent's, until told otherwise
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    answer.send(next(int(line.split()[1]) * 1.024 for line in lines if line.startswith("VmHWM")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="cases whose name begins so")
    args = parser.parse_args(argv)
    print(f"{date.today()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}; limit of a transfer "
          f"{LIMIT_MB:.0f} MB")
    print(f"{'case':<42}  peak, MB", flush=True)
    worst = 0.0
    for name, prepare in tqdm(CASES.items(), disable=None):
        if name.startswith(tuple(args.only)):
            with tempfile.TemporaryDirectory() as folder:
                peak_mb = measure(prepare, Path(folder))
            worst = max(worst, peak_mb if name.startswith("transfer") else 0.0)
            print(f"{name:<42}  {peak_mb:>8.0f}", flush=True)
    print(f"the most of a transfer: {worst:.0f} MB, " + ("within the limit" if worst < LIMIT_MB else "above the limit"))
    return 0 if worst < LIMIT_MB else 1


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    sys.exit(main())
