"""One version from many peers, each of which may stall, lie, forget, break off or come late."""

import asyncio

import pytest
from blake3 import blake3

from tether.errors import (
    ChunkMissingError,
    DigestMismatchError,
    ForbiddenError,
    NoSpaceError,
    PeerUnreachableError,
    ServiceUnavailableError,
    WrongBytesError,
)
from tether.manager.peering.downloading import Download, DownloadRules, Order
from tether.manager.peering.sources import Sources
from tether.store.replicas.fetching import Wanted
from tether.testing.blob_sources import MemoryBlobSource

RULES = DownloadRules(poll=0.02, give_up=0.6, lacking=0.1, rests=(0.005, 0.01), blob_patience=20.0)
BLOBS = [number.to_bytes(2, "little") * 8000 for number in range(60)]
DIGESTS = [blake3(data).hexdigest() for data in BLOBS]
ORIGIN = "0" * 64


class Mapped(MemoryBlobSource):
    """It says what it has; `claims`: whether or not that is so."""

    claims = None

    async def bitmap(self, digest, count):
        assert (digest, count) == ("v" * 64, len(BLOBS))
        if self.gone:
            raise ServiceUnavailableError(f"{self.name} does not answer")
        return [digest in self.blobs for digest in DIGESTS] if self.claims is None else list(self.claims)


def source(kind=Mapped, indices=None, **options):
    chosen = range(len(BLOBS)) if indices is None else indices
    return kind(blobs={DIGESTS[index]: BLOBS[index] for index in chosen}, **options)


class Rig:
    def __init__(self, rules=RULES, missing=None, **peers):
        """`peers`: name → source, or an error that connecting raises."""
        blobs = tuple(Wanted(digest, len(data), f"files/{index}") for index, (digest, data) in enumerate(zip(DIGESTS, BLOBS, strict=True)))
        order = Order("v" * 64, ORIGIN, blobs, frozenset(range(len(BLOBS)) if missing is None else missing))
        self.peers, self.kept, self.came, self.liars, self.connected = peers, {}, [], [], []
        self.full_after = None
        self.download = Download(order, self.connect, self.keep, Sources(len(BLOBS), "me", "v"), rules)

    async def connect(self, peer):
        self.connected.append(peer)
        found = self.peers[peer]
        if isinstance(found, Exception):
            raise found
        return found

    async def keep(self, digest, data):
        if blake3(data).hexdigest() != digest:
            raise DigestMismatchError("other bytes", digest)
        if self.full_after is not None and len(self.kept) >= self.full_after:
            raise NoSpaceError("the disk is full")
        self.kept[digest] = data

    async def run(self):
        async with asyncio.timeout(20):
            await self.download.run(list(self.peers), self.came.append, lambda peer, error: self.liars.append((peer, type(error))))
        return self


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (nothing says when it has got so far)
            await asyncio.sleep(0.001)


def is_whole(rig):
    return rig.kept == dict(zip(DIGESTS, BLOBS, strict=True)) and sorted(rig.came) == list(range(len(BLOBS)))


async def test_all_comes_once_and_from_all():
    peers = {name: source(delay=0.001) for name in "abc"}
    assert is_whole(await Rig(**peers).run())
    asked = [digest for peer in peers.values() for digest in peer.asked]
    assert sorted(asked) == sorted(DIGESTS)
    assert all(peer.asked for peer in peers.values())


async def test_only_what_is_missing_is_asked_for():
    rig = await Rig(missing=[3, 5], a=source()).run()
    assert (sorted(rig.came), set(rig.peers["a"].asked)) == ([3, 5], {DIGESTS[3], DIGESTS[5]})


async def test_who_has_a_part_gives_that_and_each_the_rest():
    rig = await Rig(a=source(indices=range(30)), b=source(indices=range(20, 60))).run()
    assert is_whole(rig)
    assert not set(rig.peers["a"].asked) & set(DIGESTS[30:])


async def test_a_source_that_does_not_say_what_it_has_is_asked_for_all():
    rig = await Rig(a=source(MemoryBlobSource, indices=range(30)), b=source(MemoryBlobSource)).run()
    assert is_whole(rig)


async def test_the_publisher_is_spared_where_others_have_it():
    rig = await Rig(a=source(delay=0.001), **{ORIGIN: source()}).run()
    assert is_whole(rig)
    assert rig.peers[ORIGIN].asked == []


async def test_one_that_stalls_holds_nobody_up_and_is_told_that_it_is_not_wanted_any_more():
    rig = await Rig(slow=source(stalls=lambda _: True), quick=source(delay=0.002)).run()
    assert is_whole(rig)
    assert rig.peers["slow"].cancelled == len(rig.peers["slow"].asked)


