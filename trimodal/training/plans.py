"""The memory plans of a run: predicted for `--plan`, made or kept when it starts or resumes, printed, and calibrated by
the measured peaks of its stages."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets import read_tables, speakers_with_sound
from trimodal.blocks import KERNELS, use_kernel
from trimodal.config import Config, TaskConfig, config_from_dict
from trimodal.data import tokenizer
from trimodal.data.samples import SampleTable
from trimodal.distributed import place_in_world
from trimodal.errors import UserError, counted
from trimodal.files import replacing
from trimodal.memory import devices
from trimodal.memory.devices import CONTEXT_GIB, GIB, Fit
from trimodal.memory.tracker import TAGS
from trimodal.sets import SETS
from trimodal.towers.base import PretrainedTower
from trimodal.towers.settings import live_towers, open_towers, tokenizer_of, with_towers
from trimodal.training.attention import choose_kernel, has_choice
from trimodal.training.fitting import Plan
from trimodal.training.frozen import live_by_stage
from trimodal.training.initial import find_checkpoint
from trimodal.training.planner import DeviceSetup, plan_stages, settings_digests, without_speaker
from trimodal.training.run import Run
from trimodal.training.stage import active_tasks

Tasks = Mapping[str, Sequence[TaskConfig]]  # of each stage


# ---- a run that starts or resumes --------------------------------------------------------------------------------


def fit_stages(run: Run, tasks: Tasks, state: Mapping[str, Any] | None) -> None:
    """Give `run` its attention kernel, the fit of each stage that `tasks` names and of its evaluation, and print them
    as they are used.

    Raises:
        OverBudget: nothing fits; names the knobs.
    """
    began = None if state is None else state.get("attention_kernel", KERNELS[0])  # of releases that knew no other
    run.kernel = run.world.on_main(lambda: began or choose_kernel(run.device, run.precision.dtype))
    use_kernel(run.model, run.kernel)
    setup, config = setup_of(run), settings_of(run, run.config)
    if has_choice(run.device, run.precision.dtype):
        print(f"Attention: {run.kernel}, {'as this run began' if began else 'the fastest on this CPU'}")
    kept = saved_fits(run, config, tasks, state)
    plans: dict[str, Plan] = run.world.on_main(lambda: plan_stages(config, tasks, setup, kept))
    print(format_plan(plans), flush=True)
    if state is not None and (anew := [name for name in plans if name in state["fits"] and name not in kept]):
        print(f"Planned anew, for settings other than the checkpoint's: {', '.join(anew)}")
    run.fits = {name: found.fit for name, found in plans.items()}
    run.fits_asked = settings_digests(config, tasks, setup)
    run.predicted_gib = {name: found.peak_bytes / GIB for name, found in plans.items()}
    run.planned_fits = dict(run.fits)


def saved_fits(run: Run, config: Config, tasks: Tasks, state: Mapping[str, Any] | None) -> dict[str, Fit]:
    """The fits in the checkpoint `state` that may be used again: of stages whose `settings_digests` are unchanged.

    A resumed run keeps its micro-batches, even where it had made them smaller than planned after running out of memory:
    other micro-batches would round differently. Stages whose settings changed are missing, and are planned anew.

    Returns:
        {stage, or EVALUATION: fit}; empty where `state` is None.
    """
    if state is None:
        return {}
    now = settings_digests(config, tasks, setup_of(run))
    then = state.get("fits_asked") or _digests_of_earlier_release(run, state)
    return {name: Fit(**fit) for name, fit in state["fits"].items() if name in now and now[name] == then.get(name)}


def _digests_of_earlier_release(run: Run, state: Mapping[str, Any]) -> dict[str, str]:
    """`settings_digests` of the configuration in the checkpoint `state`, for releases that kept no digests in it.

    Computed with the tasks that the data of `run` allow and with its device. Empty where a stage of that configuration
    has nothing to train on these data.
    """
    try:
        config = config_from_dict(state["config"])
        tasks = {row.name: active_tasks(row, run.data)[0] for row in config.stages}
        return settings_digests(config, tasks, setup_of(run))
    except UserError:  # a stage that these data hold nothing for
        return {}


def setup_of(run: Run) -> DeviceSetup:
    """The device, precision, ranks and calibration of `run`, to plan its stages for."""
    return DeviceSetup(run.device.type, run.precision.dtype, len(run.data.speakers), run.world.size,
                       calibration(devices.device_name(run.device)), run.kernel,
                       {name: tower.description for name, tower in run.model.towers.items()}, live_by_stage(run))


def settings_of(run: Run, config: Config) -> Config:
    """`config` with the model settings of `run`, whose vocabulary size is final."""
    return dataclasses.replace(config, model=run.model.config)


# ---- --plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What the plans of a run depend on, as far as it is known before it: the configuration, the tasks that each stage
    will train, and the number of speakers."""

    config: Config  # with the vocabulary size of the tokenizer, and the image size of the tower
    tasks: Tasks
    speakers: int
    towers: Mapping[str, Mapping[str, Any]]  # descriptions of the pretrained ones
    live: Mapping[str, Sequence[str]]  # by stage, the frozen ones that run, where the cache has room for the others


