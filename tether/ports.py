"""Every seam of Tether on one screen: what a part needs of another, as Protocols. Real parts and fakes pass the same contract suites."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tether.types import Digest, Framework, ModelFormat, ModelInfo, Tensors

__all__ = [
    "BlobSource",
    "Endpoint",
    "Hop",
    "HopReply",
    "LoadedModel",
    "Management",
    "MessageStream",
    "OnReply",
    "Runtime",
    "SignedManifest",
    "Transport",
    "Undelivered",
]


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

    async def put_blob(self, digest: str, data: bytes, encrypt: str | None = None) -> dict[str, Any]:
        """Stage a blob until a publish names it. `encrypt`: the model that it is for, whose key encrypts it before it is written.

        Raises: DigestMismatchError, NoSpaceError, PayloadTooLargeError; BadNameError: `encrypt` is none.
        """
        ...

    async def get_blob(self, digest: str, version: str | None = None) -> bytes:
        """The verified bytes as they are stored; decrypted where `version` (`digits:2`) names the encrypted one that they belong to.

        Raises: NotFoundError, ChunkMissingError, ChunkAlteredError, LockedModelError.
        """
        ...

    async def publish(self, name: str, draft: Mapping[str, Any]) -> dict[str, Any]:
        """Inspect in the sandbox, sign, commit. The answer has `created`: False when these bytes are a version already."""
        ...

    async def models(self) -> list[dict[str, Any]]: ...

    async def model(self, name: str) -> dict[str, Any]: ...

    async def manifest(self, name: str, version: int) -> dict[str, Any]:
        """`{"version", "digest", "manifest"}`; of an encrypted version the manifest tells all, and `public` is what was signed."""
        ...

    async def signed_manifest(self, digest: str) -> dict[str, Any]:
        """A version as it was signed: `{"name", "publisher", "manifest": base64, "signature": hex, "code_trusted"}`, the last one saying
        whether this lab trusts the publisher for code. Raises: UnknownVersionError, ChunkMissingError, ChunkAlteredError.
        """
        ...

    async def set_alias(self, name: str, alias: str, version: int) -> dict[str, Any]: ...

    async def delete_alias(self, name: str, alias: str) -> dict[str, Any]: ...

    async def rollback(self, name: str, alias: str | None) -> dict[str, Any]: ...

    async def delete_version(self, name: str, version: int) -> dict[str, Any]: ...

    async def verify(self, name: str, version: int | None) -> dict[str, Any]: ...

    async def diff(self, name: str, before: int, after: int) -> dict[str, Any]:
        """What changed between two versions: `{"files", "tensors", "unchanged", "shared_nbytes", "new_nbytes"}`."""
        ...

    async def repair(self, name: str, version: int | None) -> dict[str, Any]:
        """Mend what is damaged with what was uploaded since, or is had elsewhere: `{"found", "repaired", "failed"}`, lists of digests, and
        `"paths"`, by digest the array that a failed one is of, where that is known.
        """
        ...

    async def gc(self, *, dry_run: bool, grace: float | None) -> dict[str, Any]:
        """Delete what no version names and is older than `grace` seconds (None: a day).

        The answer: `{"dry_run", "freed_nbytes", "later_nbytes", "lines"}`.
        """
        ...

    async def rebuild_index(self) -> dict[str, Any]:
        """Read from the packs again where each blob lies: `{"packs": how many}`."""
        ...

    async def forget_store(self, store: str) -> dict[str, Any]:
        """Take a host that is gone for good out of a shared folder of packs: `{"store", "was": host and data folder}`.

        Raises: NotFoundError.
        """
        ...

    async def read_zarr(self, ref: str, path: str, start: int | None, nbytes: int) -> dict[str, Any]:
        """A part of the value at a zarr path of a version: `nbytes` from `start` (None: the last ones), no more than 4 MiB at once.

        The answer: `{"digest": the manifest's, "nbytes": the whole value's, "start", "data": bytes}`. Raises: NotFoundError and its kin,
        ChunkMissingError, ChunkAlteredError.
        """
        ...

    async def trust(self, publisher: str, scopes: Sequence[str]) -> dict[str, Any]: ...

    async def allow(self, peer: str, scopes: Sequence[str]) -> dict[str, Any]:
        """Let a lab open encrypted models (`decrypt:NAME`): `{"peer", "scopes", "envelopes": name → base64}`, for it alone.

        Raises: BadNameError, BadKeyError; LockedModelError: no model of the name is encrypted.
        """
        ...

    async def revoke_decrypt(self, peer: str, scopes: Sequence[str]) -> dict[str, Any]:
        """Give later versions a key that a lab doesn't get.

        The answer: `{"peer", "models", "message", "envelopes": name → peer that stays → base64}`.
        """
        ...

    async def accept(self, envelope: str) -> dict[str, Any]:
        """Keep the keys that `allow` gave elsewhere for this lab: `{"publisher", "name", "new_keys"}`.

        Raises: BadEnvelopeError; ConflictError: they are for a model of this lab itself.
        """
        ...

    async def rotate(self) -> dict[str, Any]:
        """Replace the cluster key, which wraps all model keys: `{"cluster_key": its id, "rewrapped", "resumed"}`."""
        ...


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A version as its publisher signed it, from wherever it came: good only once digest and signature were checked."""

    data: bytes
    """The manifest's canonical bytes; their digest identifies the version."""
    publisher: str
    """Ed25519 public key, hex."""
    signature: bytes


