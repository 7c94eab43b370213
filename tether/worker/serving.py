"""One model version on its own Unix socket, served by one plain thread.

While the runtime runs a batch the GIL is free and requests pile up in the socket; the next turn takes them all.  So batches form with no
timer and no added wait, and models do not block each other (FASTPATH.md §3: best or tied in every cell against event-loop variants).
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import structlog

from tether.errors import DeadlineExceededError, InternalError
from tether.ports import LoadedModel
from tether.serving_settings import ServingSettings
from tether.types import ModelVersion
from tether.wire.connection import Connection
from tether.wire.flat import RequestReader
from tether.wire.frames import ALONE, INLINE, PARTS, TAKEN, WITHDRAWN, Frame, Head
from tether.worker.batch_runner import BatchRunner
from tether.worker.batching import rows_of
from tether.worker.gateways import Gateways
from tether.worker.job import Job
from tether.worker.replies import Replies
from tether.worker.request_queue import RequestQueue
from tether.worker.run_guard import RunGuard
from tether.worker.stats import ServingStats
from tether.worker.streaming import StreamServer

__all__ = ["ModelServer"]

log = structlog.get_logger("tether.worker")
_INTERRUPTED = 0.5
"""Seconds that a run has to end when it was interrupted, before it is made to."""
_GLANCE = 0.05
"""Seconds between looks whether a model that leaves is still needed."""


class ModelServer:
    """Serves `loaded` as `model` on `endpoint` until `stop`."""

    def __init__(self, model: ModelVersion, loaded: LoadedModel, endpoint: Path, latency: float = 0.1) -> None:
        """`latency`: seconds within which answers are wanted, where no settings say. Raises: WorkerLostError: no socket at `endpoint`."""
        self.model, self.loaded, self.endpoint, self.stats = model, loaded, endpoint, ServingStats()
        # requests of a model that keeps something between runs are run one by one: a batch that failed could not be run again
        self._queue: RequestQueue[Job] = RequestQueue(latency, joins=loaded.info.batched and loaded.info.pure)
        self._requests = RequestReader(loaded.info)
        self._said: ServingSettings | None = None
        """Settings that came and are not in force yet."""
        self._is_to_move = False
        """Whether it was told to move into a process of its own."""
        self._decoding, self._decoded = 0.0, 0.0
        """Seconds that decoding took lately, and for how many rows."""
        self._stopping = self._leaving = False
        self._guard = RunGuard(model, loaded)
        self._taken: list[Job] = []
        """Those of the batch that runs."""
        self._gateways = Gateways(model, endpoint, self._hear, self._lost, self._roused)
        self._replies = Replies(model, loaded.info, self.stats, self._gateways.send)
        self._batches = BatchRunner(model, loaded, self._guard, self._queue, self._replies)
        self._streams: StreamServer[Job] = StreamServer(model, loaded, self._guard, self._replies.stream, self._replies.refuse_now)
        self._thread = threading.Thread(target=self._serve, name=f"serve-{model}", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def configure(self, settings: ServingSettings) -> None:
        """Serve like this from the next batch on. From any thread."""
        self._said = settings
        self._gateways.rouse()

    def isolate(self) -> None:
        """Run it in a process of its own from the next batch on, where it does not already. From another thread."""
        self._is_to_move = True
        self._gateways.rouse()

    def stop(self, grace: float = 10.0) -> None:
        """Answer what was read, then close the socket and free the model. Blocks; a run that takes longer than `grace` is interrupted."""
        self._stopping = self._batches.is_ending = True
        self._gateways.rouse()
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
        self._gateways.rouse()
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

    def _roused(self) -> None:
        if self._leaving:
            self._gateways.leave()
        settings, self._said = self._said, None
        if settings is not None:
            self._queue.configure(settings)
            self._batches.is_on_trial = settings.rollout is not None and settings.rollout.checks(self.model.version)

    def _listen(self, pause: float | None = 0.0) -> None:
        """Take in what arrived, and refuse what waited too long; nobody else does, or is in the middle of it."""
        arrived = self._gateways.wait(pause)
        for job in self._queue.expired(time.monotonic()):
            self._replies.refuse_now(job, DeadlineExceededError("the request waited as long as the model's queue_timeout allows"))
        self._gateways.serve(arrived)

    def _has_ended(self) -> bool:
        return not self._queue and (self._stopping or self._gateways.have_left)

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
            if self._is_to_move:
                self._is_to_move = False
                self._batches.move_if_possible()
            self._run_batch()
            self.stats.busy += self._streams.step()
        except Exception:  # a bug of ours in one batch: its gateways ask elsewhere, the model serves on
            log.exception("batch lost", model=str(self.model))
            self._gateways.drop_all()

    def _close(self) -> None:
        if len(self._streams):
            self._streams.end()
        self._gateways.part()
        self._gateways.close()
        self.loaded.close()

    def _hear(self, connection: Connection, frame: Frame) -> None:
        """What a gateway sent."""
        now = time.monotonic()
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
        self.stats.waiting = len(self._queue)
        self._decoding += time.monotonic() - now

    def _lost(self, connection: Connection) -> None:
        """Nobody is there any more who waits for these."""
        self._queue.drop(lambda job: job.connection is connection)
        for job in self._taken:
            job.is_withdrawn |= job.connection is connection
        self._streams.withdraw(lambda job: job.connection is connection)

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
            request = self._requests.read(body, head.header_nbytes)
            job = Job(connection, head.id, request, rows_of(request, self.loaded.info), now, now + head.timeout_ms / 1000)
            if block is not None:
                job.block = block
            self._add(job, head.flags)
        except Exception as error:
            self._replies.refuse(connection, head.id, error)

    def _add(self, job: Job, flags: int) -> None:
        """Raises: QueueFullError."""
        rows = job.rows
        if flags & ALONE:
            job.is_suspect, rows.key = True, None
        if flags & PARTS and self.loaded.info.streams:
            self._streams.add(job)
        else:
            self._queue.add(rows, job)
        self._decoded += rows.count

    def _withdraw(self, connection: Connection, ids: set[int]) -> None:
        """Nobody waits for these any more. Those whose batch has not begun never run, and their ring blocks go back now.

        All of a frame at once: each look goes through the whole queue, and all requests of a gateway may reach their deadline together.
        """
        for job in self._queue.drop(lambda job: job.connection is connection and job.id in ids):
            self._replies.withdraw(job)
        for job in self._taken:
            job.is_withdrawn |= job.connection is connection and job.id in ids
        self._streams.withdraw(lambda job: job.connection is connection and job.id in ids)

    def _run_batch(self) -> None:
        """The next one; what is past its deadline is answered and left out."""
        if not self._queue:
            return
        taken: list[Job] = []
        self._taken = taken
        jobs: list[Job] = []
        while self._queue and not jobs:
            now = time.monotonic()
            batch = self._queue.take(now, hurry=self._stopping or self._leaving)
            if not batch:  # it waits for more, as was asked for
                break
            jobs = [job for job in batch if not self._batches.is_unwanted(job, now)]
            taken += batch
        self.stats.waiting = len(self._queue)
        begun = time.monotonic()
        if jobs and self._batches.answer(jobs):
            self._learn(jobs, time.monotonic() - begun)
        self._taken = []
        for connection in {job.connection for job in taken}:
            self._gateways.send(connection)

    def _learn(self, jobs: list[Job], seconds: float) -> None:
        """What the batch took, and what decoding takes for as many rows."""
        if not self._decoded:
            return
        rows = sum([job.rows.count for job in jobs])
        seconds += rows * self._decoding / self._decoded
        self._queue.ran(jobs[0].rows.key, rows, seconds)
        self._replies.note_pace(seconds / len(jobs))
        self._decoding, self._decoded = self._decoding / 2, self._decoded / 2
