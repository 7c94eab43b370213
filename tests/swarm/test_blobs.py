"""Blobs between two peers: the smallest first, capped, verified; and what becomes of peers that lie, stall, shout or leave."""

import asyncio
import contextlib
import threading

import pytest
import structlog
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import ForbiddenError, PeerFailedError, ProtocolError, ServiceUnavailableError, UnavailableError
from tether.ports import SignedManifest
from tether.swarm.blobs import blobs
from tether.swarm.blobs.blobs import AskingLimits, BlobConnection, GivingLimits
from tether.swarm.blobs.frames import (
    Begin,
    Kind,
    Piece,
    bits,
    encode_absent,
    encode_ask,
    encode_begin,
    encode_cancel,
    encode_error,
    encode_goodbye,
    encode_have,
    encode_hello,
    encode_manifest,
    encode_piece,
    is_hello,
    read_frame,
    read_manifest,
)
from tether.swarm.wire.bandwidth import TokenBucket
from tether.swarm.wire.pieces import PIECE_NBYTES, Body
from tether.testing.streams import INITIATOR, RESPONDER, stream_pair

PATIENCE = 10.0
MIB = 1 << 20


def digest_of(data):
    return blake3(data).hexdigest()


def pieces(data, nbytes):
    return [data[at : at + nbytes] for at in range(0, max(len(data), 1), nbytes)]


