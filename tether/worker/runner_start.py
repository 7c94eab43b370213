"""How the process of a model begins: confined before anything is imported that starts a thread.

Landlock holds for the thread that asks for it and for those that it starts. numpy starts threads when it is imported, and a model can have
any thread of its process run its code. Started by `python -m`, never by fork: the worker has threads, too.
"""

from __future__ import annotations

import json
import sys
from typing import NoReturn

from tether.sandbox.confinement import Confinement, confine

__all__ = ["main"]


def main(arguments: list[str]) -> NoReturn:
    """`python -m tether.worker.runner_start CONFINEMENT PARENT SOCKET IN OUT`: descriptors, inherited."""
    confine(Confinement(**json.loads(arguments[0])))
    parent, *fds = map(int, arguments[1:])
    from tether.worker.runner_server import main as serve

    serve(parent, fds)


if __name__ == "__main__":
    main(sys.argv[1:])
