"""What a model version says to its gateways: outputs, parts, errors. Written for a connection at once, sent when the batch is through."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from tether.errors import InternalError, TetherError
from tether.types import ModelInfo, ModelVersion, Tensors
from tether.wire.connection import Connection
from tether.wire.frames import OK, WITHDRAWN
from tether.wire.oip import ResponseWriter, encode_error
from tether.worker.job import Job
from tether.worker.stats import ServingStats

__all__ = ["Replies"]

log = structlog.get_logger("tether.worker")
_MOST_US = (1 << 32) - 1


class Replies:
    """Of one model version."""

    def __init__(self, model: ModelVersion, info: ModelInfo, stats: ServingStats, send: Callable[[Connection], None]) -> None:
        """`stats`: where answers are counted. `send` sends what was written for a connection."""
        self._model, self.stats, self._send = model, stats, send
        self._write = ResponseWriter(model, info).write
        self._pace_us = 0
        """Microseconds of the model's thread that a request takes."""

    def note_pace(self, seconds: float) -> None:
        """A request takes so long. Gateways are told, who then know how many may wait here before one feels it."""
        self._pace_us = min(int(seconds * 1e6) + 1, _MOST_US)

    def give(self, job: Job, outputs: Tensors) -> None:
        """The model's answer."""
        try:
            body, header_nbytes = self._write(outputs, job.request)
        except Exception as error:
            self.refuse(job.connection, job.id, error)
            return
        self.stats.requests += 1
        writer = job.connection.writer
        writer.reply(job.id, OK, body, header_nbytes, self._pace_us)
        if writer.is_full:
            self._send(job.connection)

    def stream(self, job: Job, status: int, body: bytes, header_nbytes: int) -> None:
        """A part of an answer, or its end: what there is goes out at once."""
        self.stats.requests += status == OK
        job.connection.writer.reply(job.id, status, body, header_nbytes)
        self._send(job.connection)

    def refuse(self, connection: Connection, request_id: int, error: Exception) -> None:
        """An error in its place."""
        self.stats.failures += 1
        if not isinstance(error, TetherError):
            log.error("request failed", model=str(self._model), exc_info=error)
            error = InternalError(f"{type(error).__name__} in the worker; its log has the traceback")
        connection.writer.reply(request_id, error.http_status, encode_error(error), 0)

    def refuse_now(self, job: Job, error: Exception) -> None:
        """As `refuse`, and sent at once."""
        self.refuse(job.connection, job.id, error)
        self._send(job.connection)

    def withdraw(self, job: Job) -> None:
        """It did not run, as its gateway wished: the ring block goes back."""
        job.connection.writer.reply(job.id, WITHDRAWN, b"", 0)