@dataclass(frozen=True)
class _Lists:
    """The part of `datasets.Data` that `active_tasks` needs: samples of the lists that have been read."""

    tables: dict[str, SampleTable]
    speakers: tuple[str, ...]

    def names(self) -> list[str]:
        return sorted(self.tables["train"].sources.names)


def foretell(config: Config) -> Forecast:
    """What the plans of a run depend on, read from the lists of those data sets whose samples are known without a
    download (`DataSet.reads_at_once`). Of pretrained towers no weights are fetched or read.

    Other sets may not be here yet and are not read: with one of them every task is planned, and each counts with all
    the speakers that it has.

    Raises:
        UserError: as a run would: a list cannot be read, or a stage has nothing to train.
    """
    listed = [name for name in config.data.datasets if SETS[name].reads_at_once]
    towers = open_towers(config.model, load="never")
    config = _with_vocab_size(dataclasses.replace(config, model=with_towers(config.model, towers)), towers)
    of_towers = {name: tower.description for name, tower in towers.items()}, live_towers(config, towers)
    lists = _read(config, listed)
    speakers = len(lists.speakers) + sum(SETS[name].speakers for name in config.data.datasets)
    if len(listed) == len(config.data.datasets):
        return Forecast(config, {row.name: active_tasks(row, lists)[0] for row in config.stages}, speakers, *of_towers)
    tasks = {row.name: list(row.tasks) if speakers else without_speaker(row.tasks) for row in config.stages}
    return Forecast(config, tasks, speakers, *of_towers)


def _read(config: Config, names: list[str]) -> _Lists:
    """The training samples of the data sets called `names`, from their lists."""
    if not names:
        return _Lists({"train": SampleTable.pack([])}, ())
    part = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=tuple(names)))
    table = read_tables(part, ["train"])["train"]
    return _Lists({"train": table}, tuple(speakers_with_sound(table)))


