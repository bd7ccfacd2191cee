"""Files that the system's package tool fetches."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from trimodal.download import notes
from trimodal.download.http import Fetched, Mismatch, TransferError, Wanted, check_file
from trimodal.files import settle

APT_TIMEOUT_S = 3600


def fetch_by_apt(package: str, wanted: Wanted) -> Fetched:
    """Let apt-get fetch PACKAGE=VERSION (that needs no root), and check what came, which then gets its name. Another
    file of this name is kept under a new one."""
    with contextlib.suppress(FileNotFoundError, Mismatch):
        return check_file(wanted)
    if not shutil.which("apt-get"):
        raise TransferError(f"{wanted.path.name}: this system has no apt-get")
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wanted.path.parent) as folder:
        try:
            result = subprocess.run(["apt-get", "download", package], cwd=folder, stdin=subprocess.DEVNULL,
                                    capture_output=True, text=True, errors="replace", timeout=APT_TIMEOUT_S,
                                    env={**os.environ, "LC_ALL": "C"})
        except subprocess.TimeoutExpired:
            raise TransferError(f"{wanted.path.name}: apt-get did not end within {APT_TIMEOUT_S} s") from None
        found = list(Path(folder).glob("*.deb"))
        if result.returncode or len(found) != 1:
            said = "; ".join(line for line in result.stderr.splitlines() if line.startswith("E:"))
            raise TransferError(f"{wanted.path.name}: apt-get does not give {package} ({said or 'no file came'})")
        return _checked(found[0], wanted)


def _checked(found: Path, wanted: Wanted) -> Fetched:
    try:
        fetched = check_file(replace(wanted, path=found))
    except Mismatch as error:
        raise TransferError(f"{wanted.path.name}: apt-get gives another release than the one verified here: it {error}"
                            ) from None
    notes.write(wanted.path, {"url": "apt:", "whole": fetched.sha256})
    settle(found, wanted.path)
    return replace(fetched, path=wanted.path)
