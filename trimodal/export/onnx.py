"""A checkpoint as a folder of ONNX graphs, which any machine runs without torch or this project.

    python -m trimodal.export onnx outputs/checkpoints/best_model.pt exported

FOLDER/image.onnx, text.onnx, audio.onnx      a tower each: raw inputs to features of length 1, and tokens
FOLDER/fusion.onnx                            tokens of the modalities given to fused features and class logits
FOLDER/tokenizer.json, preprocessing.json     what is left to do before a graph
FOLDER/README.md, example.py                  how to use them, and a program that does

Each graph is run by onnxruntime beside the model itself before the folder appears.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from model import IMAGE_MEAN, IMAGE_STD, TriModalModel, load_model
from trimodal.config import MODALITIES, SAMPLE_RATE_HZ
from trimodal.data.cache import cache_side
from trimodal.data.tokenizer import Tokenizer
from trimodal.errors import UserError
from trimodal.export.graphs import AUDIO_WINDOW, Axes, Graph, graphs_of
from trimodal.inference.opening import checkpoint_in
from trimodal.towers.base import ImageInput

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PIXELS = {"uint8": torch.uint8, "float32": torch.float32}
MAX_DIFFERENCE = 1e-4  # of features of length 1, and of logits
OPSET = 20
SEED = 0
EXAMPLE = Path(__file__).with_name("example.py")


def write(source: str, folder: Path, modalities: Sequence[str] = MODALITIES, pixels: str = "uint8") -> None:
    """Write the graphs of the checkpoint `source`, of the towers of `modalities`, to a new folder.

    Args:
        pixels: of the pixels that image.onnx takes: "uint8", or "float32" from 0 to 1.

    Raises:
        UserError: a package is missing, the folder is there already, the checkpoint cannot be opened, a tower has no
            graph, or a graph gives other numbers than the model.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"the package {missing[0]} is not there; pip install -r requirements-export.txt")
    if os.path.lexists(folder):
        raise UserError(f"{folder}: is there already, and nothing is written over it; name a new folder")
    model, state = load_model(checkpoint_in(source))
    graphs = graphs_of(model, modalities, PIXELS[pixels])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as staging:
        made = Path(staging) / "made"
        made.mkdir()
        for graph in graphs:
            write_graph(graph, made / f"{graph.name}.onnx")
            largest = largest_difference(graph, made / f"{graph.name}.onnx")
            print(f"{graph.name}.onnx: largest difference from the model {largest:.1e}", flush=True)
            if not largest <= MAX_DIFFERENCE:
                raise UserError(f"{graph.name}: the graph gives other numbers than the model, by up to {largest:.1e}, "
                                f"over {MAX_DIFFERENCE:g}; nothing was written. Try onnxruntime and torch of "
                                "constraints.txt")
        write_rules(model, state, pixels, made)
        (made / "README.md").write_text(_readme(graphs, model), "utf-8")
        shutil.copyfile(EXAMPLE, made / EXAMPLE.name)
        os.rename(made, folder)
    print(f"{folder}: written; see {folder / 'README.md'}", flush=True)


# ---- graphs ------------------------------------------------------------------------------------------------------


def write_graph(graph: Graph, path: Path) -> None:
    """Write a graph as ONNX, with its weights in a file PATH.data beside it where they take over 2 GB.

    Raises:
        UserError: torch's exporter cannot follow it.
    """
    inputs = graph.examples(graph.traced, torch.Generator().manual_seed(SEED))
    shapes = [{i: torch.export.Dim.DYNAMIC for i, size in enumerate(axes) if isinstance(size, str)}
              for axes in graph.inputs.values()]
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                graph.eval(), tuple(inputs), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(graph.inputs), output_names=list(graph.outputs), dynamic_shapes=tuple(shapes))
    except Exception as error:  # the exporter raises nearly any type
        if isinstance(error, MemoryError):
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"{graph.name}: torch cannot make a graph of it ({reason}); leave it out, with --modalities"
                        ) from None
    assert program is not None
    _strip(program.model, graph)
    program.save(path)


