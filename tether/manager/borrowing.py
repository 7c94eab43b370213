"""Models at labs that lend their workers to this one: how the orchestrator asks for them.

tether_lent_load    {"worker", "number", "model": msgpack of a ModelVersion} → {"endpoint"} or {"error": [code, message]}
tether_lent_unload  the same → {"unloaded": true} or {"error": [code, message]}
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from tether.errors import InternalError, TetherError
from tether.types import ModelVersion

__all__ = ["Borrowing", "handlers"]

log = structlog.get_logger("tether.manager")
Handler = Callable[..., Awaitable[dict[str, Any]]]


class Borrowing(Protocol):
    """Has the lines to the labs. `number`: of the registration (`events.LentWorker`); another one has nothing loaded."""

    async def load(self, worker: str, number: int, model: ModelVersion) -> Path:
        """Where a gateway reaches the version there, once it is loaded; asked again, the same socket.

        Raises: NotFoundError: this registration is not there; what loading raised.
        """
        ...

    async def unload(self, worker: str, number: int, model: ModelVersion) -> None:
        """The lab need not have it any more; nothing happens where it has not. Raises: NotFoundError."""
        ...


def handlers(borrowing: Borrowing) -> dict[str, Handler]:
    """For the orchestrator, on Dask's comms; it alone calls them, so nothing is acknowledged."""

    async def load(worker: str, number: int, model: bytes) -> dict[str, Any]:
        return {"endpoint": str(await borrowing.load(worker, number, _decoded(model)))}

    async def unload(worker: str, number: int, model: bytes) -> dict[str, Any]:
        await borrowing.unload(worker, number, _decoded(model))
        return {"unloaded": True}

    return {"tether_lent_load": _answering(load), "tether_lent_unload": _answering(unload)}


def _decoded(model: bytes) -> ModelVersion:
    return msgspec.msgpack.decode(model, type=ModelVersion)


def _answering(operation: Handler) -> Handler:
    async def answer(**arguments: Any) -> dict[str, Any]:
        try:
            return await operation(**arguments)
        except TetherError as error:
            return {"error": [error.code, str(error)]}
        except Exception as error:
            log.exception("a lent worker could not be asked")
            return {"error": [InternalError.code, f"{type(error).__name__} in the manager; its log has the traceback"]}

    return answer
