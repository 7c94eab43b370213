"""Two labs, one of which lends its workers: models of the other run there, and what becomes of it when either goes."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import WEIGHTS, until, write_model

import tether
from tether.client.own_manager import OwnManager
from tether.config import DataFolder
from tether.errors import (
    BadInputError,
    ForbiddenError,
    LockedModelError,
    MalformedRequestError,
    NoWorkerError,
    PeerNotFoundError,
    RequestError,
    UnavailableError,
    UnsupportedError,
    UntrustedCodeError,
)
from tether.lab import loop
from tether.security.addresses import Address, Link
from tether.security.identity import Identity
from tether.testing.requirements import needs
from tether.wire.heads import joined

pytestmark = [pytest.mark.swarm, needs("pythonmonkey"), pytest.mark.usefixtures("on_the_net")]
ROWS = np.ones((2, 16), np.float32)
PATIENCE = 60.0


@pytest.fixture(scope="module")
def hers(on_the_net, tmp_path_factory):  # noqa: ARG001 (a fixture takes no mark)
    """Has models and no worker."""
    with tether.up(workers=0, data=tmp_path_factory.mktemp("hers")) as lab:
        yield lab


@pytest.fixture(scope="module")
def his(on_the_net, tmp_path_factory):  # noqa: ARG001 (as above)
    """Has a worker."""
    with tether.up(workers=1, data=tmp_path_factory.mktemp("his")) as lab:
        yield lab


@pytest.fixture(scope="module")
def let_in(hers, his):
    """His lab may lend to hers."""
    his.join(str(hers.invite(scope=["register"])))


@pytest.fixture
def lent(hers, his, let_in):  # noqa: ARG001 (as above)
    loan = his.lend(hers.address)
    yield loan
    if his.lendings():
        his.end_lending(hers.address)
    until(lambda: not running(hers))


def running(lab):
    return [each for each in lab.workers.values() if each.state == "running"]


def answers(lab, model, scale=1.0, timeout=30.0):
    return np.allclose(lab.infer(model, ROWS, timeout=timeout), scale * ROWS @ WEIGHTS)


def pid_of(lab, role):
    (service,) = [service for service in lab.status().services if service.role == role]
    return service.pid


def kill(lab, role):
    pid = pid_of(lab, role)
    os.kill(pid, signal.SIGKILL)
    return pid


def call(lab, peer, method, value):
    """What another lab answers to this one's manager."""
    own = OwnManager(DataFolder(Path(lab.status().data)))

    async def asked():
        try:
            return await own.request("peer/call", joined({"peer": peer, "method": method, "timeout": 20.0}, value), 25.0)
        finally:
            await own.aclose()

    return loop.run(asked())


def key_of(lab):
    return Link.parse(lab.address).address.key


def test_a_lab_without_workers_runs_its_models_on_those_of_another(hers, his, lent, tmp_path, measured):
    assert (lent.state, lent.models, lent.slots, lent.error) == ("registered", "*", 32, None)
    (worker,) = running(hers)
    assert worker.id == lent.worker
    hers.publish("lent-digits", write_model(tmp_path / "m.onnx"), example=ROWS)
    began = time.monotonic()
    assert answers(hers, "lent-digits")
    first = time.monotonic() - began
    seconds = []
    for _ in range(20):
        began = time.monotonic()
        assert answers(hers, "lent-digits")
        seconds.append(time.monotonic() - began)
    large = np.random.default_rng(1).random((300_000, 16), np.float32)  # 19 MB
    np.testing.assert_allclose(hers.infer("lent-digits", large), large @ WEIGHTS, rtol=1e-4)
    request = json.dumps({"model_name": "other", "inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [1.0] * 16}]})
    url = f"{hers.status().gateway}/v2/models/lent-digits/infer"
    with urllib.request.urlopen(urllib.request.Request(url, request.encode()), timeout=30) as reply:
        said = json.load(reply)
    assert (said["model_name"], said["model_version"]) == ("lent-digits", "1")
    np.testing.assert_allclose(said["outputs"][0]["data"], np.ravel(ROWS[:1] @ WEIGHTS))
    assert his.models[f"{key_of(hers)[:12]}~lent-digits"].versions[0].digest == hers.models["lent-digits"].versions[0].digest
    measured(
        f"a model of a lab without workers: first answer from another lab's worker after {first:.1f} s (fetched and loaded), then "
        f"{sorted(seconds)[10] * 1000:.1f} ms"
    )


@pytest.mark.usefixtures("lent")
def test_a_version_that_the_lab_that_lends_deletes_is_brought_there_again(hers, his, tmp_path):
    hers.publish("lent-deleted", write_model(tmp_path / "m.onnx"))
    assert answers(hers, "lent-deleted")
    his.delete(f"{key_of(hers)[:12]}~lent-deleted", 1)
    assert answers(hers, "lent-deleted")


@pytest.mark.usefixtures("lent")
def test_the_other_labs_words_about_a_request_reach_who_made_it(hers, tmp_path):
    hers.publish("lent-words", write_model(tmp_path / "m.onnx"))
    assert answers(hers, "lent-words")
    with pytest.raises(BadInputError):
        hers.infer("lent-words", {"z": ROWS})
    url = f"{hers.status().gateway}/v2/models/lent-words/infer"
    for body in (b"", b"[]", b"{", b'{"inputs":'):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, body), timeout=30)
        assert refused.value.code == 400
        refused.value.close()


