"""Files appear whole or not at all, and survive a power cut once they are there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoint
from files import BESIDE, replacing


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Syncs and renames in their order, each with the name of what it is about; all are really done."""
    seen: list[tuple[str, str]] = []

    def recorded(name: str, about: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*given: Any) -> Any:
            seen.append((name, about(*given)))
            return real(*given)

        monkeypatch.setattr(os, name, call)

    recorded("fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    recorded("replace", lambda source, target: Path(target).name)
    return seen


def write_text(path: Path) -> None:
    with replacing(path, "w") as file:
        file.write("all of it")


@pytest.mark.durable
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are asked of /proc")
@pytest.mark.parametrize("write", [write_text, lambda path: checkpoint.save({"a": 1}, path)], ids=["text", "weights"])
def test_bytes_are_synced_before_the_rename_and_the_folder_after_it(
        tmp_path: Path, calls: list[tuple[str, str]], write: Callable[[Path], None]) -> None:
    write(tmp_path / "kept")
    [(first, temporary), *rest] = calls
    assert first == "fsync" and temporary.startswith("kept.") and temporary.endswith(BESIDE)
    assert rest == [("replace", "kept"), ("fsync", tmp_path.name)]


def test_a_block_that_fails_leaves_the_file_of_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_text(path)
    with pytest.raises(KeyError), replacing(path, "w") as file:
        file.write("half of")
        raise KeyError
    assert path.read_text("utf-8") == "all of it" and list(tmp_path.iterdir()) == [path]
