"""Settings, read once: where a lab lives and which ports it asks for.

Order: what the caller passes, then `dask.config`'s namespace `tether` (YAML files and `DASK_TETHER__…` variables, one convention with the
tools beside it), then the defaults below.  The data folder: `--data`, else `TETHER_HOME`, else the platform's user data folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from tether.errors import BadNameError, ConfigError
from tether.sites import region_name

__all__ = [
    "CARDS_ENV",
    "GATEWAY_PORT",
    "HOUSEKEEPING",
    "MANAGER_PORT",
    "ORCHESTRATOR_PORT",
    "REGION_ENV",
    "DataFolder",
    "Limits",
    "bootstrap_nodes",
    "has_cards",
    "lab_region",
    "worker_ports",
]

GATEWAY_PORT = 8000
ORCHESTRATOR_PORT = 8002
MANAGER_PORT = 8004


def worker_ports(count: int) -> list[int]:
    """8001, 8003, 8005 … : the odd ports beside the services' even ones.

    >>> worker_ports(3)
    [8001, 8003, 8005]
    """
    return [8001 + 2 * index for index in range(count)]


BOOTSTRAP_ENV = "TETHER_BOOTSTRAP"


REGION_ENV = "TETHER_REGION"


def lab_region(text: str) -> str:
    """Where a lab is, in words that labs agreed on; "": nobody said. Raises: ConfigError."""
    if not text:
        return ""
    try:
        return region_name(text)
    except BadNameError as error:
        raise ConfigError(f"{error} (--region, {REGION_ENV})") from error


CARDS_ENV = "CUDA_VISIBLE_DEVICES"
"""Read by every library that drives NVIDIA's cards. Empty: none."""


def has_cards() -> bool:
    """Whether this process may use graphics cards, if the machine has some."""
    return os.environ.get(CARDS_ENV, "all").strip() not in {"", "-1"}


def bootstrap_nodes(text: str | None = None) -> tuple[tuple[str, int], ...] | None:
    """Where the swarm's DHT is entered: `host:port,…` as given, else as `TETHER_BOOTSTRAP` says; None: Hyperswarm's public nodes.

    >>> bootstrap_nodes("dht.example.org:49737,[::1]:7000")
    (('dht.example.org', 49737), ('::1', 7000))

    Raises: ConfigError.
    """
    text = text or os.environ.get(BOOTSTRAP_ENV)
    return tuple(map(_node, text.split(","))) if text else None


def _node(text: str) -> tuple[str, int]:
    host, _, port = text.strip().rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:  # noqa: PLR2004 (ports)
        raise ConfigError(f"{text[:80]!r} is no node to begin with: write host:port,host:port (--bootstrap, {BOOTSTRAP_ENV})")
    return host.strip("[]"), int(port)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gateway accepts."""

    body_nbytes: int = 64 << 20
    """As Triton's `--http-max-input-size`: larger inputs are cut up by the caller."""
    timeout: float = 60.0
    """Seconds a request may take when it does not say."""
    latency: float = 0.1
    """Seconds within which 99 of 100 answers are wanted; batches are kept as short as that needs."""


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The paths of one lab. Everything that must survive is below `root`; sockets lie in `runtime`, whose paths must stay short."""

    root: Path

    @classmethod
    def locate(cls, path: str | os.PathLike[str] | None = None) -> DataFolder:
        """The folder that `path`, `TETHER_HOME` or the platform names; it need not exist."""
        chosen = path or os.environ.get("TETHER_HOME") or platformdirs.user_data_dir("tether", appauthor=False)
        return cls(Path(chosen).expanduser().resolve())

    def create(self) -> DataFolder:
        """Make the folders, for this user only.

        Raises: ConfigError: it can't be made or is not writable.
        """
        try:
            for folder in (self.root, self.tls, self.keys, self.logs, self.run):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data folder {self.root}: {error.strerror}; choose another with --data or TETHER_HOME") from error
        if not os.access(self.root, os.W_OK):
            raise ConfigError(f"data folder {self.root} is not writable; choose another with --data or TETHER_HOME")
        runtime = self.runtime
        _make_own(runtime.parent)
        _make_own(runtime)
        return self

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def replicas(self) -> Path:
        """What workers fetched, each in a folder of its name: on a host that has not the store of the manager."""
        return self.root / "replicas"

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run(self) -> Path:
        """What is true only while the lab runs."""
        return self.root / "run"

    @property
    def lab_lock(self) -> Path:
        """Held by the supervisor of the lab for as long as it lives."""
        return self.run / "lab.lock"

    @property
    def lease(self) -> Path:
        """What the orchestrator remembers of who may write the store."""
        return self.root / "lease.json"

    @property
    def identity(self) -> Path:
        return self.keys / "identity"

    @property
    def api_key(self) -> Path:
        """The first API key, written at first start, mode 0600."""
        return self.keys / "api-key"

    @property
    def runtime(self) -> Path:
        """Folder of the Unix sockets: their paths are limited to 107 bytes, so it is not below `root`.

        Not in XDG_RUNTIME_DIR either: that is removed at logout, and a detached lab lives on.
        """
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"tether-{os.getuid()}" / digest

    @property
    def door(self) -> Path:
        """Socket of the manager, for this user's notebooks and programs."""
        return self.runtime / "manager.sock"


def _make_own(folder: Path) -> None:
    """A folder that this user alone can enter. Others may write around it (`/tmp`) and have put theirs, or a link, there first.

    Raises: ConfigError: it can't be made, is not this user's, or is open to others.
    """
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"folder for sockets {folder}: {error.strerror}; set TMPDIR to a folder of your own") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{folder} is not a folder of this user's; remove it, or set TMPDIR to a folder of your own")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{folder} is open to other users; run `chmod 700 {folder}` if nobody else has put anything there, or remove it")


HOUSEKEEPING: dict[str, object] = {
    "distributed.worker.profile.enabled": False,
    "distributed.worker.daemon": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.memory.monitor-interval": "10s",
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.scheduler.worker-ttl": None,
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.admin.tick.interval": "2s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.comm.require-encryption": True,
}
"""Settings of `dask.config` for the cluster's processes: an idle cluster falls from 0.09 cores to 0.01 (DESIGN.md §2).

Of a worker that is silent Dask would have the process end after five minutes (`worker-ttl`); its models are there still.
"""
