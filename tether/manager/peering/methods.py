"""What peers may call: a scope opens each method before any of the value is read, and each model by its resolved name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final, TypeVar

import msgspec
import orjson
from blake3 import blake3

from tether.errors import MalformedRequestError, ManagerLeavingError, ServiceUnavailableError, UnknownModelError, UnknownVersionError
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.running import READING_ON, Running, url_name
from tether.manager.peering.telling import Telling
from tether.security.access import Access
from tether.store import Repository
from tether.swarm.node.node import PREFIX
from tether.swarm.rpc.rpc import Call, Service
from tether.types import Digest, ModelRef

__all__ = ["Ask", "Methods"]

_DIGEST_NBYTES: Final = 32
_MOST_RESOLVED: Final = 4096
_MOST_WAIT: Final = 30.0
"""Seconds for which a question about models may stay open: a peer that is gone without a word is forgotten then."""
Asked = TypeVar("Asked")

Ask = Callable[..., Awaitable[Any]]
"""`await ask("models")`: an operation of this manager, acknowledged as for any other caller. Raises the errors of the tree."""


class _Named(msgspec.Struct):
    name: str


class _Models(msgspec.Struct):
    name: str | None = None
    """One, with all of its versions' inputs and outputs. Else all that the caller sees, or those of these names."""
    names: set[str] | None = None
    seen: str = ""
    """`state` of the answer that the caller has: no other one is given before there is another."""
    wait: float = 0.0
    """Seconds for that."""


class _Enrol(msgspec.Struct):
    secret: str


class _Manifest(msgspec.Struct):
    digest: str


class _Publish(msgspec.Struct):
    name: str
    draft: dict[str, Any]


class _Alias(msgspec.Struct):
    name: str
    alias: str
    version: int


