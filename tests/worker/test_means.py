"""What a worker tells of its cards and its load; nothing is told that nobody knows."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.worker.means import Busyness, Card, card_users, cards, chosen

H100, L4 = Card("NVIDIA H100 80GB HBM3", 81559 << 20), Card("NVIDIA L4", 23034 << 20)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Says what it is told to."""

    def says(text, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(stat.S_IRWXU)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return says


def test_cards_are_those_that_the_driver_names(driver):
    driver("NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559")
    assert cards(2) == (H100, H100)
    assert cards(1) == (H100,)
    assert cards(0) == ()


@pytest.mark.parametrize("text", ["", "No devices were found", "a, b\n, ,", "NVIDIA H100, [N/A]"])
def test_what_the_driver_does_not_say_is_not_made_up(driver, text):
    driver(text)
    assert cards(1) == ()


def test_without_a_driver_or_with_one_that_fails_nothing_is_told(driver, monkeypatch):
    driver("NVIDIA L4, 23034", code=9)
    assert cards(1) == ()
    monkeypatch.setenv("PATH", "")
    assert cards(1) == ()


def test_which_of_different_cards_a_worker_has_is_told_only_where_it_is_known():
    assert chosen([H100, L4], 2) == (H100, L4)
    assert chosen([H100, L4], 1) == ()
    assert chosen([H100, L4], 1, "1") == (L4,)
    assert chosen([H100, L4], 1, "GPU-3f8a") == ()
    assert chosen([H100, L4], 1, "7") == ()
    assert chosen([], 3) == ()


def test_who_takes_how_much_of_cards_is_what_the_driver_says_and_nothing_where_it_does_not(driver):
    driver("4711, 512\n4712, 100\n4711, 24")
    assert card_users() == {4711: 536 << 20, 4712: 100 << 20}
    driver("4711, [N/A]\n[Insufficient Permissions], 3\n")
    assert card_users() == {}
    driver("4711, 512", code=9)
    assert card_users() == {}


def test_load_is_the_share_of_the_last_half_minute():
    busyness = Busyness()
    assert busyness.look({"a": 50.0}, 0.0) == 0.0
    assert busyness.look({"a": 55.0}, 10.0) == 0.5
    assert busyness.look({"a": 55.0, "b": 5.0}, 20.0) == 0.5
    assert busyness.look({"b": 5.0}, 45.0) == pytest.approx(0.0, abs=0.15)
    assert busyness.look({"b": 5.0}, 80.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 100), st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e6))), max_size=40))
def test_load_is_a_share_whatever_happens_to_models(looks):
    busyness, now = Busyness(), 0.0
    for seconds, totals in looks:
        now += seconds
        assert 0.0 <= busyness.look(totals, now) <= 1.0
