"""Peers' inferences go through a gateway of this lab, as its own do: one place admits, coalesces, tries again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

import orjson

from tether.errors import DeadlineExceededError, ServiceUnavailableError, TetherError
from tether.swarm.rpc.rpc import Incoming
from tether.wire.faults import decode_error
from tether.wire.parts import PARTS_KIND

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Answer", "Gateway"]

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_TIMEOUT: Final = 65.0
"""Seconds; over the gateway's own 60, so that its answer, which says more, comes first."""
_LONGEST: Final = 3600.0
"""Seconds, as the gateway has it: a peer may say what it likes."""
_JOINED: Final = 1 << 20
"""Bytes of a request up to which it is sent in one piece."""
_ERROR_NBYTES: Final = 64 << 10


class Answer(NamedTuple):
    """Of the gateway, not read yet."""

    nbytes: int
    header_nbytes: int
    """Of its JSON."""
    chunks: AsyncIterator[bytes]


class Gateway:
    """Inference over HTTP, on the loop of the first call."""

    def __init__(self, url: str | None, api_key: str | None = None) -> None:
        """`url`: None where the lab has no gateway."""
        self._url, self._api_key = url, api_key
        self._session: aiohttp.ClientSession | None = None

    @property
    def is_there(self) -> bool:
        """Whether this lab runs models for others at all."""
        return self._url is not None

    @asynccontextmanager
    async def infer(self, target: tuple[str, str], header: bytes, tensors: Incoming, seconds: float | None) -> AsyncIterator[Answer]:
        """Run a request whose JSON is `header` and whose tensors come as they do; the answer is passed on in the same way.

        `target`: the model as a URL names it, and the version, "" for the default one.
        Raises: what the gateway answers; ServiceUnavailableError: there is none, or it is away; DeadlineExceededError.
        """
        timeout = {} if seconds is None else {"X-Request-Timeout": f"{max(seconds, 0.001):.3f}"}
        limit = _TIMEOUT if seconds is None else min(seconds, _LONGEST)
        try:
            async with asyncio.timeout(limit), self._run(_path(*target) + "/infer", header, tensors, timeout) as response:
                yield _answer(response)
        except TimeoutError as error:
            if isinstance(error, TetherError):
                raise
            raise DeadlineExceededError(f"no answer from the lab's gateway within {limit:g} s") from error

    @asynccontextmanager
    async def stream(self, target: tuple[str, str], header: bytes, tensors: Incoming) -> AsyncIterator[aiohttp.StreamReader]:
        """As `infer`, with the answer in parts, as `wire.parts` frames them; left, the model stops. Nothing is read before it is asked for.

        The deadline is the request's own parameter, else the gateway's for each part.
        """
        async with self._run(_path(*target) + "/infer_stream", header, tensors, {"Accept": PARTS_KIND}) as response:
            yield response.content

    @asynccontextmanager
    async def _run(self, path: str, header: bytes, tensors: Incoming, more: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        nbytes = len(header) + tensors.left_nbytes
        headers = {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream", "Content-Length": str(nbytes)}
        data = header + await tensors.rest() if nbytes <= _JOINED else _chunks(header, tensors)
        async with self._asked("POST", path, data=data, headers=headers | more) as response:
            yield response

    async def events(self, after: int | None, wait: float) -> dict[str, Any]:
        """What happened in the lab: `{"events", "seq"}`, at once or, if nothing has after that number, when something does.

        Raises: as `infer`.
        """
        query = {"wait": f"{wait:g}"} | ({} if after is None else {"after": str(after)})
        try:
            async with asyncio.timeout(wait + _TIMEOUT), self._asked("GET", "/tether/v1/events", params=query) as response:
                told: dict[str, Any] = orjson.loads(await response.read())
                return told
        except TimeoutError as error:
            raise DeadlineExceededError("the lab's gateway does not say what happened: ask again") from error

    @asynccontextmanager
    async def _asked(self, method: str, path: str, **request: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """Raises: what the gateway answers instead of 2xx; ServiceUnavailableError."""
        import aiohttp  # 0.1 s that a lab without peers need not pay

        if self._url is None:
            raise ServiceUnavailableError("this lab runs no models for others: it was started without a gateway")
        try:
            async with self._connected().request(method, self._url + path, allow_redirects=False, **request) as response:
                if response.status // 100 != 2:  # noqa: PLR2004 (2xx)
                    raise decode_error(response.status, await _beginning(response.content))
                yield response
        except aiohttp.ClientError as error:
            raise ServiceUnavailableError(f"the lab's gateway does not answer ({type(error).__name__}); try again") from error

    def _connected(self) -> aiohttp.ClientSession:
        import aiohttp  # as above

        if self._session is None:
            headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
            self._session = aiohttp.ClientSession(
                headers=headers,
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),  # each call has its own
                read_bufsize=1 << 20,
            )
        return self._session

    async def aclose(self) -> None:
        """Close the connections; a second call does nothing."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _path(model: str, version: str) -> str:
    return f"/v2/models/{quote(model, safe='~@')}" + (f"/versions/{quote(version, safe='')}" if version else "")


def _answer(response: aiohttp.ClientResponse) -> Answer:
    nbytes = response.content_length
    if nbytes is None:
        raise ServiceUnavailableError("what answers in the place of the lab's gateway does not say how much it answers")
    header = response.headers.get(HEADER_LENGTH)
    return Answer(nbytes, int(header) if header else nbytes, response.content.iter_any())


async def _beginning(content: aiohttp.StreamReader) -> bytes:
    """What an error says, whole: one `read` gives what has come so far."""
    error = b""
    while len(error) < _ERROR_NBYTES and (part := await content.read(_ERROR_NBYTES - len(error))):
        error += part
    return error


async def _chunks(header: bytes, tensors: Incoming) -> AsyncIterator[bytes]:
    yield header
    async for chunk in tensors:
        yield chunk
