"""What the manager does for others, as `ports.Management`: JSON values in and out, blocking work in threads."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec

from tether.errors import BadNameError, LockedModelError, StoreError, UnknownModelError, UnknownVersionError
from tether.events import CatalogModel
from tether.manager.admission import Admission
from tether.manager.hierarchies import Hierarchies
from tether.manager.publishing import EXAMPLE, Publisher
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.identity import Identity
from tether.store import FILES, ModelRecord, Published, Repository, VersionRecord
from tether.store.format.diff import diff
from tether.store.format.layout import TENSORS
from tether.store.replicas.held import Held
from tether.types import Digest, ModelInfo, ModelRef, ModelVersion, model_name

__all__ = ["Operations"]


class _Facts(NamedTuple):
    """What is told of a version without its files."""

    info: ModelInfo
    example: bool
    encrypted: bool


class Operations:
    """The operations of one repository."""

    NAMES: ClassVar[tuple[str, ...]] = (
        "put_blob",
        "get_blob",
        "publish",
        "models",
        "model",
        "manifest",
        "signed_manifest",
        "model_key",
        "set_alias",
        "delete_alias",
        "rollback",
        "set_serving",
        "delete_version",
        "verify",
        "diff",
        "repair",
        "gc",
        "rebuild_index",
        "forget_store",
        "read_zarr",
        "trust",
    )

    def __init__(self, repository: Repository, identity: Identity, workspace: Path) -> None:
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(mode=0o700, parents=True)
        self._repository = repository
        self._identity = identity
        self._publisher = Publisher(repository, identity, workspace)
        self._hierarchies = Hierarchies(repository)
        self._known: dict[Digest, _Facts] = {}
        """What the manifests say, read once: a digest never changes what it means."""

    @property
    def repository(self) -> Repository:
        return self._repository

    @cached_property
    def admission(self) -> Admission:
        """Who is let in from outside. Its file is opened, or made, when this is first asked for.

        Raises: ConfigError, FormatTooNewError, StoreError, NoSpaceError: the file can't be used.
        """
        access = Access(AccessFile.open(self._repository.root.parent / "access.sqlite"))
        return Admission(self._repository, access, lambda: self._identity)

    @property
    def access(self) -> Access:
        """Which peers may do what."""
        return self.admission.access

    def handlers(self) -> dict[str, Callable[..., Awaitable[Any]]]:
        """All that can be asked, by name."""
        return {name: getattr(provider, name) for provider in (self, self.admission) for name in provider.NAMES}

    def close(self) -> None:
        """Close what this opened; a second call does nothing. The repository is its owner's to close."""
        self._publisher.threads.shutdown(wait=False)
        if "admission" in self.__dict__:
            self.access.file.close()

    @property
    def identity(self) -> Identity:
        """The lab's."""
        return self._identity

    @property
    def public(self) -> str:
        """The key of the lab."""
        return self._identity.public

    def become(self, identity: Identity) -> None:
        """Be another lab's from now on: this store, where this one never published, follows one of that lab."""
        self._repository.set_own(identity.public)
        self._identity, self._publisher = identity, replace(self._publisher, identity=identity)

    async def put_blob(self, digest: str, data: bytes, encrypt: str | None = None) -> dict[str, Any]:
        if encrypt is None:
            await asyncio.to_thread(self._repository.put_blob, Digest(digest), bytes(data))
        else:
            await asyncio.to_thread(self._publisher.sealing.put_blob, encrypt, Digest(digest), bytes(data))
        return {"digest": digest, "nbytes": len(data)}

    async def get_blob(self, digest: str, version: str | None = None) -> bytes:
        if version is None:
            return await asyncio.to_thread(self._repository.read_blob, Digest(digest))
        return await asyncio.to_thread(self._hierarchies.blob, version, Digest(digest))

    async def publish(self, name: str, draft: Mapping[str, Any], peer: str | None = None) -> dict[str, Any]:
        """As the port says; `peer`: the lab that asks for it, if it is not this one's own people."""
        published, record = await self._publisher.publish(model_name(name), draft, peer)
        return await asyncio.to_thread(self._published, published, record)

    async def models(self) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._models)

    async def model(self, name: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._described, name)

    async def manifest(self, name: str, version: int) -> dict[str, Any]:
        return await asyncio.to_thread(self._manifest, name, version)

    async def signed_manifest(self, digest: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._signed_manifest, Digest(digest))

    async def model_key(self, digest: str) -> dict[str, Any] | None:
        """For workers of this cluster on other hosts, never for HTTP: what opens a version; None: it is not encrypted."""
        found = await asyncio.to_thread(self._repository.key_of, Digest(digest))
        return None if found is None else {"key": found[0].secret.hex(), "publisher": found[1].publisher, "name": found[1].name}

    async def set_alias(self, name: str, alias: str, version: int) -> dict[str, Any]:
        change = await asyncio.to_thread(self._repository.set_alias, name, alias, version)
        return {"alias": change.alias, "from": change.before, "to": change.after}

    async def delete_alias(self, name: str, alias: str) -> dict[str, Any]:
        await asyncio.to_thread(self._repository.delete_alias, name, alias)
        return {"alias": alias}

    async def rollback(self, name: str, alias: str | None) -> dict[str, Any]:
        change = await asyncio.to_thread(self._repository.rollback, name, alias)
        return {"alias": change.alias, "from": change.before, "to": change.after}

    async def set_serving(self, name: str, changes: Mapping[str, Any] | None) -> dict[str, Any]:
        said = await asyncio.to_thread(self._repository.set_serving, name, changes)
        return {"name": name, "serving": msgspec.to_builtins(said)}

    async def delete_version(self, name: str, version: int) -> dict[str, Any]:
        await asyncio.to_thread(self._repository.delete_version, name, version)
        return {"name": name, "version": version}

    async def verify(self, name: str, version: int | None) -> dict[str, Any]:
        ref = ModelRef.parse(name if version is None else f"{name}:{version}")
        report = await asyncio.to_thread(self._repository.verify, ref)
        problems = [{"path": each.path, "digest": each.digest, "code": each.code, "error": each.message} for each in report.problems]
        return {"ok": not problems, "checked": report.checked, "nbytes": report.nbytes, "problems": problems}

    async def diff(self, name: str, before: int, after: int) -> dict[str, Any]:
        return await asyncio.to_thread(self._diff, name, before, after)

    async def read_zarr(self, ref: str, path: str, start: int | None, nbytes: int) -> dict[str, Any]:
        return await asyncio.to_thread(self._hierarchies.read, ref, path, start, nbytes)

    async def repair(self, name: str, version: int | None) -> dict[str, Any]:
        ref = ModelRef.parse(name if version is None else f"{name}:{version}")
        return await asyncio.to_thread(self._repair, ref)

    async def gc(self, *, dry_run: bool, grace: float | None) -> dict[str, Any]:
        report = await asyncio.to_thread(self._repository.gc, dry_run=dry_run, **({} if grace is None else {"grace": grace}))
        freed = {"freed_nbytes": report.freed_nbytes, "later_nbytes": report.later_nbytes}
        return {"dry_run": report.dry_run, **freed, "lines": report.lines()}

    async def rebuild_index(self) -> dict[str, Any]:
        return {"packs": await asyncio.to_thread(self._repository.rebuild_index)}

    async def forget_store(self, store: str) -> dict[str, Any]:
        return {"store": store, "was": await asyncio.to_thread(self._repository.forget_store, store)}

    async def trust(self, publisher: str, scopes: Sequence[str]) -> dict[str, Any]:
        if set(scopes) - {"code"}:
            raise BadNameError(f"unknown scope among {', '.join(scopes)}; the one scope is: code")
        if not re.fullmatch("[0-9a-f]{64}", publisher):
            raise BadNameError(f"{publisher[:80]!r} is no public key: a publisher's key is 64 hex digits, `tether show NAME` prints it")
        await asyncio.to_thread(self._repository.trust, publisher, scopes)
        return {"publisher": publisher, "scopes": list(scopes)}

    def _repair(self, ref: ModelRef) -> dict[str, Any]:
        report = self._repository.repair(self._repository.staged_blob, ref)
        paths = self._paths(ref, set(report.failed)) if report.failed else {}
        return {"found": list(report.found), "repaired": list(report.repaired), "failed": list(report.failed), "paths": paths}

    def _paths(self, ref: ModelRef, blobs: set[Digest]) -> dict[Digest, str]:
        """Of these blobs the array that each is of."""
        found: dict[Digest, str] = {}
        for version in self._repository.versions_meant(ref):
            try:
                manifest = self._repository.manifest(version.digest)
            except (StoreError, LockedModelError):  # it is what could not be mended, or nobody here may read it
                continue
            arrays = [array for array in manifest.arrays if not array.path.startswith(f"{TENSORS}/")]
            found |= {part.digest: array.path for array in arrays for part in array.segments if part.digest in blobs}
        return found

    def _published(self, published: Published, record: VersionRecord) -> dict[str, Any]:
        info = msgspec.to_builtins(self._facts(record.digest).info)
        return self._version(record) | {"name": record.name, "created": published.created, "info": info}

    def _models(self) -> list[dict[str, Any]]:
        return [self._model(record) for record in self._repository.models()]

    def _described(self, name: str) -> dict[str, Any]:
        wanted = self._repository.resolve(ModelRef.parse(name)).name
        record = next((record for record in self._repository.models() if record.name == wanted), None)
        if record is None:
            raise UnknownModelError(f"{name} was deleted just now; list the models to see which are there")
        described = self._model(record)
        for version in described["versions"]:
            facts = self._facts(Digest(version["digest"]))
            version |= {"info": msgspec.to_builtins(facts.info), "example": facts.example}
        return described

    def _manifest(self, name: str, version: int) -> dict[str, Any]:
        record = self._resolve(name, version)
        manifest, public = self._repository.manifest(record.digest), self._repository.public_manifest(record.digest)
        answer = {"version": record.version, "digest": record.digest, "manifest": msgspec.to_builtins(manifest)}
        return answer if public.encryption is None else answer | {"public": msgspec.to_builtins(public)}

    def _diff(self, name: str, before: int, after: int) -> dict[str, Any]:
        old, new = (self._repository.manifest(self._resolve(name, version).digest) for version in (before, after))
        found = diff(old, new, self._repository.read_array)
        return {"name": name, "before": before, "after": after, **msgspec.to_builtins(found)}

    def _signed_manifest(self, digest: Digest) -> dict[str, Any]:
        held = Held(self._repository)
        record = held.record(digest)
        if record is None:
            raise UnknownVersionError(f"no version here has the digest {digest[:64]}; it may have been deleted")
        signed = held.signed(record)
        return {
            "name": record.name,
            "publisher": signed.publisher,
            "manifest": base64.b64encode(signed.data).decode(),
            "signature": signed.signature.hex(),
            "code_trusted": self._repository.trusted(record.publisher, "code"),
        }

    def change_count(self) -> int:
        """Grows with each change of the catalog. It waits for a transaction that goes on: in a thread, then, as `catalog`."""
        return self._repository.change_count()

    def catalog(self) -> dict[str, CatalogModel]:
        """All that the orchestrator needs to know. A version whose manifest is damaged is left out: it can't be served."""
        return {record.name: self._catalog_model(record) for record in self._repository.models()}

    def _catalog_model(self, record: ModelRecord) -> CatalogModel:
        versions: dict[int, tuple[ModelVersion, ModelInfo]] = {}
        for version in record.versions:
            try:
                info = self._facts(version.digest).info
            except StoreError:
                continue
            versions[version.version] = (ModelVersion(record.name, version.version, version.digest), info)
        return CatalogModel(record.name, record.default, record.aliases, versions, record.serving)

    def _resolve(self, name: str, version: int) -> VersionRecord:
        return self._repository.resolve(ModelRef.parse(f"{name}:{version}"))

    def _facts(self, digest: Digest) -> _Facts:
        known = self._known.get(digest)
        if known is None:
            public = self._repository.public_manifest(digest)
            encrypted = public.encryption is not None
            try:
                manifest = self._repository.manifest(digest) if encrypted else public
            except LockedModelError:  # what its publisher shows to all; whoever loads it is told what is lacking
                return _Facts(public.info, example=False, encrypted=True)
            example = any(array.path == f"{FILES}/{EXAMPLE}" for array in manifest.arrays)
            known = self._known[digest] = _Facts(manifest.info, example, encrypted)
        return known

    def _model(self, record: ModelRecord) -> dict[str, Any]:
        versions = [self._version(version) for version in record.versions]
        return {
            "name": record.name,
            "publisher": record.publisher,
            "default": record.default,
            "aliases": record.aliases,
            "serving": msgspec.to_builtins(record.serving),
            "versions": versions,
        }

    def _version(self, record: VersionRecord) -> dict[str, Any]:
        framework, encrypted = None, False
        try:
            facts = self._facts(record.digest)
            framework, encrypted = facts.info.framework, facts.encrypted
        except StoreError:
            pass
        return {
            "version": record.version,
            "digest": record.digest,
            "created": record.created,
            "nbytes": record.nbytes,
            "framework": framework,
            "encrypted": encrypted,
            "tags": record.tags,
        }
