"""`tether doctor`: what of this machine is ready for a lab, and what is not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

import click

from tether._version import __version__
from tether.cli.options import as_json, data_folder
from tether.cli.tables import print_json, print_table
from tether.config import GATEWAY_PORT, MANAGER_PORT, DataFolder
from tether.errors import TetherError
from tether.lab.sizes import size_text

__all__ = ["Check", "doctor"]

_NEEDED: Final = (
    "aiohttp", "blake3", "click", "cryptography", "dask", "distributed", "ml-dtypes", "msgspec", "numpy", "orjson", "platformdirs",
    "prometheus-client", "psutil", "structlog", "zarr",
)  # fmt: skip
_OPTIONAL: Final = {
    "gateway": ("uvicorn", "starlette", "httptools"),
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "swarm": ("pythonmonkey",),
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
}
"""Extra of the package → distributions; for a framework one of them is enough."""
_OLDEST: Final = (3, 11)
_LITTLE: Final = 5 << 30
"""Bytes free under which a note is made: a model of some GB is stored once and may be assembled once more."""
_TOO_LITTLE: Final = 256 << 20
_SOON: Final = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    state: Literal["ok", "note", "fail"]
    detail: str


@click.command("doctor")
@click.option("--swarm", is_flag=True, help="Enter the swarm, too, and see whether other labs can reach this one.")
@data_folder
@as_json
def doctor(data: str | None, swarm: bool, json_: bool) -> None:
    """Check this machine: libraries, ports, disk, data folder, certificates. Exits 1 if a lab could not run, or not be reached."""
    folder = DataFolder.locate(data)
    checks = [*_python(), *_libraries(), *_ports(), *_folder(folder), *_certificates(folder)]
    checks += _swarm(folder) if swarm else ()
    if json_:
        print_json({"version": __version__, "checks": [asdict(check) for check in checks]})
    else:
        print_table(("state", "check", "detail"), [(check.state, check.name, check.detail) for check in checks])
    sys.exit(1 if any(check.state == "fail" for check in checks) else 0)


def _python() -> Iterator[Check]:
    good = sys.version_info >= _OLDEST
    yield Check("python", "ok" if good else "fail", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Check("tether", "ok", __version__)


def _libraries() -> Iterator[Check]:
    for name in _NEEDED:
        found = _version(name)
        yield Check(name, "ok", found) if found else Check(name, "fail", "not installed; install Tether again with pip")
    for extra, names in _OPTIONAL.items():
        found_names = [f"{name} {version}" for name in names if (version := _version(name))]
        yield _optional(extra, found_names, complete=len(found_names) == len(names))


def _optional(extra: str, found: list[str], *, complete: bool) -> Check:
    """Any one distribution of a framework will do; the gateway, which every lab has, needs all of its own."""
    if complete or (found and extra != "gateway"):
        return Check(extra, "ok", ", ".join(found))
    return Check(extra, "fail" if extra == "gateway" else "note", f"not installed; pip install 'tether[{extra}]'")


def _version(name: str) -> str | None:
    """As the package's metadata has it: importing TensorFlow to ask takes seconds."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _ports() -> Iterator[Check]:
    holders = _listeners()
    for port in range(GATEWAY_PORT, MANAGER_PORT + 1):
        holder = holders.get(port)
        if holder is None:
            yield Check(f"port {port}", "ok", "free")
        else:
            yield Check(f"port {port}", "note", f"held by {holder}; `tether up` takes the next free one")


def _listeners() -> dict[int, str]:
    """Port → who listens there. Without rights to look at other users' processes the holder is unnamed."""
    import psutil  # 30 ms, and needed here only

    try:
        found = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):  # macOS lets only root look
        return {}
    return {each.laddr.port: _process(each.pid) for each in found if each.laddr and each.status == psutil.CONN_LISTEN}


def _process(pid: int | None) -> str:
    import psutil  # as above

    if pid is None:
        return "another user's process"
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"


def _folder(folder: DataFolder) -> Iterator[Check]:
    there = next(path for path in (folder.root, *folder.root.parents) if path.exists())
    if not os.access(there, os.W_OK) or not there.is_dir():
        yield Check("data folder", "fail", f"{folder.root} can't be written; choose another with --data or TETHER_HOME")
    else:
        yield Check("data folder", "ok", str(folder.root) if there == folder.root else f"{folder.root} (will be made)")
    free = shutil.disk_usage(there).free
    state: Literal["ok", "note", "fail"] = "fail" if free < _TOO_LITTLE else "note" if free < _LITTLE else "ok"
    yield Check("disk", state, f"{size_text(free)} free")


def _certificates(folder: DataFolder) -> Iterator[Check]:
    for path in sorted(folder.tls.glob("*.pem")):
        if not path.stem.endswith("-key"):
            yield _certificate(path)


def _swarm(folder: DataFolder) -> Iterator[Check]:
    """As the manager of this data folder finds it; one is started where none runs."""
    from tether.cli.options import run
    from tether.client.own_manager import OwnManager  # what speaks with managers is not for `--help`

    async def ask() -> dict[str, str]:
        own = OwnManager(folder)
        try:
            return dict(await own.ask("reachability"))
        finally:
            await own.aclose()

    try:
        found = run(ask())
        yield Check("swarm", _STATES[found["state"]], f"{found['address']}: {found['detail']}")
    except TetherError as error:
        yield Check("swarm", "fail", str(error))


_STATES: Final[dict[str, Literal["ok", "note", "fail"]]] = {"ok": "ok", "note": "note", "fail": "fail"}


def _certificate(path: Path) -> Check:
    from cryptography import x509  # 50 ms, and needed here only

    name = f"certificate {path.stem}"
    try:
        left = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp() - time.time()
    except (OSError, ValueError) as error:
        return Check(name, "fail", f"{path} can't be read: {error}")
    if left <= 0:
        return Check(
            name, "fail", f"{path} has expired; delete the folder {path.parent} to have new ones made, and start all services again"
        )
    return Check(name, "note" if left < _SOON else "ok", f"valid for {int(left // 86400)} days")
