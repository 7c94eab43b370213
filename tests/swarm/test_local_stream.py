"""Streams over a Unix socket: what every message stream owes its user, on both event loops, and who may open one."""

import asyncio
import contextlib
import os
import socket
import struct
import sys

import pytest
import uvloop

from tether.errors import ConfigError, ForbiddenError, PayloadTooLargeError, ProtocolError, ServiceUnavailableError, StreamLostError
from tether.swarm.rpc.rpc import RpcConnection, RpcLimits, Service
from tether.swarm.wire import local
from tether.swarm.wire.local import MAX_MESSAGE, THIS_USER, LocalStream
from tether.testing.streams import stream_pair

SECONDS = 30


class Heard:
    """What a stream delivered: messages, None for its end."""

    def __init__(self, stream):
        self.messages = asyncio.Queue()
        self.closed = asyncio.get_running_loop().create_future()
        stream.start(self._take, lambda: self.messages.put_nowait(None), self.closed.set_result)

    def _take(self, message):
        self.messages.put_nowait(bytes(message))

    async def next(self):
        return await asyncio.wait_for(self.messages.get(), SECONDS)

    async def close(self):
        return await asyncio.wait_for(self.closed, SECONDS)


async def until(holds):
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110 (nothing says when a stream has delivered)
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def local_pair(folder):
    opened = asyncio.get_running_loop().create_future()
    server = await local.serve(folder / "door", opened.set_result)
    one = await local.connect(folder / "door")
    other = await asyncio.wait_for(opened, SECONDS)
    try:
        yield one, other
    finally:
        one.destroy()
        other.destroy()
        server.close()


@contextlib.asynccontextmanager
async def memory_pair(_folder):
    yield stream_pair(THIS_USER, THIS_USER)


# --- what every stream owes its user


async def messages_of_all_sizes_arrive_whole_and_in_order(one, other):
    heard = Heard(other)
    sent = [os.urandom(size) for size in (0, 1, 2, 3, 4, 17, 1200, 65_535, 65_536, 200_000, 1, MAX_MESSAGE)]
    for message in sent:
        one.send(message)
    one.send(memoryview(b"a view"))
    array = bytearray(b"an array")
    one.send(array)
    array[:] = b"........"
    assert [await heard.next() for _ in sent] == sent
    assert [await heard.next(), await heard.next()] == [b"a view", b"an array"]


async def both_sides_end_in_order(one, other):
    here, there = Heard(one), Heard(other)
    one.send(b"the last word")
    one.end()
    one.end()
    one.send(b"not sent any more")
    assert [await there.next(), await there.next()] == [b"the last word", None]
    other.send(b"an answer to it")
    other.end()
    assert [await here.next(), await here.next()] == [b"an answer to it", None]
    assert [await here.close(), await there.close()] == [None, None]
    assert one.closed
    assert other.closed


async def both_sides_end_at_once(one, other):
    here, there = Heard(one), Heard(other)
    one.send(b"1")
    other.send(b"2")
    one.end()
    other.end()
    assert [await here.next(), await here.next(), await there.next(), await there.next()] == [b"2", None, b"1", None]
    assert [await here.close(), await there.close()] == [None, None]


async def nothing_is_lost_that_came_before_somebody_listened(one, other):
    one.send(b"early")
    one.send(b"bird")
    one.end()
    await asyncio.sleep(0.02)
    heard = Heard(other)
    assert [await heard.next(), await heard.next(), await heard.next()] == [b"early", b"bird", None]


async def nobody_reads_nobody_sends(one, other):
    heard = Heard(other)
    other.pause()
    sent = 0
    with contextlib.suppress(TimeoutError):
        while True:
            sent += 1
            if not one.send(bytes(65_536)):
                await asyncio.wait_for(one.drained(), 0.3)
    assert sent * 65_536 < 4 << 20
    assert heard.messages.empty()
    other.resume()
    for _ in range(sent):
        assert await heard.next() == bytes(65_536)
    await asyncio.wait_for(one.drained(), SECONDS)


