"""Reports of a run or an evaluation: `report_YYYYmmdd_HHMMSS.json` and `.md`, with curves and galleries as PNG beside.

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
                  "available": {set: {split: {"samples": n, "of": n, "sha256": of their list}}}, ...}
    stages        [{"stage", "epochs", "steps", "samples", "seconds", "peak_gib", "held_gib", "measured_gib",
                  "predicted_gib", "data_wait_pct", "samples_per_s", "loss"}], in order; the last three are means of the
                  stage's logged steps (loss: of its last tenth). Compare predicted_gib, of tensors, with measured_gib:
                  of all that was measured, peak_gib, what was held before the model was made, held_gib, is not in it
    validations   [{"stage", "epoch", "step", "loss", "metrics": {name: value}, "chance": {name: value}, "candidates":
                  {name: count}}]
    evaluation    {"split", "figures": {set: {pair: {metric: {"value", "chance", "candidates", "queries", "low",
                  "high"}}}}, "facts": {set: {"samples", "of", "broken", "trained_on", "subset_seed", "nonfinite",
                  "trials", "near": {modality: files}}}}
    gallery       [{"query", "source", "modality", "rank", "candidates", "answers": [{"caption", "score", "right"}]}]
    events        messages of the run: skipped steps, smaller micro-batches, resumption
    files         {"markdown", "losses", "progress", "gallery_image", "gallery_audio"}: names of files beside this one

What `write_report` is given as `run` are those keys that it cannot know itself: kind, command, checkpoint, best, model,
towers, config, data, evaluation, and "device", "precision", "predicted_gib" ({stage: GiB}); each may be missing.
"""

import datetime
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimodal import __version__
from trimodal.evaluation.plots import flat_values, loss_curves, progress_curves, retrieval_grid
from trimodal.files import rename_to_free, replacing
from trimodal.redaction import without_secrets

__all__ = ["format_table", "retrieval_grid", "write_report"]

SCHEMA = 1
PACKAGES = ("torch", "torchvision", "torchaudio", "numpy", "transformers", "tokenizers", "pillow", "soundfile", "av")

