"""The tests of our zarr stores once more, with the newest zarr, which needs a newer Python: in an environment of their own, made once."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = (
    "zarr_newest_checks",
    "test_zarr_conformance",
    "test_zarr_stateful",
    "test_zarr_elsewhere",
    "test_version_store",
    "test_draft_store",
)
NEWEST = (3, 12)
"""What zarr ≥ 3.2 asks for."""
WANTED = ("zarr>=3.4", "pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "tensorstore", "xarray")
USABLE = f"import sys, venv, ensurepip; sys.exit(sys.version_info < {NEWEST})"
CLEAN = {
    name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "TETHER_REQUIRE"} and not name.startswith("PYTHON")
}


def newer_python():
    """A Python that runs, is new enough and can make environments: this one, one on the path, one of pyenv's."""
    names = [f"python3.{minor}" for minor in range(19, NEWEST[1] - 1, -1)]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [
        sys.executable,
        *filter(None, map(shutil.which, names)),
        *sorted(map(str, pyenv.glob("3.1[2-9]*/bin/python")), reverse=True),
    ]
    for python in candidates:
        if subprocess.run([python, "-c", USABLE], capture_output=True, check=False, env=CLEAN).returncode == 0:
            return python
    return None


PYTHON = newer_python()
MISSING = "needs python3.12: apt install python3.12-venv, or pyenv install 3.12"


def environment(folder: Path) -> Path:
    """The environment's Python; made again when Python or what is asked for changes."""
    pins = (ROOT / "constraints.txt").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    made_of = hashlib.sha256(pins + repr((PYTHON, ROOT, WANTED)).encode()).hexdigest()
    mark, python = folder / "made-of", folder / "venv" / "bin" / "python"
    if not mark.exists() or mark.read_text() != made_of:
        mark.unlink(missing_ok=True)
        run(str(PYTHON), "-m", "venv", "--clear", str(folder / "venv"))
        pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt")
        run(*pip, "pip")
        run(*pip, "--build-constraint", "constraints.txt", "-e", ".", *WANTED)
        mark.write_text(made_of)
    return python


def run(*command: str) -> str:
    ended = subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True, check=False, timeout=280)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None and os.environ.get("TETHER_REQUIRE") != "all", reason=MISSING)
@pytest.mark.timeout(600)
def test_the_newest_zarr_finds_no_difference_either(request):
    assert PYTHON is not None, MISSING
    python = environment(request.config.cache.mkdir("zarr-newest"))
    files = [f"tests/store/{name}.py" for name in TESTS]
    assert " passed" in run(str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
