"""What labs say of themselves: signed, short, over in time; and a book of them that no flood fills."""

import hashlib
import random

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import MalformedRecordError
from tether.security.identity import Identity
from tether.swarm.records import records
from tether.swarm.records.peer_book import _BURST, MOST, PeerBook, Verdict
from tether.swarm.records.records import (
    LIFETIME,
    MAX_LIFETIME,
    MAX_NBYTES,
    SKEW,
    Capabilities,
    Gpu,
    Held,
    decode_listing,
    encode_listing,
    next_seq,
    parse,
    sign,
    topic,
)

LAB = Identity(bytes(range(32)))
NOW = 1_800_000_000.0
SALT = bytes(32)


def held(number, *, loaded=False):
    return Held(LAB.public, f"model-{number}", 1, blake3(b"%d" % number).hexdigest(), 1 << 20, loaded)


FULL = Capabilities(
    held=[held(number) for number in range(3)],
    serves=True,
    region="eu-west",
    gpus=(Gpu("NVIDIA H100 80GB HBM3", 2, 80 << 30),),
    load=40,
    endpoints=("192.168.1.7:49737", "[fd00::1]:49737"),
)


def other(number):
    return Identity(hashlib.blake2b(b"%d" % number, digest_size=32).digest())


def signed(identity, body):
    return identity.sign(b"tether record v1\0" + body) + body


def fields(data):
    return msgspec.msgpack.decode(data[64:])


def test_a_record_says_what_the_lab_said_and_who_it_is():
    record = parse(sign(LAB, FULL, 7, NOW), LAB.public)

    assert (record.peer, record.seq, record.issued, record.lifetime) == (LAB.public, 7, NOW, LIFETIME)
    assert (record.serves, record.region, record.gpus, record.load, record.endpoints) == (True, "eu-west", FULL.gpus, 40, FULL.endpoints)
    assert record.count == 3
    assert all(record.holds(each.digest) for each in FULL.held)
    assert record.holds("0" * 64) is False


def test_the_same_things_said_give_the_same_bytes_and_no_name_of_a_model():
    backwards = Capabilities(**{**{name: getattr(FULL, name) for name in FULL.__slots__}, "held": FULL.held[::-1]})
    assert sign(LAB, FULL, 7, NOW) == sign(LAB, backwards, 7, NOW)
    assert b"model-" not in sign(LAB, FULL, 7, NOW)


def test_a_record_says_whether_the_lab_relays_and_flags_of_newer_versions_are_passed_over():
    assert not parse(sign(LAB, FULL, 7, NOW)).relays
    assert parse(sign(LAB, Capabilities(relays=True), 7, NOW)).relays
    body = fields(sign(LAB, Capabilities(relays=True), 7, NOW))
    body[-1] = 64 | 1
    assert parse(signed(LAB, msgspec.msgpack.encode(body))).relays


@settings(max_examples=20)
@given(st.integers(0, 300), st.integers(0, 4), st.integers(0, 8))
def test_a_record_fits_one_datagram_however_much_the_lab_has(count, endpoints, gpus):
    many = [held(number, loaded=number % 7 == 0) for number in range(count)]
    offered = Capabilities(
        held=many,
        region="r" * 32,
        endpoints=tuple(f"203.0.113.{n}:49737" for n in range(endpoints)),
        gpus=tuple(Gpu(f"card {n}" + "x" * 30, 8, 80 << 30) for n in range(gpus)),
    )
    data = sign(LAB, offered, 1, NOW)
    record = parse(data)

    assert len(data) <= MAX_NBYTES
    assert record.count == count
    if len(record.beginnings) < count:
        assert len(data) > MAX_NBYTES - 8
        assert record.holds("f" * 64) is None
    loaded = [each for each in many if each.loaded]
    if len(loaded) <= len(record.beginnings):
        assert all(record.holds(each.digest) for each in loaded)


