"""Checks of the doctor that compute: the real model and steps on a few real samples, in a run of a temporary folder.

    model      the run as it would start
    steps      forward, backward and update of each stage and task: all finite, a gradient wherever there should be one
    overfit    each objective alone learns one small batch by heart, on a copy of the smallest size
    waiting    what reading a batch takes beside computing on it
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from datasets import Batch, Data, loader, pool, worker_count
from model import TriModalModel
from trimodal.config import PRESETS, Config, StageConfig, TaskConfig
from trimodal.data import cache
from trimodal.data.batches import Split
from trimodal.doctor.findings import Finding, State, guarded
from trimodal.doctor.inspection import Case
from trimodal.memory import devices
from trimodal.memory.devices import Fit
from trimodal.objectives.losses import OBJECTIVES, start_sigmoid
from trimodal.objectives.step import Step
from trimodal.training.budget import Plan
from trimodal.training.loop import attempt, leave_gradients, train_step, update
from trimodal.training.planner import TOWERS
from trimodal.training.resume import begins_with_sigmoid, stage_epochs
from trimodal.training.run import Run, build_model, open_run
from trimodal.training.stage import TOTAL, Stage, build_stage, first_contrast, make_step
from trimodal.training.tracking import SilentTracker

SAMPLES = {"cuda": 32}  # of a batch; a few leave a GPU idle
FEW_SAMPLES = 8  # elsewhere
UPDATES = 40  # in which a batch is learnt
FEW_UPDATES, TRY_S = 10, 20.0  # on a slow machine: no more than so many once so long has passed
QUICK_RATE = 1e-3  # a run takes thousands of updates: here ten times its rate, up to this one
LEARNT, SLOW = 0.7, 0.97  # of the first loss: at most the one is learnt, above the other is not
READ_SAMPLES = 64  # samples of each kind that are read again and again
NOT_FINITE = "not finite"
NOTHING = "nothing to learn in these samples"
WAIT_PCT = 20.0  # of the time; more is told


def model(case: Case) -> Iterator[Finding]:
    """The run that the others use: this configuration with effective batches of a few samples, fresh or as the
    checkpoint left it."""
    assert case.device is not None
    config = case.tried
    training = dataclasses.replace(config.training, batch_size=SAMPLES.get(case.device.type, FEW_SAMPLES),
                                   gradient_accumulation_steps=1)
    rows = tuple(dataclasses.replace(row, effective_batch=None) for row in config.stages)
    small = dataclasses.replace(config, training=training, stages=rows)
    case.run = run = open_run(small, dataclasses.replace(case.options, resume=None, overwrite=False), case.state,
                              data=case.data)
    run.tracker.close()
    run.tracker = SilentTracker(run.folder)
    if begins_with_sigmoid(config, case.state):
        start_sigmoid(run.model, first_contrast(config))
    count = sum(p.numel() for p in run.model.parameters())
    yield Finding("model", "ok", f"{config.model.size}, {count / 1e6:.1f} M parameters; {len(run.data.concepts)} "
                                 f"concepts, {len(run.data.speakers)} speakers")


# ---- the samples -------------------------------------------------------------------------------------------------


def some_rows(split: Split, task: TaskConfig, count: int) -> np.ndarray:
    """`count` samples of a task, the same each time: with a speaker where it trains speakers, and of different captions
    where it has text, and of different files, since equal ones cannot be told apart."""
    members = pool(split.table, task.inputs)
    members = np.random.default_rng(0).permutation(members)
    if "speaker" in task.objectives and (split.speakers[members] >= 0).any():
        members = members[split.speakers[members] >= 0]
    for told in task.inputs:
        ids = {"image": split.image_ids, "audio": split.audio_ids}.get(told)
        first = split.caption_ids[split.table.caption_offsets[members]] if ids is None else ids[members]
        different = members[np.sort(np.unique(first, return_index=True)[1])]
        members = different if len(different) > 1 else members
    return members[:count]


def batch_of(run: Run, task: TaskConfig) -> Batch:
    """A training batch of a few samples."""
    rows = some_rows(run.data.splits["train"], task, run.config.training.batch_size)
    return next(iter(loader(run.data, "train", [(0, rows)], run.config, inputs=[task.inputs], train=True, epoch=1,
                            workers=1)))  # a file that hangs or ends its reader does so there


def small_fit(run: Run, plan: Plan | None) -> Fit:
    """The plan's fit, for few samples: a tower that it splits has two parts here as well."""
    training = run.config.training
    sizes = {tower: training.batch_size * (training.captions_per_visit if tower == "text" else 1) for tower in TOWERS}
    if plan is None:
        return Fit(sizes, dict.fromkeys(TOWERS, 0))
    return Fit({tower: min(plan.micro_batch[tower], -(-size // 2)) if tower in plan.in_parts else size
                for tower, size in sizes.items()}, dict(plan.recompute))


# ---- one step of each task ---------------------------------------------------------------------------------------


def steps(case: Case) -> Iterator[Finding]:
    for row in case.rows:
        yield from guarded(f"step: {row.name}", _steps_of, case, row)


def _steps_of(case: Case, row: StageConfig) -> Iterator[Finding]:
    assert case.run is not None
    tasks, skipped = case.tasks[row.name]
    case.run.fits[row.name] = small_fit(case.run, case.plans.get(row.name))
    stage = build_stage(case.run, row, tasks, 1)
    if case.state is not None and goes_on_in(case.config, case.state) == row.name:
        stage.load_state_dict(case.state["stage_state"])
    for number, task in enumerate(tasks):
        title = f"step: {row.name} {'-'.join(task.inputs)}"
        case.say(title)
        yield from guarded(title, _step, case, title, stage, number)
    for line in skipped:
        yield Finding(f"step: {row.name}", "skipped", line.partition("] ")[2])


def goes_on_in(config: Config, state: Mapping[str, Any]) -> str | None:
    """The stage within which a resumed run begins; None: at a stage's start."""
    epochs = stage_epochs(config, state)
    end = sum(list(epochs.values())[:list(epochs).index(state["stage"]) + 1])
    return state["stage"] if state["progress"]["epoch"] < end else None


def _step(case: Case, title: str, stage: Stage, number: int) -> Iterator[Finding]:
    """Gradients first, then a whole step as it trains, then one more, which is timed since nothing is new to it."""
    assert case.run is not None
    run, task = case.run, stage.tasks[number]
    run.model.train()
    batch = batch_of(run, task)
    scaler, stage.optimizer.scaler = stage.optimizer.scaler, None  # its first scale is a guess that may overflow
    parts, cause = attempt(run.world, lambda: leave_gradients(run, stage, number, batch, None))
    stage.optimizer.scaler = scaler
    if parts is None:
        yield Finding(title, "fail", f"out of memory with {len(batch.keys)} samples ({cause})", devices.KNOBS)
        return
    if TOTAL not in parts:
        yield Finding(title, "skipped", NOTHING)
        return
    faults = _faults(run, stage, number, batch, {name: float(value) for name, value in parts.items()})
    trained = sum(p.grad is not None for p in stage.optimizer.parameters)
    stage.optimizer.zero_grad()
    train_step(run, stage, number, batch).read()
    gradients_s = _timed(lambda: leave_gradients(run, stage, number, batch, None)[TOTAL])
    update_s = _timed(lambda: update(run, stage)[0])
    seconds = gradients_s + update_s
    share = len(batch.keys) / case.config.effective_batch(stage.row)  # an update serves a whole effective batch
    case.step_s[stage.row.name, number] = gradients_s + update_s * share
    if faults:
        yield Finding(title, "fail", "\n".join(faults), _remedy(run, stage, faults))
        return
    yield Finding(title, "ok", f"{', '.join(task.objectives)}: loss {float(parts[TOTAL]):.3f}; {trained} gradients, "
                               f"all finite; {seconds:.2f} s for {len(batch.keys)} samples")


def _timed(work: Callable[[], Tensor]) -> float:
    """Seconds until what `work` gives has come to the host."""
    start_s = time.perf_counter()
    float(work())
    return time.perf_counter() - start_s


def _faults(run: Run, stage: Stage, number: int, batch: Batch, parts: dict[str, float]) -> list[str]:
    """What is wrong with the gradients that a step has left."""
    every = dict(run.model.named_parameters())
    for name, _, head in stage.objectives_of(number):
        every |= {f"{name}.{part}": p for part, p in head.named_parameters()}
    bad = [name for name, p in every.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    found = [f"loss is {NOT_FINITE} ({_some([name for name, value in parts.items() if not math.isfinite(value)])})"
             ] if not math.isfinite(parts[TOTAL]) else []
    found += [f"gradient is {NOT_FINITE} of {_some(bad)}"] if bad else []
    step = make_step(run, stage, batch, train=True)
    lacking = without_gradient(run.model, stage, number, step)
    return found + ([f"no gradient of {_some(lacking)}"] if lacking else [])


def without_gradient(model: TriModalModel, stage: Stage, number: int, step: Step) -> list[str]:
    """Trainable parameters that a task should train and that it gave no gradient.

    It should train the encoders of its inputs, the fusion where an objective uses it, and the heads of its objectives;
    and all of any other part of the model of which it trains something.
    """
    active = [(name, objective) for name, _, objective in stage.objectives_of(number) if objective.count(step)]
    wanted = {*stage.tasks[number].inputs, *("fusion" for _, objective in active if objective.uses_fusion)}
    parts: dict[str, dict[str, bool]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts.setdefault(part_of(model, name), {})[name] = p.grad is not None
    lacking = [name for part, has in parts.items() if part in wanted or any(has.values())
               for name, there in has.items() if not there]
    return lacking + [f"{name}.{part}" for name, objective in active for part, p in objective.named_parameters()
                      if p.requires_grad and p.grad is None]


def part_of(model: nn.Module, name: str) -> str:
    """The part of the model that a parameter belongs to: one of its children, or an entry of a dictionary in them,
    since each serves other inputs."""
    module, words = model, name.split(".")
    for depth, word in enumerate(words[:-1], start=1):
        module = getattr(module, word)
        if isinstance(module, nn.ModuleDict | nn.ParameterDict):
            return ".".join(words[:depth + 1])
    return words[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(name or "all" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _remedy(run: Run, stage: Stage, faults: list[str]) -> str:
    name = stage.row.name
    if not any(NOT_FINITE in fault for fault in faults):
        return f"stages.{name}.trainable=..., without what no objective uses; or an objective that uses it"
    if run.precision.dtype is not None:
        return "training.use_amp=false"
    return f"look at the samples' values, or leave this objective out of stages.{name}"


# ---- learning by heart -------------------------------------------------------------------------------------------


def overfit(case: Case) -> Iterator[Finding]:
    """Each objective with each kind of inputs, in the first stage that has it."""
    assert case.run is not None
    run = _small_copy(case.run)
    if (size := run.config.model.size) != case.config.model.size:
        yield Finding("overfit", "ok", f"on a fresh model of size {size}, to be quick")
    start = {name: value.clone() for name, value in run.model.state_dict().items()}
    done = set()
    for row in case.rows:
        for task in case.tasks[row.name][0]:
            for name in [known for known in OBJECTIVES if known in task.objectives]:
                title = f"overfit: {name} {'-'.join(task.inputs)}"
                if title not in done:
                    done.add(title)
                    case.say(title)
                    run.model.load_state_dict(start)
                    alone = TaskConfig(inputs=task.inputs, objectives={name: 1.0})
                    yield from guarded(title, _learn, run, row, alone, title)


def _small_copy(run: Run) -> Run:
    """The same run with a fresh model, of at most the smallest size."""
    settings = run.config.model
    if settings.preset.dim > PRESETS["tiny"].dim:
        settings = dataclasses.replace(settings, size="tiny")
    config = dataclasses.replace(run.config, model=settings)
    copy = dataclasses.replace(run, config=config, model=build_model(config, run.data, None).to(run.device))
    if config.training.contrastive_loss == "sigmoid":
        start_sigmoid(copy.model, config.training.batch_size)
    return copy


def quick(config: Config, row: StageConfig) -> tuple[Config, float]:
    """The configuration with a constant rate that learns one batch soon, as long as that of the run learns at all."""
    peak = config.training.learning_rate * row.lr_factor
    rate = max(peak, min(10 * peak, QUICK_RATE))
    training = dataclasses.replace(config.training, learning_rate=rate / row.lr_factor, warmup_pct=0.0,
                                   min_lr_pct=100.0)
    return dataclasses.replace(config, training=training), rate


def _learn(run: Run, row: StageConfig, task: TaskConfig, title: str) -> Iterator[Finding]:
    config, rate = quick(run.config, row)
    row = dataclasses.replace(row, trainable=(".*",))  # its patterns name layers of another size
    run = dataclasses.replace(run, config=config, fits={row.name: small_fit(run, None)})
    stage = build_stage(run, row, [task], 1)
    batch, losses, start_s = batch_of(run, task), list[float](), time.perf_counter()
    for done in range(UPDATES + 1):
        losses.append(train_step(run, stage, 0, batch).read()[0])  # of the weights before its update
        is_slow = done >= FEW_UPDATES and time.perf_counter() - start_s > TRY_S
        if losses[-1] <= LEARNT * losses[0] or is_slow or not math.isfinite(losses[-1]):
            break
    yield judged(title, losses, rate)


def judged(title: str, losses: Sequence[float], rate: float) -> Finding:
    """Whether a batch was learnt; `losses`: the first one, and that after each update."""
    before, after = losses[0], losses[-1]
    if before == 0.0:
        return Finding(title, "skipped", NOTHING)
    updates = f"{len(losses) - 1} update{'s' * (len(losses) > 2)}"
    found = f"loss {before:.3f} -> {after:.3f} by {updates} on one batch at rate {rate:.1g}"
    if after <= LEARNT * before:
        return Finding(title, "ok", found)
    state: State = "warn" if after <= SLOW * before else "fail"
    return Finding(title, state, found, f"{'raise' if after <= before else 'lower'} --lr; or do these samples not "
                                        "belong together?")


# ---- waiting for data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How long the loader takes for a batch."""

    batch_s: float
    processes: int

    def wait_pct(self, step_s: float) -> float:
        """Of the time of a loop over batches and steps: processes read while a step computes."""
        if not self.processes:
            return 100 * self.batch_s / (self.batch_s + step_s)
        return 100 * max(0.0, 1 - step_s / self.batch_s)


def waiting(case: Case) -> Iterator[Finding]:
    """Of each stage, over its tasks as an epoch mixes them."""
    assert case.run is not None
    known: dict[tuple[str, ...], Reading] = {}
    table = case.run.data.tables["train"]
    for row in case.rows:
        tasks, read_s, step_s = case.tasks[row.name][0], 0.0, 0.0
        for number, task in enumerate(tasks):
            if task.inputs not in known:
                case.say(f"waiting: {'-'.join(task.inputs)}")
                known[task.inputs] = read_time(case, task)
            batches = task.passes * len(pool(table, task.inputs))
            read_s += batches * known[task.inputs].batch_s
            step_s += batches * case.step_s.get((row.name, number), math.nan)
        whole = sum(task.passes * len(pool(table, task.inputs)) for task in tasks)
        mean = Reading(read_s / whole, known[tasks[0].inputs].processes)
        yield _waited(case, row, mean, step_s / whole)


def read_time(case: Case, task: TaskConfig) -> Reading:
    """Of batches that follow each other, once all processes are at work."""
    assert case.run is not None
    run, size = case.run, case.run.config.training.batch_size
    rows = some_rows(run.data.splits["train"], task, max(READ_SAMPLES, size))
    data = as_cached(case, rows)
    cut = [rows[i:i + size] for i in range(0, len(rows), size)]
    count = worker_count(case.config, 1000)
    started = max(count, 1)
    jobs = [(0, cut[i % len(cut)]) for i in range(started + max(2 * count, 4))]
    times_s = [time.perf_counter() for _ in loader(data, "train", jobs, run.config, inputs=[task.inputs], train=True,
                                                  epoch=1, workers=count)]
    return Reading((times_s[-1] - times_s[started - 1]) / (len(times_s) - started), count)


def as_cached(case: Case, rows: np.ndarray) -> Data:
    """The data as they will be once a run has filled its cache: with these rows in a cache of the temporary folder."""
    assert case.run is not None
    data = case.run.data
    split = data.splits["train"]
    has = {"image": split.table.has_image[rows], "sound": split.table.has_audio[rows]}
    if not case.fills_cache or all((split.store.places[kind][rows, 0] >= 0)[has[kind]].all() for kind in cache.KINDS):
        return data
    settings = dataclasses.replace(case.run.config.data, cache_dir=str(case.folder / "cache"))
    part = cache.open_store(split.table.select(rows), dataclasses.replace(case.run.config, data=settings))
    places = {kind: np.full((len(split.table), 2), -1, np.int64) for kind in cache.KINDS}
    for kind, found in part.places.items():
        places[kind][rows] = found
    store = dataclasses.replace(split.store, entries=part.entries, places=places)
    return dataclasses.replace(data, splits={**data.splits, "train": dataclasses.replace(split, store=store)})


def _waited(case: Case, row: StageConfig, reading: Reading, step_s: float) -> Finding:
    title, wait_pct = f"waiting: {row.name}", reading.wait_pct(step_s)
    if math.isnan(step_s):
        return Finding(title, "skipped", "needs the time of a step; see above")
    found = (f"a batch is read in {1000 * reading.batch_s:.0f} ms from files in memory (reading processes: "
             f"{reading.processes}) and trained in {1000 * step_s:.0f} ms: waits {wait_pct:.0f} % of the time")
    if wait_pct <= WAIT_PCT:
        return Finding(title, "ok", found)
    if not case.config.data.cache:
        return Finding(title, "warn", found, "data.cache=true")
    return Finding(title, "warn", found, f"data.workers={max(2 * reading.processes, 1)}")
