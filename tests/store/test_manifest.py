import json
import string
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_models import INFO

from tether.errors import MalformedManifestError
from tether.store.format.layout import BLOB_NBYTES, chunk_shape, cut, node_name, path_problem, slices
from tether.store.format.manifest import MAX_NBYTES, ArrayEntry, Manifest, Segment, decode, digest_of, encode

DIGEST = "ab" * 32
digests = st.binary(min_size=1, max_size=4).map(digest_of)
segments = st.builds(Segment, digests, st.integers(0, 1000), st.integers(1, 1000))
names = st.text(string.ascii_letters + string.digits + "._-é ", min_size=1, max_size=8).filter(lambda text: text not in {".", ".."})
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def arrays(draw):
    parts = tuple(draw(st.lists(segments, max_size=4)))
    return ArrayEntry(f"files/{draw(names)}", "uint8", (sum(part.nbytes for part in parts),), parts)


@st.composite
def manifests(draw):
    entries = draw(st.lists(arrays(), min_size=1, max_size=4, unique_by=lambda array: array.path))
    attributes = draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3))
    entry = draw(st.sampled_from(["", entries[0].path.removeprefix("files/")]))
    return Manifest(framework="onnx", entry=entry, info=INFO, arrays=tuple(entries), attributes=attributes)


def a_file(path="files/m.onnx", nbytes=3, **changes):
    return msgspec.structs.replace(ArrayEntry(path, "uint8", (nbytes,), (Segment(DIGEST, 0, nbytes),)), **changes)


def a_manifest(*entries, **changes):
    return msgspec.structs.replace(Manifest(framework="onnx", entry="", info=INFO, arrays=entries or (a_file(),)), **changes)


@given(st.integers(0, 10_000), st.integers(1, 500))
def test_pieces_cover_a_file_without_gap_or_overlap(nbytes, step):
    pieces = list(cut(nbytes, step=step))

    assert sum(piece.nbytes for piece in pieces) == nbytes
    assert [piece.offset for piece in pieces] == list(range(0, nbytes, step))
    assert all(piece.nbytes == step for piece in pieces[:-1])


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=8), st.integers(0, 80), st.integers(0, 80))
def test_slices_of_segments_are_the_slice_of_the_whole(parts, start, stop):
    found = slices([len(part) for part in parts], start, stop)

    assert b"".join(parts[index][piece.offset : piece.offset + piece.nbytes] for index, piece in found) == b"".join(parts)[start:stop]


@given(st.lists(st.integers(1, 5_000), max_size=4), st.sampled_from([1, 2, 4, 8]))
def test_chunks_hold_whole_rows_and_at_most_a_blob_where_a_row_fits(shape, itemsize):
    chunks = chunk_shape(shape, itemsize)

    assert chunks[1:] == tuple(shape[1:])
    row = itemsize
    for extent in shape[1:]:
        row *= extent
    assert not shape or 1 <= chunks[0] <= shape[0]
    assert not shape or chunks[0] * row <= max(BLOB_NBYTES, row)


@given(manifests())
def test_a_manifest_survives_encoding_and_the_order_of_arrays_does_not_matter(manifest):
    data = encode(manifest)

    assert encode(decode(data)) == data
    assert encode(msgspec.structs.replace(manifest, arrays=manifest.arrays[::-1])) == data
    assert set(decode(data).arrays) == set(manifest.arrays)
    assert decode(data).attributes == manifest.attributes


@given(manifests(), st.data())
def test_mutated_bytes_are_another_manifest_or_malformed_and_nothing_else(manifest, data):
    encoded = bytearray(encode(manifest))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(encoded) - 1))
        match data.draw(st.sampled_from(["flip", "delete", "insert", "cut"])):
            case "flip":
                encoded[where] = data.draw(st.integers(0, 255))
            case "delete":
                del encoded[where : where + 3]
            case "insert":
                encoded[where:where] = data.draw(st.sampled_from([b"\0", b"[" * 50, b"-", b"9" * 30, b'"a":1,', b"\xff", b"1e999"]))
            case _:
                del encoded[where:]
        if not encoded:
            break

    try:
        decoded = decode(bytes(encoded))
    except MalformedManifestError:
        return
    assert encode(decoded) == bytes(encoded)


@given(st.binary(max_size=60))
def test_noise_is_malformed(data):
    with pytest.raises(MalformedManifestError):
        decode(data)


