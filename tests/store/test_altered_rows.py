"""Rows of the catalog that the disk altered, or lost: every method tells it in an error of ours, and nothing is deleted for it."""

import sqlite3
import threading

import pytest
from collecting import DAY, Clock, content, opened, packs_in
from store_models import files_of, publish

from tether import store
from tether.errors import StoreError, TetherError
from tether.store import Repository
from tether.types import ModelRef

DIGITS = ModelRef("digits")
STATEMENTS = (
    "UPDATE blobs SET offset = 'abc'",
    "UPDATE blobs SET offset = -7",
    "UPDATE blobs SET offset = 9223372036854775807",
    "UPDATE blobs SET nbytes = -5",
    "UPDATE blobs SET nbytes = 'x'",
    "UPDATE blobs SET nbytes = 9999999999",
    "UPDATE blobs SET digest = x'00' || substr(digest, 1, 9) WHERE digest = (SELECT min(digest) FROM blobs)",
    "UPDATE pack_ages SET written = 'x'",
    "UPDATE forgotten_manifests SET since = 'x'",
    "UPDATE versions SET digest = 'zz'",
)
USES = {
    "verify": Repository.verify,
    "scrub": lambda repository: list(repository.scrub(1e9)),
    "repair": lambda repository: repository.repair(lambda _: None),
    "gc": Repository.gc,
    "dry run": lambda repository: repository.gc(dry_run=True),
    "read": lambda repository: repository.load_file(repository.resolve(DIGITS).digest, "model.onnx"),
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_row_that_makes_no_sense_is_an_error_of_ours(tmp_path, statement):
    clock, root = Clock(), tmp_path / "store"
    with opened(root, clock) as repository:
        publish(repository, 1, files={"model.onnx": content("one"), "b": content("both")})
        publish(repository, 2, files={"model.onnx": content("two"), "b": content("both")})
        repository.delete_version("digits", 1)
        repository.gc()
    with sqlite3.connect(root / "catalog.sqlite") as db:
        db.execute("PRAGMA foreign_keys = OFF")
        db.execute(statement)
    db.close()

    before = packs_in(root)
    clock.advance(5 * DAY)
    for use in USES.values():
        try:
            with opened(root, clock) as repository:
                use(repository)
        except TetherError as error:
            assert len(str(error)) > 20  # noqa: PT017 (either is right: an answer, or an error of ours)
    if "versions" in statement or "blobs" in statement:
        assert packs_in(root).keys() >= before.keys()


def test_a_blob_whose_row_was_lost_is_found_in_its_pack_before_that_passes_for_garbage(tmp_path):
    clock, blob = Clock(), content("lost row")
    with opened(tmp_path / "store", clock) as repository:
        publish(repository, files={"model.onnx": blob})
        with repository._catalog.writing() as db:
            db.execute("DELETE FROM blobs WHERE digest = ?", (bytes.fromhex(store.digest_of(blob)),))
        clock.advance(3 * DAY)

        repository.gc()

        assert repository.read_blob(store.digest_of(blob)) == blob


def test_a_blob_is_found_while_another_thread_holds_a_long_transaction(repository):
    published = publish(repository, files=files_of(1))
    digest, found = repository.manifest(published.digest).blobs()[0], []
    with repository._catalog.reading():
        reader = threading.Thread(target=lambda: found.append(repository.read_blob(digest)))
        reader.start()
        reader.join(10)
    assert store.digest_of(found[0]) == digest


def test_what_a_pack_holds_is_asked_of_an_index(repository):
    """Else each pack of a collection, a repair or a scrub walks over all blobs of the store."""
    with repository._catalog.reading() as db:
        plan = db.execute("EXPLAIN QUERY PLAN SELECT digest FROM blobs WHERE pack = 1 ORDER BY offset").fetchall()
    assert "blobs_by_pack" in str(plan)


def test_a_manifest_that_grew_is_not_read_whole(repository):
    digest = publish(repository).digest
    path = repository.root / "manifests" / digest
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    with pytest.raises(StoreError):
        repository.manifest_bytes(digest)
