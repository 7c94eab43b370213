"""The contract of a lab on the swarm, as cases for any way of making nodes: those in memory and those of the real engine pass it.

Parametrise a test with `CASES` and give each a `MakeNode`, which `making` makes of how you start a node; all that one of them
makes must find each other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from tether.errors import (
    BadKeyError,
    DeadlineExceededError,
    ForbiddenError,
    MalformedRecordError,
    PayloadTooLargeError,
    PeerFailedError,
    PeerNotFoundError,
    PeerUnreachableError,
    ServiceUnavailableError,
    UnknownMethodError,
    UnknownModelError,
    WrongBytesError,
)
from tether.ports import SignedManifest
from tether.swarm.node.node import ConnectionLimits, Standing
from tether.swarm.records.records import Capabilities, parse, sign
from tether.testing.node_labs import ContractLab, MakeNode, StartNode, failure, making, until
from tether.types import Digest

__all__ = ["CASES", "GROUPS", "Case", "ContractLab", "MakeNode", "StartNode", "making"]

Case = Callable[[MakeNode], Awaitable[None]]
_MIB = 1 << 20
_SECONDS = 10.0
_NO_WAY = (PeerUnreachableError, PeerNotFoundError, DeadlineExceededError)
"""What one hears who is not let in: not why."""
_BLOB = bytes(range(256)) * 2000
_VERSION = Digest("ab" * 32)


# --- calls


async def calls_go_both_ways_over_one_connection(make: MakeNode) -> None:
    """Fifty at once cause one connection, which serves who was called too."""
    one, two = await make("both/one"), await make("both/two")
    answers = await asyncio.gather(*(one.node.request(two.key, "echo", b"%d" % number, _SECONDS) for number in range(50)))
    assert answers == [b"%d" % number for number in range(50)]
    assert await two.node.request(one.key, "echo", b"back", _SECONDS) == b"back"
    for lab, peer in ((one, two), (two, one)):
        assert [(each.peer, each.purpose, each.is_initiator) for each in lab.node.connections()] == [(peer.key, "rpc", lab is one)]


async def labs_that_call_each_other_at_once_are_both_answered(make: MakeNode) -> None:
    """Whoever is first: neither call is lost, and what is open afterwards serves both."""
    one, two = await make("cross/one"), await make("cross/two")
    asking = (one.node.request(two.key, "echo", b"there", _SECONDS), two.node.request(one.key, "echo", b"here", _SECONDS))
    assert list(await asyncio.gather(*asking)) == [b"there", b"here"]
    assert len(one.node.connections()) <= 2


async def bodies_of_a_mebibyte_go_there_and_back(make: MakeNode) -> None:
    """In pieces, and the same when they arrive."""
    one, two = await make("large/one"), await make("large/two")
    body = _BLOB * 3
    assert len(body) > _MIB
    assert await one.node.request(two.key, "echo", body, _SECONDS) == body


async def errors_come_as_what_they_are(make: MakeNode) -> None:
    """Ours with all that they know; what else breaks there as the peer's; a method that there is none of as that."""
    one, two = await make("errors/one"), await make("errors/two")
    refused = await failure(one.node.request(two.key, "refuse", b"digits", _SECONDS))
    assert (type(refused), refused.code, refused.args[1]) == (UnknownModelError, "unknown_model", "digits")
    assert type(await failure(one.node.request(two.key, "break", b"", _SECONDS))) is PeerFailedError
    assert type(await failure(one.node.request(two.key, "nothing", b"", _SECONDS))) is UnknownMethodError
    assert await one.node.request(two.key, "echo", b"still there", _SECONDS) == b"still there"


async def a_deadline_ends_the_call_on_both_sides(make: MakeNode) -> None:
    """Who asked is told, who works on it stops."""
    one, two = await make("deadline/one"), await make("deadline/two")
    await one.node.request(two.key, "echo", b"", _SECONDS)
    assert type(await failure(one.node.request(two.key, "held", b"", 0.3))) is DeadlineExceededError
    await until(two.ended.is_set)
    assert await one.node.request(two.key, "echo", b"next", _SECONDS) == b"next"


async def a_call_that_is_taken_back_is_worked_on_no_more(make: MakeNode) -> None:
    """And its connection goes on."""
    one, two = await make("back/one"), await make("back/two")
    call = asyncio.create_task(one.node.request(two.key, "held", b"", _SECONDS))
    await until(two.started.is_set)
    call.cancel()
    await until(two.ended.is_set)
    assert await one.node.request(two.key, "echo", b"next", _SECONDS) == b"next"


