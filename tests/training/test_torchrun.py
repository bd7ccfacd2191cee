"""Training in several processes: they share each effective batch and make the step of one process; checkpoints
interchange; one writes and prints; running out of memory on one is answered by all; under torchrun itself a death ends
the run cleanly. All in float64, where two ways to the same mathematics agree to 1e-9 on every CPU.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import run_training
from tests.narrow import make_batch, narrow_model, part_of, settings_of, step_of
from tests.project import ROOT
from tests.ranks import PATIENCE_S, Rank, in_ranks
from tests.refusals import assert_names, refused
from tests.small_runs import SmallRuns, batches, differing, float64, records
from trimodal import distributed
from trimodal.distributed import World
from trimodal.objectives import build_objective
from trimodal.objectives.step import shared_batch
from trimodal.training import loop, resume
from trimodal.training import run as run_module
from trimodal.training import stage as stage_module
from trimodal.training.run import Options

B = 13
SHARES = {2: [9, 4], 3: [6, 2, 5]}  # rows of each rank
TASKS = {"image text": ("contrastive matching concepts", "infonce"),
         "audio text": ("contrastive matching masked_words words", "sigmoid soft"),
         "image audio": ("contrastive", "infonce"), "image audio text": ("masked concepts", "infonce"),
         "audio": ("masked speaker", "infonce")}
SHOWN = 1e-6  # metrics.jsonl holds float32
MICRO: list[Any] = [100, {"image": 4, "audio": 3, "text": 5, "fusion": 2}]


# ---- what a rank does --------------------------------------------------------------------------------------------


def gradient(world: World, inputs: str, micro: Any) -> dict[str, Tensor]:
    """Parts of the loss and all gradients of one effective batch in float64, shared by the processes of `world`."""
    names, loss = TASKS[inputs]
    model = narrow_model()
    torch.manual_seed(1)
    objectives = nn.ModuleList(build_objective(name, model, inputs.split(), 3, settings_of(loss))
                               for name in names.split()).double()
    batch = make_batch(inputs.split(), B)
    if world.size > 1:
        begin = sum(SHARES[world.size][:world.rank])
        batch = part_of(batch, torch.arange(begin, begin + SHARES[world.size][world.rank]))
    whole, share = shared_batch(world, batch, with_media="matching" in names)
    step = step_of(model, whole, micro, world=world, share=share)
    stage: Any = SimpleNamespace(row=SimpleNamespace(name="own"), objectives_of=lambda task: (
        (name, 1.0, objective) for name, objective in zip(names.split(), objectives, strict=True)))
    total, parts = stage_module.compute_losses(stage, 0, step, Tensor.backward)
    assert total is not None
    parameters = [*model.parameters(), *objectives.parameters()]
    stage_module.reduce_gradients(SimpleNamespace(world=world, model=model),  # type: ignore[arg-type]
                            SimpleNamespace(optimizer=SimpleNamespace(parameters=parameters)))  # type: ignore[arg-type]
    shown = world.sum_scalars({name: float(value) for name, value in {"loss": total, **parts}.items()})
    found = {name: p.grad for name, p in nn.ModuleDict({"model": model, "heads": objectives}).named_parameters()
             if p.grad is not None}
    return {**found, **{f"part {name}": torch.tensor(value, dtype=torch.float64) for name, value in shown.items()}}


def trained(world: World, folder: Path, fails: bool) -> dict[str, Any]:
    """Weights after two steps of finetune, where the second process may run out of memory in the first step."""
    small = SmallRuns(folder / f"shared_{world.rank}_{world.size}_{fails}")
    config = small.config(folder / f"out_{fails}_{world.size}")
    run = run_module.open_run(config, Options("cpu"), None, world)
    run.fits = {row.name: loop.devices.Fit(dict.fromkeys(("image", "audio", "text", "fusion"), 4), {})
                for row in config.stages}
    stage = small.stage(run, "finetune")
    left = [torch.OutOfMemoryError("CUDA out of memory.")] if fails and world.rank == 1 else []
    features = run.model.features

    def failing(*given: Any) -> Tensor:
        if left:
            raise left.pop()
        return features(*given)

    run.model.features = failing  # type: ignore[method-assign,assignment]
    for batch in batches(run, stage)[:2]:
        own = part_of(batch, torch.arange(len(batch.keys))[world.share(len(batch.keys))])
        own = dataclasses.replace(own, inputs=batch.inputs)
        loop.train_step(run, stage, 0, own)
        run.progress.step += 1
        run.progress.stage_step += 1
    run.tracker.close()
    return {"weights": run.model.state_dict(), "fit": run.fits["finetune"].micro_batch}


def work(folder: Path) -> dict[str, Any]:
    world = distributed.start()
    with float64(), world.quiet():
        found = {f"{inputs} {i}": gradient(world, inputs, micro) for inputs in TASKS for i, micro in enumerate(MICRO)}
        runs_of = {fails: trained(world, folder, fails) for fails in (False, True)} if world.size == 2 else {}
    world.stop()
    return {"gradients": found, "runs": runs_of}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return [rank.value for rank in in_ranks(request.param, work, tmp_path_factory.mktemp("ranks"))]


# ---- one step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", TASKS)
def test_uneven_shares_give_the_gradient_of_one_process(ranks: list[dict], inputs: str) -> None:
    with float64():
        expected = gradient(World(), inputs, 100)
    for rank in ranks:
        for i in range(len(MICRO)):
            found = rank["gradients"][f"{inputs} {i}"]
            assert found.keys() == expected.keys()
            limits = dict.fromkeys(expected, 1e-9) | {"part matching_accuracy": 1e-7}  # a count, shown in float32
            far = {name: float((found[name] - value).abs().max()) for name, value in expected.items()
                   if float((found[name] - value).abs().max()) > limits[name]}
            assert far == {}, (inputs, MICRO[i])


def test_out_of_memory_on_one_process_is_answered_by_all(ranks: list[dict], tmp_path: Path) -> None:
    if len(ranks) != 2:
        pytest.skip("done by two processes")
    first, second = (rank["runs"] for rank in ranks)
    for fails, size in ((False, 4), (True, 2)):
        assert first[fails]["fit"] == second[fails]["fit"] == dict.fromkeys(("image", "audio", "text", "fusion"), size)
        assert differing(first[fails]["weights"], second[fails]["weights"]) == [], "no process drifts from the other"
    with float64():
        alone = trained(World(), tmp_path, False)["weights"]
    for found in (first[False], first[True]):
        one, other = (torch.cat([value.flatten() for value in state.values()]) for state in (alone, found["weights"]))
        assert one.dtype == torch.float64 and float((one - other).norm() / one.norm()) < 1e-9


def test_a_batch_of_fewer_samples_than_processes_is_refused(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(world=World(rank=0, size=5))
    jobs = [(0, torch.arange(9).numpy()), (1, torch.arange(4).numpy())]
    with refused("torchrun", 5, 4):
        stage_module.own_jobs(run, jobs)
    run.world = World(rank=1, size=2)
    assert [indices.tolist() for _, indices in stage_module.own_jobs(run, jobs)] == [[4, 5, 6, 7, 8], [2, 3]]


# ---- a run -------------------------------------------------------------------------------------------------------


def recipe_of(small: SmallRuns, folder: Path, *overrides: str) -> str:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(small.config(folder, *overrides).to_dict()), "utf-8")
    return str(path)


def program(arguments: list[str]) -> int:
    """run_training.py in float64."""
    with float64():
        return run_training.main(["--device", "cpu", *arguments])


def both(*arguments: str) -> list[Rank]:
    """The program in two processes."""
    return in_ranks(2, program, list(arguments))


def test_one_process_goes_on_where_two_have_stopped_and_the_other_way_round(small: SmallRuns, tmp_path: Path) -> None:
    """Each stage by other numbers of processes; metrics are those of one process throughout."""
    with float64():
        small.train(tmp_path / "alone")
    folder = tmp_path / "shared"
    recipe = recipe_of(small, folder)
    first, second = both("--config", recipe)
    assert first.value == second.value == 0 and second.printed == "", "one process prints"
    assert first.printed.count("[align] epoch 2/3") == 1 and len(list((folder / "reports").glob("*.md"))) == 1
    lines = [records(place, "step", "validation") for place in (tmp_path / "alone", folder)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=SHOWN)
        assert one["parts"] == pytest.approx(other["parts"], rel=SHOWN)
    for name in ("checkpoint_epoch_3.pt", "best_model.pt", "final_model.pt"):
        (folder / "checkpoints" / name).unlink()
    with float64():
        report = small.train(folder, resume="auto")
    assert report.exists() and (folder / "checkpoints" / "final_model.pt").exists()
    last = [records(place, "validation")[-1]["loss"] for place in (tmp_path / "alone", folder)]
    assert last[0] == pytest.approx(last[1], rel=SHOWN)
    (folder / "checkpoints" / "checkpoint_epoch_3.pt").unlink()
    assert [rank.value for rank in both("--config", recipe, "--resume", "auto")] == [0, 0]
    assert records(folder, "validation")[-1]["loss"] == pytest.approx(last[0], rel=SHOWN)


def test_a_plan_is_that_of_each_process_and_printed_once(small: SmallRuns, tmp_path: Path) -> None:
    first, second = both("--plan", "--config", recipe_of(small, tmp_path / "run"))
    assert first.value == second.value == 0 and second.printed == ""
    assert_names(first.printed.splitlines()[0], 2)
    rows = {line.split()[0]: line for line in first.printed.splitlines() if line.strip()}
    for stage in ("pretrain", "align", "finetune"):
        assert first.printed.count(f"\n{stage} ") == 1
        assert "image 16 (16), audio 16 (16)" in rows[stage], "half of the batch of 32 each"


def test_a_mistake_is_told_once(small: SmallRuns, tmp_path: Path) -> None:
    first, second = both("--config", recipe_of(small, tmp_path / "run"), "--datasets", "coco")
    assert first.value == second.value == 2 and second.told == ""
    assert first.told.count("error: ") == 1 and "python download_datasets.py --datasets coco" in first.told


# ---- torchrun itself -----------------------------------------------------------------------------------------------


def torchrun(*arguments: str) -> subprocess.Popen:
    """run_training.py in two processes."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             "run_training.py", "--device", "cpu", *arguments],
                            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.timed
