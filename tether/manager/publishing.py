"""What a publish is: a draft from a stranger becomes an inspected, tested, signed version, or a clear error and nothing."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import shutil
import stat
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from tether.errors import (
    BadInputError,
    ConflictError,
    ForbiddenError,
    HostileModelError,
    MalformedManifestError,
    MalformedRequestError,
    MissingBlobsError,
    NoSpaceError,
    UntrustedCodeError,
)
from tether.runtimes import DATA_FORMATS, recognise
from tether.runtimes.inspecting import Inspection, inspect_in_sandbox, limits_for
from tether.security.identity import Identity
from tether.security.volatile import VolatileFolder
from tether.store import FILES, HIDDEN, ArrayEntry, Manifest, Published, Repository, Segment, VersionRecord, decode, encode, signed_message
from tether.store.format.layout import CONVERTED, Piece, cut
from tether.store.format.weights import tensor_arrays
from tether.store.packing.disk import disk_errors
from tether.store.sealing import Intake, PlainIntake, Sealing
from tether.types import ModelInfo, ModelRef, StoredTensor
from tether.wire.npz import to_npz

__all__ = ["EXAMPLE", "EXPECTED", "Draft", "Publisher", "SignedManifest", "parse_draft"]

P = ParamSpec("P")
T = TypeVar("T")

EXAMPLE = f"{HIDDEN}/example.npz"
"""Where a version keeps its example inputs, named and cast as the model takes them: one example is one digest however it was given."""
EXPECTED = f"{HIDDEN}/expected.npz"
"""Where it keeps what the model answered to them at publish."""

_GIVEN = (EXAMPLE, f"{HIDDEN}/signature.json")
"""What a draft may say of its model beside the model's own files."""


class _File(msgspec.Struct):
    path: str
    nbytes: int
    segments: tuple[Segment, ...]


class Draft(msgspec.Struct, kw_only=True):
    """The body of `POST /tether/v1/models/{name}/versions`."""

    files: tuple[_File, ...]
    entry: str = ""
    framework: str | None = None
    aliases: tuple[str, ...] = ()
    tags: dict[str, str] = {}
    encrypt: bool | None = None
    """Whether it is to be encrypted; its blobs are sent to be so, then. None: no, and refused for a model that was encrypted before."""


class SignedManifest(msgspec.Struct, kw_only=True):
    """The other body: a version that another lab signed."""

    manifest: str
    """base64 of the canonical bytes."""
    publisher: str
    signature: str
    """hex."""
    aliases: tuple[str, ...] = ()
    tags: dict[str, str] = {}


def parse_draft(body: Mapping[str, Any]) -> Draft | SignedManifest:
    """Raises: MalformedRequestError: a field is missing or of the wrong type, or a file is not the sender's to give."""
    try:
        if "manifest" in body:
            return msgspec.convert(body, SignedManifest)
        draft = msgspec.convert(body, Draft)
    except msgspec.ValidationError as error:
        raise MalformedRequestError(f"publish: {error}; see /docs for the fields") from None
    for file in draft.files:
        if file.path.startswith(f"{HIDDEN}/") and file.path not in _GIVEN:
            raise MalformedRequestError(
                f"publish: the file {file.path[:200]!r} would be Tether's own; of {HIDDEN}/ send {' and '.join(_GIVEN)} only"
            )
    return draft


