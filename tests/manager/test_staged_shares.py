"""What peers sent and no publish named: bounded for each of them and for all, counted over a restart, free again when it is published."""

import asyncio
import shutil
import threading
from types import SimpleNamespace

import pytest

from tether.errors import DigestMismatchError, StagingFullError
from tether.manager.peering import staged
from tether.manager.peering.staged import StagedShares
from tether.security.identity import Identity
from tether.store import Manifest, Repository, digest_of, encode, signed_message
from tether.store.format.manifest import ArrayEntry, Segment
from tether.types import ModelInfo

MIB = 1 << 20
ALICE, BOB = "aa" * 32, "bb" * 32
INFO = ModelInfo("onnx", "onnx", (), (), batched=False, pure=True, code=False)
OWN = Identity(bytes([1]) * 32)


def blob(number, nbytes=MIB):
    return number.to_bytes(4, "big") * (nbytes // 4)


@pytest.fixture(autouse=True)
def disk(monkeypatch):
    """Says how much is free; other peers' and other programs' bytes do not count in it."""

    def has(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    has(1 << 50)
    return has


@pytest.fixture
def store(tmp_path):
    with Repository.open(tmp_path / "store", own=OWN.public) as repository:
        yield repository


@pytest.fixture
def shares(store, tmp_path):
    return StagedShares(store, tmp_path / "staged.log", 4 * MIB)


async def stage(shares, store, peer, *blobs):
    for data in blobs:
        async with shares.claimed(peer, digest_of(data), len(data)):
            store.put_blob(digest_of(data), data)


def publish(store, data):
    segment = Segment(digest_of(data), 0, len(data))
    arrays = (ArrayEntry("files/model.onnx", "uint8", (len(data),), (segment,)),)
    manifest = encode(Manifest(framework="onnx", entry="model.onnx", info=INFO, arrays=arrays))
    return store.publish("net", manifest, OWN.public, OWN.sign(signed_message(manifest)))


async def test_a_peer_has_so_much_and_what_another_one_sent_is_not_its(shares, store):
    await stage(shares, store, ALICE, *map(blob, range(4)))
    with pytest.raises(StagingFullError, match="publish them"):
        await stage(shares, store, ALICE, blob(4))
    assert store.staged_nbytes(digest_of(blob(4))) is None
    await stage(shares, store, BOB, blob(4))
    assert (shares.nbytes(ALICE), shares.nbytes(BOB)) == (4 * MIB, MIB)


async def test_what_is_here_already_costs_nothing(shares, store):
    await stage(shares, store, ALICE, blob(1), blob(1), blob(1))
    await stage(shares, store, BOB, blob(1))
    assert (shares.nbytes(ALICE), shares.nbytes(BOB)) == (MIB, 0)


async def test_what_is_published_makes_room(shares, store):
    await stage(shares, store, ALICE, *map(blob, range(4)))
    publish(store, blob(0))
    await stage(shares, store, ALICE, blob(4))
    with pytest.raises(StagingFullError):
        await stage(shares, store, ALICE, blob(5))


async def test_what_nobody_added_to_in_a_day_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "_EXPIRY", 0.0)
    now = [1e9]
    with Repository.open(tmp_path / "store", own=OWN.public, clock=lambda: now[0]) as store:
        shares = StagedShares(store, tmp_path / "staged.log", 4 * MIB)
        await stage(shares, store, ALICE, *map(blob, range(4)))
        now[0] = 1e12  # a day after the file was touched, by the clock of the machine
        await stage(shares, store, ALICE, blob(4))
        assert shares.nbytes(ALICE) == MIB


async def test_a_restart_forgives_nothing_and_a_torn_log_is_read_as_far_as_it_goes(tmp_path):
    log = tmp_path / "staged.log"
    with Repository.open(tmp_path / "store", own=OWN.public) as store:
        await stage(StagedShares(store, log, 4 * MIB), store, ALICE, *map(blob, range(4)))
        publish(store, blob(0))
    with log.open("a") as torn:
        torn.write(f"{BOB} {digest_of(blob(9))} 12")
        torn.write("\n\x00\x00 half")
    with Repository.open(tmp_path / "store", own=OWN.public) as store:
        shares = StagedShares(store, log, 4 * MIB)
        assert (shares.nbytes(ALICE), shares.nbytes(BOB)) == (3 * MIB, 0)
        await stage(shares, store, ALICE, blob(4))
        with pytest.raises(StagingFullError):
            await stage(shares, store, ALICE, blob(5))
        assert len(log.read_text().splitlines()) == 4


async def test_a_small_disk_has_less_room_for_each_and_for_all(shares, store, disk):
    disk(8 * MIB)
    await stage(shares, store, ALICE, blob(0), blob(1))
    disk(6 * MIB)
    with pytest.raises(StagingFullError, match="may"):
        await stage(shares, store, ALICE, blob(2))
    await stage(shares, store, BOB, blob(2), blob(3))
    disk(4 * MIB)
    with pytest.raises(StagingFullError, match="all peers"):
        await stage(shares, store, "cc" * 32, blob(4))


async def test_small_blobs_count_for_what_they_cost(shares, store):
    with pytest.raises(StagingFullError):
        await stage(shares, store, ALICE, *(blob(number, 4) for number in range(17)))
    assert shares.nbytes(ALICE) == 4 * MIB


async def test_what_was_refused_or_cut_off_is_not_counted(shares, store):
    with pytest.raises(DigestMismatchError):
        async with shares.claimed(ALICE, digest_of(blob(1)), MIB):
            store.put_blob(digest_of(blob(1)), blob(2))
    with pytest.raises(asyncio.CancelledError):
        async with shares.claimed(ALICE, digest_of(blob(1)), MIB):
            raise asyncio.CancelledError
    assert shares.nbytes(ALICE) == 0
    await stage(shares, store, ALICE, blob(1))
    assert shares.nbytes(ALICE) == MIB


async def test_many_at_once_do_not_get_past_the_bound(shares, store):
    done = await asyncio.gather(*(stage(shares, store, ALICE, blob(number)) for number in range(12)), return_exceptions=True)
    assert [type(each) for each in done].count(StagingFullError) == 8
    assert shares.nbytes(ALICE) == 4 * MIB


async def test_a_peer_that_leaves_while_its_blob_is_counted_owes_nothing_for_it(shares, store, monkeypatch):
    begun, may_go, missing = threading.Event(), threading.Event(), store.missing

    def slow(digests):
        begun.set()
        may_go.wait(10)
        return missing(digests)

    monkeypatch.setattr(store, "missing", slow)
    staging = asyncio.create_task(stage(shares, store, ALICE, blob(1)))
    await asyncio.to_thread(begun.wait, 10)
    staging.cancel()
    await asyncio.gather(staging, return_exceptions=True)
    may_go.set()
    monkeypatch.setattr(store, "missing", missing)
    async with asyncio.timeout(10):
        while not shares._path.exists() or shares.nbytes(ALICE) or shares._coming:  # noqa: ASYNC110 (it is told to nobody)
            await asyncio.sleep(0.001)
    await stage(shares, store, ALICE, blob(1))
    assert shares.nbytes(ALICE) == MIB
