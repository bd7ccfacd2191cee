"""The Markdown file of a report, and the tables that evaluations print.

    text = render(report, "en")                  # of a report as plain data, see report.py
    print(format_table(figures) + format_notes(figures, facts))
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trimodal.evaluation import verdict
from trimodal.evaluation.phrases import PHRASES, distinct, duration, interval, number, times


def format_table(figures: Mapping[str, Any]) -> str:
    """Figures as aligned columns for a terminal."""
    rows = [["set", "pair", "metric", "value", "95 % interval", "chance", "candidates", "queries"]]
    rows += [[name, pair, metric, number(f["value"]), interval(f), number(f["chance"]), f"{f['candidates']:,}",
              f"{f['queries']:,}"]
             for name, pairs in distinct(figures).items() for pair, metrics in pairs.items()
             for metric, f in metrics.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) if n < 3 else cell.rjust(width)
                       for n, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def format_notes(figures: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Notes to print below the table of figures: one line for each data set that needs one, each after a line break.

    A set needs one where only a part of its samples was used, samples are broken or were trained on, features were not
    finite, speakers were verified on trials, or no figure could be computed. In English.

    Args:
        figures: {set: figures}, as `protocols.score` returns.
        facts: {set: facts}, as in `protocols.Encoded`; see `note` for the keys.
    """
    say = {key: words["en"] for key, words in PHRASES.items()}
    return "".join(f"\n{name}: {note(own, say, name in figures)}" for name, own in facts.items()
                   if name not in figures or own["samples"] < own["of"] or own["subset_seed"] is not None
                   or any(own.get(key) for key in ("broken", "nonfinite", "trials", "trained_on", "near")))


