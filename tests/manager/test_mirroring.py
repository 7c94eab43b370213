"""A catalog that says what another one says: numbers, aliases and their history, trust, keys; nothing of it late or twice."""

import pytest

from tether.errors import ConflictError, MissingBlobsError
from tether.manager import secrets
from tether.manager.feed import Changes
from tether.ports import SignedManifest
from tether.security.identity import Identity
from tether.store import Manifest, Repository, encode, signed_message
from tether.store.format.encrypted import ModelContext
from tether.types import ModelInfo, ModelRef

LAB = Identity(bytes(range(32)))
INFO = ModelInfo("onnx", "onnx", (), (), batched=False, pure=True, code=False)


@pytest.fixture
def writer(tmp_path):
    with Repository.open(tmp_path / "writer" / "store", own=LAB.public) as repository:
        repository.begin_term(1)
        yield repository


@pytest.fixture
def follower(tmp_path):
    with Repository.open(tmp_path / "follower" / "store", own=LAB.public) as repository:
        yield repository


def publish(repository, number, name="net", **options):
    data = encode(Manifest(framework="onnx", entry="m", info=INFO, arrays=(repository.add_bytes("m", b"%d " % number * 100),)))
    return repository.publish(name, data, LAB.public, LAB.sign(signed_message(data)), **options)


def fetch(writer, follower):
    """All versions of the one, durable at the other."""
    versions = []
    for model in writer.models():
        for version in model.versions:
            for digest in writer.manifest(version.digest).blobs():
                follower.put_blob(digest, writer.read_blob(digest))
            data = writer.manifest_bytes(version.digest)
            versions.append(SignedManifest(data, version.publisher, writer.signature(version.digest, version.publisher)))
    follower.hold(versions)


def test_a_mirror_says_the_same_and_is_read_from_its_own_packs(writer, follower):
    changes = Changes()
    for number in range(4):
        publish(writer, number, alias=["prod"], tags={"n": str(number)})
    writer.trust("ab" * 32, ["code"])
    writer.name_publisher("ab" * 32, "alice")
    fetch(writer, follower)
    follower.mirror(1, changes.since(writer.snapshot()))
    writer.delete_version("net", 2)
    writer.rollback("net")
    follower.mirror(1, changes.since(writer.snapshot()))
    assert follower.models() == writer.models()
    assert follower.trusted("ab" * 32, "code")
    assert follower.rollback("net") == writer.rollback("net")
    assert not follower.verify().problems
    assert follower.footing().position[0] == 1


def test_a_change_names_only_the_models_that_are_different(writer):
    changes = Changes()
    for name in ("a", "b"):
        publish(writer, 1, name)
    assert changes.since(writer.snapshot()).whole
    publish(writer, 2, "b")
    change = changes.since(writer.snapshot())
    assert ([model.name for model in change.models], change.rest, change.whole) == (["b"], None, False)


def test_numbers_go_on_after_a_take_over_also_behind_deleted_ones(writer, follower):
    for number in range(3):
        publish(writer, number)
    writer.delete_version("net", 3)
    fetch(writer, follower)
    follower.mirror(1, writer.snapshot())
    counted = writer.change_count()
    follower.begin_term(2)
    assert publish(follower, 7).version == 4
    assert follower.change_count() > counted


def test_what_comes_late_of_an_earlier_term_is_refused(writer, follower):
    publish(writer, 1)
    late = writer.snapshot()
    follower.begin_term(2)
    with pytest.raises(ConflictError):
        follower.mirror(1, late)
    with pytest.raises(ConflictError):
        follower.begin_term(1)
    assert not follower.models()


def test_versions_that_only_a_former_writer_has_are_told_and_taken_out_and_a_copy_of_its_catalog_stays(writer, follower):
    publish(writer, 1)
    fetch(writer, follower)
    follower.mirror(1, writer.snapshot())
    lonely = publish(writer, 2)
    follower.begin_term(2)
    publish(follower, 3)
    fetch(follower, writer)
    (lost,) = writer.mirror(2, follower.snapshot())
    assert lost == f"net:2 ({lonely.digest})"
    assert writer.models() == follower.models()
    assert writer.manifest(lonely.digest).blobs()
    assert (writer.root / "catalog-before-term-2.sqlite").exists()
    assert not writer.mirror(2, follower.snapshot())


def test_nothing_is_held_whose_blobs_are_not_here(writer, follower):
    publish(writer, 1)
    version = writer.resolve(ModelRef("net"))
    signed = SignedManifest(writer.manifest_bytes(version.digest), LAB.public, writer.signature(version.digest, LAB.public))
    with pytest.raises(MissingBlobsError):
        follower.hold([signed])


def test_the_keys_of_encrypted_models_open_at_a_follower_that_was_given_the_labs_secrets(writer, follower, tmp_path):
    context = ModelContext(LAB.public, "net")
    here, there = tmp_path / "writer" / "keys", tmp_path / "follower" / "keys"
    key = writer.keys.current(context)
    Identity.load_or_create(here / "identity")
    assert follower.keys.peers(context) == []  # makes a cluster key of its own
    sent = secrets.collect(here)
    secrets.adopt_identity(there, sent["identity"])
    secrets.adopt_cluster_keys(there, sent["cluster_keys"])
    follower.mirror(1, writer.snapshot())
    secrets.forget_cluster_keys(there, set(sent["cluster_keys"]))
    assert follower.keys.get(key.id).secret == key.secret
    assert follower.keys.current(context).id == key.id
    assert (there / "identity").read_text() == (here / "identity").read_text()
    assert secrets.cluster_keys(there) == secrets.cluster_keys(here)
    assert all(path.stat().st_mode & 0o77 == 0 for path in there.iterdir())
