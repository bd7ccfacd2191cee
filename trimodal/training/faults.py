"""What is wrong with a step that was not finite: where it began, in which samples, and a snapshot to study it by.

Such a step has changed nothing, so it can be done again. It is: under hooks that find the first module whose output, or
else the first parameter whose gradient, is not finite. The flags of a step are read one step late; if the step in
between has updated the weights, they are those after its update. The batch and what is known goes to
`logs/bad_step_N.pt`, for the first three such steps of a run. With the weights of any checkpoint it can be done again:

    python faults.py outputs/logs/bad_step_120.pt outputs/checkpoints/checkpoint_epoch_3.pt
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

from trimodal.openmp import bound_waiting

if __name__ == "__main__":
    bound_waiting()

import torch
from torch import Tensor, nn

from datasets import Batch
from model import load_model
from trimodal.arguments import Parser
from trimodal.checkpoint import describe_mismatch, load, save
from trimodal.config import TaskConfig, config_from_dict
from trimodal.errors import CheckpointError, UserError
from trimodal.objectives.losses import build_objective
from trimodal.objectives.step import Share, Step, accumulate, positives_of
from trimodal.redaction import redact
from trimodal.training.alarms import Figures, guessing
from trimodal.training.optimizer import freeze
from trimodal.training.run import Run, description
from trimodal.training.stage import Stage, make_step, weighted_terms

SNAPSHOTS = 3  # of a run: a batch may be large
FOUND = {"": "", "sounds": "in sounds of the batch itself", "weights": "in the weights {}",
         "output": "first in the output of {}", "gradient": "first in the gradient of {}",
         "loss": "in the loss, though the outputs of all modules are finite", "unknown": "where cannot be told ({})"}
SHOWN = 3  # samples named in a line

Attempt = Callable[[Any, Callable[[], Any]], tuple[Any, str]]


class Given(NamedTuple):
    """What a step is made of; references only."""

    task: int
    own: Batch  # that this process has read
    whole: Batch
    share: Share | None


# ---- finite steps -------------------------------------------------------------------------------------------------


def listen(run: Run, stage: Stage, given: Given, facts: Mapping[str, Any]) -> None:
    """Say what is striking about the figures of a good step."""
    contrasts = {}
    for name, value in facts["parts"].items():
        kind, _, pair = name.partition("_")
        if kind == "contrastive":
            contrasts[pair] = (value, chance(given.whole, pair.split("_"), run.config.training.contrastive_loss))
    figures = Figures(facts["loss"], facts["grad_norm"], contrasts)
    for line in stage.alarms.hear(facts["step"], facts["task"], figures):
        run.tracker.event(line, facts["step"])


def chance(batch: Batch, inputs: list[str], kind: str) -> float:
    """Loss of guessing on this batch. Only the sigmoid loss depends on how many of its pairs are right."""
    queries = keys = len(batch.sample_ids)
    if "text" in inputs:
        assert batch.caption_owner is not None
        keys = len(batch.caption_owner)
    return guessing(queries, keys, positives_of(batch, inputs).count() if kind == "sigmoid" else None)


# ---- steps that are not finite ------------------------------------------------------------------------------------


@dataclass
class Finding:
    """What stops being finite first, a key of FOUND; what is put into its words; and the samples concerned, all where
    they cannot be told."""

    kind: str
    name: str
    keys: list[str]

    @property
    def where(self) -> str:
        return FOUND[self.kind].format(self.name)

    @property
    def is_own(self) -> bool:
        """Of this process: what other processes work out has no part in it."""
        return self.kind in ("sounds", "output")


def examine(run: Run, stage: Stage, given: Given, facts: Mapping[str, Any], attempt: Attempt) -> str:
    """Find and say the cause of a step that was not finite, and keep a snapshot; the cause in words.

    All processes look together, each at its share. `attempt` does work that may run out of memory.
    """
    step = make_step(run, stage, given.whole, given.share, train=True)
    try:
        finding, problem = attempt(run.world, lambda: look(stage, given, step))
    except Exception as error:
        if run.world.size > 1:
            raise  # the others are in another place now
        finding, problem = None, repr(error)[:200]  # whatever it is, it does not end the run
    stage.optimizer.zero_grad()
    findings = run.world.gather_objects(finding or Finding("unknown", problem, given.own.keys))
    found = [rank for rank, one in enumerate(findings) if one.kind]
    rank = next((rank for rank in found if findings[rank].is_own), found[0] if found else None)
    bad = [part for part, value in facts["parts"].items() if not math.isfinite(value)]
    cause = f"loss part {', '.join(bad)}" if bad else "the gradient, not the loss"
    first = findings[rank or 0]
    cause += f", {first.where}" if rank is not None else _not_again(stage)
    kept = ""
    if rank is not None or bad or stage.optimizer.scaler is None:  # else the scale of fp16 was too large, as it may be
        kept = keep(run, stage, given, {**facts, "cause": cause}, rank or 0)
    run.tracker.event(f"[{facts['stage']}] step {facts['step']} skipped: not finite in {cause} "
                      f"({_samples(first.keys)}){kept and f'; kept in {kept}'}", facts["step"], parts=bad,
                      found=first.kind, name=first.name, samples=first.keys[:SHOWN], of=len(first.keys))
    return cause


def _not_again(stage: Stage) -> str:
    scaler = stage.optimizer.scaler
    return "; done again, with the weights of one step later, it is finite" + (
        f" without the loss scale, now {scaler.get_scale():g}" if scaler is not None else "")


def _samples(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"samples {', '.join(keys[:SHOWN])}{more}"


def look(stage: Stage, given: Given, step: Step) -> Finding:
    """Do a step again, save for its update, and find where it stops being finite. Leaves gradients."""
    modules = nn.ModuleDict({"model": step.model, "objectives": stage.objectives})
    with watching(modules) as seen:
        parts = accumulate(step, weighted_terms(stage, given.task, step), Tensor.backward)
    weight = next((name for name, p in modules.named_parameters() if not bool(p.isfinite().all())), None)
    sounds = _bad_sounds(given.own)
    if sounds:
        return Finding("sounds", "", sounds)
    if weight is not None:
        return Finding("weights", weight, given.own.keys)
    if not seen and not all(bool(value.isfinite().all()) for value in parts.values()):
        seen.append(("loss", ""))
    return Finding(*(seen[0] if seen else ("", "")), _bad_samples(step, given) or given.own.keys)


def _bad_sounds(batch: Batch) -> list[str]:
    if batch.audio is None:
        return []
    return [key for key, sound_TM in zip(batch.keys, batch.audio, strict=True) if not bool(sound_TM.isfinite().all())]


def _bad_samples(step: Step, given: Given) -> list[str]:
    """Of this process's samples those whose features are not finite."""
    own = given.share.samples if given.share else range(len(given.own.keys))
    rows: set[int] = set()
    for modality, features in step.detached.items():
        bad = (~features.isfinite().all(1)).nonzero()[:, 0].cpu()
        rows |= set((cast(Tensor, given.whole.caption_owner)[bad] if modality == "text" else bad).tolist())
    return [key for row, key in zip(own, given.own.keys, strict=True) if row in rows]


