"""Two machines and a network that loses, doubles, reorders, delays, cuts and narrows, all from one seed: the same seed, the same run."""

import hashlib
import heapq
import itertools
import random
from dataclasses import dataclass, field

from tether.swarm.udx import machine as udx
from tether.swarm.udx import wire
from tether.swarm.udx.receiving import WINDOW_NBYTES

PATIENCE = 400.0
"""Simulated seconds after which a run that is not over has failed."""


@dataclass
class Network:
    """One direction of the path."""

    loss: float = 0.0
    duplicates: float = 0.0
    delay: float = 0.01
    jitter: float = 0.0
    rate: float = 0.0
    """Bytes a second of the narrowest link; 0: unbounded."""
    queue: int = 100_000
    """Bytes that wait there before the rest is dropped."""
    mtu: list[tuple[float, int]] = field(default_factory=list)
    """From when on the path carries only so much."""
    cuts: list[tuple[float, float]] = field(default_factory=list)
    """When nothing passes."""
    batched: bool = False
    """The receiver's kernel puts packets together again (UDP_GRO)."""
    busy_until: float = 0.0

    def arrival(self, now: float, nbytes: int, fate: random.Random, *, may_fragment: bool = False) -> float | None:
        """When a datagram comes out, if it does."""
        limit = min((size for since, size in self.mtu if now >= since), default=1 << 16)
        if (nbytes > limit and not may_fragment) or any(start <= now < end for start, end in self.cuts) or fate.random() < self.loss:
            return None
        if self.rate:
            if (self.busy_until - now) * self.rate > self.queue:
                return None
            self.busy_until = now = max(self.busy_until, now) + nbytes / self.rate
        return now + self.delay + (fate.random() * self.jitter if self.jitter else 0.0)


@dataclass
class Side:
    """An application and its machine."""

    name: str
    machine: udx.Machine
    network: Network
    writes: list[tuple[float, bytes]]
    pauses: list[tuple[float, float]] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)
    """When it changes the remote, to another address of the same peer."""
    talks: list[tuple[float, bytes]] = field(default_factory=list)
    """Messages beside the stream."""
    keepalive: float = 0.0
    keeps_quiet_until: float = 0.0
    """When it connects; what comes before is to be kept."""
    received: bytearray = field(default_factory=bytearray)
    messages: list[bytes] = field(default_factory=list)
    has_ended: bool = False
    pending_moves: int = 0
    settling: bool = False
    timer: float = 0.0

    @property
    def wrote(self) -> bytes:
        return b"".join(data for _, data in self.writes)


class Simulation:
    """Runs until both sides are over."""

    def __init__(self, seed: str, left: Side, right: Side) -> None:
        self.fate = random.Random(seed)
        self.sides = left, right
        self.now = min(left.keeps_quiet_until, right.keeps_quiet_until)
        self.trace = hashlib.sha256()
        self.packets = 0
        self._order = itertools.count()
        self._due: list = []
        self.overhead = 48
        for side, other in ((left, right), (right, left)):
            self.at(side.keeps_quiet_until, self.connect, side, other)

    def at(self, when: float, what, *args) -> None:
        heapq.heappush(self._due, (max(when, self.now), next(self._order), what, args))

    def run(self) -> None:
        end = self.now + PATIENCE
        while not all(side.machine.is_over for side in self.sides):
            assert self._due, f"both wait for ever: {[side.name for side in self.sides if not side.machine.is_over]}"
            self.step()
            assert self.now < end, f"not over after {PATIENCE} s"

    def linger(self) -> None:
        """Go on until the last timer: nothing more may happen than a few answers."""
        while self._due:
            self.step()

    def step(self) -> None:
        self.now, _, what, args = heapq.heappop(self._due)
        what(*args)

    # -- the application

    def connect(self, side: Side, other: Side) -> None:
        side.machine.connect(other, 1, self.overhead, self.now)
        for when, data in side.writes:
            self.at(self.now + when, self.write, side, data)
        for start, end in side.pauses:
            self.at(self.now + start, self.pause, side)
            self.at(self.now + end, self.resume, side)
        for when in side.moves:
            self.at(self.now + when, self.move, side, other)
        for when, data in side.talks:
            self.at(self.now + when, self.talk, side, data)
        side.machine.set_keepalive(side.keepalive, self.now)
        last = max((when for when, _ in side.writes), default=0.0)
        self.at(self.now + last, self.end, side)
        self.settle(side)

    def write(self, side: Side, data: bytes) -> None:
        side.machine.write(data)
        self.settle(side)

    def end(self, side: Side) -> None:
        side.machine.end()
        self.settle(side)

    def move(self, side: Side, other: Side) -> None:
        if side.machine.is_connected and not side.pending_moves:
            side.pending_moves = 1
            side.machine.change_remote(other, 1, self.overhead, self.now)
            self.settle(side)

    def talk(self, side: Side, data: bytes) -> None:
        side.machine.send_message(data)
        self.settle(side)

    def pause(self, side: Side) -> None:
        side.machine.pause()

    def resume(self, side: Side) -> None:
        side.machine.resume()
        self.settle(side)

    def tell(self, side: Side, event: udx.Event) -> None:
        self.trace.update(repr((self.now, side.name, event)).encode())
        match event:
            case udx.Data(data):
                assert not side.has_ended, "bytes behind the end"
                side.received += data
                other = self.sides[side is self.sides[0]]
                assert other.wrote.startswith(side.received[-len(data) :], len(side.received) - len(data)), "wrong bytes"
            case udx.Message(data):
                side.messages.append(data)
            case udx.Moved():
                side.pending_moves -= 1
                assert side.pending_moves == 0, "moved twice"
            case udx.Ended():
                assert not side.has_ended
                side.has_ended = True

    # -- the machines

    def settle(self, side: Side) -> None:
        side.settling = False
        machine = side.machine
        for event in machine.turn(self.now):
            self.tell(side, event)
        while machine.flush(self.now):
            self.transmit(side)
        self.transmit(side)
        self.check(machine)
        self.arm(side)

    def arm(self, side: Side) -> None:
        deadline = side.machine.deadline
        if deadline and not side.machine.is_gone and (not side.timer or deadline < side.timer):
            side.timer = deadline
            self.at(deadline, self.expire, side, deadline)

    def expire(self, side: Side, due: float) -> None:
        if side.timer != due:
            return
        side.timer = 0.0
        if side.machine.deadline and side.machine.deadline <= self.now:
            side.machine.expire(self.now)
        if not side.machine.is_gone:
            self.settle(side)

    def check(self, machine: udx.Machine) -> None:
        flight = machine.sender.flight
        assert machine.receiver.nbytes <= WINDOW_NBYTES + (1 << 17)
        assert flight.una <= flight.next
        assert flight.count >= 0
        assert machine.sender.unacknowledged_nbytes >= 0
        assert machine.sender.congestion.window >= 4

    # -- the network

    def transmit(self, side: Side) -> None:
        for data, nbytes, path, may_fragment in side.machine.outgoing:
            batches: dict[float, list[bytes]] = {}
            for at in range(0, len(data), nbytes):
                packet = bytes(data[at : at + nbytes])
                self.packets += 1
                self.trace.update(packet[:20])
                for _ in range(1 + (self.fate.random() < side.network.duplicates)):
                    when = side.network.arrival(self.now, len(packet) + self.overhead - 20, self.fate, may_fragment=may_fragment)
                    if when is not None:
                        batches.setdefault(when, []).append(packet)
            for when, packets in batches.items():
                self.at(when, self.arrive, path, packets, side.network.batched)
        side.machine.outgoing.clear()

    def arrive(self, side: Side, packets: list[bytes], batched: bool) -> None:
        if side.machine.is_gone:
            return
        head = [packet for packet in packets if len(packet) == len(packets[0])] if batched else []
        run = wire.parse_run(b"".join(head), len(head[0]), len(head)) if len(head) > 1 and packets[: len(head)] == head else None
        if run is not None:
            side.machine.receive_run(run, sum(map(len, head)))
        for packet in packets[len(head) if run is not None else 0 :]:
            side.machine.receive(packet, wire.parse_header(packet))
        if not side.settling:  # what comes within the same wake-up of a socket is settled at once
            side.settling = True
            self.at(self.now + self.fate.choice((0.0, 0.0002, 0.002)), self.settle, side)


