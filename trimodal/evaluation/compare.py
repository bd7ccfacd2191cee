"""Runs side by side, from their reports: settings that differ, figures with intervals, time and memory.

    python -m trimodal.evaluation.report compare outputs/a outputs/b outputs/c/reports/report_20260101_120000.json
    python -m trimodal.evaluation.report compare outputs/a outputs/b --html compared.html

A run's folder stands for its newest report of training, or, where it has none, its newest report. The first run is what
the others are compared with: a figure whose 95 % interval has no value in common with that of the first is marked ▲
where it is better and ▼ where it is worse.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimodal.arguments import columns_of, reading
from trimodal.errors import UserError
from trimodal.evaluation import verdict
from trimodal.evaluation.charts import Bar, Line, bars, figure, line_chart, seconds
from trimodal.evaluation.elements import Html, data, element, join, section, table, words
from trimodal.evaluation.page import document, language_buttons, time_parts
from trimodal.evaluation.phrases import PHRASES, number

BETTER, WORSE = "▲", "▼"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Place = tuple[str, str, str]  # set, pair, metric
Cell = tuple[Mapping[str, Any] | None, str]  # figure, mark


@dataclass(frozen=True)
class Compared:
    """A run as it stands in a comparison."""

    letter: str
    name: str  # as it was given
    report: Mapping[str, Any]


def read_runs(given: Sequence[str]) -> list[Compared]:
    """The reports of runs that are named by a report's JSON file or the run's folder.

    Raises:
        UserError: fewer than two or more than 26, no such file, no report in a folder, or a file that is none.
    """
    if not 2 <= len(given) <= len(LETTERS):
        raise UserError(f"compare: {len(given)} given; name 2 to {len(LETTERS)} runs: their folders, or report_*.json")
    return [Compared(letter, name, _read(Path(name))) for letter, name in zip(LETTERS, given, strict=False)]


def _read(path: Path) -> dict[str, Any]:
    with reading(path):
        if not path.is_dir():
            return _report_in(path)
        found = sorted(path.glob("report_*.json")) or sorted((path / "reports").glob("report_*.json"))
    if not found:
        raise UserError(f"{path}: holds no report_*.json, nor does its folder reports; name a run's output folder, or "
                        "a report's JSON file")
    reports = [_report_in(file) for file in found]
    return next((report for report in reversed(reports) if report.get("kind") == "training"), reports[-1])


def _report_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a report_*.json or a run's output folder"
                        ) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "schema" not in found or "evaluation" not in found:
        raise UserError(f"{path}: is no report; name a report_*.json or a run's output folder")
    if found["schema"] != 1:
        raise UserError(f"{path}: has schema {found['schema']}, this version reads 1; update the project")
    return found


# ---- what there is to compare ------------------------------------------------------------------------------------


def flat_settings(report: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted key, and what else decides a run."""
    found: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                add(f"{prefix}.{key}", inner)
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for n, one in enumerate(value, start=1):  # stages by their names, tasks by their inputs
                add(f"{prefix}.{one.get('name') or '+'.join(one.get('inputs') or [str(n)])}", {
                    key: inner for key, inner in one.items() if key not in ("name", "inputs")})
        else:
            found[prefix.lstrip(".")] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    add("", {name: section for name, section in (report.get("config") or {}).items()
             if name not in ("paths", "report")})
    env, split = report.get("environment") or {}, (report.get("evaluation") or {}).get("split")
    digests = (report.get("data") or {}).get("digests") or {}
    found |= {"checkpoint": str(report.get("checkpoint")), "device": str(env.get("device")),
              "precision": str(env.get("precision")), "split": str(split),
              "git_commit": str(env.get("git_commit"))[:12],
              f"samples ({split})": str(digests.get(split))[:12], **{
                  f"version of {name}": str(version) for name, version in (env.get("packages") or {}).items()}}
    return found