def _with_vocab_size(config: Config, towers: Mapping[str, PretrainedTower]) -> Config:
    """`config` with `model.vocab_size` raised to the size of the tokenizer's vocabulary, as a run will do; where the
    tokenizer is not on this machine yet, `config` as it is, and a line on stderr says so."""
    own = tokenizer_of(towers)
    if own is None and tokenizer.needs_network(config.model):
        print(f"Plan: {config.model.word_embeddings} is not on this machine yet, so {config.model.vocab_size} words "
              "are planned for (model.vocab_size)", file=sys.stderr)
        return config
    size = max((own or tokenizer.load_tokenizer(config.model)).vocab_size, config.model.vocab_size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def print_plan(config: Config, device_name: str, *, as_json: bool = False, init: str | None = None) -> None:
    """`--plan`: for a CUDA device with bf16 unless another device is named or found. Under torchrun that of each
    process, planned and printed by the first. `init`: of --init, which changes no plan, but must be there.

    Raises:
        UserError: as `foretell`; no such device.
        OverBudget: nothing fits.
    """
    rank, processes = place_in_world()
    if rank:
        return
    if init:
        find_checkpoint(init)
    found = devices.choose_device(device_name)
    device = "cuda" if device_name == "auto" else found.type
    amp = devices.choose_precision(found, config.training.use_amp).dtype
    if device == "cuda" and found.type != "cuda":
        amp = torch.bfloat16 if config.training.use_amp else None
    known = foretell(config)
    kernel = choose_kernel(torch.device(device), amp)
    setup = DeviceSetup(device, amp, known.speakers, processes, calibration(devices.device_name(found)), kernel,
                        known.towers, known.live)
    plans = plan_stages(known.config, known.tasks, setup)
    precision = "fp32" if amp is None else str(amp).removeprefix("torch.")
    attention = f" (attention: {kernel})" if has_choice(torch.device(device), amp) else ""
    batches = {row.name: config.effective_batch(row) for row in config.stages}
    if as_json:
        shown = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
        print(json.dumps({"size": config.model.size, "device": device, "precision": precision, "processes": processes,
                          "effective_batch": batches, "plans": shown}, indent=1))
        return
    shared = f", of each of {processes} processes" if processes > 1 else ""
    print(f"Plan for {device}, {precision}{attention}, effective batch "
          f"{', '.join(f'{n} {size}' for n, size in batches.items())}{shared}")
    print(format_plan(plans))
    if config.training.max_hours is not None:
        print(f"training.max_hours={config.training.max_hours:g}: of at most "
              f"{counted(config.training.epochs, 'epoch')} as many as fit, once steps have been timed")


def format_plan(plans: Mapping[str, Plan]) -> str:
    """One aligned row for each stage, in GiB; the last lines explain it."""
    header = ["stage", *TAGS, "peak", "allowance", "budget", "micro-batch (of), recompute"]
    rows = [header]
    for name, plan in plans.items():
        figures = [*(plan.by_tag.get(tag, 0) for tag in TAGS), plan.peak_bytes, plan.allowance_bytes, plan.budget_bytes]
        rows.append([name, *(f"{figure / GIB:.2f}" for figure in figures), describe_towers(plan)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:]), row[-1]]) for row in rows]
    used = sorted({plan.device for plan in plans.values()})
    context = ", ".join(f"{CONTEXT_GIB[device]} GiB of context on {device}" for device in used)
    lines.append(f"GiB. Allowance: {context}{', the best weights so far' if 'cpu' in used else ''}, and gaps and "
                 "workspaces. A tower whose micro-batch is the whole batch is encoded once; one in parts runs forward "
                 "again in the backward pass; /n: so does every n-th block. Objectives that fuse share tokens that are "
                 "kept; else each of them encodes its own.")
    return "\n".join(lines)


def describe_towers(plan: Plan) -> str:
    """"image 16 (32), audio 32 (32) /2; tokens kept": micro-batch, of how many, and which blocks are recomputed."""
    towers = ", ".join(f"{tower} {size} ({plan.upper[tower]})" + (f" /{n}" if (n := plan.recompute[tower]) else "")
                       for tower, size in plan.micro_batch.items())
    return f"{towers}; tokens kept" if plan.keep_tokens else towers


# ---- calibration -------------------------------------------------------------------------------------------------

LEAST_RATIO = 1.02  # an allocator that seemed to waste nothing may do so next time
LEAST_GIB = 2.0  # of a plan; below it the workspaces that every process has, however small its steps, raise the ratio
MANY_RATIOS = 20  # the newest stages' count


def calibration_file() -> Path:
    """Where this machine's ratios are kept for all runs."""
    return devices.machine_file("memory_ratios.json")


def _ratios() -> dict[str, list[float]]:
    try:
        found = json.loads(calibration_file().read_text(encoding="utf-8"))
        return {str(name): [float(ratio) for ratio in ratios] for name, ratios in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def calibration(device_name: str) -> float | None:
    """The largest ratio of measured to predicted peak among the newest stages run on devices of this name with this
    torch, at least LEAST_RATIO; None: nothing has been measured here."""
    ratios = _ratios().get(f"{device_name}, torch {torch.__version__}")
    return max(LEAST_RATIO, *ratios) if ratios else None


def calibrate(device_name: str, measured_gib: float, planned_gib: float) -> None:
    """Keep a stage's ratio of measured to predicted peak for later plans, if its folder can be written and the stage
    was large enough to tell."""
    if planned_gib < LEAST_GIB:
        return
    known, name, path = _ratios(), f"{device_name}, torch {torch.__version__}", calibration_file()
    known[name] = [*known.get(name, []), measured_gib / planned_gib][-MANY_RATIOS:]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, "w") as file:
            json.dump(known, file, indent=1)
    except OSError:
        return  # a convenience: the next plan takes the general allowance
