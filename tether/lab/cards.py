"""The graphics cards of this machine, and which worker gets which."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tether.config import CARDS_ENV, has_cards
from tether.errors import ConfigError

__all__ = ["check_cards", "gpu_count", "machine_cards", "share", "worker_counts"]


def machine_cards() -> list[str]:
    """Of the cards of this machine those that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    there = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    visible = os.environ.get(CARDS_ENV)
    if visible is None or not there:
        return there
    return [name.strip() for name in visible.split(",")] if has_cards() else []


def gpu_count(wished: int | Literal["auto"]) -> int:
    """As many GPUs as this process may use for "auto", else the number itself.

    Raises: ConfigError: it is neither.
    """
    if wished == "auto":
        return len(machine_cards())
    if not isinstance(wished, int) or wished < 0:
        raise ConfigError(f"{wished!r} GPUs: give a number from 0 on, or auto for all of this machine")
    return wished


def worker_counts(wished: int | tuple[int, int] | None, gpus: int) -> tuple[int, int | None]:
    """The fewest and the most, None where they are the same; of nothing: two, or one for each GPU where there are more."""
    if isinstance(wished, tuple):
        return wished
    return max(2, gpus) if wished is None else wished, None


def check_cards(gpus: int, workers: int) -> None:
    """Raises: ConfigError: there are not so many, or some worker would have more than the one that it uses."""
    there = len(machine_cards())
    if gpus > there:
        has = f"this machine has {there} that this process may use" if there else "this machine has no NVIDIA driver"
        raise ConfigError(f"{gpus} GPUs were asked for, {has}; --pretend-gpus gives the tag without a card")
    if gpus > workers:
        raise ConfigError(f"{gpus} GPUs and {workers} workers: a worker uses one GPU, so give at least --workers {gpus}")


def share(things: Sequence[str], index: int, of: int) -> list[str]:
    """What the worker of this index gets of things that are dealt round; the first gets the first.

    >>> [share(["a", "b", "c"], index, 2) for index in range(2)]
    [['a', 'c'], ['b']]
    """
    return list(things[index::of])
