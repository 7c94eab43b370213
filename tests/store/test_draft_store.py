"""Drafts: written by several at once, kept over the end of a process, published key for key."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import zarr
from store_models import INFO, LAB
from zarr.core.buffer import default_buffer_prototype

from tether.errors import BadModelError, BadNameError, ChunkAlteredError, ConflictError, MalformedManifestError
from tether.store import BLOB_NBYTES, DraftStore, Manifest, VersionStore, open_group
from tether.store.hierarchy.drafts import Draft
from tether.types import ModelRef

PROTOTYPE = default_buffer_prototype()
BIG = np.random.default_rng(0).bytes(2 * BLOB_NBYTES + 77)


@pytest.fixture
def draft(tmp_path):
    return DraftStore(tmp_path / "store", "run")


def buffer(data):
    return PROTOTYPE.buffer.from_bytes(data)


def keys_of(store):
    async def collect():
        return [key async for key in store.list()]

    return sorted(asyncio.run(collect()))


def stored(draft):
    """Names of the files that hold large values."""
    folder = draft._draft.folder / "values"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_what_was_written_with_zarr_is_published_and_read_back_the_same(repository):
    draft = DraftStore(repository.root, "run")
    group = zarr.open_group(draft, mode="w", attributes={"author": "me"})
    values = np.arange(6_000_000, dtype="f4").reshape(3000, 2000)
    group.create_array("deep/er/values", data=values, chunks=(1000, 2000), shards=(3000, 2000), attributes={"unit": "m"})
    group.create_array("half", data=values[:3].astype("f2"), compressors=zarr.codecs.ZstdCodec())

    published = draft.publish(repository, "run", LAB, alias=["prod"])
    version = VersionStore(repository, published.digest)

    assert keys_of(version) == keys_of(draft)
    opened = open_group(repository, published.digest)
    np.testing.assert_array_equal(opened["deep/er/values"][:], values)
    np.testing.assert_array_equal(opened["half"][:], values[:3].astype("f2"))
    assert opened["deep/er/values"].attrs["unit"] == "m"
    assert opened.attrs["author"] == "me"
    assert opened.attrs["tether"]["framework"] == "custom"
    assert draft.publish(repository, "run", LAB).created is False


def test_a_second_version_of_a_draft_stores_what_changed_only(repository):
    draft = DraftStore(repository.root, "run")
    array = zarr.create_array(draft, name="a", data=np.random.default_rng(1).random((4, 500_000)), chunks=(1, 500_000), compressors=None)
    first = repository.manifest(draft.publish(repository, "run", LAB).digest)
    array[2] = 0.5
    second = repository.manifest(draft.publish(repository, "run", LAB).digest)

    assert len(set(second.blobs()) - set(first.blobs())) == 1  # a row is one blob of 4 MB
    assert repository.resolve(ModelRef("run")).version == 2


def test_attributes_of_the_users_own_are_never_hidden(repository):
    draft = DraftStore(repository.root, "run")
    zarr.open_group(draft, mode="w", attributes={"tether": "mine"})
    assert open_group(repository, draft.publish(repository, "run", LAB).digest).attrs.asdict() == {"tether": "mine"}
    for root in (b"not json", b"[1]", b'{"zarr_format": 3, "node_type": "group", "attributes": [1]}'):
        draft.set_sync("zarr.json", buffer(root))
        version = VersionStore(repository, draft.publish(repository, "run", LAB).digest)
        assert version.get_sync("zarr.json").to_bytes() == root
        assert asyncio.run(version.getsize("zarr.json")) == len(root)


def test_written_arrays_stand_beside_the_models_files(repository):
    files = (repository.add_bytes("model.onnx", b"weights"),)
    about = Manifest(framework="onnx", entry="model.onnx", info=INFO, arrays=files, attributes={"seed": 1})
    draft = DraftStore(repository.root, "run")
    zarr.create_array(draft, name="embeddings/words", data=np.ones((3, 4)))
    group = open_group(repository, draft.publish(repository, "run", LAB, about=about).digest)

    assert sorted(path for path, node in group.members(max_depth=None) if isinstance(node, zarr.Array)) == [
        "embeddings/words",
        "files/model.onnx",
    ]
    assert group["files/model.onnx"][:].tobytes() == b"weights"
    assert group.attrs["tether"]["attributes"] == {"seed": 1}
    zarr.create_array(draft, name="files/other", data=np.ones(1))
    with pytest.raises(BadModelError, match="another group"):
        draft.publish(repository, "run", LAB, about=about)


def test_what_no_version_can_hold_is_refused_when_it_is_published_and_named(repository):
    draft = DraftStore(repository.root, "run")
    with pytest.raises(BadModelError, match="empty"):
        draft.publish(repository, "run", LAB)
    for key, reason in [("a\\b", "backslash"), ("../x", r"part '\.\.'"), ("a" * 300, "255"), ("a//b", "part ''")]:
        draft.set_sync(key, buffer(b"x"))
        with pytest.raises(BadModelError, match=reason):
            draft.publish(repository, "run", LAB)
        draft.delete_sync(key)
    draft.set_sync("a", buffer(b"x"))
    draft.set_sync("a/b", buffer(b"x"))
    with pytest.raises(MalformedManifestError, match="also the folder"):
        draft.publish(repository, "run", LAB)
    with pytest.raises(BadNameError, match="Unicode"):
        draft.set_sync("\udc80", buffer(b"x"))
    with pytest.raises(BadNameError):
        DraftStore(repository.root, "../run")


def test_of_many_who_set_a_key_that_is_not_there_one_sets_it(draft):
    for round_, nbytes in enumerate((10, 100_000)):
        barrier, copies = threading.Barrier(8), [pickle.loads(pickle.dumps(draft)) for _ in range(8)]  # noqa: S301 (ours)

        def claim(index, barrier=barrier, copies=copies, key=f"lock/{round_}", nbytes=nbytes):
            barrier.wait()
            return copies[index]._draft.write(key, bytes([index]) * nbytes, replace=False)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(claim, range(8)))
        assert won.count(True) == 1
        assert draft.get_sync(f"lock/{round_}").to_bytes() == bytes([won.index(True)]) * nbytes
    assert len(stored(draft)) == 1


def _write_rows(draft, rows):
    array = zarr.open_array(draft, path="rows", mode="r+")
    for row in rows:
        array[row] = row
    return draft._draft.write("first", str(rows[0]).encode(), replace=False)


def test_processes_write_one_draft_together(draft):
    zarr.create_array(draft, name="rows", shape=(24, 30_000), chunks=(1, 30_000), dtype="i4", compressors=None)
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        won = list(pool.map(_write_rows, [draft] * 3, [range(start, 24, 3) for start in range(3)]))

    assert won.count(True) == 1
    np.testing.assert_array_equal(zarr.open_array(draft, path="rows")[:], np.repeat(np.arange(24, dtype="i4")[:, None], 30_000, axis=1))


def test_a_reader_sees_the_old_value_or_the_new_one_and_nothing_else(draft):
    values = [bytes([number]) * (3_000_000 + number) for number in range(2)] + [b"small"]
    draft._draft.write("k", values[0])
    stop = threading.Event()

    def overwrite():
        copy = DraftStore(draft._draft.root, "run")
        while not stop.is_set():
            for value in values:
                copy._draft.write("k", value)

    writer = threading.Thread(target=overwrite)
    writer.start()
    try:
        assert {draft._draft.read("k") in values for _ in range(60)} == {True}
    finally:
        stop.set()
        writer.join()
    assert len(stored(draft)) <= 1


def test_a_draft_survives_the_kill_of_its_writer(draft):
    code = f"""
