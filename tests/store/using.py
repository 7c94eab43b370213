"""Every way of using a version: what is handed out is what was published, or the error says what is wrong."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from mutating import REFS, Golden
from store_models import LAB, files_in

from tether import store
from tether.errors import (
    BadSignatureError,
    ChunkAlteredError,
    ChunkMissingError,
    ConflictError,
    FormatTooNewError,
    LockedModelError,
    MissingBlobsError,
    NotFoundError,
    StoreError,
    TetherError,
)
from tether.store import Repository
from tether.store.hierarchy.zarr import VersionStore
from tether.types import ModelRef

TELLING = (StoreError, NotFoundError, ConflictError, BadSignatureError, FormatTooNewError, LockedModelError)
"""What a damaged store may answer. LockedModelError: the row of the model key is gone.
ConflictError: of two models with one name, when the row that made one the lab's own is gone."""


class WrongError(AssertionError):
    """Something else than what was published was handed out, or the error does not say what is wrong."""


@dataclass
class Seen:
    """What using the store gave: how often the right bytes, and the errors."""

    right: int = 0
    errors: list[TetherError] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    """Versions of which a chunk was missing or altered."""

    def attempt(self, what: str, use: Callable[[], bool], *, also: tuple[type[TetherError], ...] = ()) -> None:
        try:
            if not use():
                raise WrongError(f"{what} gave other bytes than were published")
            self.right += 1
        except TetherError as error:
            self.errors.append(error)
            if not isinstance(error, (*TELLING, *also)) or len(str(error)) < 20:
                raise WrongError(f"{what}: {error!r} does not tell what is wrong") from error
            if isinstance(error, ChunkMissingError | ChunkAlteredError) and str(error.args[1])[:8] not in str(error):
                raise WrongError(f"{what}: {error!r} does not name the chunk") from error


def use_all(golden: Golden, repository: Repository, chance: random.Random) -> Seen:
    """Every way to a version's bytes."""
    seen = Seen()
    for ref in REFS:
        seen.attempt(ref, lambda ref=ref: _resolves(golden, repository, ref))
    for digest in sorted(golden.contents):
        before = len(seen.errors)
        _use_version(golden, repository, digest, chance, seen)
        if any(isinstance(error, ChunkMissingError | ChunkAlteredError) for error in seen.errors[before:]):
            seen.damaged.add(digest)
    return seen


def _resolves(golden: Golden, repository: Repository, ref: str) -> bool:
    record = repository.resolve(ModelRef.parse(ref))
    data = repository.manifest_bytes(record.digest)
    return record.digest in golden.meanings[ref] and data == golden.manifests[record.digest]


def _use_version(golden: Golden, repository: Repository, digest: str, chance: random.Random, seen: Seen) -> None:
    if digest == store.digest_of(golden.draft[0]):
        return
    files, raw, manifest = golden.contents[digest], golden.tensors[digest], golden.opened[digest]
    seen.attempt("manifest", lambda: repository.manifest(digest) == manifest)
    seen.attempt("checkout", lambda: files_in(repository.checkout(digest)) == files)
    for array in manifest.arrays:
        data = files.get(array.path.removeprefix("files/")) if array.path.startswith("files/") else raw[array.path.removeprefix("tensors/")]
        seen.attempt(array.path, lambda array=array, data=data: repository.read_array(array, 0, array.nbytes) == data)
    name = chance.choice(sorted(raw))
    seen.attempt("zarr", lambda: _zarr(repository, digest, f"tensors/{name}") == raw[name])
    seen.attempt("load_tensors", lambda: {key: values.tobytes() for key, values in repository.load_tensors(digest).items()} == raw)
    seen.attempt("load_file", lambda: bytes(repository.load_file(digest, "w.bin")) == files["w.bin"])


def _zarr(repository: Repository, digest: str, path: str) -> bytes:
    buffer = VersionStore(repository, digest).get_sync(f"{path}/c/0")
    return b"" if buffer is None else buffer.to_bytes()


def verify_all(repository: Repository, seen: Seen) -> None:
    """`verify` reports what a reader would meet of damage to stored data."""
    try:
        problems = repository.verify().problems
        known = {record.digest for model in repository.models() for record in model.versions}
    except TetherError as error:
        if not isinstance(error, TELLING):
            raise
        return
    if seen.damaged & known and not problems:
        raise WrongError(f"verify reports nothing, but a reader meets {seen.errors}")


def publish_draft(golden: Golden, repository: Repository, seen: Seen) -> None:
    """What was staged is published whole, or said to be missing; or it is sent again and then published whole."""
    data, signature = golden.draft

    def publish_it() -> bool:
        digest = repository.publish("digits", data, LAB.public, signature).digest
        return files_in(repository.checkout(digest)) == golden.contents[digest]

    seen.attempt("draft", publish_it, also=(MissingBlobsError,))
