"""Checks that a version is its publisher's: the catalog only says so, the signature proves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tether.errors import BadSignatureError, ChunkAlteredError, ChunkMissingError, StoreError
from tether.security.identity import verify
from tether.store.format.manifest import signed_message
from tether.store.format.records import VersionRecord
from tether.types import Digest

__all__ = ["Signatures"]


class Signatures:
    """Checks each version once in the life of a process: a catalog that was changed to name another manifest or publisher is found out."""

    def __init__(self, signature: Callable[[VersionRecord], bytes | None], manifest: Callable[[Digest], bytes]) -> None:
        """`signature`: what the catalog has of a version; `manifest`: the verified bytes."""
        self._signature = signature
        self._manifest = manifest
        self._checked: set[tuple[str, int, Digest, str]] = set()

    def check(self, record: VersionRecord) -> None:
        """Return if the publisher signed the version's manifest, or the manifest is damaged: whoever reads it is told of that.

        Raises: StoreError: the catalog was altered.
        """
        if _key(record) in self._checked:
            return
        try:
            data = self._manifest(record.digest)
        except (ChunkMissingError, ChunkAlteredError):
            return
        try:
            verify(record.publisher, signed_message(data), self._signature(record) or b"")
        except BadSignatureError:
            raise StoreError(
                f"{record.name}:{record.version} is not what {record.publisher[:12]} signed: the catalog was altered; restore it from a "
                "backup, or delete the version and publish it again"
            ) from None
        self._checked.add(_key(record))

    def wrong(self, records: Iterable[VersionRecord]) -> Iterator[tuple[VersionRecord, StoreError]]:
        """Those that do not pass, all checked anew."""
        for record in records:
            self._checked.discard(_key(record))
            try:
                self.check(record)
            except StoreError as error:
                yield record, error


def _key(record: VersionRecord) -> tuple[str, int, Digest, str]:
    return record.name, record.version, record.digest, record.publisher