async def nobody_is_not_found(make: MakeNode) -> None:
    """Within the time that one gives it; what is no key is not even looked for. Oneself is somebody."""
    one, nobody = await make("nobody/one"), ContractLab("nobody/nobody").key
    assert type(await failure(one.node.request(nobody, "echo", b"", _SECONDS))) is PeerNotFoundError
    assert type(await failure(one.node.request(nobody, "echo", b"", 0.0))) is DeadlineExceededError
    assert type(await failure(one.node.request("00" * 32, "echo"))) is BadKeyError
    assert one.node.connections() == []
    assert await one.node.request(one.key, "echo", b"me", _SECONDS) == b"me"


async def a_lab_that_was_restarted_is_called_again(make: MakeNode) -> None:
    """Under the same key, by whoever knew it."""
    one, two = await make("restart/one"), await make("restart/two")
    assert await one.node.request(two.key, "echo", b"before", _SECONDS) == b"before"
    await two.node.aclose()
    call = asyncio.create_task(one.node.request(two.key, "echo", b"after", 2 * _SECONDS))
    again = await make("restart/two")
    assert again.key == two.key
    assert await call == b"after"


async def who_retires_ends_what_runs_and_takes_nobody_new(make: MakeNode) -> None:
    """Calls that are worked on are answered first; who comes then is not let in."""
    one, two, three = await make("retire/one"), await make("retire/two"), await make("retire/three")
    call = asyncio.create_task(one.node.request(two.key, "held", b"answered", _SECONDS))
    await until(two.started.is_set)
    retiring = asyncio.create_task(two.node.retire(_SECONDS))
    assert isinstance(await failure(three.node.request(two.key, "echo", b"", _SECONDS)), _NO_WAY)
    assert not retiring.done()
    two.hold.set()
    await retiring
    assert await call == b"answered"


# --- who may


async def an_unknown_key_may_enrol_and_little_else(make: MakeNode) -> None:
    """Small calls of one method; then it is known, and as others are."""
    host, guest = await make("enrol/host"), await make("enrol/guest")
    host.standings[guest.key] = Standing.UNKNOWN
    assert type(await failure(guest.node.request(host.key, "echo", b"", _SECONDS))) is ForbiddenError
    assert type(await failure(guest.node.request(host.key, "enrol", bytes(5000), _SECONDS))) is PayloadTooLargeError
    await guest.node.request(host.key, "enrol", b"the secret", _SECONDS)
    assert await guest.node.request(host.key, "echo", bytes(_MIB), _SECONDS) == bytes(_MIB)
    assert len(host.node.connections()) == 1


async def an_unknown_key_that_says_too_much_is_cut(make: MakeNode) -> None:
    """One message over 64 KiB, or a stream for blobs."""
    host, guest = await make("much/host"), await make("much/guest")
    host.standings[guest.key] = Standing.UNKNOWN
    digest = host.shelf.put(_BLOB)
    assert isinstance(await failure(guest.node.request(host.key, "enrol", bytes(100_000), _SECONDS)), ServiceUnavailableError)
    source = await guest.node.blobs(host.key)
    assert isinstance(await failure(source.fetch(digest, 1)), ServiceUnavailableError)
    await until(lambda: host.node.connections() == [])
    assert "enrol" not in host.asked


async def an_unknown_key_has_not_long(make: MakeNode) -> None:
    """It is cut when its time is over, though it did nothing wrong."""
    host, guest = await make("long/host", ConnectionLimits(unknown_patience=1.0)), await make("long/guest")
    host.standings[guest.key] = Standing.UNKNOWN
    await guest.node.request(host.key, "enrol", b"a guess", _SECONDS)
    assert len(host.node.connections()) == 1
    await until(lambda: host.node.connections() == guest.node.connections() == [])


async def a_banned_key_gets_nothing_and_is_not_called(make: MakeNode) -> None:
    """Neither a stream, nor a reason, nor what it asked heard."""
    host, banned = await make("ban/host"), await make("ban/banned")
    host.standings[banned.key] = Standing.BANNED
    assert isinstance(await failure(banned.node.request(host.key, "enrol", b"the secret", 1.0)), _NO_WAY)
    assert type(await failure(host.node.request(banned.key, "echo", b"", _SECONDS))) is ForbiddenError
    assert (host.asked, banned.asked, host.node.connections()) == ([], [], [])


