"""Pure: a version's tensors as arrays over the blobs of its files, under paths that every file system and zarr take."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from urllib.parse import quote, unquote

from blake3 import blake3

from tether.errors import BadModelError
from tether.store.format.layout import DTYPES, FILES, TENSORS
from tether.store.format.manifest import ArrayEntry, Segment
from tether.types import StoredTensor

__all__ = ["MAX_TENSORS", "Ranges", "tensor_arrays", "tensor_name", "tensor_path"]

MAX_TENSORS = 65_536
"""In one version: the largest models have a tenth of it, and every one is a line of the manifest and a zarr node."""
_MAX_SEGMENTS = 1 << 20
"""Of all of a version's tensors: a file's half a million, and as many again for tied weights. Tensors may overlap, so that few bytes ask
for many."""
_MAX_NAME = 4096
"""Characters."""
_MAX_PART = 255
"""Bytes of one part of a path, as file systems have it."""
_KEPT = 180
"""Of those for the beginning of a name that is too long; then come `~` and the start of its digest."""
_PUNCTUATION = " !#$&'()*+,:;<=>?@[]^`{|}"
"""What stands for itself in a path, besides letters, digits and `_.-~`."""
_plain = re.compile(rf"[\w~\-{re.escape(_PUNCTUATION)}][\w.~\-{re.escape(_PUNCTUATION)}]{{0,{_MAX_PART - 1}}}", re.ASCII).fullmatch
"""Whether a name is its own path: as nearly all are, but for one that begins with a dot."""


def tensor_arrays(files: Iterable[ArrayEntry], tensors: Sequence[StoredTensor]) -> list[ArrayEntry]:
    """One typed array for each tensor, naming the same bytes as the file that it lies in; sorted by path.

    Raises: BadModelError: too many, or overlapping too often; two of one name; an unknown element type; a range that the file or the shape
    does not have.
    """
    if len(tensors) > MAX_TENSORS:
        raise BadModelError(f"the model has {len(tensors)} tensors; at most {MAX_TENSORS} are taken: merge small ones")
    ranges = {array.path.removeprefix(f"{FILES}/"): Ranges(array) for array in files}
    arrays: dict[str, ArrayEntry] = {}
    count = 0
    for tensor in tensors:
        array = _array(tensor, ranges)
        count += len(array.segments)
        if count > _MAX_SEGMENTS:
            raise BadModelError(f"the model's tensors are over {_MAX_SEGMENTS} ranges of blobs: they overlap; name each weight once")
        if array.path in arrays:
            raise BadModelError(f"the model has two tensors of the name {tensor.name[:200]!r}: rename one")
        arrays[array.path] = array
    return [arrays[path] for path in sorted(arrays)]


def tensor_path(name: str) -> str:
    """Where in a version the tensor of this name lies; different names have different paths.

    >>> tensor_path("conv1.weight"), tensor_path("/encoder/kernel"), tensor_path("..")
    ('tensors/conv1.weight', 'tensors/%2Fencoder%2Fkernel', 'tensors/%2E%2E')
    """
    if name != "zarr.json" and _plain(name):
        return f"{TENSORS}/{name}"  # what follows takes ten times as long, for thousands of tensors
    part = quote(name, safe=_PUNCTUATION) or "%"
    if set(part) == {"."} or part == "zarr.json":
        part = part.replace(".", "%2E")
    if len(part) > _MAX_PART:
        part = f"{part[:_KEPT]}~{blake3(name.encode()).hexdigest()[:32]}"
    return f"{TENSORS}/{part}"


def tensor_name(array: ArrayEntry) -> str:
    """The name of the tensor that an array of `tensors/` holds."""
    part = array.path.removeprefix(f"{TENSORS}/")
    return array.name or ("" if part == "%" else unquote(part))


class Ranges:
    """Segments for ranges of one array, each found without walking from the start."""

    def __init__(self, array: ArrayEntry) -> None:
        self.nbytes = array.nbytes
        self._segments = array.segments
        self._starts = [0, *accumulate(segment.nbytes for segment in array.segments)]
        self._end = self._starts.pop()

    def segments(self, offset: int, nbytes: int) -> Iterator[Segment]:
        stop = min(offset + nbytes, self._end)
        index = bisect_right(self._starts, offset) - 1
        while offset < stop:
            segment = self._segments[index]
            skipped = offset - self._starts[index]
            taken = min(segment.nbytes - skipped, stop - offset)
            yield Segment(segment.digest, segment.offset + skipped, taken)
            offset += taken
            index += 1


def _array(tensor: StoredTensor, ranges: Mapping[str, Ranges]) -> ArrayEntry:
    label = tensor.name[:200]
    if len(tensor.name) > _MAX_NAME:
        raise BadModelError(f"a tensor's name has {len(tensor.name)} characters; at most {_MAX_NAME} are taken: rename it")
    if not tensor.name.isascii() and any(0xD800 <= ord(char) < 0xE000 for char in tensor.name):  # noqa: PLR2004 (surrogates)
        raise BadModelError(f"a tensor's name is not valid Unicode ({label!r}): rename it")
    file = ranges.get(tensor.file)
    if file is None:
        raise BadModelError(f"tensor {label!r} should lie in {tensor.file[:200]!r}, which is not one of the model's files")
    if tensor.dtype not in DTYPES or tensor.nbytes != DTYPES[tensor.dtype] * prod(tensor.shape) or (tensor.shape and min(tensor.shape) < 0):
        raise BadModelError(f"tensor {label!r}: {tensor.nbytes} bytes are not {tensor.dtype[:40]} of shape {list(tensor.shape)[:32]}")
    if tensor.offset < 0 or tensor.offset + tensor.nbytes > file.nbytes:
        raise BadModelError(f"tensor {label!r} should lie in bytes that {tensor.file[:200]!r} does not have: was it cut off?")
    path = tensor_path(tensor.name)
    segments = tuple(file.segments(tensor.offset, tensor.nbytes))
    array = ArrayEntry(path, tensor.dtype, tensor.shape, segments)
    return array if tensor_name(array) == tensor.name else ArrayEntry(path, tensor.dtype, tensor.shape, segments, tensor.name)
