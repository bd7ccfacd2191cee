"""What re-ranking by the matching head gains: R@1 before and after, by seed, on validation and on test data.

    python benchmarks/rerank.py                           # synthetic and demo_pretrained, seeds 0 1 2: half an hour
    python benchmarks/rerank.py --recipes synthetic --seeds 0
    python benchmarks/rerank.py --checkpoints a/best_model.pt b/best_model.pt --recipes demo

Trains each recipe with each seed, or takes checkpoints that are there (of one recipe). The first K candidates of each
query (--depth, 20) are ordered by the head alone ("head") and by its logit plus the contrastive one ("sum", what
evaluate.py does). Which of the two the project takes was decided on the columns "val"; "test" is read once.

The demo on pretrained towers trains no matching head. Here it gets a stage more, which trains the fusion and the heads
alone: plain figures stay as they were. The head of the epoch with the lowest validation loss is taken.

Points of R@1, mean and sd over seeds of the mean of both directions.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.run import ROOT, commit, hardware
from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
import yaml

from benchmarks.learning import run as train
from datasets import Data, load_data
from model import load_model
from trimodal.config import Config, config_from_dict
from trimodal.data.tokenizer import Tokenizer
from trimodal.evaluation import protocols
from trimodal.evaluation.rerank import PairScores, heads_of
from trimodal.memory import devices

SETS = {"synthetic": "synthetic", "demo_pretrained": "stamps", "demo": "stamps"}
MEASURED = ("synthetic", "demo_pretrained")
HEADS_STAGE = {"name": "finetune", "share": 1, "audio_keep": 0.5, "feature_dropout": 0.3, "trainable": ["fusion.*"],
               "lr_factor": 0.167,
               "tasks": [{"inputs": ["image", "text"], "objectives": {"matching": 1.0}},
                         {"inputs": ["audio", "text"], "objectives": {"matching": 1.0}, "passes": 2}]}
PAIRS = {"image-text": ("image_to_text_R@1", "text_to_image_R@1"),
         "audio-text": ("audio_to_text_R@1", "text_to_audio_R@1")}
WEIGHTS = {"head": 0.0, "sum": 1.0}  # of the contrastive logit

Points = dict[tuple[str, str], dict[str, float]]  # (split, pair) -> by "plain" and the names of WEIGHTS


def points_of(checkpoint: Path, name: str, data_root: str, depth: int) -> Points:
    """R@1 in percent, mean of both directions, of one checkpoint on a set."""
    model, state = load_model(checkpoint)
    config = config_from_dict(state["config"], [f"paths.data_root={data_root}", f"data.datasets=[{name}]",
                                                f"evaluation.rerank={depth}", "evaluation.resamples=0"])
    heads = heads_of(state, config, str(checkpoint))
    data = load_data(config, ["val", "test"], tokenizer=Tokenizer.from_json(state["tokenizer"]),
                     concepts=state["concepts"], speakers=state["speakers"])
    device = torch.device("cpu")
    setting = protocols.Setting(device=device, concepts=False,
                                amp=devices.choose_precision(device, config.training.use_amp).dtype)
    found: Points = {}
    for split in ("val", "test"):
        scores = PairScores(model, heads, data, split, config, setting)
        for kind, figures in compare(model, data, split, config, setting, scores, name).items():
            found[split, kind] = figures
    return found


def compare(model: Any, data: Data, split: str, config: Config, setting: protocols.Setting, scores: PairScores,
            name: str) -> dict[str, dict[str, float]]:
    """{pair: {"plain", "head", "sum": R@1 in percent}} of one split, which is encoded once."""
    encoded = protocols.encode_split(model, data, split, config, setting)
    found: dict[str, dict[str, float]] = {pair: {} for pair in PAIRS}
    for way, weight in WEIGHTS.items():
        scores.contrastive_weight = weight
        figures = protocols.score(encoded, data, config, scores)[name]
        for pair, metrics in PAIRS.items():
            found[pair]["plain"] = 50 * sum(figures[pair][metric]["value"] for metric in metrics)
            found[pair][way] = 50 * sum(figures[pair][f"{metric}_reranked"]["value"] for metric in metrics)
    return found


def table(of_recipe: Mapping[str, Sequence[Points]]) -> str:
    lines = ["| recipe | split | pair | seeds | plain R@1 | gain of head | gain of sum |",
             "| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for recipe, seeds in of_recipe.items():
        for split, pair in seeds[0]:
            rows = [points[split, pair] for points in seeds]
            cells = [spread([row["plain"] for row in rows]),
                     *(spread([row[way] - row["plain"] for row in rows], "+") for way in WEIGHTS)]
            lines.append(f"| {recipe} | {split} | {pair} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], sign: str = "") -> str:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.2f} ± {sd:.2f}"


def measure(recipes: Sequence[str], seeds: Sequence[int], depth: int, data_root: str, checkpoints: Sequence[Path] = (),
            overrides: Sequence[str] = ()) -> dict[str, list[Points]]:
    """The points of each recipe by seed; trains what is not among `checkpoints`."""
    found: dict[str, list[Points]] = {recipe: [] for recipe in recipes}
    with contextlib.ExitStack() as stack:
        for recipe in recipes:
            paths = list(checkpoints)
            for seed in seeds if not checkpoints else ():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rerank_")))
                settings = [f"paths.data_root={data_root}", *overrides]
                train(with_heads(recipe, folder), seed, settings, folder / "run")
                paths.append(folder / "run" / "checkpoints" / "best_model.pt")
            for path in paths:
                found[recipe].append(points_of(path, SETS[recipe], data_root, depth))
    return found


def with_heads(recipe: str, folder: Path) -> Path:
    """The recipe's file; of the demo on pretrained towers one in `folder`, with a stage for the heads, as long as what
    it has, and with the tokens that these read."""
    file = ROOT / "recipes" / f"{recipe}.yaml"
    if recipe != "demo_pretrained":
        return file
    values = yaml.safe_load(file.read_text("utf-8"))
    values["model"]["image"]["keep_tokens"], values["model"]["text"]["keep_tokens"] = 49, "all"
    values["training"]["epochs"] *= 2
    values["stages"].append(HEADS_STAGE)
    written = folder / "recipe.yaml"
    written.write_text(yaml.safe_dump(values), "utf-8")
    return written


def gain() -> dict[str, float]:
    """Points of R@1 that the sum gains on test data: mean over pairs and seeds, of the recipe that gains most."""
    found = measure(MEASURED, [0, 1, 2], 20, str(ROOT / "data"))
    return {"rerank_gain_r1": max(statistics.mean(
        figures["sum"] - figures["plain"] for points in seeds
        for (split, _), figures in points.items() if split == "test") for seeds in found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--recipes", nargs="+", choices=SETS, default=MEASURED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depth", type=int, default=20, metavar="K")
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--data-root", default=str(ROOT / "data"), metavar="DIR")
    options, overrides = parser.parse_known_args()
    if options.checkpoints and len(options.recipes) > 1:
        parser.error("--checkpoints: name the one recipe that they are of with --recipes")
    found = measure(options.recipes, options.seeds, options.depth, options.data_root, options.checkpoints, overrides)
    print(f"{hardware()}; {commit()}, {date.today()}; K = {options.depth}\n{table(found)}")


if __name__ == "__main__":
    main()