def network_of(fate: random.Random, start: float) -> Network:
    """A path as it may be; cuts are shorter than the patience of a stream."""
    delay = fate.choice((0.0001, 0.001, 0.01, 0.05, 0.2))
    network = Network(
        loss=fate.choice((0.0, 0.0, 0.005, 0.02, 0.1, 0.25)),
        duplicates=fate.choice((0.0, 0.0, 0.01, 0.2)),
        delay=delay,
        jitter=fate.choice((0.0, 0.0, 0.1, 1.0, 4.0)) * delay,
        rate=fate.choice((0.0, 0.0, 1e5, 1e6, 1e7)),
        queue=fate.choice((15_000, 60_000, 1_000_000)),
        batched=fate.random() < 0.5,
    )
    if fate.random() < 0.2:
        cut = start + fate.random() * 2
        network.cuts = [(cut, cut + fate.choice((0.2, 1.0, 5.0)))]
    if fate.random() < 0.2:
        network.mtu = [(0.0, fate.choice((1200, 1280, 1400, 1492)))]
    elif fate.random() < 0.2:
        network.mtu = [(start + fate.random(), fate.choice((1200, 1300)))]
    return network


def writes_of(fate: random.Random) -> list[tuple[float, bytes]]:
    """What an application writes, and when."""
    total = fate.choice((0, 1, 1000, 20_000, 100_000, 200_000))
    found, when = [], 0.0
    while total > 0:
        size = min(total, fate.choice((1, 100, 1152, 5000, 50_000)) if total < 20_000 else fate.choice((1152, 5000, 70_000)))
        found.append((when, fate.randbytes(size)))
        total -= size
        when += fate.choice((0.0, 0.0, 0.0, 0.01, 0.3))
    return found


def simulation_of(seed: str) -> Simulation:
    """Two applications and a network, all drawn from the seed."""
    fate = random.Random(f"{seed} world")
    start = fate.choice((0.0, 12_345.678, 5e6))
    firsts = [fate.choice((0, 0, 5, (1 << 32) - 3, (1 << 31) - 7)) for _ in range(2)]
    sides = []
    for name, first, peer_first in (("left", *firsts), ("right", *firsts[::-1])):
        pauses = [(at, at + fate.choice((0.1, 2.0))) for at in [fate.random()] if fate.random() < 0.3]
        late = start + (fate.random() if fate.random() < 0.2 else 0.0)
        side = Side(name, udx.Machine(start, first, peer_first), network_of(fate, start), writes_of(fate), pauses)
        side.moves = [fate.random() for _ in range(fate.choice((0, 0, 0, 1, 3)))]
        side.talks = [(fate.random(), fate.randbytes(fate.randrange(1000))) for _ in range(fate.choice((0, 0, 5)))]
        side.keepalive = fate.choice((0.0, 0.0, 0.3))
        side.keeps_quiet_until = late
        sides.append(side)
    return Simulation(seed, *sides)
