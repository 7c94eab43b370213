import hypothesis.strategies as st
import pytest
from hypothesis import given

from tether.store.collecting.collection import MERGE, PROMISE, TINY, WHOLE, Claim, Inventory, Need, StoredPack, need_of, placed, plan
from tether.store.format.packs import MAGIC, Located, index_bytes
from tether.types import Digest

NOW = 1_000_000.0
GRACE = 1_000.0
OLD = NOW - GRACE
MIB = 1 << 20


def digest(number):
    return Digest(f"{number:064x}")


def pack_of(*numbers, nbytes=MIB, written=OLD, name=None, extra=0):
    """A pack whose blobs have these numbers; `extra`: bytes of copies that were replaced elsewhere."""
    index = placed(Located(digest(number), 0, nbytes) for number in numbers)
    end = index[-1].offset + nbytes if index else len(MAGIC)
    own, tail = index_bytes(index, end)
    return StoredPack(name or own, end + len(tail) + extra, written, tuple(index))


def decide(*packs, named=(), **known):
    return plan(Inventory(tuple(packs), named={digest(number) for number in named}, **known), NOW, GRACE)


def reasons(found):
    return {kept.reason.split(",")[0]: kept for kept in found.kept}


def test_a_pack_that_nothing_names_is_deleted():
    live, dead = pack_of(1), pack_of(2)

    found = decide(live, dead, named=[1])

    assert found.drops == (dead,)
    assert found.rewrites == ()
    assert found.kept == ()


def test_what_was_stored_within_the_grace_period_stays_and_is_said_to_until_when():
    young = pack_of(1, 2, written=NOW - 1)

    found = decide(young)

    assert found.drops == ()
    (kept,) = found.kept
    assert (kept.packs, kept.nbytes, kept.until) == (1, 2 * MIB, NOW - 1 + GRACE)
    assert plan(Inventory((young,)), NOW - 1 + GRACE, GRACE).drops == (young,)


def test_what_deleted_versions_named_stays_for_the_grace_period_after_the_deletion():
    pack = pack_of(1, 2)
    forgotten = {digest(90): NOW - 10, digest(91): OLD}

    found = decide(pack, forgotten=forgotten, lingering={digest(1): NOW - 10})

    assert found.manifests == (digest(91),)
    assert found.drops == ()
    assert reasons(found)["named by versions that were deleted a short time ago"].until == NOW - 10 + GRACE
    assert plan(Inventory((pack,), lingering={digest(1): NOW - 10}), NOW - 10 + GRACE, GRACE).drops == (pack,)


def test_what_was_promised_stays_for_an_hour():
    pack = pack_of(1)
    promised = {digest(1): NOW - PROMISE + 1}

    assert decide(pack, promised=promised).drops == ()
    assert decide(pack, promised={digest(1): NOW - PROMISE}).drops == (pack,)
    assert reasons(decide(pack, promised=promised))["promised to a publish that goes on"].until == NOW + 1


@pytest.mark.parametrize(("live", "rewritten"), [(1, True), (4, True), (5, False), (9, False)])
def test_a_pack_is_rewritten_when_less_than_half_would_be_left(live, rewritten):
    pack = pack_of(*range(10))

    found = decide(pack, named=range(live))

    assert bool(found.rewrites) == rewritten
    if rewritten:
        (rewrite,) = found.rewrites
        assert [line.digest for line in rewrite.index] == [digest(number) for number in range(live)]
        assert rewrite.sources[0].dead == tuple(digest(number) for number in range(live, 10))
        assert rewrite.nbytes < pack.nbytes / 2
    else:
        assert reasons(found)["garbage in packs of which half or more is needed"].nbytes == (10 - live) * MIB


def test_what_a_rewrite_made_is_not_rewritten_again():
    """Also where the index is larger than the blobs: what counts is what the new pack would have."""
    many = pack_of(*range(100), nbytes=1)
    (rewrite,) = decide(many, named=range(10)).rewrites
    made = StoredPack(rewrite.name, rewrite.nbytes, rewrite.written, rewrite.index)

    assert decide(made, named=range(10)).rewrites == ()
    assert pack_of(*range(10), nbytes=1).name == rewrite.name, "the name follows from what it holds"


def test_copies_that_were_replaced_count_as_garbage_of_their_pack():
    assert decide(pack_of(1, extra=3 * MIB), named=[1]).rewrites != ()
    assert decide(pack_of(extra=MIB)).drops != ()


def test_neighbours_stay_neighbours_and_keep_their_alignment():
    before = [Located(digest(1), 80, 20), Located(digest(2), 100, 4), Located(digest(3), 1_030, 7)]

    after = placed(before)

    assert after[1].offset == after[0].offset + 20
    assert [line.offset % 64 for line in after] == [line.offset % 64 for line in before]


