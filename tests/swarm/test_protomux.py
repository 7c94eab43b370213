"""Many channels on one stream: as npm's protomux does it, and bounded whatever a peer sends."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import InternalError, ProtocolError
from tether.swarm.wire.compact import MAX_UINT, buffer, read_buffer, read_string, read_uint, string, uint
from tether.swarm.wire.protomux import Asked, Closed, MuxLimits, Opened, Protomux, Received


def receive(mux, *frames):
    return [event for frame in frames for event in mux.receive(memoryview(frame))]


def exchange(one, other):
    """Deliver until both are silent; what each was told, with bodies as bytes."""
    told = {one: [], other: []}
    while frames := [(other, frame) for frame in one.take()] + [(one, frame) for frame in other.take()]:
        for mux, frame in frames:
            told[mux] += [plain(event) for event in mux.receive(memoryview(frame))]
    return told[one], told[other]


def plain(event):
    return event._replace(body=bytes(event.body)) if isinstance(event, Received) else event


def opened():
    one, other = Protomux(), Protomux()
    here, there = one.open("talk", b"id"), other.open("talk", b"id")
    exchange(one, other)
    return one, here, other, there


class TestCompact:
    @given(st.integers(0, MAX_UINT))
    def test_numbers_come_back(self, number):
        assert read_uint(memoryview(b"x" + uint(number) + b"y"), 1) == (number, 1 + len(uint(number)))

    @pytest.mark.parametrize(
        ("number", "encoded"),
        [(0xFC, "fc"), (0xFD, "fdfd00"), (0x10000, "fe00000100"), (1 << 32, "ff0000000001000000"), (MAX_UINT, "ffffffffffffff1f00")],
    )
    def test_numbers_are_written_as_javascript_writes_them(self, number, encoded):
        assert uint(number).hex() == encoded

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_texts_come_back(self, text):
        assert read_string(memoryview(string(text)), 0)[0] == text

    @pytest.mark.parametrize("data", [b"", b"\xfd\x01", b"\xfe\x01\x02\x03", b"\xff" * 8, b"\xff" * 9, b"\x05abcd"])
    def test_what_is_cut_short_or_too_large_is_refused(self, data):
        with pytest.raises(ProtocolError):
            read_buffer(memoryview(data), 0)

    def test_what_is_no_text_is_replaced_as_javascript_does(self):
        assert read_string(memoryview(buffer(b"\xff")), 0)[0] == "\ufffd"
        assert string("\ud800") == string("?")


class TestFrames:
    def test_an_opening_is_what_npm_writes(self):
        mux = Protomux()
        mux.open("protomux-rpc", b"\x22" * 32)
        assert mux.take() == [b"\x00\x01\x01" + b"\x0cprotomux-rpc" + b"\x20" + b"\x22" * 32]

    def test_what_is_sent_together_goes_in_one_frame_channel_by_channel(self):
        mux = Protomux()
        first, second = mux.open("a"), mux.open("b")
        mux.take()
        for channel, message in ((first, b"\x00one"), (first, b"\x00two"), (second, b"\x01three")):
            mux.send(channel, message)
        assert mux.take() == [b"\x00\x00" + b"\x01" + b"\x04\x00one" + b"\x04\x00two" + b"\x00\x02" + b"\x06\x01three"]
        assert mux.take() == []

    def test_one_message_goes_alone_and_a_large_one_always(self):
        one, here, other, there = opened()
        one.send(here, b"\x00small")
        assert one.take() == [b"\x01\x00small"]
        large = b"\x00" + bytes(1 << 15)
        one.send(here, b"\x00a")
        one.send(here, large)
        one.send(here, b"\x00b")
        frames = one.take()
        assert frames == [b"\x01\x00a", b"\x01" + large, b"\x01\x00b"]
        assert [bytes(event.body) for event in receive(other, *frames)] == [b"a", large[1:], b"b"]
        assert there.opened

    def test_thousands_of_messages_are_several_frames_and_arrive_in_order(self):
        one, here, other, _ = opened()
        for number in range(5000):
            one.send(here, b"\x07" + number.to_bytes(4, "big"))
        frames = one.take()
        assert 4 < len(frames) < 20
        assert [int.from_bytes(event.body, "big") for event in receive(other, *frames)] == list(range(5000))


class TestChannels:
    def test_both_open_and_both_are_told(self):
        one, other = Protomux(), Protomux()
        here, there = one.open("talk", b"id", b"hello"), other.open("talk", b"id", b"hi")
        assert exchange(one, other) == ([Opened(here)], [Opened(there)])
        assert (here.handshake, there.handshake) == (b"hi", b"hello")

    def test_the_other_id_is_another_channel(self):
        one, other = Protomux(), Protomux()
        channel = one.open("talk", b"1")
        other.open("talk", b"2")
        told, _ = exchange(one, other)
        assert told == [Closed(channel)]

    def test_what_nobody_knows_is_rejected(self):
        one, other = Protomux(), Protomux()
        channel = one.open("new in 2030")
        one.send(channel, b"\x00early")
        assert exchange(one, other) == ([Closed(channel)], [])
        assert channel.closed
        assert one.open("new in 2031").local == channel.local, "its number is free again"

    def test_what_is_offered_is_asked_about_and_early_messages_are_kept(self):
        one, other = Protomux(), Protomux()
        other.offer("talk")
        here = one.open("talk", b"any", b"hello")
        one.send(here, b"\x03early")
        (asked,) = exchange(one, other)[1]
        assert (asked.protocol, asked.id, asked.handshake) == ("talk", b"any", b"hello")
        there, held = other.accept(asked)
        assert [plain(event) for event in held] == [Received(there, 3, b"early")]
        assert other._held_nbytes == 0
        assert exchange(one, other)[0] == [Opened(here)]

    def test_what_is_asked_can_be_rejected_and_withdrawn(self):
        one, other = Protomux(), Protomux()
        other.offer("talk", b"id")
        here = one.open("talk", b"id")
        (asked,) = exchange(one, other)[1]
        other.reject(asked)
        assert exchange(one, other)[0] == [Closed(here)]
        again = one.open("talk", b"id")
        (asked,) = exchange(one, other)[1]
        one.close(again)
        exchange(one, other)
        assert asked.is_withdrawn
        other.reject(asked)
        with pytest.raises(InternalError):
            other.accept(asked)
        assert other.take() == []

    def test_a_channel_is_open_once(self):
        one, here, other, _ = opened()
        with pytest.raises(InternalError):
            one.open("talk", b"id")
        with pytest.raises(InternalError):
            other.open("talk", b"id")
        frames = [b"\x00\x01\x02" + string("talk") + buffer(b"id")]
        assert receive(one, *frames) == []
        assert one.take() == [b"\x00\x02\x02"], "rejected, as npm's does with unique channels"
        assert not here.closed

    def test_closing_tells_the_other_side_and_later_messages_are_dropped(self):
        one, here, other, there = opened()
        other.send(there, b"\x00on its way")
        one.close(here)
        one.close(here)
        one.send(here, b"\x00after")
        assert exchange(one, other) == ([], [Closed(there)])
        assert other.open("talk", b"id").local == there.local

    def test_both_close_at_once_and_open_again_under_the_same_numbers(self):
        one, here, other, there = opened()
        one.close(here)
        other.close(there)
        again, there_again = one.open("talk", b"id"), other.open("talk", b"id")
        assert exchange(one, other) == ([Opened(again)], [Opened(there_again)])

    def test_closed_before_it_was_answered_it_can_be_opened_again(self):
        one, other = Protomux(), Protomux()
        one.close(one.open("talk"))
        again = one.open("talk")
        there = other.open("talk")
        told_one, told_other = exchange(one, other)
        assert told_other == [Opened(there), Closed(there)]
        assert told_one in ([Closed(again)], [Opened(again)])


class TestLimits:
    def broken(self, *frames, mux=None):
        with pytest.raises(ProtocolError):
            receive(mux or Protomux(MuxLimits(channels=4, held_nbytes=2000, frame_messages=10)), *frames)

    def test_numbers_that_are_in_use_or_leave_others_out(self):
        self.broken(b"\x00\x01\x02\x01a\x00")
        self.broken(b"\x00\x01" + uint(MAX_UINT) + b"\x01a\x00")
        one, _, _, _ = opened()
        self.broken(b"\x00\x01\x01\x01a\x00", mux=one)

    def test_more_channels_than_allowed(self):
        self.broken(*(b"\x00\x01" + bytes([number]) + b"\x01a\x00" for number in range(1, 6)))

    def test_a_rejection_of_nothing(self):
        self.broken(b"\x00\x02\x01")

    def test_frames_within_frames(self):
        self.broken(b"\x00\x00\x00\x04\x00\x01\x01\x01")

    def test_a_frame_of_more_messages_than_allowed(self):
        self.broken(b"\x00\x00\x05" + b"\x01\x00" * 11)

    def test_a_frame_that_names_more_channels_than_that(self):
        self.broken(b"\x00\x00\x05" + b"\x00\x05" * 11)

    def test_messages_that_are_cut_short_or_have_no_type(self):
        self.broken(b"\x00\x00\x05\x09\x00")
        self.broken(b"\x05")
        self.broken(b"\x00\x01\x01\x09ab")

    def test_more_kept_than_allowed(self):
        mux = Protomux(MuxLimits(held_nbytes=2000))
        mux.offer("a")
        (asked,) = receive(mux, b"\x00\x01\x01\x01a\x00")
        receive(mux, b"\x01\x00" + bytes(1000))
        self.broken(b"\x01\x00" + bytes(1000), mux=mux)
        assert len(asked.held) == 1

    def test_a_long_handshake(self):
        self.broken(b"\x00\x01\x01\x01a\x00" + bytes(5000))

    def test_what_is_of_a_later_version_is_passed_over(self):
        assert receive(Protomux(), b"", b"\x00\x09what", b"\x07\x00for no channel", b"\x00\x03\x05") == []


numbers = st.sampled_from([0, 1, 2, 3, 5, 0xFD, 0xFFFF, MAX_UINT])
names = st.sampled_from(["a", "b", "talk", "", "\u00e9" * 40])
messages = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda kind, number: uint(kind) + uint(number), st.integers(0, 6), numbers),
    st.builds(lambda number, name, rest: b"\x01" + uint(number) + string(name) + rest, numbers, names, st.binary(max_size=8)),
    st.builds(lambda number, name: b"\x01" + uint(number) + string(name) + b"\x00", st.integers(1, 4), names),
)
frames = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda number, message: uint(number) + message, numbers, messages),
    st.builds(
        lambda number, parts: b"\x00\x00" + uint(number) + b"".join(buffer(part) if part else b"\x00\x01" for part in parts),
        numbers,
        st.lists(messages, max_size=8),
    ),
)


@given(st.lists(frames, max_size=30), st.randoms(use_true_random=False))
def test_whatever_comes_it_says_so_with_its_own_error_and_stays_small(sent, chance):
    mux = Protomux(MuxLimits(channels=4, held_nbytes=4096))
    mux.offer("a")
    mux.open("talk")
    answered = 0
    try:
        for frame in sent:
            for event in mux.receive(memoryview(frame)):
                if isinstance(event, Asked) and chance.random() < 0.5:
                    mux.accept(event) if chance.random() < 0.5 else mux.reject(event)
            answered += sum(map(len, mux.take()))
    except ProtocolError:
        pass
    assert len(mux._remotes) <= 5
    assert 0 <= mux._held_nbytes <= 4096 + 712
    assert answered <= 64 + 8 * sum(map(len, sent))


ACTS = ("open", "close", "send", "deliver")


class Two:
    """Two muxes with a line each way; what was sent and what arrived."""

    def __init__(self):
        self.sides = {True: Protomux(), False: Protomux()}
        self.channels, self.sent, self.got = {}, {True: [], False: []}, {True: [], False: []}

    def act(self, number, act, side, name):
        channel = self.channels.get((side, name))
        is_open = channel is not None and not channel.closed
        if act == "open" and not is_open:
            self.channels[side, name] = self.sides[side].open(name)
        elif act == "close" and is_open:
            self.sides[side].close(channel)
        elif act == "send" and is_open:
            self.sides[side].send(channel, b"\x00%d" % number)
            self.sent[side].append(b"%d" % number)
        elif act == "deliver":
            self.deliver(side)

    def deliver(self, side):
        told = receive(self.sides[not side], *self.sides[side].take())
        self.got[not side] += [bytes(event.body) for event in told if isinstance(event, Received)]

    def open_channels(self, side):
        return {name for name in "ab" if (channel := self.channels.get((side, name))) and not channel.closed}


@given(st.lists(st.tuples(st.sampled_from(ACTS), st.booleans(), st.sampled_from("ab")), max_size=80))
def test_two_sides_that_do_as_they_like_agree_in_the_end(acts):
    """Whatever the order in which things cross: no error, what arrives was sent in that order, and both hold the same channels open."""
    two = Two()
    for number, act in enumerate(acts):
        two.act(number, *act)
    for _ in range(6):
        two.deliver(True)
        two.deliver(False)
    for side, mux in two.sides.items():
        assert two.got[not side] == sorted(set(two.got[not side]) & set(two.sent[side]), key=int), "in order, none twice, none invented"
        assert not mux._waiting
        assert len(mux._free) + len(mux._channels) == len(mux._locals), "each number is free or in use"
    assert two.open_channels(True) == two.open_channels(False)


def test_random_interleavings_of_many_channels():
    """The same with more channels and longer runs than hypothesis tries."""
    chance = random.Random("channels")
    for _ in range(30):
        acts = [(chance.choice(ACTS), chance.random() < 0.5, chance.choice("ab")) for _ in range(400)]
        test_two_sides_that_do_as_they_like_agree_in_the_end.hypothesis.inner_test(acts)
