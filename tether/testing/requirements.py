"""What a test needs of the machine: said once on the test, told with how to install it where it is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

__all__ = ["needs", "why_missing"]

_PROGRAMS = {
    "chromium": (("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"), "apt install chromium"),
    "ip": (("ip",), "apt install iproute2"),
    "nft": (("nft",), "apt install nftables"),
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
_NAMESPACES = "namespaces"
"""User namespaces in which one may mount: a full disk of one's own without being root."""
_NO_NAMESPACES = (
    "needs user namespaces with mounts: this system forbids them (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces)"
)
_NO_RIGHT = "needs the right to mount: root, outside of a container or in a privileged one"
_CAP_SYS_ADMIN = 1 << 21
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}


def needs(name: str) -> pytest.MarkDecorator:
    """A mark for a test, class or module (`pytestmark`) that needs a Python module, a program, or a right (`mounts`, `namespaces`).

    Missing, the test is skipped and says how to install it; under `TETHER_REQUIRE=all` it runs, and fails. A right can't be
    installed: without it the test is skipped in any case, and says so.
    """
    reason = why_missing(name)
    skipped = reason is not None and (os.environ.get("TETHER_REQUIRE") != "all" or reason in {_NO_RIGHT, _NO_NAMESPACES})
    return pytest.mark.skipif(skipped, reason=reason or f"needs {name}")


def why_missing(name: str) -> str | None:
    """None if it is there, else what is missing and how to install it."""
    if name in _PROGRAMS:
        names, how = _PROGRAMS[name]
        return None if any(map(shutil.which, names)) else f"needs {name}: {how}"
    if name == _MOUNTS:
        return _why_no_mounts()
    if name == _NAMESPACES:
        return _why_no_namespaces()
    if importlib.util.find_spec(name.partition(".")[0]) is not None:
        return None
    wanted = _EXTRAS.get(name) or _DISTRIBUTIONS.get(name, name)
    return f"needs {name}: pip install '{wanted}'"


def _why_no_mounts() -> str | None:
    if not _may_mount():
        return _NO_RIGHT
    return None if all(map(shutil.which, _MOUNTING)) else "needs mkfs.ext4: apt install e2fsprogs util-linux"


@cache
def _why_no_namespaces() -> str | None:
    if shutil.which("unshare") is None:
        return "needs unshare: apt install util-linux"
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, check=False, timeout=30)
    return _NO_NAMESPACES if tried.returncode else None


def _may_mount() -> bool:
    """Never asks for it: a suite does not become root."""
    status = Path("/proc/self/status")
    if not status.exists() or not Path("/dev/loop-control").exists():
        return False
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read_text(encoding="ascii"), re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) & _CAP_SYS_ADMIN)
