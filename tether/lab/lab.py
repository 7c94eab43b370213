"""The composition root: `Lab`, and the two ways to one: `up()` starts it, `connect()` finds it."""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Concatenate, Final, Literal, ParamSpec, Self, TypeVar
from urllib.parse import urlsplit

from tether._version import __version__
from tether.client.http import HttpClient
from tether.client.lab_client import LabClient
from tether.config import DataFolder
from tether.errors import LabRunningError, NoLabError, TetherError, UnsupportedError
from tether.lab import loop
from tether.lab.bars import bar
from tether.lab.cards import gpu_count, worker_counts
from tether.lab.launch import Running, UpSettings, launch, running, settled
from tether.lab.operations import Operations
from tether.lab.replicating import OnReplica, Replica
from tether.lab.views import Models, Peers, Workers
from tether.routing.lab_events import LabEvent
from tether.security.addresses import SCHEME

__all__ = ["Lab", "connect", "up"]

KEY_ENV: Final = "TETHER_API_KEY"

P = ParamSpec("P")
T = TypeVar("T")
_Call = Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]]


def _waiting(call: _Call[P, T]) -> Callable[Concatenate[Lab, P], T]:
    """The sync form: same parameters, same documentation, waits."""

    @functools.wraps(call)
    def method(self: Lab, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return loop.run(call(self.operations, *args, **kwargs))

    return method


def _awaited(call: _Call[P, T]) -> Callable[Concatenate[Lab, P], Coroutine[Any, Any, T]]:
    """The `a…` form: to be awaited in any event loop."""

    @functools.wraps(call)
    async def method(self: Lab, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await loop.run_async(call(self.operations, *args, **kwargs))

    method.__name__ = method.__qualname__ = f"a{call.__name__}"
    return method


class Lab:
    """A lab: publish models, run them, look after them. Made by `tether.up()` and `tether.connect()`.

    A context manager, in `with` and in `async with`. Every call has an `a…` form to await. Leaving it closes the connections, and ends
    the lab if this object started it.
    """

    def __init__(self, client: LabClient | None, running: Running | None = None) -> None:
        """`running` is a lab that this object is to end with itself; None: somebody else's. No `client`: it has no gateway."""
        self._url = None if client is None else client.url
        self.operations = Operations(client)
        """The calls themselves, for one who builds on this: coroutines of the background loop."""
        self._running = running
        self._process = os.getpid()
        self._closed = False
        _remember(self)

    publish = _waiting(Operations.publish)
    apublish = _awaited(Operations.publish)
    infer = _waiting(Operations.infer)
    ainfer = _awaited(Operations.infer)
    version = _waiting(Operations.version)
    aversion = _awaited(Operations.version)
    example = _waiting(Operations.example)
    aexample = _awaited(Operations.example)
    alias = _waiting(Operations.alias)
    aalias = _awaited(Operations.alias)
    rollback = _waiting(Operations.rollback)
    arollback = _awaited(Operations.rollback)
    serve = _waiting(Operations.serve)
    aserve = _awaited(Operations.serve)
    explain = _waiting(Operations.explain)
    aexplain = _awaited(Operations.explain)
    reset_serving = _waiting(Operations.reset_serving)
    areset_serving = _awaited(Operations.reset_serving)
    rollout = _waiting(Operations.rollout)
    arollout = _awaited(Operations.rollout)
    abort_rollout = _waiting(Operations.abort_rollout)
    aabort_rollout = _awaited(Operations.abort_rollout)
    drain = _waiting(Operations.drain)
    adrain = _awaited(Operations.drain)
    undrain = _waiting(Operations.undrain)
    aundrain = _awaited(Operations.undrain)
    restart = _waiting(Operations.restart)
    arestart = _awaited(Operations.restart)
    verify = _waiting(Operations.verify)
    averify = _awaited(Operations.verify)
    diff = _waiting(Operations.diff)
    adiff = _awaited(Operations.diff)
    delete = _waiting(Operations.delete)
    adelete = _awaited(Operations.delete)
    repair = _waiting(Operations.repair)
    arepair = _awaited(Operations.repair)
    gc = _waiting(Operations.gc)
    agc = _awaited(Operations.gc)
    export = _waiting(Operations.export)
    aexport = _awaited(Operations.export)
    trust = _waiting(Operations.trust)
    atrust = _awaited(Operations.trust)
    allow = _waiting(Operations.allow)
    aallow = _awaited(Operations.allow)
    disallow = _waiting(Operations.disallow)
    adisallow = _awaited(Operations.disallow)
    accept = _waiting(Operations.accept)
    aaccept = _awaited(Operations.accept)
    areplicate = _awaited(Operations.replicate)
    areplicas = _awaited(Operations.replicas)
    join = _waiting(Operations.join)
    ajoin = _awaited(Operations.join)
    release = _waiting(Operations.release)
    arelease = _awaited(Operations.release)
    replicas = _waiting(Operations.replicas)
    policy = _waiting(Operations.policy)
    apolicy = _awaited(Operations.policy)
    policies = _waiting(Operations.policies)
    apolicies = _awaited(Operations.policies)
    hold = _waiting(Operations.hold)
    ahold = _awaited(Operations.hold)
    holdings = _waiting(Operations.holdings)
    aholdings = _awaited(Operations.holdings)
    end_holding = _waiting(Operations.end_holding)
    aend_holding = _awaited(Operations.end_holding)
    lend = _waiting(Operations.lend)
    alend = _awaited(Operations.lend)
    lendings = _waiting(Operations.lendings)
    alendings = _awaited(Operations.lendings)
    end_lending = _waiting(Operations.end_lending)
    aend_lending = _awaited(Operations.end_lending)
    borrowings = _waiting(Operations.borrowings)
    aborrowings = _awaited(Operations.borrowings)
    recent_events = _waiting(Operations.recent_events)
    arecent_events = _awaited(Operations.recent_events)
    copies = _waiting(Operations.copies)
    acopies = _awaited(Operations.copies)
    rotate = _waiting(Operations.rotate)
    arotate = _awaited(Operations.rotate)
    invite = _waiting(Operations.invite)
    ainvite = _awaited(Operations.invite)
    invitations = _waiting(Operations.invitations)
    ainvitations = _awaited(Operations.invitations)
    revoke_invitation = _waiting(Operations.revoke_invitation)
    arevoke_invitation = _awaited(Operations.revoke_invitation)
    ban = _waiting(Operations.ban)
    aban = _awaited(Operations.ban)
    unban = _waiting(Operations.unban)
    aunban = _awaited(Operations.unban)
    name_peer = _waiting(Operations.name_peer)
    aname_peer = _awaited(Operations.name_peer)
    audit = _waiting(Operations.audit)
    aaudit = _awaited(Operations.audit)
    status = _waiting(Operations.status)
    astatus = _awaited(Operations.status)
    amodels = _awaited(Operations.models)
    aworkers = _awaited(Operations.workers)
    apeers = _awaited(Operations.peers)
    aaddress = _awaited(Operations.address)

    @property
    def gateway(self) -> str | None:
        """Where its gateway answers; None: it has none, or was reached over the swarm."""
        return None if self._url is None or self._url.startswith(SCHEME) else self._url

    def replicate(
        self,
        model: str,
        source: str | None = None,
        *,
        via: str | None = None,
        timeout: float | None = None,
        progress: OnReplica | None = None,
    ) -> Replica:
        with bar(model) if progress is None else nullcontext(progress) as told:
            return loop.run(self.operations.replicate(model, source, via=via, timeout=timeout, progress=told))

    replicate.__doc__ = Operations.replicate.__doc__

    def stream(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        outputs: str | Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """As `infer`, part by part while the model makes them: leave the loop to stop it.

            for words in lab.stream("writer", {"prompt": ["Once upon"]}):
                print(words[0].decode(), end="")

        Of a model that answers at once, its answer. `timeout`: seconds for all of it; without, a minute for each part. To await: `astream`.

        Raises: as `infer`; WorkerLostError: the worker went away in the middle; UnsupportedError: of a lab reached over the swarm.
        """
        return loop.each(self.operations.stream(model, inputs, version=version, outputs=outputs, timeout=timeout))

    def astream(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        outputs: str | Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Any]:
        """As `stream`, for `async for`."""
        return loop.each_async(self.operations.stream(model, inputs, version=version, outputs=outputs, timeout=timeout))

    def events(self, after: int | None = None) -> Iterator[LabEvent]:
        """What happens in the lab from now on, or from `after`, the `seq` of an event, on: leave the loop to end it.

            for event in lab.events():
                print(event)                    # version-published digits:2

        It goes on past restarts of the gateway and lost connections; what can't be told then is said by an event `missed`. Of a lab
        elsewhere, what happens to models that its scope `events` shows. To await: `aevents()`; what happened lately: `recent_events()`.

        Raises: ServiceUnavailableError: the lab has not answered for a minute; ForbiddenError.
        """
        return loop.each(self.operations.watch(after))

    def aevents(self, after: int | None = None) -> AsyncIterator[LabEvent]:
        """As `events`, for `async for`."""
        return loop.each_async(self.operations.watch(after))

    @property
    def models(self) -> Models:
        """Name → model, live: each look asks the lab. To await: `amodels()`."""
        return Models(self.operations)

    @property
    def workers(self) -> Workers:
        """Name → worker, live. To await: `aworkers()`."""
        return Workers(self.operations)

    @property
    def peers(self) -> Peers:
        """Key → peer, live: who was let in, and how they are connected. To await: `apeers()`."""
        return Peers(self.operations)

    @property
    def address(self) -> str:
        """`tether://…`: how other labs find this one; it admits nobody, `invite` does. To await: `aaddress()`."""
        return loop.run(self.operations.address())

    def close(self) -> None:
        """Close the connections; end the lab if this object started it. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        try:
            loop.run(self.operations.aclose())
        finally:
            if self._running is not None and self._process == os.getpid():  # a fork's copy does not own the lab
                self._running.stop()

    async def aclose(self) -> None:
        """As `close`."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Lab at {self._url or 'no gateway'}{' (closed)' if self._closed else ''}>"

    def _repr_html_(self) -> str:
        """Deterministic: the address is left out."""
        if self._closed:
            return "<p>A lab, closed</p>"
        try:
            return f"<p>A lab</p>{self.models._repr_html_()}"
        except TetherError:
            return "<p>A lab, not answering</p>"


_open: set[Lab] = set()
"""Labs that nobody has closed: they are closed when Python ends, so that none outlives the notebook that started it."""


def _remember(lab: Lab) -> None:
    if not _open:
        atexit.unregister(_close_all)
        atexit.register(_close_all)
    _open.add(lab)


def _close_all() -> None:
    for lab in tuple(_open):
        lab.close()


def up(  # noqa: PLR0913 (all that can be said of a lab)
    workers: int | tuple[int, int] | None = None,
    gateway: bool = True,
    *,
    data: str | os.PathLike[str] | None = None,
    port: int | None = None,
    gpus: int | Literal["auto"] = 0,
    pretend_gpus: bool = False,
    region: str | None = None,
    labels: Sequence[str] = (),
    swarm: bool = True,
    bootstrap: str | None = None,
    relay: bool = False,
    relay_through: str | None = None,
) -> Lab:
    """Start a lab on this machine: scheduler, workers, model manager and gateway. It ends with this process, or when it is closed.

    Where a lab already runs on the data folder (`data`, else `TETHER_HOME`, else the platform's), or is being started there, it attaches to
    that one and says so. `workers`: two, or one for each GPU, if not said; `(1, 4)`: from one to four, as requests need. `gpus="auto"`: all
    of this machine that this process may use.
    `region`: where the lab is, as other labs are told ("eu-west"), from now on; `TETHER_REGION` says it, too. `labels`: what its workers
    have, as "gpu=a100", for models that need it. `swarm=False`: no other lab is spoken with; `bootstrap`: nodes by which the swarm is
    entered, `host:port,…`, in place of those of `TETHER_BOOTSTRAP`, else Hyperswarm's public ones. `relay=True`: labs that this one knows
    may go through it where they can't reach each other, which is of use where the address is public; `relay_through`: address of a lab
    that does that, in place of `TETHER_RELAY_THROUGH`, else of those known here that say that they relay.

    Raises: PortBusyError: `port` was asked for and is taken; StartFailedError: a service did not come up; ConfigError.
    """
    folder, count = DataFolder.locate(data), gpu_count(gpus)
    fewest, most = worker_counts(workers, count)
    settings = UpSettings(
        folder,
        workers=fewest,
        most_workers=most,
        gateway=gateway,
        port=port,
        gpus=count,
        pretend_gpus=pretend_gpus,
        region=region,
        labels=labels,
        swarm=swarm,
        bootstrap=bootstrap,
        relay=relay,
        relay_through=relay_through,
    )
    while (found := running(folder)) is None:
        try:
            return _started(settings)
        except LabRunningError:
            if not settled(folder):  # another start came first: wait for its lab, or try again where it failed
                raise
    return _attached(found)


def _attached(found: Running) -> Lab:
    _check_version(found)
    where = f" at {found.gateway}" if found.gateway else ""
    print(f"A lab already runs on {found.data.root}: attached to it{where}. Closing this does not stop it.")  # noqa: T201 (says so)
    return Lab(_client(found))


def _started(settings: UpSettings) -> Lab:
    started = launch(settings, bound=True)
    for note in started.notes:
        print(note)  # noqa: T201 (a port that was not the usual one: the user must know)
    return Lab(_client(started), started)


def _client(lab: Running) -> HttpClient | None:
    return HttpClient(lab.gateway, lab.api_key) if lab.gateway else None


def _check_version(lab: Running) -> None:
    if lab.version != __version__:
        raise LabRunningError(
            f"a lab of Tether {lab.version} runs on {lab.data.root}, this is {__version__}; "
            "stop it with `tether down`, or choose another data folder"
        )


def connect(
    url: str | None = None,
    api_key: str | None = None,
    *,
    data: str | os.PathLike[str] | None = None,
    bootstrap: str | None = None,
) -> Lab:
    """A lab that runs already. Without `url` the one of the data folder; `http(s)://host:port` is a gateway anywhere.

    `tether://<address>` is a lab anywhere in the swarm, reached with the identity of the data folder: by the manager of the lab that runs
    there, else by one that is started for this, which enters the swarm by `bootstrap` (see `up`). An invitation,
    `tether://<address>#<secret>`, lets this identity in; then the address is enough.

    The key: `api_key`, else `TETHER_API_KEY`, else, for the lab of the data folder, the one that it wrote at its first start.

    Raises: NoLabError: none runs here; ServiceUnavailableError: nothing answers at `url`; UnsupportedError: another kind of address;
        PeerNotFoundError, PeerUnreachableError: nobody is at the address, or can be reached there; BadInvitationError, ForbiddenError;
        ConfigError.
    """
    folder = DataFolder.locate(data)
    lab = Lab(_client_for(url, api_key, folder, bootstrap))
    try:
        loop.run(lab.operations.client.live())
    except BaseException:
        lab.close()
        raise
    return lab


def _client_for(url: str | None, api_key: str | None, folder: DataFolder, bootstrap: str | None) -> LabClient:
    if url is not None:
        if _scheme(url) == "tether":
            from tether.client.peer import PeerClient  # the wire of the swarm: 30 ms, not for those who have a gateway

            return PeerClient(folder, url, bootstrap)
        return HttpClient(url, api_key or _key_for(url, running(folder)))
    return _local(folder, running(folder), api_key)


def _local(folder: DataFolder, found: Running | None, api_key: str | None) -> HttpClient:
    if found is None:
        raise NoLabError(
            f"no lab runs on {folder.root}; start one with `tether up` (in a notebook: tether.up()), or pass the url of a gateway"
        )
    if found.gateway is None:
        raise NoLabError(f"the lab on {folder.root} runs without a gateway; start it with one, or pass the url of a gateway")
    return HttpClient(found.gateway, api_key or os.environ.get(KEY_ENV) or found.api_key)


def _key_for(url: str, found: Running | None) -> str | None:
    """The environment's key; or the local lab's, where `url` is its gateway and nobody else's: a key goes to its own lab only."""
    local = found is not None and (found.gateway or "").rstrip("/") == url.rstrip("/")
    return os.environ.get(KEY_ENV) or (found.api_key if found is not None and local else None)


def _scheme(url: str) -> str:
    """Raises: UnsupportedError: nothing that one can connect to."""
    scheme = urlsplit(url).scheme
    if scheme == "tls":
        raise UnsupportedError(
            "tls:// addresses (joining a cluster as a member) come in a later version; use the http(s):// address of a gateway"
        )
    if scheme not in {"http", "https", "tether"}:
        raise UnsupportedError(f"{url.partition('#')[0]!r} is no address of a lab; use http://host:port, https://host:port or tether://…")
    return scheme
