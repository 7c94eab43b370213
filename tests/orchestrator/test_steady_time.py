"""The clock that the orchestrator's state lives by."""

import time

from tether.telemetry import clock


def test_it_is_the_time_of_day_and_is_not_set_with_it(monkeypatch):
    clock._offset.cache_clear()
    before = clock.steady_time()
    assert abs(before - time.time()) < 60
    monkeypatch.setattr("time.time", lambda: before + 3600)
    assert 0 <= clock.steady_time() - before < 60
