"""From one version to another: what was added, removed, retyped, changed, and by how much."""

import math

import ml_dtypes
import numpy as np
import pytest
from store_models import INFO

from tether.store.format.diff import diff
from tether.store.format.layout import Piece, cut
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, digest_of
from tether.store.format.weights import tensor_arrays
from tether.types import StoredTensor


class Blobs(dict):
    """Versions in memory; counts what is read."""

    nbytes_read = 0

    def version(self, header=b"h" * 5000, **tensors):
        data, index = header, []
        for name, array in tensors.items():
            index.append(StoredTensor(name, str(array.dtype), array.shape, "w.bin", len(data), array.nbytes))
            data += array.tobytes()
        pieces = [data[piece.offset : piece.offset + piece.nbytes] for piece in cut(len(data), [Piece(t.offset, t.nbytes) for t in index])]
        self.update({digest_of(piece): piece for piece in pieces})
        file = ArrayEntry("files/w.bin", "uint8", (len(data),), tuple(Segment(digest_of(piece), 0, len(piece)) for piece in pieces))
        return Manifest(framework="onnx", entry="w.bin", info=INFO, arrays=(file, *tensor_arrays([file], index)))

    def read(self, array, start, stop):
        self.nbytes_read += stop - start
        return b"".join(self[part.digest][part.offset : part.offset + part.nbytes] for part in array.segments)[start:stop]


@pytest.fixture
def blobs():
    return Blobs()


def values(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_same_version_differs_in_nothing_and_nothing_is_read(blobs):
    one = blobs.version(a=values(1, 300, 300), b=values(2, 10))

    found = diff(one, one, blobs.read)

    assert (found.files, found.tensors, found.unchanged, found.new_nbytes) == ((), (), 2, 0)
    assert blobs.nbytes_read == 0


def test_a_fine_tune_names_the_layer_and_how_far_it_moved(blobs):
    head, body = values(1, 100, 200), values(2, 500, 400)
    tuned = head * np.float32(1.1)
    one, two = blobs.version(body=body, head=head), blobs.version(b"longer header" * 500, body=body, head=tuned)

    found = diff(one, two, blobs.read)

    (change,) = found.tensors
    assert (change.name, change.kind, change.before) == ("head", "changed", "float32[100, 200]")
    assert change.relative == pytest.approx(0.1, rel=1e-5)
    assert change.largest == pytest.approx(float(np.max(np.abs(tuned - head))), rel=1e-6)
    assert change.share == 1.0
    assert found.unchanged == 1
    assert found.shared_nbytes >= body.nbytes > found.new_nbytes
    assert blobs.nbytes_read == 2 * head.nbytes
    assert [file.name for file in found.files] == ["w.bin"]


def test_what_came_went_and_changed_its_type(blobs):
    one = blobs.version(a=values(1, 9), b=values(2, 9), c=values(3, 9))
    two = blobs.version(a=values(1, 9), b=values(2, 9).astype(np.float64), d=values(4, 9))

    found = diff(one, two, blobs.read)

    assert [(change.name, change.kind) for change in found.tensors] == [("b", "retyped"), ("c", "removed"), ("d", "added")]
    assert (found.tensors[0].before, found.tensors[0].after) == ("float32[9]", "float64[9]")
    assert found.unchanged == 1


def test_small_tensors_that_only_share_a_blob_with_a_changed_one_are_unchanged(blobs):
    one, two = blobs.version(a=values(1, 50), b=values(2, 50)), blobs.version(a=values(1, 50), b=values(3, 50))

    assert [change.name for change in diff(one, two, blobs.read).tensors] == ["b"]


@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "int8", "int64", "uint8", "bool", "complex64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_every_element_type_can_be_compared(blobs, dtype):
    before = np.array([0, 1, 1, 0], dtype)
    after = np.array([0, 1, 0, 0], dtype)

    (change,) = diff(blobs.version(t=before), blobs.version(t=after), blobs.read).tensors

    assert (change.relative, change.largest, change.share) == (pytest.approx(math.sqrt(0.5)), 1.0, 0.25)


def test_zero_before_nan_and_signs_of_zero(blobs):
    zero = blobs.version(t=np.zeros(4, np.float32))

    grown = diff(zero, blobs.version(t=np.ones(4, np.float32)), blobs.read).tensors[0]
    broken = diff(zero, blobs.version(t=np.array([0, 0, 0, np.nan], np.float32)), blobs.read).tensors[0]
    up, down = np.full(4, np.inf, np.float32), np.array([np.inf] * 3 + [-np.inf], np.float32)
    endless = diff(blobs.version(t=up), blobs.version(t=down), blobs.read).tensors[0]
    signed = diff(zero, blobs.version(t=-np.zeros(4, np.float32)), blobs.read).tensors[0]

    assert grown.relative == math.inf
    assert (broken.relative, broken.largest, broken.share) == (None, None, 0.25)
    assert (endless.relative, endless.share) == (None, 0.25)
    assert (signed.relative, signed.largest, signed.share) == (0.0, 0.0, 1.0)
