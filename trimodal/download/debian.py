"""Files that the system's package tool fetches."""

import contextlib
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from trimodal.download import notes
from trimodal.download.http import Fetched, Mismatch, TransferError, Wanted, check_file
from trimodal.files import replace_with_backup

TIMEOUT_S = 3600


def fetch_by_apt(package: str, wanted: Wanted) -> Fetched:
    """Let apt-get fetch PACKAGE=VERSION (that needs no root), and check what came, which then gets its name. Another
    file of this name is kept under a new one."""
    with contextlib.suppress(FileNotFoundError, Mismatch):
        return check_file(wanted)
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    name = wanted.path.name
    with tempfile.TemporaryDirectory(dir=wanted.path.parent) as folder:
        try:
            result = subprocess.run(["apt-get", "download", package], cwd=folder, stdin=subprocess.DEVNULL,
                                    capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S,
                                    env={**os.environ, "LC_ALL": "C"})
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            why = "does not end" if isinstance(error, subprocess.TimeoutExpired) else "is not there"
            raise TransferError(f"{name}: apt-get {why}") from None
        found = list(Path(folder).glob("*.deb"))
        if result.returncode or len(found) != 1:
            said = "; ".join(line for line in result.stderr.splitlines() if line.startswith("E:"))
            raise TransferError(f"{name}: apt-get does not give {package} ({said or 'no file came'})")
        try:
            fetched = check_file(replace(wanted, path=found[0]))
        except Mismatch as error:
            raise TransferError(f"{name}: apt-get gives another release than the one verified here: it {error}"
                                ) from None
        notes.write(wanted.path, {"url": "apt:", "whole": fetched.sha256})
        replace_with_backup(found[0], wanted.path)
    return replace(fetched, path=wanted.path)
