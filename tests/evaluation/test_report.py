"""Reports: what the files hold, both languages, safe text, whole files or none."""

import datetime
import errno
import json
import math
import os
import re
import string
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import trimodal
from trimodal.evaluation import markdown, report, verdict
from trimodal.evaluation.markdown import remarks
from trimodal.evaluation.phrases import PHRASES

NOW = datetime.datetime(2026, 3, 4, 5, 6, 7)


def say(key: str, language: str = "en", **values: object) -> str:
    """A phrase of the report, whatever its words are."""
    return PHRASES[key][language].format(**values)


def _records() -> list[dict]:
    found: list[dict] = []
    for stage, part in (("pretrain", "masked_image"), ("align", "contrastive_image_text")):
        for step in range(1, 41):
            at = step + (40 if stage == "align" else 0)
            found.append({"kind": "step", "stage": stage, "epoch": 1, "step": at, "task": "image_text",
                          "loss": 4.0 / at, "parts": {part: 4.0 / at}, "lr": 1e-4, "grad_norm": 1.0,
                          "samples_per_s": 50.0, "data_wait_pct": 2.0 if step < 21 else 4.0})
        found.append({"kind": "validation", "stage": stage, "epoch": 1, "step": at, "loss": 1.5,
                      **({"metrics": {"image_to_text_R@1": 0.25}, "chance": {"image_to_text_R@1": 0.125},
                          "candidates": {"image_to_text_R@1": 8}} if stage == "align" else {"metrics": {}})})
        for epochs in (1, 2):  # it was through after one epoch and has gone on for another: its records add up already
            found.append({"kind": "stage", "stage": stage, "epochs": epochs, "steps": 20 * epochs, "peak_gib": 1.5,
                          "held_gib": 1.25,
                          "seconds": 30.0 * epochs, "samples": 200 * epochs, "step": at})
    return [*found, {"kind": "event", "step": 3, "message": "step 3 skipped: a|b <b>bold</b>"}]


def _figure(value=0.25, chance=0.1) -> dict:
    return {"value": value, "chance": chance, "candidates": 1234, "queries": 50, "low": 0.2, "high": 0.3}


def _run() -> dict:
    pair = {"image-text": {"image_to_text_R@1": _figure(), "image_to_text_median_rank": _figure(14.0, 77.5)}}
    facts = {"samples": 90, "of": 100, "broken": 2, "subset_seed": 0, "nonfinite": {"text": 3}, "trials": "all pairs"}
    return {"kind": "training", "command": "python run_training.py", "checkpoint": "best_model.pt", "device": "cpu",
            "precision": "fp32", "model": {"size": "tiny", "parameters": 15_000_000},
            "config": {"training": {"lr": 1e-4}}, "best": {"stage": "align", "epoch": 2, "loss": float("nan")},
            "predicted_gib": {"align": 1.4},
            "data": {"counts": {"stamps": {"train": {"image+text": 7}}}, "digests": {"train": "ab12"},
                     "licences": {"stamps": "GPL-2"}},
            "evaluation": {"split": "test", "figures": {"all": pair, "stamps": pair}, "facts": {"stamps": facts}}}


