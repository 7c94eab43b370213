"""A replica: local blobs first, else the first source that has them, each fetched once, verified, and kept over a crash."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager

import numpy as np
import pytest
from store_models import INFO, LAB, publish, seeded

from tether import store
from tether.errors import BadNameError, ChunkAlteredError, ChunkMissingError, NoSpaceError, ServiceUnavailableError
from tether.store import Repository
from tether.store.format import layout
from tether.store.format.weights import tensor_arrays
from tether.store.replicas.fetching import FetchRules
from tether.store.replicas.replicated import Replicated
from tether.testing.blob_sources import BlobSourceSuite, MemoryBlobSource
from tether.types import StoredTensor

QUICK = FetchRules(patience=0.1, give_up=0.6, rests=(0.01, 0.05), wary=5.0)
PROMPT = 20.0
MIB = 1 << 20


class TestMemorySource(BlobSourceSuite):
    @asynccontextmanager
    async def open_source(self, repository):
        yield MemoryBlobSource.of(repository)

    async def cut_off(self, source):
        source.gone = True


def until(condition):
    deadline = time.monotonic() + PROMPT
    while not condition():
        assert time.monotonic() < deadline, f"not true after {PROMPT} s"
        time.sleep(0.005)


@pytest.fixture
def origin(tmp_path):
    with Repository.open(tmp_path / "origin", own=LAB.public) as repository:
        yield repository


@pytest.fixture
def local(tmp_path):
    with Repository.open(tmp_path / "local") as repository:
        yield repository


LAYERS, LAYER = 12, (64, 1024)
"""256 KiB each: a blob of its own."""


def weights(seed=0):
    chance = np.random.default_rng(seed)
    return {f"layer{index}": chance.standard_normal(LAYER, np.float32) for index in range(LAYERS)}


def publish_weights(repository, tensors, name="net"):
    """One file, a header and the tensors behind it, as safetensors has them."""
    header = b"header" * 10
    placed, offset = [], len(header)
    for key, array in tensors.items():
        placed.append(StoredTensor(key, str(array.dtype), array.shape, "model.bin", offset, array.nbytes))
        offset += array.nbytes
    data = header + b"".join(array.tobytes() for array in tensors.values())
    pieces = layout.cut(len(data), [layout.Piece(tensor.offset, tensor.nbytes) for tensor in placed])
    segments = []
    for piece in pieces:
        part = data[piece.offset : piece.offset + piece.nbytes]
        repository.put_blob(store.digest_of(part), part)
        segments.append(store.Segment(store.digest_of(part), 0, len(part)))
    file = store.ArrayEntry("files/model.bin", "uint8", (len(data),), tuple(segments))
    manifest = store.encode(store.Manifest(framework="onnx", entry="", info=INFO, arrays=(file, *tensor_arrays([file], placed))))
    return repository.publish(name, manifest, LAB.public, LAB.sign(store.signed_message(manifest))).digest


def array_of(manifest, path):
    return next(array for array in manifest.arrays if array.path == path)


def damage(repository, digest):
    """Flip a byte of a stored blob in its pack."""
    location = repository._catalog.locate(digest)
    path = repository.root / "packs" / location.pack
    with path.open("r+b") as file:
        file.seek(location.offset + location.nbytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


# --- whole versions


def test_a_version_is_replicated_as_it_was_signed_and_is_not_fetched_again(origin, local):
    digest, source = publish(origin, 1).digest, MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        steps = []
        record = replica.replicate(digest, "digits", steps.append)
        assert (record.publisher, record.digest, record.version) == (LAB.public, digest, 1)
        assert sorted(source.asked) == sorted(origin.manifest(digest).blobs())
        assert steps[0].here_nbytes == 0
        assert steps[-1].here_nbytes == steps[-1].nbytes
        assert replica.replicate(digest) == record
        assert replica.load_tensors(digest) == {}
    assert len(source.asked) == len(source.blobs)
    assert not local.verify().problems
    assert len(list((local.root / "packs").glob("*.pack"))) == 1
    assert source.closed


def test_a_second_version_costs_what_changed(origin, local):
    tensors = weights()
    first = publish_weights(origin, tensors)
    second = publish_weights(origin, tensors | {"layer3": tensors["layer3"] + 1})
    source = MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        replica.replicate(first, "net")
        before = len(source.asked)
        replica.replicate(second, "net")
        assert len(source.asked) - before == 1
        assert replica.traffic()[0].blobs == len(source.asked)


def test_a_replica_lies_in_its_pack_as_the_file_does(origin, local):
    digest = publish_weights(origin, weights())
    source = MemoryBlobSource.of(origin)
    source.blobs = dict(reversed(source.blobs.items()))
    with Replicated(local, [source]) as replica:
        replica.replicate(digest, "net")
    array = array_of(local.manifest(digest), "files/model.bin")
    locations = [local._catalog.locate(segment.digest) for segment in array.segments]
    assert [location.offset for location in locations] == sorted(location.offset for location in locations)
    for name, tensor in local.load_tensors(digest).items():
        assert tensor.base is not None, name


def test_a_version_without_a_name_is_refused_with_what_to_do(origin, local):
    digest = publish(origin, 1).digest
    with Replicated(local, [MemoryBlobSource.of(origin)]) as replica, pytest.raises(BadNameError, match="name="):
        replica.replicate(digest)


def test_the_next_source_is_asked_for_what_the_first_lacks(origin, local):
    digest = publish_weights(origin, weights())
    blobs = origin.manifest(digest).blobs()
    first, second = MemoryBlobSource.of(origin, "manager"), MemoryBlobSource.of(origin, "peer")
    first.loses = set(blobs[::2]).__contains__
    with Replicated(local, [first, second], QUICK) as replica:
        replica.replicate(digest, "net")
    assert sorted(second.asked) == sorted(blobs[::2])
    assert not local.verify().problems


def test_a_blob_that_nobody_has_is_named_with_its_array_and_who_was_asked(origin, local):
    digest = publish_weights(origin, weights())
    lost = array_of(origin.manifest(digest), "tensors/layer5").segments[0].digest
    sources = [MemoryBlobSource.of(origin, name) for name in ("manager", "alice")]
    for source in sources:
        source.loses = {lost}.__contains__
    with Replicated(local, sources, QUICK) as replica, pytest.raises(ChunkMissingError, match="manager, alice") as caught:
        replica.replicate(digest, "net")
    assert caught.value.args[1:] == (lost, "files/model.bin")
    assert str(lost) in str(caught.value)


def test_a_source_that_lied_once_is_asked_nothing_more_and_is_reported(origin, local):
    digest = publish_weights(origin, weights())
    liar, honest = MemoryBlobSource.of(origin, "liar", in_flight=1), MemoryBlobSource.of(origin, "honest")
    liar.lies = liar.blobs.__contains__
    with Replicated(local, [liar, honest], QUICK) as replica:
        replica.replicate(digest, "net")
        assert [(traffic.source, traffic.banned) for traffic in replica.traffic()] == [("liar", True), ("honest", False)]
    assert len(liar.asked) == 1
    assert not local.verify().problems


def test_a_manifest_that_is_not_the_one_asked_for_is_not_believed(origin, local):
    digest = publish(origin, 1).digest
    liar, honest = MemoryBlobSource.of(origin, "liar"), MemoryBlobSource.of(origin, "honest")
    liar.lies = {digest}.__contains__
    with Replicated(local, [liar, honest], QUICK) as replica:
        assert replica.manifest(digest) == origin.manifest(digest)
        assert replica.traffic()[0].banned
    with Replicated(local, [liar], QUICK) as replica, pytest.raises(ChunkMissingError, match="gave wrong bytes"):
        replica.manifest(digest)


def test_a_stalled_source_costs_its_patience_once_and_the_next_one_gives_the_rest(origin, local):
    digest = publish_weights(origin, weights())
    stalled, quick = MemoryBlobSource.of(origin, "stalled", in_flight=2), MemoryBlobSource.of(origin, "quick")
    stalled.stalls = lambda digest: digest in stalled.blobs
    with Replicated(local, [stalled, quick], QUICK) as replica:
        replica.replicate(digest, "net")
    assert len(stalled.asked) == 2
    assert stalled.cancelled == 2
    assert not local.verify().problems


def test_a_source_that_breaks_off_is_tried_again(origin, local):
    digest, source = publish_weights(origin, weights()), None
    source = MemoryBlobSource.of(origin)
    source.drops = 5
    with Replicated(local, [source], QUICK) as replica:
        replica.replicate(digest, "net")
        assert replica.traffic()[0].failures == 5


def test_a_source_that_is_gone_is_a_clear_error_in_time_and_what_came_is_kept(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin, "manager", in_flight=1)

    def leave_after_four(_):
        source.gone = len(source.asked) > 4
        return False

    source.loses = leave_after_four
    with Replicated(local, [source], QUICK) as replica:
        begun = time.monotonic()
        with pytest.raises(ServiceUnavailableError, match="manager did not give it within"):
            replica.replicate(digest, "net")
        assert time.monotonic() - begun < 10 * QUICK.give_up
        came = source.given_nbytes
        assert came
        source.gone, source.loses = False, lambda _: False
        replica.replicate(digest, "net")
    assert source.given_nbytes == sum(map(len, source.blobs.values()))
    assert not local.verify().problems


def test_one_fetch_serves_all_who_want_a_version_at_the_same_time(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin)
    source.delay = 0.02
    manifest = origin.manifest(digest)
    file = array_of(manifest, "files/model.bin")
    with Replicated(local, [source]) as replica, ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(replica.replicate, digest, "net") for _ in range(3)]
        calls += [threads.submit(replica.checkout, digest, "net") for _ in range(2)]
        reads = [threads.submit(replica.read_array, file, 0, file.nbytes) for _ in range(3)]
        for call in calls:
            call.result(PROMPT)
        expected = origin.read_array(file, 0, file.nbytes)
        assert all(read.result(PROMPT) == expected for read in reads)
    assert sorted(source.asked) == sorted(manifest.blobs())


async def test_a_call_that_is_cancelled_stops_fetching_and_leaves_the_next_one_nothing_but_the_rest(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin, in_flight=1)
    reached, loop = asyncio.Event(), asyncio.get_running_loop()

    def stalls_from_the_seventh_on(_):
        if len(source.asked) > 6:
            loop.call_soon_threadsafe(reached.set)
        return len(source.asked) > 6

    source.stalls = stalls_from_the_seventh_on
    with Replicated(local, [source]) as replica:
        call = asyncio.create_task(replica.areplicate(digest, "net"))
        await asyncio.wait_for(reached.wait(), PROMPT)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(PROMPT):
            while not source.cancelled:  # noqa: ASYNC110 (another loop's thread counts)
                await asyncio.sleep(0.005)
        assert (len(source.asked), source.cancelled) == (7, 1)
        source.stalls = lambda _: False
        await replica.areplicate(digest, "net")
    assert len(source.asked) == len(source.blobs) + 1
    assert not local.verify().problems


_KILLED = """
import os, signal, sys
from pathlib import Path
from tether.store import Repository
from tether.store.replicas.replicated import Replicated
from tether.testing.blob_sources import MemoryBlobSource
origin, local = Repository.open(Path(sys.argv[1]), read_only=True), Repository.open(Path(sys.argv[2]))
def die(progress):
    if progress.here_nbytes * 2 >= progress.nbytes:
        os.kill(os.getpid(), signal.SIGKILL)
