"""An answer in parts is the same however its bytes are cut on the way, and what is none is said to be none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import RemoteError
from tether.wire.parts import END, Part, PartReader, encode_part

BODIES = st.lists(st.tuples(st.sampled_from([200, 503]), st.binary(max_size=40)), max_size=6)


@given(BODIES, st.lists(st.integers(1, 30)))
def test_parts_are_the_same_however_they_are_cut(bodies, cuts):
    sent = b"".join(encode_part(status, body, len(body) // 2) for status, body in bodies) + END
    reader, found = PartReader(), []
    for size in cuts:
        found += reader.fed(sent[:size])
        sent = sent[size:]
    found += reader.fed(sent)
    assert found == [*(Part(status, len(body) // 2, body) for status, body in bodies), Part(204, 0, b"")]
    assert [part.is_end for part in found] == [False] * len(bodies) + [True]


@pytest.mark.parametrize("data", [b"<html><body>no", b"\xff" * 12, encode_part(200, b"{}")[:4] + b"\x03\0\0\0\x02\0\0\0{}"])
def test_what_is_no_answer_in_parts_is_noticed_before_it_is_kept(data):
    with pytest.raises(RemoteError, match="version"):
        PartReader().fed(data)