PHRASES: dict[str, dict[str, str]] = {key: {"en": en, "zh": zh} for key, en, zh in (
    ("title_training", "Training report", "训练报告"),
    ("title_evaluation", "Evaluation report", "评测报告"),
    ("what", "What", "项目"), ("fact", "Value", "内容"), ("created", "Written", "生成时间"),
    ("command", "Command", "命令"), ("model", "Model, parameters", "模型，参数量"),
    ("tower_image", "Pretrained tower of images", "预训练图像编码器"),
    ("tower_text", "Pretrained tower of texts", "预训练文本编码器"),
    ("tower_audio", "Pretrained tower of sounds", "预训练音频编码器"),
    ("tower", "`{source}`, licence {licence}, {parameters} parameters, sha256 {digest}; {stages}",
     "`{source}`，许可 {licence}，{parameters} 个参数，sha256 {digest}；{stages}"),
    ("frozen", "frozen in {}", "冻结于 {}"), ("trained", "trained in {}", "训练于 {}"),
    ("checkpoint", "Weights", "权重文件"),
    ("best", "Chosen on validation data", "按验证集选出"),
    ("best_text", "stage {stage}, epoch {epoch}, validation loss {loss}",
     "阶段 {stage}，第 {epoch} 轮，验证损失 {loss}"),
    ("best_none", "no validation: the newest weights, stage {stage}, epoch {epoch}",
     "没有验证：最新的权重，阶段 {stage}，第 {epoch} 轮"),
    ("device", "Device, precision", "设备，精度"),
    ("duration", "Training time, validation included", "训练用时（含验证）"),
    ("results", "Results", "评测结果"),
    ("results_text",
     "Split `{split}`. Chance is the exact expectation under a random order; candidates are what each query chooses "
     "from, each file once. Equal scores count against the model. Intervals: bootstrap over queries, 95 %. Of "
     "median_rank, EER and minDCF less is better. R@K counts equal captions of a file once, and every file that has "
     "the words is right; `_per_caption` counts as papers do: each caption is a query, only its own file is right.",
     "数据划分：`{split}`。“随机水平”是随机排序下的精确期望值，“候选数”是每个查询可选的数量，同一个文件只算一个。"
     "分数相同时按对模型不利的顺序计算。区间为对查询做自助法得到的 95 % 置信区间。median_rank、EER 和 minDCF 越小越好。"
     "R@K 把同一文件的相同描述只算一次，凡有这句话的文件都算正确；"
     "`_per_caption` 是论文的算法：每句描述都是一个查询，只有它自己的文件算正确。"),
    ("nothing", "Nothing was evaluated: this split has no two samples with two modalities, labels or speakers. Add "
     "lines with this split to the list, or another set.",
     "没有可评测的内容：这一划分里没有两个含两种模态、标签或说话人的样本。请在清单里加上写有这一划分的行，或换用别的数据集。"),
    ("pair", "Pair", "模态对"), ("metric", "Metric", "指标"), ("value", "Value", "数值"),
    ("interval", "95 % interval", "95 % 区间"), ("chance", "Chance", "随机水平"), ("times", "x chance", "随机的倍数"),
    ("candidates", "Candidates", "候选数"), ("queries", "Queries", "查询数"),
    ("samples", "{samples} of {of} samples", "使用 {of} 个样本中的 {samples} 个"),
    ("no_figures", "no figures, for which two samples are needed that can be compared",
     "没有指标，至少要有两个可以比较的样本"),
    ("subset", "a random part, drawn by seed {subset_seed}", "为随机抽取的一部分（种子 {subset_seed}）"),
    ("broken", "broken files left out: {broken}", "跳过的损坏文件：{broken}"),
    ("trained_on", "{trained_on} of them were trained on: these figures do not tell how it does on new samples",
     "其中 {trained_on} 个参加过训练：这些数字不能说明对新样本的效果"),
    ("near", "near-equal to a training file (re-encoded, resized): {}",
     "与某个训练文件几乎相同（重新编码、缩放等）：{}"),
    ("nonfinite", "features that are not finite, counted as errors: {}", "含非有限值、按错误计的特征：{}"),
    ("without_symbols", "Without letters, digits and signs, which their shapes alone tell apart.",
     "不含字母、数字和符号（它们仅凭形状即可区分）。"),
    ("trials", "speaker trials: {}", "说话人验证的试验：{}"), ("sentence_end", "; ", "；"),
    ("gallery", "Examples", "检索示例"),
    ("gallery_text", "Held-out captions drawn at random and their best answers; a green frame marks a right one.",
     "随机抽取的留出描述及其最佳结果；绿框为正确答案。"),
    ("gallery_image", "Text to image", "文本检索图像"), ("gallery_audio", "Text to audio", "文本检索声音"),
    ("query", "Query", "查询"), ("set", "Set", "数据集"), ("rank", "Rank of the right one", "正确答案的名次"),
    ("best_answer", "Caption of the best answer", "首个结果的描述"),
    ("curves", "Curves", "曲线"), ("losses", "training loss by stage and part", "各阶段、各部分的训练损失"),
    ("progress", "validation loss, retrieval, learning rate, speed", "验证损失、检索指标、学习率、速度"),
    ("stages", "Stages", "训练阶段"), ("stage_stage", "Stage", "阶段"), ("stage_epochs", "Epochs", "轮数"),
    ("stage_steps", "Steps", "步数"), ("stage_samples", "Samples seen", "看过的样本数"),
    ("stage_seconds", "Time", "用时"),
    ("stage_samples_per_s", "Samples/s", "样本/秒"), ("stage_data_wait_pct", "Waiting for data, %", "等待数据 %"),
    ("stage_predicted_gib", "Predicted peak of tensors, GiB", "张量预测峰值 GiB"),
    ("stage_measured_gib", "Measured of them, GiB", "其实测 GiB"),
    ("stage_peak_gib", "Measured in all, GiB", "全部实测峰值 GiB"),
    ("stage_loss", "Training loss, last tenth", "训练损失（最后十分之一）"),
    ("stages_text",
     "Compare the predicted peak with what was measured of it: on a CPU that is the process less what it held before "
     "the model was made (Python, libraries, data read), on CUDA all that the allocator took.",
     "预测峰值应与“其实测”相比：在 CPU 上是进程的内存减去建立模型之前已占的（Python、库、读入的数据），"
     "在 CUDA 上是分配器占用的全部。"),
    ("after_stages", "Validation after each stage", "各阶段结束时的验证"),
    ("after_stages_text", "R@1 of all pairs on validation data at the end of each stage that contrasts. Where a figure "
     "falls, a later stage has made the model forget.",
     "每个含对比目标的阶段结束时，各配对在验证集上的 R@1。数字下降，就是后面的阶段让模型忘记了先前学到的。"),
    ("events", "Events", "事件"), ("data", "Data", "数据"), ("split", "Split", "划分"),
    ("counts", "Samples by kind", "各类样本数"), ("licence", "Licence", "许可"),
    ("digests", "Digest of the lists of samples:", "样本清单的摘要："),
    ("available", "Sets of which a part is gone: compare figures only where the list of samples is the same.",
     "有一部分已经消失的数据集：样本清单相同，数字才能比较。"),
    ("samples_of", "Samples / listed", "现有 / 名单"), ("environment", "Environment", "环境"),
    ("platform", "Platform", "平台"), ("changed", " with uncommitted changes", "，有未提交的修改"),
    ("no_git", "not a git repository", "不是 git 仓库"), ("config", "Configuration", "完整配置"),
)}


