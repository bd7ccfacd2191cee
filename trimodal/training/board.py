"""What TensorBoard shows of a run: the points of its curves, by tag, and the charts of the tab Custom Scalars.

    points = step_points(record)              # {"loss/align": 1.5, "train/lr": 1e-4, ...}
    charts(points.keys())                     # which curves stand together, as add_custom_scalars takes it
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from trimodal.evaluation.protocols import PER_CAPTION

PER_STEP = ("lr", "grad_norm", "samples_per_s", "data_wait_pct", "memory_gib")  # curves train/NAME
SKIPPED, PLANNED, CHANCE = "train/skipped_steps", "train/memory_planned_gib", "_chance"
LAYOUT = "custom_scalars__config__"  # TensorBoard's tag of the charts
TOGETHER = {  # charts of several curves, by category: tags as regular expressions
    "Optimiser": {"learning rate": ("train/lr", "lr/.*"), "gradient norm": ("train/grad_norm",),
                  "temperature": ("temperature/.*",), "bias": ("bias/.*",), "skipped steps": (SKIPPED,)},
    "Machine": {"memory, GiB": ("train/memory_gib", PLANNED), "samples per second": ("train/samples_per_s",),
                "waiting for data, %": ("train/data_wait_pct",)}}

Points = dict[str, float]
Charts = dict[str, dict[str, tuple[str, list[str]]]]


def points_of(record: Mapping[str, Any]) -> Points:
    """The points of a record of metrics.jsonl; none of another kind than "step" and "validation", nor of a line that
    another program wrote."""
    kinds = {"step": step_points, "validation": validation_points}
    try:
        return kinds[record["kind"]](record) if record["kind"] in kinds else {}
    except (KeyError, TypeError, AttributeError):
        return {}


def step_points(record: Mapping[str, Any]) -> Points:
    stage = record["stage"]
    return {f"loss/{stage}": record["loss"],
            **{f"parts/{stage}/{name}": value for name, value in record["parts"].items()},
            **{f"temperature/{pair}": value for pair, value in record["temperature"].items()},
            **{f"bias/{pair}": value for pair, value in record.get("bias", {}).items()},  # of the sigmoid loss alone
            **{f"lr/{pattern}": rate for pattern, rate in record.get("lr_of", {}).items()},
            **{f"train/{name}": record[name] for name in PER_STEP}}


def validation_points(record: Mapping[str, Any]) -> Points:
    loss = {} if record["loss"] is None else {"loss": record["loss"]}  # None: there is nothing to validate on
    return {**{f"validation/{record['stage']}/{name}": value for name, value in {**loss, **record["parts"]}.items()},
            **{f"retrieval/{name}": value for name, value in record["metrics"].items()},
            **{f"retrieval/{name}{CHANCE}": value for name, value in record.get("chance", {}).items()}}


def charts(tags: Collection[str]) -> Charts:
    """Each metric with its chance level, each loss in training with that in validation, and TOGETHER, of those tags
    that there are. Metrics as papers count them stay among the scalars."""
    retrieval = {tag.removeprefix("retrieval/"): [tag, tag + CHANCE] for tag in sorted(tags, key=_by_metric)
                 if tag + CHANCE in tags and not tag.endswith(PER_CAPTION)}
    losses = {}
    for tag in tags:
        kind, _, name = tag.partition("/")
        if kind in ("loss", "parts"):
            checked = f"validation/{name}" + "/loss" * (kind == "loss")
            losses[name.replace("/", ": ")] = [tag, *([checked] if checked in tags else [])]
    found = {"Retrieval, with chance": retrieval, "Losses, training and validation": dict(sorted(losses.items()))}
    for category, members in TOGETHER.items():
        found[category] = {title: own for title, patterns in members.items() if (
            own := sorted(tag for tag in tags if any(re.fullmatch(pattern, tag) for pattern in patterns)))}
    return {category: {title: ("Multiline", [f"{re.escape(tag)}$" for tag in own]) for title, own in members.items()}
            for category, members in found.items() if members}


def _by_metric(tag: str) -> tuple[str, str]:
    """R@1 of all directions, then R@5 and so on: the order of retrieval/IMAGE_to_TEXT_METRIC."""
    metric = tag.split("_", 3)[-1]
    return re.sub(r"\d+", lambda found: f"{int(found[0]):03}", metric), tag
