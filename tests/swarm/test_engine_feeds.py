"""Feeds: Hyperbees in the engine, on files, read by real hyperbee in Node and followed by another engine."""

import pytest
from engine_harness import Scenario, Testnet, run_scenario

from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("node"), needs("npm"), needs("pythonmonkey")]


def test_a_feed_is_followed_and_read_by_node(testnet: Testnet, tmp_path):
    ours = Scenario("feed", bootstrap=testnet.bootstrap, folder=str(tmp_path))
    said = ours.said()
    assert testnet.call("feed", key=said["key"], publisher=said["publisher"], prefix="models/") == [
        ["models/digits/versions/1", '{"manifest": "aa"}'],
        ["models/digits/versions/2", '{"manifest": "bb"}'],
    ]
    ours.go_on()
    seen = ours.result()
    assert seen["writable"] == [True, False]
    assert seen["same"]
    assert seen["change"][:2] == ["append", "1"]
    assert seen["change"][2] < 1
    assert seen["old"] == "1"
    assert [value for _, value in seen["range"]] == ['{"manifest": "aa"}', '{"manifest": "bb"}']
    assert ["del", "gone"] in seen["history"]
    assert seen["known"]
    assert seen["files"] == ["bitfield", "data", "oplog", "tree"]


def test_an_answer_that_is_larger_than_what_crosses_is_said(testnet: Testnet, tmp_path):
    refused, one = run_scenario("large_answer", bootstrap=testnet.bootstrap, folder=str(tmp_path))
    assert refused[0] == "EngineError"
    assert "ask for less" in refused[1]
    assert one == 9 << 20


def test_a_feed_whose_log_lost_its_end_opens_shorter(testnet: Testnet, tmp_path):
    length, after, kept = run_scenario("torn_feed", bootstrap=testnet.bootstrap, folder=str(tmp_path))
    assert after == length - 1
    assert kept == "1"
