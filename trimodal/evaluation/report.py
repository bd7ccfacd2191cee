"""Reports of a run or an evaluation: `report_YYYYmmdd_HHMMSS.json`, `.md` and `.html`, curves and galleries as PNG.

    paths = write_report(Path("outputs/reports"), run, records, gallery=rows, language="en")

The JSON file (schema 1; a later schema may add keys, never change one). None stands for what is not known.

    schema        1
    created       local time, ISO 8601
    kind          "training" or "evaluation"
    command       what was called, one string
    checkpoint    path of the weights that were evaluated
    initialised_from  of a run that began with weights of a checkpoint (--init): which file, and what was taken of it
    best          {"stage", "epoch", "loss"}: where these weights come from, chosen on validation data (loss None: there
                  was none, they are the newest)
    model         {"size", "parameters"}
    towers        {modality: {"source", "licence", "digest", "parameters", "frozen": [stages], "trained": [stages]}} of
                  those that are pretrained
    environment   {"python", "platform", "cpus", "device", "precision", "git_commit", "git_changed", "packages":
                  {name: version}, this project's under "trimodal"}
    config        the resolved configuration
    data          {"counts": {set: {split: {kind: samples}}}, "digests": {split: sha256}, "licences": {set: text},
                  "available": {set: {split: {"samples": n, "of": n, "sha256": of their list}}},
                  "broken": {set: {split: samples that bad_samples.jsonl lists}}, ...}
    stages        [{"stage", "epochs", "steps", "samples", "seconds", "peak_gib", "held_gib", "measured_gib",
                  "predicted_gib", "data_wait_pct", "samples_per_s", "loss"}], in order; the last three are means of the
                  stage's logged steps (loss: of its last tenth). Compare predicted_gib, of tensors, with measured_gib:
                  of all that was measured, peak_gib, what was held before the model was made, held_gib, is not in it.
                  Of "seconds" are "validation_s", "saving_s" and "waiting_s", for data, as its logged steps tell it
    curves        {"losses": {stage: {part: [[steps], [values]]}}, "lr", "samples_per_s", "data_wait_pct": {stage:
                  [[steps], [values]]}}, of at most 200 points each, means over as many neighbours
    validations   [{"stage", "epoch", "step", "loss", "metrics": {name: value}, "chance": {name: value}, "candidates":
                  {name: count}}]
    evaluation    {"split", "figures": {set: {pair: {metric: {"value", "chance", "candidates", "queries", "low",
                  "high"}}}}, "facts": {set: {"samples", "of", "broken", "trained_on", "subset_seed", "nonfinite",
                  "trials", "near": {modality: files}}}}
    evaluation_s  seconds that this took
    earlier       what differs from the newest earlier report in this folder of the same recipe: verdict.find_earlier
    similarities  {pair: {"low", "high", "right": counts in bins of equal width between them, "wrong", "separation"}}
    map           {"points": [...], "of", "neighbours", "kept", "kept_pca"}: gallery.embedding_map
    retrievals    best, worst and random ones: gallery.retrievals
    gallery       [{"query", "source", "modality", "rank", "candidates", "answers": [{"caption", "score", "right"}]}]
    events        messages of the run: skipped steps, smaller micro-batches, resumption
    files         {"markdown", "page", "losses", "progress", "gallery_image", "gallery_audio"}: names of files beside it

What `write_report` is given as `run` are those keys that it cannot know itself: kind, command, checkpoint, best, model,
towers, config, data, evaluation, evaluation_s, similarities, map, retrievals, and "device", "precision",
"predicted_gib" ({stage: GiB}); each may be missing.

    python -m trimodal.evaluation.report compare A B ... [--html FILE]     # runs side by side: compare.py
"""

import datetime
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimodal import __version__
from trimodal.arguments import Parser, exit_code
from trimodal.errors import UserError
from trimodal.evaluation import markdown, page, verdict
from trimodal.evaluation.charts import thinned
from trimodal.evaluation.markdown import format_notes, format_table
from trimodal.evaluation.phrases import PHRASES, locale_language
from trimodal.evaluation.plots import flat_values, loss_curves, loss_parts, progress_curves, retrieval_grid
from trimodal.files import rename_to_free, replacing
from trimodal.redaction import without_secrets

__all__ = ["format_notes", "format_table", "retrieval_grid", "write_report"]

