"""What peers have run here: one answer, passed on as it comes, or one in parts for which they ask again and again."""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, Final, NamedTuple

import msgspec
import orjson

from tether.config import Limits
from tether.errors import MalformedRequestError, ServiceUnavailableError
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.lender import Lender
from tether.manager.peering.open_streams import OpenStreams
from tether.manager.peering.readying import Wanted
from tether.store import Repository
from tether.swarm.node.node import PREFIX
from tether.swarm.rpc.rpc import Call, Incoming, Reply, Service
from tether.types import ModelRef, ModelVersion

__all__ = ["READING_ON", "Check", "Running", "url_name"]

READING_ON: Final = frozenset({"parts", "unstream"})
"""Methods by which what was begun is brought to its end, also at a manager that begins nothing any more."""
_MOST_HEADER: Final = Limits().body_nbytes
"""Bytes of an inference's JSON, which has to be here as a whole; tensors behind it have not. Without those it is all that there is."""
_Length: Final = struct.Struct("<I")
_MOST_WAIT: Final = 20.0
"""Seconds for which a question for parts may stay open: a peer that is gone without a word is forgotten then."""

Check = Callable[[Call, str], Awaitable[str]]
"""Call, model → the model's resolved name, if the caller may call this method for it. Raises: UnknownModelError."""


class _Infer(msgspec.Struct):
    model_name: str
    model_version: str = ""


class _Parts(msgspec.Struct):
    stream: str
    wait: float = 0.0
    """Seconds for something to come."""


class _Request(NamedTuple):
    """An inference, whose tensors may still be on their way."""

    ref: ModelRef
    version: str
    header: bytes
    tensors: Incoming


