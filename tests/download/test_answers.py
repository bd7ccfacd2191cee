"""What servers say, in their headers and by breaking off: no answer is too odd to be one of ours."""

import io
import ssl
from collections.abc import Callable
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter

from tests.refusals import refused
from trimodal.download import answers
from trimodal.download.answers import Again, NextServer


@pytest.mark.parametrize("text", ["", "abc", "-5", "²", "1.5", "5, 5"])
def test_numbers_that_are_none_are_not_told(text: str) -> None:
    assert answers.body_length({"Content-Length": text}) == 0
    assert answers.retry_after_s({"Retry-After": text}) is None
    assert answers.content_range({"Content-Range": f"bytes {text}-9/{text}"}) == (-1, 0)


def test_numbers_are_read() -> None:
    assert answers.body_length({"Content-Length": "12"}) == 12 and answers.body_length({}) == 0
    assert answers.content_range({"Content-Range": "bytes 5-9/10"}) == (5, 10)
    assert answers.content_range({"Content-Range": "bytes */10"}) == (-1, 10)
    assert answers.content_range({"Content-Range": "items 5-9/10"}) == answers.content_range({}) == (-1, 0)
    assert answers.retry_after_s({"Retry-After": "7"}) == 7
    assert answers.retry_after_s({"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"}) == 0


@pytest.mark.parametrize(("error", "ours", "named", "unreachable"), [
    (requests.exceptions.SSLError(ssl.SSLCertVerificationError("certificate s3cret")), NextServer, ("TLS",), False),
    (requests.exceptions.SSLError("[SSL: UNEXPECTED_EOF_WHILE_READING] s3cret"), Again, ("TLS",), False),
    (requests.exceptions.ProxyError("s3cret"), Again, ("proxy",), True),
    (requests.exceptions.TooManyRedirects("s3cret"), NextServer, ("TooManyRedirects",), False),
    (requests.exceptions.ConnectTimeout("s3cret"), Again, (10,), True),
    (requests.exceptions.ReadTimeout("s3cret"), Again, (60,), False),
    (requests.exceptions.ChunkedEncodingError("s3cret"), Again, (), False),
])
def test_errors_of_the_library_become_ours(error: Exception, ours: type[Exception], named: tuple[str | int, ...],
                                           unreachable: bool) -> None:
    with refused(*named, error=ours) as found, answers.translated((10, 60)):
        raise error
    assert found.value.unreachable == unreachable
    assert "s3cret" not in str(found.value) and found.value.__cause__ is None


def test_a_proxy_that_is_not_there_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with refused("proxy", error=Again) as found, answers.translated((1, 1)):
        answers.open_session().get("http://data.invalid/a", timeout=1)
    assert found.value.unreachable


def answer(request: Any, to: str) -> requests.Response:
    response = requests.Response()
    response.request, response.url, response.raw = request, request.url, io.BytesIO()
    response.status_code = 302 if to else 200
    response.headers["Location"] = to
    return response


@pytest.mark.parametrize(("unverified", "expected"), [((), [True, True]), (("own.invalid",), [False, True])])
def test_only_the_host_that_was_named_goes_unverified(monkeypatch: pytest.MonkeyPatch, unverified: tuple[str, ...],
                                                      expected: list[bool]) -> None:
    """A redirect from it leads to a host whose certificate is checked."""
    seen: list[bool] = []

    def send(self: HTTPAdapter, request: Any, verify: bool, **settings: Any) -> requests.Response:
        seen.append(verify)
        return answer(request, "https://other.invalid/b" if "own" in request.url else "")

    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.setattr(HTTPAdapter, "send", send)
    answers.open_session(unverified).get("https://own.invalid/a")
    assert seen == expected


@pytest.mark.parametrize(("status", "ours"), [(429, Again), (503, Again), (404, NextServer), (206, None)])
def test_a_status_is_ours_to_try_again_or_not(status: int, ours: type[Exception] | None) -> None:
    response = requests.Response()
    response.status_code = status
    refuse: Callable[[], None] = lambda: answers.refuse_errors(response, (200, 206))  # noqa: E731
    if ours is None:
        return refuse()
    with refused(status, error=ours):
        refuse()