SCHEMA = 1
PACKAGES = ("torch", "torchvision", "torchaudio", "numpy", "transformers", "tokenizers", "pillow", "soundfile", "av")


def write_report(folder: Path, run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, language: str = "zh",
                 gallery: Sequence[Mapping[str, Any]] = (), media: Mapping[str, str] | None = None,
                 now: datetime.datetime | None = None) -> tuple[Path, Path]:
    """Write the report's files, each whole or not at all; paths of the JSON and the Markdown file. The page has the
    name of the latter, with .html.

    Args:
        run: facts of the run, see the module's docstring.
        records: of metrics.jsonl; empty for an evaluation.
        language: of the Markdown file, "zh" or "en"; the page has both, and opens in Chinese where this says so and the
            locale is Chinese.
        gallery: rows of gallery.examples, of both modalities.
        media: pictures and sounds of the page, as gallery.collect gives them.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = now or datetime.datetime.now().astimezone()
    pictures = {"losses": loss_curves(records), "progress": progress_curves(records)}
    for modality in ("image", "audio"):
        rows = [row for row in gallery if row["modality"] == modality]
        pictures[f"gallery_{modality}"] = _png(retrieval_grid(rows)) if rows else None
    while True:
        stem = now.strftime("report_%Y%m%d_%H%M%S")
        files: dict[str, str | None] = {"markdown": f"{stem}.md", "page": f"{stem}.html"}
        files |= {name: f"{stem}_{name}.png" if content else None for name, content in pictures.items()}
        report = compose(run, records, gallery, now) | {"files": files}
        report["earlier"] = verdict.find_earlier(folder, report)
        words = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
        contents = {f"{stem}_{name}.png": content for name, content in pictures.items() if content}
        opened = "zh" if language == locale_language() == "zh" else "en"
        contents |= {f"{stem}.md": _bytes(markdown.render(report, language)), f"{stem}.json": _bytes(words),
                     f"{stem}.html": _bytes(page.render(report, media, language=opened))}
        if not any(path.name.startswith(stem) for path in folder.iterdir()) and write_new(folder, contents):
            return folder / f"{stem}.json", folder / f"{stem}.md"
        now += datetime.timedelta(seconds=1)  # two reports within a second, or files of the user


def compose(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], gallery: Sequence[Mapping[str, Any]],
            now: datetime.datetime) -> dict[str, Any]:
    """The report as plain data, all but `files`."""
    named = ("kind", "command", "checkpoint", "initialised_from", "best", "model", "towers", "config", "data",
             "evaluation", "evaluation_s", "similarities", "map", "retrievals")
    report = {
        "schema": SCHEMA, "created": now.isoformat(timespec="seconds"), **{name: run.get(name) for name in named},
        "environment": environment(run),
        "stages": _stages(records, run.get("predicted_gib") or {}), "curves": _curves(records),
        "validations": [{**{name: record.get(name) for name in ("stage", "epoch", "step", "loss")},
                         "metrics": flat_values(record.get("metrics") or {}),
                         "chance": record.get("chance") or {}, "candidates": record.get("candidates") or {}}
                        for record in records if record.get("kind") == "validation"],
        "gallery": [{**row, "answers": [{name: answer[name] for name in ("caption", "score", "right")}
                                        for answer in row["answers"]]} for row in gallery],
        "events": [record["message"] for record in records if record.get("kind") == "event"],
    }
    report["checkpoint"] = without_secrets(str(report["checkpoint"] or "")) or None
    plain: dict[str, Any] = _plain(report)
    return plain


def environment(run: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, machine and commit of what runs here."""
    packages = {"trimodal": __version__}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(),
            "device": run.get("device"), "precision": run.get("precision"), "git_commit": _git("rev-parse", "HEAD"),
            "git_changed": None if changed is None else bool(changed), "packages": packages}


