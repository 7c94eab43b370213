"""Sessions of ONNX Runtime: of a large model at once, its weights mapped from their file, and while that one answers the one for good.

What takes long about a session are its weights: the file is parsed whole, each weight is copied, and copied again in the order that its
kernel likes (prepacking). Over the outline of the model and without prepacking 1 GiB is ready in 0.05 s instead of 3 s and more, answers
single rows as fast, batches at a third of the speed. So that is how a large model begins. From its second run on the prepacked session is
made in the background, and takes over between two runs. A model that is run once, as in the self-test of a publish, is never prepacked.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from tether.errors import BadModelError
from tether.runtimes import tensors
from tether.runtimes.devices import onnx_providers
from tether.runtimes.onnx_outline import outline

__all__ = ["LARGE", "Opened", "Prepacking", "open_session", "said"]

log = structlog.get_logger("tether.runtimes")
LARGE = 32 << 20
"""Bytes of a model from which on it is worth two sessions: below, the prepacked one is ready in 0.05 s."""
_FATAL = 4
"""ONNX Runtime's log severity: what it has to say of a model comes as an exception, its warnings would land in notebooks."""
_NICE = 10
"""Of the thread that prepacks. Not the lowest: on a busy machine it would get a sixtieth of a core, and there it is needed most."""
_CANCELLED_SECONDS = 5.0
"""For a session in the making to notice that nobody wants it: 0.05 s between weights, 1.3 s where 250 MiB of convolutions are laid out."""
_FAILED = "prepacking failed, the model answers on without it: batches take longer"
_one_at_a_time = threading.Lock()
"""Of this process: prepacking takes a core, and as much memory as the model."""


class Opened(NamedTuple):
    """A session that answers, and what will make the better one."""

    session: Any
    prepacking: Prepacking | None
    """None: it is prepacked already."""


@dataclass(frozen=True, slots=True)
class _Mapped:
    """What a session over mapped weights is made of."""

    name: str
    model: bytes | str
    """The outline; the path of a model all of whose weights lie in other files, which ONNX Runtime maps by itself."""
    folder: str
    threads: int


def open_session(path: Path, others: Sequence[Path], threads: int) -> Opened:
    """`others`: the files of its external data. All files have to stay as they are until the session is gone: they may be mapped.

    Raises: BadModelError, MissingDependencyError.
    """
    mapped = _mapped(path, others, threads)
    if mapped is not None:
        # Whatever is wrong with the file is said by the session below, which reads it as its author meant it to be read.
        with contextlib.suppress(Exception):
            return Opened(_quick_session(mapped), Prepacking(mapped))
    options, providers = _options(threads), _providers()
    try:
        return Opened(_library().InferenceSession(str(path), options, providers=providers), None)
    except Exception as error:
        hint = "; it needs more memory than it may use" if "bad_alloc" in str(error) else ""
        raise BadModelError(f"{path.name} can't be loaded by ONNX Runtime: {said(error)}{hint}") from error


def said(error: Exception) -> str:
    """Without `[ONNXRuntimeError] : 7 : `."""
    return tensors.first_line(error).removeprefix("[ONNXRuntimeError] : ").partition(" : ")[2] or tensors.first_line(error)


class Prepacking:
    """Makes the prepacked session of a model on a thread of its own. One thread calls the methods."""

    def __init__(self, mapped: _Mapped) -> None:
        self._mapped = mapped
        self._options = _options(mapped.threads)
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_turn = False
        self._is_cancelled = False
        self._session: Any = None
        self._runs = 0

    def ready(self) -> Any:
        """The session, once it is there: the caller's from then on. None: not yet."""
        with self._guard:
            session, self._session = self._session, None
        return session

    def used(self) -> None:
        """The model is about to be run; when it is for the second time the work begins."""
        self._runs += 1
        if self._runs != 2:  # noqa: PLR2004
            return
        # No daemon: Python would end it inside of ONNX Runtime at exit, and that ends the process by SIGABRT.
        thread = threading.Thread(target=self._work, name=f"prepack-{self._mapped.name}")
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left
            log.warning(_FAILED, error=str(error))
            return
        self._thread = thread

    def cancel(self) -> None:
        """Nobody wants it any more. Waits until its memory is given back."""
        with self._guard:
            self._is_cancelled, waits = True, self._has_turn
        self._options.set_load_cancellation_flag(True)
        if self._thread is not None and waits:
            self._thread.join(_CANCELLED_SECONDS)
        self._session = None

    def _work(self) -> None:
        with _one_at_a_time:
            with self._guard:
                if self._is_cancelled or not threading.main_thread().is_alive():  # the process ends and waits for its threads
                    return
                self._has_turn = True
            # Threads of ONNX Runtime's own would inherit it, and answer requests ever after.
            if sys.platform == "linux" and self._mapped.threads == 1:
                os.nice(_NICE)  # Linux: of this thread
            self._keep(self._built())

    def _built(self) -> Any:
        try:
            return _session_over(self._mapped, self._options)
        except Exception as error:
            if not self._is_cancelled:
                log.warning(_FAILED, error=type(error).__name__)  # what it says may name tensors of an encrypted model
            return None

    def _keep(self, session: Any) -> None:
        with self._guard:
            if not self._is_cancelled:
                self._session = session


def _mapped(path: Path, others: Sequence[Path], threads: int) -> _Mapped | None:
    """None: it is small, or another provider than the CPU's has it, which copies or compiles every weight in any case."""
    if path.stat().st_size + sum(other.stat().st_size for other in others) < LARGE or len(_providers()) > 1:
        return None
    with contextlib.suppress(BadModelError, UnicodeEncodeError):  # no protobuf; a name that is no text
        model = outline(path)
        if model is not None or others:
            return _Mapped(path.name, model or str(path.absolute()), str(path.parent.absolute()), threads)
    return None


def _quick_session(mapped: _Mapped) -> Any:
    options = _options(mapped.threads)
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Beyond this level weights of convolutions are laid out anew (1.6 s for 250 MiB).
    options.graph_optimization_level = _library().GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return _session_over(mapped, options)


def _session_over(mapped: _Mapped, options: Any) -> Any:
    if isinstance(mapped.model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", mapped.folder)
    return _library().InferenceSession(mapped.model, options, providers=_providers())


def _library() -> Any:
    try:
        import onnxruntime  # heavy (0.2 s)
    except ImportError as error:
        raise tensors.missing("onnxruntime", "onnx", error) from error
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


def _providers() -> list[Any]:
    return onnx_providers(_library().get_available_providers())


def _options(threads: int) -> Any:
    library = _library()
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = library.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _FATAL
    # Threads that spin while they wait take the cores of the other models (measured: a second model halves the first one's rate).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
