"""UDX in Python: reliable streams over UDP, wire-compatible with udx-native, on asyncio sockets."""

from __future__ import annotations

from tether.swarm.udx.addresses import Address
from tether.swarm.udx.endpoint import Udx
from tether.swarm.udx.sockets import UdxSocket
from tether.swarm.udx.stream import UdxStream

__all__ = ["Address", "Udx", "UdxSocket", "UdxStream"]
