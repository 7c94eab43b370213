"""Pure: what was sent and is not acknowledged, and what an ack says of it.

State is kept by batch (up to 64 packets that left at once), and by packet only for what the network lost or reordered: `sacked`, `lost`
and `resent` are empty on a clean path, and an ack then costs the same however many packets it covers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter

from tether.swarm.udx import wire
from tether.swarm.udx.ranges import Ranges

__all__ = ["Batch", "Delivery", "Flight"]

_SEQ = attrgetter("seq")
_OWN_ROUND_TRIP = 0.9
"""An ack that comes sooner after a resend than this share of the shortest round trip is the original's."""


class Batch:
    """Packets that left in one datagram batch, as they stand on the wire."""

    __slots__ = (
        "count",
        "data_nbytes",
        "delivered",
        "delivered_at",
        "is_limited",
        "nbytes",
        "padding",
        "path",
        "payload_nbytes",
        "sent_at",
        "seq",
        "since",
        "wire",
    )

    def __init__(self, seq: int, count: int, data: bytearray | memoryview, path: object, now: float) -> None:
        self.seq = seq
        self.count = count
        self.wire = data
        self.path = path
        """Where it went; what it still sends goes there too, also after a change of the remote."""
        self.sent_at = now
        self.nbytes = len(data)
        """Size of one packet; the last may be shorter."""
        self.payload_nbytes = 0
        """Payload of one packet; the last may be shorter."""
        self.data_nbytes = 0
        """Payload of all."""
        self.padding = 0
        """Bytes that only make it a probe for a larger MTU."""
        self.delivered = 0
        """Packets of the stream that were delivered when this left."""
        self.delivered_at = now
        """When the last of those was."""
        self.since = now
        """When the newest packet that was delivered by then had left."""
        self.is_limited = False
        """Whether the application, not the network, held the stream back: such a sample says nothing of the network."""

    def packet(self, seq: int) -> memoryview:
        """The packet of this number."""
        at = (seq - self.seq) * self.nbytes
        return memoryview(self.wire)[at : at + self.nbytes]

    def strip_padding(self) -> None:
        """Make a probe (a batch of one) an ordinary packet: the probe was lost, its payload must not be lost with it."""
        head, self.padding = wire.HEADER_NBYTES, 0
        data = bytes(self.wire)
        self.wire = bytearray(data[:3] + b"\0" + data[4:head] + data[head + data[3] :])
        self.nbytes = len(self.wire)


class Delivery:
    """What an ack told for the first time."""

    __slots__ = ("batch", "count", "data_nbytes", "is_reordered", "is_spurious", "probes", "sent_at", "seq")

    def __init__(self) -> None:
        self.count = 0
        """Packets delivered."""
        self.data_nbytes = 0
        """Payload that is acknowledged with all before it: the application may send as much again."""
        self.sent_at = 0.0
        """When the newest of them left, be it as a resend."""
        self.seq = 0
        """One above its number; orders those that left at once."""
        self.batch: Batch | None = None
        """The newest whose packet was never resent: what a round trip and a rate can be told from."""
        self.is_reordered = False
        """Whether an older packet came after a newer one without being resent."""
        self.is_spurious = False
        """Whether something was resent that had come."""
        self.probes: list[Batch] = []
        """MTU probes among them."""

    def saw(self, sent_at: float, seq: int) -> bool:
        """Note a delivered packet; True if it left after all others."""
        if (sent_at, seq + 1) <= (self.sent_at, self.seq):
            return False
        self.sent_at, self.seq = sent_at, seq + 1
        return True


