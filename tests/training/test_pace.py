"""`training.max_hours`, by a clock that steps, validations and the evaluation move: a run ends in time at whatever
speed, its schedules end with it, and it is resumed to the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import refused
from tests.small_runs import SmallRuns, differing, records
from trimodal import checkpoint
from trimodal.training import loop, validation
from trimodal.training.run import Options

RECIPE = ("training.epochs=12", "training.batch_size=8", "stages.pretrain.effective_batch=16",
          "evaluation.max_validation=8", "training.keep_checkpoints=99", "report.gallery_queries=0")
REPEATED = pytest.mark.repetition
SAMPLE_S, VALIDATION_S, EVALUATION_S, START_S = 0.25, 6.0, 16.0, 32.0  # a validation is of at most 24 samples
STEP_S = {"pretrain": 1.0, "align": 2.0, "finetune": 2.0}  # sums of these are exact


class Killed(BaseException):
    """As a kill -9, within this process."""


class Machine:
    """A clock, and how long things take by it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: Callable[[str, float], float]) -> None:
        self.now_s, self.start_s, self.steps, self.dies_after = 1000.0, START_S, 0, 0
        self.lr: dict[str, list[float]] = {}
        train_step, finish, open_run = loop.train_step, loop.finish, loop.open_run
        validation_loss = validation.validation_loss

        def slow_step(run: Any, stage: Any, *rest: Any) -> Any:
            if self.dies_after and self.steps == self.dies_after:
                raise Killed
            self.steps += 1
            name = stage.row.name
            self.now_s += step_s(name, self.now_s - 1000)
            self.lr.setdefault(name, []).append(stage.learning_rate(run.config.training, run.progress.stage_step))
            return train_step(run, stage, *rest)

        def starting(*given: Any) -> Any:
            self.now_s += self.start_s
            return open_run(*given)

        def slow_validation(run: Any, stage: Any, known: Any) -> Any:
            self.now_s += SAMPLE_S * validation.validated_samples(run, stage)
            return validation_loss(run, stage, known)

        def slow_finish(run: Any) -> Any:
            self.now_s += EVALUATION_S
            return finish(run)

        monkeypatch.setattr(loop, "train_step", slow_step)
        monkeypatch.setattr(validation, "validation_loss", slow_validation)
        monkeypatch.setattr(loop, "finish", slow_finish)
        monkeypatch.setattr(loop, "open_run", starting)

    def train(self, small: SmallRuns, folder: Path, *overrides: str, resume: str | None = None) -> float:
        """The seconds that a run took, by this clock."""
        begin_s = self.now_s
        loop.train(small.config(folder, *RECIPE, *overrides), Options("cpu", resume), lambda: self.now_s)
        return self.now_s - begin_s


def at_their_speeds(name: str, _: float) -> float:
    return STEP_S[name]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, at_their_speeds)


def hours(seconds: float) -> str:
    return f"training.max_hours={seconds / 3600!r}"


def last_state(folder: Path) -> dict[str, Any]:
    path = checkpoint.find_latest(folder / "checkpoints")
    assert path
    return checkpoint.load(path)


