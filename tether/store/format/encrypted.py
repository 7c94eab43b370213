"""Pure: encrypts the blobs of a version and what its manifest tells: AES-256-GCM under a model key, the same content always the same way.

Replication, packs and verification see ciphertext only. Because nonces follow from the content, versions of a model share blobs as
plain ones do; what a holder of all ciphertext learns is sizes and which blobs are equal within one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, NoReturn

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, AEADEncryptionContext, Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM

from tether.errors import ChunkAlteredError, InternalError, LockedModelError, MalformedManifestError, MissingBlobsError
from tether.store.format.layout import BLOB_NBYTES, TENSORS
from tether.store.format.manifest import (
    SCHEME,
    ArrayEntry,
    Encryption,
    Manifest,
    Seal,
    Segment,
    decode,
    digest_of,
    encode,
    public_info,
    public_path,
)
from tether.types import Digest

__all__ = [
    "KEY_NBYTES",
    "ModelContext",
    "ModelKey",
    "Opener",
    "Sealed",
    "SealedArray",
    "SealedManifest",
    "Sealer",
    "Vault",
    "on_ciphertext",
    "open_blob",
    "open_manifest",
    "seal_manifest",
    "unlocked",
    "vault_of",
]

KEY_NBYTES = 32
"""Of a model key."""
_ID_NBYTES = 16
_NONCE_NBYTES = 12
_BLOCK_NBYTES = 16
_PURPOSES = {
    "id": "tether 2026 id of a model key",
    "encryption": "tether 2026 encryption of blobs",
    "nonce": "tether 2026 nonces of blobs",
    "index": "tether 2026 index of sealed blobs",
}
"""What is derived from a model key, each with a context of its own (BLAKE3 derive_key): no two uses ever meet."""

Buffer = bytes | bytearray | memoryview


class ModelContext(NamedTuple):
    """Whose model a blob belongs to: bound into every seal, so that no blob of another model passes for one of this."""

    publisher: str
    """Public key, hex."""
    name: str
    """Without publisher or version."""

    def __str__(self) -> str:
        return f"{self.publisher[:12]}/{self.name}"


@dataclass(frozen=True)
class ModelKey:
    """The secret that opens a model. Prints as its id."""

    secret: bytes = field(repr=False)
    """32 random bytes."""

    def __repr__(self) -> str:
        return f"ModelKey({self.id}, ***)"

    @cached_property
    def id(self) -> str:
        """32 hex digits, derived from the secret: a manifest that names it fits no other key."""
        return self.derived("id")[:_ID_NBYTES].hex()

    def derived(self, purpose: str) -> bytes:
        """The 32 bytes for one of `_PURPOSES`."""
        return blake3(self.secret, derive_key_context=_PURPOSES[purpose]).digest()


class Sealed(NamedTuple):
    """An encrypted blob."""

    seal: Seal
    ciphertext: memoryview


class SealedManifest(NamedTuple):
    """What is stored of an encrypted version, besides the blobs of its files."""

    public: Manifest
    private: tuple[Sealed, ...]
    """Blobs to be stored with it."""


class Sealer:
    """Encrypts for one model. Any thread."""

    def __init__(self, key: ModelKey, context: ModelContext) -> None:
        self._cipher = AES256(key.derived("encryption"))
        self._nonces = key.derived("nonce")
        self._context = context

    def seal(self, data: Buffer, out: bytearray | memoryview | None = None) -> Sealed:
        """Encrypt a blob into `out` (as long as `data`, or longer; None: a new buffer). The same data gives the same ciphertext."""
        return self._seal(data, out, "blob")

    def seal_private(self, data: bytes) -> tuple[Sealed, ...]:
        """The same for the private part of a manifest, in blobs."""
        view = memoryview(data)
        return tuple(self._seal(view[at : at + BLOB_NBYTES], None, "private") for at in range(0, len(view), BLOB_NBYTES))

    def _seal(self, data: Buffer, out: bytearray | memoryview | None, part: str) -> Sealed:
        view = memoryview(data).cast("B")
        ciphertext = memoryview(bytearray(view.nbytes) if out is None else out).cast("B")[: view.nbytes]
        bound = _bound(self._context, part, view.nbytes)
        nonce = self._nonce(view, bound)
        encryptor = Cipher(self._cipher, GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(bound)
        _run(encryptor, view, ciphertext)
        encryptor.finalize()
        return Sealed(Seal(digest_of(ciphertext), view.nbytes, nonce, encryptor.tag), ciphertext.toreadonly())

    def _nonce(self, data: memoryview, bound: bytes) -> bytes:
        """Of content *and* what is bound to it: were it of the content alone, one nonce would serve two tags, which betrays GCM's key.

        2^48 different blobs under one key would make two equal by chance.
        """
        content = blake3(data, key=self._nonces).digest()
        return blake3(content + bound, key=self._nonces).digest(_NONCE_NBYTES)


class Opener:
    """Decrypts for one model. Any thread."""

    def __init__(self, key: ModelKey, context: ModelContext) -> None:
        self._cipher = AES256(key.derived("encryption"))
        self._context = context

    def open_into(self, seal: Seal, ciphertext: Buffer, out: bytearray | memoryview, path: str = "") -> None:
        """Decrypt a blob into the first `seal.nbytes` bytes of `out` and check its tag, which makes checking its digest needless.

        `path` is the array that needs it and goes into the error. Where it raises, `out` holds zeros.

        Raises: ChunkAlteredError: these are not the bytes that were sealed for this model.
        """
        self._open_into(seal, ciphertext, out, path, "blob")

    def open(self, seal: Seal, ciphertext: Buffer, path: str = "") -> bytearray:
        """The same into a new buffer."""
        plain = bytearray(seal.nbytes)
        self._open_into(seal, ciphertext, plain, path, "blob")
        return plain

    def open_private(self, seals: Iterable[Seal], read_blob: Callable[[Digest], Buffer]) -> bytes:
        """The private part of a manifest. Raises: ChunkAlteredError, and what `read_blob` raises."""
        seals = tuple(seals)
        plain = bytearray(sum(seal.nbytes for seal in seals))
        rest = memoryview(plain)
        for seal in seals:
            self._open_into(seal, read_blob(seal.digest), rest, "the private part of the manifest", "private")
            rest = rest[seal.nbytes :]
        return bytes(plain)

    def _open_into(self, seal: Seal, ciphertext: Buffer, out: bytearray | memoryview, path: str, part: str) -> None:
        source, target = memoryview(ciphertext).cast("B"), memoryview(out).cast("B")
        if target.nbytes < seal.nbytes:
            raise InternalError(f"a buffer of {target.nbytes} bytes for a blob of {seal.nbytes}")
        target = target[: seal.nbytes]
        if source.nbytes != seal.nbytes:
            raise _altered(seal, path, f"has {source.nbytes} bytes instead of {seal.nbytes}")
        decryptor = Cipher(self._cipher, GCM(seal.nonce, seal.tag)).decryptor()
        decryptor.authenticate_additional_data(_bound(self._context, part, seal.nbytes))
        try:
            _run(decryptor, source, target)
            decryptor.finalize()
        except InvalidTag:
            target[:] = bytes(target.nbytes)  # nobody may see what was not authenticated
            raise _altered(seal, path, "is not what was sealed for this model") from None


def on_ciphertext(arrays: Iterable[ArrayEntry], seals: Mapping[Digest, Seal]) -> tuple[ArrayEntry, ...]:
    """Arrays whose segments name blobs of plaintext, made to name the ciphertext. `seals` by the digest of the plaintext.

    Raises: MissingBlobsError: some were not sealed; `args[1]` lists them.
    """
    arrays = tuple(arrays)
    missing = list(dict.fromkeys(part.digest for array in arrays for part in array.segments if part.digest not in seals))
    if missing:
        raise MissingBlobsError(f"{len(missing)} blobs were not encrypted yet: upload them, then publish again", missing)

    def moved(segment: Segment) -> Segment:
        return Segment(seals[segment.digest].digest, segment.offset, segment.nbytes)

    return tuple(msgspec.structs.replace(array, segments=tuple(map(moved, array.segments))) for array in arrays)


def seal_manifest(manifest: Manifest, seals: Iterable[Seal], key: ModelKey, context: ModelContext) -> SealedManifest:
    """The manifest to publish for one that tells all. Its segments name blobs of ciphertext; `seals` are at least those of them.

    Raises: MalformedManifestError: it breaks a rule of the format, or has a blob that none of its files has, or no seal.
    """
    data = encode(manifest)
    if manifest.encryption is not None:
        raise MalformedManifestError("malformed manifest: it is encrypted already; seal the one that names the files")
    carriers = _carriers(manifest.arrays)
    needed = {segment.digest for array in carriers for segment in array.segments}
    private = Sealer(key, context).seal_private(data)
    encryption = Encryption(
        key=key.id,
        private=tuple(sealed.seal for sealed in private),
        seals=tuple(sorted((seal for seal in {*seals} if seal.digest in needed), key=lambda seal: seal.digest)),
    )
    arrays = sorted(_opaque(carriers), key=lambda array: array.path)
    public = Manifest(framework=manifest.framework, entry="", info=public_info(manifest.info), arrays=tuple(arrays), encryption=encryption)
    _check_described(public, manifest)
    encode(public)
    return SealedManifest(public, private)


def open_manifest(public: Manifest, key: ModelKey, context: ModelContext, read_blob: Callable[[Digest], Buffer]) -> Manifest:
    """The manifest that `seal_manifest` was given. Its blobs are still ciphertext, whose seals are in `public.encryption`.

    Raises: LockedModelError: it needs another key; ChunkAlteredError: the private part is not what was sealed for this model;
    MalformedManifestError: it describes other blobs than the public one; what `read_blob` raises.
    """
    encryption = public.encryption
    if encryption is None:
        raise MalformedManifestError("malformed manifest: it is not encrypted")
    if encryption.key != key.id:
        raise LockedModelError(
            f"{context} is encrypted with model key {encryption.key}, not {key.id}: ask its publisher for it", encryption.key
        )
    manifest = decode(Opener(key, context).open_private(encryption.private, read_blob))
    _check_described(public, manifest)
    return manifest


class Vault:
    """Opens the blobs of one version. Any thread. It holds a key, so it does not pickle."""

    def __init__(self, opener: Opener, seals: Iterable[Seal]) -> None:
        self._opener = opener
        self._seals = {seal.digest: seal for seal in seals}

    def open_into(self, digest: Digest, ciphertext: Buffer, out: bytearray | memoryview, path: str) -> memoryview:
        """Decrypt a blob of the version, as it was read, and check its tag; gives the part of `out` that holds it.

        Raises: ChunkAlteredError: the ciphertext is not what was sealed.
        """
        seal = self._seals.get(digest)
        if seal is None:
            raise InternalError(f"blob {digest} is none of this version's")
        self._opener.open_into(seal, ciphertext, out, path)
        return memoryview(out)[: seal.nbytes]

    def around(self, array: ArrayEntry) -> SealedArray:
        """The array, which brings this vault to whoever reads it."""
        sealed = SealedArray(array.path, array.dtype, array.shape, array.segments, array.name)
        sealed.__dict__["vault"] = self
        return sealed

    def __reduce__(self) -> NoReturn:
        raise InternalError("a vault holds a key and stays in its process")


class SealedArray(ArrayEntry, frozen=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    """An array of an encrypted version: its segments name ciphertext. Its JSON is that of any array.

    What opens it is bound to this very object: a copy of it, or what comes out of a pickle, can't be read any more, rather than be read
    as if it were plain.
    """

    @property
    def vault(self) -> Vault:
        """Raises: InternalError: it was lost on the way."""
        found = self.__dict__.get("vault")
        if not isinstance(found, Vault):
            raise InternalError(f"{self.path} is encrypted and was parted from its key: ask the store for its manifest again")
        return found


def vault_of(array: ArrayEntry) -> Vault | None:
    """What opens the array's blobs; None: they are plain."""
    return array.vault if isinstance(array, SealedArray) else None


