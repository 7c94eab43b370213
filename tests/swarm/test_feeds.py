"""Feeds of labs over real nodes: a catalog here is what another lab's says, and nothing of a history that contradicts itself is taken."""

import json

import pytest
from engine_harness import HERE, Scenario, Testnet

from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("node"), needs("npm"), needs("pythonmonkey")]


class FeedScenario(Scenario):
    script = HERE / "feed_scenarios.py"


def run_feed(name, testnet, **values):
    return FeedScenario(name, bootstrap=testnet.bootstrap, **values).result()


def test_a_catalog_is_followed_as_it_changes_and_read_by_a_plain_hyperbee_program(testnet: Testnet, tmp_path):
    ours = FeedScenario("followed", bootstrap=testnet.bootstrap, folder=str(tmp_path))
    answer = ours.said()
    read = testnet.call("feed", key=answer["core"], publisher=answer["server"], prefix="")
    ours.go_on()
    seen = ours.result()

    assert seen["first"] == ["first", {"net": [[1, 2], {"latest": 2, "prod": 2}, 3]}]
    entries = {key: json.loads(value) for key, value in read}
    assert [entries[f"models/net/versions/{number}"]["digest"] for number in (1, 2)] == seen["digests"]["net"]
    assert entries["aliases/net/prod"] == {"version": 2}
    assert seen["moved"] == ["newer", {"net": [[1, 2], {"latest": 2, "prod": 1}, 3]}, ["net"]]
    assert seen["seconds"] < 1
    assert seen["last"] == ["newer", {"net": [[1, 3, 4], {"latest": 4, "prod": 1}, 5]}]
    assert seen["blocks"] < 10
    assert seen["again"] == ["newer", ["other"]]
    assert seen["known before"] == ["same", True, []]
    assert seen["same"]
    assert seen["known"]
    assert seen["files"]


def test_a_feed_that_lost_its_end_or_everything_is_begun_anew_and_says_the_same(testnet: Testnet, tmp_path):
    seen = run_feed("begun_anew", testnet, folder=str(tmp_path))
    assert seen["seen"] == [["new-era", {"net": [[1, 2], {"latest": 2, "prod": 1}, 3]}, []]] * 3
    assert seen["grows"]
    assert seen["went_on"] == "newer"
    assert seen["kept"]
    assert "a lab began its feed anew" in seen["loud"]
    assert "the lab's feed is begun anew" in seen["loud"]
    assert "what was known of the lab's own feed is damaged: it is begun anew" in seen["loud"]


def test_a_process_that_dies_between_writing_and_signing_is_no_fork(testnet: Testnet, tmp_path):
    seen = run_feed("killed", testnet, folder=str(tmp_path))
    assert seen["died"] == [9, 9]
    assert seen["era"] == [True] * 4
    assert seen["grew"] > 0
    assert seen["news"] == ["newer", {"net": [[1, 2], {"latest": 2}, 3]}]
    assert seen["loud"] == []


def test_a_second_history_is_refused_loudly_remembered_and_forgiven(testnet: Testnet, tmp_path):
    seen = run_feed("forked", testnet, folder=str(tmp_path))
    assert seen["longer"][0] == "FeedRefusedError"
    assert seen["longer"][2] == "forked"
    assert seen["content"]
    assert seen["quiet"]
    assert seen["restarted"] == seen["longer"]
    assert seen["forgiven"] == "newer"
    assert seen["old"][2] == "rolled-back"
    assert seen["goes on"] == ["newer", True]
    assert seen["heard"] == "truncated"
    assert seen["cut"][2] == "truncated"
    assert "a feed was refused" in seen["loud"]


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (3, 1), (1, 3)])
def test_two_followers_that_were_shown_different_histories_find_out_when_they_meet(testnet: Testnet, tmp_path, ours, theirs):
    seen = run_feed("met", testnet, folder=str(tmp_path), ours=ours, theirs=theirs)
    assert [[problem[0], problem[2]] for problem in seen["problems"]] == [["FeedRefusedError", "forked"]] * 2
    assert seen["kept"]
    assert seen["loud"] == 2
    assert seen["asked"][0] <= 2
    assert seen["asked"][1] <= seen["asked"][0] + 2, "what was shown once is not shown again"


