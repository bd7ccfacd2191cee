"""What servers answer, and what is made of it: another try, another server, or the place of a body in the file."""

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from requests import Response, Session

# Some hosts turn away the default agents of HTTP libraries; a name of our own is what they ask for.
USER_AGENT = "trimodal-trainer/0.1 (data set downloader; resumes by Range, obeys Retry-After)"
LATER = (408, 425, 429, 500, 502, 503, 504)  # answers that may be different later


class NextServer(Exception):
    """This server will not give the file, however often it is asked."""

    def __init__(self, why: str, *, unreachable: bool = False) -> None:
        super().__init__(why)
        self.unreachable = unreachable


class Again(Exception):
    """This try failed; another may not. `wait_s` is the server's wish."""

    def __init__(self, why: str, wait_s: float | None = None, *, unreachable: bool = False) -> None:
        super().__init__(why)
        self.wait_s = wait_s
        self.unreachable = unreachable


def open_session(unverified_hosts: Collection[str] = ()) -> "Session":
    """Honours proxies and CA bundles of the environment, and drops credentials on other hosts. TLS certificates are
    checked but for `unverified_hosts`, wherever a redirect leads."""
    from requests import Session
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **settings: Any) -> "Response":
            if urlsplit(request.url).hostname in unverified_hosts:
                settings["verify"] = False
            return super().send(request, *arguments, **settings)

    session = Session()
    session.headers.update({"User-Agent": USER_AGENT, "Accept": "*/*"})
    if unverified_hosts:
        from urllib3 import disable_warnings
        from urllib3.exceptions import InsecureRequestWarning

        disable_warnings(InsecureRequestWarning)  # the user asked for it: a warning a request adds nothing
        session.mount("https://", Adapter())
    return session


def host_of(url: str) -> str:
    """Name and port, without the user's name and password that an address can hold."""
    return urlsplit(url).netloc.rpartition("@")[2]


@contextlib.contextmanager
def translated(timeouts_s: tuple[float, float]) -> Iterator[None]:
    """Turn the library's exceptions, whose texts hold addresses and with them keys, into our short ones."""
    import requests
    from urllib3.exceptions import NameResolutionError, NewConnectionError

    errors = requests.exceptions
    try:
        yield
    except errors.SSLError as error:
        if "certificate" in str(error).lower():
            raise NextServer("shows a TLS certificate that is not accepted") from None
        raise Again("cut the TLS connection") from None
    except errors.ProxyError:
        raise Again("cannot be reached by the proxy that the environment names", unreachable=True) from None
    except (errors.TooManyRedirects, errors.MissingSchema, errors.InvalidSchema, errors.InvalidURL) as error:
        raise NextServer(f"cannot be used ({type(error).__name__})") from None
    except errors.ConnectTimeout:
        raise Again(f"did not answer in {timeouts_s[0]:.0f} s", unreachable=True) from None
    except errors.ReadTimeout:
        raise Again(f"sent nothing for {timeouts_s[1]:.0f} s") from None
    except errors.RequestException as error:
        reason = getattr(error.args[0], "reason", None) if error.args else None
        lost = not isinstance(reason, NewConnectionError | NameResolutionError)
        raise Again("cut the connection" if lost else "cannot be reached", unreachable=not lost) from None


def refuse_errors(response: "Response", good: tuple[int, ...]) -> None:
    """Raises `Again` or `NextServer` where the status is none of `good`."""
    status = response.status_code
    if status in LATER:
        raise Again(f"answered {status}", retry_after_s(response.headers))
    if status not in good:
        raise NextServer(f"answered {status} {response.reason}".strip())


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where there is none or it is not readable."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def body_length(headers: Mapping[str, str]) -> int:
    """Of the Content-Length, 0 where it is not told or not readable."""
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isdecimal() else 0


def content_range(headers: Mapping[str, str]) -> tuple[int, int]:
    """(first byte, total) of `bytes 5-9/10` or `bytes */10`; -1 and 0 stand for what it does not say."""
    unit, _, rest = headers.get("Content-Range", "").partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes":
        return -1, 0
    return int(first) if first.isdecimal() else -1, int(total) if total.isdecimal() else 0


def looks_like_page(head: bytes) -> bool:
    start = head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head"))


def announced_sha256(response: "Response") -> str:
    """The digest that Hub-like servers name in the answer that redirects to the bytes."""
    for answer in (*response.history, response):
        digest = answer.headers.get("X-Linked-ETag", "").strip('"').lower()
        if len(digest) == 64 and all(c in "0123456789abcdef" for c in digest):
            return digest
    return ""
