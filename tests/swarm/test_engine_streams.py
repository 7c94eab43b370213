"""A secure stream over real UDX on loopback, without JavaScript: what a peer may do that knows no key, or knows one and lies."""

import asyncio
import contextlib
import os
import random

import pytest
from nacl import bindings

from tether.errors import PayloadTooLargeError, ProtocolError, StreamLostError
from tether.swarm.engine.secure import MAX_MESSAGE, Keys, SecureStream, StreamLimits
from tether.swarm.udx import Udx, UdxStream

SECONDS = 10
ONE, OTHER = os.urandom(32), os.urandom(32)


class End:
    """One end of a UDX stream: what comes goes to a secure stream, or is kept as it is."""

    def __init__(self, udx: Udx, number: int) -> None:
        self.raw = bytearray()
        self.secure: SecureStream | None = None
        self.code: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.udx = UdxStream(udx, number, on_data=self._data, on_end=self._end, on_drain=self._drain, on_close=self._close)

    def secured(self, peer: bytes, *, initiator: bool, limits: StreamLimits | None = None, own_id: bytes | None = None) -> SecureStream:
        ids = bytes([1]) * 32, bytes([2]) * 32
        own, other = ids if initiator else reversed(ids)
        keys = Keys(ONE if initiator else OTHER, OTHER if initiator else ONE, peer, bytes(64), own_id or own, other, initiator)
        self.secure = SecureStream(self.udx, keys, limits or StreamLimits(), asyncio.get_running_loop())
        return self.secure

    def _data(self, data: bytes) -> None:
        if self.secure is None:
            self.raw += data
        else:
            self.secure.data_arrived(data)

    def _end(self) -> None:
        if self.secure is not None:
            self.secure.ended()

    def _drain(self) -> None:
        if self.secure is not None:
            self.secure.drain()

    def _close(self, code: str | None) -> None:
        self.code.set_result(code)
        if self.secure is not None:
            self.secure.carrier_closed(code)


@pytest.fixture
async def ends():
    udx = Udx()
    sockets = [udx.socket(), udx.socket()]
    ports = [socket.bind(0, "127.0.0.1") for socket in sockets]
    pair = End(udx, 1), End(udx, 2)
    pair[0].udx.connect(sockets[0], 2, ports[1], "127.0.0.1")
    pair[1].udx.connect(sockets[1], 1, ports[0], "127.0.0.1")
    yield pair
    udx.close()


@pytest.fixture
async def failures():
    """What callbacks of the loop raised."""
    loop, raised = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: raised.append(context["exception"]))
    yield raised
    loop.set_exception_handler(None)


class Heard:
    """What a stream delivered."""

    def __init__(self, stream: SecureStream) -> None:
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        stream.start(
            lambda message: self.messages.put_nowait(bytes(message)), lambda: self.messages.put_nowait(None), self.closed.set_result
        )

    async def next(self) -> bytes | None:
        return await asyncio.wait_for(self.messages.get(), SECONDS)

    async def close(self) -> Exception | None:
        return await asyncio.wait_for(self.closed, SECONDS)


