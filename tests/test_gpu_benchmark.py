"""The arithmetic of benchmarks/gpu.py, which runs where a GPU is."""

import pytest

from benchmarks.gpu import order
from benchmarks.gpu_worker import busy


@pytest.mark.parametrize(("intervals", "expected"), [
    ([], 0.0), ([(1, 3)], 2.0), ([(5, 6), (1, 3)], 3.0), ([(1, 4), (2, 3), (3, 6)], 5.0), ([(1, 2), (1, 2)], 1.0)])
def test_kernels_that_run_at_once_count_once(intervals: list[tuple[float, float]], expected: float) -> None:
    assert busy(intervals) == expected


def test_the_longest_stages_come_last() -> None:
    cases = order(["base", "large"], [32, 4096], ["align", "finetune"])
    assert [(case.size, case.batch, *case.stages) for case in cases] == [
        ("base", 32, "align", "finetune"), ("large", 32, "align", "finetune"), ("base", 4096, "align"),
        ("large", 4096, "align"), ("base", 4096, "finetune"), ("large", 4096, "finetune")]
