"""What a run writes while it goes: records that last, logs without duplicates after a resume, a bar only for eyes."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from trimodal.training.tracking import Tracker, read_records


def step_record(step: int, stage: str = "align", loss: float = 1.5) -> dict:
    return {"stage": stage, "epoch": 1, "step": step, "loss": loss, "parts": {"contrastive_image_text": loss},
            "lr": 1e-4, "grad_norm": 0.5, "temperature": {"image_text": 14.0}, "samples_per_s": 100.0,
            "data_wait_pct": 1.0, "memory_gib": 0.25}


def validation_record(step: int, loss: float = 2.0) -> dict:
    return {"stage": "align", "epoch": 1, "step": step, "loss": loss, "parts": {"contrastive_image_text": loss},
            "metrics": {"image_to_text_R@1": 0.25}}


def scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """All points as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(logs / "tensorboard"), {"scalars": 0, "images": 0})
    board.Reload()
    return {tag: [(event.step, event.value) for event in events] for tag in board.Tags()["scalars"]
            if (events := board.Scalars(tag))}


def long_ago(logs: Path) -> None:
    """TensorBoard orders its files by the second in their names: these become older than any that follow."""
    for path in (logs / "tensorboard").iterdir():
        path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.step(step_record(10))
    tracker.validation(validation_record(10))
    tracker.event("Something happened: 内存", 11)
    tracker.record({"kind": "stage", "stage": "align", "step": 12, "seconds": 1.5})
    assert read_records(tmp_path / "metrics.jsonl") == [  # readable while the run goes on
        {"kind": "step", **step_record(10)}, {"kind": "validation", **validation_record(10)},
        {"kind": "event", "step": 11, "message": "Something happened: 内存"},
        {"kind": "stage", "stage": "align", "step": 12, "seconds": 1.5}]
    tracker.close()


