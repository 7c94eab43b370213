"""What a peer gets of this lab's store: by the names of models that its scopes open, asked anew each time, for little memory and work."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest
import structlog
from peering_labs import INFO, model_bytes

from tether.errors import ForbiddenError, NotFoundError, ServiceUnavailableError
from tether.manager.peering import shelf as shelf_module
from tether.manager.peering.shelf import RepositoryShelf
from tether.security.scopes import Scope
from tether.store import Manifest, encode, signed_message
from tether.swarm.blobs.blobs import BlobConnection, Kind
from tether.swarm.blobs.frames import bits
from tether.testing.blob_sources import BlobSourceSuite
from tether.testing.streams import stream_pair


@pytest.fixture
async def lab(labs):
    return labs(1)


@pytest.fixture
async def peer(labs):
    return labs(2)


def content(seed, count=3):
    """Blobs of a model: every seed others."""
    return {f"m{number}": np.random.default_rng([seed, number]).bytes(1000) for number in range(count)}


def blobs_of(lab, published):
    return lab.repository.public_manifest(published.digest).blobs()


async def may(lab, peer, kind, digest):
    try:
        await lab.shelf.authorise(peer.key, kind, digest)
    except (ForbiddenError, NotFoundError):
        return False
    return True


@pytest.fixture
def read(monkeypatch):
    """Manifests that were read for an index."""
    seen = []
    real = shelf_module.decode

    def decode(data):
        seen.append(len(data))
        return real(data)

    monkeypatch.setattr(shelf_module, "decode", decode)
    return seen


async def test_a_peer_gets_what_its_scopes_open_and_nothing_else_and_is_told_the_same_of_what_is_not_there(lab, peer):
    open_, closed = lab.give("open", content(1)), lab.give("closed", content(2))
    lab.allow(peer, scopes=["replicate:open", "infer"])
    for kind in (Kind.MANIFEST, Kind.BITMAP):
        assert await may(lab, peer, kind, open_.digest)
    for digest in blobs_of(lab, open_):
        assert await may(lab, peer, Kind.BLOB, digest)
    refusals = set()
    for kind, digest in (
        (Kind.MANIFEST, closed.digest),
        (Kind.BITMAP, closed.digest),
        (Kind.BLOB, blobs_of(lab, closed)[0]),
        (Kind.MANIFEST, "0" * 64),
        (Kind.BLOB, "0" * 64),
        (Kind.BLOB, open_.digest),
        (Kind.MANIFEST, blobs_of(lab, open_)[0]),
    ):
        with pytest.raises(NotFoundError) as raised:
            await lab.shelf.authorise(peer.key, kind, digest)
        refusals.add(str(raised.value))
    assert len(refusals) == 1
    for digest in (open_.digest, "0" * 64):
        with pytest.raises(ForbiddenError):
            await lab.shelf.authorise("ab" * 32, Kind.MANIFEST, digest)


async def test_a_blob_that_two_models_share_is_had_through_the_one_that_is_open(lab, peer):
    lab.give("closed", content(1) | {"own": b"secret" * 100})
    shared = lab.give("open", content(1))
    lab.allow(peer, scopes=["replicate:open"])
    assert [await may(lab, peer, Kind.BLOB, digest) for digest in blobs_of(lab, shared)] == [True] * 3
    (secret,) = set(blobs_of(lab, lab.give("again", {"own": b"secret" * 100})))
    assert not await may(lab, peer, Kind.BLOB, secret)


async def test_another_publishers_model_goes_by_the_name_that_the_catalog_has_for_it(lab, peer, labs):
    alice = labs(3)
    alice.allow(lab)
    given = alice.give("net", {"net.onnx": model_bytes()})
    await lab.pull(alice)
    lab.allow(peer, scopes=["replicate:net", "replicate:friend~*"])
    assert not await may(lab, peer, Kind.MANIFEST, given.digest)
    lab.repository.name_publisher(alice.key, "friend")
    await asyncio.sleep(0.3)  # what is asked of the catalog once is good for a quarter of a second
    assert await may(lab, peer, Kind.MANIFEST, given.digest)
    signed = await lab.shelf.manifest(given.digest)
    assert (signed.publisher, signed.data) == (alice.key, alice.repository.manifest_bytes(given.digest))


async def test_what_is_taken_from_a_peer_is_refused_at_once(lab, peer):
    given = lab.give("net", content(1))
    lab.allow(peer)
    assert await may(lab, peer, Kind.BLOB, blobs_of(lab, given)[0])
    lab.access.disallow(peer.key, [Scope.parse("replicate")])
    assert not await may(lab, peer, Kind.BLOB, blobs_of(lab, given)[0])
    assert not await may(lab, peer, Kind.MANIFEST, given.digest)


async def test_a_version_that_is_deleted_is_not_given_any_more(lab, peer):
    lab.give("net", content(1))
    given = lab.give("net", content(2))
    lab.allow(peer)
    assert await may(lab, peer, Kind.BLOB, blobs_of(lab, given)[0])
    lab.repository.delete_version("net", 2)
    await asyncio.sleep(0.3)
    assert not await may(lab, peer, Kind.BLOB, blobs_of(lab, given)[0])
    assert not await may(lab, peer, Kind.MANIFEST, given.digest)


# --- blobs without their manifest


async def test_one_that_goes_on_after_our_restart_gets_blobs_without_asking_for_the_manifest(lab, peer, read):
    given = [lab.give(f"net-{number}", content(number)) for number in range(30)]
    lab.allow(peer)
    for digest in blobs_of(lab, given[0]):
        assert await may(lab, peer, Kind.BLOB, digest)
    assert 0 < len(read) <= 30


async def test_digests_that_are_made_up_are_refused_without_reading_anything(lab, peer, read):
    for number in range(10):
        lab.give(f"net-{number}", content(number))
    lab.allow(peer, scopes=["replicate:net-1"])
    for number in range(200):
        assert not await may(lab, peer, Kind.BLOB, f"{number:064x}")
        assert not await may(lab, peer, Kind.MANIFEST, f"{number:064x}")
    assert read == []


async def test_one_that_asks_for_what_it_may_not_have_again_and_again_has_little_read(lab, peer, labs, read):
    given = [lab.give(f"net-{number}", content(number, 1)) for number in range(80)]
    lab.allow(peer, scopes=["replicate:net-*"])
    secret = lab.give("secret", content(1000))
    for _ in range(50):
        assert not await may(lab, peer, Kind.BLOB, blobs_of(lab, secret)[0])
    assert len(read) <= 66
    honest = labs(3)
    lab.allow(honest, scopes=["replicate:net-*"])
    assert await may(lab, honest, Kind.MANIFEST, given[0].digest)
    assert await may(lab, honest, Kind.BLOB, blobs_of(lab, given[0])[0])
    assert await may(lab, peer, Kind.BITMAP, given[0].digest)
    assert await may(lab, peer, Kind.BLOB, blobs_of(lab, given[0])[0])


async def test_only_what_it_may_have_is_searched(lab, peer, read):
    for number in range(40):
        lab.give(f"closed-{number}", content(number))
    given = lab.give("open", content(99))
    lab.give("newer", content(98))
    lab.allow(peer, scopes=["replicate:open"])
    assert await may(lab, peer, Kind.BLOB, blobs_of(lab, given)[0])
    assert len(read) == 1


async def test_what_is_known_of_versions_stays_small_however_many_are_asked_for(lab, peer):
    given = [lab.give(f"net-{number}", content(number, 1)) for number in range(80)]
    lab.allow(peer)
    for each in given:
        assert await may(lab, peer, Kind.MANIFEST, each.digest)
    (known,) = lab.shelf._known.values()
    assert len(known.versions) == len(lab.shelf._indices) == 64
    for number in range(300):
        await may(lab, type("Peer", (), {"key": f"{number:064x}"}), Kind.MANIFEST, given[0].digest)
    assert len(lab.shelf._known) == 1


# --- what is given


async def test_a_damaged_blob_is_not_given_and_said_once_in_the_log(lab, peer):
    given = lab.give("net", content(1))
    lab.allow(peer)
    digest = blobs_of(lab, given)[1]
    (pack,) = (lab.repository.root / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    at = data.index(content(1)["m1"])
    data[at] ^= 1
    pack.write_bytes(data)
    with structlog.testing.capture_logs() as lines:
        assert await lab.shelf.blob(digest) is None
    assert [(line["log_level"], line["blob"]) for line in lines] == [("warning", digest)]
    assert await lab.shelf.blob(blobs_of(lab, given)[0]) == content(1)["m0"]


async def test_a_disk_that_refuses_is_no_peers_business(lab):
    given = lab.give("net", content(1))
    lab.repository.close()
    with pytest.raises(ServiceUnavailableError) as raised:
        await lab.shelf.manifest(given.digest)
    assert str(lab.folder) not in str(raised.value)


async def test_a_bitmap_says_which_blobs_are_here(lab):
    given = lab.give("net", content(1, 11))
    bitmap = await lab.shelf.bitmap(given.digest)
    assert bits(bitmap, 11) == [True] * 11
    assert await lab.shelf.bitmap("0" * 64) is None
    assert await lab.shelf.manifest("0" * 64) is None
    assert await lab.shelf.blob("0" * 64) is None


async def test_what_came_of_a_version_that_is_coming_is_given_under_the_name_that_it_will_have(lab, peer, labs):
    alice = labs(3)
    given = alice.give("net", content(1))
    signed = await alice.shelf.manifest(given.digest)
    blobs = blobs_of(alice, given)
    lab.allow(peer, scopes=["replicate:alice~net"])
    lab.repository.put_blob(blobs[1], alice.repository.read_blob(blobs[1]))
    assert not await may(lab, peer, Kind.BITMAP, given.digest)
    with lab.shelf.arriving("alice~net", signed):
        assert await may(lab, peer, Kind.BITMAP, given.digest)
        assert bits(await lab.shelf.bitmap(given.digest), 3) == [False, True, False]
        assert await lab.shelf.manifest(given.digest) == signed
        assert await may(lab, peer, Kind.BLOB, blobs[1])
        assert await lab.shelf.blob(blobs[1]) == alice.repository.read_blob(blobs[1])
        assert await lab.shelf.blob(blobs[0]) is None
        assert not await may(lab, alice, Kind.BITMAP, given.digest)
    assert not await may(lab, peer, Kind.BLOB, blobs[1])


async def test_of_a_manifest_that_two_labs_signed_the_labs_own_signature_is_given(lab, labs):
    other = labs(3)
    data = encode(Manifest(framework="onnx", entry="m", info=INFO, arrays=(lab.repository.add_bytes("m", b"m" * 100),)))
    for identity in (other.identity, lab.identity):
        lab.repository.publish("net", data, identity.public, identity.sign(signed_message(data)))
    assert (await lab.shelf.manifest(lab.repository.models()[0].versions[0].digest)).publisher == lab.key


async def test_thousands_of_models_cost_nothing_before_they_are_asked_for(lab, peer, measured):
    """A version's index is made when it is asked for: here of a hundred with two hundred blobs each, one is."""
    given = [lab.give(f"net-{number}", content(number, 200)) for number in range(20)]
    lab.allow(peer)
    fresh = RepositoryShelf(lab.repository, lab.access)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await fresh.authorise(peer.key, Kind.BITMAP, given[7].digest)
    first = loop.time() - began
    assert len(fresh._indices) == 1
    began = loop.time()
    for digest in blobs_of(lab, given[7]):
        await fresh.authorise(peer.key, Kind.BLOB, digest)
    measured(f"shelf: the first asking {first * 1e3:.1f} ms, a blob of a known version {(loop.time() - began) / 200 * 1e6:.0f} µs")
    fresh.close()


class Everybody:
    def may(self, peer, method, model=None):
        del peer, model
        return method == "blobs"


class TestShelfAsASource(BlobSourceSuite):
    """The contract of a source, over the real shelf."""

    @asynccontextmanager
    async def open_source(self, repository):
        ours, theirs = stream_pair()
        shelf = RepositoryShelf(repository, Everybody())
        self.connection, giver = BlobConnection(ours), BlobConnection(theirs, shelf)
        yield self.connection.source()
        await self.connection.aclose()
        assert giver.is_closed
        shelf.close()

    async def cut_off(self, source):
        assert source.name
        self.connection._link._stream.cut(ConnectionResetError("no route"))
        await self.connection.wait_closed()
