"""A process that has imported what all services import, and becomes each of them by forking: half of what their starts cost.

It is asked over a socket (`nursery.py`): one JSON message with the descriptors that the service is to have; it answers the service's
process id. It has one Python thread and no event loop, so that a fork of it is a process as any other. What it forks it forgets: nobody has
to reap them (SIGCHLD is ignored), and the supervisor watches them by pidfd. It ends when the supervisor's end of the socket does.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import random
import runpy
import signal
import socket
import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

import tether.worker.service  # noqa: F401  (Dask, the wire, the store: a gateway, an orchestrator and a manager need most of it, too)

_REQUEST_NBYTES: Final = 64 << 10
_DESCRIPTORS: Final = 16


def _serve(sock: socket.socket) -> bool:
    """Fork for each request. True: this is a service now; False: the supervisor is gone."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(sock, _REQUEST_NBYTES, _DESCRIPTORS)
        if not message:
            return False
        pid = os.fork()
        if not pid:
            sock.close()  # later, its number may be that of a descriptor of the service's
            request = json.loads(message)
            _become(request, dict(zip(request["descriptors"], descriptors, strict=True)))
            return True
        for descriptor in descriptors:
            os.close(descriptor)
        sock.send(str(pid).encode())


def _become(request: dict[str, Any], descriptors: Mapping[int, int]) -> None:
    """A process of its own: session, signals, descriptors, environment, name, randomness."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    above = max(descriptors) + 1
    aside = {target: fcntl.fcntl(source, fcntl.F_DUPFD, above) for target, source in descriptors.items()}
    for target, source in aside.items():
        os.dup2(source, target)
    _close_all_but({0, *descriptors})
    os.environ.update(request["environ"])
    sys.argv = ["tether", *request["arguments"]]
    with suppress(OSError):  # what `ps` shows is no reason not to start
        _show([sys.executable, "-m", *sys.argv])
    random.seed()
    np.random.seed()  # noqa: NPY002 (models of users draw from it, and two workers are not to draw the same)


def _close_all_but(kept: Collection[int]) -> None:
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (its own descriptor is gone by then)
        if int(name) not in kept:
            with suppress(OSError):
                os.close(int(name))


def _show(arguments: Collection[str]) -> None:
    """Write a command line over the one that this process was started with, as far as there is room (proc(5), arg_start)."""
    begin, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    room = end - begin - 1
    ctypes.memmove(begin, b"\0".join(each.encode() for each in arguments)[:room].ljust(end - begin, b"\0"), end - begin)


def _live() -> None:
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # numpy's BLAS, which minds forks itself
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # else the first collection in each service would write to all pages that they share
    if _serve(socket.socket(fileno=int(sys.argv[1]))):
        runpy.run_module("tether", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _live()
