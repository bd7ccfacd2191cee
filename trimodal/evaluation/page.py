"""The page of a report: one HTML file with everything inside, which asks nothing of any other address.

    text = render(report, media, language="zh")      # report: plain data, see report.py; media: data: URIs by key

Both languages are in it, and a button changes between them. Sections for which a report has no data (of an earlier
release, an evaluation, a run without validation) are left out. All that comes from data is escaped (elements.py);
beyond that, the page's own policy lets no other script run than page.js, and nothing be loaded.
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimodal.evaluation import verdict
from trimodal.evaluation.charts import Bar, Line, bars, figure, histogram, interval_bar, line_chart, seconds
from trimodal.evaluation.elements import Html, both, data, element, join, section, table, words
from trimodal.evaluation.map_chart import map_figure
from trimodal.evaluation.markdown import note, remarks
from trimodal.evaluation.phrases import PHRASES, distinct, duration, interval, number, times
from trimodal.evaluation.retrievals import retrieval_section

Report = Mapping[str, Any]
Media = Mapping[str, str]  # pictures and sounds as data: URIs
OFTEN = ("R@1", "R@5", "R@10", "mAP@10", "median_rank")


def render(report: Report, media: Media | None = None, *, language: str = "en") -> str:
    """The page of a report, opened in `language`."""
    title = f"title_{report.get('kind') or 'training'}"
    parts = [_head(report, title), _results(report), _curves(report), _after_stages(report), _memory(report),
             _time(report), _data(report), _map(report, media or {}), _similarities(report),
             retrieval_section(report, media or {}), _events(report), _environment(report), _config(report)]
    return document(PHRASES[title][language], parts, language)


def document(title: str, parts: list[Any], language: str) -> str:
    """A whole page around `parts`."""
    here = Path(__file__).parent
    style, script = ((here / name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
              f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")
    head = element("head", element("meta", charset="utf-8"),
                   element("meta", http_equiv="Content-Security-Policy", content=policy),
                   element("meta", name="viewport", content="width=device-width, initial-scale=1"),
                   element("meta", name="color-scheme", content="light dark"),
                   element("title", title), element("link", rel="icon", href="data:,"),
                   element("style", Html(style)))
    body = element("body", element("main", parts), element("div", id="tip", hidden=True),
                   element("script", Html(script)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='zh-CN' if language == 'zh' else 'en')}\n"


# ---- what it is, and what came of it -----------------------------------------------------------------------------


def language_buttons() -> Html:
    return element("nav", element("button", "English", type="button", data_language="en"),
                   element("button", "中文", type="button", data_language="zh-CN"), class_="languages")


def _head(report: Report, title: str) -> Html:
    model, best = report.get("model") or {}, report.get("best") or {}
    rows = [(words("created"), element("time", str(report.get("created") or "")[:19].replace("T", " "))),
            (words("model"), join([data(model.get("size")), ", ", number(model.get("parameters"))])),
            *((words(f"tower_{name}"), _tower(of)) for name, of in (report.get("towers") or {}).items()),
            (words("checkpoint"), report.get("checkpoint") and element("code", data(report["checkpoint"]))),
            (words("best"), _origin(best)),
            (words("device"), _device(report)),
            (words("duration"), duration(sum(stage.get("seconds") or 0 for stage in report.get("stages") or [])))]
    facts = element("dl", [(element("dt", name), element("dd", fact)) for name, fact in rows if fact], class_="facts")
    command = element("pre", data(report.get("command") or "", most=4000), tabindex="0")
    return element("header", language_buttons(), element("h1", words(title)),
                   element("p", both(verdict.sentence(report)), class_="verdict"), facts,
                   element("h2", words("command")), command)


def _tower(of: Mapping[str, Any]) -> Html:
    texts = {}
    for language in ("en", "zh"):
        say = {key: text[language] for key, text in PHRASES.items()}
        stages = [say[what].format(", ".join(of[what])) for what in ("frozen", "trained") if of[what]]
        texts[language] = say["tower"].format(source=of["source"], licence=of["licence"], digest=of["digest"][:12],
                                              parameters=number(of["parameters"]),
                                              stages=say["sentence_end"].join(stages))
    return both(texts)


def _origin(best: Mapping[str, Any]) -> Html | None:
    if best.get("epoch") is None:
        return None
    if best.get("loss") is None:
        return words("best_none", stage=best["stage"], epoch=best["epoch"])
    return words("best_text", stage=best["stage"], epoch=best["epoch"], loss=number(best["loss"]))


def _device(report: Report) -> Html | None:
    env = report.get("environment") or {}
    return data(", ".join(filter(None, [env.get("device"), env.get("precision")]))) if env.get("device") else None


def _results(report: Report) -> Html | None:
    evaluation = report.get("evaluation") or {}
    figures, facts = evaluation.get("figures") or {}, evaluation.get("facts") or {}
    parts: list[Any] = [element("p", words("results_text", split=evaluation.get("split")), class_="faint")]
    for name, pairs in distinct(figures).items():
        parts += [element("h3", data(name)), _note(name, facts, True), _figure_table(pairs)]
    parts += [[element("h3", data(name)), _note(name, facts, False)] for name in facts
              if figures and name not in figures]
    return section("results", parts if figures else element("p", words("nothing")), _earlier(report))


def _note(name: str, facts: Mapping[str, Any], has_figures: bool) -> Html | None:
    if keys := remarks(name):
        return element("p", [words(key) for key in keys])
    own = facts.get(name)
    texts = {language: note(own, {key: text[language] for key, text in PHRASES.items()}, has_figures)
             for language in ("en", "zh")}
    return element("p", both(texts)) if texts["en"] else None


def _figure_table(pairs: Mapping[str, Any]) -> list[Html]:
    """The figures of a set: those that people look at first open, those counted caption by caption folded."""
    head = [words("metric"), words("value"), words("interval"), words("chance"), words("times"), words("candidates"),
            words("queries"), ""]
    found = []
    for pair, metrics in pairs.items():
        first = {name: f for name, f in metrics.items() if not name.endswith(("_per_caption", "_per_caption_reranked"))}
        others = {name: f for name, f in metrics.items() if name not in first}
        found.append(element("h4", data(pair)))
        found.append(table(head, [_figure_row(*one) for one in first.items()], numbers=range(1, 7), class_="figures"))
        if others:
            found.append(element("details", element("summary", words("per_caption")), table(
                head, [_figure_row(*one) for one in others.items()], numbers=range(1, 7), class_="figures")))
    return found


def _figure_row(metric: str, f: Mapping[str, Any]) -> list[Any]:
    return [data(metric), element("b", number(f["value"])), interval(f), number(f["chance"]), times(metric, f),
            f"{f['candidates']:,}", f"{f['queries']:,}", interval_bar(f)]


def _earlier(report: Report) -> list[Any] | None:
    """The figures that differ from the same recipe's earlier run beyond the intervals."""
    earlier = report.get("earlier")
    if not earlier or not earlier["differences"]:
        return None
    rows = [[data(one["set"]), data(one["metric"]), number(one["before"]), number(one["after"]),
             words("better" if one["is_better"] else "worse")] for one in earlier["differences"]]
    head = [words("set"), words("metric"), words("before"), words("now"), ""]
    return [element("h3", words("earlier_title", file=earlier["file"])), table(head, rows, numbers=(2, 3))]


