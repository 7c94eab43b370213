"""The manager's end of hops to a lent worker, from the gateway's real transport: answers, deadlines, limits, and connections that end."""

import asyncio
import json
import socket

import pytest

from tether.errors import ConfigError, UnknownModelError
from tether.gateway.transport import UnixTransport
from tether.manager.hops import HopLimits, HopServer, sweep
from tether.ports import Hop, HopReply, Undelivered
from tether.wire.frames import FrameWriter
from tether.wire.ring import Ring

PROMPT = 20.0


class Rig:
    """A hop server before a lab that answers as `answer` does; by default it echoes what it is sent."""

    def __init__(self, folder):
        self.folder, self.answer, self.hops, self.ended = folder, echo, [], []
        self.ring, self.transports, self.server = Ring(8 << 20), [], None

    def serve(self, limits=None):
        self.server = HopServer(self.folder, self.infer, limits)
        self.endpoint = self.server.start()
        return self.server

    async def infer(self, hop):
        self.hops.append(hop)
        try:
            return await self.answer(hop)
        finally:
            self.ended.append(hop)

    def gateway(self):
        self.transports.append(UnixTransport(str(self.endpoint), self.ring))
        return self.transports[-1]

    async def aclose(self):
        for transport in self.transports:
            transport.close()
        self.ring.close()
        if self.server is not None:
            await self.server.aclose()


@pytest.fixture
async def rig(tmp_path):
    made = Rig(tmp_path)
    yield made
    await made.aclose()


async def echo(hop):
    return HopReply(200, hop.body, hop.header_nbytes)


async def never(_hop):
    await asyncio.Event().wait()


def ask(transport, body=b"{}", header_nbytes=0, timeout=PROMPT):
    """The reply to come; `.abandon` of it."""
    future = asyncio.get_running_loop().create_future()
    asked = Asked(future)
    asked.abandon = transport.send(Hop(body, header_nbytes, timeout), future.set_result)
    return asked


class Asked:
    def __init__(self, future):
        self.future, self.abandon = future, None

    def __await__(self):
        return asyncio.wait_for(self.future, PROMPT).__await__()


async def eventually(condition):
    async with asyncio.timeout(PROMPT):
        while not condition():  # noqa: ASYNC110 (other tasks make it true)
            await asyncio.sleep(0.005)


async def test_small_bodies_in_frames_and_large_ones_in_the_ring_arrive_whole_and_answers_come_back_by_request(rig):
    rig.serve()
    transport, free = rig.gateway(), list(rig.ring._free)
    bodies = [bytes([number]) * (1 << 17 if number % 3 == 0 else 100 * number) for number in range(20)]
    replies = await asyncio.gather(*(ask(transport, body, number) for number, body in enumerate(bodies)))
    assert replies == [HopReply(200, body, number) for number, body in enumerate(bodies)]
    assert rig.ring._free == free
    assert all(0 < hop.timeout <= PROMPT for hop in rig.hops)


async def test_the_socket_is_the_users_alone_and_goes_with_the_server(rig):
    rig.serve()
    assert rig.endpoint.stat().st_mode & 0o777 == 0o600
    await rig.server.aclose()
    assert not rig.endpoint.exists()
    await rig.server.aclose()
    assert await ask(rig.gateway()) is Undelivered.NOT_SENT


async def test_what_a_killed_manager_left_is_removed_and_nothing_else(rig):
    other = rig.folder / "manager.sock"
    other.touch()
    rig.serve()
    sweep(rig.folder)
    assert list(rig.folder.iterdir()) == [other]


async def test_what_became_of_a_hop_at_the_other_lab_is_told_of_each_by_itself(rig):
    rig.serve()

    async def answer(hop):
        match hop.body:
            case b"not sent":
                return Undelivered.NOT_SENT
            case b"lost":
                return Undelivered.LOST
            case b"unknown":
                raise UnknownModelError("no such model there")
            case b"bug":
                raise ZeroDivisionError
        return await echo(hop)

    rig.answer, transport = answer, rig.gateway()
    *others, unknown, bug = await asyncio.gather(*(ask(transport, body) for body in (b"not sent", b"lost", b"fine", b"unknown", b"bug")))
    assert others == [Undelivered.NOT_SENT, Undelivered.LOST, HopReply(200, b"fine")]
    assert [(reply.status, json.loads(reply.body)["code"]) for reply in (unknown, bug)] == [(404, "unknown_model"), (500, "internal")]


async def test_a_hop_ends_at_its_deadline_though_its_gateway_forgets_it(rig):
    rig.serve()
    rig.answer = never
    reply = await ask(rig.gateway(), timeout=0.05)
    assert (reply.status, json.loads(reply.body)["code"]) == (504, "deadline_exceeded")
    assert (len(rig.ended), rig.server.in_flight) == (1, 0)


