"""Pure: the body of an error, `{"error": text, "code": code}`, ↔ the error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from tether.errors import MissingBlobsError, RemoteError, TetherError, from_code

__all__ = ["decode_error", "encode_error"]


class _Error(msgspec.Struct, gc=False):
    error: str
    code: str = ""
    missing: list[str] | None = None
    details: list[Any] = []


_read_error = msgspec.json.Decoder(_Error).decode


def encode_error(error: TetherError) -> bytes:
    """`{"error": text, "code": code}`; `missing` lists digests (MissingBlobsError), `details` whatever else the error knows."""
    body: dict[str, Any] = {"error": str(error), "code": error.code}
    if isinstance(error, MissingBlobsError) and len(error.args) > 1:
        body["missing"] = list(error.args[1])
    elif len(error.args) > 1:
        body["details"] = error.args[1:]
    return orjson.dumps(body, default=str)


_BY_STATUS: Mapping[int, str] = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "payload_too_large",
    431: "headers_too_large",
    501: "unsupported",
    503: "unavailable",
    504: "deadline_exceeded",
}
"""For servers that send no code."""


def decode_error(status: int, body: bytes) -> TetherError:
    """The error that an answer of `status` carries; of a server that is not Tether's, the one nearest to the status."""
    try:
        sent = _read_error(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body[:200].decode("utf-8", "replace").strip()
        sent = _Error(f"HTTP {status}: {text}" if text else f"HTTP {status}")
    code = sent.code or _BY_STATUS.get(status, RemoteError.code)
    if sent.missing is not None:
        return from_code(code, sent.error, sent.missing)
    return from_code(code, sent.error, *sent.details)
