"""A bar for people who wait for a replica: a widget in a notebook, text in a terminal, nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tether.lab.replicating import OnReplica, Replica

__all__ = ["bar"]


@contextmanager
def bar(name: str) -> Iterator[OnReplica | None]:
    """What is to be told how far it is; None: nobody looks."""
    if not _is_watched():
        yield None
        return
    from tqdm.auto import tqdm  # 0.1 s, with the widgets in a notebook

    shown = tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def tell(state: Replica) -> None:
        shown.total = max(state.nbytes, state.done_nbytes) or None
        shown.update(state.done_nbytes - shown.n)

    try:
        yield tell
    finally:
        shown.close()


def _is_watched() -> bool:
    """A terminal, or a notebook's kernel: a library that imported IPython is neither."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return hasattr(shell, "kernel") or sys.stderr.isatty()
