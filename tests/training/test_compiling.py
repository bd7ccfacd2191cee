"""Compiled blocks, on the CPU's compiler: the same mathematics, the same bits after a resume, no more memory; and what
happens where nothing can be compiled."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from tests.narrow import make_batch, narrow_model, part_of, step_of
from tests.objectives.test_exactness import far
from tests.ranks import in_ranks
from tests.refusals import assert_names, refused
from tests.small_runs import SmallRuns, batches, differing, float64, records, step, weights, without_times
from trimodal import distributed
from trimodal.config import TrainingConfig, load_config
from trimodal.memory.devices import Fit
from trimodal.objectives import build_objective
from trimodal.objectives.base import learn
from trimodal.training.compiling import CompiledBlocks, wants_compiling
from trimodal.training.diagnostics import watch
from trimodal.training.run import Options, open_run

CPU = torch.device("cpu")
CUTS: dict[str, Any] = {"whole": 1000, "ragged": {"image": 19, "audio": 7, "text": 17, "fusion": 9}}
needs_compiler = pytest.mark.skipif(not os.popen("command -v g++").read(), reason="no g++ in this machine")


@pytest.fixture(autouse=True)
def nothing_compiled_before(tmp_path: Path) -> Iterator[None]:
    with fresh_cache(dir=str(tmp_path)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield


def gradient(inputs: str, names: str, cut: Any, compiled: bool) -> dict[str, Tensor]:
    """Loss and gradients of a batch in float64."""
    said: list[str] = []
    model = narrow_model()
    blocks = CompiledBlocks(model, said.append) if compiled else None
    torch.manual_seed(1)
    objectives = [build_objective(name, model, inputs.split(), 3, TrainingConfig()).double() for name in names.split()]
    both = nn.ModuleDict({"model": model, "heads": nn.ModuleList(objectives)})

    def learnt() -> Tensor:
        both.zero_grad()
        step = step_of(model, make_batch(inputs.split(), 48), cut)
        total = learn(step, [(1.0, objective) for objective in objectives], Tensor.backward).total
        assert total is not None
        return total

    if blocks:
        with blocks.trial():
            learnt()
        assert blocks.works and all(blocks.works.values())
        found = len(said)
    total = learnt()
    assert not blocks or len(said) == found, f"nothing unforeseen: {said[found:]}"
    return {"loss": total, **{name: p.grad for name, p in both.named_parameters() if p.grad is not None}}


# ---- with a compiler ---------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.repetition
@pytest.mark.parametrize(("inputs", "names"), [("audio text", "contrastive matching concepts"),
                                               ("image audio text", "masked")])
def test_the_gradient_is_that_of_uncompiled_blocks_however_the_batch_is_cut(inputs: str, names: str) -> None:
    expected = gradient(inputs, names, CUTS["whole"], compiled=False)
    for cut in CUTS.values():
        found = gradient(inputs, names, cut, compiled=True)
        assert abs(float(found["loss"]) - float(expected["loss"])) <= 1e-9 * abs(float(expected["loss"]))
        assert far(found, expected) <= 1e-9


@needs_compiler
@pytest.mark.repetition
def test_a_run_compiles_a_handful_and_a_resumed_one_has_the_same_bits(small: SmallRuns, tmp_path: Path) -> None:
    compiled = ("training.compile=on", "training.ema_decay=0.9", "memory.micro_batch=16")
    small.train(tmp_path / "whole", *compiled, "training.epochs=3")
    lines = [event["message"] for event in records(tmp_path / "whole", "event")]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 3 < len(lines) == graphs < 16 and all(" compiled in " in line for line in lines)
    small.train(tmp_path / "parts", *compiled, "training.epochs=3", "training.keep_checkpoints=100")
    for epoch in (1, 2):
        for path in (tmp_path / "parts" / "checkpoints").glob("*.pt"):
            if path.name != f"checkpoint_epoch_{epoch}.pt":
                path.unlink()
        torch._dynamo.reset()
        with fresh_cache():
            small.train(tmp_path / "parts", *compiled, "training.epochs=3", "training.keep_checkpoints=100",
                        resume="auto")
        for name in ("final_model.pt", "best_model.pt"):
            one, other = (torch.load(tmp_path / folder / "checkpoints" / name) for folder in ("parts", "whole"))
            assert differing(one["model_state_dict"], other["model_state_dict"]) == []
        one, other = (without_times(records(tmp_path / folder, "step", "epoch")) for folder in ("parts", "whole"))
        assert one == other


def weights_after_two_steps(folder: Path) -> dict[str, Tensor]:
    """Of finetune, by one of the processes that share it, or by one alone."""
    world = distributed.start()
    with float64(), world.quiet(), fresh_cache():
        small = SmallRuns(folder / f"shared_{world.rank}_{world.size}")
        config = small.config(folder / f"out_{world.size}", "training.compile=on")
        run = open_run(config, Options("cpu"), None, world)
        run.fits = {row.name: Fit(dict.fromkeys(("image", "audio", "text", "fusion"), 4), {}) for row in config.stages}
        stage = small.stage(run, "finetune")
        for batch in batches(run, stage)[:2]:
            own = part_of(batch, torch.arange(len(batch.keys))[world.share(len(batch.keys))])
            step(run, stage, replace(own, inputs=batch.inputs))
        assert run.compiled_blocks and all(run.compiled_blocks.works.values()) and not run.compiled_blocks.said
        run.tracker.close()
    world.stop()
    return weights(run.model)


@needs_compiler
@pytest.mark.repetition
def test_two_processes_train_compiled_what_one_trains(tmp_path: Path) -> None:
    alone = weights_after_two_steps(tmp_path)
    for rank in in_ranks(2, weights_after_two_steps, tmp_path):
        assert max(float((rank.value[name] - value).abs().max()) for name, value in alone.items()) <= 1e-9


@needs_compiler
@pytest.mark.repetition
def test_diagnostics_see_inside_compiled_blocks(small: SmallRuns, tmp_path: Path) -> None:
    run = small.open(tmp_path / "run", "training.compile=on")
    stage = small.stage(run, "align")
    with torch.no_grad():
        run.model.get_parameter("image.blocks.blocks.1.up.bias")[0] = torch.nan
    images = batches(run, stage)[0].images
    assert images is not None
    with watch(run.model) as seen:
        run.model.image(images)
    assert seen[0][1].startswith("image.blocks.blocks.1.up ")


def peak_bytes(small: SmallRuns, folder: Path, name: str, compiles: str) -> int:
    """The most bytes that live at once in a step, of all that torch's CPU allocator hands out in it."""
    run = small.open(folder, f"training.compile={compiles}", "model.size=tiny", "model.embed_dim=64",
                     "model.image_size=64", "model.vocab_size=135", "training.use_amp=true")
    stage = small.stage(run, name)
    batch = batches(run, stage)[0]
    step(run, stage, batch)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step(run, stage, batch)
    changes = [event.nbytes() for event in sorted(profile.profiler.kineto_results.events(),
                                                  key=lambda event: event.start_ns()) if event.name() == "[memory]"]
    live = torch.tensor(changes).cumsum(0)
    return int(live.max())


