"""Tether: serve models from notebooks, on the machines that researchers already have.

    import tether
    lab = tether.up()
    lab.publish("digits", "digits.onnx", example=x)
    lab.infer("digits", images)

Importing this loads nothing else: names are looked up when they are used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tether._version import __version__

if TYPE_CHECKING:
    from tether import errors
    from tether.errors import TetherError
    from tether.lab.lab import Lab, connect, up
    from tether.types import ModelRef

__all__ = ["Lab", "ModelRef", "TetherError", "__version__", "connect", "errors", "up"]

_HOMES = {
    "Lab": "tether.lab.lab",
    "ModelRef": "tether.types",
    "TetherError": "tether.errors",
    "connect": "tether.lab.lab",
    "up": "tether.lab.lab",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("tether.errors")
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    raise AttributeError(f"module 'tether' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
