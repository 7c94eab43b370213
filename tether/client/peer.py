"""A lab elsewhere, reached over the swarm through the user's own manager: this process speaks no Hyperswarm itself."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Final, Never

import orjson
from blake3 import blake3

from tether.client.admitting import Admitting
from tether.client.answers import part_of
from tether.client.copying import Copying
from tether.client.lending import Lending
from tether.client.own_manager import OwnManager
from tether.client.replicating import OwnReplicating
from tether.client.rolling import Rolling
from tether.config import DataFolder, bootstrap_nodes
from tether.errors import (
    ChunkAlteredError,
    ForbiddenError,
    LockedModelError,
    RemoteError,
    StreamLostError,
    TetherError,
    UnknownAliasError,
    UnknownVersionError,
    UnsupportedError,
)
from tether.security.addresses import Link
from tether.security.scopes import METHODS
from tether.swarm.rpc.rpc import Chunk, Outgoing, Piece
from tether.types import InferResponse, ModelRef, Tensors
from tether.wire.heads import joined
from tether.wire.oip import decode_response, encode_request
from tether.wire.parts import PartReader

__all__ = ["PeerClient"]

_CONNECT: Final = 60.0
"""Seconds for the lab to be found: a manager may have to be started, enter the DHT, and punch a hole."""
_TIMEOUT: Final = 65.0
"""Seconds; over the 60 of the gateway there, so that its answer, which says more, comes first."""
_NBYTES_PER_SECOND: Final = 1 << 20
"""That a line carries at least: for a large request there is more time, unless its caller says how much."""
_GRACE: Final = 2.0
"""Seconds that the manager's own word on a deadline may be late."""
_LENGTH_NBYTES: Final = 4
"""Before the JSON of an answer: its length, little-endian."""
_LONG: Final = 1800.0
"""Seconds for a publish: a sandbox may import TensorFlow."""
_LISTEN: Final = 10.0
"""Seconds for which the lab is asked for parts at a time."""
_READING: Final = frozenset({"events", "manifest", "models", "ping"})
"""Methods that may be heard twice."""
_ENCRYPTING: Final = ("encrypt a model", "`tether publish --encrypt`")


