"""Speaks HTTP to a gateway: inference (Open Inference Protocol, binary) and all of `/tether/v1`."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import aiohttp
import orjson
from yarl import URL

from tether._version import __version__
from tether.client.admitting import Admitting
from tether.client.answers import part_of
from tether.client.copying import Copying
from tether.client.forking import abandon
from tether.client.lending import Lending
from tether.client.replicating import Replicating
from tether.client.rolling import Rolling
from tether.errors import (
    BadInputError,
    DeadlineExceededError,
    NotFoundError,
    QueueFullError,
    RemoteError,
    ServiceUnavailableError,
    TetherError,
    UnsupportedError,
)
from tether.store.format.layout import BLOB_NBYTES
from tether.store.hierarchy.elsewhere import gateway_kvstore
from tether.types import InferResponse, ModelRef, Tensors
from tether.wire.oip import decode_error, decode_response, encode_request
from tether.wire.parts import PARTS_KIND, PartReader

__all__ = ["HttpClient"]

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_TIMEOUT_HEADER: Final = "X-Request-Timeout"
_NO_ROOM: Final = f'"{QueueFullError.code}"'.encode()
_CONNECT: Final = 5.0
"""Seconds to open a connection: a host that takes longer is not there."""
_TIMEOUT: Final = 65.0
"""Seconds; over the gateway's own 60, so that its answer, which says more, comes first."""
_GRACE: Final = 0.25
"""Seconds that the gateway's own word on a deadline may be late."""
_LONG: Final = 1800.0
"""Seconds for a publish (a sandbox may import TensorFlow) or a verification (reads every byte)."""
_PAUSES: Final = (0.1, 0.4, 1.0)
"""Seconds before each retry: together about what the supervisor needs to restart a gateway."""
_KEEPALIVE: Final = 4.0
"""Seconds an idle connection is kept: under the 5 s of usual servers, so that a request never meets one that just closed."""
_PIECEMEAL: Final = 1 << 20
"""Bytes from which on aiohttp warns of a body in one piece."""
_JSON_LIMIT: Final = 256 << 20
"""Bytes of a JSON answer: the manifest of a model with a million segments is under it."""
_TENSOR_LIMIT: Final = 4 << 30
"""Bytes of an inference answer."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One HTTP request."""

    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] | None = None
    timeout: float = _TIMEOUT
    repeatable: bool = True
    """Whether it may be sent again when the connection was lost after it was sent."""
    limit: int = _JSON_LIMIT
    """Largest answer that is read, bytes."""


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    header_nbytes: int
    body: bytes
    retry_after: float = 0.0
    """Seconds, of a request that found no room; 0: of all others."""


