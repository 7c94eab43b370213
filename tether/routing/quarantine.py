"""Pure: which inputs end the process that runs them. A gateway suspects and finds out; the orchestrator remembers it for all gateways.

An input is known by its mark, a digest of the request's body, made only once a process was lost.  Of all that were under way at a death
none is certain: those are *suspected*.  Who is suspected of two deaths runs alone, in a process of its own, so that another death names
exactly one; that one is *condemned*: not run again for an hour, as what is condemned by mistake, or was mended since, must not be for ever.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

from blake3 import blake3

from tether.types import ModelVersion

__all__ = ["LIVES", "Quarantine", "mark_of"]

LIVES = 2
"""Processes that an input may end before it is found out: the first death may be anyone's fault, and bad luck seldom comes twice."""
_MOST = 1000
"""Marks of each kind that are kept. More at a time is an attack, whose inputs cost their own process only: the version is isolated then."""
_SECONDS = 3600.0
_MARK_NBYTES = 16


def mark_of(body: bytes, header_nbytes: int) -> str:
    """Of a request's body: 32 hex digits."""
    return blake3(header_nbytes.to_bytes(4, "little") + body).hexdigest(_MARK_NBYTES)


class Quarantine:
    """Marks that are suspected or condemned, for an hour after the last death; of more than a thousand the oldest are forgotten."""

    def __init__(self, most: int = _MOST, seconds: float = _SECONDS) -> None:
        self._suspected, self._condemned = _Marks(most, seconds), _Marks(most, seconds)

    def concerns(self, model: ModelVersion) -> bool:
        """Whether inputs of this version need be looked at: mostly not, and then they have no mark."""
        return model in self._suspected or model in self._condemned

    def died(self, model: ModelVersion, mark: str, now: float) -> int:
        """A process ended while it had this input: how many did by now."""
        deaths = self._suspected.deaths(model, mark, now) + 1
        self._suspected.put(model, mark, now, deaths)
        return deaths

    def deaths(self, model: ModelVersion, mark: str, now: float) -> int:
        """Of how many it is suspected."""
        return self._suspected.deaths(model, mark, now)

    def survived(self, model: ModelVersion, mark: str) -> None:
        """It ran to its end: others were to blame."""
        self._suspected.remove(model, mark)

    def condemn(self, model: ModelVersion, mark: str, now: float) -> bool:
        """It was found out; whether that is news."""
        is_news = not self.is_condemned(model, mark, now)
        self._suspected.remove(model, mark)
        self._condemned.put(model, mark, now, LIVES)
        return is_news

    def is_condemned(self, model: ModelVersion, mark: str, now: float) -> bool:
        """Whether it must not run."""
        return self._condemned.deaths(model, mark, now) > 0

    def condemned(self, now: float) -> dict[ModelVersion, dict[str, float]]:
        """All that must not run: of each version the marks, and until when."""
        found: dict[ModelVersion, dict[str, float]] = {}
        for model, mark, until in self._condemned.known(now):
            found.setdefault(model, {})[mark] = until
        return found

    def forget(self, models: Iterable[ModelVersion]) -> None:
        """Nothing is held any more against inputs of these."""
        gone = set(models)
        self._suspected.forget(gone)
        self._condemned.forget(gone)


class _Marks:
    """The latest so many, for so long."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._kept: OrderedDict[tuple[ModelVersion, str], tuple[float, int]] = OrderedDict()
        """When it last changed, and deaths; oldest first."""
        self._counts: Counter[ModelVersion] = Counter()

    def __contains__(self, model: ModelVersion) -> bool:
        return bool(self._counts) and model in self._counts  # to hash a version costs more than to see that there is none

    def deaths(self, model: ModelVersion, mark: str, now: float) -> int:
        at, deaths = self._kept.get((model, mark), (now, 0))
        return deaths if now - at < self._seconds else 0

    def put(self, model: ModelVersion, mark: str, now: float, deaths: int) -> None:
        self.remove(model, mark)
        self._kept[model, mark] = now, deaths
        self._counts[model] += 1
        self._expire(now)

    def remove(self, model: ModelVersion, mark: str) -> None:
        if self._kept.pop((model, mark), None) is not None:
            self._counts[model] -= 1
            if not self._counts[model]:
                del self._counts[model]

    def known(self, now: float) -> Iterator[tuple[ModelVersion, str, float]]:
        self._expire(now)
        return ((model, mark, at + self._seconds) for (model, mark), (at, _) in self._kept.items())

    def forget(self, models: set[ModelVersion]) -> None:
        for model, mark in [key for key in self._kept if key[0] in models]:
            self.remove(model, mark)

    def _expire(self, now: float) -> None:
        while self._kept:
            (model, mark), (at, _) = next(iter(self._kept.items()))
            if len(self._kept) <= self._most and now - at < self._seconds:
                return
            self.remove(model, mark)
