"""Pure: the receiving half of a stream: what came, in order or not yet, how much more may come, what to acknowledge.

Memory is bounded by `limit`: bytes that wait for the application and bytes that came out of order both make the advertised window
smaller, and what comes beyond it is dropped as if the network had lost it.
"""

from __future__ import annotations

from tether.swarm.udx.ranges import Ranges
from tether.swarm.udx.wire import MAX_BLOCKS

__all__ = ["WINDOW_NBYTES", "Receiver"]

WINDOW_NBYTES = 4 << 20
"""libudx' window: 4 MiB is 100 MB/s at 40 ms."""
_SLACK_NBYTES = 1 << 16
"""A sender rounds the window up to whole packets, and its last batch was sent before it saw the smaller one."""
_MAX_AHEAD = 65_536
"""libudx acknowledges no packet further ahead; without a bound a stranger's sequence numbers would be memory."""
_MAX_HELD = 16_384
"""Packets held out of order: small ones cost more than their bytes."""
_LARGE_NBYTES = 1 << 14
"""On the average, from which on pieces are delivered one by one: a callback costs what joining so many bytes does."""
_MANY_PIECES = 4096
"""Waiting pieces that are joined to one: a paused stream of two-byte packets would take thirty times its bytes."""


class Receiver:
    """What came. `next` is the first number that did not come yet: the ack."""

    __slots__ = ("_end", "_held", "_held_nbytes", "_ranges", "_ready", "_ready_nbytes", "_reported", "advertised", "limit", "next")

    def __init__(self, first: int = 0, limit: int = WINDOW_NBYTES) -> None:
        self.next = first
        self.limit = limit
        self.advertised = limit
        """The window that the peer was told last."""
        self._ready: list[bytes] = []
        self._ready_nbytes = 0
        self._held: dict[int, bytes] = {}
        self._held_nbytes = 0
        self._ranges = Ranges()
        self._reported = 0
        self._end: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory: ready for the application and out of order."""
        return self._ready_nbytes + self._held_nbytes

    @property
    def is_ready(self) -> bool:
        """Whether there is something to `take`."""
        return bool(self._ready)

    @property
    def is_ended(self) -> bool:
        """Whether the END came and all before it."""
        return self._end is not None and self.next > self._end

    @property
    def has_holes(self) -> bool:
        """Whether packets wait for an earlier one."""
        return bool(self._held)

    def window(self) -> int:
        """Bytes that may still come; noted as what the peer was told."""
        self.advertised = max(0, self.limit - self._ready_nbytes - self._held_nbytes)
        return self.advertised

    def accept(self, seq: int, payload: bytes, *, end: bool = False) -> bool:
        """Take a packet; False if it is none that can be taken: come before, beyond the end, beyond what memory allows."""
        nbytes = len(payload)
        fits = self._ready_nbytes + self._held_nbytes + nbytes <= self.limit + _SLACK_NBYTES
        if seq == self.next and nbytes and fits and not end and not self._held and self._end is None:  # as nearly always
            self.next = seq + 1
            self._ready.append(payload)
            self._ready_nbytes += nbytes
            if len(self._ready) > _MANY_PIECES:
                self._ready = [b"".join(self._ready)]
            return True
        if seq < self.next or (self._end is not None and seq > self._end) or (end and self._ranges and self._ranges.end > seq):
            return False
        if nbytes and not fits:
            return False
        if seq != self.next and not self._hold(seq, payload):
            return False
        if end:
            self._end = seq
        if seq == self.next:
            self.next += 1
            self._keep((payload,) if payload else (), nbytes)
            self._close_hole()
        return True

    def accept_run(self, seq: int, count: int, data: bytes) -> None:
        """Take packets of one size, with one number after the other, as `accept` for each, but at once; `data`: all their payloads."""
        end, nbytes = seq + count, len(data)
        plain = self._end is None and self._ready_nbytes + self._held_nbytes + nbytes <= self.limit + _SLACK_NBYTES
        if plain and seq == self.next and (not self._held or self._ranges.first >= end):
            self.next = end
            self._keep((data,) if data else (), nbytes)
            self._close_hole()
            return
        each = nbytes // count
        payloads = tuple(data[at * each : (at + 1) * each] for at in range(count))
        if not (plain and self._hold_run(seq, end, payloads, nbytes)):
            for index, payload in enumerate(payloads):
                self.accept(seq + index, payload)

    def take(self) -> list[bytes]:
        """All that is ready, as one piece, or as large ones that need not be copied; they are the application's from here on."""
        ready, nbytes = self._ready, self._ready_nbytes
        self._ready = []
        self._ready_nbytes = 0
        return ready if nbytes >= len(ready) * _LARGE_NBYTES else [b"".join(ready)]

    def blocks(self) -> list[tuple[int, int]]:
        """What to report above the ack. Of more than a packet can name each call names the next ones: the peer adds them up."""
        if len(self._ranges) <= MAX_BLOCKS:
            return list(self._ranges)
        start, self._reported = self._reported % len(self._ranges), self._reported + MAX_BLOCKS
        return self._ranges.slice(start, MAX_BLOCKS)

    def clear(self) -> None:
        """Forget what is held and ready."""
        self._ready, self._held, self._ranges = [], {}, Ranges()
        self._ready_nbytes = self._held_nbytes = 0

    def _hold(self, seq: int, payload: bytes) -> bool:
        if seq - self.next >= _MAX_AHEAD or len(self._held) >= _MAX_HELD or seq in self._held:
            return False
        self._held[seq] = payload
        self._held_nbytes += len(payload)
        self._ranges.add(seq, seq + 1)
        return True

    def _hold_run(self, seq: int, end: int, payloads: tuple[bytes, ...], nbytes: int) -> bool:
        fresh = next(self._ranges.gaps(seq, end), None) == (seq, end)
        if seq <= self.next or end - self.next > _MAX_AHEAD or len(self._held) + len(payloads) > _MAX_HELD or not fresh:
            return False
        self._held.update(zip(range(seq, end), payloads, strict=True))
        self._held_nbytes += nbytes
        self._ranges.add(seq, end)
        return True

    def _keep(self, payloads: tuple[bytes, ...], nbytes: int) -> None:
        self._ready.extend(payloads)
        self._ready_nbytes += nbytes
        if len(self._ready) > _MANY_PIECES:
            self._ready = [b"".join(self._ready)]

    def _close_hole(self) -> None:
        if not self._held or self._ranges.first > self.next:
            return
        start, end = next(iter(self._ranges))
        payloads = tuple(filter(None, map(self._held.pop, range(start, end))))
        nbytes = sum(map(len, payloads))
        self._held_nbytes -= nbytes
        self._ranges.trim(end)
        self.next = end
        self._keep(payloads, nbytes)
