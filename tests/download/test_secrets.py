"""Passwords and tokens of addresses, and the keys of data sets, reach no line that is printed and no note."""

from pathlib import Path

import pytest

import download_datasets
from trimodal.download.http import without_secrets


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