def blob(number, nbytes=64 << 10):
    return number.to_bytes(8, "little") * (nbytes // 8)


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (nothing says when a peer has seen something)
            await asyncio.sleep(0)


class Shelf:
    def __init__(self, *contents):
        self.blobs = {digest_of(data): data for data in contents}
        self.manifests, self.bitmaps = {}, {}
        self.forbidden, self.read, self.asked = set(), [], []
        self.reading = self.most_reading = 0
        self.open = asyncio.Event()
        self.open.set()

    async def authorise(self, peer, kind, digest):
        self.asked.append((peer, kind, digest))
        if digest in self.forbidden:
            raise ForbiddenError("this key may not have the model: ask for an invitation")

    async def blob(self, digest):
        self.read.append(digest)
        self.reading += 1
        self.most_reading = max(self.most_reading, self.reading)
        try:
            await self.open.wait()
        finally:
            self.reading -= 1
        return self.blobs.get(digest)

    async def manifest(self, digest):
        return self.manifests.get(digest)

    async def bitmap(self, digest):
        if digest == "f" * 64:
            raise OSError("the disk is gone")
        return self.bitmaps.get(digest)


class Pair:
    def __init__(self, shelf, **options):
        self.near, self.far = stream_pair()
        asking, giving, uplink = options.get("asking"), options.get("giving"), options.get("uplink")
        self.had = []
        self.taker = BlobConnection(self.near, options.get("own"), asking=asking, on_have=lambda *what: self.had.append(what))
        self.giver = BlobConnection(self.far, shelf, giving=giving, uplink=uplink)

    def close(self):
        self.taker.destroy()
        self.giver.destroy()


@pytest.fixture
async def shelf():
    return Shelf(*(blob(number) for number in range(20)), blob(99, 4 * MIB), blob(98, 4 * MIB))


@pytest.fixture
async def pair(shelf):
    pair = Pair(shelf)
    yield pair
    pair.close()


class TestTaking:
    async def test_blobs_come_with_their_bytes_large_and_small(self, pair, shelf):
        found = await asyncio.gather(*(pair.taker.blob(digest) for digest in shelf.blobs))
        assert found == list(shelf.blobs.values())
        assert pair.taker.got_nbytes == pair.giver.given_nbytes == sum(map(len, found))

    async def test_what_is_not_there_is_none(self, pair):
        assert await pair.taker.blob("0" * 64) is None
        assert await pair.taker.manifest("0" * 64) is None
        assert await pair.taker.bitmap("0" * 64, 5) is None

    async def test_a_manifest_comes_as_it_was_signed(self, pair, shelf):
        signed = SignedManifest(b"a manifest" * 30_000, "ab" * 32, bytes(range(64)))
        shelf.manifests[digest_of(signed.data)] = signed
        assert await pair.taker.manifest(digest_of(signed.data)) == signed

    async def test_both_sides_give_at_the_same_time(self, shelf):
        own = Shelf(blob(1000), blob(1001, MIB))
        pair = Pair(shelf, own=own)
        here, there = (
            asyncio.gather(*(each.blob(digest) for digest in blobs)) for each, blobs in ((pair.taker, shelf.blobs), (pair.giver, own.blobs))
        )
        assert (await here, await there) == (list(shelf.blobs.values()), list(own.blobs.values()))
        pair.close()

    async def test_a_small_blob_passes_a_large_one(self, pair):
        order = []

        async def note(name, data):
            assert await pair.taker.blob(digest_of(data)) == data
            order.append(name)

        await asyncio.gather(note("large", blob(99, 4 * MIB)), note("small", blob(1)))
        assert order == ["small", "large"]

    async def test_many_small_blobs_starve_no_large_one(self, pair, shelf):
        small = [blob(number) for number in range(1000, 1200)]
        shelf.blobs |= {digest_of(each): each for each in small}
        large = asyncio.create_task(pair.taker.blob(digest_of(blob(99, 4 * MIB))))
        rest = [asyncio.create_task(pair.taker.blob(digest_of(each))) for each in small]
        await large
        assert not all(call.done() for call in rest)
        assert await asyncio.gather(*rest) == small

    async def test_of_large_blobs_one_is_whole_after_the_other(self, shelf, monkeypatch):
        data = [blob(number, MIB) for number in range(300, 304)]
        shelf.blobs |= {digest_of(each): each for each in data}
        pair = Pair(shelf)
        frames, read = [], blobs.read_frame
        monkeypatch.setattr(blobs, "read_frame", lambda *given: frames.append(read(*given)) or frames[-1])
        assert await asyncio.gather(*(pair.taker.blob(digest_of(each)) for each in data)) == data
        ids = [frame.id for frame in frames if isinstance(frame, Begin | Piece)]
        assert len(ids) > 3 * len(data)
        assert ids == sorted(ids)
        pair.close()

    async def test_what_is_taken_back_as_its_last_piece_leaves_is_answered_once(self, pair, monkeypatch):
        giving, send = pair.giver._giving, pair.giver._giving._send_piece

        async def then_taken_back(body):
            nbytes = await send(body)
            if not body.missing:
                giving.on_cancel(body.ask_id)
            return nbytes

        monkeypatch.setattr(giving, "_send_piece", then_taken_back)
        for number in (1, 2, 99):
            wanted = blob(number, 4 * MIB if number == 99 else 64 << 10)
            assert await pair.taker.blob(digest_of(wanted)) == wanted
        await until(lambda: not len(giving))
        assert pair.taker.error is None
        assert await pair.taker.blob(digest_of(blob(3))) == blob(3)

    async def test_no_more_is_asked_than_agreed_and_all_is_answered(self, shelf):
        for asking, giving, most in ((AskingLimits(in_flight=3), GivingLimits(at_once=9), 3), (AskingLimits(), GivingLimits(window=2), 2)):
            shelf.open.clear()
            pair = Pair(shelf, asking=asking, giving=giving)
            calls = [asyncio.create_task(pair.taker.blob(digest)) for digest in shelf.blobs]
            await until(lambda most=most: shelf.reading == most)
            shelf.open.set()
            assert None not in await asyncio.gather(*calls)
            assert shelf.most_reading <= 3
            pair.close()

    async def test_a_slow_reader_makes_the_giver_hold_little(self, pair, shelf):
        pair.far.nbytes_per_second = 100e6
        assert await pair.taker.blob(digest_of(blob(99, 4 * MIB))) == blob(99, 4 * MIB)
        assert pair.far.most_queued_nbytes <= pair.far.queue_nbytes + 2 * PIECE_NBYTES
        assert shelf.most_reading == 1

    async def test_a_source_is_used_from_another_loop(self, pair, shelf):
        source, found = pair.taker.source("alice"), []
        assert (source.name, source.in_flight) == ("alice", 8)

        async def elsewhere():
            found.append(await source.fetch(digest_of(blob(3)), 1))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await source.fetch("9" * 64, 1)

        def read(digest):
            return shelf.open.clear() if digest == "9" * 64 else None

        shelf.read = type("Noticing", (list,), {"append": lambda _, digest: read(digest)})()
        thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
        thread.start()
        await asyncio.to_thread(thread.join)
        assert found == [blob(3)]
        await until(lambda: not shelf.reading)


class TestGiving:
    async def test_who_may_not_is_told_before_anything_is_read(self, pair, shelf):
        shelf.forbidden.add(digest_of(blob(1)))
        with pytest.raises(ForbiddenError, match="ask for an invitation"):
            await pair.taker.blob(digest_of(blob(1)))
        assert shelf.asked == [(INITIATOR, Kind.BLOB, digest_of(blob(1)))]
        assert shelf.read == []
        assert await pair.taker.blob(digest_of(blob(2))) == blob(2)

    async def test_what_breaks_there_is_logged_there_and_only_that_is_lost(self, pair):
        with structlog.testing.capture_logs() as logs, pytest.raises(ServiceUnavailableError, match="ask another peer"):
            await pair.taker.bitmap("f" * 64, 1)
        assert [(entry["event"], entry["digest"]) for entry in logs] == [("a blob could not be given", "f" * 64)]
        assert await pair.taker.blob(digest_of(blob(2))) == blob(2)

    async def test_a_refusal_that_is_no_text_is_told_all_the_same(self, pair, shelf):
        async def authorise(*_):
            raise ForbiddenError("not \udcff")

        shelf.authorise = authorise
        with pytest.raises(ForbiddenError, match=r"not \?"):
            await asyncio.wait_for(pair.taker.blob("0" * 64), PATIENCE)

    async def test_a_peer_that_takes_slowly_but_steadily_is_not_cut(self, shelf):
        pair = Pair(shelf, giving=GivingLimits(patience=0.3))
        pair.far.nbytes_per_second = PIECE_NBYTES / 0.12
        data = [blob(number, MIB) for number in range(200, 204)]
        shelf.blobs |= {digest_of(each): each for each in data}
        calls = [asyncio.create_task(pair.taker.blob(digest_of(each))) for each in data]
        await until(lambda: pair.taker.got_nbytes >= 8 * PIECE_NBYTES or pair.giver.is_closed)
        assert pair.giver.error is None
        pair.close()
        await asyncio.gather(*calls, return_exceptions=True)

    async def test_a_call_taken_back_stops_the_reading_or_the_sending(self, pair, shelf):
        shelf.open.clear()
        calls = [asyncio.create_task(pair.taker.blob(digest)) for digest in list(shelf.blobs)[:8]]
        await until(lambda: shelf.reading == 4)
        for call in calls[:6]:
            call.cancel()
        await until(lambda: len(shelf.read) == 6)
        shelf.open.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in found] == [asyncio.CancelledError] * 6 + [bytes] * 2
        assert len(shelf.read) == 6, "two were never read, since they were taken back in the queue"
        pair.far.nbytes_per_second = 50e6
        call = asyncio.create_task(pair.taker.blob(digest_of(blob(99, 4 * MIB))))
        given = pair.giver.given_nbytes
        await until(lambda: pair.giver.given_nbytes > given)
        call.cancel()
        await until(lambda: not pair.taker._asking and not pair.giver._giving)
        assert pair.giver.given_nbytes - given < 2 * MIB

    async def test_the_cap_holds_for_all_peers_together_and_starves_none(self, shelf):
        uplink = TokenBucket(2e6, 100_000)
        pairs = [Pair(shelf, uplink=uplink) for _ in range(4)]
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await asyncio.gather(*(pair.taker.blob(digest) for pair in pairs for digest in list(shelf.blobs)[:3]))
        given = sum(pair.giver.given_nbytes for pair in pairs)
        assert given == 4 * 3 * (64 << 10)
        assert loop.time() - begun >= (given - 100_000) / 2e6 - 0.02
        for pair in pairs:
            pair.close()

    async def test_who_asks_and_takes_back_uses_up_nothing_of_what_all_share(self, shelf):
        uplink, loop = TokenBucket(1e6, 100_000), asyncio.get_running_loop()
        pair = Pair(shelf, uplink=uplink)
        for _ in range(50):
            calls = [asyncio.create_task(pair.taker.blob(digest_of(blob(number, 4 * MIB)))) for number in (98, 99)]
            before = uplink._paid_until
            await until(lambda before=before: uplink._paid_until > before)
            for call in calls:
                call.cancel()
            await until(lambda pair=pair: not pair.taker._asking and not pair.giver._giving)
        assert uplink.take(0, loop.time()) < 0.5
        pair.close()

    async def test_a_peer_that_gives_nothing_has_nothing(self, pair):
        assert await pair.giver.blob(digest_of(blob(1))) is None

    async def test_a_digest_that_is_none_costs_no_room(self, shelf):
        pair = Pair(shelf, asking=AskingLimits(in_flight=1))
        with pytest.raises(ValueError, match="hexadecimal"):
            await pair.taker.blob("nonsense")
        assert await asyncio.wait_for(pair.taker.blob(digest_of(blob(1))), PATIENCE) == blob(1)
        pair.close()

    async def test_those_who_follow_a_version_hear_what_came(self, pair, shelf):
        shelf.bitmaps["a" * 64] = b"\x05"
        pair.giver.announce("a" * 64, [0])
        assert await pair.taker.bitmap("a" * 64, 3) == [True, False, True]
        pair.giver.announce("a" * 64, [1])
        pair.giver.announce("b" * 64, [1])
        await until(lambda: pair.had)
        assert pair.had == [("a" * 64, (1,))]

    async def test_of_versions_that_are_followed_the_latest_are_kept(self, shelf):
        pair = Pair(shelf, giving=GivingLimits(max_followed=2))
        for letter in "abc":
            shelf.bitmaps[letter * 64] = b"\x01"
            await pair.taker.bitmap(letter * 64, 1)
        for letter in "abc":
            pair.giver.announce(letter * 64, [0])
        await until(lambda: len(pair.had) == 2)
        assert [digest[0] for digest, _ in pair.had] == ["b", "c"]
        pair.close()


