"""Pure: which routes to a version are left out for a while, by what requests saw of them, and when they are tried again.

As Envoy's outlier detection has it: a route is *ejected* when its worker fails several requests in a row, answers many times slower than
the others, or falls silent while others answer.  After a time that grows with each ejection one request is its *probe*: it is back when
that is answered, so a client's request is the price.  One that fell silent is not probed, since that would cost seconds: it is back once it
has answered anything.  Never more than half of the routes are out, and so never the last one.

What may be the request's own fault is no error of a route: `Verdict`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Final

from tether.routing.tracks import Track

__all__ = ["ERRORS", "SILENCE", "Health", "Verdict"]

ERRORS: Final = 5
"""In a row, as Envoy's default: fewer happen by chance."""
_FAILING: Final = 1.0
"""Seconds of errors and nothing else after which it is enough as well: a worker that gets few requests."""
SILENCE: Final = 1.0
"""Seconds without any answer to requests that usually take less: then a request is sent to another worker as well."""
_PATIENCE: Final = 3.0
"""How many times as long as the longest answer of late a worker may be silent: slow models are. The orchestrator's pings are deceived by
none, and take a second more; this is for what they do not see."""
_FADES: Final = 0.98
"""Each second, of that longest answer: a model that is slow at times is known to be for a minute or two."""
_FIRST: Final = 0.5
"""Seconds of the first ejection; each further one in a row lasts twice as long."""
_LONGEST: Final = 4.0
"""A worker that was cured is back within five seconds."""
_FORGOTTEN: Final = 30.0
"""Seconds in order after which the next ejection is a first one again."""
_SLOW: Final = 8.0
"""How many times as long as the others' median takes a route that is out of order: a slower machine is not."""
_NOTICED: Final = 0.25
"""Seconds by which it has to be slower besides: below nobody minds, and policies that look at open requests see to it."""
_ENOUGH: Final = 10
"""Answers from which an average tells something."""


class Verdict(enum.Enum):
    """What an answer says of the worker that gave it."""

    FINE = "a result"
    NEUTRAL = "a refusal: of what was asked, or for want of room or time, which is load and no reason to take a worker away"
    MODEL = "the model raised: the input may be at fault, or this copy"
    BROKEN = "it failed in a way of which no request is the cause"


