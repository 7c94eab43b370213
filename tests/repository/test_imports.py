"""`import tether` is cheap: it loads next to nothing, and no module of the package loads a framework until a model needs it."""

import json
import statistics
import subprocess
import sys
import time

import pytest

HEAVY = {"torch", "tensorflow", "keras", "onnxruntime", "onnx", "sklearn", "pandas", "matplotlib", "ipywidgets"}
SERVICES = {"distributed", "dask", "zarr", "numpy", "uvicorn", "starlette", "aiohttp", "cryptography"}
SECONDS = 0.3
"""What `import tether` may take; printed, since a busy machine must not fail a test."""

NEW_MODULES = """
import json, sys
before = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def _loaded_by(module: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", NEW_MODULES.format(module=module)], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_tether_loads_nothing_but_itself_and_the_standard_library():
    outside = {name.partition(".")[0] for name in _loaded_by("tether")} - set(sys.stdlib_module_names)
    assert outside == {"tether"}


def test_importing_tether_loads_three_modules_of_its_own_at_most():
    assert {name for name in _loaded_by("tether") if name.startswith("tether")} <= {"tether", "tether._version", "tether.errors"}


@pytest.mark.parametrize("module", ["tether.lab", "tether.gateway", "tether.runtimes", "tether.worker", "tether.manager", "tether.cli"])
def test_no_part_of_tether_loads_a_framework_at_import(module):
    assert {name.partition(".")[0] for name in _loaded_by(module)} & HEAVY == set()


def test_the_help_of_the_command_line_needs_no_service():
    assert {name.partition(".")[0] for name in _loaded_by("tether.cli")} & SERVICES == set()


def test_how_long_importing_tether_takes(measured):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import tether"], check=True)
        times.append(time.perf_counter() - start)
    measured(f"starting Python and `import tether`: median {statistics.median(times):.3f} s, aim {SECONDS} s")
