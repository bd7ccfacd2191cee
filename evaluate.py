"""Evaluate a checkpoint on any data set, with the protocols of training.

    python evaluate.py --checkpoint outputs/checkpoints/best_model.pt --datasets stamps
    python evaluate.py --checkpoint best_model.pt --datasets manifest --split val data.manifest=own.jsonl
    python evaluate.py --checkpoint best_model.pt --zero-shot DIR      # DIR/dog/1.wav, DIR/rain/7.wav, ...
    python evaluate.py --checkpoint hub:openai/clip-vit-base-patch32 --datasets coco

Prints one aligned table and writes report_*.json, .md and .html (the page) to the output folder's reports/.
Exit codes: 0 done, 2 a mistake in what was asked for, 130 interrupted, 141 nobody reads the output any more.
"""

import argparse
import sys

from trimodal.arguments import Parser, environment_needed, exit_code, folder_name
from trimodal.errors import UserError
from trimodal.openmp import bound_waiting
from trimodal.redaction import without_secrets

with environment_needed():
    from trimodal.sets import SETS


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        (__doc__ or "").split("\n\n", 1)[0],
        "Settings are those of the checkpoint; any key can be overridden: evaluation.batch_size=16 "
        "report.language=en")
    parser.add_argument("--checkpoint", type=folder_name, metavar="FILE", required=True, help="best_model.pt, any "
                        "other checkpoint, the folder of a run or an export, or hub:OWNER/NAME (or hub:FOLDER) of a "
                        "CLIP, SigLIP or CLAP of transformers")
    parser.add_argument("--datasets", nargs="+", metavar="SET", help=f"any of {', '.join(SETS)} (default: as trained)")
    parser.add_argument("--zero-shot", type=folder_name, metavar="DIR", help="instead of data sets: a folder of class "
                        "folders of pictures or sounds, classified by prompts")
    parser.add_argument("--prompts", metavar="FILE", help="with --zero-shot: templates, one a line, {} for the class")
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
    if options.prompts and not options.zero_shot:
        parser.error("--prompts: needs --zero-shot DIR")
    if options.limit is not None and options.limit < 2:
        parser.error(f"--limit: {options.limit} is below 2")
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    options.arguments = arguments
    bound_waiting()
    try:
        from trimodal.training.evaluations import evaluate  # loads torch, which --help need not

        evaluate(options)
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