# ---- training ----------------------------------------------------------------------------------------------------


def _curves(report: Report) -> Html | None:
    curves, checks = report.get("curves") or {}, report.get("validations") or []
    found = [figure([words("curve_loss"), " ", data(stage)],
                    line_chart([Line(name, *xy) for name, xy in parts.items()]))
             for stage, parts in (curves.get("losses") or {}).items()]
    stages = list(dict.fromkeys(check["stage"] for check in checks))
    losses = [Line(stage, *_over_epochs([c for c in checks if c["stage"] == stage], "loss")) for stage in stages]
    found.append(figure(words("curve_validation"), line_chart(losses)))
    found += [figure([words("curve_retrieval"), " ", data(pair)], line_chart(lines, zero=True))
              for pair, lines in _retrieval_lines(checks).items()]
    for name, zero in (("lr", True), ("samples_per_s", True), ("data_wait_pct", True)):
        lines = [Line(stage, *xy) for stage, xy in (curves.get(name) or {}).items()]
        found.append(figure(words(f"curve_{name}"), line_chart(lines, zero=zero)))
    shown = [one for one in found if one]
    return section("curves", element("div", shown, class_="grid")) if shown else None


def _over_epochs(checks: list[Any], name: str) -> tuple[list[float], list[float]]:
    known = [check for check in checks if check.get(name) is not None]
    return [check["epoch"] for check in known], [check[name] for check in known]


