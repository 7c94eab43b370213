"""Pure: which models are in a worker's memory: who may come in, who goes to make room, who has to wait and who can't be held.

Who goes first is decided as by GreedyDual-Size-Frequency (Cherkasova 1998, after Young's and Cao's GreedyDual): what a model is worth is
what it costs to load it again, for the share of memory that it takes, the more the more it was used, above what the last one was worth
that had to go. So what is not used ages by what goes, without a clock; what loads slowly or was used often stays longer; and a scan of
models that are asked for once passes those by. Two things are ours: uses count up to 64, since a hundred thousand requests of this morning
must not outlast a day, and nine tenths of them are remembered when a model goes, since with ten times more models than fit those that are
asked for much go and come, too. `benchmarks/residency` has it beside LRU and others.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from tether.types import ModelVersion

__all__ = ["GPU", "RAM", "Decision", "Phase", "Residency", "Size"]

RAM, GPU = "ram", "gpu"
"""Where bytes lie: in the machine's memory, on the worker's card."""
Size = Mapping[str, int]
"""Where → bytes."""

SETTLE = 2.0
"""Seconds after its load in which a model that nobody has used yet stays: those who wait for it have to hear of it first. Without that two
models that are asked for in turn could put each other out for ever before either answers."""
PATIENCE = 0.5
"""Seconds that a load waits for models to fall idle before it takes the place of a busy one, which answers what it has first."""
PASSES = 8
"""Later ones that may come in before one that waits for more room than there is: then it is its turn."""
_REMEMBERED = 4096
"""Models whose size and uses are kept after they went."""
_MOST_USES, _STILL_COUNTS = 64, 0.9


class Phase(Enum):
    """Of a model that takes memory."""

    LOADING = auto()
    """Its room is reserved."""
    IDLE = auto()
    BUSY = auto()
    """It runs, or requests wait for it."""
    STREAMING = auto()
    """It gives an answer in parts: nobody knows when that ends, and what it has not given would be lost."""
    LEAVING = auto()
    """It answers what it has; then its room is free."""


@dataclass(slots=True)
class _Resident:
    size: Size
    phase: Phase
    pinned: bool
    keep_alive: float | None
    since: float
    """When it was loaded."""
    seconds: float = 0.0
    """That it took to load."""
    uses: float = 0
    worth: float = 0.0
    used_at: float = -math.inf

    def is_settled(self, now: float) -> bool:
        return self.used_at > -math.inf or now - self.since >= SETTLE

    def is_kept(self, now: float) -> bool:
        """Whether somebody said that it is to stay in memory so long after its last use."""
        return self.keep_alive is not None and now < max(self.used_at, self.since) + self.keep_alive

    def is_over(self, now: float) -> bool:
        if self.keep_alive is None or self.phase is not Phase.IDLE or self.pinned:
            return False
        return self.is_settled(now) and not self.is_kept(now)


@dataclass(slots=True)
class _Want:
    size: Size
    since: float
    pinned: bool
    keep_alive: float | None
    passed: int = 0
    """How many that came later were let in before."""


@dataclass(frozen=True, slots=True)
class _Known:
    """Of a model that was here before."""

    size: Size
    uses: float


@dataclass(slots=True)
class Decision:
    """What is to be done; it is so from then on as far as `Residency` is concerned."""

    admitted: list[ModelVersion] = field(default_factory=list)
    """These may be loaded: `loaded` or `gone` is to follow."""
    evicted: list[ModelVersion] = field(default_factory=list)
    """These have to leave: `gone` is to follow."""
    refused: dict[ModelVersion, str] = field(default_factory=dict)
    """These can't be held, and why."""