class PeerClient:
    """One lab of the swarm. Belongs to the event loop that makes the first call.

    What only the lab's own people can ask is refused here, with what to do instead. What reads is repeated where a process ended
    meanwhile, an inference where its model is pure, nothing else.
    """

    def __init__(self, folder: DataFolder, url: str, bootstrap: str | None = None) -> None:
        """`folder`: of the user's own manager, and how it enters the swarm if it is started for this. `url`: `tether://<address>[#<secret>]`.

        Raises: BadAddressError; ConfigError: `bootstrap`.
        """
        bootstrap_nodes(bootstrap)
        self._link = Link.parse(url)
        self._own = OwnManager(folder, bootstrap)
        self._is_known = False

    @property
    def url(self) -> str:
        """The address; the secret is never shown."""
        return str(self._link.address)

    @property
    def admitting(self) -> Admitting:
        """Of all this, a lab elsewhere tells its address alone."""
        return Admitting(self._admission)

    @property
    def replicating(self) -> OwnReplicating:
        """What the user's own manager keeps, of this lab and others."""
        return OwnReplicating(self._own)

    @property
    def copying(self) -> Copying:
        """Nothing of it: each call is refused."""
        return Copying(self._refused_copying)

    async def _refused_copying(self, method: str, path: str, value: dict[str, Any] | None = None, *, repeatable: bool = True) -> Never:
        """Raises: UnsupportedError."""
        del method, path, value, repeatable
        self._only_there("agree on copies of models, or tell where they are", "`tether policy`, `tether hold`, `tether show`")

    @property
    def lending(self) -> Lending:
        """Nothing of it: each call is refused."""
        return Lending(self._refused_lending)

    async def _refused_lending(self, method: str, path: str, value: dict[str, Any] | None = None, *, repeatable: bool = True) -> Never:
        """Raises: UnsupportedError."""
        del method, path, value, repeatable
        self._only_there("lend its workers", "`tether lend`")

    @property
    def rolling(self) -> Rolling:
        """Nothing of it: each call is refused."""
        return Rolling(self._refused_rolling)

    async def _refused_rolling(self, method: str, path: str, value: dict[str, Any] | None = None, *, repeatable: bool = True) -> Never:
        """Raises: UnsupportedError."""
        del method, path, value, repeatable
        self._only_there("roll out a version, or drain workers", "`tether rollout`, `tether drain`, `tether restart`")

    async def _admission(self, method: str, path: str, value: dict[str, Any] | None = None, *, repeatable: bool = True) -> dict[str, Any]:
        """Raises: UnsupportedError."""
        del value, repeatable
        if (method, path) != ("GET", "/tether/v1/address"):
            self._only_there("let others in, or tell whom it lets in", "`tether invite`, `tether allow`, `tether peers`")
        return {"address": self.url, "publisher": self._link.address.key}

    def __repr__(self) -> str:
        return f"PeerClient({self.url!r})"

    async def aclose(self) -> None:
        """Close the connection to the manager; a second call does nothing."""
        await self._own.aclose()

    async def live(self) -> None:
        """Find the lab, and be enrolled there if the address came with a secret. Return if it answers.

        Raises: PeerNotFoundError, PeerUnreachableError, BadInvitationError, ForbiddenError, StartFailedError …
        """
        self._is_known = False
        await self._asked("ping", {}, _CONNECT)

    # Inference

    async def infer(
        self,
        model: str,
        inputs: Tensors,
        *,
        version: int | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (it also goes to the lab, which stops working on what nobody waits for)
        priority: int = 0,
    ) -> InferResponse:
        """Run one request; `model` is a name, `publisher~name` or `name@alias`. Lost on its way, it is made again if the model is pure.

        Raises: UnknownModelError, BadInputError, NoWorkerError, ModelFailedError …: as the lab's gateway answers; StreamLostError: the
        lab went away meanwhile, and only the caller knows whether the model may have run twice.
        """
        body, header_nbytes = encode_request(inputs, outputs=outputs, binary=True, priority=priority)
        value = _addressed(body, header_nbytes or len(body), model, version)
        answer = await self._inferred(value, (model, version), _patience(len(body)) if timeout is None else timeout)
        return decode_response(memoryview(answer)[_LENGTH_NBYTES:], int.from_bytes(answer[:_LENGTH_NBYTES], "little"))

    async def stream(
        self,
        model: str,
        inputs: Tensors,
        *,
        version: int | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
    ) -> AsyncGenerator[InferResponse]:
        """As `infer`, part by part: the lab is asked for those that came, again and again. Closed, it stops the model.

        `timeout`: seconds for all of it; without, the lab's own for each part. Lost on its way, it is not begun again.
        """
        body, header_nbytes = encode_request(inputs, outputs=outputs, binary=True)
        value = _addressed(body, header_nbytes or len(body), model, version, timeout)
        opened = _object("stream", await self._request("stream", timeout or _patience(len(body)), *value))
        asked = orjson.dumps({"stream": opened.get("stream"), "wait": _LISTEN})
        reader, is_over = PartReader(), False
        try:
            while not is_over:
                for part in reader.fed(await self._request("parts", _LISTEN + _TIMEOUT, asked)):
                    is_over = part.is_end or part.status != 200  # noqa: PLR2004 (HTTP's OK)
                    if not part.is_end:
                        yield part_of(part)
        finally:
            if not is_over:
                with contextlib.suppress(TetherError):  # else the lab ends it when nobody has asked for a while
                    await self._request("unstream", _LISTEN, asked)

    async def _inferred(self, value: Piece, asked: tuple[str, int | None], timeout: float) -> bytes:  # noqa: ASYNC109 (as above)
        clock = asyncio.get_running_loop().time
        end = clock() + timeout
        while True:
            try:
                return await self._request("infer", max(end - clock(), 0.0), *value)
            except StreamLostError:
                if clock() >= end or not await self._is_pure(*asked):
                    raise

    async def _is_pure(self, model: str, version: int | None) -> bool:
        """As the lab says: it repeats what its own workers lost by the same rule."""
        ref = ModelRef.parse(model)
        info = _chosen(await self.model(_url_name(ref)), ref, version).get("info")
        return isinstance(info, dict) and info.get("pure") is True

    async def metadata(self, model: str, version: int | None = None) -> dict[str, Any]:
        """As the inference protocol has it, made of what the lab says of the model."""
        ref = ModelRef.parse(model)
        described = await self.model(_url_name(ref))
        chosen = _chosen(described, ref, version)
        info = chosen.get("info")
        if not isinstance(info, dict):
            raise RemoteError(f"the lab does not say what {model} takes; do its version and this one differ?")
        versions = [str(each["version"]) for each in described["versions"]]
        return {
            "name": described["name"],
            "versions": versions,
            "platform": info.get("format", ""),
            "inputs": info.get("inputs", []),
            "outputs": info.get("outputs", []),
        }

    # Models

    async def put_blob(self, digest: str, data: bytes, encrypt: str | None = None) -> None:
        """Stage a blob for a publish. Raises: DigestMismatchError, NoSpaceError; UnsupportedError: it is to be encrypted there."""
        if encrypt is not None:
            self._only_there(*_ENCRYPTING)
        await self._request("stage", _TIMEOUT, bytes.fromhex(digest), data)

    async def get_blob(self, digest: str, version: str | None = None) -> bytes:
        """The bytes as they came; whoever uses them checks the digest. Raises: NotFoundError, ForbiddenError."""
        if version is not None:
            raise _locked(version)
        await self._introduced()
        return await self._own.request("peer/blob", orjson.dumps({"peer": self._link.address.key, "digest": digest}), _TIMEOUT)

    async def publish(self, name: str, draft: Mapping[str, Any]) -> dict[str, Any]:
        """Make the drafted files a version there.

        Raises: MissingBlobsError: `args[1]` lists the digests to send first; UnsupportedError: it is to be encrypted.
        """
        if draft.get("encrypt"):
            self._only_there(*_ENCRYPTING)
        return await self._asked("publish", {"name": name, "draft": draft}, _LONG)

    async def models(self) -> list[dict[str, Any]]:
        """Those that the lab lets this one see."""
        rows = (await self._asked("models", {})).get("models")
        if not isinstance(rows, list):
            raise RemoteError("the lab's answer has no list of models; do its version and this one differ?")
        return rows

    async def model(self, name: str) -> dict[str, Any]:
        described = (await self._asked("models", {"name": name})).get("model")
        if not isinstance(described, dict) or not isinstance(described.get("versions"), list):
            raise RemoteError(f"the lab's answer does not describe {name}; do its version and this one differ?")
        return described

    async def manifest(self, name: str, version: int) -> dict[str, Any]:
        """`{"version", "digest", "manifest"}`, of the digest that the lab lists.

        Raises: LockedModelError: the version is encrypted, and it is only run there; ChunkAlteredError: what came has another digest.
        """
        chosen = _chosen(await self.model(name), ModelRef.parse(name), version)
        if chosen.get("encrypted"):
            raise _locked(f"{name}:{version}")
        digest = str(chosen["digest"])
        signed = await self._asked("manifest", {"digest": digest})
        try:
            data = base64.b64decode(signed["manifest"], validate=True)
        except (KeyError, TypeError, binascii.Error) as error:
            raise RemoteError(f"the lab's answer has no manifest of {name}:{version}; do its version and this one differ?") from error
        if blake3(data).hexdigest() != digest:
            message = f"the lab sent another manifest than that of {name}:{version}; nothing of it was used"
            raise ChunkAlteredError(message, digest, "manifest")
        return {"version": version, "digest": digest, "manifest": orjson.loads(data)}

    def kvstore(self, name: str, version: int, path: str = "") -> dict[str, Any]:
        """Raises: UnsupportedError: tensorstore speaks HTTP."""
        del name, version, path
        self._only_there("be read by tensorstore", "its gateway's address, http(s)://…")

    async def set_alias(self, name: str, alias: str, version: int) -> dict[str, Any]:
        return await self._asked("alias", {"name": name, "alias": alias, "version": version})

    async def events(self, after: int | None, wait: float) -> dict[str, Any]:
        """Of the models that the lab lets this one hear of."""
        return await self._asked("events", {"after": after, "wait": wait}, wait + _TIMEOUT)

    # What a lab is asked by its own people only

    async def delete_version(self, name: str, version: int) -> dict[str, Any]:
        self._only_there("delete a version", f"`tether rm {name}:{version}`")

    async def set_serving(self, name: str, changes: Mapping[str, Any] | None) -> dict[str, Any]:
        del changes
        self._only_there("say how it serves a model", f"`tether serving {name}`")

    async def explain(self, name: str) -> dict[str, Any]:
        self._only_there("explain where a model is", f"`tether explain {name}`")

    async def rollback(self, name: str, alias: str | None = None) -> dict[str, Any]:
        del alias
        self._only_there("roll back", f"`tether rollback {name}`, or set the alias")

    async def verify(self, name: str, version: int | None = None) -> dict[str, Any]:
        del version
        self._only_there("verify its store", f"`tether verify {name}`")

    async def diff(self, name: str, before: int, after: int) -> dict[str, Any]:
        self._only_there("compare versions", f"`tether diff {name} {before} {after}`")

    async def repair(self, name: str, version: int | None = None) -> dict[str, Any]:
        del version
        self._only_there("repair its store", f"`tether repair {name}`")

    async def gc(self, *, dry_run: bool, grace: float | None) -> dict[str, Any]:
        del dry_run, grace
        self._only_there("collect garbage", "`tether gc`")

    async def rebuild_index(self) -> dict[str, Any]:
        self._only_there("rebuild its store's index", "`tether repair --index`")

    async def forget_store(self, store: str) -> dict[str, Any]:
        self._only_there("forget a host", f"`tether gc --forget {store}`")

    async def workers(self) -> list[dict[str, Any]]:
        self._only_there("show its workers", "`tether status`")

    async def status(self) -> dict[str, Any]:
        self._only_there("show its services", "`tether status`")

    async def quarantine(self) -> list[dict[str, Any]]:
        self._only_there("show what it holds against inputs", "`tether quarantine`")

    async def forgive(self, name: str) -> dict[str, Any]:
        del name
        self._only_there("forgive inputs", "`tether quarantine --clear`")

    async def trust(self, publisher: str, scopes: Sequence[str]) -> dict[str, Any]:
        del publisher, scopes
        self._only_there("trust a publisher", "`tether trust`")

    def _only_there(self, what: str, how: str) -> Never:
        """Raises: UnsupportedError."""
        raise UnsupportedError(f"a lab can't be asked over the swarm to {what}: do it on its own machines ({how})")

    # One call

    async def _asked(self, method: str, value: Any, timeout: float = _TIMEOUT) -> dict[str, Any]:  # noqa: ASYNC109 (as above)
        try:
            answer = await self._request(method, timeout, orjson.dumps(value))
        except StreamLostError:
            if method not in _READING:
                raise
            answer = await self._request(method, timeout, orjson.dumps(value))
        return _object(method, answer)

    async def _request(self, method: str, timeout: float, *value: Chunk) -> bytes:  # noqa: ASYNC109 (as above)
        await self._introduced()
        head = {"peer": self._link.address.key, "method": method, "timeout": timeout}
        try:
            return await self._own.request("peer/call", Outgoing.of(joined(head), *value), timeout + _GRACE)
        except ForbiddenError as error:
            raise _lacking(method, error) from error

    async def _introduced(self) -> None:
        """Once: the lab is found and, with a secret, this one enrolled there; afterwards its address is enough."""
        if not self._is_known:
            await self._own.request("peer/connect", orjson.dumps({"url": self._link.url}), _CONNECT)
            self._link, self._is_known = Link(self._link.address), True


