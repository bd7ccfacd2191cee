"""Get the data sets: fetched, checked, unpacked into the layout that training reads. Run it again, and it goes on.

    python download_datasets.py --datasets coco clotho audiocaps --data-root ./data
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from trimodal.arguments import Parser, environment_needed, folder_name
from trimodal.errors import UserError, similar

with environment_needed("requests", "tqdm", "numpy"):
    from trimodal.data.samples import SPLITS
    from trimodal.download import overview
    from trimodal.download import verify as verify_module
    from trimodal.download.acquire import DONE, FAILED, IN_PART, MEND, Acquisition, Outcome
    from trimodal.download.http import Policy, without_secrets
    from trimodal.download.selection import Options
    from trimodal.files import check_writable
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
exit code: 0 all that was asked for is there, 1 a transfer failed or files are missing or damaged, 2 something for you
to mend, 3 what is there can be used, and the rest is not to be had (clips of AudioCaps that are gone), 130 stopped"""


T = TypeVar("T")


def main(argv: Sequence[str] | None = None, *, table: Mapping[str, Source] = SOURCES,
         policy: Policy | None = None) -> int:
    try:
        arguments = parse(argv)
        names, options = asked_for(arguments, table, policy or Policy())
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
        print("\nstopped; what has arrived is kept, the same command goes on from there", file=sys.stderr)
        return 130
    _print_outcomes(outcomes)
    codes = [outcome.code for outcome in outcomes]
    return next((code for code in (FAILED, MEND, IN_PART) if code in codes), DONE)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the command line `argv`, or of the process where it is None.

    Raises:
        SystemExit: with code 2, after one line on stderr, for a flag that there is not or one without its value.
    """
    return _parser().parse_args(argv)


def asked_for(arguments: argparse.Namespace, table: Mapping[str, Source],
              policy: Policy) -> tuple[list[str], Options]:
    """The names of the sets, and what is asked of them."""
    names = _names(arguments.datasets, [*table, *NEEDS_NOTHING])
    for flag, given, known in (("--mirror", [arguments.mirror], MIRRORS), ("--splits", arguments.splits, SPLITS),
                               ("--sounds", [arguments.sounds], ("mirror", "youtube"))):
        for word in given:
            if word not in known:
                raise UserError(f"{flag}: {word!r} is unknown. {similar(word, known)}")
    options = Options(
        data_root=arguments.data_root, mirror=arguments.mirror, keep_archives=arguments.keep_archives,
        splits=tuple(dict.fromkeys(arguments.splits)), sounds=arguments.sounds,
        max_gb=_positive("--max-gb", arguments.max_gb, float), sample=_positive("--sample", arguments.sample, int),
        jobs=_positive("--jobs", arguments.jobs, int),
        cookies=_existing(f"--cookies {arguments.cookies}", arguments.cookies) if arguments.cookies else None,
        skip_existing=arguments.skip_existing, insecure_tls=arguments.insecure_tls, policy=policy,
        base_urls=_pairs("--base-url", arguments.base_url, names, _address),
        local=_pairs("--local", _with_name(arguments.local, names, table), names, _existing),
        also=_subsets(arguments.also, table),
        keys={source.needs_key: os.environ.get(source.needs_key, "").strip() for source in table.values()
              if source.needs_key})
    if arguments.json and not (arguments.dry_run or arguments.status):
        raise UserError("--json: goes with --status or --dry-run, whose answer it prints as JSON")
    if not (arguments.dry_run or arguments.status):
        _check_writable(arguments.data_root)
    return names, options


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Get data sets: fetched, checked, unpacked.", EXAMPLES)
    add = parser.add_argument
    add("--datasets", nargs="+", required=True, metavar="NAME",
        help=f"{', '.join(SOURCES)}, or all ({' '.join(ALL)}); {', '.join(NEEDS_NOTHING)} need no download")
    add("--data-root", type=lambda name: Path(folder_name(name)), default=Path("./data"), metavar="DIR",
        help="where the sets go (default: ./data)")
    add("--skip-existing", action="store_true", help="trust a complete set after a quick look; without this flag every "
        "file of it is looked at, and fetched again only if it is missing or wrong")
    _add_looks(parser)
    _add_parts(parser)
    _add_origins(parser)
    add("--jobs", default="", metavar="N", help="files that are fetched at a time (default: 4, of Clotho 1)")
    add("--keep-archives", action="store_true", help="keep archives in NAME/archives after unpacking")
    return parser


def _add_looks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_mutually_exclusive_group().add_argument
    add("--dry-run", action="store_true", help="print files, bytes, servers and space needed; fetch nothing")
    add("--status", action="store_true",
        help="print a table of what is there, missing or broken, and how big it is; fetch nothing")
    add("--verify", action="store_true", help="read every file again, compare it with what came, open it, and name "
        "those that are broken; fetch nothing")
    parser.add_argument("--json", action="store_true", help="print the answer of --status or --dry-run as one JSON "
                        'object on stdout, {"sets": [...]}, with sizes in bytes')


def _add_parts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--also", nargs="+", action="extend", default=[], metavar="NAME:SUBSET", help="more of a set than its default: "
        + ", ".join(f"{name}:{subset}" for name, source in SOURCES.items() for subset in source.subsets
                    if subset not in source.defaults))
    add("--splits", nargs="+", default=[], metavar="SPLIT", help="only the archives that these splits need: "
        f"{', '.join(SPLITS)} (Clotho, AudioCaps and VoxCeleb have archives by split)")
    add("--max-gb", default="", metavar="GB", help="fetch at most so much of each set: lists and small archives first")
    add("--sample", default="", metavar="N", help="for a small start, so many files of each archive; only their bytes "
        "are fetched where the server allows it")


def _add_origins(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mirror", default="auto", metavar="WHICH", help=f"{', '.join(MIRRORS)} (default: auto, the official server "
        "first; hf obeys HF_ENDPOINT)")
    add("--base-url", action="append", default=[], metavar="NAME=URL", help="fetch the files of a set from URL/FILE")
    add("--local", action="append", default=[], metavar="[NAME=]PATH", help="what you have already: an unpacked "
        "set, also as other tools leave it (linked, not copied), a folder of archives, or one archive")
    add("--sounds", default="mirror", metavar="WHERE", help="where AudioCaps' sounds come from: mirror (a pinned copy) "
        "or youtube (by the optional yt-dlp, with a ledger of every clip)")
    add("--cookies", default="", metavar="FILE", help="cookies of a browser, for --sounds youtube")
    add("--insecure-tls", action="store_true", help="do not verify the certificate of VoxCeleb's own server, which is "
        "at times out of date; digests are checked all the same")


def _names(given: Iterable[str], known: Iterable[str]) -> list[str]:
    names: list[str] = []
    for name in given:
        if name != "all" and name not in known:
            raise UserError(f"--datasets: {name!r} is unknown. {similar(name, ['all', *known])}")
        names += ALL if name == "all" else (name,)
    return list(dict.fromkeys(names))


def _with_name(given: Iterable[str], names: list[str], table: Mapping[str, Source]) -> list[str]:
    """`--local PATH` without a name is for the only set that is asked for."""
    downloads = [name for name in names if name in table]
    full = []
    for text in given:
        if text.partition("=")[0] in table:
            full.append(text)
        elif len(downloads) == 1:
            full.append(f"{downloads[0]}={text}")
        else:
            raise UserError(f"--local {text}: which set is it? Write --local NAME={text}")
    return full


def _pairs(flag: str, given: Iterable[str], names: list[str], convert: Callable[[str, str], T]) -> dict[str, T]:
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        if not value or name not in names:
            raise UserError(f"{flag} {text}: expected NAME=..., NAME one of the sets asked for ({', '.join(names)})")
        found[name] = convert(f"{flag} {text}", value)
    return found


def _address(where: str, value: str) -> str:
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is none
        usable = False
    if not usable:
        raise UserError(f"{where}: an address is http:// or https://, a host, and a path where there is one")
    return value.rstrip("/")


def _positive(flag: str, text: str, convert: Callable[[str], T]) -> T:
    try:
        number = convert(text or "0")
    except ValueError:
        number = convert("-1")
    if text and not 0 < float(str(number)) < float("inf"):
        raise UserError(f"{flag} {text}: expected a {'whole ' if convert is int else ''}number above 0")
    return number


def _existing(where: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f"{where}: no such file or folder")
    return path


def _subsets(given: Iterable[str], table: Mapping[str, Source]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, _, subset = text.partition(":")
        known = [f"{source.name}:{other}" for source in table.values() for other in source.subsets]
        if text not in known:
            raise UserError(f"--also: {text!r} is unknown. {similar(text, known)}")
        found[name] = (*found.get(name, ()), subset)
    return found


def _check_writable(folder: Path) -> None:
    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(f"--data-root {folder}: cannot be written ({error.strerror or error})") from None


def _get(name: str, table: Mapping[str, Source], options: Options, verify: bool) -> Outcome:
    if name in NEEDS_NOTHING:
        print(f"{name}: {NEEDS_NOTHING[name]}")
        return Outcome(name=name, state="done", detail=NEEDS_NOTHING[name])
    work = Acquisition(table[name], options)
    outcome = verify_module.verify(work) if verify else work.run()
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
    look = overview.status if arguments.status else overview.plan
    found = [look(name, table, options) for name in names]
    if arguments.json:
        print(json.dumps({"sets": found}, ensure_ascii=False))
        return
    for line in overview.status_lines(found) if arguments.status else chain.from_iterable(
            map(overview.plan_lines, found)):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
