"""Bodies larger than anybody wants in memory: passed on as they come, both ways, and ended in the middle."""

import asyncio
import contextlib

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import (
    DeadlineExceededError,
    ForbiddenError,
    InternalError,
    MalformedRequestError,
    PayloadTooLargeError,
    ProtocolError,
    QueueFullError,
    RequestTimeoutError,
    ServiceUnavailableError,
    UnknownModelError,
)
from tether.swarm.rpc.bodies import Allowance, Cutter, Incoming, Outgoing, Room
from tether.swarm.rpc.messages import CALLS, PROTOCOL, CallMessage, encode_call, encode_response
from tether.swarm.rpc.rpc import RpcConnection, RpcLimits, Service
from tether.swarm.wire.compact import string, uint
from tether.swarm.wire.pieces import PIECE_NBYTES
from tether.swarm.wire.protomux import Protomux
from tether.testing.streams import INITIATOR, RESPONDER, stream_pair

PATIENCE = 20.0
MIB = 1 << 20
WINDOW = 8 * MIB
CHUNK = bytes(range(256)) * 1024


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (nothing says when a peer has seen something)
            await asyncio.sleep(0)


class Source:
    """A body that is made as it is sent: `given` bytes so far; at `breaks_at` it fails, at `stops_at` it waits."""

    def __init__(self, nbytes, breaks_at=None, stops_at=None):
        self.nbytes, self.breaks_at, self.stops_at = nbytes, breaks_at, stops_at
        self.given, self.go_on = 0, asyncio.Event()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.given == self.breaks_at:
            raise UnknownModelError("what gives it broke")
        if self.given == self.stops_at:
            await self.go_on.wait()
        if self.given == self.nbytes:
            raise StopAsyncIteration
        chunk = CHUNK[: min(len(CHUNK), self.nbytes - self.given)]
        self.given += len(chunk)
        return chunk

    def outgoing(self):
        return Outgoing(self.nbytes, self)


class Lab:
    """Passes bodies on: echoes them, counts them, gives as much as it is asked for."""

    def __init__(self, passing_nbytes=512 * MIB):
        self.taken = self.ended = self.begun = 0
        self.bodies, self.hold = [], asyncio.Event()
        self.sources = []
        self.service = service = Service(self.authorise, passing_nbytes)
        self.revoked = False
        service.pass_on("echo", self.echo, 64 * MIB)
        service.pass_on("count", self.count, 64 * MIB)
        service.pass_on("held", self.held, 64 * MIB)
        service.pass_on("refuse", self.refuse, 64 * MIB)
        service.pass_on("zeros", self.zeros, 100)
        service.pass_on("short", self.short, 100)
        service.pass_on("long", self.long, 100)
        service.respond("small", lambda _, value: value)
        service.respond("whole", lambda _, value: b"%d" % len(value))

    def authorise(self, _peer, _method):
        if self.revoked:
            raise ForbiddenError("this key was revoked")

    async def echo(self, _, body, reply):
        await reply.begin(body.nbytes)
        async for chunk in body:
            await reply.write(chunk)

    async def count(self, _, body, reply):
        self.begun += 1
        async for chunk in body:
            self.taken += len(chunk)
        await reply.begin(3)
        await reply.write(b"all")

    async def held(self, _, body, reply):
        self.bodies.append(body)
        self.begun += 1
        try:
            await self.hold.wait()
            async for chunk in body:
                self.taken += len(chunk)
        finally:
            self.ended += 1
        await reply.begin(0)

    async def refuse(self, _, body, _reply):
        await body.read(MIB)
        raise UnknownModelError("no such model")

    async def zeros(self, _, body, reply):
        nbytes, *where = (await body.rest()).split()
        source = Source(int(nbytes), *map(int, where))
        self.sources.append(source)
        await reply.begin(source.nbytes)
        try:
            async for chunk in source:
                await reply.write(chunk)
        finally:
            self.ended += 1

    async def short(self, _, _body, reply):
        await reply.begin(2 * MIB)
        await reply.write(bytes(MIB))

    async def long(self, _, _body, reply):
        await reply.begin(10)
        await reply.write(bytes(11))


