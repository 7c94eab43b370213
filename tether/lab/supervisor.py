"""The supervisor: starts a lab's services on one machine, restarts what dies, ends them in order, leaves no orphan.

It holds the gateway's listening socket, so that connections wait in its queue while a gateway is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from tether._version import __version__
from tether.config import CARDS_ENV, GATEWAY_PORT, MANAGER_PORT, ORCHESTRATOR_PORT, DataFolder, bootstrap_nodes, lab_region, worker_ports
from tether.errors import ConfigError, LabRunningError, StartFailedError
from tether.lab.cards import check_cards, machine_cards, share
from tether.lab.nursery import Nursery
from tether.lab.ports import CHOOSING, PortPicker, bind_exactly, claimed
from tether.lab.processes import Process, ServiceSpec
from tether.lab.scaling import scaled
from tether.manager.locks import is_locked
from tether.manager.settings import relay_keys
from tether.security.addresses import Address
from tether.security.identity import Identity
from tether.security.keys import ensure_api_key
from tether.security.tls import ROLES, ensure_tls
from tether.telemetry.service import Life

__all__ = ["LAB_FILE", "LOCK_FILE", "START_TIMEOUT", "UpSettings", "supervise"]

LAB_FILE = "lab.json"
LOCK_FILE = "lab.lock"
START_TIMEOUT = 60.0
"""Seconds for all services to answer, the wait for another lab that starts included."""
_LOCK_PATIENCE = 0.5
"""Seconds to ask for the lock again: who only looks whether a lab runs holds it for a moment too."""
_DISMISSAL = 15.0
"""Seconds for a manager that serves this user's notebooks without a lab to finish its calls and go."""
_POLL = 0.02
_STOP_GRACE = 10.0
_STOP_ORDER = ("gateway", "worker", "manager", "orchestrator")
"""The door first, then who works behind it: nothing accepted is dropped for want of a worker."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UpSettings:
    """What `tether up` was asked for."""

    data: DataFolder
    workers: int = 2
    gateway: bool = True
    port: int | None = None
    """None: the seed port or the next free one; a number: that one or an error."""
    gpus: int = 0
    pretend_gpus: bool = False
    host: str = "127.0.0.1"
    region: str | None = None
    """Where the lab is, which is remembered; None: as `TETHER_REGION` says, else as it was said last."""
    swarm: bool = True
    """Whether other labs may be spoken with, once there is a reason to."""
    bootstrap: str | None = None
    """Nodes by which the swarm is entered, `host:port,…`; None: as `TETHER_BOOTSTRAP` says, else Hyperswarm's public ones."""
    relay: bool = False
    """Whether labs that this one knows may go through it to each other."""
    relay_through: str | None = None
    """Labs to go through where no direct way is found, by address; None: as `TETHER_RELAY_THROUGH` says, else known ones that relay."""
    labels: Sequence[str] = ()
    """Of its workers, as `gpu=a100`, for models that need them."""
    most_workers: int | None = None
    """That there may be: `workers` are the fewest then, and requests make it more. None: no more than those."""

    @property
    def most(self) -> int:
        """Workers that this machine is shared by, when all are there."""
        return self.workers if self.most_workers is None else self.most_workers