async def who_is_cut_has_lost_its_calls_within_a_second(make: MakeNode) -> None:
    """On both sides, and comes back only as what it is then."""
    one, two = await make("cut/one"), await make("cut/two")
    call = asyncio.create_task(failure(one.node.request(two.key, "held", b"", 30.0)))
    await until(two.started.is_set)
    began = time.monotonic()
    two.standings[one.key] = Standing.BANNED
    two.node.cut(one.key)
    await until(two.ended.is_set)
    assert isinstance(await call, ServiceUnavailableError)
    assert time.monotonic() - began < 1
    assert two.node.connections() == []
    assert isinstance(await failure(one.node.request(two.key, "echo", b"", 1.0)), _NO_WAY)


async def what_nobody_uses_is_closed_by_who_opened_it(make: MakeNode) -> None:
    """And opened again when it is wanted."""
    one, two = await make("idle/one", ConnectionLimits(idle=0.5)), await make("idle/two")
    await one.node.request(two.key, "echo", b"", _SECONDS)
    await until(lambda: one.node.connections() == two.node.connections() == [])
    assert await one.node.request(two.key, "echo", b"again", _SECONDS) == b"again"


# --- blobs


async def blobs_and_versions_come_as_they_are_named(make: MakeNode) -> None:
    """What the peer lacks is None, on the one stream for that."""
    one, two = await make("blobs/one"), await make("blobs/two")
    digest, small = two.shelf.put(_BLOB), two.shelf.put(b"small")
    named = two.shelf.put(b"a manifest")
    two.shelf.manifests[named] = signed = SignedManifest(b"a manifest", two.key, bytes(64))
    source = await one.node.blobs(two.key)
    assert await asyncio.gather(*(source.fetch(each, 1) for each in (digest, small) * 5)) == [_BLOB, b"small"] * 5
    assert await source.fetch(_VERSION, 1) is None
    assert (await source.manifest(named), await source.manifest(_VERSION)) == (signed, None)
    assert [each.purpose for each in one.node.connections()] == ["blobs"]


async def blobs_that_one_may_not_have_do_not_come(make: MakeNode) -> None:
    """As if they were not there."""
    one, two = await make("secret/one"), await make("secret/two")
    digest, other = two.shelf.put(_BLOB), two.shelf.put(b"other")
    two.shelf.secret.add(digest)
    source = await one.node.blobs(two.key)
    assert await source.fetch(digest, 1) is None
    assert await source.fetch(other, 1) == b"other"


async def who_gives_other_bytes_is_cut(make: MakeNode) -> None:
    """And its bytes are given to nobody; what was asked of it besides fails too."""
    one, liar = await make("lies/one"), await make("lies/liar")
    digest = liar.shelf.put(_BLOB)
    liar.shelf.blobs[digest] = _BLOB[:-1] + b"?"
    source = await one.node.blobs(liar.key)
    assert type(await failure(source.fetch(digest, len(_BLOB)))) is WrongBytesError
    await until(lambda: liar.node.connections() == [])


async def bitmaps_say_what_is_there_and_then_what_comes(make: MakeNode) -> None:
    """To those who asked for one."""
    one, two = await make("bits/one"), await make("bits/two")
    two.shelf.bitmaps[_VERSION] = b"\x05\x01"
    heard: list[tuple[str, Digest, tuple[int, ...]]] = []
    one.node.on_have.append(lambda peer, digest, places: heard.append((peer, digest, places)))
    source = await one.node.blobs(two.key)
    assert await source.bitmap(_VERSION, 9) == [True, False, True, False, False, False, False, False, True]
    assert await source.bitmap(Digest("cd" * 32), 9) is None
    two.node.have(_VERSION, (1, 3))
    await until(lambda: heard)
    assert heard == [(two.key, _VERSION, (1, 3))]


# --- the DHT


async def who_announces_is_found_until_it_takes_it_back(make: MakeNode) -> None:
    """By everybody, itself too."""
    one, two, topic = await make("topic/one"), await make("topic/two"), b"announce" * 4
    assert await two.node.lookup(topic) == []
    assert await one.node.announce(topic) >= 1
    assert await two.node.announce(topic) >= 1
    assert sorted(await two.node.lookup(topic)) == sorted([one.key, two.key])
    await one.node.unannounce(topic)
    assert await one.node.lookup(topic) == [two.key]
    assert await one.node.lookup(bytes(32)) == []
    assert type(await failure(one.node.announce(b"too short"))) is BadKeyError


