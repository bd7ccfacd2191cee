"""Secrets reach no line that is printed, no log, no report and no checkpoint."""

import dataclasses
import json
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest

import download_datasets
import evaluate
import run_training
from tests.small_runs import SmallRuns
from trimodal import checkpoint, redaction
from trimodal.config import Config, load_config
from trimodal.evaluation import report
from trimodal.redaction import command_line, names_secret, redact, redacted, settings
from trimodal.training.tracking import Tracker

SECRET = "s3cr3t/pa+ss"


@pytest.mark.parametrize(("text", "expected"), [
    ("https://anna:pw@host/x", "https://***@host/x"),
    ("http://anna@host:80", "http://***@host:80"), ("https:/anna:pw@host", "https:/***@host"),
    ("https://anna:p@w:x@host/@x?y=a@b", "https://***@host/@x?y=a@b"),
    ("two: https://a:b@h, 's3://c:d@i'", "two: https://***@h, 's3://***@i'"),
    ("https://h/x?token=abc&page=2&key=d#signature=e", "https://h/x?token=***&page=2&key=***#signature=***"),
    ("https://h/?X-Amz-Signature=ab%2F&X-Amz-Credential=c&access_token=d",
     "https://h/?X-Amz-Signature=***&X-Amz-Credential=***&access_token=***"),
    ("HF_TOKEN=abc MY_PASSWORD='a b' python x.py", "HF_TOKEN=*** MY_PASSWORD=*** python x.py"),
    ("--api-key=abc", "--api-key=***"), ("password=abc, then", "password=***, then"),
])
def test_what_is_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize("text", [
    "an override looks like section.key=value, for example training.seed=1", "https://host/@anna/x?page=2",
    "data.token: unknown key", "lr=1e-4 tokens=12 keys=3", "C:/a@b", "anna@example.org", "/data/a:b@c/1.jpg", ""])
def test_what_is_left(text: str) -> None:
    assert redact(text) == text


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXCELEB_KEY", SECRET)
    monkeypatch.setenv("SHORT_KEY", "train")  # a word that must stay readable
    monkeypatch.setenv("OTHER", "harmless-value")
    assert redact(f"a {SECRET} b s3cr3t%2Fpa%2Bss harmless-value train") == "a *** b *** harmless-value train"
    assert redact("k and kk", ("k", "kk")) == "*** and ***"


@pytest.mark.parametrize(("name", "secret"), [
    ("--api-key", True), ("HF_TOKEN", True), ("x.db_password", True), ("AWS_SECRET", True), ("--checkpoint", False),
    ("training.seed", False), ("tokens", False), ("key_frames", False)])
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert names_secret(name) == secret


def test_command_lines() -> None:
    words = ["python", "a b.py", "--api-key", "abc", "--token=abc", "data.x_key=abc", "--base-url", "n=https://u:p@h"]
    shown = command_line(words)
    assert "abc" not in shown and "u:p" not in shown
    assert shlex.split(shown) == ["python", "a b.py", "--api-key", "***", "--token=***", "data.x_key=***",
                                  "--base-url", "n=https://***@h"]


def test_nested_values() -> None:
    value = {"api_key": "abc", "list": ["https://a:b@h", ("x", 3)], "n": 1.5, "token": "", "none": None}
    assert redacted(value) == {"api_key": "***", "list": ["https://***@h", ["x", 3]], "n": 1.5, "token": "",
                               "none": None}
    assert redacted(Config().to_dict()) == Config().to_dict(), "no setting of ours has a secret's name"


PATHS = ["/data/sets/coco2017", "/data/a:b@c/token=abcd", "a/b?token=abcdefgh&x=1", "C:/a@b", "file:/me@home/x", None,
         "hub:anna/a@b", "./data"]