def _retrieval_lines(checks: list[Any]) -> dict[str, list[Line]]:
    """R@1 and R@5 of each direction over the epochs, and the chance of R@1, by pair."""
    found: dict[str, list[Line]] = {}
    for name in dict.fromkeys(name for check in checks for name in check["metrics"]):
        if name.endswith(("R@1", "R@5")) or name == "EER":
            direction = name.rpartition("_")[0]
            pair = "-".join(sorted(direction.split("_to_"), key=("image", "audio", "text").index)) if (
                "_to_" in direction) else name
            lines = found.setdefault(pair, [])
            flat = [{"epoch": check["epoch"], "value": check["metrics"].get(name),
                     "chance": (check.get("chance") or {}).get(name)} for check in checks]
            lines.append(Line(name, *_over_epochs(flat, "value"), colour=len([x for x in lines if not x.dashed])))
            if name.endswith("R@1") and not any(line.dashed for line in lines):
                lines.append(Line(f"{name}, chance", *_over_epochs(flat, "chance"), dashed=True, colour=7))
    return found


def _after_stages(report: Report) -> Html | None:
    """R@1 by pair and stage, of the last validation of each stage that has such figures."""
    last = {check["stage"]: check for check in report.get("validations") or []
            if any(name.endswith("R@1") for name in check["metrics"])}
    if len(last) < 2:
        return None
    names = dict.fromkeys(name for check in last.values() for name in check["metrics"] if name.endswith("R@1"))
    chance = {name: value for check in last.values() for name, value in (check.get("chance") or {}).items()}
    rows = [[data(name), number(chance.get(name)), *(number(check["metrics"].get(name)) for check in last.values())]
            for name in names]
    return section("after_stages", element("p", words("after_stages_text"), class_="faint"),
                   table([words("metric"), words("chance"), *map(data, last)], rows, numbers=range(1, len(last) + 2)))


def _memory(report: Report) -> Html | None:
    stages = report.get("stages") or []
    chart = bars([Bar(join([data(stage["stage"]), ", ", words(f"memory_{kind}")]),
                      {f"memory_{kind}": stage[key] or 0.0}, f"{number(stage[key])} GiB")
                  for stage in stages for kind, key in (("planned", "predicted_gib"), ("measured", "measured_gib"))
                  if stage.get(key) is not None])
    keys = ("stage", "predicted_gib", "measured_gib", "peak_gib")
    rows = [[data(stage["stage"]), *(number(stage.get(key)) for key in keys[1:])] for stage in stages]
    return section("memory", element("p", words("stages_text"), class_="faint"), chart,
                   table([words(f"stage_{key}") for key in keys], rows, numbers=(1, 2, 3))) if stages else None


def _time(report: Report) -> Html | None:
    """Where the time of each stage went, and of the evaluation at the end."""
    stages = report.get("stages") or []
    rows = [Bar(data(stage["stage"]), time_parts(stage), seconds(stage["seconds"])) for stage in stages
            if stage.get("seconds")]
    if (took := report.get("evaluation_s")) is not None:
        rows.append(Bar(words("time_evaluation"), {"time_evaluation": took}, seconds(took)))
    keys = ("stage", "epochs", "steps", "samples", "seconds", "samples_per_s", "data_wait_pct", "loss")
    told = [[data(stage["stage"]), *(seconds(stage[key]) if key == "seconds" else number(stage.get(key))
                                     for key in keys[1:])] for stage in stages]
    return section("time", bars(rows), table([words(f"stage_{key}") for key in keys], told, numbers=range(1, len(keys)))
                   if told else None)