class TestEnds:
    async def test_goodbye_says_why_and_ends_what_waits(self, pair, shelf):
        shelf.open.clear()
        calls = [asyncio.create_task(pair.taker.blob(digest)) for digest in shelf.blobs]
        await until(lambda: shelf.reading)
        await pair.giver.aclose("the lab is shutting down")
        await pair.giver.aclose()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in errors} == {ServiceUnavailableError}
        assert all(RESPONDER in str(error) and "shutting down" in str(error) for error in errors)
        with pytest.raises(ServiceUnavailableError):
            await pair.taker.blob(digest_of(blob(1)))
        assert pair.taker.is_closed
        assert pair.taker.error is None
        assert shelf.reading == 0

    async def test_a_connection_that_is_lost_ends_what_waits_in_and_before_the_window(self, shelf):
        pair = Pair(shelf, asking=AskingLimits(in_flight=1))
        shelf.open.clear()
        calls = [asyncio.create_task(pair.taker.blob(digest)) for digest in list(shelf.blobs)[:3]]
        await until(lambda: shelf.reading)
        pair.far.cut(ConnectionResetError("no route"))
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in errors] == [ServiceUnavailableError] * 3
        assert "no route" in str(errors[0])

    async def test_a_call_that_is_cancelled_before_its_turn_gives_it_on(self, shelf):
        pair = Pair(shelf, asking=AskingLimits(in_flight=1))
        calls = [asyncio.create_task(pair.taker.blob(digest)) for digest in list(shelf.blobs)[:5]]
        await until(lambda: shelf.read)
        calls[1].cancel()
        calls[3].cancel()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in found] == [bytes, asyncio.CancelledError] * 2 + [bytes]
        pair.close()

    async def test_one_that_is_cancelled_just_when_it_is_its_turn_gives_it_on_too(self, shelf):
        pair = Pair(shelf, asking=AskingLimits(in_flight=1))
        shelf.open.clear()
        calls = [asyncio.create_task(pair.taker.blob(digest)) for digest in list(shelf.blobs)[:3]]
        await until(lambda: shelf.reading)
        pair.taker._asking._asked[1].future.add_done_callback(lambda _: calls[1].cancel())
        shelf.open.set()
        found = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE)
        assert [type(each) for each in found] == [bytes, asyncio.CancelledError, bytes]
        pair.close()


