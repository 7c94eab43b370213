"""The user's own notebooks and programs come in here, over a Unix socket that nobody else can open: they may do all that the user may.

own/<operation>   the manager's operations; JSON in and out, but
                  own/put_blob   head {"digest", "encrypt"} | the blob          own/get_blob    answers the blob
                  own/read_zarr  answers head {"digest", "nbytes", "start"} | the bytes
peer/connect      {"url"} → {"publisher", "scopes"}: finds a lab; with an invitation in the url this lab is enrolled there
peer/call         head {"peer", "method", "timeout"} | value → what the peer answers; both are passed on as they come
peer/blob         {"peer", "digest"} → the blob
door/hello        {} → {"pid", "version", "publisher", "alone"}
door/leave        {} → {"pid"}: a manager that is alone ends, as soon as its calls are done

head   u32 LE nbytes | JSON
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol, TypeVar

import msgspec
import orjson
import structlog

from tether._version import __version__
from tether.errors import ConflictError, MalformedRequestError, ManagerLeavingError, NotFoundError
from tether.manager.asking import Operation
from tether.ports import BlobSource, MessageStream
from tether.security.addresses import Link
from tether.swarm.rpc.rpc import Call, Handler, Incoming, Outgoing, Reply, RpcConnection, RpcLimits, Service
from tether.swarm.wire.local import THIS_USER
from tether.types import Digest
from tether.wire.heads import joined, parted

__all__ = ["Door", "Peers"]

log = structlog.get_logger("tether.manager")
LIMITS: Final = RpcLimits(max_held_nbytes=512 << 20, max_passing_nbytes=4 << 30)
"""Of one of the user's own processes."""
_PASSING_NBYTES: Final = 1 << 30
"""Of a call to another lab, of which a window lies here: that lab decides how large it may be."""
_AHEAD_NBYTES: Final = 1 << 20
"""Up to here a call is read before it is passed on, so that it can be made anew where a peer is about to end."""
_LOOK: Final = 0.02
"""Seconds between looks at whether calls are done."""
Asked = TypeVar("Asked")


class Peers(Protocol):
    """What the door needs of the swarm."""

    async def connect(self, link: Link) -> dict[str, Any]:
        """Find a lab and, with an invitation, be enrolled there: `{"publisher", "scopes"}`.

        Raises: PeerNotFoundError, PeerUnreachableError, BadInvitationError, ForbiddenError …
        """
        ...

    def exchange(self, peer: str, method: str, value: bytes | Outgoing, timeout: float | None) -> AbstractAsyncContextManager[Incoming]:
        """Call a method of a lab, by its bare name; the answer is taken as it comes, and the value may be sent so.

        Raises: what the lab answers, DeadlineExceededError, ServiceUnavailableError.
        """
        ...

    async def blobs(self, peer: str) -> BlobSource:
        """What a lab gives. Raises: as `request`."""
        ...


class _PutBlob(msgspec.Struct):
    digest: str
    encrypt: str | None = None


class _Connect(msgspec.Struct):
    url: str


class _Call(msgspec.Struct):
    peer: str
    method: str
    timeout: float | None = None


class _Blob(msgspec.Struct):
    peer: str
    digest: str


