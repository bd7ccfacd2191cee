"""Which settings of a demo are better, told without its test split?

    python benchmarks/inner_folds.py                                      # the recipe as it is: about ten minutes
    python benchmarks/inner_folds.py training.learning_rate=1e-3          # with other settings
    python benchmarks/inner_folds.py --recipe recipes/demo.yaml           # towers of our own: a quarter of an hour
    python benchmarks/inner_folds.py --recipe recipes/demo_bilingual.yaml # another recipe; figures by language, too
    python benchmarks/inner_folds.py --folds 0 1 -- training.epochs=30

The captions of train and val are cut into five parts, each of which validates a run that the others train. What is
test in the demo is test in all runs, which end after their last validation, so that it is never scored. Figures are
those of the epoch with the lowest validation loss, of which best_model.pt would be, and of the last epoch. CPU seconds
are of the whole process with its workers that have ended; the first run with some settings of the data fills the cache
within them.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import numpy as np

from benchmarks.beside_open_clip import machine
from benchmarks.run import commit
from trimodal.config import FOLDS, LANGUAGES, load_config
from trimodal.sets.reading import draw_fold

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "demo_pretrained.yaml"
KEYS = ("image_to_text_R@5", "text_to_image_R@5", "audio_to_text_R@5", "text_to_audio_R@5")
PARTS, DRAW = 5, 77  # of the captions that are not test, and the seed by which they are drawn


def inner_sides(units: Iterable[str], part: int) -> dict[str, str]:
    """The side of each distinct caption: those of the demo's test stay there, a fifth of the others is val."""
    sides = draw_fold(units, 0, FOLDS, 0.0)
    rest = [unit for unit, side in sides.items() if side != "test"]
    number = np.random.RandomState(DRAW).permutation(len(rest)) % PARTS
    return sides | {unit: "val" for unit, own in zip(rest, number.tolist(), strict=True) if own == part}


def with_languages(figures_of_all: Callable[[Any, Any], dict[str, Any]], run: Any, encoded: Any) -> dict[str, Any]:
    """The validation figures, and those of pictures and captions in one language, as image_to_text_R@5_zh; none in a
    stage that encodes nothing, such as masked training."""
    from trimodal.evaluation import protocols

    sets = protocols.score(encoded, run.data, run.config) if encoded else {}
    return figures_of_all(run, encoded) | {
        f"{key}_{language}": figure for language in LANGUAGES
        for key, figure in sets.get(f"stamps_{language}", {}).get("image-text", {}).items()}


def train(recipe: Path, part: int, settings: Sequence[str], data_root: str) -> dict[str, Any]:
    """Figures of a run that the part `part` validates, and what it took."""
    from trimodal.sets import stamps
    from trimodal.training import loop, validation

    figures = partial(with_languages, validation.retrieval_figures)
    stamps.draw_fold = lambda units, *_: inner_sides(units, part)
    loop.finish = lambda run: None  # type: ignore[assignment,return-value]  # which reads the test split
    begin_s = cpu_s()
    with tempfile.TemporaryDirectory(prefix="inner_folds_") as folder:
        config = load_config(recipe, ["model.size=tiny", f"training.seed={part}", *settings,
                                      f"paths.data_root={json.dumps(data_root)}", f"paths.output_dir={folder}/run"])
        with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
              mock.patch.object(validation, "retrieval_figures", figures)):
            loop.train(config, loop.Options("cpu"))
        lines = Path(folder, "run", "logs", "metrics.jsonl").read_text("utf-8").splitlines()
    return figures_of([json.loads(line) for line in lines]) | {"cpu_s": cpu_s() - begin_s}


def figures_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the epoch of the last stage with the lowest validation loss, and of the last."""
    validations = [record for record in records if record["kind"] == "validation"]
    validations = [record for record in validations if record["stage"] == validations[-1]["stage"]]
    best = min(validations, key=lambda record: record["loss"])
    return {"best": best["metrics"], "last": validations[-1]["metrics"], "epoch": best["epoch"],
            "epochs": validations[-1]["epoch"]}


def cpu_s() -> float:
    """CPU seconds of this process and of its workers that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def line_of(label: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Means over some runs: each figure of the best epoch, and behind a slash of the last."""
    def mean(which: str, key: str) -> str:
        values = [one[which][key] for one in found if key in one[which]]
        return f"{statistics.mean(values):.3f}" if values else "-"

    by_language = [f"{key}_{language}" for language in LANGUAGES for key in KEYS]
    keys = [*KEYS, *(key for key in by_language if key in found[0]["last"])]
    cells = [f"{key} {mean('best', key)}/{mean('last', key)}" for key in keys]
    return (f"{label}: {'  '.join(cells)}  epoch {statistics.mean(one['epoch'] for one in found):.0f} of "
            f"{found[0]['epochs']}, {statistics.mean(one['cpu_s'] for one in found):.0f} CPU s")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings of the runs, as run_training.py takes them")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--folds", nargs="+", type=int, choices=range(PARTS), default=list(range(PARTS)))
    parser.add_argument("--data-root", default=str(ROOT / "data"))
    options = parser.parse_args(argv)
    print(f"{date.today().isoformat()}, {commit()}, {machine()}", flush=True)
    found = []
    for part in options.folds:
        found.append(train(options.recipe, part, options.settings, options.data_root))
        print(line_of(f"part {part}", found[-1:]), flush=True)
    print(line_of("mean", found))


if __name__ == "__main__":
    main()
