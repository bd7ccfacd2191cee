"""What evaluate.py does: a checkpoint, or a model of a hub, on the data sets that were asked for; table and report."""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datasets import Data, load_data
from model import load_model
from trimodal.arguments import writing_to
from trimodal.config import Config, config_from_dict
from trimodal.data import bad_samples
from trimodal.data.tokenizer import Tokenizer, load_tokenizer
from trimodal.errors import UserError, counted
from trimodal.evaluation import gallery, peers, protocols, report, rerank, zero_shot
from trimodal.files import check_writable
from trimodal.inference.hub_models import PREFIX, HubModel, open_hub
from trimodal.inference.opening import checkpoint_in
from trimodal.memory import devices
from trimodal.redaction import command_line, settings
from trimodal.sets import check_settings
from trimodal.towers.features import with_features
from trimodal.towers.settings import decoded_kinds, frozen_until, inputs_of, tower_facts
from trimodal.training.planner import DeviceSetup, plan_evaluation


def configuration(options: argparse.Namespace, saved: dict[str, Any]) -> Config:
    """The configuration in the checkpoint, then flags, then overrides. The model stays as it was trained.

    Raises:
        UserError: an unknown key, value or set, or a setting of the model.
    """
    if changed := [word for word in options.overrides if word.startswith("model.")]:
        raise UserError(f"{changed[0]}: the model is that of the checkpoint; only other sections can be changed")
    flags = [f"paths.data_root={json.dumps(options.data_root)}", f"paths.output_dir={json.dumps(options.output_dir)}"]
    if options.datasets:
        flags.append(f"data.datasets={json.dumps(options.datasets)}")
    return check_settings(config_from_dict(saved, flags + options.overrides))


def evaluate(options: argparse.Namespace) -> Path:
    """Print the table, write the report; path of its Markdown file.

    Raises:
        UserError: the checkpoint, the data, the device or the output folder cannot be used.
    """
    devices.prepare_process()
    device = devices.choose_device(options.device)
    is_hub = options.checkpoint.startswith(PREFIX)
    model: Any
    model, state = (open_hub(options.checkpoint), {}) if is_hub else load_model(
        checkpoint_in(options.checkpoint))
    config = configuration(options, state.get("config", {}))
    config = config if is_hub else replace(config, model=model.config)
    precision = devices.choose_precision(device, config.training.use_amp and not is_hub)
    print(f"Device: {device}; {precision.reason}")
    folder = Path(config.paths.output_dir) / "reports"
    with writing_to(folder):  # at once: to find out after an hour that it cannot be written helps nobody
        check_writable(folder)
    devices.cap_allocator(device, int(config.budget_gb * devices.GIB))
    setting = protocols.Setting(device=device, amp=precision.dtype, limit=options.limit, less=lambda size, cause: print(
        f"Out of memory ({cause}): {counted(size, 'sample')} at a time"), sizes={} if is_hub else planned_sizes(
            config, DeviceSetup(device.type, precision.dtype, kernel=state["attention_kernel"],
                                towers=state.get("towers", {}))))
    start_s = time.perf_counter()
    found = (on_classes if options.zero_shot else on_data_sets)(options, model.to(device), state, config, setting)
    run = {
        "kind": "evaluation", "command": command_line(["python", "evaluate.py", *options.arguments]),
        "checkpoint": options.checkpoint, "best": {name: state.get(name) for name in ("stage", "epoch", "loss")},
        "model": describe(model), "towers": {} if is_hub else tower_facts(model.towers, config.stages),
        "config": settings(own_settings(config, is_hub)), "data": found.data, "device": str(device),
        "precision": precision.reason, **found.shown,
        "evaluation": {"split": found.split, "figures": found.figures, "facts": found.facts},
        "evaluation_s": time.perf_counter() - start_s,
    }
    with writing_to(folder):
        _, markdown = report.write_report(folder, run, [], language=config.report.language, gallery=found.gallery,
                                          media=found.media)
    print(report.format_table(found.figures) + report.format_notes(found.figures, found.facts))
    print(f"Report page: {markdown.with_suffix('.html')}\nReport: {markdown}")
    return markdown


class Found(NamedTuple):
    """What an evaluation tells its report; see evaluation/report.py."""

    split: str
    figures: protocols.Figures
    facts: dict[str, dict[str, Any]]
    data: dict[str, Any]
    gallery: list[dict[str, Any]]
    shown: dict[str, Any]
    media: dict[str, str]


