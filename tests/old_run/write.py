"""Write `run/` beside this file: a finished run of the release of November 2026 and what its weights compute.

    git worktree add /tmp/old 9d618e6
    OMP_NUM_THREADS=1 python tests/old_run/write.py /tmp/old

`/tmp/old` is a checkout of commit 9d618e6, whose modules lie flat in the root. No code of today runs here, so the files
are what users of that release have. Its sizes were too large for a file that is committed, so `tiny` has the dimensions
of today's test size `nano`; its vocabulary is tests/words.json. The data are drawn by the set
`synthetic`. The run has three stages and three epochs, and the files of its last steps are kept, so that one of them
stands within the last epoch. tests/test_old_run.py says what must hold of it.
"""

import os
import shutil
import sys
import tempfile
import typing
from pathlib import Path

HERE = Path(__file__).resolve().parent
NANO = (8, 2, 2, 2, 2, 1, 4, 4.0)
RECIPE: dict[str, typing.Any] = {
    "data": {"datasets": ["synthetic"], "synthetic_images": 128, "synthetic_sounds": 128, "min_crop": 1.0,
             "flip": False, "audio_max_s": 0.5, "workers": 0},
    "model": {"size": "tiny", "image_size": 32, "context_length": 12, "embed_dim": 8, "num_classes": 60,
              "vocab_size": 135, "word_embeddings": "random"},
    "memory": {"micro_batch": 32},
    "training": {"epochs": 3, "batch_size": 32, "gradient_accumulation_steps": 1, "use_amp": False,
                 "log_every_steps": 1, "learning_rate": 1e-3, "save_every_minutes": 1e-6, "keep_checkpoints": 2},
    "evaluation": {"resamples": 0}, "report": {"gallery_queries": 0, "language": "en"},
    "stages": [
        {"name": "pretrain", "share": 1, "image_keep": 0.5, "tasks": [
            {"inputs": ["image"], "objectives": {"masked": 1.0}}, {"inputs": ["text"], "objectives": {"masked": 1.0}}]},
        {"name": "align", "share": 1, "drop_path": 0.1, "audio_keep": 0.5, "tasks": [
            {"inputs": ["image", "text"], "objectives": {"contrastive": 1.0}},
            {"inputs": ["audio", "text"], "objectives": {"contrastive": 1.0}}]},
        {"name": "finetune", "share": 1, "lr_factor": 0.5, "tasks": [
            {"inputs": ["image", "text"], "objectives": {"contrastive": 1.0, "matching": 0.5, "concepts": 0.5}}]},
    ],
    "paths": {"data_root": "data", "output_dir": "run"},
}


def main(checkout: str) -> None:
    sys.path[0] = checkout
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        words = Path("words")
        words.mkdir()
        shutil.copy(HERE.parent / "words.json", words / "tokenizer.json")

        import config
        import training
        import vocabulary
        from runs import Options

        config.PRESETS["tiny"] = config.Preset(**dict(zip(config.Preset.__dataclass_fields__, NANO, strict=True)))
        config.ModelConfig.problems = lambda self: []  # of 1,000 words at least
        vocabulary._package_folder = words.resolve
        training.train(config.config_from_dict(RECIPE), Options("cpu"))
        write_features(Path("run"))
        keep(Path("run"))


def write_features(run: Path) -> None:
    """features.pt: inputs and what the best weights make of them, in float32 and in float64 (`exact`), by the code of
    that release."""
    import torch

    from model import load_model

    model, _ = load_model(run / "checkpoints" / "best_model.pt")
    rng = torch.Generator().manual_seed(0)
    inputs = {
        "images": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=rng),
        "input_ids": torch.randint(5, model.config.vocab_size, (3, 12), generator=rng),
        "attention_mask": torch.arange(12) < torch.tensor([[12], [7], [3]]),
        "audio": torch.randn(3, 50, 80, generator=rng) * 3 - 6, "audio_lengths": torch.tensor([50, 32, 5]),
    }
    with torch.inference_mode():
        outputs = {name: value.clone() for name, value in model(**inputs).items()}
        exact = {name: value.clone() for name, value in model.double()(**inputs).items()}
    torch.save({"inputs": inputs, "outputs": outputs, "exact": exact}, run / "features.pt")


def keep(run: Path) -> None:
    """Copy what a resumed run needs, and the report as JSON; curves, plans, final_model.pt and pictures stay behind."""
    target = HERE / "run"
    shutil.rmtree(target, ignore_errors=True)
    for pattern in ("config.yaml", "features.pt", "checkpoints/[bc]*.pt", "logs/metrics.jsonl", "reports/*.json"):
        for file in run.glob(pattern):
            (target / file.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(run))


if __name__ == "__main__":
    main(sys.argv[1])