def _rows(modality="image", count=2, right=1) -> list[dict]:
    shape = (60, 100, 3) if modality == "image" else (150, 80)
    return [{"query": f"query {n}", "source": "stamps", "modality": modality, "rank": right + 1, "candidates": 20,
             "answers": [{"picture": np.full(shape, 90 + 20 * k, np.uint8 if modality == "image" else np.float16),
                          "caption": f"answer {k}", "score": 0.9 - 0.1 * k, "right": k == right} for k in range(5)]}
            for n in range(count)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    path, markdown = report.write_report(folder, _run(), _records(), language="en", now=NOW,
                                         gallery=_rows("image") + _rows("audio"))
    return path, markdown


def test_the_json_holds_every_documented_key_and_what_was_given(written):
    path, _ = written
    found = json.loads(path.read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    documented = re.findall(r"^    (\w+)  +\S", report.__doc__, re.MULTILINE)
    assert found.keys() == set(documented)
    assert found["schema"] == 1 and found["created"] == "2026-03-04T05:06:07"
    assert path.name == "report_20260304_050607.json"
    assert found["evaluation"]["figures"]["stamps"]["image-text"]["image_to_text_R@1"] == _figure()
    assert found["best"] == {"stage": "align", "epoch": 2, "loss": None}  # NaN is no JSON
    align = found["stages"][1]
    assert align == {"stage": "align", "epochs": 2, "steps": 40, "samples": 400, "seconds": 60.0, "peak_gib": 1.5,
                     "predicted_gib": 1.4, "held_gib": 1.25, "measured_gib": 0.25, "data_wait_pct": 3.0,
                     "samples_per_s": 50.0, "validation_s": 0.0, "saving_s": 0.0, "waiting_s": pytest.approx(1.8),
                     "loss": pytest.approx(np.mean([4 / at for at in range(77, 81)]))}
    assert [found["validations"][1][name] for name in ("metrics", "chance", "candidates")] == [
        {"image_to_text_R@1": 0.25}, {"image_to_text_R@1": 0.125}, {"image_to_text_R@1": 8}]
    assert found["gallery"][0]["answers"][1] == {"caption": "answer 1", "score": 0.8, "right": True}
    assert found["environment"]["packages"]["torch"].startswith("2.")
    assert found["environment"]["packages"]["trimodal"] == trimodal.__version__


def test_what_later_stages_forget_is_seen(tmp_path):
    """The last validation of each stage that has figures, pair by pair; one such stage alone tells nothing."""
    def validation(stage, **metrics):
        return {"kind": "validation", "stage": stage, "epoch": 1, "step": 1, "loss": 1.0,
                "metrics": {f"{name}_R@1": value for name, value in metrics.items()} | {"image_to_text_R@5": 0.9},
                "chance": {"image_to_text_R@1": 0.125}}

    records = [validation("align", image_to_text=0.3), validation("align", image_to_text=0.5, audio_to_text=0.75)]
    for stage, expected in ((None, False), ("speech", True)):
        further = [validation("speech", audio_to_text=0.25)] if stage else []
        _, markdown = report.write_report(tmp_path, _run(), records + further, language="en", now=NOW)
        text = markdown.read_text("utf-8")
        assert (say("after_stages_text") in text) == expected
    assert "| image_to_text_R@1 | 0.1250 | 0.5000 | - |" in text and "R@5 |" not in text
    assert "| audio_to_text_R@1 | - | 0.7500 | 0.2500 |" in text


def test_further_rows_of_a_set_say_what_they_leave_out() -> None:
    assert remarks("stamps_without_symbols_zh") == ["without_symbols", "one_language"]
    assert remarks("stamps_en") == ["one_language"] and not remarks("stamps") and not remarks("my_enamels")


def test_files_named_in_the_report_are_there_and_nothing_else(written):
    path, markdown = written
    files = json.loads(path.read_text("utf-8"))["files"]
    assert files["markdown"] == markdown.name
    assert {p.name for p in path.parent.iterdir()} == {path.name, *files.values()}
    for name in re.findall(r"!\[.*\]\((.+)\)", markdown.read_text("utf-8")):
        image = Image.open(path.parent / name)
        assert min(image.size) >= 200 and max(image.size) <= 4000


def test_the_markdown_says_what_was_measured(written):
    text = written[1].read_text("utf-8")
    assert verdict.sentence(json.loads(written[0].read_text("utf-8")))["en"] == text.splitlines()[2]
    assert "| image-text | image_to_text_R@1 | **0.2500** | 0.2000 - 0.3000 | 0.1000 | 2.5 | 1,234 | 50 |" in text
    assert "image_to_text_median_rank | **14** | 0.2000 - 0.3000 | 77.5 | - |" in text  # less is better: no "times"
    for note in (say("samples", samples=90, of=100), say("subset", subset_seed=0), say("broken", broken=2)):
        assert note in text
    assert "text 3" in text and "all pairs" in text
    assert "### stamps" in text and "### all" not in text  # one set alone is not told twice
    assert "| align | 2 | 40 | 400 | 1 min 00 s | 50 | 3 | 1.4 | 0.2500 | 1.5 |" in text and say("stages_text") in text
    assert "GPL-2" in text and "`ab12`" in text and "lr: 0.0001" in text
    assert "a\\|b &lt;b>bold&lt;/b>" in text  # neither a cell's end nor HTML
    assert "{" not in text.split("```")[0]  # no phrase with a place that was not filled


def test_every_table_has_as_many_cells_in_each_row(written):
    for table in re.findall(r"(?:^\|.*\|\n)+", written[1].read_text("utf-8"), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_chinese_is_the_same_report_in_other_words(written):
    chinese, english = markdown.render(json.loads(written[0].read_text("utf-8")), "zh"), written[1].read_text("utf-8")
    for key in ("title_training", "chance", "candidates", "licence", "stages"):
        assert say(key, "zh") in chinese and say(key, "en") in english and say(key, "en") not in chinese
    shape = [re.sub(r"[^#|`!*]", "", line) for line in english.splitlines()]
    assert [re.sub(r"[^#|`!*]", "", line) for line in chinese.splitlines()] == shape
    assert sorted(re.findall(r"\d+\.\d+", chinese)) == sorted(re.findall(r"\d+\.\d+", english))


def test_phrases_have_both_languages_with_the_same_places():
    for key, words in PHRASES.items():
        assert words.keys() == {"zh", "en"} and words["zh"] and words["en"], key
        places = {language: sorted(name or "" for _, name, _, _ in string.Formatter().parse(text) if name is not None)
                  for language, text in words.items()}
        assert places["zh"] == places["en"], key
        assert not re.search(r"[\u4e00-\u9fff]", words["en"]), key
    folder = Path(report.__file__).parent
    source = "".join(path.read_text("utf-8") for path in folder.glob("*.py") if path.name != "phrases.py")
    built = tuple(name for name in re.findall(r"""f["'](\w+_)\{""", source))  # keys put together: f"stage_{key}"
    assert {key for key in PHRASES if f'"{key}"' not in source and f"'{key}'" not in source
            and not key.startswith(built)} == set()


def test_an_evaluation_without_records_or_gallery(tmp_path):
    run = {**_run(), "kind": "evaluation", "evaluation": {"split": "test", "figures": {}, "facts": {}}}
    path, markdown = report.write_report(tmp_path, run, [], language="en", now=NOW)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".html", ".json", ".md"]
    text = markdown.read_text("utf-8")
    assert text.startswith(f"# {say('title_evaluation')}\n") and say("nothing") in text
    assert f"## {say('stages')}\n" not in text
    assert json.loads(path.read_text("utf-8"))["files"]["losses"] is None


def test_two_reports_in_one_second_do_not_overwrite_each_other(tmp_path):
    first, markdown = report.write_report(tmp_path, {"kind": "evaluation"}, [], now=NOW)
    second, _ = report.write_report(tmp_path, {"kind": "evaluation"}, [], now=NOW)
    assert (first.name, second.name) == ("report_20260304_050607.json", "report_20260304_050608.json")
    assert markdown.read_text("utf-8").startswith(f"# {say('title_evaluation', 'zh')}\n"), "unless asked otherwise"


@pytest.mark.parametrize("taken", [".md", ".json", "_losses.png", "_of_mine.txt"])
def test_a_report_never_takes_the_name_of_a_file_that_is_there(tmp_path, taken):
    (tmp_path / f"report_20260304_050607{taken}").write_text("of the user")
    path, markdown = report.write_report(tmp_path, _run(), _records(), now=NOW)
    assert path.stem == markdown.stem == "report_20260304_050608"
    assert (tmp_path / f"report_20260304_050607{taken}").read_text() == "of the user"


@pytest.mark.parametrize("has_links", [True, False])
def test_of_two_reports_at_one_moment_neither_overwrites_the_other(tmp_path, monkeypatch, has_links):
    """The other one appears between our look into the folder and our last file."""
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    (tmp_path / "b").write_bytes(b"other")
    assert not report.write_new(tmp_path, {"a": b"new", "b": b"new", "c": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"] and (tmp_path / "b").read_bytes() == b"other"
    assert report.write_new(tmp_path, {"a": b"new"}) and (tmp_path / "a").read_bytes() == b"new"


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        report.write_report(tmp_path, _run(), _records(), now=NOW)
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_the_terminal_is_told_what_the_figures_leave_out():
    facts = _run()["evaluation"]["facts"]
    whole: dict = {"samples": 5, "of": 5, "broken": 0, "subset_seed": None, "nonfinite": {}}
    figures: dict = {"whole": {}, "stamps": {}}
    text = report.format_notes(figures, {"whole": whole, **facts})
    assert text.startswith("\nstamps: ") and len(text.splitlines()) == 2 and "whole" not in text
    for note in (say("samples", samples=90, of=100), say("subset", subset_seed=0), say("broken", broken=2)):
        assert note in text
    assert "all pairs" in text
    assert report.format_notes(figures, {"whole": whole}) == ""
    assert report.format_notes({}, {"whole": whole}).endswith(say("no_figures"))


def test_a_set_without_figures_is_named(tmp_path):
    run = _run()
    run["evaluation"]["facts"]["manifest"] = {
        "samples": 0, "of": 0, "broken": 0, "subset_seed": None, "nonfinite": {}}
    _, markdown = report.write_report(tmp_path, run, [], language="en", now=NOW)
    assert f"### manifest\n\n{say('samples', samples=0, of=0)}; {say('no_figures')}\n" in markdown.read_text("utf-8")


def test_the_terminal_table_is_aligned():
    figures = {"stamps": {"image-text": {"image_to_text_R@1": _figure(), "text_to_image_median_rank": _figure(7.0)}},
               "a_set_with_a_long_name": {"speakers": {"EER": {**_figure(math.nan), "low": None, "high": None}}}}
    lines = report.format_table(figures).splitlines()
    assert len(lines) == 5 and len({line.rindex(" ") for line in lines[2:]}) == 1
    assert re.split(" {2,}", lines[2]) == ["stamps", "image-text", "image_to_text_R@1", "0.2500", "0.2000 - 0.3000",
                                           "0.1000", "1,234", "50"]
    assert " nan " in lines[4] and " -  " in lines[4]
