"""A replica's folder stays within its bytes: the longest unused versions go, what somebody has loaded stays, whoever that is."""

import os
import subprocess
import sys
import threading
import time

import pytest
from store_models import LAB, seeded

from tether.store import Repository
from tether.store.replicas.cache import CacheBudget, default_nbytes
from tether.store.replicas.replicated import Replicated
from tether.testing.blob_sources import MemoryBlobSource, publish_bytes

PROMPT = 20.0
SIZE = 400_000
"""Of one version's file: on the disk twice, as blobs and as a checkout."""


@pytest.fixture
def origin(tmp_path):
    with Repository.open(tmp_path / "origin", own=LAB.public) as repository:
        yield repository


@pytest.fixture
def versions(origin):
    """The digests of five versions of one size that share nothing."""
    return [publish_bytes(origin, {"model.onnx": seeded(number).randbytes(SIZE)}, f"model-{number}") for number in range(5)]


@pytest.fixture
def replica(origin, versions, tmp_path):
    assert versions
    with Repository.open(tmp_path / "replica") as repository, Replicated(repository, [MemoryBlobSource.of(origin)]) as replicated:
        yield replicated


def bring(replica, budget, digest, name="model"):
    """As a worker does; the pin is the caller's."""
    pin = budget.pin(digest)
    budget.make_room(2 * SIZE)
    replica.replicate(digest, name)
    replica.checkout(digest)
    return pin


def held(repository):
    return [version.digest for model in repository.models() for version in model.versions]


def test_the_longest_unused_versions_go_and_the_folder_stays_within_its_bytes(replica, versions):
    budget = CacheBudget(replica.local, 5 * SIZE)
    for order, digest in enumerate(versions[:2]):
        bring(replica, budget, digest).release()
        os.utime(replica.local.root / "cache" / "uses" / digest, (order, order))
    os.utime(replica.local.root / "cache" / "uses" / versions[0], (9, 9))  # the first was used again
    bring(replica, budget, versions[2]).release()
    assert held(replica.local) == [versions[0], versions[2]]
    assert not (replica.local.root / "cache" / versions[1]).exists()
    assert budget.used_nbytes() <= budget.nbytes
    assert replica.checkout(versions[0]).is_dir()


def test_what_is_pinned_stays_though_nothing_else_fits(replica, versions):
    budget = CacheBudget(replica.local, 3 * SIZE)
    pin = bring(replica, budget, versions[0])
    with bring(replica, budget, versions[1]):
        assert held(replica.local) == versions[:2]
        evicted = budget.make_room(2 * SIZE)
        assert (evicted.digests, evicted.fits) == ((), False)
    pin.release()
    evicted = budget.make_room(2 * SIZE)
    assert set(evicted.digests) == set(versions[:2])
    assert evicted.fits
    assert evicted.freed_nbytes > 3 * SIZE
    assert not list((replica.local.root / "packs").iterdir())


_HOLDER = """
import sys
from pathlib import Path
from tether.store import Repository
from tether.store.replicas.cache import CacheBudget
pin = CacheBudget(Repository.open(Path(sys.argv[1]), read_only=True), 0).pin(sys.argv[2])
print("pinned", flush=True)
sys.stdin.read()
"""


