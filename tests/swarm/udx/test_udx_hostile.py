"""Whoever knows a stream's id can send it anything: nothing raises, nothing grows, and what is right still comes through."""

import asyncio
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from udx_pairs import Pair, until
from udx_simulation import Network, Side, Simulation

from tether.swarm.udx import machine as udx
from tether.swarm.udx import wire

NUMBER = st.one_of(st.integers(0, 40), st.integers(0, (1 << 32) - 1), st.sampled_from([(1 << 32) - 1, 1 << 31, (1 << 31) - 1, 70_000]))
PACKET = st.builds(
    lambda flags, offset, numbers, tail: (
        b"\xff\x01" + bytes([flags, offset]) + b"".join(each.to_bytes(4, "little") for each in numbers) + tail
    ),
    st.integers(0, 255).filter(lambda flags: not flags & wire.DESTROY),
    st.sampled_from([0, 0, 0, 1, 8, 16, 255]),
    st.tuples(*[NUMBER] * 4),
    st.one_of(st.binary(max_size=64), st.lists(NUMBER, max_size=104).map(lambda found: b"".join(n.to_bytes(4, "little") for n in found))),
)


def connected(now=0.0):
    machine = udx.Machine(now)
    machine.connect("there", 7, 48, now)
    return machine


def feed(machine, datagram):
    machine.receive(datagram, wire.parse_header(datagram))


@given(st.lists(st.one_of(PACKET, st.floats(0.0001, 3.0)), max_size=40))
def test_any_packets_at_any_time_raise_nothing_and_keep_the_state_whole(steps):
    machine, now = connected(), 0.0
    machine.write(bytes(30_000))
    for step in steps:
        if isinstance(step, float):
            now += step
            if machine.deadline and machine.deadline <= now and not machine.is_gone:
                machine.expire(now)
        else:
            feed(machine, step)
        machine.turn(now)
        while machine.flush(now):
            machine.outgoing.clear()
        machine.outgoing.clear()
        flight = machine.sender.flight
        assert flight.una <= flight.next
        assert flight.count >= 0
        assert machine.receiver.nbytes < 1 << 16
        assert machine.sender.unacknowledged_nbytes >= 0


@given(st.lists(PACKET, max_size=20), st.booleans())
def test_packets_before_connect_and_after_the_end_are_no_danger(packets, before):
    machine = udx.Machine(0.0) if before else connected()
    if not before:
        machine.destroy(0.0)
    for packet in packets:
        feed(machine, packet)
    assert machine.turn(0.1) == [] or before
    machine.flush(0.1)
    assert len(machine.outgoing) <= 2


def test_an_ack_of_what_was_never_sent_is_not_believed():
    machine = connected()
    machine.write(bytes(5000))
    machine.flush(0.0)
    feed(machine, wire.build_packet(0, 1, 4 << 20, 0, 1000))
    feed(machine, wire.build_ack(1, 4 << 20, 0, 0, [(3, 1 << 31), (50, 60), (4, 2)]))
    machine.turn(0.1)
    assert machine.sender.flight.una == 0
    assert machine.sender.flight.sacked.count == 0


def test_a_flood_of_packets_out_of_order_takes_no_more_memory_than_a_window():
    machine, fate = connected(), random.Random("flood")
    tracemalloc.start()
    for _ in range(60_000):
        packet = wire.build_packet(wire.DATA, 1, 1, fate.randrange(1, 1 << 32), fate.randrange(1 << 32)) + bytes(4)
        feed(machine, packet)
        machine.turn(1.0)
        machine.flush(1.0)
        machine.outgoing.clear()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20


def test_a_paused_stream_fed_tiny_packets_holds_their_bytes_and_little_more():
    machine = connected()
    machine.pause()
    tracemalloc.start()
    for seq in range(100_000):
        feed(machine, wire.build_packet(wire.DATA, 1, 1, seq, 0) + b"ab")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert machine.receiver.nbytes == 200_000
    assert most < 2 << 20


