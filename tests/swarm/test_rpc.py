"""Calls over a secure stream: answers, errors, deadlines, what is taken back, and what strangers and clumsy peers may not do."""

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
    PeerFailedError,
    ProtocolError,
    QueueFullError,
    RemoteError,
    ServiceUnavailableError,
    UnknownMethodError,
    UnknownModelError,
)
from tether.swarm.rpc.messages import CALLS, PROTOCOL, CallMessage, encode_call
from tether.swarm.rpc.rpc import RpcConnection, RpcLimits, Service
from tether.swarm.wire.compact import buffer, string, uint
from tether.swarm.wire.protomux import Protomux
from tether.testing.streams import INITIATOR, RESPONDER, stream_pair

PATIENCE = 10.0


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (nothing says when a peer has seen something)
            await asyncio.sleep(0)


class Lab:
    """What is called in these tests."""

    def __init__(self):
        self.started = self.cancelled = 0
        self.calls = []
        self.hold = asyncio.Event()
        self.asked = []
        self.service = service = Service(self.authorise)
        service.respond("echo", self.echo)
        service.respond("later", self.later)
        service.respond("held", self.held)
        service.respond("unknown model", self.unknown_model)
        service.respond("bug", lambda *_: {}["index"])
        service.respond("zeros", lambda _, value: bytes(int(value)))

    def authorise(self, peer, method):
        self.asked.append((peer, method))
        if method == "enrolled only":
            raise ForbiddenError("this key is not enrolled: ask for an invitation")
        if method == "broken hook":
            raise ZeroDivisionError

    def echo(self, call, value):
        self.calls.append(call)
        return value

    async def later(self, call, value):
        await asyncio.sleep(0)
        self.calls.append(call)
        return value

    async def held(self, _, value):
        self.started += 1
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return value

    async def unknown_model(self, *_):
        raise UnknownModelError("no model digits", "digits", ["squares"])


@pytest.fixture
async def lab():
    return Lab()


class Pair:
    def __init__(self, lab, limits=None, caller_limits=None, caller_service=None):
        self.near, self.far = stream_pair()
        self.caller = RpcConnection(self.near, INITIATOR, caller_service, caller_limits)
        self.answerer = RpcConnection(self.far, RESPONDER, lab.service, limits)

    def close(self):
        self.caller.destroy()
        self.answerer.destroy()


@pytest.fixture
async def pair(lab):
    pair = Pair(lab)
    yield pair
    pair.close()


