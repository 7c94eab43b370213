"""The user's own manager on this machine, over its door: found, or started where none runs, and found again when it was another's turn."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import orjson

from tether.client.forking import abandon
from tether.client.starting import start_manager
from tether.config import DataFolder
from tether.errors import DeadlineExceededError, ManagerLeavingError, RemoteError, ServiceUnavailableError, StreamLostError, TetherError
from tether.manager.locks import is_locked
from tether.swarm.rpc.rpc import Outgoing, RpcConnection, RpcLimits
from tether.swarm.wire.local import THIS_USER, connect

__all__ = ["OwnManager", "dismiss"]

_PATIENCE: Final = 40.0
"""Seconds until one has to answer: before it begins, another one may take ten to end."""
_LAB_PATIENCE: Final = 60.0
"""Seconds, where a lab starts on the folder, or starts its manager again."""
_HELLO: Final = 5.0
"""Seconds for the first answer of a manager that listens."""
_AGAIN: Final = 0.1
"""Seconds between looks for a manager that somebody else starts."""
_TRIES: Final = 5
"""Managers that may leave one after the other before a call is given up."""
_LIMITS: Final = RpcLimits(max_whole_nbytes=RpcLimits().max_reply_nbytes)
"""Answers are the user's own, and end here: arrays of a model's outputs."""


class OwnManager:
    """Of one data folder. Belongs to the event loop of the call that it is used by; in another one it connects anew."""

    def __init__(self, folder: DataFolder, bootstrap: str | None = None) -> None:
        """Nothing is opened or started before the first call. `bootstrap`: for a manager that is started for this."""
        self._folder, self._bootstrap = folder, bootstrap
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = asyncio.Lock()
        self._connection: RpcConnection | None = None
        self._ending: set[RpcConnection] = set()
        """To managers that take no more calls, and still work on some."""

    async def request(self, method: str, value: bytes | Outgoing = b"", timeout: float | None = None) -> bytes:  # noqa: ASYNC109 (it also goes to the manager)
        """What a method of the door (manager/peering/door.py) answers. A call that was made is not repeated: it may have been heard.
        `value` lies in memory, whole or in parts.

        Raises: what it answers; ServiceUnavailableError: none answers; StreamLostError: it ended meanwhile; StartFailedError;
        DeadlineExceededError.
        """
        for _ in range(_TRIES):
            connection = await self._connected()
            try:
                return await connection.request(method, value, timeout)
            except ManagerLeavingError:
                self._part(connection)  # it did nothing, and the next one is another
            except ServiceUnavailableError as error:
                if not connection.is_closed:
                    raise
                message = f"the manager of {self._folder.root} ended while it worked on {method}; call again (its log: {self._log})"
                raise StreamLostError(message, "ECONNRESET") from error
        raise ServiceUnavailableError(f"one manager after another leaves {self._folder.root}: see {self._log}")

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """An operation of the manager (`models`, `invite` …), with JSON values both ways. Raises: what it raises, and as `request`."""
        return orjson.loads(await self.request(f"own/{operation}", orjson.dumps(arguments)))

    async def aclose(self) -> None:
        """Close the connection; a second call does nothing. The manager ends by itself, a while after its last client."""
        connections = self._forgotten()
        if self._loop is asyncio.get_running_loop():
            await asyncio.gather(*(each.aclose() for each in connections))
        else:
            for each in connections:
                abandon(each)

    @property
    def _log(self) -> str:
        return str(self._folder.logs / "manager.log")

    def _part(self, connection: RpcConnection) -> None:
        """Ask nothing more on it. Calls that the manager still works on are answered; then it closes the connection itself."""
        if connection is self._connection:
            self._connection = None
        self._ending = {each for each in (*self._ending, connection) if each.in_flight}
        if not connection.in_flight:
            connection.destroy()

    def _forgotten(self) -> list[RpcConnection]:
        """All connections, which are none of this one's any more."""
        connections = [*self._ending] if self._connection is None else [*self._ending, self._connection]
        self._ending, self._connection = set(), None
        return connections

    async def _connected(self) -> RpcConnection:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            for each in self._forgotten():
                abandon(each)  # after a fork, or in a second loop: the old connections are another's
            self._loop, self._opening = loop, asyncio.Lock()
        async with self._opening:
            if self._connection is None or self._connection.is_closed:
                self._connection = await self._opened()
            return self._connection

    async def _opened(self) -> RpcConnection:
        await asyncio.to_thread(self._folder.create)
        clock = asyncio.get_running_loop().time
        begun = clock()
        while True:
            patience = _LAB_PATIENCE if is_locked(self._folder.lab_lock) else _PATIENCE
            try:
                return (await _greeted(self._folder))[0]
            except ServiceUnavailableError as error:
                if clock() > begun + patience:
                    raise self._silence(error) from error
            if not await asyncio.to_thread(start_manager, self._folder, begun + patience - clock(), self._bootstrap):
                await asyncio.sleep(_AGAIN)

    def _silence(self, error: ServiceUnavailableError) -> ServiceUnavailableError:
        lock = self._folder.store / "writer.lock"
        if is_locked(lock) and not is_locked(self._folder.lab_lock):
            holder = lock.read_text(errors="replace").strip() or "unknown"
            return ServiceUnavailableError(
                f"process {holder} writes the store of {self._folder.root} and is no manager: end it, or wait for it"
            )
        return ServiceUnavailableError(f"no manager answers for {self._folder.root} ({error}): see {self._log}")


async def _greeted(folder: DataFolder) -> tuple[RpcConnection, dict[str, Any]]:
    """A connection on which the manager has answered, and what it said of itself: one that ends just now takes nobody any more.

    Raises: ServiceUnavailableError: none answers.
    """
    connection = RpcConnection(await connect(folder.door), THIS_USER, limits=_LIMITS)
    try:
        hello = orjson.loads(await connection.request("door/hello", b"", _HELLO))
    except BaseException as error:
        connection.destroy()
        if isinstance(error, DeadlineExceededError | ManagerLeavingError):
            raise ServiceUnavailableError(f"the manager listens and does not answer ({error})") from error
        raise
    if not isinstance(hello, dict):
        connection.destroy()
        raise RemoteError("what listens at the door of the manager is none; do its version and this one differ?")
    return connection, hello


async def dismiss(folder: DataFolder, patience: float) -> None:
    """Ask a manager that is alone on this folder to leave, and wait until it has; `patience` seconds at most, and for no other one.

    Whoever calls this holds the lab's lock, so that no new one begins.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + patience
    while is_locked(folder.store / "writer.lock") and clock() < deadline:
        try:
            connection, hello = await _greeted(folder)
            if not hello.get("alone"):
                connection.destroy()
                return
            await connection.request("door/leave", b"", _HELLO)
            await connection.aclose()
        except TetherError:
            pass  # it is on its way out, or has not opened its door yet and will see the lab's lock
        await asyncio.sleep(_AGAIN)
