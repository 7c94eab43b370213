"""The tree over a log's blocks, and the blocks themselves, as Hypercore 10 and Hyperbee 2 have them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import MalformedFeedError
from tether.swarm.feeds.tree import FeedTree, Growth, parse_block, spans

ROOTS = [
    "bb30a42c1e62f0afda5f0a4e8a562f7a13a24cea00ee81917b86b89e801314aa",
    "61471abb31324244026bc68a3e4551b32e7058188e95b976f741fe574f033fe0",
    "e3ecafaf785753f24a07e65da203e893be9839d30fd55d2cbd51948b0ff6b629",
    "97df96a7a8f9159b5821fe5655ce1096921f78e1ea3d201f8c2d4d8a7955b188",
    "db8b8f1e913d532e0668682e7e8464433a45d21ae49b01e3f32b154ab4f74299",
    "2776e7945918b6f25401a9cc8be26f477aad7f0728e3db3a336945e792105447",
    "123d6aa4cf3fad6c4b736f2a1751ff35e8f1e7677ea4b10226c9f361c6ff2fb7",
]
"""`core.treeHash()` of hypercore 10.38.2 after no block, one, two … : the block `n` is `50 * n` times the letter `A + n`."""


def tree_of(blocks):
    tree = FeedTree()
    for block in blocks:
        tree.append(block)
    return tree


def entry(key, value=None, index=b"\x0a\x00"):
    parts = [(1, index), (2, key)] + ([(3, value)] if value is not None else [])
    return b"".join(bytes([number << 3 | 2]) + varint(len(data)) + data for number, data in parts)


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def test_roots_are_those_that_hypercore_computes():
    blocks = [bytes([65 + number]) * (50 * number) for number in range(len(ROOTS) - 1)]
    assert [tree_of(blocks[:length]).root() for length in range(len(ROOTS))] == ROOTS


@given(st.lists(st.binary(max_size=20), max_size=40), st.integers(0, 40))
def test_a_tree_goes_on_from_where_another_was_and_leaves_it_as_it_is(blocks, at):
    part = tree_of(blocks[:at])
    root = part.root()
    whole = FeedTree(part)
    for block in blocks[at:]:
        whole.append(block)
    assert whole.root() == tree_of(blocks).root()
    assert (part.root(), part.length) == (root, len(blocks[:at]))
    assert whole.length == len(blocks)


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=20), st.integers(0, 400), st.integers(1, 255))
def test_another_byte_or_another_cut_is_another_root(blocks, place, flip):
    root = tree_of(blocks).root()
    assert tree_of([*blocks, b""]).root() != root
    assert tree_of(blocks[:-1]).root() != root
    at = place % len(blocks)
    if blocks[at]:
        other = bytearray(blocks[at])
        other[place % len(other)] ^= flip
        assert tree_of([*blocks[:at], bytes(other), *blocks[at + 1 :]]).root() != root


def growth_of(blocks, shorter):
    """As a follower makes it of its copy."""
    behind, at = [], shorter
    for count in spans(shorter, len(blocks)):
        part = FeedTree.behind(at)
        for block in blocks[at : at + count]:
            part.append(block)
        (subtree,) = part.subtrees()
        behind.append(subtree)
        at += count
    return Growth(tree_of(blocks[:shorter]).subtrees(), tuple(behind))


@given(st.lists(st.binary(max_size=6), max_size=70), st.integers(0, 70))
def test_how_a_tree_grew_is_shown_by_a_few_hashes(blocks, at):
    shorter = min(at, len(blocks))
    growth = growth_of(blocks, shorter)
    assert growth.roots(shorter, len(blocks)) == (tree_of(blocks[:shorter]).root(), tree_of(blocks).root())
    assert len(growth.before) + len(growth.behind) <= 3 * max(len(blocks), 1).bit_length()


@given(st.lists(st.binary(min_size=1, max_size=6), min_size=2, max_size=40), st.data())
def test_nobody_can_show_that_a_log_contains_another_one_which_it_does_not(blocks, data):
    shorter = data.draw(st.integers(1, len(blocks) - 1))
    place = data.draw(st.integers(0, shorter - 1))
    other = [*blocks]
    other[place] = bytes([other[place][0] ^ 1]) + other[place][1:]
    claimed, grown = growth_of(other, shorter), growth_of(blocks, shorter)
    assert grown.roots(shorter, len(blocks))[0] != tree_of(other[:shorter]).root()
    mixed = Growth(claimed.before, grown.behind)
    assert mixed.roots(shorter, len(blocks))[1] != tree_of(blocks).root()


@pytest.mark.parametrize(
    "growth",
    [
        Growth((), ()),
        Growth((("ab" * 32, 5),), (("ab" * 32, 5), ("ab" * 32, 5))),
        Growth((("xy" * 32, 5),), (("ab" * 32, 5),)),
        Growth((("ab" * 32, -1),), (("ab" * 32, 5),)),
        Growth((("ab" * 31, 5),), (("ab" * 32, 1 << 60),)),
    ],
)
def test_what_is_to_show_how_a_tree_grew_and_makes_no_sense_is_told(growth):
    with pytest.raises(MalformedFeedError):
        growth.roots(1, 2)


@given(st.binary(max_size=300), st.none() | st.binary(max_size=300))
def test_a_block_is_key_and_value(key, value):
    assert parse_block(entry(key, value)) == (key, value)
    assert parse_block(entry(key, value) + b"\x20\x96\x01") == (key, value)  # a field of a newer Hyperbee


@given(st.binary(max_size=60))
def test_garbage_is_a_block_or_is_told(data):
    try:
        key, _ = parse_block(data)
    except MalformedFeedError:
        return
    assert key in data


@pytest.mark.parametrize(
    "data", [b"", b"\x12", b"\x12\x05ab", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x0a\x00", b"\x15abcd"]
)
def test_what_ends_early_or_has_no_key_is_no_block(data):
    with pytest.raises(MalformedFeedError):
        parse_block(data)