def open_blob(array: ArrayEntry, digest: Digest, ciphertext: Buffer) -> memoryview:
    """A blob of an encrypted array, as it was read, in memory of its own. Raises: ChunkAlteredError; InternalError: the array is plain."""
    vault = vault_of(array)
    if vault is None:
        raise InternalError(f"{array.path} is not encrypted")
    return vault.open_into(digest, ciphertext, bytearray(memoryview(ciphertext).nbytes), array.path)


def unlocked(public: Manifest, key: ModelKey, context: ModelContext, read_blob: Callable[[Digest], Buffer]) -> Manifest:
    """As `open_manifest`, its arrays ready to be read by whoever can read ciphertext."""
    manifest = open_manifest(public, key, context, read_blob)
    seals = public.encryption.seals if public.encryption else ()
    vault = Vault(Opener(key, context), seals)
    return msgspec.structs.replace(manifest, arrays=tuple(map(vault.around, manifest.arrays)))


def _carriers(arrays: Iterable[ArrayEntry]) -> list[ArrayEntry]:
    """The arrays that hold all blobs: tensors are but views of them."""
    return sorted((array for array in arrays if not array.path.startswith(f"{TENSORS}/")), key=lambda array: array.path)


def _opaque(carriers: Iterable[ArrayEntry]) -> list[ArrayEntry]:
    return [ArrayEntry(public_path(index), "uint8", array.shape, array.segments) for index, array in enumerate(carriers)]


