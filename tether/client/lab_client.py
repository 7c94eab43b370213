"""What a lab can be asked for, whatever carries the question: HTTP to its gateway, or the swarm."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from tether.ports import Admitting, Copying, Lending, Replicating, Rolling
from tether.types import InferResponse, Tensors

__all__ = ["LabClient"]


class LabClient(Protocol):
    """One lab. Every call raises the errors of the tree, UnsupportedError among them: this lab can't be asked that on this way."""

    @property
    def url(self) -> str:
        """How the lab was reached: what `tether.connect` takes; no secret is in it."""
        ...

    @property
    def admitting(self) -> Admitting:
        """Whom the lab lets in."""
        ...

    @property
    def replicating(self) -> Replicating:
        """What is kept of other labs: by this lab, or where it is elsewhere, by the user's own manager."""
        ...

    @property
    def copying(self) -> Copying:
        """Copies of this lab's models elsewhere, and of others' here."""
        ...

    @property
    def lending(self) -> Lending:
        """Workers that this lab lends to others."""
        ...

    @property
    def rolling(self) -> Rolling:
        """How this lab changes while it serves."""
        ...

    async def aclose(self) -> None:
        """Close the connections; a second call does nothing."""
        ...

    async def live(self) -> None:
        """Return if the lab answers. Raises: UnavailableError."""
        ...

    # Inference

    async def infer(
        self,
        model: str,
        inputs: Tensors,
        *,
        version: int | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (it also goes to the lab)
        priority: int = 0,
    ) -> InferResponse:
        """Run one request; `model` is a name, `publisher~name` or `name@alias`. It is sent once.

        `priority`: 1 is the most urgent, 0 the model's default; for models whose lab gave them levels.
        """
        ...

    def stream(
        self,
        model: str,
        inputs: Tensors,
        *,
        version: int | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[InferResponse]:
        """As `infer`, part by part. Closed, it stops the model."""
        ...

    async def metadata(self, model: str, version: int | None = None) -> dict[str, Any]:
        """`{"name", "versions", "platform", "inputs", "outputs"}`, as the inference protocol has it."""
        ...

    # Models

    async def put_blob(self, digest: str, data: bytes, encrypt: str | None = None) -> None: ...

    async def get_blob(self, digest: str, version: str | None = None) -> bytes:
        """The bytes as they came; whoever uses them checks the digest."""
        ...

    async def publish(self, name: str, draft: Mapping[str, Any]) -> dict[str, Any]:
        """Raises: MissingBlobsError: `args[1]` lists the digests to send first."""
        ...

    async def models(self) -> list[dict[str, Any]]: ...

    async def model(self, name: str) -> dict[str, Any]: ...

    async def manifest(self, name: str, version: int) -> dict[str, Any]: ...

    def kvstore(self, name: str, version: int, path: str = "") -> dict[str, Any]: ...

    async def delete_version(self, name: str, version: int) -> dict[str, Any]: ...

    async def set_alias(self, name: str, alias: str, version: int) -> dict[str, Any]: ...

    async def set_serving(self, name: str, changes: Mapping[str, Any] | None) -> dict[str, Any]: ...

    async def rollback(self, name: str, alias: str | None = None) -> dict[str, Any]: ...

    async def verify(self, name: str, version: int | None = None) -> dict[str, Any]: ...

    async def diff(self, name: str, before: int, after: int) -> dict[str, Any]: ...

    async def repair(self, name: str, version: int | None = None) -> dict[str, Any]: ...

    # The lab

    async def gc(self, *, dry_run: bool, grace: float | None) -> dict[str, Any]: ...

    async def rebuild_index(self) -> dict[str, Any]: ...

    async def explain(self, name: str) -> dict[str, Any]: ...

    async def forget_store(self, store: str) -> dict[str, Any]: ...

    async def workers(self) -> list[dict[str, Any]]: ...

    async def status(self) -> dict[str, Any]: ...

    async def quarantine(self) -> list[dict[str, Any]]:
        """`{"model", "version", "isolated", "poison": [{"mark": of an input that is not run, "until": Unix time}]}`."""
        ...

    async def forgive(self, name: str) -> dict[str, Any]: ...

    async def events(self, after: int | None, wait: float) -> dict[str, Any]:
        """`{"events", "seq"}`: what happened after that number (0: all that is still known), at once, or within `wait` seconds when
        something does. None: nothing, and the number of now.
        """
        ...

    async def trust(self, publisher: str, scopes: Sequence[str]) -> dict[str, Any]: ...
