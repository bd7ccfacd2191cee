"""A file on a server, read in pieces by Range requests, as if it lay on the disk: for a sample of a large archive."""

import io
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from trimodal.download import http
from trimodal.download.http import NextServer, Policy, TransferError, Wanted, host_of

if TYPE_CHECKING:
    from requests import Response

BLOCK_BYTES = 1 << 18
BLOCKS = 32  # kept, of the most recent


class NoRange(Exception):
    """The server answers with the whole file only."""


class ByteSource(io.RawIOBase):
    """Bytes to read archives from, `size` of them; whoever inherits gives `readinto`, which reads from `position` and
    moves it on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position


class RemoteFile(ByteSource):
    """`wanted` on the first of its servers that gives pieces. Bytes that change under way are an error.

    Raises, when it is opened and when it is read:
        NoRange: no server gives pieces.
        TransferError: no server gives the file.
    """

    def __init__(self, wanted: Wanted, policy: Policy) -> None:
        super().__init__(0)
        self.name = wanted.path.name
        self._wanted, self._policy = wanted, policy
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._etag = ""
        self.size = self._open_any(wanted)

    def close(self) -> None:
        """Those who read it close it; it can be read again."""

    def readinto(self, buffer: Any) -> int:
        number, inside = divmod(self.position, BLOCK_BYTES)
        if self.position >= self.size:
            return 0
        chunk = self._block(number)[inside: inside + len(buffer)]
        buffer[: len(chunk)] = chunk
        self.position += len(chunk)
        return len(chunk)

    def _open_any(self, wanted: Wanted) -> int:
        """The size, from the first server that gives pieces of this file."""
        problems: list[str] = []
        whole_only = False
        for self._url in wanted.urls:
            self._session = http.open_session(self._url, wanted, self._policy)
            try:
                return self._open(wanted.size)
            except NoRange:
                whole_only = True
            except NextServer as error:
                problems.append(f"{host_of(self._url)} {error}")
        if whole_only:
            raise NoRange
        raise TransferError(f"{self.name}: {'; '.join(problems) or 'no address is known'}")

    def _open(self, expected: int) -> int:
        """Ask for the first byte: tells the size, and whether pieces are given."""
        response = self._request("bytes=0-0")
        _, size = http.content_range(response.headers)
        if not size:
            raise NoRange
        if expected and size != expected:
            raise NextServer(f"offers {size:,} bytes instead of {expected:,}: another file or release")
        self._etag = response.headers.get("ETag", "")
        return size

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            first = number * BLOCK_BYTES
            length = min(BLOCK_BYTES, self.size - first)
            try:
                response = self._request(f"bytes={first}-{first + length - 1}")
            except NextServer as error:
                raise TransferError(f"{self.name}: {host_of(self._url)} {error}") from None
            if http.content_range(response.headers)[0] != first or len(response.content) != length:
                raise TransferError(f"{self.name}: {host_of(self._url)} does not give the pieces that are asked for")
            if response.headers.get("ETag", "") != self._etag:
                raise TransferError(f"{self.name}: changed on {host_of(self._url)} while it was read")
            self._blocks[number] = response.content
            if len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _request(self, span: str) -> "Response":
        import requests

        with http.ask(self._session, self._url, self._policy, (200, 206), {"Range": span}) as response:
            if response.status_code == 200:
                raise NoRange  # before all of it comes
            try:
                response.content  # noqa: B018  # read while the connection is open
            except requests.RequestException:
                raise NextServer("cut the connection") from None
        return response