class TestAnswers:
    async def test_at_once_or_later_empty_or_not(self, pair):
        assert await pair.caller.request("echo", b"x") == b"x"
        assert await pair.caller.request("later", b"x", timeout=5) == b"x"
        assert await pair.caller.request("echo") == b""

    async def test_hundreds_at_a_time_get_their_own(self, pair):
        expected = [b"%d" % number for number in range(500)]
        assert await asyncio.gather(*(pair.caller.request("later", value) for value in expected)) == expected
        assert pair.far.sent_messages < 100, "answers that are ready together travel together"
        assert pair.caller.in_flight == pair.answerer.working == 0

    async def test_both_sides_call(self, lab):
        pair = Pair(lab, caller_service=lab.service)
        assert await pair.answerer.request("echo", b"back") == b"back"
        assert lab.calls[-1].peer == RESPONDER
        pair.close()

    async def test_a_handler_is_told_who_calls_and_until_when(self, pair, lab):
        await pair.caller.request("echo", b"x")
        await pair.caller.request("echo", b"x", timeout=5)
        without, within = lab.calls
        assert (without.peer, without.method, without.deadline) == (INITIATOR, "echo", None)
        assert 0 < within.deadline - asyncio.get_running_loop().time() <= 5

    async def test_events_are_not_answered(self, pair, lab):
        await pair.caller.event("later", b"x")
        await pair.caller.event("nowhere", b"x")
        await pair.caller.event("bug", b"x")
        assert await pair.caller.request("echo", b"y") == b"y"
        await until(lambda: len(lab.calls) == 2)
        assert pair.caller.in_flight == 0

    async def test_large_values_travel_in_pieces_and_others_pass_them(self, pair):
        large = bytes(range(256)) * (12 << 12)
        order = []

        async def note(name, value):
            assert await pair.caller.request("echo", value) == value
            order.append(name)

        await asyncio.gather(note("large", large), *(note(f"small {number}", b"x") for number in range(3)))
        assert order[-1] == "large"
        assert pair.near.most_queued_nbytes < 1 << 20, "no more is queued than the stream takes"

    async def test_a_small_call_passes_a_large_body_that_waits_for_room(self, pair):
        pair.near.nbytes_per_second = 50e6
        large = asyncio.create_task(pair.caller.request("echo", bytes(8 << 20)))
        await until(lambda: pair.near.sent_nbytes > 1 << 20)
        assert await pair.caller.request("echo", b"x") == b"x"
        assert pair.near.sent_nbytes < 3 << 20
        await large

    async def test_calls_with_a_deadline_that_wait_behind_a_large_body_cut_nobody(self, pair):
        pair.near.nbytes_per_second = 100e6
        large = asyncio.create_task(pair.caller.request("echo", bytes(4 << 20), timeout=PATIENCE))
        await until(lambda: pair.near.sent_nbytes > 1 << 20)
        await asyncio.gather(large, *(pair.caller.request("echo", bytes(5000), timeout=PATIENCE) for _ in range(1500)))

    async def test_many_large_answers_to_a_slow_reader_wait_where_they_are(self, pair):
        pair.far.nbytes_per_second = 100e6
        answers = await asyncio.gather(*(pair.caller.request("zeros", b"500000") for _ in range(60)))
        assert {len(answer) for answer in answers} == {500_000}
        assert pair.far.most_queued_nbytes < 1 << 20

    async def test_answers_of_a_hundred_kilobytes_to_a_slow_reader_too(self, pair):
        pair.far.nbytes_per_second = 200e6
        answers = await asyncio.gather(*(pair.caller.request("zeros", b"100000") for _ in range(300)))
        assert {len(answer) for answer in answers} == {100_000}
        assert pair.far.most_queued_nbytes < 1 << 20

    async def test_many_requests_and_events_at_once_wait_for_room_and_cut_nobody(self, pair, lab):
        pair.near.nbytes_per_second = 100e6
        await asyncio.gather(*(pair.caller.request("echo", bytes(100_000)) for _ in range(100)))
        await asyncio.gather(*(pair.caller.request("echo", bytes(4000)) for _ in range(1000)))
        for _ in range(1000):
            await pair.caller.event("echo", bytes(4000))
        for _ in range(100):
            await pair.caller.event("echo", bytes(100_000))
        await pair.caller.request("echo")
        assert len(lab.calls) == 2201
        assert pair.near.most_queued_nbytes < 1 << 20


class TestErrors:
    async def test_errors_of_ours_come_back_as_they_were_raised(self, pair):
        with pytest.raises(UnknownModelError) as raised:
            await pair.caller.request("unknown model")
        assert raised.value.args == ("no model digits", "digits", ["squares"])

    async def test_a_bug_is_logged_there_and_its_text_stays_there(self, pair):
        with structlog.testing.capture_logs() as logs, pytest.raises(PeerFailedError) as raised:
            await pair.caller.request("bug")
        assert "index" not in str(raised.value)
        assert raised.value.args[1] == InternalError.code
        assert [(entry["event"], entry["method"], entry["peer"]) for entry in logs] == [("a call failed", "bug", INITIATOR)]

    @pytest.mark.parametrize("known", ["\ud800", {1: 2}, 1 << 70], ids=["surrogate", "keys", "number"])
    async def test_what_an_error_knows_and_json_does_not_is_left_out(self, pair, lab, known):
        async def later(*_):
            raise UnknownModelError("no model", known)

        def at_once(*_):
            raise UnknownModelError("no model", known)

        lab.service.respond("later", later)
        lab.service.respond("at once", at_once)
        for method in ("later", "at once"):
            with pytest.raises(UnknownModelError) as raised:
                await pair.caller.request(method, timeout=PATIENCE)
            assert raised.value.args == ("no model",)

    async def test_unknown_methods_are_answered(self, pair):
        with pytest.raises(UnknownMethodError, match="Unknown method 'nowhere'"):
            await pair.caller.request("nowhere")

    async def test_who_may_not_is_told_before_anything_of_the_value_is_read(self, pair, lab):
        with pytest.raises(ForbiddenError, match="ask for an invitation"):
            await pair.caller.request("enrolled only", bytes(15 << 20))
        assert lab.asked == [(INITIATOR, "enrolled only")]
        assert pair.near.sent_nbytes < 1 << 20, "and sends no more of it"

    async def test_a_hook_that_breaks_lets_nobody_in(self, pair):
        with structlog.testing.capture_logs(), pytest.raises(PeerFailedError):
            await pair.caller.request("broken hook")

    async def test_oversized_requests_are_refused_before_they_are_sent(self, lab):
        pair = Pair(lab, RpcLimits(max_request_nbytes=1 << 20))
        with pytest.raises(PayloadTooLargeError, match="at most 1048576"):
            await pair.caller.request("echo", bytes((1 << 20) + 1))
        assert pair.near.sent_nbytes < 1 << 19
        assert await pair.caller.request("echo", b"still there") == b"still there"
        pair.close()

    async def test_answers_are_bounded_by_either_side(self, lab):
        for limits in ({"limits": RpcLimits(max_reply_nbytes=200_000)}, {"caller_limits": RpcLimits(max_reply_nbytes=200_000)}):
            pair = Pair(lab, **limits)
            with pytest.raises(PayloadTooLargeError):
                await pair.caller.request("zeros", b"200001")
            with contextlib.suppress(PayloadTooLargeError):
                await pair.caller.request("zeros", b"100000")
            assert len(await pair.caller.request("zeros", b"200000")) == 200_000
            await until(lambda pair=pair: not pair.answerer.working)
            pair.close()

    async def test_a_method_of_too_long_a_name_is_not_called(self, pair):
        with pytest.raises(MalformedRequestError):
            await pair.caller.request("m" * 300)

    async def test_a_lab_that_answers_nothing_says_so(self, pair):
        with pytest.raises(ForbiddenError):
            await pair.answerer.request("echo")


