"""`run_training.py --plan`: the memory of each stage, foretold from the settings and what is known of the data.

What a plan depends on beside the settings is found as a run finds it, by its own functions: how many words the
tokenizer has, and, of sets that are read at once, the speakers and which tasks have samples. Of other sets
nothing is read, as they may not be there yet: then each task is planned, with as many speakers as they have at most.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from datasets import heard_speakers, read_tables
from trimodal.config import Config, TaskConfig
from trimodal.data import tokenizer
from trimodal.data.samples import SampleTable
from trimodal.distributed import place_in_world
from trimodal.memory import devices
from trimodal.sets import SETS
from trimodal.training import budget
from trimodal.training.planner import Place, plan_stages, without_speaker
from trimodal.training.stage import active_tasks


@dataclass(frozen=True)
class Forecast:
    """What a run will find, as far as it is known: a configuration with as many words as there are, the tasks that each
    stage trains, and the number of speakers."""

    config: Config
    tasks: Mapping[str, list[TaskConfig]]
    speakers: int


@dataclass(frozen=True)
class _Lists:
    """As `datasets.Data`, of the training samples that have been read."""

    tables: dict[str, SampleTable]
    speakers: tuple[str, ...]

    def names(self) -> list[str]:
        return sorted(self.tables["train"].sources.names)


def foretell(config: Config) -> Forecast:
    """What can be known before a run of `config` without opening a file of its sets but their lists.

    Raises:
        UserError: as a run would: a list cannot be read, or a stage has nothing to train.
    """
    listed = [name for name in config.data.datasets if SETS[name].reads_at_once]
    words = _with_words(config)
    lists = _read(config, listed)
    speakers = len(lists.speakers) + sum(SETS[name].speakers for name in config.data.datasets)
    if len(listed) == len(config.data.datasets):
        return Forecast(words, {row.name: active_tasks(row, lists)[0] for row in config.stages}, speakers)
    tasks = {row.name: row.tasks if speakers else without_speaker(row.tasks) for row in config.stages}
    return Forecast(words, {name: [task for task in found if task.objectives] for name, found in tasks.items()},
                    speakers)


def _read(config: Config, names: list[str]) -> _Lists:
    """The training samples of some of the sets."""
    if not names:
        return _Lists({"train": SampleTable.pack([])}, ())
    part = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=tuple(names)))
    table = read_tables(part, ["train"])["train"]
    return _Lists({"train": table}, tuple(heard_speakers(table)))


def _with_words(config: Config) -> Config:
    """`config` with as many words as the tokenizer has, if that is on this machine."""
    if tokenizer.needs_network(config.model):
        print(f"Plan: {config.model.word_embeddings} is not on this machine yet, so {config.model.vocab_size} words "
              "are planned for (model.vocab_size)", file=sys.stderr)
        return config
    size = max(tokenizer.load_tokenizer(config.model).vocab_size, config.model.vocab_size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def print_plan(config: Config, device_name: str, *, as_json: bool = False) -> None:
    """`--plan`: for a CUDA device with bf16 unless another device is named or found. Under torchrun that of each
    process, planned and printed by the first.

    Raises:
        UserError: as `foretell`; no such device.
        OverBudget: nothing fits.
    """
    rank, processes = place_in_world()
    if rank:
        return
    found = devices.choose_device(device_name)
    device = "cuda" if device_name == "auto" else found.type
    amp = devices.choose_precision(found, config.training.use_amp).dtype
    if device == "cuda" and found.type != "cuda":
        amp = torch.bfloat16 if config.training.use_amp else None
    known = foretell(config)
    place = Place(device, amp, known.speakers, processes, budget.calibration(devices.device_name(found)))
    plans = plan_stages(known.config, known.tasks, place)
    precision = "fp32" if amp is None else str(amp).removeprefix("torch.")
    batches = {row.name: config.effective_batch(row) for row in config.stages}
    if as_json:
        print(json.dumps({"size": config.model.size, "device": device, "precision": precision, "processes": processes,
                          "effective_batch": batches, "plans": {name: plan.to_dict() for name, plan in plans.items()}},
                         indent=1))
        return
    shared = f", of each of {processes} processes" if processes > 1 else ""
    print(f"Plan for {device}, {precision}, effective batch {', '.join(f'{n} {size}' for n, size in batches.items())}"
          f"{shared}")
    print(budget.format_plan(plans))