async def a_pause_within_a_message_holds_the_next_one(one, other):
    seen = []

    def take(message):
        seen.append(bytes(message))
        other.pause()

    other.start(take, lambda: None, lambda _: None)
    for number in range(3):
        one.send(b"%d" % number)
    for expected in ([b"0"], [b"0", b"1"], [b"0", b"1", b"2"]):
        await until(lambda expected=expected: seen == expected)
        await asyncio.sleep(0.02)
        assert seen == expected
        other.resume()


async def a_cut_ends_both_directions_and_those_who_wait(one, other):
    here, there = Heard(one), Heard(other)
    other.pause()
    while one.send(bytes(65_536)):  # noqa: ASYNC110 (until there is no room, which is what it says)
        await asyncio.sleep(0)
    waiting = asyncio.ensure_future(one.drained())
    await asyncio.sleep(0.02)
    one.destroy()
    one.destroy()
    with pytest.raises(ServiceUnavailableError):
        await asyncio.wait_for(waiting, SECONDS)
    await here.close()
    other.resume()
    await there.close()
    assert one.send(b"nobody") is True
    with pytest.raises(ServiceUnavailableError):
        await one.drained()


async def who_starts_late_is_told_of_the_end(one, other):
    here = Heard(one)
    one.destroy()
    await here.close()
    await asyncio.sleep(0.02)
    await Heard(other).close()


CONTRACT = (
    messages_of_all_sizes_arrive_whole_and_in_order,
    both_sides_end_in_order,
    both_sides_end_at_once,
    nothing_is_lost_that_came_before_somebody_listened,
    nobody_reads_nobody_sends,
    a_pause_within_a_message_holds_the_next_one,
    a_cut_ends_both_directions_and_those_who_wait,
    who_starts_late_is_told_of_the_end,
)


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("pair", [local_pair, memory_pair], ids=["socket", "memory"])
async def test_a_stream_keeps_its_promises(promise, pair, tmp_path):
    async with pair(tmp_path) as (one, other):
        await promise(one, other)


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_a_stream_keeps_its_promises_on_uvloop(promise, tmp_path):
    async def story():
        async with local_pair(tmp_path) as (one, other):
            await promise(one, other)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())


# --- what only a socket can do


async def test_both_sides_have_the_name_of_this_user(tmp_path):
    async with local_pair(tmp_path) as (one, other):
        assert (one.peer, one.is_initiator, other.peer, other.is_initiator) == (THIS_USER, True, THIS_USER, False)
        assert repr(one) == "<LocalStream open>"


async def test_an_end_is_told_from_a_death(tmp_path):
    async with local_pair(tmp_path) as (one, other):
        here = Heard(one)
        other.send(b"half a")
        other.destroy()
        assert await here.next() == b"half a"
        error = await here.close()
        assert isinstance(error, StreamLostError)
        assert here.messages.empty(), "no end was told"


async def test_who_goes_after_its_end_without_hearing_ours_broke_the_stream(tmp_path):
    async with local_pair(tmp_path) as (one, other):
        here = Heard(one)
        other.end()
        assert await here.next() is None
        other.destroy()
        assert isinstance(await here.close(), StreamLostError)


@pytest.mark.parametrize("sent", [struct.pack("<I", MAX_MESSAGE + 1), struct.pack("<II", 0xFFFF_FFFF, 1) + b"x"])
async def test_what_is_no_frame_cuts_the_other_side(tmp_path, sent):
    opened = asyncio.get_running_loop().create_future()
    server = await local.serve(tmp_path / "door", opened.set_result)
    _, writer = await asyncio.open_unix_connection(tmp_path / "door")
    heard = Heard(await opened)
    writer.write(sent)
    assert isinstance(await heard.close(), ProtocolError)
    writer.close()
    server.close()


async def test_a_message_over_the_limit_is_refused_before_it_is_sent(tmp_path):
    async with local_pair(tmp_path) as (one, _):
        with pytest.raises(PayloadTooLargeError):
            one.send(bytes(MAX_MESSAGE + 1))


