"""What a gateway makes of a rollout that is asked for, and how it describes one."""

import json
from types import SimpleNamespace

import pytest
from msgspec import structs

from tether.errors import BadInputError, ConflictError, NotFoundError
from tether.gateway.rolling import ROLLING, begun, described
from tether.routing.table import Canary, ModelEntry, Table, VersionEntry
from tether.serving_settings import DEFAULTS, Rollout, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)


def entry(rollout=None, *, default=1, canary=None, aliases=None):
    versions = {number: VersionEntry(ModelVersion("digits", number, Digest(f"{number:064x}")), INFO) for number in (1, 2, 3)}
    versions[1] = structs.replace(versions[1], canary=canary)
    serving = DEFAULTS if rollout is None else ServingSettings(rollout=rollout)
    return ModelEntry("digits", default, versions, {"prod": default} if aliases is None else aliases, serving)


def test_what_is_not_said_has_a_default_and_what_the_name_means_is_noted():
    assert begun(entry(), {"version": 2, "every": 1}, 5.0) == Rollout(2, 1, begun=5.0, every=1.0)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"version": 2, "pace": 1}, "no 'pace'"),
        ({"version": 2, "steps": [0.5, 0.1]}, "ascending"),
        ({"version": 2, "steps": []}, "length"),
        ({"version": 2, "steps": [2]}, "<= 1"),
        ({"version": 2, "every": -1}, ">= 0"),
        ({"version": 2, "before": 3}, "no 'before'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(terms, words):
    with pytest.raises(BadInputError, match=words):
        begun(entry(), terms, 5.0)


def test_what_the_name_means_already_needs_no_rollout_and_without_prod_it_is_said_why_it_does():
    with pytest.raises(ConflictError, match=r"already$"):
        begun(entry(default=2), {"version": 2}, 5.0)
    with pytest.raises(ConflictError, match="tether alias digits prod"):
        begun(entry(default=3, aliases={"latest": 3}), {"version": 3}, 5.0)


def test_the_same_asked_again_is_the_same_and_another_one_waits_for_its_end():
    running = begun(entry(), {"version": 2}, 5.0)
    assert begun(entry(running), {"version": 2}, 6.0) is running
    with pytest.raises(ConflictError, match="version 2 of digits is being rolled out"):
        begun(entry(running), {"version": 3}, 6.0)
    ended = structs.replace(running, state="reverted")
    assert begun(entry(ended), {"version": 2}, 6.0).begun == 6.0


@pytest.mark.parametrize(
    ("canary", "ended", "state"),
    [
        (None, "running", "loading"),
        (Canary(2, shadow=0.5), "running", "shadow"),
        (Canary(2, 0.5), "running", "canary"),
        (Canary(2, 1.0), "promoted", "promoted"),
        (None, "reverted", "reverted"),
    ],
)
def test_it_is_described_by_what_gateways_do(canary, ended, state):
    told = described(entry(Rollout(2, 1, begun=5.0, state=ended, reason="why"), canary=canary))
    assert (told["state"], told["version"], told["before"], told["reason"]) == (state, 2, 1, "why")
    assert told["weight"] == (canary.weight if canary and ended == "running" else 0.0)


def test_where_there_was_none_it_is_said_how_to_begin():
    with pytest.raises(NotFoundError, match="tether rollout digits VERSION"):
        described(entry())


async def test_what_is_written_while_the_orchestrator_is_away_is_told_as_it_was_written():
    async def durable(name, changes):
        written.append((name, changes["rollout"]["version"], changes["rollout"].get("state", "running")))

    written, begin, end = [], ROLLING[0], ROLLING[2]
    dispatcher = SimpleNamespace(table=Table(1, {"digits": entry()}), management=SimpleNamespace(set_serving=durable))
    call = SimpleNamespace(door=SimpleNamespace(dispatcher=dispatcher), path={"name": "digits"}, body=b'{"version": 2}')
    assert json.loads((await begin.handle(call)).body)["state"] == "loading"
    dispatcher.table = Table(2, {"digits": entry(Rollout(2, 1, begun=5.0))})
    assert json.loads((await end.handle(call)).body)["state"] == "aborted"
    assert written == [("digits", 2, "running"), ("digits", 2, "aborted")]
