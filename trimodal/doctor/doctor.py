"""`run_training.py --doctor`: whether a run with this configuration can work, tried before it starts.

Each check looks at one thing and yields rows of one table. What a check needs of earlier ones lies in a `Case`; where
it is not there the check is shown as skipped. Nothing is written but below a temporary folder, so that a run in the
output folder stays as it is; only words of the hub (`hub:NAME`) are fetched where they are not on this machine.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trimodal.config import Config
from trimodal.doctor import environment
from trimodal.doctor.findings import Finding, format_table, guarded
from trimodal.errors import UserError
from trimodal.redaction import redact
from trimodal.training.signals import Interruption

NO_TERMINAL_WIDTH = 160
NEEDS = {"device": "a device", "data": "data", "run": "the model", "step_s": "a step"}  # by attribute of a Case


@dataclass(frozen=True)
class Check:
    title: str
    look: Callable[..., Iterable[Finding]]  # of a Case
    needs: tuple[str, ...] = ()  # of its attributes


def main(config: Config, device: str = "auto", resume: str | None = None, *, overwrite: bool = False) -> int:
    """Print the table, of what was looked at so far where it is interrupted; 0 if nothing failed, else 1.

    Raises:
        UserError: under torchrun, or without a folder for temporary files.
        KeyboardInterrupt: a signal asked to stop.
    """
    if os.environ.get("WORLD_SIZE", "").strip() not in ("", "1"):
        raise UserError("--doctor: looks at one process; start it with python, not with torchrun")
    findings, last = list[Finding](), "interrupted: the rest has not been looked at"
    with Interruption(), _temporary_folder() as folder:
        try:
            with contextlib.closing(examine(config, folder, device, resume, overwrite)) as rows:
                findings.extend(rows)
            last = verdict(findings)
        finally:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else NO_TERMINAL_WIDTH
            _print(redact(f"{format_table(findings, width)}\n{last}"))
    return int(any(one.state == "fail" for one in findings))


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix="doctor-"))
    except OSError as error:
        raise UserError(f"--doctor: no folder for temporary files ({error}); set TMPDIR to one") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _print(text: str) -> None:
    """Names of files may hold what the screen's encoding does not."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def verdict(findings: list[Finding]) -> str:
    """The line below the table."""
    count = {state: sum(one.state == state for one in findings) for state in ("ok", "warn", "fail", "skipped")}
    shown = ", ".join(f"{n} {state}" for state, n in count.items() if n)
    if count["fail"]:
        return f"{shown}: mend what failed and try again"
    return f"{shown}: a run with these settings can start" + ("; read the warnings first" if count["warn"] else "")


def examine(config: Config, folder: Path, device: str, resume: str | None,
            overwrite: bool) -> Generator[Finding, None, None]:
    """All rows, as they are found. What the project prints meanwhile is held back; `folder` is for temporary files."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from guarded("python", environment.python)
        found = list(guarded("packages", environment.packages))
        yield from found
        if any(one.state == "fail" for one in found):
            yield Finding("all else", "skipped", "needs all packages; see above")
            return
        yield from guarded("decoders", environment.decoders, folder)
        yield from guarded("word vectors", environment.word_vectors, config)
        with contextlib.suppress(OSError):  # what was planned before need not be planned again
            shutil.copytree(Path(config.paths.output_dir) / "plans", folder / "plans")
        yield from _run_checks(config, folder, device, resume, overwrite)


def _run_checks(config: Config, folder: Path, device: str, resume: str | None, overwrite: bool) -> Iterator[Finding]:
    """The checks that need torch."""
    from tqdm import tqdm

    from trimodal.doctor import inspection, rehearsal
    from trimodal.training.run import Options

    checks = [
        Check("device", inspection.device), Check("resume", inspection.checkpoint), Check("data", inspection.data),
        Check("files", inspection.files, ("data",)), Check("disk", inspection.disk),
        Check("model", rehearsal.model, ("device", "data")), Check("memory", inspection.plan, ("run",)),
        Check("step", rehearsal.steps, ("run",)), Check("overfit", rehearsal.overfit, ("run",)),
        Check("waiting", rehearsal.waiting, ("step_s",))]
    case = inspection.Case(config, Options(device, resume, overwrite), folder)
    with tqdm(checks, "Doctor", disable=None, leave=False, bar_format="{desc} {n}/{total} {postfix}") as bar:
        case.say = bar.set_postfix_str
        for check in bar:
            case.say(check.title)
            if missing := [NEEDS[need] for need in check.needs if not getattr(case, need)]:
                yield Finding(check.title, "skipped", f"needs {' and '.join(missing)}; see above")
            else:
                yield from guarded(check.title, check.look, case)
