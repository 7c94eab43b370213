"""Labs on a DHT of this machine: they call each other, keep strangers short, and are back after a sleep or a restart."""

import signal

import pytest
from engine_harness import HERE, Scenario

from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("pythonmonkey")]


class NodeScenario(Scenario):
    script = HERE / "node_scenarios.py"


def run(name, **values):
    return NodeScenario(name, **values).result()


def test_two_labs_call_each_other_over_one_connection_and_give_blobs_over_another():
    seen = run("two_labs")
    assert seen["many"]
    assert seen["back"] == 1 << 20
    assert seen["blobs"]
    assert [each[:3] for each in seen["shown"]] == [["rpc", True, True], ["blobs", True, True]]
    assert {each[3] for each in seen["shown"]} <= {"direct", "punched"}
    assert 0 < seen["rtt"] < 1
    assert seen["record"] == ["what I have", 3, None]
    assert seen["found"] == [True, []]
    assert 10 << 20 < seen["weight"][0] < 1 << 30
    assert not seen["weight"][1]
    assert seen["announced"]
    assert seen["nobodys"] == ["PeerNotFoundError", "DeadlineExceededError", "BadKeyError"]


def test_who_takes_leave_is_found_no_more_by_those_who_look_for_it_or_for_what_it_had():
    seen = run("leaving")
    assert (seen["found"], seen["says"]) == ([[], []], [0, 0.0])
    assert seen["seconds"] < 2


def test_who_no_longer_waits_for_a_connection_leaves_none():
    assert run("cancelled") == [0] * 6


def test_strangers_may_enrol_and_no_more_and_who_is_banned_gets_nothing():
    seen = run("strangers")
    assert seen["refused"] == "ForbiddenError"
    assert seen["sizes"] == ["PayloadTooLargeError", "StreamLostError", 1 << 20]
    error, seconds, ours = seen["kept_out"]
    assert error in ("PeerUnreachableError", "PeerNotFoundError", "DeadlineExceededError")
    assert seconds < 6
    assert ours == "ForbiddenError"
    assert seen["cut_in"] < 3
    assert seen["held"] == [True]


def test_who_is_cut_in_the_middle_of_a_call_has_lost_it_within_a_second():
    seen = run("revoked")
    assert seen["error"] == "StreamLostError"
    assert seen["seconds"] < 1
    assert seen["again"] in ("PeerUnreachableError", "PeerNotFoundError", "DeadlineExceededError")
    assert seen["left"] == 0


@pytest.mark.parametrize("is_orderly", [True, False])
def test_a_lab_that_was_restarted_is_called_again(is_orderly, measured):
    streams = {"idle": 3.0, "keepalive": 0.5}
    caller = NodeScenario("caller", streams=streams)
    dht = caller.said()
    answerer = NodeScenario("answerer", bootstrap=dht["bootstrap"], streams=streams)
    key = answerer.said()
    caller.go_on({"call": {"peer": key}})
    assert caller.said()["answer"] == "hello"
    if is_orderly:
        answerer.go_on()
        answerer.result()
    else:
        answerer.kill()
    answerer = NodeScenario("answerer", bootstrap=dht["bootstrap"], streams=streams)
    assert answerer.said() == key
    caller.go_on({"call": {"peer": key}})
    seen = caller.said()
    measured(f"called again after a restart ({'in order' if is_orderly else 'killed'}): {seen['seconds']:.2f} s, {seen['tries']} tries")
    assert seen["answer"] == "hello"
    assert seen["tries"] == 1 or not is_orderly
    end(answerer, caller)


def test_a_call_to_a_lab_that_was_killed_is_answered_by_its_next_process_long_before_its_stream_is_given_up(measured):
    caller = NodeScenario("caller")
    dht = caller.said()
    answerer = NodeScenario("answerer", bootstrap=dht["bootstrap"])
    key = answerer.said()
    caller.go_on({"call": {"peer": key}})
    assert caller.said()["answer"] == "hello"
    answerer.kill()
    caller.go_on({"call": {"peer": key, "method": "ping", "timeout": 25.0}})
    answerer = NodeScenario("answerer", bootstrap=dht["bootstrap"])
    assert answerer.said() == key
    seen = caller.said()
    measured(f"a call to a lab that was killed and started again is answered after {seen['seconds']:.2f} s")
    assert seen["answer"] == "hello"
    assert seen["tries"] == 1
    assert seen["seconds"] < 15
    end(answerer, caller)


def test_a_laptop_that_wakes_is_back_within_five_seconds(measured):
    streams = {"idle": 3.0, "keepalive": 0.5}
    caller = NodeScenario("caller", streams=streams)
    dht = caller.said()
    sleeper = NodeScenario("answerer", bootstrap=dht["bootstrap"], peer=dht["key"], streams=streams)
    key = sleeper.said()
    sleeper.signal(signal.SIGSTOP)
    caller.go_on({"lost": {"at_least": 5.0}})
    caller.said()
    sleeper.signal(signal.SIGCONT)
    caller.go_on({"call": {"peer": key, "timeout": 1.0}})
    seen = caller.said()
    measured(f"called after a sleep: {seen['seconds']:.2f} s, {seen['tries']} tries")
    assert seen["answer"] == "hello"
    assert seen["seconds"] < 5
    sleeper.go_on("until it was told so")
    assert sleeper.result()["back"] == 1
    end(caller)


def test_a_lab_that_starts_without_a_network_is_found_once_there_is_one(measured):
    seen = run("early")
    measured(f"found after the network came: {seen['seconds']:.2f} s; started in {seen['started']:.2f} s, ready in {seen['ready']:.2f} s")
    assert not seen["alone"]
    assert seen["answer"] == "found"
    assert seen["seconds"] < 15


def end(*scenarios):
    for scenario in scenarios:
        scenario.go_on()
        scenario.result()
