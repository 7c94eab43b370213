"""What a manager's process was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from tether.config import DataFolder

__all__ = ["ManagerSettings"]


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    """Of `tether manager`."""

    data: DataFolder
    orchestrator: str
    host: str = "127.0.0.1"
    port: int = 0
    take_over: bool = False
    """Whether it is to write though nobody can tell that it has all."""
    gateway: str | None = None
    """Which gateway runs models for other labs; None: none does."""
    bootstrap: str | None = None
    """Nodes by which the swarm is entered, as `config.bootstrap_nodes` takes them."""
    swarm: bool = True
    """Whether other labs may be spoken with."""
    max_weight_nbytes: int = 1 << 30
    """Of memory that the process has for itself; one that is heavier, again and again, makes room for a new one."""
    weighing: float = 60.0
    """Seconds between two weighings."""
    idle: float = 60.0
    """Seconds without a client after which a manager that is alone ends."""
