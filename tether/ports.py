"""Every seam of Tether on one screen: what a part needs of another, as Protocols. Real parts and fakes pass the same contract suites."""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tether.types import Digest, Framework, ModelFormat, ModelInfo, Tensors

__all__ = [
    "Admitting",
    "BlobSource",
    "Copying",
    "Endpoint",
    "Hop",
    "HopReply",
    "Isolatable",
    "Lending",
    "LoadedModel",
    "Management",
    "MessageStream",
    "OnReply",
    "OpenStream",
    "Replicating",
    "Rolling",
    "Runtime",
    "SignedManifest",
    "Streaming",
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
        """End the `run` that goes on in another thread soon, with ModelFailedError or WorkerLostError; does nothing where none does.

        Asked once more during the same run: at any price, what the model keeps included.
        """
        ...

    def close(self) -> None:
        """Free it; a second call does nothing."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A `LoadedModel` whose answer comes in parts, if its `info.streams` says so. Parts of several streams, and runs, may take turns."""

    def stream(self, inputs: Tensors) -> Generator[Tensors]:
        """Inputs as of `run`; each part has all of `info.outputs`. Nothing runs before the first part is asked for, nor between two.

        Each `next` is a run, as `interrupt` has it, and so is `close`, which ends the model's own generator (GeneratorExit).
        """
        ...


@runtime_checkable
class Isolatable(Protocol):
    """A `LoadedModel` that runs in the worker's own process, and can do so in one of its own."""

    def isolate(self) -> None:
        """Move it there, between two runs; a second call does nothing. Raises: as `Runtime.load`; LoadFailedError: it stays where it is."""
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


@dataclass(slots=True)  # nobody changes one; frozen ones take four times as long to make, and each request makes one
class Hop:
    """One request on its way from the gateway to a worker: the HTTP body as it came."""

    body: bytes
    header_nbytes: int
    """Length of the JSON before binary tensors; 0: the whole body is JSON (OIP §3)."""
    timeout: float
    """Seconds that are left for the answer."""
    alone: bool = False
    """Whether it is suspected to end the process that runs it: it runs alone, in one of its own."""
    session: bytes = b""
    """What the caller called the requests that belong together; the gateway's own matter."""


@dataclass(slots=True)  # nobody changes one; frozen ones take four times as long to make, and each request makes one
class HopReply:
    """A worker's answer: an HTTP status and body, ready to send."""

    status: int
    body: bytes
    header_nbytes: int = 0
    retry_after: int = 1
    """Of a 429 or 503: seconds after which another try is due."""


class Undelivered(enum.Enum):
    """Why there is no reply."""

    NOT_SENT = "the worker never saw the request"
    LOST = "the connection ended after the request was sent: the worker may have run it"


OnReply = Callable[[HopReply | Undelivered], None]
"""Called once, on the loop's thread."""
Endpoint = str
"""Where one model of one worker listens: the path of a Unix socket."""


@dataclass(frozen=True, slots=True)
class OpenStream:
    """An answer that comes in parts, as seen by who asked for it."""

    cancel: Callable[[], None]
    """No more of it; nothing is called any more."""
    taken: Callable[[], None]
    """A part has found its reader, and another one may come: called once for each. A few come without."""


class Transport(Protocol):
    """Carries requests to one endpoint and answers back, in any order, coalesced per tick of the loop."""

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet answered."""
        ...

    def send(self, hop: Hop, on_reply: OnReply) -> Callable[[], None]:
        """Send it; never blocks. The returned function abandons it: `on_reply` will not be called any more."""
        ...

    def stream(self, hop: Hop, on_part: Callable[[HopReply], None], on_reply: OnReply) -> OpenStream:
        """As `send`; before `on_reply` each part is given to `on_part`. The last reply is the end, with one more part if it has a body."""
        ...

    def close(self) -> None:
        """Drop the connection; open requests end as `Undelivered`."""
        ...


class Admitting(Protocol):
    """Who is let in from outside, and what for: `Management` has it. `peer`: a key, an address, a petname, or the label of one alone.

    Each raises BadKeyError, BadAddressError and BadScopeError for what is none, NoSpaceError and StoreError.
    """

    async def address(self) -> dict[str, Any]:
        """`{"address": "tether://…", "publisher": the key}`: how other labs find this one."""
        ...

    async def invite(self, scopes: Sequence[str], expires: str | float, uses: int, label: str) -> dict[str, Any]:
        """Make an invitation: its row (`invitations`) with `url`, the only place where its secret is. `expires`: seconds, "30d", "never".

        Raises: BadTermsError: `expires`, `uses`; BadNameError: `label`; ConflictError: too many are open; UnsupportedError,
        MissingDependencyError: nobody could come by it, since the lab is not on the swarm and can't be.
        """
        ...

    async def invitations(self) -> list[dict[str, Any]]:
        """`{"id", "scopes", "label", "created", "expires", "uses", "peers": keys that came by it, "problem": why it admits nobody}`."""
        ...

    async def revoke_invitation(self, invitation: str) -> dict[str, Any]:
        """Its row; those that came by it stay. Raises: NotFoundError."""
        ...

    async def allow(self, peer: str, scopes: Sequence[str], label: str | None = None) -> dict[str, Any]:
        """`{"peer", "scopes": all that it has then, "envelopes": name → base64, "note"}`, an envelope for each `decrypt:NAME` given.

        `note`: why the peer can't make use of the scopes now, or None.

        Raises: ForbiddenError: it is banned; LockedModelError: no model of the name is encrypted.
        """
        ...

    async def disallow(self, peer: str, scopes: Sequence[str] | None) -> dict[str, Any]:
        """Take scopes (None: everything) from a peer, at once. What it could decrypt gets a new key for later versions.

        The answer: `{"peer", "taken", "scopes": what is left, "invitations": ids by which another key could still come, "message",
        "models": those with a new key, "envelopes": name → peer that stays → base64}`. Raises: NotFoundError; ScopeStillOpenError: nothing
        was taken.
        """
        ...

    async def ban(self, peer: str, reason: str) -> dict[str, Any]:
        """Speak with it no more, whatever it was allowed: its row (`peers`)."""
        ...

    async def unban(self, peer: str) -> dict[str, Any]:
        """Forgive it: its row. Raises: NotFoundError."""
        ...

    async def peers(self) -> list[dict[str, Any]]:
        """Every key that was let in, sent away, named, is connected, or whose lab says something of itself that was found.

        `{"peer", "address", "label", "petname", "scopes", "since", "revoked", "banned", "stranger": nobody here knows it}`, `"route"` and
        `"round_trip"`, null where it is not connected, and what it says of itself, null or empty where it says nothing: `"versions"`: how
        many it holds, `"models"`: those that this lab knows by their bytes, `"region"`, `"gpus"`: [{"name", "count", "nbytes"}], `"load"`:
        per cent, `"serves"`, `"said"`: Unix time.
        """
        ...

    async def name_peer(self, peer: str, petname: str) -> dict[str, Any]:
        """Call a lab by a name of one's own: `{"peer", "petname"}`. Raises: BadNameError; ConflictError: another one has it."""
        ...

    async def audit(self, most: int) -> list[dict[str, Any]]:
        """The latest changes of all this, oldest first: `{"at", "action", "subject", "detail"}`."""
        ...

    async def accept(self, envelope: str) -> dict[str, Any]:
        """Keep the keys that `allow` gave elsewhere for this lab: `{"publisher", "name", "new_keys"}`.

        Raises: BadEnvelopeError; ConflictError: they are for a model of this lab itself.
        """
        ...

    async def rotate(self) -> dict[str, Any]:
        """Replace the cluster key, which wraps all model keys: `{"cluster_key": its id, "rewrapped", "resumed"}`."""
        ...


class Replicating(Protocol):
    """What is kept here of other labs: `Management` has it. A publisher is named by its key, its address, or a petname.

    Each raises UnsupportedError where the lab speaks with no other lab, BadKeyError, BadAddressError.
    """

    async def join(self, url: str) -> dict[str, Any]:
        """Find the lab of `tether://…`; with a secret, be let in there: `{"publisher", "scopes": all that this lab may do there, or None}`.

        Raises: PeerNotFoundError, PeerUnreachableError; BadInvitationError; ForbiddenError: it does not let this lab in.
        """
        ...

    async def replicate(self, publisher: str, model: str, via: str | None = None, wait: float = 20.0) -> dict[str, Any]:
        """Keep a model of another lab here, from now on. Answers when all of it is here, or after `wait` seconds: then call again.

        The answer: `{"publisher", "model", "versions": as they are called here, "done", "fraction", "done_nbytes", "nbytes", "rate",
        "peers": that give something, "error": [code, text] or None}`. `model`: as the publisher calls it; `*`: all of them. `via`: another
        lab that has it. Raises: what keeps it from ever coming (ForbiddenError, UntrustedCodeError …); it is not kept then.
        """
        ...

    async def replications(self) -> list[dict[str, Any]]:
        """What is kept, as `replicate` answers."""
        ...

    async def release(self, publisher: str, model: str) -> dict[str, Any]:
        """Keep it no longer up to date; what is here stays."""
        ...


class Copying(Protocol):
    """Copies of models in several labs, by policies: `Management` has it. A lab is named by its key, its address, or a petname.

    Each raises BadKeyError, BadAddressError; StoreError: what was agreed can't be remembered.
    """

    async def set_policy(self, model: str, policy: Mapping[str, Any] | None) -> dict[str, Any]:
        """Agree on copies of a model of this lab, there or yet to come; `*`: of each that has no policy of its own; None: on none.

        `policy`: `{"copies", "regions", "pin", "budget"}`, each with a default. The answer: `{"model", "policy"}`.
        Raises: BadInputError, MalformedRequestError, BadNameError.
        """
        ...

    async def policies(self) -> dict[str, Any]:
        """Model → policy."""
        ...

    async def hold(self, publisher: str, region: str = "", room: int | None = None) -> dict[str, Any]:
        """Hold copies of its models here, as its policies say, from now on: `{"publisher", "region", "room"}`.

        Raises: ForbiddenError: it does not allow it; PeerNotFoundError, PeerUnreachableError; UnsupportedError where the lab speaks with
        no other lab; BadInputError.
        """
        ...

    async def holdings(self) -> list[dict[str, Any]]:
        """For whom, as `hold` answers."""
        ...

    async def end_holding(self, publisher: str) -> dict[str, Any]:
        """Hold none for it any more; what is here stays."""
        ...

    async def copies(self, model: str) -> dict[str, Any]:
        """Who has a model: `{"model", "publisher", "policy": or None, "labs": [{"peer", "petname", "own", "state", "here"}], "short"}`.

        `state`: whole, coming, surplus (whole, and about to be dropped); `short`: why there are fewer than agreed, or None.
        Raises: UnknownModelError.
        """
        ...


class Lending(Protocol):
    """Workers that are lent to other labs, for their own models: `Management` has it. A lab is named by its key, address, or petname.

    Each raises BadKeyError, BadAddressError; StoreError: what is lent can't be remembered.
    """

    async def lend(self, publisher: str, models: str = "*", slots: int | None = None) -> dict[str, Any]:
        """Lend a lab the workers, from now on: a row of `lendings`, once it has confirmed that. `models`: a glob of its models' names.

        Raises: ForbiddenError: it takes none of this lab; PeerNotFoundError, PeerUnreachableError; NoWorkerError: none runs;
        UnsupportedError: there are no workers at all, or the lab speaks with no other lab; BadInputError.
        """
        ...

    async def lendings(self) -> list[dict[str, Any]]:
        """`{"publisher", "models", "slots", "state", "worker": what they are called there, "error": [code, text] or None}`.

        `state`: registered, or waiting: `error` says for what.
        """
        ...

    async def end_lending(self, publisher: str) -> dict[str, Any]:
        """Lend it none any more."""
        ...

    async def borrowings(self) -> list[dict[str, Any]]:
        """Workers that other labs lend to this one now: `{"worker", "publisher", "models", "slots", "gpus"}`, and as they said a second
        ago: `{"free": slots, "queue": seconds until a request begins, "loaded": how many models}`.
        """
        ...


class Rolling(Protocol):
    """A lab that changes while it serves: new versions step by step, workers one by one. Answers are plain JSON values."""

    async def begin_rollout(self, name: str, terms: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to put a version in the place of the one that the name means. `terms`: fields of `Rollout`, `version` at least.

        The answer is that of `rollout`. The same asked again is the same one.
        Raises: ConflictError: another one goes on, or the name means the version already; UnknownVersionError; BadInputError.
        """
        ...

    async def rollout(self, name: str) -> dict[str, Any]:
        """`{"model", "version", "before", "state", "weight", "shadow", "steps", "every", "begun", "reason"}`, of the latest one.

        `state`: loading, shadow, canary, promoted, reverted, aborted. Raises: NotFoundError: there was none.
        """
        ...

    async def end_rollout(self, name: str) -> dict[str, Any]:
        """Go back: the name means what it meant, at once. Does nothing where none goes on. The answer is that of `rollout`."""
        ...

    async def drain(self, worker: str, patience: float, wait: float) -> dict[str, Any]:
        """Have a worker take no more requests, once what it has is elsewhere or `patience` seconds are over, and answer those it has.

        The answer comes when it has nothing any more, or after `wait` seconds: `{"worker", "state": draining, drained …, "models", "pid"}`.
        Raises: UnknownWorkerError; UnsupportedError: it is another lab's.
        """
        ...

    async def undrain(self, worker: str) -> dict[str, Any]:
        """Have it go on."""
        ...

    async def restart_worker(self, worker: str) -> dict[str, Any]:
        """End its process, so that who looks after it starts another one: `{"worker", "state", "models", "pid": of the one that ends}`."""
        ...


class Management(Admitting, Replicating, Copying, Lending, Protocol):
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

    async def swarm(self) -> dict[str, Any]:
        """Whether this lab is on the swarm: `{"state", "address", "since": Unix time or None, "peers": connected, "reachable", "detail"}`.

        `state`: on; off: there is no reason to be there, or it was started without; failed: it could not, and tries again. `reachable`, on
        the swarm: ok, note: not from everywhere, fail; None: not known yet. `detail`: for people, with what to do.
        """
        ...

    async def contacts(self) -> dict[str, Any]:
        """Keys of other labs: `{"admitted", "connected"}`, those that may do something here, and those that are connected now."""
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

    async def set_serving(self, name: str, changes: Mapping[str, Any] | None) -> dict[str, Any]:
        """Say how this lab serves a model, from now on: fields of `ServingSettings`; null takes one back, None all of them.

        The answer: `{"name", "serving": all that is said}`. Raises: UnknownModelError; BadInputError.
        """
        ...

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
