"""Files that the system's package tool fetches."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import transfer
from transfer import Fetched, Mismatch, TransferError, Wanted

APT_TIMEOUT_S = 3600


def fetch_by_apt(package: str, wanted: Wanted) -> Fetched:
    """Let apt-get fetch PACKAGE=VERSION (that needs no root), and check what came."""
    with contextlib.suppress(FileNotFoundError, Mismatch):
        return transfer.check_file(wanted)
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
        os.replace(found[0], wanted.path)
    try:
        return transfer.check_file(wanted)
    except Mismatch as error:
        wanted.path.unlink()
        raise TransferError(f"{wanted.path.name}: apt-get gives another release than the one verified here: it {error}"
                            ) from None
