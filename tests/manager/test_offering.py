"""What a lab says of itself in its record: from what its workers say, where it is, and what it has."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import ConfigError, StoreError
from tether.manager.peering.agreements import Agreements, Holding
from tether.manager.peering.gateway import Gateway
from tether.manager.peering.offering import Means, Offering, means_of, steady
from tether.manager.peering.region import Region
from tether.security.identity import Identity
from tether.store import Manifest, Repository, digest_of, encode, signed_message
from tether.swarm.records.records import Capabilities, Gpu, parse, sign
from tether.types import ModelInfo

LAB = Identity(bytes([7]) * 32)
INFO = ModelInfo("onnx", "onnx", (), (), batched=False, pure=True, code=False)
PATIENCE = 10.0


def worker(busy=0.0, *cards):
    return {"busy": busy, "cards": [list(card) for card in cards]}


def test_cards_of_all_workers_are_counted_by_kind_and_load_is_their_average():
    answer = {"workers": [worker(0.9, ("H100", 80)), worker(0.1, ("H100", 80), ("L4", 24)), {}], "loaded": ["a" * 64]}
    means = means_of(answer, Means())
    assert means == Means((Gpu("H100", 2, 80), Gpu("L4", 1, 24)), 30, frozenset({"a" * 64}))
    assert means_of({"workers": [], "loaded": []}, Means()) == Means()


def test_whatever_workers_say_goes_into_a_record():
    many = [worker(5.0, *((f"card {number} {'x' * 60}", 1) for number in range(20)))]
    means = means_of({"workers": many, "loaded": []}, Means())
    assert parse(sign(LAB, Capabilities(gpus=means.gpus, load=means.load), 1, 1000.0)).load == 100


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_load_is_told_in_tens_near_what_it_is_and_not_anew_for_noise(loads):
    told, tellings = 0, 0
    for load in loads:
        before, told = told, steady(told, load)
        tellings += told != before
        assert told in range(0, 101, 10)
        assert abs(told - load) < 8
    assert tellings <= sum(abs(after - before) >= 2 for before, after in zip([0, *loads], loads, strict=False))


def test_a_region_is_remembered_until_another_one_is_said(tmp_path):
    path = tmp_path / "region"
    assert Region(path, None).name == ""
    assert not path.exists()
    assert Region(path, "eu-west").name == "eu-west"
    assert Region(path, None).name == "eu-west"
    assert Region(path, "").name == ""
    assert Region(path, None).name == ""
    with pytest.raises(ConfigError, match="TETHER_REGION"):
        Region(path, "EU West")
    path.write_text("no region!")
    with pytest.raises(StoreError):
        Region(path, None)


def test_what_the_writer_says_counts_where_this_manager_was_told_nothing(tmp_path):
    follower, elsewhere = Region(tmp_path / "region", None), Region(tmp_path / "region", "us-east")
    (tmp_path / "region").write_text("eu-west")
    follower.read_again()
    elsewhere.read_again()
    assert (follower.name, elsewhere.name) == ("eu-west", "us-east")


def test_copies_are_held_in_the_region_of_the_lab_unless_another_one_was_said_for_that(tmp_path):
    region = Region(tmp_path / "region", "eu-west")
    agreements = Agreements(tmp_path / "copies.json", lambda: region.name)
    agreements.hold(Holding("aa" * 32))
    agreements.hold(Holding("bb" * 32, "basel"))
    assert [each.region for each in agreements.holdings] == ["eu-west", "basel"]
    assert [each.region for each in Agreements(tmp_path / "copies.json").holdings] == ["", "basel"]


async def test_the_record_follows_what_the_workers_say_and_keeps_it_while_the_orchestrator_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr("tether.manager.peering.offering._LOOK", 0.001)
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        data = encode(Manifest(framework="onnx", entry="m", info=INFO, arrays=(repository.add_bytes("m", b"weights"),)))
        repository.publish("digits", data, LAB.public, LAB.sign(signed_message(data)))
        answers = [
            {"workers": [worker(0.0)], "loaded": []},
            {"workers": [worker(0.52, ("H100", 80))], "loaded": [digest_of(data)]},
            OSError("it is away"),
            {"nonsense": 3},
        ]
        asked, told = 0, []

        async def ask():
            nonlocal asked
            answer = answers[min(asked, len(answers) - 1)]
            asked += 1
            if isinstance(answer, OSError):
                raise answer
            return answer

        offering = Offering(repository, Gateway(None, None), Region(tmp_path / "region", "eu-west"), ask)
        assert [(held.name, held.loaded) for held in offering.offered().held] == [("digits", False)]
        running = asyncio.create_task(offering.run(lambda: told.append(asked)))
        async with asyncio.timeout(PATIENCE):
            while asked < 6:  # noqa: ASYNC110 (of what is asked, nothing tells)
                await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        offered = offering.offered()
    assert told == [2]
    assert [held.loaded for held in offered.held] == [True]
    assert (offered.region, offered.gpus, offered.load, offered.serves) == ("eu-west", (Gpu("H100", 1, 80),), 50, False)


async def test_without_an_orchestrator_there_is_nobody_to_ask(tmp_path):
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        offering = Offering(repository, Gateway(None, None), Region(tmp_path / "region", None), None)
        await offering.run(lambda: None)
        assert offering.offered() == Capabilities(())
