"""Pure: whether this machine slept, or is in another network, and what a node of the swarm has to do to be reachable again.

hyperdht by itself tries again to announce after five minutes when the first try failed, which it does on a laptop that wakes: the radio
comes seconds later than the processor.  So it is asked until it has worked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Deed", "Look", "Waking"]

_LATE = 3.0
"""Seconds that a look may come late: a busy loop does that. After more, routers may have forgotten where our packets came from."""
_FIRST_WAIT, _LAST_WAIT = 1.0, 60.0
"""Seconds between two tries to announce, doubled each time."""
_FIRST = 5.0
"""Seconds for the first announcement: without a network it takes four to fail."""
_ASK = 30.0
"""Seconds between two questions whether it is still announced, while it is."""


@dataclass(frozen=True, slots=True)
class Look:
    """How things are now."""

    at: float
    """Seconds of a clock that goes on while the machine sleeps."""
    outward: str | None
    """The address that packets to the rest of the world leave from; None: there is no way there."""
    addresses: frozenset[str] = frozenset()
    """All addresses of this machine."""


class Deed(Enum):
    """What is to be done, in this order."""

    CUT = "streams lead nowhere any more"
    WAKE = "announce anew, look for neighbours"
    ASK = "find out whether it is announced, and tell `told`"
    TELL = "it is back: who waits for that is told"


class Waking:
    """Looks each second; what it says is done by others."""

    def __init__(self, patience: float, interval: float = 1.0) -> None:
        """`patience`: seconds of silence after which peers give up a stream. `interval`: between two looks."""
        self._patience, self._interval = patience, interval
        self._last: Look | None = None
        self._outward: str | None = None
        """The last one there was: a network that comes back under the same address is the same."""
        self._was_upset = False
        self._wait = _FIRST_WAIT
        self._ask_at = self._wake_at = 0.0

    def look(self, look: Look) -> tuple[Deed, ...]:
        """What follows from it."""
        before, self._last = self._last, look
        home, self._outward = self._outward, look.outward or self._outward
        if before is None:
            self._wake_at = look.at + _FIRST
            return ()
        late = look.at - before.at - self._interval
        is_elsewhere = look.outward is not None and home is not None and look.outward != home
        if late >= self._patience or is_elsewhere:
            return (Deed.CUT, self._wake(look.at))
        if late >= _LATE or (look.outward, look.addresses) != (before.outward, before.addresses):
            return (self._wake(look.at),)
        return (Deed.ASK,) if look.at >= self._ask_at else ()

    def told(self, at: float, *, is_announced: bool) -> tuple[Deed, ...]:
        """What follows from the answer to a question, `at` as of `Look`."""
        if is_announced:
            self._ask_at, self._wait = at + _ASK, _FIRST_WAIT
            self._wake_at = at
            was_upset, self._was_upset = self._was_upset, False
            return (Deed.TELL,) if was_upset else ()
        self._ask_at = at + self._wait / 4
        if at < self._wake_at:
            return ()
        self._was_upset = True
        self._wait = min(2 * self._wait, _LAST_WAIT)
        self._wake_at = at + self._wait
        return (Deed.WAKE,)

    def _wake(self, at: float) -> Deed:
        self._was_upset = True
        self._wait = _FIRST_WAIT
        self._ask_at, self._wake_at = at, at + self._wait
        return Deed.WAKE