@pytest.mark.usefixtures("lent")
def test_lending_opens_what_it_is_for_and_nothing_else(hers, his, tmp_path):
    hers.publish("lent-open", write_model(tmp_path / "m.onnx"))
    hers.publish("hers-alone", write_model(tmp_path / "m.onnx"))
    his.publish("his-alone", write_model(tmp_path / "m.onnx"))
    assert answers(hers, "lent-open")
    pong = json.loads(call(hers, key_of(his), "ping", b""))
    assert pong["lent"]["models"] >= 1
    version = hers.models["lent-open"].versions[0]
    wanted = {"model": "lent-open", "version": 1, "digest": version.digest}
    capacity = json.loads(call(hers, key_of(his), "capacity", json.dumps(wanted).encode()))
    assert (capacity["cached"], capacity["loaded"], capacity["error"]) == (True, True, None)
    assert capacity["slots"] == 32

    def head(name):
        return joined({"model_name": name, "inputs": []})

    for method, value in (
        ("models", b"{}"),
        ("manifest", json.dumps({"digest": version.digest}).encode()),
        ("publish", b"{}"),
        ("have", b"{}"),
        ("feed", b""),
        ("register", json.dumps({"workers": 1, "slots": 1}).encode()),
        ("capacity", b'{"model": "his-alone"}'),
        ("infer", head("his-alone")),
        ("infer", head(f"{'0' * 64}~lent-open")),
    ):
        with pytest.raises(RequestError) as refused:
            call(hers, key_of(his), method, value)
        assert isinstance(refused.value, (ForbiddenError, LookupError)), (method, refused.value)
    with pytest.raises(LookupError):  # of hers it may have what it is asked to run
        call(his, key_of(hers), "manifest", json.dumps({"digest": "0" * 64}).encode())
    seen = json.loads(call(his, key_of(hers), "models", b"{}"))["models"]
    assert [row["name"] for row in seen if row["name"].startswith(("lent-open", "hers"))] == ["lent-open"]


@pytest.mark.usefixtures("let_in")
@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"nonsense",
        b"[]",
        b'{"workers": "many"}',
        b'{"workers": -1}',
        b'{"workers": 1, "slots": 0}',
        b'{"workers": 1e99, "slots": 1}',
        b'{"workers": 1, "slots": 1, "models": "a~b"}',
        b'{"workers": 1, "slots": 1, "models": "' + b"*" * 4000 + b'"}',
    ],
)
def test_what_is_no_offer_is_refused(hers, his, value):
    with pytest.raises((MalformedRequestError, BadInputError)):
        call(his, key_of(hers), "register", value)
    with pytest.raises(ForbiddenError, match="tether lend"):  # nor is one that lends nothing believed
        call(his, key_of(hers), "register", b'{"workers": 1, "slots": 1}')
    assert running(hers) == []


@pytest.mark.usefixtures("let_in")
def test_only_models_of_the_glob_are_run(hers, his, tmp_path):
    hers.publish("glob-in", write_model(tmp_path / "m.onnx"))
    hers.publish("out", write_model(tmp_path / "m.onnx"))
    loan = his.lend(hers.address, "glob-*", 3)
    assert (loan.models, loan.slots) == ("glob-*", 3)
    assert answers(hers, "glob-in")
    (borrowing,) = hers.borrowings()
    assert (borrowing.publisher, borrowing.models, borrowing.slots) == (key_of(his), "glob-*", 3)
    until(lambda: hers.borrowings()[0].free == 3)
    with pytest.raises(UnsupportedError, match=r"glob-\*"):
        hers.infer("out", ROWS, timeout=5)
    with pytest.raises(BadInputError):
        his.lend(hers.address, "alice~*")
    his.end_lending(hers.address)
    until(lambda: not running(hers))


@pytest.mark.usefixtures("lent")
def test_nothing_is_trusted_since_it_is_lent(hers, tmp_path):
    (tmp_path / "model.py").write_text(
        "class Model:\n    inputs = [('x', 'FP32', (-1, 2))]\n    outputs = [('y', 'FP32', (-1, 2))]\n    pure = True\n"
        "    def load(self, path):\n        pass\n    def predict(self, x):\n        return {'y': x}\n"
    )
    hers.publish("lent-code", tmp_path / "model.py")
    with pytest.raises(UntrustedCodeError, match="tether trust"):
        hers.infer("lent-code", np.ones((1, 2), np.float32), timeout=20)
    hers.publish("lent-locked", write_model(tmp_path / "m.onnx"), encrypt=True)
    with pytest.raises(LockedModelError):
        hers.infer("lent-locked", ROWS, timeout=20)