class Stranger:
    """The other end, in the hands of somebody who sends what they like."""

    def __init__(self, shelf=None, asking=None, giving=None, *, greets=True):
        self.near, far = stream_pair()
        self.heard = []
        self.near.start(lambda message: self.heard.append(bytes(message)), lambda: None, lambda _: None)
        self.connection = BlobConnection(far, shelf, asking=asking or AskingLimits(patience=1000.0), giving=giving)
        if greets:
            self.near.send(encode_hello(8))

    async def ask(self, kind=Kind.BLOB, digest="0" * 64):
        calls = {Kind.BLOB: self.connection.blob, Kind.MANIFEST: self.connection.manifest}
        before = len(self.heard)
        call = asyncio.create_task(self.connection.bitmap(digest, 9) if kind is Kind.BITMAP else calls[kind](digest))
        await until(lambda: len(self.heard) > max(before, 1) or call.done())
        return call

    async def is_cut_for(self, call, text):
        with structlog.testing.capture_logs() as logs:
            with pytest.raises((ProtocolError, ServiceUnavailableError), match=text) as raised:
                await asyncio.wait_for(call, PATIENCE)
            await until(lambda: self.near.closed)
        assert self.connection.peer in str(raised.value)
        assert self.connection.error is not None
        assert [(entry["event"], entry["peer"]) for entry in logs] == [("peer cut", INITIATOR)]


