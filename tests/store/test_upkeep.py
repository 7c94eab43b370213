"""Scrub finds all damage at a bounded rate and goes on where it stopped; repair mends it from any source and keeps nothing unverified."""

import time

import pytest
from store_models import LAB, files_in, files_of, publish, seeded

from tether.errors import ConflictError, StoreError
from tether.store import Repository
from tether.store.format.manifest import digest_of
from tether.store.scrubbing import Pace
from tether.types import ModelRef

FAST = 1e12


@pytest.fixture
def filled(repository):
    for seed in range(3):
        publish(repository, seed)
    return repository


def packs_of(repository):
    return sorted((repository.root / "packs").glob("*.pack"))


def damage(repository, seed, count):
    """Flip a byte in that many blobs; gives their digests."""
    chance = seeded(seed)
    lines = [(pack, line) for pack in packs_of(repository) for line in repository._catalog.blobs_in(pack.name)]
    hit = chance.sample(lines, count)
    for pack, line in hit:
        data = bytearray(pack.read_bytes())
        data[line.offset + chance.randrange(line.nbytes)] ^= 0x10
        pack.write_bytes(data)
    return {line.digest for _, line in hit}


def copy_of(path):
    """A store with the same versions, as a source of blobs."""
    other = Repository.open(path, own=LAB.public)
    for seed in range(3):
        publish(other, seed)

    def source(digest):
        try:
            return other.read_blob(digest)
        except StoreError:
            pass
        try:
            return other.manifest_bytes(digest)
        except StoreError:
            return None

    return other, source


# --- scrub


def test_a_scrub_reads_everything_once_and_finds_all_damage(filled):
    hit = damage(filled, "scrub", 5)

    seen = list(filled.scrub(FAST))

    assert {step.problem.digest for step in seen if step.problem} == hit
    assert [step.cursor for step in seen] == sorted({step.cursor for step in seen})
    assert len(seen) == sum(len(filled._catalog.blobs_in(pack.name)) for pack in packs_of(filled))


def test_a_scrub_goes_on_behind_its_cursor_also_when_that_pack_is_gone(filled):
    everything = list(filled.scrub(FAST))

    for stop in range(len(everything)):
        assert list(filled.scrub(FAST, start_after=everything[stop].cursor)) == everything[stop + 1 :]
    first = packs_of(filled)[0]
    filled._catalog.forget_pack(first.name)  # as a collection does it; one that is only gone is reported
    first.unlink()
    rest = list(filled.scrub(FAST, start_after=everything[0].cursor))
    assert {step.cursor.pack for step in rest} == {pack.name for pack in packs_of(filled)}


def test_a_scrub_reports_a_pack_whose_index_is_gone_and_reads_what_the_catalog_knows_of_it(filled):
    pack = packs_of(filled)[0]
    blobs = filled._catalog.blobs_in(pack.name)
    pack.write_bytes(pack.read_bytes()[:-30])

    steps = [step for step in filled.scrub(FAST) if step.cursor.pack == pack.name]

    assert [step.problem.code for step in steps if step.problem] == ["store_failed"]
    assert len(steps) == len(blobs) + 1


def test_a_scrub_stops_when_told_also_while_it_waits(filled):
    begun = time.monotonic()
    steps = list(filled.scrub(1.0, stop=lambda: time.monotonic() - begun > 0.15))

    assert len(steps) == 1
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("rate", [1e6, 4e6])
def test_a_scrub_keeps_its_rate(rate):
    """On a clock of its own: reading takes no time, or stalls now and then."""
    now, done, pace, chance = 0.0, 0, Pace(rate, 0.0), seeded("pace")
    for _ in range(1000):
        now += chance.choice([0.0, 0.0, 0.001, 0.5])
        nbytes = chance.randrange(1, 1 << 22)
        done += nbytes
        now += pace.wait(nbytes, now)
        assert done <= rate * (now + 0.25) + 1


# --- repair