class TestEnds:
    async def test_a_deadline_ends_the_call_here_and_the_work_there(self, pair, lab):
        with pytest.raises(DeadlineExceededError, match=r"within 0\.5 s"):
            await pair.caller.request("held", b"x", timeout=0.5)  # of which the work has to begin
        await until(lambda: lab.cancelled == 1 and not pair.answerer.working)
        assert pair.caller.in_flight == 0

    async def test_many_calls_each_end_at_their_own(self, pair, lab):
        seconds = [0.1 + number / 1000 for number in range(100)]
        answers = await asyncio.gather(*(pair.caller.request("held", b"x", each) for each in seconds), return_exceptions=True)
        assert [str(answer) for answer in answers] == [f"no answer within {each:g} s" for each in seconds]
        await until(lambda: lab.cancelled == lab.started and not pair.answerer.working)
        assert pair.caller.in_flight == 0

    async def test_how_long_one_waits_is_said_when_it_changes(self, pair, lab):
        said, answers = [], pair.answerer._answers
        on_deadline, answers.on_deadline = answers.on_deadline, lambda body: (said.append(body), on_deadline(body))
        for timeout in (None, PATIENCE, PATIENCE, 2 * PATIENCE, None, None):
            await asyncio.gather(*(pair.caller.request("echo", b"x", timeout) for _ in range(3)))
        assert len(said) < 9, "not for each of the calls that have one"
        ends = [call.deadline for call in lab.calls]
        assert ends[:3] + ends[12:] == [None] * 9
        assert min(ends[9:12]) > max(ends[3:9])

    async def test_a_deadline_holds_there_when_nothing_can_be_heard_from_here(self, pair, lab):
        call = asyncio.create_task(pair.caller.request("held", b"x", timeout=0.2))
        await until(lambda: lab.started == 1)
        pair.near.nbytes_per_second = 0.001
        await until(lambda: lab.cancelled == 1)
        with pytest.raises(DeadlineExceededError):
            await call

    @pytest.mark.parametrize("value", [b"x", bytes(5000), bytes(1 << 20)], ids=len)
    async def test_a_deadline_holds_while_there_is_no_room_to_send(self, pair, value):
        await pair.caller.request("echo")
        pair.far.pause()
        before = [asyncio.create_task(pair.caller.request("echo", bytes(1 << 20))) for _ in range(2)]
        await until(lambda: not pair.caller._line.is_clear)
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(DeadlineExceededError, match=r"within 0\.01 s"):
                await pair.caller.request("echo", value, timeout=0.01)
        pair.far.resume()
        await asyncio.gather(*before)
        assert pair.caller.in_flight == 0

    @pytest.mark.parametrize("seconds", [float("inf"), 1e300])
    async def test_a_deadline_that_never_comes(self, pair, seconds):
        assert await pair.caller.request("echo", b"x", timeout=seconds) == b"x"

    async def test_it_also_holds_there_for_a_large_answer_that_nobody_takes(self, pair):
        await pair.caller.request("echo")
        pair.near.pause()
        call = asyncio.create_task(pair.caller.request("zeros", b"1000000", timeout=0.2))
        await until(lambda: pair.answerer.working)
        pair.near.nbytes_per_second = 0.001
        await until(lambda: not pair.answerer.working)
        assert pair.answerer._answers._unsent_nbytes == 0
        with pytest.raises(DeadlineExceededError):
            await call

    async def test_a_call_that_is_cancelled_is_cancelled_there(self, pair, lab):
        call = asyncio.create_task(pair.caller.request("held", b"x"))
        await until(lambda: lab.started == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: lab.cancelled == 1 and not pair.answerer.working)
        assert pair.caller.in_flight == 0

    async def test_a_large_request_or_answer_that_is_cancelled_half_way_leaves_nothing(self, pair, lab):
        pair.near.nbytes_per_second = pair.far.nbytes_per_second = 50e6
        for method, value in (("echo", bytes(12 << 20)), ("zeros", b"12000000")):
            call = asyncio.create_task(pair.caller.request(method, value))
            await until(lambda: pair.answerer.working)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await until(lambda: not pair.answerer.working)
            assert pair.answerer._answers._held_nbytes == 0
        assert await pair.caller.request("echo", b"x") == b"x"
        assert len(lab.calls) == 1

    async def test_a_connection_that_is_lost_ends_its_calls_on_both_sides(self, pair, lab):
        call = asyncio.create_task(pair.caller.request("held", b"x"))
        await until(lambda: lab.started == 1)
        pair.near.cut(ConnectionResetError("no route"))
        with pytest.raises(ServiceUnavailableError, match=f"{RESPONDER}.*no route.*connect again"):
            await call
        with pytest.raises(ServiceUnavailableError):
            await pair.caller.request("echo")
        await until(lambda: lab.cancelled == 1)

    async def test_closed_in_order_what_was_sent_arrives(self, pair, lab):
        await pair.caller.event("echo", b"last words")
        await pair.caller.aclose()
        await pair.caller.aclose()
        assert len(lab.calls) == 1
        assert pair.answerer.is_closed
        assert pair.far.closed
        assert pair.far.error is None
        with pytest.raises(ServiceUnavailableError, match="closed here"):
            await pair.caller.request("echo")

    async def test_a_peer_that_closes_ends_calls_that_wait(self, pair, lab):
        call = asyncio.create_task(pair.caller.request("held", b"x"))
        await until(lambda: lab.started == 1)
        await pair.answerer.aclose()
        with pytest.raises(ServiceUnavailableError, match=RESPONDER):
            await call

    async def test_a_handler_goes_on_when_the_method_is_taken_away(self, pair, lab):
        call = asyncio.create_task(pair.caller.request("held", b"x"))
        await until(lambda: lab.started == 1)
        lab.service.unrespond("held")
        lab.hold.set()
        assert await call == b"x"
        with pytest.raises(UnknownMethodError):
            await pair.caller.request("held")

    async def test_a_large_request_to_a_peer_that_opens_nothing_ends_in_time_or_with_the_connection(self):
        near, far = stream_pair()
        far.start(lambda _: None, lambda: None, lambda _: None)
        caller = RpcConnection(near, INITIATOR)
        with pytest.raises(DeadlineExceededError):
            await caller.request("echo", bytes(1 << 20), timeout=0.01)
        call = asyncio.create_task(caller.request("echo", bytes(1 << 20)))
        await asyncio.sleep(0)
        far.destroy()
        with pytest.raises(ServiceUnavailableError):
            await call
        assert caller.in_flight == 0