class Health:
    """Of the routes of one version. `tell` hears of a route that is out (True) or back (False)."""

    def __init__(self, tell: Callable[[Track, bool], None]) -> None:
        self._tell = tell
        self._tracks: Sequence[Track] = ()
        self._longest = 0.0
        """Seconds that an answer took, of late."""
        self.out: list[Track] = []
        self.own: Sequence[Track] = ()
        """In order, and the lab's own; another object whenever they are others."""
        self.lent: Sequence[Track] = ()

    def follow(self, tracks: Sequence[Track]) -> None:
        """These are the routes from now on."""
        self._tracks = tracks
        self.out = [track for track in tracks if track.is_out]
        while len(self.out) > len(tracks) // 2:
            self._return(self.out[0], self.out[0].back_at)
        self._sort()

    def took(self, track: Track, seconds: float, now: float) -> None:
        """It answered after so long, as it should."""
        track.took(seconds, now)
        self._longest = max(self._longest, seconds)
        if track.is_out and (track.is_probed or track.cause == "silent"):
            self._probed(track, seconds, now)

    def flowed(self, track: Track, now: float) -> None:
        """It gave a stream to its end: how long that took was its reader's matter."""
        track.errors = 0
        track.replied = track.succeeded = now
        if track.is_out and (track.is_probed or track.cause == "silent"):
            self._return(track, now)

    def heard(self, track: Track, now: float) -> None:
        """It answered, and not with a result: it is there, at least."""
        track.replied = now
        if track.is_out and track.cause == "silent":
            self._return(track, now)
        elif track.is_probed:
            self._again(track, now)

    def failed(self, track: Track, now: float, *, by_itself: bool = True) -> None:
        """A request failed. Not `by_itself`: it, too, may be to blame, so others have to have done better meanwhile."""
        if track.errors == 0:
            track.failing_since = now
        track.errors += 1
        if track.is_out:
            self.let_go(track, now)
        elif not by_itself and not self._others_did_better(track):
            return
        elif track.errors >= ERRORS or (track.errors > 1 and now - track.failing_since >= _FAILING):
            self._eject(track, "errors", now)

    def let_go(self, track: Track, now: float) -> None:
        """Nobody waits any more for the request that was its probe, or may have been."""
        if track.is_probed:
            self._again(track, now)

    def is_silent(self, track: Track, sent: float, now: float) -> bool:
        """Whether it has answered nothing since a request was `sent`, for far longer than any answer took lately."""
        return track.replied < sent and now - sent > max(SILENCE, _PATIENCE * self._longest)

    def fell_silent(self, track: Track, sent: float, now: float) -> None:
        """As `is_silent` says. It is out if others have answered meanwhile."""
        if track.is_out:
            self.let_go(track, now)
        elif any(each.replied > sent for each in self._tracks if each is not track):
            self._eject(track, "silent", now)

    def review(self, now: float) -> None:
        """Look for routes that are too slow, and for silent ones that were heard again, and let peaks fade; once in a second."""
        self._longest *= _FADES
        for track in self.out[:]:
            if track.cause == "silent" and track.owes() < track.owed:
                self._return(track, now)
        for peers in (self.own, self.lent):
            limit = _slow_from(peers)
            for track in peers:
                track.rested(now)
                if track.answers >= _ENOUGH and track.usual > limit:
                    self._eject(track, "slow", now)

    def due(self, now: float) -> Track | None:
        """Of those that are out one that is to be tried, or has shown a sign of life."""
        for track in self.out:
            if track.cause == "silent":
                if track.owes() < track.owed:
                    return track
            elif now >= track.ejected_until and not track.is_probed:
                return track
        return None

    def probe(self, track: Track, now: float) -> None:
        """The next request goes to one that is out; to one that was silent and has answered as to any other."""
        if track.cause == "silent":
            self._return(track, now)
        else:
            track.is_probed = True

    def trust(self, track: Track, now: float) -> None:
        """Take one that is `due` back without a probe."""
        self._return(track, now)

    def _others_did_better(self, track: Track) -> bool:
        return any(each.succeeded > track.failing_since and not each.errors for each in self._tracks if each is not track)

    def _probed(self, track: Track, seconds: float, now: float) -> None:
        if track.cause == "slow" and seconds > _slow_from(self.lent if track.is_lent else self.own):
            self._again(track, now)
        else:
            self._return(track, now)

    def _eject(self, track: Track, cause: str, now: float) -> None:
        if len(self.out) + 1 > len(self._tracks) // 2 or track not in self._tracks:  # its route is gone: nobody is to probe it
            return
        if now - track.back_at > _FORGOTTEN:
            track.stints = 0
        track.is_out, track.cause, track.owed = True, cause, track.owes()
        self._again(track, now)
        self.out.append(track)
        self._sort()
        self._tell(track, True)

    def _again(self, track: Track, now: float) -> None:
        track.is_probed = False
        track.ejected_until = now + min(_FIRST * 2**track.stints, _LONGEST)
        track.stints = min(track.stints + 1, 8)

    def _return(self, track: Track, now: float) -> None:
        track.is_out = track.is_probed = False
        track.errors = track.answers = 0
        track.latency = track.usual = 0.0
        track.back_at = now
        if track in self.out:  # else its route is gone, and this is an answer that was still on its way
            self.out.remove(track)
        self._sort()
        self._tell(track, False)

    def _sort(self) -> None:
        usable = [track for track in self._tracks if not track.is_out]
        self.own = [track for track in usable if not track.is_lent]
        self.lent = [track for track in usable if track.is_lent]


def _slow_from(peers: Sequence[Track]) -> float:
    """Seconds from which an answer of one of them is too slow, by what is usual for them: the lower of two in the middle."""
    usual = median_low([track.usual for track in peers if track.answers] or [math.inf])
    return max(_SLOW * usual, usual + _NOTICED)