class TestStrangers:
    @pytest.mark.parametrize("kind", [Kind.BLOB, Kind.MANIFEST])
    async def test_wrong_bytes_end_the_connection_and_are_remembered(self, kind):
        stranger = Stranger()
        call, other = await stranger.ask(kind, digest_of(b"right")), await stranger.ask()
        wrong = encode_manifest(SignedManifest(b"wrong", "ab" * 32, b"")) if kind is Kind.MANIFEST else b"wrong"
        stranger.near.send(encode_begin(1, len(wrong), wrong))
        await stranger.is_cut_for(call, f"other bytes for {kind.name.lower()} {digest_of(b'right')}")
        with pytest.raises(ProtocolError, match="was cut"):
            await other
        with pytest.raises(ProtocolError, match="was cut"):
            await stranger.connection.blob("0" * 64)

    @pytest.mark.parametrize("bitmap", [b"\xff", b"\xff\xff", b"\xff\x03", bytes(100)])
    async def test_a_bitmap_that_is_none_of_so_many_blobs(self, bitmap):
        stranger = Stranger()
        call = await stranger.ask(Kind.BITMAP)
        stranger.near.send(encode_begin(1, len(bitmap), bitmap))
        await stranger.is_cut_for(call, "bitmap")

    async def test_a_bitmap_that_lies_is_found_out_by_what_does_not_come(self):
        stranger = Stranger()
        call = await stranger.ask(Kind.BITMAP)
        stranger.near.send(encode_begin(1, 2, b"\xff\x01"))
        assert await call == [True] * 9
        call = await stranger.ask()
        stranger.near.send(encode_absent(2))
        assert await call is None

    @pytest.mark.parametrize(
        "frames",
        [
            [b"garbage"],
            [b""],
            [b"\xff" * 100],
            [encode_hello(8)],
            [encode_piece(1, bytes(10))],
            [encode_begin(1, 1 << 40, b"x")],
            [encode_begin(1, 0, b"")],
            [encode_begin(7, 10, b"x")],
            [encode_begin(1, 100_000, bytes(10))],
            [encode_begin(1, 10, bytes(11))],
            [encode_begin(1, 4096, bytes(2048))] * 2,
            [encode_begin(1, 4096, bytes(2048)), encode_piece(1, b"")],
            [encode_absent(2)],
            [encode_error(2, ServiceUnavailableError("no"))],
            [encode_have("0" * 64, [1])[0]],
            [b"\x07" + bytes(33)],
            [b"\x01" + bytes(4) + b"\x09" + bytes(32)],
        ],
        ids=repr,
    )
    async def test_frames_that_break_the_protocol(self, frames):
        stranger = Stranger()
        call = await stranger.ask()
        for frame in frames:
            stranger.near.send(frame)
        await stranger.is_cut_for(call, "was cut")

    async def test_errors_that_are_none_of_ours_name_the_peer(self):
        stranger = Stranger()
        for number, body in enumerate((b"{", b'{"error": "?", "code": "invented"}', b'{"error": "x", "code": "protocol_error"}'), start=1):
            call = await stranger.ask()
            stranger.near.send(b"\x06" + number.to_bytes(4, "little") + body)
            with pytest.raises((PeerFailedError, UnavailableError), match=r"11111111|HTTP"):
                await call
        assert not stranger.connection.is_closed

    async def test_another_version_of_the_protocol_says_what_to_do(self):
        stranger = Stranger(greets=False)
        hello = bytearray(encode_hello(8))
        hello[-5] = 9
        call = asyncio.create_task(stranger.connection.blob("0" * 64))
        stranger.near.send(hello)
        await stranger.is_cut_for(call, "version 9.*upgrade")

    async def test_who_does_not_say_hello_first(self, shelf):
        stranger = Stranger(shelf, greets=False)
        stranger.near.send(encode_ask(1, Kind.BLOB, digest_of(blob(1))))
        await stranger.is_cut_for(asyncio.create_task(stranger.connection.blob("0" * 64)), "begins with one hello")
        assert shelf.read == []

    async def test_of_what_was_taken_back_nothing_is_kept_and_its_end_makes_room(self):
        stranger = Stranger(asking=AskingLimits(in_flight=1))
        (await stranger.ask()).cancel()
        await until(lambda: encode_cancel(1) in stranger.heard)
        stranger.near.send(encode_begin(1, 4096, bytes(2048)))
        asking = stranger.connection._asking
        await until(lambda: asking._asked[1].body is not None)
        assert asking._asked[1].body._data is None
        following = asyncio.create_task(stranger.connection.blob("1" * 64))
        stranger.near.send(encode_piece(1, bytes(2048)))
        await until(lambda: encode_ask(2, Kind.BLOB, "1" * 64) in stranger.heard)
        following.cancel()

    async def test_a_window_of_nothing(self):
        stranger = Stranger(greets=False)
        call = asyncio.create_task(stranger.connection.blob("0" * 64))
        stranger.near.send(encode_hello(0))
        await stranger.is_cut_for(call, "takes no askings")

    async def test_more_askings_than_agreed(self, shelf):
        shelf.open.clear()
        stranger = Stranger(shelf, giving=GivingLimits(window=4, at_once=2))
        with structlog.testing.capture_logs() as logs:
            for number in range(5):
                stranger.near.send(encode_ask(number, Kind.BLOB, digest_of(blob(number))))
            await until(lambda: stranger.near.closed)
        assert "more than 4 askings" in logs[0]["error"]
        await until(lambda: not shelf.reading)

    async def test_the_same_asking_twice(self, shelf):
        shelf.open.clear()
        stranger = Stranger(shelf)
        stranger.near.send(encode_ask(1, Kind.BLOB, digest_of(blob(1))))
        stranger.near.send(encode_ask(1, Kind.BLOB, digest_of(blob(1))))
        await until(lambda: stranger.near.closed)
        assert isinstance(stranger.connection.error, ProtocolError)

    async def test_a_peer_that_gives_a_byte_now_and_then_is_cut(self):
        stranger = Stranger(asking=AskingLimits(patience=0.05))
        call = await stranger.ask()
        stranger.near.send(encode_begin(1, 4 * MIB, bytes(1024)))
        await stranger.is_cut_for(call, r"asked and gave 1024 bytes in 0\.05 s")

    async def test_a_peer_that_gives_slowly_but_steadily_is_not(self):
        stranger = Stranger(asking=AskingLimits(patience=0.3, min_nbytes=1024))
        data = bytes(12 * 1024)
        call = await stranger.ask(digest=digest_of(data))
        first, *rest = pieces(data, 1024)
        stranger.near.send(encode_begin(1, len(data), first))
        loop = asyncio.get_running_loop()
        for piece in rest:
            begun = loop.time()
            await until(lambda begun=begun: loop.time() > begun + 0.04)
            stranger.near.send(encode_piece(1, piece))
        assert await call == data

    async def test_a_peer_that_asks_and_takes_nothing_is_cut_and_little_was_held_for_it(self, shelf):
        stranger = Stranger(shelf, giving=GivingLimits(patience=0.05, window=64, at_once=4))
        stranger.near.other.nbytes_per_second = 1.0
        with structlog.testing.capture_logs() as logs:
            for number, digest in enumerate(shelf.blobs):
                stranger.near.send(encode_ask(number, Kind.BLOB, digest))
            await until(lambda: stranger.near.closed)
        assert "took nothing" in logs[0]["error"]
        assert len(shelf.read) <= 8
        assert stranger.near.other.most_queued_nbytes <= stranger.near.other.queue_nbytes + 4 * PIECE_NBYTES + 100

    async def test_asking_and_taking_back_without_reading_has_an_end(self, shelf):
        shelf.open.clear()
        stranger = Stranger(shelf)
        stranger.near.other.queue_nbytes = 0
        stranger.near.pause()
        for number in range(100_000):
            stranger.near.send(encode_ask(number, Kind.BLOB, "0" * 64) if not number % 2 else encode_cancel(number - 1))
            if stranger.near.closed:
                break
            if not number % 50:
                await asyncio.sleep(0)
        assert stranger.near.closed
        await until(lambda: not shelf.reading)

    async def test_a_stream_that_stays_silent_is_closed(self, monkeypatch):
        monkeypatch.setattr("tether.swarm.blobs.blobs._HELLO_PATIENCE", 0.02)
        stranger = Stranger(greets=False)
        await stranger.is_cut_for(asyncio.create_task(stranger.connection.blob("0" * 64)), "said nothing")