class TestBounds:
    async def test_more_at_a_time_than_allowed_is_told_to_wait(self, lab):
        pair = Pair(lab, RpcLimits(max_in_flight=3))
        calls = [asyncio.create_task(pair.caller.request("held", b"x")) for _ in range(5)]
        await until(lambda: sum(call.done() for call in calls) == 2)
        lab.hold.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [bytes] * 3 + [QueueFullError] * 2
        pair.close()

    async def test_so_is_who_says_until_when_it_waits_for_large_ones(self, lab):
        pair = Pair(lab, RpcLimits(max_in_flight=3))
        calls = [pair.caller.request("echo", bytes(200_000), timeout=PATIENCE) for _ in range(8)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [bytes] * 3 + [QueueFullError] * 5
        pair.close()

    @pytest.mark.parametrize("method", ["zeros", "zeros later"])
    async def test_answers_that_wait_for_a_peer_that_reads_nothing_are_bounded(self, lab, method):
        async def later(_, value):
            return bytes(int(value))

        lab.service.respond("zeros later", later)
        pair = Pair(lab, RpcLimits(max_reply_nbytes=1 << 20))
        await pair.caller.request("echo")
        pair.near.pause()
        calls = [asyncio.create_task(pair.caller.request(method, b"300000")) for _ in range(8)]
        answers = pair.answerer._answers
        await until(lambda: answers._unsent_nbytes == 900_000 and pair.answerer.working == 3)
        pair.near.resume()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in found] == [bytes] * 3 + [QueueFullError] * 5
        await until(lambda: not pair.answerer.working)
        assert answers._unsent_nbytes == 0
        pair.close()

    async def test_bodies_that_are_held_are_bounded(self, lab):
        pair = Pair(lab, RpcLimits(max_held_nbytes=500_000))
        calls = [asyncio.create_task(pair.caller.request("held", bytes(nbytes))) for nbytes in (100_000, 300_000, 300_000)]
        await until(lambda: calls[2].done() and lab.started == 2)
        lab.hold.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [bytes, bytes, QueueFullError]
        assert pair.answerer._answers._held_nbytes == 0
        pair.close()

    async def test_a_peer_that_asks_and_does_not_read_is_cut_and_named(self, lab):
        pair = Pair(lab, RpcLimits(max_unread_nbytes=100_000))
        await pair.caller.request("echo")
        pair.near.pause()
        with structlog.testing.capture_logs() as logs:
            calls = [asyncio.create_task(pair.caller.request("zeros", b"4000")) for _ in range(200)]
            await until(lambda: pair.answerer.is_closed)
            await asyncio.gather(*calls, return_exceptions=True)
        assert pair.far.most_queued_nbytes < 1 << 20
        assert [(entry["event"], entry["peer"]) for entry in logs] == [("peer cut", INITIATOR)]
        assert "does not read" in logs[0]["error"]
        pair.close()


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

    def say(self, *messages, beside=False):
        for message in messages:
            self.mux.send(self.beside if beside else self.channel, message)
        for frame in self.mux.take():
            self.near.send(frame)

    async def is_cut(self):
        await until(lambda: self.connection.is_closed)
        return isinstance(self.connection._line.error, ProtocolError)


