"""Notes of what was encrypted before go with their blobs, and never from under a publish that relies on them."""

import threading

import pytest
from collecting import DAY, Clock, opened
from sealed_models import publish_sealed
from store_models import LAB, seeded

from tether.store import digest_of
from tether.store.sealing import Sealing

KEPT, GONE = seeded("kept").randbytes(200_000), seeded("gone").randbytes(300_000)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    with opened(tmp_path / "store", clock) as repository:
        yield repository


def noted(store):
    """How many notes there are."""
    with store._catalog.reading() as db:
        return db.execute("SELECT count(*) FROM seals").fetchone()[0]


def two_versions(store, clock):
    """The first is deleted two days ago."""
    publish_sealed(store, {"a": KEPT, "b": GONE})
    publish_sealed(store, {"a": KEPT})
    store.delete_version("digits", 1)
    clock.advance(2 * DAY)


def test_the_note_of_a_blob_goes_with_it_and_a_dry_run_says_so_before(store, clock):
    two_versions(store, clock)
    changes = store.change_count()
    would = store.gc(dry_run=True)
    assert (would.seals, noted(store), store.change_count()) == (1, 2, changes)
    assert "would forget 1 notes of what was encrypted: it is stored no more" in would.lines()

    did = store.gc()

    assert (did.seals, noted(store)) == (1, 1)
    assert "forgot 1 notes of what was encrypted: it is stored no more" in did.lines()
    assert store.gc().seals == 0
    intake = Sealing(store, LAB.public).intake("digits")
    assert intake.missing([digest_of(KEPT), digest_of(GONE)]) == [digest_of(GONE)]
    assert publish_sealed(store, {"a": KEPT, "b": GONE}).version == 3
    assert store.verify().problems == ()


def test_while_a_deletion_can_be_taken_back_the_notes_stay(store, clock):
    publish_sealed(store, {"b": GONE})
    clock.advance(2 * DAY)
    store.delete_version("digits", 1)
    clock.advance(DAY / 2)

    assert store.gc().seals == 0
    assert Sealing(store, LAB.public).intake("digits").missing([digest_of(GONE)]) == []


def test_what_a_publish_staged_or_was_told_is_here_keeps_its_note(store, clock):
    publish_sealed(store, {"b": GONE})
    store.delete_version("digits", 1)
    clock.advance(2 * DAY)
    intake = Sealing(store, LAB.public).intake("digits")
    intake.put(digest_of(KEPT), KEPT)  # staged: in no pack yet
    assert intake.missing([digest_of(KEPT), digest_of(GONE)]) == []  # promised

    assert (store.gc(dry_run=True).seals, store.gc().seals, noted(store)) == (0, 0, 2)
    assert publish_sealed(store, {"a": KEPT, "b": GONE}).created
    assert store.verify().problems == ()


def test_an_upload_that_was_given_up_takes_its_notes_with_it(store):
    intake = Sealing(store, LAB.public).intake("digits")
    intake.put(digest_of(GONE), GONE)
    intake.settle()
    assert noted(store) == 1
    store.clear_staging()

    assert (store.gc(dry_run=True).seals, store.gc().seals, noted(store)) == (1, 1, 0)
    assert intake.missing([digest_of(GONE)]) == [digest_of(GONE)]


def test_publishing_and_collecting_together_lose_no_note_of_what_is_stored(store):
    pieces = [seeded(f"piece {number}").randbytes(20_000) for number in range(12)]
    done = threading.Event()

    def collect():
        while not done.is_set():
            store.gc(grace=0)

    collecting = threading.Thread(target=collect)
    collecting.start()
    try:
        for number in range(40):
            chosen = seeded(number).sample(pieces, 4)
            published = publish_sealed(store, {str(place): data for place, data in enumerate(chosen)})
            if number % 2:
                store.delete_version("digits", published.version)
    finally:
        done.set()
        collecting.join()

    assert store.verify().problems == ()
    known = Sealing(store, LAB.public).intake("digits")
    for version in store.models()[0].versions:
        for array in store.manifest(version.digest).files():
            data = store.read_array(array, 0, array.nbytes)
            assert known.missing([digest_of(data)]) == []
