"""Streams over real sockets of this machine, of both families, with and without the kernel's batches."""

import asyncio
import contextlib
import gc
import random
import socket

import pytest
from udx_pairs import End, Pair, until

from tether.errors import ConflictError, PayloadTooLargeError, PortBusyError, QueueFullError, RequestError
from tether.swarm.udx import Udx, UdxStream

IP_RECVTTL = getattr(socket, "IP_RECVTTL", 12)  # Python names it from 3.14 on; 12 is that of Linux
DATA = random.Random("udx").randbytes(3_000_000)


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("::1", 0))
        return True
    return False


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6: the loopback has none")


@pytest.fixture
async def made():
    """Makes pairs and closes them."""
    pairs = []

    def make(*arguments, **options):
        pairs.append(Pair(*arguments, **options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
async def pair(made):
    return made().connect()


@pytest.fixture
async def udx():
    udx = Udx()
    yield udx
    udx.close()


@pytest.mark.parametrize(
    ("host", "options"),
    [
        ("127.0.0.1", {}),
        pytest.param("::1", {}, marks=IPV6),
        ("127.0.0.1", {"gso": False}),
        ("127.0.0.1", {"gro": False}),
        ("127.0.0.1", {"gso": False, "gro": False}),
    ],
)
async def test_bytes_go_both_ways_and_both_ends_close(made, host, options):
    pair = made(host, **options).connect()
    for end, data in ((pair.left, DATA), (pair.right, DATA[::-1])):
        for at in range(0, len(data), 100_000):
            end.stream.write(data[at : at + 100_000])
        end.stream.write_end()
    assert await pair.left.until_closed() is None
    assert await pair.right.until_closed() is None
    assert bytes(pair.right.data) == DATA
    assert bytes(pair.left.data) == DATA[::-1]
    assert pair.left.events.count("end") == pair.right.events.count("end") == 1
    assert pair.left.stream.mtu == 1500


@IPV6
async def test_a_socket_of_both_families_speaks_with_an_ipv4_one(udx):
    both, one = udx.socket(6), udx.socket()
    both_port, one_port = both.bind(), one.bind(0, "127.0.0.1")
    heard = []
    one.on_message = lambda data, address: heard.append((data, address))
    both.on_message = lambda data, address: heard.append((data, address))
    both.send(b"to four", ("127.0.0.1", one_port))
    one.send(b"to both", ("127.0.0.1", both_port))
    await until(lambda: len(heard) == 2)
    assert sorted(heard) == [(b"to both", ("127.0.0.1", one_port)), (b"to four", ("127.0.0.1", both_port))]
    left, right = End(udx, 1), End(udx, 2)
    left.stream.connect(both, 2, one_port, "127.0.0.1")
    right.stream.connect(one, 1, both_port, "127.0.0.1")
    left.stream.write(DATA)
    await until(lambda: len(right.data) == len(DATA))


async def test_one_side_may_end_while_the_other_goes_on(pair):
    pair.left.stream.write(b"question")
    pair.left.stream.write_end()
    await until(lambda: pair.right.events == ["end"])
    assert pair.right.data == b"question"
    pair.right.stream.write(DATA)
    await until(lambda: len(pair.left.data) == len(DATA))
    assert not pair.left.stream.is_closed
    pair.right.stream.write_end()
    assert [await pair.left.until_closed(), await pair.right.until_closed()] == [None, None]


async def test_destroying_a_stream_resets_it_at_the_peer(pair):
    pair.left.stream.write(b"last words")
    await until(lambda: pair.right.data == b"last words")
    pair.left.stream.destroy()
    assert await pair.left.until_closed() is None
    assert await pair.right.until_closed() == "ECONNRESET"


async def test_a_peer_that_missed_the_destroy_is_told_again_when_it_speaks(pair):
    pair.left.stream.write(b"x")
    await until(lambda: pair.right.data == b"x")
    pair.left_socket.transmit = lambda *_, **__: None
    pair.left.stream.destroy()
    del pair.left_socket.transmit
    pair.right.stream.write(b"are you there?")
    assert await pair.right.until_closed() == "ECONNRESET"


async def test_messages_go_beside_the_stream(pair):
    pair.left.stream.send_message(b"one")
    pair.right.stream.send_message(b"two")
    await until(lambda: pair.left.messages and pair.right.messages)
    assert (pair.right.messages, pair.left.messages) == ([b"one"], [b"two"])
    pair.left.stream.send_message(bytes(1452))
    await until(lambda: pair.right.messages[1:] == [bytes(1452)])
    with pytest.raises(PayloadTooLargeError):
        pair.left.stream.send_message(bytes(1453))


async def test_datagrams_of_no_stream_are_messages_of_the_socket(pair):
    heard = []
    pair.right_socket.on_message = lambda data, address: heard.append((data, address))
    for data in (b"", b"short", b"\xff\x01" + bytes(18), b"\xff\x01\x01\x00" + bytes(1000), bytes(3000)):
        pair.left_socket.send(data, ("127.0.0.1", pair.right_port))
    await until(lambda: len(heard) == 5)
    assert {address for _, address in heard} == {("127.0.0.1", pair.left_port)}
    assert heard[-1][0] == bytes(3000)


async def test_a_reader_that_pauses_stops_the_writer_and_nothing_is_lost(pair):
    pair.right.stream.pause()
    sent = random.Random("pause").randbytes(12_000_000)
    assert not pair.left.stream.write(sent)
    pair.left.stream.write_end()
    await until(lambda: pair.left.stream.machine.sender.window == 0)
    assert pair.right.stream.stats["unread_nbytes"] <= (4 << 20) + (1 << 16)
    assert not pair.right.data
    assert not pair.right.events
    pair.right.stream.resume()
    await until(lambda: pair.right.events == ["end"])
    assert bytes(pair.right.data) == sent
    assert "drain" in pair.left.events


async def test_what_waits_to_be_sent_is_bounded(pair):
    pair.right.stream.pause()
    pair.left.stream.write(bytes(80 << 20))
    with pytest.raises(QueueFullError, match="on_drain"):
        pair.left.stream.write(b"more")


async def test_a_firewall_may_connect_and_what_came_before_is_kept(udx):
    here, there = udx.socket(), udx.socket()
    here_port, there_port = here.bind(0, "127.0.0.1"), there.bind(0, "127.0.0.1")
    asked = []

    def firewall(socket, host, port):
        asked.append((socket, host, port))
        late.stream.connect(socket, 1, port, host)
        return False

    late, early = End(udx, 2, on_firewall=firewall), End(udx, 1)
    early.stream.connect(there, 2, here_port, "127.0.0.1")
    early.stream.write(DATA)
    await until(lambda: len(late.data) == len(DATA))
    assert asked == [(here, "127.0.0.1", there_port)]


async def test_data_that_came_before_connect_is_delivered_after_it(udx):
    here, there = udx.socket(), udx.socket()
    here_port, there_port = here.bind(0, "127.0.0.1"), there.bind(0, "127.0.0.1")
    late, early = End(udx, 2, on_firewall=lambda *_: False), End(udx, 1)
    early.stream.connect(there, 2, here_port, "127.0.0.1")
    early.stream.write(b"early")
    await until(lambda: late.stream.stats["unread_nbytes"] == 5)
    assert not late.data
    late.stream.connect(here, 1, there_port, "127.0.0.1")
    await until(lambda: late.data == b"early")


@pytest.mark.parametrize("firewall", [None, lambda *_: True])
async def test_a_firewall_refuses_and_so_does_none(udx, firewall):
    here, there = udx.socket(), udx.socket()
    here_port = here.bind(0, "127.0.0.1")
    asked = []
    late, early = End(udx, 2, on_firewall=firewall and (lambda *at: asked.append(at) or firewall(*at))), End(udx, 1)
    here.on_message = asked.append
    early.stream.connect(there, 2, here_port, "127.0.0.1")
    early.stream.write(b"early")
    await until(lambda: here.statistics.batches_received >= 1)
    assert late.stream.stats["packets_received"] == 0
    assert bool(asked) == bool(firewall)


async def test_a_stream_moves_to_another_socket_of_the_peer_in_the_middle(pair):
    other = pair.right_udx.socket()
    other_port = other.bind(0, "127.0.0.1")
    pair.right.stream.on_firewall = lambda *_: False
    pair.left.stream.write(DATA)
    await until(lambda: pair.right.data)
    pair.left.stream.change_remote(pair.left_socket, 2, other_port, "127.0.0.1")
    pair.left.stream.write(DATA)
    pair.left.stream.write_end()
    await until(lambda: pair.right.events == ["end"])
    assert pair.left.events.count("moved") == 1
    assert bytes(pair.right.data) == DATA * 2
    assert other.statistics.nbytes_received > len(DATA) // 2


async def test_a_relay_joins_two_peers_and_ends_with_them(made):
    pair = made()
    relay = made()
    near, far = End(relay.left_udx, 11), End(relay.left_udx, 12)
    near.stream.connect(relay.left_socket, 1, pair.left_port, "127.0.0.1")
    far.stream.connect(relay.left_socket, 2, pair.right_port, "127.0.0.1")
    near.stream.relay_to(far.stream)
    far.stream.relay_to(near.stream)
    pair.left.stream.connect(pair.left_socket, 11, relay.left_port, "127.0.0.1")
    pair.right.stream.connect(pair.right_socket, 12, relay.left_port, "127.0.0.1")
    pair.left.stream.write(DATA)
    pair.right.stream.write(DATA[::-1])
    pair.left.stream.send_message(b"beside")
    await until(lambda: len(pair.right.data) == len(pair.left.data) == len(DATA) and pair.right.messages)
    assert bytes(pair.right.data) == DATA
    assert bytes(pair.left.data) == DATA[::-1]
    assert not near.data
    with pytest.raises(RequestError):
        near.stream.relay_to(far.stream)
    pair.left.stream.destroy()
    assert await pair.right.until_closed() == "ECONNRESET"
    assert await near.until_closed() == "ECONNRESET"
    assert await far.until_closed() is None


async def test_keepalive_asks_for_signs_of_life(pair):
    pair.left.stream.write(b"x")
    await until(lambda: pair.right.data == b"x")
    pair.left.stream.set_keepalive(20)
    heard = pair.left.stream.stats["packets_received"]
    await until(lambda: pair.left.stream.stats["packets_received"] >= heard + 3)
    pair.left.stream.set_keepalive(0)
    assert not pair.left.stream.machine.deadline


async def test_a_datagram_may_have_few_hops_and_the_next_has_the_usual(udx):
    here, there = udx.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    there.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    there.bind(("127.0.0.1", 0))
    there.setblocking(False)
    here.send(b"near", there.getsockname(), ttl=3)
    here.send(b"far", there.getsockname())
    hops = []

    def receive():
        with contextlib.suppress(BlockingIOError):
            data, ancillary, *_ = there.recvmsg(100, 100)
            hops.append((data, int.from_bytes(ancillary[0][2], "little")))
        return len(hops) == 2

    await until(receive)
    there.close()
    assert hops == [(b"near", 3), (b"far", 64)]
    with pytest.raises(RequestError):
        here.send(b"x", ("127.0.0.1", 1), ttl=256)


async def test_small_writes_of_one_turn_leave_together(pair):
    for _ in range(1000):
        pair.left.stream.write(b"0123456789")
    await until(lambda: len(pair.right.data) == 10_000)
    assert pair.left.stream.stats["packets_sent"] < 20


async def test_a_callback_that_raises_is_reported_and_other_streams_are_served(pair):
    loop = asyncio.get_running_loop()
    reported = []
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    pair.right.stream.on_data = lambda _: 1 / 0
    others = End(pair.left_udx, 3), End(pair.right_udx, 4)
    others[0].stream.connect(pair.left_socket, 4, pair.right_port, "127.0.0.1")
    others[1].stream.connect(pair.right_socket, 3, pair.left_port, "127.0.0.1")
    pair.left.stream.write(b"x")
    others[0].stream.write(b"y")
    await until(lambda: others[1].data == b"y" and reported)
    assert isinstance(reported[0], ZeroDivisionError)
    loop.set_exception_handler(None)


async def test_a_closed_socket_closes_its_streams(pair):
    pair.left_socket.close()
    pair.left_socket.close()
    assert await pair.left.until_closed() == "ECANCELED"
    assert pair.left_socket.address is None
    pair.left_socket.send(b"into the void", ("127.0.0.1", pair.right_port))
    assert pair.left.stream.write(b"too late")
    pair.left.stream.write_end()
    pair.left.stream.destroy()


async def test_ids_are_free_again_once_a_stream_is_closed(pair):
    with pytest.raises(ConflictError):
        UdxStream(pair.left_udx, 1)
    pair.left.stream.destroy()
    again = End(pair.left_udx, 1)
    again.stream.connect(pair.left_socket, 2, pair.right_port, "127.0.0.1")
    assert pair.left_udx.streams[1] is again.stream


@pytest.mark.parametrize(
    "act",
    [
        lambda pair: pair.left.stream.connect(pair.left_socket, 2, 1, "127.0.0.1"),
        lambda pair: End(pair.left_udx, 5).stream.connect(pair.left_socket, 2, 0, "127.0.0.1"),
        lambda pair: End(pair.left_udx, 6).stream.connect(pair.left_socket, 2, 1, "example.com"),
        lambda pair: End(pair.left_udx, 7).stream.connect(pair.left_socket, 1 << 32, 1, "127.0.0.1"),
        lambda pair: End(pair.left_udx, 8).stream.connect(pair.left_socket, 2, 1, "::1"),
        lambda pair: End(pair.left_udx, 9).stream.change_remote(pair.left_socket, 2, 1, "127.0.0.1"),
        lambda pair: pair.left_socket.bind(),
        lambda pair: pair.left_udx.socket().bind(0, "203.0.113.7"),
        lambda pair: pair.left_udx.socket().bind(70_000),
        lambda pair: pair.left_udx.socket().bind(-1),
        lambda pair: pair.left_socket.send(bytes(65_508), ("127.0.0.1", 1)),
    ],
)
async def test_what_can_not_be_is_refused_with_words(pair, act):
    with pytest.raises(RequestError):
        act(pair)


async def test_a_port_that_is_taken_is_named(pair):
    with pytest.raises(PortBusyError, match=str(pair.left_port)):
        pair.right_udx.socket().bind(pair.left_port, "127.0.0.1")


async def test_of_many_closed_streams_only_the_latest_still_answer(udx, monkeypatch):
    monkeypatch.setattr("tether.swarm.udx.endpoint._MAX_LINGERING", 10)
    socket = udx.socket()
    socket.bind(0, "127.0.0.1")
    for stream_id in range(50):
        end = End(udx, stream_id)
        end.stream.connect(socket, 1, 9, "127.0.0.1")
        end.stream.destroy()
    assert sorted(udx.streams) == list(range(40, 50))


async def test_closing_leaves_nothing_behind(made):
    pair = made().connect()
    pair.left.stream.write(DATA)
    await until(lambda: pair.right.data)
    pair.close()
    assert not pair.left_udx.streams
    assert not pair.left_udx.sockets
    gc.collect()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
