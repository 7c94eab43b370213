"""What a process may run models on is said by its environment, and wrong settings are refused with what there is."""

import subprocess
import sys
from functools import partial

import numpy as np
import onnxruntime
import pytest
import runtime_models as models

from tether.config import has_cards
from tether.errors import ConfigError
from tether.runtimes import devices, inspect, load

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "TETHER_ONNX_PROVIDERS", "TETHER_TORCH_COMPILE"):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)


def test_cards_are_used_where_they_are_and_unless_they_are_hidden(monkeypatch):
    assert devices.onnx_providers([CUDA, CPU]) == [(CUDA, {}), CPU]
    assert devices.onnx_providers([CPU]) == [CPU]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert has_cards()
    devices.hide_cards()
    assert not has_cards()
    assert devices.onnx_providers([CUDA, CPU]) == [CPU]


def test_configured_providers_come_in_their_order_and_the_cpu_last():
    devices.use_providers(["CPU", ["OpenVINO", {"device_type": "GPU", "streams": 2}]], ["OpenVINOExecutionProvider", CUDA, CPU])
    assert devices.onnx_providers([]) == [("OpenVINOExecutionProvider", {"device_type": "GPU", "streams": "2"}), CPU]


@pytest.mark.parametrize("wrong", [[], 3, {"CUDA": 1}, [3], [["CPU", "fast"]], [["CPU", {}, {}]]])
def test_what_is_no_list_of_providers_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"tether\.onnx\.providers"):
        devices.check_providers(wrong, [CPU])


def test_a_provider_that_is_not_installed_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"'TensorRT' is not in the installed ONNX Runtime, which has .*CPUExecutionProvider"):
        devices.use_providers(["TensorRT"], onnxruntime.get_available_providers())
    with pytest.raises(ConfigError, match=r"torch\.compile"):
        devices.use_torch_compiler(True)


def test_a_session_has_the_providers_that_are_configured(tmp_path, monkeypatch):
    sessions = []
    make = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kw: sessions.append(make(*args, **kw)) or sessions[-1])
    other = "AzureExecutionProvider"  # of every wheel on PyPI; it does nothing by itself, so each node goes on to the CPU
    devices.use_providers([other], onnxruntime.get_available_providers())
    path = models.onnx_rows(tmp_path)
    loaded = load(path, inspect(path))
    assert [session.get_providers() for session in sessions] == [[other, CPU]] * 2
    loaded.close()


@pytest.mark.parametrize("backend", ["eager", "there is no such backend"])
def test_a_compiled_model_answers_as_before_and_so_does_one_that_cannot_be_compiled(tmp_path, backend):
    path = models.save_pt2(tmp_path, *models.torch_rows())
    info = inspect(path)
    run = partial(lambda model, x: (model.run({info.inputs[0].name: x}), model.close())[0])
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    plain = run(load(path, info), x)
    devices.use_torch_compiler(backend)
    compiled = run(load(path, info), x)
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(compiled[name], value, rtol=1e-6)


def test_runners_are_told_by_the_environment():
    devices.use_providers(["CPU"], [CPU])
    devices.hide_cards()
    code = "from tether.config import has_cards; from tether.runtimes import devices; print(has_cards(), devices.onnx_providers([]))"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.split() == ["False", "['CPUExecutionProvider']"]
