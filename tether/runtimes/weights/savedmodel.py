"""TensorFlow's SavedModel: variables lie in place in `variables.data-…`, told by `variables.index`; large constants in `saved_model.pb`.

The index is a table of LevelDB's format (table_format.md of LevelDB: blocks of keys with shared prefixes, a block of blocks, a footer),
uncompressed, its values `BundleEntryProto` (tensorflow/core/protobuf/tensor_bundle.proto). The names that people know are in the entry
`_CHECKPOINTABLE_OBJECT_GRAPH`, a `TrackableObjectGraph`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tether.errors import BadModelError, HostileModelError
from tether.runtimes import protobuf
from tether.runtimes.protobuf import Source
from tether.runtimes.weights import savedmodel_graph
from tether.runtimes.weights.limits import MAX_METADATA_NBYTES, MAX_TENSORS, checked
from tether.runtimes.weights.savedmodel_nodes import TF_DTYPES, check_plain_file, parts, shape_of, signed
from tether.runtimes.weights.sinks import Sink
from tether.types import StoredTensor

__all__ = ["Bundle", "bundle", "check", "index"]

check = savedmodel_graph.check

_INDEX = "variables/variables.index"
_FOOTER_NBYTES = 48
_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_TRAILER_NBYTES = 5
"""Behind each block: how it is compressed, and a checksum."""
_MAX_SHARDS = 10_000
_MAX_ENTRIES = 4 * MAX_TENSORS
"""Strings, slices and optimizer state among them are no tensors of ours."""
_GRAPH = b"_CHECKPOINTABLE_OBJECT_GRAPH"
_OBJECT_GRAPH = "the object graph of the SavedModel"
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_STRING = 7


class _Entry(NamedTuple):
    """A `BundleEntryProto`."""

    key: bytes
    dtype: int
    shape: tuple[int, ...] | None
    """None: not known, or more axes than any tensor has."""
    shard: int
    offset: int
    nbytes: int
    crc: bytes
    sliced: bool
    """A partitioned variable: its parts are entries of their own."""


class Bundle(NamedTuple):
    """What `variables/` holds, by the keys of the checkpoint."""

    tensors: dict[str, StoredTensor]
    graph: StoredTensor | None
    """The `TrackableObjectGraph`, as a string tensor's bytes; None: TensorFlow 1 wrote it."""

    def object_graph(self, folder: Path) -> bytes:
        """The serialized graph, once its bytes are there. Raises: BadModelError: there is none, or it is damaged."""
        if self.graph is None:
            raise BadModelError("the SavedModel has no object graph: save it again with TensorFlow 2")
        with (folder / self.graph.file).open("rb") as file:
            file.seek(self.graph.offset)
            return _string(file.read(self.graph.nbytes))


def bundle(folder: Path) -> Bundle:
    """Reads `variables.index` alone: data files need to have their size, not yet their bytes. Strings and variables in parts are left out.

    Raises: BadModelError: damaged, or a tensor that is not in its file; HostileModelError: links, overlaps.
    """
    check_plain_file(folder, _INDEX)
    shards, entries = _bundle(folder / _INDEX)
    tensors = checked(_plain(folder, shards, entries), lambda name: (folder / name).stat().st_size)
    graph = _graph_entry(shards, entries)
    if graph is None:
        return Bundle({tensor.name: tensor for tensor in tensors}, None)
    found = StoredTensor(_GRAPH.decode(), "uint8", (graph.nbytes,), _shard(folder, graph.shard, shards), graph.offset, graph.nbytes)
    return Bundle({tensor.name: tensor for tensor in tensors}, *checked([found], lambda name: (folder / name).stat().st_size))


def _plain(folder: Path, shards: int, entries: list[_Entry]) -> Iterator[StoredTensor]:
    for entry in entries:
        dtype = TF_DTYPES.get(entry.dtype)
        if dtype is None or entry.sliced or entry.shape is None or not 0 <= entry.shard < shards or entry.key.startswith(b"\0"):
            continue
        key = entry.key.decode("utf-8", "replace")
        yield StoredTensor(key, dtype, entry.shape, _shard(folder, entry.shard, shards), entry.offset, entry.nbytes)


