"""The model card of an exported folder, written from the report of the run: figures, data, towers, training, licences.

Nothing of a report is taken over as it stands but numbers, names of sets and metrics, and licences.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimodal import __version__
from trimodal.errors import counted
from trimodal.export.public import public_command, public_name
from trimodal.sets import SETS

FIGURES = re.compile(r".*(R@(1|5|10)|mAP|EER|minDCF@[\d.]+|top[15])")  # of the many in a report
CARD = """---
library_name: trimodal-trainer
pipeline_tag: feature-extraction
license: other
license_name: see-the-licences-of-data-and-towers
tags:
- image-text-retrieval
- audio-text-retrieval
- zero-shot-classification
---

# {title}

A `{size}` model of images, texts and sounds in one space of {width} dimensions, {parameters} parameters, made with
trimodal-trainer {version}.

```python
from model import open_model              # of trimodal-trainer, see its README

model = open_model("FOLDER")              # this one
images = model.encode(images=["dog.jpg"])
texts = model.encode(texts=["a dog", "a cat"])
print(model.compare(images, texts))       # cosines
```

`tokenizer.json` and `preprocessing.json` say how inputs are prepared, for other programs.

## Figures

{figures}

## Training

{training}

## Licences

Trained weights are bound by the licences of the data and of the pretrained towers that they were made from.

| Part | Licence |
| --- | --- |
{licences}

The code of trimodal-trainer: MIT.
"""


def model_card(path: Path, model: Any, state: Mapping[str, Any]) -> str:
    """The text of README.md for the model of the checkpoint at `path`."""
    report = report_of(path, state)
    return CARD.format(
        title=f"Trimodal model, {model.config.size}", size=model.config.size, width=model.config.embed_dim,
        parameters=f"{sum(value.numel() for value in model.parameters()):,}", version=__version__,
        figures=figures_text(report), training="\n".join(f"- {line}" for line in training_lines(state, report)),
        licences="\n".join(f"| {part} | {text} |" for part, text in licences(model, state, report)))


def report_of(path: Path, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest report of training, beside the checkpoints of a run, that is of these weights."""
    reports = sorted((path.parent.parent / "reports").glob("report_*.json"), reverse=True)
    for report in map(_read, reports):
        if report.get("kind") == "training" and report.get("best") == {
                name: state.get(name) for name in ("stage", "epoch", "loss")}:
            return report
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- figures -----------------------------------------------------------------------------------------------------


def figures_text(report: Mapping[str, Any] | None) -> str:
    """A table of the figures of a report, with interval, chance and candidates."""
    if report is None or not report.get("evaluation", {}).get("figures"):
        return "The run has no report of these weights: they were not evaluated."
    figures = dict(report["evaluation"]["figures"])
    if len(report["data"]["counts"]) == 1:
        figures.pop("all", None)  # the same once more
    rows = [f"| {name} | {metric} | {value} |" for name, metric, value in _rows(figures)]
    return (f"On the split `{report['evaluation']['split']}`, with 95 % intervals. Chance is what guessing gives among "
            "as many candidates.\n\n| Set | Metric | Value | 95 % interval | Chance | Candidates | Queries |\n"
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n" + "\n".join(rows))


def _rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, pairs in figures.items():
        for metrics in pairs.values():
            for metric, figure in metrics.items():
                if FIGURES.fullmatch(metric):
                    interval = f"{_number(figure.get('low'))} to {_number(figure.get('high'))}"
                    yield name, metric, " | ".join([
                        _number(figure.get("value")), interval if figure.get("low") is not None else "",
                        *(_number(figure.get(key)) for key in ("chance", "candidates", "queries"))])


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


# ---- training ----------------------------------------------------------------------------------------------------


def training_lines(state: Mapping[str, Any], report: Mapping[str, Any] | None) -> Iterator[str]:
    """What the model was trained on, how, and on which machine."""
    yield f"Data sets: {', '.join(state['config']['data']['datasets'])}"
    if state.get("loss") is not None:
        yield f"Weights: chosen on validation data, stage {state['stage']}, epoch {state['epoch']}"
    if report is None:
        return
    for name, splits in report["data"]["counts"].items():
        yield f"{name}: " + "; ".join(f"{split} {_counts(kinds)}" for split, kinds in splits.items())
    yield f"Command: `{public_command(report['command'])}`"
    stages = ", ".join(f"{row['stage']} {counted(row['epochs'], 'epoch')} in {row['seconds'] / 60:.1f} minutes"
                       for row in report["stages"])
    yield f"Stages: {stages}"
    machine, packages = report["environment"], report["environment"]["packages"]
    yield f"Hardware: {machine['device']}, {counted(machine['cpus'], 'CPU core')}; {machine['precision']}"
    yield f"Software: Python {machine['python']}, torch {packages.get('torch')}, trimodal {packages.get('trimodal')}"
    yield f"Date: {report['created'][:10]}"


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(counted(count, "caption") if kind == "captions" else f"{count:,} {kind}"
                     for kind, count in kinds.items())


# ---- licences ----------------------------------------------------------------------------------------------------


def licences(model: Any, state: Mapping[str, Any], report: Mapping[str, Any] | None) -> Sequence[tuple[str, str]]:
    """Of the data sets, of pretrained towers, and of pretrained words."""
    told = dict(report["data"]["licences"]) if report else {}
    found = [(f"data set {name}", told.get(name) or (SETS[name].licence if name in SETS else "unknown"))
             for name in state["config"]["data"]["datasets"]]
    found += [(f"tower of {name}: {public_name(tower.source)}", tower.licence) for name, tower in model.towers.items()]
    if model.config.text.is_own and model.config.word_embeddings == "minilm":
        found.append(("word embeddings: all-MiniLM-L6-v2", "Apache-2.0"))
    return found
