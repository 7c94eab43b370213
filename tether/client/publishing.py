"""How a model's files travel up: found and checked, cut into named blobs, and only what the lab lacks is sent."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from blake3 import blake3

from tether.client.together import together
from tether.errors import BadModelError, MissingBlobsError, NoModelFileError, RemoteError, TetherError
from tether.runtimes import recognise
from tether.runtimes.weights import boundaries
from tether.store.format.layout import HIDDEN, Piece, cut, path_problem

__all__ = [
    "EXAMPLE",
    "Blob",
    "DraftFile",
    "Source",
    "Uploads",
    "cut_file",
    "cut_model",
    "draft",
    "model_sources",
    "publish_draft",
    "upload",
]

EXAMPLE: Final = f"{HIDDEN}/example.npz"
"""Where a version keeps its example tensors, beside the model's files."""
_HIDDEN: Final = frozenset({EXAMPLE, f"{HIDDEN}/signature.json"})
"""What a folder may say of its model beside the model's own files; all else in `.tether` is the lab's to write."""
_AT_ONCE: Final = 4
"""Uploads at a time: enough to fill a link while the gateway hashes, and 16 MiB of memory."""
_ROUNDS: Final = 4
"""Times the draft is sent: a blob may expire between its upload and the commit, not again and again."""
_LITTER: Final = frozenset({"__pycache__", ".ipynb_checkpoints", ".DS_Store", ".git"})
"""What tools leave in folders and is no part of a model; it would give the same model another digest."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a model to be: where its bytes are now."""

    path: str
    """Relative path in the model, with slashes."""
    content: Path | bytes


@dataclass(frozen=True, slots=True)
class Blob:
    """One cut of a source."""

    digest: str
    source: Source
    offset: int
    nbytes: int

    def read(self) -> bytes:
        """Raises: NoModelFileError: the file is gone or was changed since it was cut."""
        if isinstance(self.source.content, bytes):
            return self.source.content[self.offset : self.offset + self.nbytes]
        try:
            with self.source.content.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
        except OSError as error:
            raise _unreadable(self.source.content, error) from error
        if blake3(data).hexdigest() != self.digest:
            raise NoModelFileError(
                f"{self.source.content} changed while it was being published; publish it again when nothing writes to it"
            )
        return data


@dataclass(frozen=True, slots=True)
class DraftFile:
    """One file, cut."""

    path: str
    nbytes: int
    blobs: tuple[Blob, ...]

    def as_json(self) -> dict[str, Any]:
        """As the gateway takes it: each blob is one segment, used whole."""
        return {"path": self.path, "nbytes": self.nbytes, "segments": [[blob.digest, 0, blob.nbytes] for blob in self.blobs]}


class Uploads(Protocol):
    """What a publish needs of a client."""

    async def put_blob(self, digest: str, data: bytes, encrypt: str | None = None) -> None: ...

    async def publish(self, name: str, draft: Mapping[str, Any]) -> dict[str, Any]: ...


def model_sources(path: str | os.PathLike[str]) -> tuple[str, list[Source]]:
    """The model's entry (a single file's name, "" for a folder) and its files, sorted.

    Raises: NoModelFileError: nothing is there, or nothing in it; BadModelError: a link, a device, a name that a version can't hold.
    """
    root = Path(path).expanduser()
    try:
        mode = root.lstat().st_mode
        if stat.S_ISDIR(mode):
            return "", _folder_sources(root)
        return root.name, [Source(_checked_name(root.name, root), _checked_file(root, mode))]
    except TetherError:  # some are OSErrors too
        raise
    except FileNotFoundError:
        raise NoModelFileError(f"no file or folder {root}; check the path (this process is in {Path.cwd()})") from None
    except OSError as error:
        raise _unreadable(root, error) from error


def _folder_sources(root: Path) -> list[Source]:
    found = sorted(_walked(root, ""))
    if not any(path.stat().st_size for name, path in found if name not in _HIDDEN):
        raise NoModelFileError(f"folder {root} holds no bytes; give the folder that the framework wrote the model to")
    return [Source(name, path) for name, path in found]