class Door:
    """Of one manager. Belongs to its event loop."""

    def __init__(self, publisher: str, operations: Mapping[str, Operation], peers: Peers, *, alone: bool) -> None:
        """`publisher`: the lab's key, hex. `alone`: whether this manager is here for those who come in alone, and may be asked to leave."""
        self._publisher, self._operations, self._peers, self._alone = publisher, operations, peers, alone
        self._service = self._services()
        self._connections: set[RpcConnection] = set()
        self._attending: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._leaving = asyncio.Event()
        self._changed = asyncio.Event()
        self.idle_since: float | None = self._loop.time()
        """On the loop's clock: when the last client left; None: there is one."""

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._connections)

    def admit(self, stream: MessageStream) -> None:
        """Answer the calls of one client."""
        connection = RpcConnection(stream, THIS_USER, self._service, LIMITS)
        self._connections.add(connection)
        self.idle_since = None
        task = self._loop.create_task(self._attend(connection))
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)

    async def _attend(self, connection: RpcConnection) -> None:
        await connection.wait_closed()
        self._connections.discard(connection)
        if not self._connections:
            self.idle_since = self._loop.time()
        self._changed.set()

    async def deserted(self, idle: float) -> None:
        """Wait until nobody was here for `idle` seconds, or somebody asked this manager to leave."""
        while not self._leaving.is_set():
            now = self._loop.time()
            if self.idle_since is not None and now >= self.idle_since + idle:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(None if self.idle_since is None else self.idle_since + idle - now):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def aclose(self, grace: float) -> None:
        """Take no more calls; those that are made may go on for `grace` seconds. Then nobody is connected any more."""
        self._leave()
        deadline = self._loop.time() + grace
        while any(each.working for each in self._connections) and self._loop.time() < deadline:  # noqa: ASYNC110 (calls end one by one)
            await asyncio.sleep(_LOOK)
        await asyncio.gather(*(each.aclose() for each in tuple(self._connections)))
        await asyncio.gather(*self._attending)

    def _leave(self) -> None:
        self._leaving.set()
        self._changed.set()

    # --- what can be called

    def _services(self) -> Service:
        service = Service(self._authorise, LIMITS.max_passing_nbytes)
        for name, operation in self._operations.items():
            service.respond(f"own/{name}", functools.partial(_own, operation))
        own: dict[str, Handler] = {"put_blob": self._put_blob, "get_blob": self._get_blob, "read_zarr": self._read_zarr}
        for name, handler in own.items():
            service.respond(f"own/{name}", handler)
        service.respond("peer/connect", self._connect)
        service.pass_on("peer/call", self._call, _PASSING_NBYTES)
        service.respond("peer/blob", self._blob)
        service.respond("door/hello", self._hello)
        service.respond("door/leave", self._asked_to_leave)
        return service

    def _authorise(self, _peer: str, _method: str) -> None:
        """Whoever could open the socket may do all; there is only nothing to be had of a manager that goes."""
        if self._leaving.is_set():
            raise ManagerLeavingError("the manager of this machine is about to end and did nothing: call again, the next one answers")

    async def _put_blob(self, _: Call, value: bytes) -> bytes:
        head, data = parted(value)
        asked = _asked(head, _PutBlob)
        return _json(await self._operations["put_blob"](digest=asked.digest, data=data, encrypt=asked.encrypt))

    async def _get_blob(self, _: Call, value: bytes) -> bytes:
        blob: bytes = await _called(self._operations["get_blob"], value)
        return blob

    async def _read_zarr(self, _: Call, value: bytes) -> bytes:
        answer = await _called(self._operations["read_zarr"], value)
        return joined({name: each for name, each in answer.items() if name != "data"}, answer["data"])

    async def _connect(self, _: Call, value: bytes) -> bytes:
        return _json(await self._peers.connect(Link.parse(_asked(value, _Connect).url)))

    async def _call(self, _: Call, body: Incoming, reply: Reply) -> None:
        asked = _asked(await _head(body), _Call)
        value = await body.rest() if body.left_nbytes <= _AHEAD_NBYTES else Outgoing(body.left_nbytes, body)
        async with self._peers.exchange(asked.peer, asked.method, value, asked.timeout) as answer:
            await reply.begin(answer.nbytes)
            async for chunk in answer:
                await reply.write(chunk)

    async def _blob(self, _: Call, value: bytes) -> bytes:
        asked = _asked(value, _Blob)
        blob = await (await self._peers.blobs(asked.peer)).fetch(Digest(asked.digest), 0)
        if blob is None:
            raise NotFoundError(f"the lab does not have blob {asked.digest[:64]}: it may have been deleted there, list its versions again")
        return blob

    def _hello(self, _call: Call, _value: bytes) -> bytes:
        return _json({"pid": os.getpid(), "version": __version__, "publisher": self._publisher, "alone": self._alone})

    def _asked_to_leave(self, _call: Call, _value: bytes) -> bytes:
        if not self._alone:
            raise ConflictError("this manager belongs to a lab, which ends as a whole: `tether down`")
        log.info("asked to leave")
        self._loop.call_soon(self._leave)  # behind the answer
        return _json({"pid": os.getpid()})


async def _head(body: Incoming) -> bytes:
    """The JSON before what is passed on. Raises: MalformedRequestError."""
    nbytes = int.from_bytes(await body.read(4), "little")
    if nbytes > _AHEAD_NBYTES:
        raise MalformedRequestError(f"{nbytes} bytes of JSON say whom a call is for; at most {_AHEAD_NBYTES} are taken")
    return await body.read(nbytes)


async def _own(operation: Operation, _: Call, value: bytes) -> bytes:
    return _json(await _called(operation, value))


async def _called(operation: Operation, value: bytes) -> Any:
    """Raises: MalformedRequestError: these are not its arguments."""
    arguments = _asked(value, dict[str, Any])
    try:
        inspect.signature(operation).bind(**arguments)
    except TypeError as error:
        raise MalformedRequestError(f"{getattr(operation, '__name__', 'the operation')}: {error}") from None
    return await operation(**arguments)


def _asked(value: bytes, kind: type[Asked]) -> Asked:
    """Raises: MalformedRequestError."""
    try:
        return msgspec.json.decode(value or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise MalformedRequestError(f"the value is not what this method takes: {error}") from None


def _json(value: Any) -> bytes:
    return orjson.dumps(value, default=str)
