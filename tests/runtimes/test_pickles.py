"""Pickles are read as data: the same values as Python's, no import, no call, and nothing that weights do not need."""

import contextlib
import pickle
import random
import struct
import sys

import hostile_archives as hostile
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.weights import pickles

SCALARS = st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers(-(1 << 40), 1 << 40) | st.tuples(st.text(), st.integers(0, 9))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner), max_leaves=12)


@given(VALUES, st.integers(0, 5))
def test_plain_values_are_what_python_reads(value, protocol):
    assert pickles.check(pickle.dumps(value, protocol), "p") == value


@given(st.binary(max_size=300), st.integers(3, 5))
def test_bytes_are_what_python_reads(value, protocol):
    assert pickles.check(pickle.dumps([value, bytearray(value)], protocol), "p")[0] == value


@pytest.mark.parametrize("way", hostile.WAYS)
@pytest.mark.parametrize("attack", hostile.ATTACKS, ids=".".join)
def test_what_attacks_call_is_refused_by_name_in_every_way_to_call_it(attack, way):
    with pytest.raises(HostileModelError, match="calls '") as caught:
        pickles.check(hostile.calling(*attack, way), "model.pt: 'data.pkl'")
    assert attack[1] in str(caught.value)
    assert "data.pkl" in str(caught.value)


@pytest.mark.parametrize("way", hostile.WAYS)
def test_whatever_is_not_needed_by_weights_is_refused(way):
    with pytest.raises(BadModelError, match=r"needs 'somebody\.Model'.*state_dict"):
        pickles.check(hostile.calling("somebody", "Model", way), "p")


def test_nothing_is_imported():
    assert "antigravity" not in sys.modules
    with pytest.raises(BadModelError):
        pickles.check(hostile.calling("antigravity", "fly"), "p")
    assert "antigravity" not in sys.modules


def test_classes_of_a_script_are_names_in_a_script_only():
    data = b"\x80\x02c__torch__.net\nNet\n)\x81}" + hostile.text("w") + b"K\x01sb."
    made = pickles.check(data, "p", script=True)
    assert (str(made.function), made.state) == ("__torch__.net.Net", {"w": 1})
    with pytest.raises(BadModelError, match="__torch__"):
        pickles.check(data, "p")


def test_the_first_name_outside_the_list_is_told():
    data = pickle.dumps([1, 2])[:-1] + b"0" + hostile.named("first", "one") + hostile.named("os", "system") + b"."
    with pytest.raises(BadModelError, match=r"first\.one"):
        pickles.check(data, "p")


EXHAUSTING = {
    "extension code 1": b"\x80\x02\x82\x01.",
    "extension code 2": b"\x80\x02\x83\x01\x00.",
    "extension code 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent id in text": b"Pos.system\n.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "endless": b"\x80\x02" + b"N0" * 1_100_000 + b"N.",
    "marks": b"(" * 2000,
    "huge integer": b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b".",
    "digits": b"I" + b"9" * 5000 + b"\n.",
    "second pickle behind": b"\x80\x02N." + hostile.PLANT,
    "keys that collide": b"\x80\x02}" + b"\x8a\x10" + b"\x7f" * 16 + b"Ns.",
}


@pytest.mark.parametrize("kind", EXHAUSTING)
def test_what_exhausts_or_hides_is_refused(kind):
    with pytest.raises(HostileModelError):
        pickles.check(EXHAUSTING[kind], "p")


NONSENSE = {
    "empty": b"",
    "text": b"<!DOCTYPE html>",
    "protocol 9": b"\x80\x09N.",
    "no end": b"\x80\x02N",
    "nothing at the end": b"\x80\x02.",
    "two values at the end": b"\x80\x02NN.",
    "an open mark": b"\x80\x02(N.",
    "unknown opcode": b"\x80\x02\xff.",
    "unknown memo": b"\x80\x02h\x07.",
    "text that ends early": b"\x80\x02X\xff\xff\xff\xffabc.",
    "text of 2^63": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call without a tuple": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "a call of a type": b"\x80\x02ctorch\nfloat32\n)R.",
    "attributes of a list": b"\x80\x02]}b.",
    "attributes of a device": b"\x80\x02ctorch\ndevice\n)R}b.",
    "items of a number": b"\x80\x02K\x01(NNu.",
    "odd items": b"\x80\x02}(Nu.",
    "a key that is a list": b"\x80\x02}]Ns.",
    "a key that is nested": b"\x80\x02})\x85\x85\x85Ns.",
    "appended to a tuple": b"\x80\x02)Na.",
    "a global of numbers": b"\x80\x04K\x01K\x02\x93.",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_what_is_no_pickle_is_a_bad_model(kind):
    with pytest.raises(BadModelError):
        pickles.check(NONSENSE[kind], "p")


def test_tuples_that_would_hash_for_ever_are_no_keys():
    shared = b"\x80\x02}" + b")" + b"2\x86" * 100 + b"Ns."
    with pytest.raises(BadModelError):
        pickles.check(shared, "p")


def test_deep_values_are_read_and_freed():
    assert pickles.check(b"\x80\x02N" + b"\x85" * 500_000 + b".", "p")


@pytest.mark.parametrize("percent", range(0, 100, 2))
def test_a_pickle_that_was_cut_off_is_a_bad_model(percent):
    data = pickle.dumps({"a": [1.5, "x" * 100, (1, 2, 3)] * 10, "b": {"c": 2**40}}, 2)
    with pytest.raises(BadModelError):
        pickles.check(data[: len(data) * percent // 100], "p")


def test_mutated_pickles_are_values_or_bad_models():
    data = hostile.state_dict({"w": hostile.tensor(), "b": hostile.tensor("1", 2, 0, (2,), (1,))})
    chance = random.Random("mutated pickles")
    for _ in range(3000):
        mutated = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            mutated[chance.randrange(len(data))] = chance.randrange(256)
        try:
            pickles.check(bytes(mutated), "p")
        except BadModelError as error:
            assert "\n" not in str(error)  # noqa: PT017


@given(st.binary(max_size=400))
def test_any_bytes_are_a_value_or_a_bad_model(data):
    for start in (b"", b"\x80\x02", b"\x80\x04"):
        with contextlib.suppress(BadModelError):
            pickles.check(start + data + b".", "p", script=True)
        pickles.planted(start + data)


def test_a_planted_pickle_is_told_from_text():
    assert pickles.planted(b"class M(Module):\n  c0 : Tensor\n  return torch.relu(x)\n") is None
    assert pickles.planted(b"little") is None
    assert pickles.planted(pickle.dumps({"a": 1})) is None
    assert pickles.planted(hostile.PLANT) == "os.system"
    assert pickles.planted(hostile.PLANT + b"garbage") == "os.system"
    assert pickles.planted(b"cos\nsystem\n(S'id'\ntR.") == "os.system"
