"""What the manager does for others, as `ports.Management`: JSON values in and out, blocking work in threads."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from tether.errors import BadNameError, StoreError, UnknownModelError
from tether.events import CatalogModel
from tether.manager.publishing import EXAMPLE, Publisher
from tether.security.identity import Identity
from tether.store import FILES, ModelRecord, Published, Repository, VersionRecord
from tether.types import Digest, ModelInfo, ModelRef, ModelVersion, model_name

__all__ = ["Operations"]


class Operations:
    """The operations of one repository."""

    NAMES: ClassVar[tuple[str, ...]] = (
        "put_blob",
        "get_blob",
        "publish",
        "models",
        "model",
        "manifest",
        "set_alias",
        "delete_alias",
        "rollback",
        "delete_version",
        "verify",
        "trust",
    )

    def __init__(self, repository: Repository, identity: Identity, workspace: Path) -> None:
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(mode=0o700, parents=True)
        self._repository = repository
        self._publisher = Publisher(repository, identity, workspace)
        self._known: dict[Digest, tuple[ModelInfo, bool]] = {}
        """What the manifests say, read once: a digest never changes what it means."""

    async def put_blob(self, digest: str, data: bytes) -> dict[str, Any]:
        await asyncio.to_thread(self._repository.put_blob, Digest(digest), bytes(data))
        return {"digest": digest, "nbytes": len(data)}

    async def get_blob(self, digest: str) -> bytes:
        return await asyncio.to_thread(self._repository.read_blob, Digest(digest))

    async def publish(self, name: str, draft: Mapping[str, Any]) -> dict[str, Any]:
        published, record = await self._publisher.publish(model_name(name), draft)
        return await asyncio.to_thread(self._published, published, record)

    async def models(self) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._models)

    async def model(self, name: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._described, name)

    async def manifest(self, name: str, version: int) -> dict[str, Any]:
        return await asyncio.to_thread(self._manifest, name, version)

    async def set_alias(self, name: str, alias: str, version: int) -> dict[str, Any]:
        change = await asyncio.to_thread(self._repository.set_alias, name, alias, version)
        return {"alias": change.alias, "from": change.before, "to": change.after}

    async def delete_alias(self, name: str, alias: str) -> dict[str, Any]:
        await asyncio.to_thread(self._repository.delete_alias, name, alias)
        return {"alias": alias}

    async def rollback(self, name: str, alias: str | None) -> dict[str, Any]:
        change = await asyncio.to_thread(self._repository.rollback, name, alias)
        return {"alias": change.alias, "from": change.before, "to": change.after}

    async def delete_version(self, name: str, version: int) -> dict[str, Any]:
        await asyncio.to_thread(self._repository.delete_version, name, version)
        return {"name": name, "version": version}

    async def verify(self, name: str, version: int | None) -> dict[str, Any]:
        ref = ModelRef.parse(name if version is None else f"{name}:{version}")
        report = await asyncio.to_thread(self._repository.verify, ref)
        problems = [{"path": each.path, "digest": each.digest, "code": each.code, "error": each.message} for each in report.problems]
        return {"ok": not problems, "checked": report.checked, "nbytes": report.nbytes, "problems": problems}

    async def trust(self, publisher: str, scopes: Sequence[str]) -> dict[str, Any]:
        if set(scopes) - {"code"}:
            raise BadNameError(f"unknown scope among {', '.join(scopes)}; the one scope is: code")
        if not re.fullmatch("[0-9a-f]{64}", publisher):
            raise BadNameError(f"{publisher[:80]!r} is no public key: a publisher's key is 64 hex digits, `tether show NAME` prints it")
        await asyncio.to_thread(self._repository.trust, publisher, scopes)
        return {"publisher": publisher, "scopes": list(scopes)}

    def _published(self, published: Published, record: VersionRecord) -> dict[str, Any]:
        info, _ = self._info(record.digest)
        return self._version(record) | {"name": record.name, "created": published.created, "info": msgspec.to_builtins(info)}

    def _models(self) -> list[dict[str, Any]]:
        return [self._model(record) for record in self._repository.models()]

    def _described(self, name: str) -> dict[str, Any]:
        wanted = self._repository.resolve(ModelRef.parse(name)).name
        record = next((record for record in self._repository.models() if record.name == wanted), None)
        if record is None:
            raise UnknownModelError(f"{name} was deleted just now; list the models to see which are there")
        described = self._model(record)
        for version in described["versions"]:
            info, example = self._info(Digest(version["digest"]))
            version |= {"info": msgspec.to_builtins(info), "example": example}
        return described

    def _manifest(self, name: str, version: int) -> dict[str, Any]:
        record = self._resolve(name, version)
        manifest = self._repository.manifest(record.digest)
        return {"version": record.version, "digest": record.digest, "manifest": msgspec.to_builtins(manifest)}

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
                info, _ = self._info(version.digest)
            except StoreError:
                continue
            versions[version.version] = (ModelVersion(record.name, version.version, version.digest), info)
        return CatalogModel(record.name, record.default, record.aliases, versions)

    def _resolve(self, name: str, version: int) -> VersionRecord:
        return self._repository.resolve(ModelRef.parse(f"{name}:{version}"))

    def _info(self, digest: Digest) -> tuple[ModelInfo, bool]:
        known = self._known.get(digest)
        if known is None:
            manifest = self._repository.manifest(digest)
            example = any(array.path == f"{FILES}/{EXAMPLE}" for array in manifest.arrays)
            known = self._known[digest] = (manifest.info, example)
        return known

    def _model(self, record: ModelRecord) -> dict[str, Any]:
        versions = [self._version(version) for version in record.versions]
        return {
            "name": record.name,
            "publisher": record.publisher,
            "default": record.default,
            "aliases": record.aliases,
            "versions": versions,
        }

    def _version(self, record: VersionRecord) -> dict[str, Any]:
        try:
            framework = self._info(record.digest)[0].framework
        except StoreError:
            framework = None
        return {
            "version": record.version,
            "digest": record.digest,
            "created": record.created,
            "nbytes": record.nbytes,
            "framework": framework,
            "tags": record.tags,
        }