class Methods:
    """Of one lab."""

    def __init__(self, publisher: str, ask: Ask, repository: Repository, access: Access, gateway: Gateway) -> None:
        """`publisher`: the lab's key, hex."""
        self.feed: Callable[[], Awaitable[Mapping[str, str]]] = _no_feed
        """What `feed` answers."""
        self.on_admitted: Callable[[str], None] = _nothing
        """Told of a key that may do more, before it is told so itself."""
        self.heads: Callable[[str, bytes], Awaitable[bytes]] = _no_heads
        """Caller, value → what `heads` answers."""
        self.have: Callable[[str, bytes], Awaitable[bytes]] = _no_group
        """Caller, value → what `have` answers."""
        self.claimed: Callable[[str, Digest, int], AbstractAsyncContextManager[None]] = _unbounded
        """Caller, digest, size: to be entered while a blob is staged. Raises: StagingFullError."""
        self.opens: Callable[[str, str], bool] = _nothing_more
        """Peer, method: what is open to a key by something else than its scopes."""
        self.may: Callable[[str, str, str | None], bool] = access.may
        """Peer, method, model by its resolved name: whether it may, by scopes or something else."""
        self.running = Running(repository, gateway, self._check)
        self.register: Callable[[str, bytes], Awaitable[bytes]] = _no_borrower
        """Caller, value → what `register` answers."""
        self._publisher, self._ask, self._repository = publisher, ask, repository
        self._access, self._gateway = access, gateway
        self._telling = Telling(gateway, access)
        self._resolved: dict[str, str] = {}
        self._rows: list[dict[str, Any]] | None = None
        self._changed = asyncio.Event()
        self._is_leaving = False

    def service(self) -> Service:
        """They, for any number of connections."""
        service = Service(self._authorise)
        for name, handler in {
            "enrol": self._enrol,
            "ping": self._ping,
            "models": self._models,
            "manifest": self._manifest,
            "feed": self._feed,
            "stage": self._stage,
            "publish": self._publish,
            "alias": self._alias,
            "envelope": self._envelope,
            "have": self._have,
            "heads": self._heads,
            "events": self._telling.events,
            "register": self._register,
        }.items():
            service.respond(PREFIX + name, handler)
        self.running.serve(service)
        return service

    def leave(self) -> None:
        """Do nothing new: this manager is about to end. Questions that wait for a change are answered now."""
        self._is_leaving = True
        self._telling.is_leaving = True
        self._changed.set()

    def changed(self) -> None:
        """The catalog is another one: names may mean other models."""
        self._resolved.clear()
        self._rows = None
        self._changed.set()
        self._changed = asyncio.Event()

    def _authorise(self, peer: str, method: str) -> None:
        name = method.removeprefix(PREFIX)
        if not self.opens(peer, name):
            self._access.check(peer, name)
        if self._is_leaving and name not in READING_ON:
            raise ManagerLeavingError("the manager of this lab is about to end and did nothing: call again, the next one answers")

    async def _check(self, call: Call, name: str) -> str:
        """The model's resolved name, if the caller may call this method for it.

        Raises: UnknownModelError: it may not, or there is none: it is not told which.
        """
        resolved = self._resolved.get(name)
        if resolved is None:
            ref = ModelRef.parse(name)
            try:
                resolved = (await asyncio.to_thread(self._repository.resolve, ref)).name
            except UnknownModelError:
                resolved = url_name(ref)
            else:
                self._remember(name, resolved)
        self._access.check(call.peer, call.method.removeprefix(PREFIX), resolved)
        return resolved

    def _remember(self, name: str, resolved: str) -> None:
        if len(self._resolved) >= _MOST_RESOLVED:
            self._resolved.clear()
        self._resolved[name] = resolved

    # --- who, and whether

    async def _enrol(self, call: Call, value: bytes) -> bytes:
        admitted = await self._ask("enrol", secret=_asked(value, _Enrol).secret, peer=call.peer)
        self.on_admitted(call.peer)
        return orjson.dumps(admitted)

    def _ping(self, call: Call, _: bytes) -> bytes | Awaitable[bytes]:
        """At once, where the catalog's rows are here: labs that lend each other workers ask each second."""
        rows = self._rows
        return self._pinged_later(call) if rows is None else self._pinged(call, rows)

    async def _pinged_later(self, call: Call) -> bytes:
        return self._pinged(call, await self._listed())

    def _pinged(self, call: Call, rows: Iterable[dict[str, Any]]) -> bytes:
        seen = len(self._shown(call, rows))
        answer = {"publisher": self._publisher, "time": time.time(), "models": seen, "serves": self._gateway.is_there}
        lender = self.running.lender
        vitals = None if lender is None else lender.pinged(call.peer)
        return orjson.dumps(answer if vitals is None else answer | {"lent": msgspec.to_builtins(vitals)})

    # --- what there is

    async def _models(self, call: Call, value: bytes) -> bytes:
        asked = _asked(value, _Models)
        if asked.name is not None:
            return orjson.dumps({"model": _shown(await self._ask("model", name=await self._check(call, asked.name)))})
        end = asyncio.get_running_loop().time() + min(asked.wait, _MOST_WAIT)
        while True:
            changed = self._changed
            rows = [row for row in self._shown(call, await self._listed()) if asked.names is None or row["name"] in asked.names]
            state = blake3(orjson.dumps(rows)).hexdigest(8)
            if state != asked.seen or self._is_leaving or not await _within(changed, end):
                return orjson.dumps({"models": rows, "state": state})

    async def _listed(self) -> list[dict[str, Any]]:
        changed, rows = self._changed, self._rows
        if rows is None:
            rows = [_shown(row) for row in await self._ask("models")]
            if changed is self._changed:
                self._rows = rows
        return rows

    def _shown(self, call: Call, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the caller may know of."""
        return [row for row in rows if self.may(call.peer, "models", row["name"])]

    async def _manifest(self, call: Call, value: bytes) -> bytes:
        """As it was signed. Whether there is a version that the caller may not have is not told."""
        digest = Digest(_asked(value, _Manifest).digest)
        names = [version.name for version in await asyncio.to_thread(self._repository.versions_of, digest)]
        name = next((name for name in names if self.may(call.peer, "manifest", name)), None)
        if name is None:
            raise UnknownVersionError("there is no version with this digest that this key may have")
        return orjson.dumps(await self._ask("signed_manifest", digest=digest) | {"name": name})

    async def _envelope(self, call: Call, value: bytes) -> bytes:
        """The keys of an encrypted model, which the caller alone can open."""
        return orjson.dumps(await self._ask("envelope", peer=call.peer, name=_asked(value, _Named).name))

    async def _feed(self, _: Call, __: bytes) -> bytes:
        return orjson.dumps(await self.feed())

    async def _heads(self, call: Call, value: bytes) -> bytes:
        """Which head of another lab's feed is believed here, to who shows that it knows one: see `handing_on`."""
        return await self.heads(call.peer, value)

    async def _have(self, call: Call, value: bytes) -> bytes:
        """What this lab has of one publisher's models, to labs that hold copies of them too: see `group_view`."""
        return await self.have(call.peer, value)

    # --- lending and publishing

    async def _register(self, call: Call, value: bytes) -> bytes:
        """Workers of the caller's, for this lab."""
        return await self.register(call.peer, value)

    async def _stage(self, call: Call, value: bytes) -> bytes:
        digest, data = value[:_DIGEST_NBYTES], value[_DIGEST_NBYTES:]
        if len(digest) < _DIGEST_NBYTES:
            raise MalformedRequestError("stage: the value is a digest of 32 bytes and the blob behind it")
        async with self.claimed(call.peer, Digest(digest.hex()), len(data)):
            staged = await self._ask("put_blob", digest=digest.hex(), data=data)
        return orjson.dumps({"nbytes": staged["nbytes"]})

    async def _publish(self, call: Call, value: bytes) -> bytes:
        asked = _asked(value, _Publish)
        self._access.check(call.peer, "publish", asked.name)  # a version is made under the lab's own name: there is nothing to resolve
        published = await self._ask("publish", name=asked.name, draft=asked.draft, peer=call.peer)
        self.changed()  # the caller looks for it at once
        return orjson.dumps(published, default=str)

    async def _alias(self, call: Call, value: bytes) -> bytes:
        asked = _asked(value, _Alias)
        name = await self._check(call, asked.name)
        moved = await self._ask("set_alias", name=name, alias=asked.alias, version=asked.version)
        self.changed()
        return orjson.dumps(moved)


async def _within(event: asyncio.Event, end: float) -> bool:
    """Whether it came before the loop's clock says `end`."""
    try:
        async with asyncio.timeout_at(end):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def _no_heads(_: str, __: bytes) -> bytes:
    raise ServiceUnavailableError("this lab follows no feeds now: ask again later")


async def _no_group(_: str, __: bytes) -> bytes:
    raise ServiceUnavailableError("this lab has no list of what it has now: ask again later")


async def _no_borrower(_: str, __: bytes) -> bytes:
    raise ServiceUnavailableError("this lab takes no workers now: ask again later")


def _nothing_more(_: str, __: str) -> bool:
    return False


def _unbounded(*_: object) -> AbstractAsyncContextManager[None]:
    return nullcontext()


async def _no_feed() -> Mapping[str, str]:
    raise ServiceUnavailableError("this lab has no feed now: ask again later")


def _nothing(_: str) -> None:
    pass


def _asked(value: bytes, kind: type[Asked]) -> Asked:
    """Raises: MalformedRequestError."""
    try:
        return msgspec.json.decode(value or b"{}", type=kind)
    except msgspec.DecodeError as error:
        raise MalformedRequestError(f"the value is not what this method takes: {error}") from None


def _shown(model: dict[str, Any]) -> dict[str, Any]:
    """What others see of a model: how this lab serves it is its own matter."""
    return {key: value for key, value in model.items() if key != "serving"}