def _patience(nbytes: int) -> float:
    """Seconds for an inference whose caller did not say."""
    return _TIMEOUT + nbytes / _NBYTES_PER_SECOND


def _object(method: str, answer: bytes) -> dict[str, Any]:
    """Raises: RemoteError: it is something else."""
    try:
        told = orjson.loads(answer)
    except orjson.JSONDecodeError as error:
        raise RemoteError(f"the lab answered {method} with bytes that are not JSON; do its version and this one differ?") from error
    if not isinstance(told, dict):
        raise RemoteError(f"the lab answered {method} with JSON that is not an object; do its version and this one differ?")
    return told


def _addressed(body: bytes, header_nbytes: int, model: str, version: int | None, seconds: float | None = None) -> Piece:
    """`u32 | JSON | tensors`: the request with the model's name in its JSON, which over HTTP is in the path; of a stream, its deadline."""
    head = orjson.loads(memoryview(body)[:header_nbytes])
    names: dict[str, Any] = {"model_name": model} | ({} if version is None else {"model_version": str(version)})
    if seconds is not None:
        names["parameters"] = head.get("parameters", {}) | {"timeout": round(seconds * 1e6)}
    return joined(head | names), memoryview(body)[header_nbytes:]


def _lacking(method: str, error: ForbiddenError) -> ForbiddenError:
    """With what to ask for: the lab itself says nothing by which a key could find out what there is."""
    if type(error) is not ForbiddenError or method not in METHODS or method == "ping":
        return error
    return ForbiddenError(f"{error}; {method!r} is opened by the scope {' or '.join(sorted(METHODS[method].verbs))}")


def _locked(version: str) -> LockedModelError:
    return LockedModelError(f"{version} is encrypted: its lab runs it, and its files stay there; ask that lab for `tether allow … decrypt`")


def _url_name(ref: ModelRef) -> str:
    return f"{ref.publisher}~{ref.name}" if ref.publisher else ref.name


def _chosen(described: Mapping[str, Any], ref: ModelRef, version: int | None) -> Mapping[str, Any]:
    """Raises: UnknownVersionError, UnknownAliasError."""
    number = version or ref.version or described.get("default")
    if ref.alias is not None and version is None:
        number = described.get("aliases", {}).get(ref.alias)
        if number is None:
            raise UnknownAliasError(f"model {ref.name!r} has no alias {ref.alias!r}")
    for each in described["versions"]:
        if each.get("version") == number:
            found: Mapping[str, Any] = each
            return found
    raise UnknownVersionError(f"model {ref.name!r} has no version {number}")
