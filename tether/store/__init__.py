"""The model store: manifests, blobs in packs, a catalog of versions; zarr on top. Importing it does not import zarr."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tether.store.collecting.collected import GcReport
from tether.store.format.layout import BLOB_NBYTES, FILES, HIDDEN
from tether.store.format.manifest import ArrayEntry, Manifest, Segment, decode, digest_of, encode, signed_message
from tether.store.format.records import AliasChange, ModelRecord, Problem, Published, Report, VersionRecord
from tether.store.hierarchy.elsewhere import gateway_kvstore, kvstore
from tether.store.hierarchy.reading import LocalVersions, Versions
from tether.store.repository import Repository

if TYPE_CHECKING:
    from tether.store.hierarchy.draft import DraftStore
    from tether.store.hierarchy.zarr import VersionStore, Weights, open_array, open_group

__all__ = [
    "BLOB_NBYTES",
    "FILES",
    "HIDDEN",
    "AliasChange",
    "ArrayEntry",
    "DraftStore",
    "GcReport",
    "LocalVersions",
    "Manifest",
    "ModelRecord",
    "Problem",
    "Published",
    "Report",
    "Repository",
    "Segment",
    "VersionRecord",
    "VersionStore",
    "Versions",
    "Weights",
    "decode",
    "digest_of",
    "encode",
    "gateway_kvstore",
    "kvstore",
    "open_array",
    "open_group",
    "signed_message",
]
_LAZY = {"DraftStore": "draft", "VersionStore": "zarr", "Weights": "zarr", "open_array": "zarr", "open_group": "zarr"}
"""Name → module. These import zarr, which costs 0.4 s that a worker that loads files need not pay."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"tether.store.hierarchy.{_LAZY[name]}"), name)
    raise AttributeError(name)