def write_report(folder: Path, run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, language: str = "zh",
                 gallery: Sequence[Mapping[str, Any]] = (), now: datetime.datetime | None = None) -> tuple[Path, Path]:
    """Write the report's files, each whole or not at all; paths of the JSON and the Markdown file.

    Args:
        run: facts of the run, see the module's docstring.
        records: of metrics.jsonl; empty for an evaluation.
        language: of the Markdown file, "zh" or "en".
        gallery: rows of protocols.examples, of both modalities.

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
        files: dict[str, str | None] = {"markdown": f"{stem}.md"}
        files |= {name: f"{stem}_{name}.png" if content else None for name, content in pictures.items()}
        report = compose(run, records, gallery, now) | {"files": files}
        words = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
        contents = {f"{stem}_{name}.png": content for name, content in pictures.items() if content}
        contents |= {f"{stem}.md": _bytes(render(report, language)), f"{stem}.json": _bytes(words)}
        if not any(path.name.startswith(stem) for path in folder.iterdir()) and write_new(folder, contents):
            return folder / f"{stem}.json", folder / f"{stem}.md"
        now += datetime.timedelta(seconds=1)  # two reports within a second, or files of the user


def compose(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], gallery: Sequence[Mapping[str, Any]],
            now: datetime.datetime) -> dict[str, Any]:
    """The report as plain data, all but `files`."""
    named = ("kind", "command", "checkpoint", "initialised_from", "best", "model", "towers", "config", "data",
             "evaluation")
    report = {
        "schema": SCHEMA, "created": now.isoformat(timespec="seconds"), **{name: run.get(name) for name in named},
        "environment": environment(run),
        "stages": _stages(records, run.get("predicted_gib") or {}),
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
        last = steps[-max(1, len(steps) // 10):]
        entry |= {"data_wait_pct": _mean(steps, "data_wait_pct"), "samples_per_s": _mean(steps, "samples_per_s"),
                  "loss": _mean(last, "loss")}
        found.append(entry)
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


# ---- words -------------------------------------------------------------------------------------------------------


def format_table(figures: Mapping[str, Any]) -> str:
    """Figures as aligned columns for a terminal."""
    rows = [["set", "pair", "metric", "value", "95 % interval", "chance", "candidates", "queries"]]
    rows += [[name, pair, metric, _number(f["value"]), _interval(f), _number(f["chance"]), f"{f['candidates']:,}",
              f"{f['queries']:,}"]
             for name, pairs in _distinct(figures).items() for pair, metrics in pairs.items()
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
        facts: {set: facts}, as in `protocols.Encoded`; see `_note` for the keys.
    """
    say = {key: words["en"] for key, words in PHRASES.items()}
    return "".join(f"\n{name}: {_note(own, say, name in figures)}" for name, own in facts.items()
                   if name not in figures or own["samples"] < own["of"] or own["subset_seed"] is not None
                   or any(own.get(key) for key in ("broken", "nonfinite", "trials", "trained_on", "near")))


