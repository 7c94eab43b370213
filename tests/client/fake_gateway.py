"""A gateway of one file: the routes of `/v2` and `/tether/v1` over a dict, so that the client and the CLI are tested over real HTTP."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web
from blake3 import blake3

from tether.errors import (
    ConflictError,
    DigestMismatchError,
    MissingBlobsError,
    NotFoundError,
    ScopeStillOpenError,
    TetherError,
    UnauthenticatedError,
    UnknownModelError,
    UnknownVersionError,
)
from tether.types import ModelInfo, ModelVersion, TensorSpec
from tether.wire.oip import decode_request, encode_error, encode_response

KEY = "tk_test"
ADDRESS = "tether://" + "y" * 56


def spec(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


@dataclass
class FakeGateway:
    """Models answer with their first input times the version's number (text: itself), once for each declared output."""

    inputs: list[dict[str, Any]] = field(default_factory=lambda: [spec("x", "FP32", -1, 3)])
    outputs: list[dict[str, Any]] = field(default_factory=lambda: [spec("y", "FP32", -1, 3)])
    blobs: dict[str, bytes] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    manifests: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    trusted: dict[str, list[str]] = field(default_factory=dict)
    invitations: dict[str, dict[str, Any]] = field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    """`METHOD path` of every request, in order."""
    called: threading.Event = field(default_factory=threading.Event)
    delay: float = 0.0
    unaware: int = 0
    """How many of the next requests for metadata come before the news of a publish."""
    drop: int = 0
    """How many of the next requests lose their connection."""
    url: str = ""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=8 << 20, middlewares=[self.rim])
        route = app.router.add_route
        route("GET", "/v2/health/live", self.live)
        for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            route("GET", path, self.metadata)
            route("POST", path + "/infer", self.infer)
        route("PUT", "/tether/v1/blobs/{digest}", self.put_blob)
        route("GET", "/tether/v1/blobs/{digest}", self.get_blob)
        route("GET", "/tether/v1/models", self.list_models)
        route("GET", "/tether/v1/models/{name}", self.one_model)
        route("POST", "/tether/v1/models/{name}/versions", self.publish)
        route("GET", "/tether/v1/models/{name}/versions/{version}", self.manifest)
        route("DELETE", "/tether/v1/models/{name}/versions/{version}", self.delete_version)
        route("PUT", "/tether/v1/models/{name}/aliases/{alias}", self.set_alias)
        route("DELETE", "/tether/v1/models/{name}/aliases/{alias}", self.delete_alias)
        route("POST", "/tether/v1/models/{name}/rollback", self.rollback)
        route("POST", "/tether/v1/models/{name}/verify", self.verify)
        route("GET", "/tether/v1/workers", self.workers)
        route("GET", "/tether/v1/status", self.status)
        route("PUT", "/tether/v1/trust/{publisher}", self.trust)
        route("GET", "/tether/v1/address", self.address)
        route("POST", "/tether/v1/invitations", self.invite)
        route("GET", "/tether/v1/invitations", self.list_invitations)
        route("DELETE", "/tether/v1/invitations/{id}", self.revoke_invitation)
        route("GET", "/tether/v1/peers", self.list_peers)
        route("PUT", "/tether/v1/peers/{peer}", self.allow)
        route("POST", "/tether/v1/peers/{peer}/disallow", self.disallow)
        route("PUT", "/tether/v1/peers/{peer}/ban", self.ban)
        route("DELETE", "/tether/v1/peers/{peer}/ban", self.ban)
        route("PUT", "/tether/v1/peers/{peer}/petname", self.name_peer)
        route("GET", "/tether/v1/audit", self.audit)
        return app

    @web.middleware
    async def rim(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.calls.append(f"{request.method} {request.path}")
        self.called.set()
        if self.drop:
            self.drop -= 1
            request.transport.abort()
            return web.Response()
        await asyncio.sleep(self.delay)
        try:
            if request.path.startswith("/tether/") and request.headers.get("Authorization") != f"Bearer {KEY}":
                raise UnauthenticatedError("a key is needed; pass api_key")
            return await handler(request)
        except TetherError as error:
            return web.Response(status=error.http_status, body=encode_error(error), content_type="application/json")

    async def live(self, _: web.Request) -> web.Response:
        return web.Response()

    def _row(self, name: str) -> dict[str, Any]:
        if name not in self.models:
            raise UnknownModelError(f"model {name!r} is not found")
        return self.models[name]

    def _number(self, request: web.Request) -> tuple[str, int]:
        name, _, alias = request.match_info["name"].partition("@")
        row = self._row(name)
        number = int(request.match_info.get("version", 0)) or (row["aliases"].get(alias, 0) if alias else row["default"])
        if number not in {version["version"] for version in row["versions"]}:
            raise UnknownVersionError(f"model {name!r} has no version {number}")
        return name, number

    async def metadata(self, request: web.Request) -> web.Response:
        name, number = self._number(request)
        if self.unaware:
            self.unaware -= 1
            raise UnknownModelError(f"model {name!r} is not found")
        return web.json_response(
            {"name": name, "versions": [str(number)], "platform": "onnx", "inputs": self.inputs, "outputs": self.outputs}
        )

    async def infer(self, request: web.Request) -> web.Response:
        name, number = self._number(request)
        specs = [
            tuple(TensorSpec(each["name"], each["datatype"], tuple(each["shape"])) for each in each_side)
            for each_side in (self.inputs, self.outputs)
        ]
        info = ModelInfo("onnx", "onnx", specs[0], specs[1], batched=True, pure=True, code=False)
        header = int(request.headers.get("Inference-Header-Content-Length", 0))
        decoded = decode_request(await request.read(), header, info)
        first = next(iter(decoded.inputs.values()))
        result = first if first.dtype == object else first * number
        answer, nbytes = encode_response(
            {each["name"]: result for each in self.outputs}, ModelVersion(name, number, "0" * 64), decoded, info
        )
        return web.Response(body=answer, headers={"Inference-Header-Content-Length": str(nbytes)})

    async def put_blob(self, request: web.Request) -> web.Response:
        data, digest = await request.read(), request.match_info["digest"]
        if blake3(data).hexdigest() != digest:
            raise DigestMismatchError(f"these bytes are not {digest}")
        self.blobs[digest] = data
        return web.json_response({"digest": digest}, status=201)

    async def get_blob(self, request: web.Request) -> web.Response:
        if request.match_info["digest"] not in self.blobs:
            raise NotFoundError("no such blob")
        return web.Response(body=self.blobs[request.match_info["digest"]])

    async def list_models(self, _: web.Request) -> web.Response:
        return web.json_response({"models": list(self.models.values())})

    async def one_model(self, request: web.Request) -> web.Response:
        return web.json_response(self._row(request.match_info["name"]))

    async def publish(self, request: web.Request) -> web.Response:
        name, draft = request.match_info["name"], await request.json()
        missing = sorted({digest for file in draft["files"] for digest, _, _ in file["segments"]} - self.blobs.keys())
        if missing:
            raise MissingBlobsError(f"{len(missing)} blobs are missing", missing)
        return self._committed(name, draft)

    def _committed(self, name: str, draft: dict[str, Any]) -> web.Response:
        digest = blake3(json.dumps([draft["entry"], draft["files"]]).encode()).hexdigest()
        row = self.models.setdefault(name, {"name": name, "default": 0, "aliases": {}, "versions": []})
        for version in row["versions"]:
            if version["digest"] == digest:
                return web.json_response({"name": name, "version": version["version"], "digest": digest, "created": False})
        number = len(row["versions"]) + 1
        row["versions"].append(self._version(number, digest, draft))
        row["aliases"] |= dict.fromkeys(["latest", *draft["aliases"]], number)
        row["default"] = row["aliases"].get("prod", number)
        self.manifests[name, number] = self._manifest_of(draft)
        return web.json_response({"name": name, "version": number, "digest": digest, "created": True}, status=201)

    def _version(self, number: int, digest: str, draft: dict[str, Any]) -> dict[str, Any]:
        return {
            "version": number,
            "digest": digest,
            "created": 1.5,
            "nbytes": sum(file["nbytes"] for file in draft["files"]),
            "framework": draft["framework"] or "onnx",
            "state": "unloaded",
            "tags": draft["tags"],
            "info": {"inputs": self.inputs, "outputs": self.outputs},
            "example": any(file["path"] == ".tether/example.npz" for file in draft["files"]),
        }

    def _manifest_of(self, draft: dict[str, Any]) -> dict[str, Any]:
        arrays = [
            {"path": f"files/{file['path']}", "dtype": "uint8", "shape": [file["nbytes"]], "segments": file["segments"]}
            for file in sorted(draft["files"], key=lambda file: file["path"])
        ]
        return {"framework": "onnx", "entry": draft["entry"], "arrays": arrays}

    async def manifest(self, request: web.Request) -> web.Response:
        name, number = self._number(request)
        return web.json_response({"version": number, "digest": "0" * 64, "manifest": self.manifests[name, number]})

    async def delete_version(self, request: web.Request) -> web.Response:
        name, number = self._number(request)
        self.models[name]["versions"] = [version for version in self.models[name]["versions"] if version["version"] != number]
        return web.json_response({})

    async def set_alias(self, request: web.Request) -> web.Response:
        name, number = request.match_info["name"], (await request.json())["version"]
        row = self._row(name)
        if not 1 <= number <= len(row["versions"]):
            raise UnknownVersionError(f"model {name!r} has no version {number}")
        row["aliases"][request.match_info["alias"]] = number
        row["default"] = row["aliases"].get("prod", row["default"])
        return web.json_response({"alias": request.match_info["alias"], "version": number})

    async def delete_alias(self, request: web.Request) -> web.Response:
        self._row(request.match_info["name"])["aliases"].pop(request.match_info["alias"], None)
        return web.json_response({})

    async def rollback(self, request: web.Request) -> web.Response:
        row = self._row(request.match_info["name"])
        alias = (await request.json())["alias"] or ("prod" if "prod" in row["aliases"] else "latest")
        before = row["aliases"][alias]
        if before == 1:
            raise ConflictError(f"{alias} was never elsewhere")
        row["aliases"][alias] = row["default"] = before - 1
        return web.json_response({"alias": alias, "from": before, "to": before - 1})

    async def verify(self, request: web.Request) -> web.Response:
        name, only = request.match_info["name"], (await request.json())["version"]
        numbers = [version["version"] for version in self._row(name)["versions"] if only in {None, version["version"]}]
        segments = [
            (array["path"], *segment)
            for number in numbers
            for array in self.manifests[name, number]["arrays"]
            for segment in array["segments"]
        ]
        problems = [
            {"path": path, "digest": digest, "code": "chunk_altered", "error": f"{path} was altered"}
            for path, digest, _, _ in segments
            if blake3(self.blobs[digest]).hexdigest() != digest
        ]
        total = sum(segment[-1] for segment in segments)
        return web.json_response({"ok": not problems, "checked": len(segments), "nbytes": total, "problems": problems})

    def _workers(self) -> list[dict[str, Any]]:
        return [
            {
                "id": "worker-1",
                "address": "tls://127.0.0.1:8001",
                "pid": 71,
                "state": "running",
                "since": 2.5,
                "gpus": 1,
                "models": ["digits:1"],
            }
        ]

    async def workers(self, _: web.Request) -> web.Response:
        return web.json_response({"workers": self._workers()})

    async def status(self, _: web.Request) -> web.Response:
        service = {"name": "gateway", "role": "gateway", "pid": 70, "address": self.url, "state": "running", "since": 2.5}
        body = {"address": None, "gateway": self.url, "data": "/data", "services": [service], "workers": self._workers()}
        swarm = {"state": "on", "address": ADDRESS, "since": 2.5, "peers": 3, "reachable": "ok", "detail": "reachable from everywhere"}
        return web.json_response(body | {"models": list(self.models.values()), "swarm": swarm})

    async def trust(self, request: web.Request) -> web.Response:
        self.trusted[request.match_info["publisher"]] = (await request.json())["scopes"]
        return web.json_response({})

    async def address(self, _: web.Request) -> web.Response:
        return web.json_response({"address": ADDRESS, "publisher": "ab" * 32})

    async def invite(self, request: web.Request) -> web.Response:
        asked, number = await request.json(), f"{len(self.invitations):08x}"
        row = asked | {"id": number, "created": 1.5, "expires": 1.5 + 2592000, "terms": asked["expires"], "peers": [], "problem": None}
        self.invitations[number] = row
        return web.json_response(row | {"url": f"{ADDRESS}#{number}"}, status=201)

    async def list_invitations(self, _: web.Request) -> web.Response:
        return web.json_response({"invitations": list(self.invitations.values())})

    async def revoke_invitation(self, request: web.Request) -> web.Response:
        row = self.invitations.get(request.match_info["id"])
        if row is None:
            raise NotFoundError("there is no such invitation")
        row["problem"] = "was revoked"
        return web.json_response(row)

    def _peer(self, request: web.Request) -> dict[str, Any]:
        name = request.match_info["peer"]
        key = next((key for key, row in self.peers.items() if row["petname"] == name), name)
        return self.peers.setdefault(key, {"peer": key, "address": ADDRESS, "label": "", "petname": None, "scopes": [], "since": 1.5})

    async def list_peers(self, _: web.Request) -> web.Response:
        return web.json_response({"peers": list(self.peers.values())})

    async def allow(self, request: web.Request) -> web.Response:
        asked, row = await request.json(), self._peer(request)
        row["scopes"] += asked["scopes"]
        row["label"] = asked["label"] or row["label"]
        envelopes = {scope.removeprefix("decrypt:"): "AAAA" for scope in asked["scopes"] if scope.startswith("decrypt:")}
        return web.json_response({"peer": row["peer"], "scopes": row["scopes"], "envelopes": envelopes})

    async def disallow(self, request: web.Request) -> web.Response:
        asked, row = (await request.json())["scopes"], self._peer(request)
        if asked == ["infer:digits"] and "infer" in row["scopes"]:
            raise ScopeStillOpenError("it has infer, which opens the same", ["infer"])
        gone = row["scopes"] if asked is None else asked
        row["scopes"] = [scope for scope in row["scopes"] if scope not in gone]
        envelopes = {"net": {"cd" * 32: "BBBB"}} if "decrypt:net" in gone else {}
        answer = {"peer": row["peer"], "taken": gone, "scopes": row["scopes"], "invitations": ["00000000"], "message": "taken"}
        return web.json_response(answer | {"models": list(envelopes), "envelopes": envelopes})

    async def ban(self, request: web.Request) -> web.Response:
        row = self._peer(request)
        row["banned"] = (await request.json())["reason"] if request.method == "PUT" else None
        return web.json_response(row)

    async def name_peer(self, request: web.Request) -> web.Response:
        row = self._peer(request)
        row["petname"] = (await request.json())["petname"]
        return web.json_response({"peer": row["peer"], "petname": row["petname"]})

    async def audit(self, request: web.Request) -> web.Response:
        line = {"at": 1.5, "action": "invite", "subject": "00000000", "detail": "infer"}
        return web.json_response({"lines": [line] * int(request.query["most"])})


class Served:
    """The gateway in a thread with a loop of its own, as it is in life: another process."""

    def __init__(self, gateway: FakeGateway) -> None:
        self.gateway = gateway
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> FakeGateway:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self.gateway

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        self._runner = web.AppRunner(self.gateway.app(), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.gateway.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"


def npz_names(data: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(data)).namelist()


def rows(count: int = 2) -> np.ndarray:
    return np.arange(3 * count, dtype=np.float32).reshape(count, 3)
