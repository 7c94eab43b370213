"""What a key is to a lab, and what its streams may cost: values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from tether.swarm.blobs.blobs import AskingLimits, GivingLimits, Shelf
from tether.swarm.relaying.pairs import RelayLimits
from tether.swarm.rpc.rpc import RpcLimits, Service

__all__ = ["Admits", "ConnectionLimits", "OwnSide", "Standing"]

_UNKNOWN_RPC: Final = RpcLimits(
    max_request_nbytes=4096, max_in_flight=4, max_held_nbytes=16 << 10, max_passing_nbytes=4096, max_unread_nbytes=256 << 10
)


class Standing(Enum):
    """What a key is to this lab."""

    BANNED = "nothing is taken from it"
    UNKNOWN = "it may ask to be admitted, and that is all"
    KNOWN = "what it may do is looked up for each call"


Admits = Callable[[str], Standing]
"""Called with a key, hex, whenever it matters; has its answer at once."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What peers may open here, and how much of it is kept open."""

    max_unknown: int = 64
    """Streams of all unknown keys together: keys cost nothing, so a bound for each would be none. One more pushes the oldest out, which
    leaves each half a second at the rate at which the engine takes handshakes: a secret is told in less."""
    unknown_patience: float = 30.0
    """Seconds that an unknown key has to be admitted: somebody may have to copy an invitation's secret, but not while connected."""
    unknown_message_nbytes: int = 64 << 10
    """Of a message of one: a frame is kept until it is whole, and 64 times 16 MiB are too many."""
    unknown_rpc: RpcLimits = _UNKNOWN_RPC
    """An invitation's secret has some dozens of bytes, and guessing gains nothing by asking much at a time."""
    max_streams: int = 8
    """That one known key opened, besides those for relaying, which has bounds of its own: RPC and blobs, and again those that a change of
    its network left behind until they are given up."""
    max_outgoing: int = 256
    """That this side opened: each is kept alive, and holds buffers."""
    idle: float = 60.0
    """Seconds after which one that this side opened and nobody uses is closed: opening it again costs some round trips."""
    silence: float = 2.0
    """Seconds in which nothing at all comes back of what was sent, not even that it arrived, after which a stream is doubted."""
    proof: float = 0.25
    """Seconds that a doubted stream has to give a sign of life, when its peer has just given one elsewhere."""
    returning: float = 15.0
    """Seconds that callers wait for a peer that was here and is gone: a manager that is started again needs two to five, on a machine
    that has much to do ten."""
    rpc: RpcLimits = field(default_factory=RpcLimits)
    asking: AskingLimits = field(default_factory=AskingLimits)
    giving: GivingLimits = field(default_factory=GivingLimits)
    relaying: RelayLimits | None = None
    """What is relayed for known keys that can't reach each other; None: nothing."""


@dataclass(frozen=True, slots=True)
class OwnSide:
    """What a lab is to its peers."""

    key: str
    """Public, hex."""
    service: Service
    """What it answers."""
    shelf: Shelf | None
    """What it gives; None: nothing."""
    admits: Admits
