"""Runs a batch and has it answered; what fails together runs again one by one, as far as that is allowed."""

from __future__ import annotations

import time

import structlog

from tether.errors import DeadlineExceededError, ModelFailedError, TetherError
from tether.ports import Isolatable, LoadedModel
from tether.types import ModelVersion, Tensors
from tether.worker.batching import join_inputs, split_outputs
from tether.worker.job import Job
from tether.worker.quarantine import deaths_by, judged, runs_again
from tether.worker.replies import Replies
from tether.worker.request_queue import RequestQueue
from tether.worker.run_guard import RunGuard
from tether.worker.soundness import check_numbers

__all__ = ["BatchRunner"]

log = structlog.get_logger("tether.worker")


class BatchRunner:
    """Of one model version. `queue` is told what the model can't run at once."""

    def __init__(self, model: ModelVersion, loaded: LoadedModel, guard: RunGuard, queue: RequestQueue[Job], replies: Replies) -> None:
        self._model, self._loaded, self._guard, self._queue, self._replies = model, loaded, guard, queue, replies
        self._stats = replies.stats
        self.is_on_trial = False
        """Whether answers are looked through for NaN."""
        self.is_ending = False
        """Whether the model goes: nothing is tried again."""

    def is_unwanted(self, job: Job, now: float) -> bool:
        """Whether nobody waits for it any more; then it is answered so."""
        if job.is_withdrawn:
            self._replies.withdraw(job)
        elif job.deadline < now:
            error = DeadlineExceededError("the deadline passed before the model got to the request")
            self._replies.refuse(job.connection, job.id, error)
        else:
            return False
        return True

    def answer(self, jobs: list[Job]) -> bool:
        """Run the batch; when it fails, each request alone, so that one bad input costs nobody else an answer.

        False: it failed.
        """
        try:
            if jobs[0].is_suspect:
                self._move()
            outputs = self._run(jobs)
        except Exception as error:
            self._failed(jobs, error)
            return False
        give = self._replies.give
        for job, share in zip(jobs, split_outputs(outputs, [job.rows.count for job in jobs]), strict=True):
            give(job, share)
        return True

    def move_if_possible(self) -> None:
        """Into a process of the model's own; where it can't, it serves on from here."""
        try:
            self._move()
        except TetherError as error:
            log.warning("model not isolated", model=str(self._model), error=str(error))

    def _move(self) -> None:
        """If it is not in one: it may be what ends its worker."""
        if isinstance(self._loaded, Isolatable):
            self._loaded.isolate()
            log.warning("model isolated", model=str(self._model))

    def _failed(self, jobs: list[Job], error: Exception) -> None:
        """Who was there when the model's process died may have ended it: who then ends one alone, did."""
        for job in jobs:
            job.tries += 1
            job.deaths += deaths_by(error, is_suspect=job.is_suspect)
        first = jobs[0]
        if len(jobs) > 1:
            self._answer_one_by_one(jobs)
        elif not self.is_ending and runs_again(error, first.deaths, first.tries, is_pure=self._loaded.info.pure):
            if not self.is_unwanted(first, time.monotonic()):
                self.answer(jobs)
        else:
            self._replies.refuse(first.connection, first.id, judged(error, first.deaths))

    def _answer_one_by_one(self, jobs: list[Job]) -> None:
        """What failed as a batch. Where each of them runs alone, there were too many rows: of a model's memory, or of its graph's limit."""
        failures = self._stats.failures
        for job in jobs:
            if not self.is_unwanted(job, time.monotonic()):
                self.answer([job])
        if self._stats.failures == failures:
            self._queue.failed(jobs[0].rows.key, sum([job.rows.count for job in jobs]))

    def _run(self, jobs: list[Job]) -> Tensors:
        begun = time.perf_counter()
        inputs = join_inputs([job.request for job in jobs])
        self._guard.begin(jobs)
        try:
            outputs = self._loaded.run(inputs)
        finally:
            self._guard.end()
            self._stats.busy += time.perf_counter() - begun
        if self.is_on_trial:
            check_numbers(inputs, outputs, len(jobs))
        rows = sum([job.rows.count for job in jobs])
        if self._loaded.info.batched:
            for name, array in outputs.items():
                if array.ndim == 0 or array.shape[0] != rows:
                    raise ModelFailedError(f"output {name!r} has shape {array.shape} for {rows} rows; its first axis must be the batch")
        self._stats.batches += 1
        self._stats.rows += rows
        return outputs
