"""Pure: the labs that lend workers to this one: what they offer, which of them answer, when each is asked, and when it is given up.

A lab that registered and answered is *up*: it stands in the routing table. It is asked each second, and is down after two without an
answer. One that is down is asked again after growing pauses, until it registers anew, ends it, or is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgspec

from tether.errors import BadInputError, BadScopeError, QueueFullError
from tether.events import LentWorker
from tether.security.scopes import Scope
from tether.types import WorkerId

__all__ = ["EVERY", "INTERVAL", "MOST_LABS", "SILENCE", "LentState", "Offer", "Turn", "Vitals", "covers", "worker_of"]

INTERVAL: Final = 1.0
"""Seconds between two questions to a lab that is up."""
SILENCE: Final = 2.0
"""Seconds without an answer after which it is down."""
MOST_LABS: Final = 64
"""Each costs a question a second."""
EVERY: Final = "*"
"""In place of a glob: all models."""
_MOST: Final = 1 << 20
"""Of workers, GPUs, slots that a lab may say that it has."""
_SOON, _AT_LAST = 0.25, 30.0
"""Seconds until one that does not answer is asked again: at first, and at most."""
_FORGOTTEN: Final = 600.0
"""Seconds after which one that is down is asked no more: it registers again by itself when it is back."""
_STALLED: Final = 0.75
"""Seconds between two turns from which on it was this process that heard nothing."""
_KEY_DIGITS: Final = 16


class Offer(msgspec.Struct, frozen=True):
    """What a lab offers to another one, as `register` carries it."""

    workers: int
    gpus: int = 0
    slots: int = 0
    """Requests that it takes at a time."""
    models: str = EVERY
    """Glob of the other lab's own models that it runs."""

    def checked(self) -> Offer:
        """Raises: BadInputError: it makes no sense."""
        if not all(0 <= each <= _MOST for each in (self.workers, self.gpus, self.slots)):
            raise BadInputError(f"workers, GPUs and slots are numbers from 0 to {_MOST}")
        if self.workers and not self.slots:
            raise BadInputError("workers without a slot run nothing: lend at least one")
        try:
            scope = Scope.parse(f"infer:{self.models}")
        except BadScopeError as error:
            raise BadInputError(f"the models that are lent for: {error}") from None
        if "~" in scope.models:
            raise BadInputError("workers are lent for a lab's own models: give a glob without a publisher")
        return self

    def covers(self, model: str) -> bool:
        """Whether a model of this name, without a publisher, is run."""
        return covers(self.models, model)


class Vitals(msgspec.Struct, frozen=True):
    """How a lab that lends is, as each of its answers says."""

    slots: int = 0
    """Free ones."""
    queue: float = 0.0
    """Seconds until a request that comes now would begin."""
    gpus: int = 0
    models: int = 0
    """How many are loaded there."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What is to be done now."""

    ask: tuple[str, ...] = ()
    """Keys of labs: what comes of it is `answered` or `failed`."""
    lost: tuple[str, ...] = ()
    """Keys of those that are down since."""


@dataclass(slots=True)
class _Lab:
    offer: Offer
    heard: float
    """Of its last answer."""
    number: int = 0
    is_up: bool = False
    is_asked: bool = False
    due: float = 0.0
    pause: float = _SOON
    vitals: Vitals = field(default_factory=Vitals)