class TestStrangers:
    async def test_values_that_are_cut_short_are_answered_as_npm_does(self, lab):
        stranger = Stranger(lab)
        stranger.say(b"\x00\x01" + string("echo") + b"\x09abc", b"\x00\x02" + string("echo") + b"\x01z")
        await until(lambda: len(stranger.heard) == 2)
        assert b"DECODE_ERROR" in stranger.heard[0][1]
        assert stranger.heard[1] == (1, b"\x00\x02\x01z")

    @pytest.mark.parametrize(
        ("beside", "sent"),
        [
            (False, [b"\x00\x01\x09ab"]),
            (False, [b"\x00\x01" + string("m" * 300)]),
            (False, [b"\x00\x01" + string("held") + b"\x00"] * 2),
            (False, [b"\x01"]),
            (False, [b"\x01\x00\x01\x05ab"]),
            (True, [b"\x63"]),
            (True, [encode_call(CallMessage.REQUEST, 1, uint(10) + string("echo"))]),
            (True, [encode_call(CallMessage.REQUEST, 1, uint(200_000) + string("m" * 300))]),
            (True, [uint(CallMessage.DEADLINE)]),
            (True, [encode_call(CallMessage.REQUEST, 1, uint(200_000) + string("echo")), encode_call(CallMessage.REQUEST_PIECE, 1, b"x")]),
        ],
        ids=[
            "method",
            "long method",
            "id in use",
            "no response",
            "value",
            "type",
            "needless pieces",
            "long name",
            "deadline",
            "tiny pieces",
        ],
    )
    async def test_who_breaks_the_protocol_is_cut_and_named(self, lab, beside, sent):
        stranger = Stranger(lab)
        await until(lambda: stranger.channel.opened)
        with structlog.testing.capture_logs() as logs:
            stranger.say(*sent, beside=beside)
            assert await stranger.is_cut()
        assert [entry["peer"] for entry in logs] == [INITIATOR]

    async def test_who_loses_the_right_before_a_body_is_whole_is_not_let_in(self, lab):
        stranger, piece = Stranger(lab), encode_call(CallMessage.REQUEST_PIECE, 1, bytes(100_000))
        await until(lambda: stranger.beside.opened)
        stranger.say(encode_call(CallMessage.REQUEST, 1, uint(200_000) + string("echo")), piece, beside=True)
        await until(lambda: stranger.connection.working)

        def revoked(*_):
            raise ForbiddenError("this key was revoked")

        lab.service.authorise = revoked
        stranger.say(piece, beside=True)
        await until(lambda: stranger.heard)
        assert b"this key was revoked" in stranger.heard[0][1]
        assert not lab.calls
        assert not stranger.connection.working

    async def test_answers_that_nobody_waits_for_are_passed_over(self, lab):
        stranger = Stranger(lab)
        stranger.say(b"\x01\x00\x07\x01x", b"\x00\x01" + string("echo") + b"\x01y")
        await until(lambda: stranger.heard)
        assert stranger.heard == [(1, b"\x00\x01\x01y")]

    async def test_a_lie_about_an_answers_size_costs_nothing_and_fails_that_call(self, lab):
        stranger = Stranger(lab)
        await until(lambda: stranger.beside.opened)
        call = asyncio.create_task(stranger.connection.request("anything"))
        await until(lambda: stranger.heard)
        stranger.say(encode_call(CallMessage.RESPONSE, 1, uint(1 << 40)), beside=True)
        with pytest.raises(PayloadTooLargeError):
            await call
        assert not stranger.connection.is_closed

    async def test_errors_that_make_no_sense_name_the_peer(self, lab):
        stranger = Stranger(lab)
        for number, body in enumerate((b"\x01\x01" + string("?"), b"\x0f\x02" + b"".join(map(string, ("?", "X", "?", "internal", "{"))))):
            call = asyncio.create_task(stranger.connection.request("anything"))
            await until(lambda number=number: len(stranger.heard) == number + 1)
            stranger.say(b"\x01" + body)
            with pytest.raises(RemoteError, match="11111111"):
                await call

    async def test_large_requests_that_never_come_hold_their_own_peers_budget_only(self, lab):
        stranger = Stranger(lab, RpcLimits(max_in_flight=3))
        begun = [encode_call(CallMessage.REQUEST, number, uint(1 << 20) + string("echo")) for number in range(1, 5)]
        stranger.say(*begun, beside=True)
        await until(lambda: stranger.heard)
        assert b"queue_full" in stranger.heard[0][1]
        pair = Pair(lab, RpcLimits(max_in_flight=3))
        assert await pair.caller.request("echo", b"x") == b"x"
        pair.close()


