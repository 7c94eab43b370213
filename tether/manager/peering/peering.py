"""A lab among labs: when it is on the swarm, and what its own people ask of others. There only while there is a reason, where it writes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
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
    InternalError,
    NotWriterError,
    RequestError,
    TetherError,
    UnsupportedError,
)
from tether.manager.admission import Neighbour
from tether.manager.asking import Operation
from tether.manager.membership import Signal
from tether.manager.operations import Operations
from tether.manager.peering.acquaintances import acquaintances
from tether.manager.peering.agreeing import Agreeing
from tether.manager.peering.agreements import Agreements
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.group_view import Asked
from tether.manager.peering.keeping import FINAL, Kept, KeptModel
from tether.manager.peering.lines import Lines
from tether.manager.peering.members import Members
from tether.manager.peering.offering import AskMeans, Offering
from tether.manager.peering.presence import LabSide, Presence
from tether.manager.peering.reachability import judged, told_off, told_on
from tether.manager.peering.region import Region
from tether.manager.peering.staged import StagedShares
from tether.manager.peering.subscriptions import Subscriptions
from tether.manager.settings import ManagerSettings, relay_keys
from tether.security.addresses import Address, Link
from tether.swarm.blobs.blobs import PeerBlobs
from tether.swarm.engine.engine import EngineSettings
from tether.swarm.engine.interpreter import check_installed
from tether.swarm.node.node import ConnectionLimits, NodeSettings
from tether.swarm.relaying.relay import RelayLimits
from tether.swarm.rpc.rpc import Incoming, Outgoing
from tether.types import model_name

__all__ = ["Peering"]

log = structlog.get_logger("tether.swarm")
_LOOK = 1.0
"""Seconds between looks at whether there is a reason to be on the swarm, and for changes that did not come through this process."""
_REST = 30.0
"""Seconds until a start that failed is tried again by itself."""
_CONNECT = 25.0
"""Seconds for finding a lab and its first answer."""
_FOUND = 5.0
"""Seconds that an invitation waits until the lab can be found: about what a first look round a DHT behind a NAT takes."""
_READY = 15.0
"""Seconds for the first look round the DHT."""
_MOST_WAIT = 60.0
_GLANCE = 1.5
"""Seconds for which who lists the peers waits for what they say of themselves."""


class Peering:
    """Of one manager. Belongs to its event loop, which is the main thread's."""

    NAMES: ClassVar[tuple[str, ...]] = ("join", "replicate", "replications", "release", "reachability", "swarm", "contacts")

    def __init__(
        self,
        operations: Operations,
        asking: Mapping[str, Operation],
        settings: ManagerSettings,
        signal: Signal,
        means: AskMeans | None = None,
    ) -> None:
        """`asking`: the manager's operations, acknowledged as for any other caller. `signal`: fired when the catalog may be another one.

        `means`: what the workers of its cluster have to work with. Raises: ConfigError: the region; StoreError: a file can't be read.
        """
        self._operations, self._asking, self._settings, self._signal = operations, asking, settings, signal
        self._may_serve: Callable[[], bool] = _not_yet
        self._gateway = Gateway(settings.gateway, _api_key(settings))
        self._subscriptions = Subscriptions(settings.data.root / "subscriptions.json")
        self.lines = lines = Lines(operations, settings.data)
        self.lines.on_need(self._present)
        self._region, members = Region(settings.data.root / "region", settings.region), Members(operations.access, lines.loans)
        self._agreements = Agreements(settings.data.root / "copies.json", lambda: self._region.name)
        offering = Offering(operations.repository, self._gateway, self._region, means)
        self._lab = LabSide(
            settings.data,
            operations,
            self._ask,
            self._gateway,
            self._subscriptions,
            self._agreements,
            members,
            offering,
            lines,
            StagedShares(operations.repository, settings.data.run / "staged.log", settings.max_staged_nbytes),
            signal.fire,
            settings.surplus,
        )
        self._presence: Presence | None = None
        self._called = set[str]()
        """Labs (keys) to which somebody here connected."""
        self._since = 0.0
        """Unix time at which it began."""
        self._problem: TetherError | None = None
        """Why it could not begin when that was tried last."""
        self._agreeing = Agreeing(operations, self._agreements, lambda: None if self._presence is None else self._presence.copying)
        self._agreeing.may_hold, self._agreeing.ended = self._may_hold, self._ended
        self._beginning = asyncio.Lock()
        self._leaving: asyncio.Task[None] | None = None
        self._seen = -1
        self._weigh_at = 0.0
        self._closed_since: int | None = None
        """Change of who may come, by number, at which nobody might."""
        self.is_heavy = False
        """Whether this process is to be replaced by a new one, as far as it can tell."""
        self.replace: Callable[[], None] = _nothing
        """Called once, when it is heavy."""
        admission = operations.admission
        admission.neighbourhood, admission.check_reachable, admission.be_found = self.neighbours, self.check_possible, self._be_found

    async def _ask(self, operation: str, **arguments: Any) -> Any:
        return await self._asking[operation](**arguments)

    def handlers(self) -> dict[str, Operation]:
        """What people ask of it, by name."""
        return {name: getattr(self, name) for name in self.NAMES} | self._agreeing.handlers() | self.lines.handlers()

    def read_again(self) -> None:
        """The files of what is kept and agreed are others than before: those of the manager that writes. Any thread. Raises: StoreError."""
        self._region.read_again()
        self._subscriptions.read_again()
        self._agreements.read_again()
        self.lines.read_again()

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
                    self._problem, pause = error, _REST
                except Exception as error:  # a bug of ours must not keep the lab away for good
                    log.exception("not on the swarm: other labs can't reach this one")
                    self._problem, pause = InternalError(f"{type(error).__name__}: the manager's log has the traceback"), _REST
                await self._signal.within(event, pause)
        finally:
            self._may_serve = _not_yet  # who waits for its turn in `_present` begins nothing any more
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
        if self._subscriptions.all() or self._agreements.holdings or self.lines.lends:
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
        self._check_serving()
        async with self._beginning:
            self._check_serving()  # it may have left while this waited
            if self._presence is None:
                self.check_possible()
                self._presence = await Presence.begin(self._lab, self._node_settings())
                self._since, self._problem = time.time(), None
                self._weigh_at = asyncio.get_running_loop().time() + self._settings.weighing
                log.info("on the swarm", address=str(Address(self._operations.public)))
            return self._presence

    def _check_serving(self) -> None:
        if not self._may_serve():
            raise NotWriterError("this manager follows another one of its lab, which speaks with other labs: call that one")

    def check_possible(self) -> None:
        """Whether this process could be on the swarm. Raises: UnsupportedError: it was started without; MissingDependencyError."""
        if not self._settings.swarm:
            raise UnsupportedError(
                "this lab speaks with no other lab: it was started with --no-swarm (swarm=False): end it, and start it without that"
            )
        check_installed()

    async def _be_found(self) -> None:
        """Come on the swarm, and wait until others can find this lab there; for some seconds, since there may be no network."""
        with contextlib.suppress(TetherError, TimeoutError):  # `run` tries again, and says why it could not
            async with asyncio.timeout(_FOUND):
                await (await self._present()).node.ready()

    def _node_settings(self) -> NodeSettings:
        settings = self._settings
        relays = tuple(map(bytes.fromhex, relay_keys(settings.relay_through)))
        engine = EngineSettings(bootstrap=bootstrap_nodes(settings.bootstrap), relays=relays)
        limits = ConnectionLimits(relaying=RelayLimits() if settings.relay else None)
        return NodeSettings(engine=engine, limits=limits, max_weight_nbytes=settings.max_weight_nbytes)

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
        """To its end, also where who waits for it is cancelled: a writer that ends loses the lease first, and leaves for that reason."""
        if self._leaving is None or self._leaving.done():
            self._leaving = asyncio.create_task(self._left(), name="leaving-the-swarm")
        await asyncio.shield(self._leaving)

    async def _left(self) -> None:
        async with self._beginning:
            presence, self._presence = self._presence, None
            if presence is not None:
                await presence.aclose()
                await self._gateway.aclose()

    async def neighbours(self, known: Collection[str]) -> list[Neighbour]:
        """Those that are connected, and what labs say of themselves: `known` ones, and some that hold models that are looked for here."""
        presence = self._presence
        if presence is None:
            return []
        known = {*known, *self._called, *(each.publisher for each in self._subscriptions.all())}
        await presence.neighbours.meet(known, _GLANCE)
        return acquaintances(known, presence.node.connections(), presence.neighbours.said(), self._is_met)

    def _is_met(self, peer: str) -> bool:
        return peer in self._called or self._lab.follows(peer) or self._lab.members.knows(peer)

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
        self._called.add(peer)
        return {"publisher": peer, "scopes": orjson.loads(answer).get("scopes")}

    async def join(self, url: str) -> dict[str, Any]:
        """As the port says."""
        return await self.connect(Link.parse(url))

    async def request(self, peer: str, method: str, value: bytes, timeout: float | None) -> bytes:  # noqa: ASYNC109 (it also goes to the peer)
        """Call a method of a lab, by its bare name. Raises: as `Node.request`."""
        return await (await self._present()).node.request(peer, method, value, timeout)

    @asynccontextmanager
    async def exchange(self, peer: str, method: str, value: bytes | Outgoing, timeout: float | None) -> AsyncIterator[Incoming]:  # noqa: ASYNC109 (as above)
        """As `Node.exchange`."""
        async with (await self._present()).node.exchange(peer, method, value, timeout) as answer:
            yield answer

    async def blobs(self, peer: str) -> PeerBlobs:
        """What a lab gives. Raises: as `Node.blobs`."""
        return await (await self._present()).node.blobs(peer)

    async def reachability(self) -> dict[str, Any]:
        """Whether other labs can reach this one: `{"state": "ok" | "note" | "fail", "detail", "address"}`. It is on the swarm then."""
        presence = await self._present()
        node = presence.node
        try:
            async with asyncio.timeout(_READY):
                await node.ready()
        except (TimeoutError, TetherError) as error:
            log.info("the swarm is not ready", error=str(error))
        state, detail = judged(await node.status(), presence.relaying.aid)
        return {"state": state, "detail": detail, "address": str(Address(self._operations.public))}

    async def swarm(self) -> dict[str, Any]:
        """Whether this lab is on the swarm, as the port says. Nothing is begun for it."""
        address, presence = str(Address(self._operations.public)), self._presence
        if presence is None:
            return told_off(address, await asyncio.to_thread(self._why_not))
        peers = len({each.peer for each in presence.node.connections()})
        found = judged(await presence.node.status(), presence.relaying.aid)
        return told_on(address, self._since, peers, found, time.time())

    async def contacts(self) -> dict[str, Any]:
        """As the port says. Nothing is begun for it."""
        peers = await asyncio.to_thread(self._operations.access.peers)
        connected = [] if self._presence is None else {each.peer for each in self._presence.node.connections()}
        return {"admitted": [peer.key for peer in peers if peer.scopes], "connected": sorted(connected)}

    def _why_not(self) -> TetherError | None:
        """None: there was no reason to be there."""
        try:
            self.check_possible()
        except TetherError as error:
            return error
        return self._problem if self._may_serve() else NotWriterError("another manager of this lab speaks with other labs")

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
        if is_new or isinstance(kept.model(name).error, FINAL):
            kept.try_again(name)
        await asyncio.to_thread(self._operations.repository.touch)  # so that followers in step have it soon
        state = await _settled(kept, name, min(wait, _MOST_WAIT))
        error = state.error
        if is_new and isinstance(error, RequestError):
            await self.release(key, name)  # which forgets why, too
            raise error
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
        await asyncio.to_thread(self._operations.repository.touch)
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
        if state.is_done or isinstance(state.error, FINAL) or left <= 0:
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
