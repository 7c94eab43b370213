"""Many publish, roll back, delete, collect and read at the same time; and all copies but one are damaged."""

import itertools
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_models import LAB, files_in, files_of, publish, seeded

from tether.errors import ConflictError, MissingBlobsError, NotFoundError
from tether.store import Repository
from tether.types import ModelRef

DIGITS = ModelRef("digits")
NBYTES = 8_000
PUBLISHES = 100
READER = """
import json, select, sys
from pathlib import Path
from store_models import files_in, files_of
from tether.store import Repository
from tether.types import ModelRef
reads = 0
with Repository.open(Path(sys.argv[1]), read_only=True) as repository:
    print("reads", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        record = repository.resolve(ModelRef("digits", alias="prod"))
        manifest = repository.manifest(record.digest)
        files = files_of(manifest.attributes["seed"], int(sys.argv[2]))
        for array in manifest.files():
            if repository.read_array(array, 0, array.nbytes) != files[array.path.removeprefix("files/")]:
                raise SystemExit("another process reads something else than was published")
        reads += 1
print(json.dumps(reads))
"""


@pytest.fixture
def reader(repository):
    """Another process that reads what @prod is, all the while; gives how often it did."""
    publish(repository, 0, files=files_of(0, NBYTES), alias=["prod"])
    command = [sys.executable, "-c", READER, str(repository.root), str(NBYTES)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{':'.join(filter(None, sys.path))}"}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "reads\n", process.stderr.read()

        def end():
            out, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
            return json.loads(out)

        yield end
        process.kill()


@pytest.mark.chaos
def test_row_14_a_hundred_publishes_and_a_hundred_rollbacks_at_once(repository, reader, chaos):
    """Each is all or nothing: numbers follow each other, every version is whole, the alias is always one that it was given."""
    count, begun = chaos.count(10 * PUBLISHES, PUBLISHES), time.monotonic()

    def publish_one(seed):
        return publish(repository, seed, files=files_of(seed, NBYTES), alias=["prod"])

    def roll_back(_):
        try:
            return repository.rollback("digits", "prod")
        except ConflictError:  # back to the first already
            return None

    with ThreadPoolExecutor(8) as pool:
        publishing = [pool.submit(publish_one, seed) for seed in range(1, count + 1)]
        rolling = [pool.submit(roll_back, number) for number in range(count)]
        published = [future.result() for future in publishing]
        moves = [change for future in rolling if (change := future.result()) is not None]

    assert sorted(one.version for one in published) == list(range(2, count + 2))
    assert all(change.before != change.after for change in moves)
    (model,) = repository.models()
    assert model.aliases["latest"] == count + 1
    assert {one.digest for one in published} < {version.digest for version in model.versions}
    for seed, one in enumerate(published, start=1):
        assert repository.resolve(ModelRef("digits", version=one.version)).digest == one.digest
        if seed % 10 == 0:
            assert files_in(repository.checkout(one.digest)) == files_of(seed, NBYTES)
    assert repository.verify().problems == ()
    assert reader() > 0
    chaos.record(14, f"110: {count} publishes and {count} rollbacks at once, {len(moves)} moves, 0 mixed", time.monotonic() - begun)


@pytest.mark.chaos
def test_row_19_publishing_while_it_is_collected_loses_nothing(repository, reader, chaos):
    """Versions that share blobs come and go, garbage is collected with no grace, and what is alive is always whole."""
    count, begun, alive, lock = chaos.count(20 * PUBLISHES, 60), time.monotonic(), {}, threading.Lock()
    seeds, over, collected = itertools.count(1), threading.Event(), [0]

    def come_and_go(name):
        chance = seeded(name)
        for _ in range(count // 3):
            seed = next(seeds) if chance.random() < 0.8 else chance.randrange(1, 6)
            try:
                published = publish(repository, seed, files=files_of(seed, NBYTES), name=name)
            except MissingBlobsError:  # a blob was here when it was asked for, and is asked for again
                continue
            with lock:
                alive[name, published.version] = published.digest, seed
            if chance.random() < 0.5:
                _delete_one(name, chance)

    def _delete_one(name, chance):
        with lock:
            mine = sorted(version for other, version in alive if other == name)
            version = chance.choice(mine)
            del alive[name, version]
        repository.delete_version(name, version)

    def collect():
        while not over.is_set():
            repository.gc(grace=0.0)
            collected[0] += 1

    with ThreadPoolExecutor(4) as pool:
        collecting = pool.submit(collect)
        try:
            for future in [pool.submit(come_and_go, name) for name in ("one", "two", "three")]:
                future.result()
        finally:
            over.set()
        collecting.result()

    for digest, seed in alive.values():
        assert files_in(repository.checkout(digest)) == files_of(seed, NBYTES)
        repository.discard(digest)
    assert repository.verify().problems == ()
    assert collected[0] > 1
    assert reader() > 0
    chaos.record(19, f"110: {count} publishes during {collected[0]} collections, 0 lost", time.monotonic() - begun)


@pytest.mark.chaos
def test_row_16_of_many_copies_all_but_one_are_damaged_and_that_one_heals_them(tmp_path, chaos):
    """111: nine stores lie, the tenth heals the damaged one; what the liars send is never stored."""
    begun, files = time.monotonic(), {f"w{number}.bin": seeded(number).randbytes(60_000) for number in range(chaos.count(400, 20))}
    stores = [Repository.open(tmp_path / f"store{number}", own=LAB.public) for number in range(4)]
    (digest,) = {publish(store, 1, files=files).digest for store in stores}
    for store in stores[:-1]:
        _damage(store, seeded(f"{chaos.seed} {store.root.name}"))
    damaged, *liars, honest = stores
    asked = []

    def of(store):
        def read(wanted):
            asked.append(wanted)
            try:
                return (store.root / "manifests" / wanted).read_bytes() if wanted == digest else raw_blob(store, wanted)
            except (KeyError, OSError):
                return None

        return read

    before = damaged.verify().problems
    assert before
    for liar in liars:
        damaged.repair(of(liar))
    report = damaged.repair(of(honest))

    assert report.failed == ()
    assert damaged.verify().problems == ()
    assert files_in(damaged.checkout(digest)) == files
    assert set(asked) <= {problem.digest for problem in before} | {digest}, "more was fetched than was damaged"
    for store in stores:
        store.close()
    with Repository.open(tmp_path / "store0", own=LAB.public) as reopened:
        assert reopened.verify().problems == ()
    chaos.record(16, f"111: {len(before)} blobs damaged, 2 lying copies, healed from the one that was whole", time.monotonic() - begun)


def raw_blob(store, digest):
    """What lies there, true or not: a peer that lies, or does not know that it does."""
    location = store._blobs.locate([digest])[digest]
    with (store.root / "packs" / location.pack).open("rb") as file:
        file.seek(location.offset)
        return file.read(location.nbytes)


def _damage(store, chance):
    """A byte of every third blob, and the whole manifest."""
    for location in list(_locations(store)):
        if chance.random() < 0.4:
            path = store.root / "packs" / location.pack
            with path.open("r+b") as file:
                file.seek(location.offset + chance.randrange(location.nbytes))
                byte = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte[0] ^ 0xFF]))
    (manifest,) = (store.root / "manifests").iterdir()
    manifest.write_bytes(manifest.read_bytes()[:-1])


def _locations(store):
    digests = store.manifest(store.resolve(DIGITS).digest).blobs()
    return store._blobs.locate(digests).values()


def test_a_version_that_nobody_has_is_said_to_be_unrepairable(repository):
    published = publish(repository, 1)
    for pack in (repository.root / "packs").iterdir():
        pack.unlink()

    report = repository.repair(lambda _: None)

    assert set(report.failed) == set(repository.manifest(published.digest).blobs())
    assert repository.verify().problems
    with pytest.raises(NotFoundError):
        repository.resolve(ModelRef("other"))


SHARED = """
import os
from tether.store.packing.parallel import buffer
with buffer() as view:
    view[:6] = b"parent"
if os.fork() == 0:
    with buffer() as view:
        view[:6] = b"child!"
    os._exit(0)
os.wait()
with buffer() as view:
    assert bytes(view[:6]) == b"parent", bytes(view[:6])
"""


def test_a_forked_process_does_not_write_into_its_parents_buffers():
    """Found by cutting the power: a fork that read one blob while its parent wrote another changed what was written."""
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
