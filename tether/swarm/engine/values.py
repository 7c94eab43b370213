"""Pure: how a node is to take part in the DHT, and what it tells of that; keys and records as the bundle takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tether.errors import BadKeyError, PayloadTooLargeError
from tether.swarm.engine.secure import StreamLimits

__all__ = ["EngineSettings", "FoundPeer", "MutableRecord", "NodeStatus", "check_record", "hex_key", "hex_keys", "node_status"]

_KEY_NBYTES = 32
_MAX_RECORD_NBYTES = 1000
"""Of a record's value: it travels in one datagram, as BEP 44's do."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a node takes part in the DHT."""

    bootstrap: Sequence[tuple[str, int]] | None = None
    """Nodes to begin with, as (host, port); None: Hyperswarm's public ones; empty: none, so that others begin with this one."""
    host: str = "0.0.0.0"  # noqa: S104 (peers come from anywhere; what they may do is decided by key)
    port: int = 0
    """UDP; 0: any free one."""
    ephemeral: bool | None = None
    """Whether it stays out of others' routing tables; None: until it has proved reachable for a while."""
    firewalled: bool | None = None
    """Whether it is taken to be behind a firewall; None: found out."""
    relays: Sequence[bytes] = ()
    """Public keys of blind relays, for peers that no hole can be punched to; `Engine.relay_through` changes them."""
    limits: StreamLimits = field(default_factory=StreamLimits)


@dataclass(frozen=True, slots=True)
class FoundPeer:
    """Who announced a topic."""

    public_key: bytes
    relays: tuple[tuple[str, int], ...]
    """Nodes through which it can be asked for a stream."""


@dataclass(frozen=True, slots=True)
class MutableRecord:
    """A record of the DHT, its signature verified."""

    value: bytes
    seq: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """How the network sees this node."""

    address: tuple[str, int] | None
    """Public address, where other nodes agree on one; the port is 0 where each of them sees another."""
    local: tuple[str, int] | None
    """Where it listens on this machine's network."""
    firewalled: bool
    """Whether packets come only from those that were written to."""
    randomized: bool
    """Whether the NAT gives each remote another port: between two such peers no hole can be punched."""
    ephemeral: bool
    bootstrapped: bool
    online: bool
    degraded: bool
    announced: bool
    """Whether nodes of the DHT know where it is to be found; for one that listens, and since it woke."""
    known: int
    """Nodes in the routing table."""
    punches: Mapping[str, int]
    """Holes punched, by kind."""
    relaying: Mapping[str, int]


def node_status(found: Mapping[str, Any]) -> NodeStatus:
    """As the bundle tells it."""
    return NodeStatus(
        address=(found["host"], found["port"]) if found["host"] else None,
        local=(found["local"]["host"], found["local"]["port"]) if found["local"] else None,
        firewalled=found["firewalled"],
        randomized=found["randomized"],
        ephemeral=found["ephemeral"],
        bootstrapped=found["bootstrapped"],
        online=found["online"],
        degraded=found["degraded"],
        announced=found["announced"],
        known=int(found["known"]),
        punches=found["punches"],
        relaying=found["relaying"],
    )


def hex_key(value: bytes, name: str) -> str:
    """A key as the bundle takes it. Raises: BadKeyError: not 32 bytes."""
    if len(value) != _KEY_NBYTES:
        raise BadKeyError(f"A {name} has {_KEY_NBYTES} bytes, this one {len(value)}.")
    return value.hex()


def hex_keys(keys: Sequence[bytes], name: str) -> list[str]:
    """As `hex_key`, of each."""
    return [hex_key(key, name) for key in keys]


def check_record(value: bytes) -> None:
    """Raises: PayloadTooLargeError: over 1,000 bytes."""
    if len(value) > _MAX_RECORD_NBYTES:
        raise PayloadTooLargeError(f"A record of {len(value)} bytes is over {_MAX_RECORD_NBYTES}: put what is larger behind a stream.")