def differing_settings(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with their values; "-" where a run has none."""
    each = [flat_settings(run.report) for run in runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    rows = [(name, [settings.get(name, "-") for settings in each]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def figure_rows(runs: Sequence[Compared]) -> list[tuple[Place, list[Cell]]]:
    """Each figure that a run has: its place, and of each run the figure and its mark, where it was evaluated on the
    samples of the first."""
    same = [verdict.samples_of(run.report) == verdict.samples_of(runs[0].report) for run in runs]
    each = [verdict.all_figures(run.report) for run in runs]
    found = []
    for place in dict.fromkeys(place for figures in each for place in figures):
        cells = [figures.get(place) for figures in each]
        found.append((place, [(cell, _mark(place[2], cells[0], cell) if alike else "")
                              for cell, alike in zip(cells, same, strict=True)]))
    return found


def _mark(metric: str, first: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    if first is None or other is None or not verdict.are_apart(first, other):
        return ""
    return BETTER if (other["low"] > first["high"]) != verdict.is_less_better(metric) else WORSE


def evaluated_alike(runs: Sequence[Compared]) -> bool:
    """Whether all runs were evaluated on the same samples."""
    return len({json.dumps(verdict.samples_of(run.report)) for run in runs}) == 1


def measured_rows(runs: Sequence[Compared]) -> list[tuple[str, str, list[str]]]:
    """Time and memory of each stage, and of the evaluation: stage, key of PHRASES, a value for each run."""
    stages = dict.fromkeys(stage["stage"] for run in runs for stage in run.report.get("stages") or [])
    rows = []
    for stage in stages:
        own: list[dict[str, Any]] = [next((one for one in run.report.get("stages") or [] if one["stage"] == stage), {})
                                     for run in runs]
        rows.append((stage, "stage_seconds", [seconds(one.get("seconds")) for one in own]))
        rows += [(stage, f"stage_{key}", [number(one.get(key)) for one in own])
                 for key in ("samples_per_s", "predicted_gib", "measured_gib")]
    return [*rows, ("", "time_evaluation", [seconds(run.report.get("evaluation_s")) for run in runs])]


# ---- as text -----------------------------------------------------------------------------------------------------


def as_text(runs: Sequence[Compared], language: str) -> str:
    """The comparison for a terminal."""
    def say(key: str) -> str:
        return PHRASES[key][language]

    letters = [run.letter for run in runs]
    parts = ["\n".join(f"{run.letter}  {run.name}  ({say(_kind(run.report))}, {_when(run.report)})" for run in runs)]
    rows = [[name, *map(_short, values)] for name, values in differing_settings(runs)]
    parts.append(aligned([[say("settings"), *letters], *rows] if rows else [[say("settings")], [say("settings_same")]]))
    rows = [[f"{place[0]}  {place[2]}", *(_cell(*cell) for cell in cells)] for place, cells in figure_rows(runs)]
    parts.append(aligned([[say("results"), *letters], *rows] if rows else [[say("results")], [say("nothing")]]))
    parts.append(say("compare_text"))
    if not evaluated_alike(runs):
        parts.append(say("compare_other"))
    rows = [[f"{stage}  {say(key)}".lstrip(), *values] for stage, key, values in measured_rows(runs)]
    parts.append(aligned([[say("time_and_memory"), *letters], *rows]))
    return "\n\n".join(parts)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns, a line below the first."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell + " " * (width - columns_of(cell))
                       for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(found: Mapping[str, Any] | None, mark: str) -> str:
    if found is None or found.get("value") is None:
        return "-"
    interval = "" if found.get("low") is None else f" [{number(found['low'])}, {number(found['high'])}]"
    return f"{number(found['value'])}{interval}{' ' + mark if mark else ''}"


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most - 3] + "..."


def _kind(report: Mapping[str, Any]) -> str:
    """The key of PHRASES of what was run."""
    return f"kind_of_{report.get('kind') or 'training'}"


def _when(report: Mapping[str, Any]) -> str:
    return str(report.get("created") or "")[:16].replace("T", " ")


# ---- as a page ---------------------------------------------------------------------------------------------------


def as_page(runs: Sequence[Compared], language: str) -> str:
    """The comparison as one HTML file."""
    letters = [run.letter for run in runs]
    about = [[element("b", run.letter), data(run.name), words(_kind(run.report)),
              _when(run.report), element("code", data(run.report.get("command") or ""))] for run in runs]
    head = element("header", language_buttons(), element("h1", words("title_compare")),
                   table(["", words("run"), words("what"), words("created"), words("command")], about))
    settings = [[data(name), *(data(value, 120) for value in values)] for name, values in differing_settings(runs)]
    parts = [head, section("settings", table([words("setting"), *letters], settings) if settings
                           else element("p", words("settings_same"))),
             section("results", *_figures(runs, letters)), _curves(runs), _measured(runs, letters)]
    return document(PHRASES["title_compare"][language], parts, language)


def _figures(runs: Sequence[Compared], letters: Sequence[str]) -> list[Html | None]:
    rows = [[data(place[0]), data(place[2]), *(_html_cell(*cell) for cell in cells)]
            for place, cells in figure_rows(runs)]
    if not rows:
        return [element("p", words("nothing"))]
    return [element("p", words("compare_text"), class_="faint"),
            None if evaluated_alike(runs) else element("p", words("compare_other"), class_="down"),
            table([words("set"), words("metric"), *letters], rows, numbers=range(2, len(letters) + 2))]


def _html_cell(found: Mapping[str, Any] | None, mark: str) -> Html:
    if found is None or found.get("value") is None:
        return Html("-")
    interval = None if found.get("low") is None else element(
        "span", f" [{number(found['low'])}, {number(found['high'])}]", class_="faint")
    return join([element("b", number(found["value"])), interval,
                 element("span", f" {mark}", class_="up" if mark == BETTER else "down") if mark else None])


def _curves(runs: Sequence[Compared]) -> Html | None:
    """Validation losses by stage, and R@1 of each direction, a curve for each run."""
    stages = dict.fromkeys(check["stage"] for run in runs for check in run.report.get("validations") or [])
    found = [figure([words("curve_validation"), ", ", data(stage)], line_chart([
        Line(run.letter, *_losses(run, stage), colour=n) for n, run in enumerate(runs)])) for stage in stages]
    names = dict.fromkeys(name for run in runs for check in run.report.get("validations") or []
                          for name in check["metrics"] if name.endswith("R@1"))
    found += [figure([words("curve_retrieval"), " ", data(name)], line_chart([
        Line(run.letter, *_values(run, name), colour=n) for n, run in enumerate(runs)], zero=True)) for name in names]
    shown = [one for one in found if one]
    return section("curves", element("div", shown, class_="grid")) if shown else None


def _losses(run: Compared, stage: str) -> tuple[list[float], list[float]]:
    """Epochs and validation losses of a stage."""
    known = [check for check in run.report.get("validations") or []
             if check["stage"] == stage and check["loss"] is not None]
    return [check["epoch"] for check in known], [check["loss"] for check in known]


def _values(run: Compared, metric: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a validation metric."""
    known = [check for check in run.report.get("validations") or [] if check["metrics"].get(metric) is not None]
    return [check["epoch"] for check in known], [check["metrics"][metric] for check in known]


def _measured(runs: Sequence[Compared], letters: Sequence[str]) -> Html | None:
    rows = [Bar(join([element("b", run.letter), ", ", data(stage["stage"])]), time_parts(stage),
                seconds(stage["seconds"]))
            for run in runs for stage in run.report.get("stages") or [] if stage.get("seconds")]
    told = [[data(stage), words(key), *values] for stage, key, values in measured_rows(runs)]
    return section("time_and_memory", bars(rows), table([words("stage_stage"), words("what"), *letters], told,
                                                        numbers=range(2, len(letters) + 2)))
