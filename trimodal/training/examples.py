"""Examples of a run in TensorBoard: what captions find, as pictures and as sounds to play, and the projector's points.

Shape suffixes: N points, F embed_dim.
"""

import contextlib
import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets import Data
from trimodal.config import MODALITIES, SAMPLE_RATE_HZ
from trimodal.data.samples import BrokenSample
from trimodal.evaluation import gallery, report
from trimodal.evaluation.plots import spectrogram
from trimodal.evaluation.protocols import Encoded, take
from trimodal.files import replacing
from trimodal.training import outputs
from trimodal.training.run import Run

QUERIES = 4  # captions of each kind, the same ones each time
SOUND_S = 5.0  # of a sound: 160 kB
TILE = 32  # pixels of a side of a point's picture
COLOURS = {"text": (247, 200, 96), "audio": (60, 60, 60), "image": (90, 140, 220)}  # of points without a picture
HEADER = ("words", "modality", "set", "class")  # columns of the projector's labels


def show_examples(run: Run, encoded: Encoded | None) -> None:
    """What a few validation captions find: grids, and the sounds that are found first."""
    for modality in ("image", "audio"):
        if encoded and (rows := gallery.examples(encoded, run.data, modality, queries=QUERIES)):
            run.tracker.picture(f"examples/{modality}", report.retrieval_grid(rows), run.progress.step)
    if encoded and (search := gallery.searching(encoded, run.data, ("text", "audio"))):
        _show_sounds(run, encoded, search)


def _show_sounds(run: Run, encoded: Encoded, search: gallery.Search) -> None:
    """The first answer to each caption, `sounds/N`, and a table of what it answers."""
    lines = ["| sound | caption asked for | rank of a right sound | |", "| --- | --- | --- | --- |"]
    for number, q in enumerate(gallery.draw(len(search.queries_Q), QUERIES), 1):
        result = gallery.result_of(search, q)
        best = int(result.scores_G.argmax())
        row = int(encoded.items["audio"].rows_N[search.gallery_G[best]])
        words = gallery.words(encoded, run.data, "text", int(search.queries_Q[q]))
        lines.append(f"| sounds/{number} | {_cell(words)} | {result.rank} of {len(search.gallery_G)} | "
                     f"{'right' if result.right_G[best] else 'wrong'}: {_cell(_caption(run.data, encoded, row))} |")
        with contextlib.suppress(BrokenSample):  # its features are known, and the file has gone
            wave_S = run.data.splits[encoded.split].store.wave(row, SAMPLE_RATE_HZ)
            run.tracker.sound(f"sounds/{number}", wave_S[:round(SOUND_S * SAMPLE_RATE_HZ)], SAMPLE_RATE_HZ,
                              run.progress.step)
    run.tracker.text("sounds/asked_for", "\n".join(lines), run.progress.step)


def _caption(data: Data, encoded: Encoded, row: int) -> str:
    return (data.tables[encoded.split].captions_of(row) or ("",))[0]


def _cell(words: str) -> str:
    return " ".join(words.replace("|", "/").split())


# ---- the projector -----------------------------------------------------------------------------------------------


def write_projector(run: Run, encoded: Encoded) -> None:
    """Write points of the embeddings of a split, with captions and pictures, for the tab Projector of TensorBoard.

    At most gallery.MAP_POINTS, the ones of the report's map. Twice: as they are, and less the mean of their modality,
    since modalities lie apart, which would be all that one sees.
    """
    chosen = gallery.map_items(encoded)
    if len(chosen) < 3:
        return
    features_NF = torch.cat([take(encoded.items[name].features_NF, np.array([index])) for name, index in chosen]).cpu()
    names = np.array([name for name, _ in chosen])
    centred_NF = features_NF.clone()
    for name in MODALITIES:
        own = torch.from_numpy(names == name)
        centred_NF[own] -= features_NF[own].mean(0)
    content = (_table(features_NF), _table(centred_NF), _labels(encoded, run.data, chosen),
               _sprite(encoded, run.data, chosen), _settings().encode())
    with outputs.writing(run.folder, *(path.as_posix() for path in outputs.PROJECTOR)):
        for path, written in zip(outputs.PROJECTOR, content, strict=True):
            with replacing(run.folder / path) as file:
                file.write(written)


def _table(features_NF: torch.Tensor) -> bytes:
    return "".join("\t".join(f"{value:.4f}" for value in row) + "\n" for row in features_NF.tolist()).encode()


def _labels(encoded: Encoded, data: Data, chosen: list[tuple[str, int]]) -> bytes:
    table, lines = data.tables[encoded.split], ["\t".join(HEADER)]
    for name, index in chosen:
        sample = table[int(encoded.items[name].rows_N[index])]
        label = next(iter(sample.labels), sample.speaker) or "none"
        lines.append("\t".join(" ".join(str(value).split()) or "-" for value in (
            gallery.words(encoded, data, name, index)[:200], name, sample.source, label)))
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _sprite(encoded: Encoded, data: Data, chosen: list[tuple[str, int]]) -> bytes:
    """All points' pictures, row by row, in one PNG."""
    columns = math.ceil(math.sqrt(len(chosen)))
    sheet = Image.new("RGB", (columns * TILE,) * 2, "white")
    for number, (name, index) in enumerate(chosen):
        place = (number % columns * TILE, number // columns * TILE)
        sheet.paste(_tile(data, encoded, name, int(encoded.items[name].rows_N[index])), place)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _tile(data: Data, encoded: Encoded, name: str, row: int) -> Any:
    store = data.splits[encoded.split].store
    try:
        pixels_HWC = (store.image(row) if name == "image" else
                      spectrogram(np.asarray(store.mel(row)[:600])) if name == "audio" else None)
    except BrokenSample:
        pixels_HWC = None
    if pixels_HWC is None:
        return Image.new("RGB", (TILE, TILE), COLOURS[name])
    return Image.fromarray(pixels_HWC).resize((TILE, TILE))


def _settings() -> str:
    """projector_config.pbtxt, whose paths are from its own folder. The page opens with the first tensor by name."""
    tensors, centred, labels, sprite, _ = (path.name for path in outputs.PROJECTOR)
    return "".join(f"""embeddings {{
  tensor_name: "{title}"
  tensor_path: "{name}"
  metadata_path: "{labels}"
  sprite {{ image_path: "{sprite}" single_image_dim: {TILE} single_image_dim: {TILE} }}
}}
""" for title, name in (("embeddings", tensors), ("centred by modality", centred)))
