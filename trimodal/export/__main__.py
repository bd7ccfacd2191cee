"""Write a trained model for use elsewhere.

    python -m trimodal.export hub outputs/demo FOLDER      # to share: safetensors, config, tokenizer, model card
    python -m trimodal.export onnx outputs/demo FOLDER     # to run without torch: graphs of the towers and the fusion

The checkpoint is a file, or the output folder of a run. FOLDER must not exist yet.
Exit codes: 0 done, 2 a mistake in what was asked for, 130 interrupted, 141 nobody reads the output any more.
"""

import argparse
import importlib
import sys
from pathlib import Path

from trimodal.arguments import Parser, exit_code, folder_name
from trimodal.config import MODALITIES
from trimodal.errors import UserError
from trimodal.redaction import without_secrets

KINDS = {"hub": "trimodal.export.hub", "onnx": "trimodal.export.onnx"}  # modules: write(source, folder, OPTION=...)
OPTIONS = {"onnx": ("modalities", "pixels")}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    parser.prog = "python -m trimodal.export"
    parser.add_argument("kind", choices=KINDS, help="what is written")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=folder_name,
                        help="best_model.pt, or the output folder of a run")
    parser.add_argument("folder", metavar="FOLDER", type=folder_name, help="a new folder")
    parser.add_argument("--modalities", nargs="+", choices=MODALITIES, help="with onnx: towers to write (default: all)")
    parser.add_argument("--pixels", choices=("uint8", "float32"), help="with onnx: type of the pixels that image.onnx "
                        "takes, from 0 to 255 or from 0 to 1 (default: uint8)")
    options = parser.parse_args(arguments)
    options.given = {name: value for name, value in vars(options).items()
                     if any(name in names for names in OPTIONS.values()) and value is not None}
    if alien := [name for name in options.given if name not in OPTIONS.get(options.kind, ())]:
        parser.error(f"--{alien[0]}: is not of {options.kind}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        importlib.import_module(KINDS[options.kind]).write(options.checkpoint, Path(options.folder), **options.given)
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.folder}: cannot be written ({error.strerror}); free space, or name another folder",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
