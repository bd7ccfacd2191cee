"""Samples that cannot be read: listed in bad_samples.jsonl, counted, and some of them not tried again.

One JSON object a line: {"key": "coco/139", "split": "train", "reason": "..."}.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from trimodal.config import Config
from trimodal.data.samples import SampleTable
from trimodal.errors import UserError

_GIVEN_UP = re.compile(r": (took longer than data\.timeout_s|\d+ reading processes were lost)")


def path_of(config: Config) -> Path:
    return Path(config.paths.output_dir) / "logs" / "bad_samples.jsonl"


def given_up(table: SampleTable, config: Config) -> dict[int, str]:
    """Rows of samples at which a process of this run hung or died before, and why: they are not read again, so that a
    run that goes on sees what it would have seen. Deleting its line in bad_samples.jsonl gives a sample another try."""
    reasons = {(record["split"], record["key"]): record["reason"] for record in _records(path_of(config))
               if _GIVEN_UP.search(record["reason"])}
    if not reasons:
        return {}
    keys = ((table.splits[row], f"{table.sources[row]}/{table.keys[row]}") for row in range(len(table)))
    return {row: reasons[key] for row, key in enumerate(keys) if key in reasons}


def _records(path: Path) -> Iterator[dict[str, str]]:
    """Lines of bad_samples.jsonl, without what was cut off or is no record: people edit it."""
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict) and all(isinstance(found.get(name), str) for name in ("key", "split", "reason")):
                yield found


def counts(config: Config) -> dict[str, dict[str, int]]:
    """How many samples are listed as broken, by set and split."""
    found: dict[str, dict[str, set[str]]] = {}
    for line in _records(path_of(config)):
        found.setdefault(line["key"].partition("/")[0], {}).setdefault(line["split"], set()).add(line["key"])
    return {name: {split: len(keys) for split, keys in splits.items()} for name, splits in found.items()}


def record(records: Sequence[dict[str, str]], config: Config) -> None:
    """Append to bad_samples.jsonl what it does not hold yet, one JSON object a line; a full disk costs this only."""
    path = path_of(config)
    lines = [json.dumps(record, ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace")
             for record in records]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.read_bytes().split(b"\n") if path.exists() else [b""]
        with path.open("ab") as file:
            file.write(b"\n" if known[-1] else b"")  # after a line that was cut off
            file.writelines(line + b"\n" for line in dict.fromkeys(lines) if line not in known)
    except OSError as error:
        print(f"{path}: broken samples are not listed ({error.strerror}); reading goes on", flush=True)


def check(what: str, broken: int, total: int, first: str, config: Config) -> None:
    """Raise UserError where more than `data.max_bad_pct` of `total` are broken."""
    if broken * 100 > config.data.max_bad_pct * total:
        limit = f"data.max_bad_pct={config.data.max_bad_pct:g}"
        raise UserError(f"{what}: {broken} of {total} cannot be read, more than {limit} allows; the first: {first}; "
                        f"mend or remove those listed in {path_of(config)}")
