"""Downloads that are killed at any moment and go on, for tests and benchmarks: started, killed, all bytes compared."""

import dataclasses
import gzip
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

import download_datasets
from tests import forked, miniature
from tests.loopback import Loopback
from trimodal.download.acquire import ARCHIVES
from trimodal.download.http import Policy
from trimodal.download.unpack import STAGING
from trimodal.sets import ALL, SOURCES, inventory
from trimodal.sets.base import Source

DONE = (0, 3)  # all there, and all there but for clips that are gone
NOISE_FILES, NOISE_BYTES = 250, 6_000  # of each large archive, so that unpacking takes a while


@dataclass
class Served:
    """Miniatures of the sets on a server that takes its time."""

    table: dict[str, Source]
    words: list[str]
    server: Loopback
    seconds: float = 0.0  # of an undisturbed download
    moments: Counter[str] = field(default_factory=Counter)  # what was under way when a download was killed


def serve(folder: Path, server: Loopback, names: tuple[str, ...] = ALL) -> Served:
    draw = random.Random(0)
    table, words = dict(SOURCES), ["--datasets", *names]
    for name in names:
        shards = {"shards": True} if name == "audiocaps" else {}
        table[name], served = getattr(miniature, name)(folder, **shards)
        server.files |= {f"/{name}/{file}": data for file, data in served.items()}
        words += ["--base-url", f"{name}={server.url(f'/{name}')}"]
    if "coco" in names:
        contents = miniature.files_of(folder / "coco", "val2017") | {
            f"val2017/n{i:04d}.jpg": draw.randbytes(NOISE_BYTES) for i in range(NOISE_FILES)}
        noise, served = miniature.shrink("coco", {"val2017.zip": contents}, folder)
        items = tuple(noise.items[0] if item.name == "val2017.zip" else item for item in table["coco"].items)
        table["coco"] = dataclasses.replace(table["coco"], items=items)
        server.files |= {f"/coco/{file}": data for file, data in served.items()}
    return Served(table, words, server)


def in_process(served: Served, root: Path) -> BaseProcess:
    """A process that downloads, or goes on downloading, to `root`; its exit code is that of the command."""
    arguments = (served.table, [*served.words, "--data-root", str(root)], root)
    process = forked.context().Process(target=_download, args=arguments)
    process.start()
    return process


def _download(table: dict[str, Source], words: list[str], root: Path) -> None:
    tqdm.set_lock(threading.RLock())  # else it takes a semaphore of the system, which a killed process would leave
    sys.stdout = sys.stderr = open(root.with_suffix(".out"), "a", encoding="utf-8")
    code = download_datasets.main(words, table=table, policy=Policy(backoff_s=0.05))
    sys.stdout.flush()
    os._exit(code)


def undisturbed(served: Served, root: Path) -> dict[str, object]:
    for _ in range(2):  # the second one is timed, everything is loaded then
        shutil.rmtree(root, ignore_errors=True)
        begin_s = time.monotonic()
        process = in_process(served, root)
        process.join()
        served.seconds = time.monotonic() - begin_s
        assert process.exitcode in DONE, root.with_suffix(".out").read_text("utf-8")[-2000:]
    return state(root)


def state(root: Path) -> dict[str, object]:
    """All files and their bytes; of lists their lines, of markers their contents."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            name = path.relative_to(root).as_posix()
            data = path.read_bytes()
            found[name] = (json.loads(data) if path.name == inventory.MARKER
                           else gzip.decompress(data) if path.suffix == ".gz" else data)
    return found


def killed_until_done(served: Served, root: Path, most: int, draw: random.Random) -> int:
    """SIGKILL at `most` random moments of as many starts, then to the end; how many kills there were."""
    for kills in range(most + 1):
        process = in_process(served, root)
        if kills < most:
            process.join(draw.uniform(0, served.seconds))
            process.kill()
        process.join()
        if process.exitcode in DONE:
            return kills
        assert process.exitcode == -signal.SIGKILL, root.with_suffix(".out").read_text("utf-8")[-2000:]
        served.moments[moment(root)] += 1
    raise AssertionError("the last process goes on to the end")


def moment(root: Path) -> str:
    """What was under way, by what lies about."""
    arriving = any(path.suffix == ".part" for path in root.glob(f"*/{ARCHIVES}/*"))
    unpacking = any(path.is_file() for path in root.glob(f"*/{STAGING}/**/*"))
    words = [word for word, there in (("transfer", arriving), ("unpacking", unpacking)) if there]
    return " and ".join(words) or "between them"


def differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def killed_downloads(served: Served, whole: dict[str, object], folder: Path, kills: int,
                     most_each: int = 6) -> Iterator[int]:
    """Downloads that are killed at random moments and compared with `whole` when they are through, until there were so
    many kills; yields how many so far.

    Raises:
        AssertionError: a download ended otherwise, or left other files.
    """
    draw, done, turn = random.Random(0), 0, 0
    while done < kills:
        turn += 1
        root = folder / f"run{turn}"
        done += killed_until_done(served, root, min(most_each, kills - done), draw)
        found = state(root)
        assert found == whole, f"{differing(found, whole)}: not as undisturbed; {served.moments}"
        shutil.rmtree(root)
        yield done
