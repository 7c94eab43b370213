import asyncio
import inspect
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from blake3 import blake3
from fake_gateway import KEY, rows, spec

import tether
from tether.client.http import HttpClient
from tether.config import DataFolder
from tether.errors import (
    BadInputError,
    BadNameError,
    ChunkAlteredError,
    ConflictError,
    LabRunningError,
    MalformedManifestError,
    NoLabError,
    ServiceUnavailableError,
    UnauthenticatedError,
    UnknownAliasError,
    UnknownModelError,
    UnknownVersionError,
    UnsupportedError,
)
from tether.lab.lab import Lab, connect
from tether.lab.launch import Running
from tether.lab.objects import Model, Status, WorkerInfo, tensor_text
from tether.lab.operations import Operations
from tether.lab.swarm_state import SwarmState


def test_publish_then_infer_numpy_in_numpy_out(lab, model_file):
    version = lab.publish("digits", model_file, example=rows(), alias="prod", tags={"run": 7})
    assert (str(version), version.framework, version.tags, version.example) == ("digits:1", "onnx", {"run": "7"}, True)
    np.testing.assert_array_equal(lab.infer("digits", rows()), rows())
    np.testing.assert_array_equal(lab.infer("digits@prod", {"x": rows()}), rows())


def test_the_same_bytes_are_the_same_version(lab, model_file):
    assert str(lab.publish("digits", model_file)) == str(lab.publish("digits", model_file)) == "digits:1"


def two_versions(lab, model_file):
    lab.publish("digits", model_file)
    model_file.write_bytes(b"another")
    return lab.publish("digits", model_file)


def test_versions_are_named_by_number_alias_or_digest(lab, model_file):
    second = two_versions(lab, model_file)
    lab.alias("digits", "old", 1)
    for reference, factor in (("digits", 2), ("digits:1", 1), ("digits@old", 1), (f"digits:sha-{second.digest[:12]}", 2)):
        np.testing.assert_array_equal(lab.infer(reference, rows()), rows() * factor)
    np.testing.assert_array_equal(lab.infer("digits", rows(), version=1), rows())
    with pytest.raises(BadInputError, match="give one of them"):
        lab.infer("digits:1", rows(), version=2)


def test_what_is_not_there_says_what_is(lab, model_file):
    two_versions(lab, model_file)
    with pytest.raises(UnknownModelError):
        lab.infer("nope", rows())
    with pytest.raises(UnknownVersionError):
        lab.infer("digits:9", rows())
    with pytest.raises(UnknownVersionError, match="versions 1, 2"):
        lab.version("digits:9")
    with pytest.raises(UnknownAliasError, match="latest"):
        lab.version("digits@blue")
    with pytest.raises(BadNameError):
        lab.publish("Digits!", model_file)


def test_inputs_are_converted_to_the_model_s_type_or_refused_by_the_lab(lab, model_file):
    lab.publish("digits", model_file)
    assert lab.infer("digits", [[1, 2, 3]]).dtype == np.float32
    with pytest.raises(BadInputError, match="FP32"):
        lab.infer("digits", np.array([[1j, 2, 3]]).astype("S4"))


def test_several_outputs_come_as_a_dict_one_asked_for_as_an_array(lab, gateway, model_file):
    gateway.outputs.append(spec("z", "FP32", -1, 3))
    lab.publish("digits", model_file)
    assert set(lab.infer("digits", rows())) == {"y", "z"}
    assert lab.infer("digits", rows(), outputs="z").shape == (2, 3)
    assert lab.infer("digits", rows(), outputs=["y"]).shape == (2, 3)


def test_text_goes_and_comes(lab, gateway, model_file):
    gateway.inputs[:] = [spec("x", "BYTES", -1)]
    gateway.outputs[:] = [spec("y", "BYTES", -1)]
    lab.publish("words", model_file)
    assert lab.infer("words", ["grüß", "b"]).tolist() == ["grüß".encode(), b"b"]


