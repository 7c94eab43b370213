"""Which runtime a model belongs to: recognise, inspect, load. Imports nothing heavy; each runtime imports its library when it needs it."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from tether.errors import MissingDependencyError, NoModelFileError, UnknownFrameworkError
from tether.types import ModelFormat, ModelInfo

if TYPE_CHECKING:
    from tether.ports import LoadedModel, Runtime
    from tether.runtimes.arrivals import Arrivals
    from tether.runtimes.signatures import Signature

__all__ = ["DATA_FORMATS", "FORMATS", "FRAMEWORKS", "inspect", "load", "load_arriving", "recognise", "runtime_for", "warm"]

FRAMEWORKS = ("custom", "onnx", "torch", "tensorflow")
"""In the order of recognition: a folder's `model.py` decides, since it may load any other file beside it."""
FORMATS = (
    "an .onnx file (or a folder with one), a .pt2 file (torch.export.save), TorchScript (.pt, .pts), "
    "a TensorFlow SavedModel folder, a .keras file, a folder with model.py or one .py file"
)
DATA_FORMATS: frozenset[ModelFormat] = frozenset({"onnx"})
"""What can be loaded without running anything that its author wrote: from anyone, then. All others are code (DESIGN.md §3)."""
_CLASSES = {"custom": "CustomRuntime", "onnx": "OnnxRuntime", "tensorflow": "TensorFlowRuntime", "torch": "TorchRuntime"}


def runtime_for(framework: str) -> Runtime:
    """The runtime of a framework.

    Raises: UnknownFrameworkError: none of ours.
    """
    if framework not in _CLASSES:
        raise UnknownFrameworkError(f"framework {framework[:40]!r}: use one of {', '.join(sorted(_CLASSES))}")
    runtime: Runtime = getattr(importlib.import_module(f"tether.runtimes.{framework}"), _CLASSES[framework])()
    return runtime


def recognise(path: Path, framework: str | None = None) -> tuple[Runtime, ModelFormat]:
    """The runtime and format of a model's file or folder, by names and first bytes.

    Raises:
        UnknownFrameworkError: `framework` is none of ours, or does not fit the files; or no framework does.
        NoModelFileError: the path is missing, empty, or a folder with nothing in it.
    """
    _check_there(path)
    wanted = FRAMEWORKS if framework is None else (framework,)
    for runtime in map(runtime_for, wanted):
        found = runtime.recognise(path)
        if found:
            return runtime, found
    what = "no model that Tether knows" if framework is None else f"no model of framework {framework!r}"
    raise UnknownFrameworkError(f"{path.name}: {what}; publish {FORMATS}")


def inspect(path: Path, framework: str | None = None, hints: Signature | None = None) -> ModelInfo:
    """The metadata of a model. It may run the model's code: call it through `tether.sandbox` for files of others.

    `hints` says what a format does not (TorchScript's shapes, a custom class without specs); else `.tether/signature.json` in the
    model's folder does.

    Raises: as `recognise`; BadModelError, MissingDependencyError; BadInputError: the format needs hints and there are none.
    """
    from tether.runtimes.signatures import folder_signature, hinted  # here, so that `import tether.runtimes` stays free of numpy

    runtime, _ = recognise(path, framework)
    return hinted(runtime, path, hints or folder_signature(path))


def load(path: Path, info: ModelInfo, threads: int = 1) -> LoadedModel:
    """Bring a model into the memory of this process. Code formats belong in `tether.worker.runner` instead.

    Raises: BadModelError, MissingDependencyError, NoModelFileError.
    """
    _check_there(path)
    return runtime_for(info.framework).load(path, info, threads)


def load_arriving(path: Path, info: ModelInfo, threads: int, arrivals: Arrivals) -> LoadedModel:
    """As `load`, of files that are still coming and will lie in `path`: the library is imported meanwhile.

    A runtime that knows better what to do before they are whole has a `load_arriving` of its own. Raises: what `arrivals` raises besides.
    """
    own = getattr(runtime_for(info.framework), "load_arriving", None)
    if own is not None:
        loaded: LoadedModel = own(path, info, threads, arrivals)
        return loaded
    warm(info.framework)
    arrivals.wait_whole()
    return load(path, info, threads)


def warm(framework: str) -> None:
    """Import the framework's library, and what it imports late; where it is missing nothing happens, since `load` says so."""
    warm_up = getattr(runtime_for(framework), "warm", None)
    if warm_up is not None:
        with contextlib.suppress(MissingDependencyError):
            warm_up()


def _check_there(path: Path) -> None:
    if not path.exists():
        raise NoModelFileError(f"{path}: there is no such file or folder; publish {FORMATS}")
    if path.is_dir():
        if not any(path.iterdir()):
            raise NoModelFileError(f"{path.name}: the folder is empty; publish {FORMATS}")
    elif path.stat().st_size == 0:
        raise NoModelFileError(f"{path.name}: the file is empty; publish {FORMATS}")
