"""A checkout that is written while it comes tells who watches how far each file is: what it said is there is there, verified."""

import os
from contextlib import contextmanager

import pytest
from store_models import LAB, manifest_of, publish, seeded

from tether import store
from tether.errors import ChunkMissingError
from tether.store import Repository
from tether.store.replicas import streaming
from tether.store.replicas.fetching import FetchRules
from tether.store.replicas.replicated import Replicated
from tether.testing.blob_sources import MemoryBlobSource

QUICK = FetchRules(patience=0.1, give_up=0.6, rests=(0.01, 0.05), wary=5.0)


@contextmanager
def replica_of(origin, folder):
    with Repository.open(folder) as local, Replicated(local, [MemoryBlobSource.of(origin)], QUICK) as replica:
        yield replica


class Witness:
    """Compares what it is told with what lies there."""

    def __init__(self, files):
        self.files, self.folder, self.reached, self.told = files, None, dict.fromkeys(files, 0), []

    def begun(self, folder):
        assert {name: (folder / name).stat().st_size for name in self.files} == {name: len(data) for name, data in self.files.items()}
        self.folder = folder

    def grew(self, file, nbytes):
        assert nbytes > self.reached[file]
        assert (self.folder / file).read_bytes()[:nbytes] == self.files[file][:nbytes]
        self.reached[file] = nbytes
        self.told.append(file)


@pytest.fixture
def origin(tmp_path):
    with Repository.open(tmp_path / "origin", own=LAB.public) as repository:
        yield repository


def of_many_blobs(repository, files):
    """As published files are, but cut every 10,000 bytes."""
    arrays = []
    for name, data in files.items():
        segments = []
        for start in range(0, len(data), 10_000):
            part = data[start : start + 10_000]
            repository.put_blob(store.digest_of(part), part)
            segments.append(store.Segment(store.digest_of(part), 0, len(part)))
        arrays.append(store.ArrayEntry(f"files/{name}", "uint8", (len(data),), tuple(segments)))
    manifest = store.encode(
        store.Manifest(framework="onnx", entry="", info=store.decode(manifest_of(repository, files)).info, arrays=(*arrays,))
    )
    return repository.publish("net", manifest, LAB.public, LAB.sign(store.signed_message(manifest))).digest


def files():
    """One has the same bytes twice, with others between them; one begins as that one ends; one is empty."""
    chance = seeded(17)
    twice, between = chance.randbytes(10_000), chance.randbytes(30_000)
    return {
        "a/large": twice + between + twice + chance.randbytes(5),
        "b/middle": twice + chance.randbytes(25_000),
        "c/small": b"x" * 70,
        "d": b"",
    }


def test_files_grow_from_their_beginning_and_never_shrink(origin, tmp_path):
    wanted = files()
    digest, witness = of_many_blobs(origin, wanted), Witness(files())
    with replica_of(origin, tmp_path / "local") as replica:
        folder = replica.checkout(digest, "net", watcher=witness)
    assert witness.reached == {name: len(data) for name, data in wanted.items()}
    assert not witness.folder.exists()
    assert all((folder / name).read_bytes() == data for name, data in wanted.items())


def test_the_smallest_files_come_first(origin, tmp_path):
    digest, witness = of_many_blobs(origin, files()), Witness(files())
    with replica_of(origin, tmp_path / "local") as replica:
        replica.checkout(digest, "net", watcher=witness)
    finished = {name: index for index, name in enumerate(witness.told)}
    assert sorted(finished, key=finished.get) == ["c/small", "b/middle", "a/large"]
    assert witness.told.count("a/large") > 2


def test_blobs_that_no_file_needs_come_last(origin):
    manifest = store.decode(manifest_of(origin, {"a": b"1" * 50, "b": b"2"}))
    wanted = streaming.wanted_of(manifest)
    other = streaming.Wanted("f" * 64, 5, "tensors/x")
    assert [each.path for each in streaming.smallest_first(manifest, [other, *wanted])] == ["files/b", "files/a", "tensors/x"]


def test_what_is_here_already_is_checked_out_without_a_word(origin, tmp_path):
    digest = publish(origin, 3).digest
    with replica_of(origin, tmp_path / "local") as replica:
        replica.replicate(digest, "digits")
        replica.checkout(digest, watcher=(witness := Witness({})))
    assert witness.folder is None


def test_one_that_fails_leaves_no_folder_behind(origin, tmp_path):
    digest, witness = of_many_blobs(origin, files()), Witness(files())
    source = MemoryBlobSource.of(origin)
    del source.blobs[origin.manifest(digest).blobs()[-1]]
    with Repository.open(tmp_path / "local") as local, Replicated(local, [source], QUICK) as replica:
        with pytest.raises(ChunkMissingError):
            replica.checkout(digest, "net", watcher=witness)
        assert witness.folder is not None
        assert not os.path.lexists(witness.folder)
