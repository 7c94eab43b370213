"""What a manager's process was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from tether.config import DataFolder
from tether.errors import BadAddressError, BadKeyError, ConfigError
from tether.security.addresses import public_key

__all__ = ["ManagerSettings", "relay_keys"]


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
    region: str | None = None
    """Where the lab is; "": nowhere that has a name; None: as it was said last."""
    relay: bool = False
    """Whether labs that this one knows may go through it to each other."""
    relay_through: str | None = None
    """Labs to go through where no direct way is found, as `relay_keys` takes them; None: those known here that say they relay."""
    swarm: bool = True
    """Whether other labs may be spoken with."""
    max_weight_nbytes: int = 1 << 30
    """Of memory that the process has for itself; one that is heavier, again and again, makes room for a new one."""
    weighing: float = 60.0
    """Seconds between two weighings."""
    max_staged_nbytes: int = 64 << 30
    """Of blobs that one peer may send before a publish names them: a model of thirty billion parameters, and what is left of a broken try.
    On small disks it is less (`peering/staged.py`)."""
    surplus: float = 3600.0
    """Seconds for which a copy has to be one too many before it is dropped (`peering/leaving.py`)."""
    idle: float = 60.0
    """Seconds without a client after which a manager that is alone ends."""


def relay_keys(text: str | None) -> tuple[str, ...]:
    """Keys (hex) of the labs whose addresses or keys stand in `text`, with commas between them. Raises: ConfigError."""
    try:
        return tuple(public_key(each.strip()) for each in (text or "").split(",") if each.strip())
    except (BadAddressError, BadKeyError) as error:
        raise ConfigError(f"{error} (--relay-through, TETHER_RELAY_THROUGH)") from error
