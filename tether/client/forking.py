"""What a fork copies of an event loop and its connections: the copy must never be closed, not even by the interpreter's end."""

from __future__ import annotations

import ctypes

__all__ = ["abandon"]


def abandon(thing: object) -> None:
    """Let nothing finalise it any more in this process.

    Closing a copied connection or loop takes the descriptor out of the epoll that the child shares with its parent, whose calls would then
    hang. A list in a module does not help: the interpreter's end empties modules.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