async def test_a_handler_that_raises_closes_the_stream(tmp_path):
    loop, raised = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: raised.append(context["exception"]))
    async with local_pair(tmp_path) as (one, other):
        here, closed = Heard(one), loop.create_future()
        other.start(lambda message: {}[bytes(message)], lambda: None, closed.set_result)
        one.send(b"x")
        await asyncio.wait_for(closed, SECONDS)
        await here.close()
    loop.set_exception_handler(None)
    assert [type(error) for error in raised] == [KeyError]


async def test_the_socket_is_this_user_s_alone_and_goes_with_its_server(tmp_path):
    server = await local.serve(tmp_path / "door", LocalStream.destroy)
    assert (tmp_path / "door").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["door"]
    server.close()
    server.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ServiceUnavailableError, match="nobody listens"):
        await local.connect(tmp_path / "door")


async def test_what_a_killed_process_left_is_replaced_and_a_successor_s_socket_is_not_removed(tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "door"))
    with pytest.raises(ServiceUnavailableError, match="nobody listens"):
        await local.connect(tmp_path / "door")
    first = await local.serve(tmp_path / "door", LocalStream.destroy)
    second = await local.serve(tmp_path / "door", LocalStream.destroy)
    first.close()
    assert (await Heard(await local.connect(tmp_path / "door")).close()) is not None
    second.close()


async def test_a_path_that_no_socket_can_have_is_said(tmp_path):
    with pytest.raises(ConfigError, match="TMPDIR"):
        await local.serve(tmp_path / ("x" * 120), LocalStream.destroy)
    assert not list(tmp_path.iterdir())


async def test_a_process_of_another_user_is_refused_on_both_sides(tmp_path, monkeypatch):
    """Its user is what the kernel says it is; here we pretend to be somebody else."""
    streams = []
    server = await local.serve(tmp_path / "door", streams.append)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 4321)
    with pytest.raises(ForbiddenError, match=f"user {own}"):
        await local.connect(tmp_path / "door")
    await asyncio.sleep(0.02)
    assert not streams
    server.close()


TALK = """
import asyncio, sys
from tether.swarm.wire import local
async def main():
    stream = await local.connect(sys.argv[1])
    stream.start(lambda message: stream.send(message), lambda: None, lambda _: None)
    stream.send(b"hello")
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_a_process_that_is_killed_is_missed_at_once(tmp_path):
    opened = asyncio.get_running_loop().create_future()
    server = await local.serve(tmp_path / "door", opened.set_result)
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", TALK, str(tmp_path / "door"))
    heard = Heard(await asyncio.wait_for(opened, SECONDS))
    assert await heard.next() == b"hello"
    child.kill()
    assert isinstance(await heard.close(), StreamLostError)
    await child.wait()
    server.close()


async def test_a_pause_holds_an_end_back_too(tmp_path):
    async with local_pair(tmp_path) as (one, other):
        heard = Heard(other)
        one.send(b"1")
        assert await heard.next() == b"1"
        other.pause()
        one.send(b"2")
        one.end()
        await asyncio.sleep(0.05)
        assert heard.messages.empty()
        other.resume()
        assert [await heard.next(), await heard.next()] == [b"2", None]


async def test_rpc_runs_on_it_with_bodies_both_ways(tmp_path):
    service = Service(lambda *_: None)
    service.respond("echo", lambda _, value: value)
    limits = RpcLimits(max_request_nbytes=64 << 20)
    async with local_pair(tmp_path) as (one, other):
        caller, answerer = RpcConnection(one, THIS_USER), RpcConnection(other, THIS_USER, service, limits)
        body = os.urandom(20 << 20)
        assert await caller.request("echo", body, timeout=SECONDS) == body
        assert await asyncio.gather(*(caller.request("echo", b"%d" % n) for n in range(100))) == [b"%d" % n for n in range(100)]
        await caller.aclose()
        await answerer.wait_closed()