def test_many_tiny_packs_become_one_and_few_do_not():
    few = [pack_of(number, nbytes=4_000) for number in range(MERGE - 1)]
    many = [*few, pack_of(MERGE, nbytes=4_000)]
    large = pack_of(1_000, nbytes=TINY)
    named = [*range(MERGE + 1), 1_000]

    assert decide(*few, large, named=named).rewrites == ()
    (merge,) = decide(*many, large, named=named).rewrites
    assert {source.pack.name for source in merge.sources} == {pack.name for pack in many}
    assert decide(StoredPack(merge.name, merge.nbytes, OLD, merge.index), large, named=named).rewrites == ()


def test_a_merge_keeps_the_age_of_the_youngest():
    packs = [pack_of(number, nbytes=4_000, written=OLD - number) for number in range(MERGE)]

    (merge,) = decide(*packs, named=range(MERGE)).rewrites

    assert merge.written == OLD


def test_nothing_is_deleted_while_it_is_not_known_what_is_named():
    found = decide(pack_of(1), unreadable=("what digits:1 is made of is not known",))

    assert (found.drops, found.rewrites, found.manifests) == ((), (), ())
    assert found.unknown == ("what digits:1 is made of is not known",)


def test_what_another_store_needs_stays_and_the_store_is_named():
    pack = pack_of(1, 2)
    claims = {pack.name: (Claim("host b", need_of(pack.blobs[:1])),)}

    found = decide(pack, claims=claims)

    assert found.drops == ()
    assert found.kept[0].reason == "needed by host b"
    assert found.kept[0].nbytes == pack.nbytes


def test_stores_that_need_the_same_part_rewrite_and_those_that_need_others_do_only_where_the_disk_wins():
    pack = pack_of(*range(10))

    def rewrites(need):
        return decide(pack, named=range(4), claims={pack.name: (Claim("host b", need),)}).rewrites

    assert rewrites(need_of(pack.blobs[:4])), "the other one will make, and share, the same pack"
    assert not rewrites(need_of(pack.blobs[4:8])), "two packs of four are no gain"
    assert not rewrites(WHOLE)
    assert decide(pack, named=[1], claims={pack.name: (Claim("host b", need_of(pack.blobs[7:9])),)}).rewrites


def test_a_store_needs_the_packs_of_what_is_named_and_not_the_young_ones():
    named, young, promised = pack_of(1, 2), pack_of(3, written=NOW), pack_of(4)

    found = decide(named, young, promised, named=[1], promised={digest(4): NOW})

    assert found.needs == {named.name: need_of(named.blobs[:1]), promised.name: need_of(promised.blobs)}
    assert found.needs[named.name] == Need(MIB, need_of(named.blobs[:1]).live)


numbers = st.integers(0, 30)
ages = st.floats(0, 3 * GRACE)


@given(
    layout=st.lists(st.lists(numbers, unique=True), max_size=8),
    written=st.lists(ages, min_size=8, max_size=8),
    named=st.sets(numbers),
    promised=st.dictionaries(numbers, st.floats(0, 3 * PROMISE)),
    lingering=st.dictionaries(numbers, ages),
    grace=st.sampled_from([0.0, GRACE]),
)
def test_whatever_there_is_all_that_is_needed_stays_and_all_that_is_not_goes(layout, written, named, promised, lingering, grace):
    seen, packs = set(), []
    for index, content in enumerate(layout):
        fresh = [number for number in content if number not in seen]  # a blob lies in one pack
        seen.update(fresh)
        packs.append(pack_of(*fresh, nbytes=2 * MIB, written=NOW - written[index], name=f"{index}.pack"))
    inventory = Inventory(
        tuple(packs),
        named={digest(number) for number in named},
        promised={digest(number): NOW - age for number, age in promised.items()},
        lingering={digest(number): NOW - age for number, age in lingering.items()},
    )

    found = plan(inventory, NOW, grace)

    needed = (
        named
        | {n for n, age in promised.items() if NOW - age + PROMISE > NOW}
        | {n for n, age in lingering.items() if NOW - age + grace > NOW}
    )
    gone = {blob.digest for pack in found.drops for blob in pack.blobs} | {d for r in found.rewrites for s in r.sources for d in s.dead}
    assert gone.isdisjoint({digest(number) for number in needed})
    moved = {source.pack.name for rewrite in found.rewrites for source in rewrite.sources}
    for pack in packs:
        young = pack.written + grace > NOW
        useful = [blob for blob in pack.blobs if young or blob.digest in {digest(number) for number in needed}]
        assert (pack in found.drops) == (not useful and not young)
        if useful and pack.name not in moved:
            assert sum(blob.nbytes for blob in useful) >= sum(blob.nbytes for blob in pack.blobs) // 2 - 64
    for rewrite in found.rewrites:
        assert {blob.digest for source in rewrite.sources for blob in source.keep} == {line.digest for line in rewrite.index}
