"""Pure, but for the clock that it is given: what the nodes of a DHT keep for others, and for how long, as hyperdht's do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tether.errors import BadKeyError, PayloadTooLargeError
from tether.security.identity import Identity, verify

__all__ = ["MemoryDht", "StoredRecord", "sign_record"]

_ANNOUNCED = 20 * 60.0
"""Seconds for which an announcement is kept (hyperdht 6.34, `index.js`: `records`)."""
_RECORDED = 48 * 3600.0
"""Seconds for which a record is kept (`mutables`)."""
_MOST_FOUND = 1000
_MAX_RECORD_NBYTES = 1000
_TOPIC_NBYTES = 32
_SIGNED = b"tether memory record v1\0"


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """The mutable value of a key."""

    value: bytes
    seq: int
    signature: bytes


class MemoryDht:
    """All its nodes together. A test may fill it with what strangers say: `announce` believes anybody, as real nodes do in effect."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds; a test that does not want to wait for forgetting passes its own."""
        self._clock = clock
        self._topics: dict[bytes, dict[str, float]] = {}
        self._records: dict[str, tuple[StoredRecord, float]] = {}

    def announce(self, topic: bytes, key: str) -> None:
        """Keep, for twenty minutes from now, that this key is to be found under the topic. Raises: BadKeyError: it has not 32 bytes."""
        _check_topic(topic)
        announced = self._topics.setdefault(topic, {})
        announced.pop(key, None)
        announced[key] = self._clock() + _ANNOUNCED

    def unannounce(self, topic: bytes, key: str) -> None:
        """Keep it no more."""
        self._topics.get(topic, {}).pop(key, None)

    def lookup(self, topic: bytes) -> list[str]:
        """Keys under the topic, those first that were announced last; 1,000 at most. Raises: BadKeyError."""
        _check_topic(topic)
        now = self._clock()
        announced = self._topics.get(topic, {})
        for key in [key for key, until in announced.items() if until <= now]:
            del announced[key]
        return list(reversed(announced))[:_MOST_FOUND]

    def put(self, key: str, record: StoredRecord) -> None:
        """Keep a record, unless one with this number or a higher one is kept.

        Raises: BadSignatureError: the key did not sign it; PayloadTooLargeError: over 1,000 bytes.
        """
        if len(record.value) > _MAX_RECORD_NBYTES:
            raise PayloadTooLargeError(
                f"A record of {len(record.value)} bytes is over {_MAX_RECORD_NBYTES}: put what is larger behind a stream."
            )
        verify(key, _message(record.value, record.seq), record.signature)
        kept = self.get(key)
        if kept is None or self.replaces(record, kept):
            self._records[key] = record, self._clock() + _RECORDED

    def replaces(self, record: StoredRecord, kept: StoredRecord) -> bool:
        """Whether a record that comes is kept instead of the one that is there."""
        return record.seq > kept.seq

    def get(self, key: str) -> StoredRecord | None:
        """The record of a key; None: none is kept."""
        record, until = self._records.get(key, (None, 0.0))
        return record if self._clock() < until else None


def sign_record(identity: Identity, value: bytes, seq: int) -> StoredRecord:
    """A record as the identity's owner stores it."""
    return StoredRecord(value, seq, identity.sign(_message(value, seq)))


def _check_topic(topic: bytes) -> None:
    if len(topic) != _TOPIC_NBYTES:
        raise BadKeyError(f"A topic has {_TOPIC_NBYTES} bytes, this one {len(topic)}.")


def _message(value: bytes, seq: int) -> bytes:
    return _SIGNED + seq.to_bytes(8, "little") + value
