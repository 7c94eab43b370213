"""A disposable process with limits: one function, JSON in, JSON out."""

from tether.sandbox.process import Limits, arun, run

__all__ = ["Limits", "arun", "run"]