class BlobSource(Protocol):
    """Somewhere that may have blobs: the manager, a gateway, a peer. Nothing that it gives is believed before its digest was checked.

    One blob a call, many calls at a time: whoever fetches then sees which of them stalls, may ask elsewhere for that one, and takes a
    call back by cancelling it. A stream of many would hide that, and HTTP, Dask's comms and Hypercore all carry single requests well.
    """

    @property
    def name(self) -> str:
        """For people: `manager`, a URL, a peer's petname."""
        ...

    @property
    def in_flight(self) -> int:
        """How many calls of `fetch` it takes to keep it busy; more are not made."""
        ...

    async def fetch(self, digest: Digest, nbytes: int) -> bytes | None:
        """The blob, which has at least `nbytes` bytes; None: not here. No answer is read beyond the size of the largest blob.

        Raises: UnavailableError: it does not answer now; RemoteError: what came is no answer. Cancelled, it leaves nothing open.
        """
        ...

    async def manifest(self, digest: Digest) -> SignedManifest | None:
        """The version whose manifest has this digest; None: not here. Raises: as `fetch`."""
        ...

    async def aclose(self) -> None:
        """Close its connections; a second call does nothing."""
        ...


class MessageStream(Protocol):
    """An encrypted connection to one peer, who proved its key: whole messages, in order, both ways. Belongs to one event loop."""

    @property
    def peer(self) -> str:
        """The other side's Ed25519 public key, hex."""
        ...

    @property
    def is_initiator(self) -> bool:
        """Whether this side opened it."""
        ...

    def start(
        self, on_message: Callable[[memoryview], None], on_end: Callable[[], None], on_close: Callable[[Exception | None], None]
    ) -> None:
        """Deliver what comes, on the loop; nothing is lost that came before. `on_end`: the other side sends no more.

        `on_close`, once: both directions are gone; the error is None where both sides ended in order. A message is valid in its call only.
        """
        ...

    def send(self, message: bytes | bytearray | memoryview) -> bool:
        """Queue a message; False: the queue is long, wait for `drained`. Does nothing on a stream that closed."""
        ...

    async def drained(self) -> None:
        """Wait until more may be queued. Raises: ServiceUnavailableError: the stream closed."""
        ...

    def pause(self) -> None:
        """Deliver nothing for now: the other side is slowed down once what it may send has come."""
        ...

    def resume(self) -> None: ...

    def end(self) -> None:
        """Send no more; what is queued goes out first."""
        ...

    def destroy(self) -> None:
        """Cut the connection at once, in both directions; a second call does nothing."""
        ...