async def who_left_is_found_no_more(make: MakeNode) -> None:
    """It closes in order; a topic that it did not take back may be said for a while, and leads nowhere."""
    one, two, three, topic = await make("left/one"), await make("left/two"), await make("left/three"), b"leaving!" * 4
    await one.node.request(two.key, "echo", b"", _SECONDS)
    await two.node.announce(topic)
    await two.node.unannounce(topic)
    await two.node.aclose()
    await two.node.aclose()
    await until(lambda: one.node.connections() == [])
    assert await three.node.lookup(topic) == []
    assert type(await failure(three.node.request(two.key, "echo", b"", _SECONDS))) is PeerNotFoundError


async def the_newest_record_of_a_key_wins(make: MakeNode) -> None:
    """In whatever order they come; each key has its own."""
    one, two = await make("newest/one"), await make("newest/two")
    assert await two.node.get_record(one.key) is None
    for value, seq in ((b"first", 1), (b"third", 3), (b"second", 2), (b"third again", 3)):
        assert await one.node.put_record(value, seq) >= 1
    await two.node.put_record(b"mine", 9)
    assert await two.node.get_record(one.key) == (b"third", 3)
    assert await one.node.get_record(two.key) == (b"mine", 9)
    assert await one.node.get_record(one.key) == (b"third", 3)
    assert await one.node.get_record(ContractLab("newest/nobody").key) is None


async def a_record_has_a_thousand_bytes_at_most(make: MakeNode) -> None:
    """One more is refused here, before anybody is asked to keep it."""
    one, two = await make("thousand/one"), await make("thousand/two")
    await one.node.put_record(bytes(1000), 1)
    assert type(await failure(one.node.put_record(bytes(1001), 2))) is PayloadTooLargeError
    assert await two.node.get_record(one.key) == (bytes(1000), 1)
    assert type(await failure(two.node.get_record("00" * 32))) is BadKeyError


async def nobody_speaks_for_another_in_a_record(make: MakeNode) -> None:
    """What a forger has of a lab, or signs in its name, stands under the forger's key, and is refused there."""
    one, forger = await make("forged/one"), await make("forged/forger")
    record = sign(one.identity, Capabilities(serves=True), 5, time.time())
    await one.node.put_record(record, 5)
    await forger.node.put_record(record, 6)
    found, other = await forger.node.get_record(one.key), await one.node.get_record(forger.key)
    assert found == (record, 5)
    assert parse(found[0], one.key).serves
    assert other == (record, 6)
    assert not _is_believed(other[0], forger.key)
    assert not _is_believed(bytes([record[0] ^ 1]) + record[1:], one.key)


def _is_believed(record: bytes, peer: str) -> bool:
    try:
        parse(record, peer)
    except MalformedRecordError:
        return False
    return True


GROUPS: Mapping[str, tuple[Case, ...]] = {
    "calls": (
        calls_go_both_ways_over_one_connection,
        labs_that_call_each_other_at_once_are_both_answered,
        bodies_of_a_mebibyte_go_there_and_back,
        errors_come_as_what_they_are,
        a_deadline_ends_the_call_on_both_sides,
        a_call_that_is_taken_back_is_worked_on_no_more,
        nobody_is_not_found,
        a_lab_that_was_restarted_is_called_again,
        who_retires_ends_what_runs_and_takes_nobody_new,
    ),
    "admission": (
        an_unknown_key_may_enrol_and_little_else,
        an_unknown_key_that_says_too_much_is_cut,
        an_unknown_key_has_not_long,
        a_banned_key_gets_nothing_and_is_not_called,
        who_is_cut_has_lost_its_calls_within_a_second,
        what_nobody_uses_is_closed_by_who_opened_it,
    ),
    "blobs": (
        blobs_and_versions_come_as_they_are_named,
        blobs_that_one_may_not_have_do_not_come,
        who_gives_other_bytes_is_cut,
        bitmaps_say_what_is_there_and_then_what_comes,
    ),
    "dht": (
        who_announces_is_found_until_it_takes_it_back,
        who_left_is_found_no_more,
        the_newest_record_of_a_key_wins,
        a_record_has_a_thousand_bytes_at_most,
        nobody_speaks_for_another_in_a_record,
    ),
}
"""All cases by what they are about: what a process of its own may run one after the other."""
CASES: tuple[Case, ...] = tuple(case for group in GROUPS.values() for case in group)