def _distinct(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures by data set, without "all" where these equal those of a single set."""
    return {name: pairs for name, pairs in figures.items()
            if name != "all" or all(pairs != other for key, other in figures.items() if key != "all")}


def render(report: Mapping[str, Any], language: str) -> str:
    """The Markdown file of a report."""
    say = {key: words[language] for key, words in PHRASES.items()}
    sections = [f"# {say['title_' + (report['kind'] or 'training')]}", _summary(report, say), _figures(report, say),
                _gallery(report, say), _curves(report, say), _stage_table(report, say), _after_stages(report, say),
                _data(report, say), _environment(report, say), _config(report, say)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    model, best, env = report["model"] or {}, report["best"] or {}, report["environment"]
    rows = [[say["created"], report["created"]], [say["command"], _code(report["command"])],
            [say["model"], f"{model.get('size')}, {_number(model.get('parameters'))}"],
            *([say[f"tower_{name}"], _tower(of, say)] for name, of in (report["towers"] or {}).items()),
            [say["checkpoint"], _code(report["checkpoint"])],
            [say["best"], _origin(best, say)],
            [say["device"], ", ".join(filter(None, [env["device"], env["precision"]]))],
            [say["duration"], _duration(sum(stage["seconds"] or 0 for stage in report["stages"]))]]
    return _table([[say["what"], say["fact"]]] + [row for row in rows if row[1]])


def _tower(of: Mapping[str, Any], say: Mapping[str, str]) -> str:
    """Source, licence, size and weights of a pretrained tower, and in which stages it was trained."""
    stages = [say[what].format(", ".join(of[what])) for what in ("frozen", "trained") if of[what]]
    return say["tower"].format(source=of["source"], licence=of["licence"], digest=of["digest"][:12],
                                       parameters=_number(of["parameters"]), stages=say["sentence_end"].join(stages))


def _origin(best: Mapping[str, Any], say: Mapping[str, str]) -> str | None:
    """A sentence on the epoch that the evaluated weights are of and why it was chosen; None where there was no choice,
    as for a checkpoint of training."""
    if best.get("epoch") is None:
        return None
    if best.get("loss") is None:
        return say["best_none"].format(**best)
    return say["best_text"].format(**{**best, "loss": _number(best["loss"])})


def _figures(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    evaluation = report["evaluation"] or {}
    parts = [f"## {say['results']}", say["results_text"].format(split=evaluation.get("split"))]
    columns = ("pair", "metric", "value", "interval", "chance", "times", "candidates", "queries")
    for name, pairs in _distinct(evaluation.get("figures") or {}).items():
        rows = [[say[key] for key in columns]]
        rows += [[pair, metric, f"**{_number(f['value'])}**", _interval(f), _number(f["chance"]), _times(metric, f),
                  f"{f['candidates']:,}", f"{f['queries']:,}"]
                 for pair, metrics in pairs.items() for metric, f in metrics.items()]
        note = say["without_symbols"] if name.endswith("_without_symbols") else ""
        parts += [f"### {name}", note or _note((evaluation.get("facts") or {}).get(name), say), _table(rows)]
    parts += [f"### {name}\n\n{_note(own, say, False)}" for name, own in (evaluation.get("facts") or {}).items()
              if len(parts) > 2 and name not in (evaluation.get("figures") or {})]
    return "\n\n".join(part for part in parts if part) if len(parts) > 2 else f"{parts[0]}\n\n{say['nothing']}"


def _note(facts: Mapping[str, Any] | None, say: Mapping[str, str], has_figures: bool = True) -> str:
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
    rows += [[_duration(stage[key]) if key == "seconds" else _number(stage[key]) for key in keys]
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
    rows += [[name, _number(chance.get(name)), *(_number(found["metrics"].get(name)) for found in last.values())]
             for name in names]
    return "\n\n".join([f"## {say['after_stages']}", say["after_stages_text"], _table(rows)])


def _data(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    data = report["data"] or {}
    rows = [[say["set"], say["split"], say["counts"], say["licence"]]]
    rows += [[name, split, ", ".join(f"{kind} {_number(n)}" for kind, n in kinds.items()),
              (data.get("licences") or {}).get(name, "")]
             for name, splits in (data.get("counts") or {}).items() for split, kinds in splits.items()]
    digests = [[say["split"], "SHA-256"], *([split, _code(d)] for split, d in (data.get("digests") or {}).items())]
    if len(rows) == 1:
        return ""
    parts = [[say["set"], say["split"], say["samples_of"], "SHA-256"]]
    parts += [[name, split, f"{_number(part['samples'])} / {_number(part['of'])}", _code(part["sha256"])]
              for name, splits in (data.get("available") or {}).items() for split, part in splits.items()]
    return "\n\n".join([f"## {say['data']}", _table(rows)] + ([say["available"], _table(parts)] if parts[1:] else [])
                       + ([say["digests"], _table(digests)] if digests[1:] else []))


def _environment(report: Mapping[str, Any], say: Mapping[str, str]) -> str:
    env = report["environment"]
    commit = env["git_commit"] and _code(env["git_commit"]) + (say["changed"] if env["git_changed"] else "")
    rows = [["python", env["python"]], [say["platform"], env["platform"]], ["CPU", _number(env["cpus"])],
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


def _number(value: Any) -> str:
    """Whole numbers with commas, others with four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{round(value):,}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def _interval(figure: Mapping[str, Any]) -> str:
    return "-" if figure["low"] is None else f"{_number(figure['low'])} - {_number(figure['high'])}"


def _times(metric: str, figure: Mapping[str, Any]) -> str:
    """How many times chance a figure is, where more is better."""
    better = ("R@", "mAP", "top")
    if figure["value"] is None or not figure["chance"] or not any(word in metric for word in better):
        return "-"
    return f"{figure['value'] / figure['chance']:.1f}"


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
