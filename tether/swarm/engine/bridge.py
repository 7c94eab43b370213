"""The border with JavaScript: shared memory, calls across it, timers. `js/bridge.js` has the same layout and says why it is so.

Nothing crosses: a call takes no argument and returns nothing; its arguments lie in the control block, its bytes in a ring.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import structlog

from tether.errors import (
    EngineClosedError,
    EngineError,
    PayloadTooLargeError,
    PeerNotFoundError,
    PeerUnreachableError,
    TetherError,
)

__all__ = ["FAILED", "MAX_NBYTES", "OK", "Bridge", "Memory", "error_of"]

log = structlog.get_logger("tether.swarm")

OK = 0
FAILED = 1
MAX_NBYTES = (16 << 20) + (64 << 10)
"""What a ring holds: one frame of a secret stream and what stands round it."""

_CONTROL_NBYTES = 256
_CLOCK = slice(256, 264)
_INBOX_AT = 4096

_UNREACHABLE = frozenset(
    {
        "PEER_CONNECTION_FAILED",
        "BAD_HANDSHAKE_REPLY",
        "BAD_HOLEPUNCH_REPLY",
        "CANNOT_HOLEPUNCH",
        "HANDSHAKE_INVALID",
        "HANDSHAKE_UNFINISHED",
        "HOLEPUNCH_ABORTED",
        "HOLEPUNCH_DOUBLE_RANDOMIZED_NATS",
        "HOLEPUNCH_INVALID",
        "HOLEPUNCH_PROBE_TIMEOUT",
        "REMOTE_ABORTED",
        "REMOTE_NOT_HOLEPUNCHABLE",
        "REMOTE_NOT_HOLEPUNCHING",
        "RELAY_ABORTED",
        "REQUEST_TIMEOUT",
        "SERVER_ERROR",
        "SERVER_INCOMPATIBLE",
    }
)
"""hyperdht's words for a peer that was found, or announced once, and with which no stream came about."""
_CLOSED = frozenset({"NODE_DESTROYED", "REQUEST_DESTROYED", "SUSPENDED", "IO_SUSPENDED"})


class Memory:
    """What both sides see. The JavaScript side allocated it: memory of Python's would leak each time it crossed."""

    __slots__ = ("clock", "control", "inbox", "outbox", "whole")

    def __init__(self, whole: memoryview) -> None:
        self.whole = whole
        self.control = whole[:_CONTROL_NBYTES].cast("I")
        self.clock = whole[_CLOCK].cast("d")
        """Milliseconds of a monotonic clock: what JavaScript's timers go by."""
        self.inbox = whole[_INBOX_AT : _INBOX_AT + MAX_NBYTES]
        """Python to JavaScript."""
        self.outbox = whole[_INBOX_AT + MAX_NBYTES : _INBOX_AT + 2 * MAX_NBYTES]
        """JavaScript to Python."""

    def put_text(self, text: str) -> int:
        """Into the inbox; its length in bytes."""
        encoded = text.encode()
        self.inbox[: len(encoded)] = encoded
        return len(encoded)


