"""Steps that are not finite: where it began is found, and in which samples; nothing else moves. Figures of finite steps
reach the monitor."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.killing import OFTEN
from tests.narrow import part_of
from tests.ranks import in_ranks
from tests.refusals import assert_names, refused
from tests.small_runs import SmallRuns, batches, differing, records, step, weights
from trimodal import checkpoint, distributed
from trimodal.data.batches import Batch
from trimodal.errors import TrainingError
from trimodal.memory import devices
from trimodal.training import loop
from trimodal.training import run as run_module
from trimodal.training.diagnostics import guessing_loss
from trimodal.training.loop import Stage, StepLog
from trimodal.training.run import Options, Run
from trimodal.training.saving import Saver
from trimodal.training.signals import Interruption


def opened(small: SmallRuns, folder: Path, *overrides: str) -> tuple[Run, Stage, list[Batch]]:
    """Four batches of eight pictures and texts."""
    run = small.open(folder, "training.batch_size=8", *overrides)
    stage = small.stage(run, "align")
    return run, stage, batches(run, stage)[:4]


def take(run: Run, stage: Stage, given: list[Batch]) -> None:
    log = StepLog(run, stage, epoch=1)
    for batch in given:
        log.add(step(run, stage, batch), batch, len(batch.keys))
    log.flush()


def found(folder: Path) -> dict[str, Any]:
    """What was found out about the only step of a run that was not finite."""
    [event] = records(folder, "event")
    assert_names(event["message"], event["step"], *event["parts"], *event["name"].split(), *event["samples"])
    return {name: event[name] for name in ("step", "parts", "found", "name")} | {"samples": event["samples"]}


def changing(change: Callable[[Tensor], Tensor]) -> Any:
    """A forward hook that changes the tokens of a tower."""
    return lambda module, given, tokens: tokens._replace(tokens_BND=change(tokens.tokens_BND))


def spoil_marked(run: Run) -> None:
    """From now on pictures of nothing but sevens come out of their encoder as no numbers."""
    def spoil(module: nn.Module, given: Any, tokens: Any) -> Any:
        marked = (given[0] == 7).flatten(1).all(1)
        return tokens._replace(tokens_BND=tokens[0].masked_fill(marked[:, None, None], float("nan")))

    run.model.image.register_forward_hook(spoil)


def mark(batch: Batch, row: int) -> Batch:
    assert batch.images is not None
    images = batch.images.clone()
    images[row] = 7
    return dataclasses.replace(batch, images=images)


# ---- where it began ----------------------------------------------------------------------------------------------


UP = "model.text.blocks.blocks.1.up (float32)"


def overflow(run: Run) -> None:
    with torch.no_grad():
        run.model.get_parameter("text.blocks.blocks.1.up.weight").fill_(3e38)


def test_the_first_module_whose_output_is_not_finite_is_named(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, (first, *_) = opened(small, tmp_path)
    overflow(run)
    take(run, stage, [first])
    assert found(tmp_path) == {"step": 1, "parts": ["contrastive_image_text"], "found": "output", "name": UP,
                               "samples": first.keys[:3]}
    [event] = records(tmp_path, "event")
    assert event["of"] == 8
    assert_names(event["message"], "[align] step 1", 5)


def test_it_is_named_in_micro_batches_as_well(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, (first, *_) = opened(small, tmp_path)
    run.fits["align"] = devices.Fit(dict.fromkeys(("image", "audio", "text", "fusion"), 3), {})
    overflow(run)
    take(run, stage, [first])
    assert found(tmp_path)["found"] == "output" and found(tmp_path)["name"] == UP


def test_where_a_gradient_first_stops_being_finite_is_named_not_where_it_ends_up(small: SmallRuns,
                                                                                 tmp_path: Path) -> None:
    run, stage, (first, *_) = opened(small, tmp_path)

    def spoil(module: nn.Module, given: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    run.model.get_submodule("text.blocks.blocks.1.down").register_forward_hook(spoil)
    take(run, stage, [first])
    assert found(tmp_path)["parts"] == [] and found(tmp_path)["found"] == "gradient"
    assert found(tmp_path)["name"].startswith("model.text.blocks.blocks.1.down.")


def test_samples_whose_features_are_not_finite_are_named(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, (first, *_) = opened(small, tmp_path)
    spoil_marked(run)
    take(run, stage, [mark(first, 5)])
    assert found(tmp_path)["name"] == "model.image (float32)" and found(tmp_path)["samples"] == [first.keys[5]]


def test_captions_whose_features_are_not_finite_name_their_samples(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, (first, *_) = opened(small, tmp_path, "training.captions_per_visit=2")
    assert first.caption_owner is not None and len(first.caption_owner) == 16

    def spoil(tokens: Tensor) -> Tensor:
        return tokens.masked_fill((torch.arange(len(tokens)) == 11)[:, None, None], float("nan"))

    run.model.text.register_forward_hook(changing(spoil))
    take(run, stage, [first])
    assert found(tmp_path)["samples"] == [first.keys[int(first.caption_owner[11])]]


def test_sounds_that_are_not_finite_are_told_from_faults_of_the_model(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, _ = opened(small, tmp_path)
    batch = batches(run, stage, task=1)[0]
    assert batch.audio is not None
    batch.audio[2, 7, 3] = float("inf")
    log = StepLog(run, stage, epoch=1)
    log.add(step(run, stage, batch, task=1), batch, 8)
    log.flush()
    assert found(tmp_path) == {"step": 1, "parts": ["contrastive_audio_text"], "found": "sounds", "name": "",
                               "samples": [batch.keys[2]]}


def test_weights_that_are_not_finite_are_told(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, (first, *_) = opened(small, tmp_path)
    with torch.no_grad():
        run.model.get_parameter("image.blocks.blocks.1.qkv.weight")[3, 4] = float("nan")
    take(run, stage, [first])
    assert found(tmp_path)["found"] == "weights"
    assert found(tmp_path)["name"] == "model.image.blocks.blocks.1.qkv.weight"


def test_what_does_not_come_back_is_said_to_have_gone(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, (first, second, *_) = opened(small, tmp_path)
    handle = run.model.text.register_forward_hook(changing(lambda tokens: tokens * float("nan")))
    log = StepLog(run, stage, epoch=1)
    log.add(step(run, stage, first), first, 8)
    handle.remove()
    log.add(step(run, stage, second), second, 8)
    assert found(tmp_path)["parts"] == ["contrastive_image_text"] and found(tmp_path)["found"] == ""


# ---- nothing else moves ------------------------------------------------------------------------------------------


def test_looking_for_the_cause_changes_nothing_of_the_training(small: SmallRuns, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(folder: Path) -> tuple[Run, Stage]:
        run, stage, given = opened(small, folder)
        spoil_marked(run)
        torch.manual_seed(5)
        take(run, stage, [given[0], mark(given[1], 0), *given[2:]])
        return run, stage

    run, stage = trained(tmp_path / "looked")
    assert found(tmp_path / "looked")["name"] == "model.image (float32)"
    assert all(p.grad is None for p in run.model.parameters())
    random = torch.get_rng_state()
    monkeypatch.setattr(loop, "find_cause", lambda *_: None)
    monkeypatch.setattr(loop, "report_skipped_step", lambda *_: "")
    plain, plain_stage = trained(tmp_path / "not")
    assert records(tmp_path / "not", "event") == []
    assert torch.equal(torch.get_rng_state(), random)
    assert differing(run.model.state_dict(), plain.model.state_dict()) == []
    assert differing(stage.state_dict(), plain_stage.state_dict()) == []


def test_a_bad_step_has_changed_no_weights_when_it_is_done_again(small: SmallRuns, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    run, stage, (first, *_) = opened(small, tmp_path)
    overflow(run)
    before = weights(run.model)
    states: list[list[str]] = []
    locate = loop.locate

    def locating(*given: Any) -> Any:
        states.append(differing(weights(run.model), before))
        return locate(*given)

    monkeypatch.setattr(loop, "locate", locating)
    take(run, stage, [first])
    assert states == [[]]


@pytest.mark.parametrize(("error", "named"), [
    (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory"), (KeyError("odd"), "KeyError('odd')")])
def test_a_failure_while_looking_is_said_and_the_run_goes_on(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, named: str) -> None:
    run, stage, (first, second, *_) = opened(small, tmp_path)
    handle = run.model.text.register_forward_hook(changing(lambda tokens: tokens * float("nan")))
    log = StepLog(run, stage, epoch=1)
    log.add(step(run, stage, first), first, 8)
    handle.remove()

    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "locate", failing)
    log.add(step(run, stage, second), second, 8)
    log.flush()
    assert found(tmp_path)["found"] == "unknown" and named in found(tmp_path)["name"]
    assert [record["step"] for record in records(tmp_path, "step")] == [2]


# ---- what a bad step does -----------------------------------------------------------------------------------------


def test_bad_steps_in_a_row_end_the_run_with_cause_and_last_good_checkpoint(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, given = opened(small, tmp_path, "training.max_bad_steps=3")
    run.progress.epoch = 1
    checkpoint.save({}, tmp_path / "checkpoints/checkpoint_epoch_1.pt")
    overflow(run)
    with refused("align", 3, "contrastive_image_text", UP.split()[0], "--lr", "training.use_amp=false",
                 tmp_path / "checkpoints/checkpoint_epoch_1.pt", error=TrainingError):
        take(run, stage, given)
    assert [event["step"] for event in records(tmp_path, "event")] == [1, 2, 3]


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is(small: SmallRuns, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    run, stage, given = opened(small, tmp_path)
    compute = loop.compute_losses
    monkeypatch.setattr(loop, "compute_losses", lambda *args: compute(*args)._replace(total=torch.tensor(math.inf)))
    before = weights(run.model)
    take(run, stage, given[:1])
    assert differing(weights(run.model), before) == [] and stage.bad_in_a_row == 1


# ---- figures of good steps ---------------------------------------------------------------------------------------


def test_spikes_and_contrasts_of_training_reach_the_monitor_of_the_stage(small: SmallRuns, tmp_path: Path) -> None:
    run, stage, given = opened(small, tmp_path, "training.warmup_pct=0")
    take(run, stage, given)
    state = stage.state_dict()["alarms"]
    assert state["steps"] == 4 and state["series"].keys() == {"loss image_text", "gradient image_text"}
    steps = records(tmp_path, "step")
    assert state["series"]["loss image_text"]["values"] == [record["loss"] for record in steps]
    assert state["series"]["gradient image_text"]["values"] == [record["grad_norm"] for record in steps]
    parts = state["contrasts"]["image_text"]["parts"]
    assert parts == [record["parts"]["contrastive_image_text"] / guessing_loss(batch, ["image", "text"], "infonce")
                     for record, batch in zip(steps, given, strict=True)]
    stage.monitor.series["loss image_text"].values = [0.01] * 50
    take(run, stage, given[:1])
    [event] = records(tmp_path, "event")
    assert event["step"] == 5
    assert_names(event["message"], "align", "image_text", "0.01")
    again = small.stage(small.open(tmp_path / "warm", "training.warmup_pct=50"), "align")
    assert stage.monitor.warmup_steps == 0 and again.monitor.warmup_steps == again.steps // 2
    again.monitor.warmup_steps = 0
    again.load_state_dict(stage.state_dict())
    assert again.monitor == stage.monitor and again.monitor is not stage.monitor


# ---- several processes -------------------------------------------------------------------------------------------


def three_steps(folder: Path) -> dict[str, Tensor]:
    """Of one rank: in the first the third picture of the second process is spoilt."""
    world = distributed.start()
    small = SmallRuns(folder / f"shared{world.rank}")
    with world.quiet():
        config = small.config(folder / "run", "training.batch_size=8", *OFTEN)
        run = run_module.open_run(config, Options("cpu"), None, world)
        towers = ("image", "audio", "text", "fusion")
        run.fits = {row.name: devices.Fit(dict.fromkeys(towers, 3), {}) for row in run.config.stages}
        stage = small.stage(run, "align")
        spoil_marked(run)
        log, saver = StepLog(run, stage, epoch=1), Saver(run, {}, Interruption())
        for number, batch in enumerate(batches(run, stage)[:3]):
            own = part_of(batch, torch.arange(len(batch.keys))[world.share(len(batch.keys))])
            own = mark(own, 2) if world.rank == 1 and number == 0 else own
            log.add(loop.train_step(run, stage, 0, own), own, len(batch.keys))
            run.progress.step += 1
            run.progress.stage_step += 1
            run.progress.epoch_step += 1
            saver.after_step("align", stage.state_dict, log.flush)  # the main process alone knows that it is time
        log.flush()
        run.tracker.close()
    world.stop()
    return weights(run.model)


def test_processes_look_together_and_name_the_sample_of_the_one_that_has_it(small: SmallRuns, tmp_path: Path) -> None:
    one, other = in_ranks(2, three_steps, tmp_path)
    _, _, (first, *_) = opened(small, tmp_path / "alone")
    assert found(tmp_path / "run") == {"step": 0, "parts": ["contrastive_image_text"], "found": "output",
                                       "name": "model.image (float32)", "samples": [first.keys[6]]}
    assert [record["step"] for record in records(tmp_path / "run", "step")] == [1, 2]
    assert differing(one.value, other.value) == []