def time_parts(stage: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a stage by what it did. A report of an earlier release tells the whole alone."""
    parts = {name: stage.get(f"{name}_s") or 0.0 for name in ("validation", "saving", "waiting")}
    return {"time_training": max(stage["seconds"] - sum(parts.values()), 0.0),
            **{f"time_{name}": value for name, value in parts.items() if value}}


# ---- data --------------------------------------------------------------------------------------------------------


def _data(report: Report) -> Html | None:
    found = report.get("data") or {}
    rows = [[data(name), data(split), ", ".join(f"{kind} {number(n)}" for kind, n in kinds.items()),
             _left_out(report, name, split), data((found.get("licences") or {}).get(name, ""))]
            for name, splits in (found.get("counts") or {}).items() for split, kinds in splits.items()]
    if not rows:
        return None
    digests = [[data(split), element("code", data(digest))] for split, digest in (found.get("digests") or {}).items()]
    head = [words("set"), words("split"), words("counts"), words("left_out"), words("licence")]
    return section("data", table(head, rows), [element("p", words("digests")),
                                               table([words("split"), "SHA-256"], digests)] if digests else None)


def _left_out(report: Report, name: str, split: str) -> Html:
    """What of a set's split was not used, and why; "-" for nothing that is known."""
    found, evaluation = report.get("data") or {}, report.get("evaluation") or {}
    facts = (evaluation.get("facts") or {}).get(name) or {} if evaluation.get("split") == split else {}
    available = (found.get("available") or {}).get(name, {}).get(split)
    parts = []
    if available and available["samples"] < available["of"]:
        parts.append(words("left_gone", n=number(available["of"] - available["samples"]), of=number(available["of"])))
    if broken := (found.get("broken") or {}).get(name, {}).get(split) or facts.get("broken"):
        parts.append(words("left_broken", n=number(broken)))
    if facts.get("subset_seed") is not None:
        parts.append(words("left_subset", n=number(facts["of"] - facts["samples"])))
    elif facts and facts["samples"] < facts["of"]:
        parts.append(words("left_alone", n=number(facts["of"] - facts["samples"])))
    return join(parts, between=", ") if parts else Html("-")


def _map(report: Report, media: Media) -> Html | None:
    found = report.get("map")
    return section("map", map_figure(found, media)) if found and found["points"] else None


def _similarities(report: Report) -> Html | None:
    found = [figure([data(pair), " · ", words("separation", value=f"{one['separation']:.3f}")],
                    histogram(one["low"], one["high"], one["right"], one["wrong"]))
             for pair, one in (report.get("similarities") or {}).items()]
    return section("similarities", element("p", words("similarities_text"), class_="faint"),
                   element("div", found, class_="grid")) if found else None


# ---- where it was made -------------------------------------------------------------------------------------------


def _events(report: Report) -> Html | None:
    lines = [element("li", data(event, most=1000)) for event in report.get("events") or []]
    return section("events", element("ul", lines)) if lines else None


def _environment(report: Report) -> Html | None:
    env = report.get("environment") or {}
    if not env:
        return None
    commit = env.get("git_commit")
    told = join([element("code", commit), words("changed") if env.get("git_changed") else None]) if commit else None
    rows: list[list[Any]] = [["python", env.get("python")], [words("platform"), env.get("platform")],
                             ["CPU", number(env.get("cpus"))], ["git", told or words("no_git")],
                             *([name, version] for name, version in (env.get("packages") or {}).items())]
    return section("environment", table([words("what"), words("fact")], rows))


def _config(report: Report) -> Html | None:
    if not report.get("config"):
        return None
    import yaml

    text = yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True).rstrip()
    return section("config", element("details", element("summary", "config.yaml"), element("pre", text)))
