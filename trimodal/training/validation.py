"""Validation after each epoch: losses, retrieval, the best weights. At the end: evaluation and report of the run."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import Loader, epoch_batches
from trimodal.checkpoint import check_room, export, is_own, plain
from trimodal.checkpoint import save as save_file
from trimodal.config import FRAME_RATE_HZ, MODALITIES
from trimodal.data import bad_samples
from trimodal.data.batches import Batch, pool
from trimodal.errors import CheckpointError, UserError
from trimodal.evaluation import gallery, protocols, report
from trimodal.memory import devices
from trimodal.objectives.base import Losses
from trimodal.redaction import command_line, settings
from trimodal.towers.settings import frozen_until, tower_facts
from trimodal.training import outputs
from trimodal.training.examples import write_projector
from trimodal.training.frozen import read_features
from trimodal.training.run import Run, description
from trimodal.training.stage import Stage, compute_losses, make_step, shrink
from trimodal.training.tracking import read_records

Figure = Mapping[str, Any]  # value, chance, candidates, ... (evaluation/metrics.py)

VALIDATION_BATCH = 512  # contrast on validation data is over at most this many samples, whatever the training batch
NO_TEST = ("no test samples to compare, so the report has no figures: they need two with two modalities, labels or "
           "speakers")
ADD_TEST = "add lines with split: test to the manifest, or a set that has some (--datasets)"
NO_VAL = "no validation: the val split has fewer than two samples to compare; best_model.pt holds the newest weights"
ADD_VAL = "give two samples of each kind the split val, or add data: of ten of a kind some are held out"
AT_THE_END = "training is done: mend this, then --resume auto evaluates and reports"


def validate(run: Run, stage: Stage, speed: str = "") -> protocols.Encoded | None:
    """Validation loss, and retrieval where the stage contrasts; remembers the best weights; prints the epoch's line,
    which ends with `speed`. Returns what was encoded of the validation split."""
    start_s = time.perf_counter()
    with averaged(run, stage):
        loss, parts, encoded = encode_all(run, stage)
        figures = retrieval_figures(run, encoded)
        is_best = remember_best(run, stage.row.name, loss, stage.matching_heads)
    name, progress = stage.row.name, run.progress
    recorded = {key: {figure: values[field] for figure, values in figures.items()} for key, field in
                (("metrics", "value"), ("chance", "chance"), ("candidates", "candidates"))}
    run.tracker.validation({"stage": name, "epoch": progress.epoch, "step": progress.step, "loss": loss,
                            "parts": parts, **recorded, "seconds": time.perf_counter() - start_s})
    if loss is None and not run.has_logged_no_validation:  # once, though every epoch of every stage finds it anew
        run.has_logged_no_validation = True
        run.tracker.event(f"[{name}] {NO_VAL}; {ADD_VAL}", progress.step)
    mean = progress.loss_sum / progress.losses if progress.losses else float("nan")
    validated = "" if loss is None else f"  validation {loss:.4f}{' *' if is_best else ''}"
    run.tracker.say(f"[{name}] epoch {progress.epoch}/{run.config.training.epochs}  loss {mean:.4f}"
                    f"{validated}{first_recalls(figures)}  {speed}")
    return encoded


def encode_all(run: Run, stage: Stage) -> tuple[float | None, dict[str, float], protocols.Encoded | None]:
    """Validation loss and its parts, and where the stage contrasts what is encoded for retrieval, which takes the
    features that the loss has computed."""
    known: protocols.Known = {}
    loss, parts = validation_loss(run, stage, known)
    return loss, parts, encode_validation(run, known) if stage.contrasts else None


@contextlib.contextmanager
def averaged(run: Run, stage: Stage) -> Iterator[None]:
    """Evaluate with the averaged weights, where an average is kept."""
    run.model.eval()
    if stage.average is None:
        yield
        return
    stage.average.swap(run.model)
    try:
        yield
    finally:
        stage.average.swap(run.model)


# ---- loss --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(run: Run, stage: Stage,
                    known: protocols.Known | None = None) -> tuple[float | None, dict[str, float]]:
    """Mean over validation samples of their task's loss, and of each part; no augmentation, all captions.

    To `known` are added the features that losses have computed, of whole sounds alone.

    A sample weighs the same whatever its task, so that a handful of sounds does not outvote thousands of pictures.
    Batches with nothing to compare or predict are left out; None if that is all of them.
    """
    seen: protocols.Known = {}
    batches = Loader(run.data, "val", validation_jobs(run, stage), run.config,
                     inputs=[task.inputs for task in stage.tasks], train=False, epoch=0)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        cropped = batch if "audio" in run.model.towers else crop_sounds(batch, run.config.data.audio_max_s)
        features = known_features(stage, batch, seen)
        losses = batch_loss(run, stage, batch.task, cropped, features)
        add_features(features, batch, cropped, seen, {} if known is None else known)
        if losses.total is None:
            continue
        for name, value in {"loss": losses.total, **losses.parts}.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch.keys)
            counts[name] = counts.get(name, 0) + len(batch.keys)
    means = {name: total / counts[name] for name, total in sums.items()}
    return means.pop("loss", None), means


def validation_jobs(run: Run, stage: Stage) -> list[Any]:
    """The same batches every epoch: a seeded choice from each task's validation samples. Task by task, so that one
    finds the features that those before have computed of its samples."""
    pools = []
    for task in stage.tasks:
        indices = pool(run.data.tables["val"], task.inputs)
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
        pools.append(indices[order[:run.config.evaluation.max_validation].sort().values.numpy()])
    size = min(run.config.effective_batch(stage.row), VALIDATION_BATCH)
    return sorted(epoch_batches(pools, [1.0] * len(pools), size, seed=0, epoch=0), key=lambda job: job[0])


def validated_samples(run: Run, stage: Stage) -> int:
    """How many samples `validate` encodes: those of its loss, and those of its retrieval figures."""
    compared = min(len(run.data.tables["val"]), run.config.evaluation.max_validation) if stage.contrasts else 0
    return sum(len(indices) for _, indices in validation_jobs(run, stage)) + compared


def crop_sounds(batch: Batch, max_s: float) -> Batch:
    """At most `max_s` from the start of each sound: validation losses are over one window, as in training."""
    if batch.audio is None or "audio" not in batch.noise:  # of a pretrained tower, which reads all of a sound
        return batch
    frames = -(-int(max_s * FRAME_RATE_HZ) // 16) * 16
    patches = batch.noise["audio"].shape[1] * min(frames, batch.audio.shape[1]) // batch.audio.shape[1]
    assert batch.audio_lengths is not None
    return dataclasses.replace(
        batch, audio=batch.audio[:, :frames], audio_lengths=batch.audio_lengths.clamp(max=frames),
        noise={**batch.noise, "audio": batch.noise["audio"][:, :patches]})


def known_features(stage: Stage, batch: Batch, seen: protocols.Known) -> dict[str, Tensor]:
    """The features of a batch by modality, where all are among those seen, and its task needs nothing else of them."""
    if any(objective.scope != "batch" for _, _, objective in stage.objectives_of(batch.task)):
        return {}
    rows = batch.sample_ids.tolist()
    return {name: torch.cat([seen[name][row] for row in rows]) for name in batch.inputs
            if all(row in seen.get(name, ()) for row in rows)}


def add_features(features: Mapping[str, Tensor], batch: Batch, cropped: Batch, seen: protocols.Known,
                 known: protocols.Known) -> None:
    """Add the features of a batch to those seen, and to those known where no sound was cropped, by their samples."""
    rows, counts = batch.sample_ids.tolist(), torch.ones_like(batch.sample_ids)
    for name, features_NF in features.items():
        each = batch.caption_owner.bincount() if name == "text" and batch.caption_owner is not None else counts
        is_whole = counts.bool()
        if name == "audio" and batch.audio_lengths is not None and cropped.audio_lengths is not None:
            is_whole = cropped.audio_lengths.eq(batch.audio_lengths)
        for row, found, whole in zip(rows, features_NF.split(each.tolist()), is_whole.tolist(), strict=True):
            seen.setdefault(name, {}).setdefault(row, found)
            if whole:
                known.setdefault(name, {}).setdefault(row, found)


def batch_loss(run: Run, stage: Stage, task: int, batch: Batch, features: dict[str, Tensor]) -> Losses:
    """Loss and parts of a validation batch; out of memory halves the micro-batches, as in training.

    `features`: by modality, of all rows, where they are known; those that are computed are added.
    """
    while True:
        try:
            step = make_step(run, stage, batch, train=False)
            step.known_features |= features
            losses = compute_losses(stage, task, step, lambda loss: None)
            features |= step.known_features
            return losses
        except (RuntimeError, MemoryError) as error:
            cause = devices.out_of_memory_cause(error)
        shrink(run, stage, cause, "the same validation batch again", run.progress.step)


def remember_best(run: Run, stage: str, loss: float | None,
                  matching_heads: Mapping[str, Mapping[str, Tensor]] | None = None) -> bool:
    """Keep these weights, and the stage's matching heads, on the host if their validation loss is the lowest of the
    stage: true. Later stages start anew. Without one (None: nothing to validate on; or not finite) the newest are kept,
    until there is one."""
    before = run.best["loss"] if run.best and run.best["stage"] == stage else None
    is_best = loss is not None and math.isfinite(loss)
    if before is not None and math.isfinite(before) and not (is_best and loss < before):
        return False
    run.best = {"stage": stage, "epoch": run.progress.epoch, "loss": loss,
                "model_state_dict": plain(run.model.state_dict(), copy=True),
                "matching_head": plain(matching_heads or {}, copy=True)}
    return is_best


# ---- retrieval ---------------------------------------------------------------------------------------------------


def encode_validation(run: Run, known: protocols.Known | None = None) -> protocols.Encoded | None:
    """A fixed part of the validation split, over all sets; None where it has no samples. `known`: its features that
    have been computed already, with the same weights."""
    if not len(run.data.tables["val"]):
        return None
    setting = evaluation_setting(run, concepts=False, limit=run.config.evaluation.max_validation)
    return protocols.encode_split(run.model, run.data, "val", run.config, setting, known)


def evaluation_setting(run: Run, **settings: Any) -> protocols.Setting:
    """How splits are encoded: in micro-batches of the size that evaluation was planned with."""
    fit = run.fits.get(devices.EVALUATION)

    def less(size: int, cause: str) -> None:
        run.fits[devices.EVALUATION] = devices.Fit(dict.fromkeys(MODALITIES, size), dict.fromkeys(MODALITIES, 0))
        run.tracker.event(f"[evaluation] out of memory ({cause}): the same samples again, {size} at a time",
                          run.progress.step)

    return protocols.Setting(device=run.device, amp=run.precision.dtype, less=less,
                             sizes=dict(fit.micro_batch) if fit else {}, **settings)


def retrieval_figures(run: Run, encoded: protocols.Encoded | None) -> dict[str, Figure]:
    """Retrieval figures, by name, of what has been encoded of the validation split; without intervals."""
    if encoded is None:
        return {}
    quick = dataclasses.replace(run.config, evaluation=dataclasses.replace(run.config.evaluation, resamples=0))
    pairs = protocols.score(encoded, run.data, quick).get(protocols.ALL, {})
    return {name: figure for kind, figures in pairs.items() if kind != "speakers"
            for name, figure in figures.items() if figure["value"] is not None}


def first_recalls(figures: Mapping[str, Figure]) -> str:
    """R@1 of each direction for an epoch's line: with chance and the number of candidates, and per caption, as papers
    count, where that differs."""
    shown = ""
    for name, figure in figures.items():
        if name.endswith("R@1"):
            per_caption = figures.get(name + protocols.PER_CAPTION, figure)
            value, of_papers = f"{figure['value']:.3f}", f"{per_caption['value']:.3f}"
            more = f"; {of_papers} per caption" if of_papers != value else ""
            shown += f"  {name} {value} (chance {figure['chance']:.3f} of {figure['candidates']:,}{more})"
    return shown


# ---- the end of the run ------------------------------------------------------------------------------------------


def finish(run: Run) -> Path:
    """Evaluate the best weights on the test split, save final_model.pt, write the report; path of its Markdown.

    Raises:
        UserError: the disk is full, or the test data are broken.
    """
    if run.best:
        run.model.load_state_dict(run.best["model_state_dict"])
    else:
        run.tracker.event("The best weights are not known: the last ones are evaluated", run.progress.step)
    run.model.to(run.device).eval()
    read_features(run, set.intersection(*frozen_until(run.config, run.model.towers).values()))
    _check_room_for_the_end(run)
    heads = run.best.get("matching_head")
    if run.config.evaluation.rerank and not heads:
        run.tracker.event(f"evaluation.rerank={run.config.evaluation.rerank}: the best weights are of a stage without "
                          "the objective matching; nothing is re-ranked", run.progress.step)
    start_s = time.perf_counter()
    figures, encoded = protocols.evaluate_split(run.model, run.data, "test", run.config, evaluation_setting(run), heads)
    protocols.mark_trained_on(encoded, run.data, run.config, run.trained_on.numpy())
    protocols.mark_near(encoded, run.data, run.config)
    if figures:
        table = report.format_table(figures) + report.format_notes(figures, encoded.facts)
        run.tracker.say(table)
        run.tracker.text("run/test_figures", f"```text\n{table}\n```", run.progress.step)
    else:
        run.tracker.event(f"Evaluation: {NO_TEST}; {ADD_TEST}", run.progress.step)
    count = run.config.report.gallery_queries
    rows = [row for modality in ("image", "audio")
            for row in gallery.examples(encoded, run.data, modality, count)] if count and figures else []
    shown, media = gallery.collect(encoded, run.data, run.config)
    facts = {
        "kind": "training", "command": command_line(["python", *sys.argv]),
        "checkpoint": str(run.folder / "checkpoints" / "best_model.pt"),
        "best": {name: run.best.get(name) for name in ("stage", "epoch", "loss")},
        "model": {"size": run.model.config.size, "parameters": sum(p.numel() for p in run.model.parameters())},
        "towers": tower_facts(run.model.towers, run.config.stages),
        "initialised_from": run.initialised_from, "config": settings(run.config.to_dict()),
        "data": {**run.data.describe(), "broken": bad_samples.counts(run.config)},
        "device": str(run.device), "precision": run.precision.reason,
        "predicted_gib": run.predicted_gib, **shown,
        "evaluation": {"split": "test", "figures": figures, "facts": encoded.facts},
        "evaluation_s": time.perf_counter() - start_s,
    }
    final = {**description(run), "model_state_dict": run.model.state_dict(), **run.best,
             "progress": vars(run.progress).copy()}
    try:
        save_file(final, run.folder / "checkpoints" / "final_model.pt")
        with outputs.writing(run.folder, *(f"checkpoints/{name}" for name in outputs.EXPORTS)):
            export(final, run.folder / "checkpoints" / outputs.EXPORTS[0])
        write_projector(run, encoded)
        _, markdown = report.write_report(run.folder / "reports", facts, read_records(run.tracker.path),
                                          language=run.config.report.language, gallery=rows, media=media)
    except (CheckpointError, OSError) as error:
        raise UserError(f"{error}; {AT_THE_END}") from None
    run.tracker.record({"kind": "report", "step": run.progress.step, "file": markdown.name})
    run.tracker.say(f"Report page: {markdown.with_suffix('.html')}\nReport: {markdown}")
    return markdown


def _check_room_for_the_end(run: Run) -> None:
    """Before the evaluation, which takes long. A file that is there already is replaced, and gives its room."""
    folder, weights = run.folder / "checkpoints", run.model.state_dict()
    is_ours = {"final_model.pt": is_own(folder / "final_model.pt"),
               "model.safetensors": outputs.is_listed(run.folder, folder / "model.safetensors")}
    try:
        check_room(folder, *(weights for ours in is_ours.values() if not ours))
    except CheckpointError as error:
        raise UserError(f"{error}; {AT_THE_END}") from None