BROKEN = {
    "no arrays": {"arrays": ()},
    "a path with ..": {"arrays": (a_file("files/../x"),)},
    "an absolute path": {"arrays": (a_file("/files/x"),)},
    "an absolute path below files": {"arrays": (a_file("files//x"),)},
    "a NUL": {"arrays": (a_file("files/a\0b"),)},
    "a newline": {"arrays": (a_file("files/a\nb"),)},
    "a backslash": {"arrays": (a_file("files/a\\b"),)},
    "a path outside of the groups": {"arrays": (a_file("other/x"),)},
    "a group as array": {"arrays": (a_file("files"),)},
    "a path that is too long": {"arrays": (a_file("files/" + "a/" * 600 + "a"),)},
    "a name that is too long": {"arrays": (a_file("files/" + "é" * 128),)},
    "a lone surrogate": {"arrays": (a_file("files/\udc80"),)},
    "a path given twice": {"arrays": (a_file(), a_file())},
    "a file that is also a folder": {"arrays": (a_file("files/a"), a_file("files/a-b"), a_file("files/a/b"))},
    "a negative size": {"arrays": (a_file(shape=(-3,)),)},
    "a negative segment": {"arrays": (a_file(segments=(Segment(DIGEST, 0, 6), Segment(DIGEST, 0, -3))),)},
    "a negative offset": {"arrays": (a_file(segments=(Segment(DIGEST, -1, 3),)),)},
    "an empty segment": {"arrays": (a_file(segments=(Segment(DIGEST, 0, 3), Segment(DIGEST, 0, 0))),)},
    "a segment over the end of any blob": {"arrays": (a_file(segments=(Segment(DIGEST, BLOB_NBYTES, 3),)),)},
    "segments that do not add up": {"arrays": (a_file(shape=(4,)),)},
    "a huge shape": {"arrays": (a_file(shape=(1 << 70,)),)},
    "an overflowing shape": {"arrays": (a_file("tensors/x", shape=(1 << 40,) * 30),)},
    "a file of floats": {"arrays": (a_file(dtype="float32", shape=(1,), segments=(Segment(DIGEST, 0, 4),)),)},
    "a file of two dimensions": {"arrays": (a_file(shape=(1, 3)),)},
    "an unknown dtype": {"arrays": (a_file("tensors/x", dtype="object"),)},
    "a digest in capitals": {"arrays": (a_file(segments=(Segment("AB" * 32, 0, 3),)),)},
    "a digest and a newline": {"arrays": (a_file(segments=(Segment(DIGEST + "\n", 0, 3),)),)},
    "an entry that is not there": {"entry": "other.onnx"},
    "an entry with ..": {"entry": "../m.onnx"},
    "another framework than info": {"framework": "torch"},
    "a NaN": {"attributes": {"x": float("nan")}},
    "an object": {"attributes": {"x": object()}},
    "bytes": {"attributes": {"x": b"1"}},
    "a huge integer": {"attributes": {"x": 1 << 64}},
    "deep nesting": {"attributes": {"x": json.loads("[" * 40 + "]" * 40)}},
    "a key that is no text": {"attributes": {"x": {1: 2}}},
    "an unknown format": {"format": 2},
}


@pytest.mark.parametrize("rule", BROKEN)
def test_encode_refuses(rule):
    with pytest.raises(MalformedManifestError):
        encode(a_manifest(**BROKEN[rule]))


@pytest.mark.parametrize(
    "rule", [rule for rule in BROKEN if rule not in {"a NaN", "an object", "bytes", "a key that is no text", "a lone surrogate"}]
)
def test_decode_refuses(rule):
    data = msgspec.json.encode(a_manifest(**BROKEN[rule]), order="sorted")

    with pytest.raises(MalformedManifestError):
        decode(data)


def test_decode_refuses_other_spellings_of_the_same_manifest():
    data = encode(a_manifest())

    for other in (
        b" " + data,
        data + b"\n",
        data.replace(b'"entry"', b'"\\u0065ntry"'),
        data.replace(b'"format":1', b'"format":1,"format":1'),
    ):
        with pytest.raises(MalformedManifestError):
            decode(other)


def test_a_newer_format_is_refused_with_both_numbers():
    data = encode(a_manifest()).replace(b'"format":1', b'"format":7,"new":2')

    with pytest.raises(MalformedManifestError, match=r"format 7.*understands 1"):
        decode(data)


def test_a_manifest_is_bounded_before_it_is_parsed():
    with pytest.raises(MalformedManifestError, match="at most"):
        decode(b" " * (MAX_NBYTES + 1))


@pytest.mark.parametrize("spelling", ['{"x":[%s]}', '{"x":[%s]},"attributes":{}', "[%s]"])
def test_attributes_are_bounded_before_they_become_objects(spelling):
    """Also where JSON gives them twice, of which the last counts."""
    data = encode(a_manifest(attributes={"x": 0}))
    lists = ",".join(["[]"] * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedManifestError):
            decode(data.replace(b'{"x":0}', (spelling % lists).encode()))
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    with pytest.raises(MalformedManifestError, match="keep what is longer in a file"):
        encode(a_manifest(attributes={"x": "x" * (1 << 20)}))


def test_the_same_bytes_have_the_same_digest_for_ever():
    assert digest_of(encode(a_manifest())) == "75206563b233e0a0c30face82f34c1b114acbbcc89b37b7b7ba261ee7c589637"


@pytest.mark.parametrize("path", ["files/__init__.py", "files/.hidden", "files/a b", "files/...", "files/Ünï/x%41", "files/zarr.json"])
def test_ordinary_paths_are_allowed(path):
    assert path_problem(path) is None


@given(st.lists(st.sampled_from(["zarr.json", "zarr%2Ejson", "a", "%", "%25"]), min_size=1, max_size=3), st.data())
def test_zarr_names_of_different_paths_differ(parts, data):
    others = data.draw(st.lists(st.sampled_from(["zarr.json", "zarr%2Ejson", "a", "%", "%25"]), min_size=1, max_size=3))

    assert (node_name("/".join(parts)) == node_name("/".join(others))) == (parts == others)
    assert "zarr.json" not in node_name("/".join(parts)).split("/")
