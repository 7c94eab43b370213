"""Follows the writer: fetches what its catalog names, makes this one say the same, and tells it what is durable here."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import structlog

from tether.errors import ChunkAlteredError, ChunkMissingError, ConfigError, NoSpaceError, NotFoundError, StoreError, TetherError
from tether.manager import secrets, small_files
from tether.ports import SignedManifest
from tether.security.access import Access
from tether.security.access_file import AccessState
from tether.security.identity import Identity
from tether.store import Repository
from tether.store.index.mirror_tables import CatalogState
from tether.store.replicas.fetching import FetchRules
from tether.store.replicas.replicated import Replicated
from tether.types import Digest

__all__ = ["Channel", "Follower", "Lab", "Link", "WriterBlobs"]

log = structlog.get_logger("tether.manager")
_AGAIN = 0.2
"""Seconds between tries to reach the writer."""
_REST = 2.0
"""Seconds longer, where the disk refused."""
_BUSY = 0.5
"""Seconds between words to the writer while something big is fetched."""
_BATCH = 64
"""Versions that are made durable together."""
_RULES = FetchRules(patience=2.0, give_up=10.0)


class Channel(Protocol):
    """A connection of Dask's."""

    async def read(self) -> Any: ...

    async def write(self, message: Any) -> Any: ...

    def abort(self) -> None: ...


class Link(Protocol):
    """The writer's operations. Belongs to the event loop that uses it first."""

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """Raises: the errors of the tree that it answers; ServiceUnavailableError."""
        ...

    async def close(self) -> None: ...


class Lab(Protocol):
    """Whose models this manager signs, and whom it lets in."""

    @property
    def public(self) -> str: ...

    @property
    def access(self) -> Access: ...

    def become(self, identity: Identity) -> None:
        """Be this lab from now on."""
        ...


Connect = Callable[[str], Awaitable[Channel]]
Answer = TypeVar("Answer")


class WriterBlobs:
    """`ports.BlobSource` over the writer's operations."""

    name = "writer"
    in_flight = 4

    def __init__(self, link: Link) -> None:
        self._link = link
        self.nbytes = 0
        """That it gave."""

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        """As the port says."""
        del nbytes
        try:
            data = bytes(await self._link.ask("get_blob", digest=digest))
        except (NotFoundError, ChunkMissingError, ChunkAlteredError):
            return None
        self.nbytes += len(data)
        return data

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """As the port says."""
        try:
            answer = await self._link.ask("signed_manifest", digest=digest)
        except (NotFoundError, ChunkMissingError, ChunkAlteredError):
            return None
        data = base64.b64decode(answer["manifest"])
        self.nbytes += len(data)
        return SignedManifest(data, str(answer["publisher"]), bytes.fromhex(answer["signature"]))

    async def aclose(self) -> None:
        """Close its connections."""
        await self._link.close()


@dataclass(frozen=True, slots=True)
class _Source:
    """A writer, and what it gives."""

    address: str
    blobs: WriterBlobs
    replicated: Replicated


