"""Which ways of learning earn their place? Each option of training by itself, against the recipe, at equal CPU time.

    python download_datasets.py --datasets stamps emoji
    python benchmarks/ablation.py screen                      # each option on stamps and synthetic, one seed; 2 hours
    python benchmarks/ablation.py best                        # best four and recipe, three seeds, emoji too; 1.5 hours
    python benchmarks/ablation.py table                       # all that has been run
    python benchmarks/ablation.py folds --against DIR         # this tree and an older one, as they are: half an hour
    python benchmarks/ablation.py vocabulary                  # how many held-out captions have words that were trained

What an epoch of each stage costs with an option is measured first, in CPU seconds, so other work on the machine does
not count. Then it has as many epochs as come nearest to the time of the recipe's; the table has the CPU seconds that
the whole took. Figures are those of the validation split at the epoch that best_model.pt would be of. Runs are ended
after their last validation, so that nothing here reads the test split before `folds`. What has been run is kept in
ablation.json beside this file, failures too: the same command goes on where it was stopped, and `--runs 1` ends it
after one run. Figures are R@5 on stamps, and on emoji, which has the demo's recipe with half of its epochs. On
`synthetic`, whose R@5 is 1 with every option, they are R@1, after an eighth of its recipe's passes. What ranks an
option is the share of all queries that it answers, less the recipe's, mean over sets: each query counts once, or the
ten sounds of stamps would weigh as much as its 75 pictures.

`folds` reads test splits: of each fifth of the captions in turn, so that every captioned picture and every sound is a
query once. A figure is over the queries of all five, its interval Wilson's, 95 %.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

from benchmarks.beside_open_clip import cpu_s, machine
from benchmarks.run import commit
from datasets import load_data
from trimodal.config import Config, load_config
from trimodal.data.concepts import content_words
from trimodal.files import replacing

ROOT = Path(__file__).resolve().parent.parent
FOUND = Path(__file__).with_suffix(".json")
RECIPES = {"stamps": "demo", "synthetic": "synthetic", "emoji": "demo"}
SCREENED = ("stamps", "synthetic")
BEFORE = ("stages.pretrain.share=3", "stages.align.share=12")  # of the demo, until it took what was found here
USUAL: dict[str, tuple[str, ...]] = {
    "stamps": BEFORE, "synthetic": ("stages.align.tasks.0.passes=0.05", "stages.align.tasks.1.passes=0.6"),
    "emoji": (*BEFORE, "data.datasets=[emoji]", "training.epochs=9")}
BEST, SEEDS, FOLDS = 4, (0, 1, 2), range(5)
METRICS = {"stamps": "R@5", "synthetic": "R@1", "emoji": "R@5"}
QUERIES = {"stamps": {"image-text": 75, "audio-text": 10}}  # in validation; as many of each where none stand
PAIRS = {"image-text": ("image_to_text", "text_to_image"), "audio-text": ("audio_to_text", "text_to_audio")}
LAST = "finetune"  # stage of both recipes
COST = -1  # in the place of the seed: what an epoch costs


def objectives(**weights: float) -> tuple[str, ...]:
    """Of align's tasks of text, beside contrast."""
    words = json.dumps({"contrastive": 1.0, **weights})
    return tuple(f"stages.align.tasks.{task}.objectives={words}" for task in (0, 1))


OPTIONS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "words 0.2": objectives(words=0.2), "words 1.0": objectives(words=1.0),
    "masked words 0.3": objectives(masked_words=0.3), "masked words 1.0": objectives(masked_words=1.0),
    "words 0.2, masked words 0.3": objectives(words=0.2, masked_words=0.3),
    "soft targets 0.2": ("training.soft_targets=0.2",), "soft targets 0.5": ("training.soft_targets=0.5",),
    "soft targets 0.8": ("training.soft_targets=0.8",),
    "soft targets 0.5, words 0.2": ("training.soft_targets=0.5", *objectives(words=0.2)),
    "false negatives 0.8": ("training.false_negatives=0.8",),
    "soft targets 0.2, false negatives 0.8": ("training.soft_targets=0.2", "training.false_negatives=0.8"),
    "less pretraining": ("stages.pretrain.share=0.5",), "more pretraining": ("stages.pretrain.share=6",),
    "less finetuning": ("stages.finetune.share=0.5",), "more finetuning": ("stages.finetune.share=6",),
    "sigmoid": ("training.contrastive_loss=sigmoid",), "adamw": ("training.optimizer=adamw",),
    "average of the weights": ("training.ema_decay=0.99",),
    "other captions per visit": ("training.captions_per_visit=1",),
}
ONLY: dict[str, tuple[str, ...]] = {
    "other captions per visit": ("synthetic",),  # a picture of the others has one caption
    **dict.fromkeys(("less pretraining", "more pretraining", "less finetuning", "more finetuning"),
                    ("stamps", "emoji"))}  # shares of the demo's recipe