class Flight:
    """Packets from `una`, the first not acknowledged, up to `next`, the number of the next new one."""

    __slots__ = ("batches", "highest", "lost", "next", "resent", "sacked", "una")

    def __init__(self, first: int = 0) -> None:
        self.una = first
        self.next = first
        self.highest = first
        """One above the highest number that was ever delivered."""
        self.batches: list[Batch] = []
        self.sacked = Ranges()
        self.lost: dict[int, None] = {}
        """Held to be lost and not yet resent, in the order in which that was found."""
        self.resent: dict[int, float] = {}
        """When it was resent last, in that order."""

    @property
    def count(self) -> int:
        """Packets that are thought to be in the network."""
        return self.next - self.una - self.sacked.count - len(self.lost)

    @property
    def is_empty(self) -> bool:
        """Whether all that was sent is acknowledged."""
        return self.una == self.next

    def add(self, batch: Batch) -> None:
        """A batch left; its `seq` is `next`."""
        self.batches.append(batch)
        self.next += batch.count

    def batch_of(self, seq: int) -> Batch:
        """The batch that a number between `una` and `next` left in."""
        return self.batches[bisect_right(self.batches, seq, key=_SEQ) - 1]

    def last_missing(self) -> int:
        """The newest packet of which no ack came; below `una` if there is none."""
        return self.sacked.last_gap(self.next - 1)

    def missing(self, batch: Batch) -> Iterator[int]:
        """Numbers of a batch of which no ack came, nor were they found lost, nor resent."""
        lost, resent = self.lost, self.resent
        for start, end in self.sacked.gaps(max(batch.seq, self.una), batch.seq + batch.count):
            for seq in range(start, end):
                if seq not in lost and seq not in resent:
                    yield seq

    def acknowledge(self, ack: int, blocks: Sequence[tuple[int, int]], shortest: float, now: float) -> Delivery:
        """Apply an ack, `una <= ack <= next`, and what was reported above it; blocks that can't be are passed over.

        `shortest`: the shortest round trip so far.
        """
        found = Delivery()
        if ack > self.una:
            self._advance(ack, found, now - shortest * _OWN_ROUND_TRIP)
        for low, high in blocks:
            start = wire.unwrap(self.una, low)
            end = wire.unwrap(start, high)
            if self.una <= start < end <= self.next:
                for begin, stop in self.sacked.add(start, end):
                    self._deliver_out_of_order(begin, stop, found, now - shortest * _OWN_ROUND_TRIP)
        return found

    def forget(self) -> None:
        """Let go of all that was sent."""
        self.batches, self.lost, self.resent, self.sacked = [], {}, {}, Ranges()
        self.una = self.next

    def _advance(self, ack: int, found: Delivery, latest: float) -> None:
        newest = self.sacked.last_gap(ack - 1)
        done = 0
        for batch in self.batches:
            if batch.seq >= ack:
                break
            first, end = max(self.una, batch.seq), batch.seq + batch.count
            if end <= ack:
                done += 1
                found.data_nbytes += batch.data_nbytes - (first - batch.seq) * batch.payload_nbytes
            else:
                found.data_nbytes += (ack - first) * batch.payload_nbytes
            if batch.padding:
                found.probes.append(batch)
            if first <= newest < end and newest not in self.resent and found.saw(batch.sent_at, newest):
                found.batch = batch
                found.is_reordered |= newest < self.highest - 1
        del self.batches[:done]
        found.count += ack - self.una - self.sacked.trim(ack)
        for seq in [seq for seq in self.resent if seq < ack]:
            self._settle_resent(seq, self.resent.pop(seq), found, latest)
        for seq in [seq for seq in self.lost if seq < ack]:
            del self.lost[seq]
        self.una = ack
        self.highest = max(self.highest, ack)

    def _deliver_out_of_order(self, start: int, end: int, found: Delivery, latest: float) -> None:
        found.count += end - start
        newest = end - 1
        for seq in range(start, end) if self.resent or self.lost or start < self.highest else ():
            sent_at = self.resent.pop(seq, None)
            if sent_at is not None:
                self._settle_resent(seq, sent_at, found, latest)
                newest -= seq == newest
                continue
            self.lost.pop(seq, None)
            found.is_reordered |= seq < self.highest - 1
        batch = self.batch_of(newest)
        if newest >= start and found.saw(batch.sent_at, newest):
            found.batch = batch
        self.highest = max(self.highest, end)
        for other in self._probes(start, end):
            found.probes.append(other)
            other.padding = 0

    def _settle_resent(self, seq: int, sent_at: float, found: Delivery, latest: float) -> None:
        # The ack is the resend's, unless it came too soon for that.
        if sent_at > latest:
            found.is_spurious = True
        else:
            found.saw(sent_at, seq)

    def _probes(self, start: int, end: int) -> list[Batch]:
        low = bisect_right(self.batches, start, key=_SEQ) - 1
        high = bisect_right(self.batches, end - 1, key=_SEQ)
        return [batch for batch in self.batches[max(0, low) : high] if batch.padding]
