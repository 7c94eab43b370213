"""How many rows a batch is to have, learned from what batches took."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.serving_settings import DEFAULTS
from tether.worker.batch_sizes import BatchSizes

KEY, OTHER = (("x", "<f4", (4,)),), (("x", "<f4", (5,)),)
LATENCY = 0.1


def served(sizes, cost, batches=400, waiting=10_000, key=KEY):
    """The rows of each batch while so many requests wait always."""
    rows = []
    for _ in range(batches):
        rows.append(min(sizes.most_rows(key), waiting))
        sizes.ran(key, rows[-1], cost(rows[-1]), is_full=waiting > rows[-1])
    return rows


def usual(rows):
    return sorted(rows[-100:])[50]


def test_where_a_row_costs_as_much_in_any_batch_requests_run_one_by_one():
    assert usual(served(BatchSizes(LATENCY), lambda rows: 0.007 * rows)) == 1


def test_where_batches_are_free_they_grow_until_they_take_half_the_latency():
    assert usual(served(BatchSizes(LATENCY), lambda rows: 0.002 + 0.00001 * rows)) == 1024
    assert usual(served(BatchSizes(LATENCY), lambda rows: 0.002 + 0.0002 * rows)) == 128  # 256 rows take 53 ms


def test_no_more_rows_than_make_nearly_full_use_of_the_runtime():
    rows = usual(served(BatchSizes(LATENCY), lambda rows: 0.0005 + 0.0001 * rows))
    best = max(each / (0.0005 + 0.0001 * each) for each in (2**size for size in range(11)))
    assert rows / (0.0005 + 0.0001 * rows) > 0.85 * best
    assert rows <= 128


def test_a_model_that_takes_longer_than_the_latency_by_itself_is_still_run_in_batches_that_pay():
    rows = usual(served(BatchSizes(LATENCY), lambda rows: 0.2 + 0.001 * rows))
    assert 32 <= rows <= 256
    assert usual(served(BatchSizes(LATENCY), lambda rows: 0.2 * rows)) == 1


def test_the_first_batches_are_no_reason_to_change_anything():
    sizes = BatchSizes(LATENCY, first=32)
    sizes.ran(KEY, 1, 3.0, is_full=True)  # a runtime that warms up
    assert sizes.most_rows(KEY) == 32


def test_a_machine_that_becomes_slower_is_learned_anew():
    sizes = BatchSizes(LATENCY)
    assert usual(served(sizes, lambda rows: 0.001 + 0.00005 * rows)) >= 128
    assert usual(served(sizes, lambda rows: 0.01 + 0.005 * rows)) <= 8


def test_a_pause_of_the_machine_is_no_reason_for_long():
    sizes = BatchSizes(LATENCY)
    before = usual(served(sizes, lambda rows: 0.002 + 0.0002 * rows))
    sizes.ran(KEY, before, 5.0, is_full=True)
    assert usual(served(sizes, lambda rows: 0.002 + 0.0002 * rows, 600)) == before


def test_what_batches_cost_that_few_requests_left_half_empty_is_not_taken_for_their_size():
    sizes = BatchSizes(LATENCY)
    cost = lambda rows: 0.0055 + 0.00001 * rows  # noqa: E731
    before = usual(served(sizes, cost))
    served(sizes, cost, waiting=before // 2 + 10)
    assert usual(served(sizes, cost)) == before


@pytest.mark.parametrize("most", [1, 5, 20, 40, 300])
def test_what_a_model_cannot_run_at_once_is_tried_seldom_and_what_it_can_is_used(most):
    sizes, failed, rows = BatchSizes(LATENCY), 0, []
    for _ in range(1000):
        rows.append(sizes.most_rows(KEY))
        if rows[-1] <= most:
            sizes.ran(KEY, rows[-1], 0.002 + 0.00001 * rows[-1], is_full=True)
            continue
        failed += 1
        for _ in range(rows[-1]):
            sizes.ran(KEY, 1, 0.00201, is_full=True)
        sizes.failed(KEY, rows[-1])
    assert failed <= 30
    assert usual(rows) == 1 << most.bit_length() - 1


def test_shapes_are_learned_apart_and_their_number_is_bounded():
    sizes = BatchSizes(LATENCY)
    served(sizes, lambda rows: 0.007 * rows)
    assert usual(served(sizes, lambda rows: 0.002 + 0.00001 * rows, key=OTHER)) == 1024
    assert sizes.most_rows(KEY) == 1
    for number in range(1000):
        sizes.ran((("x", "<f4", (number,)),), 4, 0.001, is_full=True)
    assert len(sizes._shapes) <= 64


@given(st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 100), st.booleans()), max_size=200), st.floats(0.001, 10))
def test_whatever_batches_took_a_size_is_given(batches, latency):
    sizes = BatchSizes(latency)
    for rows, seconds, is_full in batches:
        sizes.ran(KEY, rows, seconds, is_full=is_full)
        assert 1 <= sizes.most_rows(KEY) <= 1024


@pytest.mark.parametrize("cost", [lambda rows: 0.0001 * rows, lambda rows: 0.007 * rows, lambda rows: 0.002 + 0.0002 * rows])
@pytest.mark.parametrize("kind", ["steady", "step", "bursts"])
def test_no_setting_by_hand_does_much_better(monkeypatch, cost, kind):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "batching")
    monkeypatch.delitem(sys.modules, "simulation", raising=False)
    from simulation import by_hand, simulate, trace

    capacity = max(rows / cost(rows) for rows in (1, 8, 32, 128))
    arrivals = trace(kind, min(capacity, 1500), 6.0, "test")
    learned = simulate(arrivals, cost, DEFAULTS, "test")
    best = max(simulate(arrivals, cost, by_hand(*each), "test").rate() for each in [(1, 0.0), (8, 0.002), (32, 0.002), (64, 0.01)])
    assert learned.good_windows(LATENCY) >= 0.8  # of six windows all but one; the benchmark's traces are longer
    assert learned.rate() >= 0.9 * best
