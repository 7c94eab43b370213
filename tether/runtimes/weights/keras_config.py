"""Pure: whether a Keras model's configuration names only what Keras itself has, and nothing of it that runs code or opens files.

A configuration is a program for Keras' deserializer: it names classes by module, and some classes carry code (Lambda: bytecode;
TorchModuleWrapper: a pickle) or open paths. Keras has had a bypass a release (CVE-2025-1550, -8747, -9905, -9906, -12058, -49655), so the
configuration is judged before Keras sees it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from tether.errors import BadModelError, HostileModelError

__all__ = ["MAX_NBYTES", "check_config"]

MAX_NBYTES = 64 << 20
"""As for all metadata; the configuration of the largest models has a few MB."""
_MAX_VALUES = 4_000_000
_AREAS = frozenset({
    "activations", "constraints", "dtype_policies", "initializers", "layers", "losses", "metrics", "models", "ops", "optimizers",
    "quantizers", "random", "regularizers", "tree",
})  # fmt: skip
"""Parts of Keras whose classes models are made of; not its `utils`, `saving` and `config`, which fetch files and switch its checks off."""
_TOP = frozenset({
    "DTypePolicy", "FloatDTypePolicy", "Function", "Functional", "Initializer", "KerasTensor", "Layer", "Loss", "Metric", "Model",
    "Operation", "Optimizer", "Quantizer", "Regularizer", "Sequential", "Variable",
})  # fmt: skip
_CODE = frozenset({
    "Lambda", "__lambda__", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer", "enable_unsafe_deserialization", "get_file",
})  # fmt: skip
"""Classes and functions that hold or load code, or take files from elsewhere."""
_SPECIAL = frozenset({
    "__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__",
})  # fmt: skip
"""Values that JSON lacks."""
_PATHS = ("vocabulary", "idf_weights", "filepath")
"""Settings that may be lists; as strings they are paths that Keras would read."""


def check_config(data: bytes | str, label: str) -> None:
    """Refuse a configuration (JSON) that needs code. `label` begins each message.

    Raises: HostileModelError: a class that carries code, a path to read, a module of Python's; BadModelError: a class of others, no JSON.
    """
    if len(data) > MAX_NBYTES:
        raise BadModelError(f"{label}: its configuration has {len(data)} bytes; at most {MAX_NBYTES} are read")
    try:
        config = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadModelError(f"{label}: its configuration is not valid JSON ({error}): save the model again") from None
    for value in _dicts(config, label):
        _check(value, label)


def _dicts(config: Any, label: str) -> Iterator[dict[str, Any]]:
    waiting = [config]
    for _ in range(_MAX_VALUES):
        if not waiting:
            return
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and value.startswith("{") and "class_name" in value:
            raise HostileModelError(f"{label}: its configuration has another one hidden in a text, so it is refused")
    raise HostileModelError(f"{label}: its configuration has more than {_MAX_VALUES} values")


def _check(value: dict[str, Any], label: str) -> None:
    for name in _PATHS:
        if isinstance(value.get(name), str):
            raise HostileModelError(
                f"{label}: its configuration reads the file {value[name][:200]!r} ({name}): save the model with its vocabulary in it"
            )
    if "class_name" not in value:
        return
    kind, module, registered = value["class_name"], value.get("module"), value.get("registered_name")
    if not isinstance(kind, str) or not isinstance(module, str | None) or not isinstance(registered, str | None):
        raise BadModelError(f"{label}: its configuration names a class by something that is no text: save the model again")
    if not _CODE.isdisjoint((kind, registered, value.get("config") if isinstance(value.get("config"), str) else "")):
        raise HostileModelError(
            f"{label}: its configuration has a {kind[:80]}, which carries code or loads it: replace it by layers of Keras, "
            "or publish a custom model (model.py)"
        )
    if kind.startswith("__") and kind not in _SPECIAL:
        raise HostileModelError(
            f"{label}: its configuration has a {kind[:80]!r}, which Keras does not write for models: save the model again"
        )
    if registered not in {None, kind, value.get("config") if kind == "function" else None, "function" if kind == "function" else None}:
        raise _foreign(f"{registered[:80]}", label)
    if module is not None and not _is_keras(module, kind, value.get("config")):
        name = f"{module[:80]}.{kind[:80]}"
        if module.partition(".")[0] in sys.stdlib_module_names or module.partition(".")[0] == "keras":
            raise HostileModelError(f"{label}: its configuration has {name!r}, which is no part of a model, so it is refused")
        raise _foreign(name, label)


def _is_keras(module: str, kind: str, config: Any) -> bool:
    """Of Keras, and of what models are made of. A function is named by `config`; Keras looks it up among its activations and the like."""
    if kind == "function" and module == "builtins":
        return isinstance(config, str) and config.isidentifier() and not config.startswith("_")
    parts = module.split(".")
    if parts[0] != "keras":
        return False
    inner = parts[2:] if parts[1:2] == ["src"] else parts[1:]
    if not inner:
        return kind in _TOP
    return inner[0] in _AREAS


def _foreign(name: str, label: str) -> BadModelError:
    return BadModelError(
        f"{label}: its configuration needs the class {name!r}, which is not Keras' own: save it as a SavedModel "
        "(model.export), or publish a custom model (model.py)"
    )
