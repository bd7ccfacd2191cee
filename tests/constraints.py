"""constraints.txt: the exact versions that were tested together.

    bash setup_environment.sh --dev --latest           # the newest within the ranges, on Python 3.11
    bash tests/run.sh                                  # do they work?
    python tests/constraints.py --renew                # then write down what is here

A package whose version here is not for Python 3.10 is left to the ranges there. The parts of CUDA are left out: which
ones there are, follows from torch and from the machine.
"""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = "3.10.0"
OF_CUDA = re.compile(r"nvidia-|cuda-|triton$")
BASE = {"pip", "setuptools", "wheel"}  # of the environment itself
HEAD = """\
# The versions that were tested together, for setup_environment.sh: those of a fresh set-up on Python 3.11, with what
# they depend on. `bash setup_environment.sh --latest` leaves them out and takes the newest within requirements*.txt.
# To renew them: setup_environment.sh --dev --latest, tests/run.sh, then python tests/constraints.py --renew.
"""


def required() -> list[Requirement]:
    """What requirements.txt and requirements-dev.txt ask for."""
    lines = [line.split("#")[0].strip() for name in ("requirements.txt", "requirements-dev.txt")
             for line in (ROOT / name).read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


def closure() -> Iterator[importlib.metadata.Distribution]:
    """The packages that are asked for and all that they need in this environment."""
    todo, seen = required(), set[str]()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        yield found
        todo += [Requirement(line) for line in found.requires or ()]


def text() -> str:
    """What constraints.txt holds of this environment."""
    lines = []
    for found in closure():
        name, version = canonicalize_name(found.metadata["Name"]), found.version.partition("+")[0]
        if not OF_CUDA.match(name) and name not in BASE:
            old = SpecifierSet(found.metadata["Requires-Python"] or "").contains(OLDEST)
            lines.append(f"{name}=={version}" + ("" if old else ' ; python_version >= "3.11"'))
    return HEAD + "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
    if "--renew" in sys.argv:
        CONSTRAINTS.write_text(text(), "utf-8")
    print(text(), end="")
