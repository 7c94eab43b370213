"""Who is let in, as people ask for it: what the answers say, what they leave behind, and that the next manager knows it, too."""

import pytest
from blake3 import blake3

from tether.errors import (
    BadAddressError,
    BadKeyError,
    BadNameError,
    BadScopeError,
    BadTermsError,
    ConflictError,
    ForbiddenError,
    LockedModelError,
    NotFoundError,
    ScopeStillOpenError,
    UnknownModelError,
)
from tether.manager.admission import Neighbour
from tether.manager.feed import Changes
from tether.manager.operations import Operations
from tether.security.addresses import Address, Link
from tether.security.identity import Identity
from tether.store import Manifest, Repository, digest_of, encode, signed_message
from tether.store.format.encrypted import ModelContext
from tether.swarm.records.records import Capabilities, Gpu, Held, parse, sign
from tether.types import Digest, ModelInfo

LAB = Identity(bytes(range(32)))
ALICE, BOB, CAROL, DAVE = (Identity(bytes([number]) * 32) for number in range(1, 5))


@pytest.fixture
def operations(tmp_path):
    with Repository.open(tmp_path / "data" / "store", own=LAB.public) as repository:
        operations = Operations(repository, LAB, tmp_path / "data" / "publishing")
        yield operations
        operations.close()


@pytest.fixture
def admission(operations):
    return operations.admission


@pytest.fixture
def encrypted(operations):
    """Models `net` and `face` of which there are keys."""
    for name in ("net", "face"):
        operations.repository.keys.current(ModelContext(LAB.public, name))


def secret_of(invitation):
    return invitation["url"].partition("#")[2]


async def test_an_invitation_is_a_link_that_lets_one_key_in_and_the_list_has_no_secret(admission):
    made = await admission.invite(["infer:digits"], "12h", 1, "for alice")
    assert Link.parse(made["url"]).address.key == LAB.public
    assert (made["scopes"], made["uses"], made["label"]) == (["infer:digits"], 1, "for alice")
    assert made["expires"] - made["created"] == pytest.approx(43200, abs=1)

    enrolled = await admission.enrol(secret_of(made), ALICE.public)

    assert enrolled == {"publisher": LAB.public, "scopes": ["infer:digits"]}
    (listed,) = await admission.invitations()
    assert (listed["peers"], listed["problem"], "url" in listed) == ([ALICE.public], "was used", False)
    (peer,) = await admission.peers()
    assert (peer["peer"], peer["label"], peer["scopes"]) == (ALICE.public, "for alice", ["infer:digits"])
    assert peer["address"] == str(Address(ALICE.public))
    assert [line["action"] for line in await admission.audit()] == ["invite", "enrol"]
    assert [line["action"] for line in await admission.audit(1)] == ["enrol"]


async def test_the_address_is_the_lab_s_also_when_it_became_another_one_s(admission, operations):
    assert await admission.address() == {"address": str(Address(LAB.public)), "publisher": LAB.public}
    operations.become(BOB)
    assert (await admission.address())["publisher"] == BOB.public


@pytest.mark.parametrize(
    ("terms", "error"),
    [
        ({"expires": "soon"}, BadTermsError),
        ({"expires": 0}, BadTermsError),
        ({"expires": True}, BadTermsError),
        ({"expires": None}, BadTermsError),
        ({"uses": 0}, BadTermsError),
        ({"scopes": []}, BadScopeError),
        ({"scopes": ["manage"]}, BadScopeError),
        ({"label": "a\nb"}, BadNameError),
    ],
)
async def test_terms_that_make_no_sense_are_the_caller_s_to_mend(admission, terms, error):
    with pytest.raises(error) as caught:
        await admission.invite(**{"scopes": ["infer"]} | terms)
    assert caught.value.http_status == 400
    assert await admission.invitations() == []


async def test_a_revoked_invitation_admits_nobody_and_is_told_where_it_is_none(admission):
    made = await admission.invite(["infer"], "never")
    assert made["expires"] is None
    assert (await admission.revoke_invitation(made["id"]))["problem"] == "was revoked"
    with pytest.raises(ForbiddenError, match="revoked"):
        await admission.enrol(secret_of(made), ALICE.public)
    with pytest.raises(NotFoundError, match="--list"):
        await admission.revoke_invitation("00000000")


