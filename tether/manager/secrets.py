"""What the managers of one lab share: the identity that signs its models, and the cluster keys that wrap its model keys.

A member of the cluster asks for them over mutual TLS; whoever has a certificate of the cluster could run code in the manager anyway.
"""

from __future__ import annotations

import re
from pathlib import Path

from tether.errors import ConfigError
from tether.security.files import locked, written_aside
from tether.store.packing.disk import disk_errors, sync_folder

__all__ = ["adopt_cluster_keys", "adopt_identity", "cluster_keys", "collect", "forget_cluster_keys"]

_FILE = re.compile(r"cluster-([0-9a-f]{32})\.key")
_IDENTITY = "identity"
_REPLACED = "identity.replaced"


def cluster_keys(folder: Path) -> list[str]:
    """Ids of the cluster keys in a folder of keys, sorted."""
    return sorted(match[1] for path in folder.glob("cluster-*.key") if (match := _FILE.fullmatch(path.name)))


def collect(folder: Path) -> dict[str, object]:
    """All of them. Raises: StoreError."""
    with disk_errors(folder):
        identity = (folder / _IDENTITY).read_text(encoding="ascii").strip()
        keys = {key: (folder / f"cluster-{key}.key").read_text(encoding="ascii") for key in cluster_keys(folder)}
    return {"identity": identity, "cluster_keys": keys}


def adopt_identity(folder: Path, seed: str) -> None:
    """Be the lab that has this identity (hex); the folder's own, with which nothing was published, stays beside it."""
    with disk_errors(folder):
        path = folder / _IDENTITY
        if path.exists():
            path.replace(folder / _REPLACED)
        with written_aside(path, f"{seed}\n".encode()) as partial:
            partial.replace(path)
        sync_folder(folder)


def adopt_cluster_keys(folder: Path, keys: dict[str, str]) -> None:
    """Have these keys besides those that are there. Raises: ConfigError: malformed."""
    with disk_errors(folder), locked(folder / "cluster.lock"):
        for key, text in keys.items():
            path = folder / f"cluster-{key}.key"
            if not _FILE.fullmatch(path.name):
                raise ConfigError(f"{key[:64]!r} is no id of a cluster key: the writer runs another version of Tether, update both")
            with written_aside(path, text.encode("ascii")) as partial:
                partial.replace(path)
        sync_folder(folder)


def forget_cluster_keys(folder: Path, kept: set[str]) -> None:
    """Remove all others: the writer has done with them, and they wrap nothing here."""
    gone = set(cluster_keys(folder)) - kept
    if gone:
        with disk_errors(folder), locked(folder / "cluster.lock"):
            for key in gone:
                (folder / f"cluster-{key}.key").unlink(missing_ok=True)
            sync_folder(folder)