class Pair:
    def __init__(self, lab, limits=None):
        self.near, self.far = stream_pair()
        self.caller = RpcConnection(self.near, INITIATOR)
        self.answerer = RpcConnection(self.far, RESPONDER, lab.service, limits)

    @property
    def answers(self):
        return self.answerer._answers

    async def is_idle(self):
        await until(lambda: not self.answerer.working and not self.caller.in_flight)
        assert self.answers._room.free_nbytes == self.answers._room.nbytes
        assert (self.answers._held_nbytes, self.answers._unsent_nbytes) == (0, 0)

    def close(self):
        self.caller.destroy()
        self.answerer.destroy()


@pytest.fixture
async def lab():
    return Lab()


@pytest.fixture
async def pair(lab):
    pair = Pair(lab)
    yield pair
    pair.close()


class TestPassing:
    @pytest.mark.parametrize("nbytes", [0, 1, 5000, PIECE_NBYTES, PIECE_NBYTES + 1, MIB, MIB + 1, 12 * MIB + 7])
    async def test_a_body_of_any_size_goes_there_and_back(self, pair, nbytes):
        value = (CHUNK * (nbytes // len(CHUNK) + 1))[:nbytes]
        assert await pair.caller.request("echo", value, PATIENCE) == value
        assert await pair.caller.request("echo", Outgoing.of(value[:700], value[700:]), PATIENCE) == value
        async with pair.caller.exchange("echo", value, PATIENCE) as answer:
            assert answer.nbytes == nbytes
            assert b"".join([chunk async for chunk in answer]) == value
        await pair.is_idle()

    async def test_a_small_body_that_does_not_come_is_waited_for_no_longer_than_told(self, pair):
        with pytest.raises(DeadlineExceededError):
            await asyncio.wait_for(pair.caller.request("count", Source(100, stops_at=0).outgoing(), 0.05), PATIENCE)
        assert not pair.caller.in_flight

    async def test_nor_longer_than_the_connection_is_there(self, pair):
        source = Source(100, stops_at=0)
        call = asyncio.create_task(pair.caller.request("count", source.outgoing()))
        await asyncio.sleep(0)
        pair.answerer.destroy()
        await pair.caller.wait_closed()
        source.go_on.set()
        with pytest.raises(ServiceUnavailableError):
            await asyncio.wait_for(call, PATIENCE)
        assert not pair.caller.in_flight

    async def test_through_three_connections_nobody_holds_more_than_a_window(self, lab):
        """As an inference goes: client, its manager, the lab's manager; the source gives no faster than the end takes."""
        far, relay = Pair(lab), Lab()

        async def pass_on(_, body, reply):
            async with far.caller.exchange("held", Outgoing(body.left_nbytes, body), PATIENCE) as answer:
                await reply.begin(answer.nbytes)
                async for chunk in answer:
                    await reply.write(chunk)

        relay.service.pass_on("call", pass_on, 64 * MIB)
        near, source = Pair(relay), Source(64 * MIB)
        call = asyncio.create_task(near.caller.request("call", source.outgoing(), PATIENCE))
        await until(lambda: lab.begun and source.given >= 2 * WINDOW)
        for _ in range(100):
            await asyncio.sleep(0)
        assert source.given <= 2 * WINDOW + 2 * MIB
        lab.hold.set()
        assert await call == b""
        assert lab.taken == source.given == 64 * MIB
        far.close()
        near.close()

    async def test_an_answer_is_made_no_faster_than_it_is_taken(self, pair, lab):
        async with pair.caller.exchange("zeros", b"%d" % (300 * MIB), PATIENCE) as answer:
            await until(lambda: lab.sources[0].given >= WINDOW)
            for _ in range(100):
                await asyncio.sleep(0)
            assert lab.sources[0].given <= WINDOW + MIB
            assert sum([len(chunk) async for chunk in answer]) == 300 * MIB
        await pair.is_idle()

    async def test_small_calls_pass_a_large_upload_within_a_few_messages(self, pair, lab):
        """By the order of messages: how many of the body's pieces come between a small call and its answer."""
        await pair.caller.request("small")
        call = asyncio.create_task(pair.caller.request("count", Source(64 * MIB).outgoing(), PATIENCE))
        await until(lambda: lab.taken > MIB)
        passed = []
        for _ in range(20):
            before = lab.taken
            assert await pair.caller.request("small", b"x") == b"x"
            passed.append((lab.taken - before) // PIECE_NBYTES)
        assert not call.done()
        assert max(passed) <= 20, "pieces that were sent before, and those of one turn of the loop"
        assert await call == b"all"

    async def test_what_wants_the_whole_of_it_gets_that_too(self, pair):
        assert await pair.caller.request("whole", Source(16 * MIB).outgoing(), PATIENCE) == b"%d" % (16 * MIB)
        with pytest.raises(PayloadTooLargeError, match="at most 16777216"):
            await pair.caller.request("whole", Source(16 * MIB + 1).outgoing(), PATIENCE)

    async def test_nothing_is_taken_of_a_body_that_nobody_wants(self, pair):
        for method, error in (("echo", PayloadTooLargeError), ("nowhere", Exception)):
            source = Source(65 * MIB).outgoing()
            with pytest.raises(error):
                await pair.caller.request(method, source, PATIENCE)
            assert source.can_be_sent
        assert pair.near.sent_nbytes < 10_000


class TestEnds:
    async def test_a_deadline_in_the_middle_of_a_body_ends_it_everywhere(self, pair, lab):
        source = Source(20 * MIB, stops_at=10 * MIB)
        with pytest.raises(DeadlineExceededError):
            await pair.caller.request("count", source.outgoing(), 0.5)
        await pair.is_idle()
        assert lab.taken == 10 * MIB

    async def test_it_holds_there_when_nothing_can_be_heard_from_here(self, pair, lab):
        call = asyncio.create_task(pair.caller.request("held", Source(20 * MIB).outgoing(), 0.5))
        await until(lambda: lab.begun)
        pair.near.nbytes_per_second = 0.001
        await until(lambda: lab.ended)
        with pytest.raises(DeadlineExceededError):
            await call

    async def test_a_deadline_in_the_middle_of_an_answer(self, pair, lab):
        with pytest.raises(DeadlineExceededError):  # noqa: PT012 (it begins, and then comes no further)
            async with pair.caller.exchange("zeros", b"%d %d %d" % (20 * MIB, -1, 3 * MIB), 0.5) as answer:
                async for _ in answer:
                    pass
        await until(lambda: lab.ended)
        await pair.is_idle()

    async def test_whoever_leaves_an_answer_takes_it_back(self, pair, lab):
        async with pair.caller.exchange("zeros", b"%d" % (100 * MIB), PATIENCE) as answer:
            await anext(answer)
        await until(lambda: lab.ended)
        assert lab.sources[0].given <= WINDOW + 2 * MIB
        await pair.is_idle()

    async def test_a_call_that_is_cancelled_sends_no_more(self, pair, lab):
        source = Source(64 * MIB)
        call = asyncio.create_task(pair.caller.request("held", source.outgoing(), PATIENCE))
        await until(lambda: lab.begun and source.given >= WINDOW)
        call.cancel()
        await until(lambda: lab.ended)
        await asyncio.gather(call, return_exceptions=True)
        await pair.is_idle()
        assert source.given <= WINDOW + MIB

    async def test_a_refusal_in_the_middle_stops_the_sender(self, pair):
        source = Source(64 * MIB)
        with pytest.raises(UnknownModelError, match="no such model"):
            await pair.caller.request("refuse", source.outgoing(), PATIENCE)
        assert source.given <= WINDOW + 2 * MIB
        assert await pair.caller.request("small", b"x") == b"x"

    async def test_what_breaks_the_source_of_a_body_is_said_on_both_sides(self, pair, lab):
        with pytest.raises(UnknownModelError, match="what gives it broke"):
            await pair.caller.request("count", Source(20 * MIB, breaks_at=4 * MIB).outgoing(), PATIENCE)
        await pair.is_idle()
        with pytest.raises(UnknownModelError, match="what gives it broke"):  # noqa: PT012 (as above)
            async with pair.caller.exchange("zeros", b"%d %d" % (20 * MIB, 3 * MIB), PATIENCE) as answer:
                async for _ in answer:
                    pass
        with pytest.raises(UnknownModelError, match="what gives it broke"):
            await pair.caller.request("zeros", b"%d %d" % (20 * MIB, 3 * MIB), PATIENCE)
        assert lab.ended == 2

    async def test_a_bug_in_the_source_of_a_body_is_in_the_log_that_the_error_speaks_of(self, pair):
        async def broken():
            yield CHUNK * 8
            raise KeyError("a bug")

        with structlog.testing.capture_logs() as logs, pytest.raises(InternalError, match="the log has the traceback"):
            await pair.caller.request("count", Outgoing(20 * MIB, broken()), PATIENCE)
        assert [(entry["peer"], repr(entry["exc_info"])) for entry in logs] == [(RESPONDER, "KeyError('a bug')")]
        await pair.is_idle()

    async def test_a_lost_connection_ends_both_halves(self, pair, lab):
        call = asyncio.create_task(pair.caller.request("held", Source(20 * MIB).outgoing(), PATIENCE))
        async with pair.caller.exchange("zeros", b"%d" % (20 * MIB), PATIENCE) as answer:
            await until(lambda: lab.begun)
            pair.near.cut(None)
            with pytest.raises(ServiceUnavailableError):
                async for _ in answer:
                    pass
        with pytest.raises(ServiceUnavailableError):
            await call
        await until(lambda: lab.ended == 2)

    async def test_a_body_or_an_answer_of_another_size_is_our_bug(self, pair):
        with pytest.raises(InternalError, match="was announced"):
            await pair.caller.request("count", Outgoing(5 * MIB, Source(4 * MIB)), PATIENCE)
        for method in ("short", "long"):
            with pytest.raises(Exception, match="please report it"):
                await pair.caller.request(method, b"", PATIENCE)
        await pair.is_idle()


class TestRoom:
    async def test_bodies_that_have_no_room_wait_for_their_turn_and_nothing_of_them_comes(self, lab):
        pair = Pair(lab, RpcLimits(max_passing_nbytes=24 * MIB))
        sources = [Source(12 * MIB) for _ in range(4)]
        calls = [asyncio.create_task(pair.caller.request("held", source.outgoing(), PATIENCE)) for source in sources]
        await until(lambda: lab.begun == 2)
        for _ in range(100):
            await asyncio.sleep(0)
        assert [source.given > 0 for source in sources] == [True, True, False, False]
        assert await pair.caller.request("echo", bytes(MIB)) == bytes(MIB), "smaller ones need none"
        lab.hold.set()
        assert await asyncio.gather(*calls) == [b""] * 4
        await pair.is_idle()
        pair.close()

    async def test_one_peer_may_not_have_all_of_it_and_all_together_have_a_bound(self):
        lab = Lab(passing_nbytes=24 * MIB)
        greedy, modest = Pair(lab, RpcLimits(max_passing_nbytes=12 * MIB)), Pair(lab, RpcLimits(max_passing_nbytes=12 * MIB))
        calls = [asyncio.create_task(greedy.caller.request("held", Source(12 * MIB).outgoing(), PATIENCE)) for _ in range(5)]
        await until(lambda: lab.begun == 1)
        calls.append(asyncio.create_task(modest.caller.request("held", Source(12 * MIB).outgoing(), PATIENCE)))
        await until(lambda: lab.begun == 2)
        assert lab.service.room.free_nbytes == 0
        calls[1].cancel()
        lab.hold.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert lab.service.room.free_nbytes == 24 * MIB
        with pytest.raises(PayloadTooLargeError):
            await greedy.caller.request("held", Source(13 * MIB).outgoing(), PATIENCE)
        greedy.close()
        modest.close()

    async def test_a_peer_at_one_byte_a_second_costs_one_place_and_not_for_long(self, lab):
        """What it announces takes no memory, others are answered meanwhile, and nothing of it is left."""
        pair = Pair(lab, RpcLimits(patience=0.2))
        stopped = Source(60 * MIB, stops_at=2 * MIB)
        slow = asyncio.create_task(pair.caller.request("count", stopped.outgoing(), PATIENCE))
        await until(lambda: lab.taken == 2 * MIB)
        assert pair.answers._room.free_nbytes == 68 * MIB
        assert await pair.caller.request("small", b"x") == b"x"
        with pytest.raises(RequestTimeoutError, match="without pauses"):
            await slow
        await pair.is_idle()
        collected = asyncio.create_task(pair.caller.request("whole", Source(12 * MIB, stops_at=2 * MIB).outgoing(), PATIENCE))
        with pytest.raises(RequestTimeoutError):
            await collected
        await pair.is_idle()
        pair.close()

    async def test_who_takes_nothing_of_an_answer_does_not_get_the_rest(self, lab):
        pair = Pair(lab, RpcLimits(patience=0.2))
        async with pair.caller.exchange("zeros", b"%d" % (100 * MIB), PATIENCE) as answer:
            await until(lambda: lab.ended)
            with pytest.raises(RequestTimeoutError, match="was taken"):
                async for _ in answer:
                    pass
        await pair.is_idle()
        pair.close()

    async def test_of_answers_that_go_out_as_they_are_made_what_is_here_counts(self, lab):
        pair = Pair(lab, RpcLimits(max_reply_nbytes=40 * MIB))
        async with contextlib.AsyncExitStack() as stack:
            answers = [await stack.enter_async_context(pair.caller.exchange("zeros", b"%d" % (40 * MIB), PATIENCE)) for _ in range(5)]
            assert [answer.nbytes for answer in answers] == [40 * MIB] * 5
            with pytest.raises(QueueFullError, match="wait for you"):
                await stack.enter_async_context(pair.caller.exchange("zeros", b"%d" % (40 * MIB), PATIENCE))
            with pytest.raises(PayloadTooLargeError):
                await stack.enter_async_context(pair.caller.exchange("zeros", b"%d" % (40 * MIB + 1), PATIENCE))
        await pair.is_idle()
        pair.close()

    async def test_who_reads_nothing_at_all_while_it_is_answered_is_cut(self, lab):
        pair = Pair(lab, RpcLimits(patience=0.2))
        async with pair.caller.exchange("zeros", b"%d" % (100 * MIB), PATIENCE):
            pair.near.pause()
            await until(lambda: pair.answerer.is_closed)
            assert "took nothing" in str(pair.answerer._line.error)
            await until(lambda: not pair.answerer.working)
            assert pair.answers._unsent_nbytes == 0
        pair.close()

    async def test_an_answer_that_would_be_kept_whole_has_a_bound_of_its_own(self, lab):
        pair = Pair(lab)
        with pytest.raises(PayloadTooLargeError, match="at most"):
            await pair.caller.request("zeros", b"%d" % (200 * MIB), PATIENCE)
        assert await pair.caller.request("small", b"x") == b"x"
        pair.close()

    async def test_a_long_body_that_comes_is_not_taken_for_one_that_stalls(self, lab):
        pair = Pair(lab, RpcLimits(patience=0.05))
        pair.near.nbytes_per_second = 10e6
        assert await pair.caller.request("count", Source(4 * MIB).outgoing(), PATIENCE) == b"all"
        pair.close()

    async def test_the_handler_is_what_is_slow_and_nobody_is_blamed(self, lab):
        pair = Pair(lab, RpcLimits(patience=0.05))
        call = asyncio.create_task(pair.caller.request("held", Source(20 * MIB).outgoing(), PATIENCE))
        await until(lambda: lab.begun)
        await asyncio.sleep(0.3)
        lab.hold.set()
        assert await call == b""
        pair.close()

    async def test_who_stalls_after_the_handler_did_is_found_all_the_same(self, lab):
        pair = Pair(lab, RpcLimits(patience=0.1))
        call = asyncio.create_task(pair.caller.request("held", Source(20 * MIB, stops_at=WINDOW + MIB).outgoing(), PATIENCE))
        await until(lambda: lab.begun)
        await asyncio.sleep(0.3)
        lab.hold.set()
        with pytest.raises(RequestTimeoutError):
            await call
        await pair.is_idle()
        pair.close()

    async def test_an_event_has_no_answer_however_large(self, pair, lab):
        await pair.caller.event("zeros", b"%d" % MIB)
        await until(lambda: lab.ended)
        assert await pair.caller.request("small", b"x") == b"x"
        await pair.is_idle()
        assert pair.far.sent_nbytes < 10_000

    async def test_what_is_taken_back_ends_in_the_middle(self, pair, lab):
        source = Source(6 * MIB, stops_at=5 * MIB)
        call = asyncio.create_task(pair.caller.request("held", source.outgoing(), PATIENCE))
        await until(lambda: lab.begun and source.given == 5 * MIB)
        lab.revoked = True
        source.go_on.set()
        with pytest.raises(ForbiddenError):
            await call
        await pair.is_idle()


class Stranger:
    """The other end, in the hands of somebody who sends what they like."""

    def __init__(self, lab, limits=None):
        self.near, far = stream_pair()
        self.connection = RpcConnection(far, RESPONDER, lab.service, limits)
        self.mux = Protomux()
        channel_id = bytes.fromhex(RESPONDER)
        self.channel, self.beside = self.mux.open(PROTOCOL, channel_id), self.mux.open(CALLS, channel_id)
        self.near.start(self.hear, lambda: None, lambda _: None)
        self.heard = []
        self.say()

    def hear(self, message):
        self.heard += [(event.type, bytes(event.body)) for event in self.mux.receive(message) if hasattr(event, "body")]

    def say(self, *messages):
        for message in messages:
            self.mux.send(self.beside, message)
        for frame in self.mux.take():
            self.near.send(frame)


class TestStrangers:
    async def test_who_sends_more_than_there_is_room_for_is_cut(self, lab):
        stranger = Stranger(lab)
        await until(lambda: stranger.beside.opened)
        stranger.say(encode_call(CallMessage.REQUEST, 1, uint(20 * MIB), string("held")))
        await until(lambda: stranger.heard)
        assert stranger.heard == [(CallMessage.REQUEST_ROOM, uint(1) + uint(WINDOW))]
        for _ in range(WINDOW // PIECE_NBYTES):
            stranger.say(encode_call(CallMessage.REQUEST_PIECE, 1, bytes(PIECE_NBYTES)))
        await until(lambda: lab.bodies[0]._came == WINDOW)
        assert not stranger.connection.is_closed
        stranger.say(encode_call(CallMessage.REQUEST_PIECE, 1, bytes(PIECE_NBYTES)))
        await until(lambda: stranger.connection.is_closed)
        assert isinstance(stranger.connection._line.error, ProtocolError)
        await until(lambda: lab.ended)

    async def test_who_answers_in_pieces_and_whole_is_cut_and_nobody_waits_for_the_rest(self, lab):
        stranger = Stranger(lab)
        await until(lambda: stranger.beside.opened)

        async def taken():
            async with stranger.connection.exchange("any", b"") as answer:
                return [chunk async for chunk in answer]

        call = asyncio.create_task(taken())
        await until(lambda: stranger.connection.in_flight)
        stranger.say(encode_call(CallMessage.RESPONSE, 1, uint(2 * MIB)))
        stranger.mux.send(stranger.channel, encode_response(1, b"whole"))
        stranger.say()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ProtocolError, match="comes whole, too"):
                await call
        assert stranger.connection.is_closed

    async def test_room_for_what_is_not_sent_means_nothing(self, lab):
        stranger = Stranger(lab)
        await until(lambda: stranger.beside.opened)
        stranger.say(encode_call(CallMessage.RESPONSE_ROOM, 7, uint(1 << 50)), encode_call(CallMessage.REQUEST_ROOM, 7, uint(1 << 50)))
        stranger.say(encode_call(CallMessage.REQUEST, 1, uint(200_000), string("echo")))
        await until(lambda: stranger.connection.working)
        assert not stranger.connection.is_closed

    async def test_hundreds_of_announced_bodies_cost_places_in_a_queue(self, lab):
        stranger = Stranger(lab, RpcLimits(max_in_flight=300))
        await until(lambda: stranger.beside.opened)
        stranger.say(*(encode_call(CallMessage.REQUEST, number, uint(64 * MIB), string("held")) for number in range(1, 400)))
        await until(lambda: len(stranger.heard) >= 99 + 2)
        assert lab.begun == 2
        assert sum(b"queue_full" in body for _, body in stranger.heard) == 99
        assert lab.service.room.free_nbytes == 384 * MIB
        stranger.connection.destroy()
        await until(lambda: lab.service.room.free_nbytes == 512 * MIB)


async def test_a_plain_peer_gets_what_fits_in_a_message_and_is_told_why_not_more(lab):
    pair = Pair(lab)
    await pair.caller.request("small")
    for connection in (pair.caller, pair.answerer):
        connection._line.mux.close(connection._beside)
    assert await pair.caller.request("echo", bytes(12 * MIB), PATIENCE) == bytes(12 * MIB)
    assert await pair.caller.request("echo", Source(3 * MIB).outgoing(), PATIENCE) == b"".join([c async for c in Source(3 * MIB)])
    for work in (pair.caller.request("echo", Source(17 * MIB).outgoing()), pair.caller.request("zeros", b"%d" % (17 * MIB))):
        with pytest.raises(PayloadTooLargeError, match="takes no pieces"):
            await work
    pair.close()


class TestParts:
    @given(st.lists(st.integers(0, 3 * PIECE_NBYTES), max_size=8))
    def test_chunks_of_any_size_are_cut_into_pieces_of_one(self, sizes):
        cutter, given_ = Cutter(), [bytes([number]) * size for number, size in enumerate(sizes)]
        pieces = [b"".join(piece) for chunk in given_ for piece in cutter.add(chunk)]
        assert all(len(piece) == PIECE_NBYTES for piece in pieces)
        rest = b"".join(cutter.rest())
        assert len(rest) < PIECE_NBYTES
        assert b"".join((*pieces, rest)) == b"".join(given_)

    async def test_reading_exactly_so_much(self):
        body = Incoming.whole(b"head and rest")
        assert [await body.read(4), body.left_nbytes, await body.rest()] == [b"head", 9, b" and rest"]
        assert await body.rest() == b""
        with pytest.raises(MalformedRequestError):
            await body.read(1)

    async def test_room_is_given_in_turn_and_comes_back_from_who_is_cancelled(self):
        room, got = Room(10), []

        async def take(name, nbytes):
            await room.take(nbytes)
            got.append(name)

        await take("first", 6)
        tasks = [asyncio.create_task(take(name, nbytes)) for name, nbytes in (("large", 8), ("small", 2), ("last", 3))]
        await asyncio.sleep(0)
        assert got == ["first"], "who is behind one that waits waits too"
        tasks[0].cancel()
        await until(lambda: len(got) == 2)
        assert got == ["first", "small"]
        room.give_back(6)
        await until(lambda: len(got) == 3)
        room.give_back(5)
        assert room.free_nbytes == 10
        room.resize(4)
        assert room.free_nbytes == 4

    async def test_room_that_was_given_at_the_moment_of_a_cancel_is_not_lost(self):
        room = Room(1)
        await room.take(1)
        waiting = asyncio.create_task(room.take(1))
        await asyncio.sleep(0)
        room.give_back(1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert room.free_nbytes == 1

    async def test_an_allowance_is_spent_as_it_is_granted(self):
        allowance = Allowance(3)
        await allowance.spend(3)
        waiting = asyncio.create_task(allowance.spend(2))
        for _ in range(2):
            await asyncio.sleep(0)
            assert not waiting.done()
            allowance.grant(1)
        await waiting