class TestFrames:
    def test_a_stream_of_blobs_is_told_from_one_of_protomux(self):
        assert is_hello(encode_hello(8))
        assert not is_hello(b"\x00\x01\x01\x0cprotomux-rpc\x00")
        assert not is_hello(b"")

    @given(st.binary(min_size=1, max_size=100), st.binary(max_size=64))
    def test_manifests_come_back(self, data, signature):
        signed = SignedManifest(data, "0f" * 32, signature)
        assert read_manifest(encode_manifest(signed)) == signed

    @given(st.binary(max_size=120))
    def test_what_is_no_manifest_is_refused(self, data):
        try:
            found = read_manifest(data)
        except ProtocolError:
            return
        assert encode_manifest(found) == data

    @given(st.lists(st.booleans(), max_size=70))
    def test_bitmaps_come_back(self, wanted):
        encoded = bytes(sum(1 << bit for bit, is_there in enumerate(wanted[at : at + 8]) if is_there) for at in range(0, len(wanted), 8))
        assert bits(encoded, len(wanted)) == wanted

    @given(st.binary(max_size=300), st.integers(1, 40))
    def test_bodies_come_back_from_their_pieces(self, data, factor):
        body, parts = Body(len(data)), list(pieces(data, 1024 * factor))
        assert [body.add(part) for part in parts][-1]
        assert body.take() == data

    def test_a_text_of_goodbye_is_bounded(self):
        assert len(encode_goodbye("x" * 10_000)) < 1000
        assert len(encode_error(1, ServiceUnavailableError("x" * 10_000))) < 1000


