"""Who waits for a replica without a limit is told why nothing comes; it is tried again all the same."""

import asyncio

import pytest

from tether.errors import DeadlineExceededError, MalformedFeedError, PeerUnreachableError, UntrustedCodeError
from tether.lab import replicating
from tether.lab.replicating import Replica, Replicating

UNREACHABLE = ("peer_unreachable", "No node of the DHT answers here.")


class Keeper:
    """Answers one state after the other, then the last one for ever."""

    def __init__(self, *states):
        self.states, self.asked = list(states), 0

    async def replicate(self, publisher, model, via, wait):
        del via, wait
        self.asked += 1
        await asyncio.sleep(0)
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return {"publisher": publisher, "model": model} | state


class Lab(Replicating):
    """A connection to one lab."""

    def __init__(self, *states):
        self.keeper = Keeper(*states)

    _keeper = property(lambda self: self.keeper)
    _elsewhere = "ab" * 32


@pytest.fixture
def _clock(monkeypatch):
    """Ten seconds later with each look at it."""
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(replicating, "monotonic", lambda: float(next(seconds)))


def coming(nbytes, error=None):
    return {"done_nbytes": nbytes, "nbytes": 100, "fraction": nbytes / 100, "error": error}


@pytest.mark.usefixtures("_clock")
async def test_nothing_comes_and_the_reason_is_told_with_what_ends_it():
    with pytest.raises(PeerUnreachableError, match=r"No node of the DHT answers here\. .*--release"):
        await Lab(coming(0, UNREACHABLE)).replicate("digits")


@pytest.mark.parametrize(("code", "error"), [("untrusted_code", UntrustedCodeError), ("malformed_feed", MalformedFeedError)])
async def test_a_refusal_that_no_waiting_mends_is_told_at_once(code, error):
    lab = Lab(coming(0, (code, "tether trust ab --code")))
    with pytest.raises(error, match="tether trust"):
        await lab.replicate("digits", timeout=200)
    assert lab.keeper.asked == 1


@pytest.mark.usefixtures("_clock")
async def test_as_long_as_bytes_come_or_nothing_is_wrong_it_is_waited_for():
    states = [coming(number, UNREACHABLE) for number in range(10)] + [coming(10)] * 10 + [{"done": True, "versions": ["ab~digits:1"]}]
    lab = Lab(*states)
    asked = len(states)
    assert (await lab.replicate("digits")).done
    assert lab.keeper.asked == asked


@pytest.mark.usefixtures("_clock")
async def test_who_set_a_time_waits_for_so_long_and_hears_the_reason():
    with pytest.raises(DeadlineExceededError, match="No node of the DHT"):
        await Lab(coming(0, UNREACHABLE)).replicate("digits", timeout=200)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (coming(0, UNREACHABLE) | {"nbytes": 0}, "digits does not come: No node of the DHT answers here."),
        (coming(50, UNREACHABLE), "digits: 50% of 100 B, then: No node of the DHT answers here."),
        (coming(50), "digits: 50% of 100 B"),
        ({"done": True, "versions": ("alice~digits:1",)}, "alice~digits: 1 version here"),
    ],
)
def test_a_replica_says_how_far_it_is_and_what_is_wrong(state, text):
    assert str(Replica(publisher="ab" * 32, model="digits", **state)) == text