def test_repair_mends_blobs_manifests_and_lost_packs_from_a_source(filled, tmp_path):
    other, source = copy_of(tmp_path / "other")
    with other:
        digests = [version.digest for version in filled.models()[0].versions]
        hit = damage(filled, "repair", 6)
        (filled.root / "manifests" / digests[1]).write_bytes(b"{}")
        lost = {line.digest for line in filled._catalog.blobs_in(packs_of(filled)[-1].name)}
        packs_of(filled)[-1].unlink()

        report = filled.repair(source)

    assert set(report.found) == hit | lost | {digests[1]}
    assert (set(report.repaired), report.failed) == (set(report.found), ())
    assert filled.verify().problems == ()
    for seed, digest in enumerate(digests):
        assert files_in(filled.checkout(digest)) == files_of(seed)
    filled.rebuild_index()
    assert filled.verify().problems == ()
    assert list((filled.root / "staging").iterdir()) == []


def test_repair_of_one_version_leaves_the_others_alone(filled, tmp_path):
    other, source = copy_of(tmp_path / "other")
    with other:
        for pack in packs_of(filled):
            pack.unlink()

        report = filled.repair(source, ModelRef("digits", version=2))

    assert report.failed == ()
    assert filled.verify(ModelRef("digits", version=2)).problems == ()
    assert filled.verify(ModelRef("digits", version=1)).problems != ()


@pytest.mark.parametrize("lie", [lambda _: None, lambda data: data[:-1] + b"!", lambda data: data + bytes(5_000_000), lambda _: b""])
def test_what_a_source_lies_about_or_lacks_is_not_kept_and_another_may_be_asked(filled, tmp_path, lie):
    other, source = copy_of(tmp_path / "other")
    with other:
        hit = damage(filled, "lies", 3)
        before = sum(pack.stat().st_size for pack in packs_of(filled))

        report = filled.repair(lambda digest: lie(source(digest)))

        assert (set(report.failed), report.repaired) == (hit, ())
        assert sum(pack.stat().st_size for pack in packs_of(filled)) == before
        assert set(filled.repair(source).repaired) == hit
    assert filled.verify().problems == ()


def test_good_blobs_of_a_pack_whose_index_is_gone_are_salvaged_without_any_source(filled):
    pack = packs_of(filled)[0]
    digests = {line.digest for line in filled._catalog.blobs_in(pack.name)}
    data = bytearray(pack.read_bytes())
    data[-20] ^= 1
    pack.write_bytes(data)

    report = filled.repair(lambda _: None)

    assert (set(report.repaired), report.failed) == (digests, ())
    assert filled.verify().problems == ()  # the same blobs in the same order are the same pack: it was replaced
    filled.rebuild_index()
    assert filled.verify().problems == ()


def test_a_broken_pack_stays_as_long_as_one_of_its_blobs_is_not_mended(filled, tmp_path):
    other, source = copy_of(tmp_path / "other")
    pack = packs_of(filled)[0]
    victim = filled._catalog.blobs_in(pack.name)[1]
    data = bytearray(pack.read_bytes())
    data[-20] ^= 1
    data[victim.offset] ^= 1
    pack.write_bytes(data)

    with other:
        assert filled.repair(lambda _: None).failed == (victim.digest,)
        assert pack.exists()
        assert filled.repair(source).failed == ()
    assert not pack.exists()
    assert filled.verify().problems == ()


def test_nothing_damaged_nothing_repaired_and_a_reader_repairs_nothing(filled):
    assert filled.repair(lambda _: b"").found == ()
    with Repository.open(filled.root, read_only=True) as reader, pytest.raises(ConflictError, match="reading only"):
        reader.repair(lambda _: None)


def test_verify_counts_what_nobody_names_any_more_too(filled):
    filled.set_alias("digits", "prod", 2)
    filled.delete_version("digits", 1)
    whole = filled.verify()
    orphan = next(iter({digest_of(data) for data in files_of(0).values()} - {digest_of(data) for data in files_of(1).values()}))
    located = filled._catalog.locate(orphan)
    pack = filled.root / "packs" / located.pack
    data = bytearray(pack.read_bytes())
    data[located.offset] ^= 1
    pack.write_bytes(data)

    (problem,) = filled.verify().problems

    assert whole.problems == ()
    assert (problem.path, problem.digest, problem.code) == (pack.name, orphan, "chunk_altered")
