"""A scrub finds every kind of damage, at the speed of the hash, and serving hardly notices."""

import os
import threading
import time

import pytest
from store_models import LAB, publish, seeded

from tether.store import BLOB_NBYTES, Repository

FULL, SMALL = 128, 2
"""Files of 32 MiB of `make chaos` and of `make test`."""
FILE_NBYTES = 32 * 1024 * 1024
UNBOUNDED = float("inf")
LIMIT = 100e6
"""Bytes a second of a scrub beside which is served."""


@pytest.fixture
def filled(tmp_path, chaos):
    """A store of real bytes, one pack a file."""
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        for number in range(chaos.count(FULL, SMALL)):
            publish(repository, number, files={"w.bin": os.urandom(FILE_NBYTES), "small": os.urandom(500)})
        yield repository


def damage(repository, chance):
    """Flips, zeroed pages, a swap and a lost pack, where there are several; gives what is then wrong."""
    hit, packs = set(), sorted((repository.root / "packs").iterdir())
    if len(packs) > 1:
        hit |= {line.digest for line in repository._catalog.blobs_in(packs[-1].name)}
        packs.pop().unlink()
    for pack in packs:
        lines = [line for line in repository._catalog.blobs_in(pack.name) if line.nbytes == BLOB_NBYTES]
        one, two, three, four = chance.sample(lines, 4)
        with pack.open("r+b", buffering=0) as file:
            put(file, one.offset + chance.randrange(one.nbytes), lambda byte: bytes([byte[0] ^ 1 << chance.randrange(8)]), 1)
            put(file, two.offset + chance.randrange(0, two.nbytes, 4096), lambda page: bytes(len(page)), 4096)
            first, second = (os.pread(file.fileno(), line.nbytes, line.offset) for line in (three, four))
            os.pwrite(file.fileno(), second, three.offset)
            os.pwrite(file.fileno(), first, four.offset)
        hit |= {line.digest for line in (one, two, three, four)}
    return hit


def put(file, offset, change, nbytes):
    os.pwrite(file.fileno(), change(os.pread(file.fileno(), nbytes, offset)), offset)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_row_20_a_scrub_finds_all_damage_at_the_speed_of_the_hash(filled, chaos, measured):
    whole = sum(seen.nbytes for seen in filled.scrub(UNBOUNDED))
    begun, cpu = time.monotonic(), time.thread_time()
    assert sum(seen.nbytes for seen in filled.scrub(UNBOUNDED)) == whole
    rate, core = whole / (time.monotonic() - begun) / 1e9, whole / (time.thread_time() - cpu) / 1e9
    begun = time.monotonic()
    assert filled.verify().problems == ()
    verified = whole / (time.monotonic() - begun) / 1e9
    slower = slowdown(filled)
    hit = damage(filled, seeded(chaos.seed))

    begun = time.monotonic()
    found = {seen.problem.digest for seen in filled.scrub(UNBOUNDED) if seen.problem}
    seconds = time.monotonic() - begun

    assert found == hit
    assert {problem.digest for problem in filled.verify().problems} == hit
    told = f"{whole / 1e9:.2f} GB at {rate:.2f} GB/s, {core:.2f} GB/s a core, verify {verified:.2f} GB/s"
    told += f"; reads {slower:+.0%} beside a scrub at {LIMIT / 1e6:.0f} MB/s"
    measured(f"scrub: {told}")
    chaos.record(20, f"{told}; {len(found)} of {len(hit)} damaged blobs found", seconds)


def slowdown(repository):
    """How much longer reads take while a bounded scrub goes on beside them."""
    alone, stop = time_of_reads(repository), threading.Event()

    def scrub():
        while not stop.is_set():
            for _ in repository.scrub(LIMIT, stop.is_set):
                pass

    thread = threading.Thread(target=scrub)
    thread.start()
    try:
        return time_of_reads(repository) / alone - 1
    finally:
        stop.set()
        thread.join()


def time_of_reads(repository):
    (model,) = repository.models()
    array = next(array for array in repository.manifest(model.versions[0].digest).files() if array.nbytes == FILE_NBYTES)
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        for start in range(0, FILE_NBYTES, BLOB_NBYTES):
            repository.read_array(array, start, start + BLOB_NBYTES)
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]
