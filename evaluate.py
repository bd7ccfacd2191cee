"""Evaluate a checkpoint on any data set, with the protocols of training.

    python evaluate.py --checkpoint outputs/checkpoints/best_model.pt --datasets stamps
    python evaluate.py --checkpoint best_model.pt --datasets manifest --split val data.manifest=own.jsonl

Prints one aligned table and writes report_*.json and report_*.md to the output folder's reports/.
Exit codes: 0 done, 2 a mistake in what was asked for, 130 interrupted.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trimodal.arguments import Parser, environment_needed, folder_name, writing_to
from trimodal.errors import UserError
from trimodal.openmp import bound_waiting
from trimodal.redaction import command_line, settings, without_secrets

with environment_needed():
    from trimodal.config import Config, config_from_dict
    from trimodal.files import check_writable
    from trimodal.sets import SETS, check_settings


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        (__doc__ or "").split("\n\n", 1)[0],
        "Settings are those of the checkpoint; any key can be overridden: evaluation.batch_size=16 "
        "report.language=en")
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="best_model.pt, or any other checkpoint")
    parser.add_argument("--datasets", nargs="+", metavar="SET", help=f"any of {', '.join(SETS)} (default: as trained)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default test")
    parser.add_argument("--data-root", type=folder_name, metavar="DIR", default="./data",
                        help="folder of the data sets (default ./data)")
    parser.add_argument("--output-dir", type=folder_name, metavar="DIR", default="./outputs", help="default ./outputs")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N samples of each set and kind, drawn with a "
                        "fixed seed (default: all)")
    options, rest = parser.parse_known_args(arguments)
    given = options.datasets or []  # argparse gives it the overrides that follow it, too
    options.datasets = [word for word in given if "=" not in word]
    options.overrides = [word for word in given + rest if "=" in word and not word.startswith("-")]
    if unknown := [word for word in rest if word not in options.overrides]:
        parser.error(f"unknown argument {unknown[0]!r}")
    if options.limit is not None and options.limit < 2:
        parser.error(f"--limit: {options.limit} is below 2")
    return options


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
    import torch

    from datasets import load_data
    from model import load_model
    from trimodal.data.tokenizer import Tokenizer
    from trimodal.evaluation import protocols, report, rerank
    from trimodal.memory import devices
    from trimodal.training.planner import DeviceSetup, plan_evaluation

    devices.prepare_process()
    device = devices.choose_device(options.device)
    model, state = load_model(options.checkpoint)
    config = configuration(options, state["config"])
    heads = rerank.heads_of(state, config, options.checkpoint)
    precision = devices.choose_precision(device, config.training.use_amp)
    print(f"Device: {device}; {precision.reason}")
    folder = Path(config.paths.output_dir) / "reports"
    with writing_to(folder):  # at once: to find out after an hour that it cannot be written helps nobody
        check_writable(folder)
    data = load_data(config, [options.split], tokenizer=Tokenizer.from_json(state["tokenizer"]),
                     concepts=state["concepts"], speakers=state["speakers"])
    plan = plan_evaluation(config, DeviceSetup(device.type, precision.dtype, kernel=state["attention_kernel"]))
    devices.cap_allocator(device, int(config.budget_gb * devices.GIB))
    setting = protocols.Setting(device=device, amp=precision.dtype, limit=options.limit, sizes=plan.micro_batch,
                                less=lambda size, cause: print(f"Out of memory ({cause}): {size} samples at a time"))
    figures, encoded = protocols.evaluate_split(model.to(device), data, options.split, config, setting, heads)
    if not figures:
        raise UserError(f"--split {options.split}: {', '.join(config.data.datasets)} has no two samples there with two "
                        "modalities, labels or speakers; choose another --split or other --datasets")
    known = state.get("trained_on")
    if isinstance(known, torch.Tensor) and options.split != "train":
        protocols.mark_trained_on(encoded, data, config, known.numpy())
    print(report.format_table(figures) + report.format_notes(figures, encoded.facts))
    run = {
        "kind": "evaluation", "command": command_line(["python", "evaluate.py", *options.arguments]),
        "checkpoint": options.checkpoint, "best": {name: state.get(name) for name in ("stage", "epoch", "loss")},
        "model": {"size": model.config.size, "parameters": sum(p.numel() for p in model.parameters())},
        "config": settings(config.to_dict()), "data": data.describe(), "device": str(device),
        "precision": precision.reason,
        "evaluation": {"split": options.split, "figures": figures, "facts": encoded.facts},
    }
    gallery = [row for modality in ("image", "audio")
               for row in protocols.examples(encoded, data, modality, config.report.gallery_queries)]
    with writing_to(folder):
        _, markdown = report.write_report(folder, run, [], language=config.report.language, gallery=gallery)
    print(f"Report: {markdown}")
    return markdown


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    options.arguments = arguments
    bound_waiting()
    try:
        evaluate(options)
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
