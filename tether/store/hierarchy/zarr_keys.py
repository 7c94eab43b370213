"""Pure: a version as a zarr v3 hierarchy: which keys it has, where the bytes of each lie. Chunk keys are computed, not listed at open."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from tether.store.format.layout import DTYPES, FILES, KEYS, TENSORS, chunk_shape, node_name
from tether.store.format.manifest import ArrayEntry, Manifest
from tether.store.format.weights import tensor_name

__all__ = ["ATTRIBUTE", "DOCUMENT", "Chunk", "VersionKeys", "consolidated", "node_of", "with_attribute"]

DOCUMENT = "zarr.json"
"""Last part of the key of each group's and array's description."""
ATTRIBUTE = "tether"
"""The attribute of the root group that says what the version is: one name, so that nothing of a user's own is hidden by ours."""
_INDEX = re.compile("0|[1-9][0-9]{0,18}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._:@+,()%/-]")
_CONSOLIDATED = 10_000
"""Arrays up to which the documents of a group are sent with its own: some megabytes; a reader of more opens them by name."""


class Chunk(NamedTuple):
    """A range of an array's bytes, which zarr wants to be `nbytes` long: the last chunk of an array is filled up with zeros."""

    array: ArrayEntry
    start: int
    stop: int
    nbytes: int


class _Grid(NamedTuple):
    shape: tuple[int, ...]
    """Of one chunk."""
    counts: tuple[int, ...]
    """Of chunks along each axis."""


class VersionKeys:
    """The keys of one version. One that was written as such (`keys/…` of the manifest) goes before what follows from a file or tensor."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._written: dict[str, ArrayEntry] = {}
        self._arrays: dict[str, ArrayEntry] = {}
        for array in manifest.arrays:
            if array.path.startswith(f"{KEYS}/"):
                self._written[array.path[len(KEYS) + 1 :]] = array
            else:
                self._arrays[node_of(array.path)] = array
        self._groups = set(_parents(self._arrays))

    def find(self, key: str) -> bytes | Chunk | None:
        """What the key holds; None: the version has no such key."""
        written = self._written.get(key)
        if written is not None:
            return Chunk(written, 0, written.nbytes, written.nbytes)
        node, _, name = key.rpartition("/")
        return self._document(node) if name == DOCUMENT else self._chunk(key)

    def __contains__(self, key: str) -> bool:
        node, _, name = key.rpartition("/")
        if key in self._written:
            return True
        return node in self._groups or node in self._arrays if name == DOCUMENT else self._chunk(key) is not None

    def is_group(self, node: str) -> bool:
        """Whether it holds files or tensors ("": the root)."""
        return node in self._groups

    def root(self) -> dict[str, Any]:
        """What the root's attribute says: framework, entry, info, attributes."""
        return {name: msgspec.to_builtins(getattr(self._manifest, name)) for name in ("framework", "entry", "info", "attributes")}

    def under(self, folder: str, prefix: str = "") -> Iterator[str]:
        """All keys below a folder ("": the root) whose next part begins with `prefix`; the time grows with their number only."""
        for name in self.children(folder):
            if name.startswith(prefix):
                path = f"{folder}/{name}" if folder else name
                if path in self:
                    yield path
                else:
                    yield from self.under(path)

    def children(self, folder: str) -> list[str]:
        """The parts that follow `folder/` in keys, each once."""
        found = dict(self._folders.get(folder, {}))
        array = self._arrays.get(folder)
        if array is not None:
            found |= dict.fromkeys([DOCUMENT, "c"] if _has_chunks(array) else [DOCUMENT])
        elif folder in self._groups:
            found[DOCUMENT] = None
        else:
            found |= dict.fromkeys(self._coordinates(folder))
        return list(found)

    def arrays(self, folder: str = "") -> Iterator[tuple[str, ArrayEntry]]:
        """The files and tensors below a folder, each with its zarr path."""
        inside = f"{folder}/" if folder else ""
        return ((node, array) for node, array in self._arrays.items() if node.startswith(inside))

    @cached_property
    def _folders(self) -> dict[str, dict[str, None]]:
        """Folder → its children, as far as they don't follow from a description; made when something is listed first."""
        folders: dict[str, dict[str, None]] = {}
        for path in (*self._arrays, *self._written):
            parent, _, name = path.rpartition("/")
            while name not in (inside := folders.setdefault(parent, {})):
                inside[name] = None
                if not parent:
                    break
                parent, _, name = parent.rpartition("/")
        return folders

    def _document(self, node: str) -> bytes | None:
        array = self._arrays.get(node)
        if array is not None:
            return _array_document(array, self._dimensions(node, len(array.shape)))
        if node in self._groups:
            return _group_document({} if node else {ATTRIBUTE: self.root()})
        return None

    def _dimensions(self, node: str, count: int) -> list[str]:
        """`<path in the group>_<axis>`: no two arrays of a group share one (xarray takes equal names for one axis), none is an array."""
        group, _, name = node.partition("/")
        names = [f"{name}_{axis}" for axis in range(count)]
        for axis in range(count):
            while f"{group}/{names[axis]}" in self._arrays:
                names[axis] += "_"
        return names

    def _chunk(self, key: str) -> Chunk | None:
        """An array's path is all before one of the `/c` in the key: no array lies in another, so at most one of them fits."""
        position = key.find("/c")
        while position >= 0:
            rest = key[position + 2 :]
            array = self._arrays.get(key[:position]) if rest[:1] in {"", "/"} else None
            if array is not None:
                return _piece(array, rest[1:].split("/") if rest else [])
            position = key.find("/c", position + 1)
        return None

    def _coordinates(self, folder: str) -> Iterable[str]:
        """The children of a folder inside of an array's `c`."""
        position = f"{folder}/".find("/c/")
        while position >= 0:
            array = self._arrays.get(folder[:position])
            if array is not None:
                return _next_indices(array, folder[position + 3 :].split("/") if folder[position + 3 :] else [])
            position = f"{folder}/".find("/c/", position + 1)
        return ()


