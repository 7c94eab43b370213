"""The model keys of a store: made when a model is first encrypted, wrapped by the cluster key, given to peers, rotated."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from sqlite3 import Connection

import msgspec
from blake3 import blake3

from tether.errors import BadEnvelopeError, BadNameError, ClusterKeyMissingError, ConflictError, LockedModelError
from tether.security import envelopes
from tether.security.identity import Identity
from tether.security.keyring import Keyring, wrapped_by
from tether.store.faults import reach
from tether.store.format.encrypted import KEY_NBYTES, ModelContext, ModelKey
from tether.store.format.manifest import Seal, is_digest
from tether.store.index import key_tables as tables
from tether.store.index.catalog import Catalog
from tether.store.index.key_tables import KeyRow
from tether.types import Digest, model_name

__all__ = ["Accepted", "ModelKeys", "Revocation", "Rotation", "SealIndex", "granted", "has_keys", "key_row"]

_BATCH = 100
"""Model keys that are wrapped anew in one transaction: each costs an fsync, and publishes wait for it."""
_MAX_KEYS = 1024
"""In one envelope. A model gets a new key with each revocation."""
_ENVELOPE = b"tether model keys v1\0"
"""Sets an envelope with model keys apart from all else that may be sealed for a lab."""


class _Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    publisher: str
    name: str
    keys: tuple[bytes, ...]


_decoder = msgspec.json.Decoder(_Keys, strict=True)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What an envelope brought."""

    context: ModelContext
    keys: tuple[str, ...]
    """Ids of those that this lab did not have."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """What taking a model away from a peer did, and what it can't do."""

    peer: str
    models: tuple[ModelContext, ...]
    """Versions that are published from now on have a new key, which those who stay have to be granted."""

    def __str__(self) -> str:
        names = ", ".join(context.name for context in self.models) or "nothing"
        return (
            f"revoked {names} from {self.peer}: later versions get a new key. What the peer already has, keys and copies, can't be recalled"
        )


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a rotation of the cluster key did."""

    cluster_key: str
    """Id of the new one: back up its file."""
    rewrapped: int
    resumed: bool
    """Whether it brought an earlier one to its end, instead of making a new key."""


class ModelKeys:
    """The model keys in one catalog. Any thread. Secrets are unwrapped for each use and not kept."""

    def __init__(self, catalog: Catalog, keyring: Keyring, clock: Callable[[], float] = time.time) -> None:
        self._catalog = catalog
        self._keyring = keyring
        self._clock = clock
        self._rotating = threading.Lock()

    def current(self, context: ModelContext) -> ModelKey:
        """The key that encrypts what is published of a model of this lab; made when there is none.

        Raises: ClusterKeyMissingError, ConfigError, StoreError.
        """
        with self._catalog.reading() as db:
            row = tables.current_key(db, context)
        return self._unwrapped(row) if row else self._make(context)

    def get(self, key: str) -> ModelKey:
        """The key of this id.

        Raises: LockedModelError: this lab has no such key; ClusterKeyMissingError: it has, but not what it is wrapped by; StoreError.
        """
        try:
            return self._unwrapped(self._row(key))
        except ClusterKeyMissingError:
            return self._unwrapped(self._row(key))  # a rotation came between reading the row and opening it

    def peers(self, context: ModelContext) -> list[str]:
        """Those who were granted a model: who needs the new key when it was rotated."""
        with self._catalog.reading() as db:
            return tables.grants_of(db, context)

    def rotate_model(self, context: ModelContext) -> ModelKey:
        """Give later versions of a model a new key; earlier ones keep theirs."""
        with self._catalog.writing() as db:
            tables.retire_keys(db, context, self._clock())
            return self._added(context, db)

    def grant(self, context: ModelContext, peer: str) -> bytes:
        """An envelope with all keys of a model, which only the lab `peer` (public key, hex) can open; who got one is recorded.

        Raises: LockedModelError: this lab has no key of the model; BadKeyError; ClusterKeyMissingError, ConfigError, StoreError.
        """
        with self._catalog.reading() as db:
            rows = tables.keys_of(db, context)
        if not rows:
            raise LockedModelError(f"this lab has no key of {context}: publish it with `--encrypt` before you grant it")
        keys = tuple(self._unwrapped(row).secret for row in rows[-_MAX_KEYS:])
        envelope = envelopes.seal_to(peer, _ENVELOPE + msgspec.json.encode(_Keys(context.publisher, context.name, keys)))
        with self._catalog.writing() as db:
            tables.add_grant(db, peer, context, self._clock())
        return envelope

    def revoke(self, peer: str, context: ModelContext | None = None) -> Revocation:
        """Take a model (None: all) from a peer: versions that come later get keys that it is not given."""
        with self._catalog.writing() as db:
            models = tuple(model for model in tables.grants_to(db, peer) if context in {None, model})
            for model in models:
                tables.remove_grant(db, peer, model)
                tables.retire_keys(db, model, self._clock())
        return Revocation(peer, models)

    def accept(self, envelope: bytes, identity: Identity) -> Accepted:
        """Keep the keys that a peer granted this lab.

        Raises: BadEnvelopeError: it is for another, altered, or holds something else; ConflictError: keys for this lab's own model, which
        nobody else makes: what was published with them would be open to who sent them.
        """
        found = _opened(identity.open_sealed(envelope))
        context = ModelContext(found.publisher, found.name)
        if context.publisher == identity.public:
            raise ConflictError(f"the envelope has keys for {context.name!r} of this lab itself, which makes its own: it was refused")
        keys = [ModelKey(secret) for secret in found.keys]
        with self._catalog.writing() as db:
            # Retired from the start: a key that came from elsewhere opens, and never encrypts.
            new = [key.id for key in keys if tables.add_key(db, self._wrapped(key, context, retired=self._clock()))]
        return Accepted(context, tuple(new))

    def rotate_cluster(self) -> Rotation:
        """Wrap every model key by a new cluster key and delete the old one; no blob or manifest is touched.

        A rotation that did not come to its end, because of a crash or a full disk, is brought there by the next call.

        Raises: ClusterKeyMissingError, ConfigError, StoreError, NoSpaceError; ConflictError: another process keeps the catalog's log open.
        """
        with self._rotating:
            outdated = self._keyring.outdated
            current = self._keyring.current if outdated else self._keyring.rotate_begin()
            reach("keys.begin")
            rewrapped = self._rewrap_all(current)
            reach("keys.rewrapped")
            self._catalog.scrub()
            reach("keys.scrubbed")
            for key in self._keyring.outdated:
                self._keyring.retire(key)
            reach("keys.retired")
            return Rotation(current, rewrapped, resumed=bool(outdated))

    def _rewrap_all(self, cluster_key: str) -> int:
        count = 0
        while True:
            with self._catalog.writing() as db:
                rows = tables.wrapped_by_others(db, cluster_key, _BATCH)
                tables.rewrap(db, [self._rewrapped(row) for row in rows])
                reach("keys.batch")
            count += len(rows)
            if len(rows) < _BATCH:
                return count

    def _rewrapped(self, row: KeyRow) -> tuple[bytes, str, str]:
        new = self._wrapped(self._unwrapped(row), row.context)
        return new.wrapped, new.cluster_key, row.id

    def _make(self, context: ModelContext) -> ModelKey:
        with self._catalog.writing() as db:
            row = tables.current_key(db, context)
            return self._unwrapped(row) if row else self._added(context, db)

    def _added(self, context: ModelContext, db: Connection) -> ModelKey:
        key = ModelKey(secrets.token_bytes(KEY_NBYTES))
        tables.add_key(db, self._wrapped(key, context))
        return key

    def _wrapped(self, key: ModelKey, context: ModelContext, retired: float | None = None) -> KeyRow:
        """To be called inside the transaction that writes it: a rotation of the cluster key then finds it, or has come before."""
        wrapped = self._keyring.wrap(key.secret, _wrapping(key.id, context))
        return KeyRow(key.id, *context, wrapped, wrapped_by(wrapped), self._clock(), retired)

    def _unwrapped(self, row: KeyRow) -> ModelKey:
        return ModelKey(self._keyring.unwrap(row.wrapped, _wrapping(row.id, row.context)))

    def _row(self, key: str) -> KeyRow:
        return key_row(self._catalog, key)


def has_keys(catalog: Catalog, context: ModelContext) -> bool:
    """Whether a key was ever made for a model, or came from elsewhere: something of it is encrypted."""
    with catalog.reading() as db:
        return bool(tables.keys_of(db, context))


def granted(catalog: Catalog, peer: str) -> tuple[ModelContext, ...]:
    """The models whose keys a peer was given."""
    with catalog.reading() as db:
        return tuple(tables.grants_to(db, peer))


def key_row(catalog: Catalog, key: str) -> KeyRow:
    """A model key as it is stored, by its id. Raises: LockedModelError: this lab has no such key."""
    with catalog.reading() as db:
        row = tables.find_key(db, key)
    if row is None:
        message = f"the model is encrypted and this lab has no key for it (model key {key[:32]})"
        advice = "ask its publisher to run `tether allow KEY --scope decrypt:NAME` with this lab's key, and `tether accept` the answer"
        raise LockedModelError(f"{message}: {advice}", key)
    return row


class SealIndex:
    """What was already encrypted with a model key: a blob that is known needs neither to be sent nor encrypted again.

    Digests of plaintext are kept as keyed hashes only: who reads the catalog can't ask whether a model holds something he knows.
    """

    def __init__(self, catalog: Catalog, key: ModelKey) -> None:
        self._catalog = catalog
        self._key = key.id
        self._secret = key.derived("index")

    def find(self, digests: Iterable[Digest]) -> dict[Digest, Seal]:
        """Seals by the digest of the plaintext, of those that were sealed. The caller sees whether their blobs are still stored."""
        wanted = [digest for digest in dict.fromkeys(digests) if is_digest(digest)]
        with self._catalog.reading() as db:
            found = tables.find_seals(db, self._key, [self._hash(digest) for digest in wanted])
        return {digest: seal for digest, seal in zip(wanted, found, strict=True) if seal is not None}

    def add(self, seals: Mapping[Digest, Seal]) -> None:
        """Remember them, durably; in one transaction, so many at once."""
        with self._catalog.writing() as db:
            tables.add_seals(db, self._key, [(self._hash(digest), seal) for digest, seal in seals.items()])

    def _hash(self, digest: Digest) -> bytes:
        return blake3(bytes.fromhex(digest), key=self._secret).digest()


def _wrapping(key: str, context: ModelContext) -> bytes:
    """What a wrapped model key is bound to."""
    return msgspec.json.encode(["model key", key, *context])


def _opened(message: bytes) -> _Keys:
    """Raises: BadEnvelopeError: no keys are in it."""
    try:
        if not message.startswith(_ENVELOPE):
            raise ValueError
        found = _decoder.decode(message.removeprefix(_ENVELOPE))
        model_name(found.name)
    except (msgspec.MsgspecError, BadNameError, ValueError):
        raise BadEnvelopeError("the envelope holds no model keys: ask its sender for a new one") from None
    if not is_digest(found.publisher) or not 0 < len(found.keys) <= _MAX_KEYS or any(len(key) != KEY_NBYTES for key in found.keys):
        raise BadEnvelopeError("the envelope's model keys are malformed: ask its sender for a new one")
    return found
