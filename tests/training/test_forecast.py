"""`--plan` foretells what training then plans: words, speakers and tasks as they are found; of unread sets the most."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import run_training
from tests import trees
from tests.refusals import assert_names, assert_told, refused
from tests.small_runs import SmallRuns
from trimodal.config import Config
from trimodal.data import tokenizer
from trimodal.training import plans
from trimodal.training.fitting import Plan
from trimodal.training.stage import active_tasks

STAGES = ("stages.align.tasks=[{inputs: [image, text], objectives: {contrastive: 1.0}}, {inputs: [audio, text], "
          "objectives: {contrastive: 1.0, speaker: 1.0}}]")


def own_list(folder: Path, speakers: int = 0, *, sounds: bool = True) -> Path:
    """Pictures with captions, and stretches of one sound, each of another speaker."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [trees.picture(folder / f"{i}.png", (9 * i, 200, 90)) for i in range(9)]
    sound = trees.sound(folder / "a.wav", trees.tone(2.0))
    lines: list[dict[str, Any]] = [{"image": picture.name, "text": f"a thing {picture.stem}"} for picture in pictures]
    lines += [{"audio": sound.name, "id": f"s{i}", "start": i / 1000, "duration": 0.3, "text": f"a sound {i}",
               **({"speaker": f"s{i}"} if i < speakers else {})} for i in range(max(speakers, 9))] if sounds else []
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps({**line, "split": "train"}) + "\n" for line in lines), "utf-8")
    return path


def foretold(config: Config, capsys: pytest.CaptureFixture[str]) -> dict[str, Plan]:
    plans.print_plan(config, "cpu", as_json=True)
    return {name: Plan(**plan) for name, plan in json.loads(capsys.readouterr().out)["plans"].items()}


def planned(small: SmallRuns, folder: Path, overrides: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """What training predicts, in GiB, and its fits."""
    run = small.open(folder, *overrides)
    plans.fit_stages(run, {row.name: active_tasks(row, run.data)[0] for row in run.config.stages}, None)
    return run.predicted_gib, run.fits


@pytest.mark.parametrize(("speakers", "more"), [
    (300, []), (0, []), (300, ["model.vocab_size=1"]), (2, ["data.datasets=[manifest, synthetic]"])])
def test_plan_is_that_of_the_training_that_follows(small: SmallRuns, tmp_path: Path, speakers: int, more: list[str],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    manifest = own_list(tmp_path / "own", speakers)
    overrides = ["data.datasets=[manifest]", f"data.manifest={manifest}", "data.cache=false", STAGES, *more]
    found = foretold(small.config(tmp_path / "plan", *overrides), capsys)
    peaks, its = planned(small, tmp_path / "run", overrides)
    assert {name: plan.peak_bytes / (1 << 30) for name, plan in found.items()} == peaks
    assert {name: plan.fit for name, plan in found.items()} == its


def test_speakers_take_memory_in_a_plan(small: SmallRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that the test above compares something."""
    overrides = ["data.datasets=[manifest]", STAGES]
    few, many = (foretold(small.config(tmp_path / str(count), *overrides, f"data.manifest={own}"), capsys)
                 for count in (2, 300) if (own := own_list(tmp_path / f"own{count}", count)))
    assert many["align"].by_tag["parameters"] > few["align"].by_tag["parameters"]
    assert many["finetune"].peak_bytes == few["finetune"].peak_bytes


def test_tasks_without_samples_are_not_planned(small: SmallRuns, tmp_path: Path) -> None:
    manifest = own_list(tmp_path / "own", sounds=False)
    known = plans.foretell(small.config(tmp_path, "data.datasets=[manifest]", f"data.manifest={manifest}", STAGES))
    assert {name: [task.inputs for task in tasks] for name, tasks in known.tasks.items()} == {
        "pretrain": [("image",), ("text",)], "align": [("image", "text")], "finetune": [("image", "text")]}


@pytest.mark.parametrize(("names", "speakers"), [("[coco, clotho]", 0), ("[coco, voxceleb]", 7205)])
def test_of_sets_that_are_not_read_all_tasks_are_planned(small: SmallRuns, tmp_path: Path, names: str,
                                                         speakers: int) -> None:
    """They may not be there yet."""
    config = small.config(tmp_path, f"data.datasets={names}", f"paths.data_root={tmp_path}/none", STAGES)
    known = plans.foretell(config)
    assert known.speakers == speakers
    assert [set(task.objectives) for task in known.tasks["align"]] == [
        {"contrastive"}, {"contrastive", "speaker"} if speakers else {"contrastive"}]


def test_speakers_of_a_list_are_counted_beside_sets_that_are_not_read(small: SmallRuns, tmp_path: Path) -> None:
    manifest = own_list(tmp_path / "own", 30)
    config = small.config(tmp_path, "data.datasets=[coco, manifest]", f"data.manifest={manifest}", STAGES)
    known = plans.foretell(config)
    assert known.speakers == 30 and "speaker" in known.tasks["align"][1].objectives


def test_a_list_that_training_refuses_is_refused(small: SmallRuns, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    lost = tmp_path / "lost.jsonl"
    with refused(lost):
        plans.foretell(small.config(tmp_path, "data.datasets=[manifest]", f"data.manifest={lost}"))
    assert run_training.main(["--plan", "--datasets", "manifest", "--output-dir", str(tmp_path),
                              f"data.manifest={lost}"]) == 2
    assert_told(capsys.readouterr().err, lost)


def test_words_that_are_not_here_are_not_fetched(small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda _: pytest.fail("fetched"))
    config = small.config(tmp_path, "model.word_embeddings=hub:nobody/nothing")
    assert plans.foretell(config).config == config
    [line] = capsys.readouterr().err.splitlines()
    assert_names(line, "hub:nobody/nothing", 135, "model.vocab_size")
