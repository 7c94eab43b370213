"""The one JavaScript interpreter of this process: whose it is, and the bundle in it. The only importer of pythonmonkey.

It belongs to the thread that loads it, which must be the main one (elsewhere the process crashes at its exit), for as long as the process
lives.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tether.errors import EngineMisusedError, MissingDependencyError
from tether.swarm.engine.host import Functions, Host

__all__ = ["check_installed", "check_owner", "collect", "the_host"]

_BUNDLE = Path(__file__).parents[1] / "js" / "bundle.js"
_NO_BUNDLE = (
    "The swarm's JavaScript was not built when Tether was installed (npm's registry was out of reach). Install Tether again with a "
    "network, or run `python hatch_build.py` in its checkout. Everything but the swarm works."
)
_NO_MONKEY = "The swarm needs PythonMonkey: pip install 'tether[swarm]'. Everything but the swarm works."

_host: Host | None = None
_owner: tuple[int, int] | None = None
"""Process and thread of the interpreter."""


def the_host() -> Host:
    """Of this process, which is loaded at the first call. Raises: EngineMisusedError, MissingDependencyError."""
    global _host, _owner  # noqa: PLW0603 (one interpreter for each process: PythonMonkey's rule)
    check_owner()
    if _host is None:
        if threading.current_thread() is not threading.main_thread():
            raise EngineMisusedError("The swarm's engine must be started on the main thread: elsewhere the process crashes at its exit.")
        _owner = os.getpid(), threading.get_ident()
        _host = Host(_evaluate)
    return _host


def check_owner() -> None:
    """Raises: EngineMisusedError: in another thread, or after a fork."""
    if _owner is None or _owner == (os.getpid(), threading.get_ident()):
        return
    if _owner[0] != os.getpid():
        raise EngineMisusedError("The swarm's engine does not survive a fork: start the process by spawn, or exec, and start it there.")
    raise EngineMisusedError("The swarm's engine belongs to the main thread: hand the work to its event loop.")


def _evaluate(functions: Functions) -> tuple[Mapping[str, Callable[[], None]], list[str]]:
    source = _read_bundle()
    monkey = _import_pythonmonkey()
    javascript = monkey.globalThis
    javascript.tetherHost = functions
    monkey.eval(source, {"filename": _BUNDLE.name})
    # Each read of a property makes a new proxy: once, and kept.
    entries = javascript.tetherEntries
    names = str(javascript.tetherNames).split()
    return {name: entries[name] for name in names}, str(javascript.tetherMethods).split()


def collect() -> None:
    """Give back what JavaScript holds no more. Only where a node runs."""
    import pythonmonkey  # loaded, since a node runs

    pythonmonkey.collect()


def check_installed() -> None:
    """Whether an engine could start here; nothing is loaded for it. Raises: MissingDependencyError."""
    if not _BUNDLE.is_file():
        raise MissingDependencyError(_NO_BUNDLE)
    if find_spec("pythonmonkey") is None:
        raise MissingDependencyError(_NO_MONKEY)


def _read_bundle() -> str:
    try:
        return _BUNDLE.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingDependencyError(_NO_BUNDLE) from None


def _import_pythonmonkey() -> Any:
    if "pythonmonkey" in sys.modules:
        raise EngineMisusedError("PythonMonkey was imported in this process before the swarm's engine, which must be its owner.")
    try:
        import pythonmonkey  # loads SpiderMonkey: 40 MB, a second
    except ImportError as error:
        raise MissingDependencyError(f"{_NO_MONKEY} ({error})") from error
    return pythonmonkey
