"""A lab among labs: when it is on the swarm, and what its own people ask of others. There only while there is a reason, where it writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import msgspec
import orjson
import structlog

from tether.config import bootstrap_nodes
from tether.errors import (
    BadAddressError,
    BadInputError,
    BadInvitationError,
    ForbiddenError,
    NotWriterError,
    RequestError,
    TetherError,
    UnsupportedError,
)
from tether.manager.admission import Connected
from tether.manager.asking import Operation
from tether.manager.membership import Signal
from tether.manager.operations import Operations
from tether.manager.peering.agreeing import Agreeing
from tether.manager.peering.agreements import Agreements
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.group_view import Asked
from tether.manager.peering.keeping import Kept, KeptModel
from tether.manager.peering.members import Members
from tether.manager.peering.presence import LabSide, Presence
from tether.manager.peering.reachability import judged
from tether.manager.peering.subscriptions import Subscriptions
from tether.manager.settings import ManagerSettings
from tether.security.addresses import Address, Link
from tether.swarm.blobs.blobs import PeerBlobs
from tether.swarm.engine.engine import EngineSettings
from tether.swarm.node.node import NodeSettings
from tether.types import model_name

__all__ = ["Peering"]

log = structlog.get_logger("tether.swarm")
_LOOK = 1.0
"""Seconds between looks at whether there is a reason to be on the swarm, and for changes that did not come through this process."""
_REST = 30.0
"""Seconds until a start that failed is tried again by itself."""
_CONNECT = 25.0
"""Seconds for finding a lab and its first answer."""
_READY = 15.0
"""Seconds for the first look round the DHT."""
_MOST_WAIT = 60.0


class Peering:
    """Of one manager. Belongs to its event loop, which is the main thread's."""

    NAMES: ClassVar[tuple[str, ...]] = ("join", "replicate", "replications", "release", "reachability")

    def __init__(self, operations: Operations, asking: Mapping[str, Operation], settings: ManagerSettings, signal: Signal) -> None:
        """`asking`: the manager's operations, acknowledged as for any other caller. `signal`: fired when the catalog may be another one."""
        self._operations, self._asking, self._settings, self._signal = operations, asking, settings, signal
        self._may_serve: Callable[[], bool] = _not_yet
        self._gateway = Gateway(settings.gateway, _api_key(settings))
        self._subscriptions = Subscriptions(settings.data.root / "subscriptions.json")
        self._agreements, members = Agreements(settings.data.root / "copies.json"), Members(operations.access)
        self._lab = LabSide(
            settings.data, operations, self._ask, self._gateway, self._subscriptions, self._agreements, members, signal.fire
        )
        self._presence: Presence | None = None
        self._agreeing = Agreeing(operations, self._agreements, lambda: None if self._presence is None else self._presence.copying)
        self._agreeing.may_hold, self._agreeing.ended = self._may_hold, self._ended
        self._beginning = asyncio.Lock()
        self._seen = -1
        self._weigh_at = 0.0
        self._closed_since: int | None = None
        """Change of who may come, by number, at which nobody might."""
        self.is_heavy = False
        """Whether this process is to be replaced by a new one, as far as it can tell."""
        self.replace: Callable[[], None] = _nothing
        """Called once, when it is heavy."""
        operations.admission.connections = self.connected

    async def _ask(self, operation: str, **arguments: Any) -> Any:
        return await self._asking[operation](**arguments)

    def handlers(self) -> dict[str, Operation]:
        """What people ask of it, by name."""
        return {name: getattr(self, name) for name in self.NAMES} | self._agreeing.handlers()

    # --- when to be there

    async def run(self, may_serve: Callable[[], bool]) -> None:
        """Until cancelled, be on the swarm while there is a reason. `may_serve`: whether this manager is the one that writes."""
        self._may_serve = may_serve
        try:
            while True:
                event, pause = self._signal.event, _LOOK
                try:
                    await self._look()
                except TetherError as error:
                    log.warning("not on the swarm: other labs can't reach this one", error=str(error), code=error.code)
                    pause = _REST
                except Exception:  # a bug of ours must not keep the lab away for good
                    log.exception("not on the swarm: other labs can't reach this one")
                    pause = _REST
                await self._signal.within(event, pause)
        finally:
            await self._leave()

    async def _look(self) -> None:
        if not self._may_serve():
            await self._leave()
            return
        if self._presence is None:
            if self._settings.swarm and await asyncio.to_thread(self._is_wanted):
                await self._present()
            return
        self._weigh(self._presence)
        change = await asyncio.to_thread(self._operations.change_count)
        if change != self._seen:
            self._seen = change
            self._presence.changed()

    def _is_wanted(self) -> bool:
        """Somebody may come, or we are to keep what somebody has."""
        if self._subscriptions.all() or self._agreements.holdings:
            return True
        access = self._operations.access
        commits = access.file.commits
        if commits == self._closed_since:
            return False  # time ends invitations, and begins none
        invitations = self._operations.admission.registry.list
        if any(peer.scopes for peer in access.peers()) or any(invitation.problem is None for invitation in invitations()):
            return True
        self._closed_since = commits
        return False

    async def _present(self) -> Presence:
        """This lab on the swarm, which begins if it is not there yet.

        Raises: UnsupportedError: it was started without; NotWriterError; MissingDependencyError: no PythonMonkey; EngineError.
        """
        if not self._may_serve():
            raise NotWriterError("this manager follows another one of its lab, which speaks with other labs: call that one")
        async with self._beginning:
            if self._presence is None:
                if not self._settings.swarm:
                    raise UnsupportedError("this lab speaks with no other lab (--no-swarm): start it without that option")
                self._presence = await Presence.begin(self._lab, self._node_settings())
                self._weigh_at = asyncio.get_running_loop().time() + self._settings.weighing
                log.info("on the swarm", address=str(Address(self._operations.public)))
            return self._presence

    def _node_settings(self) -> NodeSettings:
        engine = EngineSettings(bootstrap=bootstrap_nodes(self._settings.bootstrap))
        return NodeSettings(engine=engine, max_weight_nbytes=self._settings.max_weight_nbytes)

    def _weigh(self, presence: Presence) -> None:
        """Now and then. The engine's JavaScript leaks a little, so a manager that has become too heavy makes room for a new one."""
        now = asyncio.get_running_loop().time()
        if self.is_heavy or now < self._weigh_at:
            return
        self._weigh_at = now + self._settings.weighing
        weight = presence.node.weight()
        if weight.is_heavy:
            self.is_heavy = True
            log.info("this manager has grown too heavy: another one takes its place", nbytes=weight.nbytes)
            self.replace()

    async def retire(self, grace: float) -> None:
        """Before the end: what other labs ask is not begun any more, what runs ends within `grace` seconds."""
        if self._presence is not None:
            await self._presence.retire(grace)

    async def _leave(self) -> None:
        async with self._beginning:
            presence, self._presence = self._presence, None
            if presence is not None:
                await presence.aclose()
                await self._gateway.aclose()

    def connected(self) -> list[Connected]:
        """Those with whom this lab is connected now."""
        if self._presence is None:
            return []
        found = {each.peer: Connected(each.peer, each.route, each.round_trip or None, None) for each in self._presence.node.connections()}
        return list(found.values())

    # --- other labs

    async def connect(self, link: Link) -> dict[str, Any]:
        """Find a lab and, with an invitation, be admitted: `{"publisher", "scopes"}`; scopes are None where nothing new was given.

        Raises: PeerNotFoundError, PeerUnreachableError, BadInvitationError …; ForbiddenError: it does not know this lab.
        """
        peer = link.address.key
        if peer == self._operations.public:
            raise BadAddressError("that is this lab's own address: tether.connect() without an address connects to it")
        node = (await self._present()).node
        try:
            if link.secret is not None:
                answer = await node.request(peer, "enrol", orjson.dumps({"secret": link.secret.text}), _CONNECT)
            else:
                answer = await node.request(peer, "ping", b"", _CONNECT)
        except BadInvitationError:
            raise
        except ForbiddenError as error:
            own = Address(self._operations.public)
            raise ForbiddenError(
                f"the lab does not let this one in: ask it for an invitation, or for `tether allow {own} --scope …`"
            ) from error
        return {"publisher": peer, "scopes": orjson.loads(answer).get("scopes")}

    async def join(self, url: str) -> dict[str, Any]:
        """As the port says."""
        return await self.connect(Link.parse(url))

    async def request(self, peer: str, method: str, value: bytes, timeout: float | None) -> bytes:  # noqa: ASYNC109 (it also goes to the peer)
        """Call a method of a lab, by its bare name. Raises: as `Node.request`."""
        return await (await self._present()).node.request(peer, method, value, timeout)

    async def blobs(self, peer: str) -> PeerBlobs:
        """What a lab gives. Raises: as `Node.blobs`."""
        return await (await self._present()).node.blobs(peer)

    async def reachability(self) -> dict[str, Any]:
        """Whether other labs can reach this one: `{"state": "ok" | "note" | "fail", "detail", "address"}`. It is on the swarm then."""
        node = (await self._present()).node
        try:
            async with asyncio.timeout(_READY):
                await node.ready()
        except (TimeoutError, TetherError) as error:
            log.info("the swarm is not ready", error=str(error))
        state, detail = judged(await node.status())
        return {"state": state, "detail": detail, "address": str(Address(self._operations.public))}

    # --- keeping what they have

    async def replicate(self, publisher: str, model: str, via: str | None = None, wait: float = 20.0) -> dict[str, Any]:
        """Keep a model of another lab here, from now on; answers when all of it is here, or after `wait` seconds how far it is: ask again.

        `publisher`: its key, address or petname; `via`: another lab that has it. Raises: UnknownModelError, ForbiddenError,
        UntrustedCodeError …: it can't be had, and is not kept.
        """
        key = await asyncio.to_thread(self._operations.admission.key_of, publisher)
        if key == self._operations.public:
            raise BadInputError(f"{model} is this lab's own: it is here")
        name, other = (
            model if model == "*" else model_name(model),
            None if via is None else await asyncio.to_thread(self._operations.admission.key_of, via),
        )
        presence = await self._present()
        before = self._subscriptions.of(key)
        is_new = before is None or name not in before.models
        kept = presence.keep(await asyncio.to_thread(self._subscriptions.add, key, name, other))
        state = await _settled(kept, name, min(wait, _MOST_WAIT))
        if is_new and isinstance(state.error, RequestError):
            await self.release(key, name)
            raise state.error
        return _row(key, name, state)

    async def replications(self) -> list[dict[str, Any]]:
        """What is kept of other labs, and how far it is."""
        rows = []
        for subscription in self._subscriptions.all():
            kept = None if self._presence is None else self._presence.keep(subscription)
            names = set(subscription.models) | (set(kept.models) if kept else set())
            rows += [_row(subscription.publisher, name, kept.model(name) if kept else KeptModel()) for name in sorted(names)]
        return rows

    async def release(self, publisher: str, model: str) -> dict[str, Any]:
        """Keep it no longer up to date; what is here stays."""
        key = await asyncio.to_thread(self._operations.admission.key_of, publisher)
        await asyncio.to_thread(self._subscriptions.remove, key, model)
        left = self._subscriptions.of(key)
        if self._presence is not None:
            if left is None:
                await self._presence.release(key)
            else:
                self._presence.keep(left)
        return {"publisher": key, "model": model}

    async def _may_hold(self, publisher: str) -> None:
        """Raises: ForbiddenError: the lab did not give this one what it needs for that; as `request`."""
        try:
            await self.request(publisher, "have", msgspec.json.encode(Asked(publisher)), _CONNECT)
        except ForbiddenError as error:
            raise ForbiddenError(
                f"the lab does not let this one hold copies of its models ({error}): ask it for `tether invite --scope replicate`, "
                f"or for `tether allow {Address(self._operations.public)} --scope replicate`"
            ) from error

    async def _ended(self, publisher: str) -> None:
        """No copies are held for it any more; what else is kept of it stays so."""
        if self._presence is not None:
            await self._presence.end_holding(publisher)


async def _settled(kept: Kept, name: str, seconds: float) -> KeptModel:
    """How far it is, once it is here or can't be had, or after so long."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        state = kept.model(name)
        left = end - asyncio.get_running_loop().time()
        if state.is_done or isinstance(state.error, RequestError) or left <= 0:
            return state
        await kept.moved(min(left, _LOOK))


def _row(publisher: str, name: str, state: KeptModel) -> dict[str, Any]:
    progress, error = state.progress, state.error
    return {
        "publisher": publisher,
        "model": name,
        "versions": list(state.versions),
        "done": state.is_done,
        "fraction": 1.0 if state.is_done else progress.fraction,
        "done_nbytes": progress.done,
        "nbytes": progress.total,
        "rate": progress.rate,
        "peers": progress.peers,
        "error": None if error is None else [error.code, str(error)],
    }


def _not_yet() -> bool:
    return False


def _api_key(settings: ManagerSettings) -> str | None:
    try:
        return settings.data.api_key.read_text().strip()
    except OSError:
        return None


def _nothing() -> None:
    """Until somebody says how this manager is replaced."""
