"""Memory and time of a full-size retrieval evaluation: 25,000 captions x 5,000 images x 512 dimensions.

    python benchmarks/evaluation_memory.py [--samples 5000 --captions-per-sample 5 --dim 512 --tile 1024]

A matrix of all scores would take 0.5 GiB, and sorting it 1.4 GiB more; a tile takes 4 MiB. Prints what the process
holds at its peak, with and without what Python and torch take themselves.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch

from trimodal.evaluation import metrics


def peak_gib() -> float:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def make_features(samples: int, per_sample: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit features in which a caption is near its image, with two captions in 100 worded as another one is."""
    g = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(samples, dim, generator=g), dim=1)
    captions = torch.randn(samples * per_sample, dim, generator=g)
    captions.mul_(6.0 / dim**0.5).add_(images.repeat_interleave(per_sample, 0))
    texts = torch.arange(len(captions))
    again = torch.randperm(len(captions), generator=g)[: len(captions) // 50]
    texts[again] = texts[again.roll(1)]
    return images, torch.nn.functional.normalize(captions, dim=1), texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--captions-per-sample", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args(argv)
    start_gib = peak_gib()
    images, captions, texts = make_features(args.samples, args.captions_per_sample, args.dim)
    data_gib = peak_gib()
    owners = torch.arange(args.samples).repeat_interleave(args.captions_per_sample)
    began = time.perf_counter()
    figures = metrics.retrieval(images, captions, owners, texts,
                                options=metrics.Options(tile=args.tile, resamples=args.resamples))
    seconds = time.perf_counter() - began
    print(f"{len(captions):,} captions x {len(images):,} images x {args.dim}, tile {args.tile}, "
          f"{torch.get_num_threads()} threads")
    print(f"peak RSS {peak_gib():.2f} GiB: Python and torch {start_gib:.2f}, making the features "
          f"{data_gib - start_gib:.2f}, evaluation {peak_gib() - data_gib:.2f} more; {seconds:.1f} s")
    print(f"{'metric':28} {'value':>9} {'95 % interval':>20} {'chance':>10} {'candidates':>10} {'queries':>8}")
    for name, f in figures.items():
        interval = "-" if f["low"] is None else f"{f['low']:.4f} to {f['high']:.4f}"
        print(f"{name:28} {f['value']:9.4f} {interval:>20} {f['chance']:10.4f} {f['candidates']:10,} {f['queries']:8,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
