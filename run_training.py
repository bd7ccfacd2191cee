"""Train the tri-modal model: pretrain, align, finetune, evaluate, report.

    python run_training.py --model-size base --batch-size 8 --epochs 100
    python run_training.py --config recipes/synthetic.yaml
    python run_training.py --resume outputs/checkpoints/checkpoint_epoch_50.pt
    python run_training.py --check        # are flags and settings right? Like --plan and --doctor, it trains nothing

Exit codes: 0 done, 1 the run could not go on or the doctor found a fault, 2 a mistake in what was asked for, 3 stopped
by a signal after the step in hand, which is saved, 130 stopped at once, 141 nobody reads the output.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trimodal.arguments import Parser, environment_needed, exit_code
from trimodal.errors import ReportedByMain, Stopped, TrainingError, UserError
from trimodal.openmp import bound_waiting
from trimodal.redaction import without_secrets

if TYPE_CHECKING:
    from trimodal.config import Config

DEFAULT_CONFIG = Path(__file__).with_name("config.yaml")
TEXTS = {"data_root": "paths.data_root", "output_dir": "paths.output_dir", "model_size": "model.size"}
NUMBERS = {"batch_size": "training.batch_size", "epochs": "training.epochs", "lr": "training.learning_rate"}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Flags and overrides; a mistake among them ends the program. Needs no package but Python itself."""
    parser = Parser(
        (__doc__ or "").split("\n\n", 1)[0],
        "Any key of config.yaml can be overridden: training.seed=1 stages.align.lr_factor=0.5")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default ./data)")
    parser.add_argument("--output-dir", metavar="DIR", help="checkpoints, logs and reports (default ./outputs)")
    parser.add_argument("--model-size", metavar="SIZE", help="tiny, small, base, large (default base)")
    parser.add_argument("--batch-size", metavar="N", help="samples of one accumulation step (default 8); times "
                        "training.gradient_accumulation_steps it is the effective batch")
    parser.add_argument("--epochs", metavar="N", help="epochs of all stages together (default 100)")
    parser.add_argument("--lr", metavar="RATE", help="peak learning rate (default 1e-4)")
    parser.add_argument("--resume", metavar="PATH", help="a checkpoint_epoch_N.pt to resume from, or 'auto': the "
                        "newest intact one in the output folder, or a fresh start (default None)")
    parser.add_argument("--init", metavar="PATH", help="begin a new run with the weights of a checkpoint, or of the "
                        "best one in a run's folder, as far as they fit (default None)")
    parser.add_argument("--overwrite", action="store_true",
                        help="delete what the earlier run wrote in the output folder; all other files stay")
    parser.add_argument("--config", metavar="FILE", default=str(DEFAULT_CONFIG), help="settings (default config.yaml)")
    parser.add_argument("--datasets", nargs="+", metavar="SET", help="data sets, by their names in config.yaml")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="check flags, settings, device, output folder and "
                         "checkpoint, print data root, output folder and data sets, one per line, and stop")
    instead.add_argument("--plan", action="store_true", help="print the predicted memory of each stage, and stop")
    instead.add_argument("--doctor", action="store_true", help="try everything that a run needs, print what was found "
                         "and what to do, and stop; downloads word embeddings and small files of towers, no more")
    parser.add_argument("--json", action="store_true", help="print the plan of --plan as JSON")
    options, rest = parser.parse_known_args(arguments)
    if options.json and not options.plan:
        parser.error("--json needs --plan")
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word]:
        parser.error(f"unknown argument {unknown[0]!r}")
    options.overrides = rest
    return options


def configuration(options: argparse.Namespace) -> "Config":
    """config.yaml, then flags, then `section.key=value`, each winning over the one before."""
    from trimodal.config import load_config
    from trimodal.sets import check_settings

    given = {name: value for name in TEXTS | NUMBERS if (value := getattr(options, name)) is not None}
    flags = [f"{key}={json.dumps(given[name])}" for name, key in TEXTS.items() if name in given]
    flags += [f"{key}={_literal(given[name])}" for name, key in NUMBERS.items() if name in given]
    words = options.datasets or []  # argparse gives it the overrides that follow it, too
    if names := [word for word in words if "=" not in word]:
        flags.append(f"data.datasets={json.dumps(names)}")
    overrides = flags + [word for word in words if "=" in word] + options.overrides
    return check_settings(load_config(options.config, overrides))


def _literal(value: str) -> str:
    """Numbers as they are, all else as quoted text, so that `[3` is shown as it was given."""
    try:
        float(value)
        return value
    except ValueError:
        return json.dumps(value)


def run(options: argparse.Namespace, config: "Config") -> int:
    """Do what was asked for with these settings; the exit code."""
    if options.doctor:
        from trimodal import doctor

        return doctor.main(config, options.device, options.resume, overwrite=options.overwrite, init=options.init)
    from trimodal.training import loop, plans, resume

    if options.plan:
        plans.print_plan(config, options.device, as_json=options.json, init=options.init)
        return 0
    start = loop.Options(options.device, options.resume, options.overwrite, options.init)
    if options.check:
        with contextlib.redirect_stdout(io.StringIO()):  # training says it again
            resume.check_start(config, start)
        print(config.paths.data_root, config.paths.output_dir, " ".join(config.data.datasets), sep="\n")
    else:
        loop.train(config, start)
    return 0


def main(arguments: list[str] | None = None) -> int:
    options, is_main = parse(sys.argv[1:] if arguments is None else arguments), os.environ.get("RANK", "0") == "0"
    bound_waiting((lambda line: None) if options.plan or options.check else print)  # these compute nothing
    try:
        with environment_needed():
            config = configuration(options)
        return run(options, config)
    except (UserError, ReportedByMain) as error:
        if not isinstance(error, ReportedByMain):
            print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or config.paths.output_dir}: {error.strerror}; free space, then go on with "
              "--resume auto", file=sys.stderr)
        return 2
    except TrainingError as error:
        if is_main:
            print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if is_main:
            print(stopped, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        looks = options.check or options.plan or options.doctor
        print("\nStopped at once." + " --resume auto goes on from the newest checkpoint" * (not looks), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(exit_code(main))
