"""Every sentence that the program may say, as it stands in the source: tests/messages.txt is the snapshot of them all.

    python tests/messages.py            # what has changed since the snapshot; exit code 1 if anything has
    python tests/messages.py --renew    # write it again, after a change of wording that is meant

No other test asserts wording. A message is a text of two words or more in the sources that is no docstring; `{}`
stands for a value. What the shell scripts say stands in one table, trimodal/messages.sh.
"""

import ast
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.project import ROOT, product_files

SNAPSHOT = Path(__file__).with_name("messages.txt")
SCRIPTS = ("trimodal/messages.sh",)
_SAID = re.compile(r"""\b(?:en|zh)=("(?:[^"\\]|\\.)*"|'[^']*')""")


def texts(source: str) -> Iterator[str]:
    """Texts of two words or more in Python `source`, docstrings left out, with `{}` for each value, in their order."""
    tree = ast.parse(source)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)  # type: ignore[attr-defined]
                  if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                  and ast.get_docstring(node, clean=False) is not None}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
             if part is not node}
    found = []
    for node in ast.walk(tree):
        if id(node) in docstrings or id(node) in inner:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if len(re.findall(r"[^\W\d_]{2,}", text)) >= 2 and " " in text.strip():
            found.append((node.lineno, node.col_offset, text))
    yield from (text for _, _, text in sorted(found))


def messages() -> str:
    """All messages of all modules and scripts, one a line, below the name of their file."""
    lines = []
    for path in product_files():
        found = list(texts(path.read_text("utf-8")))
        lines += [f"# {path.relative_to(ROOT)}", *(repr(text)[1:-1] for text in found), ""] if found else []
    for name in SCRIPTS:
        lines += [f"# {name}", *(found[1:-1] for found in _SAID.findall((ROOT / name).read_text("utf-8"))), ""]
    return "\n".join(lines).strip() + "\n"


def changes() -> list[str]:
    """The lines in which the messages differ from the snapshot, as a diff."""
    kept = SNAPSHOT.read_text("utf-8").splitlines() if SNAPSHOT.exists() else []
    return list(difflib.unified_diff(kept, messages().splitlines(), "snapshot", "source", lineterm="", n=0))


if __name__ == "__main__":
    differing = changes()
    print("\n".join(differing) or "nothing has changed")
    if "--renew" in sys.argv:
        SNAPSHOT.write_text(messages(), "utf-8")
    sys.exit(bool(differing) and "--renew" not in sys.argv)
