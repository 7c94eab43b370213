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
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from tether.errors import (
    DeadlineExceededError,
    InternalError,
    ModelFailedError,
    TetherError,
    WorkerLostError,
)
from tether.ports import Isolatable, LoadedModel
from tether.serving_settings import ServingSettings
from tether.types import InferRequest, ModelVersion, Tensors
from tether.wire.connection import Connection
from tether.wire.frames import ALONE, INLINE, LEAVING, OK, PARTS, TAKEN, WITHDRAWN, Head
from tether.wire.oip import decode_request, encode_error, encode_response
from tether.worker.batching import Rows, join_inputs, rows_of, split_outputs
from tether.worker.quarantine import deaths_by, judged, runs_again
from tether.worker.request_queue import RequestQueue
from tether.worker.run_guard import RunGuard
from tether.worker.streaming import StreamServer

__all__ = ["ModelServer", "ServingStats"]

log = structlog.get_logger("tether.worker")
_INTERRUPTED = 0.5
"""Seconds that a run has to end when it was interrupted, before it is made to."""
_GLANCE = 0.05
"""Seconds between looks whether a model that leaves is still needed."""
_FAREWELL = 0.5
"""Seconds for gateways to read the last word of streams that a model ends which goes."""
_WAKES = 4096
"""Bytes that other threads wrote to wake this one; how many of them is nothing."""


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
    load_seconds: float = 0.0
    """What it took to load, fetching and a first run included; waiting for room not."""


@dataclass(slots=True)
class _Job:
    """A decoded request that waits for its batch."""

    connection: Connection
    id: int
    request: InferRequest
    rows: Rows
    arrived: float
    deadline: float
    block: memoryview | None = field(default=None)
    """Keeps the ring block alive while arrays view it."""
    is_suspect: bool = False
    """Whether it is suspected to have ended workers: it runs alone, in a process of the model's own."""
    deaths: int = 0
    """Of the model's processes that it may have ended; one more tells where it had ended workers before."""
    tries: int = 0
    """Runs that failed."""
    is_withdrawn: bool = False
    """Whether nobody waits for it any more."""

    @property
    def key(self) -> tuple[Connection, int]:
        """What tells it from all others of the model."""
        return self.connection, self.id

    @property
    def priority(self) -> object:
        """As the caller wrote it; looked at only where the model has levels."""
        return self.request.parameters.get("priority", 0)


