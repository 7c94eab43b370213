"""The engine by itself: two nodes in one process on a DHT of Node, errors, limits, its rules about threads and processes."""

import pytest
from engine_harness import Testnet, run_scenario

from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("node"), needs("npm"), needs("pythonmonkey")]


def test_two_nodes_speak_and_know_each_other_by_key(testnet: Testnet):
    seen = run_scenario("two_engines", bootstrap=testnet.bootstrap, nbytes=5_000_000)
    assert seen == {"equal": True, "same": [True, True, False]}


def test_messages_arrive_as_they_were_cut_up_to_the_largest(testnet: Testnet):
    largest = (1 << 24) - 18
    sizes = [1, 17, 65_535, 65_536, 1 << 20, largest, 2]
    assert run_scenario("frames", bootstrap=testnet.bootstrap, sizes=sizes) == sizes


def test_a_message_that_no_frame_holds_is_refused_and_the_stream_goes_on(testnet: Testnet):
    refused, back = run_scenario("too_large", bootstrap=testnet.bootstrap, keys=testnet.keys)
    assert refused[0] == "PayloadTooLargeError"
    assert back == "small"


def test_who_is_not_there_is_not_found_and_what_is_no_key_is_said(testnet: Testnet):
    absent, zeros, short, topic = run_scenario("nobody_there", bootstrap=testnet.bootstrap)
    assert [absent[0], absent[2]] == ["PeerNotFoundError", "PEER_NOT_FOUND"]
    assert zeros[0] == "PeerNotFoundError"
    assert [short[0], topic[0]] == ["BadKeyError", "BadKeyError"]


def test_without_a_network_the_engine_runs_alone():
    seen = run_scenario("no_network")
    assert seen["known"] == 0
    assert not seen["ready"]
    assert seen["connect"][0] in ("PeerNotFoundError", "PeerUnreachableError")


def test_connecting_ends_at_its_deadline_or_by_cancellation_and_leaves_nothing(testnet: Testnet):
    late, cancelled, left = run_scenario("given_up", bootstrap=testnet.bootstrap, seconds=0.3)
    assert late[0] == "PeerUnreachableError"
    assert cancelled
    assert left == 0


def test_a_peer_that_falls_silent_is_given_up_and_an_idle_one_is_not(testnet: Testnet):
    seen = run_scenario("silence", bootstrap=testnet.bootstrap)
    assert seen["alive"]
    assert seen["error"][0] == "StreamLostError"
    assert seen["error"][2] == "ETIMEDOUT"


def test_a_receiver_that_takes_nothing_stops_the_sender(testnet: Testnet):
    seen = run_scenario("backpressure", bootstrap=testnet.bootstrap, nbytes=20_000_000)
    assert seen["received"] == 0
    assert seen["stopped"] < 16_000_000
    assert seen["sent"] == seen["got"]


def test_closing_cuts_streams_takes_back_announcements_and_leaves_room_for_another(testnet: Testnet):
    seen = run_scenario("closing", bootstrap=testnet.bootstrap)
    assert seen["reached"][0] == "StreamLostError"
    assert seen["there"]
    assert seen["refused"][0] == "EngineClosedError"
    assert seen["gone"][0] == "PeerNotFoundError"
    assert seen["again"]


def test_many_streams_at_once(testnet: Testnet):
    assert run_scenario("many", bootstrap=testnet.bootstrap, count=50) == {"equal": True, "left": 0}


def test_a_node_whose_goodbyes_nobody_answers_gives_its_port_back():
    assert run_scenario("impatient") == [0]


def test_a_node_may_begin_while_the_last_one_ends():
    assert run_scenario("one_ends_as_another_begins", turns=5) == [True] * 5


def test_a_node_that_names_impossible_neighbours_stops_no_lookup():
    assert run_scenario("hostile_neighbours") == []


def test_names_that_no_resolver_takes_are_names_that_nobody_has():
    assert run_scenario("no_such_names") == 0


@pytest.mark.parametrize("scenario", ["other_thread", "second_thread"])
def test_only_the_main_thread_may_use_it(scenario):
    assert run_scenario(scenario)[0] == "EngineMisusedError"


def test_after_a_fork_it_refuses_and_says_what_to_do():
    error = run_scenario("after_fork")
    assert error[0] == "EngineMisusedError"
    assert "spawn" in error[1]


def test_one_event_loop_after_another_but_not_two_at_once():
    assert run_scenario("loop_after_loop")[0] == "EngineMisusedError"


def test_an_interpreter_that_somebody_else_began_is_refused():
    assert run_scenario("imported_before")[0] == "EngineMisusedError"


def test_without_the_bundle_it_says_how_to_get_it():
    error = run_scenario("no_bundle")
    assert error[0] == "MissingDependencyError"
    assert "hatch_build.py" in error[1]


def test_without_pythonmonkey_it_says_how_to_get_it():
    error = run_scenario("no_pythonmonkey")
    assert error[0] == "MissingDependencyError"
    assert "tether[swarm]" in error[1]
