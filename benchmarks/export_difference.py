"""How far are the ONNX graphs of a model from the model itself, and how long do they take?

    python benchmarks/export_difference.py [tiny small base large pretrained] [--times]

Own towers of each size, and the demo's pretrained ones of pictures and texts (projections and sounds of size tiny), all
else with fresh weights. Each graph is run by onnxruntime over batches of one to five samples: texts of one token to the
longest, sounds from one sample to three windows alone and beside others, any of the modalities in the fusion. Shown is
the largest difference of all features and logits. --times: what a batch takes in both, on one thread, and log-mels by
the convolution of the graph beside the operator STFT of ONNX.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import numpy as np
import torch
from torch import nn

from benchmarks.attention_memory import cpu_name
from benchmarks.run import commit
from model import TriModalModel, create_model
from trimodal.config import MODALITIES, SAMPLE_RATE_HZ, load_config
from trimodal.data.audio import FFT, HOP, LOG_FLOOR, WINDOW, log_mel
from trimodal.export import onnx
from trimodal.export.graphs import Graph, LogMel, graphs_of

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny", "small", "base", "large", "pretrained")
TIMED = 5  # runs, of which the median is shown


class Row(NamedTuple):
    model: str
    graph: Graph
    megabytes: float
    difference: float
    path: Path


def model_of(name: str) -> TriModalModel:
    torch.manual_seed(0)
    if name != "pretrained":
        return create_model(name).eval()
    return TriModalModel(load_config(ROOT / "recipes" / "demo_pretrained.yaml", ["model.size=tiny"]).model).eval()


def compared(name: str, folder: Path) -> Iterator[Row]:
    """Each graph of a model, once it has been run."""
    for graph in graphs_of(model_of(name), MODALITIES, torch.uint8):
        path = folder / f"{graph.name}.onnx"
        onnx.write_graph(graph, path)
        size = sum(part.stat().st_size for part in folder.glob(f"{path.name}*")) / 1e6
        yield Row(name, graph, size, onnx.largest_difference(graph, path), path)


def measured(names: tuple[str, ...] = MODELS) -> dict[str, float]:
    """The largest difference over all models and graphs, each of which is printed."""
    largest = 0.0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for row in compared(name, Path(folder)):
                print(described(row), flush=True)
                largest = max(largest, row.difference)
    return {"onnx_largest_difference": largest}


def described(row: Row) -> str:
    return f"| {row.model} | {row.graph.name} | {row.megabytes:.1f} | {row.difference:.1e} |"


# ---- times -------------------------------------------------------------------------------------------------------


def median_ms(work: Callable[[], Any]) -> float:
    work()
    times = []
    for _ in range(TIMED):
        begin_s = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin_s))
    return statistics.median(times)


def session_of(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def times_ms(row: Row) -> tuple[float, float]:
    """Of eight samples (texts of 16 tokens, sounds of 10 s): by onnxruntime, and by the model."""
    length = {"text": 16, "audio": 10 * SAMPLE_RATE_HZ, "fusion": 64}.get(row.graph.name, 1)
    inputs = row.graph.examples([length] * 8, torch.Generator().manual_seed(0))
    given = {name: value.numpy() for name, value in zip(row.graph.inputs, inputs, strict=True)}
    session, outputs = session_of(row.path), list(row.graph.outputs)
    with torch.inference_mode():
        return median_ms(lambda: session.run(outputs, given)), median_ms(lambda: row.graph.expected(*inputs))


class StftLogMel(LogMel):
    """The same by torch.stft, which becomes the operator STFT."""

    def forward(self, wave_BS: torch.Tensor, samples_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wave_BS = nn.functional.pad(wave_BS, (FFT // 2, FFT // 2 - HOP))
        parts = torch.view_as_real(torch.stft(wave_BS, FFT, HOP, WINDOW, torch.hann_window(WINDOW), center=False,
                                              return_complex=True))
        return ((parts.square().sum(-1).mT @ self.filters_MH.T) + LOG_FLOOR).log(), samples_B


def front_ends(folder: Path) -> Iterator[tuple[str, float]]:
    """Milliseconds of the log-mels of eight sounds of 10 s, by each way."""
    waves = torch.randn(8, 10 * SAMPLE_RATE_HZ, generator=torch.Generator().manual_seed(0)) / 10
    lengths = torch.full((8,), waves.shape[1])
    for name, module in (("convolution", LogMel()), ("operator STFT", StftLogMel())):
        path = folder / "front_end.onnx"
        torch.onnx.export(module.eval(), (waves, lengths), path, dynamo=True, opset_version=onnx.OPSET, verbose=False,
                          input_names=["waves", "lengths"], external_data=False)
        session = session_of(path)
        needed = {one.name for one in session.get_inputs()}
        given = {key: value.numpy() for key, value in (("waves", waves), ("lengths", lengths)) if key in needed}
        yield name, median_ms(lambda session=session, given=given: session.run(None, given))  # type: ignore[misc]
    yield "torch", median_ms(lambda: [log_mel(np.asarray(wave)) for wave in waves])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{date.today()}, {commit()}, torch {torch.__version__}, {cpu_name()}")
    print("| model | graph | MB | largest difference |" + " onnxruntime, ms | torch, ms |" * options.times)
    print("| --- | --- | ---: | ---: |" + " ---: | ---: |" * options.times)
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            for row in compared(name, Path(folder)):
                times = "".join(f" {value:.1f} |" for value in (times_ms(row) if options.times else ()))
                print(described(row) + times, flush=True)
    if options.times:
        with tempfile.TemporaryDirectory() as folder:
            for way, value in front_ends(Path(folder)):
                print(f"log-mels of 8 sounds of 10 s by {way}: {value:.1f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
