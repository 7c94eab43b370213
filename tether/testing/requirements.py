"""What a test needs of the machine: said once on the test, told with how to install it where it is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

__all__ = ["needs", "why_missing"]

_PROGRAMS = {
    "chromium": (("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"), "apt install chromium"),
    "node": (("node", "nodejs"), "apt install nodejs"),
    "npm": (("npm",), "apt install npm"),
    "redis-server": (("redis-server",), "apt install redis-server"),
    "strace": (("strace",), "apt install strace"),
}
"""Names under which a program may be found, and how to get it."""
_EXTRAS = {"onnxruntime": "tether[onnx]", "torch": "tether[torch]", "tensorflow": "tether[tensorflow]", "keras": "tether[tensorflow]"}
"""Python modules whose requirement is not their own name."""
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}


def needs(name: str) -> pytest.MarkDecorator:
    """A mark for a test, class or module (`pytestmark`) that needs a Python module or a program.

    Missing, the test is skipped and says how to install it; under `TETHER_REQUIRE=all` it runs, and fails.
    """
    reason = why_missing(name)
    return pytest.mark.skipif(reason is not None and os.environ.get("TETHER_REQUIRE") != "all", reason=reason or f"needs {name}")


def why_missing(name: str) -> str | None:
    """None if it is there, else what is missing and how to install it."""
    if name in _PROGRAMS:
        names, how = _PROGRAMS[name]
        return None if any(map(shutil.which, names)) else f"needs {name}: {how}"
    if importlib.util.find_spec(name.partition(".")[0]) is not None:
        return None
    wanted = _EXTRAS.get(name) or _DISTRIBUTIONS.get(name, name)
    return f"needs {name}: pip install '{wanted}'"
