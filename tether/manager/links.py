"""The operations of another manager of this cluster, over Dask's comms under mutual TLS."""

from __future__ import annotations

import asyncio
from typing import Any

from distributed.core import rpc

from tether.errors import ServiceUnavailableError, from_code

__all__ = ["CONNECT", "Link"]

CONNECT = 2.0
"""Seconds to open a connection."""
_ANSWER = 20.0
"""Seconds for one operation of another manager: a blob of 4 MiB over 2 Mbit/s."""


class Link:
    """The operations of another manager. Belongs to the event loop that uses it first."""

    def __init__(self, address: str, arguments: dict[str, Any]) -> None:
        """`arguments`: of Dask's `connect`, with the certificates."""
        self._address, self._arguments = address, arguments
        self._rpc: rpc | None = None

    async def ask(self, operation: str, **arguments: Any) -> Any:
        """Raises: ServiceUnavailableError; what it answers as an error of the tree."""
        if self._rpc is None:
            self._rpc = rpc(self._address, timeout=CONNECT, connection_args=self._arguments)
        try:
            async with asyncio.timeout(_ANSWER):
                answer = await getattr(self._rpc, f"tether_{operation}")(**arguments)
        except (OSError, TimeoutError) as error:
            raise ServiceUnavailableError(f"the manager at {self._address} does not answer ({error}); it is asked again") from error
        if "error" in answer:
            code, *args = answer["error"]
            raise from_code(code, *args)
        return answer["answer"]

    async def close(self) -> None:
        """Drop the connections; a second call does nothing."""
        old, self._rpc = self._rpc, None
        if old is not None:
            await old.close_rpc()