def test_what_had_no_room_is_in_the_listing_that_the_record_vouches_for():
    many = [held(number) for number in range(500)]
    record = parse(sign(LAB, Capabilities(held=many), 1, NOW))
    data = encode_listing(many)

    assert len(record.beginnings) >= 80
    assert set(decode_listing(data, record)) == set(many)
    for wrong in (data[:-1], data + b"\0", encode_listing(many[1:]), b"", bytes(5 << 20)):
        with pytest.raises(MalformedRecordError):
            decode_listing(wrong, record)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "Bad Name"},
        {"name": "../x"},
        {"version": 0},
        {"digest": "f" * 63},
        {"publisher": "x"},
        {"nbytes": -1},
    ],
)
def test_a_listing_of_nonsense_is_none_even_when_signed(wrong):
    bad = msgspec.structs.replace(held(1), **wrong)
    with pytest.raises(MalformedRecordError):
        encode_listing([bad])
    data = msgspec.msgpack.encode((bad,))
    record = parse(sign(LAB, Capabilities(held=[held(1)]), 1, NOW))
    vouched = record.__class__(
        **{name: getattr(record, name) for name in record.__slots__ if name != "listing"}, listing=blake3(data).hexdigest()
    )
    with pytest.raises(MalformedRecordError):
        decode_listing(data, vouched)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 2),
        (1, bytes(31)),
        (2, 0),
        (2, 1 << 53),
        (3, 0),
        (4, MAX_LIFETIME + 1),
        (4, -1),
        (5, 1),
        (6, "Eu West"),
        (6, "r" * 33),
        (7, [["x\x1b[2J", 1, 1]]),
        (7, [["x", 0, 1]]),
        (7, [["x", 1, 1]] * 9),
        (8, 101),
        (9, ["a b:1"]),
        (9, ["host"]),
        (9, ["h:1"] * 5),
        (10, 2),
        (11, bytes(31)),
        (12, bytes(16)),
        (12, b"1234567"),
        (13, -1),
        (13, 128),
        (12, b"bbbbbbbbaaaaaaaacccccccc"),
        (2, "7"),
        (6, b"\xff"),
    ],
)
def test_what_breaks_a_rule_is_no_record_whoever_signed_it(place, value):
    body = fields(sign(LAB, FULL, 7, NOW))
    body[place] = value
    with pytest.raises(MalformedRecordError):
        parse(signed(LAB, msgspec.msgpack.encode(body)))


def test_there_is_one_way_to_write_a_record():
    data = sign(LAB, FULL, 7, NOW)
    body = fields(data)
    assert data[64 + 36] == 7
    longer = data[64 : 64 + 36] + b"\xcc\x07" + data[64 + 37 :]  # 7, in two bytes
    for wrong in (longer, data[64:] + b"\0", msgspec.msgpack.encode([*body, 0]), msgspec.msgpack.encode(body[:-1]), b""):
        with pytest.raises(MalformedRecordError):
            parse(signed(LAB, wrong))


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_bit_of_a_record_can_be_changed(place, flip):
    data = bytearray(sign(LAB, FULL, 7, NOW))
    data[place % len(data)] ^= flip
    with pytest.raises(MalformedRecordError):
        parse(bytes(data))


@given(st.binary(max_size=1000))
def test_garbage_is_no_record(data):
    with pytest.raises(MalformedRecordError):
        parse(data)
    with pytest.raises(MalformedRecordError):
        parse(bytes(64) + data)


def test_nobody_speaks_for_another():
    data = sign(LAB, FULL, 7, NOW)
    with pytest.raises(MalformedRecordError, match="not that of"):
        parse(data, other(1).public)
    body = fields(data)
    body[1] = bytes.fromhex(other(1).public)
    with pytest.raises(MalformedRecordError, match="not signed"):
        parse(signed(LAB, msgspec.msgpack.encode(body)))