def _strip(model: Any, graph: Graph) -> None:
    """Name the sizes that vary, and take out what the exporter notes of this machine: its files stand at each node."""
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
        axes = {**graph.inputs, **graph.outputs}[value.name]
        value.shape = type(value.shape)(axes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter says nothing: what its steps and warnings tell is checked by running the graph."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def largest_difference(graph: Graph, path: Path) -> float:
    """Between what onnxruntime makes of a graph's file and the model's own numbers, over all of `graph.cases`."""
    import onnxruntime

    session, largest = onnxruntime.InferenceSession(str(path)), 0.0
    generator = torch.Generator().manual_seed(SEED)
    for lengths_B in graph.cases:
        inputs = graph.examples(lengths_B, generator)
        with torch.inference_mode():
            expected = graph.expected(*inputs)
        given = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
        for found, value in zip(session.run(list(graph.outputs)[:len(expected)], given), expected, strict=True):
            largest = max(largest, float(np.abs(found - value.numpy()).max()))
    return largest


# ---- beside the graphs -------------------------------------------------------------------------------------------


def write_rules(model: TriModalModel, state: Mapping[str, Any], pixels: str, folder: Path) -> None:
    """Write preprocessing.json and tokenizer.json."""
    rules = {"embed_dim": model.config.embed_dim, "image": _image_rule(model, state, pixels),
             "text": {"max_tokens": model.config.context_length},
             "audio": {"rate_hz": SAMPLE_RATE_HZ, "window_s": AUDIO_WINDOW / SAMPLE_RATE_HZ},
             "fusion": {name: getattr(model, name).dim for name in MODALITIES},
             "logit_scale": {pair: float(value.detach().exp()) for pair, value in model.logit_scale.items()},
             "concepts": list(state["concepts"])}
    (folder / "preprocessing.json").write_text(json.dumps(rules, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / "tokenizer.json").write_text(_tokenizer(state["tokenizer"], model), "utf-8")


def _image_rule(model: TriModalModel, state: Mapping[str, Any], pixels: str) -> dict[str, Any]:
    """How a picture becomes a square, as `data.batches.read_image` does for evaluation."""
    side, fit = model.config.image_side, state["config"]["data"].get("fit", "crop")
    tower = model.towers.get("image")
    taken = tower.input if tower is not None else None
    rule: dict[str, Any] = {"size": side, "shrink_to": cache_side(side), "fit": fit, "crop_pct": 1.0,
                            "filter": "bicubic", "type": pixels}
    if not isinstance(taken, ImageInput):
        return rule | {"mean": IMAGE_MEAN, "std": IMAGE_STD}
    rule |= {"filter": taken.filter, "mean": taken.mean, "std": taken.std}
    return rule | ({"fit": taken.fit, "crop_pct": taken.crop_pct} if fit == "crop" else {})


def _tokenizer(text: str, model: TriModalModel) -> str:
    """tokenizer.json that cuts and pads by itself."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(text)
    pad_id = Tokenizer.from_json(text).pad_id
    backend.enable_truncation(model.config.context_length)
    backend.enable_padding(pad_id=pad_id, pad_token=backend.id_to_token(pad_id))
    return backend.to_str(pretty=True)


README = """# {size} model of images, texts and sounds as ONNX graphs

Needs `pip install numpy onnxruntime pillow soundfile tokenizers`, and nothing else.

```python
from example import Exported               # example.py of this folder

model = Exported()
images = model.images(["picture.png"])     # image_features [1, {width}], image_tokens, image_valid
texts = model.texts(["a dog barks", "rain on a roof"])
sounds = model.sounds(["sound.wav"])       # {rate} Hz, of any length
cosines = images["image_features"] @ texts["text_features"].T
together = model.fuse(images, sounds)      # of the same samples: fused_features, logits
```

`python example.py picture.png sound.wav "a dog barks" "rain on a roof"` does the same.

| graph | inputs | outputs |
| --- | --- | --- |
{rows}

Named sizes vary, from 1 on; those of tokens that fusion.onnx takes from 0 on, which is a modality that is not given.
`*_features` have length 1: their products are cosines, and `logit_scale` of preprocessing.json times these are the
logits of training. `*_valid` says which tokens are real. `logits` are log odds of the `concepts` there.

Before a graph:

- Pictures: upright, transparency over white; shrunk, not enlarged, to a short side of `shrink_to`; then by `fit` "crop"
  the middle (`crop_pct` of the shorter side), "pad" the whole on a white square, "squash" the whole with other
  proportions; resized to `size` by Pillow's `filter`; RGB of the type `type`, channels first. `mean` and `std` are
  applied inside. Training reads photographs through JPEG of quality 95, which example.py leaves out.
- Texts: tokenizer.json cuts to `max_tokens` and pads; the mask is 1 for real tokens.
- Sounds: the mean of the channels at {rate} Hz, floats from -1 to 1. Log-mels, windows of {window:g} s and their mean
  are made inside; the row of a sound depends on its `samples_valid` samples alone.

Licences of the pretrained towers: {licences}.
"""


def _readme(graphs: Sequence[Graph], model: TriModalModel) -> str:
    rows = [f"| {graph.name}.onnx | {_listed(graph.inputs)} | {_listed(graph.outputs)} |" for graph in graphs]
    licences = ", ".join(f"{name} {tower.licence}" for name, tower in model.towers.items()) or "there are none"
    return README.format(size=model.config.size, width=model.config.embed_dim, rate=SAMPLE_RATE_HZ,
                         window=AUDIO_WINDOW / SAMPLE_RATE_HZ, rows="\n".join(rows), licences=licences)


def _listed(tensors: Axes) -> str:
    return ", ".join(f"`{name}` [{', '.join(map(str, axes))}]" for name, axes in tensors.items())
