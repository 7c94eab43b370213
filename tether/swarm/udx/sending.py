"""Pure: the sending half of a stream: what leaves when, what is sent again, and when to give up.

Order of a turn: `acknowledge` with what came, the application may `put`, `pump` fills `outgoing`; `expire` when `deadline` has passed.
Losses are told from acks (`loss.py`), or from their absence (`timers.py`).
"""

from __future__ import annotations

from tether.swarm.udx import wire
from tether.swarm.udx.congestion import Congestion
from tether.swarm.udx.flight import Batch, Delivery, Flight
from tether.swarm.udx.loss import LossDetector, RoundTrip
from tether.swarm.udx.mtu import BASE_NBYTES, PathMtu
from tether.swarm.udx.outbox import Outbox
from tether.swarm.udx.outgoing import Outgoing, Statistics
from tether.swarm.udx.receiving import WINDOW_NBYTES, Receiver
from tether.swarm.udx.timers import NEVER, Timers
from tether.swarm.udx.wire import Buffer

__all__ = ["HIGH_WATER_NBYTES", "Sender"]

HIGH_WATER_NBYTES = 1 << 18
"""Beyond this and a window the application is asked to wait for a drain; libudx' figure."""
_DATAGRAM_NBYTES = 65_507 - 28
"""What the kernel takes as one batch."""
_BATCH_PACKETS = 64
"""UDP_MAX_SEGMENTS of older kernels."""
_SMALL_BATCH, _SMALL_FLIGHT = 8, 16
"""With enough in flight a small opening of the window waits for a larger one: a batch costs the same however many packets it has."""
_BATCHES_A_PUMP = 4
"""256 KiB: sent while they are in the processor's cache, instead of a whole window built first."""
_BLACK_HOLE_PROBES = 3
"""Probes for large packets without an answer: the path may have become narrower."""


