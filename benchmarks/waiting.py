"""How long does one wait: for a plan, for the first step of a run, and for validation?

    python download_datasets.py --datasets stamps          # once, for the last two
    python benchmarks/waiting.py                           # about 6 minutes, on 2 idle cores
    python benchmarks/run.py plan_slowest_s first_step_s validation_share_pct

`plan`: the slowest of all sizes and effective batches of docs/memory_en.md, as benchmarks/plans.py plans them, each
anew. `first step`: from the command of the demo (recipes/demo.yaml, tiny) to the record of its first optimizer step,
which is written when the second one is done; prepared data, no plan kept. `validation`: its part of the time of a stage
of the demo in %, the stage in which it is most; two epochs a stage, a grid of examples and checkpoints included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimodal.errors import UserError
from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

ROOT = Path(__file__).resolve().parent.parent
DEMO = ["--config", str(ROOT / "recipes" / "demo.yaml"), "--model-size", "tiny"]
TWO_EPOCHS_A_STAGE = ["training.epochs=6", *(f"stages.{name}.share=1" for name in ("pretrain", "align", "finetune"))]
LOOK_S = 0.05


def slowest_plan_s() -> float:
    """Seconds that the slowest plan of the table takes; prints each."""
    from benchmarks.plans import configured, plans_of, rows

    slowest = 0.0
    for size, batch in rows():
        with tempfile.TemporaryDirectory() as folder:
            config, began = configured(size, batch, folder), time.perf_counter()
            plans_of(config)
            seconds = time.perf_counter() - began
        print(f"plan  {size:6} {batch:6,}  {seconds:5.1f} s", flush=True)
        slowest = max(slowest, seconds)
    return slowest


@contextmanager
def demo(data_root: str, *overrides: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A run of the demo in a new folder, and its log; it is ended with the block."""
    if not (Path(data_root) / "stamps").is_dir():
        raise UserError(f"{data_root}/stamps: not there; python download_datasets.py --datasets stamps")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "out.txt", "w+") as out:
        command = [sys.executable, str(ROOT / "run_training.py"), *DEMO, "--data-root", data_root,
                   "--output-dir", f"{folder}/run", "training.log_every_steps=1", *overrides]
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
        try:
            yield process, Path(folder) / "run" / "logs" / "metrics.jsonl"
        finally:
            process.kill()
            process.wait()


def records(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log so far."""
    return [json.loads(line) for line in log.read_text("utf-8").splitlines(keepends=True)
            if line.endswith("\n")] if log.exists() else []


def first_step_s(data_root: str) -> float:
    """Seconds from the demo's command to the record of its first step."""
    began = time.perf_counter()
    with demo(data_root) as (process, log):
        while not any(record["kind"] == "step" for record in records(log)):
            if process.poll() is not None:
                raise RuntimeError(f"the demo ended with exit code {process.returncode} before its first step")
            time.sleep(LOOK_S)
        return time.perf_counter() - began


def validation_shares_pct(data_root: str) -> dict[str, float]:
    """The part of each stage of the demo that its validations take, in %."""
    with demo(data_root, *TWO_EPOCHS_A_STAGE, "evaluation.resamples=0") as (process, log):
        if process.wait():
            raise RuntimeError(f"the demo ended with exit code {process.returncode}")
        found = records(log)
    return {stage["stage"]: 100 * sum(one["seconds"] for one in found if one["kind"] == "validation"
                                      and one["stage"] == stage["stage"]) / stage["seconds"]
            for stage in found if stage["kind"] == "stage"}


def measured(key: str, data_root: str = str(ROOT / "data")) -> dict[str, float]:
    """One run of what gives `key`."""
    if key == "plan_slowest_s":
        return {key: slowest_plan_s()}
    if key == "first_step_s":
        found = first_step_s(data_root)
        print(f"first step  {found:.1f} s", flush=True)
        return {key: found}
    shares = validation_shares_pct(data_root)
    print("validation  " + "  ".join(f"{stage} {share:.1f} %" for stage, share in shares.items()), flush=True)
    return {key: max(shares.values())}


def main(argv: list[str] | None = None) -> int:
    from benchmarks.run import commit, hardware

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default=str(ROOT / "data"))
    parser.add_argument("--runs", type=int, default=3, help="of the first step")
    args = parser.parse_args(argv)
    print(f"{time.strftime('%Y-%m-%d')}, {commit()}, {hardware()}")
    try:
        for _ in range(args.runs):
            measured("first_step_s", args.data_root)
        measured("validation_share_pct", args.data_root)
        measured("plan_slowest_s")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"load {os.getloadavg()[0]:.1f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
