"""Thousands of networks that misbehave: every stream ends with all its bytes, whatever they do. A failing seed replays."""

import time

import pytest
from udx_simulation import Simulation, simulation_of


def play(seed: str) -> Simulation:
    simulation = simulation_of(seed)
    try:
        simulation.run()
        left, right = simulation.sides
        for side, other in ((left, right), (right, left)):
            assert side.machine.code is None, f"{side.name} closed with {side.machine.code}"
            assert side.has_ended, f"{side.name} never heard the end"
            assert set(side.messages) <= {data for _, data in other.talks}, "a message that nobody sent"
            assert side.received == other.wrote, f"{side.name} got {len(side.received)} of {len(other.wrote)} bytes"
        simulation.linger()
        assert all(side.machine.is_gone for side in simulation.sides), "a timer is left"
    except AssertionError as error:
        raise AssertionError(f"seed {seed!r}: {error}") from error
    return simulation


@pytest.mark.chaos
def test_row_35_whatever_the_network_does_every_stream_ends_with_all_its_bytes(chaos, measured):
    started = time.monotonic()
    count, packets = chaos.count(10_000, 1_000), 0
    for run in range(count):
        packets += play(f"{chaos.seed} {run}").packets
    seconds = time.monotonic() - started
    measured(f"udx: {count} simulated networks, {packets} packets, {seconds:.1f} s")
    chaos.record(35, f"udx: {count} simulated networks, {packets} packets, every stream ended with all its bytes", seconds)


@pytest.mark.parametrize("run", range(3))
def test_the_same_seed_is_the_same_run(chaos, run):
    seeds = [f"{chaos.seed} replay {run}"] * 2
    assert len({play(seed).trace.hexdigest() for seed in seeds}) == 1
