"""What a peer may call of a lab: over a stream, with a real store, real access and real invitations."""

import asyncio
import base64
import contextlib
import json
import struct

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tether.errors import (
    BadInvitationError,
    ForbiddenError,
    MalformedRequestError,
    ManagerLeavingError,
    ServiceUnavailableError,
    StagingFullError,
    UnknownModelError,
    UnknownVersionError,
    UntrustedCodeError,
)
from tether.manager.operations import Operations
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.methods import Methods
from tether.manager.peering.staged import StagedShares
from tether.security.identity import Identity
from tether.security.scopes import Scope
from tether.store import FILES, Repository, digest_of
from tether.swarm.node.node import PREFIX
from tether.swarm.rpc.rpc import RpcConnection
from tether.testing.streams import stream_pair
from tether.types import ModelRef

LAB, PEER, OTHER = (Identity(bytes([number]) * 32) for number in (1, 2, 3))
PATIENCE = 20.0


class Lab:
    """A lab that peers call."""

    def __init__(self, folder):
        self.repository = Repository.open(folder / "store", own=LAB.public)
        self.operations = Operations(self.repository, LAB, folder / "publishing")
        self.access, self.invitations = self.operations.access, self.operations.admission.registry
        self.methods = Methods(LAB.public, self.ask, self.repository, self.access, Gateway(None))
        self.service = self.methods.service()

    async def ask(self, operation, **arguments):
        return await self.operations.handlers()[operation](**arguments)

    def allow(self, *scopes, peer=PEER.public):
        self.access.allow(peer, [Scope.parse(scope) for scope in scopes])

    @contextlib.asynccontextmanager
    async def called_by(self, peer=PEER.public):
        theirs, ours = stream_pair(peer, LAB.public)
        here, there = RpcConnection(ours, LAB.public, self.service), RpcConnection(theirs, peer)

        def call(method, value=b""):
            return there.request(PREFIX + method, value if isinstance(value, bytes) else json.dumps(value).encode(), PATIENCE)

        call.answering = here
        yield call
        await asyncio.gather(there.aclose(), here.aclose())

    def close(self):
        self.operations.close()
        self.repository.close()


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def write_onnx(path, scale=1.0):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.full((16, 4), scale, np.float32), "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


async def publish(lab, folder, name, scale=1.0, **more):
    """As the lab's own people do it."""
    arrays = lab.repository.add_files(write_onnx(folder / "model.onnx", scale))
    return await lab.operations.publish(name, draft_of(arrays, "model.onnx") | more)


def draft_of(arrays, entry):
    files = [
        {"path": each.path.removeprefix(f"{FILES}/"), "nbytes": each.nbytes, "segments": msgspec.to_builtins(each.segments)}
        for each in arrays
    ]
    return {"files": files, "entry": entry}


async def test_who_is_not_enrolled_reaches_enrol_and_nothing_else(lab):
    secret = lab.invitations.invite([Scope.parse("models:digits*")])
    async with lab.called_by() as call:
        for method in ("ping", "models", "infer", "manifest", "stage", "publish", "alias", "envelope", "events", "have", "no such"):
            with pytest.raises(ForbiddenError):
                await call(method)
        with pytest.raises(BadInvitationError):
            await call("enrol", {"secret": "y" * 36})
        answer = json.loads(await call("enrol", {"secret": secret.text}))
        assert answer == {"publisher": LAB.public, "scopes": ["models:digits*"]}
        assert json.loads(await call("ping"))["models"] == 0
    async with lab.called_by(OTHER.public) as call:
        with pytest.raises(BadInvitationError):
            await call("enrol", {"secret": secret.text})


async def test_one_sees_the_models_that_one_may_see(lab, tmp_path):
    for name in ("digits", "digits-large", "faces"):
        await publish(lab, tmp_path, name)
    lab.allow("infer:digits*")
    async with lab.called_by() as call:
        seen = json.loads(await call("models"))["models"]
        assert sorted(model["name"] for model in seen) == ["digits", "digits-large"]
        described = json.loads(await call("models", {"name": "digits"}))["model"]
        assert described["versions"][0]["info"]["inputs"][0]["name"] == "x"
        for name in ("faces", "no-such"):
            with pytest.raises(UnknownModelError, match="no such model that this key may use"):
                await call("models", {"name": name})
        assert json.loads(await call("ping"))["models"] == 2


async def test_a_model_of_another_lab_is_not_opened_by_its_bare_name(lab, tmp_path):
    await publish(lab, tmp_path, "digits")
    lab.allow("infer:digits")
    async with lab.called_by() as call:
        with pytest.raises(UnknownModelError):
            await call("models", {"name": "alice~digits"})
        with pytest.raises(MalformedRequestError):
            await call("models", {"name": 7})


async def test_a_signed_version_is_given_to_who_may_replicate_it(lab, tmp_path):
    published = await publish(lab, tmp_path, "digits")
    lab.allow("replicate:digits")
    async with lab.called_by() as call:
        signed = json.loads(await call("manifest", {"digest": published["digest"]}))
        assert digest_of(base64.b64decode(signed["manifest"])) == published["digest"]
        assert (signed["publisher"], signed["name"]) == (LAB.public, "digits")
        with pytest.raises(UnknownVersionError):
            await call("manifest", {"digest": "0" * 64})
    lab.access.revoke(PEER.public)
    lab.allow("replicate:faces")
    async with lab.called_by() as call:
        with pytest.raises(UnknownVersionError):
            await call("manifest", {"digest": published["digest"]})
        await publish(lab, tmp_path, "faces")  # the same bytes
        assert json.loads(await call("manifest", {"digest": published["digest"]}))["name"] == "faces"