def index(path: Path, name: str, sink: Sink) -> Iterator[StoredTensor]:
    """Variables by their names (`dense/kernel`), where two share one by their checkpoint keys; constants of 1 KiB or more by their nodes'.

    `name` is `""`: files are relative to the folder. Strings, and constants that are not stored as plain bytes, are left out.

    Raises: BadModelError: damaged, compressed, big-endian; HostileModelError: operations on files, links.
    """
    del sink  # everything that TensorFlow writes lies in place
    taken = set()
    for tensor in _variables(path, name):
        taken.add(tensor.name)
        yield tensor
    for tensor in savedmodel_graph.constants(path, name):
        if tensor.name not in taken:
            taken.add(tensor.name)
            yield tensor


def _variables(folder: Path, prefix: str) -> Iterator[StoredTensor]:
    file = folder / _INDEX
    if not file.exists():
        return
    check_plain_file(folder, _INDEX)
    shards, entries = _bundle(file)
    names = _names(folder, shards, entries)
    for entry in entries:
        dtype = TF_DTYPES.get(entry.dtype)
        key = entry.key.decode("utf-8", "replace")
        if dtype is None or entry.sliced or entry.key.startswith(b"\0"):
            continue
        if entry.shape is None or entry.shard >= shards:
            raise BadModelError(f"variable {key[:200]!r} has no shape, or lies in a file that is not there: save the model again")
        yield StoredTensor(names[entry.key], dtype, entry.shape, prefix + _shard(folder, entry.shard, shards), entry.offset, entry.nbytes)


def _shard(folder: Path, number: int, count: int) -> str:
    name = f"variables/variables.data-{number:05d}-of-{count:05d}"
    check_plain_file(folder, name)
    return name


def _bundle(file: Path) -> tuple[int, list[_Entry]]:
    """How many data files there are, and what is in them."""
    if file.stat().st_size > MAX_METADATA_NBYTES:
        raise HostileModelError(f"{_INDEX} has more than {MAX_METADATA_NBYTES} bytes, more than any index of {MAX_TENSORS} tensors")
    shards = 1
    entries: list[_Entry] = []
    for key, value in _table(file.read_bytes()):
        source = Source(_INDEX, value)
        if not key:
            shards = _header(source)
        elif len(entries) == _MAX_ENTRIES:
            raise HostileModelError(f"{_INDEX} has more than {_MAX_ENTRIES} entries")
        else:
            entries.append(_entry(key, source))
    return shards, entries


def _header(source: Source) -> int:
    shards = 1
    for field in parts(source, 0, source.nbytes):
        if field.number == 1:
            shards = field.value
        elif field.number == 2 and field.value:  # noqa: PLR2004 (endianness)
            raise BadModelError(f"{_INDEX} was written on a big-endian machine: load and save it on a little-endian one")
    if not 0 <= shards <= _MAX_SHARDS:
        raise HostileModelError(f"{_INDEX} claims {shards} data files")
    return shards


def _entry(key: bytes, source: Source) -> _Entry:
    numbers = dict.fromkeys((1, 3, 4, 5), 0)
    shape: tuple[int, ...] | None = ()
    crc = b""
    sliced = False
    for field in parts(source, 0, source.nbytes):
        if field.wire_type == protobuf.VARINT and field.number in numbers:
            numbers[field.number] = signed(field.value)
        elif field.wire_type == protobuf.BYTES and field.number == 2:  # noqa: PLR2004 (shape)
            shape = shape_of(source, field)
        elif field.number == 6 and field.wire_type == protobuf.FIXED32:  # noqa: PLR2004 (checksum)
            crc = source.read(field.value, field.end)
        elif field.number == 7:  # noqa: PLR2004 (slices)
            sliced = True
    return _Entry(key, numbers[1], shape, numbers[3], numbers[4], numbers[5], crc, sliced)


# --- the table


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table, in order. Raises: BadModelError: it is none."""
    try:
        if data[-8:] != _MAGIC or len(data) < _FOOTER_NBYTES:
            raise IndexError
        footer = data[-_FOOTER_NBYTES:]
        _, at = _handle(footer, 0)
        where, _ = _handle(footer, at)
        end = 0
        for _, handle in _block(data, *where):
            (offset, nbytes), _ = _handle(handle, 0)
            if offset < end:
                raise IndexError  # blocks follow each other; one that is named again would be read again and again
            end = offset + nbytes
            yield from _block(data, offset, nbytes)
    except IndexError:
        raise BadModelError(f"{_INDEX} is damaged or cut off: save the model again") from None


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and where they end."""
    offset, at = protobuf.varint(data, at)
    nbytes, at = protobuf.varint(data, at)
    return (offset, nbytes), at