# ---- runs on the validation split --------------------------------------------------------------------------------


def found() -> list[dict[str, Any]]:
    """All runs so far."""
    return json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else []


def keep(one: Mapping[str, Any]) -> None:
    with replacing(FOUND, "w") as file:
        rows = ",\n ".join(map(json.dumps, [*found(), one]))
        file.write(f"[\n {rows}\n]\n")


def names_of(name: str) -> list[str]:
    return [option for option in OPTIONS if name in ONLY.get(option, RECIPES)]


def recipe_of(name: str, option: str) -> Config:
    return load_config(ROOT / "recipes" / f"{RECIPES[name]}.yaml", [*USUAL[name], *OPTIONS[option]])


@dataclass
class Watched:
    """A run up to its last validation: the records of its log, CPU seconds at each validation and in all, wall time;
    and what went wrong, if it did."""

    records: list[dict[str, Any]] = field(default_factory=list)
    validated_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    seconds: float = 0.0
    problem: str = ""

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "validation"]

    @property
    def is_over(self) -> bool:
        return any(record["kind"] == "stage" and record["stage"] == LAST for record in self.records)


def watch(name: str, settings: Sequence[str], data_root: Path) -> Watched:
    """Train the recipe of a set with some settings."""
    run, begin_s = Watched(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ablation_") as temporary:
        said, log = Path(temporary, "said.txt"), Path(temporary, "run", "logs", "metrics.jsonl")
        with open(said, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "run_training.py", "--config", f"recipes/{RECIPES[name]}.yaml", "--model-size", "tiny",
                 "--data-root", str(data_root), "--output-dir", f"{temporary}/run", *USUAL[name], *settings],
                cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None and not run.is_over:
                    time.sleep(0.1)
                    run.cpu_s = max(run.cpu_s, cpu_s(process.pid))
                    lines = log.read_text("utf-8").split("\n")[:-1] if log.exists() else []
                    run.records = [json.loads(line) for line in lines]
                    run.validated_s += [run.cpu_s] * (len(run.validations) - len(run.validated_s))
            finally:
                run.seconds = time.perf_counter() - begin_s
                if process.poll() is None:
                    process.kill()
                process.wait()
        if not run.is_over:
            run.problem = (said.read_text("utf-8").strip().splitlines() or ["ended without a word"])[-1][:300]
    return run


def costs(name: str, option: str, data_root: Path) -> dict[str, Any]:
    """CPU seconds of an epoch of each stage with an option, validation included: of the second of two."""
    stages = recipe_of(name, option).stages
    run = watch(name, [*OPTIONS[option], *(f"stages.{row.name}.share=1" for row in stages),
                       f"training.epochs={2 * len(stages)}"], data_root)
    if run.problem:
        return {"problem": run.problem}
    return {"cost": {row.name: round(run.validated_s[2 * i + 1] - run.validated_s[2 * i], 2)
                     for i, row in enumerate(stages)}}


def cost_of(name: str, option: str) -> dict[str, float]:
    return next(one["cost"] for one in found() if (one["set"], one["option"]) == (name, option) and "cost" in one)


def equal_epochs(name: str, option: str) -> int:
    """Epochs with an option that take as long as the recipe's without."""
    def per_epoch(option: str) -> float:
        stages, cost = recipe_of(name, option).stages, cost_of(name, option)
        return sum(row.share * cost[row.name] for row in stages) / sum(row.share for row in stages)

    return round(recipe_of(name, "recipe").training.epochs * per_epoch("recipe") / per_epoch(option))


def train(name: str, option: str, seed: int, data_root: Path) -> dict[str, Any]:
    """Figures, time and steps of one run; or what went wrong."""
    epochs = equal_epochs(name, option)
    run = watch(name, [*OPTIONS[option], f"training.seed={seed}", f"training.epochs={epochs}"], data_root)
    facts = {"epochs": epochs, "seconds": round(run.seconds, 1), "cpu_s": round(run.cpu_s, 1)}
    return facts | ({"problem": run.problem} if run.problem else figures_of(run.records, METRICS[name]))


def figures_of(records: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Of the epoch of the last stage with the lowest validation loss; and the steps of all stages."""
    best = min((record for record in records if record["kind"] == "validation" and record["stage"] == LAST),
               key=lambda record: record["loss"])
    metrics = best["metrics"]
    values = {way: metrics[key] for ways in PAIRS.values() for way in ways if (key := f"{way}_{metric}") in metrics}
    return {"figures": {pair: statistics.mean(values[way] for way in ways) for pair, ways in PAIRS.items()
                        if ways[0] in values},
            "metrics": {f"{way}_{metric}": round(value, 4) for way, value in values.items()},
            "steps": {record["stage"]: record["steps"] for record in records if record["kind"] == "stage"}}


def facts_of(name: str, option: str, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    return {"set": name, "option": option, "seed": seed, "settings": list(settings), "machine": machine(),
            "commit": commit(), "date": date.today().isoformat()}


def go_on(wanted: Sequence[tuple[str, str, int]], options: argparse.Namespace) -> None:
    """Do the runs of (set, option, seed) that have not been done, at most `--runs` of them, each after what its epochs
    cost, and those of the recipe, is known."""
    costly = [(name, one, COST) for name, option, _ in wanted for one in ("recipe", option)]
    known = {(one["set"], one["option"], one["seed"]) for one in found()}
    failed = {(one["set"], one["option"]) for one in found() if "problem" in one and one["seed"] == COST}
    left = [one for one in dict.fromkeys([*costly, *wanted]) if one not in known and one[:2] not in failed]
    for number, (name, option, seed) in enumerate(left[:options.runs]):
        what = "cost" if seed == COST else f"seed {seed}"
        print(f"{name}, {option}, {what}: {len(left) - number} runs left", flush=True)
        if (name, option) in failed:
            continue
        facts = facts_of(name, option, seed, OPTIONS[option])
        one = costs(name, option, options.data_root) if seed == COST else train(name, option, seed, options.data_root)
        keep(facts | one)
        if "problem" in one and seed == COST:
            failed.add((name, option))
        print(f"  {one.get('problem') or one.get('cost') or one['figures']}", flush=True)


# ---- which is best -----------------------------------------------------------------------------------------------


def answered(one: Mapping[str, Any]) -> float:
    """Share of the queries that a run answers, of both pairs and all ways."""
    figures, known = one["figures"], QUERIES.get(one["set"], {})
    queries = {pair: known.get(pair, 1) for pair in figures}
    return sum(figures[pair] * queries[pair] for pair in figures) / sum(queries.values())


def gains(rows: Iterable[Mapping[str, Any]], seeds: Sequence[int] = SEEDS, sets: Sequence[str] = tuple(RECIPES)
          ) -> dict[str, list[float]]:
    """Option -> what it gains over the recipe of the same set and seed, of each seed the mean over the sets that it is
    for; the best option first. Options of which a run is missing or failed are left out."""
    by_run = {(one["set"], one["option"], one["seed"]): answered(one) for one in rows if "figures" in one}
    found = {}
    for option in OPTIONS:
        own = [name for name in sets if option in names_of(name)]
        if own and all((name, one, seed) in by_run for name in own for seed in seeds for one in (option, "recipe")):
            found[option] = [statistics.mean(by_run[name, option, seed] - by_run[name, "recipe", seed] for name in own)
                             for seed in seeds]
    return dict(sorted(found.items(), key=lambda one: -statistics.mean(one[1])))


def finalists(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The best options of the screening, and the recipe."""
    return ["recipe", *[option for option in gains(rows, SEEDS[:1], SCREENED) if option != "recipe"][:BEST]]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every option's figures (of METRICS), by set: mean over seeds and each seed's; CPU seconds; steps."""
    lines = [f"{'set':10} {'option':38} {'seeds':5} {'image-text':25} {'audio-text':25} {'CPU s':>5} {'steps':>5}"]
    for name in RECIPES:
        for option in names_of(name):
            own = sorted((one for one in rows if (one["set"], one["option"]) == (name, option)),
                         key=lambda one: one["seed"])
            good = [one for one in own if "figures" in one]
            lines += [f"{name:10} {option:38} failed: {one['problem']}" for one in own if "problem" in one]
            cells = []
            for pair in PAIRS:
                values = [one["figures"][pair] for one in good if pair in one["figures"]]
                each = " ".join(f"{value:.3f}" for value in values)
                cells.append(f"{statistics.mean(values):.3f} ({each})" if values else "-")
            if good:
                lines.append(f"{name:10} {option:38} {len(good):5} {cells[0]:25} {cells[1]:25} "
                             f"{statistics.mean(one['cpu_s'] for one in good):5.0f} "
                             f"{statistics.mean(sum(one['steps'].values()) for one in good):5.0f}")
    lines.append("gain over the recipe in queries answered, mean of stamps and synthetic, seed 0: " + ", ".join(
        f"{option} {one:+.3f}" for option, (one,) in gains(rows, SEEDS[:1], SCREENED).items()))
    lines.append("mean of all three sets, three seeds: " + ", ".join(
        f"{option} {statistics.mean(each):+.3f} ({' '.join(f'{one:+.3f}' for one in each)})"
        for option, each in gains(rows).items()))
    return "\n".join(lines)


# ---- folds of the test split -------------------------------------------------------------------------------------


KEYS = {"scratch_stamps_r5": ("image-text", "image_to_text_R@5"),
        "scratch_stamps_audio_r5": ("audio-text", "audio_to_text_R@5")}
OLDER = """
import importlib, itertools, sys
sys.path.insert(0, "")
try:
    sets = importlib.import_module("trimodal.sets.stamps")
except ImportError:
    sets = importlib.import_module("readers")
fold, draw = int(sys.argv.pop(1)), sets.draw_splits
def folded(units, test, val):
    order = list(draw(units, 0, 0))
    first, last = (round(len(order) * part / 5) for part in (fold, fold + 1))
    sides = ["test"] * (last - first) + ["val"] * val
    return dict(itertools.zip_longest(order[first:] + order[:first], sides, fillvalue="train"))
sets.draw_splits = folded
import run_training
sys.exit(run_training.main())
"""  # an older tree, unchanged, with the same folds as `data.fold`


def test_fold(fold: int, data_root: Path, tree: Path | None = None) -> dict[str, Any]:
    """The test figures of one fold of stamps by name of KEYS, and the seconds of training. `tree`: an older one, whose
    cache is its own."""
    with tempfile.TemporaryDirectory(prefix="folds_") as temporary:
        if tree is None:
            program = ["run_training.py", f"data.fold={fold}"]
        else:
            program = ["-c", OLDER, str(fold), f"data.cache_dir={temporary}/cache"]
        subprocess.run([sys.executable, *program, "--config", "recipes/demo.yaml", "--model-size", "tiny",
                        "--data-root", str(data_root), "--output-dir", f"{temporary}/run"],
                       cwd=tree or ROOT, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(next(Path(temporary, "run", "reports").glob("report_*.json")).read_text("utf-8"))
    figures = report["evaluation"]["figures"]["stamps"]
    return {"figures": {key: {name: figures[pair][metric][name] for name in ("value", "queries", "chance")}
                        for key, (pair, metric) in KEYS.items()},
            "seconds": sum(stage["seconds"] for stage in report["stages"])}


def pooled(folds: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float, float, int]:
    """Share of right answers over the queries of all folds, its interval, and their number."""
    number = sum(one["figures"][key]["queries"] for one in folds)
    value = sum(one["figures"][key]["value"] * one["figures"][key]["queries"] for one in folds) / number
    return value, *wilson(value, number), number


def wilson(share: float, number: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share that was counted among `number`."""
    middle, half = share + z * z / (2 * number), z * math.sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2)
    return (middle - half) / (1 + z * z / number), (middle + half) / (1 + z * z / number)


def print_folds(label: str, folds: Sequence[Mapping[str, Any]]) -> None:
    for key, (_, metric) in KEYS.items():
        value, low, high, number = pooled(folds, key)
        each = " ".join(f"{one['figures'][key]['value']:.3f}" for one in folds)
        chance = statistics.mean(one["figures"][key]["chance"] for one in folds)
        print(f"{label:38} {metric:18} {value:.3f} [{low:.3f}, {high:.3f}] of {number} queries, chance {chance:.3f}; "
              f"by fold {each}; training {statistics.mean(one['seconds'] for one in folds):.0f} s", flush=True)


def compare(sides: Mapping[str, Path | None], data_root: Path, runs: int | None = None
            ) -> dict[str, list[dict[str, Any]]]:
    """The folds of each tree (None: this one), in turns, by label: those that are kept, and at most so many `runs`
    more."""
    for fold in FOLDS:
        for label, tree in sides.items():
            if _kept(label, fold) or runs == 0:
                continue
            runs = runs and runs - 1
            keep(facts_of("folds", label, fold, ()) | {"test": test_fold(fold, data_root, tree)})
            print(f"{label}: fold {fold} done", flush=True)
    folds = {label: [one["test"] for fold in FOLDS if (one := _kept(label, fold))] for label in sides}
    for label, done in folds.items():
        if len(done) == len(FOLDS):
            print_folds(label, done)
    return folds


def _kept(label: str, fold: int) -> dict[str, Any]:
    return next((one for one in found() if (one["set"], one["option"], one["seed"]) == ("folds", label, fold)), {})


def print_known_words(data_root: Path) -> None:
    """How many held-out pictures have a caption of which a content word, and of which the last one, is in a training
    caption of the same fold: what a model that begins with random weights may know."""
    shares, numbers = [], []
    for fold in FOLDS:
        tables = load_data(load_config(ROOT / "recipes" / "demo.yaml", [
            f"data.fold={fold}", f"paths.data_root={json.dumps(str(data_root))}"]), ["train", "test"]).tables
        captions = {name: [content_words(table.captions[i].lower()) for i in range(len(table.captions))]
                    for name, table in tables.items()}
        trained = {word for words in captions["train"] for word in words}
        numbers.append(len(captions["train"]))
        test = tables["test"]
        own = [captions["test"][first:end] for first, end in itertools.pairwise(test.caption_offsets.tolist())]
        queries = [words for words, has_image in zip(own, test.has_image.tolist(), strict=True) if words and has_image]
        shares += [(any(trained & set(words) for words in one), any(words and words[-1] in trained for words in one))
                   for one in queries]
    known, last = (statistics.mean(column) for column in zip(*shares, strict=True))
    print(f"{len(shares)} held-out pictures: {known:.3f} have a caption with a word of a training caption, {last:.3f} "
          f"one whose last word is one; {min(numbers)} to {max(numbers)} training captions")


def own_label() -> str:
    return f"folds: {commit().removesuffix('+')}"


def measured() -> dict[str, float]:
    """For `benchmarks/run.py`: R@5 of the recipe as it is, over five folds, which may have been trained already."""
    label = own_label()
    folds = compare({label: None}, ROOT / "data")[label]
    return {key: pooled(folds, key)[0] for key in KEYS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["screen", "best", "table", "folds", "vocabulary"])
    parser.add_argument("--runs", type=int, help="end after so many runs (default: all)")
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), help="options to screen (default: all)")
    parser.add_argument("--sets", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="of `best` (default: all)")
    parser.add_argument("--against", type=Path, help="folds: an older tree of this project")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder with the sets (default ./data)")
    options = parser.parse_args(argv)
    options.data_root = options.data_root.resolve()
    print(f"{date.today().isoformat()}, {commit()}, {machine()}", flush=True)
    rows = [one for one in found() if one["set"] in RECIPES]
    if options.what == "screen":
        go_on([(name, option, SEEDS[0]) for option in options.only or OPTIONS for name in options.sets
               if name in SCREENED and option in names_of(name)], options)
    elif options.what == "best":
        go_on([(name, option, seed) for seed in options.seeds for option in finalists(rows) for name in options.sets
               if option in names_of(name)], options)
    elif options.what == "folds":
        older = {f"folds: {options.against.name}": options.against.resolve()} if options.against else {}
        compare({own_label(): None, **older}, options.data_root, options.runs)
        return
    elif options.what == "vocabulary":
        print_known_words(options.data_root)
        return
    print(table([one for one in found() if one["set"] in RECIPES]))


if __name__ == "__main__":
    main()