async def test_what_a_gateway_gives_up_is_cancelled_and_its_ring_block_comes_back(rig):
    rig.serve()
    rig.answer, transport, free = never, rig.gateway(), list(rig.ring._free)
    given_up, other = ask(transport, b"x" * (1 << 17)), ask(transport, b"y")
    await eventually(lambda: len(rig.hops) == 2)
    given_up.abandon()
    await eventually(lambda: rig.ring._free == free)
    assert [len(hop.body) for hop in rig.ended] == [1 << 17]
    assert (given_up.future.done(), other.future.done()) == (False, False)
    given_up.abandon()
    rig.answer = echo
    assert await ask(transport, b"z") == HopReply(200, b"z")


async def test_the_end_of_a_gateways_connection_cancels_its_hops_and_no_others(rig):
    rig.serve()
    rig.answer, one, another = never, rig.gateway(), rig.gateway()
    asked, kept = [ask(one, b"1"), ask(one, b"2")], ask(another, b"3")
    await eventually(lambda: len(rig.hops) == 3)
    one.close()
    await eventually(lambda: len(rig.ended) == 2)
    assert [await each for each in asked] == [Undelivered.LOST] * 2
    assert not kept.future.done()


async def test_closing_the_server_loses_what_is_open_at_once(rig):
    rig.serve()
    rig.answer, transport = never, rig.gateway()
    asked = ask(transport)
    await eventually(lambda: rig.hops)
    await rig.server.aclose()
    assert await asked is Undelivered.LOST
    assert (len(rig.ended), rig.server.in_flight) == (1, 0)


async def test_a_server_that_retires_answers_what_it_has_and_sends_nothing_more(rig):
    rig.serve()
    go, transport = asyncio.Event(), rig.gateway()

    async def answer(hop):
        await go.wait()
        return await echo(hop)

    rig.answer = answer
    large = ask(transport, b"x" * (8 << 20))
    await eventually(lambda: rig.hops)
    retiring = asyncio.create_task(rig.server.retire(PROMPT))
    await eventually(lambda: not rig.endpoint.exists())
    assert await ask(transport) is Undelivered.NOT_SENT
    go.set()
    assert (await large).body == b"x" * (8 << 20)
    await retiring
    await eventually(lambda: transport.closed)


async def test_what_is_on_its_way_when_a_server_retires_was_not_sent(rig):
    rig.serve()
    transport = rig.gateway()
    await ask(transport)
    late = ask(transport)
    await rig.server.retire(PROMPT)
    assert await late is Undelivered.NOT_SENT


async def test_a_server_that_retires_waits_no_longer_than_it_is_told(rig):
    rig.serve()
    rig.answer, transport = never, rig.gateway()
    asked = ask(transport)
    await eventually(lambda: rig.hops)
    await rig.server.retire(0.05)
    assert await asked is Undelivered.LOST


async def test_what_is_too_much_was_not_sent_and_one_large_body_always_passes(rig):
    rig.serve(HopLimits(most_open=2, most_nbytes=1000))
    rig.answer, transport = never, rig.gateway()
    first = ask(transport, b"x" * 5000)
    assert await ask(transport, b"y") is Undelivered.NOT_SENT
    first.abandon()
    await eventually(lambda: rig.ended)
    await eventually(lambda: not rig.server.in_flight)
    several = [ask(transport, b"x") for _ in range(3)]
    assert await several[2] is Undelivered.NOT_SENT
    assert rig.server.in_flight == 2


@pytest.mark.parametrize("greeting", [b"-" + b"\xff" * 64, b"R", b"", b"-"], ids=["garbage", "no ring", "nothing", "silence"])
async def test_a_connection_that_breaks_the_rules_costs_nobody_else_anything(rig, greeting):
    rig.serve()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(rig.endpoint))
        stranger.sendall(greeting)
        if greeting == b"R":
            writer = FrameWriter()
            writer.request(1, b"x" * 100, 0, 1000, offset=0)
            stranger.sendall(b"".join(writer.take()))
        assert await ask(rig.gateway(), b"{}") == HopReply(200, b"{}")
    assert await ask(rig.gateway(), b"[]") == HopReply(200, b"[]")


async def test_a_gateway_that_does_not_read_gets_its_answers_later_and_holds_up_nobody(rig):
    rig.serve()
    writer, body = FrameWriter(), b"x" * (1 << 20)
    for number in range(8):
        writer.request(number, body, 0, 60_000)
    reader, sent = await asyncio.open_unix_connection(str(rig.endpoint), limit=1 << 12)
    sent.writelines([b"-", *writer.take()])
    await eventually(lambda: len(rig.ended) == 8)
    assert await ask(rig.gateway(), b"{}") == HopReply(200, b"{}")
    async with asyncio.timeout(PROMPT):
        assert len(await reader.readexactly(8 * len(body))) == 8 * len(body)
    sent.close()
    await sent.wait_closed()


async def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="TMPDIR"):
        HopServer(tmp_path / "none", echo).start()
    with pytest.raises(ConfigError):
        HopServer(tmp_path / ("x" * 90), echo).start()
