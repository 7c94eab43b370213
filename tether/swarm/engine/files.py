"""Files for the bundle's Hypercores. `js/files.js` is the other half, and says when they are flushed to the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from tether.swarm.engine.bridge import FAILED, OK, Bridge

__all__ = ["Files"]

_HIGH = 32


class Files:
    """Open files by number. A log belongs to one process: the folder's owner sees to that."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._open: dict[int, int] = {}
        self._numbers = 0

    def functions(self) -> dict[str, Callable[[], None]]:
        """By the names that `js/files.js` uses."""
        works = {
            "fileOpen": self._file_open,
            "fileRead": self._read,
            "fileWrite": self._write,
            "fileTruncate": self._truncate,
            "fileSize": self._size,
            "fileClose": self._close,
            "fileSync": self._sync,
        }
        return {name: self._guarded(work) for name, work in works.items()}

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        """No exception crosses: what the disk refused stands in the inbox."""

        def call() -> None:
            memory = self._bridge.memory
            try:
                work()
            except OSError as error:
                code = errno.errorcode.get(error.errno or 0, "EIO")
                memory.control[1] = memory.put_text(f"{code}\n{error.strerror}")
                memory.control[0] = FAILED
            else:
                memory.control[0] = OK

        return call

    def _file_open(self) -> None:
        memory = self._bridge.memory
        path = bytes(memory.outbox[: memory.control[0]]).decode()
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120 (a path as text, once)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._numbers += 1
        self._open[self._numbers] = descriptor
        memory.control[1] = self._numbers

    def _place(self) -> tuple[int, int, int]:
        """Descriptor, offset, bytes."""
        number, low, high, nbytes = self._bridge.memory.control[:4]
        return self._descriptor(number), low | high << _HIGH, nbytes

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            raise OSError(errno.EBADF, "the file is closed")
        return self._open[number]

    def _read(self) -> None:
        descriptor, offset, nbytes = self._place()
        memory = self._bridge.memory
        memory.control[1] = os.preadv(descriptor, [memory.inbox[:nbytes]], offset)

    def _write(self) -> None:
        descriptor, offset, nbytes = self._place()
        rest = self._bridge.memory.outbox[:nbytes]
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def _truncate(self) -> None:
        descriptor, offset, _ = self._place()
        os.ftruncate(descriptor, offset)

    def _size(self) -> None:
        control = self._bridge.memory.control
        size = os.fstat(self._descriptor(control[0])).st_size
        control[1], control[2] = size & 0xFFFFFFFF, size >> _HIGH

    def _close(self) -> None:
        descriptor = self._open.pop(self._bridge.memory.control[0], None)
        if descriptor is not None:
            os.close(descriptor)

    def _sync(self) -> None:
        os.fsync(self._descriptor(self._bridge.memory.control[0]))
