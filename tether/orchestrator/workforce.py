"""Pure: the workers, which of them has to do with which version, and what changed since somebody looked.

A change of one worker or version must not cost a walk over all: with 1,000 workers and 10,000 versions each event would take seconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Iterator
from itertools import chain

from tether.events import LentWorker
from tether.orchestrator.registry import KnownWorker, Standing, lent_worker
from tether.routing.table import WorkerEntry
from tether.types import ModelVersion, WorkerId, WorkerMemory, WorkerSite

__all__ = ["FORGET_AFTER", "Workforce"]

FORGET_AFTER = 3600.0
"""Seconds that a lost worker stays in the table, for people to see."""

_ANSWERING = {"running", "draining"}


class Workforce:
    """Whoever changes a worker says so here (`note`, `remember`, `stand`): that keeps the index, and marks what must be looked at again."""

    def __init__(self) -> None:
        self._own: dict[str, KnownWorker] = {}
        """By address."""
        self._lent: dict[str, KnownWorker] = {}
        """By id, which is also their address."""
        self.lost: dict[WorkerId, WorkerEntry] = {}
        self._forget_at = math.inf
        self._by_id: dict[WorkerId, KnownWorker] = {}
        self._concerned: dict[ModelVersion, dict[str, KnownWorker]] = {}
        """Version → those that know it, by address."""
        self.failing: dict[ModelVersion, set[str]] = {}
        """Version → addresses of those that failed to load it and are not to be asked at once."""
        self._sizes: dict[str, dict[str, int]] = {}
        """`name:version` → bytes that it takes, by address."""
        self._due: list[tuple[float, int, str, ModelVersion | None]] = []
        """When a worker may be asked again for a version, or (None) gets further copies again: a heap."""
        self._numbers = itertools.count()
        self.kinds: frozenset[tuple[int, WorkerSite]] = frozenset()
        """Whether with a GPU, and where: of those that are there and those that may come back."""
        self.touched: set[ModelVersion] = set()
        """Versions whose place or state may be another one now. These four are emptied by who looked (`settled`)."""
        self.changed: set[WorkerId] = set()
        """Workers whose entry may be another one now."""
        self.freed: set[str] = set()
        """Addresses of workers that can perhaps take what they could not."""
        self.resized: set[str] = set()
        """`name:version` of what was found to take another size."""
        self.shrunk = False
        """Whether one of the lab's own is there no more."""

    def __iter__(self) -> Iterator[KnownWorker]:
        """All, lent ones last."""
        return chain(self._own.values(), self._lent.values())

    def __getitem__(self, address: str) -> KnownWorker:
        return self._own.get(address) or self._lent[address]

    def get(self, address: str) -> KnownWorker | None:
        """By its address; of a lent one, its id."""
        return self._own.get(address) or self._lent.get(address)

    def by_id(self, worker: WorkerId) -> KnownWorker | None:
        """By its name."""
        return self._by_id.get(worker)

    @property
    def has_own(self) -> bool:
        """Whether the lab has a worker of its own."""
        return bool(self._own)

    @property
    def has_lent(self) -> bool:
        """Whether another lab lends one."""
        return bool(self._lent)

    def concerned(self, model: ModelVersion) -> list[KnownWorker]:
        """Those that know the version, in the order of routes, whatever their state."""
        return sorted(self._concerned.get(model, {}).values(), key=_place_in_routes)

    def knowing(self, model: ModelVersion) -> Collection[str]:
        """Addresses of those that know the version."""
        return self._concerned.get(model, {}).keys()

    def having(self, model: ModelVersion) -> list[KnownWorker]:
        """Those that answer and have the version in memory, in the order of routes: also one that is drained, as long as it has it."""
        return [worker for worker in self.concerned(model) if worker.state in _ANSWERING and model in worker.loaded]

    def reached(self, model: ModelVersion) -> list[KnownWorker]:
        """Those that requests go to. Silent ones where no other has the version: it may be the orchestrator that is cut off."""
        return self.having(model) or [worker for worker in self.concerned(model) if worker.state == "silent" and model in worker.loaded]

    def nbytes(self, model: ModelVersion) -> int:
        """That the version takes where it is; 0: it is not known."""
        return max(self._sizes.get(str(model), {}).values(), default=0)

    def entry(self, worker: WorkerId) -> WorkerEntry | None:
        """As gateways and people see it."""
        known = self._by_id.get(worker)
        return self.lost.get(worker) if known is None else known.entry()

    def join(self, worker: KnownWorker) -> None:
        """One of the lab's own is there."""
        before = self._own.get(worker.address)
        if before is not None:
            self._drop(before)
        worker.order = before.order if before is not None else next(self._numbers)
        self._own[worker.address] = worker
        self.lost.pop(worker.id, None)
        self._add(worker)
        self._note_kinds()

    def leave(self, address: str, now: float, *, for_good: bool = False) -> None:
        """One of the lab's own is there no more; people see it as lost for a while, where it is not gone for good."""
        worker = self._own.pop(address, None)
        if worker is None:
            return
        self._drop(worker)
        if not for_good:
            self.lost[worker.id] = WorkerEntry(worker.id, address, worker.pid, "lost", now, worker.gpus, site=worker.site)
            self._forget_at = min(self._forget_at, now + FORGET_AFTER)
        self.shrunk = True
        self._note_kinds()

    def lend(self, lent: Collection[LentWorker], now: float) -> None:
        """Other labs' workers are these now. Others aren't shown as lost: it may be that the lending ended. The manager says what it is."""
        before = self._lent
        for worker in before.values():
            self._drop(worker)
        self._lent = {each.id: lent_worker(each, before.get(each.id), now) for each in lent}
        for order, worker in enumerate(self._lent.values()):
            worker.order = order
            self._add(worker)
            self.touched.update(worker.known)
        self._note_kinds()

    def stand(self, address: str, state: Standing, now: float) -> None:
        """It is running, or it is silent, draining …: then for routes and placement it is as if it were not there."""
        worker = self.get(address)
        if worker is None or worker.state == state:
            return
        worker.state, worker.since = state, now
        self.touched.update(worker.known)
        self.changed.add(worker.id)
        if state == "running":
            self.freed.add(worker.address)
        else:
            self.shrunk = True

    def note(self, worker: KnownWorker, model: ModelVersion) -> None:
        """What the worker has to do with the version is another thing now."""
        _keep(self._concerned, model, worker, is_so=worker.knows(model))
        failure = worker.failed.get(model)
        failing = self.failing.setdefault(model, set())
        if failure is None:
            failing.discard(worker.address)
        else:
            failing.add(worker.address)
            self.look_again(failure.until, worker.address, model)
        if not failing:
            del self.failing[model]
        worker.changed()
        self.touched.add(model)
        self.changed.add(worker.id)

    def remember(self, worker: KnownWorker, memory: WorkerMemory | None) -> None:
        """What its models take now; None: it did not say."""
        if memory is None:
            return
        before, room = worker.memory, worker.room
        worker.memory = memory
        worker.changed()
        self._size(worker, before, memory)
        self.changed.add(worker.id)
        if worker.room > room:
            self.freed.add(worker.address)

    def press(self, worker: KnownWorker) -> None:
        """It put a model out for another one."""
        self.look_again(worker.pressed_until, worker.address, None)

    def look_again(self, when: float, address: str, model: ModelVersion | None) -> None:
        """Mark the version then; None: mark the worker as one that can perhaps take what it could not."""
        heapq.heappush(self._due, (when, next(self._numbers), address, model))

    def pass_time(self, now: float) -> None:
        """Mark what time alone makes another thing; forget who was lost long ago."""
        while self._due and self._due[0][0] <= now:
            _, _, address, model = heapq.heappop(self._due)
            if model is not None:
                self.touched.add(model)
            elif address in self._own or address in self._lent:
                self.freed.add(address)
        if now >= self._forget_at:
            self._forget(now)

    def settled(self) -> None:
        """What was marked has been looked at."""
        self.touched, self.changed, self.freed, self.resized, self.shrunk = set(), set(), set(), set(), False

    def _forget(self, now: float) -> None:
        over = [name for name, entry in self.lost.items() if now - entry.since >= FORGET_AFTER]
        for name in over:
            del self.lost[name]
        self.changed.update(over)
        self._forget_at = min((entry.since + FORGET_AFTER for entry in self.lost.values()), default=math.inf)
        self._note_kinds()

    def _add(self, worker: KnownWorker) -> None:
        self._by_id[worker.id] = worker
        for model in set(worker.known):
            _keep(self._concerned, model, worker, is_so=True)
            if model in worker.failed:
                self.failing.setdefault(model, set()).add(worker.address)
        self._size(worker, None, worker.memory)
        worker.changed()
        self.changed.add(worker.id)
        self.freed.add(worker.address)

    def _drop(self, worker: KnownWorker) -> None:
        for model in set(worker.known):
            _keep(self._concerned, model, worker, is_so=False)
            failing = self.failing.get(model, set())
            failing.discard(worker.address)
            if not failing:
                self.failing.pop(model, None)
            self.touched.add(model)
        self._size(worker, worker.memory, None)
        if self._by_id.get(worker.id) is worker:
            del self._by_id[worker.id]
        self.changed.add(worker.id)

    def _size(self, worker: KnownWorker, before: WorkerMemory | None, now: WorkerMemory | None) -> None:
        was, models = before.models if before is not None else {}, now.models if now is not None else {}
        for name in [name for name in was.keys() | models.keys() if was.get(name) != models.get(name)]:
            sizes = self._sizes.setdefault(name, {})
            if name in models:
                sizes[worker.address] = models[name]
            else:
                sizes.pop(worker.address, None)
            if not sizes:
                del self._sizes[name]
            self.resized.add(name)

    def _note_kinds(self) -> None:
        there = frozenset((int(worker.gpus > 0), worker.site) for worker in self)
        self.kinds = there | {(int(entry.gpus > 0), entry.site) for entry in self.lost.values()}


def _keep(index: dict[ModelVersion, dict[str, KnownWorker]], model: ModelVersion, worker: KnownWorker, *, is_so: bool) -> None:
    concerned = index.setdefault(model, {})
    if is_so:
        concerned[worker.address] = worker
    else:
        concerned.pop(worker.address, None)
    if not concerned:
        del index[model]


def _place_in_routes(worker: KnownWorker) -> tuple[bool, int]:
    return worker.lent is not None, worker.order