@pytest.fixture(scope="module")
def whole(small: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run without a limit, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        return folder, Machine(patch, at_their_speeds).train(small, folder)


def test_with_time_enough_nothing_changes(small: SmallRuns, machine: Machine, whole: tuple[Path, float],
                                          tmp_path: Path) -> None:
    folder, took_s = whole
    machine.train(small, tmp_path, hours(1.5 * took_s))
    with_limit, without = last_state(tmp_path), last_state(folder)
    for key in ("model_state_dict", "stage_state", "stage_epochs"):
        assert differing(with_limit[key], without[key]) == []
    assert not [record for record in records(tmp_path, "event") if "max_hours" in record["message"]]


@pytest.mark.parametrize("part", [0.6, pytest.param(0.45, marks=REPEATED), pytest.param(0.9, marks=REPEATED)])
def test_a_run_ends_in_time_with_all_stages_and_schedules_at_their_end(
        small: SmallRuns, machine: Machine, whole: tuple[Path, float], tmp_path: Path, part: float) -> None:
    limit_s = part * whole[1]
    took_s = machine.train(small, tmp_path, hours(limit_s))
    assert took_s <= limit_s + VALIDATION_S
    assert took_s >= limit_s - 80, "and uses the time"
    for rates in machine.lr.values():
        assert rates[-1] < 0.2 * max(rates), "the schedule is at its end"
    epochs = last_state(tmp_path)["stage_epochs"]
    assert list(epochs) == list(STEP_S) and all(1 <= number <= 4 for number in epochs.values())
    stages = {record["stage"]: record for record in records(tmp_path, "stage")}
    assert {name: record["epochs"] for name, record in stages.items()} == epochs
    assert [record["epoch"] for record in records(tmp_path, "validation")] == list(range(1, sum(epochs.values()) + 1))
    told = [record["message"] for record in records(tmp_path, "event") if "ended by" in record["message"]]
    assert told and all("max_hours" in line for line in told)
    assert list(tmp_path.glob("reports/*.md"))


@pytest.mark.parametrize("speeds", [(1, 8, 1), pytest.param((4, 1, 1), marks=REPEATED),
                                    pytest.param((1, 1, 8), marks=REPEATED)])
def test_stages_of_unforeseen_speeds_end_in_time(small: SmallRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                 speeds: tuple[int, int, int]) -> None:
    step_s = dict(zip(STEP_S, map(float, speeds), strict=True))
    took_s = Machine(monkeypatch, lambda name, _: step_s[name]).train(small, tmp_path, hours(200.0))
    assert took_s <= 200 + VALIDATION_S


@pytest.mark.parametrize("factor", [4.0, pytest.param(0.25, marks=REPEATED)])
def test_a_machine_that_changes_its_speed_ends_in_time(small: SmallRuns, monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path, factor: float) -> None:
    changing = Machine(monkeypatch, lambda name, s: STEP_S[name] * (factor if s > 100 else 1))
    assert changing.train(small, tmp_path, hours(200.0)) <= 200 + VALIDATION_S


def test_where_not_even_an_epoch_fits_stages_are_cut_or_left_out(small: SmallRuns, machine: Machine,
                                                                 tmp_path: Path) -> None:
    took_s = machine.train(small, tmp_path, hours(START_S + 30.0))
    assert took_s <= START_S + 30 + 2 * VALIDATION_S + EVALUATION_S
    assert min(last_state(tmp_path)["stage_epochs"].values()) == 0
    assert [record for record in records(tmp_path, "event") if "left out" in record["message"]]
    assert list(tmp_path.glob("reports/*.md"))
    assert machine.train(small, tmp_path, hours(START_S + 30.0), resume="auto") == 0, "it is complete"


@pytest.mark.parametrize("dies_after", [27, *(pytest.param(steps, marks=REPEATED) for steps in (3, 12, 31))])
def test_a_killed_run_goes_on_to_the_same_bits(small: SmallRuns, machine: Machine, whole: tuple[Path, float],
                                               tmp_path: Path, dies_after: int) -> None:
    limit, often = hours(0.5 * whole[1]), "training.save_every_minutes=0.00001"
    machine.train(small, tmp_path / "whole", limit)
    machine.steps, machine.dies_after = 0, dies_after
    with pytest.raises(Killed):
        machine.train(small, tmp_path / "killed", limit, often)
    machine.dies_after, machine.start_s = 0, 0.0  # time passes alike
    machine.now_s += 5000  # but for a gap, which does not count
    machine.train(small, tmp_path / "killed", limit, often, resume="auto")
    one, other = last_state(tmp_path / "whole"), last_state(tmp_path / "killed")
    for key in ("model_state_dict", "stage_state", "stage_epochs"):
        assert differing(one[key], other[key]) == []


def test_a_limit_is_a_number_above_zero(small: SmallRuns, tmp_path: Path) -> None:
    with refused("training.max_hours", 0):
        small.config(tmp_path, "training.max_hours=0")
