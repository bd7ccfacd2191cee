"""The benchmark that compares settings of a demo without its test split."""

from benchmarks import inner_folds
from trimodal.config import FOLDS
from trimodal.sets.reading import draw_fold
from trimodal.sets.stamps import VAL

CAPTIONS = [f"caption {number}" for number in range(101)]


def test_what_is_test_in_the_demo_is_test_in_all_parts() -> None:
    demo = draw_fold(CAPTIONS, 0, FOLDS, VAL)
    test = {unit for unit, side in demo.items() if side == "test"}
    validated = list[str]()
    for part in range(inner_folds.PARTS):
        sides = inner_folds.inner_sides(reversed(CAPTIONS), part)
        assert {unit for unit, side in sides.items() if side == "test"} == test
        assert set(sides) == set(CAPTIONS)
        validated += [unit for unit, side in sides.items() if side == "val"]
    assert sorted(validated) == sorted(set(CAPTIONS) - test), "each of the others validates once"


def test_figures_are_of_the_lowest_validation_loss_and_of_the_last_epoch() -> None:
    records = [{"kind": "validation", "stage": stage, "epoch": epoch, "loss": loss,
                "metrics": {"image_to_text_R@5": value}}
               for stage, epoch, loss, value in (("pretrain", 1, 0.5, 0.1), ("align", 1, 3.0, 0.1),
                                                 ("align", 2, 2.0, 0.5), ("align", 3, 2.5, 0.6))]
    found = inner_folds.figures_of([*records, {"kind": "stage", "stage": "align"}])
    assert (found["epoch"], found["epochs"]) == (2, 3)
    line = inner_folds.line_of("mean", [found | {"cpu_s": 7.0}])
    assert line.startswith("mean: image_to_text_R@5 0.500/0.600  text_to_image_R@5 -/-")
