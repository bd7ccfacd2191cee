"""Running out of memory, in each phase of a step and in evaluation: the work goes on in smaller parts, and nothing of
the mathematics changes. In float64, where what a CPU's rounding may change is below 1e-12."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.refusals import assert_names, refused
from tests.small_runs import SmallRuns, batches, differing, float64, records, step, trained, weights
from trimodal.memory import devices
from trimodal.objectives import contrastive
from trimodal.training import optimizer, validation
from trimodal.training.run import Run

ON_DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_HOST = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    with float64():
        yield


def fail_once(monkeypatch: pytest.MonkeyPatch, run: Run, where: str, error: Exception) -> None:
    """The first time that `where` is reached, it runs out of memory."""
    left = [error]

    def fail(*_: Any) -> None:
        if left:
            raise left.pop()

    owner, name = {"fusion": (run.model, "fuse"), "loss": (contrastive, "info_nce"),
                   "room for the update": (optimizer.Muon, "reserve")}.get(where, (run.model, "features"))
    method = getattr(owner, name)

    def failing(*given: Any, **named: Any) -> Any:
        if where != "backward":
            fail()
        found = method(*given, **named)
        if where == "backward" and found.requires_grad:
            found.register_hook(fail)
        return found

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(("where", "error", "size"), [
    ("encoding", MemoryError(), 32), ("loss", ON_DEVICE, 32), ("backward", ON_HOST, 16), ("fusion", ON_DEVICE, 16),
    ("room for the update", ON_DEVICE, 16)])
def test_out_of_memory_redoes_the_step_in_smaller_parts(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception,
        size: int) -> None:
    """As if the run had begun with the smaller parts, bit for bit; of the undisturbed one, up to rounding."""
    expected, expected_stage = trained(small, tmp_path / "expected", "finetune", size // 2, 2)
    run = small.open(tmp_path / "failing", micro_batch=size)
    stage = small.stage(run, "finetune")
    random = torch.get_rng_state()
    fail_once(monkeypatch, run, where, error)
    for batch in batches(run, stage):
        step(run, stage, batch)
    assert torch.equal(torch.get_rng_state(), random), "nothing was drawn, so nothing has to be restored"
    assert run.fits["finetune"].micro_batch == dict.fromkeys(("image", "audio", "text", "fusion"), size // 2)
    assert run.fits["align"].micro_batch["image"] == size, "other stages are not concerned"
    assert differing(run.model.state_dict(), expected.model.state_dict()) == []
    assert differing(stage.state_dict(), expected_stage.state_dict()) == []
    [event] = records(tmp_path / "failing", "event")
    assert event["step"] == 1
    assert_names(event["message"], "finetune", (str(error) or "MemoryError").split()[0], f"image {size // 2}")


@pytest.mark.parametrize("where", ["encoding", "loss", "backward", "fusion"])
def test_the_gradient_of_a_redone_step_is_that_of_the_undisturbed_one(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    found = []
    for failing in (False, True):
        run = small.open(tmp_path / str(failing), micro_batch=16)
        stage = small.stage(run, "finetune")
        if failing:
            fail_once(monkeypatch, run, where, ON_DEVICE)
        monkeypatch.setattr(stage.optimizer, "step", lambda *_: (torch.zeros(()), torch.ones(())))
        step(run, stage, batches(run, stage)[0])
        found.append(torch.cat([p.grad.flatten() for p in stage.optimizer.parameters if p.grad is not None]))
    assert len(records(tmp_path / "True", "event")) == 1
    assert not torch.equal(*found), "another order of additions"
    assert found[0].dtype == torch.float64 and (found[0] - found[1]).norm() <= 1e-12 * found[0].norm()


def test_out_of_memory_in_validation_halves_and_goes_on(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.open(tmp_path, micro_batch=16)
    stage = small.stage(run, "finetune")
    expected = validation.validation_loss(run, stage)
    fail_once(monkeypatch, run, "fusion", ON_DEVICE)
    loss, parts = validation.validation_loss(run, stage)
    assert loss == pytest.approx(expected[0], rel=1e-9) and parts.keys() == expected[1].keys()
    [event] = records(tmp_path, "event")
    assert run.fits["finetune"].micro_batch["fusion"] == 8 and event["step"] == run.progress.step


def test_out_of_memory_in_evaluation_halves_its_parts_from_there_on(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.open(tmp_path)
    expected = validation.retrieval_figures(run, validation.encode_validation(run))
    fail_once(monkeypatch, run, "encoding", ON_HOST)
    found = validation.retrieval_figures(run, validation.encode_validation(run))
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(dict(figure)) for name, figure in expected.items())
    [event] = records(tmp_path, "event")
    assert_names(event["message"], "evaluation", 32)
    assert run.fits["evaluation"].micro_batch["image"] == 32, "kept for later evaluations, and saved"


def test_nothing_of_the_failed_step_is_alive_when_its_memory_is_given_back(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.open(tmp_path)
    stage = small.stage(run, "finetune")
    encode, alive = run.model.image.forward, []

    def seen(*given: Any) -> Any:
        tokens = encode(*given)
        alive.append(weakref.ref(tokens.tokens_BND))
        return tokens

    def failing(*_: Any) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(devices, "free_cached", lambda device: left.append([one() is not None for one in alive]))
        raise torch.OutOfMemoryError

    left: list[list[bool]] = []
    monkeypatch.setattr(run.model.image, "forward", seen)
    monkeypatch.setattr(run.model, "fuse", failing)
    step(run, stage, batches(run, stage)[0])
    assert left == [[False]]


def test_out_of_memory_again_and_again_ends_at_one_with_what_to_turn(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.open(tmp_path, micro_batch=8)
    stage = small.stage(run, "align")
    before = weights(run.model)

    def never_fits(*_: Any) -> None:
        raise ON_DEVICE

    monkeypatch.setattr(run.model, "features", never_fits)
    with refused("stages.align", "cpu", 1, "training.batch_size", "memory.budget_gb"):
        step(run, stage, batches(run, stage)[0])
    assert len(records(tmp_path, "event")) == 5  # 4, 2, 1, then recompute of every block, then no tokens kept
    assert differing(run.model.state_dict(), before) == []


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.open(tmp_path)
    stage = small.stage(run, "align")
    fail_once(monkeypatch, run, "encoding", RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        step(run, stage, batches(run, stage)[0])
    assert run.fits["align"].micro_batch["image"] == 32
