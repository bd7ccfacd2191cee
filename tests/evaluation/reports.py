"""Reports of all kinds of runs as plain data, as report.py composes them, for tests of what is made of them."""

import base64
import datetime
import io
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from trimodal.evaluation import report

NOW = datetime.datetime(2026, 3, 4, 5, 6, 7, tzinfo=datetime.timezone.utc)
FACTS: dict[str, Any] = {"samples": 90, "of": 100, "broken": 2, "subset_seed": None, "nonfinite": {},
                         "near": {"image": 1}}


def figure(value: float = 0.25, chance: float = 0.01, low: float | None = 0.2, high: float | None = 0.3,
           candidates: int = 100) -> dict[str, Any]:
    return {"value": value, "chance": chance, "candidates": candidates, "queries": 50, "low": low, "high": high}


def pair(first: str, second: str, **given: Any) -> dict[str, dict[str, Any]]:
    """The figures of a pair, both directions."""
    return {f"{one}_to_{other}_{metric}": figure(**given) for one, other in ((first, second), (second, first))
            for metric in ("R@1", "R@1_per_caption", "R@5", "median_rank")}


def records(stages: tuple[str, ...] = ("pretrain", "align"), steps: int = 30, epochs: int = 2, validates: bool = True,
            ) -> list[dict[str, Any]]:
    """Of metrics.jsonl: steps, validations, stages."""
    found: list[dict[str, Any]] = []
    for number, stage in enumerate(stages):
        for step in range(1, steps + 1):
            at, epoch = number * steps + step, number * epochs + 1 + (step - 1) * epochs // steps
            found.append({"kind": "step", "stage": stage, "epoch": epoch, "step": at, "task": "image_text",
                          "loss": 4.0 / at, "parts": {f"part_of_{stage}": 4.0 / at}, "lr": 1e-4, "grad_norm": 1.0,
                          "samples_per_s": 50.0 + step, "data_wait_pct": 4.0})
            if step % (steps // epochs) == 0:
                retrieval = stage != "pretrain" and validates
                found.append({"kind": "validation", "stage": stage, "epoch": epoch, "step": at, "seconds": 1.5,
                              "loss": 2.0 / epoch if validates else None,
                              "metrics": {"image_to_text_R@1": 0.1 * epoch, "image_to_text_R@5": 0.2 * epoch,
                                          "text_to_image_R@1": 0.05 * epoch} if retrieval else {},
                              "chance": {"image_to_text_R@1": 0.05} if retrieval else {},
                              "candidates": {"image_to_text_R@1": 20} if retrieval else {}})
        found.append({"kind": "stage", "stage": stage, "epochs": epochs, "steps": steps, "peak_gib": 1.5,
                      "held_gib": 0.5, "seconds": 40.0, "save_s": 1.0 + number, "samples": 400, "step": at})
    return found


def run(figures: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """What `compose` is given of a run."""
    figures = {"stamps": {"image-text": pair("image", "text")}} if figures is None else figures
    return {"kind": "training", "command": "python run_training.py --model-size tiny", "device": "cpu",
            "checkpoint": "outputs/checkpoints/best_model.pt", "precision": "fp32",
            "model": {"size": "tiny", "parameters": 15_000_000}, "towers": {},
            "config": {"training": {"learning_rate": 1e-4, "seed": 0}, "paths": {"output_dir": "./outputs"}},
            "best": {"stage": "align", "epoch": 2, "loss": 1.25},
            "predicted_gib": {"pretrain": 0.8, "align": 0.9, "finetune": 0.9},
            "data": {"counts": {"stamps": {"train": {"image+text": 700, "captions": 700}, "test": {"image+text": 100}}},
                     "digests": {"train": "ab12", "test": "cd34"}, "licences": {"stamps": "GPL-2"},
                     "broken": {"stamps": {"train": 3}}, "available": {}},
            "evaluation": {"split": "test", "figures": figures, "facts": {"stamps": FACTS}}, "evaluation_s": 5.0,
            **given}


def composed(of: dict[str, Any], lines: list[dict[str, Any]], **given: Any) -> dict[str, Any]:
    """A report as write_report has it, without its files."""
    return {**report.compose(of, lines, [], NOW), "earlier": None, "files": {}, **given}


def kinds() -> dict[str, dict[str, Any]]:
    """A report of each kind of run that there is."""
    image_text, audio_text = pair("image", "text"), pair("audio", "text")
    tower = {"source": "timm:tiny", "licence": "Apache-2.0", "digest": "0" * 64, "parameters": 3_000_000,
             "frozen": ["align"], "trained": []}
    event = {"kind": "event", "step": 3, "message": "resumed from checkpoint_epoch_1.pt"}
    return {
        "own_towers": composed(run({"stamps": {"image-text": image_text, "audio-text": audio_text}}, **shown()),
                               records(("pretrain", "align", "finetune"))),
        "pretrained": composed(run(towers={"image": tower, "text": tower}), records(("align",))),
        "synthetic": composed(run({name: {"image-text": image_text} for name in ("all", "synthetic")}), records()),
        "image_text": composed(run({"coco": {"image-text": image_text}}, **shown("image")), records()),
        "speakers": composed(run({"voxceleb": {"speakers": {"EER": figure(0.1, 0.5, 0.08, 0.12)}}},
                                 **shown("speakers")), records(("pretrain",))),
        "without_validation": composed(run(best={"stage": "align", "epoch": 2, "loss": None}),
                                       records(validates=False)),
        "resumed": composed(run(), [*records(), event]),
        "one_epoch": composed(run({"stamps": {"image-text": pair("image", "text", value=0.01, low=0.0, high=0.03)}}),
                              records(("align",), steps=1, epochs=1)),
        "evaluation": composed(run(kind="evaluation", **shown()), []),
        "zero_shot": composed(run({"birds": {"image-class": {"image_to_class_top1": figure(0.9, 0.1, 0.8, 0.95)}}},
                                  kind="evaluation", data={"prompts": ["a {}"], "classes": ["a", "b"]}), []),
        "nothing": composed(run({}), records()),
    }


# ---- what is shown beside figures --------------------------------------------------------------------------------


def shown(*modalities: str, words: str = "A red {}.") -> dict[str, Any]:
    """Similarities, map and retrievals of some modalities, all of them by default."""
    modalities = modalities or ("image", "audio")
    rng = np.random.default_rng(0)
    kept = [name for name in ("image", "text", "audio") if name in modalities or name == "text"]
    points = [{"x": float(rng.random()), "y": float(rng.random()), "modality": kept[n % len(kept)], "set": "stamps",
               "class": ("cat", "dog", None)[n % 3], "words": words.format(n), "sample": n // len(kept),
               "picture": "image" if kept[n % len(kept)] == "image" else None} for n in range(60)]
    item: dict[str, dict[str, Any]] = {
        "image": {"words": words.format("fish"), "picture": "image", "sound": None},
        "audio": {"words": words.format("bell"), "picture": "mel", "sound": "sound"}}
    item["speakers"] = {**item["audio"], "words": "id10270"}
    rows = [{"direction": "speakers" if name == "speakers" else f"text_to_{name}", "kind": kind, "source": "stamps",
             "rank": None if name == "speakers" else rank, "candidates": None if name == "speakers" else 20,
             "query": item[name] if name == "speakers" else {"words": words.format(kind), "picture": None,
                                                             "sound": None},
             "answers": [{**item[name], "score": 0.5 - n / 10, "right": n + 1 == rank, "rank": n + 1}
                         for n in range(3)]}
            for name in modalities for kind, rank in (("best", 1), ("worst", 3), ("random", 2))]
    histogram = {"low": -0.2, "high": 0.8, "right": [0, 1, 5, 9], "wrong": [100, 50, 10, 0], "separation": 0.91}
    return {"similarities": {f"{name}-text": histogram for name in modalities}, "retrievals": rows,
            "map": {"points": points, "of": 900, "neighbours": 10, "kept": 0.55, "kept_pca": 0.2}}


def media() -> dict[str, str]:
    """A picture, a spectrogram and half a second of a tone, by the keys that `shown` names."""
    def uri(kind: str, content: bytes) -> str:
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    found = {}
    for name, colour in (("image", (200, 30, 30)), ("mel", (30, 30, 90))):
        out = io.BytesIO()
        Image.new("RGB", (64, 48), colour).save(out, "WEBP")
        found[name] = uri("image/webp", out.getvalue())
    out = io.BytesIO()
    soundfile.write(out, 0.2 * np.sin(np.arange(8000) * 0.2), 16_000, format="MP3")
    return {**found, "sound": uri("audio/mpeg", out.getvalue())}
