"""Does it learn? Trains a recipe over several seeds and prints what held-out captions find, with chance beside it.

    python benchmarks/learning.py                                  # synthetic, seeds 0 1 2: about 20 minutes on 2 cores
    python benchmarks/learning.py --recipe recipes/demo.yaml       # the demo set; fetch it first (run_all.sh --demo)
    python benchmarks/learning.py --recipe recipes/demo_pretrained.yaml
    python benchmarks/learning.py --recipe recipes/demo_bilingual.yaml
    python benchmarks/learning.py training.optimizer=adamw --seeds 0

Every figure comes from the report of a whole run (run_training.py): the weights were chosen on the validation split,
the test split was read once, at the end. "mean" and "sd" are over seeds, "chance" is the exact expectation under a
random order, and the limit that the project sets itself stands in the last column.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def stamps_rows(limit: str, without_symbols: str) -> list[tuple[str, str, str, str]]:
    return [
        ("stamps", "image-text", "image_to_text_R@5", limit), ("stamps", "image-text", "text_to_image_R@5", "-"),
        ("stamps_without_symbols", "image-text", "image_to_text_R@5", without_symbols),
        ("stamps_without_symbols", "image-text", "text_to_image_R@5", "-"),
        ("stamps", "audio-text", "audio_to_text_R@5", "-"), ("stamps", "audio-text", "text_to_audio_R@5", "-")]


ROWS = {  # recipe -> (set, pair, metric, limit as text)
    "synthetic": [
        ("synthetic", "image-text", "image_to_text_R@1", "0.80"),
        ("synthetic", "image-text", "text_to_image_R@1", "0.80"),
        ("synthetic", "audio-text", "audio_to_text_R@1", "0.80"),
        ("synthetic", "audio-text", "text_to_audio_R@1", "0.80"),
    ],
    "demo": stamps_rows("0.20", "2.5 x chance"),
    "demo_pretrained": stamps_rows("0.55", "0.45"),
    "demo_bilingual": [(name, "image-text", f"{direction}_R@5", limit)
                       for name, limit in (("stamps_en", "-"), ("stamps_zh", "5 x chance, 0.8 x en"),
                                           ("stamps_without_symbols_en", "-"), ("stamps_without_symbols_zh", "-"))
                       for direction in ("image_to_text", "text_to_image")],
}


def run(recipe: Path, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """The JSON report of one whole run."""
    command = [sys.executable, str(ROOT / "run_training.py"), "--config", str(recipe), "--output-dir", str(folder),
               "--overwrite", f"training.seed={seed}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(max((folder / "reports").glob("report_*.json")).read_text(encoding="utf-8"))


def pretrained(seed: int) -> dict[str, float]:
    """For `benchmarks/run.py`: R@5 of image to text after the demo on pretrained towers, of all queries and without
    symbols among them, and seconds of training, validation included; features are in the cache before."""
    with tempfile.TemporaryDirectory(prefix="learning_") as folder:
        report = run(ROOT / "recipes" / "demo_pretrained.yaml", seed, [], Path(folder))
    figures = report["evaluation"]["figures"]
    return {"pretrained_stamps_r5": figures["stamps"]["image-text"]["image_to_text_R@5"]["value"],
            "pretrained_stamps_without_symbols_r5":
                figures["stamps_without_symbols"]["image-text"]["image_to_text_R@5"]["value"],
            "pretrained_train_s": sum(stage["seconds"] for stage in report["stages"])}


def bilingual(seed: int) -> dict[str, float]:
    """For `benchmarks/run.py`: R@5 of pictures and Chinese captions after the demo in two languages, over chance, and
    over that of English on the same pictures; the lower of both directions."""
    with tempfile.TemporaryDirectory(prefix="learning_") as folder:
        report = run(ROOT / "recipes" / "demo_bilingual.yaml", seed, [], Path(folder))
    chinese, english = (report["evaluation"]["figures"][f"stamps_{name}"]["image-text"] for name in ("zh", "en"))
    both = ("image_to_text_R@5", "text_to_image_R@5")
    return {"chinese_r5_over_chance": min(chinese[key]["value"] / chinese[key]["chance"] for key in both),
            "chinese_over_english": min(chinese[key]["value"] / english[key]["value"] for key in both)}


def describe(report: dict[str, Any]) -> str:
    stages = report["stages"]
    times = ", ".join(f"{stage['stage']} {stage['seconds']:.0f} s" for stage in stages)
    waits = [stage["data_wait_pct"] or 0.0 for stage in stages]
    return (f"training {sum(stage['seconds'] for stage in stages):.0f} s, validation included ({times}); waiting for "
            f"data {max(waits):.1f} % at most; best weights: epoch {report['best']['epoch']}")


def table(reports: list[dict[str, Any]], rows: list[tuple[str, str, str, str]]) -> str:
    lines = [f"{'set':25}  {'metric':18}  mean   sd     {'by seed':19}  chance  candidates  queries  limit"]
    for name, pair, metric, limit in rows:
        figures = [report["evaluation"]["figures"][name][pair][metric] for report in reports]
        values = [figure["value"] for figure in figures]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        by_seed = " ".join(f"{value:.3f}" for value in values)
        lines.append(f"{name:25}  {metric:18}  {statistics.mean(values):.3f}  {spread:.3f}  {by_seed:19}  "
                     f"{figures[0]['chance']:.3f}  {figures[0]['candidates']:10}  {figures[0]['queries']:7}  {limit}")
    return "\n".join(lines)


def intervals(reports: list[dict[str, Any]]) -> str:
    """The bootstrap interval of each seed's audio figure, since its queries are few."""
    figures = [report["evaluation"]["figures"]["stamps"]["audio-text"]["audio_to_text_R@5"] for report in reports]
    return "audio_to_text_R@5, 95 % interval by seed: " + ", ".join(
        f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" for figure in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "synthetic.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, overrides = parser.parse_known_args()
    reports, temporary = [], Path(tempfile.mkdtemp(prefix="learning_"))
    print(f"{options.recipe.stem}, {datetime.date.today()}, {_cpu()}, {os.cpu_count()} cores", flush=True)
    try:
        for seed in options.seeds:
            report = run(options.recipe, seed, overrides, temporary / str(seed))
            reports.append(report)
            print(f"seed {seed}: {describe(report)}", flush=True)
    finally:
        shutil.rmtree(temporary)
    print(f"torch {reports[0]['environment']['packages']['torch']}, {reports[0]['environment']['precision']}")
    print(table(reports, ROWS[options.recipe.stem]))
    if options.recipe.stem in ("demo", "demo_pretrained"):
        print(intervals(reports))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
