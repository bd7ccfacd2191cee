"""Plans the memory of every stage: its real training step, run on fake tensors, at micro-batches and recompute that
fit a stated budget.

The step is the one that trains (`objectives`, `optimizer`), over a batch of the largest shapes that the stage can meet:
audio of `data.audio_max_s`, captions of `model.context_length`. What a step reads off its data on the host (how many
patches are kept, which words are hidden) is put at its worst case, since fake tensors have no values. At most
`MICRO_BATCHES` of each tower are run, beside inputs, features and kept tokens of full size: further ones free what they
took. Under torchrun a plan is that of each process: its share of the batch, the features of all. Which fits are tried,
and which of them is taken, is decided in `fitting`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from datasets import Batch
from model import TriModalModel
from trimodal.blocks import KERNELS, KERNELS_OF, use_kernel
from trimodal.config import (
    AUDIO_WINDOW_FRAMES,
    FRAME_RATE_HZ,
    IMAGE_PATCH,
    MODALITIES,
    NUM_MELS,
    Config,
    StageConfig,
    TaskConfig,
)
from trimodal.data.batches import PATH_DRAWS
from trimodal.data.workers import cpu_cores, prepare_worker
from trimodal.distributed import World
from trimodal.files import replacing
from trimodal.memory import shapes
from trimodal.memory.devices import EVALUATION, GIB, Fit
from trimodal.memory.tracker import HOST, OverLimit, Usage, loss_ends_at, phase, tracing
from trimodal.objectives import OBJECTIVES, build_objective
from trimodal.objectives.base import learn
from trimodal.objectives.step import Rows, Share, Step
from trimodal.towers import captions
from trimodal.towers.base import SoundInput
from trimodal.towers.opening import build_tower
from trimodal.towers.settings import frozen_until
from trimodal.training.fitting import Limits, Measure, Plan, plan_fit, plan_of
from trimodal.training.optimizer import MovingAverage, Optimizer, freeze

PLAN_VERSION = 5  # to be raised whenever a step takes other memory than before: kept plans then count no longer
TOWERS = ("image", "audio", "text", "fusion")  # the costliest first
MICRO_BATCHES = 2  # of each tower in a planned step

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceSetup:
    """The device type, precision, number of ranks and allocator calibration that a plan is made for.

    Do not rename a field: the names are hashed into `settings_digests`, which checkpoints hold, and into the file names
    of cached plans.
    """

    device: str  # torch.device.type, such as "cuda"
    amp: torch.dtype | None  # of autocast; None: float32
    num_speakers: int = 0  # classes of the speaker objective
    processes: int = 1  # ranks that share each effective batch
    ratio: float | None = None  # calibration: measured over predicted peak memory; None: not measured on this device
    kernel: str = KERNELS[0]  # of attention
    towers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # descriptions, by modality
    live: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # by stage, the frozen ones that run


# ---- a step on fake tensors --------------------------------------------------------------------------------------


@dataclass
class PlanStep(Step):
    """A step on fake tensors, which have no values and all lie on the CPU: what depends on values takes its worst case,
    and where it is planned for another device a transfer makes a copy."""

    is_on_host: bool = True
    upper: Mapping[str, int] = dataclasses.field(default_factory=dict)  # rows of this process, of which few are run

    def buffer_rows(self, modality: str) -> int:
        return self.upper[modality]

    def split(self, modality: str, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """A slice is of this process's rows; of a list, all are those of others, if there are others."""
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop)
        elif self.world.size > 1:
            return rows[:0], rows, torch.arange(len(rows))
        return rows, rows[:0], torch.arange(len(rows))

    def to_device(self, value: Tensor) -> Tensor:
        return value if self.is_on_host else value.clone()

    def read(self, number: Tensor, most: int) -> int:
        return most

    def gather(self, features: Tensor, num_rows: int) -> Tensor:
        others = features.new_zeros(num_rows - len(features), features.shape[1])
        return loss_ends_at(torch.cat([features, others]) if len(others) else features)


