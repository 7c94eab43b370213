"""Tensors as arrays over the blobs of their files: what is shared, what is named, what is refused."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_models import seeded

from tether.errors import BadModelError
from tether.store.format.layout import Piece, cut, path_problem, slices
from tether.store.format.manifest import ArrayEntry, Segment, digest_of
from tether.store.format.weights import MAX_TENSORS, tensor_arrays, tensor_name, tensor_path
from tether.types import StoredTensor

KIB = 1024


def cut_up(name, data, tensors=(), step=256 * KIB):
    """The file's array and its blobs."""
    pieces = [data[piece.offset : piece.offset + piece.nbytes] for piece in cut(len(data), tensors, step)]
    segments = tuple(Segment(digest_of(piece), 0, len(piece)) for piece in pieces)
    return ArrayEntry(f"files/{name}", "uint8", (len(data),), segments), dict(zip((s.digest for s in segments), pieces, strict=True))


def read(array, blobs):
    return b"".join(blobs[part.digest][part.offset : part.offset + part.nbytes] for part in array.segments)


def model_file(seed, header, sizes):
    """A file of tensors of these sizes behind a header, as safetensors has it."""
    tensors, offset = [], header
    for size in sizes:
        tensors.append(Piece(offset, size))
        offset += size
    return seeded(seed).randbytes(offset), tensors


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 200_000)), max_size=12), st.integers(0, 9000), st.integers(1, 100_000))
def test_any_cut_is_the_file_and_large_tensors_begin_and_end_pieces(gaps, tail, step):
    tensors, offset = [], 0
    for gap, size in gaps:
        tensors.append(Piece(offset + gap, size))
        offset += gap + size

    pieces = list(cut(offset + tail, tensors, step))

    assert all(one.offset + one.nbytes == two.offset for one, two in pairwise(pieces))
    assert sum(piece.nbytes for piece in pieces) == offset + tail
    assert all(0 < piece.nbytes <= step for piece in pieces)
    edges = {piece.offset for piece in pieces} | {offset + tail}
    for tensor in tensors:
        if tensor.nbytes >= 64 * KIB:
            assert {tensor.offset, tensor.offset + tensor.nbytes} <= edges


@given(st.lists(st.tuples(st.integers(-10, 2000), st.integers(-10, 2000)), max_size=12), st.integers(0, 3000))
def test_nonsense_about_tensors_still_gives_a_cut_of_the_file(tensors, nbytes):
    pieces = list(cut(nbytes, [Piece(*tensor) for tensor in tensors]))

    assert sum(piece.nbytes for piece in pieces) == nbytes
    assert all(one.offset + one.nbytes == two.offset for one, two in pairwise(pieces))


def test_a_grown_header_changes_no_blob_of_the_tensors():
    sizes = [300_000, 2_000, 70_000, 500, 500, 1_000_000, 100]
    data, tensors = model_file(1, 8_000, sizes)
    grown = b"h" * 8_064 + data[8_000:]

    before = {segment.digest for segment in cut_up("m", data, tensors)[0].segments}
    after = {segment.digest for segment in cut_up("m", grown, [Piece(o + 64, n) for o, n in tensors])[0].segments}

    assert len(after - before) == 1


def test_small_tensors_share_blobs():
    data, tensors = model_file(2, 8_000, [4 * KIB] * 5_000)

    pieces = list(cut(len(data), tensors))

    assert 200 < len(pieces) < 400
    assert max(piece.nbytes for piece in pieces) < 128 * KIB