def _check_described(public: Manifest, private: Manifest) -> None:
    """Raises: MalformedManifestError: the two do not speak of the same bytes, or of a model of the same kind."""
    if private.encryption is not None or public_info(private.info) != public.info:
        raise MalformedManifestError("malformed manifest: its private part describes another kind of model")
    carriers = _carriers(private.arrays)
    if sorted(_opaque(carriers), key=lambda array: array.path) != list(public.arrays):
        raise MalformedManifestError("malformed manifest: its private part describes other files")
    stored = {segment.digest for array in carriers for segment in array.segments}
    if not stored.issuperset(private.blobs()):
        raise MalformedManifestError("malformed manifest: its private part has a tensor that lies in none of its files")


def _bound(context: ModelContext, part: str, nbytes: int) -> bytes:
    """The associated data: no two contents have the same, because JSON is read in one way only."""
    return msgspec.json.encode([SCHEME, part, context.publisher, context.name, nbytes])


def _run(cipher: AEADEncryptionContext | AEADDecryptionContext, source: memoryview, target: memoryview) -> None:
    """All of `source` through the cipher, straight into `target`.

    The end goes by itself: `update_into` may ask for room for another block behind what it writes.
    """
    whole = max(0, source.nbytes - _BLOCK_NBYTES)
    if whole:
        cipher.update_into(source[:whole], target)
    target[whole:] = cipher.update(source[whole:])


def _altered(seal: Seal, path: str, reason: str) -> ChunkAlteredError:
    needed = f" (needed by {path})" if path else ""
    return ChunkAlteredError(f"encrypted blob {seal.digest}{needed} {reason}: replicate or publish the version again", seal.digest, path)
