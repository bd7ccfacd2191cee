"""Plans the memory of every stage: its real training step, on fake tensors, before a run and for `--plan`.

The step is the one that trains (`losses`, `optimization`), over a batch of the largest shapes that the stage can meet:
sounds of `data.audio_max_s`, captions of `model.context_length`. What a step reads off its data on the host (how many
patches are kept, which words are hidden) is put at its worst case, since fake tensors have no values. At most
`PARTS` micro-batches of each tower are run, beside inputs and features of full size: further ones free what they took.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import footprint
import memory
import steps
from config import AUDIO_WINDOW_FRAMES, FRAME_RATE_HZ, NUM_MELS, Config, StageConfig, TaskConfig, UserError
from datasets import Batch
from footprint import Usage
from losses import OBJECTIVES
from memory import GIB, MicroBatch, Plan
from model import TriModalModel
from optimization import MovingAverage, Optimizer
from steps import Positives, Step, accumulate

PARTS = 3
VOXCELEB_SPEAKERS = 7205  # training speakers of both releases: an upper bound, before their lists are read
TOWERS = ("image", "audio", "text", "fusion")


class PlanStep(Step):
    """A step whose data are shapes only: what depends on values takes its worst case."""

    def parts(self, modality: str) -> tuple[Tensor, ...]:
        return super().parts(modality)[:PARTS]

    def features(self, modality: str) -> Tensor:
        seen = super().features(modality)
        rest = self.rows(modality) - len(seen)
        features = torch.cat([seen, seen.new_zeros(rest, seen.shape[1])]) if rest else seen
        self.detached[modality] = features.detach()
        return footprint.loss_ends_at(features)

    def kept(self, modality: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.batch.noise[modality].shape[1]
        shape = (len(rows), max(1, -int(-patches * self.keep.get(modality, 1.0) // 1)))
        return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)

    def positives(self, inputs: Sequence[str]) -> Positives:
        keys = self.rows(inputs[1])
        member = torch.zeros(len(self.batch.sample_ids), keys, dtype=torch.bool)
        return Positives(member, torch.zeros(keys, dtype=torch.int64)).to(self.to_device)

    def hidden_words(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        length = self.batch.input_ids.shape[1]
        hidden = torch.zeros(len(rows), length, dtype=torch.bool)
        most = int(len(rows) * length * steps.TEXT_MASK_PART * 1.5)  # a draw is rarely above its mean by half
        return hidden, torch.zeros(max(most, 1), 2, dtype=torch.int64)

    def with_speaker(self, rows: Tensor) -> Tensor:
        return rows


def largest_batch(config: Config, row: StageConfig, task: TaskConfig) -> Batch:
    """A batch of the largest shapes of this task, with no meaningful values."""
    B = config.effective_batch(row)
    C, L = B * config.training.captions_per_visit, config.model.context_length
    T = min(-(-int(config.data.audio_max_s * FRAME_RATE_HZ) // 16) * 16, AUDIO_WINDOW_FRAMES)
    S, zeros = config.model.image_size, torch.zeros
    noise = {"path": zeros(B, 64), "drop_text": zeros(B)}
    columns: dict[str, Tensor] = {"concepts": zeros(B, config.model.num_classes, dtype=torch.bool)}
    if "image" in task.inputs:
        columns["images"] = zeros(B, 3, S, S, dtype=torch.uint8)
        noise["image"] = zeros(B, (S // 16) ** 2)
    if "audio" in task.inputs:
        columns |= {"audio": zeros(B, T, NUM_MELS, dtype=torch.float16),
                    "audio_lengths": zeros(B, dtype=torch.int64), "speakers": zeros(B, dtype=torch.int64)}
        noise["audio"] = zeros(B, T // 16 * (NUM_MELS // 16))
    if "text" in task.inputs:
        columns |= {"input_ids": zeros(C, L, dtype=torch.int64), "attention_mask": zeros(C, L, dtype=torch.bool),
                    "caption_owner": zeros(C, dtype=torch.int64), "caption_ids": zeros(C, dtype=torch.int64)}
        noise |= {"text": zeros(C, L), "path_text": zeros(C, 64)}
    return Batch(inputs=task.inputs, keys=[], sample_ids=zeros(B, dtype=torch.int64), noise=noise, **columns)


def step_usage(config: Config, row: StageConfig, task: TaskConfig, micro_batch: MicroBatch,
               amp: torch.dtype | None, num_speakers: int) -> Usage:
    """Bytes at the peak of two optimizer steps of one task on fake tensors."""
    def backward(loss: Tensor) -> None:
        with footprint.phase("loss"):
            optimizer.backward(loss)

    with footprint.tracing() as tracker:
        model = TriModalModel(config.model)
        objectives = nn.ModuleDict({name: OBJECTIVES[name](model, task.inputs, num_speakers)
                                    for name in task.objectives})
        both = nn.ModuleDict({"model": model, "objectives": objectives})
        tracker.watch(both.parameters())
        optimizer = Optimizer(both, config.training, amp)
        optimizer.allocate()
        average = MovingAverage(model, config.training.ema_decay) if config.training.ema_decay else None
        tracker.mark("optimizer", [list(state.values()) for state in optimizer.state.values()],
                     average.values if average else [])
        batch = largest_batch(config, row, task)
        tracker.mark("data", [v for v in vars(batch).values() if isinstance(v, Tensor)], batch.noise)
        for _ in range(2):
            step = PlanStep(
                model=model, batch=batch, device=torch.device("cpu"), micro_batch=micro_batch,
                autocast=lambda: torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None),
                keep={"image": row.image_keep, "audio": row.audio_keep}, drop_path=row.drop_path,
                num_concepts=config.model.num_classes)
            names = [known for known in OBJECTIVES if known in task.objectives]
            accumulate(step, (term for name in names for term in objectives[name].terms(step)), backward)  # type: ignore[operator]
            optimizer.step(1e-4)
            if average:
                average.update(model.parameters())
    return tracker.usage()


def plan_stage(config: Config, row: StageConfig, tasks: Sequence[TaskConfig], device: str, amp: torch.dtype | None,
               num_speakers: int = 0) -> Plan:
    """Micro-batches at which every task of the stage fits the budget, from the cache if it was planned before."""
    B = config.effective_batch(row)
    upper = {tower: B * (config.training.captions_per_visit if tower == "text" else 1) for tower in TOWERS}
    facts = {"model": config.to_dict()["model"], "effective_batch": B, "captions": config.training.captions_per_visit,
             "average": config.training.ema_decay > 0, "optimizer": config.training.optimizer,
             "audio_max_s": config.data.audio_max_s,
             "keep": (row.image_keep, row.audio_keep), "drop_path": row.drop_path > 0,
             "tasks": [(task.inputs, sorted(task.objectives)) for task in tasks],
             "memory": dataclasses.asdict(config.memory), "budget_gb": config.budget_gb,
             "device": device, "amp": str(amp), "speakers": num_speakers}  # rates, weights and seeds take no memory
    sources = [Path(__file__).with_name(f"{name}.py")
               for name in ("planning", "steps", "losses", "model", "optimization", "footprint")]
    folder, key = Path(config.paths.output_dir) / "plans", memory.plan_key(facts, sources)
    plan = memory.read_plan(folder, key)
    if plan is None:
        def run_step(micro_batch: MicroBatch) -> Usage:
            usages = [step_usage(config, row, task, micro_batch, amp, num_speakers) for task in tasks]
            return max(usages, key=lambda usage: usage.peak_bytes)

        pinned = None if config.memory.micro_batch == "auto" else config.memory.micro_batch
        plan = memory.plan_micro_batches(run_step, TOWERS, int(config.budget_gb * GIB), upper, device, pinned)
        try:
            memory.write_plan(folder, key, plan)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output-dir") from None
    return plan


def plan_stages(config: Config, tasks: Mapping[str, Sequence[TaskConfig]], device: str, amp: torch.dtype | None,
                num_speakers: int) -> dict[str, Plan]:
    """The plan of each stage that `tasks` names, and a printed table of them."""
    rows = [row for row in config.stages if tasks.get(row.name)]
    plans = {row.name: plan_stage(config, row, tasks[row.name], device, amp, num_speakers) for row in rows}
    print(memory.format_plan(plans), flush=True)
    return plans


def print_plan(config: Config, device_name: str) -> None:
    """`--plan`: every task of every stage, for a CUDA device with bf16 unless another device is named or found."""
    found = memory.choose_device(device_name)
    device = "cuda" if device_name == "auto" else found.type
    amp = memory.choose_precision(found, config.training.use_amp).dtype
    if device == "cuda" and found.type != "cuda":
        amp = torch.bfloat16 if config.training.use_amp else None
    speakers = VOXCELEB_SPEAKERS if "voxceleb" in config.data.datasets else 0
    tasks = {row.name: [without_speaker(task) if not speakers else task for task in row.tasks] for row in config.stages}
    print(f"Plan for {device}, {'fp32' if amp is None else str(amp).removeprefix('torch.')}, effective batch "
          f"{', '.join(f'{row.name} {config.effective_batch(row)}' for row in config.stages)}")
    plan_stages(config, {name: [t for t in found if t.objectives] for name, found in tasks.items()}, device, amp,
                speakers)


def without_speaker(task: TaskConfig) -> TaskConfig:
    return dataclasses.replace(task, objectives={n: w for n, w in task.objectives.items() if n != "speaker"})
