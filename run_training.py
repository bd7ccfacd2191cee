"""Train the tri-modal model: pretrain, align, finetune, evaluate, report. `--help` is instant: torch loads later.

    python run_training.py --model-size base --batch-size 8 --epochs 100
    python run_training.py --config recipes/synthetic.yaml
    python run_training.py --resume outputs/checkpoints/checkpoint_epoch_50.pt
    python run_training.py --plan
    python run_training.py --doctor

Exit codes: 0 done, 1 the run could not go on or the doctor found a fault, 2 a mistake in what was asked for, 3 stopped
by a signal after the step in hand, which is saved, 130 stopped at once.
"""

import argparse
import errno
import json
import os
import sys
from pathlib import Path

from trimodal.arguments import Parser, environment_needed
from trimodal.errors import ReportedByMain, Stopped, TrainingError, UserError
from trimodal.openmp import bound_waiting
from trimodal.redaction import redact

with environment_needed():
    from trimodal.config import DATASETS, SIZES, Config, load_config

DEFAULT_CONFIG = Path(__file__).with_name("config.yaml")
TEXTS = {"data_root": "paths.data_root", "output_dir": "paths.output_dir", "model_size": "model.size"}
FLAGS = TEXTS | {  # flag -> key of the configuration
    "batch_size": "training.batch_size", "epochs": "training.epochs", "lr": "training.learning_rate",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        (__doc__ or "").split("\n\n", 1)[0],
        "Any key of config.yaml can be overridden: training.seed=1 stages.align.lr_factor=0.5")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default ./data)")
    parser.add_argument("--output-dir", metavar="DIR", help="checkpoints, logs and reports (default ./outputs)")
    parser.add_argument("--model-size", metavar="SIZE", help=f"{', '.join(SIZES)} (default base)")
    parser.add_argument("--batch-size", metavar="N", help="samples of one accumulation step (default 8); times "
                        "training.gradient_accumulation_steps it is the effective batch")
    parser.add_argument("--epochs", metavar="N", help="epochs of all stages together (default 100)")
    parser.add_argument("--lr", metavar="RATE", help="peak learning rate (default 1e-4)")
    parser.add_argument("--resume", metavar="PATH", help="a checkpoint_epoch_N.pt to go on from, or 'auto': the newest "
                        "good one in the output folder, or a fresh start (default None)")
    parser.add_argument("--overwrite", action="store_true", help="delete what the earlier run in the "
                        "output folder wrote; other files stay")
    parser.add_argument("--config", metavar="FILE", default=str(DEFAULT_CONFIG), help="settings (default config.yaml)")
    parser.add_argument("--datasets", nargs="+", metavar="SET", help=f"any of {', '.join(DATASETS)}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    parser.add_argument("--plan", action="store_true", help="print what each stage takes in memory, and stop")
    parser.add_argument("--json", action="store_true", help="print what --plan finds as JSON")
    parser.add_argument("--doctor", action="store_true", help="try all that a run needs, print what was found and what "
                        "to do, and stop; changes nothing, but fetches words of the hub where they are not here")
    options, rest = parser.parse_known_args(arguments)
    if options.json and not options.plan:
        parser.error("--json needs --plan")
    if options.doctor and options.plan:
        parser.error("--doctor plans as well; leave out --plan")
    options.overrides = []
    for word in rest:
        if word.startswith("-") or "=" not in word:
            parser.error(f"unknown argument {word!r}")
        options.overrides.append(word)
    return options


def configuration(options: argparse.Namespace) -> Config:
    """config.yaml, then flags, then `section.key=value`, each winning over the one before."""
    flags = [f"{key}={json.dumps(value) if name in TEXTS else _literal(value)}" for name, key in FLAGS.items()
             if (value := getattr(options, name)) is not None]
    given = options.datasets or []  # argparse gives it the overrides that follow it, too
    if names := [word for word in given if "=" not in word]:
        flags.append(f"data.datasets={json.dumps(names)}")
    return load_config(options.config, flags + [word for word in given if "=" in word] + options.overrides)


def _literal(value: str) -> str:
    """Numbers as they are, all else as quoted text, so that `[3` is shown as it was given."""
    try:
        float(value)
        return value
    except ValueError:
        return json.dumps(value)


def main(arguments: list[str] | None = None) -> int:
    options, is_main = parse(sys.argv[1:] if arguments is None else arguments), os.environ.get("RANK", "0") == "0"
    bound_waiting((lambda line: None) if options.plan else print)  # a plan computes nothing that would wait
    try:
        config = configuration(options)
        if options.doctor:
            from trimodal import doctor

            return doctor.main(config, options.device, options.resume, overwrite=options.overwrite)
        if options.plan:
            from trimodal.training import forecast

            forecast.print_plan(config, options.device, as_json=options.json)
            return 0
        from trimodal.training import loop

        loop.train(config, loop.Options(options.device, options.resume, options.overwrite))
        return 0
    except UserError as error:
        if not isinstance(error, ReportedByMain):
            print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or config.paths.output_dir}: {error.strerror}; free space, then go on with "
              "--resume auto", file=sys.stderr)
        return 2
    except TrainingError as error:
        if is_main:
            print(f"error: {redact(str(error))}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if is_main:
            print(stopped, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        advice = "" if options.doctor else " Go on with --resume auto from the newest checkpoint"
        print(f"\nStopped at once.{advice}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
