"""Pure: the OpenAPI document of the endpoints, and a page that shows it without fetching anything from elsewhere."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from tether._version import __version__
from tether.gateway.routes import Endpoint

__all__ = ["openapi", "page"]

_ERROR = {
    "type": "object",
    "required": ["error", "code"],
    "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
}
_VARIABLE = re.compile(r"{(\w+)}")


def openapi(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(_shown(endpoint.path), {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tether", "version": __version__, "description": "Open Inference Protocol V2, and management of models."},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    failure = {
        "description": "It failed; `code` says why",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{_shown(endpoint.path)}").strip("_"),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _VARIABLE.findall(_shown(endpoint.path))
        ],
        "responses": {"200": {"description": "Done"}, "default": failure},
        "security": [] if endpoint.need == "open" else [{"key": []}],
    }
    if endpoint.body is not None:
        kind = "application/octet-stream" if endpoint.body.get("format") == "binary" else "application/json"
        operation["requestBody"] = {"content": {kind: {"schema": endpoint.body}}}
    return operation


def _shown(path: str) -> str:
    """OpenAPI has no word for a variable that takes several parts of a path."""
    return path.replace(":path}", "}")


_NEEDS = {"open": "open", "infer": "key, or this user on loopback", "metrics": "key, or loopback", "manage": "key"}


def page(endpoints: Iterable[Endpoint]) -> str:
    """The endpoints as one table of HTML."""
    rows = "".join(
        f"<tr><td>{endpoint.method}</td><td><code>{html.escape(_shown(endpoint.path))}</code></td>"
        f"<td>{html.escape(endpoint.summary)}</td><td>{_NEEDS[endpoint.need]}</td></tr>"
        for endpoint in endpoints
    )
    style = "body{font:15px system-ui;margin:2em}td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ddd}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tether</title><style>{style}</style><h1>Tether {__version__}</h1>'
        '<p>Machine-readable: <a href="openapi.json">openapi.json</a>. Errors are <code>{"error", "code"}</code>.</p>'
        f"<table><tr><th>Verb<th>Path<th>What<th>Needs</tr>{rows}</table></html>"
    )