def test_a_process_that_dies_ends_the_run_and_leaves_a_usable_checkpoint(small: SmallRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    longer = ("training.epochs=60", "training.keep_checkpoints=60")
    recipe = recipe_of(small, folder, *longer)
    process = torchrun("--config", recipe)
    try:
        first = folder / "checkpoints" / "checkpoint_epoch_1.pt"
        while process.poll() is None and not first.exists():
            time.sleep(0.02)
        os.kill(process_of_rank(1, process.pid), signal.SIGKILL)
        process.wait(PATIENCE_S)  # nobody waits for the dead
    finally:
        process.kill()
    assert process.returncode > 0
    assert not list((folder / "reports").iterdir()), "it had not been through"
    state = resume.find_state(small.config(folder, *longer), Options("cpu", "auto"))
    assert state is not None and 1 <= state["progress"]["epoch"] < 60
    fewer = state["progress"]["epoch"] + 2
    again = torchrun("--config", recipe, "--resume", "auto", "--epochs", str(fewer))
    assert again.wait(PATIENCE_S) == 0
    assert [line["epoch"] for line in records(folder, "validation")] == list(range(1, fewer + 1))
    assert len(list((folder / "reports").glob("*.md"))) == 1, "one process writes"


def process_of_rank(rank: int, parent: int) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                status = (entry / "status").read_text()
            except OSError:
                continue
            if f"RANK={rank}".encode() in environment and f"PPid:\t{parent}\n" in status:
                return int(entry.name)
    raise AssertionError("no such process")