def test_a_peer_that_is_gone_is_given_up_and_one_that_never_was():
    for heard in (True, False):
        fate = "gone" if heard else "never there"
        left = Side("left", udx.Machine(0.0), Network(), [(0.0, bytes(300_000))])
        right = Side("right", udx.Machine(0.0), Network(cuts=[(0.03 if heard else 0.0, 1e9)]), [])
        simulation = Simulation(fate, left, right)
        while not left.machine.is_over:
            simulation.step()
        assert left.machine.code == "ETIMEDOUT"
        assert 20 < simulation.now < 40


@pytest.mark.parametrize(("keepalive", "patience"), [(0.1, 15.0), (1.0, 15.0), (10.0, 70.0)])
def test_an_idle_peer_that_is_gone_is_noticed_by_unanswered_keepalives(keepalive, patience):
    machine, now = connected(), 0.0
    machine.set_keepalive(keepalive, now)
    feed(machine, wire.build_packet(0, 1, 4 << 20, 0, 0))
    while not machine.is_over:
        now = machine.deadline
        machine.expire(now)
        machine.turn(now)
    assert machine.code == "ETIMEDOUT"
    assert patience <= now <= patience + 2 * keepalive
    assert {parsed[2] for parsed in (wire.parse_header(each.wire) for each in machine.outgoing)} == {wire.HEARTBEAT}


@pytest.mark.parametrize(
    ("network", "rate"),
    [
        ({"rate": 12.5e6, "delay": 0.01, "queue": 250_000}, 10e6),
        ({"rate": 12.5e6, "delay": 0.01, "queue": 250_000, "loss": 0.01}, 9e6),
        ({"rate": 12.5e6, "delay": 0.01, "queue": 30_000, "loss": 0.01}, 6e6),
        ({"delay": 0.01, "loss": 0.01}, 30e6),
        ({"rate": 1.25e6, "delay": 0.03, "queue": 60_000, "loss": 0.02}, 0.9e6),
    ],
)
def test_loss_and_short_queues_do_not_make_it_slow(network, rate):
    """The window of CUBIC comes to 1 to 3 MB/s here."""
    nbytes = int(rate) * 2
    left = Side("left", udx.Machine(0.0), Network(**network, batched=True), [(0.0, random.Random("bulk").randbytes(nbytes))])
    right = Side("right", udx.Machine(0.0), Network(**network, batched=True), [])
    simulation = Simulation("bulk", left, right)
    simulation.run()
    assert len(right.received) == nbytes
    assert nbytes / simulation.now > rate


def test_a_path_that_narrows_in_the_middle_delivers_all_and_goes_on_with_smaller_packets():
    data = random.Random("narrow").randbytes(4_000_000)
    left = Side("left", udx.Machine(0.0), Network(mtu=[(0.1, 1280)], rate=12.5e6), [(0.0, data)])
    simulation = Simulation("narrow", left, Side("right", udx.Machine(0.0), Network(), []))
    simulation.run()
    assert simulation.sides[1].received == data
    assert left.machine.sender.mtu.size == 1200
    assert simulation.now < 5


async def test_garbage_on_a_real_socket_neither_stops_it_nor_is_told_to_the_loop():
    reported, pair, fate = [], Pair().connect(), random.Random("garbage")
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    try:
        pair.right_socket.on_message = lambda *_: None
        pair.left.stream.write(bytes(2_000_000))
        for turn in range(600):
            head = bytes([255, 1, fate.randrange(256) & ~wire.DESTROY, fate.randrange(256)]) + (2).to_bytes(4, "little")
            for datagram in (fate.randbytes(fate.randrange(80)), head[: fate.randrange(9)], head + fate.randbytes(fate.randrange(12, 60))):
                pair.left_socket.send(datagram, ("127.0.0.1", pair.right_port))
            if turn % 50 == 0:
                await asyncio.sleep(0)
        await until(lambda: pair.right_socket.statistics.nbytes_received > 2_000_000)
        assert reported == []
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
        pair.close()