@pytest.mark.parametrize("path", PATHS)
def test_settings_that_are_no_addresses_are_saved_as_they_are(path: str | None,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", path or "/data/sets/coco2017")
    given = {section: dict.fromkeys(names, path) for section, names in (
        ("paths", ("data_root", "output_dir")), ("data", ("manifest", "manifest_root", "cache_dir")),
        ("model", ("word_embeddings",)))} | {"stages": [{"name": path}]}
    assert settings(given) == given
    if "token=" not in str(path):
        assert command_line([f"--data-root={path}", str(path)]) == shlex.join([f"--data-root={path}", str(path)])


def test_addresses_among_the_settings_lose_what_is_secret_whatever_the_environment_holds(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "host/list.csv")
    given = {"data": {"manifest": "https://anna:pw@host/list.csv?a=1&token=abc", "cache_dir": "s3:/key:pw@bucket/x"}}
    assert settings(given) == {"data": {"manifest": "https://***@host/list.csv?a=1&token=***",
                                        "cache_dir": "s3:/***@bucket/x"}}
    assert settings(settings(given)) == settings(given)


def test_each_text_among_the_settings_is_known_to_be_an_address_or_none() -> None:
    """A new one has to be looked at: may it be an address, its password must not be saved."""
    free = {f"{section.name}.{one.name}" for section in dataclasses.fields(Config)
            if dataclasses.is_dataclass(kind := typing.get_type_hints(Config)[section.name])
            for one in dataclasses.fields(kind) if str in typing.get_args(hint := typing.get_type_hints(kind)[one.name])
            or hint is str}
    assert free == {*redaction.ADDRESSES, "model.word_embeddings", "model.size", "data.datasets"}


# ---- where they could come out -----------------------------------------------------------------------------------


def test_errors_of_the_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = "https://anna:s3cr3t@host/x"
    mains: list[tuple[Any, list[str]]] = [
        (run_training.main, ["--config", url]), (run_training.main, [url]), (evaluate.main, ["--checkpoint", url]),
        (evaluate.main, ["--checkpoint", "a.pt", url]),
        (download_datasets.main, ["--datasets", "stamps", "--base-url", f"none={url}", "--data-root", str(tmp_path)])]
    for main, arguments in mains:
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        assert status == 2 and "***@host" in printed.err, printed
        assert "s3cr3t" not in printed.err + printed.out


def test_downloads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = "stamps=http://anna:s3cr3t@127.0.0.1:9/x"
    arguments = ["--datasets", "stamps", "--base-url", url, "--data-root", str(tmp_path)]
    download_datasets.main([*arguments, "--dry-run"])
    assert "http://***@127.0.0.1:9/x" in capsys.readouterr().out
    policy = download_datasets.Policy(failures=0, failures_to_connect=0, backoff_s=0.0)
    download_datasets.main(arguments, policy=policy)
    printed = capsys.readouterr()
    assert "***@127.0.0.1:9" in printed.out, "the command that is suggested"
    files = [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("s3cr3t" in text for text in [printed.out, printed.err, *files])


def test_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path)
    tracker.event("from https://anna:s3cr3t@host", 1)
    tracker.record({"kind": "event", "step": 1, "message": "x", "api_key": "s3cr3t", "list": ["?token=s3cr3t"]})
    tracker.close()
    written = (tmp_path / "metrics.jsonl").read_text("utf-8")
    assert "s3cr3t" not in written + capsys.readouterr().out
    assert json.loads(written.splitlines()[0])["message"] == "from https://***@host"


def test_reports(tmp_path: Path) -> None:
    run = {"kind": "training", "command": "python x.py --a https://anna:s3cr3t@host",
           "config": {"data": {"manifest": "https://anna:s3cr3t@host/list?token=s3cr3t"}}}
    for path in report.write_report(tmp_path, run, [{"kind": "event", "message": "HF_TOKEN=s3cr3t"}]):
        assert "***" in path.read_text("utf-8") and "s3cr3t" not in path.read_text("utf-8")


def test_a_path_that_a_variable_of_the_environment_holds_as_well_is_saved_as_it_is(
        small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sets = str(tmp_path / "sets" / "coco2017")
    monkeypatch.setenv("MY_API_KEY", sets)
    monkeypatch.setenv("HF_TOKEN", "evaluation")  # a word of ours
    monkeypatch.setattr("sys.argv", ["run_training.py", "--data-root", sets])
    given = [f"data.manifest={sets}", "training.epochs=2"]
    markdown = small.train(tmp_path / "run", *given)
    report = json.loads(markdown.with_suffix(".json").read_text("utf-8"))
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "best_model.pt")["config"]
    copy = load_config(tmp_path / "run" / "config.yaml").to_dict()
    assert [one["data"]["manifest"] for one in (report["config"], saved, copy)] == [sets] * 3
    assert sets in report["command"] and report["evaluation"]["split"] == "test"
    capsys.readouterr()
    small.train(tmp_path / "run", *given[:1], "training.epochs=3", resume="auto")
    assert [line for line in capsys.readouterr().out.splitlines() if "data.manifest" in line] == []


def test_a_whole_run_writes_none(small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password in a setting, and a token among the arguments."""
    monkeypatch.setattr("sys.argv", ["run_training.py", "--own-token", "s3cr3t"])
    small.train(tmp_path / "run", "data.manifest=https://anna:s3cr3t@host/a?token=s3cr3t")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {".pt", ".json", ".md", ".jsonl", ".yaml"} <= {path.suffix for path in files}
    assert [path for path in files if b"s3cr3t" in path.read_bytes()] == []
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "best_model.pt")
    assert saved["config"]["data"]["manifest"] == f"https://{redaction.HIDDEN}@host/a?token={redaction.HIDDEN}"
    (written,) = (tmp_path / "run" / "reports").glob("*.json")
    assert json.loads(written.read_text("utf-8"))["command"] == "python run_training.py --own-token '***'"