async def test_a_peer_is_named_by_its_key_its_address_or_its_petname(admission):
    await admission.allow(ALICE.public, ["infer:digits"], "alice")
    await admission.name_peer(str(Address(ALICE.public)), "al")
    allowed = await admission.allow("al", ["models:digits"])
    assert (allowed["peer"], allowed["scopes"], allowed["envelopes"]) == (ALICE.public, ["infer:digits", "models:digits"], {})
    (peer,) = await admission.peers()
    assert (peer["petname"], peer["label"]) == ("al", "alice")
    assert (await admission.allow("alice", ["models:digits"]))["peer"] == ALICE.public  # her label, which nobody else has
    for nobody, why in (
        ("alan", "nobody is called 'alan'"),
        ("Not a name", "tether peers"),
        ("tether://" + "y" * 56, "wrong"),
        ("", "nobody"),
    ):
        with pytest.raises(BadAddressError, match=why):
            await admission.allow(nobody, ["infer"])
    await admission.allow(BOB.public, ["infer"], "alice")
    with pytest.raises(BadAddressError, match=f"2 peers: .*{BOB.public}"):
        await admission.disallow("alice", None)
    with pytest.raises(BadKeyError):
        await admission.allow("00" * 32, ["infer"])
    with pytest.raises(BadKeyError, match="this lab's own"):
        await admission.allow(LAB.public, ["infer"])
    with pytest.raises(ConflictError):
        await admission.name_peer(BOB.public, "al")


@pytest.mark.usefixtures("encrypted")
async def test_nothing_is_given_where_a_model_has_no_key_or_the_peer_is_banned(admission):
    with pytest.raises(LockedModelError, match="--encrypt"):
        await admission.allow(ALICE.public, ["infer:net", "decrypt:other"])
    assert await admission.peers() == []
    with pytest.raises(BadScopeError):
        await admission.allow(ALICE.public, [])
    await admission.ban(ALICE.public, "shouted")
    with pytest.raises(ForbiddenError, match="shouted"):
        await admission.allow(ALICE.public, ["decrypt:net"])
    assert admission._repository.granted(ALICE.public) == ()
    assert (await admission.unban(ALICE.public))["banned"] is None


@pytest.mark.usefixtures("encrypted")
async def test_what_a_peer_may_decrypt_goes_with_its_scope_and_comes_as_an_envelope(admission):
    allowed = await admission.allow(ALICE.public, ["decrypt:net", "infer:net"])
    assert allowed["envelopes"].keys() == {"net"}
    await admission.allow(BOB.public, ["decrypt:net"])
    made = await admission.invite(["decrypt:net", "decrypt:face"], uses=2)
    await admission.enrol(secret_of(made), CAROL.public)
    assert admission._repository.granted(CAROL.public) == ()  # it fetches them when it has seen such a model
    await admission.envelope(CAROL.public, "face")
    with pytest.raises(UnknownModelError):
        await admission.envelope(BOB.public, "face")

    taken = await admission.disallow(ALICE.public, ["decrypt:net"])

    assert (taken["taken"], taken["scopes"], taken["models"], taken["invitations"]) == (["decrypt:net"], ["infer:net"], ["net"], [])
    assert taken["envelopes"]["net"].keys() == {BOB.public}
    assert "can't be recalled" in taken["message"]
    with pytest.raises(ForbiddenError):
        await admission.envelope(ALICE.public, "net")
    everything = await admission.disallow(CAROL.public, None)
    assert (everything["models"], everything["scopes"], everything["invitations"]) == (["face"], [], [made["id"]])
    assert "tether invite --revoke" in everything["message"]
    with pytest.raises(ForbiddenError, match="taken back"):
        await admission.enrol(secret_of(made), CAROL.public)


async def test_a_lab_without_encrypted_models_makes_no_cluster_key_to_let_somebody_go(admission, tmp_path):
    await admission.allow(ALICE.public, ["infer"])
    await admission.disallow(ALICE.public, None)
    assert not list((tmp_path / "data").rglob("cluster-*.key"))


async def test_taking_a_part_of_what_a_wider_scope_opens_is_refused_with_its_name(admission):
    await admission.allow(ALICE.public, ["infer"])
    with pytest.raises(ScopeStillOpenError, match="has infer,"):
        await admission.disallow(ALICE.public, ["infer:digits"])
    assert (await admission.disallow(ALICE.public, ["infer:digits", "infer"]))["scopes"] == []
    for scopes in (None, ["infer"]):
        with pytest.raises(NotFoundError, match="tether peers"):
            await admission.disallow(BOB.public, scopes)
    with pytest.raises(BadScopeError, match="none at all"):
        await admission.disallow(ALICE.public, [])