class Running:
    """Of one lab."""

    def __init__(self, repository: Repository, gateway: Gateway, check: Check) -> None:
        self.lender: Lender | None = None
        """Who runs models of labs to which workers are lent, and knows how the workers stand."""
        self._repository, self._gateway, self._check = repository, gateway, check
        self._streams = OpenStreams()

    def serve(self, service: Service) -> None:
        """Answer what peers ask."""
        service.respond(PREFIX + "capacity", self._capacity)
        service.respond(PREFIX + "unstream", self._unstream)
        most = Limits().body_nbytes + _Length.size
        service.pass_on(PREFIX + "infer", self._infer, most)
        service.pass_on(PREFIX + "stream", self._stream, most)
        service.pass_on(PREFIX + "parts", self._parts, most)

    async def _infer(self, call: Call, body: Incoming, reply: Reply) -> None:
        request = await _read(body)
        async with self._aimed(call, request) as target, self._gateway.infer(target, request.header, body, _seconds(call)) as answer:
            await reply.begin(_Length.size + answer.nbytes)
            await reply.write(_Length.pack(answer.header_nbytes))
            async for chunk in answer.chunks:
                await reply.write(chunk)

    @asynccontextmanager
    async def _aimed(self, call: Call, request: _Request) -> AsyncIterator[tuple[str, str]]:
        """Model and version for the gateway. A lab to which workers are lent means its own models, and takes its turn among others."""
        is_lent = self.lender is not None and request.ref.publisher == call.peer and self.lender.lends(call.peer, request.ref.name)
        async with self.lender.turn(call.peer) if is_lent and self.lender is not None else nullcontext():
            yield await (self._lent(call, request.ref) if is_lent else self._named(call, request))

    async def _lent(self, call: Call, ref: ModelRef) -> tuple[str, str]:
        """A model of the caller's own, by its key, since what it is called here is this lab's choice."""
        bare = dataclasses.replace(ref, publisher=None)
        record = await asyncio.to_thread(self._repository.resolve, bare, call.peer)
        return record.name, str(record.version)

    async def _named(self, call: Call, request: _Request) -> tuple[str, str]:
        ref = request.ref
        await self._check(call, url_name(ref))
        name = f"{url_name(ref)}@{ref.alias}" if ref.alias else url_name(ref)
        version = request.version or ("" if ref.version is None else str(ref.version))
        if ref.sha is not None:
            version = str((await asyncio.to_thread(self._repository.resolve, ref)).version)
        return name, version

    async def _stream(self, call: Call, body: Incoming, reply: Reply) -> None:
        """Begin: `{"stream"}`, with which parts are asked for. Raises: what the gateway answers before the first part."""
        request = await _read(body)
        model = await self._check(call, url_name(request.ref))
        target = await self._named(call, request)
        opened = await self._streams.open(call.peer, model, self._gateway.stream(target, request.header, body))
        await _write(reply, orjson.dumps({"stream": opened}))

    async def _parts(self, call: Call, body: Incoming, reply: Reply) -> None:
        """What came of a stream since the last question, as its gateway frames it (`wire.parts`); nothing, if nothing did within `wait`."""
        asked = _asked(await body.rest(), _Parts)
        stream = self._streams.find(call.peer, asked.stream)
        await self._check(call, stream.model)
        await _write(reply, await stream.read(min(asked.wait, _MOST_WAIT)))

    async def _unstream(self, call: Call, value: bytes) -> bytes:
        """The caller has enough of it."""
        await self._streams.find(call.peer, _asked(value, _Parts).stream).aclose()
        return b"{}"

    async def _capacity(self, call: Call, value: bytes) -> bytes:
        """How a model stands here: of this lab, or, to whom workers are lent, its own, which is made ready if it asks for that."""
        asked, lender = _asked(value, Wanted), self.lender
        if lender is None:
            raise ServiceUnavailableError("this lab has no workers now: ask again later")
        if asked.digest and lender.lends(call.peer, asked.model):
            return msgspec.json.encode(await lender.capacity(call.peer, asked))
        ref = dataclasses.replace(ModelRef.parse(asked.model), version=asked.version)
        await self._check(call, url_name(ref))
        record = await asyncio.to_thread(self._repository.resolve, ref)
        return msgspec.json.encode(await lender.standing(ModelVersion(record.name, record.version, record.digest)))

    async def less(self, peer: str, may: Callable[[str, str, str | None], bool]) -> None:
        """The peer may do less than before: `may(peer, method, model)` says what it still may."""
        await self._streams.less(peer, lambda model: may(peer, "parts", model))

    async def aclose(self) -> None:
        """End what is still read; a second call does nothing."""
        await self._streams.aclose()


async def _read(body: Incoming) -> _Request:
    """The JSON of `u32 | JSON | tensors`; the tensors are left. Raises: MalformedRequestError."""
    (nbytes,) = _Length.unpack(await body.read(_Length.size))
    if not 0 < nbytes <= _MOST_HEADER:
        raise MalformedRequestError(f"infer: {nbytes} bytes of JSON; 1 to {_MOST_HEADER} are taken, and tensors in binary behind it")
    header = await body.read(nbytes)
    try:
        asked = msgspec.json.decode(header, type=_Infer)
    except msgspec.DecodeError as error:
        raise MalformedRequestError(f"infer: the JSON is no inference request with a model_name: {error}") from None
    return _Request(ModelRef.parse(asked.model_name), asked.model_version, header, body)


async def _write(reply: Reply, answer: bytes) -> None:
    await reply.begin(len(answer))
    if answer:
        await reply.write(answer)


def _seconds(call: Call) -> float | None:
    return None if call.deadline is None else call.deadline - asyncio.get_running_loop().time()


def _asked(value: bytes, kind: Any) -> Any:
    """Raises: MalformedRequestError."""
    try:
        return msgspec.json.decode(value or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise MalformedRequestError(f"the value is not what this method takes: {error}") from None


def url_name(ref: ModelRef) -> str:
    """A model as a URL names it."""
    return f"{ref.publisher}~{ref.name}" if ref.publisher else ref.name