def test_a_key_of_small_order_under_which_anybody_signs_is_no_lab():
    # R and A are the identity and S is zero: OpenSSL takes this for a signature of anything.
    identity_point = b"\1" + bytes(31)
    body = fields(sign(LAB, FULL, 7, NOW))
    body[1] = identity_point
    with pytest.raises(MalformedRecordError, match=r"anybody can sign|not signed"):
        parse(identity_point + bytes(32) + msgspec.msgpack.encode(body))


def test_a_topic_is_not_where_hyperdht_announces_the_key_itself():
    key = bytes.fromhex(LAB.public)
    assert topic(LAB.public) == hashlib.blake2b(b"tether/1/topic\0" + key, digest_size=32).digest()
    assert topic(LAB.public) != hashlib.blake2b(key, digest_size=32).digest()


@given(st.lists(st.floats(0, 4e9), max_size=20))
def test_numbers_grow_whatever_the_clock_does(times):
    seqs = [0]
    for now in times:
        seqs.append(next_seq(seqs[-1], now))
    assert seqs == sorted(set(seqs))


# --- the book


def test_of_two_records_the_newer_counts_and_the_older_does_not_come_back():
    book = PeerBook(SALT)
    first, second = (sign(LAB, Capabilities(load=load), seq, NOW) for seq, load in ((1, 10), (2, 20)))
    assert [book.offer(data, NOW) for data in (first, first, second, first, second)] == [
        Verdict.NEW,
        Verdict.SAME,
        Verdict.UPDATED,
        Verdict.OLDER,
        Verdict.SAME,
    ]
    assert book.get(LAB.public, NOW).load == 20
    assert book.offer(sign(LAB, Capabilities(load=30), 2, NOW), NOW) is Verdict.CONFLICT


def test_a_record_ends_and_saying_it_again_does_not_make_it_longer():
    book = PeerBook(SALT)
    data = sign(LAB, FULL, 1, NOW)
    book.offer(data, NOW)
    book.offer(data, NOW + LIFETIME - 1)
    assert book.peers(NOW + LIFETIME - 1)
    assert book.peers(NOW + LIFETIME) == []
    assert book.offer(data, NOW + LIFETIME + 1) is Verdict.SAME
    assert book.peers(NOW + LIFETIME + 1) == []
    assert PeerBook(SALT).offer(data, NOW + LIFETIME + SKEW) is Verdict.EXPIRED


@pytest.mark.parametrize("skew", [-600, 0, 600])
def test_clocks_ten_minutes_apart_are_no_trouble(skew):
    book = PeerBook(SALT)
    assert book.offer(sign(LAB, FULL, 1, NOW + skew), NOW) is Verdict.NEW
    assert book.get(LAB.public, NOW + LIFETIME - 1)
    assert not book.get(LAB.public, NOW + LIFETIME)


def test_a_record_from_the_future_is_not_taken():
    assert PeerBook(SALT).offer(sign(LAB, FULL, 1, NOW + SKEW + 1), NOW) is Verdict.EARLY


def test_who_took_its_leave_is_gone_and_no_replay_brings_it_back():
    book = PeerBook(SALT)
    before, leave = sign(LAB, FULL, 1, NOW), sign(LAB, FULL, 2, NOW + 1, lifetime=0)
    book.offer(before, NOW)
    assert book.offer(leave, NOW + 1) is Verdict.EXPIRED
    assert book.peers(NOW + 1) == []
    book.sweep(NOW + 2)
    assert book.offer(before, NOW + 2) is Verdict.OLDER
    book.sweep(NOW + 1 + MAX_LIFETIME + SKEW)
    assert len(book) == 0
    assert book.offer(before, NOW + 1 + MAX_LIFETIME + SKEW) is Verdict.EXPIRED


def test_who_is_banned_is_not_read_and_not_shown():
    banned = set()
    book = PeerBook(SALT, is_banned=banned.__contains__)
    book.offer(sign(LAB, FULL, 1, NOW), NOW)
    banned.add(LAB.public)
    assert book.peers(NOW) == []
    assert book.get(LAB.public, NOW) is None
    assert book.offer(sign(LAB, FULL, 2, NOW), NOW) is Verdict.BANNED


