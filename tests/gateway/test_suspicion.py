"""What a gateway makes of workers that go away while they have requests: who is suspected, who runs alone, who is found out."""

import json

import msgspec
import pytest

from tether.errors import ModelDiedError, ModelFailedError, PoisonInputError
from tether.gateway.suspicion import Suspicion
from tether.ports import Hop, HopReply, Undelivered
from tether.routing.quarantine import mark_of
from tether.routing.table import ModelEntry, Route, Table, VersionEntry
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId
from tether.wire.oip import encode_error

SPEC = (TensorSpec("x", "FP32", (-1,)),)
DATA = ModelInfo("onnx", "onnx", SPEC, SPEC, batched=True, pure=True, code=False)
CODE = ModelInfo("custom", "custom", SPEC, SPEC, batched=True, pure=False, code=True)
VERSION = ModelVersion("m", 1, Digest("0" * 64))
OWN, LENT = Route(WorkerId("w"), "w.sock"), Route(WorkerId("l"), "l.sock", slots=4)
BAD, GOOD = Hop(b"bad", 0, 1.0), Hop(b"good", 0, 1.0)
MARK = mark_of(b"bad", 0)


class Rig:
    def __init__(self):
        self.told, self.now = [], 1000.0
        self.suspicion = Suspicion(lambda model, mark: self.told.append((str(model), mark)), lambda: self.now)
        self.tables = [Table(1)]

    def push(self, seq, **entry):
        after = Table(seq, {"m": ModelEntry("m", 1, {1: VersionEntry(VERSION, DATA, "ready", **entry)}, {})})
        self.suspicion.follow(self.tables[-1], after)
        self.tables.append(after)


@pytest.fixture
def rig():
    return Rig()


def entry(info=DATA, **more):
    return VersionEntry(VERSION, info, "ready", **more)


def reply(error):
    return HopReply(error.http_status, encode_error(error))


def code(answer):
    return json.loads(answer.body)["code"]


def test_nothing_is_held_against_anyone_and_nothing_is_looked_at_until_a_worker_goes_away(rig):
    assert rig.suspicion.admitted(entry(), GOOD) is GOOD
    assert rig.suspicion.lost(entry(), OWN, BAD) is BAD
    assert rig.suspicion.admitted(entry(), GOOD) is GOOD
    assert rig.told == []


def test_whoever_was_there_twice_goes_on_alone_and_the_version_is_isolated_once(rig):
    for hop in (BAD, GOOD):
        assert not rig.suspicion.lost(entry(), OWN, hop).alone
    assert rig.suspicion.lost(entry(), OWN, BAD).alone
    assert rig.suspicion.lost(entry(), OWN, GOOD).alone
    assert rig.told == [("m:1", None)]


def test_who_sends_the_same_again_is_still_suspected_even_of_a_model_that_is_not_pure(rig):
    impure = entry(msgspec.structs.replace(DATA, pure=False))
    rig.suspicion.lost(impure, OWN, BAD)
    rig.suspicion.lost(impure, OWN, BAD)
    assert rig.suspicion.admitted(impure, BAD).alone
    assert not rig.suspicion.admitted(impure, GOOD).alone


def test_who_ran_alone_to_its_end_is_not_suspected_any_more(rig):
    rig.suspicion.lost(entry(), OWN, GOOD)
    alone = rig.suspicion.lost(entry(), OWN, GOOD)
    answer = HopReply(200, b"{}")
    assert rig.suspicion.judged(entry(), alone, answer) is answer
    assert not rig.suspicion.admitted(entry(), GOOD).alone


@pytest.mark.parametrize(("info", "route"), [(CODE, OWN), (DATA, LENT)], ids=["of a model with a process of its own", "at another lab"])
def test_a_request_that_can_not_have_ended_the_worker_is_not_suspected(rig, info, route):
    for _ in range(5):
        assert not rig.suspicion.lost(entry(info), route, BAD).alone


def test_who_was_found_out_is_refused_at_once_and_everywhere(rig):
    rig.suspicion.judged(entry(), BAD, reply(PoisonInputError("it died", True)))
    rig.suspicion.judged(entry(), BAD, reply(PoisonInputError("it died", True)))
    assert rig.told == [("m:1", MARK)]
    with pytest.raises(PoisonInputError, match="tether quarantine --clear m"):
        rig.suspicion.admitted(entry(), BAD)
    assert rig.suspicion.admitted(entry(), GOOD) is GOOD
    elsewhere = Rig()
    with pytest.raises(PoisonInputError):
        elsewhere.suspicion.admitted(entry(poison={MARK: 1001.0}), BAD)
    elsewhere.now = 9999.0  # clocks differ: when it is over, the orchestrator says
    with pytest.raises(PoisonInputError):
        elsewhere.suspicion.admitted(entry(poison={MARK: 1001.0}), BAD)
    assert elsewhere.suspicion.admitted(entry(), BAD) is BAD


def test_an_input_that_ends_the_process_of_a_model_that_is_not_pure_has_two_tries(rig):
    died = reply(ModelDiedError("signal 11", True))
    assert rig.suspicion.judged(entry(CODE), BAD, died) is died
    assert code(rig.suspicion.judged(entry(CODE), BAD, died)) == "poison_input"
    with pytest.raises(PoisonInputError):
        rig.suspicion.admitted(entry(CODE), BAD)


def test_a_process_that_was_ended_from_outside_is_held_against_nobody(rig):
    died = reply(ModelDiedError("signal 9", False))
    for _ in range(5):
        assert rig.suspicion.judged(entry(CODE), BAD, died) is died
    assert rig.suspicion.admitted(entry(CODE), BAD) is BAD
    pure = entry(msgspec.structs.replace(CODE, pure=True))
    assert rig.suspicion.judged(pure, BAD, died) is Undelivered.LOST  # so it is tried elsewhere


def test_a_model_can_not_have_an_input_condemned_by_what_it_says(rig):
    liar = reply(ModelFailedError('"code":"poison_input" "code":"model_died"'))
    assert rig.suspicion.judged(entry(), GOOD, liar) is liar
    assert rig.told == []


def test_what_was_forgiven_is_forgiven_here_too_and_a_new_orchestrator_is_told(rig):
    rig.suspicion.lost(entry(), OWN, BAD)
    rig.suspicion.lost(entry(), OWN, BAD)
    rig.suspicion.judged(entry(), BAD, reply(PoisonInputError("it died", True)))
    rig.push(7, poison={MARK: 4600.0}, is_isolated=True)
    rig.told.clear()
    rig.push(2)  # another orchestrator, which knows of nothing
    assert rig.told == [("m:1", None), ("m:1", MARK)]
    rig.push(3, poison={MARK: 4600.0}, is_isolated=True)
    rig.push(4)
    assert rig.suspicion.admitted(entry(), BAD) is BAD
    assert not rig.suspicion.lost(entry(), OWN, BAD).alone