@dataclass(frozen=True)
class Publisher:
    """Publishes into one repository as one identity."""

    repository: Repository
    identity: Identity
    workspace: Path
    """Where files are put together for inspection; what a killed manager leaves there is removed at its next start."""
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "publish"))
    """Of its own: gigabytes that are copied and hashed must keep no short call waiting for a thread."""

    async def publish(self, name: str, body: Mapping[str, Any], peer: str | None = None) -> tuple[Published, VersionRecord]:
        """What became of it, and the version. `peer`: key of the lab that asks, if another does: its code runs here only if trusted for it.

        Raises: what parsing, inspecting and storing raise; nothing was stored then.
        """
        draft = parse_draft(body)
        if isinstance(draft, SignedManifest):
            if peer is not None:
                raise ForbiddenError("a version that another lab signed is brought here by this lab itself: `tether replicate`")
            return await self._in_thread(self._adopt, name, draft)
        if draft.encrypt and peer is not None:
            raise ForbiddenError(f"{name} can't be encrypted from outside: publish it in the lab that has its key")
        arrays = [ArrayEntry(f"{FILES}/{file.path}", "uint8", (file.nbytes,), file.segments) for file in draft.files]
        intake = await self._in_thread(self._intake, name, draft.encrypt)
        await self._in_thread(_check_present, intake, arrays)
        runs_code = peer is None or await self._in_thread(self.repository.trusted, peer, "code")
        manifest = await self._inspected(intake, draft, arrays, runs_code=runs_code)
        return await self._in_thread(self._commit, name, draft, intake, manifest)

    @cached_property
    def sealing(self) -> Sealing:
        """Where blobs of encrypted models go."""
        return Sealing(self.repository, self.identity.public)

    def _intake(self, name: str, encrypt: bool | None) -> Intake:
        """Raises: ConflictError: it has to be said that a version of an encrypted model is to be plain."""
        if encrypt:
            return self.sealing.intake(name)
        if encrypt is None and self.sealing.is_used(name):
            raise ConflictError(
                f"{name} is encrypted: publish this version with encrypt=True (`--encrypt`); "
                "if it may be stored for all to read, say so with encrypt=False (`--no-encrypt`)"
            )
        return PlainIntake(self.repository)

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `asyncio.to_thread`, but one who is cancelled leaves when the thread is done: it must not write into a folder that is gone."""
        work = asyncio.get_running_loop().run_in_executor(self.threads, lambda: call(*args, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.gather(work, return_exceptions=True)
            raise

    def _commit(self, name: str, draft: Draft, intake: Intake, manifest: Manifest) -> tuple[Published, VersionRecord]:
        data = intake.finished(manifest)
        signature = self.identity.sign(signed_message(data))
        published = self.repository.publish(name, data, self.identity.public, signature, alias=draft.aliases, tags=draft.tags)
        intake.settle()
        return published, self._record(name, published, self.identity.public)

    def _record(self, name: str, published: Published, publisher: str) -> VersionRecord:
        return self.repository.resolve(ModelRef(name, version=published.version), publisher)

    async def _inspected(self, intake: Intake, draft: Draft, arrays: list[ArrayEntry], *, runs_code: bool) -> Manifest:
        """Put the files together outside of the cache, look at them in the sandbox, keep what the model answered to its example.

        Raises: UntrustedCodeError: it could run code, and is from somebody whose code does not run here.
        """
        async with self._folder(in_memory=bool(draft.encrypt)) as root:
            # the rules of a manifest's paths hold before a byte is written
            decode(encode(_manifest(draft, arrays, _NOTHING_KNOWN)))
            await self._in_thread(_assemble, intake, arrays, root)
            if not runs_code:
                await self._in_thread(_check_data, root / draft.entry, draft.framework)
            example, entry = root / EXAMPLE, root / draft.entry
            limits = replace(limits_for(entry), network=runs_code and _may_call_out())
            found = await inspect_in_sandbox(
                entry,
                draft.framework,
                example=example if example.exists() else None,
                converted=root / CONVERTED,
                limits=replace(limits, scratch=str(root.parent)) if draft.encrypt else limits,
            )
            files = [array for array in arrays if array.path != f"{FILES}/{EXAMPLE}"]
            files = await self._in_thread(_cut_at_tensors, intake, files, _placed(found.tensors, draft.entry), root)
        files += await self._in_thread(_add_examples, intake, found)
        return _manifest(draft, files + tensor_arrays(files, _placed(found.tensors, draft.entry)), found.info)

    @asynccontextmanager
    async def _folder(self, *, in_memory: bool) -> AsyncIterator[Path]:
        """A folder of the workspace, or in memory, for what no disk may see; gone afterwards.

        Raises: NoSpaceError, StoreError: the disk refuses what is done with it; ConfigError: there is no tmpfs.
        """
        if in_memory:
            folder = await self._in_thread(VolatileFolder.create, "publish")
            try:
                with folder.errors():
                    root = folder.path / "model"  # beside it the sandbox has its scratch folder
                    root.mkdir()
                    yield root
            finally:
                await self._in_thread(folder.close)
            return
        with disk_errors(self.workspace):
            root = Path(tempfile.mkdtemp(dir=self.workspace))
        try:
            with disk_errors(root):
                yield root
        finally:
            await self._in_thread(shutil.rmtree, root, ignore_errors=True)

    def _adopt(self, name: str, signed: SignedManifest) -> tuple[Published, VersionRecord]:
        """A version of another lab: as it was signed, byte for byte; code formats only from publishers trusted for code."""
        try:
            data, signature = base64.b64decode(signed.manifest, validate=True), bytes.fromhex(signed.signature)
        except (binascii.Error, ValueError):
            raise MalformedManifestError("manifest must be base64 and signature hex") from None
        manifest = decode(data)
        if manifest.info.code and not self.repository.trusted(signed.publisher, "code"):
            raise UntrustedCodeError(
                f"{name} is in a format that can run code ({manifest.info.format}), its publisher is not trusted for code; "
                f"if you know whose key that is: tether trust {signed.publisher} --code"
            )
        published = self.repository.publish(name, data, signed.publisher, signature, alias=signed.aliases, tags=signed.tags)
        return published, self._record(name, published, signed.publisher)


def _check_present(intake: Intake, arrays: list[ArrayEntry]) -> None:
    missing = intake.missing(segment.digest for array in arrays for segment in array.segments)
    if missing:
        intake.plan(arrays)
        raise MissingBlobsError(f"{len(missing)} blobs are not here yet; PUT /tether/v1/blobs/<digest>, then send this again", missing)


def _check_data(entry: Path, framework: str | None) -> None:
    """Raises: UntrustedCodeError; what `recognise` raises."""
    _, form = recognise(entry, framework)
    if form not in DATA_FORMATS:
        raise UntrustedCodeError(
            f"a model in this format ({form}) can run code, and this lab does not trust your key for that: publish ONNX, or ask the "
            "lab for `tether trust KEY --code`"
        )


def _assemble(intake: Intake, arrays: list[ArrayEntry], root: Path) -> None:
    nbytes, free = sum(array.nbytes for array in arrays), shutil.disk_usage(root).free
    if nbytes > free:  # a draft of a few blobs, each named a thousand times, is terabytes; nothing of it is written
        raise NoSpaceError(f"to be looked at, the model's files need {nbytes} bytes; {free} are free where the manager keeps its data")
    for array in arrays:
        target = root / array.path.removeprefix(f"{FILES}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for segment in array.segments:
                data = memoryview(intake.read(segment.digest))
                file.write(data[segment.offset : segment.offset + segment.nbytes])


def _cut_at_tensors(intake: Intake, files: list[ArrayEntry], tensors: Sequence[StoredTensor], root: Path) -> list[ArrayEntry]:
    """The files with the blobs that our own rule gives, however the client cut them: so one content has one digest."""
    ranges = defaultdict(list)
    for tensor in tensors:
        ranges[tensor.file].append(Piece(tensor.offset, tensor.nbytes))
    if os.path.lexists(root / CONVERTED):
        _check_own(root, CONVERTED)
        files = [*files, ArrayEntry(f"{FILES}/{CONVERTED}", "uint8", ((root / CONVERTED).stat().st_size,), ())]
    return [_cut_again(intake, file, ranges[file.path.removeprefix(f"{FILES}/")], root) for file in files]


def _cut_again(intake: Intake, file: ArrayEntry, ranges: list[Piece], root: Path) -> ArrayEntry:
    sizes = [piece.nbytes for piece in cut(file.nbytes, ranges)]
    if sizes == [segment.nbytes for segment in file.segments] and not any(segment.offset for segment in file.segments):
        return file
    name = file.path.removeprefix(f"{FILES}/")
    _check_own(root, name)
    if not file.segments:  # the lab's own: what was decoded of the model's files
        return intake.add_file(root / name, name, ranges)
    with tempfile.TemporaryDirectory(dir=root.parent) as untouched:  # code of the model may have written into the file that it saw
        _assemble(intake, [file], Path(untouched))
        return intake.add_file(Path(untouched, name), name, ranges)


def _check_own(root: Path, name: str) -> None:
    """Code of a model ran in this folder: it may have put a link where a file was. Raises: HostileModelError: it did."""
    path = root / name
    if path.resolve() != root.resolve() / name or not stat.S_ISREG(path.stat().st_mode) or path.stat().st_nlink > 1:
        raise HostileModelError(f"the model put something else in the place of {name[:200]!r} while it was looked at")


def _add_examples(intake: Intake, found: Inspection) -> list[ArrayEntry]:
    examples = ((EXAMPLE, found.example_inputs), (EXPECTED, found.example_outputs))
    return [intake.add_bytes(name, to_npz(tensors)) for name, tensors in examples if tensors is not None]


_NOTHING_KNOWN = ModelInfo("onnx", "onnx", (), (), batched=False, pure=False, code=False)


def _placed(tensors: Sequence[StoredTensor], entry: str) -> list[StoredTensor]:
    """With their files relative to the version's folder: the sandbox saw the entry only."""
    folder = entry.rpartition("/")[0] if entry else ""
    prefix = f"{folder}/" if folder else ""
    return [msgspec.structs.replace(each, file=each.file if each.file == CONVERTED else prefix + each.file) for each in tensors]


def _may_call_out() -> bool:
    """Whether models that run code may, here as in a worker's runners."""
    import dask.config  # 0.2 s, which a manager that publishes nothing need not wait for

    return bool(dask.config.get("tether.runner.network", default=False))


def _manifest(draft: Draft, arrays: list[ArrayEntry], info: ModelInfo) -> Manifest:
    ordered = tuple(sorted(arrays, key=lambda array: array.path))
    if len({array.path for array in ordered}) != len(ordered):
        raise BadInputError("two files of the draft have the same path; send each file once")
    return Manifest(framework=info.framework, entry=draft.entry, info=info, arrays=ordered)