async def test_an_alias_is_moved_by_who_may_publish(lab, tmp_path):
    await publish(lab, tmp_path, "digits")
    await publish(lab, tmp_path, "digits", 2.0)
    lab.allow("publish:digits")
    async with lab.called_by() as call:
        moved = json.loads(await call("alias", {"name": "digits", "alias": "prod", "version": 1}))
        assert moved == {"alias": "prod", "from": None, "to": 1}
        assert lab.repository.resolve(ModelRef.parse("digits")).version == 1
        with pytest.raises(UnknownModelError):
            await call("alias", {"name": "faces", "alias": "prod", "version": 1})


async def test_a_peer_publishes_data_under_its_scope(lab, tmp_path):
    lab.allow("publish:theirs*")
    data = write_onnx(tmp_path / "model.onnx").read_bytes()
    digest = digest_of(data)
    draft = {
        "files": [{"path": "model.onnx", "nbytes": len(data), "segments": [[digest, 0, len(data)]]}],
        "entry": "model.onnx",
    }
    async with lab.called_by() as call:
        assert json.loads(await call("stage", bytes.fromhex(digest) + data)) == {"nbytes": len(data)}
        with pytest.raises(UnknownModelError):
            await call("publish", {"name": "digits", "draft": draft})
        answer = json.loads(await call("publish", {"name": "theirs-1", "draft": draft}))
        assert (answer["version"], answer["created"]) == (1, True)
        with pytest.raises(ForbiddenError, match="encrypted from outside"):
            await call("publish", {"name": "theirs-1", "draft": draft | {"encrypt": True}})
        with pytest.raises(ForbiddenError, match="tether replicate"):
            await call("publish", {"name": "theirs-1", "draft": {"manifest": "", "publisher": OTHER.public, "signature": ""}})
        with pytest.raises(MalformedRequestError):
            await call("stage", b"short")


async def test_a_peer_that_only_stages_is_stopped_and_nothing_of_it_is_written(lab, tmp_path):
    lab.allow("publish:theirs*")
    lab.methods.claimed = StagedShares(lab.repository, tmp_path / "staged.log", 1 << 20).claimed
    blobs = [bytes([number]) * (512 << 10) for number in range(3)]
    async with lab.called_by() as call:
        for data in blobs[:2]:
            await call("stage", bytes.fromhex(digest_of(data)) + data)
        with pytest.raises(StagingFullError, match="publish them"):
            await call("stage", bytes.fromhex(digest_of(blobs[2])) + blobs[2])
    assert [lab.repository.staged_nbytes(digest_of(data)) is not None for data in blobs] == [True, True, False]


async def test_the_code_of_a_peer_runs_here_only_if_it_is_trusted_for_code(lab, tmp_path):
    """Not even in the sandbox."""
    lab.allow("publish")
    ran = tmp_path / "ran"
    (tmp_path / "model.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "class Model:\n    inputs = [('x', 'FP32', (-1, 2))]\n    outputs = [('y', 'FP32', (-1, 2))]\n"
        "    def load(self, path):\n        pass\n    def predict(self, x):\n        return {'y': x}\n"
    )
    draft = draft_of(lab.repository.add_files(tmp_path / "model.py"), "model.py")
    async with lab.called_by() as call:
        with pytest.raises(UntrustedCodeError, match="can run code"):
            await call("publish", {"name": "sneaky", "draft": draft})
        assert not ran.exists()
        lab.repository.trust(PEER.public, ["code"])
        assert json.loads(await call("publish", {"name": "sneaky", "draft": draft}))["version"] == 1


async def test_an_inference_needs_its_scope_a_whole_value_and_a_gateway(lab, tmp_path):
    await publish(lab, tmp_path, "digits")
    lab.allow("infer:digits")

    def value(model, tail=b""):
        head = json.dumps({"model_name": model, "inputs": []}).encode()
        return struct.pack("<I", len(head)) + head + tail

    async with lab.called_by() as call:
        for wrong in (b"", b"\x01", struct.pack("<I", 9) + b"{}", struct.pack("<I", 2) + b"{}", struct.pack("<I", 0) + b"{}"):
            with pytest.raises(MalformedRequestError):
                await call("infer", wrong)
        with pytest.raises(UnknownModelError):
            await call("infer", value("faces"))
        for name in ("digits", "digits:1", "digits@latest"):
            with pytest.raises(ServiceUnavailableError, match="without a gateway"):
                await call("infer", value(name))


async def test_a_name_that_means_another_model_since_is_looked_up_again(lab, tmp_path):
    lab.allow("models:digits")
    async with lab.called_by() as call:
        with pytest.raises(UnknownModelError):
            await call("models", {"name": "digits"})
        await publish(lab, tmp_path, "digits")
        lab.methods.changed()
        assert json.loads(await call("models", {"name": "digits"}))["model"]["name"] == "digits"


async def test_a_manager_that_is_about_to_end_answers_who_waits_and_begins_nothing_new(lab, tmp_path):
    await publish(lab, tmp_path, "digits")
    lab.allow("infer:*")
    async with lab.called_by() as call:
        first = json.loads(await call("models"))
        waiting = asyncio.create_task(call("models", {"seen": first["state"], "wait": PATIENCE}))
        while not call.answering.working:  # noqa: ASYNC110 (nothing says when the other side has heard)
            await asyncio.sleep(0)
        lab.methods.leave()
        assert json.loads(await waiting) == first
        with pytest.raises(ManagerLeavingError, match="did nothing"):
            await call("ping")
    async with lab.called_by(OTHER.public) as call:
        with pytest.raises(ForbiddenError):
            await call("ping")
