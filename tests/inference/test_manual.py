"""The lines of docs/using.md run as they stand, one block after the other, in both languages; but for those of an
export's example, which tests/export/test_onnx.py runs in its folder."""

from pathlib import Path

import pytest
import torch

from tests.project import ROOT
from tests.test_docs import blocks
from tests.test_package import write_checkpoint, write_inputs
from trimodal.config import PRESETS


@pytest.mark.parametrize("name", ["using.md", "using_en.md"])
def test_the_lines_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PRESETS, "base", PRESETS["nano"])
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    for folder in ("outputs/demo", "outputs"):
        write_checkpoint(tmp_path / folder / "checkpoints" / "best_model.pt", "base")
    found = [block for block in blocks((ROOT / "docs" / name).read_text("utf-8"))
             if block.language == "python" and "from example import" not in block.lines[0]]
    known: dict[str, object] = {}
    with torch.inference_mode():
        for block in found:
            exec("\n".join(block.lines), known)
    assert len(found) == 5 and "{1: 'gone.jpg: no such file'}" in capsys.readouterr().out
