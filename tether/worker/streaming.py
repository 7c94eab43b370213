"""Answers in parts: streams take turns with batches, a part at a time, and wait while their readers do.

The model runs one thing at a time, so a stream needs no thread of its own and its model no locks: after each batch, and whenever none
waits, one stream takes one step. What was sent and not taken yet is bounded, so who reads slowly stops the generator, not the memory.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

import structlog

from tether.errors import DeadlineExceededError, InternalError, QueueFullError, ServiceUnavailableError, TetherError
from tether.ports import LoadedModel, Streaming
from tether.types import InferRequest, ModelVersion, Tensors
from tether.wire.frames import OK, PART, WITHDRAWN
from tether.wire.oip import encode_response
from tether.worker.run_guard import RunGuard

__all__ = ["Stream", "StreamServer", "Turns"]

log = structlog.get_logger("tether.worker")
_MOST_OPEN: Final = 8
"""Streams of one model that take turns; each keeps what its generator keeps. Later ones wait until one of them ends."""
_MOST_WAITING: Final = 256
"""… so many; each keeps its request."""
_WINDOW: Final = 4
"""Parts that may be under way to their reader."""
_WINDOW_NBYTES: Final = 4 << 20
"""… or so much of them; a single larger one goes alone."""
_STUBBORN: Final = 10.0
"""Seconds that a step, or an end, may go on which was interrupted, because its client left, of a model that would lose what it keeps."""
_PATIENCE: Final = 0.25
"""Seconds that a generator has to end before it is interrupted."""


class Streamed(Protocol):
    """The request of a stream."""

    request: InferRequest
    deadline: float
    is_withdrawn: bool

    @property
    def key(self) -> object:
        """What tells it from all others of the model."""
        ...


Job = TypeVar("Job", bound=Streamed)


@dataclass(slots=True)
class Stream(Generic[Job]):
    """One that is open, or waits to be."""

    job: Job
    parts: Generator[Tensors] | None = None
    """None: nothing of it ran yet."""
    under_way: deque[int] = field(default_factory=deque)
    """Bytes of each part that was sent and not taken."""

    @property
    def may_go(self) -> bool:
        """Whether its reader keeps up."""
        return len(self.under_way) < _WINDOW and sum(self.under_way) < _WINDOW_NBYTES

    def is_unwanted(self, now: float) -> bool:
        """Whether it is to be ended."""
        return self.job.is_withdrawn or self.job.deadline < now


class Turns(Generic[Job]):
    """Pure: who is next. In order of arrival up to `most_open`; of these each in its turn."""

    def __init__(self, most_open: int = _MOST_OPEN) -> None:
        self._most_open = most_open
        self._open: dict[object, Stream[Job]] = {}
        """The one that had its turn last stands last."""
        self._waiting: dict[object, Stream[Job]] = {}

    def __len__(self) -> int:
        return len(self._open) + len(self._waiting)

    def __iter__(self) -> Iterator[Stream[Job]]:
        return iter((*self._open.values(), *self._waiting.values()))

    def add(self, job: Job) -> None:
        """It waits for a place if all are taken. Raises: QueueFullError: too many do."""
        if len(self._waiting) >= _MOST_WAITING:
            raise QueueFullError(f"{_MOST_WAITING} streams wait for this model already: try again later")
        self._waiting[job.key] = Stream(job)
        self._fill()

    def next(self, now: float) -> Stream[Job] | None:
        """Whose turn it is: first those that are to be ended, open or not; None: all wait for their readers."""
        for stream in self:
            if stream.is_unwanted(now):
                return stream
        return next((stream for stream in self._open.values() if stream.may_go), None)

    def sent(self, stream: Stream[Job], nbytes: int) -> None:
        """It had its turn, and a part of so many bytes is on its way."""
        stream.under_way.append(nbytes)
        self._open[stream.job.key] = self._open.pop(stream.job.key)

    def taken(self, key: object) -> None:
        """Its reader took a part. Late word of one that has ended is no fault."""
        stream = self._open.get(key)
        if stream is not None and stream.under_way:
            stream.under_way.popleft()

    def remove(self, stream: Stream[Job]) -> None:
        """It has ended: the next one that waits gets its place."""
        if self._open.pop(stream.job.key, None) is None:
            del self._waiting[stream.job.key]
        self._fill()

    def withdraw(self, unwanted: Callable[[Job], bool], until: float) -> None:
        """Nobody waits for these any more. One of them may be in the middle of a step, so they are ended in their turn, `until` then."""
        for stream in self:
            if unwanted(stream.job):
                stream.job.is_withdrawn, stream.job.deadline = True, min(stream.job.deadline, until)

    def _fill(self) -> None:
        while self._waiting and len(self._open) < self._most_open:
            key = next(iter(self._waiting))
            self._open[key] = self._waiting.pop(key)


class _Ending:
    """What stands for a stream while its generator ends: interrupted as a run is whose client leaves in a moment."""

    __slots__ = ("_patient_until", "deadline")

    def __init__(self) -> None:
        now = time.monotonic()
        self._patient_until, self.deadline = now + _PATIENCE, now + _STUBBORN

    @property
    def is_withdrawn(self) -> bool:
        return time.monotonic() > self._patient_until


class StreamServer(Generic[Job]):
    """The streams of one model version. Belongs to the model's thread."""

    def __init__(
        self,
        model: ModelVersion,
        loaded: LoadedModel,
        guard: RunGuard,
        reply: Callable[[Job, int, bytes, int], None],
        refuse: Callable[[Job, Exception], None],
    ) -> None:
        """`reply` takes a status, a body and the length of its JSON part."""
        self._model, self._loaded, self._guard, self._reply, self._refuse = model, loaded, guard, reply, refuse
        self._turns: Turns[Job] = Turns()
        self.add, self.taken = self._turns.add, self._turns.taken

    def __len__(self) -> int:
        return len(self._turns)

    def withdraw(self, unwanted: Callable[[Job], bool]) -> None:
        """Nobody waits for these any more."""
        if self._turns:
            self._turns.withdraw(unwanted, time.monotonic() + _STUBBORN)

    @property
    def is_ready(self) -> bool:
        """Whether `step` has something to do now."""
        return len(self._turns) > 0 and self._turns.next(time.monotonic()) is not None

    def step(self) -> float:
        """The turn of one stream: a part of it, or its end. Seconds that it took; 0: there is none, or all wait for their readers."""
        if not self._turns:
            return 0.0
        now = time.monotonic()
        stream = self._turns.next(now)
        if stream is None:
            return 0.0
        if stream.is_unwanted(now):
            self._leave(stream)
            self._tell_unwanted(stream.job)
        else:
            self._advance(stream)
        return time.monotonic() - now

    def _advance(self, stream: Stream[Job]) -> None:
        try:
            part = self._part(stream)
            encoded = None if part is None else encode_response(part, self._model, stream.job.request, self._loaded.info)
        except Exception as error:
            self._leave(stream)
            self._refuse(stream.job, error)
            return
        if encoded is None:
            self._turns.remove(stream)
            self._reply(stream.job, OK, b"", 0)
        else:
            self._turns.sent(stream, len(encoded[0]))
            self._reply(stream.job, PART, *encoded)

    def end(self) -> None:
        """End all of them: the model goes."""
        for stream in self._turns:
            self._leave(stream)
            self._refuse(stream.job, ServiceUnavailableError("the model left memory in the middle of this stream; ask again"))

    def _part(self, stream: Stream[Job]) -> Tensors | None:
        """The next one, of a run that is interrupted when nobody waits for it any more; None: there is none."""
        if stream.parts is None:
            if not isinstance(self._loaded, Streaming):
                raise InternalError("a stream was asked of a model that has none")
            stream.parts = self._loaded.stream(stream.job.request.inputs)
        self._guard.begin((stream.job,))
        try:
            return next(stream.parts, None)
        finally:
            self._guard.end()

    def _leave(self, stream: Stream[Job]) -> None:
        """Let the model's generator end, or make it."""
        self._turns.remove(stream)
        if stream.parts is None:
            return
        self._guard.begin((_Ending(),))
        try:
            stream.parts.close()
        except TetherError as error:
            log.warning("a stream did not end in order", model=str(self._model), error=str(error))
        finally:
            self._guard.end()

    def _tell_unwanted(self, job: Job) -> None:
        if job.is_withdrawn:
            self._reply(job, WITHDRAWN, b"", 0)
        else:
            self._refuse(job, DeadlineExceededError("the deadline passed in the middle of the stream; give a longer timeout"))