@contextlib.contextmanager
def watching(modules: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Collects what is not finite, as kind and name, the first one first: outputs of modules, then gradients as they
    come."""
    seen: list[tuple[str, str]] = []

    def hear_output(name: str) -> Callable[..., None]:
        @torch.no_grad()  # what autograd would keep of a look is missed in the recompute
        def hear(module: nn.Module, given: Any, output: Any) -> None:
            bad = None if seen else next((one for one in _tensors(output) if not bool(one.isfinite().all())), None)
            if bad is not None:
                seen.append(("output", f"{name} ({str(bad.dtype).removeprefix('torch.')})"))
        return hear

    def hear_gradient(name: str) -> Callable[[Tensor], None]:
        def hear(parameter: Tensor) -> None:
            if not seen and parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                seen.append(("gradient", name))
        return hear

    handles = [module.register_forward_hook(hear_output(name)) for name, module in modules.named_modules() if name]
    handles += [parameter.register_post_accumulate_grad_hook(hear_gradient(name))
                for name, parameter in modules.named_parameters() if parameter.requires_grad]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, list | tuple):
        for one in output:
            yield from _tensors(one)


# ---- snapshots ----------------------------------------------------------------------------------------------------


def keep(run: Run, stage: Stage, given: Given, facts: Mapping[str, Any], rank: int) -> str:
    """Name of the snapshot of the step, of the share of process `rank`; "" where there are enough of them already."""
    logs = run.folder / "logs"
    path = logs / f"bad_step_{facts['step']}.pt"
    there = set(logs.glob("bad_step_*.pt")) - {path}  # a run that goes on meets its bad steps again
    name = ""
    if run.world.rank == rank and len(there) < SNAPSHOTS:
        try:
            save({**facts, **_circumstances(run, stage, given)}, path)
            name = f"logs/{path.name}"
        except CheckpointError as error:
            name = f"no file: {error}"
    return run.world.gather_objects(name)[rank]


def _circumstances(run: Run, stage: Stage, given: Given) -> dict[str, Any]:
    return {
        "batch": {f.name: getattr(given.own, f.name) for f in fields(Batch)}, "task_number": given.task,
        "tasks": [asdict(task) for task in stage.tasks], "config": description(run)["config"],
        "process": [run.world.rank, run.world.size], "micro_batch": dict(run.fits[stage.row.name].micro_batch),
        "amp": str(run.precision.dtype), "mask_id": run.data.tokenizer.mask_id,
        "num_concepts": len(run.data.concepts), "num_speakers": len(run.data.speakers)}


def replay(snapshot: str | Path, checkpoint: str | Path, device: str = "cpu") -> str:
    """Do a bad step again with the weights of a checkpoint; what is found, in words.

    The heads of the objectives are those of the checkpoint if it is of the same stage, else fresh. A snapshot of one of
    several processes holds that one's share alone, which is then taken for the whole batch.

    Raises:
        UserError: one of the files is not what it should be.
    """
    try:
        state = load(snapshot)
        batch = Batch(**state["batch"])
    except (CheckpointError, KeyError, TypeError) as error:
        raise UserError(f"{snapshot}: is not the snapshot of a step ({error})") from None
    model, extras = load_model(checkpoint, device)
    stage, note = _stage(state, extras, model.train())
    amp = getattr(torch, state["amp"].removeprefix("torch."), None)
    step = Step(model=model, batch=batch, device=torch.device(device), micro_batch=state["micro_batch"],
                autocast=lambda: torch.autocast(device, amp) if amp else contextlib.nullcontext(),
                keep={"image": stage.row.image_keep, "audio": stage.row.audio_keep}, drop_path=stage.row.drop_path,
                mask_id=state["mask_id"], num_concepts=state["num_concepts"])
    stage.objectives.to(device)
    finding = look(stage, Given(state["task_number"], batch, batch, None), step)
    found = f"not finite {finding.where}" if finding.kind else "finite, with these weights"
    return f"Step {state['step']} of stage {state['stage']} was not finite in {state['cause']}.\nNow: {found}.{note}"


def _stage(state: Mapping[str, Any], weights: Mapping[str, Any], model: Any) -> tuple[Stage, str]:
    """The stage of a snapshot, without what updates weights; and what is to be known about its heads."""
    config = config_from_dict(state["config"])
    row = next(row for row in config.stages if row.name == state["stage"])
    tasks = [TaskConfig(**task) for task in state["tasks"]]
    freeze(model, row)
    torch.manual_seed(config.training.seed)
    objectives = nn.ModuleDict({
        f"{number}_{name}": build_objective(name, model, task.inputs, state["num_speakers"],
                                            config.training.contrastive_loss)
        for number, task in enumerate(tasks) for name in task.objectives})
    heads = weights.get("stage_state", {}).get("objectives", {})
    fit = weights.get("stage") == row.name and describe_mismatch(heads, objectives.state_dict()) is None
    if fit:
        objectives.load_state_dict(heads)
    return Stage(row, tasks, objectives, cast(Any, None), None), "" if fit else " The objectives' heads were fresh."


def main(arguments: list[str]) -> int:
    parser = Parser("Do a step that was not finite again, and find where it stops being finite.")
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="logs/bad_step_N.pt of a run")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="weights to do it with: any checkpoint")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda, cuda:1, mps")
    options = parser.parse_args(arguments)
    try:
        print(replay(options.snapshot, options.checkpoint, options.device))
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
