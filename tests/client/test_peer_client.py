"""A lab elsewhere, as a notebook sees it: through the door of the user's own manager, with everything real but the swarm between."""

import asyncio
import contextlib
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from fake_gateway import KEY, spec
from far_lab import LAB, FarLab
from onnx import TensorProto, helper, numpy_helper

import tether
from tether.client.peer import PeerClient
from tether.config import DataFolder
from tether.errors import (
    BadAddressError,
    BadInputError,
    BadInvitationError,
    ChunkAlteredError,
    DeadlineExceededError,
    ForbiddenError,
    LockedModelError,
    RemoteError,
    StreamLostError,
    UnknownAliasError,
    UnknownModelError,
    UnknownVersionError,
    UnsupportedError,
)
from tether.lab.lab import Lab
from tether.security.addresses import Address, Link, Secret
from tether.wire.parts import END

WEIGHTS = np.arange(64, dtype=np.float32).reshape(16, 4)
X = np.random.default_rng(3).random((2, 16), dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    return DataFolder(tmp_path / "mine")


@pytest.fixture
def far(gateway, folder):
    gateway.inputs[:], gateway.outputs[:] = [spec("x", "FP32", -1, 16)], [spec("y", "FP32", -1, 16)]
    far = FarLab(folder, gateway, KEY)
    yield far
    far.close()


@pytest.fixture
def tiny(tmp_path):
    """y = x @ W, 16 → 4. The gateway of these tests, which runs nothing, answers x times the version instead."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(WEIGHTS, "W")],
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


EVERYTHING = ("infer", "models", "publish", "replicate")


def test_an_invitation_is_all_that_a_colleague_needs(far, folder, tiny):
    url = far.invite("infer:digits*", "publish:digits*", "replicate:digits*")
    with tether.connect(url, data=folder.root) as lab:
        assert (lab.gateway, lab.address) == (None, str(Address(LAB.public)))
        assert repr(lab) == f"<Lab at {Address(LAB.public)}>"
        version = lab.publish("digits", tiny, example={"x": X}, alias="prod", tags={"run": 7})
        assert (str(version), version.framework, version.tags, version.example) == ("digits:1", "onnx", {"run": "7"}, True)
        assert str(lab.publish("digits", tiny, example={"x": X})) == "digits:1"
        assert list(lab.models) == ["digits"]
        np.testing.assert_array_equal(lab.infer("digits", X), X)
        np.testing.assert_array_equal(lab.infer("digits@prod", {"x": X.tolist()}), X)
        np.testing.assert_array_equal(lab.example("digits")["x"], X)
        lab.alias("digits", "best", 1)
        assert lab.version("digits@best").version == 1
    assert repr(lab) == f"<Lab at {Address(LAB.public)} (closed)>"


def test_afterwards_the_address_is_enough_and_the_secret_is_sent_once(far, folder):
    url = far.invite("infer")
    with tether.connect(url, data=folder.root) as lab:
        assert list(lab.models) == []
    assert [link.secret is not None for link in far.connects] == [True]
    for again in (url, str(Address(LAB.public))):
        with tether.connect(again, data=folder.root) as lab:
            assert list(lab.models) == []
    assert [link.secret is not None for link in far.connects] == [True, True, False]


@pytest.mark.usefixtures("far")
def test_who_was_not_invited_is_told_so_and_no_secret_is_shown(folder):
    with pytest.raises(ForbiddenError, match="does not know this one"):
        tether.connect(str(Address(LAB.public)), data=folder.root)
    wrong = Link(Address(LAB.public), Secret.new())
    with pytest.raises(BadInvitationError) as raised:
        tether.connect(wrong.url, data=folder.root)
    assert wrong.secret.text not in str(raised.value)
    assert wrong.secret.text not in repr(PeerClient(folder, wrong.url))
    for url in ("tether://mistyped", wrong.url[:-1]):
        with pytest.raises(BadAddressError):
            tether.connect(url, data=folder.root)


def test_versions_are_named_by_number_alias_or_digest(far, folder, tiny):
    far.publish("digits", tiny)
    far.publish("digits", tiny, tags={"again": "1"}, entry="tiny.onnx", framework="onnx")
    with tether.connect(far.allow("infer"), data=folder.root) as lab:
        model = lab.models["digits"]
        np.testing.assert_array_equal(lab.infer(f"digits:sha-{model[1].digest[:12]}", X), X)
        np.testing.assert_array_equal(lab.infer("digits", X, version=1), X)
        for reference, error in (
            ("digits:9", UnknownVersionError),
            ("digits@blue", UnknownAliasError),
            ("nope", UnknownModelError),
            ("digits@latest:1", tether.errors.BadNameError),
        ):
            with pytest.raises(error):
                lab.infer(reference, X)
        with pytest.raises(BadInputError, match="FP32"):
            lab.infer("digits", np.array([["a"] * 16]))


def test_metadata_is_what_the_protocol_says(far, folder, tiny):
    far.publish("digits", tiny, aliases=["prod"])
    url = far.allow("infer")

    async def story():
        client = PeerClient(folder, url)
        by_name, by_alias = await client.metadata("digits"), await client.metadata("digits@prod")
        await client.aclose()
        await client.aclose()
        return by_name, by_alias

    found, same = asyncio.run(story())
    assert found == same
    assert (found["name"], found["versions"], found["platform"]) == ("digits", ["1"], "onnx")
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16]}]


def test_what_one_may_not_do_is_refused_there(far, folder, tiny):
    far.publish("digits", tiny)
    far.publish("faces", tiny)
    with tether.connect(far.allow("infer:digits"), data=folder.root) as lab:
        assert list(lab.models) == ["digits"]
        with pytest.raises(UnknownModelError):
            lab.infer("faces", X)
        with pytest.raises(ForbiddenError):
            lab.publish("mine", tiny)
        with pytest.raises(ForbiddenError):
            lab.models["digits"].weights["W"]


def test_weights_and_files_come_from_there_verified(far, folder, tiny, tmp_path):
    with tether.connect(far.allow(*EVERYTHING), data=folder.root) as lab:
        lab.publish("digits", tiny)
        np.testing.assert_array_equal(lab.models["digits"].weights["W"][:], WEIGHTS)
        lab.export("digits:1", tmp_path / "out")
        assert (tmp_path / "out" / "tiny.onnx").read_bytes() == tiny.read_bytes()
        assert far.source.asked
        far.source.altered = True
        with pytest.raises(ChunkAlteredError):
            lab.export("digits", tmp_path / "altered")
        assert not (tmp_path / "altered").exists()
        far.altered_manifest = True
        with pytest.raises(ChunkAlteredError):
            lab.export("digits", tmp_path / "altered")


def test_an_encrypted_model_runs_there_and_its_files_stay(far, folder, tiny, tmp_path):
    far.publish("secret", tiny, encrypt=True)
    with tether.connect(far.allow(*EVERYTHING), data=folder.root) as lab:
        np.testing.assert_array_equal(lab.infer("secret", X), X)
        assert lab.version("secret").encrypted
        with pytest.raises(LockedModelError, match="its files stay there"):
            lab.export("secret", tmp_path / "out")
        with pytest.raises(UnsupportedError, match="--encrypt"):
            lab.publish("mine", tiny, encrypt=True)


ONLY_THERE = (
    (lambda lab: lab.rollback("digits"), "tether rollback digits"),
    (lambda lab: lab.verify("digits"), "tether verify digits"),
    (lambda lab: lab.diff("digits", 1, 1), "tether diff digits 1 1"),
    (lambda lab: lab.delete("digits", 1), "tether rm digits:1"),
    (lambda lab: lab.repair("digits"), "tether verify digits"),
    (lambda lab: lab.explain("digits"), "tether explain digits"),
    (lambda lab: lab.gc(), "tether gc"),
    (lambda lab: lab.status(), "tether status"),
    (lambda lab: list(lab.workers), "tether status"),
    (lambda lab: lab.trust("0" * 64), "tether trust"),
    (lambda lab: lab.invite("digits"), "tether invite"),
    (lambda lab: list(lab.peers), "tether peers"),
    (lambda lab: lab.models["digits"][1].kvstore(), "gateway"),
)


def test_what_only_its_own_people_can_do_says_where_to_do_it(lab_of_tiny):
    for ask, where in ONLY_THERE:
        with pytest.raises(UnsupportedError, match=f"over the swarm.*{where}"):
            ask(lab_of_tiny)


@pytest.fixture
def lab_of_tiny(far, folder, tiny):
    far.publish("digits", tiny)
    with tether.connect(far.allow(*EVERYTHING), data=folder.root) as lab:
        yield lab


def test_a_deadline_is_kept_on_the_way(lab_of_tiny, gateway):
    lab_of_tiny.infer("digits", X)
    gateway.delay = 5.0
    with pytest.raises(DeadlineExceededError):
        lab_of_tiny.infer("digits", X, timeout=0.2)


def interrupted(far, lab, gateway):
    """What comes of a call of `digits` during which the user's manager ends and another one takes its place."""
    gateway.delay = 5.0
    gateway.called.clear()

    def end():
        gateway.called.wait(20)
        gateway.delay = 0.0
        far.run(far.replace_door())

    async def story():
        return await asyncio.gather(lab.ainfer("digits", X), asyncio.to_thread(end), return_exceptions=True)

    return asyncio.run(story())[0]


def test_a_pure_model_is_asked_again_when_the_manager_ends_during_the_call(far, lab_of_tiny, gateway):
    np.testing.assert_array_equal(interrupted(far, lab_of_tiny, gateway), X)


def test_where_the_model_may_keep_something_the_end_of_the_manager_is_told_and_the_next_call_finds_another(far, lab_of_tiny, gateway):
    described = far.run(far.ask("model", name="digits"))
    described["versions"][0]["info"]["pure"] = False
    far.respond("models", json.dumps({"model": described}, default=str).encode())
    error = interrupted(far, lab_of_tiny, gateway)
    assert isinstance(error, StreamLostError)
    assert "call again" in str(error)
    np.testing.assert_array_equal(lab_of_tiny.infer("digits", X), X)


@pytest.mark.parametrize("times", [1, 3])
def test_a_pure_model_is_asked_again_however_often_the_way_to_its_lab_is_lost(far, lab_of_tiny, times):
    exchange, left = far.exchange, [None] * times

    @contextlib.asynccontextmanager
    async def lossy(peer, method, value, timeout):  # noqa: ASYNC109 (the port's)
        if method == "infer" and left:
            left.pop()
            raise StreamLostError("the connection was lost", "ECONNRESET")
        async with exchange(peer, method, value, timeout) as answer:
            yield answer

    far.exchange = lossy
    np.testing.assert_array_equal(lab_of_tiny.infer("digits", X), X)
    assert left == []


@pytest.mark.leaks("the connection of a loop that ended is abandoned, as after a fork: its socket stays open until the process ends")
def test_a_client_works_in_one_loop_after_another(far, folder):
    url = far.allow("infer")
    client = PeerClient(folder, url)
    for _ in range(2):
        assert asyncio.run(client.models()) == []
    asyncio.run(client.aclose())


def test_a_lab_that_answers_something_else_is_said_to(far, folder):
    url = far.allow("infer")
    far.respond("ping", b"[]")
    far.respond("models", b"{")
    with pytest.raises(RemoteError, match="not an object"):
        tether.connect(url, data=folder.root)
    with Lab(PeerClient(folder, url)) as lab:
        with pytest.raises(RemoteError, match="not JSON"):
            list(lab.models)
        for answer in (b"{}", b'{"models": 1}'):
            far.respond("models", answer)
            with pytest.raises(RemoteError, match="version"):
                list(lab.models)
            with pytest.raises(RemoteError, match="version"):
                lab.version("digits")


def test_the_kernel_of_a_notebook_that_only_connects_loads_no_javascript_and_no_cluster(far, folder):
    url = far.allow("infer")
    script = (
        "import sys, tether\n"
        f"lab = tether.connect({url!r}, data={str(folder.root)!r})\n"
        "assert list(lab.models) == []\n"
        "print([name for name in ('pythonmonkey', 'distributed', 'zarr', 'uvicorn') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_a_fork_gets_a_connection_of_its_own(far, folder):
    url = far.allow("infer")
    script = (
        "import os, sys, tether\n"
        f"lab = tether.connect({url!r}, data={str(folder.root)!r})\n"
        "assert list(lab.models) == []\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    assert list(lab.models) == []\n"
        "    sys.exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert list(lab.models) == []\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_other_addresses_are_named_without_their_secrets(folder):
    for url in ("tls://host:8002", "ftp://host#secret"):
        with pytest.raises(UnsupportedError) as raised:
            tether.connect(url, data=folder.root)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("seconds", [None, 5.0])
async def test_a_stream_has_its_numbers_in_binary_with_a_deadline_too(folder, seconds, monkeypatch):
    client = PeerClient(folder, str(Address(LAB.public)))
    sent = {}

    async def request(method, _timeout, *value):
        sent[method] = b"".join(value)
        return END if method == "parts" else b'{"stream": "its name"}'

    monkeypatch.setattr(client, "_request", request)
    assert [part async for part in client.stream("digits", {"x": X}, timeout=seconds)] == []
    length = int.from_bytes(sent["stream"][:4], "little")
    told = json.loads(sent["stream"][4 : 4 + length])["parameters"]
    assert told == {"binary_data_output": True} | ({} if seconds is None else {"timeout": 5_000_000})
