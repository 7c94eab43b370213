"""Everything one can ask of a lab, written once, asynchronously; `Lab` gives each call a sync and an `a…` form."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from tether import ports
from tether.client.exporting import StoredFile, export_files, fetch_file, is_encrypted, stored_files
from tether.client.lab_client import LabClient
from tether.client.publishing import EXAMPLE, DraftFile, Source, cut_model, draft, model_sources, publish_draft, upload
from tether.errors import (
    BadInputError,
    NotFoundError,
    RemoteError,
    ServiceUnavailableError,
    TetherError,
    UnknownAliasError,
    UnknownVersionError,
)
from tether.lab.admitting import Admitting
from tether.lab.copying import Copying
from tether.lab.lending import Lending
from tether.lab.mending import advice
from tether.lab.objects import (
    AliasMove,
    Collection,
    Diff,
    Model,
    Repair,
    Status,
    Verification,
    Version,
    WorkerInfo,
    described,
)
from tether.lab.placing import Placement
from tether.lab.replicating import Replicating
from tether.lab.rolling import Rolling
from tether.lab.tensors import named_arrays, to_npz
from tether.lab.watching import EventSource, Watching
from tether.lab.weights import open_weights
from tether.security.addresses import SCHEME
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import Array, Digest, InferResponse, ModelRef, Tensors, TensorSpec, model_name
from tether.wire.npz import from_npz

__all__ = ["Operations"]

_EXAMPLE_LIMIT: Final = 1 << 30
"""Bytes of an example that is brought into memory."""


class _Metadata(msgspec.Struct, frozen=True):
    """What the protocol's metadata says and we need."""

    inputs: tuple[TensorSpec, ...]


@dataclass(slots=True)
class _Known:
    """The inputs of a model, as learnt before its last request."""

    inputs: tuple[TensorSpec, ...]
    version: int | None = None
    """That answered the last request; another one may have other inputs."""


