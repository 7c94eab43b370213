"""What a lab says of serving its models, in the catalog: local to it, and with all else that its managers have."""

import sqlite3

import pytest
from store_models import LAB, publish

from tether.errors import BadInputError, UnknownModelError
from tether.manager.feed import Changes
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.store import Repository


@pytest.fixture
def repository(tmp_path):
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        publish(repository, 1)
        yield repository


def serving(repository):
    return {model.name: model.serving for model in repository.models()}


def test_settings_are_kept_changed_and_taken_back(repository, tmp_path):
    before = repository.change_count()
    assert repository.set_serving("digits", {"max_batch_size": 8, "pinned": True}) == ServingSettings(max_batch_size=8, pinned=True)
    assert repository.change_count() > before, "who follows the catalog hears of it"
    assert repository.set_serving("digits", {"max_batch_size": None, "max_delay": 0.5}) == ServingSettings(max_delay=0.5, pinned=True)
    repository.close()
    with Repository.open(tmp_path / "store") as again:
        assert serving(again) == {"digits": ServingSettings(max_delay=0.5, pinned=True)}
        assert again.set_serving("digits", None) == DEFAULTS
        assert serving(again) == {"digits": DEFAULTS}


def test_what_is_refused_changes_nothing(repository):
    repository.set_serving("digits", {"max_queue_size": 3})
    with pytest.raises(BadInputError, match="there are max_batch_size"):
        repository.set_serving("digits", {"queue": 3})
    with pytest.raises(UnknownModelError):
        repository.set_serving("other", {"max_queue_size": 3})
    assert serving(repository) == {"digits": ServingSettings(max_queue_size=3)}


def test_they_outlive_versions_and_go_with_the_last_one(repository):
    repository.set_serving("digits", {"max_queue_size": 3})
    publish(repository, 2)
    repository.delete_version("digits", 1)
    assert serving(repository) == {"digits": ServingSettings(max_queue_size=3)}
    repository.delete_version("digits", 2)
    publish(repository, 3)
    assert serving(repository) == {"digits": DEFAULTS}


def test_a_follower_says_the_same_and_is_sent_no_model_for_it(repository, tmp_path):
    repository.begin_term(1)
    changes = Changes()
    changes.since(repository.snapshot())
    repository.set_serving("digits", {"max_queue_size": 3})
    change = changes.since(repository.snapshot())
    assert (change.models, change.rest is None) == ((), False)
    with Repository.open(tmp_path / "other", own=LAB.public) as follower:
        publish(follower, 1)
        follower.mirror(1, change)
        assert serving(follower) == {"digits": ServingSettings(max_queue_size=3)}


def test_a_row_that_the_disk_altered_is_as_good_as_not_said(repository, tmp_path):
    repository.set_serving("digits", {"max_queue_size": 3})
    repository.close()
    for value in ("x", 7, b"{}}", b"[]", b'{"max_queue_size": -1}'):
        with sqlite3.connect(tmp_path / "store" / "catalog.sqlite") as db:
            db.execute("UPDATE serving SET settings = ?", (value,))
        db.close()
        with Repository.open(tmp_path / "store", read_only=True) as again:
            assert list(serving(again).values()) == [DEFAULTS]


def test_a_catalog_of_before_is_read_as_it_is(repository, tmp_path):
    repository.close()
    with sqlite3.connect(tmp_path / "store" / "catalog.sqlite") as db:
        db.execute("DROP TABLE serving")
    db.close()
    with Repository.open(tmp_path / "store", read_only=True) as old:
        assert serving(old) == {"digits": DEFAULTS}
    with Repository.open(tmp_path / "store") as upgraded:
        assert upgraded.set_serving("digits", {"pinned": True}) == ServingSettings(pinned=True)