def test_those_who_have_a_version_are_found_and_those_who_may_have_it():
    book = PeerBook(SALT)
    version = held(1).digest
    book.offer(sign(other(1), Capabilities(held=[held(1)], load=50), 1, NOW), NOW)
    book.offer(sign(other(2), Capabilities(held=[held(1)], load=5), 1, NOW), NOW)
    book.offer(sign(other(3), Capabilities(held=[held(2)]), 1, NOW), NOW)
    book.offer(sign(other(4), Capabilities(held=[held(n) for n in range(500, 900)]), 1, NOW), NOW)
    sure, maybe = book.holders(version, NOW)
    assert [record.peer for record in sure] == [other(2).public, other(1).public]
    assert [record.peer for record in maybe] == [other(4).public]


def test_among_equals_those_of_the_same_region_come_first_then_the_least_loaded():
    region = ""
    book = PeerBook(SALT, is_known=lambda peer: peer == other(4).public, region=lambda: region)
    for number, (where, load) in enumerate([("eu-west", 90), ("us-east", 0), ("", 10), ("us-east", 50)], 1):
        book.offer(sign(other(number), Capabilities(region=where, load=load), 1, NOW), NOW)
    assert [record.peer for record in book.peers(NOW)] == [other(number).public for number in (4, 2, 3, 1)]
    region = "eu-west"
    assert [record.peer for record in book.peers(NOW)] == [other(number).public for number in (4, 1, 2, 3)]


def test_a_stranger_that_does_not_answer_makes_room_for_a_while_and_a_friend_stays():
    book = PeerBook(SALT)
    for number in (1, 2):
        book.offer(sign(other(number), FULL, 1, NOW), NOW)
    book.proved(other(1).public)
    for number in (1, 2):
        book.failed(other(number).public, NOW)
    assert [record.peer for record in book.peers(NOW)] == [other(1).public]
    assert book.offer(sign(other(2), FULL, 2, NOW), NOW + 1) is Verdict.RESTING
    assert book.offer(sign(other(2), FULL, 2, NOW), NOW + 601) is Verdict.NEW


def fakes(count, beginning=b""):
    """Cheap ones: records of keys that nobody has, with signatures that are none."""
    body = fields(sign(LAB, FULL, 1, NOW))
    draw = random.Random(f"fakes {beginning!r}")
    for _ in range(count):
        body[1] = beginning + draw.randbytes(32 - len(beginning))
        yield draw.randbytes(64) + msgspec.msgpack.encode(body)


def test_ten_thousand_forged_announcements_cost_a_bounded_number_of_checks(monkeypatch):
    checks = []
    monkeypatch.setattr(records, "verify", lambda *_: checks.append(1) or (_ for _ in ()).throw(records.BadSignatureError("no")))
    book = PeerBook(SALT)
    verdicts = {book.offer(data, NOW + number / 1000) for number, data in enumerate(fakes(10_000))}
    assert verdicts == {Verdict.MALFORMED, Verdict.BUSY}
    assert len(checks) <= _BURST + 50.0 * 10 + 1
    assert len(book) == 0


def test_ten_thousand_fake_peers_leave_room_for_friends_and_a_fair_sample(monkeypatch):
    # Their signatures are right: keys cost nothing. Making 10,000 takes long, so checking is left out here.
    monkeypatch.setattr(records, "verify", lambda *_: None)
    monkeypatch.setattr(records, "is_sound", lambda _: True)
    friends = {other(number).public for number in range(10)}
    book = PeerBook(SALT, is_known=friends.__contains__)
    now = NOW
    for number in range(10):
        assert book.offer(sign(other(number), FULL, 1, NOW), now) is Verdict.NEW
    proved = other(99)
    book.offer(sign(proved, FULL, 1, NOW), now)
    book.proved(proved.public)
    offered = list(fakes(10_000))
    for data in offered:
        now += 0.02  # as fast as signatures are checked
        book.offer(data, now)
    kept = [peer for peer in book if peer not in friends]
    late = sum(data[64 + 4 : 64 + 36].hex() in set(kept) for data in offered[5000:])

    assert len(book) == MOST + 11
    assert friends | {proved.public} <= {record.peer for record in book.peers(now)}
    assert 0.35 * MOST < late < 0.65 * MOST
    assert book.offer(sign(other(5), FULL, 2, NOW), now) is Verdict.UPDATED


