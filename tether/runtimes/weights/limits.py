"""Pure: what holds for the weights of every format, and the check of what a reader found against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from math import prod

from tether.errors import BadModelError, HostileModelError
from tether.types import StoredTensor

__all__ = [
    "CONVERTED",
    "DTYPES",
    "MAX_METADATA_NBYTES",
    "MAX_NAME",
    "MAX_RANK",
    "MAX_TENSORS",
    "checked",
    "tensor_nbytes",
]

CONVERTED = ".tether/tensors.bin"
"""The file of a version for tensors that do not lie in the model's files as zarr wants them; the store knows it by this name."""
MAX_TENSORS = 65_536
"""In one model, as the store has it."""
MAX_NAME = 4096
"""Characters, as the store has it."""
MAX_METADATA_NBYTES = 64 << 20
"""What describes the tensors of one file: 1 KiB for each of as many as there may be. Everything that grows with it stays in memory."""
MAX_RANK = 32
"""numpy 1 took no more, and no format here writes more."""
DTYPES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "int32": 4, "uint32": 4, "float32": 4,
    "int64": 8, "uint64": 8, "float64": 8,
    "complex64": 8, "complex128": 16, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
"""zarr's names of the element types → bytes an element, as the store has them."""


def tensor_nbytes(name: str, dtype: str, shape: Iterable[int]) -> int:
    """How many bytes a tensor takes.

    Raises: BadModelError: an unknown element type, a negative extent, too many axes.
    """
    extents = tuple(shape)
    if len(extents) > MAX_RANK:
        raise BadModelError(f"tensor {name[:200]!r} has {len(extents)} axes; at most {MAX_RANK} are taken: reshape it")
    if dtype not in DTYPES or (extents and min(extents) < 0):
        raise BadModelError(f"tensor {name[:200]!r}: there is no {dtype[:40]} of shape {list(extents)}; export the model again")
    return DTYPES[dtype] * prod(extents)


def checked(
    tensors: Iterable[StoredTensor], file_nbytes: Callable[[str], int], *, views: bool = False, room: int = MAX_TENSORS
) -> list[StoredTensor]:
    """The tensors as they come, if each has a name of its own and lies in a file.

    Two may lie in the same range (tied weights); with `views`, for formats whose tensors are views of a storage, in any ranges.

    Raises: BadModelError: a rule is broken; HostileModelError: tensors overlap in part. Stops at the first tensor too many.
    """
    found: list[StoredTensor] = []
    names: set[str] = set()
    for tensor in tensors:
        if len(found) == room:
            raise BadModelError(f"the model has more than {MAX_TENSORS} tensors, which is the most that is taken: merge small ones")
        _check(tensor, file_nbytes)
        if tensor.name in names:
            raise BadModelError(f"the model has two tensors of the name {tensor.name[:200]!r}: rename one")
        names.add(tensor.name)
        found.append(tensor)
    if not views:
        _check_overlaps(found)
    return found


def _check(tensor: StoredTensor, file_nbytes: Callable[[str], int]) -> None:
    name = tensor.name
    if len(name) > MAX_NAME:
        raise BadModelError(f"the tensor name {name[:80]!r}… has {len(name)} characters; at most {MAX_NAME} are taken: rename it")
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise BadModelError(f"the tensor name {name[:200]!r} is not valid Unicode: rename it") from None
    if tensor.nbytes != tensor_nbytes(name, tensor.dtype, tensor.shape):
        raise BadModelError(
            f"tensor {name[:200]!r}: {tensor.nbytes} bytes are not {tensor.dtype} of shape {list(tensor.shape)}; export the model again"
        )
    if tensor.offset < 0 or tensor.offset + tensor.nbytes > file_nbytes(tensor.file):
        raise BadModelError(f"tensor {name[:200]!r} should lie in bytes that {tensor.file[:200]!r} does not have: was the file cut off?")


def _check_overlaps(tensors: Iterable[StoredTensor]) -> None:
    ranges = sorted({(tensor.file, tensor.offset, tensor.nbytes) for tensor in tensors if tensor.nbytes})
    for (file, offset, nbytes), (next_file, next_offset, _) in pairwise(ranges):
        if file == next_file and next_offset < offset + nbytes:
            raise HostileModelError(f"two tensors overlap in part at byte {next_offset} of {file[:200]!r}; export the model again")
