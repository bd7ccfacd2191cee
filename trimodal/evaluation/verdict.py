"""What a report's figures amount to, in one sentence: against chance, and against an earlier run of the same recipe.

    report["earlier"] = find_earlier(folder, report)     # None where there is none
    sentence(report)                                     # {"en": "...", "zh": "..."}

Two figures differ where their 95 % intervals have no value in common; a figure is better than chance where its interval
leaves chance out, on the better side. Reports are plain data, as report.py writes them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trimodal.evaluation.phrases import PHRASES, distinct, percent

Report = Mapping[str, Any]
Words = dict[str, str]  # by language

FIGURES = (  # what the sentence tells of each pair, in this order, at most MOST of them
    ("image-text", "text_to_image_R@1"), ("audio-text", "text_to_audio_R@1"), ("image-audio", "image_to_audio_R@1"),
    ("speakers", "EER"), ("image-class", "image_to_class_top1"), ("audio-class", "audio_to_class_top1"),
    ("image-concepts", "image_to_concepts_mAP"), ("audio-concepts", "audio_to_concepts_mAP"))
MOST = 3
LESS_IS_BETTER = ("median_rank", "EER", "minDCF")


class Difference(NamedTuple):
    """A figure of two reports whose intervals have no value in common."""

    place: tuple[str, str, str]  # set, pair, metric
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    is_better: bool


def is_less_better(metric: str) -> bool:
    return any(name in metric for name in LESS_IS_BETTER)


def above_chance(metric: str, figure: Mapping[str, Any]) -> bool | None:
    """Whether a figure is better than chance beyond its interval; without an interval, whether its value is; None where
    chance or value are not known."""
    if figure.get("value") is None or figure.get("chance") is None:
        return None
    low, high = (figure["value"] if figure.get(name) is None else figure[name] for name in ("low", "high"))
    return bool(high < figure["chance"] if is_less_better(metric) else low > figure["chance"])


def all_figures(report: Report) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    """Figures by (set, pair, metric)."""
    sets = distinct((report.get("evaluation") or {}).get("figures") or {})
    return {(name, pair, metric): figure for name, pairs in sets.items() for pair, metrics in pairs.items()
            for metric, figure in metrics.items()}


def differences(before: Report, after: Report) -> tuple[int, list[Difference]]:
    """How many figures both reports have, with intervals, and those of them that differ."""
    one, other = all_figures(before), all_figures(after)
    both = [place for place in other if all(place in of and of[place].get("low") is not None for of in (one, other))]
    found = [Difference(place, one[place], other[place],
                        (other[place]["low"] > one[place]["high"]) != is_less_better(place[2]))
             for place in both if are_apart(one[place], other[place])]
    return len(both), found


def are_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two intervals have no value in common; False where one is missing."""
    if one.get("low") is None or other.get("low") is None:
        return False
    return bool(one["low"] > other["high"] or other["low"] > one["high"])


# ---- the earlier run ---------------------------------------------------------------------------------------------


def recipe(report: Report) -> dict[str, Any]:
    """The settings that make a run's results: all but its seed, folders, memory, and how its report looks."""
    config = {name: value for name, value in (report.get("config") or {}).items()
              if name not in ("paths", "memory", "report")}
    training = {name: value for name, value in (config.get("training") or {}).items() if name != "seed"}
    return {**config, "training": training}


def find_earlier(folder: Path, report: Report) -> dict[str, Any] | None:
    """The newest report in `folder` of another run, of the same kind, recipe and split, and what differs from it.

    Returns:
        {"file", "created", "same_samples", "compared": figures, "differences": [{"set", "pair", "metric", "before",
        "after", "is_better"}]}; figures are compared only where the evaluated samples are the same. None where there is
        no such report.
    """
    mine = (report.get("kind"), (report.get("evaluation") or {}).get("split"), recipe(report))
    for path, other in _newest_first(folder):
        theirs = (other.get("kind"), (other.get("evaluation") or {}).get("split"), recipe(other))
        is_this_run = bool(report.get("stages")) and other.get("stages") == report["stages"]
        if theirs != mine or is_this_run:
            continue
        same = samples_of(other) == samples_of(report)
        compared, found = differences(other, report) if same else (0, [])
        return {"file": path.name, "created": other.get("created"), "same_samples": same, "compared": compared,
                "differences": [{**dict(zip(("set", "pair", "metric"), one.place, strict=True)),
                                 "before": one.before["value"], "after": one.after["value"],
                                 "is_better": one.is_better} for one in found]}
    return None


def _newest_first(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("report_*.json"), reverse=True):
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # of somebody else, or damaged: not ours to judge
        if isinstance(found, dict) and found.get("schema") == 1:
            yield path, found


def samples_of(report: Report) -> Any:
    """Digest of the samples that were evaluated."""
    return ((report.get("data") or {}).get("digests") or {}).get((report.get("evaluation") or {}).get("split"))


# ---- words -------------------------------------------------------------------------------------------------------


def sentence(report: Report) -> Words:
    """The verdict in both languages."""
    return {language: _sentence(report, {key: words[language] for key, words in PHRASES.items()})
            for language in ("en", "zh")}


def _sentence(report: Report, say: Mapping[str, str]) -> str:
    chosen = _chosen(report)
    if not chosen:
        return say["verdict_nothing"]
    parts = [say[f"verdict_{metric}"].format(value=percent(figure["value"]), chance=percent(figure["chance"]),
                                             candidates=figure["candidates"]) for metric, figure in chosen]
    are_above = [above_chance(metric, figure) for metric, figure in chosen]
    judgement = "all" if all(are_above) else "some" if any(are_above) else "none"
    names = {is_above: say["listed"].join(say[f"short_{metric}"] for (metric, _), above in zip(
        chosen, are_above, strict=True) if bool(above) == is_above) for is_above in (True, False)}
    if len(chosen) == 1:
        judgement = "one" if are_above[0] else "none"
    judged = say[f"verdict_{judgement}"].format(shown=names[True], missed=names[False])
    return say["verdict"].format(split=(report.get("evaluation") or {}).get("split"), parts=say["comma"].join(parts),
                                 judgement=judged, earlier=_against(report.get("earlier"), say))


def _chosen(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    """The figures that the sentence tells, of all sets together, or else of the first that has some."""
    for pairs in ((report.get("evaluation") or {}).get("figures") or {}).values():
        found = [(metric, pairs[pair][metric]) for pair, metric in FIGURES
                 if pairs.get(pair, {}).get(metric, {}).get("value") is not None]
        if found:
            return found[:MOST]
    return []


def _against(earlier: Mapping[str, Any] | None, say: Mapping[str, str]) -> str:
    if earlier is None:
        return say["earlier_none"]
    when = str(earlier.get("created") or "")[:16].replace("T", " ")
    if not earlier["same_samples"]:
        return say["earlier_other"].format(when=when)
    if not earlier["compared"]:
        return say["earlier_without"].format(when=when)
    better = sum(one["is_better"] for one in earlier["differences"])
    worse = len(earlier["differences"]) - better
    words = "earlier_differs" if earlier["differences"] else "earlier_same"
    return say[words].format(when=when, better=better, worse=worse, compared=earlier["compared"])
