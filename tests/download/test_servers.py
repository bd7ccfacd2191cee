"""What servers say, in their headers and by breaking off: no answer is too odd to be one of ours."""

import io
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import SSLError

from tests.download.test_http import DATA, Patience, get, only_file, server, wanted
from tests.loopback import Loopback
from tests.refusals import refused
from trimodal.download import http
from trimodal.download.http import Policy, TransferError, fetch

__all__ = ["server"]  # a fixture


@pytest.mark.parametrize("text", ["", "abc", "-5", "²", "1.5", "5, 5"])
def test_numbers_that_are_none_are_not_told(server: Loopback, tmp_path: Path, text: str) -> None:
    assert http.content_range({"Content-Range": f"bytes {text}-9/{text}"}) == (-1, 0)
    server.faults["/a.bin"] = [f"retry:{text}"]
    patience = Patience()
    fetch(wanted(tmp_path, server.url("/a.bin")), patience.policy)
    assert only_file(tmp_path) == DATA and patience.slept_s == [0], "as if no time were asked for"


def test_numbers_are_read() -> None:
    assert http.content_range({"Content-Range": "bytes 5-9/10"}) == (5, 10)
    assert http.content_range({"Content-Range": "bytes */10"}) == (-1, 10)
    assert http.content_range({"Content-Range": "items 5-9/10"}) == http.content_range({}) == (-1, 0)


def test_a_certificate_that_does_not_fit_is_named(server: Loopback, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def send(self: HTTPAdapter, request: Any, **settings: Any) -> requests.Response:
        raise requests.exceptions.SSLError(SSLError("certificate of https://s3cret@host"))

    monkeypatch.setattr(HTTPAdapter, "send", send)
    with refused("a.bin", "TLS", error=TransferError) as caught:
        get(wanted(tmp_path, "https://data.invalid/a.bin"))
    assert "s3cret" not in str(caught.value)


def test_a_proxy_that_is_not_there_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with refused("a.bin", "proxy", 3, error=TransferError):
        get(wanted(tmp_path, "http://data.invalid/a.bin"))


def answer(request: Any, to: str) -> requests.Response:
    response = requests.Response()
    response.request, response.url, response.raw = request, request.url, io.BytesIO()
    response.status_code = 302 if to else 200
    response.headers["Location"] = to
    return response


@pytest.mark.parametrize(("unverified", "expected"), [((), [True, True]), (("own.invalid",), [False, True])])
def test_only_the_host_that_was_named_goes_unverified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      unverified: tuple[str, ...], expected: list[bool]) -> None:
    """A redirect from it leads to a host whose certificate is checked."""
    seen: list[bool] = []

    def send(self: HTTPAdapter, request: Any, verify: bool, **settings: Any) -> requests.Response:
        seen.append(verify)
        return answer(request, "https://other.invalid/b" if "own" in request.url else "")

    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.setattr(HTTPAdapter, "send", send)
    http.open_session("", wanted(tmp_path, unverified_hosts=unverified), Policy()).get("https://own.invalid/a")
    assert seen == expected
