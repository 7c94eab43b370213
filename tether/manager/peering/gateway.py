"""Peers' inferences go through a gateway of this lab, as its own do: one place admits, coalesces, tries again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from tether.errors import DeadlineExceededError, PayloadTooLargeError, ServiceUnavailableError
from tether.wire.faults import decode_error

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Gateway"]

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_TIMEOUT: Final = 65.0
"""Seconds; over the gateway's own 60, so that its answer, which says more, comes first."""
_ANSWER_NBYTES: Final = 1 << 30
"""Of one answer, as an RPC connection carries."""


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

    async def infer(self, model: str, version: str, body: bytes, header_nbytes: int, seconds: float | None) -> tuple[bytes, int]:
        """The answer's body and the length of its JSON. `model`: as a URL names it; `version`: "" for the default one.

        Raises: what the gateway answers; ServiceUnavailableError: there is none, or it is away; DeadlineExceededError.
        """
        if self._url is None:
            raise ServiceUnavailableError("this lab runs no models for others: it was started without a gateway")
        path = f"/v2/models/{quote(model, safe='~@')}" + (f"/versions/{quote(version, safe='')}" if version else "") + "/infer"
        headers = {HEADER_LENGTH: str(header_nbytes), "Content-Type": "application/octet-stream"}
        if seconds is not None:
            headers["X-Request-Timeout"] = f"{max(seconds, 0.001):.3f}"
        try:
            async with asyncio.timeout(_TIMEOUT if seconds is None else seconds):
                return await self._post(self._url + path, body, headers)
        except TimeoutError as error:
            raise DeadlineExceededError(f"no answer from the lab's gateway within {seconds or _TIMEOUT:g} s") from error

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> tuple[bytes, int]:
        import aiohttp  # 0.1 s that a lab without peers need not pay

        try:
            async with self._connected().post(url, data=body, headers=headers, allow_redirects=False) as response:
                if (response.content_length or 0) > _ANSWER_NBYTES:
                    raise PayloadTooLargeError(f"the answer has {response.content_length} bytes, over {_ANSWER_NBYTES}: ask for less")
                answer, status, nbytes = await response.read(), response.status, response.headers.get(HEADER_LENGTH)
        except aiohttp.ClientError as error:
            raise ServiceUnavailableError(f"the lab's gateway does not answer ({type(error).__name__}); try again") from error
        if status // 100 != 2:  # noqa: PLR2004 (2xx)
            raise decode_error(status, answer)
        return answer, int(nbytes) if nbytes else len(answer)

    def _connected(self) -> aiohttp.ClientSession:
        import aiohttp  # as above

        if self._session is None:
            headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
            self._session = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20)
        return self._session

    async def aclose(self) -> None:
        """Close the connections; a second call does nothing."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