def render(report: Mapping[str, Any], language: str) -> str:
    """The Markdown file of a report."""
    say = {key: words[language] for key, words in PHRASES.items()}
    sections = [f"# {say['title_' + (report['kind'] or 'training')]}", verdict.sentence(report)[language],
                _summary(report, say), _figures(report, say), _gallery(report, say), _curves(report, say),
                _stage_table(report, say), _after_stages(report, say), _data(report, say), _environment(report, say),
                _config(report, say)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    model, best, env = report["model"] or {}, report["best"] or {}, report["environment"]
    rows = [[say["created"], report["created"]], [say["command"], _code(report["command"])],
            [say["model"], f"{model.get('size')}, {number(model.get('parameters'))}"],
            *([say[f"tower_{name}"], _tower(of, say)] for name, of in (report["towers"] or {}).items()),
            [say["checkpoint"], _code(report["checkpoint"])],
            [say["best"], _origin(best, say)],
            [say["device"], ", ".join(filter(None, [env["device"], env["precision"]]))],
            [say["duration"], duration(sum(stage["seconds"] or 0 for stage in report["stages"]))]]
    return _table([[say["what"], say["fact"]]] + [row for row in rows if row[1]])


def _tower(of: Mapping[str, Any], say: Mapping[str, str]) -> str:
    """Source, licence, size and weights of a pretrained tower, and in which stages it was trained."""
    stages = [say[what].format(", ".join(of[what])) for what in ("frozen", "trained") if of[what]]
    return say["tower"].format(source=of["source"], licence=of["licence"], digest=of["digest"][:12],
                                       parameters=number(of["parameters"]), stages=say["sentence_end"].join(stages))


def _origin(best: Mapping[str, Any], say: Mapping[str, str]) -> str | None:
    """A sentence on the epoch that the evaluated weights are of and why it was chosen; None where there was no choice,
    as for a checkpoint of training."""
    if best.get("epoch") is None:
        return None
    if best.get("loss") is None:
        return say["best_none"].format(**best)
    return say["best_text"].format(**{**best, "loss": number(best["loss"])})


def _figures(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    evaluation = report["evaluation"] or {}
    parts = [f"## {say['results']}", say["results_text"].format(split=evaluation.get("split"))]
    columns = ("pair", "metric", "value", "interval", "chance", "times", "candidates", "queries")
    for name, pairs in distinct(evaluation.get("figures") or {}).items():
        rows = [[say[key] for key in columns]]
        rows += [[pair, metric, f"**{number(f['value'])}**", interval(f), number(f["chance"]), times(metric, f),
                  f"{f['candidates']:,}", f"{f['queries']:,}"]
                 for pair, metrics in pairs.items() for metric, f in metrics.items()]
        remark = " ".join(say[key] for key in remarks(name))
        parts += [f"### {name}", remark or note((evaluation.get("facts") or {}).get(name), say), _table(rows)]
    parts += [f"### {name}\n\n{note(own, say, False)}" for name, own in (evaluation.get("facts") or {}).items()
              if len(parts) > 2 and name not in (evaluation.get("figures") or {})]
    return "\n\n".join(part for part in parts if part) if len(parts) > 2 else f"{parts[0]}\n\n{say['nothing']}"


def remarks(name: str) -> list[str]:
    """What is said of further rows of figures of a set, by the names of these: keys of phrases."""
    signs = (("_without_symbols", "without_symbols"), ("_en", "one_language"), ("_zh", "one_language"))
    return [key for sign, key in signs if f"{sign}_" in f"{name}_"]


def note(facts: Mapping[str, Any] | None, say: Mapping[str, str], has_figures: bool = True) -> str:
    """The note on one data set, as sentences: how many samples were used, and what limits its figures.

    Args:
        facts: of `protocols.Encoded` for this set; read are "samples", "of", "subset_seed", "broken", "trained_on",
            "nonfinite", "trials" and "near".
        say: the phrases in the language of the report.
        has_figures: False: a sentence says that the set has none.

    Returns:
        "" where there are no facts.
    """
    if not facts:
        return ""
    words = [say["samples"].format(**facts)] + ([] if has_figures else [say["no_figures"]])
    if facts.get("subset_seed") is not None:
        words.append(say["subset"].format(**facts))
    if facts.get("broken"):
        words.append(say["broken"].format(**facts))
    if facts.get("trained_on"):
        words.append(say["trained_on"].format(**facts))
    if facts.get("near"):
        words.append(say["near"].format(", ".join(f"{k} {n}" for k, n in facts["near"].items())))
    if facts.get("nonfinite"):
        words.append(say["nonfinite"].format(", ".join(f"{k} {n}" for k, n in facts["nonfinite"].items())))
    if facts.get("trials"):
        words.append(say["trials"].format(facts["trials"]))
    return say["sentence_end"].join(words)


def _gallery(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    parts = []
    for modality in ("image", "audio"):
        rows = [row for row in report["gallery"] if row["modality"] == modality]
        if rows:
            table = [[say["query"], say["set"], say["rank"], say["best_answer"]]]
            table += [[row["query"], row["source"], f"{row['rank']} / {row['candidates']}",
                       row["answers"][0]["caption"]] for row in rows]
            picture = f"![{modality}]({report['files'][f'gallery_{modality}']})"
            parts += [f"### {say[f'gallery_{modality}']}", picture, _table(table)]
    return "\n\n".join([f"## {say['gallery']}", say["gallery_text"], *parts]) if parts else ""


def _curves(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    names = [name for name in ("losses", "progress") if report["files"].get(name)]
    pictures = [f"![{say[name]}]({report['files'][name]})" for name in names]
    return "\n\n".join([f"## {say['curves']}", *pictures]) if pictures else ""


def _stage_table(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    if not report["stages"]:
        return ""
    keys = ("stage", "epochs", "steps", "samples", "seconds", "samples_per_s", "data_wait_pct", "predicted_gib",
            "measured_gib", "peak_gib", "loss")
    rows = [[say[f"stage_{key}"] for key in keys]]
    rows += [[duration(stage[key]) if key == "seconds" else number(stage[key]) for key in keys]
             for stage in report["stages"]]
    events = [f"- {_cell(event)}" for event in report["events"]]
    return "\n\n".join([f"## {say['stages']}", _table(rows), say["stages_text"]]
                       + ([f"### {say['events']}", "\n".join(events)] if events else []))


def _after_stages(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    """R@1 by pair and stage, of the last validation of each stage that has such figures; "" with fewer than two."""
    last = {found["stage"]: found for found in report["validations"]
            if any(name.endswith("R@1") for name in found["metrics"])}
    if len(last) < 2:
        return ""
    names = dict.fromkeys(name for found in last.values() for name in found["metrics"] if name.endswith("R@1"))
    chance = {name: value for found in last.values() for name, value in found["chance"].items()}
    rows = [[say["metric"], say["chance"], *last]]
    rows += [[name, number(chance.get(name)), *(number(found["metrics"].get(name)) for found in last.values())]
             for name in names]
    return "\n\n".join([f"## {say['after_stages']}", say["after_stages_text"], _table(rows)])


def _data(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    data = report["data"] or {}
    rows = [[say["set"], say["split"], say["counts"], say["licence"]]]
    rows += [[name, split, ", ".join(f"{kind} {number(n)}" for kind, n in kinds.items()),
              (data.get("licences") or {}).get(name, "")]
             for name, splits in (data.get("counts") or {}).items() for split, kinds in splits.items()]
    digests = [[say["split"], "SHA-256"], *([split, _code(d)] for split, d in (data.get("digests") or {}).items())]
    if len(rows) == 1:
        return ""
    parts = [[say["set"], say["split"], say["samples_of"], "SHA-256"]]
    parts += [[name, split, f"{number(part['samples'])} / {number(part['of'])}", _code(part["sha256"])]
              for name, splits in (data.get("available") or {}).items() for split, part in splits.items()]
    return "\n\n".join([f"## {say['data']}", _table(rows)] + ([say["available"], _table(parts)] if parts[1:] else [])
                       + ([say["digests"], _table(digests)] if digests[1:] else []))


def _environment(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    env = report["environment"]
    commit = env["git_commit"] and _code(env["git_commit"]) + (say["changed"] if env["git_changed"] else "")
    rows = [["python", env["python"]], [say["platform"], env["platform"]], ["CPU", number(env["cpus"])],
            ["git", commit or say["no_git"]], *([name, version] for name, version in env["packages"].items())]
    return "\n\n".join([f"## {say['environment']}", _table([[say["what"], say["fact"]], *rows])])


def _config(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    if not report["config"]:
        return ""
    import yaml

    text = yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True).rstrip()
    return f"## {say['config']}\n\n<details><summary>config.yaml</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _cell(value: Any) -> str:
    """A value as text for a cell of a Markdown table: on one line, with "|" and "<" escaped; "-" for nothing."""
    text = "-" if value is None or value == "" else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _code(value: Any) -> str:
    return "`" + str(value).replace("`", "'") + "`" if value else ""