bodies = st.binary(max_size=60)
methods = st.sampled_from(["echo", "later", "unknown model", "nowhere", "enrolled only"])
ids = st.integers(0, 4)
rpc_messages = st.one_of(
    bodies,
    st.builds(lambda number, method, value: b"\x00" + uint(number) + string(method) + buffer(value), ids, methods, bodies),
    st.builds(lambda flags, number, body: b"\x01" + bytes([flags]) + uint(number) + body, st.integers(0, 15), ids, bodies),
)
call_messages = st.one_of(
    bodies,
    st.builds(encode_call, st.sampled_from(CallMessage), ids, bodies),
    st.builds(
        lambda number, nbytes, method: encode_call(CallMessage.REQUEST, number, uint(nbytes) + string(method)),
        ids,
        st.sampled_from([0, 131_073, 1 << 24, 1 << 52]),
        methods,
    ),
    st.builds(
        lambda number, nbytes: encode_call(CallMessage.REQUEST_PIECE, number, bytes(nbytes)), ids, st.sampled_from([0, 1, 4096, 131_072])
    ),
)


@given(st.lists(st.one_of(st.tuples(st.just(False), rpc_messages), st.tuples(st.just(True), call_messages)), max_size=25))
def test_whatever_a_peer_sends_it_is_answered_or_cut(sent):
    """Never a failure of ours, and nothing is left over."""

    async def story():
        stranger = Stranger(Lab(), RpcLimits(max_in_flight=4, max_held_nbytes=1 << 20))
        answers = stranger.connection._answers
        for beside, message in sent:
            stranger.say(message, beside=beside)
            await asyncio.sleep(0)
            assert 0 <= answers._held_nbytes <= 1 << 20
        for _ in range(10):
            await asyncio.sleep(0)
        assert stranger.connection.is_closed == (stranger.connection._line.error is not None)
        assert isinstance(stranger.connection._line.error, ProtocolError | None)
        stranger.connection.destroy()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not answers._work

    with structlog.testing.capture_logs() as logs:
        asyncio.run(story())
    assert {entry["event"] for entry in logs} <= {"peer cut", "an event was refused"}
