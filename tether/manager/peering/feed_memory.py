"""What a lab must not forget of its own feed: which core it is, how it is signed, and the last end of it that anybody was shown."""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec
import structlog

from tether.errors import MalformedFeedError, StoreError
from tether.security.files import sync_folder, written_aside
from tether.swarm.feeds.heads import Head, parse_head

__all__ = ["FeedMemory", "begun", "load_memory", "save_memory"]

log = structlog.get_logger("tether.swarm")
_FORMAT = 1
_SECRET_NBYTES = 32


class FeedMemory(msgspec.Struct, frozen=True):
    """Of one lab, in a file of mode 0600."""

    era: int
    core: str
    """Seed of the key that signs the core, hex: another one in each era, so that nothing is ever signed twice for one place."""
    server: str
    """Seed of the key under which it is served, hex."""
    signed: int = 0
    """Unix time of the last head, of whichever era: no later one is signed earlier."""
    head: bytes | None = None
    """The last of this era."""
    since: int = 0
    """`Footing.since` when the era began: another one means that another manager wrote, and signed, in between."""
    format: int = _FORMAT

    def __repr__(self) -> str:
        return f"FeedMemory(era={self.era}, signed={self.signed})"

    def known(self, publisher: str) -> Head | None:
        """What `head` says. Raises: MalformedFeedError."""
        return parse_head(self.head, publisher) if self.head else None


def begun(before: FeedMemory | None, now: int, since: int = 0) -> FeedMemory:
    """Of a new core. Its era is a time, so that also a lab that lost its memory begins a later one than it had."""
    era = now if before is None else max(now, before.era + 1)
    server = secrets.token_hex(_SECRET_NBYTES) if before is None else before.server
    return FeedMemory(max(era, 1), secrets.token_hex(_SECRET_NBYTES), server, 0 if before is None else before.signed, since=since)


def load_memory(path: Path, publisher: str) -> FeedMemory | None:
    """None: there is none, or it was damaged: then a new core is begun, since what was signed is not known. Raises: StoreError."""
    try:
        memory = msgspec.json.decode(path.read_bytes(), type=FeedMemory)
        memory.known(publisher)
        secret = bytes.fromhex(memory.core), bytes.fromhex(memory.server)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} can't be read ({error.strerror}): mend the folder's permissions") from error
    except (msgspec.DecodeError, MalformedFeedError, ValueError) as error:
        log.warning("what was known of the lab's own feed is damaged: it is begun anew", path=str(path), error=str(error))
        return None
    return memory if memory.format == _FORMAT and all(len(each) == _SECRET_NBYTES for each in secret) else None


def save_memory(path: Path, memory: FeedMemory) -> None:
    """Durable when it returns. Raises: StoreError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with written_aside(path, msgspec.json.encode(memory)) as partial:
            partial.rename(path)
            sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path} can't be written ({error.strerror}): free some space, or mend the folder's permissions") from error