class HttpClient:
    """One gateway. Belongs to the event loop that makes the first call; connections are opened then and kept.

    Every call raises the error of the tree that the gateway names, `ServiceUnavailableError` when nothing answers and
    `DeadlineExceededError` when the answer does not come in time. What may be repeated without harm is repeated when the
    connection breaks; an inference only when it can't have reached the gateway, or was sent away since the queue is full.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises: UnsupportedError: `url` is not `http(s)://host[:port]`."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UnsupportedError(f"{url!r} is not the address of a gateway; write http://host:port or https://host:port")
        self.url = url.rstrip("/")
        self._api_key = api_key
        self.admitting = Admitting(self._ask)
        """Whom the lab lets in."""
        self.replicating = Replicating(self._ask)
        """What it keeps of other labs."""
        self.copying = Copying(self._ask)
        """Copies of its models elsewhere, and of others' there."""
        self.lending = Lending(self._ask)
        """Workers that it lends to others."""
        self.rolling = Rolling(self._ask)
        """How it changes while it serves."""
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"HttpClient({self.url!r}, api_key={'***' if self._api_key else None})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; a second call does nothing."""
        session, self._session = self._session, None
        if session is not None and self._loop is asyncio.get_running_loop():
            await session.close()
        elif session is not None:
            abandon(session)

    # Inference

    async def infer(
        self,
        model: str,
        inputs: Tensors,
        *,
        version: int | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (it also goes to the gateway, which stops working on what nobody waits for)
        priority: int = 0,
    ) -> InferResponse:
        """Run one request; `model` is a name, `publisher~name` or `name@alias`, as in a URL.

        Raises: UnknownModelError, UnknownVersionError, BadInputError, NoWorkerError, ModelFailedError …: as the gateway answers.
        """
        body, header_nbytes = encode_request(inputs, outputs=outputs, binary=True, priority=priority)
        headers = {HEADER_LENGTH: str(header_nbytes), "Content-Type": "application/octet-stream"}
        if timeout is not None:
            headers[_TIMEOUT_HEADER] = f"{timeout:g}"
        wait = _TIMEOUT if timeout is None else timeout + _GRACE
        call = _Call("POST", _model_path(model, version) + "/infer", body, headers, wait, repeatable=False, limit=_TENSOR_LIMIT)
        reply = await self._patiently(call)
        return decode_response(reply.body, reply.header_nbytes)

    async def stream(
        self,
        model: str,
        inputs: Tensors,
        *,
        version: int | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
    ) -> AsyncGenerator[InferResponse]:
        """As `infer`, part by part as the model gives them; of one that does not, its answer. Closed, it stops the model.

        `timeout`: seconds for all of it; without, the lab's own for each part. Nothing is asked for before the first part is.
        """
        body, header_nbytes = encode_request(inputs, outputs=outputs, binary=True)
        headers = {HEADER_LENGTH: str(header_nbytes), "Content-Type": "application/octet-stream", "Accept": PARTS_KIND}
        if timeout is not None:
            headers[_TIMEOUT_HEADER] = f"{timeout:g}"
        call = _Call("POST", _model_path(model, version) + "/infer_stream", body, headers, repeatable=False)
        total = None if timeout is None else timeout + _GRACE
        timeouts = aiohttp.ClientTimeout(total, sock_connect=_CONNECT, sock_read=_TIMEOUT if timeout is None else None)
        with self._translated(call, timeout or _TIMEOUT):
            async with await self._opened(call, timeouts) as response, aclosing(self._parts(call, response)) as parts:
                async for part in parts:
                    yield part

    async def _parts(self, call: _Call, response: aiohttp.ClientResponse) -> AsyncGenerator[InferResponse]:
        if response.status != 200:  # noqa: PLR2004 (HTTP's OK)
            raise self._refusal(call, _Reply(response.status, 0, await _bounded(response, _JSON_LIMIT)))
        reader = PartReader()
        try:
            async for data in response.content.iter_any():
                for part in reader.fed(data):
                    if part.is_end:
                        return
                    yield part_of(part)
        except aiohttp.SocketTimeoutError:
            raise
        except aiohttp.ClientConnectionError as error:
            raise self._lost(call, error) from error
        raise self._broken_off(call)

    async def metadata(self, model: str, version: int | None = None) -> dict[str, Any]:
        """`{"name", "versions", "platform", "inputs", "outputs"}`, as the protocol has it."""
        return await self._json(_Call("GET", _model_path(model, version)))

    async def live(self) -> None:
        """Return if a server answers HTTP at the address, ready or not. Raises: ServiceUnavailableError."""
        await self._exchange(_Call("GET", "/v2/health/live", timeout=_CONNECT))

    # Models

    async def put_blob(self, digest: str, data: bytes, encrypt: str | None = None) -> None:
        """`encrypt`: the model that it is for; the lab encrypts it on arrival, then. Raises: DigestMismatchError, NoSpaceError."""
        headers = {"Content-Type": "application/octet-stream"}
        query = "" if encrypt is None else f"?encrypt={quote(encrypt, safe='')}"
        await self._send(_Call("PUT", f"/tether/v1/blobs/{quote(digest)}{query}", data, headers))

    async def get_blob(self, digest: str, version: str | None = None) -> bytes:
        """The bytes as they came; whoever uses them checks the digest. Of an encrypted `version` (`digits:2`) they come decrypted and
        checked by the lab. Raises: NotFoundError, ChunkMissingError, ChunkAlteredError, LockedModelError.
        """
        query = "" if version is None else f"?version={quote(version, safe='')}"
        return (await self._send(_Call("GET", f"/tether/v1/blobs/{quote(digest)}{query}", limit=BLOB_NBYTES))).body

    async def publish(self, name: str, draft: Mapping[str, Any]) -> dict[str, Any]:
        """Make the drafted files a version. Idempotent by content: sent again it answers `created` false.

        Raises: MissingBlobsError: `args[1]` lists the digests to upload first.
        """
        return await self._json(_posted(_name_path(name) + "/versions", draft, timeout=_LONG))

    async def models(self) -> list[dict[str, Any]]:
        answer = await self._json(_Call("GET", "/tether/v1/models"))
        return _rows(answer, "models")

    async def model(self, name: str) -> dict[str, Any]:
        return await self._json(_Call("GET", _name_path(name)))

    async def manifest(self, name: str, version: int) -> dict[str, Any]:
        return await self._json(_Call("GET", f"{_name_path(name)}/versions/{version}"))

    async def signed_manifest(self, digest: str) -> dict[str, Any]:
        """A version as it was signed: name, publisher, manifest (base64), signature (hex). Raises: UnknownVersionError."""
        return await self._json(_Call("GET", f"/tether/v1/manifests/{quote(digest)}"))

    def kvstore(self, name: str, version: int, path: str = "") -> dict[str, Any]:
        """The spec with which tensorstore opens a version that this gateway serves, with the API key in it."""
        return gateway_kvstore(self.url, ModelRef.parse(f"{name}:{version}"), path, self._api_key)

    async def delete_version(self, name: str, version: int) -> dict[str, Any]:
        return await self._json(_Call("DELETE", f"{_name_path(name)}/versions/{version}"))

    async def set_alias(self, name: str, alias: str, version: int) -> dict[str, Any]:
        return await self._json(_with_json("PUT", _alias_path(name, alias), {"version": version}))

    async def delete_alias(self, name: str, alias: str) -> dict[str, Any]:
        return await self._json(_Call("DELETE", _alias_path(name, alias)))

    async def set_serving(self, name: str, changes: Mapping[str, Any] | None) -> dict[str, Any]:
        path = f"{_name_path(name)}/serving"
        return await self._json(_Call("DELETE", path) if changes is None else _with_json("PUT", path, dict(changes)))

    async def rollback(self, name: str, alias: str | None = None) -> dict[str, Any]:
        """Move `alias` to where it was before. Never repeated by itself: a second one would go one step further back."""
        return await self._json(_posted(_name_path(name) + "/rollback", {"alias": alias}, repeatable=False))

    async def verify(self, name: str, version: int | None = None) -> dict[str, Any]:
        return await self._json(_posted(_name_path(name) + "/verify", {"version": version}, timeout=_LONG))

    async def diff(self, name: str, before: int, after: int) -> dict[str, Any]:
        return await self._json(_Call("GET", f"{_name_path(name)}/diff/{before}/{after}", timeout=_LONG))

    async def repair(self, name: str, version: int | None = None) -> dict[str, Any]:
        return await self._json(_posted(_name_path(name) + "/repair", {"version": version}, timeout=_LONG))

    # The lab

    async def gc(self, *, dry_run: bool, grace: float | None) -> dict[str, Any]:
        return await self._json(_posted("/tether/v1/gc", {"dry_run": dry_run, "grace": grace}, timeout=_LONG))

    async def rebuild_index(self) -> dict[str, Any]:
        return await self._json(_posted("/tether/v1/index/rebuild", {}, timeout=_LONG))

    async def explain(self, name: str) -> dict[str, Any]:
        return await self._json(_Call("GET", f"{_name_path(name)}/placement"))

    async def forget_store(self, store: str) -> dict[str, Any]:
        return await self._json(_Call("DELETE", f"/tether/v1/stores/{quote(store, safe='')}"))

    async def workers(self) -> list[dict[str, Any]]:
        answer = await self._json(_Call("GET", "/tether/v1/workers"))
        return _rows(answer, "workers")

    async def status(self) -> dict[str, Any]:
        return await self._json(_Call("GET", "/tether/v1/status"))

    async def quarantine(self) -> list[dict[str, Any]]:
        return _rows(await self._json(_Call("GET", "/tether/v1/quarantine")), "quarantine")

    async def forgive(self, name: str) -> dict[str, Any]:
        return await self._json(_Call("DELETE", f"/tether/v1/quarantine/{quote(name, safe='~')}"))

    async def events(self, after: int | None, wait: float) -> dict[str, Any]:
        query = f"wait={wait:g}" + ("" if after is None else f"&after={after}")
        return await self._json(_Call("GET", f"/tether/v1/events?{query}", timeout=wait + _TIMEOUT))

    async def trust(self, publisher: str, scopes: Sequence[str]) -> dict[str, Any]:
        return await self._json(_with_json("PUT", f"/tether/v1/trust/{quote(publisher, safe='')}", {"scopes": list(scopes)}))

    # One exchange

    async def _ask(self, method: str, path: str, value: dict[str, Any] | None = None, *, repeatable: bool = True) -> dict[str, Any]:
        body, headers = (None, None) if value is None else (orjson.dumps(value), {"Content-Type": "application/json"})
        return await self._json(_Call(method, path, body, headers, _TIMEOUT if repeatable else _LONG, repeatable))

    async def _json(self, call: _Call) -> dict[str, Any]:
        reply = await self._send(call)
        try:
            value = orjson.loads(reply.body) if reply.body else {}
        except orjson.JSONDecodeError as error:
            raise RemoteError(
                f"{self.url} answered {call.method} {call.path} with bytes that are not JSON; is it a Tether gateway?"
            ) from error
        if not isinstance(value, dict):
            raise RemoteError(f"{self.url} answered {call.method} {call.path} with JSON that is not an object; is it a Tether gateway?")
        return value

    async def _send(self, call: _Call) -> _Reply:
        return self._accepted(call, await self._exchange(call))

    def _accepted(self, call: _Call, reply: _Reply) -> _Reply:
        if reply.status // 100 != 2:  # noqa: PLR2004 (2xx)
            raise self._refusal(call, reply)
        return reply

    async def _patiently(self, call: _Call) -> _Reply:
        """As `_send`. What was sent away for want of room comes again as late as it was told, and spread, while its time allows that."""
        clock = asyncio.get_running_loop().time
        end = clock() + call.timeout
        while True:
            reply = await self._exchange(call)
            pause = reply.retry_after * random.uniform(1.0, 2.0)  # noqa: S311 (spreads load; nobody gains by guessing it)
            left = end - clock() - pause
            if not reply.retry_after or left <= _GRACE:
                return self._accepted(call, reply)
            await asyncio.sleep(pause)
            headers = dict(call.headers or {})
            if _TIMEOUT_HEADER in headers:
                headers[_TIMEOUT_HEADER] = f"{left - _GRACE:g}"
            call = replace(call, headers=headers, timeout=left)

    async def _exchange(self, call: _Call) -> _Reply:
        for pause in _PAUSES:
            try:
                return await self._once(call)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                await asyncio.sleep(pause)
            except aiohttp.ClientConnectionError as error:
                if not call.repeatable:
                    raise self._lost(call, error) from error
                await asyncio.sleep(pause)
        try:
            return await self._once(call)
        except aiohttp.ClientError as error:
            raise self._lost(call, error) from error

    async def _opened(self, call: _Call, timeouts: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        """An answer that is read by whoever asked. Sent once, but for when it can't have arrived."""
        pauses = iter(_PAUSES)
        while True:
            try:
                return await self._requested(call, timeouts)
            except aiohttp.SocketTimeoutError:  # it is connected, and nothing comes
                raise
            except aiohttp.ClientError as error:
                pause = next(pauses, None)
                if pause is None or not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                    raise self._lost(call, error) from error
                await asyncio.sleep(pause)

    async def _once(self, call: _Call) -> _Reply:
        timeout = aiohttp.ClientTimeout(total=call.timeout, sock_connect=min(_CONNECT, call.timeout))
        with self._translated(call, call.timeout):
            async with self._requested(call, timeout) as response:
                body = await _bounded(response, call.limit)
                return _Reply(response.status, _header_nbytes(response), body, _retry_after(response, body))

    def _requested(self, call: _Call, timeout: aiohttp.ClientTimeout) -> aiohttp.client._RequestContextManager:
        url = URL(self.url + call.path, encoded=True)
        return self._connected().request(
            call.method, url, data=_sendable(call.body), headers=call.headers, timeout=timeout, allow_redirects=False
        )

    @contextmanager
    def _translated(self, call: _Call, seconds: float) -> Iterator[None]:
        """What an answer that does not come, or breaks off, means; connections that can't be made are the caller's."""
        try:
            yield
        except (aiohttp.ConnectionTimeoutError, TetherError):  # of these some are a TimeoutError, too
            raise
        except TimeoutError as error:
            message = f"no answer from {self.url} to {call.method} {call.path} within {seconds:g} s; try again or give a longer timeout"
            raise DeadlineExceededError(message) from error
        except aiohttp.ClientPayloadError as error:
            raise self._broken_off(call) from error

    def _broken_off(self, call: _Call) -> TetherError:
        return ServiceUnavailableError(f"the answer of {self.url} to {call.method} {call.path} broke off; call again")

    def _connected(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._session is not None and self._loop is not loop:
            abandon(self._session)  # after a fork, or in a second loop: the old connections are another's
            self._session = None
        if self._session is None:
            headers = {"User-Agent": f"tether/{__version__}"}
            if self._api_key:
                headers["Authorization"] = f"Bearer {self._api_key}"
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE)
            self._session = aiohttp.ClientSession(connector=connector, headers=headers, read_bufsize=1 << 20)
            self._loop = loop
        return self._session

    def _lost(self, call: _Call, error: Exception) -> TetherError:
        if isinstance(error, aiohttp.ClientSSLError):
            return ServiceUnavailableError(f"no TLS connection to {self.url}: {error}; check the address and the certificate")
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return ServiceUnavailableError(
                f"nothing answers at {self.url}; start a lab with `tether up` (in a notebook: tether.up()) or check the address"
            )
        return ServiceUnavailableError(f"the connection to {self.url} was lost during {call.method} {call.path}; call again")

    def _refusal(self, call: _Call, reply: _Reply) -> TetherError:
        if not reply.body.startswith(b"{"):
            where = f"{self.url} answered {call.method} {call.path} with {reply.status} and no error of ours"
            if reply.status == 404:  # noqa: PLR2004 (HTTP's not found)
                return NotFoundError(f"{where}; is it a Tether gateway?")
            return RemoteError(f"{where}; is it a Tether gateway, or is a proxy in between?")
        return decode_error(reply.status, reply.body)


def _retry_after(response: aiohttp.ClientResponse, body: bytes) -> float:
    told = response.headers.get("Retry-After", "")
    return float(told) if response.status == QueueFullError.http_status and told.isdecimal() and _NO_ROOM in body else 0.0


def _sendable(body: bytes | None) -> bytes | io.BytesIO | None:
    """Large bodies as files: aiohttp then writes them piece by piece and lets the loop's other calls run in between."""
    return io.BytesIO(body) if body is not None and len(body) > _PIECEMEAL else body


async def _bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    if response.content_length is not None and response.content_length <= limit:
        return await response.read()
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > limit:
            raise RemoteError(f"the answer of {response.url.origin()} is over {limit} bytes; nothing of it was used")
    return bytes(body)


def _header_nbytes(response: aiohttp.ClientResponse) -> int:
    text = response.headers.get(HEADER_LENGTH, "0")
    if not text.isdecimal() or len(text) > 10:  # noqa: PLR2004 (ten digits are more than any header has bytes)
        raise RemoteError(f"{response.url.origin()} sent {HEADER_LENGTH}: {text[:40]!r}; it must be a number of bytes")
    return int(text)


def _name_path(name: str) -> str:
    return f"/tether/v1/models/{quote(name, safe='~')}"


def _alias_path(name: str, alias: str) -> str:
    return f"{_name_path(name)}/aliases/{quote(alias, safe='')}"


def _model_path(model: str, version: int | None) -> str:
    if not model:
        raise BadInputError("no model named; give a name such as 'digits'")
    path = f"/v2/models/{quote(model, safe='~@')}"
    return path if version is None else f"{path}/versions/{version}"


def _with_json(method: str, path: str, value: Mapping[str, Any]) -> _Call:
    return _Call(method, path, orjson.dumps(dict(value)), {"Content-Type": "application/json"})


def _posted(path: str, value: Mapping[str, Any], *, timeout: float = _TIMEOUT, repeatable: bool = True) -> _Call:
    return _Call("POST", path, orjson.dumps(dict(value)), {"Content-Type": "application/json"}, timeout, repeatable)


def _rows(answer: dict[str, Any], key: str) -> list[dict[str, Any]]:
    rows = answer.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RemoteError(f"the gateway's answer has no list {key!r}; its version differs from this one ({__version__})")
    return rows