@pytest.mark.usefixtures("lent")
def test_a_lab_whose_manager_is_killed_lends_on_by_itself(hers, his, tmp_path, measured):
    """Back within two seconds it was never out; else it registers anew."""
    hers.publish("lent-lost", write_model(tmp_path / "m.onnx"))
    assert answers(hers, "lent-lost")
    before = kill(his, "manager")
    killed = time.monotonic()
    assert answers(hers, "lent-lost", timeout=PATIENCE)  # waits for a worker, and there is one again
    back = time.monotonic() - killed
    until(lambda: pid_of(his, "manager") not in {None, before})
    until(lambda: his.lendings()[0].state == "registered" and running(hers))
    assert answers(hers, "lent-lost", timeout=PATIENCE)
    measured(f"the manager of a lab that lends was killed: a request was answered after {back:.1f} s")


@pytest.mark.usefixtures("lent")
def test_a_lab_that_borrows_is_registered_with_again_when_its_manager_was_killed(hers, his, tmp_path):
    hers.publish("lent-again", write_model(tmp_path / "m.onnx"))
    assert answers(hers, "lent-again")
    kill(hers, "manager")
    until(lambda: not running(hers))
    until(lambda: running(hers))
    assert answers(hers, "lent-again", timeout=PATIENCE)
    assert his.lendings()[0].state == "registered"


@pytest.mark.usefixtures("lent")
def test_a_scope_that_is_taken_back_ends_it_at_once(hers, his, tmp_path, measured):
    hers.publish("lent-back", write_model(tmp_path / "m.onnx"))
    assert answers(hers, "lent-back")
    hers.disallow(his.address, ["register"])
    began = time.monotonic()
    until(lambda: not running(hers))
    measured(f"a scope was taken back: the worker was out of the table after {time.monotonic() - began:.2f} s")
    until(lambda: his.lendings()[0].state == "waiting")
    assert his.lendings()[0].error[0] == "forbidden"
    with pytest.raises(UnavailableError):
        hers.infer("lent-back", ROWS, timeout=1)
    hers.allow(his.address, ["register"])
    until(lambda: running(hers))
    assert answers(hers, "lent-back")


def test_without_the_scope_nobody_lends_and_nothing_is_remembered(hers, his, tmp_path):
    with tether.up(workers=0, data=tmp_path / "stranger") as stranger:
        his.join(str(stranger.invite(scope="infer")))
        with pytest.raises(ForbiddenError, match="--scope register"):
            his.lend(stranger.address)
        with pytest.raises(NoWorkerError):
            stranger.lend(str(hers.invite(scope=["register"])))
        assert stranger.lendings() == []
    with pytest.raises(PeerNotFoundError):
        his.lend(str(Address(Identity(b"nobody's" * 4).public)))
    with pytest.raises(BadInputError, match="own"):
        his.lend(his.address)
    assert his.lendings() == []


def test_a_lab_off_the_swarm_says_what_to_do(hers, tmp_path):
    with tether.up(workers=0, data=tmp_path / "island", swarm=False) as island:
        with pytest.raises(UnsupportedError, match="no-swarm"):
            island.lend(hers.address)
        assert island.lendings() == []


def test_a_worker_that_dies_is_stood_in_for_by_a_lent_one(his, tmp_path, measured):
    with tether.up(workers=1, data=tmp_path / "both") as both:
        both.publish("shared", write_model(tmp_path / "m.onnx"))
        assert answers(both, "shared")
        his.lend(str(both.invite(scope=["register"])))
        until(lambda: sum(bool(each.models) for each in running(both)) == 2)
        kill(both, "worker")
        began = time.monotonic()
        assert answers(both, "shared")
        measured(f"a lab's only worker was killed: the next request was answered by a lent one after {time.monotonic() - began:.2f} s")
        his.end_lending(both.address)
        until(lambda: [each.id for each in running(both)] == ["worker-1"])
        assert answers(both, "shared", timeout=PATIENCE)


@pytest.mark.usefixtures("let_in")
def test_the_command_line_lends(hers, his):
    def cli(*words):
        command = [sys.executable, "-m", "tether", *words, "--data", str(his.status().data)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stdout, done.stderr

    code, out, err = cli("lend", hers.address, "--models", "lent-*", "--slots", "2", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["lendings"]
    assert (row["publisher"], row["models"], row["slots"], row["state"]) == (key_of(hers), "lent-*", 2, "registered")
    assert "registered" in cli("lend", "--list")[1]
    assert json.loads(cli("lend", "--list", "--json")[1])["borrowings"] == []
    assert cli("lend", "--end")[0] == 2
    code, out, _ = cli("lend", hers.address, "--end", "--json")
    assert json.loads(out) == {"lendings": []}