def test_another_process_pin_holds_and_ends_with_its_death(replica, versions):
    budget = CacheBudget(replica.local, 0)
    bring(replica, budget, versions[0]).release()
    command = [sys.executable, "-c", _HOLDER, replica.local.root, versions[0]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"pinned\n"
        assert not budget.make_room().digests
        assert replica.checkout(versions[0]).is_dir()
        holder.kill()
    assert budget.make_room().digests == (versions[0],)


def test_who_pins_while_it_is_evicted_waits_and_pins_what_comes_then(replica, versions, monkeypatch):
    budget, reached, go = CacheBudget(replica.local, 0), threading.Event(), threading.Event()
    bring(replica, budget, versions[0]).release()
    discard = replica.local.discard

    def slowly(digest):
        reached.set()
        assert go.wait(PROMPT)
        discard(digest)

    monkeypatch.setattr(replica.local, "discard", slowly)
    evictor = threading.Thread(target=budget.make_room)
    evictor.start()
    assert reached.wait(PROMPT)
    pins = []
    pinner = threading.Thread(target=lambda: pins.append(budget.pin(versions[0])))
    pinner.start()
    assert not pins
    go.set()
    for thread in (evictor, pinner):
        thread.join(PROMPT)
    monkeypatch.undo()
    assert not held(replica.local)
    replica.replicate(versions[0], "model")
    assert not budget.make_room().digests
    pins[0].release()
    assert budget.make_room().digests == (versions[0],)


def test_bytes_that_a_version_shares_with_one_that_stays_stay(origin, replica):
    shared = {"shared.bin": seeded(7).randbytes(SIZE)}
    first = publish_bytes(origin, shared | {"own.bin": b"1" * 9000}, "a")
    second = publish_bytes(origin, shared | {"own.bin": b"2" * 9000}, "b")
    replica.sources[0].__dict__.update(MemoryBlobSource.of(origin).__dict__)
    budget = CacheBudget(replica.local, 0)
    replica.replicate(first, "a")
    with budget.pin(second):
        replica.replicate(second, "b")
        assert budget.make_room().digests == (first,)
        assert not replica.local.verify().problems
        assert (replica.checkout(second) / "shared.bin").read_bytes() == shared["shared.bin"]


def test_a_version_that_an_alias_points_at_stays(replica, versions):
    budget = CacheBudget(replica.local, 0)
    replica.replicate(versions[0], "model")
    replica.local.set_alias("model", "mine", 1)
    assert held(replica.local) == versions[:1]
    budget.make_room()
    assert held(replica.local) == versions[:1]


def test_of_a_store_that_is_only_read_the_checkouts_go_and_nothing_else(origin, versions):
    with Repository.open(origin.root, read_only=True) as reader:
        budget = CacheBudget(reader, 2 * SIZE + SIZE // 2)
        pin = budget.pin(versions[0])
        for order, digest in enumerate(versions):
            reader.checkout(digest)
            os.utime(reader.root / "cache" / digest, (order, order))
        evicted = budget.make_room()
        assert evicted.digests == tuple(versions[1:4])
        assert evicted.used_nbytes <= budget.nbytes
        assert sorted(path.name for path in (reader.root / "cache").iterdir()) == sorted([versions[0], versions[4], "uses"])
        pin.release()
    assert held(origin) == versions
    assert not origin.verify().problems


def test_of_a_store_that_is_no_replica_the_checkouts_go_and_nothing_else(origin, versions):
    for order, digest in enumerate(versions[:3]):
        origin.checkout(digest)
        os.utime(origin.root / "cache" / digest, (order, order))
    evicted = CacheBudget(origin, SIZE + SIZE // 2, checkouts_only=True).make_room()
    assert evicted.digests == tuple(versions[:2])
    assert (origin.root / "cache" / versions[2]).is_dir()
    assert held(origin) == versions


def test_what_is_being_fetched_is_not_evicted_from_under_it(origin, replica, versions):
    source = replica.sources[0]
    shared, other = (
        versions[0],
        publish_bytes(origin, {"model.onnx": origin.read_blob(origin.manifest(versions[0]).blobs()[0]), "b": b"b"}, "c"),
    )
    source.__dict__.update(MemoryBlobSource.of(origin).__dict__)
    budget = CacheBudget(replica.local, 0)
    replica.replicate(shared, "model")
    source.delay = 0.05
    pin, errors = budget.pin(other), []

    def fetch():
        try:
            replica.replicate(other, "c")
        except Exception as error:
            errors.append(error)

    fetcher = threading.Thread(target=fetch)
    fetcher.start()
    deadline = time.monotonic() + PROMPT
    while fetcher.is_alive() and time.monotonic() < deadline:
        budget.make_room()
    fetcher.join(PROMPT)
    assert not errors
    assert other in held(replica.local)
    assert not replica.local.verify().problems
    pin.release()


def test_the_default_is_a_tenth_of_the_disk_and_no_more_than_50_gb(tmp_path):
    stat = os.statvfs(tmp_path)
    assert default_nbytes(tmp_path / "not" / "there") == min(50_000_000_000, stat.f_blocks * stat.f_frsize // 10)