class ModelServer:
    """Serves `loaded` as `model` on `endpoint` until `stop`."""

    def __init__(self, model: ModelVersion, loaded: LoadedModel, endpoint: Path, latency: float = 0.1) -> None:
        """`latency`: seconds within which answers are wanted, where no settings say."""
        self.model, self.loaded, self.endpoint, self.stats = model, loaded, endpoint, ServingStats()
        # requests of a model that keeps something between runs are run one by one: a batch that failed could not be run again
        self._queue: RequestQueue[_Job] = RequestQueue(latency, joins=loaded.info.batched and loaded.info.pure)
        self._said: ServingSettings | None = None
        """Settings that came and are not in force yet."""
        self._is_to_move = False
        """Whether it was told to move into a process of its own."""
        self._decoding, self._decoded = 0.0, 0.0
        """Seconds that decoding took lately, and for how many rows."""
        self._connections: dict[int, Connection] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._listener = _listen(endpoint)
        self._stopping = self._leaving = self._took_leave = False
        self._guard = RunGuard(model, loaded)
        self._taken: list[_Job] = []
        """Those of the batch that runs."""
        self._streams: StreamServer[_Job] = StreamServer(model, loaded, self._guard, self._reply_to, self._refuse_to)
        self._thread = threading.Thread(target=self._serve, name=f"serve-{model}", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._thread.start()

    def configure(self, settings: ServingSettings) -> None:
        """Serve like this from the next batch on. From any thread."""
        self._said = settings
        self._rouse()

    def isolate(self) -> None:
        """Run it in a process of its own from the next batch on, where it does not already. From another thread."""
        self._is_to_move = True
        self._rouse()

    def stop(self, grace: float = 10.0) -> None:
        """Answer what was read, then close the socket and free the model. Blocks; a run that takes longer than `grace` is interrupted."""
        self._stopping = True
        self._rouse()
        for patience in (grace, _INTERRUPTED, grace):
            self._thread.join(patience)
            if not self._thread.is_alive():
                return
            self.loaded.interrupt()

    @property
    def is_in_use(self) -> bool:
        """Whether it runs, or requests wait for it. From any thread."""
        return bool(self._taken) or len(self._queue) > 0 or len(self._streams) > 0

    @property
    def is_streaming(self) -> bool:
        """Whether it gives answers in parts, or is asked for some. From any thread."""
        return len(self._streams) > 0

    def leave(self, grace: float = 5.0) -> None:
        """Answer all that was sent, and end when the gateways, which are told of it, have gone. Blocks.

        `grace`: seconds for a gateway that is asleep, from the last request on. What another one sends meanwhile is answered, so that a
        request is lost to no model, pure or not. A stream has as long: it may never end.
        """
        self._leaving = True
        self._rouse()
        end = time.monotonic() + grace
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(_GLANCE)
            self.end_unwanted_run(time.monotonic())  # the engine does not look after it any more
            if self._taken or len(self._queue):
                end = time.monotonic() + grace
        self.stop()

    def end_unwanted_run(self, now: float) -> None:
        """End a run for which nobody waits any more: one endless loop in a model would hold its thread for ever. From another thread."""
        try:
            self._guard.look(now, self._listen)
        except Exception:  # a bug of ours; who looks here looks after other models too
            log.exception("run not looked after", model=str(self.model))

    def _rouse(self) -> None:
        with contextlib.suppress(OSError):  # its thread has ended by itself
            self._waker.send(b"x")

    def _woken(self, _events: int) -> None:
        self._wake.recv(_WAKES)
        if self._leaving and not self._took_leave:
            self._take_leave()
        settings, self._said = self._said, None
        if settings is not None:
            self._queue.configure(settings)

    def _listen(self, pause: float | None = 0.0) -> None:
        """Take in what arrived, and refuse what waited too long; nobody else does, or is in the middle of it."""
        arrived = self._selector.select(pause)
        self._refuse_expired()
        for key, events in arrived:
            key.data(events)

    def _take_leave(self) -> None:
        """Nobody finds the way here any more; who has found it is told, then and when it is let in."""
        with contextlib.suppress(OSError):
            self.endpoint.unlink()
        self._took_leave = True
        for connection in list(self._connections.values()):
            connection.writer.reply(0, LEAVING, b"", 0)
            self._talk(connection, 0)

    def _has_ended(self) -> bool:
        if self._took_leave and not self._connections and not self._queue:
            return self._stopping or not self._selector.select(0)  # somebody may have come in before the way was closed
        return self._stopping and not self._queue

    def _refuse_expired(self) -> None:
        for job in self._queue.expired(time.monotonic()):
            self._refuse(job.connection, job.id, DeadlineExceededError("the request waited as long as the model's queue_timeout allows"))
            self._talk(job.connection, 0)

    def _serve(self) -> None:
        try:
            while not self._has_ended():
                self._turn()
        finally:
            self._close()

    def _turn(self) -> None:
        """Take in what arrived, run one batch, and one step of a stream."""
        self._listen(0.0 if self._stopping or self._streams.is_ready else self._queue.pause(time.monotonic()))
        try:
            self._move_if_told()
            self._run_batch()
            self.stats.busy += self._streams.step()
        except Exception:  # a bug of ours in one batch: its gateways ask elsewhere, the model serves on
            log.exception("batch lost", model=str(self.model))
            for connection in list(self._connections.values()):
                self._drop(connection)

    def _end_streams(self) -> None:
        """Their last word is read before the connections end: a gateway that writes to a closed one loses what it did not read yet."""
        if not len(self._streams):
            return
        self._streams.end()
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _FAREWELL
        while self._connections and (pause := end - time.monotonic()) > 0:
            self._listen(pause)

    def _close(self) -> None:
        self._end_streams()
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
        if self._took_leave:
            connection.writer.reply(0, LEAVING, b"", 0)
            self._talk(connection, 0)

    def _talk(self, connection: Connection, events: int) -> None:
        """Read what the socket has, write what it takes. A gateway that breaks the rules of the frames loses its own connection."""
        if connection.socket.fileno() < 0:  # dropped while its batch ran
            return
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
            elif head.status == TAKEN:
                self._streams.taken((connection, head.id))
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
        for job in self._taken:
            job.is_withdrawn |= job.connection is connection
        self._streams.withdraw(lambda job: job.connection is connection)
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
            rows, is_suspect = rows_of(request, self.loaded.info), bool(head.flags & ALONE)
            if is_suspect:
                rows = replace(rows, key=None)
            job = _Job(connection, head.id, request, rows, now, now + head.timeout_ms / 1000, block, is_suspect)
            if head.flags & PARTS and self.loaded.info.streams:
                self._streams.add(job)
            else:
                self._queue.add(rows, job)
        except Exception as error:
            self._refuse(connection, head.id, error)
            return
        self._decoded += rows.count
        self.stats.waiting = len(self._queue)

    def _withdraw(self, connection: Connection, ids: set[int]) -> None:
        """Nobody waits for these any more. Those whose batch has not begun never run, and their ring blocks go back now.

        All of a frame at once: each look goes through the whole queue, and all requests of a gateway may reach their deadline together.
        """
        for job in self._queue.drop(lambda job: job.connection is connection and job.id in ids):
            connection.writer.reply(job.id, WITHDRAWN, b"", 0)
        for job in self._taken:
            job.is_withdrawn |= job.connection is connection and job.id in ids
        self._streams.withdraw(lambda job: job.connection is connection and job.id in ids)

    def _refuse(self, connection: Connection, request_id: int, error: Exception) -> None:
        self.stats.failures += 1
        if not isinstance(error, TetherError):
            log.error("request failed", model=str(self.model), exc_info=error)
            error = InternalError(f"{type(error).__name__} in the worker; its log has the traceback")
        connection.writer.reply(request_id, error.http_status, encode_error(error), 0)

    def _reply_to(self, job: _Job, status: int, body: bytes, header_nbytes: int) -> None:
        """Of a stream: what there is goes out at once."""
        self.stats.requests += status == OK
        job.connection.writer.reply(job.id, status, body, header_nbytes)
        self._talk(job.connection, 0)

    def _refuse_to(self, job: _Job, error: Exception) -> None:
        self._refuse(job.connection, job.id, error)
        self._talk(job.connection, 0)

    def _run_batch(self) -> None:
        """The next one; what is past its deadline is answered and left out."""
        taken: list[_Job] = []
        self._taken = taken
        jobs: list[_Job] = []
        while self._queue and not jobs:
            batch = self._queue.take(time.monotonic(), hurry=self._stopping or self._leaving)
            if not batch:  # it waits for more, as was asked for
                break
            jobs = [job for job in batch if not self._is_unwanted(job)]
            taken += batch
        self.stats.waiting = len(self._queue)
        if jobs:
            self._answer(jobs)
        self._taken = []
        for connection in {id(job.connection): job.connection for job in taken}.values():
            self._talk(connection, 0)

    def _learn(self, jobs: list[_Job], seconds: float) -> None:
        """What the batch took, and what decoding takes for as many rows."""
        rows = sum(job.rows.count for job in jobs)
        if not self._decoded:
            return
        self._queue.ran(jobs[0].rows.key, rows, seconds + rows * self._decoding / self._decoded)
        self._decoding, self._decoded = self._decoding / 2, self._decoded / 2

    def _is_unwanted(self, job: _Job) -> bool:
        """Whether nobody waits for it any more; then it is answered so."""
        if job.is_withdrawn:
            job.connection.writer.reply(job.id, WITHDRAWN, b"", 0)
            return True
        if job.deadline >= time.monotonic():
            return False
        self._refuse(job.connection, job.id, DeadlineExceededError("the deadline passed before the model got to the request"))
        return True

    def _answer(self, jobs: list[_Job]) -> None:
        """Run the batch; when it fails, each request alone, so that one bad input costs nobody else an answer."""
        begun = time.perf_counter()
        try:
            if jobs[0].is_suspect:
                self._move()
            outputs = self._run(jobs)
        except Exception as error:
            self._failed(jobs, error)
            return
        for job, share in zip(jobs, split_outputs(outputs, [job.rows.count for job in jobs]), strict=True):
            self._reply(job, share)
        self._learn(jobs, time.perf_counter() - begun)

    def _move_if_told(self) -> None:
        """Where it can't, it serves on from here."""
        if self._is_to_move:
            self._is_to_move = False
            try:
                self._move()
            except TetherError as error:
                log.warning("model not isolated", model=str(self.model), error=str(error))

    def _move(self) -> None:
        """Into a process of the model's own, if it is not in one: it may be what ends its worker."""
        if isinstance(self.loaded, Isolatable):
            self.loaded.isolate()
            log.warning("model isolated", model=str(self.model))

    def _failed(self, jobs: list[_Job], error: Exception) -> None:
        """Who was there when the model's process died may have ended it: who then ends one alone, did."""
        for job in jobs:
            job.tries += 1
            job.deaths += deaths_by(error, is_suspect=job.is_suspect)
        first = jobs[0]
        if len(jobs) > 1:
            self._answer_one_by_one(jobs)
        elif not self._stopping and runs_again(error, first.deaths, first.tries, is_pure=self.loaded.info.pure):
            if not self._is_unwanted(first):
                self._answer(jobs)
        else:
            self._refuse(first.connection, first.id, judged(error, first.deaths))

    def _answer_one_by_one(self, jobs: list[_Job]) -> None:
        """What failed as a batch. Where each of them runs alone, there were too many rows: of a model's memory, or of its graph's limit."""
        failures = self.stats.failures
        for job in jobs:
            if not self._is_unwanted(job):
                self._answer([job])
        if self.stats.failures == failures:
            self._queue.failed(jobs[0].rows.key, sum(job.rows.count for job in jobs))

    def _run(self, jobs: list[_Job]) -> Tensors:
        begun = time.perf_counter()
        inputs = join_inputs([job.request for job in jobs])
        self._guard.begin(jobs)
        try:
            outputs = self.loaded.run(inputs)
        finally:
            self._guard.end()
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
