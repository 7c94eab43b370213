"""What the runtimes of this process may run on: its cores, its graphics cards, ONNX Runtime's execution providers.

Said by environment variables, since a worker's runners have to be told as well. The sandbox passes none of them on: what is published is
looked at on the CPU, wherever it will run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tether.config import CARDS_ENV, has_cards
from tether.errors import ConfigError

__all__ = [
    "Provider",
    "check_providers",
    "hide_cards",
    "onnx_providers",
    "torch_compiler",
    "use_providers",
    "use_torch_compiler",
]

_PROVIDERS_ENV = "TETHER_ONNX_PROVIDERS"
_COMPILER_ENV = "TETHER_TORCH_COMPILE"
_CARDS = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"

Provider = tuple[str, dict[str, str]]
"""Of ONNX Runtime: its name, and its options."""


def hide_cards() -> None:
    """Let this process, and those that it starts, use none. Before any library has looked for them."""
    os.environ[CARDS_ENV] = ""


def use_providers(configured: object, available: Sequence[str]) -> None:
    """Let ONNX models of this process, and of those that it starts, run on these: `check_providers`, remembered.

    Raises: ConfigError.
    """
    os.environ[_PROVIDERS_ENV] = json.dumps(check_providers(configured, available))


def check_providers(configured: object, available: Sequence[str]) -> list[Provider]:
    """Names, or pairs of name and options, the best first; ONNX Runtime takes the next for what one can't do, and the CPU in the end.

    >>> check_providers(["OpenVINO", ["CUDA", {"device_id": 1}]], ["CUDAExecutionProvider", "OpenVINOExecutionProvider"])
    [('OpenVINOExecutionProvider', {}), ('CUDAExecutionProvider', {'device_id': '1'})]

    Raises: ConfigError: something else; one that the installed ONNX Runtime lacks.
    """
    wanted = [configured] if isinstance(configured, str) else configured
    if not isinstance(wanted, Sequence) or not wanted:
        raise ConfigError(f"tether.onnx.providers is {configured!r}: give a list of names, such as [OpenVINO, CPU], or of [name, options]")
    return [_provider(each, available) for each in wanted]


def _provider(given: object, available: Sequence[str]) -> Provider:
    name, options = given if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2 else (given, {})  # noqa: PLR2004 (a pair)
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise ConfigError(f"tether.onnx.providers: {given!r} is neither a name nor [name, options]")
    full = name if name.endswith("ExecutionProvider") else f"{name}ExecutionProvider"
    if full not in available:
        raise ConfigError(
            f"tether.onnx.providers: {name!r} is not in the installed ONNX Runtime, which has {', '.join(available)}; "
            "install the package that brings it (onnxruntime-gpu, onnxruntime-openvino, …) instead of onnxruntime"
        )
    return full, {str(key): str(value) for key, value in options.items()}


def onnx_providers(available: Sequence[str]) -> list[Any]:
    """In ONNX Runtime's own form: as configured, else the cards where there are some and they may be used; the CPU in the end."""
    configured: list[Provider] = [(name, options) for name, options in json.loads(os.environ.get(_PROVIDERS_ENV, "[]"))]
    if not configured and has_cards() and _CARDS in available:
        configured = [(_CARDS, {})]
    return [*(each for each in configured if each[0] != _CPU), _CPU]


def use_torch_compiler(backend: object) -> None:
    """Let `.pt2` models of this process, and of those that it starts, be compiled by this backend of `torch.compile` ("inductor").

    Raises: ConfigError: it is no name.
    """
    if not isinstance(backend, str) or not backend:
        raise ConfigError(f'tether.torch.compile is {backend!r}: give the name of a backend of torch.compile, such as "inductor"')
    os.environ[_COMPILER_ENV] = backend


def torch_compiler() -> str | None:
    """The backend; None: models run as they were exported."""
    return os.environ.get(_COMPILER_ENV)