def test_metadata_is_asked_for_once_and_again_when_the_model_changed(lab, gateway, model_file):
    lab.publish("digits", model_file)
    lab.infer("digits", rows())
    lab.infer("digits", rows())
    assert gateway.calls.count("GET /v2/models/digits") == 1
    gateway.inputs[:] = [spec("renamed", "FP64", -1, 3)]
    np.testing.assert_array_equal(lab.infer("digits", rows()), rows())
    assert gateway.calls.count("GET /v2/models/digits") == 2


def test_metadata_is_asked_for_again_after_another_version_answered(lab, gateway, model_file):
    two_versions(lab, model_file)
    lab.infer("digits", rows())
    gateway.models["digits"]["default"] = 1
    for _ in range(2):
        lab.infer("digits", rows())
    assert gateway.calls.count("GET /v2/models/digits") == 2


def test_a_refusal_that_is_the_caller_s_fault_is_not_tried_again(lab, gateway, model_file):
    lab.publish("digits", model_file)
    lab.infer("digits", rows())
    with pytest.raises(BadInputError):
        lab.infer("digits", np.ones((2, 4)))
    assert gateway.calls.count("POST /v2/models/digits/infer") == 2


def test_rollback_alias_and_verify(lab, gateway, model_file):
    two_versions(lab, model_file)
    moved = lab.rollback("digits")
    assert (moved.alias, moved.before, moved.after) == ("latest", 2, 1)
    with pytest.raises(ConflictError):
        lab.rollback("digits")
    assert lab.verify("digits")
    digest = blake3(b"another").hexdigest()
    gateway.blobs[digest] = b"altered"
    found = lab.verify("digits:2")
    assert not found
    assert [problem.digest for problem in found.problems] == [digest]
    assert lab.verify("digits:1")