class LentState:
    """Of one lab. Times are of a monotonic clock."""

    def __init__(self, now: float) -> None:
        self._labs: dict[str, _Lab] = {}
        self._numbers = 0
        self._turned = now

    @property
    def workers(self) -> tuple[LentWorker, ...]:
        """Those that are up, as the orchestrator is told of them."""
        up = sorted((peer, lab) for peer, lab in self._labs.items() if lab.is_up)
        return tuple(LentWorker(worker_of(peer), peer, lab.number, lab.offer.gpus, lab.offer.slots, lab.offer.models) for peer, lab in up)

    def peer_of(self, worker: str, number: int) -> str | None:
        """Whose worker it is; None: that registration is over."""
        found = (peer for peer, lab in self._labs.items() if lab.is_up and lab.number == number and worker_of(peer) == worker)
        return next(found, None)

    def offer_of(self, peer: str) -> Offer | None:
        """What it offers, up or down; None: it is not registered."""
        lab = self._labs.get(peer)
        return None if lab is None else lab.offer

    def vitals_of(self, peer: str) -> Vitals | None:
        """What it said last; None: it is down, or not registered."""
        lab = self._labs.get(peer)
        return lab.vitals if lab is not None and lab.is_up else None

    def check_room(self, peer: str) -> None:
        """Raises: QueueFullError: no other lab can be taken."""
        if peer not in self._labs and len(self._labs) >= MOST_LABS:
            raise QueueFullError(f"{MOST_LABS} labs lend workers to this one, more are not taken: try again when one has ended it")

    def register(self, peer: str, offer: Offer, vitals: Vitals, now: float) -> None:
        """It registered and answered; the same offer of one that is up changes nothing. Raises: QueueFullError."""
        self.check_room(peer)
        before = self._labs.get(peer)
        lab = self._labs.setdefault(peer, _Lab(offer, now))
        goes_on = before is not None and before.is_up and before.offer.models == offer.models
        lab.offer = offer
        self._up(lab, vitals, now, anew=not goes_on)

    def end(self, peer: str) -> bool:
        """It lends no more, or may not; whether it was up."""
        lab = self._labs.pop(peer, None)
        return lab is not None and lab.is_up

    def forget(self) -> None:
        """All of them; numbers go on."""
        self._labs.clear()

    def answered(self, peer: str, vitals: Vitals, now: float) -> None:
        """One that was down is up again, with nothing loaded."""
        lab = self._labs.get(peer)
        if lab is not None:
            self._up(lab, vitals, now, anew=not lab.is_up)

    def failed(self, peer: str, now: float) -> None:
        """It could not be asked, or did not answer."""
        lab = self._labs.get(peer)
        if lab is None or not lab.is_asked:
            return
        lab.is_asked = False
        if lab.is_up:
            lab.due = min(lab.due, now + _SOON)
        else:
            lab.due, lab.pause = now + lab.pause, min(2 * lab.pause, _AT_LAST)

    def leaves(self, peer: str, now: float) -> bool:
        """It is about to end, and takes no request any more; whether it was up."""
        lab = self._labs.get(peer)
        if lab is None or not lab.is_up:
            return False
        self._down(lab, now)
        return True

    def turn(self, now: float) -> Turn:
        """To be called some times a second. Time in which it was not called is nobody's silence: answers may wait to be heard."""
        missed = now - self._turned
        self._turned = now
        if missed > _STALLED:
            for lab in self._labs.values():
                lab.heard += missed
        lost = tuple(peer for peer, lab in self._labs.items() if lab.is_up and now - lab.heard > SILENCE)
        for peer in lost:
            self._down(self._labs[peer], now)
        self._labs = {peer: lab for peer, lab in self._labs.items() if lab.is_up or now - lab.heard < _FORGOTTEN}
        ask = tuple(peer for peer, lab in self._labs.items() if not lab.is_asked and now >= lab.due)
        for peer in ask:
            self._labs[peer].is_asked, self._labs[peer].due = True, now + INTERVAL
        return Turn(ask, lost)

    def _up(self, lab: _Lab, vitals: Vitals, now: float, *, anew: bool) -> None:
        if anew:
            self._numbers += 1
            lab.number = self._numbers
        if anew and not lab.is_asked:
            lab.due = now + INTERVAL
        lab.is_up, lab.is_asked, lab.heard, lab.vitals, lab.pause = True, False, now, vitals, _SOON

    def _down(self, lab: _Lab, now: float) -> None:
        lab.is_up, lab.due = False, now + lab.pause


def covers(glob: str, model: str) -> bool:
    """Whether the glob is for a model of this name, which has no publisher in it."""
    return Scope("infer", glob).covers(model)


def worker_of(peer: str) -> WorkerId:
    """What a lab's workers are called together."""
    return WorkerId(f"lab-{peer[:_KEY_DIGITS]}")
