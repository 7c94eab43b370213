"""The engine on a DHT of real hyperdht in Node: found, connected to, listened to, both ways."""

import pytest
from engine_harness import Scenario, Testnet, run_scenario

from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("node"), needs("npm"), needs("pythonmonkey")]


def test_a_stream_to_node_carries_what_was_sent_and_ends_in_order(testnet: Testnet):
    seen = run_scenario("connect_to_node", bootstrap=testnet.bootstrap, keys=testnet.keys, nbytes=3_000_000)
    assert seen["equal"]
    assert seen["stream"] == [True, True, 64, "direct", "127.0.0.1"]
    assert 0 < seen["rtt"] < 1
    assert seen["left"] == 0


def test_node_connects_to_us_and_is_refused_where_the_firewall_says_so(testnet: Testnet):
    serving = Scenario("serve_node", bootstrap=testnet.bootstrap)
    key = serving.said()
    assert testnet.call("echo", key=key, nbytes=1_000_000) == {"equal": True}
    assert testnet.call("connect", key=key) == {}
    serving.go_on()
    assert serving.said() == "refusing"
    assert testnet.call("refused", key=key) == {"opened": False}
    serving.go_on()
    seen = serving.result()
    assert seen["peers"] == 2
    assert seen["asked"] >= 3


def test_records_travel_both_ways_and_the_newest_wins(testnet: Testnet):
    ours = Scenario("records", bootstrap=testnet.bootstrap)
    said = ours.said()
    assert said["nodes"] >= 3
    assert testnet.call("mutableGet", key=said["key"]) == {"value": "second", "seq": 2}
    assert testnet.call("immutableGet", hash=said["hash"]) == {"value": "for ever"}
    put = testnet.call("mutablePut", seed=77, value="from node", seq=5)
    ours.go_on(put)
    seen = ours.result()
    assert seen["latest"] == ["second", 2]
    assert seen["node"] == ["from node", 5]
    assert seen["absent"] == [None, None]
    assert [error[0] for error in seen["refused"]] == ["PayloadTooLargeError"] * 2


def test_announcements_are_seen_by_node_and_taken_back(testnet: Testnet):
    topic = "ab" * 32
    known = testnet.call("announce", topic=topic, seed=78)["key"]
    ours = Scenario("topics", bootstrap=testnet.bootstrap, topic=topic, known=known)
    key = ours.said()
    both = sorted([known, key])
    assert sorted(testnet.call("lookup", topic=topic)["peers"]) == both
    ours.go_on()
    assert ours.result() == {"before": True, "both": both, "after": True}
    assert testnet.call("lookup", topic=topic)["peers"] == [known]


def test_a_peer_that_cuts_or_alters_is_named_for_it(testnet: Testnet):
    closed = run_scenario("rude_peers", bootstrap=testnet.bootstrap, keys=testnet.keys)
    assert closed["rude"][0] == "StreamLostError"
    assert closed["rude"][2] == "ECONNRESET"
    assert closed["garbling"][0] == "ProtocolError"
    assert testnet.keys["garbling"][:12] in closed["garbling"][1]


def test_frames_that_no_key_sealed_cut_the_peer_that_sent_them(testnet: Testnet):
    ours = Scenario("garbage_arrives", bootstrap=testnet.bootstrap, count=3)
    key = ours.said()
    for how in ("frame", "short", "cut"):
        testnet.call("garble", key=key, how=how)
    altered, short, cut = ours.result()
    assert [error[0] for error in (altered, short, cut)] == ["ProtocolError"] * 3
    assert "altered" in altered[1]
    assert "shorter" in short[1]
    assert "middle of a frame" in cut[1]


def test_after_a_sleep_the_node_is_found_again_within_seconds(testnet: Testnet):
    sleeping = Scenario("sleeping", bootstrap=testnet.bootstrap, keys=testnet.keys)
    key = sleeping.said()
    assert testnet.call("echo", key=key, nbytes=1000) == {"equal": True}
    sleeping.go_on()
    seen = sleeping.result()
    assert seen["cut"][0] == "StreamLostError"
    assert seen["asleep"][0] == "EngineClosedError"
    assert seen["back"] == "awake"
    assert seen["seconds"] < 5
