"""What was said of a worker for those who choose where models run: its region and its labels."""

from __future__ import annotations

import re
from typing import Final

import dask.config

from tether.config import DataFolder, lab_region
from tether.errors import ConfigError
from tether.sites import LABEL
from tether.types import WorkerSite

__all__ = ["LABELS", "REGION", "worker_site"]

REGION: Final = "tether.worker.region"
LABELS: Final = "tether.worker.labels"
"""Settings of Dask's configuration: `dask worker` has no options of ours."""


def worker_site(folder: DataFolder) -> WorkerSite:
    """As configured; the region else as the lab of the data folder remembers it. Raises: ConfigError."""
    said, region = dask.config.get(LABELS, None) or (), dask.config.get(REGION, None)
    labels = [f"{name}={value}" for name, value in said.items()] if isinstance(said, dict) else said
    if isinstance(labels, str) or not all(isinstance(label, str) and re.match(LABEL, label) for label in labels):
        raise ConfigError(f"labels of a worker {said!r}: give each as NAME=VALUE, without spaces (--label or {LABELS})")
    return WorkerSite(_remembered(folder) if region is None else lab_region(str(region)), tuple(sorted(set(labels))))


def _remembered(folder: DataFolder) -> str:
    """What the manager, which has the word on it, wrote there; on another host nothing is."""
    try:
        return lab_region((folder.root / "region").read_text().strip())
    except (OSError, UnicodeDecodeError, ConfigError):
        return ""
