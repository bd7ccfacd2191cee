"""How fast is a search of 100,000 pictures and sounds by words, and what would a smaller index lose?

    python benchmarks/search.py [--entries 100000] [--index DIR]

An index of random features and a model `base` of random weights are written into a temporary folder (0.6 GB), and
`python search.py serve` is started on them. Shown is the time from a request to the whole response over loopback HTTP,
text encoding included, of 200 texts, no two the same; then its parts within one process, and the search alone in other
numbers of entries. Last: which share of the 10 best of float32 is found where features are kept in fewer bits: random
features, and with --index those of an index, each of which is asked for what is most like it.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.run import ROOT, commit, hardware
from model import create_model, open_model
from trimodal import checkpoint
from trimodal.config import Config
from trimodal.data.tokenizer import load_tokenizer
from trimodal.search.index import Entry, Index, ModelName, nearest, write_index

QUERIES, WARM_UP, TOP = 200, 20, 10
BITS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
WORDS = (("a small", "a loud", "one red", "the old", "a wet", "two"), ("dog", "bird", "engine", "guitar", "child"),
         ("barks", "sings", "stands on grass", "is far away", "can be heard in the rain", "looks at the camera"),
         ("", "at night", "while people talk in the background", "on a street"))


def texts(count: int) -> list[str]:
    """Different queries of 2 to 14 words, in a fixed random order."""
    every = [" ".join(filter(None, words)) for words in itertools.product(*WORDS)]
    order = np.random.default_rng(0).permutation(len(every))
    return [every[n] for n in order[:count]]


def random_features(count: int, width: int = 512, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def write_model(path: Path) -> None:
    """A checkpoint of `base` with fresh weights, as a run would save it."""
    config = Config()
    torch.manual_seed(0)
    model, tokenizer = create_model("base"), load_tokenizer(config.model)
    checkpoint.save({"model_state_dict": model.state_dict(), "config": config.to_dict(),
                     "tokenizer": tokenizer.to_json(), "towers": {}, "concepts": [], "speakers": []}, path)


def write_random(place: Path, count: int, name: ModelName) -> None:
    """An index of `count` entries, seven in ten of them pictures."""
    pictures = count * 7 // 10
    entries = [Entry("image" if n < pictures else "audio", f"folder/{n:07}.jpg", f"{n:064x}", 0.0, 0.0, 1, 1)
               for n in range(count)]
    place.mkdir()
    write_index(place, place, name, entries, iter(random_features(count, name.embed_dim).numpy()))


# ---- over HTTP ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(place: Path, model: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to `search.py serve` in another process, which ends with the block."""
    command = [sys.executable, str(ROOT / "search.py"), "serve", "--index", str(place), "--checkpoint", str(model),
               "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            address = next(found for line in server.stdout if (found := re.search(r"http://([\w.]+):(\d+)/", line)))
            yield http.client.HTTPConnection(address[1], int(address[2]))
        finally:
            server.terminate()


def requests_ms(connection: http.client.HTTPConnection) -> list[float]:
    """Milliseconds of each query, from the request to the whole response."""
    found = []
    for text in texts(WARM_UP + QUERIES):
        begin_s = time.perf_counter()
        connection.request("GET", f"/api/search?{urllib.parse.urlencode({'text': text})}")
        response = connection.getresponse()
        content = response.read()
        found.append(1e3 * (time.perf_counter() - begin_s))
        if response.status != 200 or not json.loads(content)["image"]:
            raise RuntimeError(f"the server answered {response.status}: {content[:200]!r}")
    return found[WARM_UP:]


def measured(count: int = 100_000) -> dict[str, float]:
    """Median and 95th percentile of the requests, for benchmarks/run.py."""
    with tempfile.TemporaryDirectory() as folder:
        place, model = prepared(Path(folder), count)
        with served(place, model) as connection:
            median, p95 = np.percentile(requests_ms(connection), [50, 95]).tolist()
    return {"search_100k_ms": median, "search_100k_p95_ms": p95}


def prepared(folder: Path, count: int) -> tuple[Path, Path]:
    """An index in `folder` and the checkpoint of its model."""
    model = folder / "base.pt"
    write_model(model)
    write_random(folder / "index", count, ModelName.of(open_model(model, "cpu"), str(model)))
    return folder / "index", model


# ---- parts, and smaller features ---------------------------------------------------------------------------------


def times_ms(work: Callable[[Any], Any], items: Sequence[Any]) -> list[float]:
    """Milliseconds of each call, without the first ones."""
    found = []
    for item in items:
        begin_s = time.perf_counter()
        work(item)
        found.append(1e3 * (time.perf_counter() - begin_s))
    return found[len(items) // 10:]


def row(name: str, found_ms: Sequence[float]) -> str:
    median, p95 = np.percentile(found_ms, [50, 95])
    return f"{name:44}{median:8.1f} ms median{p95:8.1f} ms 95th percentile  ({len(found_ms)})"


def recall(features_NF: Tensor, queries: Tensor, dtype: torch.dtype) -> float:
    """Share of the TOP best that are found where features are kept as `dtype`, mean of the queries."""
    rounded_NF = features_NF.to(dtype).float()
    shares = [len({n for n, _, _ in nearest(features_NF, query, TOP)} & {n for n, _, _ in nearest(
        rounded_NF, query, TOP)}) / min(TOP, len(features_NF)) for query in queries]
    return float(np.mean(shares))


def compare_bits(name: str, features_NF: Tensor, queries: Tensor) -> None:
    shares = ", ".join(f"{bits} {100 * recall(features_NF, queries, dtype):.2f} %" for bits, dtype in BITS.items())
    print(f"{f'the {TOP} best of float32, {name} ({len(features_NF):,})':60}{shares}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--index", help="an index of real files, to compare precisions on")
    options = parser.parse_args(argv)
    print(f"{date.today()}, {commit()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {hardware()}")
    with tempfile.TemporaryDirectory() as folder:
        place, path = prepared(Path(folder), options.entries)
        with served(place, path) as connection:
            print(row(f"a request, {options.entries:,} entries", requests_ms(connection)))
        model, index = open_model(path, "cpu"), Index.open(place)
        asked = texts(WARM_UP + QUERIES)
        print(row("of which encoding the text", times_ms(lambda text: model.encode(texts=[text]), asked)))
        queries = random_features(WARM_UP + QUERIES, seed=1)
        print(row("of which the search of both kinds", times_ms(
            lambda query: [index.search(query, kind, 96) for kind in ("image", "audio")], list(queries))))
    for count in (10_000, 1_000_000):
        features = random_features(count)
        search = partial(nearest, features, top=96)
        print(row(f"the search alone, {count:,} entries", times_ms(search, list(queries[:50]))))
    features = random_features(100_000)
    for dtype in (torch.float32, *BITS.values()):
        product = partial(F.linear, weight=features.to(dtype))
        found_ms = times_ms(product, list(queries[:50, None].to(dtype)))
        print(row(f"the product alone, 100,000 in {str(dtype)[6:]}", found_ms))
    compare_bits("random", features, queries[:50])
    if options.index:
        real = Index.open(options.index)
        for kind, entries in real.by_kind.items():
            features = real.features(kind)
            compare_bits(f"{kind} of an index", features, features[torch.randperm(len(entries))[:200]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