class TestBandwidth:
    def test_a_burst_goes_at_once_and_then_the_rate_holds(self):
        bucket = TokenBucket(1000, 500)
        assert [bucket.take(250, 10.0) for _ in range(4)] == pytest.approx([0, 0, 0.25, 0.5])
        assert bucket.take(250, 100.0) == 0

    @given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=60))
    def test_never_more_than_burst_and_rate_go(self, takes):
        bucket, now, gone = TokenBucket(1000, 500), 0.0, []
        for nbytes, later in takes:
            now += later
            gone.append((now + bucket.take(nbytes, now), nbytes))
        assert gone == sorted(gone, key=lambda each: each[0]), "first come, first served"
        for start in range(len(gone)):
            for end in range(start, len(gone)):
                nbytes = sum(each for _, each in gone[start : end + 1])
                largest = gone[start][1]
                assert nbytes <= largest + 500 + 1000 * (gone[end][0] - gone[start][0]) + 1e-3

    def test_what_did_not_go_is_not_waited_for(self):
        bucket = TokenBucket(1000, 500)
        assert bucket.take(2500, 10.0) == pytest.approx(2)
        bucket.give_back(2000)
        assert bucket.take(250, 10.0) == pytest.approx(0.25)

    def test_no_cap_never_waits_and_a_cap_can_change(self):
        bucket = TokenBucket()
        assert bucket.take(1 << 40, 0.0) == 0
        bucket.limit(1000, 0)
        assert bucket.take(1000, 0.0) == pytest.approx(1.0)
        bucket.limit(float("inf"))
        assert bucket.take(1 << 40, 1.0) == 0


