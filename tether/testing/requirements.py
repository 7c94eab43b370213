"""What a test needs of the machine: said once on the test, told with how to install it where it is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

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
_MOUNTS = "mounts"
"""File systems of one's own on loop devices: what a test needs that cuts the power or fills the disk."""
_MOUNTING = ("mkfs.ext4", "e2fsck", "unshare", "mount")
_NO_RIGHT = "needs the right to mount: root, outside of a container or in a privileged one"
_CAP_SYS_ADMIN = 1 << 21
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}


def needs(name: str) -> pytest.MarkDecorator:
    """A mark for a test, class or module (`pytestmark`) that needs a Python module, a program, or (`mounts`) the right to mount.

    Missing, the test is skipped and says how to install it; under `TETHER_REQUIRE=all` it runs, and fails. The right to mount can't be
    installed: without it the test is skipped in any case, and says so.
    """
    reason = why_missing(name)
    skipped = reason is not None and (os.environ.get("TETHER_REQUIRE") != "all" or reason == _NO_RIGHT)
    return pytest.mark.skipif(skipped, reason=reason or f"needs {name}")


def why_missing(name: str) -> str | None:
    """None if it is there, else what is missing and how to install it."""
    if name in _PROGRAMS:
        names, how = _PROGRAMS[name]
        return None if any(map(shutil.which, names)) else f"needs {name}: {how}"
    if name == _MOUNTS:
        return (
            _NO_RIGHT
            if not _may_mount()
            else None
            if all(map(shutil.which, _MOUNTING))
            else "needs mkfs.ext4: apt install e2fsprogs util-linux"
        )
    if importlib.util.find_spec(name.partition(".")[0]) is not None:
        return None
    wanted = _EXTRAS.get(name) or _DISTRIBUTIONS.get(name, name)
    return f"needs {name}: pip install '{wanted}'"


def _may_mount() -> bool:
    """Never asks for it: a suite does not become root."""
    status = Path("/proc/self/status")
    if not status.exists() or not Path("/dev/loop-control").exists():
        return False
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read_text(encoding="ascii"), re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) & _CAP_SYS_ADMIN)
