"""What a publish is: a draft from a stranger becomes an inspected, tested, signed version, or a clear error and nothing."""

from __future__ import annotations

import asyncio
import base64
import binascii
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from tether.errors import BadInputError, MalformedManifestError, MalformedRequestError, MissingBlobsError, UntrustedCodeError
from tether.runtimes.inspecting import Inspection, inspect_in_sandbox
from tether.security.identity import Identity
from tether.store import FILES, HIDDEN, ArrayEntry, Manifest, Published, Repository, Segment, VersionRecord, decode, encode, signed_message
from tether.store.disk import disk_errors
from tether.types import ModelInfo, ModelRef
from tether.wire.npz import to_npz

__all__ = ["EXAMPLE", "EXPECTED", "Draft", "Publisher", "SignedManifest", "parse_draft"]

P = ParamSpec("P")
T = TypeVar("T")

EXAMPLE = f"{HIDDEN}/example.npz"
"""Where a version keeps its example inputs, named and cast as the model takes them: one example is one digest however it was given."""
EXPECTED = f"{HIDDEN}/expected.npz"
"""Where it keeps what the model answered to them at publish."""


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
    """Raises: MalformedRequestError: a field is missing or of the wrong type; UnknownFrameworkError through the runtimes later."""
    try:
        if "manifest" in body:
            return msgspec.convert(body, SignedManifest)
        return msgspec.convert(body, Draft)
    except msgspec.ValidationError as error:
        raise MalformedRequestError(f"publish: {error}; see /docs for the fields") from None


@dataclass(frozen=True, slots=True)
class Publisher:
    """Publishes into one repository as one identity."""

    repository: Repository
    identity: Identity
    workspace: Path
    """Where files are put together for inspection; what a killed manager leaves there is removed at its next start."""
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "publish"))
    """Of its own: gigabytes that are copied and hashed must keep no short call waiting for a thread."""

    async def publish(self, name: str, body: Mapping[str, Any]) -> tuple[Published, VersionRecord]:
        """What became of it, and the version. Raises: what parsing, inspecting and storing raise; nothing was stored then."""
        draft = parse_draft(body)
        if isinstance(draft, SignedManifest):
            return await self._in_thread(self._adopt, name, draft)
        arrays = [ArrayEntry(f"{FILES}/{file.path}", "uint8", (file.nbytes,), file.segments) for file in draft.files]
        await self._in_thread(self._check_present, arrays)
        manifest = await self._inspected(draft, arrays)
        return await self._in_thread(self._commit, name, draft, manifest)

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `asyncio.to_thread`, but one who is cancelled leaves when the thread is done: it must not write into a folder that is gone."""
        work = asyncio.get_running_loop().run_in_executor(self.threads, lambda: call(*args, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.gather(work, return_exceptions=True)
            raise

    def _commit(self, name: str, draft: Draft, manifest: Manifest) -> tuple[Published, VersionRecord]:
        data = encode(manifest)
        signature = self.identity.sign(signed_message(data))
        published = self.repository.publish(name, data, self.identity.public, signature, alias=draft.aliases, tags=draft.tags)
        return published, self._record(name, published, self.identity.public)

    def _record(self, name: str, published: Published, publisher: str) -> VersionRecord:
        return self.repository.resolve(ModelRef(name, version=published.version), publisher)

    def _check_present(self, arrays: list[ArrayEntry]) -> None:
        missing = self.repository.missing(segment.digest for array in arrays for segment in array.segments)
        if missing:
            raise MissingBlobsError(f"{len(missing)} blobs are not here yet; PUT /tether/v1/blobs/<digest>, then send this again", missing)

    async def _inspected(self, draft: Draft, arrays: list[ArrayEntry]) -> Manifest:
        """Put the files together outside of the cache, look at them in the sandbox, keep what the model answered to its example."""
        async with self._folder() as root:
            await self._in_thread(self._assemble_all, draft, arrays, root)
            example = root / EXAMPLE
            found = await inspect_in_sandbox(root / draft.entry, draft.framework, example=example if example.exists() else None)
        examples = await self._in_thread(self._add_examples, found)
        return _manifest(draft, [array for array in arrays if array.path != f"{FILES}/{EXAMPLE}"] + examples, found.info)

    @asynccontextmanager
    async def _folder(self) -> AsyncIterator[Path]:
        """A folder of the workspace; gone afterwards. Raises: NoSpaceError, StoreError: the disk refuses what is done with it."""
        with disk_errors(self.workspace):
            root = Path(tempfile.mkdtemp(dir=self.workspace))
        try:
            with disk_errors(root):
                yield root
        finally:
            await self._in_thread(shutil.rmtree, root, ignore_errors=True)

    def _assemble_all(self, draft: Draft, arrays: list[ArrayEntry], root: Path) -> None:
        # the rules of a manifest's paths hold before a byte is written
        decode(encode(_manifest(draft, arrays, _NOTHING_KNOWN)))
        for array in arrays:
            self._assemble(array, root)

    def _add_examples(self, found: Inspection) -> list[ArrayEntry]:
        examples = ((EXAMPLE, found.example_inputs), (EXPECTED, found.example_outputs))
        return [self.repository.add_bytes(name, to_npz(tensors)) for name, tensors in examples if tensors is not None]

    def _assemble(self, array: ArrayEntry, root: Path) -> None:
        target = root / array.path.removeprefix(f"{FILES}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for segment in array.segments:
                data = self.repository.read_draft_blob(segment.digest)
                file.write(data[segment.offset : segment.offset + segment.nbytes])

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


_NOTHING_KNOWN = ModelInfo("onnx", "onnx", (), (), batched=False, pure=False, code=False)


def _manifest(draft: Draft, arrays: list[ArrayEntry], info: ModelInfo) -> Manifest:
    ordered = tuple(sorted(arrays, key=lambda array: array.path))
    if len({array.path for array in ordered}) != len(ordered):
        raise BadInputError("two files of the draft have the same path; send each file once")
    return Manifest(framework=info.framework, entry=draft.entry, info=info, arrays=ordered)
