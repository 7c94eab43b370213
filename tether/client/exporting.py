"""How a version's files travel down: fetched blob by blob, each checked against its digest, in place all at once or not at all."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
from blake3 import blake3

from tether.client.together import together
from tether.errors import ChunkAlteredError, ConflictError, MalformedManifestError, StoreError, TetherError
from tether.store.format.layout import FILES, HIDDEN, path_problem
from tether.store.format.manifest import Manifest, digest_of, encode

__all__ = ["Downloads", "SegmentLike", "StoredFile", "checked_segment", "export_files", "fetch_file", "is_encrypted", "stored_files"]

_AHEAD: Final = 4
"""Blobs that are fetched while one is written: 16 MiB of memory."""


class Downloads(Protocol):
    """What an export needs of a client."""

    async def get_blob(self, digest: str, version: str | None = None) -> bytes: ...


class SegmentLike(Protocol):
    """A range of a blob."""

    @property
    def digest(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class _Segment(msgspec.Struct, frozen=True, array_like=True):
    digest: str
    offset: int
    nbytes: int


class _Array(msgspec.Struct, frozen=True):
    path: str
    segments: tuple[_Segment, ...]


class _Manifest(msgspec.Struct, frozen=True):
    arrays: tuple[_Array, ...]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a version: its path in the model and its blobs."""

    path: str
    segments: tuple[_Segment, ...]
    sealed_in: str | None = None
    """The encrypted version (`digits:2`) that it belongs to: its blobs come decrypted, and were checked by the lab."""

    @property
    def own(self) -> bool:
        """Whether it is the model's own and not something that the version keeps beside it."""
        return not self.path.startswith(HIDDEN + "/")


def is_encrypted(answer: Mapping[str, Any], digest: str) -> bool:
    """Whether a version is encrypted, by the gateway's answer about its manifest: then, and only then, it can't be checked by digests.

    Raises: ChunkAlteredError: the manifest that should prove it is not the one of this digest.
    """
    if "public" not in answer:
        return False
    try:
        public = msgspec.convert(answer["public"], Manifest)
        if public.encryption is not None and digest_of(encode(public)) == digest:
            return True
    except (msgspec.ValidationError, MalformedManifestError):
        pass
    raise ChunkAlteredError(
        f"the gateway sent another manifest than that of {digest[:12]}; `tether verify` finds the cause", digest, "manifest"
    )


def stored_files(manifest: Mapping[str, Any], sealed_in: str | None = None) -> list[StoredFile]:
    """The files that a manifest lists. `sealed_in`: the version, where that is encrypted.

    Raises: MalformedManifestError: it is not a manifest, or has a path that leads out of the folder.
    """
    try:
        arrays = msgspec.convert(manifest, _Manifest).arrays
    except msgspec.ValidationError as error:
        raise MalformedManifestError(f"the manifest is not valid: {error}; nothing was written") from error
    files = [StoredFile(path, array.segments, sealed_in) for array in arrays for path in _file_path(array.path)]
    for file in files:
        problem = path_problem(file.path)
        if problem:
            raise MalformedManifestError(f"the manifest's path {file.path[:200]!r} {problem}; nothing was written")
    return files


def _file_path(path: str) -> Iterator[str]:
    group, _, rest = path.partition("/")
    if group == FILES:
        yield rest


async def export_files(client: Downloads, files: list[StoredFile], directory: Path) -> Path:
    """Write the model's own files, byte for byte, to `directory`, which must not exist or be empty. Returns it.

    They are written to a folder beside it, which then takes its place: whatever interrupts this, `directory` is complete or untouched.

    Raises: ConflictError: it holds something; StoreError: it can't be written; ChunkAlteredError: a blob came with other bytes.
    """
    target, draft = _begun(directory)
    try:
        for file in files:
            if file.own:
                await _write(client, file, draft / file.path)
        await asyncio.to_thread(_put_in_place, draft, target)
    except TetherError:  # some are OSErrors too
        raise
    except OSError as error:
        raise StoreError(f"{target} can't be written: {error.strerror or error}; nothing was kept") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _begun(directory: Path) -> tuple[Path, Path]:
    """The absolute target, and the folder beside it that will take its place."""
    target = Path(os.path.abspath(directory.expanduser()))  # noqa: PTH100 (a link at the end is to be seen, not followed)
    try:
        _refuse_full(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        draft.mkdir()
        return target, draft
    except OSError as error:
        raise StoreError(f"{target} can't be written: {error.strerror}; choose another folder") from error


def _refuse_full(target: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ConflictError(f"{target} exists and is not an empty folder; choose another, nothing is overwritten")


def _put_in_place(draft: Path, target: Path) -> None:
    _refuse_full(target)
    draft.replace(target)


async def _write(client: Downloads, file: StoredFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as out:
        async for data in _content(client, file):
            await asyncio.to_thread(out.write, data)
        out.flush()
        await asyncio.to_thread(os.fsync, out.fileno())


async def fetch_file(client: Downloads, file: StoredFile, limit: int) -> bytes:
    """The whole file, in memory.

    Raises: MalformedManifestError: it is over `limit` bytes; ChunkAlteredError: a blob came with other bytes.
    """
    if sum(segment.nbytes for segment in file.segments) > limit:
        raise MalformedManifestError(f"file {file.path!r} is over {limit} bytes; export the version instead")
    return b"".join([data async for data in _content(client, file)])


async def _content(client: Downloads, file: StoredFile) -> AsyncIterator[bytes]:
    for start in range(0, len(file.segments), _AHEAD):
        window = file.segments[start : start + _AHEAD]
        for data in await together(_segment(client, file, segment) for segment in window):
            yield data


async def _segment(client: Downloads, file: StoredFile, segment: _Segment) -> bytes:
    data = await client.get_blob(segment.digest, file.sealed_in)
    return checked_segment(data, segment, file.path, sealed=file.sealed_in is not None)


def checked_segment(data: bytes, segment: SegmentLike, path: str, *, sealed: bool = False) -> bytes:
    """What a segment of the array `path` means of the blob that came for it; `sealed`: decrypted, so that its digest says nothing.

    Raises: ChunkAlteredError: the blob has another digest; MalformedManifestError: it is shorter than the segment says.
    """
    if not sealed and blake3(data).hexdigest() != segment.digest:
        raise ChunkAlteredError(
            f"blob {segment.digest} of {path!r} came with other bytes; nothing was kept: `tether verify` finds the cause",
            segment.digest,
            path,
        )
    if segment.offset < 0 or segment.offset + segment.nbytes > len(data):
        raise MalformedManifestError(f"the manifest wants bytes of blob {segment.digest} that it does not have; nothing was kept")
    return data[segment.offset : segment.offset + segment.nbytes]
