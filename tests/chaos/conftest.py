"""One lab for all that happens here: it bears it, so nobody needs another."""

import numpy as np
import pytest
from chaos_lab import MEMORY, PATIENT, until, write_echo, write_ratio

import tether


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Two workers, on both of them the models `patient`, `echo`, `ratio`, `other`."""
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "patient.py").write_text(PATIENT)
    with pytest.MonkeyPatch.context() as patch:  # for the lab's processes; later tests of this one start labs of their own
        patch.setenv("DASK_TETHER__RUNNER__MEMORY", MEMORY)
        started = tether.up(workers=2, data=folder / "data", swarm=False)
    with started:
        started.publish("patient", folder / "patient.py", example={"x": np.zeros(1)})
        started.publish("echo", write_echo(folder / "echo.onnx"))
        started.publish("ratio", write_ratio(folder / "ratio.onnx"))
        started.publish("other", write_ratio(folder / "other.onnx"))
        for model in ("patient", "echo"):
            started.infer(model, np.zeros(1))
        for model in ("ratio", "other"):
            started.infer(model, {"x": np.ones(1, np.int64), "d": np.ones(1, np.int64)})
        until(lambda: all(len(worker.models) == 4 for worker in started.workers.values()))
        yield started