class Bridge:
    """Calls methods of the bundle and runs its timers. Belongs to one thread; one event loop at a time."""

    def __init__(self) -> None:
        self.memory = Memory(memoryview(bytearray(_INBOX_AT + 2 * MAX_NBYTES)))
        self._entries: Mapping[str, Callable[[], None]] = {}
        self._methods: dict[str, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._wake_at: float | None = None
        self._calls = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    def functions(self) -> dict[str, Callable[[], None]]:
        """What JavaScript calls here."""
        return {"complete": self._complete, "log": self._log, "wake": self._wake}

    def share(self, memory: Memory) -> None:
        """The bundle allocated its memory, and may call from now on."""
        self.memory = memory
        memory.clock[0] = self.now()

    def attach(self, entries: Mapping[str, Callable[[], None]], methods: list[str]) -> None:
        """The bundle is loaded: its functions without arguments, the names of its methods in their order."""
        self._entries = entries
        self._methods = {name: index for index, name in enumerate(methods)}
        self._tick = self.entry("tick")
        self._call = self.entry("call")

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Timers and answers belong to this loop from now on."""
        self._loop = loop
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._wake_at is not None:
            self._arm(0.0)

    def entry(self, name: str) -> Callable[[], None]:
        """A function of the bundle, with the clock set before each call."""
        work = self._entries[name]
        clock = self.memory.clock
        now = self.now

        def call() -> None:
            clock[0] = now()
            work()

        return call

    @staticmethod
    def now() -> float:
        """Milliseconds."""
        return time.monotonic() * 1e3

    def start(self, method: str, values: Mapping[str, Any]) -> tuple[int, asyncio.Future[Any]]:
        """Begin a call; its number, by which it can be cancelled, and its answer. `end` must follow."""
        if self._loop is None:
            raise EngineClosedError("The engine has no event loop yet: start a node first.")
        body = msgspec.json.encode(values)
        if len(body) > MAX_NBYTES:
            raise PayloadTooLargeError(f"{method}: {len(body)} bytes are more than the engine takes ({MAX_NBYTES}); send less.")
        answer: asyncio.Future[Any] = self._loop.create_future()
        number = self._next()
        self._waiting[number] = answer
        self._put(number, method, body)
        return number, answer

    def end(self, number: int) -> None:
        """Whoever waited waits no more."""
        self._waiting.pop(number, None)

    def send(self, method: str, values: Mapping[str, Any]) -> None:
        """Call without asking for the answer."""
        self._put(self._next(), method, msgspec.json.encode(values))

    def _next(self) -> int:
        self._calls = (self._calls + 1) & 0xFFFFFFFF
        return self._calls

    def _put(self, number: int, method: str, body: bytes) -> None:
        memory = self.memory
        memory.inbox[: len(body)] = body
        memory.control[0], memory.control[1], memory.control[2] = number, self._methods[method], len(body)
        self._call()

    async def call(self, method: str, **values: Any) -> Any:
        """Ask a method of the bundle.

        Raises: PeerNotFoundError, PeerUnreachableError, EngineClosedError; EngineError: anything else that JavaScript threw.
        """
        number, answer = self.start(method, values)
        try:
            return await answer
        finally:
            self.end(number)

    def close(self) -> None:
        """No more timers; calls that wait end with EngineClosedError."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(EngineClosedError("The engine was closed while this call waited; start it again."))
        self._waiting.clear()
        self._loop = None

    def _complete(self) -> None:
        number, status, nbytes = self.memory.control[:3]
        value = msgspec.json.decode(self.memory.outbox[:nbytes])
        answer = self._waiting.pop(number, None)
        if answer is None or answer.done():
            return
        if status == OK:
            answer.set_result(value)
        else:
            answer.set_exception(error_of(value["code"], value["message"], value["stack"]))

    def _log(self) -> None:
        log.warning("swarm.javascript", message=bytes(self.memory.outbox[: self.memory.control[0]]).decode(errors="replace"))

    def _wake(self) -> None:
        self._arm(self.memory.control[0] / 1e3)

    def _arm(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wake_at = delay
        if self._loop is not None:
            self._timer = self._loop.call_later(delay, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._wake_at = None
        self._tick()


def error_of(code: str, message: str, stack: str = "") -> TetherError:
    """What JavaScript threw, as an error of the tree. hyperdht's code stands in `args[1]`."""
    said = message.removeprefix(f"{code}: ")
    if code == "PEER_NOT_FOUND":
        return PeerNotFoundError(
            "Nobody answers to this address now: does that lab run, and does it enter the swarm by the same nodes?",
            code,
        )
    if code in _UNREACHABLE:
        return PeerUnreachableError(f"The peer is known, but no stream to it came about ({said or code}); try again, or use a relay.", code)
    if code in _CLOSED:
        return EngineClosedError("The engine was closed or suspended meanwhile; start or resume it.", code)
    return EngineError(f"JavaScript raised {said or code or 'something without a message'}", code, stack)