@contextmanager
def _only_lab(data: DataFolder) -> Iterator[None]:
    """Raises: LabRunningError: another supervisor has this data folder."""
    path = data.run / LOCK_FILE
    with path.open("a+") as file:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while not _locked(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                raise LabRunningError(
                    f"a lab already runs on {data.root} (pid {file.read().strip() or 'unknown'}); "
                    "use it (`tether status`), end it (`tether down`), or choose another folder with --data"
                )
            time.sleep(_POLL)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def _alone_with_ports(data: DataFolder) -> AsyncIterator[None]:
    """Between looking for free ports and their services holding them no other lab of this user looks."""
    while (claim := claimed(CHOOSING, data.runtime.parent)) is None:  # noqa: ASYNC110 (nothing says when another process lets go)
        await asyncio.sleep(_POLL)
    try:
        yield
    finally:
        os.close(claim)


class Supervisor:
    """One lab on this machine."""

    def __init__(self, settings: UpSettings) -> None:
        self._settings, self._data = settings, settings.data
        self._picker = PortPicker(settings.host, settings.data.runtime.parent)
        self._nursery = Nursery(settings.data.logs / "supervisor.log", settings.data.root)
        self._processes: list[Process] = []
        self._resting: list[ServiceSpec] = []
        """Workers that may be added."""
        self._started = time.time()
        self._gateway: socket.socket | None = None
        self._address: str | None = None
        """By which other labs find this one."""
        self._complete = self._ending = False
        lifeline, self._hold = os.pipe()
        self._lifeline = lifeline

    @property
    def url(self) -> str | None:
        """Where the gateway answers."""
        if self._gateway is None:
            return None
        host, port = self._gateway.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def orchestrator(self) -> str:
        """Its address, once it answers."""
        return str(next(process.facts["address"] for process in self._processes if process.spec.role == "orchestrator"))

    @property
    def notes(self) -> list[str]:
        """What differs from the default, for people."""
        return self._picker.notes

    async def start(self) -> None:
        """Start every service; returns when all answer.

        Raises: StartFailedError, PortBusyError, ConfigError.
        """
        self._nursery.open()
        for role in ROLES:
            ensure_tls(self._data.tls, role)
        ensure_api_key(self._data.api_key)
        self._address = str(Address(Identity.load_or_create(self._data.identity).public))
        specs = self._specs()
        self._resting = [spec for spec in specs if spec.role == "worker"][self._settings.workers :]
        for spec in specs:
            if spec not in self._resting:
                self._begin(spec)
        async with asyncio.TaskGroup() as group:
            for process in self._processes:
                group.create_task(process.ready())
        self._complete = True
        self._write_state()

    def _begin(self, spec: ServiceSpec) -> None:
        process = Process(spec, self._data.logs / f"{spec.name}.log", self._lifeline, self._write_state, self._nursery)
        self._processes.append(process)
        process.start()

    def workers(self) -> dict[str, bool]:
        """Name of each worker that is kept, and whether it answers."""
        return {process.spec.name: process.state == "running" for process in self._processes if process.spec.role == "worker"}

    def add_workers(self, count: int) -> None:
        """Start so many more, as far as there are."""
        for spec in self._resting[: 0 if self._ending else max(count, 0)]:
            self._resting.remove(spec)
            self._begin(spec)

    async def end_workers(self, names: Collection[str]) -> None:
        """Have these take no more part, until they are added again."""
        going = [process for process in self._processes if process.spec.name in names]
        await asyncio.gather(*(process.stop(_STOP_GRACE) for process in going))
        self._processes = [process for process in self._processes if process not in going]
        self._resting += [process.spec for process in going]
        self._write_state()

    def lateness(self) -> StartFailedError:
        """Why it is not up yet: the first service that has not answered."""
        late = f"is not up after {START_TIMEOUT:g} s"
        for process in self._processes:
            if not process.answered:
                return process.failure(late)
        return StartFailedError(f"the lab {late}: another lab of this user is starting; try again when it is up")

    def _specs(self) -> list[ServiceSpec]:
        settings, root = self._settings, ["--data", str(self._data.root)]
        if settings.gateway:
            self._gateway = bind_exactly(settings.host, settings.port) if settings.port else self._picker.bind("gateway", GATEWAY_PORT)
        orchestrator = self._picker.free("orchestrator", ORCHESTRATOR_PORT)
        manager = self._picker.free("manager", MANAGER_PORT)
        address = f"tls://127.0.0.1:{orchestrator}"
        specs = [
            ServiceSpec("orchestrator", "orchestrator", ["orchestrator", *root, "--port", str(orchestrator)]),
            ServiceSpec("manager", "manager", ["manager", address, *root, "--port", str(manager), *self._swarm_options()]),
        ]
        for index, wished in enumerate(worker_ports(settings.most)):
            port = self._picker.free(f"worker-{index + 1}", wished)
            name = f"worker-{index + 1}"
            cards = share(self._cards(), index, settings.most)
            options = ["--name", name, "--port", str(port), "--gpus", str(len(cards))]
            options += ["--workers-here", str(settings.most), *self._site_options()]
            environ = {CARDS_ENV: "" if settings.pretend_gpus else ",".join(cards)} if machine_cards() else {}
            specs.append(ServiceSpec(name, "worker", ["worker", address, *root, *options], environ=environ))
        if self._gateway is not None:
            descriptor = self._gateway.fileno()
            specs.append(ServiceSpec("gateway", "gateway", ["gateway", address, *root, "--fd", str(descriptor)], (descriptor,)))
        return specs

    def _site_options(self) -> list[str]:
        """Of workers, for those who choose where models run."""
        region = [] if self._settings.region is None else ["--region", self._settings.region]
        return region + [option for label in self._settings.labels for option in ("--label", label)]

    def _swarm_options(self) -> list[str]:
        """For the manager: whom it may speak with, where it says that the lab is, and which gateway runs models for others."""
        settings = self._settings
        options = ["--gateway", self.url] if self.url else []
        options += [] if settings.region is None else ["--region", settings.region]
        if not settings.swarm:
            return [*options, "--no-swarm"]
        options += ["--relay"] if settings.relay else []
        options += ["--relay-through", settings.relay_through] if settings.relay_through else []
        return [*options, "--bootstrap", settings.bootstrap] if settings.bootstrap else options

    def _cards(self) -> list[str]:
        """Those of the lab, by their names; by numbers where they are pretended."""
        gpus = self._settings.gpus
        return list(map(str, range(gpus))) if self._settings.pretend_gpus else machine_cards()[:gpus]

    async def stop(self) -> None:
        """End the services in order, each within its time, whatever one of them does; then nothing of theirs is left but the data."""
        self._ending = True
        self._nursery.close()
        for role in _STOP_ORDER:
            ending = [process.stop(_STOP_GRACE) for process in self._processes if process.spec.role == role]
            for error in await asyncio.gather(*ending, return_exceptions=True):
                if error is not None:
                    _log.error("a %s could not be stopped", role, exc_info=error)
        if self._gateway is not None:
            self._gateway.close()
        self._picker.close()
        os.close(self._hold)
        os.close(self._lifeline)
        _forget(self._data)
        shutil.rmtree(self._data.runtime, ignore_errors=True)

    def description(self) -> dict[str, Any]:
        """The file that `tether status` and `tether.up()` read; its services are those of DESIGN.md §7."""
        return {
            "address": self._address,
            "gateway": self.url,
            "data": str(self._data.root),
            "pid": os.getpid(),
            "version": __version__,
            "started": self._started,
            "ready": self._complete,
            "notes": self.notes,
            "services": [
                {
                    "name": process.spec.name,
                    "role": process.spec.role,
                    "pid": process.pid,
                    "address": self.url if process.spec.role == "gateway" else process.facts.get("address", ""),
                    "state": process.state,
                    "since": process.since,
                    "restarts": process.restarts,
                    "error": process.error,
                }
                for process in self._processes
            ],
        }

    def _write_state(self) -> None:
        if self._ending:
            return
        path = self._data.run / LAB_FILE
        partial = path.with_name(f"{LAB_FILE}.{secrets.token_hex(4)}.partial")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            partial.write_text(json.dumps(self.description(), indent=1))
            partial.replace(path)
        except OSError as error:  # what `tether status` shows is old then; the services are looked after all the same
            _log.warning("the state of the lab can't be written to %s (%s)", path, error.strerror)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _forget(data: DataFolder) -> None:
    with contextlib.suppress(OSError):
        (data.run / LAB_FILE).unlink(missing_ok=True)


async def _start_alone(supervisor: Supervisor, data: DataFolder) -> None:
    """Raises: what `Supervisor.start` raises; StartFailedError: it takes too long."""
    if is_locked(data.store / "writer.lock"):
        from tether.client.own_manager import dismiss  # the wire of the swarm: 30 ms that a start on a free folder need not pay

        await dismiss(data, _DISMISSAL)
    try:
        async with asyncio.timeout(START_TIMEOUT), _alone_with_ports(data):
            await supervisor.start()
    except TimeoutError:
        raise supervisor.lateness() from None


async def _live(settings: UpSettings, announce: Any) -> None:
    life = Life()
    life.watch()
    supervisor = Supervisor(settings)
    try:
        ended = asyncio.ensure_future(life.ended())
        starting = asyncio.ensure_future(_start_alone(supervisor, settings.data))
        await asyncio.wait([ended, starting], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return
        _raise_first(starting)
        announce(supervisor)
        life.ready(**supervisor.description())
        async with scaled(supervisor, settings.data, supervisor.orchestrator, settings.workers, settings.most_workers):
            await ended
    finally:
        await supervisor.stop()


def _raise_first(starting: asyncio.Future[None]) -> None:
    """One plain error instead of a group: the first service that did not start is the reason for the others."""
    try:
        starting.result()
    except BaseExceptionGroup as group:
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        raise leaf from None


def supervise(settings: UpSettings, announce: Any = lambda _supervisor: None) -> int:
    """Run a lab in this process until SIGTERM, SIGINT or the end of its lifeline. `announce` is called once everything answers.

    Raises: LabRunningError, PortBusyError, StartFailedError, ConfigError.
    """
    settings.data.create()
    _check(settings)
    with _only_lab(settings.data):
        _forget(settings.data)  # of a supervisor that was killed
        asyncio.run(_live(settings, announce))
    return 0


def _check(settings: UpSettings) -> None:
    bootstrap_nodes(settings.bootstrap)
    relay_keys(settings.relay_through)
    lab_region(settings.region or "")
    if settings.workers < 0:
        raise ConfigError(f"{settings.workers} workers: give a number from 0 on; with 0, only workers that other labs lend run models")
    if settings.most < max(settings.workers, 1 if settings.most_workers is not None else 0):
        raise ConfigError(f"{settings.workers} to {settings.most} workers: give the fewest first, as 1..4")
    if not settings.pretend_gpus:
        check_cards(settings.gpus, settings.most)