def on_data_sets(options: argparse.Namespace, model: Any, state: dict[str, Any], config: Config,
                 setting: protocols.Setting) -> Found:
    """Retrieval, concepts and speakers of one split of the data sets.

    Raises:
        UserError: the data cannot be used, or there is nothing to compare, or no head to re-rank with.
    """
    split, heads = options.split, rerank.heads_of(state, config, options.checkpoint)
    data = read_data(config, split, state, model)
    if state:
        data = with_frozen(data, model, config, fill=options.limit is None)
    if isinstance(model, HubModel):
        encoded = peers.encode(model, data, split, config, setting)
        figures = protocols.score(encoded, data, config)
    else:
        figures, encoded = protocols.evaluate_split(model, data, split, config, setting, heads)
    if not figures:
        raise UserError(f"--split {split}: {', '.join(config.data.datasets)} has no two samples there with two "
                        "modalities, labels or speakers; choose another --split or other --datasets")
    known = state.get("trained_on")
    if isinstance(known, torch.Tensor) and split != "train":
        protocols.mark_trained_on(encoded, data, config, known.numpy())
    rows = [row for modality in ("image", "audio")
            for row in gallery.examples(encoded, data, modality, config.report.gallery_queries)]
    about = {**data.describe(), "broken": bad_samples.counts(config)}
    return Found(split, figures, encoded.facts, about, rows, *gallery.collect(encoded, data, config))


def on_classes(options: argparse.Namespace, model: Any, state: dict[str, Any], config: Config,
               setting: protocols.Setting) -> Found:
    """Zero-shot classification of a folder of class folders.

    Raises:
        UserError: the folder or the prompts cannot be used.
    """
    classes = zero_shot.read_classes(Path(options.zero_shot))
    prompts = zero_shot.read_prompts(Path(options.prompts) if options.prompts else None, classes.modality)
    tokenizer = Tokenizer.from_json(state["tokenizer"]) if state else load_tokenizer(config.model)
    figures, facts = zero_shot.classify(model, classes, prompts, config, setting, tokenizer)
    name = classes.folder.absolute().name
    told = {"prompts": list(prompts), "classes": list(classes.names)}
    return Found("test", {name: {f"{classes.modality}-class": figures}}, {name: facts}, told, [], {}, {})


def read_data(config: Config, split: str, state: dict[str, Any], model: Any) -> Data:
    """One split with the words, concepts and speakers of a checkpoint; of a hub's model none of these, and no cache is
    filled, since it reads the files themselves."""
    if not state:
        return load_data(config, [split], concepts=(), speakers=(), fill_cache=())
    return load_data(config, [split], tokenizer=Tokenizer.from_json(state["tokenizer"]),
                     concepts=state["concepts"], speakers=state["speakers"], inputs=inputs_of(model.towers),
                     fill_cache=decoded_kinds(config, model.towers))


def with_frozen(data: Data, model: Any, config: Config, *, fill: bool) -> Data:
    """`data` with the features of the towers that no stage trained, as at the end of a run: from the cache, in float32
    whatever the precision here. What it lacks is encoded into it if `fill`, so that figures do not depend on whether
    the run, or an earlier evaluation, took place on this machine."""
    names = set.intersection(*frozen_until(config, model.towers).values())
    encoders = {name: getattr(model, name) for name in sorted(names)}
    first = replace(config, data=replace(config.data, views=1))  # the view that evaluation reads
    return replace(data, splits=with_features(data.splits, encoders, first, fill=fill))


def own_settings(config: Config, is_hub: bool) -> dict[str, Any]:
    """The settings that figures depend on: of a hub's model not those of a model and its training."""
    return {name: section for name, section in config.to_dict().items()
            if not is_hub or name in ("data", "evaluation", "report", "paths")}


def planned_sizes(config: Config, setup: DeviceSetup) -> dict[str, int]:
    """Samples at a time by modality, as planned for the budget."""
    return dict(plan_evaluation(config, setup).micro_batch)


def describe(model: Any) -> dict[str, Any]:
    """Size, or the name of a hub's model, and parameters, for the report."""
    if isinstance(model, HubModel):
        return {"size": model.name, "parameters": sum(p.numel() for p in model.model.parameters())}
    return {"size": model.config.size, "parameters": sum(p.numel() for p in model.parameters())}