async def test_one_that_lies_is_told_of_once_and_asked_for_nothing_more():
    lying = source(lies=lambda digest: digest in DIGESTS[10:], delay=0.001)
    rig = await Rig(lying=lying, honest=source(delay=0.002)).run()
    assert is_whole(rig)
    assert rig.liars == [("lying", WrongBytesError)]
    before = len(lying.asked)
    await asyncio.sleep(0)
    assert len(lying.asked) == before < len(BLOBS)


async def test_when_all_lie_nothing_is_waited_for():
    rig = Rig(a=source(lies=lambda _: True), b=source(lies=lambda _: True))
    with pytest.raises(ServiceUnavailableError, match="no peer can be asked for the 60 missing blobs"):
        await rig.run()
    assert {peer for peer, _ in rig.liars} == {"a", "b"}
    assert rig.kept == {}


async def test_a_bitmap_that_lies_costs_a_question_a_blob():
    rig = Rig(a=source(indices=range(59)))
    rig.peers["a"].claims = [True] * 60
    with pytest.raises(ChunkMissingError, match="files/59"):
        await rig.run()
    assert rig.peers["a"].asked.count(DIGESTS[59]) == 1
    assert len(rig.kept) == 59


async def test_what_comes_to_a_peer_meanwhile_is_asked_for_when_it_says_so():
    late = source(indices=range(10))
    rig = Rig(late=late)
    task = asyncio.create_task(rig.run())
    await until(lambda: len(rig.kept) >= 10)
    late.blobs |= dict(zip(DIGESTS[10:40], BLOBS[10:40], strict=True))
    rig.download.gained("late", range(10, 40))
    await until(lambda: len(rig.kept) >= 40)
    late.blobs |= dict(zip(DIGESTS, BLOBS, strict=True))  # and nobody says so: it is asked
    assert is_whole(await task)


async def test_a_peer_that_breaks_off_is_connected_to_again():
    rig = await Rig(a=source(drops=5, delay=0.001)).run()
    assert is_whole(rig)


async def test_a_peer_that_is_gone_and_back_goes_on():
    class Fragile(Mapped):
        async def fetch(self, digest, nbytes):
            data = await super().fetch(digest, nbytes)
            if self.gone:
                raise ServiceUnavailableError("the connection was lost with all that was on it")
            return data

    rig = Rig(a=source(Fragile, nbytes_per_second=5e6))
    task = asyncio.create_task(rig.run())
    await until(lambda: len(rig.kept) >= 10)
    rig.peers["a"].gone = True
    await until(lambda: rig.connected.count("a") >= 4)
    assert len(rig.kept) < 20
    rig.peers["a"].gone = False
    assert is_whole(await task)


async def test_peers_that_are_not_reached_are_waited_for_and_then_said():
    rig = Rig(a=PeerUnreachableError("no hole", "X"), b=source(indices=range(5)))
    with pytest.raises(ServiceUnavailableError, match="55 missing"):
        await rig.run()
    assert rig.connected.count("a") > 3
    assert rig.connected.count("b") == 1
    assert len(rig.kept) == 5


async def test_what_nobody_has_is_said_with_the_array_that_needs_it():
    rig = Rig(a=source(indices=range(50)), b=source(indices=range(40)))
    with pytest.raises(ChunkMissingError, match="files/50") as raised:
        await rig.run()
    assert raised.value.args[1:] == (DIGESTS[50], "files/50")


async def test_a_peer_that_does_not_allow_it_is_not_asked_again():
    class Closed(Mapped):
        async def bitmap(self, *_):
            raise ForbiddenError("not for you")

    rig = await Rig(closed=source(Closed), a=source()).run()
    assert is_whole(rig)
    assert rig.connected.count("closed") == 1


async def test_a_source_that_raises_what_no_source_should_is_left_for_the_others():
    class Odd(Mapped):
        async def fetch(self, *_):
            raise RuntimeError("of somebody else's making")

    assert is_whole(await Rig(odd=source(Odd), a=source()).run())


async def test_a_full_disk_ends_it_at_once_and_says_so():
    rig = Rig(a=source(), b=source())
    rig.full_after = 7
    with pytest.raises(NoSpaceError, match="full"):
        await rig.run()
    assert len(rig.kept) == 7


async def test_cancelled_it_leaves_nothing_open():
    rig = Rig(a=source(delay=0.005), b=source(stalls=lambda _: True))
    task = asyncio.create_task(rig.run())
    await until(lambda: rig.kept)
    before = asyncio.all_tasks()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before - {task} - {each for each in before if each.done()}
    assert rig.peers["b"].cancelled == len(rig.peers["b"].asked)


async def test_one_that_never_says_what_it_has_keeps_nobody_waiting():
    class Silent(Mapped):
        async def bitmap(self, *_):
            await asyncio.get_running_loop().create_future()

    assert is_whole(await Rig(silent=source(Silent), a=source()).run())
