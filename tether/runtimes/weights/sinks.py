"""Where tensors go that do not lie in a model's files as plain arrays: decoded, one after the other, into one file."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from tether.errors import BadModelError, HostileModelError, NoSpaceError, StoreError
from tether.runtimes.weights.limits import CONVERTED, tensor_nbytes
from tether.types import StoredTensor

__all__ = ["Sink"]

_ALIGNMENT = 64
"""Of each tensor in the file: a cache line, and what torch and Arrow align to."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Sink:
    """Wraps the (buffered) file for converted tensors; without one, they are left out.

    `limit` bounds the bytes that may be written in all: what expands (compression, strides, varints) must not fill the disk.
    """

    def __init__(self, file: BinaryIO | None, limit: int) -> None:
        self._file = file
        self._limit = limit
        self.nbytes = file.tell() if file else 0
        """Where the next byte goes."""

    @property
    def wanted(self) -> bool:
        """Whether `put` keeps anything; where it does not, the work before it can be spared."""
        return self._file is not None

    def put(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[bytes | memoryview]) -> StoredTensor | None:
        """Write a tensor, C-contiguous and little-endian. Without a file it is None, and `chunks` is not touched.

        Raises: BadModelError: `chunks` are not as long as the shape says; HostileModelError: over the limit; NoSpaceError, StoreError.
        """
        nbytes = tensor_nbytes(name, dtype, shape)
        if self._file is None:
            return None
        start = self.nbytes + -self.nbytes % _ALIGNMENT
        if start + nbytes > self._limit:
            raise HostileModelError(
                f"tensor {name[:200]!r} unpacks the model to over {self._limit} bytes, far more than its files have; save it uncompressed"
            )
        self._write(bytes(start - self.nbytes))
        for chunk in chunks:
            if self.nbytes + len(chunk) > start + nbytes:
                raise BadModelError(f"tensor {name[:200]!r} has more data than its shape {list(shape)} says; export the model again")
            self._write(chunk)
        if self.nbytes != start + nbytes:
            raise BadModelError(f"tensor {name[:200]!r} has less data than its shape {list(shape)} says; export the model again")
        return StoredTensor(name, dtype, shape, CONVERTED, start, nbytes)

    def rewind(self, nbytes: int) -> None:
        """Forget what was written after `nbytes`: the file that it came from turned out to be none of ours."""
        if self._file is not None:
            self._file.seek(nbytes)
            self._file.truncate()
            self.nbytes = nbytes

    def flush(self) -> None:
        """Hand everything to the system. Raises: NoSpaceError, StoreError."""
        if self._file is not None:
            with _disk():
                self._file.flush()

    def _write(self, chunk: bytes | memoryview) -> None:
        if self._file is not None:
            with _disk():
                self._file.write(chunk)
            self.nbytes += len(chunk)


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise NoSpaceError("the disk is full: no room to unpack the model's tensors; free some and publish again") from error
        raise StoreError(
            f"the model's tensors can't be unpacked ({error.strerror or error}); look at the disk of the data folder"
        ) from error
