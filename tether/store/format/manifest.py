"""Pure: the manifest of a version: what it says, its canonical bytes, its rules, its signature's message."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
from blake3 import blake3

from tether.errors import MalformedManifestError
from tether.store.format.layout import BLOB_NBYTES, DTYPES, FILES, KEYS, TENSORS, path_problem
from tether.types import Digest, Framework, ModelInfo

__all__ = [
    "FORMAT",
    "MAX_NBYTES",
    "SCHEME",
    "ArrayEntry",
    "Encryption",
    "Manifest",
    "Seal",
    "Segment",
    "decode",
    "digest_of",
    "encode",
    "is_digest",
    "public_info",
    "public_path",
    "signed_message",
]

FORMAT = 1
MAX_NBYTES = 64 * 1024 * 1024
"""Bound before parsing: half a million segments, 2 TB of model."""
_MAX_ARRAYS = 100_000
"""A version's arrays are listed, made into folders and zarr nodes: a bound on the work that a stranger's manifest may ask for."""
_MAX_DIMENSIONS = 32
_MAX_ARRAY_NBYTES = 1 << 50
_MAX_NAME = 4096
"""Characters of a tensor's name."""
_MAX_DEPTH = 32
"""Nesting of `attributes`."""
_MAX_ATTRIBUTES_NBYTES = 1 << 20
"""Of `attributes` as JSON: empty lists take 30 times their two bytes in memory."""
_SIGNED_PREFIX = b"tether manifest v1\x00"
"""Sets signatures of manifests apart from all else that the same key signs."""
SCHEME = "aes-256-gcm"
"""The one way in which blobs are encrypted (encrypted.py)."""
_NONCE_NBYTES = 12
_TAG_NBYTES = 16
_MAX_PRIVATE_BLOBS = MAX_NBYTES // BLOB_NBYTES
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEY_ID = re.compile(r"[0-9a-f]{32}")
_GROUPS = (FILES, KEYS, TENSORS)


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A range of a blob. It is in no cycle, so Python's collector need not look at thousands of them."""

    digest: Digest
    offset: int
    nbytes: int


class ArrayEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One array: its bytes are its segments, one after the other.

    A file is a flat uint8 array at `files/<relative path>`, a weight a typed one at `tensors/<its name, escaped>`.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    name: str = ""
    """A tensor's name where its path could not keep it (too long)."""

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype] * math.prod(self.shape)


class Seal(msgspec.Struct, frozen=True, array_like=True):
    """What it takes, besides the model key, to open an encrypted blob."""

    digest: Digest
    """Of the ciphertext: what is stored, sent and verified."""
    nbytes: int
    """Of the plaintext, and as many of the ciphertext."""
    nonce: bytes
    tag: bytes