def test_a_friends_name_under_another_key_costs_the_friend_none_of_its_checks():
    book = PeerBook(SALT, is_known={LAB.public}.__contains__)
    forged = sign(LAB, FULL, 1, NOW)[:-1] + b"\0"
    for number in range(1000):
        assert book.offer(forged, NOW, other(number % 10).public) is Verdict.MALFORMED
    assert book.offer(sign(LAB, FULL, 1, NOW), NOW, LAB.public) is Verdict.NEW


def test_whom_the_user_knows_is_pushed_out_by_nobody_however_many_prove_what_they_say(monkeypatch):
    monkeypatch.setattr(records, "verify", lambda *_: None)
    monkeypatch.setattr(records, "is_sound", lambda _: True)
    known = {other(number).public for number in range(60)}
    book, now = PeerBook(SALT, is_known=known.__contains__), NOW
    for data in fakes(MOST):
        now += 0.02
        assert book.offer(data, now) is Verdict.NEW
        book.proved(data[64 + 4 : 64 + 36].hex())
    for number in range(60):
        assert book.offer(sign(other(number), FULL, 1, NOW), now) is Verdict.NEW
    assert known <= {record.peer for record in book.peers(now)}


def test_a_stranger_that_the_user_gets_to_know_is_pushed_out_no_more(monkeypatch):
    monkeypatch.setattr(records, "verify", lambda *_: None)
    monkeypatch.setattr(records, "is_sound", lambda _: True)
    known = set()
    book, now = PeerBook(SALT, is_known=known.__contains__), NOW
    met = {other(number).public for number in range(20)}
    for number in range(20):
        book.offer(sign(other(number), FULL, 1, NOW), now)
    known |= met
    for data in fakes(2 * MOST):
        now += 0.02
        book.offer(data, now)
    assert met <= {record.peer for record in book.peers(now)}


@pytest.mark.parametrize("beginning", [b"\0\0", b"\xff\xff"])
def test_who_makes_keys_of_a_kind_pushes_out_no_more_strangers_than_others_do(monkeypatch, beginning):
    monkeypatch.setattr(records, "verify", lambda *_: None)
    monkeypatch.setattr(records, "is_sound", lambda _: True)
    book, now = PeerBook(b"secret salt"), NOW
    honest = [data[64 + 4 : 64 + 36].hex() for data in fakes(500)]
    for data in (*fakes(500), *fakes(1500, beginning)):
        now += 0.02
        book.offer(data, now)
    kept = sum(peer in set(book) for peer in honest)
    assert 0.15 * 500 < kept < 0.4 * 500  # 512 of 2,000 have room


@settings(max_examples=25)
@given(st.data())
def test_whatever_comes_in_whatever_order_the_highest_number_counts(data):
    book, highest, now = PeerBook(SALT), {}, NOW
    for _ in range(data.draw(st.integers(0, 15))):
        now += data.draw(st.floats(0, 300))
        number, seq, lifetime = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0, 100, 1200]))
        issued = now - data.draw(st.floats(0, 600))
        verdict = book.offer(sign(other(number), Capabilities(load=seq), seq, issued, lifetime), now)
        if verdict in {Verdict.NEW, Verdict.UPDATED}:
            assert seq > highest.get(number, 0)
            highest[number] = seq
        elif verdict is Verdict.EXPIRED and book._find(other(number).public):
            highest[number] = seq
        for each in range(3):
            found = book.get(other(each).public, now)
            assert found is None or found.seq == highest[each]