def write_new(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Write files by name, all or none of them, and none over one that is there: then False."""
    written = list[Path]()

    def rename(temporary: Path, path: Path) -> None:
        rename_to_free(temporary, path)
        written.append(path)

    try:
        for name, content in contents.items():
            with replacing(folder / name, rename=rename) as file:
                file.write(content)
    except OSError as error:
        for path in written:
            path.unlink()
        if isinstance(error, FileExistsError):
            return False
        raise
    return True


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _png(pixels: Any) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _stages(records: Sequence[Mapping[str, Any]], predicted_gib: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of the table of stages, in the order in which they ran (keys: see "stages" at the top of this file).

    A stage that was not finished has no totals. One that was continued after its end has several records of its end,
    each with the totals so far: the largest count.
    """
    found = []
    saved_s = 0.0
    for stage in dict.fromkeys(record["stage"] for record in records if record.get("kind") in ("step", "stage")):
        own = [record for record in records if record.get("stage") == stage]
        steps = [record for record in own if record["kind"] == "step"]
        ends = [record for record in own if record["kind"] == "stage"]
        entry: dict[str, Any] = {"stage": stage, "predicted_gib": predicted_gib.get(stage)}
        for name in ("epochs", "steps", "samples", "seconds", "peak_gib"):
            entry[name] = max(record[name] for record in ends) if ends else None
        known = [record for record in ends if record.get("held_gib") is not None]
        most = max(known, key=lambda record: record["peak_gib"] - record["held_gib"], default=None)
        entry["held_gib"] = most and most["held_gib"]
        entry["measured_gib"] = most and max(most["peak_gib"] - most["held_gib"], 0.0)
        entry |= _spent(entry, own, saved_s)
        saved_s = max([record.get("save_s") or 0.0 for record in ends], default=saved_s)
        last = steps[-max(1, len(steps) // 10):]
        entry |= {"data_wait_pct": _mean(steps, "data_wait_pct"), "samples_per_s": _mean(steps, "samples_per_s"),
                  "loss": _mean(last, "loss")}
        found.append(entry)
    return found


def _spent(entry: Mapping[str, Any], own: Sequence[Mapping[str, Any]], saved_s: float) -> dict[str, float | None]:
    """How much of a stage's time went into validation, saving and waiting for data. `saved_s`: what the records said of
    saving at the end of the stage before; a process that resumed has counted anew."""
    if entry["seconds"] is None:
        return dict.fromkeys(("validation_s", "saving_s", "waiting_s"))
    until_s = max(record.get("save_s") or 0.0 for record in own if record["kind"] == "stage")
    saving_s = until_s - saved_s if until_s >= saved_s else until_s
    validation_s = sum(record.get("seconds") or 0.0 for record in own if record["kind"] == "validation")
    waiting_pct = _mean([record for record in own if record["kind"] == "step"], "data_wait_pct") or 0.0
    rest_s = max(entry["seconds"] - saving_s - validation_s, 0.0)
    return {"validation_s": validation_s, "saving_s": saving_s, "waiting_s": rest_s * waiting_pct / 100}


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Curves over the steps, by stage, thinned."""
    steps: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("kind") == "step":
            steps.setdefault(record["stage"], []).append(record)
    found: dict[str, Any] = {"losses": {stage: {part: thinned(*xy) for part, xy in loss_parts(iter(own)).items()}
                                        for stage, own in steps.items()}}
    for name in ("lr", "samples_per_s", "data_wait_pct"):
        known = {stage: [record for record in own if record.get(name) is not None] for stage, own in steps.items()}
        found[name] = {stage: thinned([record["step"] for record in own], [record[name] for record in own])
                       for stage, own in known.items() if own}
    return found


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else None


def _plain(value: Any) -> Any:
    """JSON has no NaN, no tuples, no numpy: None, lists, numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the command -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Lay runs side by side; the exit code."""
    from trimodal.evaluation import compare

    parser = Parser("Lay runs side by side: settings that differ, figures, time and memory",
                    "The first run is what the others are compared with.")
    parser.add_argument("what", choices=("compare",), help="what to do")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's output folder, or a report_*.json")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page; FILE must not be there yet")
    options, language = parser.parse_args(arguments), locale_language()
    try:
        runs = compare.read_runs(options.runs)
        if options.html:
            _write_page(options.html, compare.as_page(runs, language))
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    print(compare.as_text(runs, language))
    if options.html:
        print(f"\n{PHRASES['page'][language]}: {options.html}")
    return 0


def _write_page(path: Path, text: str) -> None:
    try:
        if not write_new(path.parent, {path.name: _bytes(text)}):
            raise UserError(f"--html {path}: is there already; name another file")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}); name another file") from None


if __name__ == "__main__":
    sys.exit(exit_code(main))