def test_tensorboard_has_every_curve(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    for step in (10, 20):
        tracker.step(step_record(step, loss=1 / step))
    tracker.step(step_record(30, stage="finetune"))
    tracker.validation(validation_record(30))
    tracker.close()
    curves = scalars(tmp_path)
    assert curves["loss/align"] == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    assert curves["loss/finetune"] == [(30, 1.5)] and curves["parts/align/contrastive_image_text"][0][0] == 10
    assert curves["validation/align/loss"] == [(30, 2.0)] and curves["retrieval/image_to_text_R@1"] == [(30, 0.25)]
    assert {"temperature/image_text", "train/lr", "train/grad_norm", "train/samples_per_s", "train/data_wait_pct",
            "train/memory_gib", "validation/align/contrastive_image_text"} <= curves.keys()
    assert [step for step, _ in curves["train/lr"]] == [10, 20, 30], "the step counts over all stages"


def test_json_has_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.record({"kind": "validation", "step": 1, "loss": math.nan, "parts": {"a": [math.inf, (-math.inf, 1.0)]},
                    "name": "nan"})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text("utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kind": "validation", "step": 1, "loss": None, "parts": {"a": [None, [None, 1.0]]}, "name": "nan"}


def test_resuming_drops_what_came_after_from_both_logs(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    for step in (10, 20, 30, 40):
        first.step(step_record(step, loss=step))
    first.validation(validation_record(20))
    first.validation(validation_record(40))
    first.event("late", 21)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "step": 15, "lo')  # a kill in the middle of a line
    long_ago(tmp_path)
    second = Tracker(tmp_path, last_step=20)
    second.step(step_record(30, loss=-1))
    second.close()
    found = read_records(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"], line["loss"]) for line in found] == [
        ("step", 10, 10), ("step", 20, 20), ("validation", 20, 2.0), ("step", 30, -1)]
    assert not list(tmp_path.glob("*.tmp"))
    curves = scalars(tmp_path)
    assert curves["loss/align"] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    assert curves["validation/align/loss"] == [(20, 2.0)]


def test_what_every_start_finds_is_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for last_step in (0, 0, 20):
        tracker = Tracker(tmp_path, last_step)
        tracker.event("words are missing", last_step, once=True)
        tracker.event("resumed", last_step)
        tracker.close()
    assert [record["message"] for record in read_records(tmp_path / "metrics.jsonl")] == [
        "words are missing", *["resumed"] * 3]
    assert capsys.readouterr().out.count("words are missing") == 3


def test_a_fresh_start_drops_all_of_an_attempt_before_it(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    first.step(step_record(10))
    first.close()
    long_ago(tmp_path)
    second = Tracker(tmp_path)
    second.close()
    assert read_records(tmp_path / "metrics.jsonl") == [] and scalars(tmp_path) == {}


def points(folder: Path) -> dict[str, list[int]]:
    """Steps of all points in all event files, one by one: the server behind TensorBoard's page shows them all."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return {path.name: [event.step for event in LegacyEventFileLoader(str(path)).Load() for _ in event.summary.value]
            for path in (folder / "tensorboard").iterdir()}


def test_no_event_file_keeps_points_of_an_attempt_that_a_resume_dropped(tmp_path: Path) -> None:
    """They would stay on the page under tags that are never written again, as of a stage that is there no more."""
    first = Tracker(tmp_path)
    for step in (10, 20, 30, 40):
        first.step(step_record(step))
    first.validation(validation_record(40))
    first.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    whole = path.read_bytes()
    Tracker(tmp_path, last_step=40).close()
    assert path.read_bytes() == whole, "there is nothing to drop"
    Tracker(tmp_path, last_step=20).close()
    assert {step for steps in points(tmp_path).values() for step in steps} == {10, 20}
    curves = scalars(tmp_path)
    assert [step for step, _ in curves["loss/align"]] == [10, 20] and "validation/align/loss" not in curves


@pytest.mark.parametrize("damage", [b"", bytes(4096), b"\xff" * 64, b"\x10" + bytes(40)])
def test_an_event_file_counts_up_to_where_it_is_damaged(tmp_path: Path, damage: bytes) -> None:
    """As TensorBoard reads it: a power cut may leave anything at its end."""
    first = Tracker(tmp_path)
    for step in (10, 20, 30):
        first.step(step_record(step))
    first.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-5] + damage)
    Tracker(tmp_path, last_step=20).close()
    assert [step for step, _ in scalars(tmp_path)["loss/align"]] == [10, 20]


def test_a_line_that_is_no_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    path.write_text('{"kind": "event", "step": 1}\n{}\n[]\n{"kind": "eve', encoding="utf-8")
    assert read_records(path) == [{"kind": "event", "step": 1}]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_odd_lines_cost_themselves_only_and_odd_names_come_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tracker = Tracker(tmp_path)
    names = ["\u732b", "line\u2028separator", "next\x85line", "bytes\udcff"]
    for name in names:
        tracker.event(name, 1)
    with tracker.path.open("ab") as file:
        file.write('{"cut": "\u732b'.encode()[:-1] + b"\n")
    tracker.event("after it", 1)
    tracker.close()
    assert [record["message"] for record in read_records(tracker.path)] == [*names, "after it"]
    Tracker(tmp_path, last_step=1).close()
    assert [record["message"] for record in read_records(tracker.path)] == [*names, "after it"]
    assert "bytes\\udcff" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    screen = Screen() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    tracker = Tracker(tmp_path)
    tracker.open_bar(total=64, done=32, description="align")
    tracker.advance(16, 1.25)
    tracker.close_bar()
    tracker.close()
    shown = screen.getvalue()
    if terminal:
        assert "align" in shown and "32/64" in shown and "48/64" in shown and "loss 1.2500" in shown
    else:
        assert shown == ""


def test_pictures_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path)
    tracker.picture("examples/image", np.full((8, 12, 3), 200, np.uint8), 5)
    tracker.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    [picture] = board.Images("examples/image")
    assert (picture.step, picture.height, picture.width) == (5, 8, 12)


def layout(logs: Path) -> dict[str, dict[str, list[str]]]:
    """Titles of charts and their tags, by category, as the tab Custom Scalars shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    board = EventAccumulator(str(logs / "tensorboard"))
    board.Reload()
    found = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return {category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
            for category in found.category}


def test_each_metric_is_in_one_chart_with_its_chance_and_each_loss_with_that_of_validation(tmp_path: Path) -> None:
    """After a resume as well, which writes curves of other stages than before."""
    first = Tracker(tmp_path)
    first.step(step_record(10, stage="pretrain"), planned_gib=1.5)
    first.close()
    tracker = Tracker(tmp_path, last_step=10)
    tracker.step(step_record(20), planned_gib=1.5)
    tracker.validation({**validation_record(20), "chance": {"image_to_text_R@1": 0.01}})
    tracker.close()
    found = layout(tmp_path)
    assert found["Retrieval, with chance"] == {
        "image_to_text_R@1": ["retrieval/image_to_text_R@1$", "retrieval/image_to_text_R@1_chance$"]}
    losses = found["Losses, training and validation"]
    assert losses["align"] == ["loss/align$", "validation/align/loss$"] and losses["pretrain"] == ["loss/pretrain$"]
    assert losses["align: contrastive_image_text"] == [
        "parts/align/contrastive_image_text$", "validation/align/contrastive_image_text$"]
    assert found["Machine"]["memory, GiB"] == ["train/memory_gib$", "train/memory_planned_gib$"]
    assert scalars(tmp_path)["train/memory_planned_gib"] == [(10, 1.5), (20, 1.5)]


def test_the_number_of_skipped_steps_is_a_curve_that_a_resume_continues(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    first.step(step_record(10))
    first.skipped_step("not finite", 11, samples=["a"])
    first.step(step_record(20))
    first.close()
    second = Tracker(tmp_path, last_step=20)
    second.skipped_step("not finite", 21)
    second.close()
    assert scalars(tmp_path)["train/skipped_steps"] == [(10, 0), (11, 1), (20, 1), (21, 2)]
