"""Write a trained model for use elsewhere.

    python -m trimodal.export hub outputs/demo FOLDER      # to share: safetensors, config, tokenizer, model card

The checkpoint is a file, or the output folder of a run. FOLDER must not exist yet.
Exit codes: 0 done, 2 a mistake in what was asked for, 130 interrupted.
"""

import argparse
import importlib
import sys
from pathlib import Path

from trimodal.arguments import Parser, folder_name
from trimodal.errors import UserError
from trimodal.redaction import without_secrets

KINDS = {"hub": "trimodal.export.hub"}  # modules, each with a function write(source, folder)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    parser.prog = "python -m trimodal.export"
    parser.add_argument("kind", choices=KINDS, help="what is written")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best_model.pt, or the output folder of a run")
    parser.add_argument("folder", metavar="FOLDER", type=folder_name, help="a new folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        importlib.import_module(KINDS[options.kind]).write(options.checkpoint, Path(options.folder))
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
