"""Where a worker's models come from: the lab's own store where it lies on this host, else a replica that is fetched from the manager."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from tether.errors import (
    ChunkAlteredError,
    ChunkMissingError,
    InternalError,
    NotFoundError,
    ServiceUnavailableError,
    StoreError,
    UntrustedCodeError,
)
from tether.ports import BlobSource, Isolatable, LoadedModel, Streaming
from tether.runtimes.arrivals import Arrivals, Coming
from tether.store import HIDDEN, Manifest, Repository
from tether.store.replicas.cache import CacheBudget, Pin
from tether.store.replicas.fetching import FetchRules
from tether.store.replicas.replicated import Replicated
from tether.store.replicas.repository_blobs import RepositoryBlobs
from tether.types import Digest, ModelRef, ModelVersion, Tensors
from tether.worker.discretion import discretion, withheld
from tether.worker.engine import Source
from tether.worker.manager_blobs import ManagerBlobs
from tether.worker.runner import load_model

__all__ = ["ModelFiles", "PinnedSource", "load_pinned"]

log = structlog.get_logger("tether.worker")
EXAMPLE = f"{HIDDEN}/example.npz"
"""Where a version keeps its example tensors, beside the model's files."""


def _no_matter(_nbytes: int) -> None:
    """There is room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedSource(Source):
    """Files that stay until the pin is released."""

    pin: Pin | _InMemory
    scratch: Path | None = None
    """Of an encrypted version: where a library that unpacks a model may do so."""
    fetch: Callable[[Arrivals], object] | None = None
    """Brings the files, which are not there before; a runner does meanwhile what it can without them, or with some."""

    @property
    def files(self) -> Path | Coming:
        """As `load_model` takes them."""
        return self.path if self.fetch is None else Coming(self.path, self.fetch)

    def release(self) -> None:
        self.pin.release()


class _InMemory:
    """Holds the files of an encrypted version, which lie in memory, until it is released."""

    def __init__(self, repository: Repository, digest: Digest) -> None:
        self.folder = repository.checkout(digest)
        self.scratch = self.folder.with_name(f"{digest}.scratch")
        self._repository, self._digest = repository, digest
        self.scratch.mkdir(mode=0o700, exist_ok=True)

    def release(self) -> None:
        """Remove them; a second call does nothing."""
        self._repository.discard(self._digest)
        shutil.rmtree(self.scratch, ignore_errors=True)


class _PinnedModel:
    """A `LoadedModel` that keeps its files: a library may map them, and a runner that died is started from them again."""

    def __init__(self, loaded: LoadedModel, pin: Pin | _InMemory) -> None:
        self.info, self.run, self.interrupt = loaded.info, loaded.run, loaded.interrupt
        self._loaded, self._pin = loaded, pin

    @property
    def pid(self) -> int | None:
        """Of its process, where it has one of its own."""
        return getattr(self._loaded, "pid", None)

    def stream(self, inputs: Tensors) -> Generator[Tensors]:
        """As `Streaming.stream`."""
        if not isinstance(self._loaded, Streaming):
            raise InternalError("a stream was asked of a model that has none")
        return self._loaded.stream(inputs)

    def isolate(self) -> None:
        """As `Isolatable.isolate`; what runs code is in a process of its own already."""
        if isinstance(self._loaded, Isolatable):
            self._loaded.isolate()

    def close(self) -> None:
        self._loaded.close()
        self._pin.release()


def load_pinned(threads: int, source: Source) -> LoadedModel:
    """Bring the model into memory; its files may be evicted when it is closed.

    Raises: what `load_model` raises, of an encrypted model without its text.
    """
    if not isinstance(source, PinnedSource):
        return load_model(source.path, source.info, threads)
    try:
        return _PinnedModel(load_model(source.files, source.info, threads, scratch=source.scratch), source.pin)
    except BaseException as error:
        source.pin.release()
        if source.scratch is None or not isinstance(error, Exception):
            raise
        raise withheld(error) from None


@dataclass(frozen=True, slots=True)
class _Lab:
    """The store of the lab, read beside its manager."""

    repository: Repository
    budget: CacheBudget


class ModelFiles:
    """Gives the verified files of any version that the manager has, or what fetches them. Methods may be called from any thread."""

    def __init__(self, store: Path, replica: Path, manager: ManagerBlobs, cache_nbytes: int, rules: FetchRules | None = None) -> None:
        """`store`: where the lab's is, if it is on this host; `replica`: for what is fetched, this worker's alone.

        `cache_nbytes`: for the checkouts of the one, and for all of the other.
        """
        self._store, self._replica, self._manager, self._nbytes, self._rules = store, replica, manager, cache_nbytes, rules
        self._opening = threading.Lock()
        self._lab: _Lab | None = None
        self._replicated: Replicated | None = None
        self._closed = False

    def fetch(self, model: ModelVersion, room: Callable[[int], None] = _no_matter) -> PinnedSource:
        """`room`: called before the files of an encrypted version come into memory, with their bytes.

        Raises: what `room` does; UntrustedCodeError: trust is asked for at every load, since it can be taken away;
        ServiceUnavailableError: it is not here, and the manager does not answer in time; ChunkMissingError, NoSpaceError, StoreError.
        """
        lab = self._opened_lab()
        try:
            found = self._checked_out(lab, model, room) if lab is not None else None
        except (ChunkMissingError, ChunkAlteredError) as error:
            log.warning("the lab's store is damaged, the model is fetched beside it", model=str(model), error=str(error))
            found = None
        return found or self._fetch_replica(model, room)

    def _checked_out(self, lab: _Lab, model: ModelVersion, room: Callable[[int], None]) -> PinnedSource | None:
        """From the lab's own store; None: it is not the one that knows this version."""
        try:
            record = lab.repository.resolve(ModelRef.parse(str(model)))
        except NotFoundError:
            return None
        if record.digest != model.digest:
            return None
        public = lab.repository.public_manifest(model.digest)
        is_encrypted = public.encryption is not None
        if is_encrypted:
            room(public.nbytes)
        with discretion(is_needed=is_encrypted):
            manifest = lab.repository.manifest(model.digest)
            _check_trust(model, manifest, record.publisher, trusted=lab.repository.trusted(record.publisher, "code"))
            if is_encrypted:
                return _in_memory(lab.repository, model.digest, manifest)
        pin = lab.budget.pin(model.digest)
        try:
            if not (lab.repository.root / "cache" / model.digest).exists():
                lab.budget.make_room(manifest.nbytes)
            return _pinned(lab.repository.checkout(model.digest), manifest, pin)
        except BaseException:
            pin.release()
            raise

    def _fetch_replica(self, model: ModelVersion, room: Callable[[int], None]) -> PinnedSource:
        replica = self._opened_replica()
        manifest = self._known(replica, model)
        if manifest.encryption is not None:
            return self._fetch_encrypted(replica, model, room)
        budget = CacheBudget(replica.local, self._nbytes)
        pin = budget.pin(model.digest)
        try:
            if not (replica.local.root / "cache" / model.digest).exists():
                budget.make_room(2 * manifest.nbytes)  # blobs and checkout
            if manifest.info.code:  # it runs in a process of its own, which starts while they come
                folder = replica.local.root / "cache" / model.digest
                return _pinned(folder, manifest, pin, partial(_check_out, replica, model, manifest.entry))
            return _pinned(replica.checkout(model.digest, model.name), manifest, pin)
        except BaseException:
            pin.release()
            raise

    def _fetch_encrypted(self, replica: Replicated, model: ModelVersion, room: Callable[[int], None]) -> PinnedSource:
        """The replica holds ciphertext; the key is asked of the manager each time, and stays in this process."""
        key = replica.run(self._manager.model_key(model.digest))
        if key is not None:
            replica.local.lend_key(*key)
        budget = CacheBudget(replica.local, self._nbytes)
        with budget.pin(model.digest):
            nbytes = replica.public_manifest(model.digest).nbytes
            budget.make_room(nbytes)
            replica.replicate(model.digest, model.name)
            room(nbytes)
            with discretion(is_needed=True):
                return _in_memory(replica.local, model.digest, replica.local.manifest(model.digest))

    def _known(self, replica: Replicated, model: ModelVersion) -> Manifest:
        """The manifest, if its code is trusted. What runs no code may be loaded while the manager is away."""
        try:
            origin = replica.run(self._manager.origin(model.digest))
        except ServiceUnavailableError:
            manifest = replica.public_manifest(model.digest)
            if not manifest.info.code:
                return manifest
            origin = replica.run(self._manager.origin(model.digest))
        if origin is None:
            raise ChunkMissingError(f"the manager's store has no {model} any more: publish it again", model.digest, str(model))
        manifest = replica.public_manifest(model.digest)
        _check_trust(model, manifest, origin.signed.publisher, trusted=origin.code_trusted)
        return manifest

    def _opened_lab(self) -> _Lab | None:
        """Looked for until it is there: a worker may be up before the manager has made the store."""
        with self._opening:
            if self._lab is None:
                try:
                    repository = Repository.open(self._store, read_only=True)
                except StoreError:
                    return None
                self._lab = _Lab(repository, CacheBudget(repository, self._nbytes))
            return self._lab

    def _opened_replica(self) -> Replicated:
        with self._opening:
            if self._replicated is None:
                sources: Sequence[BlobSource] = [self._manager]
                if self._lab is not None:
                    sources = [RepositoryBlobs(self._lab.repository), self._manager]
                self._replicated = Replicated(Repository.open(self._replica), sources, self._rules)
            return self._replicated

    def close(self) -> None:
        """Close the stores; what is loaded stays pinned."""
        with self._opening:
            if self._replicated is not None:
                self._replicated.close()
                self._replicated.local.close()
            if self._lab is not None:
                self._lab.repository.close()


def _check_out(replica: Replicated, model: ModelVersion, entry: str, arrivals: Arrivals) -> None:
    """A model that is one file is of no use in parts, and what is said is of folders."""
    replica.checkout(model.digest, model.name, watcher=None if entry else arrivals)


def _pinned(folder: Path, manifest: Manifest, pin: Pin, fetch: Callable[[Arrivals], object] | None = None) -> PinnedSource:
    return PinnedSource(folder / manifest.entry, manifest.info, manifest.nbytes, folder / EXAMPLE, pin=pin, fetch=fetch)


def _in_memory(repository: Repository, digest: Digest, manifest: Manifest) -> PinnedSource:
    files = _InMemory(repository, digest)
    return PinnedSource(
        files.folder / manifest.entry,
        manifest.info,
        manifest.nbytes,
        files.folder / EXAMPLE,
        in_memory=True,
        pin=files,
        scratch=files.scratch,
    )


def _check_trust(model: ModelVersion, manifest: Manifest, publisher: str, *, trusted: bool) -> None:
    if manifest.info.code and not trusted:
        advice = f"if you know whose key that is: tether trust {publisher} --code"
        raise UntrustedCodeError(f"{model} can run code and its publisher is not trusted for code; {advice}")