def _walked(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name, path = prefix + entry.name, Path(entry.path)
            if entry.name in _LITTER or (prefix == f"{HIDDEN}/" and name not in _HIDDEN):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walked(path, name + "/")
            else:
                yield _checked_name(name, path), _regular(path, entry.stat(follow_symlinks=False).st_mode)


def _checked_file(path: Path, mode: int) -> Path:
    if not _regular(path, mode).stat().st_size:
        raise NoModelFileError(f"{path} is empty; was it written completely?")
    return path


def _regular(path: Path, mode: int) -> Path:
    if stat.S_ISLNK(mode):
        raise BadModelError(f"{path} is a symbolic link; a version holds files only: publish its target, or copy it with `cp -L`")
    if not stat.S_ISREG(mode):
        raise BadModelError(f"{path} is not a regular file; a version holds files and folders only")
    return path


def _checked_name(name: str, path: Path) -> str:
    problem = path_problem(name)
    if problem:
        raise BadModelError(f"the name of {str(path)!r} {problem}; rename it")
    return name


def _unreadable(path: Path, error: OSError) -> NoModelFileError:
    return NoModelFileError(f"{path} can't be read: {error.strerror or error}")


def cut_model(path: str | os.PathLike[str], sources: Iterable[Source], framework: str | None = None) -> list[DraftFile]:
    """Cut a model's files at their tensors, so that only what changed since an earlier version has to be sent.

    Raises: NoModelFileError: a file can't be read.
    """
    ranges = _tensor_ranges(Path(path).expanduser(), framework)
    return [cut_file(source, ranges.get(source.path, ())) for source in sources]


def _tensor_ranges(path: Path, framework: str | None) -> Mapping[str, Sequence[Piece]]:
    """Nothing where this is no model: the lab says what is wrong with it, and to all clients the same."""
    try:
        _, format_ = recognise(path, framework)
    except TetherError:
        return {}
    return {file: [Piece(*each) for each in ranges] for file, ranges in boundaries(path, format_).items()}


def cut_file(source: Source, tensors: Sequence[Piece] = ()) -> DraftFile:
    """Read it once, in pieces of at most 4 MiB, and name each piece by its BLAKE3 digest.

    Raises: NoModelFileError: it can't be read.
    """
    if isinstance(source.content, bytes):
        pieces = [source.content[offset : offset + nbytes] for offset, nbytes in cut(len(source.content))]
        return _drafted(source, iter(pieces))
    try:
        with source.content.open("rb") as file:
            sizes = cut(os.fstat(file.fileno()).st_size, tensors)
            return _drafted(source, (file.read(piece.nbytes) for piece in sizes))
    except OSError as error:
        raise _unreadable(source.content, error) from error


def _drafted(source: Source, pieces: Iterator[bytes]) -> DraftFile:
    blobs: list[Blob] = []
    offset = 0
    for data in pieces:
        blobs.append(Blob(blake3(data).hexdigest(), source, offset, len(data)))
        offset += len(data)
    return DraftFile(source.path, offset, tuple(blobs))


def draft(
    files: Sequence[DraftFile],
    entry: str,
    *,
    framework: str | None,
    aliases: Sequence[str],
    tags: Mapping[str, str],
    encrypt: bool | None = None,
) -> dict[str, Any]:
    """The body of `POST /tether/v1/models/{name}/versions`."""
    described = [file.as_json() for file in files]
    body = {"framework": framework, "entry": entry, "files": described, "aliases": list(aliases), "tags": dict(tags)}
    return body if encrypt is None else body | {"encrypt": encrypt}


async def publish_draft(client: Uploads, name: str, body: Mapping[str, Any], files: Sequence[DraftFile]) -> dict[str, Any]:
    """Send the draft, then what the lab says it lacks, then the draft again: one round trip when nothing is lacking.

    Raises: what the gateway answers; RemoteError: it asks for blobs that are not of this draft, or again for what was sent.
    """
    blobs = {blob.digest: blob for file in files for blob in file.blobs}
    for _ in range(_ROUNDS):
        try:
            return await client.publish(name, body)
        except MissingBlobsError as error:
            missing = error.args[1] if len(error.args) > 1 else ()
            if not missing or not blobs.keys() >= set(missing):
                raise RemoteError("the gateway asks for blobs that are not part of this model; nothing was published") from error
            await upload(client, [blobs[digest] for digest in dict.fromkeys(missing)], name if body.get("encrypt") else None)
    raise RemoteError("the gateway keeps asking for blobs that were sent; look into its log with `tether logs manager`")


async def upload(client: Uploads, blobs: Sequence[Blob], encrypt: str | None = None) -> None:
    """Send blobs, a few at a time. `encrypt`: the model for which they are to be encrypted on arrival.

    Raises: NoModelFileError: a file changed since it was cut; what the gateway answers.
    """
    waiting = iter(blobs)

    async def sender() -> None:
        for blob in waiting:
            await client.put_blob(blob.digest, await asyncio.to_thread(blob.read), encrypt)

    await together(sender() for _ in range(min(_AT_ONCE, len(blobs))))