class Residency:
    """Of one worker. Its owner tells what happens and asks what to do (`decide`); times are of one monotonic clock."""

    def __init__(self, budget: Size) -> None:
        """`budget`: where → bytes; what is not named is not bounded."""
        self.budget = dict(budget)
        self._residents: dict[ModelVersion, _Resident] = {}
        self._wants: dict[ModelVersion, _Want] = {}
        """First come, first served."""
        self._known: OrderedDict[ModelVersion, _Known] = OrderedDict()
        self._age = 0.0
        """What the last one was worth that had to go."""

    def want(self, model: ModelVersion, size: Size, now: float, *, pinned: bool = False, keep_alive: float | None = None) -> None:
        """It is to be loaded. `size`: as its files tell; what it took the last time is known better.

        `pinned`: it stays whatever else needs room. `keep_alive`: seconds after its last use in which others go first, and after which it
        goes without need.
        """
        known = self._known.get(model)
        expected = known.size if known is not None else size
        # what turned out larger than all that there is was held all the same, alone
        fitting = {place: min(nbytes, max(self.budget.get(place, nbytes), size.get(place, 0))) for place, nbytes in expected.items()}
        self._wants[model] = _Want(fitting, now, pinned, keep_alive)

    def keep(self, model: ModelVersion, *, pinned: bool, keep_alive: float | None) -> None:
        """As `want` says, from now on."""
        held = self._residents.get(model) or self._wants.get(model)
        if held is not None:
            held.pinned, held.keep_alive = pinned, keep_alive

    def loaded(self, model: ModelVersion, size: Size, seconds: float, now: float) -> None:
        """It is there, takes so much and took so long."""
        resident = self._residents[model]
        resident.size, resident.seconds, resident.since, resident.phase = dict(size), seconds, now, Phase.IDLE
        self._value(resident)

    def measured(self, model: ModelVersion, size: Size) -> None:
        """It takes more there, or less, than it did."""
        resident = self._residents.get(model)
        if resident is not None and resident.phase is not Phase.LOADING:
            resident.size = {**resident.size, **size}

    def used(self, model: ModelVersion, uses: int, now: float, *, is_busy: bool, is_streaming: bool = False) -> None:
        """It answered so many requests since this was told last."""
        resident = self._residents.get(model)
        if resident is None or resident.phase not in {Phase.IDLE, Phase.BUSY, Phase.STREAMING}:
            return
        is_busy |= is_streaming
        resident.phase = Phase.STREAMING if is_streaming else Phase.BUSY if is_busy else Phase.IDLE
        if uses or is_busy:
            resident.uses = min(resident.uses + uses, _MOST_USES)
            resident.used_at = now
            self._value(resident)

    def leaves(self, model: ModelVersion) -> None:
        """It goes for another reason than room: `gone` is to follow."""
        if model in self._residents:
            self._residents[model].phase = Phase.LEAVING

    def gone(self, model: ModelVersion) -> None:
        """It is in memory no more, could not be loaded, or is not wanted any more; does nothing where it was not."""
        self._wants.pop(model, None)
        resident = self._residents.pop(model, None)
        if resident is None or resident.phase is Phase.LOADING:
            return
        self._known[model] = _Known(resident.size, resident.uses * _STILL_COUNTS)
        self._known.move_to_end(model)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    @property
    def first_in_line(self) -> ModelVersion | None:
        """Who waits for room the longest; None: nobody does."""
        return next(iter(self._wants), None)

    @property
    def taken(self) -> Size:
        """Where → bytes that are in use, or reserved."""
        places = {*self.budget, *(place for resident in self._residents.values() for place in resident.size)}
        return {place: sum(resident.size.get(place, 0) for resident in self._residents.values()) for place in sorted(places)}

    @property
    def sizes(self) -> Mapping[ModelVersion, Size]:
        """Of what is in memory."""
        return {model: resident.size for model, resident in self._residents.items() if resident.phase is not Phase.LOADING}

    def phase(self, model: ModelVersion) -> Phase | None:
        """None: it takes no memory."""
        resident = self._residents.get(model)
        return resident.phase if resident else None

    def decide(self, now: float) -> Decision:
        """Let in who fits, in the order in which they came; send away who is in their way."""
        decision = Decision()
        for model in [model for model, resident in self._residents.items() if resident.is_over(now)]:
            self._evict(model, decision)
        taken = self.taken
        free = {place: nbytes - taken[place] for place, nbytes in self.budget.items()}
        coming = self._sum(resident.size for resident in self._residents.values() if resident.phase is Phase.LEAVING)
        blocked: list[_Want] = []
        for model, want in list(self._wants.items()):
            if any(other.passed >= PASSES for other in blocked):
                break
            if (reason := self._refusal(model, want)) is not None:
                decision.refused[model] = reason
                del self._wants[model]
            elif _fits(want.size, free):
                free = _less(free, want.size)
                self._admit(model, want, now, decision)
                for other in blocked:
                    other.passed += 1
            elif self._make_room(want, free, coming, now, decision):
                free, coming = _claimed(free, coming, want.size)
            else:
                blocked.append(want)
        self._shed(free, coming, now, decision)
        return decision

    def _admit(self, model: ModelVersion, want: _Want, now: float, decision: Decision) -> None:
        del self._wants[model]
        known = self._known.get(model)
        uses = known.uses if known is not None else 0
        self._residents[model] = _Resident(want.size, Phase.LOADING, want.pinned, want.keep_alive, now, uses=uses)
        decision.admitted.append(model)

    def _evict(self, model: ModelVersion, decision: Decision) -> None:
        self._residents[model].phase = Phase.LEAVING
        decision.evicted.append(model)

    def _refusal(self, model: ModelVersion, want: _Want) -> str | None:
        """Why it can't be held whoever goes."""
        staying = (resident for resident in self._residents.values() if resident.pinned and resident.phase is not Phase.LEAVING)
        pinned = self._sum(resident.size for resident in staying)
        for place, budget in self.budget.items():
            needed, kept = want.size.get(place, 0), pinned.get(place, 0)
            if needed > budget:
                return f"{model} needs {needed} bytes of {place} and the worker may use {budget} for models"
            if needed > budget - kept:
                return f"{model} needs {needed} bytes of {place}, and of the {budget} that the worker may use pinned models take {kept}"
        return None

    def _put_out(self, model: ModelVersion, decision: Decision) -> None:
        """For room: those that stay have aged by it. What ran when it had to go says nothing of them."""
        resident = self._residents[model]
        if resident.phase is Phase.IDLE:
            self._age = max(self._age, resident.worth)
        self._evict(model, decision)

    def _make_room(self, want: _Want, free: Size, coming: dict[str, int], now: float, decision: Decision) -> bool:
        """Send away what it takes; False: even that would not be enough now."""
        missing = {place: want.size.get(place, 0) - nbytes - coming.get(place, 0) for place, nbytes in free.items()}
        victims = self._victims(missing, now, even_busy=now - want.since >= PATIENCE)
        if victims is None:
            return False
        for model in victims:
            for place, nbytes in self._residents[model].size.items():
                coming[place] = coming.get(place, 0) + nbytes
            self._put_out(model, decision)
        return True

    def _victims(self, missing: Size, now: float, *, even_busy: bool) -> list[ModelVersion] | None:
        """The least worth that together take as much as is missing; None: all of them take less."""
        left = {place: nbytes for place, nbytes in missing.items() if nbytes > 0}
        allowed = {Phase.IDLE, Phase.BUSY} if even_busy else {Phase.IDLE}
        able = {
            model: resident
            for model, resident in self._residents.items()
            if resident.phase in allowed and not resident.pinned and resident.is_settled(now)
        }
        chosen: list[ModelVersion] = []
        for model in sorted(able, key=lambda model: self._order(model, now)):
            if any(nbytes > 0 and able[model].size.get(place, 0) for place, nbytes in left.items()):
                chosen.append(model)
                left = _less(left, able[model].size)
        if any(nbytes > 0 for nbytes in left.values()):
            return None
        return self._needed(chosen, left)

    def _needed(self, chosen: list[ModelVersion], spare: Size) -> list[ModelVersion]:
        """Without those whose room turned out not to be needed, the most worth first. `spare`: below zero, what is too much."""
        needed = list(chosen)
        for model in reversed(chosen):
            size = self._residents[model].size
            if all(size.get(place, 0) + nbytes <= 0 for place, nbytes in spare.items()):
                spare = {place: nbytes + size.get(place, 0) for place, nbytes in spare.items()}
                needed.remove(model)
        return needed

    def _order(self, model: ModelVersion, now: float) -> tuple[bool, bool, float, float, str]:
        resident = self._residents[model]
        return resident.phase is Phase.BUSY, resident.is_kept(now), resident.worth, resident.used_at, str(model)

    def _shed(self, free: Size, coming: Size, now: float, decision: Decision) -> None:
        """What took more than was expected goes with others until the budget holds again; one alone stays."""
        over = {place: -nbytes - coming.get(place, 0) for place, nbytes in free.items()}
        if any(nbytes > 0 for nbytes in over.values()) and len(self._residents) > 1:
            for model in self._victims(over, now, even_busy=False) or []:
                self._put_out(model, decision)

    def _value(self, resident: _Resident) -> None:
        shares = (nbytes / self.budget[place] for place, nbytes in resident.size.items() if self.budget.get(place))
        share = max(shares, default=0.0)
        resident.worth = self._age + max(resident.uses, 1) * resident.seconds / max(share, 1e-9)

    @staticmethod
    def _sum(sizes: Iterable[Size]) -> dict[str, int]:
        total: dict[str, int] = {}
        for size in sizes:
            for place, nbytes in size.items():
                total[place] = total.get(place, 0) + nbytes
        return total


def _fits(size: Size, free: Size) -> bool:
    return all(size.get(place, 0) <= nbytes for place, nbytes in free.items())


def _less(free: Size, size: Size) -> dict[str, int]:
    return {place: nbytes - size.get(place, 0) for place, nbytes in free.items()}


def _claimed(free: Size, coming: Size, size: Size) -> tuple[dict[str, int], dict[str, int]]:
    """What is left of both for those who come later, when one waits for what is coming."""
    from_free = {place: min(max(nbytes, 0), size.get(place, 0)) for place, nbytes in free.items()}
    rest = {place: size.get(place, 0) - nbytes for place, nbytes in from_free.items()}
    return _less(free, from_free), {place: max(nbytes - rest.get(place, 0), 0) for place, nbytes in coming.items()}