class Encryption(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the blobs of a version are encrypted."""

    key: str
    """Id of the model key, 32 hex digits: it follows from the key, so another key can't pass for it."""
    private: tuple[Seal, ...]
    """The blobs that hold, one after the other, what the manifest doesn't show: a manifest of its own, with the real names."""
    seals: tuple[Seal, ...]
    """One for each blob of the arrays, sorted by digest."""
    scheme: str = SCHEME


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that makes a version. No name, number or time: the same bytes have the same digest wherever and whenever they are published."""

    framework: Framework
    entry: str
    """Relative path of the file or folder that the runtime loads; "" is the whole folder."""
    info: ModelInfo
    arrays: tuple[ArrayEntry, ...]
    """Sorted by path."""
    attributes: dict[str, Any] = {}
    """JSON: provenance, names of the examples."""
    encryption: Encryption | None = None
    """Of an encrypted version: it shows sizes, framework and whether it is code; names and attributes are in its private part."""
    format: int = FORMAT

    @property
    def nbytes(self) -> int:
        """Sum of the files' sizes."""
        return sum(array.nbytes for array in self.files())

    def files(self) -> Iterator[ArrayEntry]:
        return (array for array in self.arrays if array.path.startswith(FILES + "/"))

    def tensors(self) -> Iterator[ArrayEntry]:
        return (array for array in self.arrays if array.path.startswith(TENSORS + "/"))

    def blobs(self) -> list[Digest]:
        """Every blob once, in the order of the files; then those of the private part."""
        private = self.encryption.private if self.encryption else ()
        digests = [segment.digest for array in self.arrays for segment in array.segments]
        return list(dict.fromkeys([*digests, *(seal.digest for seal in private)]))


class _Head(msgspec.Struct):
    format: int


class _Unread(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A manifest whose attributes, of any kind and depth, were not made into objects."""

    framework: Framework
    entry: str
    info: ModelInfo
    arrays: tuple[ArrayEntry, ...]
    attributes: msgspec.Raw = msgspec.Raw(b"{}")
    encryption: Encryption | None = None
    format: int = FORMAT


_head = msgspec.json.Decoder(_Head, strict=True)
_unread = msgspec.json.Decoder(_Unread, strict=True)
_attributes = msgspec.json.Decoder(dict[str, Any], strict=True)


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes: JSON, keys and arrays sorted, no blanks.

    Raises: MalformedManifestError: it breaks a rule of the format.
    """
    manifest = msgspec.structs.replace(manifest, arrays=tuple(sorted(manifest.arrays, key=operator.attrgetter("path"))))
    _check(manifest)
    try:
        data = _canonical(manifest)
        attributes_nbytes = len(msgspec.json.encode(manifest.attributes))
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedManifestError(f"the manifest can't be written as JSON: {error}") from None
    _check_size(attributes_nbytes)
    if len(data) > MAX_NBYTES:
        raise MalformedManifestError(f"the manifest is over {MAX_NBYTES} bytes: publish the model in fewer or smaller files")
    return data


def decode(data: bytes) -> Manifest:
    """The manifest that `encode` gave `data` for.

    Raises: MalformedManifestError: too long, not JSON, not canonical, of another format, or breaking a rule of it.
    """
    if len(data) > MAX_NBYTES:
        raise MalformedManifestError(f"the manifest has {len(data)} bytes; at most {MAX_NBYTES} are allowed")
    try:
        manifest = _read(_understood(data))
        canonical = _canonical(manifest)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, MalformedManifestError):
            raise
        raise MalformedManifestError(f"the manifest can't be read: {error}; publish it again with this version of Tether") from None
    _check(manifest)
    if canonical != data:
        raise MalformedManifestError("the manifest is not in canonical form (sorted keys, no blanks): make it with `encode`")
    return manifest


def _understood(data: bytes) -> _Unread:
    """Raises: MalformedManifestError: it is of another format, also where that has fields that this one doesn't."""
    try:
        unread = _unread.decode(data)
        number = unread.format
    except msgspec.MsgspecError:
        number = _head.decode(data).format
        if number == FORMAT:
            raise
    if number != FORMAT:
        raise MalformedManifestError(f"the manifest has format {number}; this Tether understands {FORMAT}: update it")
    return unread


def _read(unread: _Unread) -> Manifest:
    _check_size(len(memoryview(unread.attributes)))
    fields = msgspec.structs.asdict(unread)
    return Manifest(**{**fields, "attributes": _attributes.decode(unread.attributes)})


def _check_size(attributes_nbytes: int) -> None:
    if attributes_nbytes > _MAX_ATTRIBUTES_NBYTES:
        raise _malformed(f"attributes of {attributes_nbytes} bytes: at most {_MAX_ATTRIBUTES_NBYTES}; keep what is longer in a file")


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """BLAKE3 of `data`, as 64 hex digits."""
    return Digest(blake3(data).hexdigest())


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def signed_message(data: bytes) -> bytes:
    """What a publisher signs for the manifest whose canonical bytes are `data`."""
    return _SIGNED_PREFIX + data


def public_path(index: int) -> str:
    """What an encrypted version calls its file of this index.

    >>> public_path(0)
    'files/0'
    """
    return f"{FILES}/{index}"


def public_info(info: ModelInfo) -> ModelInfo:
    """What an encrypted version says of the model to those without its key: whether they may run it, not what it is."""
    return ModelInfo(info.framework, info.format, (), (), batched=info.batched, pure=info.pure, code=info.code)


def _canonical(manifest: Manifest) -> bytes:
    fields = msgspec.structs.asdict(manifest)
    if manifest.encryption is None:
        del fields["encryption"]  # not null: plain manifests keep the bytes, and so the digest, that they had before there was encryption
    if not manifest.info.streams:  # as little: no manifest had it before models streamed
        fields["info"] = {name: value for name, value in msgspec.structs.asdict(manifest.info).items() if name != "streams"}
    return msgspec.json.encode(fields, order="sorted")


def _check(manifest: Manifest) -> None:
    """Raises: MalformedManifestError: naming the first rule that is broken."""
    if manifest.format != FORMAT:
        raise _malformed(f"format {manifest.format} is not {FORMAT}")
    if manifest.info.framework != manifest.framework:
        raise _malformed(f"framework {manifest.framework!r} but info.framework {manifest.info.framework!r}")
    if not 0 < len(manifest.arrays) <= _MAX_ARRAYS:
        raise _malformed(f"{len(manifest.arrays)} arrays: 1 to {_MAX_ARRAYS} are allowed")
    known: set[Digest] = set()
    for array in manifest.arrays:
        _check_array(array, known)
    _check_tree([array.path for array in manifest.arrays])
    _check_entry(manifest)
    _check_json(manifest.attributes, _MAX_DEPTH)
    if manifest.encryption is not None:
        _check_encryption(manifest.encryption, manifest)


def _check_array(array: ArrayEntry, known: set[Digest]) -> None:
    """`known`: digests that were looked at. A version may have thousands of arrays, so each question is asked as cheaply as it can be."""
    path, shape = array.path, array.shape
    group, _, rest = path.partition("/")
    problem = path_problem(path)
    if problem or group not in _GROUPS or not rest:
        raise _malformed(f"array path {path[:200]!r} {problem or 'is not under files/, keys/ or tensors/'}")
    itemsize = DTYPES.get(array.dtype)
    if itemsize is None:
        raise _malformed(f"array {path[:200]!r} has dtype {array.dtype[:40]!r}; known are {', '.join(DTYPES)}")
    if shape and (len(shape) > _MAX_DIMENSIONS or min(shape) < 0 or max(shape) >= _MAX_ARRAY_NBYTES):
        raise _malformed(f"array {path[:200]!r} has an impossible shape")
    if group != TENSORS and (array.dtype != "uint8" or len(shape) != 1):
        raise _malformed(f"{path[:200]!r} must be a flat uint8 array")
    if array.name and (group != TENSORS or len(array.name) > _MAX_NAME):
        raise _malformed(f"array {path[:200]!r} has a name of its own that it may not have")
    nbytes = itemsize * math.prod(shape)
    if nbytes > _MAX_ARRAY_NBYTES or _checked_nbytes(array, known) != nbytes:
        raise _malformed(f"array {path[:200]!r}: its segments do not add up to the size of its shape")


def _checked_nbytes(array: ArrayEntry, known: set[Digest]) -> int:
    """What the array's segments add up to, each of which is a range of a blob."""
    total = 0
    for segment in array.segments:
        digest, offset, nbytes = segment.digest, segment.offset, segment.nbytes
        if digest not in known:
            if not is_digest(digest):
                raise _malformed(f"array {array.path[:200]!r} has a segment whose digest is not 64 hex digits")
            known.add(digest)
        if offset < 0 or nbytes <= 0 or offset + nbytes > BLOB_NBYTES:
            raise _malformed(f"array {array.path[:200]!r} has a segment outside of its blob")
        total += nbytes
    return total


def _check_tree(paths: list[str]) -> None:
    """Each path once, in order, and none both an array and a folder of arrays."""
    if not all(map(operator.lt, paths, paths[1:])):
        path = next(after for before, after in pairwise(paths) if before >= after)
        raise _malformed(f"array path {path[:200]!r} is given twice or out of order")
    folders: set[str] = set()
    for path in {path.rpartition("/")[0] for path in paths}:
        parent = path
        while parent and parent not in folders:
            folders.add(parent)
            parent = parent.rpartition("/")[0]
    both = folders.intersection(paths)
    if both:
        folder = min(both)
        inside = next(path for path in paths if path.startswith(folder + "/"))
        raise _malformed(f"array path {folder[:200]!r} is also the folder of {inside[:200]!r}")


def _check_entry(manifest: Manifest) -> None:
    if not manifest.entry:
        return
    path = f"{FILES}/{manifest.entry}"
    if path_problem(path) or not any(array.path == path or array.path.startswith(path + "/") for array in manifest.arrays):
        raise _malformed(f"entry {manifest.entry[:200]!r} is not one of the files")


def _check_encryption(encryption: Encryption, manifest: Manifest) -> None:
    if encryption.scheme != SCHEME:
        raise _malformed(f"encrypted by {encryption.scheme[:40]!r}; known is {SCHEME}: update Tether")
    if not _KEY_ID.fullmatch(encryption.key):
        raise _malformed("the id of the model key is not 32 hex digits")
    _check_opaque(manifest)
    _check_private(encryption.private)
    _check_seals(encryption, manifest.arrays)


def _check_opaque(manifest: Manifest) -> None:
    """Nothing that is in the model's files may stand in the clear, by mistake or on purpose."""
    opaque = {public_path(index) for index in range(len(manifest.arrays))}
    if manifest.entry or manifest.attributes or manifest.info != public_info(manifest.info):
        raise _malformed("it is encrypted but shows an entry, attributes, inputs, outputs or requirements")
    if any(array.path not in opaque for array in manifest.arrays):
        raise _malformed(f"it is encrypted but its arrays are not called {public_path(0)}, {public_path(1)} …")


def _check_private(private: tuple[Seal, ...]) -> None:
    if not 0 < len(private) <= _MAX_PRIVATE_BLOBS:
        raise _malformed(f"its private part has {len(private)} blobs; 1 to {_MAX_PRIVATE_BLOBS} are allowed")
    if any(seal.nbytes != BLOB_NBYTES for seal in private[:-1]):
        raise _malformed("its private part is not cut into blobs of 4 MiB")


def _check_seals(encryption: Encryption, arrays: tuple[ArrayEntry, ...]) -> None:
    """Exactly one for each blob. Two blobs of one nonce would betray both."""
    every = [*encryption.seals, *encryption.private]
    for seal in every:
        if not is_digest(seal.digest) or len(seal.nonce) != _NONCE_NBYTES or len(seal.tag) != _TAG_NBYTES:
            raise _malformed(f"a seal needs a digest, a nonce of {_NONCE_NBYTES} and a tag of {_TAG_NBYTES} bytes")
        if not 0 < seal.nbytes <= BLOB_NBYTES:
            raise _malformed(f"the seal of {seal.digest} has an impossible size")
    if len({seal.nonce for seal in every}) != len({seal.digest for seal in every}):
        raise _malformed("two different blobs have one nonce")
    if any(before.digest >= after.digest for before, after in pairwise(encryption.seals)):
        raise _malformed("the seals are not sorted by digest, or one is given twice")
    ends: dict[Digest, int] = {}
    for segment in (segment for array in arrays for segment in array.segments):
        ends[segment.digest] = max(ends.get(segment.digest, 0), segment.offset + segment.nbytes)
    sizes = {seal.digest: seal.nbytes for seal in encryption.seals}
    if sizes.keys() != ends.keys() or any(end > sizes[digest] for digest, end in ends.items()):
        raise _malformed("the seals are not those of the arrays' blobs")


def _check_json(value: object, depth: int) -> None:
    match value:
        case None | bool() | str():
            return
        case int() if -(1 << 63) <= value < 1 << 63:
            return
        case float() if math.isfinite(value):
            return
        case dict() | list() | tuple() if depth > 0:
            if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
                raise _malformed("attributes have a key that is not text")
            for item in value.values() if isinstance(value, dict) else value:
                _check_json(item, depth - 1)
        case _:
            raise _malformed(f"attributes hold a {type(value).__name__} that JSON can't keep, or nest deeper than {_MAX_DEPTH}")


def _malformed(reason: str) -> MalformedManifestError:
    return MalformedManifestError(f"malformed manifest: {reason}")
