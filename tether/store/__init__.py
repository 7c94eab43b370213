"""The model store: manifests, blobs in packs, a catalog of versions; zarr on top. Importing it does not import zarr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tether.store.layout import BLOB_NBYTES, FILES, HIDDEN
from tether.store.manifest import ArrayEntry, Manifest, Segment, decode, digest_of, encode, signed_message
from tether.store.records import AliasChange, ModelRecord, Problem, Published, Report, VersionRecord
from tether.store.repository import Repository

if TYPE_CHECKING:
    from tether.store.zarr import VersionStore, open_array, open_group

__all__ = [
    "BLOB_NBYTES",
    "FILES",
    "HIDDEN",
    "AliasChange",
    "ArrayEntry",
    "Manifest",
    "ModelRecord",
    "Problem",
    "Published",
    "Report",
    "Repository",
    "Segment",
    "VersionRecord",
    "VersionStore",
    "decode",
    "digest_of",
    "encode",
    "open_array",
    "open_group",
    "signed_message",
]
_LAZY = {"VersionStore", "open_array", "open_group"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from tether.store import zarr  # costs 0.4 s, which a worker that loads files need not pay

        return getattr(zarr, name)
    raise AttributeError(name)