def test_an_export_is_what_was_published(lab, tmp_path):
    source = tmp_path / "model"
    (source / "variables").mkdir(parents=True)
    (source / "saved_model.pb").write_bytes(os.urandom((9 << 20) + 5))
    (source / "variables" / "index").write_bytes(b"i")
    (source / "empty").touch()
    lab.publish("digits", source, example=rows())
    target = lab.export("digits", tmp_path / "deep" / "copy")
    copied = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert copied == {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_an_export_overwrites_nothing_and_leaves_nothing_when_it_fails(lab, gateway, model_file, tmp_path):
    lab.publish("digits", model_file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("full", "digits.onnx", "link"):
        with pytest.raises(ConflictError, match="nothing is overwritten"):
            lab.export("digits", tmp_path / name)
    before = sorted(tmp_path.iterdir())
    gateway.blobs[next(iter(gateway.blobs))] = b"altered"
    with pytest.raises(ChunkAlteredError):
        lab.export("digits", tmp_path / "empty")
    assert sorted(tmp_path.iterdir()) == before
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("path", ["files/../../out", "files//etc/passwd", "files/a/./b", "files/"])
def test_a_manifest_can_not_write_outside_of_the_folder(lab, gateway, model_file, tmp_path, path):
    lab.publish("digits", model_file)
    gateway.manifests["digits", 1]["arrays"][0]["path"] = path
    with pytest.raises(MalformedManifestError, match="nothing was written"):
        lab.export("digits", tmp_path / "out")


def test_the_mappings_are_live(lab, model_file):
    models = lab.models
    assert (len(models), list(lab.workers), lab.workers["worker-1"].gpus) == (0, ["worker-1"], 1)
    lab.publish("digits", model_file)
    assert list(models) == ["digits"]
    assert "digits" in models
    assert "nope" not in models
    assert [tensor_text(each) for each in models["digits"]["latest"].inputs] == ["x FP32[?, 3]"]
    with pytest.raises(KeyError):
        models["nope"]


def test_status_is_the_whole_lab(lab, gateway, model_file):
    lab.publish("digits", model_file)
    status = lab.status()
    assert isinstance(status, Status)
    assert (status.gateway, [service.name for service in status.services], [model.name for model in status.models]) == (
        gateway.url,
        ["gateway"],
        ["digits"],
    )
    assert (status.swarm.state, status.swarm.peers, status.swarm.reachable) == ("on", 3, "ok")
    assert "swarm on" in repr(status)


@pytest.mark.parametrize(
    ("swarm", "shown"),
    [
        (SwarmState(), "unknown"),
        (SwarmState(state="off", detail="not needed yet: …"), "off: not needed yet: …"),
        (SwarmState(state="failed", detail="a socket can't be bound"), "failed"),
        (SwarmState(state="on", since=1.0, peers=2, reachable="note", detail="7 nodes known"), "on, not reachable from everywhere"),
        (SwarmState(state="on", since=1.0), "on"),
    ],
)
def test_a_notebook_shows_how_it_stands_with_the_swarm_in_words_that_do_not_change(swarm, shown):
    assert f">{shown}<" in Status(swarm=swarm)._repr_html_()


def test_a_lent_worker_shows_whose_it_is():
    lent = WorkerInfo(id="lab-1", state="running", gpus=2, transport="swarm", slots=32, peer="ab" * 32)
    assert repr(lent) == "<Worker lab-1: running, 2 GPU, swarm abababababab…>"
    assert "swarm abababababab…" in lent._repr_html_()
    assert "swarm abababababab…" in Status(workers=(lent,))._repr_html_()
    assert WorkerInfo(id="worker-1").way == "unix"


def test_html_is_escaped_and_has_nothing_that_changes_from_run_to_run(lab, gateway, model_file):
    lab.publish("digits", model_file, tags={"<b>": "<script>"})
    shown = [
        lab,
        lab.models,
        lab.workers,
        lab.status(),
        lab.models["digits"],
        lab.version("digits"),
        lab.workers["worker-1"],
        lab.verify("digits"),
    ]
    html = "".join(each._repr_html_() for each in shown)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    for secret in ("127.0.0.1", KEY, "71", "2.5", gateway.models["digits"]["versions"][0]["digest"]):
        assert secret not in html
    assert html == "".join(each._repr_html_() for each in shown)
    assert all(repr(each).startswith("<") for each in shown)


def test_an_answer_that_does_not_fit_is_an_error_of_the_tree(lab, gateway):
    gateway.models["digits"] = {"name": 3, "default": 0, "aliases": {}, "versions": []}
    with pytest.raises(tether.errors.RemoteError, match="Model"):
        lab.models["digits"]


def test_every_call_has_a_sync_and_an_async_form_with_the_same_signature():
    inner = {name for name, _ in inspect.getmembers(Operations, inspect.iscoroutinefunction) if not name.startswith("_")}
    views, ends = {"models", "workers", "peers", "address"}, {"aclose", "model", "answer"}
    for name in inner - views - ends:
        sync, later = getattr(Lab, name), getattr(Lab, f"a{name}")
        assert not inspect.iscoroutinefunction(sync)
        assert inspect.iscoroutinefunction(later)
        assert inspect.signature(sync) == inspect.signature(later) == inspect.signature(getattr(Operations, name))
        assert sync.__doc__ == later.__doc__
    public = {name for name in vars(Lab) if not name.startswith("_")}
    streams = {"events", "aevents", "stream", "astream"}
    assert public == {form for name in inner - ends for form in (name, f"a{name}")} | {"close", "aclose", "gateway"} | streams


async def test_in_a_running_loop_both_forms_work(gateway, model_file):
    async with Lab(HttpClient(gateway.url, KEY)) as lab:
        await lab.apublish("digits", model_file)
        answers = await asyncio.gather(*(lab.ainfer("digits", rows(count)) for count in range(1, 9)))
        assert [answer.shape[0] for answer in answers] == list(range(1, 9))
        np.testing.assert_array_equal(lab.infer("digits", rows()), rows())
        assert list(await lab.amodels()) == ["digits"]


async def test_cancelling_an_async_call_ends_it(gateway):
    gateway.delay = 5
    async with Lab(HttpClient(gateway.url, KEY)) as lab:
        call = asyncio.create_task(lab.astatus())
        await asyncio.to_thread(gateway.called.wait, 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    gateway.delay = 0


def test_many_threads_may_share_a_lab(lab, model_file):
    lab.publish("digits", model_file)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(lab.infer("digits", rows()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(answers) == 8


def test_closing_twice_does_nothing_and_a_lab_without_gateway_says_so(gateway):
    with Lab(HttpClient(gateway.url, KEY)) as lab:
        lab.close()
    with Lab(None) as lab, pytest.raises(ServiceUnavailableError, match="without a gateway"):
        lab.status()


def test_connect_by_url_asks_whether_anybody_is_there(gateway, monkeypatch, tmp_path):
    monkeypatch.setattr("tether.client.http._PAUSES", ())
    with connect(gateway.url + "/", KEY, data=tmp_path) as lab:
        assert len(lab.models) == 0
    monkeypatch.setenv("TETHER_API_KEY", KEY)
    with connect(gateway.url, data=tmp_path) as lab:
        assert len(lab.models) == 0
    with pytest.raises(ServiceUnavailableError, match="nothing answers"):
        connect("http://127.0.0.1:1", data=tmp_path)


def test_connect_without_a_lab_says_how_to_start_one(tmp_path):
    with pytest.raises(NoLabError, match="tether up"):
        connect(data=tmp_path)
    with pytest.raises(UnsupportedError, match="later version"):
        connect("tls://host:8002", data=tmp_path)
    with pytest.raises(UnsupportedError, match="http://host:port"):
        connect("localhost:8000", data=tmp_path)


def test_a_fork_gets_connections_and_a_loop_of_its_own(gateway):
    program = """
import os, sys
from tether.client.http import HttpClient
from tether.lab.lab import Lab
lab = Lab(HttpClient(*sys.argv[1:]))
assert len(lab.models) == 0
child = os.fork()
if not child:
    assert len(lab.models) == 0
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert len(lab.models) == 0
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, gateway.url, KEY],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_importing_tether_loads_nothing_heavy():
    heavy = {"numpy", "aiohttp", "dask", "zarr", "asyncio", "click"}
    program = f"import sys, tether; dir(tether); tether.errors; print(*sorted(set(sys.modules) & {heavy}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == ""


def test_the_package_offers_what_it_lists():
    assert set(tether.__all__) <= set(dir(tether))
    assert all(getattr(tether, name) is not None for name in tether.__all__)
    with pytest.raises(AttributeError, match="nope"):
        getattr(tether, "nope")  # noqa: B009 (a plain attribute is an expression without use)


def test_a_model_of_the_gateway_gives_its_name_to_its_versions():
    model = Model(
        name="m", versions=tether.lab.objects.described(Model, {"name": "m", "versions": [{"version": 1, "digest": "d"}]}).versions
    )
    assert str(model[1]) == "m:1"


@pytest.fixture
def found(gateway, monkeypatch, tmp_path):
    """A lab that runs already, as the data folder's files would tell of it."""

    def answer(version=tether.__version__, url=gateway.url):
        lab = Running(url, DataFolder(tmp_path), 1, KEY, version)
        monkeypatch.setattr("tether.lab.lab.running", lambda _: lab)

    return answer


def test_up_attaches_to_the_lab_that_runs_already_and_says_so(found, tmp_path, capsys):
    found()
    with tether.up(data=tmp_path) as lab:
        assert len(lab.models) == 0
    assert "already runs" in capsys.readouterr().out


def test_up_does_not_attach_to_another_version(found, tmp_path):
    found(version="0.0.1")
    with pytest.raises(LabRunningError, match=r"0\.0\.1"):
        tether.up(data=tmp_path)


def test_connect_finds_the_lab_of_the_data_folder_and_sends_its_key_there_only(found, gateway, tmp_path):
    found()
    for url in (None, gateway.url, gateway.url + "/"):
        with connect(url, data=tmp_path) as lab:
            assert len(lab.models) == 0
    with connect(gateway.url.replace("127.0.0.1", "localhost"), data=tmp_path) as lab, pytest.raises(UnauthenticatedError):
        len(lab.models)


def test_connect_to_a_lab_without_a_gateway_is_refused(found, tmp_path):
    found(url=None)
    with pytest.raises(NoLabError, match="without a gateway"):
        connect(data=tmp_path)
