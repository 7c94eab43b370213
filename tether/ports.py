"""Every seam of Tether on one screen: what a part needs of another, as Protocols. Real parts and fakes pass the same contract suites."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tether.types import Framework, ModelFormat, ModelInfo, Tensors

__all__ = ["Endpoint", "Hop", "HopReply", "LoadedModel", "Management", "OnReply", "Runtime", "Transport", "Undelivered"]


class LoadedModel(Protocol):
    """A model in memory. One thread at a time calls `run`; `close` gives the memory back to the system."""

    info: ModelInfo

    def run(self, inputs: Tensors) -> Tensors:
        """Run one batch: the arrays of `info.inputs` by name, C-contiguous, checked against the specs; all of `info.outputs` come back.

        Raises: ModelFailedError: the model raised; BadInputError: it found the input wrong where the specs could not tell.
        """
        ...

    def interrupt(self) -> None:
        """End the `run` that goes on in another thread soon, with ModelFailedError or WorkerLostError; does nothing where none does."""
        ...

    def close(self) -> None:
        """Free it; a second call does nothing."""
        ...


class Runtime(Protocol):
    """Knows one framework. Importing it imports nothing heavy; `load` imports the framework's library."""

    framework: Framework

    def recognise(self, path: Path) -> ModelFormat | None:
        """The format of the file or folder, if it is one of this framework's; looks at names and first bytes only, parses nothing."""
        ...

    def inspect(self, path: Path) -> ModelInfo:
        """Read the metadata; may execute what the format executes, so it runs in the sandbox.

        Raises: BadModelError: it can't be parsed; MissingDependencyError: the framework's library is not installed.
        """
        ...

    def load(self, path: Path, info: ModelInfo, threads: int = 1) -> LoadedModel:
        """Bring it into memory; `threads` bounds the threads of one `run`.

        Raises: BadModelError, MissingDependencyError.
        """
        ...


@dataclass(frozen=True, slots=True)
class Hop:
    """One request on its way from the gateway to a worker: the HTTP body as it came."""

    body: bytes
    header_nbytes: int
    """Length of the JSON before binary tensors; 0: the whole body is JSON (OIP §3)."""
    timeout: float
    """Seconds that are left for the answer."""


@dataclass(frozen=True, slots=True)
class HopReply:
    """A worker's answer: an HTTP status and body, ready to send."""

    status: int
    body: bytes
    header_nbytes: int = 0


class Undelivered(enum.Enum):
    """Why there is no reply."""

    NOT_SENT = "the worker never saw the request"
    LOST = "the connection ended after the request was sent: the worker may have run it"


OnReply = Callable[[HopReply | Undelivered], None]
"""Called once, on the loop's thread."""
Endpoint = str
"""Where one model of one worker listens: the path of a Unix socket."""


class Transport(Protocol):
    """Carries requests to one endpoint and answers back, in any order, coalesced per tick of the loop."""

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet answered."""
        ...

    def send(self, hop: Hop, on_reply: OnReply) -> Callable[[], None]:
        """Send it; never blocks. The returned function abandons it: `on_reply` will not be called any more."""
        ...

    def close(self) -> None:
        """Drop the connection; open requests end as `Undelivered`."""
        ...


class Management(Protocol):
    """What the manager does for the gateway. Arguments and answers are plain JSON values, as on the wire of `/tether/v1`.

    Each raises the errors of the tree that its work can raise (`UnknownModelError`, `MissingBlobsError`, …), and
    `ServiceUnavailableError` when the manager does not answer.
    """

    async def put_blob(self, digest: str, data: bytes) -> dict[str, Any]:
        """Stage a blob until a publish names it. Raises: DigestMismatchError, NoSpaceError, PayloadTooLargeError."""
        ...

    async def get_blob(self, digest: str) -> bytes:
        """The verified bytes. Raises: NotFoundError, ChunkMissingError, ChunkAlteredError."""
        ...

    async def publish(self, name: str, draft: Mapping[str, Any]) -> dict[str, Any]:
        """Inspect in the sandbox, sign, commit. The answer has `created`: False when these bytes are a version already."""
        ...

    async def models(self) -> list[dict[str, Any]]: ...

    async def model(self, name: str) -> dict[str, Any]: ...

    async def manifest(self, name: str, version: int) -> dict[str, Any]: ...

    async def set_alias(self, name: str, alias: str, version: int) -> dict[str, Any]: ...

    async def delete_alias(self, name: str, alias: str) -> dict[str, Any]: ...

    async def rollback(self, name: str, alias: str | None) -> dict[str, Any]: ...

    async def delete_version(self, name: str, version: int) -> dict[str, Any]: ...

    async def verify(self, name: str, version: int | None) -> dict[str, Any]: ...

    async def trust(self, publisher: str, scopes: Sequence[str]) -> dict[str, Any]: ...
