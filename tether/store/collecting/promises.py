"""Remembers which blobs publishers were told are here, so that garbage collection leaves them until the manifest comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from tether.store.collecting.collection import PROMISE
from tether.types import Digest

__all__ = ["Promises"]


class Promises:
    """Those of this process: the one that publishes is the one that collects. Methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since: dict[Digest, float] = {}

    def note(self, digests: Iterable[Digest]) -> None:
        """To be called *before* one looks whether they are here: a collection then comes before the look, or keeps them."""
        noted = dict.fromkeys(digests, self._clock())
        with self._lock:
            self._since |= noted

    def release(self, digests: Iterable[Digest]) -> None:
        """They are not here."""
        with self._lock:
            for digest in digests:
                self._since.pop(digest, None)

    @contextmanager
    def held(self) -> Iterator[Mapping[Digest, float]]:
        """Those that count, and since when; none is added meanwhile."""
        with self._lock:
            expired = self._clock() - PROMISE
            self._since = {digest: since for digest, since in self._since.items() if since > expired}
            yield self._since