class Follower:
    """This store as a follower of whoever writes."""

    def __init__(self, repository: Repository, keys: Path, lab: Lab, connect: Connect, link: Callable[[str], Link]) -> None:
        """`keys`: the folder of the lab's secrets; `connect` and `link`: to a manager at an address."""
        self._repository, self._keys, self._lab = repository, keys, lab
        self._connect, self._link = connect, link
        self.on_files: Callable[[], None] = _nothing
        """Called in a thread when small files beside the store may be others than before."""
        self.is_applying = False
        """Whether it is fetching what the writer's catalog names: what it has of it is no version here yet."""

    async def run(self, address: str, member: str) -> None:
        """Follow the writer at this address until cancelled; what goes on in a thread then is waited for.

        Raises: ConfigError: the cluster is another lab's than this store.
        """
        blobs = WriterBlobs(self._link(address))
        replicated = Replicated(self._repository, [blobs], _RULES)
        try:
            while True:
                try:
                    await self._follow(_Source(address, blobs, replicated), member)
                except ConfigError:
                    raise
                except (StoreError, NoSpaceError) as error:
                    log.warning("this store can't follow", error=str(error))
                    await asyncio.sleep(_REST)
                except (OSError, TetherError) as error:
                    log.info("writer away", address=address, error=str(error))
                await asyncio.sleep(_AGAIN)
        finally:
            await asyncio.to_thread(replicated.close)

    async def _follow(self, source: _Source, member: str) -> None:
        comm = await self._connect(source.address)
        try:
            await comm.write({"op": "tether_feed", "member": member, "reply": False})
            hello = await comm.read()
            if "term" not in hello:
                return
            if hello["lab"] != self._lab.public:
                await self._enrol(source.address)
            while True:
                message = await comm.read()
                state = msgspec.msgpack.decode(message["state"], type=CatalogState)
                await self._while_telling(comm, source, self._apply(hello["term"], state, list(message["keys"]), source))
                if "access" in message:  # after the catalog, which refuses what comes late of an earlier term
                    await _to_its_end(self._lab.access.mirror, msgspec.msgpack.decode(message["access"], type=AccessState))
                if "files" in message:
                    await _to_its_end(self._mirror_files, dict(message["files"]))
                await comm.write({"applied": state.change})
        finally:
            comm.abort()

    def _mirror_files(self, files: dict[str, bytes]) -> None:
        try:
            small_files.write(self._keys.parent, files)
        finally:
            self.on_files()

    async def _while_telling(self, comm: Channel, source: _Source, work: Coroutine[Any, Any, None]) -> None:
        """Do it; meanwhile the writer hears that it goes on."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([task], timeout=_BUSY))[0]:
                await comm.write({"busy": source.blobs.nbytes})
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _apply(self, term: int, state: CatalogState, keys: list[str], source: _Source) -> None:
        self.is_applying = True
        try:
            await self._make_the_same(term, state, keys, source)
        finally:
            self.is_applying = False

    async def _make_the_same(self, term: int, state: CatalogState, keys: list[str], source: _Source) -> None:
        here = await asyncio.to_thread(self._held)
        wanted = [digest for digest in _digests(state) if digest not in here]
        for start in range(0, len(wanted), _BATCH):
            await self._hold(wanted[start : start + _BATCH], source.replicated)
        if not set(keys) <= set(secrets.cluster_keys(self._keys)):
            await self._enrol(source.address)
        lost = await _to_its_end(self._repository.mirror, term, state)
        if keys and state.rest is not None:
            await asyncio.to_thread(secrets.forget_cluster_keys, self._keys, {*keys, *(row[4] for row in state.rest.keys)})
        if lost:
            kept = f"catalog-before-term-{term}.sqlite"
            log.error("versions that were never acknowledged were taken out", versions=lost, kept=kept, store=str(self._repository.root))

    async def _hold(self, digests: list[Digest], replicated: Replicated) -> None:
        """Together, which costs few fsyncs; one by one where some can't be had. Raises: what the fetching raises."""
        try:
            await replicated.ahold(digests)
        except (ChunkMissingError, ChunkAlteredError) as error:
            if len(digests) > 1:
                for digest in digests:
                    await self._hold([digest], replicated)
            else:
                # The writer itself has it no more, or damaged: its catalog is the truth, and what can't be read there can't be here.
                log.warning("version can't be had from the writer", digest=digests[0], error=str(error))

    def _held(self) -> set[Digest]:
        """The versions here: what is one was durable when it became one."""
        return {version.digest for model in self._repository.models() for version in model.versions}

    async def _enrol(self, address: str) -> None:
        """Get the lab's secrets from the writer, over mutual TLS.

        Raises: ConfigError: this folder holds models of another lab.
        """
        link = self._link(address)
        try:
            sent = await link.ask("secrets")
        finally:
            await link.close()
        identity, mine = Identity(bytes.fromhex(sent["identity"])), self._lab.public
        if identity.public != mine:
            if any(model.publisher == mine for model in self._repository.models()):
                raise ConfigError(
                    f"this data folder holds models of lab {mine[:12]}, the cluster is lab {identity.public[:12]}: start this manager with "
                    "an empty data folder (--data), and replicate the models into the cluster"
                )
            await asyncio.to_thread(secrets.adopt_identity, self._keys, sent["identity"])
            self._lab.become(identity)
        await asyncio.to_thread(secrets.adopt_cluster_keys, self._keys, dict(sent["cluster_keys"]))


def _nothing() -> None:
    pass


def _digests(state: CatalogState) -> list[Digest]:
    return list(dict.fromkeys(each.digest for model in state.models for each in model.versions))


async def _to_its_end(work: Callable[..., Answer], *arguments: Any) -> Answer:
    """In a thread; one who is cancelled leaves when that is done: the store changes no more then."""
    future = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.gather(future, return_exceptions=True)
        raise