async def test_peers_are_those_let_in_named_or_connected_and_the_connection_is_told(admission):
    await admission.allow(ALICE.public, ["infer"])
    await admission.name_peer(BOB.public, "bob")
    assert {peer["route"] for peer in await admission.peers()} == {None}
    asked = []

    async def neighbourhood(known):
        asked.append(known)
        return [Neighbour(ALICE.public, "punched", 0.02), Neighbour(CAROL.public, "direct"), Neighbour(DAVE.public, "direct", is_met=True)]

    admission.neighbourhood = neighbourhood
    rows = {peer["peer"]: peer for peer in await admission.peers()}
    assert asked == [{ALICE.public, BOB.public}]
    assert rows.keys() == {ALICE.public, BOB.public, CAROL.public, DAVE.public}
    assert [rows[ALICE.public][name] for name in ("route", "round_trip", "versions")] == ["punched", 0.02, None]
    assert (rows[BOB.public]["petname"], rows[BOB.public]["since"], rows[CAROL.public]["route"]) == ("bob", None, "direct")
    assert [key for key, row in rows.items() if row["stranger"]] == [CAROL.public]


async def test_what_a_lab_says_of_itself_is_told_with_the_names_that_its_versions_have_here(admission, operations):
    info = ModelInfo("onnx", "onnx", (), (), batched=False, pure=True, code=False)
    data = encode(Manifest(framework="onnx", entry="m", info=info, arrays=(operations.repository.add_bytes("m", b"weights"),)))
    operations.repository.publish("digits", data, LAB.public, LAB.sign(signed_message(data)))
    digests = (digest_of(data), Digest("f" * 64))
    held = tuple(Held(LAB.public, "any", number, digest, 7, loaded=False) for number, digest in enumerate(digests, 1))
    offered = Capabilities(held, serves=True, region="eu-west", gpus=(Gpu("H100", 2, 80 << 30),), load=30)
    record = parse(sign(ALICE, offered, 5, 1000.0))

    async def neighbourhood(_):
        return [Neighbour(ALICE.public, record=record)]

    admission.neighbourhood = neighbourhood
    (row,) = await admission.peers()
    assert (row["versions"], row["models"], row["region"], row["load"], row["serves"]) == (2, ["digits"], "eu-west", 30, True)
    assert (row["gpus"], row["said"], row["route"]) == ([{"name": "H100", "count": 2, "nbytes": 80 << 30}], 1000.0, None)
    assert row["stranger"]


async def test_each_change_counts_and_one_who_comes_again_changes_nothing(admission, operations):
    made = await admission.invite(["infer"])
    for change in (
        lambda: admission.enrol(secret_of(made), ALICE.public),
        lambda: admission.allow(BOB.public, ["infer"]),
        lambda: admission.disallow(BOB.public, None),
        lambda: admission.ban(BOB.public, "shouted"),
        lambda: admission.unban(BOB.public),
        lambda: admission.revoke_invitation(made["id"]),
    ):
        before = operations.change_count()
        await change()
        assert operations.change_count() == before + 1
    before = operations.change_count()
    await admission.enrol(secret_of(made), ALICE.public)
    await admission.peers()
    assert operations.change_count() == before


async def test_a_follower_is_sent_who_may_do_what_when_that_is_new_and_admits_the_same(admission, tmp_path):
    changes, told = Changes(), []
    made = await admission.invite(["infer:digits"], uses=2)
    await admission.enrol(secret_of(made), ALICE.public)
    state = changes.access_since(admission.access.file.state())
    assert changes.access_since(admission.access.file.state()) is None

    with Repository.open(tmp_path / "other" / "store", own=LAB.public) as repository:
        follower = Operations(repository, LAB, tmp_path / "other" / "publishing")
        follower.access.listen(told.append)
        follower.access.mirror(state)
        assert follower.access.may(ALICE.public, "infer", "digits")
        await follower.admission.enrol(secret_of(made), BOB.public)
        await admission.disallow(ALICE.public, None)
        follower.access.mirror(changes.access_since(admission.access.file.state()))
        assert sorted(told) == sorted([ALICE.public, BOB.public])  # what only a former writer knew was never answered for
        assert not follower.access.may(ALICE.public, "infer", "digits")
        follower.close()


async def test_all_that_can_be_asked_has_one_name_each(operations, admission):
    handlers = operations.handlers()
    assert not set(operations.NAMES) & set(admission.NAMES)
    assert handlers.keys() == {*operations.NAMES, *admission.NAMES}
    answer = await handlers["put_blob"](digest=blake3(b"x").hexdigest(), data=b"x")
    assert answer["nbytes"] == 1
    assert (await handlers["address"]())["publisher"] == LAB.public
