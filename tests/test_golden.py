"""Twenty losses of a seeded run over all three stages equal the committed ones: a change of the mathematics shows here.

    python tests/test_golden.py            # print the losses as they are now
    python tests/test_golden.py --renew    # write them to tests/golden/losses.txt, after a change that is meant

In float64; what another CPU changes comes in by its float32 log-mels, kept in float16: filters that differ in their
last bits moved losses by 4e-6. The limit is 1e-4 of each loss.
"""

import contextlib
import copy
import io
import json
import math
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.small_runs import RECIPE, float64, records
from trimodal.config import config_from_dict
from trimodal.training.loop import train
from trimodal.training.run import Options

GOLDEN = Path(__file__).with_name("golden") / "losses.txt"
HEADER = """\
# Losses of the first twenty steps of tests/test_golden.py: stage, task, step, loss.
# To renew them after a change that is meant to change the mathematics: python tests/test_golden.py --renew
"""


def losses(folder: Path) -> list[tuple[str, str, int, float]]:
    """Stage, task, step and loss of twenty steps: 6 of pretrain, 8 of align in two epochs, 6 of finetune in three."""
    recipe = copy.deepcopy(RECIPE)
    recipe["training"] |= {"epochs": 6, "captions_per_visit": 2}
    for stage, share in zip(recipe["stages"], (1, 2, 3), strict=True):
        stage["share"] = share
    recipe["report"] = {"gallery_queries": 0}
    recipe["evaluation"] |= {"max_validation": 4}
    recipe["paths"] = {"data_root": str(folder / "data"), "output_dir": str(folder / "run")}
    with float64(), contextlib.redirect_stdout(io.StringIO()):
        train(config_from_dict(recipe), Options("cpu"))
    return [(line["stage"], line["task"], line["step"], line["loss"]) for line in records(folder / "run", "step")]


def as_text(found: list[tuple[str, str, int, float]]) -> str:
    return HEADER + "".join(f"{stage} {task} {step} {loss:.8g}\n" for stage, task, step, loss in found)


def read() -> list[tuple[str, str, int, float]]:
    rows = [line.split() for line in GOLDEN.read_text("utf-8").splitlines() if not line.startswith("#")]
    return [(stage, task, int(step), float(loss)) for stage, task, step, loss in rows]


def test_the_losses_are_those_of_before(tmp_path: Path) -> None:
    found, expected = losses(tmp_path), read()
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    apart = {f"{one[0]} step {one[2]}": f"{one[3]:.8g}, was {other[3]:.8g}"
             for one, other in zip(found, expected, strict=True) if not math.isclose(one[3], other[3], rel_tol=1e-4)}
    assert not apart, f"is this change meant? Then renew them as {GOLDEN.name} says. {json.dumps(apart, indent=1)}"


def test_the_committed_file_is_what_renewing_writes() -> None:
    expected = read()
    assert GOLDEN.read_text("utf-8") == as_text(expected)
    assert [row[2] for row in expected] == list(range(1, 21))
    assert [row[0] for row in expected] == ["pretrain"] * 6 + ["align"] * 8 + ["finetune"] * 6


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        text = as_text(losses(Path(place)))
    if "--renew" in sys.argv:
        GOLDEN.write_text(text, "utf-8")
    print(text, end="")
