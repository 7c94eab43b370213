"""Specs with which tensorstore opens a version: over a gateway, or from a copy as plain files. tensorstore can't call Python.

Its drivers read whole files, HTTP, or archives of their own making: none can say "these bytes of that pack" (`kvstack` maps names to whole
values), and a version does not lie in packs as zarr wants it: a chunk may begin in one blob and end in the next, and the last one of an
array is filled up. So without a gateway it gets a copy.

Over a gateway each read is verified by the manager, as any. The copy is verified byte for byte when its spec is made, and mended where it
differs; what alters the files after that, tensorstore does not notice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tether.errors import NotFoundError, UnsupportedError
from tether.store.hierarchy.reading import LocalVersions, VersionReader
from tether.store.hierarchy.zarr_keys import DOCUMENT
from tether.store.packing.disk import disk_errors, partial_of
from tether.store.repository import Repository
from tether.types import Digest, ModelRef

__all__ = ["gateway_kvstore", "kvstore"]


def kvstore(repository: Repository, digest: Digest, path: str = "") -> dict[str, Any]:
    """The spec of a version on this disk, or of the array or group at a zarr path of it: only that is copied, into the store's cache.

    Raises: NotFoundError: the version has no such path; UnsupportedError: it is encrypted, and the copy would not be; ChunkMissingError,
    ChunkAlteredError, NoSpaceError.
    """
    if repository.public_manifest(digest).encryption is not None:
        raise UnsupportedError("this version is encrypted, a copy would not be: use the spec of a gateway (`gateway_kvstore`)")
    reader, path = VersionReader(LocalVersions(repository), digest), path.strip("/")
    folder = repository.root / "cache" / f"{digest}.zarr"
    keys = [key for key in (f"{path}/{DOCUMENT}" if path else DOCUMENT, *reader.keys.under(path)) if key in reader.keys]
    if not keys:
        raise NotFoundError(f"version {digest[:12]} has nothing at {path[:200]!r}: give the zarr path of an array or group", path)
    with disk_errors(folder):
        for key in dict.fromkeys(keys):
            _write(folder / key, reader.read(key) or b"")
    return {"driver": "file", "path": f"{folder / path}{os.sep}"}


def gateway_kvstore(url: str, ref: ModelRef, path: str = "", api_key: str | None = None) -> dict[str, Any]:
    """The spec of a version that a gateway (`http://127.0.0.1:8000`) serves, or of the array or group at a zarr path of it.

    The API key, if there is one, becomes a part of the spec: who gets the one has the other.
    """
    publisher = f"{ref.publisher}~" if ref.publisher else ""
    name = quote(publisher + str(ModelRef(ref.name, None, ref.version, ref.alias, ref.sha)), safe="~:@")
    spec: dict[str, Any] = {"driver": "http", "base_url": f"{url.rstrip('/')}/tether/v1/zarr/{name}/", "path": f"{path}/" if path else ""}
    return spec | ({"headers": [f"Authorization: Bearer {api_key}"]} if api_key else {})


def _write(path: Path, data: bytes) -> None:
    """The file has these bytes afterwards, and at no time others than it had before or has then."""
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    partial.write_bytes(data)
    partial.replace(path)
