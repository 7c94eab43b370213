"""One model version on its own Unix socket, served by one plain thread.

While the runtime runs a batch the GIL is free and requests pile up in the socket; the next turn takes them all.  So batches form with no
timer and no added wait, and models do not block each other (FASTPATH.md §3: best or tied in every cell against event-loop variants).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from tether.errors import DeadlineExceededError, InternalError, ModelFailedError, TetherError, WorkerLostError
from tether.ports import LoadedModel
from tether.types import InferRequest, ModelVersion, Tensors
from tether.wire.connection import Connection
from tether.wire.frames import INLINE, WITHDRAWN, Head
from tether.wire.oip import decode_request, encode_error, encode_response
from tether.worker.batch_sizes import BatchSizes
from tether.worker.batching import Rows, Waiting, join_inputs, rows_of, split_outputs

__all__ = ["ModelServer", "ServingStats"]

log = structlog.get_logger("tether.worker")
_LATE = 0.5
"""Seconds past the last deadline of a batch at which its run is interrupted."""


@dataclass(slots=True)
class ServingStats:
    """Running totals of one model; written by its thread, read by the heartbeat."""

    requests: int = 0
    failures: int = 0
    batches: int = 0
    rows: int = 0
    busy: float = 0.0
    """Seconds spent inside the runtime."""
    waiting: int = 0
    """Requests decoded and not yet run."""


@dataclass(slots=True)
class _Job:
    """A decoded request that waits for its batch."""

    connection: Connection
    id: int
    request: InferRequest
    rows: Rows
    deadline: float
    block: memoryview | None = field(default=None)
    """Keeps the ring block alive while arrays view it."""


class ModelServer:
    """Serves `loaded` as `model` on `endpoint` until `stop`."""

    def __init__(self, model: ModelVersion, loaded: LoadedModel, endpoint: Path, latency: float = 0.1) -> None:
        """`latency`: seconds within which answers are wanted."""
        self.model, self.loaded, self.endpoint, self.stats = model, loaded, endpoint, ServingStats()
        # requests of a model that keeps something between runs are run one by one: a batch that failed could not be run again
        self._sizes = BatchSizes(latency) if loaded.info.batched and loaded.info.pure else None
        self._queue: Waiting[_Job] = Waiting()
        self._decoding, self._decoded = 0.0, 0.0
        """Seconds that decoding took lately, and for how many rows."""
        self._connections: dict[int, Connection] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._listener = _listen(endpoint)
        self._stopping = False
        self._batch_deadline: float | None = None
        """Until when somebody waits for the batch that runs; None between batches."""
        self._batch_guard = threading.Lock()
        """Held while a run is interrupted: the batch can't end meanwhile, so the next one is never hit."""
        self._thread = threading.Thread(target=self._serve, name=f"serve-{model}", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._thread.start()

    def stop(self, grace: float = 10.0) -> None:
        """Answer what was read, then close the socket and free the model. Blocks; a run that takes longer than `grace` is interrupted."""
        self._stopping = True
        with contextlib.suppress(OSError):  # its thread has ended by itself
            self._waker.send(b"x")
        self._thread.join(grace)
        if self._thread.is_alive():
            self.loaded.interrupt()
            self._thread.join(grace)

    def interrupt_if_late(self, now: float) -> None:
        """End a run for which nobody waits any more: one endless loop in a model would hold its thread for ever. From any thread."""
        with self._batch_guard:
            deadline = self._batch_deadline
            if deadline is not None and now > deadline + _LATE:
                log.warning("run interrupted", model=str(self.model))
                self._batch_deadline = None
                self.loaded.interrupt()

    def _serve(self) -> None:
        try:
            while not self._stopping or self._queue:
                self._turn()
        finally:
            self._close()

    def _turn(self) -> None:
        """Take in what arrived, run one batch."""
        for key, events in self._selector.select(0 if self._queue else None):
            if key.data is not None:
                key.data(events)
        try:
            self._run_batch()
        except Exception:  # a bug of ours in one batch: its gateways ask elsewhere, the model serves on
            log.exception("batch lost", model=str(self.model))
            for connection in list(self._connections.values()):
                self._drop(connection)

    def _close(self) -> None:
        self._listener.close()
        with contextlib.suppress(OSError):
            self.endpoint.unlink()
        for connection in self._connections.values():
            connection.close()
        self._selector.close()
        self._wake.close()
        self._waker.close()
        self.loaded.close()

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.warning("gateway connection refused", model=str(self.model), error=str(error))
            return
        connection = self._connections[sock.fileno()] = Connection(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda events: self._talk(connection, events))

    def _talk(self, connection: Connection, events: int) -> None:
        """Read what the socket has, write what it takes. A gateway that breaks the rules of the frames loses its own connection."""
        try:
            if events & selectors.EVENT_READ:
                self._receive(connection)
            if events & selectors.EVENT_WRITE:
                connection.send()
            self._flush(connection)
        except OSError:
            self._drop(connection)
        except Exception:
            log.exception("gateway connection broken", model=str(self.model))
            self._drop(connection)

    def _receive(self, connection: Connection) -> None:
        frame, now = connection.receive(), time.monotonic()
        withdrawn = set[int]()
        for head, payload in frame:
            if head.status == WITHDRAWN:
                withdrawn.add(head.id)
            else:
                self._decode(connection, head, payload, now)
        if withdrawn:
            self._withdraw(connection, withdrawn)
        self._decoding += time.monotonic() - now
        frame.clear()
        connection.reader.release()

    def _flush(self, connection: Connection) -> None:
        """Send; what is left waits until the socket takes more."""
        connection.flush()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.owes else 0)
        key = self._selector.get_key(connection.socket)
        if key.events != wanted:
            self._selector.modify(connection.socket, wanted, key.data)

    def _drop(self, connection: Connection) -> None:
        if self._connections.pop(connection.socket.fileno(), None) is None:
            return
        self._selector.unregister(connection.socket)
        self._queue.drop(lambda job: job.connection is connection)
        connection.close()

    def _decode(self, connection: Connection, head: Head, payload: memoryview, now: float) -> None:
        """Arrays of a binary request view its bytes, so those of a frame are copied first; a ring block stays until the reply."""
        block: memoryview | None = None
        try:
            if head.offset != INLINE:
                if connection.ring is None:
                    raise InternalError("a request names a ring block and its connection has no ring")
                block = body = connection.ring.block(head.offset, head.nbytes)
            else:
                body = memoryview(bytes(payload)) if head.header_nbytes else payload
            request = decode_request(body, head.header_nbytes, self.loaded.info)
            rows = rows_of(request, self.loaded.info)
        except Exception as error:
            self._refuse(connection, head.id, error)
            return
        self._decoded += rows.count
        self._queue.add(rows, _Job(connection, head.id, request, rows, now + head.timeout_ms / 1000, block))
        self.stats.waiting = len(self._queue)

    def _withdraw(self, connection: Connection, ids: set[int]) -> None:
        """Nobody waits for these any more. Those whose batch has not begun never run, and their ring blocks go back now.

        All of a frame at once: each look goes through the whole queue, and all requests of a gateway may reach their deadline together.
        """
        for job in self._queue.drop(lambda job: job.connection is connection and job.id in ids):
            connection.writer.reply(job.id, WITHDRAWN, b"", 0)

    def _refuse(self, connection: Connection, request_id: int, error: Exception) -> None:
        self.stats.failures += 1
        if not isinstance(error, TetherError):
            log.error("request failed", model=str(self.model), exc_info=error)
            error = InternalError(f"{type(error).__name__} in the worker; its log has the traceback")
        connection.writer.reply(request_id, error.http_status, encode_error(error), 0)

    def _run_batch(self) -> None:
        """The next one; what is past its deadline is answered and left out."""
        taken: list[_Job] = []
        jobs: list[_Job] = []
        while self._queue and not jobs:
            batch = self._queue.take(self._most_rows())
            jobs = [job for job in batch if not self._is_late(job)]
            taken += batch
        self.stats.waiting = len(self._queue)
        if jobs:
            self._answer(jobs)
        for connection in {id(job.connection): job.connection for job in taken}.values():
            self._talk(connection, 0)

    def _most_rows(self) -> int:
        key = self._queue.next_key()
        return 1 if self._sizes is None or key is None else self._sizes.most_rows(key)

    def _learn(self, jobs: list[_Job], seconds: float) -> None:
        """What the batch took, and what decoding takes for as many rows."""
        key, rows = jobs[0].rows.key, sum(job.rows.count for job in jobs)
        if self._sizes is None or key is None or not self._decoded:
            return
        self._sizes.ran(key, rows, seconds + rows * self._decoding / self._decoded, is_full=self._queue.has(key))
        self._decoding, self._decoded = self._decoding / 2, self._decoded / 2

    def _is_late(self, job: _Job) -> bool:
        """Whether nobody waits for it any more; then it is answered so."""
        if job.deadline >= time.monotonic():
            return False
        self._refuse(job.connection, job.id, DeadlineExceededError("the deadline passed before the model got to the request"))
        return True

    def _answer(self, jobs: list[_Job]) -> None:
        """Run the batch; when it fails, each request alone, so that one bad input costs nobody else an answer."""
        begun = time.perf_counter()
        try:
            outputs = self._run(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._refuse(jobs[0].connection, jobs[0].id, error)
            else:
                self._answer_one_by_one(jobs)
            return
        for job, share in zip(jobs, split_outputs(outputs, [job.rows.count for job in jobs]), strict=True):
            self._reply(job, share)
        self._learn(jobs, time.perf_counter() - begun)

    def _answer_one_by_one(self, jobs: list[_Job]) -> None:
        """What failed as a batch. Where each of them runs alone, there were too many rows: of a model's memory, or of its graph's limit."""
        failures = self.stats.failures
        for job in jobs:
            if not self._is_late(job):
                self._answer([job])
        key = jobs[0].rows.key
        if self._sizes is not None and key is not None and self.stats.failures == failures:
            self._sizes.failed(key, sum(job.rows.count for job in jobs))

    def _run(self, jobs: list[_Job]) -> Tensors:
        begun = time.perf_counter()
        inputs = join_inputs([job.request for job in jobs])
        with self._batch_guard:
            self._batch_deadline = max(job.deadline for job in jobs)
        try:
            outputs = self.loaded.run(inputs)
        finally:
            with self._batch_guard:
                self._batch_deadline = None
            self.stats.busy += time.perf_counter() - begun
        rows = sum(job.rows.count for job in jobs)
        if self.loaded.info.batched:
            for name, array in outputs.items():
                if array.ndim == 0 or array.shape[0] != rows:
                    raise ModelFailedError(f"output {name!r} has shape {array.shape} for {rows} rows; its first axis must be the batch")
        self.stats.batches += 1
        self.stats.rows += rows
        return outputs

    def _reply(self, job: _Job, outputs: Tensors) -> None:
        try:
            body, header_nbytes = encode_response(outputs, self.model, job.request, self.loaded.info)
        except Exception as error:
            self._refuse(job.connection, job.id, error)
            return
        self.stats.requests += 1
        job.connection.writer.reply(job.id, 200, body, header_nbytes)
        if job.connection.writer.is_full:
            self._talk(job.connection, 0)


def _listen(endpoint: Path) -> socket.socket:
    """Raises: WorkerLostError: the socket's path can't be used."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        endpoint.unlink(missing_ok=True)
        listener.bind(str(endpoint))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise WorkerLostError(f"socket {endpoint}: {error.strerror}; is the folder writable and its path under 108 bytes?") from error
    return listener
