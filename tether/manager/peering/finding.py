"""Finds a version's signed manifest among peers, who are connected to as they are asked, and none of whom is believed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from tether.errors import BadSignatureError, ChunkMissingError, ForbiddenError, ServiceUnavailableError, TetherError, WrongBytesError
from tether.manager.peering.downloading import Connect, Liar
from tether.ports import SignedManifest
from tether.store.replicas.searching import Answer, answers, is_genuine
from tether.types import Digest

__all__ = ["Finder"]

_PATIENCE = 1.0
"""Seconds until the next peer is asked as well: a connection that has to be punched takes one or two."""
_RESTS = (0.2, 1.0, 2.0, 5.0)
"""Seconds before all are asked again, where some did not answer."""


@dataclass(frozen=True, slots=True)
class Finder:
    """Asks peers."""

    connect: Connect
    on_liar: Liar
    """Told of each that gave something else than it was asked for."""
    give_up: float = 30.0
    """Seconds for peers that don't answer."""

    async def find(self, digest: Digest, publisher: str, peers: Sequence[str]) -> SignedManifest:
        """The version as its publisher signed it.

        Raises: ChunkMissingError: no peer has it; ForbiddenError: none allows it; ServiceUnavailableError: those that may have it are away.
        """
        search = _Search(digest, publisher, self.connect)
        rests, end = iter(_RESTS), time.monotonic() + self.give_up
        left = list(peers)
        while True:
            found = await search.ask(left, end, self.on_liar)
            if found is not None:
                return found
            rest = next(rests, _RESTS[-1])
            left = [peer for peer in peers if peer in search.silent]
            if not left or time.monotonic() + rest >= end:
                raise search.failure(peers)
            await asyncio.sleep(rest)


@dataclass(eq=False)
class _Search:
    """What was asked, and what came of it."""

    digest: Digest
    publisher: str
    connect: Connect

    def __post_init__(self) -> None:
        self.silent: set[str] = set()
        self._forbidden: ForbiddenError | None = None

    async def ask(self, peers: Sequence[str], end: float, on_liar: Liar) -> SignedManifest | None:
        """The first good answer of these peers."""
        sources = {number: _Unconnected(peer, self.connect) for number, peer in enumerate(peers)}
        self.silent = set(peers)
        async with aclosing(answers(sources, self.digest, _PATIENCE, end)) as coming:
            async for number, answer in coming:
                checked = await self._checked(peers[number], answer)
                if isinstance(checked, SignedManifest):
                    return checked
                self._note(peers[number], checked, on_liar)
        return None

    async def _checked(self, peer: str, answer: Answer) -> Answer:
        """An answer that is good, or why it is none; None: it has none that this publisher signed."""
        if not isinstance(answer, SignedManifest):
            return answer
        if not await asyncio.to_thread(is_genuine, answer, self.digest):
            return BadSignatureError(f"peer {peer} gave a manifest for {self.digest} that is not what its publisher signed")
        return answer if answer.publisher == self.publisher else None  # the same bytes, which another lab signed as well

    def _note(self, peer: str, answer: TetherError | None, on_liar: Liar) -> None:
        if isinstance(answer, BadSignatureError | WrongBytesError):
            on_liar(peer, answer)
        elif isinstance(answer, ForbiddenError):
            self._forbidden = answer
        elif answer is not None:
            return
        self.silent.discard(peer)

    def failure(self, peers: Sequence[str]) -> TetherError:
        """Why there is none."""
        what = f"version {self.digest[:12]} of publisher {self.publisher}"
        if self.silent or not peers:
            return ServiceUnavailableError(f"{what} can't be had: {_named(self.silent)} did not answer; `tether peers` says who is reached")
        if self._forbidden is not None:
            return ForbiddenError(f"{what} is not for this lab: ask its publisher for an invitation with scope replicate")
        return ChunkMissingError(
            f"none of the {len(peers)} peers that were asked has {what} for this lab: it may have been deleted, or this lab's scopes are "
            "not for this model",
            self.digest,
            f"manifests/{self.digest}",
        )


@dataclass(frozen=True)
class _Unconnected:
    """`ports.BlobSource`, as far as a search needs it: it connects when it is asked."""

    name: str
    connect: Connect
    in_flight = 1

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        return await (await self.connect(self.name)).fetch(digest, nbytes)

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        return await (await self.connect(self.name)).manifest(digest)

    async def aclose(self) -> None:
        """Nothing: others may use the connection."""


def _named(peers: set[str]) -> str:
    return ", ".join(sorted(peers)[:8]) or "no peer that may have it is known, so nobody"
