"""Pure: what becomes of a request with which the model's process died. What gateways remember of it: `routing.quarantine`."""

from __future__ import annotations

from tether.errors import ModelDiedError, PoisonInputError
from tether.routing.quarantine import LIVES

__all__ = ["deaths_by", "judged", "runs_again"]

_TRIES = 5
"""Runs of one request in which something outside ended the model's process: memory that others took, an operator. More is no accident."""


def deaths_by(error: Exception, *, is_suspect: bool) -> int:
    """How many of its lives that cost a request that was there. A suspect ended two workers before, as far as its gateway knows."""
    if not isinstance(error, ModelDiedError) or not error.args[1]:
        return 0
    return LIVES if is_suspect else 1


def runs_again(error: Exception, deaths: int, tries: int, *, is_pure: bool) -> bool:
    """Whether a request that failed alone is run once more; `tries`: how often it was."""
    return isinstance(error, ModelDiedError) and is_pure and deaths < LIVES and tries < _TRIES


def judged(error: Exception, deaths: int) -> Exception:
    """What a request is told that failed alone and does not run again."""
    if deaths < LIVES or not deaths_by(error, is_suspect=False):
        return error
    return PoisonInputError(f"{error}; it did so before, so this input is not run again: change it, or mend the model and publish that")
