"""Who has a data folder: whether a process holds the lock on a file, looked at without holding it longer than that takes."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

__all__ = ["TAKEN", "is_locked"]

TAKEN: Final = os.EX_TEMPFAIL
"""Exit code of a manager that was to be alone: another one has the data folder, and answers in its place."""


def is_locked(path: Path) -> bool:
    """Whether somebody holds it exclusively now. Nobody holds what is not there."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