async def until(holds) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_messages_of_all_sizes_arrive_whole_and_in_order(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    heard = Heard(other)
    sizes = [1, 2, 3, 17, 20, 1200, 65_535, 65_536, 200_000, 1, MAX_MESSAGE]
    sent = [os.urandom(size) for size in sizes]
    for message in sent:
        one.send(message)
    one.send(memoryview(b"a view"))
    one.send(bytearray(b"an array"))
    assert [await heard.next() for _ in sent] == sent
    assert [await heard.next(), await heard.next()] == [b"a view", b"an array"]


async def test_who_is_allowed_little_is_cut_at_the_first_bytes_of_what_is_more(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    heard, told = Heard(other), Heard(one)
    other.max_message_nbytes = 1000
    one.send(bytes(1000))
    assert len(await heard.next()) == 1000
    one.send(bytes(MAX_MESSAGE))
    error = await heard.close()
    assert isinstance(error, ProtocolError)
    assert "1000" in str(error)
    assert isinstance(await told.close(), StreamLostError)


async def test_both_sides_end_in_order(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    here, there = Heard(one), Heard(other)
    one.send(b"the last word")
    one.end()
    one.send(b"not sent any more")
    assert [await there.next(), await there.next()] == [b"the last word", None]
    other.send(b"an answer to it")
    other.end()
    assert [await here.next(), await here.next()] == [b"an answer to it", None]
    assert [await here.close(), await there.close()] == [None, None]
    assert one.closed


async def test_what_comes_before_somebody_listens_is_kept_and_bounded(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    nbytes = 0
    with contextlib.suppress(TimeoutError):
        while True:
            nbytes += 65_536
            if not one.send(bytes(65_536)):
                await asyncio.wait_for(one.drained(), 0.5)
    assert nbytes < 16 << 20
    heard = Heard(other)
    one.end()
    got = 0
    while (message := await heard.next()) is not None:
        got += len(message)
    assert got == nbytes


async def test_what_waits_is_delivered_after_the_stream_has_closed(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    other.end()
    one.send(b"early")
    one.end()
    await asyncio.wait_for(ends[1].code, SECONDS)
    heard = Heard(other)
    assert [await heard.next(), await heard.next(), await heard.close()] == [b"early", None, None]


async def test_pausing_stops_messages_between_two_of_one_batch(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    got: list[bytes] = []

    def take(message: memoryview) -> None:
        got.append(bytes(message))
        other.pause()

    other.start(take, lambda: got.append(b"end"), lambda error: got.append(repr(error).encode()))
    for number in range(3):
        one.send(bytes([number]))
    one.end()
    other.end()
    for count in (1, 2, 3):
        await until(lambda: len(got) >= count)  # noqa: B023
        assert len(got) == count
        other.resume()
    await until(lambda: len(got) == 5)
    assert got == [b"\0", b"\1", b"\2", b"end", b"None"]


async def test_an_end_that_comes_just_as_one_resumes_is_told_after_what_waits(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    got: list[bytes] = []

    def take(message: memoryview) -> None:
        got.append(bytes(message))
        if len(got) == 1:
            other.pause()

    other.start(take, lambda: got.append(b"end"), lambda error: got.append(repr(error).encode()))
    one.send(b"first")
    one.send(b"second")
    other.end()
    await until(lambda: got)
    other.resume()
    other.ended()
    other.carrier_closed(None)
    await until(lambda: len(got) == 4)
    assert got == [b"first", b"second", b"end", b"None"]


async def test_a_pause_longer_than_the_idle_limit_is_no_silence_of_the_peer(ends):
    limits = StreamLimits(idle=0.2, keepalive=0.05)
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False, limits=limits)
    heard = Heard(other)
    one.send(b"before")
    assert await heard.next() == b"before"
    other.pause()
    one.send(b"meanwhile")
    await asyncio.sleep(2 * limits.idle)
    other.resume()
    asyncio.get_running_loop().call_soon(other._look)  # just before what waits in the carrier comes
    assert await heard.next() == b"meanwhile"


async def test_who_fails_on_what_waited_loses_the_stream_and_the_peer_is_not_blamed(ends, failures):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    one.send(b"first")
    one.send(b"second")
    await until(lambda: other._parts)
    closed = asyncio.get_running_loop().create_future()
    other.start(lambda _: 1 / 0, lambda: None, closed.set_result)
    error = await asyncio.wait_for(closed, SECONDS)
    assert isinstance(error, StreamLostError)
    assert error.args[1] == "ECANCELED"
    assert [type(failure) for failure in failures] == [ZeroDivisionError]


async def test_who_fails_on_an_end_that_waited_is_told_of_the_close_all_the_same(ends, failures):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    other.end()
    one.end()
    await asyncio.wait_for(ends[1].code, SECONDS)
    closed = asyncio.get_running_loop().create_future()
    other.start(lambda _: None, lambda: 1 / 0, closed.set_result)
    await asyncio.wait_for(closed, SECONDS)
    assert len(failures) == 1


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (b"\xff\xff\xff" + bytes(100), "its first frame has 16777215 bytes"),
        (b"\x01\0\0x", "its first frame has 1 bytes"),
        (b"\x38\0\0" + bytes(56), "another handshake"),
    ],
)
async def test_before_its_header_a_peer_may_send_nothing_else(ends, first, said):
    secure = ends[0].secured(OTHER, initiator=True)
    heard = Heard(secure)
    ends[1].udx.write(first)
    error = await heard.close()
    assert isinstance(error, ProtocolError)
    assert said in str(error)
    assert await asyncio.wait_for(ends[1].code, SECONDS) == "ECONNRESET"
    assert OTHER.hex()[:12] in str(error)


async def test_a_peer_that_does_not_begin_is_given_up(ends):
    heard = Heard(ends[0].secured(OTHER, initiator=True, limits=StreamLimits(header=0.2)))
    error = await heard.close()
    assert isinstance(error, StreamLostError)
    assert error.args[1] == "ETIMEDOUT"


async def test_a_header_byte_by_byte_is_a_header(ends):
    heard = Heard(ends[0].secured(OTHER, initiator=True))
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    header = bindings.crypto_secretstream_xchacha20poly1305_init_push(state, OTHER)
    sealed = bindings.crypto_secretstream_xchacha20poly1305_push(state, b"slowly")
    for byte in b"\x38\0\0" + bytes([2]) * 32 + header + len(sealed).to_bytes(3, "little") + sealed:
        ends[1].udx.write(bytes([byte]))
        await asyncio.sleep(0)
    assert await heard.next() == b"slowly"


async def test_a_replayed_frame_cuts_the_stream(ends):
    heard = Heard(ends[0].secured(OTHER, initiator=True))
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    header = bindings.crypto_secretstream_xchacha20poly1305_init_push(state, OTHER)
    sealed = bindings.crypto_secretstream_xchacha20poly1305_push(state, b"once")
    frame = len(sealed).to_bytes(3, "little") + sealed
    ends[1].udx.write(b"\x38\0\0" + bytes([2]) * 32 + header + frame + frame)
    assert await heard.next() == b"once"
    assert isinstance(await heard.close(), ProtocolError)


async def test_another_key_cuts_the_stream(ends):
    heard = Heard(ends[0].secured(OTHER, initiator=True))
    stranger = ends[1].secured(ONE, initiator=True, own_id=bytes([2]) * 32)  # names the handshake right, seals with the wrong key
    stranger.send(b"hello")
    error = await heard.close()
    assert isinstance(error, ProtocolError)
    assert "another key" in str(error)


async def test_an_end_in_the_middle_of_a_frame_is_told(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    heard = Heard(one)
    other.send(b"whole")
    ends[1].udx.write(b"\xff\xff\x00half of it")
    ends[1].udx.write_end()
    assert await heard.next() == b"whole"
    error = await heard.close()
    assert isinstance(error, ProtocolError)
    assert "middle of a frame" in str(error)


async def test_an_empty_message_keeps_alive_and_is_not_delivered(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    heard = Heard(other)
    one.send(b"")
    one.send(b"said")
    assert await heard.next() == b"said"


async def test_what_no_frame_holds_is_refused_and_the_stream_goes_on(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    heard = Heard(other)
    with pytest.raises(PayloadTooLargeError):
        one.send(bytes(MAX_MESSAGE + 1))
    one.send(b"smaller")
    assert await heard.next() == b"smaller"


async def test_destroy_reaches_the_other_side_and_wakes_who_waits(ends):
    one, other = ends[0].secured(OTHER, initiator=True), ends[1].secured(ONE, initiator=False)
    here, there = Heard(one), Heard(other)
    other.pause()
    while one.send(bytes(1 << 20)):
        pass
    waiting = asyncio.create_task(one.drained())
    await asyncio.sleep(0)
    other.destroy()
    with pytest.raises(StreamLostError):
        await asyncio.wait_for(waiting, SECONDS)
    assert (await here.close()).args[1] == "ECONNRESET"
    assert (await there.close()).args[1] == "ECANCELED"
    other.destroy()
    assert one.send(b"into nothing")


class Wire:
    """A carrier that keeps what is written."""

    rtt, pulse = 0.0, (0, False)

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes | bytearray | memoryview, *, owned: bool) -> bool:
        assert owned
        self.written += data
        return True

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...
    def poke(self) -> None: ...
    def write_end(self) -> None: ...


def secured(wire: Wire, *, initiator: bool) -> SecureStream:
    keys = Keys(ONE if initiator else OTHER, OTHER if initiator else ONE, bytes(32), bytes(64), *([bytes(32)] * 2), initiator)
    return SecureStream(wire, keys, StreamLimits(), asyncio.get_running_loop())


@pytest.mark.parametrize("seed", range(8))
async def test_messages_come_whole_wherever_the_wire_cuts_them_and_whenever_nobody_takes_them(seed):
    chance = random.Random(f"cuts {seed}")
    messages = [chance.randbytes(chance.choice([1, 2, 100, 5000, 20_000, 40_000, 65_536])) for _ in range(60)]
    out, back, got = Wire(), Wire(), []
    sending, taking = secured(out, initiator=True), secured(back, initiator=False)
    for message in messages:
        sending.send(message)
    taking.start(lambda message: got.append(bytes(message)), lambda: None, lambda _: None)
    at = 0
    while at < len(out.written):
        nbytes = chance.choice([1, 2, 3, 4, 500, 30_000, 90_000, 400_000])
        taking.data_arrived(bytes(out.written[at : at + nbytes]))
        at += nbytes
        chance.choice([taking.pause, taking.resume, lambda: None, lambda: None])()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    taking.resume()
    async with asyncio.timeout(SECONDS):
        while len(got) < len(messages):  # noqa: ASYNC110 (each turn of the loop delivers some)
            await asyncio.sleep(0)
    assert got == messages
    for stream in (sending, taking):
        stream.destroy()