ids = st.integers(0, 3)
digests = st.sampled_from(["0" * 64, digest_of(blob(1))])
blob_frames = st.one_of(
    st.binary(max_size=100),
    st.builds(lambda kind, rest: bytes([kind]) + rest, st.integers(0, 9), st.binary(max_size=60)),
    st.builds(encode_ask, ids, st.sampled_from(Kind), digests),
    st.builds(encode_cancel, ids),
    st.builds(encode_absent, ids),
    st.builds(encode_begin, ids, st.sampled_from([0, 1, 2000, 1 << 40]), st.binary(max_size=8)),
    st.builds(lambda number, nbytes: encode_piece(number, bytes(nbytes)), ids, st.sampled_from([0, 1, 1024, 2000])),
    st.just(encode_hello(3)),
    st.just(encode_goodbye("bye")),
)


@given(st.booleans(), st.lists(blob_frames, max_size=25))
def test_whatever_a_peer_sends_it_is_answered_or_cut(greets, frames):
    """Never a failure of ours, and nothing is left over."""

    async def story():
        shelf = Shelf(blob(1))
        stranger = Stranger(shelf, greets=greets)
        connection = stranger.connection
        calls = [
            asyncio.create_task(each) for each in (connection.blob("0" * 64), connection.bitmap("0" * 64, 8), connection.manifest("0" * 64))
        ]
        for frame in frames:
            stranger.near.send(frame)
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert isinstance(connection.error, ProtocolError | None)
        connection.destroy()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, UnavailableError | ProtocolError | PeerFailedError | list | None) for answer in answers), answers
        for _ in range(3):
            await asyncio.sleep(0)
        assert not connection._giving
        assert not connection._asking

    with structlog.testing.capture_logs() as logs:
        asyncio.run(story())
    assert {entry["event"] for entry in logs} <= {"peer cut"}


@given(st.binary(max_size=400))
def test_no_bytes_make_a_frame_fail_otherwise(data):
    with contextlib.suppress(ProtocolError):
        read_frame(memoryview(data), "11" * 32)
