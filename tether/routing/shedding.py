"""Pure: which requests are refused at once, since their answers would come too late for anybody.

One rule: a request is refused when what is open before it, divided by how fast this version is answered, is more than it may wait. That
is the smaller of four fifths of its own deadline and of the queue's patience: 10 s for a burst, which a queue is there for, and 2 s once a
burst turned out to be none, until the queue has come down to half of that. So what is answered is in time, the workers never run dry, and
half of the load after an overload finds no queue after 4 s. That a queue is good as long as it goes away again, and that one which stands
gains nothing and costs each its whole length, is CoDel's point (Nichols, Jacobson: Controlling Queue Delay, ACM Queue 10/5, 2012; for
servers: Maurer, Fail at Scale, ACM Queue 13/8, 2015). The rate is the best of the last seconds of what was answered during a request's life
over its length, as BBR's (Cardwell et al., ACM Queue 14/5, 2016): it is right under load, with batches, with few requests and with many
workers, and where it errs it admits.
"""

from __future__ import annotations

import math
import re
from typing import Final

from tether.errors import QueueFullError
from tether.ports import Hop
from tether.routing.table import Table, VersionEntry
from tether.serving_settings import ServingSettings
from tether.types import ModelVersion

__all__ = ["BURST", "FEW", "STANDING", "Place", "Shedding"]

BURST: Final = 10.0
"""Seconds of requests that may wait at first: who sends a thousand at once has them run. A model's `queue_timeout` takes its place: its
workers keep it, and know it better if it is under a second."""
STANDING: Final = 2.0
"""Seconds of them that may wait once more came than `BURST`."""
FEW: Final = 64
"""Open requests from which a queue may be too long, whatever one takes: slow models have callers that wait for them."""
_SHARE: Final = 0.8
"""Of a deadline, that may pass in the queue: the rate is not known better."""
_EVIDENCE: Final = 0.25
"""Of what is bearable, that some request of late must have taken: rates that were seen in quiet times say little of a full queue."""
_WINDOW: Final = 1.0
"""Seconds; what is known is of this window and the one before, so of one to two seconds, or of the last answers."""
_SHORT: Final = STANDING / 2 / _SHARE
"""Seconds of a deadline. A queue that is within bounds for it is over, if it overflowed before."""
_TICK: Final = 1e-6
_LONGEST: Final = 30
"""Seconds that anybody is told to stay away."""
_OK: Final = 200
_LATE: Final = 504
_PRIORITY: Final = re.compile(rb'"priority"\s*:\s*([0-9]{1,9})\s*[,}]')
_ENDS: Final = 1024
"""Bytes at either end of a request's JSON in which its priority is looked for, as its deadline is."""


class _Backlog:
    """Of one version: what is open, and how fast it is answered."""

    __slots__ = ("_end", "_longest_lately", "_rate_lately", "has_overflowed", "levels", "longest", "open", "rate", "served", "settings")

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings
        self.open = self.served = 0
        self.levels: dict[int, int] = {}
        """Open requests by level of priority, where the model has levels."""
        self.has_overflowed = False
        self.rate = self.longest = 0.0
        """Answers in a second, at best; seconds that one took, at most."""
        self._end = self._rate_lately = self._longest_lately = 0.0

    def note(self, now: float, rate: float, seconds: float) -> None:
        """What a request saw that ended now; a rate of 0: it was not answered."""
        if now > self._end:
            self._end = now + _WINDOW
            self.longest, self._longest_lately = self._longest_lately, 0.0
            if self._rate_lately:  # a window in which nothing was answered says nothing of how fast that goes
                self.rate, self._rate_lately = self._rate_lately, 0.0
        if rate > self._rate_lately:
            self._rate_lately = rate
            self.rate = max(self.rate, rate)
        if seconds > self._longest_lately:
            self._longest_lately = seconds
            self.longest = max(self.longest, seconds)


class Place:
    """Of one request among the open ones, from its admission to its end."""

    __slots__ = ("_backlog", "_begun", "_level", "_served")

    def __init__(self, backlog: _Backlog, now: float, level: int) -> None:
        self._backlog, self._begun, self._level, self._served = backlog, now, level, backlog.served
        backlog.open += 1
        if level:
            backlog.levels[level] = backlog.levels.get(level, 0) + 1

    def leave(self, now: float, status: int) -> None:
        """The request is answered so; by 499: nobody waits for it any more."""
        backlog, seconds = self._backlog, now - self._begun
        backlog.open -= 1
        if self._level:
            backlog.levels[self._level] -= 1
        if status == _OK:
            backlog.served = served = backlog.served + 1
            together = served - self._served - 1 or 1  # the first of several had mostly begun before this one came
            backlog.note(now, together / (seconds or _TICK), seconds)
        elif status == _LATE:
            backlog.note(now, 0.0, seconds)


class Shedding:
    """Of one gateway, for all versions. Other gateways' requests are seen by what they leave of the workers' time."""

    def __init__(self) -> None:
        self._backlogs: dict[ModelVersion, _Backlog] = {}

    def admitted(self, table: Table, entry: VersionEntry, hop: Hop, now: float) -> Place:
        """A place for the request. Raises: QueueFullError: it would wait too long; `args[1]`: seconds after which another try is due."""
        backlog = self._backlogs.get(entry.model)
        if backlog is None:
            backlog = self._backlogs[entry.model] = _Backlog(table.models[entry.model.name].serving)
        settings, timeout = backlog.settings, hop.timeout
        level = settings.level(_priority(hop)) if settings.priority_levels else 0
        if backlog.open > _SHARE * backlog.rate * min(_SHORT, timeout):
            _check(entry, backlog, timeout, level)
        else:
            backlog.has_overflowed = False
        return Place(backlog, now, level)

    def follow(self, table: Table) -> None:
        """There is another table: versions may be gone, and other things said of those that stay."""
        for model, backlog in list(self._backlogs.items()):
            entry = table.models.get(model.name)
            if entry is None or model.version not in entry.versions:
                del self._backlogs[model]
            else:
                backlog.settings = entry.serving


def _check(entry: VersionEntry, backlog: _Backlog, timeout: float, level: int) -> None:
    ahead = sum(count for each, count in backlog.levels.items() if each <= level) if level else backlog.open
    if ahead <= 2 * len(entry.routes) or not entry.routes or not backlog.rate:
        return
    wait = (ahead + 1) / backlog.rate
    burst = backlog.settings.queue_timeout or (STANDING if backlog.has_overflowed else BURST)
    patience = burst if ahead >= FEW else math.inf
    bearable = min(_SHARE * timeout, patience)
    if wait <= bearable or backlog.longest < _EVIDENCE * bearable:
        return
    backlog.has_overflowed |= patience == bearable
    seconds = min(max(math.ceil(wait - bearable), 1), _LONGEST)
    why = f"{ahead} requests wait for {entry.model}, about {wait:.1f} s: more than this one may"
    raise QueueFullError(f"{why}; try again in {seconds} s, or let more workers run it", seconds)


def _priority(hop: Hop) -> int:
    """The parameter, if it stands near an end of the JSON, where clients write it; 0: none was found."""
    end = hop.header_nbytes or len(hop.body)
    for begin, stop in ((0, min(end, _ENDS)), (max(end - _ENDS, 0), end)):
        if found := _PRIORITY.search(hop.body, begin, stop):
            return int(found[1])
    return 0