def test_arrays_are_the_bytes_of_their_tensors_and_name_blobs_of_the_file():
    data, places = model_file(3, 999, [300_000, 2_000, 0, 70_000, 500])
    file, blobs = cut_up("w.bin", data, places)
    tensors = [StoredTensor(f"t{n}", "uint8", (place.nbytes,), "w.bin", *place) for n, place in enumerate(places)]

    arrays = tensor_arrays([file], tensors)

    assert [read(array, blobs) for array in arrays] == [data[place.offset : place.offset + place.nbytes] for place in places]
    assert [tensor_name(array) for array in arrays] == ["t0", "t1", "t2", "t3", "t4"]


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 700))
def test_any_range_of_a_file_however_it_was_cut(start, length, step):
    data = seeded(4).randbytes(3000)
    length = min(length, len(data) - start)
    file, blobs = cut_up("w.bin", data, step=step)

    (array,) = tensor_arrays([file], [StoredTensor("t", "uint8", (length,), "w.bin", start, length)])

    assert read(array, blobs) == data[start : start + length]
    assert all(segment.nbytes for segment in array.segments)


@given(st.lists(st.text(max_size=300), unique=True, max_size=6))
def test_each_name_has_a_path_of_its_own_and_comes_back(names):
    file = ArrayEntry("files/w", "uint8", (0,), ())

    arrays = tensor_arrays([file], [StoredTensor(name, "float32", (0,), "w", 0, 0) for name in names])

    assert {tensor_name(array) for array in arrays} == set(names)
    for array in arrays:
        assert path_problem(array.path) is None
        assert array.path.count("/") == 1


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a\0b", "line\nbreak", "<script>alert(1)</script>", "zarr.json", ".", "..", "", "é" * 200, "/x/y"]
)
def test_hostile_names_are_only_names(name):
    part = tensor_path(name).removeprefix("tensors/")

    assert "/" not in part
    assert path_problem(f"tensors/{part}") is None
    assert part not in {"zarr.json", "zarr%2Ejson"} or name == "zarr.json"


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (StoredTensor("t", "float32", (3,), "w", 0, 11), "11 bytes"),
        (StoredTensor("t", "float32", (3,), "w", 96, 12), "cut off"),
        (StoredTensor("t", "float32", (3,), "w", -4, 12), "cut off"),
        (StoredTensor("t", "float32", (3,), "v", 0, 12), "not one of"),
        (StoredTensor("t", "object", (3,), "w", 0, 12), "object"),
        (StoredTensor("t", "uint8", (-3, -4), "w", 0, 12), "12 bytes"),
        (StoredTensor("\ud800", "uint8", (1,), "w", 0, 1), "Unicode"),
        (StoredTensor("t" * 5000, "uint8", (1,), "w", 0, 1), "5000 characters"),
    ],
)
def test_what_can_not_be_is_refused(tensor, said):
    file = ArrayEntry("files/w", "uint8", (100,), (Segment("ab" * 32, 0, 100),))

    with pytest.raises(BadModelError, match=said):
        tensor_arrays([file], [tensor])


def test_two_of_one_name_and_a_million_tensors_are_refused():
    file = ArrayEntry("files/w", "uint8", (100,), (Segment("ab" * 32, 0, 100),))
    tensor = StoredTensor("t", "uint8", (1,), "w", 0, 1)

    with pytest.raises(BadModelError, match="two tensors"):
        tensor_arrays([file], [tensor, tensor])
    with pytest.raises(BadModelError, match="at most"):
        tensor_arrays([file], [tensor] * (MAX_TENSORS + 1))


def test_tied_weights_are_taken_and_tensors_that_all_overlap_are_refused():
    """A few lines of a hostile file's header must not ask for gigabytes of ranges."""
    count = 2_000
    file = ArrayEntry("files/w", "uint8", (count,), tuple(Segment(f"{number:064x}", 0, 1) for number in range(count)))

    def over_all(copies):
        return [StoredTensor(f"t{number}", "uint8", (count,), "w", 0, count) for number in range(copies)]

    assert len(tensor_arrays([file], over_all(2))) == 2
    with pytest.raises(BadModelError, match="overlap"):
        tensor_arrays([file], over_all(600))


def test_slices_agree_with_the_cut():
    assert list(slices([4, 4], 4, 8)) == [(1, Piece(0, 4))]