Replicated(local, [MemoryBlobSource.of(origin, in_flight=1)]).replicate(sys.argv[3], "net", die)
"""


def test_killed_in_the_middle_it_goes_on_where_it_was(origin, tmp_path):
    digest = publish_weights(origin, weights())
    died = subprocess.run([sys.executable, "-c", _KILLED, origin.root, tmp_path / "local", digest], check=False)
    assert died.returncode == -signal.SIGKILL
    source = MemoryBlobSource.of(origin)
    with Repository.open(tmp_path / "local") as local, Replicated(local, [source]) as replica:
        replica.replicate(digest, "net")
        assert len(source.asked) <= len(source.blobs) // 2 + 1
        assert not local.verify().problems


def test_a_disk_that_is_full_is_no_fault_of_the_source_and_said_to_all_who_wait(origin, local, monkeypatch):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin)

    def full(*_):
        raise NoSpaceError("no space: free some")

    monkeypatch.setattr(local, "put_blob", full)
    with Replicated(local, [source]) as replica:
        with pytest.raises(NoSpaceError):
            replica.replicate(digest, "net")
        assert not replica.traffic()[0].failures
        monkeypatch.undo()
        replica.replicate(digest, "net")


# --- parts


def test_a_layer_is_read_without_the_rest_of_the_model(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        array = array_of(replica.manifest(digest), "tensors/layer4")
        data = replica.read_array(array, 0, array.nbytes)
        assert data == weights()["layer4"].tobytes()
        assert replica.read_array(array, 4, 8) == data[4:8]
    assert source.asked == [segment.digest for segment in array.segments]


def test_reading_an_array_from_its_start_on_fetches_ahead_and_never_beyond_it(origin, local):
    big = np.frombuffer(seeded(5).randbytes(20 * MIB), np.uint8)
    digest = publish_weights(origin, {"big": big, "other": big[:MIB] + np.uint8(1)})
    source = MemoryBlobSource.of(origin, in_flight=2)
    with Replicated(local, [source]) as replica:
        array = array_of(replica.manifest(digest), "tensors/big")
        wanted = {segment.digest for segment in array.segments}
        assert replica.read_array(array, 0, 100) == big[:100].tobytes()
        until(lambda: set(source.asked) == wanted)
        assert replica.read_array(array, 19 * MIB, 20 * MIB) == big[19 * MIB :].tobytes()
        assert len(source.asked) == len(wanted)


def test_a_read_in_the_middle_fetches_nothing_ahead(origin, local):
    big = np.frombuffer(seeded(5).randbytes(20 * MIB), np.uint8)
    digest, source = publish_weights(origin, {"big": big}), None
    source = MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        array = array_of(replica.manifest(digest), "tensors/big")
        assert replica.read_array(array, 9 * MIB, 9 * MIB + 10) == big[9 * MIB : 9 * MIB + 10].tobytes()
        assert replica.read_array(array, 9 * MIB + 10, 9 * MIB + 20) == big[9 * MIB + 10 : 9 * MIB + 20].tobytes()
    assert len(source.asked) == 1


def test_a_version_that_is_elsewhere_opens_as_zarr(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        group = store.open_group(replica, digest)
        np.testing.assert_array_equal(group["tensors/layer2"][:], weights()["layer2"])
    assert len(source.asked) == 1


async def test_tensors_stream_in_the_order_of_the_file_each_as_soon_as_it_came(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin, in_flight=2)
    with Replicated(local, [source], FetchRules(max_nbytes=2 * 4 * 64 * 1024)) as replica:
        seen = []
        async for name, tensor in replica.stream_tensors(digest):
            np.testing.assert_array_equal(tensor, weights()[name])
            assert not tensor.flags.writeable
            seen.append((name, len(source.asked)))
    assert [name for name, _ in seen] == [f"layer{index}" for index in range(LAYERS)]
    assert seen[0][1] <= 4


async def test_the_first_layers_product_exists_before_a_tenth_of_the_model_has_come(origin, local, measured):
    chance = np.random.default_rng(3)
    layers = {f"w{index:02}": chance.standard_normal((512, 512), np.float32) for index in range(64)}
    digest, source = publish_weights(origin, layers), MemoryBlobSource.of(origin, in_flight=4)
    source.nbytes_per_second = 100e6
    with Replicated(local, [source]) as replica:
        async with aclosing(replica.stream_tensors(digest)) as tensors:
            name, tensor = await anext(tensors)
            product = np.ones((1, 512), np.float32) @ tensor
    np.testing.assert_allclose(product, layers[name].sum(0, keepdims=True), rtol=1e-3, atol=1e-3)
    share = source.given_nbytes / sum(map(len, source.blobs.values()))
    measured(f"streaming 64 MiB at 100 MB/s: the first layer's product when {share:.1%} had come")
    assert share < 0.1


async def test_a_stream_that_ends_early_stops_fetching(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin, in_flight=1)
    with Replicated(local, [source], FetchRules(max_nbytes=3 * 4 * 64 * 1024)) as replica:
        async with aclosing(replica.stream_tensors(digest, ["layer3", "layer1", "layer9"])) as tensors:
            name, tensor = await anext(tensors)
        assert name == "layer1"
        np.testing.assert_array_equal(tensor, weights()["layer1"])
        asked = len(source.asked)
        assert asked <= 3
        tensors = await replica.aload_tensors(digest, ["layer1", "layer5"])
        assert sorted(tensors) == ["layer1", "layer5"]
        assert len(source.asked) <= asked + 1


def test_a_checkout_is_ready_with_the_last_blob_and_published_behind_it(origin, local):
    digest, source = publish(origin, 3).digest, MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        folder = replica.checkout(digest, "digits")
        exported = origin.checkout(digest)
        names = sorted(path.relative_to(exported) for path in exported.rglob("*"))
        assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == names
        assert all((folder / name).read_bytes() == (exported / name).read_bytes() for name in names if (exported / name).is_file())
        until(local.models)
        assert replica.checkout(digest) == folder
    assert len(source.asked) == len(source.blobs)


# --- damage


def test_damaged_blobs_are_fetched_again_and_nothing_else(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        replica.replicate(digest, "net")
        source.asked.clear()
        bad = local.manifest(digest).blobs()[2:5]
        for each in bad:
            damage(local, each)
        np.testing.assert_array_equal(replica.load_tensors(digest)["layer2"], weights()["layer2"])
        assert sorted(source.asked) == sorted(bad)
        assert replica.damaged == 3
        assert not local.verify().problems


def test_a_read_of_a_damaged_blob_mends_the_store(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        replica.replicate(digest, "net")
        array = array_of(local.manifest(digest), "tensors/layer7")
        damage(local, array.segments[0].digest)
        assert replica.read_array(array, 0, array.nbytes) == weights()["layer7"].tobytes()
        assert not local.verify().problems
        assert replica.damaged == 1


def test_repair_brings_back_a_lost_pack_and_a_lost_manifest(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin)
    with Replicated(local, [source]) as replica:
        replica.replicate(digest, "net")
        for path in [*(local.root / "packs").glob("*.pack"), local.root / "manifests" / digest]:
            path.unlink()
        report = replica.repair()
        assert not report.failed
        assert not local.verify().problems
        assert (replica.checkout(digest) / "model.bin").stat().st_size == origin.manifest(digest).nbytes


def test_beside_a_store_that_may_only_be_read_good_bytes_come_from_the_source(origin):
    digest = publish_weights(origin, weights())
    source = MemoryBlobSource.of(origin)
    array = array_of(origin.manifest(digest), "tensors/layer7")
    damage(origin, array.segments[0].digest)
    with Repository.open(origin.root, read_only=True) as reader, Replicated(reader, [source]) as replica:
        for _ in range(3):
            assert replica.read_array(array, 0, array.nbytes) == weights()["layer7"].tobytes()
        assert len(source.asked) == 1
        with pytest.raises(ChunkAlteredError):
            replica.checkout(digest)


@pytest.mark.chaos
def test_row_16_damaged_chunks_are_healed_from_peers_and_a_hostile_one_is_banned_at_its_first_lie(origin, local, chaos):
    mib = chaos.count(256, 16)
    chance = np.random.default_rng(chaos.seed)
    digest = publish_weights(origin, {f"w{index}": chance.standard_normal((1024, 1024), np.float32) for index in range(mib // 4)})
    hostile, honest = MemoryBlobSource.of(origin, "hostile", in_flight=1), MemoryBlobSource.of(origin, "honest")
    with Replicated(local, [honest]) as replica:
        replica.replicate(digest, "net")
    hostile.lies = hostile.blobs.__contains__
    blobs = local.manifest(digest).blobs()[1:]  # all but the header, which no tensor needs
    bad = [blobs[index] for index in chance.choice(len(blobs), size=max(1, len(blobs) // 8), replace=False)]
    for each in bad:
        damage(local, each)
    honest.given_nbytes = 0
    with Replicated(local, [hostile, honest]) as replica:
        begun = time.monotonic()
        tensors = replica.load_tensors(digest)
        seconds = time.monotonic() - begun
        assert replica.traffic()[0].banned
    assert len(hostile.asked) == 1
    assert honest.given_nbytes <= 1.1 * sum(len(honest.blobs[each]) for each in bad)
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {
        name: tensor.tobytes() for name, tensor in origin.load_tensors(digest).items()
    }
    assert not local.verify().problems
    assert seconds < 5
    chaos.record(16, f"{len(bad)} of {len(blobs)} chunks of {mib} MiB healed, 1 lie, banned", seconds)


def test_a_replica_travels_to_another_process(origin, local):
    digest = publish_weights(origin, weights())
    with Replicated(local, [MemoryBlobSource(name="nobody")]) as replica:
        assert repr(replica) == f"Replicated({str(local.root)!r}, from nobody)"
        with Replicated(local, [MemoryBlobSource(name="nobody")]) as same:
            assert (same, hash(same)) == (replica, hash(replica))
    assert digest


def test_reading_from_many_threads_ends_with_the_store(origin, local):
    digest, source = publish_weights(origin, weights()), MemoryBlobSource.of(origin)
    source.stalls = lambda digest: digest in source.blobs
    replica = Replicated(local, [source])
    errors = []

    def read():
        try:
            replica.replicate(digest, "net")
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: source.asked)
    replica.close()
    reader.join(PROMPT)
    assert not reader.is_alive()
    assert errors
    assert pickle.loads(pickle.dumps(QUICK)) == QUICK  # noqa: S301 (our own)