import os, signal
from pathlib import Path
from tether.store.hierarchy.drafts import Draft
from tether.types import ModelRef
draft = Draft(Path({str(draft._draft.root)!r}), "run")
draft.write("small", b"s")
draft.write("big", b"b" * 5_000_000)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, env=os.environ)

    assert ended.returncode == -signal.SIGKILL
    assert keys_of(draft) == ["big", "small"]
    assert draft._draft.read("big") == b"b" * 5_000_000


def test_a_value_that_was_altered_on_disk_is_refused(draft):
    draft._draft.write("big", BIG)
    (name,) = stored(draft)
    path = draft._draft.folder / "values" / name
    path.write_bytes(BIG[:BLOB_NBYTES] + b"?" + BIG[BLOB_NBYTES + 1 :])

    assert draft._draft.read("big", lambda _: (5, 9)) == BIG[5:9]  # of a piece that is whole
    with pytest.raises(ChunkAlteredError, match="big"):
        draft._draft.read("big")
    path.write_bytes(BIG[:100])
    with pytest.raises(ChunkAlteredError, match="set it again"):
        draft.get_sync("big")


def test_a_draft_that_changes_while_it_is_published_is_refused(tmp_path):
    for before, after in [(BIG, b"now small"), (b"small", BIG), (b"one", b"two"), (BIG, None)]:
        draft = Draft(tmp_path / "changing", "run")
        draft.write("k", before)
        (value,) = [value for _, value in draft.values()]
        if after is None:
            draft.delete("k")
        else:
            draft.write("k", after)
        with pytest.raises(ConflictError, match="was changed at 'k'"):
            list(draft.pieces("k", value))


def test_small_values_share_blobs_and_large_ones_have_their_own(repository):
    draft = DraftStore(repository.root, "run")
    for number in range(40):
        draft._draft.write(f"small/{number:02}", bytes([number]) * 5000)
    draft._draft.write("big", BIG)
    draft._draft.write("empty", b"")
    manifest = repository.manifest(draft.publish(repository, "run", LAB).digest)
    version = VersionStore(repository, draft.publish(repository, "run", LAB).digest)

    assert len(manifest.blobs()) == 3 + 3
    assert version.get_sync("small/07").to_bytes() == b"\x07" * 5000
    assert version.get_sync("big").to_bytes() == BIG
    assert version.get_sync("empty").to_bytes() == b""


def test_listing_a_folder_does_not_walk_what_is_below_it(draft):
    for key in ("a", "a-b/x", "a/x", "a/y/1", "a/y/2", "a0/z", "ä/x"):
        draft._draft.write(key, b"")
    queries = []
    select = draft._draft._select
    draft._draft._select = lambda *arguments: queries.append(arguments) or select(*arguments)

    assert sorted(draft._draft.children("")) == ["a", "a-b", "a0", "ä"]
    assert sorted(draft._draft.children("a")) == ["x", "y"]
    assert len(queries) <= 10
    assert list(draft._draft.keys("a/y/")) == ["a/y/1", "a/y/2"]
    draft._draft.delete_under("a/")
    assert list(draft._draft.keys()) == ["a", "a-b/x", "a0/z", "ä/x"]


def test_a_discarded_draft_is_gone_and_its_name_free(draft):
    draft._draft.write("big", BIG)
    other = DraftStore(draft._draft.root, "run")
    assert other == draft
    assert hash(other) == hash(draft)
    assert DraftStore(draft._draft.root, "other") != draft
    draft.discard()
    assert not draft._draft.folder.exists()
    assert keys_of(DraftStore(draft._draft.root, "run")) == []
    with pytest.raises(ValueError, match="read-only"):
        DraftStore(draft._draft.root, "run", read_only=True).discard()
