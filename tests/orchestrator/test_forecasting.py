"""What is foretold of requests: the next wave of what comes in waves, and nothing where nothing is known."""

import random

import pytest

from tether.orchestrator.forecasting import STEP, Forecast
from tether.testing.requirements import needs

pytestmark = needs("statsmodels")


def told(forecast, rates, start=0):
    for step, rate in enumerate(rates, start):
        forecast.take(int(rate * STEP), step * STEP)


def saw(steps, seed="saw"):
    """Each 30 steps 60 a second at once, falling to nothing within 20."""
    draws = random.Random(seed)
    return [max(60 - 3 * (step % 30), 2) + draws.random() for step in range(steps)]


def test_the_next_wave_is_expected_before_it_comes_and_not_long_before():
    forecast = Forecast()
    told(forecast, saw(239))
    assert forecast.expected(2 * STEP) > 45
    forecast = Forecast()
    told(forecast, saw(232))
    assert forecast.expected(2 * STEP) < 25


def test_of_what_comes_evenly_the_same_is_expected():
    forecast = Forecast()
    told(forecast, [20 + random.Random(f"even {step}").random() for step in range(200)])
    assert forecast.expected(60.0) == pytest.approx(20.5, abs=3)
    quiet = Forecast()
    told(quiet, [0] * 200)
    assert quiet.expected(60.0) == pytest.approx(0, abs=0.1)


def test_nothing_is_foretold_from_half_an_hour():
    forecast = Forecast()
    assert forecast.expected(60.0) == 0
    told(forecast, saw(40))
    assert forecast.expected(60.0) == 0
