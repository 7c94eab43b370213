"""`/tether/v1/zarr`: a version as a zarr v3 hierarchy over plain HTTP, for xarray, tensorstore, zarr and whatever else reads ranges.

HTTP's own rules hold (RFC 9110): single ranges, ETag, If-None-Match, If-Range. A path whose reference names a version or digest never
changes what it holds and says so; behind an alias or a bare name it is to be asked again each time, which an ETag makes cheap.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

from tether.errors import RangeError
from tether.gateway.admission import Headers
from tether.gateway.routes import Answer, Call, Endpoint
from tether.ports import Management
from tether.types import ModelRef
from tether.wire.oip import encode_error

__all__ = ["ZARR"]

_PART: Final = 4 << 20
"""Bytes of one question to the manager, and so of a value that the gateway holds for one client."""
_RANGE: Final = re.compile(rb"bytes=(?:([0-9]{1,15})-([0-9]{0,15})|-([0-9]{1,15}))")
_FIXED: Final = "private, max-age=31536000, immutable"
_MOVING: Final = "private, no-cache"


class _Range(NamedTuple):
    """Bytes that are asked for: `nbytes` of them from `start`; None: the last ones."""

    start: int | None
    nbytes: int

    def within(self, size: int) -> tuple[int, int]:
        start = max(0, size - self.nbytes) if self.start is None else min(self.start, size)
        return start, min(start + self.nbytes, size)


_WHOLE: Final = _Range(0, 1 << 60)


async def _head(call: Call) -> Answer:
    """As GET without a range, unread."""
    ref, path = ModelRef.parse(call.path["ref"]), _path(call)
    found = await call.door.dispatcher.management.read_zarr(str(ref), path, 0, 0)
    headers = _headers(ref, path, found)
    if _is_known(call.headers, headers["etag"]):
        return Answer(304, b"", _kind(path), headers=headers)
    return Answer(200, b"", _kind(path), headers=headers | {"content-length": str(found["nbytes"])})


async def _get(call: Call) -> Answer:
    ref, path, wanted = ModelRef.parse(call.path["ref"]), _path(call), _range(call.headers)
    management = call.door.dispatcher.management
    # what a condition may spare is not read before the version is known
    conditional = b"if-none-match" in call.headers or b"if-range" in call.headers
    found = await management.read_zarr(str(ref), path, wanted.start, 0 if conditional else wanted.nbytes)
    headers = _headers(ref, path, found)
    if _is_known(call.headers, headers["etag"]):
        return Answer(304, b"", _kind(path), headers=headers)
    if call.headers.get(b"if-range", headers["etag"].encode()) != headers["etag"].encode():
        wanted = _WHOLE
    start, stop = wanted.within(found["nbytes"])
    if wanted is not _WHOLE and start == stop:
        return _beyond(path, found["nbytes"])
    body = found["data"] if found["start"] == start else b""
    rest = _rest(management, _pinned(ref, found), path, (start + len(body), stop)) if len(body) < stop - start else None
    headers["content-length"] = str(stop - start)
    if wanted is _WHOLE:
        return Answer(200, body, _kind(path), headers=headers, rest=rest)
    headers["content-range"] = f"bytes {start}-{stop - 1}/{found['nbytes']}"
    return Answer(206, body, _kind(path), headers=headers, rest=rest)


def _path(call: Call) -> str:
    """Without the second slash that obstore sends where its URL ends in one."""
    return call.path["path"].lstrip("/")


def _range(headers: Headers) -> _Range:
    """A header that is no single range of bytes is not heeded, as RFC 9110 §14.2 allows."""
    sent = _RANGE.fullmatch(headers.get(b"range", b"").replace(b" ", b""))
    if sent is None:
        return _WHOLE
    if sent[3]:
        return _Range(None, int(sent[3]))
    start = int(sent[1])
    if not sent[2]:
        return _Range(start, _WHOLE.nbytes)
    return _Range(start, int(sent[2]) + 1 - start) if int(sent[2]) >= start else _WHOLE


def _headers(ref: ModelRef, path: str, found: dict[str, Any]) -> dict[str, str]:
    tag = hashlib.sha256(f"{found['digest']}/{path}".encode("utf-8", "replace")).hexdigest()[:32]
    fixed = ref.version is not None or ref.sha is not None
    return {"etag": f'"{tag}"', "cache-control": _FIXED if fixed else _MOVING, "accept-ranges": "bytes"}


def _is_known(headers: Headers, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in headers.get(b"if-none-match", b"").decode("latin-1").split(",")]
    return etag in tags or tags == ["*"]


def _kind(path: str) -> str:
    return "application/json" if path.rpartition("/")[2] == "zarr.json" else "application/octet-stream"


def _pinned(ref: ModelRef, found: dict[str, Any]) -> str:
    """The same version even if an alias moves before the last byte was sent."""
    return str(ModelRef(ref.name, ref.publisher, sha=found["digest"]))


async def _rest(management: Management, ref: str, path: str, span: tuple[int, int]) -> AsyncIterator[bytes]:
    position, stop = span
    while position < stop:
        data = (await management.read_zarr(ref, path, position, min(_PART, stop - position)))["data"]
        position += len(data)
        yield data


def _beyond(path: str, size: int) -> Answer:
    error = RangeError(f"{path[:200]!r} has {size} bytes; ask for a range that begins before its end", size)
    return Answer(error.http_status, encode_error(error), headers={"content-range": f"bytes */{size}"})


_PATH: Final = "/tether/v1/zarr/{ref}/{path:path}"

ZARR: Final = (
    Endpoint("GET", _PATH, "manage", _get, "A version as a zarr store: any of its keys, whole or a range"),
    Endpoint("HEAD", _PATH, "manage", _head, "The size of one"),
)