class Sender:
    """What the peer is to get."""

    def __init__(self, receiver: Receiver, now: float, first: int = 0) -> None:
        self.flight = Flight(first)
        self.trip = RoundTrip()
        self.congestion = Congestion(now)
        self.mtu = PathMtu(BASE_NBYTES - 1152)
        self.statistics = Statistics()
        self.outgoing: list[Outgoing] = []
        self.remote_id = 0
        self.path: object = None
        """Where new packets go; None before there is a remote."""
        self.window = WINDOW_NBYTES
        """Bytes that the peer takes."""
        self.unacknowledged_nbytes = 0
        """Bytes that the application wrote and the peer did not acknowledge."""
        self.has_drained = False
        """The application was asked to wait and may write again; taken back by who tells it."""
        self.has_moved = False
        """All that was sent to the former remote is acknowledged; likewise."""
        self.has_failed = False
        """Timed out."""
        self.is_ending = False
        self._outbox = Outbox()
        self._losses = LossDetector()
        self._receiver = receiver
        self._window_seq, self._window_ack = 0, first
        self._is_full = False
        self._moving_until: int | None = None
        self._end_sent = False
        self._recovery_until = first
        self._timers = Timers()
        self._may_fragment = False

    # -- the application

    def put(self, data: Buffer) -> bool:
        """Write; False: wait for the drain. The bytes must not change any more."""
        if len(data):
            self._outbox.put(data)
            self.unacknowledged_nbytes += len(data)
        self._is_full = self._queued_nbytes() > self._high_water()
        return not self._is_full

    def end(self) -> None:
        """Nothing more is written."""
        self.is_ending = True

    # -- the path

    def connect(self, path: object, remote_id: int, overhead: int) -> None:
        """Now there is a remote."""
        self.path, self.remote_id = path, remote_id
        self.mtu = PathMtu(overhead)

    def move(self, path: object, remote_id: int, overhead: int, now: float) -> None:
        """Another remote for what is sent from here on; what is in flight is repeated to the former one."""
        self.connect(path, remote_id, overhead)
        self.congestion = Congestion(now, self.congestion.delivered)
        self.trip = RoundTrip()
        self._may_fragment = False
        if self.flight.is_empty:
            self.has_moved = True
        else:
            self._moving_until = self.flight.next

    # -- the network

    @property
    def is_ended(self) -> bool:
        """Whether the peer has everything, the END too."""
        return self._end_sent and self.flight.is_empty

    @property
    def waits_for_last_ack(self) -> bool:
        """Whether only the END is not acknowledged, and was repeated often."""
        return self._end_sent and self.flight.una == self.flight.next - 1 and self._timers.repeated_often

    @property
    def deadline(self) -> float:
        """When `expire` must be called; 0: never."""
        return self._timers.deadline

    def acknowledge(self, ack: int, window: int, seq: int, blocks: list[tuple[int, int]], now: float) -> None:
        """Apply what a packet with number `seq` said; an ack of what was never sent says nothing."""
        flight = self.flight
        if ack > flight.next:
            return
        if ack >= flight.una:
            self._update_window(ack, window, seq)
        if self._moving_until is not None and ack >= self._moving_until:
            self._moving_until, self.has_moved = None, True
        if ack > flight.una or blocks:
            delivery = flight.acknowledge(max(ack, flight.una), blocks, self.trip.shortest, now)
            if delivery.count:
                self._deliver(delivery, now)
        if self._is_full and self._queued_nbytes() < self._high_water():
            self._is_full, self.has_drained = False, True

    def pump(self, now: float) -> bool:
        """Send of what may be sent a few batches, which the socket is to get while they are in the processor's cache; True: call again."""
        self._timers.pace_at = NEVER
        enough = len(self.outgoing) + _BATCHES_A_PUMP
        budget = self.congestion.allowance(now)
        sent = self._resend_lost(budget, now) if self.flight.lost else 0
        sent += self._send_new(budget - sent, enough, now)
        if sent or not self.deadline:
            self._arm(now, restart=False)
        return len(self.outgoing) >= enough

    def send_control(self, flags: int, payload: Buffer = b"") -> None:
        """Send a packet that takes no number."""
        packet = self.control(flags, payload)
        self._count(len(packet), 1)
        self.outgoing.append(Outgoing(packet, len(packet), self.path))

    def control(self, flags: int, payload: Buffer = b"") -> bytes:
        """The packet that `send_control` sends."""
        return b"".join((wire.build_packet(flags, self.remote_id, self._receiver.window(), self.flight.next, self._receiver.next), payload))

    def send_ack(self) -> None:
        """Send a bare ack with what came out of order."""
        receiver = self._receiver
        packet = wire.build_ack(self.remote_id, receiver.window(), self.flight.next, receiver.next, receiver.blocks())
        self._count(len(packet), 1)
        self.outgoing.append(Outgoing(packet, len(packet), self.path))

    def expire(self, now: float) -> None:
        """Do what is due."""
        if self._timers.reorder_at and now >= self._timers.reorder_at:
            self._find_lost(now)
        if self._timers.timeout_at and now >= self._timers.timeout_at:
            self._time_out(now)
        elif self._timers.probe_at and now >= self._timers.probe_at:
            self._probe_tail(now)
        if self._timers.window_at and now >= self._timers.window_at:
            self.send_control(wire.HEARTBEAT)
            self._timers.window_at = now + 2 * self.trip.timeout

    def clear(self) -> None:
        """Let go of everything; nothing is due any more."""
        self._outbox.clear()
        self.flight.forget()
        self._timers.stop()

    def _update_window(self, ack: int, window: int, seq: int) -> None:
        """RFC 9293, 3.10.7.4: not from a packet that is older than the last one that did."""
        if seq > self._window_seq or (seq == self._window_seq and ack >= self._window_ack):
            self.window, self._window_seq, self._window_ack = window, seq, ack
            if window:
                self._timers.window_at = NEVER

    def _deliver(self, delivery: Delivery, now: float) -> None:
        flight = self.flight
        self._timers.progressed()
        self.unacknowledged_nbytes -= delivery.data_nbytes
        for _ in delivery.probes:
            self.mtu.passed()
        if delivery.batch is not None:
            self.trip.sample(now - delivery.batch.sent_at)
        self._losses.observe(delivery, now)
        self.congestion.on_delivery(delivery, flight.count, now)
        self._find_lost(now)
        self._arm(now, restart=True)

    def _find_lost(self, now: float) -> None:
        flight = self.flight
        self._timers.reorder_at = NEVER
        if flight.is_empty:
            return
        lost, wait = self._losses.find(flight, self.trip, now)
        if wait:
            self._timers.reorder_at = now + wait
        if not lost:
            return
        for seq in lost:
            flight.lost[seq] = None
            flight.resent.pop(seq, None)
        if len(lost) == 1 and flight.batch_of(lost[0]).padding:
            return  # a probe for a larger MTU says nothing of congestion
        self.congestion.on_loss(len(lost))
        if flight.una >= self._recovery_until:
            self._recovery_until = flight.next
            self.statistics.recoveries += 1
            self.congestion.on_recovery(flight.count)

    def _resend_lost(self, budget: int, now: float) -> int:
        flight = self.flight
        room = min(int(self.congestion.window) - flight.count, budget)
        chosen = [seq for seq, _ in zip(flight.lost, range(room), strict=False)]
        for seq in chosen:
            del flight.lost[seq]
            self._resend(seq, now)
        if flight.lost:
            self.congestion.is_limited = True
            self._wait_for_pace(budget - len(chosen), now)
        return len(chosen)

    def _resend(self, seq: int, now: float) -> None:
        flight, batch = self.flight, self.flight.batch_of(seq)
        if batch.padding:
            batch.strip_padding()
            self.mtu.lost()
        wire.refresh(batch.wire, (seq - batch.seq) * batch.nbytes, self._receiver.window(), self._receiver.next)
        packet = batch.packet(seq)
        is_large = len(packet) - wire.HEADER_NBYTES > self.mtu.payload_nbytes
        flight.resent.pop(seq, None)  # so that the order is that of the last resend
        flight.resent[seq] = now
        self.statistics.resent += 1
        self._count(len(packet), 1)
        self.congestion.on_resent()
        self.outgoing.append(Outgoing(packet, len(packet), batch.path, is_large or self._may_fragment))

    def _send_new(self, budget: int, enough: int, now: float) -> int:
        sent, outbox, congestion = 0, self._outbox, self.congestion
        while (outbox.nbytes or (self.is_ending and not self._end_sent)) and len(self.outgoing) < enough:
            room = self._room()
            if room <= 0:
                congestion.is_limited = True
                break
            if sent >= budget:
                self._wait_for_pace(0, now)
                break
            if not outbox.nbytes:
                self._send_end(now)
                return sent + 1
            count = self._batch_count(room, budget - sent, now)
            if not count:
                congestion.is_limited = True
                break
            sent += count
        if sent and not outbox.nbytes:
            congestion.ran_dry(self.flight.count)
        return sent

    def _wait_for_pace(self, budget: int, now: float) -> None:
        if budget <= 0:
            self._timers.pace_at = self.congestion.release_at(now)

    def _room(self) -> int:
        payload = self.mtu.payload_nbytes
        packets = self.window // payload or (1 if self.window else 0)
        return min(int(self.congestion.window), packets) - self.flight.count

    def _batch_count(self, room: int, budget: int, now: float) -> int:
        """Send one batch; how many packets, 0 if it is better to wait for a larger one."""
        payload, nbytes = self.mtu.payload_nbytes, self._outbox.nbytes
        padding = self.mtu.padding(now) if nbytes >= payload and self.congestion.delivered else 0
        wanted = min(-(-nbytes // payload), _DATAGRAM_NBYTES // (payload + wire.HEADER_NBYTES), _BATCH_PACKETS)
        count = 1 if padding else min(wanted, room, budget)
        if count < wanted and count == room < _SMALL_BATCH and self.flight.count > _SMALL_FLIGHT:
            return 0
        if padding:
            self._send_probe(padding, now)
            return count
        return self._send(self._outbox.take(count * payload), now)

    def _send(self, data: Buffer, now: float) -> int:
        flight, receiver, payload = self.flight, self._receiver, self.mtu.payload_nbytes
        count = -(-len(data) // payload)
        packets = wire.build_batch((self.remote_id, receiver.window(), flight.next, receiver.next), data, payload)
        batch = Batch(flight.next, count, packets, self.path, now)
        if count > 1:
            batch.nbytes = payload + wire.HEADER_NBYTES
        batch.payload_nbytes, batch.data_nbytes = payload, len(data)
        self._launch(batch)
        return count

    def _send_probe(self, padding: int, now: float) -> None:
        flight, receiver, payload = self.flight, self._receiver, self.mtu.payload_nbytes
        self.mtu.sent(padding)
        head = wire.build_packet(wire.DATA, self.remote_id, receiver.window(), flight.next, receiver.next, padding=padding)
        batch = Batch(flight.next, 1, bytearray(b"".join((head, self._outbox.take(payload)))), self.path, now)
        batch.payload_nbytes = batch.data_nbytes = payload
        batch.padding = padding
        self._launch(batch)

    def _send_end(self, now: float) -> None:
        flight, receiver = self.flight, self._receiver
        packet = wire.build_packet(wire.END, self.remote_id, receiver.window(), flight.next, receiver.next)
        self._end_sent = True
        self._launch(Batch(flight.next, 1, bytearray(packet), self.path, now))

    def _launch(self, batch: Batch) -> None:
        self.congestion.stamp(batch, is_first=self.flight.is_empty)
        self.flight.add(batch)
        self._count(len(batch.wire), batch.count)
        self.outgoing.append(Outgoing(batch.wire, batch.nbytes, batch.path))

    def _arm(self, now: float, *, restart: bool) -> None:
        timers = self._timers
        if not self.flight.is_empty:
            timers.watch(self.trip, now, restart=restart)
            return
        timers.rest()
        if self.window:
            timers.window_at = NEVER
        elif (self._outbox.nbytes or (self.is_ending and not self._end_sent)) and not timers.window_at:
            timers.window_at = now + self.trip.timeout

    def _probe_tail(self, now: float) -> None:
        """No ack for two round trips: send the last packet again, whose ack then tells of the others (RFC 8985, 7.3)."""
        flight = self.flight
        self.statistics.probes += 1
        if self._timers.probed() >= _BLACK_HOLE_PROBES:
            self._suspect_black_hole(now)
        last = flight.last_missing()
        if last >= flight.una:
            flight.lost.pop(last, None)
            self._resend(last, now)
        if flight.una != last and flight.una in flight.resent:  # it holds up all others, and an ack of the last would not prove it lost
            self._resend(flight.una, now)
        self._arm(now, restart=False)

    def _time_out(self, now: float) -> None:
        flight = self.flight
        self.statistics.timeouts += 1
        timeouts = self._timers.timed_out()
        if self._timers.are_exhausted:
            self.has_failed = True
            return
        self._suspect_black_hole(now)
        self._may_fragment = timeouts > 1
        for batch in flight.batches:
            flight.lost.update(dict.fromkeys(flight.missing(batch)))
        flight.lost = dict.fromkeys(sorted((*flight.lost, *flight.resent)))
        flight.resent.clear()
        self._recovery_until = flight.next
        self.congestion.on_timeout()
        self._arm(now, restart=True)

    def _suspect_black_hole(self, now: float) -> None:
        if self.mtu.size > BASE_NBYTES:
            self.mtu.shrink(now)

    def _queued_nbytes(self) -> int:
        """Not counted is what came behind a hole: on a path with losses the network would stand still for want of bytes, not of room."""
        return self._outbox.nbytes + self.flight.count * self.mtu.payload_nbytes

    def _high_water(self) -> int:
        return HIGH_WATER_NBYTES + min(int(self.congestion.window) * self.mtu.payload_nbytes, self.window)

    def _count(self, nbytes: int, packets: int) -> None:
        self.statistics.nbytes_sent += nbytes
        self.statistics.packets_sent += packets
