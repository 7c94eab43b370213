"""How a manager's operations are asked inside its own process: which change nothing, and who may change something without a cluster."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from tether.errors import NotWriterError
from tether.manager.operations import Operations

__all__ = ["READING", "Operation", "asked_alone"]

Operation = Callable[..., Awaitable[Any]]
"""Arguments and answer are JSON values, but for blobs. Raises the errors of the tree."""

READING = frozenset(
    {
        *("get_blob", "models", "model", "manifest", "signed_manifest", "model_key", "verify", "diff", "read_zarr"),
        *("address", "invitations", "peers", "audit"),
    }
)
"""Operations that change nothing: any manager answers them, and at once."""


def asked_alone(operations: Operations) -> dict[str, Operation]:
    """The operations of a manager that speaks with no orchestrator. Blocks.

    It has the lock of its store, but a store that followed another one when its cluster ran is not the lab's: a change would be lost.
    """
    footing = operations.repository.footing()
    may_change = footing.term == 0 or footing.writes
    handlers = operations.handlers()
    return {name: operation if may_change or name in READING else _refused(operation) for name, operation in handlers.items()}


def _refused(operation: Operation) -> Operation:
    @functools.wraps(operation)
    async def refuse(**_: Any) -> Any:
        raise NotWriterError("this data folder follows another manager of its lab, so nothing was changed: ask the lab, or start it")

    return refuse
