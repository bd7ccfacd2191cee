"""A file on a server that is read in pieces by Range requests: for a sample of a large archive."""

from typing import TYPE_CHECKING

from trimodal.download import http
from trimodal.download.http import NextServer, Policy, TransferError, Wanted, host_of

if TYPE_CHECKING:
    from requests import Response

PIECE_BYTES = 4 << 20  # of one request at most


class NoRange(Exception):
    """The server answers with the whole file only."""


class RemoteFile:
    """`wanted` on the first of its servers that gives pieces. Bytes that change under way are an error.

    Raises, when it is opened and when it is read:
        NoRange: no server gives pieces.
        TransferError: no server gives the file.
    """

    def __init__(self, wanted: Wanted, policy: Policy) -> None:
        self.name, self._policy = wanted.path.name, policy
        problems: list[str] = []
        whole_only = False
        for self._url in wanted.urls:
            self._session = http.open_session(self._url, wanted, policy)
            try:
                self.size, self._etag = self._look(wanted.size)
                return
            except NoRange:
                whole_only = True
            except NextServer as error:
                problems.append(f"{host_of(self._url)} {error}")
        if whole_only:
            raise NoRange
        raise TransferError(f"{self.name}: {'; '.join(problems) or 'no address is known'}")

    def read_at(self, position: int, count: int) -> bytes:
        """Up to `count` bytes from `position` on; none only beyond the end."""
        count = min(count, self.size - position, PIECE_BYTES)
        if count <= 0:
            return b""
        try:
            response = self._request(position, count)
        except NextServer as error:
            raise TransferError(f"{self.name}: {host_of(self._url)} {error}") from None
        if http.content_range(response.headers)[0] != position or len(response.content) != count:
            raise TransferError(f"{self.name}: {host_of(self._url)} does not give the pieces that are asked for")
        if response.headers.get("ETag", "") != self._etag:
            raise TransferError(f"{self.name}: changed on {host_of(self._url)} while it was read")
        return response.content

    def _look(self, expected: int) -> tuple[int, str]:
        """(bytes, ETag) of the file, by a request for its first byte."""
        response = self._request(0, 1)
        _, size = http.content_range(response.headers)
        if not size:
            raise NoRange
        if expected and size != expected:
            raise NextServer(f"offers {size:,} bytes instead of {expected:,}: another file or release")
        return size, response.headers.get("ETag", "")

    def _request(self, position: int, count: int) -> "Response":
        """The answer with its body. A connection that is cut within the body is no case for urllib3's Retry."""
        import requests

        span = {"Range": f"bytes={position}-{position + count - 1}"}
        for tries in range(1, self._policy.failures + 2):
            with http.ask(self._session, self._url, self._policy, (200, 206), span) as response:
                if response.status_code == 200:
                    raise NoRange  # before all of it comes
                try:
                    response.content  # noqa: B018  # read while the connection is open
                    return response
                except requests.RequestException:
                    self._policy.pause(self._policy.backoff_s * tries)
        raise NextServer(f"cut the connection ({tries} tries)")