def _block(data: bytes, offset: int, nbytes: int) -> Iterator[tuple[bytes, bytes]]:
    end = offset + nbytes
    if end + _TRAILER_NBYTES > len(data) or nbytes < 4:  # noqa: PLR2004 (the number of restarts)
        raise IndexError
    if data[end]:
        raise BadModelError(f"{_INDEX} is compressed, which TensorFlow does not do: save the model again")
    end -= 4 + 4 * int.from_bytes(data[end - 4 : end], "little")
    key = b""
    at = offset
    while at < end:
        shared, at = protobuf.varint(data, at)
        added, at = protobuf.varint(data, at)
        length, at = protobuf.varint(data, at)
        if shared > len(key) or at + added + length > end:
            raise IndexError
        if shared + added > MAX_METADATA_NBYTES // MAX_TENSORS * 16:
            raise HostileModelError(f"{_INDEX} has a key of {shared + added} bytes")
        key = key[:shared] + data[at : at + added]
        at += added + length
        yield key, data[at - length : at]


# --- names


def _names(folder: Path, shards: int, entries: list[_Entry]) -> dict[bytes, str]:
    """Key → name. The variable's own name if it is its alone; of copies of one variable (Keras lists each twice) the first has it."""
    known = _full_names(folder, shards, entries)
    by_name: dict[str, list[_Entry]] = defaultdict(list)
    names = {entry.key: entry.key.decode("utf-8", "replace").removesuffix(_SUFFIX) for entry in entries}
    for entry in entries:
        full = known.get(entry.key)
        if full:
            by_name[full].append(entry)
    others = set(names.values())
    for full, group in by_name.items():
        if len({(entry.dtype, entry.shape, entry.crc) for entry in group}) == 1 and (full not in others or names[group[0].key] == full):
            names[group[0].key] = full
    return names


def _full_names(folder: Path, shards: int, entries: list[_Entry]) -> dict[bytes, str]:
    """Checkpoint key → the name of the variable, from the object graph; none where there is no such entry (TensorFlow 1)."""
    entry = _graph_entry(shards, entries)
    if entry is None:
        return {}
    with (folder / _shard(folder, entry.shard, shards)).open("rb") as file:
        file.seek(entry.offset)
        source = Source(_OBJECT_GRAPH, _string(file.read(entry.nbytes)))
    return _attributes(source, 0, source.nbytes)


def _graph_entry(shards: int, entries: list[_Entry]) -> _Entry | None:
    entry = next((entry for entry in entries if entry.key == _GRAPH and entry.dtype == _STRING), None)
    if entry is None or not 0 <= entry.shard < shards or not 0 < entry.nbytes <= MAX_METADATA_NBYTES or entry.offset < 0:
        return None
    return entry


def _string(data: bytes) -> bytes:
    """The one string of a string tensor: its length, a checksum of that, itself. Raises: BadModelError: it is cut off."""
    try:
        length, at = protobuf.varint(data, 0)
    except IndexError:
        raise Source(_OBJECT_GRAPH, data).garbled() from None
    at += 4  # the checksum of the length
    if at + length > len(data):
        raise Source(_OBJECT_GRAPH, data).garbled()
    return data[at : at + length]


def _attributes(source: Source, start: int, end: int) -> dict[bytes, str]:
    names: dict[bytes, str] = {}
    for node in parts(source, start, end):
        if node.number != 1 or node.wire_type != protobuf.BYTES:
            continue
        for attribute in parts(source, node.value, node.end):
            if attribute.number != 2 or attribute.wire_type != protobuf.BYTES:  # noqa: PLR2004 (SerializedTensor)
                continue
            texts = {
                field.number: source.read(field.value, field.end)
                for field in parts(source, attribute.value, attribute.end)
                if field.wire_type == protobuf.BYTES
            }
            names[texts.get(3, b"")] = texts.get(2, b"").decode("utf-8", "replace")
    return names
