"""One try at a time for each key, however many wait for what it brings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from tether.errors import InternalError, TetherError

__all__ = ["Flights"]

Value = TypeVar("Value")


class _Flight(Generic[Value]):
    """A try, and those who wait for it."""

    def __init__(self, task: asyncio.Task[Value]) -> None:
        self.task = task
        self.landed: asyncio.Future[Value] = task.get_loop().create_future()


class Flights(Generic[Value]):
    """Belongs to one loop."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight[Value]] = {}

    def __len__(self) -> int:
        """How many have not brought anything yet."""
        return sum(not flight.task.done() for flight in self._flights.values())

    async def get(self, key: str, begin: Callable[[str], Coroutine[Any, Any, Value]]) -> Value:
        """What `begin` brings for the key; who comes while it is on its way waits with the others.

        It goes on when those who wait are cancelled: who asks next has it sooner. Raises: what `begin` does, to each a new one.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(begin(key), name=f"swarm-connect-{key[:8]}"))
            flight.task.add_done_callback(lambda task: self._done(key, flight, task))
        try:
            return await asyncio.shield(flight.landed)
        except TetherError as error:
            raise type(error)(*error.args) from error

    def land(self, key: str, value: Value) -> None:
        """It came another way."""
        flight = self._flights.pop(key, None)
        if flight is not None:
            flight.landed.set_result(value)
            flight.task.cancel()

    def abort(self, key: str, error: TetherError) -> None:
        """It is not wanted any more; those who wait are told."""
        flight = self._flights.pop(key, None)
        if flight is not None:
            _fail(flight.landed, error)
            flight.task.cancel()

    def abort_all(self, error: TetherError) -> None:
        """None of them is."""
        for key in list(self._flights):
            self.abort(key, error)

    def _done(self, key: str, flight: _Flight[Value], task: asyncio.Task[Value]) -> None:
        if flight.landed.done():
            return  # it came another way, or was given up
        del self._flights[key]
        if task.cancelled():
            flight.landed.cancel()
            return
        error = task.exception()
        if error is None:
            flight.landed.set_result(task.result())
        else:
            _fail(flight.landed, error if isinstance(error, TetherError) else InternalError(f"connecting failed: {error!r}"))


def _fail(landed: asyncio.Future[Any], error: TetherError) -> None:
    landed.set_exception(error)
    landed.exception()  # perhaps nobody waits any more
