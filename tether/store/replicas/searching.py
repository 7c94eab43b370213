"""Finds a version's signed manifest among several sources, none of which is believed and any of which may stall."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping

from tether.errors import TetherError
from tether.ports import BlobSource, SignedManifest
from tether.security.identity import verify
from tether.store.format.manifest import MAX_NBYTES, digest_of, signed_message
from tether.types import Digest

__all__ = ["Answer", "answers", "is_genuine"]

Answer = SignedManifest | TetherError | None
"""What a source came to: a manifest (not checked), why it did not answer, or that it has none."""


def is_genuine(found: SignedManifest, digest: Digest) -> bool:
    """Whether it has the digest and its publisher signed it."""
    if len(found.data) > MAX_NBYTES or digest_of(found.data) != digest:
        return False
    try:
        verify(found.publisher, signed_message(found.data), found.signature)
    except TetherError:
        return False
    return True


async def answers(
    sources: Mapping[int, BlobSource], digest: Digest, patience: float, end: float
) -> AsyncGenerator[tuple[int, Answer], None]:
    """Ask the sources in their order, the next one when one has answered or taken `patience` seconds; what they said, as it comes.

    A source that has not answered at the monotonic time `end` says nothing. Close the iterator: that cancels what is still asked.
    """
    left = iter(sources.items())
    asking: dict[asyncio.Task[Answer], int] = {}
    try:
        while True:
            following = next(left, None)
            if following is not None:
                number, source = following
                asking[asyncio.create_task(_ask(source, digest))] = number
            wait = end - time.monotonic()
            if not asking or wait <= 0:
                return
            done, _ = await asyncio.wait(asking, timeout=wait if following is None else min(wait, patience), return_when="FIRST_COMPLETED")
            for task in done:
                yield asking.pop(task), task.result()
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def _ask(source: BlobSource, digest: Digest) -> Answer:
    try:
        return await source.manifest(digest)
    except TetherError as error:
        return error
    except Exception as error:  # a source of somebody else's making: the others are asked
        return TetherError(f"{source.name}: {type(error).__name__}: {error}")
