"""Download data sets, verify them and unpack them into the layout that training reads. Run it again to resume.

    python download_datasets.py --datasets coco clotho audiocaps --data-root ./data
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trimodal.arguments import Parser, environment_needed, exit_code, folder_name
from trimodal.errors import UserError

with environment_needed("requests", "tqdm", "numpy"):
    from trimodal.data.samples import SPLITS
    from trimodal.download.acquire import DONE, FAILED, IN_PART, MEND, Outcome, acquire
    from trimodal.download.http import Policy
    from trimodal.download.selection import Options, read_options
    from trimodal.download.verify import plan, plan_lines, status, status_lines, verify
    from trimodal.redaction import without_secrets
    from trimodal.sets import ALL, NEEDS_NOTHING, SOURCES
    from trimodal.sets.base import MIRRORS, Source

EXAMPLES = """examples:
  python download_datasets.py --datasets stamps
  python download_datasets.py --datasets all --skip-existing
  python download_datasets.py --datasets coco --mirror modelscope --dry-run
  VOXCELEB_KEY=... python download_datasets.py --datasets voxceleb --also voxceleb:vox2-aac
  python download_datasets.py --datasets audiocaps --local /sounds/audiocaps
  python download_datasets.py --datasets audiocaps --sounds youtube --splits test
  python download_datasets.py --datasets coco clotho --sample 200
  python download_datasets.py --datasets all --status
  python download_datasets.py --datasets coco --local /data/coco2017 --dry-run --json
exit code: 0 everything is there, 1 a transfer failed or files are missing or damaged, 2 you need to do something, 3
what is there can be used and the rest cannot be had any more (deleted clips of AudioCaps), 130 stopped, 141 unread"""


def main(argv: Sequence[str] | None = None, *, table: Mapping[str, Source] = SOURCES,
         policy: Policy | None = None) -> int:
    try:
        arguments = parse(argv)
        names, options = read_options(arguments, table, policy or Policy())
        if arguments.dry_run or arguments.status:
            _show(arguments, names, table, options)
            return DONE
        outcomes = [_get(name, table, options, arguments.verify) for name in names]
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return MEND
    except OSError as error:
        print(f"error: {error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        return MEND
    except KeyboardInterrupt:
        looks = arguments.dry_run or arguments.status or arguments.verify
        print("\nstopped" + "; what has arrived is kept, the same command goes on" * (not looks), file=sys.stderr)
        return 130
    _print_outcomes(outcomes)
    codes = [outcome.code for outcome in outcomes]
    return next((code for code in (FAILED, MEND, IN_PART) if code in codes), DONE)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the command line `argv`, or of the process where it is None.

    Raises:
        SystemExit: with code 2, after one line on stderr, for a flag that there is not or one without its value.
    """
    parser = Parser("Download data sets, verify and unpack them. Run it again to resume.", EXAMPLES)
    looks = parser.add_mutually_exclusive_group()
    looks.add_argument("--dry-run", action="store_true", help="print files, sizes, servers and disk space "
                       "needed; download nothing")
    looks.add_argument("--status", action="store_true", help="print a table of what is complete, missing or broken, "
                       "and its size; download nothing")
    looks.add_argument("--verify", action="store_true", help="read every file again, compare it with what was "
                       "downloaded, open it, and name those that are broken; download nothing")
    add = parser.add_argument
    add("--datasets", nargs="+", required=True, metavar="NAME",
        help=f"{', '.join(SOURCES)}, or all ({' '.join(ALL)}); {', '.join(NEEDS_NOTHING)} need no download")
    add("--data-root", type=lambda name: Path(folder_name(name)), default=Path("./data"), metavar="DIR",
        help="folder of the data sets (default: ./data)")
    add("--skip-existing", action="store_true", help="trust a complete set after a quick look; without this flag every "
        "file of it is checked, and downloaded again only if it is missing or wrong")
    add("--json", action="store_true", help="print the answer of --status or --dry-run as one JSON object on stdout, "
        '{"sets": [...]}, with sizes in bytes')
    fewer = ", ".join(f"{name} {source.at_once}" for name, source in SOURCES.items() if source.at_once < 4)
    add("--jobs", default="", metavar="N", help=f"parallel transfers (default: 4; fewer as servers ask: {fewer})")
    add("--keep-archives", action="store_true", help="keep archives in NAME/archives after unpacking")
    _add_limits(parser)
    _add_origins(parser)
    return parser.parse_args(argv)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--also", nargs="+", action="extend", default=[], metavar="NAME:SUBSET", help="optional parts of a set: "
        + ", ".join(f"{name}:{subset}" for name, source in SOURCES.items() for subset in source.subsets
                    if subset not in source.defaults))
    add("--splits", nargs="+", default=[], metavar="SPLIT", help="only the archives that these splits need: "
        f"{', '.join(SPLITS)}; by split are those of "
        + ", ".join(name for name, source in SOURCES.items() if any(item.splits for item in source.items)))
    add("--max-gb", default="", metavar="GB", help="at most so much of each set: lists and small archives first")
    add("--sample", default="", metavar="N", help="for a small start, N files of each archive; only their bytes are "
        "downloaded where the server allows it")


def _add_origins(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mirror", default="auto", metavar="WHICH", help=f"{', '.join(MIRRORS)} (default: auto, the official server "
        "first; hf obeys HF_ENDPOINT)")
    add("--base-url", action="append", default=[], metavar="NAME=URL", help="download the files of a set from URL/FILE")
    add("--local", action="append", default=[], metavar="[NAME=]PATH", help="what you already have: an unpacked "
        "set, also in the layout of other tools (linked, not copied), a folder of archives, or one archive")
    add("--sounds", default="mirror", metavar="WHERE", help="where the sounds of "
        + ", ".join(name for name, source in SOURCES.items() if source.clips) + " come from: mirror (a pinned copy) or "
        "youtube (by the optional yt-dlp, with a record of every clip)")
    add("--cookies", default="", metavar="FILE", help="cookies of a browser, for --sounds youtube")
    add("--insecure-tls", action="store_true", help="do not verify the certificate of a server that wants a key "
        f"({', '.join(name for name, source in SOURCES.items() if source.needs_key)}), which is at times out of date; "
        "digests are checked all the same")


def _get(name: str, table: Mapping[str, Source], options: Options, only_verify: bool) -> Outcome:
    if name in NEEDS_NOTHING:
        print(f"{name}: {NEEDS_NOTHING[name]}")
        return Outcome(name=name, state="done", detail=NEEDS_NOTHING[name])
    outcome = (verify if only_verify else acquire)(table[name], options)
    if outcome.code in (FAILED, MEND):
        print(f"error: {name}: {outcome.detail}", file=sys.stderr)
    return outcome


def _print_outcomes(outcomes: list[Outcome]) -> None:
    width = max(len("data set"), *(len(outcome.name) for outcome in outcomes))
    print(f"\n{'data set':<{width}}  {'state':<9}  next command")
    for outcome in outcomes:
        print(f"{outcome.name:<{width}}  {outcome.state:<9}  {outcome.next_command}")
        print(f"{'':<{width}}  {outcome.detail}")


def _show(arguments: argparse.Namespace, names: list[str], table: Mapping[str, Source], options: Options) -> None:
    """Print what --status or --dry-run asks for, as a table, as lines, or as one JSON object."""
    look, lines = (status, status_lines) if arguments.status else (plan, plan_lines)
    found = [look(name, table, options) for name in names]
    print(json.dumps({"sets": found}, ensure_ascii=False) if arguments.json else "\n".join(lines(found)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