@needs_compiler
@pytest.mark.repetition
@pytest.mark.parametrize("name", ["align", "finetune"])
def test_a_compiled_step_takes_no_more_memory_than_is_planned_for(small: SmallRuns, tmp_path: Path, name: str) -> None:
    eager, compiled = (peak_bytes(small, tmp_path / compiles, name, compiles) for compiles in ("off", "on"))
    assert compiled <= 1.02 * eager


# ---- without one -------------------------------------------------------------------------------------------------


def test_what_cannot_be_compiled_runs_uncompiled_and_says_so(small: SmallRuns, tmp_path: Path) -> None:
    with float64(), torch._inductor.config.patch({"cpp.cxx": (None, "false")}):  # a compiler that fails
        trained = []
        for compiles in ("on", "off"):
            run = small.open(tmp_path / compiles, f"training.compile={compiles}")
            stage = small.stage(run, "align")
            for batch in batches(run, stage)[:2]:
                step(run, stage, batch)
            trained.append(weights(run.model))
    assert differing(trained[0], trained[1]) == []
    lines = [event["message"] for event in records(tmp_path / "on", "event")]
    assert len(lines) == 2, "images, and texts"
    assert_names(lines[0], "training.compile", "false", "uncompiled")
    assert not records(tmp_path / "off", "event")


def test_a_machine_without_a_compiler_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with refused("training.compile", "no-such-compiler", "g++", "CXX"):
        wants_compiling("on", CPU)
    monkeypatch.setenv("CC", "no-such-compiler")
    with refused("training.compile", "no-such-compiler", "gcc", "CC"):
        wants_compiling("on", torch.device("cuda"))
    with refused("training.compile", "mps", "off"):
        wants_compiling("on", torch.device("mps"))
    assert not wants_compiling("auto", CPU) and not wants_compiling("off", torch.device("mps"))


@pytest.mark.parametrize(("given", "read"), [("on", "on"), ("off", "off"), ("true", "on"), ("false", "off"),
                                             ("auto", "auto")])
def test_the_switch_is_read_as_yaml_writes_it(given: str, read: str) -> None:
    assert load_config(None, [f"training.compile={given}"]).training.compile == read