def largest_batch(config: Config, row: StageConfig, task: TaskConfig, model: TriModalModel,
                  live: Sequence[str] = ()) -> Batch:
    """A batch of zeros in the largest shapes that a step of this task can have: sounds of `data.audio_max_s`, for each
    sample `training.captions_per_visit` captions of `model.context_length` tokens; of pretrained towers that no stage
    until this one trains what the cache keeps of their outputs, but of those that are `live`."""
    B, zeros = config.effective_batch(row), torch.zeros
    C, L = B * config.training.captions_per_visit, config.model.context_length
    noise = {"path": zeros(B, PATH_DRAWS), "drop_text": zeros(B)}
    columns: dict[str, Any] = {"concepts": zeros(B, config.model.num_classes, dtype=torch.bool)}
    if "audio" in task.inputs:
        columns["speakers"] = zeros(B, dtype=torch.int64)
    if "text" in task.inputs:
        columns |= {"caption_owner": zeros(C, dtype=torch.int64), "caption_ids": zeros(C, dtype=torch.int64)}
        if config.training.compares_captions:
            columns["caption_vectors"] = zeros(C, captions.model_for(config.data.languages).width, dtype=torch.float16)
        noise["path_text"] = zeros(C, PATH_DRAWS)
    rows = {name: C if name == "text" else B for name in task.inputs}
    frozen = frozen_until(config, model.towers).get(row.name, set()) if config.data.cache else set()
    kept = [name for name in rows if name in frozen and name not in live]
    tokens = {name: largest_tokens(config, model, name, rows[name]) for name in kept}
    for name in rows.keys() - set(kept):
        columns |= largest_inputs(config, model, name, rows[name])
    patches = {"image": (config.model.image_side // IMAGE_PATCH) ** 2, "text": L,
               "audio": largest_sound(config, model)[0] // 16 * (NUM_MELS // 16)}
    noise |= {name: zeros(count, patches[name]) for name, count in rows.items() if name not in model.towers}
    return Batch(inputs=task.inputs, keys=[], sample_ids=zeros(B, dtype=torch.int64), noise=noise, tokens=tokens,
                 **columns)


def largest_inputs(config: Config, model: TriModalModel, modality: str, rows: int) -> dict[str, Tensor]:
    """What a tower reads, in its largest shapes, as columns of a batch."""
    S, L, zeros = config.model.image_side, config.model.context_length, torch.zeros
    if modality == "image":
        return {"images": zeros(rows, 3, S, S, dtype=torch.uint8)}
    if modality == "text":
        return {"input_ids": zeros(rows, L, dtype=torch.int64), "attention_mask": zeros(rows, L, dtype=torch.bool)}
    frames, bins = largest_sound(config, model)
    dtype = torch.float32 if "audio" in model.towers else torch.float16
    return {"audio": zeros(rows, frames, bins, dtype=dtype), "audio_lengths": zeros(rows, dtype=torch.int64)}


def largest_sound(config: Config, model: TriModalModel) -> tuple[int, int]:
    """Frames and bins of the longest sound of training, padded as batches are: to a multiple of the 16 frames that a
    patch spans, or as its pretrained tower reads them."""
    if "audio" not in model.towers:
        return min(-(-int(config.data.audio_max_s * FRAME_RATE_HZ) // 16) * 16, AUDIO_WINDOW_FRAMES), NUM_MELS
    taken = model.towers["audio"].input
    assert isinstance(taken, SoundInput)
    frames = math.ceil(config.data.audio_max_s * taken.frames_per_s)
    if taken.whole_windows:
        frames = -(-frames // taken.window_frames) * taken.window_frames
    return frames, taken.num_bins


def largest_tokens(config: Config, model: TriModalModel, modality: str, rows: int) -> tuple[Tensor, Tensor]:
    """What the cache keeps of so many rows of a frozen tower: tokens float32 [rows, 1 + N, D], and which are real."""
    device = next(model.parameters()).device
    one = [value.to(device) for value in largest_inputs(config, model, modality, 1).values()]
    with torch.no_grad():
        shape = getattr(model, modality).tower_tokens(*one).tokens_BND.shape[1:]
    return torch.zeros(rows, *shape), torch.ones(rows, shape[0], dtype=torch.bool)


def model_of(config: Config, setup: DeviceSetup) -> TriModalModel:
    """The model of a configuration as it is planned: with random weights, and fake ones within a FakeTensorMode."""
    return TriModalModel(config.model, {name: build_tower(of) for name, of in setup.towers.items()})


class TaskMeasure:
    """Measures the optimizer step of one task at any fit; model, heads, optimizer and batch are made once for all."""

    def __init__(self, config: Config, row: StageConfig, task: TaskConfig, setup: DeviceSetup):
        self.config, self.row, self.setup, amp = config, row, setup, setup.amp
        self.upper = stage_upper(config, row, setup)
        self.mode = FakeTensorMode()
        with kernels_of(setup.device), tracing(mode=self.mode) as tracker:
            self.model = model_of(config, setup)
            use_kernel(self.model, setup.kernel)
            freeze(self.model, row)
            self.objectives = [
                build_objective(name, self.model, task.inputs, setup.num_speakers, config.training)
                for name in OBJECTIVES if name in task.objectives]
            both = nn.ModuleDict({"model": self.model, "objectives": nn.ModuleList(self.objectives)})
            self.parameters = list(both.parameters())
            tracker.mark("parameters", self.parameters)
            self.optimizer = Optimizer(both, config.training, amp)
            self.optimizer.allocate()
            self.average = MovingAverage(self.model, decay) if (decay := config.training.ema_decay) else None
            tracker.mark("optimizer", [list(state.values()) for state in self.optimizer.state.values()],
                         self.average.values if self.average else [])
            with phase("data" if setup.device == "cpu" else HOST):
                self.batch = largest_batch(config, row, task, self.model, setup.live.get(row.name, ()))
            self.held = tracker.held()

    def __call__(self, fit: Fit, limit_bytes: int | None = None) -> Usage | None:
        """Bytes at the peak of the step; None as soon as more than `limit_bytes` live."""
        apply_recompute(self.model, fit)
        try:
            with (contextlib.suppress(OverLimit), kernels_of(self.setup.device),
                  tracing(limit_bytes, self.mode) as tracker):
                tracker.hold(self.held)
                tracker.watch(self.parameters)
                self._step(fit)
                return tracker.usage()
            return None
        finally:
            self.optimizer.zero_grad()

    def _step(self, fit: Fit) -> None:
        row, amp = self.row, self.setup.amp
        step = PlanStep(
            model=self.model, batch=self.batch, device=torch.device("cpu"), micro_batch=fit.micro_batch,
            keep_tokens=fit.keep_tokens, upper=self.upper,
            autocast=lambda: torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None),
            keep={"image": row.image_keep, "audio": row.audio_keep}, drop_path=row.drop_path,
            feature_dropout=row.feature_dropout,
            num_concepts=self.config.model.num_classes, world=World(size=self.setup.processes), stage=row.name,
            is_on_host=self.setup.device == "cpu",
            share=Share({tower: range(min(MICRO_BATCHES * fit.micro_batch[tower], rows))
                         for tower, rows in self.upper.items()}))

        def backward(loss: Tensor) -> None:
            with phase("loss"):
                self.optimizer.backward(loss)

        learn(step, [(1.0, objective) for objective in self.objectives], backward)
        _, finite = self.optimizer.step(1e-4)
        if self.average:
            self.average.update(self.model.parameters(), finite)


@contextlib.contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Inside, the model chooses its kernels as on this type of device."""
    token = KERNELS_OF.set(device)
    try:
        yield
    finally:
        KERNELS_OF.reset(token)


def apply_recompute(model: TriModalModel, fit: Fit) -> None:
    """Let the blocks of each tower be recomputed as the fit says."""
    for tower, every in fit.recompute.items():
        getattr(model, tower).set_recompute(every)


def stage_upper(config: Config, row: StageConfig, setup: DeviceSetup) -> dict[str, int]:
    """Rows of each tower in one process's share of an effective batch."""
    own = -(-config.effective_batch(row) // setup.processes)
    return {tower: own * (config.training.captions_per_visit if tower == "text" else 1) for tower in TOWERS}


class StageMeasure:
    """Measures the tasks of a stage at a fit, each anew only where the fit differs in a tower that the task uses."""

    def __init__(self, config: Config, row: StageConfig, tasks: Sequence[TaskConfig], setup: DeviceSetup,
                 kind: Callable[..., Measure] = TaskMeasure):
        self.tasks, self.order = tasks, list(range(len(tasks)))
        self.measure_of = functools.cache(lambda number: kind(config, row, tasks[number], setup))
        self.known: dict[str, Usage | None] = {}  # None: above the limit

    def __call__(self, fit: Fit, limit_bytes: int | None) -> Usage | None:
        """Peak of the task that takes most, None if it is above the limit. Limits never rise from call to call."""
        found = []
        for number in list(self.order):
            task = self.tasks[number]
            fuses = any(OBJECTIVES[name].scope == "fusion" for name in task.objectives)
            towers = (*task.inputs, "fusion") if fuses else task.inputs
            sizes = [(fit.micro_batch[tower], fit.recompute[tower]) for tower in towers]
            key = str((task, sizes, fuses and fit.keep_tokens))
            if key not in self.known or (self.known[key] is None and limit_bytes is None):
                self.known[key] = self.measure_of(number)(fit, limit_bytes)
            usage = self.known[key]
            if usage is None or (limit_bytes is not None and usage.peak_bytes > limit_bytes):
                self.order.sort(key=lambda other: other != number)  # the first to be measured at the next fit
                return None
            found.append(usage)
        return max(found, key=lambda usage: usage.peak_bytes)


def encoding_usage(config: Config, tower: str, num_samples: int, setup: DeviceSetup) -> Usage:
    """Peak memory of one forward pass of `num_samples` samples of one modality, as evaluation encodes them: through its
    tower, the fusion and the classifier, without gradients, on fake tensors."""
    with kernels_of(setup.device), tracing() as tracker, torch.no_grad():
        model = model_of(config, setup)
        use_kernel(model, setup.kernel)
        tracker.mark("parameters", list(model.parameters()))
        inputs = largest_inputs(config, model, tower, num_samples)
        if tower == "audio" and tower not in model.towers:
            inputs = {"audio": torch.zeros(num_samples, AUDIO_WINDOW_FRAMES, NUM_MELS, dtype=torch.float16)}
        tracker.mark("data", inputs)
        with torch.autocast("cpu", setup.amp or torch.bfloat16, enabled=setup.amp is not None):
            model(**inputs)
    return tracker.usage()


# ---- stages ------------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """A plan that is to be found: the file that keeps it, and what finds it anew."""

    path: Path
    find: Callable[[], Plan]


def plan_stages(config: Config, tasks: Mapping[str, Sequence[TaskConfig]], setup: DeviceSetup,
                fits: Mapping[str, Fit] | None = None) -> dict[str, Plan]:
    """The plan of each stage that `tasks` names, in order, and of `evaluation`; those in `fits` are planned so.

    Plans kept from before are read; all others are found side by side.

    Raises:
        OverBudget: nothing fits; names the knobs.
    """
    fits = fits or {}
    searches = {row.name: stage_search(config, row, tasks[row.name], setup, fits.get(row.name))
                for row in config.stages if tasks.get(row.name)}
    return plans_of({**searches, EVALUATION: evaluation_search(config, setup, fits.get(EVALUATION))})


def plans_of(searches: Mapping[str, Search]) -> dict[str, Plan]:
    """The plan of each search: read where it was kept, else found and then kept."""
    kept = {name: plan for name, search in searches.items() if (plan := read_plan(search.path))}
    found = side_by_side({name: search.find for name, search in searches.items() if name not in kept})
    for name, plan in found.items():
        keep_plan(searches[name].path, plan)
    return {name: kept.get(name) or found[name] for name in searches}


def side_by_side(searches: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """The result of each search, in forked processes where there are several cores; begins with the last, since the
    last stages tend to take longest."""
    count = min(len(searches), cpu_cores())
    try:
        if count < 2 or sys.platform != "linux":  # elsewhere a process would have to import torch, which takes longer
            return {name: find() for name, find in searches.items()}
        with ProcessPoolExecutor(count, multiprocessing.get_context("fork"), prepare_worker) as pool:
            running = {name: pool.submit(find_in_fork, find) for name, find in reversed(list(searches.items()))}
            try:
                return {name: running[name].result() or find() for name, find in searches.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        shapes.forget()


def find_in_fork(find: Callable[[], T]) -> T | None:
    """`find()`; None where torch runs no backward pass, as in a fork of a process that has run one."""
    try:
        torch.zeros((), requires_grad=True).backward()
    except RuntimeError:
        return None
    return find()


def plan_stage(config: Config, row: StageConfig, tasks: Sequence[TaskConfig], setup: DeviceSetup,
               fit: Fit | None = None, kind: Callable[..., Measure] = TaskMeasure) -> Plan:
    """The plan of one stage, as `plan_stages` gives it."""
    return plans_of({row.name: stage_search(config, row, tasks, setup, fit, kind)})[row.name]


def stage_search(config: Config, row: StageConfig, tasks: Sequence[TaskConfig], setup: DeviceSetup,
                 fit: Fit | None = None, kind: Callable[..., Measure] = TaskMeasure) -> Search:
    """Finds a fit at which every task of the stage stays in the budget.

    Args:
        fit: plan this one, whether it stays in the budget or not.
        kind: of what measures a task.
    """
    return Search(plan_file(config, stage_facts(config, row, tasks, setup.live.get(row.name, ())), setup, fit),
                  functools.partial(find_stage_plan, config, row, tasks, setup, fit, kind))


def find_stage_plan(config: Config, row: StageConfig, tasks: Sequence[TaskConfig], setup: DeviceSetup,
                    fit: Fit | None, kind: Callable[..., Measure]) -> Plan:
    measure, upper = StageMeasure(config, row, tasks, setup, kind), stage_upper(config, row, setup)
    if fit is not None:
        return plan_of(fit, measure, upper, limits(config, setup))
    pinned = None if config.memory.micro_batch == "auto" else config.memory.micro_batch
    scopes = {OBJECTIVES[name].scope for task in tasks for name in task.objectives}
    return plan_fit(measure, upper, limits(config, setup), pinned=pinned, may_recompute=config.model.use_checkpoint,
                    parts_are_free=scopes <= {"tower"}, fuses="fusion" in scopes)


def plan_evaluation(config: Config, setup: DeviceSetup, fit: Fit | None = None) -> Plan:
    """The plan of evaluation, as `plan_stages` gives it."""
    return plans_of({EVALUATION: evaluation_search(config, setup, fit)})[EVALUATION]


def evaluation_search(config: Config, setup: DeviceSetup, fit: Fit | None = None) -> Search:
    """Finds how many samples of each modality evaluation encodes at a time, and the memory that this takes.

    It is `evaluation.batch_size`, or fewer where the budget is too small; if `fit` is given, it is what `fit` says.

    Clips are windows of the encoder's length. Out of memory the encoding halves its micro-batches by itself; a plan
    spares that, and says beforehand what it takes.
    """
    return Search(plan_file(config, evaluation_facts(config), setup, fit),
                  functools.partial(find_evaluation_plan, config, setup, fit))


def find_evaluation_plan(config: Config, setup: DeviceSetup, fit: Fit | None) -> Plan:
    usage_of = functools.cache(functools.partial(encoding_usage, config, setup=setup))

    def measure(fit: Fit, limit_bytes: int | None) -> Usage | None:
        usage = max(itertools.starmap(usage_of, fit.micro_batch.items()), key=lambda usage: usage.peak_bytes)
        return usage if limit_bytes is None or usage.peak_bytes <= limit_bytes else None

    upper = dict.fromkeys(TOWERS[:3], config.evaluation.batch_size)
    if fit is not None:
        return plan_of(fit, measure, upper, limits(config, setup))
    return plan_fit(measure, upper, limits(config, setup), may_recompute=False)


def limits(config: Config, setup: DeviceSetup) -> Limits:
    """The memory that a step may take on the device of `setup`. On a CPU the copy of the best weights so far, which a
    run keeps in host memory, takes part of the budget as well."""
    held = 0
    if setup.device == "cpu":
        with torch.device("meta"):
            held = sum(p.numel() * p.element_size() for p in model_of(config, setup).parameters())
    return Limits(int(config.budget_gb * GIB), setup.device, setup.ratio, held)


def without_speaker(tasks: Iterable[TaskConfig]) -> list[TaskConfig]:
    """The tasks less the objective of speakers, and less the tasks that have no other."""
    return [dataclasses.replace(task, objectives={n: w for n, w in task.objectives.items() if n != "speaker"})
            for task in tasks if set(task.objectives) != {"speaker"}]


# ---- what plans depend on, and their cache -----------------------------------------------------------------------


def settings_digests(config: Config, tasks: Mapping[str, Sequence[TaskConfig]], setup: DeviceSetup) -> dict[str, str]:
    """A digest of the settings that each plan depends on: of every stage that has tasks in `tasks`, and of evaluation.

    Where two digests of a stage are equal, its micro-batches and recompute may be used again: checkpoints hold these
    digests under "fits_asked". What is measured and not set (`setup.ratio` and `setup.kernel`) is left out.

    Returns:
        {stage, or EVALUATION: digest}.
    """
    everywhere = common_facts(config, dataclasses.replace(setup, ratio=None))
    del everywhere["place"]["kernel"]
    own = {row.name: stage_facts(config, row, tasks[row.name], setup.live.get(row.name, ()))
           for row in config.stages if tasks.get(row.name)}
    return {name: fingerprint(everywhere | facts)
            for name, facts in (*own.items(), (EVALUATION, evaluation_facts(config)))}


def common_facts(config: Config, setup: DeviceSetup) -> dict[str, Any]:
    """The settings that all plans depend on: model, preset, memory budget and device, as plain data for a digest."""
    left_out = {"word_embeddings", *(name for name in MODALITIES if config.model.tower(name).is_own)}
    model = {name: value for name, value in config.to_dict()["model"].items() if name not in left_out}
    model["image_size"] = config.model.image_side
    place = dataclasses.asdict(setup)
    del place["live"]  # a fact of stages
    for tower in place["towers"].values():
        tower.pop("digest", None)  # of the weights, which `--plan` does not read
    if not setup.towers:
        del place["towers"]  # digests of earlier releases are without
    return {"model": model, "preset": dataclasses.asdict(config.model.preset), "budget_gb": config.budget_gb,
            "place": place}


def stage_facts(config: Config, row: StageConfig, tasks: Sequence[TaskConfig],
                live: Sequence[str] = ()) -> dict[str, Any]:
    """The further settings that the plan of stage `row` depends on, as plain data for a digest: these, and which frozen
    towers it runs. Learning rates, loss weights and seeds are not among them, since they take no memory."""
    training = config.training  # without what is off, facts are those of earlier releases
    compared = {"likeness": (training.soft_targets > 0, training.false_negatives is not None)
                } if training.compares_captions else {}
    return {"effective_batch": config.effective_batch(row), "captions": config.training.captions_per_visit,
            "average": config.training.ema_decay > 0, "optimizer": config.training.optimizer,
            "loss": config.training.contrastive_loss, "keep": (row.image_keep, row.audio_keep),
            "drop_path": row.drop_path > 0, "trainable": row.trainable, "micro_batch": config.memory.micro_batch,
            "audio_max_s": config.data.audio_max_s, **compared,
            **(_tower_facts(config, row) if config.model.pretrained else {}), **({"live": list(live)} if live else {}),
            "tasks": [(task.inputs, sorted(task.objectives)) for task in tasks]}


def _tower_facts(config: Config, row: StageConfig) -> dict[str, Any]:
    """What the plan of a stage depends on where towers are pretrained: which of their outputs are kept."""
    names = [one.name for one in config.stages]
    before = config.stages[:names.index(row.name)] if row.name in names else ()
    return {"cache": config.data.cache, "dropout": row.feature_dropout > 0, "before": [one.trainable for one in before]}


def evaluation_facts(config: Config) -> dict[str, Any]:
    return {"evaluation": config.evaluation.batch_size}


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Digest of `facts` as JSON: the same for tuples and lists."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def plan_file(config: Config, facts: Mapping[str, Any], setup: DeviceSetup, fit: Fit | None) -> Path:
    """Where a plan that depends on these is kept: in `plans/` of the output folder."""
    key = fingerprint({**facts, **common_facts(config, setup), "fit": fit and dataclasses.asdict(fit),
                       "torch": torch.__version__, "version": PLAN_VERSION})
    return Path(config.paths.output_dir) / "plans" / f"plan_{key}.json"


def keep_plan(path: Path, plan: Plan) -> None:
    """`write_plan`, or a line on stderr where the folder cannot be written."""
    try:
        write_plan(path, plan)
    except OSError as error:
        print(f"Plan: {path.parent} cannot be written ({error.strerror}), so the plan is not kept", file=sys.stderr)


def read_plan(path: Path) -> Plan | None:
    """A plan that `write_plan` kept, or None; a damaged file counts as none, since planning again takes seconds."""
    try:
        return Plan(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        print(f"Plan: {path} is damaged ({type(error).__name__}), so it is made again", file=sys.stderr, flush=True)
        return None


def write_plan(path: Path, plan: Plan) -> None:
    """Keep `plan` in a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "w") as file:
        json.dump(dataclasses.asdict(plan), file, indent=1)