def test_a_follower_that_is_behind_hears_of_news_and_nothing_is_held_against_it(testnet: Testnet, tmp_path):
    seen = run_feed("handed_on", testnet, folder=str(tmp_path))
    assert (seen["behind"], seen["same"]) == (True, True)
    assert seen["rollbacks"] == [0, 0]
    assert seen["loud"] == []
    assert seen["asked"][1] <= seen["asked"][0] + 2
    assert [error[0] for error in seen["nonsense"]] == ["MalformedRequestError", "MalformedFeedError", "MalformedFeedError"]
    assert seen["not followed"] == {}


def test_a_thiefs_new_era_is_found_out_or_contradicts(testnet: Testnet, tmp_path):
    seen = run_feed("stolen_era", testnet, folder=str(tmp_path))
    assert seen["era"] == "new-era"
    assert seen["found out"][2] == "forked"
    assert seen["less"][2] == "contradicts"
    assert seen["kept"]
    assert seen["accepted"] == ["new-era", {"net": [[1], {"latest": 1}, 2]}]
    assert seen["bound"][0] == "MalformedFeedError"
    assert "delete those here" in seen["bound"][1]
    assert {"a lab began its feed anew", "a feed was refused", "a feed begun anew contradicts what it said before"} <= set(seen["loud"])


def test_only_who_may_follow_is_given_anything_and_who_may_no_more_is_cut(testnet: Testnet, tmp_path):
    ours = FeedScenario("admitted", bootstrap=testnet.bootstrap, folder=str(tmp_path))
    keys = ours.said()
    read = {"key": keys["core"], "publisher": keys["server"], "prefix": "aliases/"}
    assert not testnet.call("refused", key=keys["server"])["opened"]
    ours.go_on(testnet.call("self")["key"])
    ours.said()
    assert testnet.call("feed", **read) == [["aliases/net/latest", '{"version":1}']]
    ours.go_on()
    seen = ours.result()
    assert seen["refused"] == seen["still"] == "PeerUnreachableError"
    assert seen["cut"] < 1
    assert seen["nothing"]
    assert seen["news"] == ["new-era", {"net": [[1, 2], {"latest": 2}, 3]}]
    assert seen["other core"]


def test_a_log_that_somebody_made_by_hand_hangs_nobody(testnet: Testnet):
    seen = run_feed("hostile", testnet, feeds=testnet.call("hostileFeeds"))
    assert seen["circle"] == [["a", "1"], ["b", None]]
    assert [seen[name][0] for name in ("garbage", "large", "letters", "value")] == ["MalformedFeedError"] * 4


def test_a_copy_that_was_altered_on_the_disk_is_not_believed(testnet: Testnet, tmp_path):
    assert run_feed("damaged_copies", testnet, folder=str(tmp_path)) == [
        ["newer", True, True],
        ["newer", True, True],
        ["same", True, ["net"]],
        [],
    ]


def test_a_manager_that_writes_again_after_another_begins_a_new_era(testnet: Testnet, tmp_path):
    seen = run_feed("another_wrote", testnet, folder=str(tmp_path))
    assert seen["restart"]
    assert seen["another"]
    assert seen["verdict"] == "new-era"
    assert "the lab's feed is begun anew" in seen["loud"]


def test_what_followers_would_refuse_is_not_written(testnet: Testnet, tmp_path):
    seen = run_feed("unsayable", testnet, folder=str(tmp_path))
    assert seen["problem"][0] == "MalformedFeedError"
    assert seen["same"]
    assert seen["mended"] == [{"net": [[1, 2], {"latest": 2}, 3]}, True]
    assert seen["refused"][0] == "MalformedFeedError"
    assert seen["full"] == ["new-era", {"net": [[1, 2, 3], {"latest": 3}, 4]}]
    assert "followers do not see the catalog as it is" in seen["loud"]


def test_feeds_go_on_when_the_node_is_replaced(testnet: Testnet, tmp_path):
    seen = run_feed("engine_again", testnet, folder=str(tmp_path))
    assert seen == {"news": ["newer", {"net": [[1, 2], {"latest": 2}, 3]}], "same": True}
