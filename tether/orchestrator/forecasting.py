"""Requests a second that are to be expected: statsmodels' Theta method, with the period that is seen in those that came.

An optional extra (`tether[forecast]`): `benchmarks/scaling` has what it saves, and where it does not.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

from tether.errors import MissingDependencyError

__all__ = ["Forecast"]

STEP: Final = 30.0
"""Seconds that are counted together."""
_LEAST: Final = 60
"""Steps before anything is foretold."""
_MOST: Final = 5760
"""Steps that are remembered: two days."""
_ANEW: Final = 10
"""Steps after which it is foretold anew, and for how many."""
_CLEAR: Final = 0.3
"""Autocorrelation of a period that counts."""
_SHORTEST: Final = 6
"""Steps of a period."""
_NOISE: Final = 1e-3
"""Requests a second that are as good as none: the method takes no zeros."""


class Forecast:
    """Of one lab. `expected` costs some ten milliseconds every few minutes, else nothing."""

    def __init__(self) -> None:
        self._counts: deque[float] = deque(maxlen=_MOST)
        self._begun: float | None = None
        """Of the step that is being counted."""
        self._count = 0.0
        self._foretold: list[float] = []
        """Requests a second, of the steps from the one that is being counted."""

    def take(self, arrived: int, now: float) -> None:
        """So many requests came since it was said last."""
        if self._begun is None:
            self._begun = now
        while now >= self._begun + STEP:
            self._counts.append(self._count / STEP)
            self._count, self._begun = 0.0, self._begun + STEP
            self._foretold = self._foretold[1:]
        self._count += arrived

    def expected(self, ahead: float) -> float:
        """Requests a second, the most within the next `ahead` seconds. 0: too little is known.

        Raises: MissingDependencyError: the extra is not installed.
        """
        if len(self._counts) < _LEAST:
            return 0.0
        steps = math.ceil(ahead / STEP) + 1
        if len(self._foretold) < steps:
            self._foretold = self._fit(steps + _ANEW)
        return max(0.0, *self._foretold[:steps])

    def _fit(self, steps: int) -> list[float]:
        history = np.array(self._counts)
        if np.ptp(history) < _NOISE:
            return [float(history[-1])] * steps
        try:
            from statsmodels.tsa.forecasting.theta import ThetaModel  # heavy (a second, 100 MB): only where something is to be foretold
            from statsmodels.tsa.stattools import acf
        except ImportError as error:
            raise MissingDependencyError("a forecast of requests needs statsmodels: pip install 'tether[forecast]'") from error
        period = _period(acf(history, nlags=len(history) // 2, fft=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what hardly changes
            model = ThetaModel(history + _NOISE, period=period or 1, deseasonalize=period > 0, use_test=False, method="additive")
            return [float(rate) for rate in model.fit().forecast(steps)]


def _period(seen: npt.NDArray[np.float64]) -> int:
    """In steps, by the autocorrelation at each lag; 0: none is seen. The shortest of those that are nearly as clear as the clearest."""
    peaks = [lag for lag in range(_SHORTEST, len(seen) - 1) if seen[lag - 1] <= seen[lag] > seen[lag + 1]]
    clearest = max((seen[lag] for lag in peaks), default=0.0)
    return next((lag for lag in peaks if seen[lag] >= max(0.9 * clearest, _CLEAR)), 0)