def node_of(path: str) -> str:
    """The zarr path of a file or tensor: its own, with what zarr or a URL takes for something else as `=` and two hex digits for each byte.

    Not as `%…`, which some readers over HTTP escape once more (as they do `~`, `[` and others) and some don't: one that asks for the wrong
    path is told that the chunk is not there, and takes that for zeros. A tensor's path has `%…` already (weights.tensor_path).

    >>> node_of("files/100%?.txt"), node_of("tensors/dense%2Fkernel:0"), node_of("tensors/conv1.weight")
    ('files/100=25=3F.txt', 'tensors/dense=2Fkernel:0', 'tensors/conv1.weight')
    """
    named = path if path.startswith(f"{TENSORS}/") and f"/{DOCUMENT}" not in path else node_name(path)
    return _UNSAFE.sub(lambda found: "".join(f"={byte:02X}" for byte in found[0].encode()), named).replace("%", "=")


def with_attribute(document: bytes, root: Mapping[str, Any]) -> bytes:
    """The description of the root that a user wrote, with ours as one more attribute; as it is, if it is none or has that attribute."""
    try:
        described = json.loads(document)
    except (ValueError, RecursionError):
        return document
    if not isinstance(described, dict) or described.get("node_type") not in {"group", "array"} or described.get("zarr_format") != 3:  # noqa: PLR2004 (zarr's)
        return document
    attributes = described.get("attributes", {})
    if not isinstance(attributes, dict) or ATTRIBUTE in attributes:
        return document
    return json.dumps(described | {"attributes": attributes | {ATTRIBUTE: root}}).encode()


def consolidated(keys: VersionKeys, folder: str, document: bytes) -> bytes:
    """A group's description with those of all below it: for readers over HTTP, which can't list. As it is where they are too many.

    The form is zarr-python's (`consolidated_metadata`, kind inline), which other readers know too; it is no part of zarr's specification.
    """
    inside = f"{folder}/" if folder else ""
    nodes: dict[str, None] = {}
    for node, _ in keys.arrays(folder):
        nodes |= {path: None for path in (*_parents([node]), node) if path.startswith(inside) and path != folder}
        if len(nodes) > _CONSOLIDATED:
            return document
    metadata = {node[len(inside) :]: json.loads(found) for node in nodes if isinstance(found := keys.find(f"{node}/{DOCUMENT}"), bytes)}
    whole = {"kind": "inline", "must_understand": False, "metadata": metadata}
    return json.dumps(json.loads(document) | {"consolidated_metadata": whole}).encode()


def _parents(nodes: Iterable[str]) -> Iterator[str]:
    """Each group above these nodes at least once, the nearest first."""
    before = None
    for node in nodes:
        parent = node.rpartition("/")[0]
        if parent != before:
            before = parent
            yield parent
            while parent:
                parent = parent.rpartition("/")[0]
                yield parent


def _grid(array: ArrayEntry) -> _Grid:
    shape = chunk_shape(array.shape, DTYPES[array.dtype])
    return _Grid(shape, tuple(math.ceil(extent / chunk) for extent, chunk in zip(array.shape, shape, strict=True)))


def _has_chunks(array: ArrayEntry) -> bool:
    return 0 not in array.shape


def _piece(array: ArrayEntry, coordinates: list[str]) -> Chunk | None:
    """The chunk at these coordinates, as a key spells them; None: there is none."""
    shape, counts = _grid(array)
    if len(coordinates) != len(counts) or not all(map(_INDEX.fullmatch, coordinates)):
        return None
    numbers = [int(text) for text in coordinates]
    if any(number >= count for number, count in zip(numbers, counts, strict=True)):
        return None
    nbytes = DTYPES[array.dtype] * math.prod(shape)
    # all axes but the first are whole in a chunk (layout.chunk_shape)
    start = nbytes * numbers[0] if numbers else 0
    return Chunk(array, start, min(start + nbytes, array.nbytes), nbytes)


def _next_indices(array: ArrayEntry, coordinates: list[str]) -> Iterable[str]:
    counts = _grid(array).counts
    if 0 in counts or len(coordinates) >= len(counts) or not all(map(_INDEX.fullmatch, coordinates)):
        return ()
    if any(int(text) >= count for text, count in zip(coordinates, counts, strict=False)):
        return ()
    return map(str, range(counts[len(coordinates)]))


def _group_document(attributes: Mapping[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def _array_document(array: ArrayEntry, dimensions: list[str]) -> bytes:
    multiple = DTYPES[array.dtype] > 1
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": _grid(array).shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": _fill_value(array.dtype),
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}} if multiple else {"name": "bytes"}],
        "attributes": {"name": tensor_name(array)} if array.path.startswith(f"{TENSORS}/") else {"name": array.path[len(FILES) + 1 :]},
        "dimension_names": dimensions,
    }
    return json.dumps(document).encode()


def _fill_value(dtype: str) -> bool | int | float | list[float]:
    """Of the element type's own kind, as zarr asks; no reader ever sees it, since every chunk is there."""
    if dtype == "bool":
        return False
    if dtype.startswith("complex"):
        return [0.0, 0.0]
    return 0.0 if "float" in dtype else 0
