"""Passwords and tokens of addresses, and the keys of data sets, reach no line that is printed and no note."""

from pathlib import Path

import pytest

import download_datasets
import run_training
from tests.small_runs import SmallRuns
from trimodal.redaction import command_line, settings, without_secrets
from trimodal.training import loop
from trimodal.training.run import Options


@pytest.mark.parametrize(("text", "expected"), [
    ("https://anna:pw@host/x", "https://***@host/x"), ("http://anna@host:80", "http://***@host:80"),
    ("https://anna:p@w:x@host/@x?y=a@b", "https://***@host/@x?y=a@b"),
    ("two: https://a:b@h, 's3://c:d@i'", "two: https://***@h, 's3://***@i'"),
    ("https://h/x?token=abc&page=2&key=d#top", "https://h/x?token=***&page=2&key=***#top"),
    ("https://h/?X-Amz-Signature=ab%2F&X-Amz-Credential=c&access_token=d",
     "https://h/?X-Amz-Signature=***&X-Amz-Credential=***&access_token=***")])
def test_what_is_hidden(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
    assert without_secrets(expected) == expected


@pytest.mark.parametrize("text", ["https://host/@anna/x?page=2", "C:/a@b", "anna@example.org", "/data/a:b@c/1.jpg", ""])
def test_what_is_left(text: str) -> None:
    assert without_secrets(text) == text


def test_keys() -> None:
    assert without_secrets("a k/e+y b k%2Fe%2By", ["k/e+y", ""]) == "a *** b ***"


def test_what_a_download_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data_root = ["--data-root", str(tmp_path)]
    assert download_datasets.main(["--datasets", "stamps", "--base-url", "none=https://anna:s3cr3t@host/x",
                                   *data_root]) == 2
    refusal = capsys.readouterr()
    arguments = ["--datasets", "stamps", "--base-url", "stamps=http://anna:s3cr3t@127.0.0.1:9/x", *data_root]
    download_datasets.main([*arguments, "--dry-run"])
    plan = capsys.readouterr()
    policy = download_datasets.Policy(failures=0, failures_to_connect=0, backoff_s=0.0)
    download_datasets.main(arguments, policy=policy)
    printed = capsys.readouterr()
    assert "***@host" in refusal.err and "http://***@127.0.0.1:9/x" in plan.out
    assert "***@127.0.0.1:9" in printed.out, "the command that is suggested"
    files = [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("s3cr3t" in text for text in [*refusal, *plan, *printed, *files])


def test_options_of_a_secret_name_lose_their_value_and_others_keep_it() -> None:
    words = ["run.py", "--api-key", "abc", "x.own_token=d e", "--data-root", "/data/key=1.jpg", "--keys", "abc"]
    assert command_line(words) == "run.py --api-key '***' 'x.own_token=***' --data-root /data/key=1.jpg --keys abc"


def test_addresses_among_the_settings_lose_what_is_secret_and_paths_are_saved_as_given() -> None:
    kept = {"data": {"manifest": "/my_key=1/a:b@c", "flip": True}, "stages": [1]}
    assert settings({"paths": {"data_root": "https://anna:pw@host/x?token=a"}, **kept}) == {
        "paths": {"data_root": "https://***@host/x?token=***"}, **kept}


def test_a_whole_run_writes_none(small: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a password in the address of a folder, and of a mistake in the command."""
    folder = tmp_path / "https://anna:s3cr3t@host"
    monkeypatch.setattr("sys.argv", ["run_training.py", "--output-dir", str(folder), "--own-token", "s3cr3t"])
    loop.train(small.config(folder, "training.epochs=1", "report.gallery_queries=0"), Options("cpu"))
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")
            if path.is_file() and b"s3cr3t" in path.read_bytes()] == []


def test_mistakes_in_a_command_hide_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_training.parse(["--own-token=s3cr3t"])
    assert "s3cr3t" not in capsys.readouterr().err
