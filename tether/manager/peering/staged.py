"""What peers who may publish have staged here and not published yet: bounded for each and for all, so that nobody fills the disk with it.

Blobs lie staged until a version names them, or a day after the last one came. A small log says whose they are, so that a restart forgives
nothing; it is not synced: after a power cut a peer may have a few seconds' worth more.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tether.errors import StagingFullError
from tether.security.files import written_aside
from tether.store import Repository
from tether.store.packing.disk import disk_errors
from tether.types import Digest

__all__ = ["StagedShares"]

_OF_DISK, _ALL_OF_DISK = 4, 2
"""A peer may have a quarter of what the disk has for this, all peers a half: the lab's own models need the rest."""
_LEAST: Final = 256 << 10
"""Bytes that a blob counts for at least: each costs memory and a line in two files. A model's are 64 KiB to 4 MiB."""
_EXPIRY: Final = 60.0
"""Seconds between looks for what nobody added to in a day."""


class StagedShares:
    """Of one lab. Any thread."""

    def __init__(self, repository: Repository, path: Path, limit: int) -> None:
        """`path`: of the log; `limit`: bytes for one peer, however large the disk is. Raises: NoSpaceError, StoreError."""
        self._repository, self._path, self._limit = repository, path, limit
        self._lock = threading.Lock()
        self._shares: dict[str, dict[Digest, int]] = {}
        self._totals: Counter[str] = Counter()
        """Of each share: it is asked for with every blob."""
        self._coming: set[Digest] = set()
        self._expired = 0.0
        self._load()

    def nbytes(self, peer: str) -> int:
        """What counts as a peer's now."""
        return self._totals[peer]

    @asynccontextmanager
    async def claimed(self, peer: str, digest: Digest, nbytes: int) -> AsyncIterator[None]:
        """While a peer's blob is put; what is here already is nobody's. Raises: StagingFullError; NoSpaceError, StoreError."""
        claiming = asyncio.ensure_future(asyncio.to_thread(self._claim, peer, digest, nbytes))
        try:
            is_new = await asyncio.shield(claiming)
        except asyncio.CancelledError:  # a peer that left: the thread goes on, and what it claims is nobody's

            def give_up(done: asyncio.Future[bool]) -> None:
                if not done.cancelled() and done.exception() is None and done.result():
                    self._give_up(peer, digest)

            claiming.add_done_callback(give_up)
            raise
        try:
            yield
        except BaseException:
            if is_new:
                self._give_up(peer, digest)
            raise
        finally:
            if is_new:
                self._coming.discard(digest)

    def _give_up(self, peer: str, digest: Digest) -> None:
        with self._lock:
            self._totals[peer] -= self._shares.get(peer, {}).pop(digest, 0)
            self._coming.discard(digest)

    def _claim(self, peer: str, digest: Digest, nbytes: int) -> bool:
        """Whether it is counted."""
        if not self._repository.missing([digest]):
            return False
        with self._lock:
            if digest in self._coming:
                return False
            cost = max(nbytes, _LEAST)
            if self._excess(peer, cost) is not None:
                self._prune()
            excess = self._excess(peer, cost)
            if excess is not None:
                raise StagingFullError(excess)
            self._write(lambda: self._append(peer, digest, cost))
            self._note(peer, digest, cost)
            self._coming.add(digest)
        return True

    def _note(self, peer: str, digest: Digest, cost: int) -> None:
        self._shares.setdefault(peer, {})[digest] = cost
        self._totals[peer] += cost

    def _excess(self, peer: str, cost: int) -> str | None:
        """Why so many bytes more are too many."""
        mine, staged = self._totals[peer], self._totals.total()
        disk = staged + shutil.disk_usage(self._repository.root).free
        bound = min(self._limit, disk // _OF_DISK)
        if mine + cost > bound:
            return (
                f"{mine} bytes of this key wait here to be published, {bound} may: publish them; what is not published is given up a day "
                "after the last of it came"
            )
        if staged + cost > disk // _ALL_OF_DISK:
            return f"{staged} bytes of all peers wait here to be published, which is all that the disk has for that: try again later"
        return None

    def _prune(self) -> None:
        """Count no longer what was published, or given up."""
        if time.monotonic() - self._expired > _EXPIRY:
            self._expired = time.monotonic()
            self._repository.give_up_staged()
        before, self._shares, self._totals = self._shares, {}, Counter()
        for peer, share in before.items():
            for digest, cost in share.items():
                if self._is_there(digest):
                    self._note(peer, digest, cost)
        if self._shares != before:
            self._write(self._rewrite)

    def _is_there(self, digest: Digest) -> bool:
        return digest in self._coming or self._repository.staged_nbytes(digest) is not None

    # --- the log

    def _load(self) -> None:
        """Lines that a power cut left half are none; what is not staged any more is nobody's."""
        try:
            lines = self._path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            peer, _, rest = line.partition(" ")
            digest, _, cost = rest.partition(" ")
            if cost.isdecimal() and self._is_there(Digest(digest)):
                self._note(peer, Digest(digest), int(cost))
        self._write(self._rewrite)

    def _append(self, peer: str, digest: Digest, cost: int) -> None:
        with self._path.open("a") as log:
            log.write(f"{peer} {digest} {cost}\n")

    def _rewrite(self) -> None:
        lines = [f"{peer} {digest} {cost}\n" for peer, share in self._shares.items() for digest, cost in share.items()]
        with written_aside(self._path, "".join(lines).encode()) as partial:
            partial.replace(self._path)

    def _write(self, deed: Callable[[], None]) -> None:
        with disk_errors(self._path.parent):
            deed()