class Operations(Admitting, Replicating, Copying, Lending, Rolling, Watching):
    """A lab behind a gateway, or elsewhere in the swarm. Every call raises the errors of the tree, as its client has them."""

    def __init__(self, client: LabClient | None) -> None:
        """None: the lab was started without a gateway, and no call can be made yet."""
        self._client = client
        self._known: dict[str, _Known] = {}

    @property
    def client(self) -> LabClient:
        """Raises: ServiceUnavailableError: the lab has no gateway."""
        if self._client is None:
            raise ServiceUnavailableError(
                "this lab was started without a gateway; start it with tether.up(gateway=True), or `tether gateway`"
            )
        return self._client

    @property
    def _door(self) -> ports.Admitting:
        return self.client.admitting

    @property
    def _keeper(self) -> ports.Replicating:
        return self.client.replicating

    @property
    def _copier(self) -> ports.Copying:
        return self.client.copying

    @property
    def _lender(self) -> ports.Lending:
        return self.client.lending

    @property
    def _roller(self) -> ports.Rolling:
        return self.client.rolling

    @property
    def _teller(self) -> EventSource:
        return self.client

    @property
    def _elsewhere(self) -> str | None:
        return self.client.url if self.client.url.startswith(SCHEME) else None

    async def publish(  # noqa: PLR0913 (all that can be said of a model)
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        framework: str | None = None,
        example: Any = None,
        alias: str | None = None,
        tags: Mapping[str, str] | None = None,
        encrypt: bool | None = None,
        serving: Mapping[str, Any] | None = None,
    ) -> Version:
        """Make a file or folder the next version of a model; the same bytes again give the version that they are already.

        `example` is a dict of arrays, or one array for a model with a single input: it is run once now and kept as the model's
        self-test, warm-up and day-one call. `alias` names the version, for instance "prod". With `encrypt` it is stored encrypted, and
        plain in memory only; whether a model that was encrypted before gets a plain version has to be said (False).
        `serving` is what `serve` takes: of the model, not of the version alone.

        Raises: NoModelFileError: nothing is at `path`; UnknownFrameworkError: the files don't say what they are, pass `framework`;
            BadModelError: they can't be parsed, or the example fails; UntrustedCodeError, MissingDependencyError; ConflictError: the model
            is encrypted, say whether this version is to be.
        """
        model_name(name)
        DEFAULTS.amended(serving or {})  # said before anything is sent
        entry, sources = await asyncio.to_thread(model_sources, path)
        if example is not None:
            sources = [*(source for source in sources if source.path != EXAMPLE), Source(EXAMPLE, to_npz(example))]
        files: list[DraftFile] = await asyncio.to_thread(cut_model, path, sources, framework)
        aliases = [] if alias is None else [alias]
        texts = {key: str(value) for key, value in (tags or {}).items()}
        body = draft(files, entry, framework=framework, aliases=aliases, tags=texts, encrypt=encrypt)
        answer = described(_Published, await publish_draft(self.client, name, body, files))
        self._known.clear()
        if serving:
            await self.serve(name, **serving)
        return await self.version(f"{name}:{answer.version}")

    async def infer(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        outputs: str | Sequence[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (it also goes to the gateway, which stops working on what nobody waits for)
        priority: int = 0,
    ) -> Any:
        """Run a model: numpy in, numpy out. `model` is "digits", "digits:2", "digits@prod"; batch axis first.

        `inputs` is a dict of arrays by name, or one array for a model with a single input; lists, pandas objects and tensors are
        converted, and numbers cast to the model's type where that loses nothing but precision. The answer is one array where the
        model has one output or `outputs` names one, else a dict. `priority`: 1 is the most urgent, for models that `serve` gave levels.

        Raises: UnknownModelError, UnknownVersionError, BadInputError, ModelFailedError, NoWorkerError, DeadlineExceededError: `timeout`
            seconds are over.
        """
        answer = await self.answer(model, inputs, version=version, outputs=outputs, timeout=timeout, priority=priority)
        return _single(answer.outputs)

    async def answer(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        outputs: str | Sequence[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
        priority: int = 0,
    ) -> InferResponse:
        """As `infer`, with the outputs' names and the version that answered."""
        name, number = await self._address(model, version)
        wanted = [outputs] if isinstance(outputs, str) else outputs
        known, fresh = await self._inputs(name, number)
        try:
            answer = await self.client.infer(
                name, named_arrays(inputs, known.inputs), version=number, outputs=wanted, timeout=timeout, priority=priority
            )
        except (BadInputError, NotFoundError):
            if fresh or not await self._changed(name, number, known):
                raise
            return await self.answer(model, inputs, version=version, outputs=outputs, timeout=timeout, priority=priority)
        if known.version not in {None, answer.version}:
            self._known.pop(_key(name, number), None)
        known.version = answer.version
        return answer

    async def stream(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        outputs: str | Sequence[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 (as above)
    ) -> AsyncGenerator[Any]:
        """As `Lab.stream`."""
        name, number = await self._address(model, version)
        wanted = [outputs] if isinstance(outputs, str) else outputs
        known, fresh = await self._inputs(name, number)
        parts = self.client.stream(name, named_arrays(inputs, known.inputs), version=number, outputs=wanted, timeout=timeout)
        begun = False
        try:
            async with aclosing(parts):
                async for part in parts:
                    begun = True
                    yield _single(part.outputs)
            return
        except (BadInputError, NotFoundError):
            if begun or fresh or not await self._changed(name, number, known):
                raise
        async for each in self.stream(model, inputs, version=version, outputs=outputs, timeout=timeout):
            yield each

    async def version(self, model: str) -> Version:
        """The version that "digits", "digits:2", "digits@prod" or "digits:sha-…" means now."""
        ref = ModelRef.parse(model)
        return _chosen(await self.model(_url_name(ref)), ref)

    async def model(self, name: str) -> Model:
        """One model with all of its versions. Raises: UnknownModelError."""
        return self._opening(described(Model, await self.client.model(_url_name(ModelRef.parse(name)))))

    def _opening(self, model: Model) -> Model:
        """Its versions know this lab, for their weights."""
        for each in model.versions:
            each.__dict__["open_weights"] = partial(open_weights, self.client, model.name, each.version, Digest(each.digest))
            each.__dict__["kvstore"] = partial(self.client.kvstore, model.name, each.version)
        return model

    async def models(self) -> dict[str, Model]:
        """Every model that the caller may see, by name."""
        found = [self._opening(described(Model, row)) for row in await self.client.models()]
        return {model.name: model for model in sorted(found, key=lambda model: model.name)}

    async def workers(self) -> dict[str, WorkerInfo]:
        """Every worker, by name."""
        found = [described(WorkerInfo, row) for row in await self.client.workers()]
        return {worker.id: worker for worker in sorted(found, key=lambda worker: worker.id)}

    async def status(self) -> Status:
        """Services, workers and models, now."""
        return described(Status, await self.client.status())

    async def example(self, model: str) -> Tensors:
        """The example tensors that were published with a version.

        Raises: NotFoundError: it has none.
        """
        version = await self.version(model)
        files = await self._files(version)
        for file in files:
            if file.path == EXAMPLE:
                return from_npz(await fetch_file(self.client, file, _EXAMPLE_LIMIT))
        raise NotFoundError(f"{version} was published without an example; publish it again with one to have it")

    async def alias(self, name: str, alias: str, version: int) -> None:
        """Let `name@alias` mean this version; "prod" is what the bare name means. Raises: UnknownVersionError, BadNameError."""
        await self.client.set_alias(name, alias, version)
        self._known.clear()

    async def rollback(self, name: str, alias: str | None = None) -> AliasMove:
        """Move an alias ("prod" where there is one, else "latest") back to where it was before.

        Raises: ConflictError: it was never elsewhere.
        """
        moved = described(AliasMove, await self.client.rollback(name, alias))
        self._known.clear()
        return moved

    async def serve(self, /, name: str, **settings: Any) -> ServingSettings:
        """Say how this lab serves a model, all versions, from now on, also where it is loaded already: `lab.serve("x", max_batch_size=32)`.

        What is not named stays as it was said; None takes one back. The settings are those of `ServingSettings`, and nothing has to be
        said: a worker learns what batches gain. It stays in this lab, and is no part of a version. The answer: all that is said.

        Raises: UnknownModelError; BadInputError: there is no such setting, or it can't have that value.
        """
        for setting, value in settings.items():
            DEFAULTS.amended({setting: value})  # JSON would make a null of what is no number, and so take it back
        return described(_Served, await self.client.set_serving(_url_name(ModelRef.parse(name)), settings)).serving

    async def explain(self, name: str) -> Placement:
        """Where each version of a model is and why there, and of every other worker, why not. Raises: UnknownModelError."""
        return described(Placement, await self.client.explain(_url_name(ModelRef.parse(name))))

    async def reset_serving(self, name: str) -> None:
        """Serve a model as if nothing had been said of it."""
        await self.client.set_serving(_url_name(ModelRef.parse(name)), None)

    async def verify(self, model: str) -> Verification:
        """Read every byte of a version ("digits:2"), or of all versions ("digits"), and compare it with its digest."""
        ref = ModelRef.parse(model)
        bare = ref.version is None and ref.alias is None and ref.sha is None
        number = None if bare else (await self.version(model)).version
        return described(Verification, await self.client.verify(_url_name(ref), number))

    async def diff(self, name: str, before: int | str, after: int | str) -> Diff:
        """What changed from one version to another: tensors that were added, removed, retyped or changed, and by how much.

        Versions are numbers or aliases. Raises: UnknownVersionError, UnknownAliasError.
        """
        model = await self.model(name)
        numbers = [_chosen(model, _within(name, wanted)).version for wanted in (before, after)]
        return described(Diff, await self.client.diff(_url_name(ModelRef.parse(name)), *numbers))

    async def delete(self, name: str, version: int) -> None:
        """Forget a version; its number is not given again. What no other version shares is freed by garbage collection after a day.

        Raises: UnknownVersionError; ConflictError: an alias points at it.
        """
        await self.client.delete_version(_url_name(ModelRef.parse(name)), version)
        self._known.clear()

    async def repair(self, model: str, path: str | os.PathLike[str] | None = None) -> Repair:
        """Mend what `verify` finds damaged of a model ("digits") or a version ("digits:2"), with the files that it was published from.

        `path` is what was given to `publish`, as it was then: of it only the damaged blobs are sent (all where it is encrypted). Without
        it, with what others of the cluster have. Raises: NoModelFileError: nothing is at `path`.
        """
        damaged = {problem.digest for problem in (await self.verify(model)).problems}
        if path is not None:
            files = await asyncio.to_thread(cut_model, path, (await asyncio.to_thread(model_sources, path))[1])
            blobs = [blob for file in files for blob in file.blobs]
            await upload(self.client, [blob for blob in blobs if blob.digest in damaged])
            if damaged and any(each.encrypted for each in (await self.model(model)).versions):
                await upload(self.client, blobs, encrypt=ModelRef.parse(model).name)  # which of them is damaged only the lab can tell
        ref = ModelRef.parse(model)
        bare = ref.version is None and ref.alias is None and ref.sha is None
        number = None if bare else (await self.version(model)).version
        done = described(Repair, await self.client.repair(_url_name(ref), number))
        return msgspec.structs.replace(done, advice=advice(model, done.failed, done.paths, given=path is not None))

    async def gc(self, *, dry_run: bool = False, grace: float | None = None) -> Collection:
        """Free what no version names and is older than `grace` seconds (None: a day); `dry_run` only says what and why."""
        return described(Collection, await self.client.gc(dry_run=dry_run, grace=grace))

    async def export(self, model: str, directory: str | os.PathLike[str]) -> Path:
        """Write a version's files, byte for byte, to a folder that does not exist or is empty. Returns it.

        Raises: ConflictError: the folder holds something; ChunkAlteredError: a blob came with other bytes; nothing is kept then.
        """
        return await export_files(self.client, await self._files(await self.version(model)), Path(directory))

    async def trust(self, publisher: str, scopes: Sequence[str] = ("code",)) -> None:
        """Let the holder of a public key publish models that run code here. Only for people whom one would lend the machine."""
        await self.client.trust(publisher, scopes)

    async def accept(self, envelope: str) -> str:
        """Keep the model keys in an envelope that another lab made for this one; gives `publisher~name` of what can be opened now.

        Raises: BadEnvelopeError.
        """
        accepted = described(_Accepted, await self._door.accept(envelope))
        self._known.clear()
        return f"{accepted.publisher}~{accepted.name}"

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _files(self, version: Version) -> list[StoredFile]:
        answer = await self._manifest(version)
        return stored_files(answer["manifest"], str(version) if is_encrypted(answer, version.digest) else None)

    async def _manifest(self, version: Version) -> dict[str, Any]:
        answer = await self.client.manifest(version.name, version.version)
        if not isinstance(answer.get("manifest"), dict):
            raise RemoteError(f"the gateway's answer has no manifest of {version}; do its version and this one differ?")
        return answer

    async def _address(self, model: str, version: int | None) -> tuple[str, int | None]:
        """The model as a URL names it, and the version's number where it is fixed."""
        ref = ModelRef.parse(model)
        if version is not None and (ref.version, ref.alias, ref.sha) != (None, None, None):
            raise BadInputError(f"{model!r} names a version and version={version} does too; give one of them")
        if ref.sha is not None:
            return _url_name(ref), (await self.version(model)).version
        name = f"{_url_name(ref)}@{ref.alias}" if ref.alias else _url_name(ref)
        return name, version if version is not None else ref.version

    async def _inputs(self, name: str, version: int | None) -> tuple[_Known, bool]:
        """What is known of the inputs, and whether it was asked for just now."""
        key = _key(name, version)
        known = self._known.get(key)
        if known is not None:
            return known, False
        known = self._known[key] = _Known(await self._asked(name, version))
        return known, True

    async def _asked(self, name: str, version: int | None) -> tuple[TensorSpec, ...]:
        sent = await self.client.metadata(name, version)
        try:
            return msgspec.convert(sent, _Metadata).inputs
        except msgspec.ValidationError as error:
            raise RemoteError(f"the metadata of model {name!r} is not valid: {error}; is it an Open Inference Protocol server?") from error

    async def _changed(self, name: str, version: int | None, known: _Known) -> bool:
        """Whether the model has other inputs by now than what a refused request was made for."""
        try:
            asked = await self._asked(name, version)
        except TetherError:
            self._known.pop(_key(name, version), None)
            return False
        self._known[_key(name, version)] = _Known(asked)
        return asked != known.inputs


class _Published(msgspec.Struct, frozen=True):
    version: int


class _Served(msgspec.Struct, frozen=True):
    serving: ServingSettings


class _Accepted(msgspec.Struct, frozen=True):
    publisher: str
    name: str


def _key(name: str, version: int | None) -> str:
    return name if version is None else f"{name}:{version}"


def _url_name(ref: ModelRef) -> str:
    return f"{ref.publisher}~{ref.name}" if ref.publisher else ref.name


def _within(name: str, version: int | str) -> ModelRef:
    return ModelRef.parse(f"{name}@{version}" if isinstance(version, str) else f"{name}:{version}")


def _single(outputs: Tensors) -> Array | Tensors:
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def _chosen(model: Model, ref: ModelRef) -> Version:
    number = ref.version or model.default
    if ref.alias is not None:
        number = model.aliases.get(ref.alias, 0)
        if not number:
            raise UnknownAliasError(f"model {model.name!r} has no alias {ref.alias!r}; it has {', '.join(sorted(model.aliases)) or 'none'}")
    for version in model.versions:
        if version.digest.startswith(ref.sha) if ref.sha else version.version == number:
            return version
    listed = ", ".join(str(version.version) for version in model.versions) or "none"
    raise UnknownVersionError(f"{ref} is not found; the model has versions {listed}")
