"""Training under torchrun: real processes share each effective batch and make the step of one process; checkpoints
interchange; one writes and prints; running out of memory on one is answered by all; a death ends the run cleanly.

Run as `python -m tests.test_torchrun FOLDER` this file is one rank's work; the tests start it with torchrun.
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

import distributed
import resume
import runs
import stages
import training
from distributed import World
from losses import build_objective
from runs import Options
from steps import accumulate, shared_batch
from tests.narrow import make_batch, narrow_model, part_of, step_of
from tests.small_runs import SmallRuns, batches, differing, records

ROOT = Path(distributed.__file__).parent
B = 13
SHARES = {2: [9, 4], 3: [6, 2, 5]}  # rows of each rank
TASKS = {"image text": ("contrastive matching concepts", "infonce"), "audio text": ("contrastive matching", "sigmoid"),
         "image audio": ("contrastive", "infonce"), "image audio text": ("masked concepts", "infonce"),
         "audio": ("masked speaker", "infonce")}
MICRO: list[Any] = [100, {"image": 4, "audio": 3, "text": 5, "fusion": 2}]


def torchrun(size: int, *command: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}",
                             *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


# ---- what a rank does --------------------------------------------------------------------------------------------


def gradient(world: World, inputs: str, micro: Any) -> dict[str, Tensor]:
    """Parts of the loss and all gradients of one effective batch in float64, shared by the processes of `world`."""
    names, loss = TASKS[inputs]
    model = narrow_model()
    torch.manual_seed(1)
    objectives = nn.ModuleList(build_objective(name, model, inputs.split(), 3, loss) for name in names.split()).double()
    batch = make_batch(inputs.split(), B)
    if world.size > 1:
        begin = sum(SHARES[world.size][:world.rank])
        batch = part_of(batch, torch.arange(begin, begin + SHARES[world.size][world.rank]))
    whole, share = shared_batch(world, batch, with_media="matching" in names)
    step = step_of(model, whole, micro, world=world, share=share)
    stage: Any = SimpleNamespace(row=SimpleNamespace(name="own"), objectives_of=lambda task: (
        (name, 1.0, objective) for name, objective in zip(names.split(), objectives, strict=True)))
    parts = accumulate(step, stages.weighted_terms(stage, 0, step), Tensor.backward)
    parameters = [*model.parameters(), *objectives.parameters()]
    stages.reduce_gradients(SimpleNamespace(world=world, model=model),  # type: ignore[arg-type]
                            SimpleNamespace(optimizer=SimpleNamespace(parameters=parameters)))  # type: ignore[arg-type]
    shown = world.sum_scalars({name: float(value) for name, value in parts.items()})
    found = {name: p.grad for name, p in nn.ModuleDict({"model": model, "heads": objectives}).named_parameters()
             if p.grad is not None}
    return {**found, **{f"part {name}": torch.tensor(value, dtype=torch.float64) for name, value in shown.items()}}


def trained(world: World, folder: Path, fails: bool) -> dict[str, Any]:
    """Weights after two steps of finetune, where the second process may run out of memory in the first step."""
    small = SmallRuns(folder / f"shared_{world.rank}_{fails}")
    config = small.config(folder / f"out_{fails}_{world.size}")
    run = runs.open_run(config, Options("cpu"), None, world)
    run.fits = {row.name: training.memory.Fit(dict.fromkeys(("image", "audio", "text", "fusion"), 4), {})
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
        training.train_step(run, stage, 0, own)
        run.progress.step += 1
        run.progress.stage_step += 1
    return {"weights": run.model.state_dict(), "fit": run.fits["finetune"].micro_batch}


def run_as_rank(folder: Path) -> None:
    world = distributed.start()
    with world.quiet():
        found = {f"{inputs} {i}": gradient(world, inputs, micro) for inputs in TASKS for i, micro in enumerate(MICRO)}
        runs_of = {fails: trained(world, folder, fails) for fails in (False, True)} if world.size == 2 else {}
    torch.save({"gradients": found, "runs": runs_of}, folder / f"rank{world.rank}.pt")
    world.stop()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    process = torchrun(request.param, "-m", "tests.test_torchrun", str(folder))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


# ---- one step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", TASKS)
def test_uneven_shares_give_the_gradient_of_one_process(ranks: list[dict], inputs: str) -> None:
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
    alone = trained(World(), tmp_path, False)["weights"]
    for found in (first[False], first[True]):
        one, other = (torch.cat([value.flatten() for value in state.values()]) for state in (alone, found["weights"]))
        assert float((one - other).norm() / one.norm()) < 1e-6


def test_a_batch_of_fewer_samples_than_processes_is_refused(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(world=World(rank=0, size=5))
    jobs = [(0, torch.arange(9).numpy()), (1, torch.arange(4).numpy())]
    with pytest.raises(stages.UserError, match="torchrun: 5 processes, but a step of some task has 4 samples"):
        stages.own_jobs(run, jobs)
    run.world = World(rank=1, size=2)
    assert [indices.tolist() for _, indices in stages.own_jobs(run, jobs)] == [[4, 5, 6, 7, 8], [2, 3]]


# ---- a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRuns:
    return SmallRuns(tmp_path_factory.mktemp("shared"))


def recipe_of(small: SmallRuns, folder: Path, *overrides: str) -> str:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(small.config(folder, *overrides).to_dict()), "utf-8")
    return str(path)


def test_one_process_goes_on_where_two_have_stopped_and_the_other_way_round(small: SmallRuns, tmp_path: Path) -> None:
    """Each stage by other numbers of processes; metrics are those of one process throughout, up to rounding."""
    small.train(tmp_path / "alone")
    folder = tmp_path / "shared"
    recipe = recipe_of(small, folder)
    process = torchrun(2, "run_training.py", "--config", recipe, "--device", "cpu")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert printed.count("Device: cpu") == 1 and printed.count("[align] epoch 2/3") == 1, "one process prints"
    assert printed.count("Report: ") == 1 and len(list((folder / "reports").glob("*.md"))) == 1
    lines = [records(place, "step", "validation") for place in (tmp_path / "alone", folder)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["parts"] == pytest.approx(other["parts"], rel=1e-3)
    for name in ("checkpoint_epoch_3.pt", "best_model.pt", "final_model.pt"):
        (folder / "checkpoints" / name).unlink()
    report = small.train(folder, resume="auto")
    assert report.exists() and (folder / "checkpoints" / "final_model.pt").exists()
    last = [records(place, "validation")[-1]["loss"] for place in (tmp_path / "alone", folder)]
    assert last[0] == pytest.approx(last[1], rel=1e-4)
    (folder / "checkpoints" / "checkpoint_epoch_3.pt").unlink()
    process = torchrun(2, "run_training.py", "--config", recipe, "--device", "cpu", "--resume", "auto")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Going on from" in printed and records(folder, "validation")[-1]["loss"] == pytest.approx(last[0], rel=1e-4)


def test_a_process_that_dies_ends_the_run_and_leaves_a_usable_checkpoint(small: SmallRuns, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = recipe_of(small, folder, "training.epochs=12", "training.keep_checkpoints=20")
    process = torchrun(2, "run_training.py", "--config", recipe, "--device", "cpu")
    first = folder / "checkpoints" / "checkpoint_epoch_1.pt"
    while process.poll() is None and not first.exists():
        time.sleep(0.02)
    os.kill(process_of_rank(1, process.pid), signal.SIGKILL)
    begin_s = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - begin_s < 120, "nobody waits for the dead"
    assert not list((folder / "reports").iterdir()), "it had not been through"
    config = small.config(folder, "training.epochs=12", "training.keep_checkpoints=20")
    state = resume.find_state(config, Options("cpu", "auto"))
    assert state is not None and 1 <= state["progress"]["epoch"] < 12
    small.train(folder, "training.epochs=12", "training.keep_checkpoints=20", resume="auto")
    assert [line["epoch"] for line in records(folder, "validation")] == list(range(1, 13))


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


def test_a_plan_is_that_of_each_process_and_printed_once(tmp_path: Path) -> None:
    process = torchrun(2, "run_training.py", "--plan", "--device", "cpu", "--model-size", "tiny", "--output-dir",
                       str(tmp_path), "model.image_size=32", "data.audio_max_s=0.5", "memory.micro_batch=32")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = printed.splitlines()
    assert lines[0].endswith("effective batch pretrain 32, align 32, finetune 32, of each of 2 processes")
    assert printed.count("Plan for ") == 1 and [line.split()[0] for line in lines].count("align") == 1
    assert all("image 16 (16), audio 16 (16)" in line for line in lines[2:5]), "half of the batch each"


def test_a_mistake_is_told_once(small: SmallRuns, tmp_path: Path) -> None:
    recipe = recipe_of(small, tmp_path / "run")
    process = torchrun(2, "run_training.py", "--config", recipe, "--device", "cpu", "--datasets", "coco")
    _, errors = process.communicate()
    assert process.returncode != 0 and errors.count("error: ") == 1
    assert "python download_datasets.py --datasets coco" in errors


if __name__ == "__main__":
    run_as_rank(Path(sys.argv[1]))
