"""Another publisher's models in the catalog of a store that writes: as its feed says, and nothing that is not here."""

import pytest
from store_models import COLLEAGUE, LAB, files_of, manifest_of, publish

from tether.errors import BadNameError, BadSignatureError, ConflictError, MissingBlobsError, UnknownVersionError
from tether.ports import SignedManifest
from tether.store import Repository, digest_of, signed_message
from tether.store.index.mirror_tables import ModelState, VersionState
from tether.types import ModelRef

LABEL = COLLEAGUE.public[:12]


@pytest.fixture
def colleague(tmp_path):
    with Repository.open(tmp_path / "colleague", own=COLLEAGUE.public) as repository:
        yield repository


@pytest.fixture
def hold(colleague, repository):
    """Publish a version there and make it durable here; gives its state."""

    def held(number, *, keep=True):
        data = manifest_of(colleague, files_of(number), number)
        signature = COLLEAGUE.sign(signed_message(data))
        published = colleague.publish("digits", data, COLLEAGUE.public, signature)
        if keep:
            for digest in colleague.manifest(published.digest).blobs():
                repository.put_blob(digest, colleague.read_blob(digest))
            repository.hold([SignedManifest(data, COLLEAGUE.public, signature)])
        return VersionState(published.version, published.digest, signature, 7.0, 100, b"{}")

    return held


def state(*versions, aliases=None, history=(), following=None, name="digits", publisher=COLLEAGUE.public):
    last = max((each.version for each in versions), default=0)
    named = ({"latest": last} if versions else {}) | (aliases or {})
    return ModelState(publisher, name, following or last + 1, versions, named, history)


def test_the_catalog_says_what_the_publishers_says_beside_its_own(repository, hold):
    own = publish(repository, 50)
    one, two = hold(1), hold(2)
    repository.follow([state(one, two, aliases={"prod": 1}, history=(("prod", 2),))])
    ours, theirs = repository.models()
    assert {ours.name, theirs.name} == {f"{LABEL}~digits", "digits"}
    assert repository.resolve(ModelRef.parse("digits")).digest == own.digest
    assert repository.resolve(ModelRef.parse(f"{LABEL}/digits")).digest == one.digest
    assert repository.resolve(ModelRef.parse(f"{LABEL}~digits@latest")).digest == two.digest
    assert repository.rollback(f"{LABEL}~digits", "prod").after == 2
    assert not repository.verify().problems


def test_it_counts_as_a_change_and_leaves_the_term_alone(repository, hold):
    repository.begin_term(4)
    one = hold(1)
    before, count = repository.footing(), repository.change_count()
    repository.follow([state(one)])
    after = repository.footing()
    assert repository.change_count() == count + 1
    assert (after.term, after.wrote, after.member, after.writes) == (4, 4, before.member, True)


def test_versions_that_are_not_named_any_more_go_and_are_collected(repository, hold):
    one, two = hold(1), hold(2)
    repository.follow([state(one, two)])
    repository.follow([state(two)])
    assert [each.version for each in repository.models()[0].versions] == [2]
    assert repository.gc(grace=0.0).manifests == 1
    assert not repository.verify().problems
    with pytest.raises(UnknownVersionError):
        repository.resolve(ModelRef.parse(f"{LABEL}~digits:1"))


def test_numbers_that_were_given_stay_given(repository, hold):
    repository.follow([state(hold(1), following=9)])
    repository.follow([state(following=1)])
    assert repository.models() == []
    assert [(model.name, model.next) for model in repository.snapshot().models] == [("digits", 9)]


def test_the_labs_own_models_are_not_to_be_followed(repository, hold):
    one = hold(1)
    with pytest.raises(ConflictError, match="own"):
        repository.follow([state(one, publisher=LAB.public)])
    assert repository.models() == []


def test_a_number_that_means_something_else_here_is_refused(repository, hold):
    one, two = hold(1), hold(2)
    repository.follow([state(one)])
    again = VersionState(1, two.digest, two.signature, 7.0, 100, b"{}")
    with pytest.raises(ConflictError, match="digits:1"):
        repository.follow([state(again)])
    assert repository.models()[0].versions[0].digest == one.digest


def test_what_is_not_here_can_t_be_named(repository, colleague, hold):
    absent = hold(1, keep=False)
    with pytest.raises(ConflictError, match="can't be a version here yet"):
        repository.follow([state(absent)])
    data = colleague.manifest_bytes(absent.digest)
    (repository.root / "manifests" / absent.digest).write_bytes(data)
    with pytest.raises(MissingBlobsError) as raised:
        repository.follow([state(absent)])
    assert set(raised.value.args[1]) == set(colleague.manifest(absent.digest).blobs())
    for digest in colleague.manifest(absent.digest).blobs():
        repository.put_blob(digest, colleague.read_blob(digest))
    with pytest.raises(MissingBlobsError, match="durable"):
        repository.follow([state(absent)])
    assert repository.models() == []


def test_what_the_publisher_did_not_sign_is_refused(repository, hold):
    one = hold(1)
    forged = VersionState(1, one.digest, LAB.sign(b"something else"), 7.0, 100, b"{}")
    with pytest.raises(BadSignatureError):
        repository.follow([state(forged)])
    repository.follow([state(one)])
    with pytest.raises(BadSignatureError):
        repository.follow([state(forged)])


def test_all_states_or_none(repository, hold):
    one, count = hold(1), repository.change_count()
    with pytest.raises(ConflictError):
        repository.follow([state(one), state(one, name="other", aliases={"prod": 7})])
    assert (repository.models(), repository.change_count()) == ([], count)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"aliases": {"prod": 5}}, ConflictError),
        ({"history": (("prod", 5),)}, ConflictError),
        ({"aliases": {"../x": 1}}, BadNameError),
        ({"name": "No/Name"}, BadNameError),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(repository, hold, wrong, error):
    one = hold(1)
    with pytest.raises(error):
        repository.follow([state(one, **wrong)])


def test_it_is_had_by_the_followers_of_this_cluster(repository, hold, tmp_path):
    one = hold(1)
    repository.begin_term(1)
    repository.follow([state(one)])
    with Repository.open(tmp_path / "second", own=LAB.public) as second:
        data = repository.manifest_bytes(one.digest)
        for digest in repository.manifest(one.digest).blobs():
            second.put_blob(digest, repository.read_blob(digest))
        second.hold([SignedManifest(data, COLLEAGUE.public, one.signature)])
        second.mirror(1, repository.snapshot())
        assert second.models() == repository.models()
        assert digest_of(data) == one.digest
