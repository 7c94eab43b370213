"""Whom a lab lets in, over real HTTP: what is asked of the gateway, and what people are shown."""

import pytest
from fake_gateway import ADDRESS

from tether.errors import BadAddressError, BadScopeError, NotFoundError, ScopeStillOpenError
from tether.lab.outsiders import Invitation, PeerInfo, Revoked

ALICE = "ab" * 32


def test_an_invitation_shows_the_link_that_is_to_be_copied(lab, gateway):
    made = lab.invite("digits", uses=2, label="for <alice>")
    assert str(made) == made.url == f"{ADDRESS}#00000000"
    assert made.url in repr(made)
    html = made._repr_html_()
    assert f"<pre>{made.url}</pre>" in html
    assert "for &lt;alice&gt;" in html
    asked = gateway.invitations["00000000"]
    assert (asked["scopes"], asked["terms"], asked["uses"], asked["label"]) == (["infer:digits"], "30d", 2, "for <alice>")
    (listed,) = lab.invitations()
    assert (str(listed), listed.problem, "#" in repr(listed) + listed._repr_html_()) == ("invitation 00000000", None, False)
    assert lab.revoke_invitation(made.id).problem == "was revoked"
    assert "was revoked" in repr(lab.invitations()[0])
    with pytest.raises(NotFoundError):
        lab.revoke_invitation("ffffffff")


@pytest.mark.parametrize(
    ("call", "scopes"),
    [
        (("digits",), ["infer:digits"]),
        ((), ["infer"]),
        (("digits", "replicate"), ["replicate:digits"]),
        (("digits", ("infer", "decrypt")), ["infer:digits", "decrypt:digits"]),
        (("digits", ["infer:digits", "models"]), ["infer:digits", "models:digits"]),
        ((None, ["infer:digits*", "events"]), ["infer:digits*", "events"]),
        ((None, "register"), ["register"]),
    ],
)
def test_a_verb_is_for_the_model_and_a_whole_scope_is_as_it_is(lab, gateway, call, scopes):
    lab.invite(*call, expires=60)
    assert (gateway.invitations["00000000"]["scopes"], gateway.invitations["00000000"]["terms"]) == (scopes, 60)


def test_a_model_that_no_scope_is_for_is_told_before_anybody_is_asked(lab, gateway):
    with pytest.raises(BadScopeError, match="digits"):
        lab.invite("digits", scope=["infer:faces"])
    assert gateway.invitations == {}


def test_peers_are_a_live_mapping_by_key_address_petname_and_label(lab, gateway):
    assert "lab.invite" in repr(lab.peers)
    allowed = lab.allow(ALICE, "infer:digits", "alice's laptop")
    assert (allowed.scopes, allowed.envelopes) == (("infer:digits",), {})
    lab.name_peer(ALICE, "al")
    lab.allow("cd" * 32, ["infer"])
    gateway.peers[ALICE] |= {"route": "punched", "round_trip": 0.02, "versions": 3, "models": ["net"], "region": "eu", "load": 20}
    assert list(lab.peers) == [ALICE, "cd" * 32]
    for name in (ALICE, "al", "alice's laptop"):
        assert lab.peers[name].peer == ALICE
    for nobody in ("bob", "", ADDRESS):  # two have the address
        with pytest.raises(KeyError):
            lab.peers[nobody]
    assert repr(lab.peers["al"]) == "<Peer al: infer:digits, connected (punched)>"
    assert repr(lab.peers) == f"<peers: al allowed, {'cd' * 6} allowed>"
    html = lab.peers._repr_html_() + lab.peers["al"]._repr_html_()
    for shown in ("punched", "3: net", "eu", "20 %"):
        assert html.count(shown) == 2
    assert ALICE not in html
    gateway.peers["ef" * 32] = {"peer": "ef" * 32, "stranger": True, "route": "direct"}
    assert repr(lab.peers).endswith(", and 1 other>")
    assert "and 1 other" in lab.peers._repr_html_()
    assert lab.peers["ef" * 32].route == "direct"


def test_disallow_takes_what_is_named_or_everything_and_says_by_what_it_could_come_back(lab):
    lab.allow(f"tether://{ALICE}/", ["infer", "models", "decrypt:net"])
    with pytest.raises(ScopeStillOpenError) as caught:
        lab.disallow(ALICE, "infer:digits")
    assert caught.value.args[1] == ["infer"]
    some = lab.disallow(ALICE, ["infer"])
    assert (some.taken, some.scopes) == (("infer",), ("models", "decrypt:net"))
    everything = lab.disallow(ALICE)
    assert (everything.scopes, everything.invitations, everything.models) == ((), ("00000000",), ("net",))
    assert everything.envelopes == {"net": {"cd" * 32: "BBBB"}}
    assert repr(everything) == f"<Revoked: models, decrypt:net from {ALICE[:12]}; nothing left>"


def test_banned_and_forgiven(lab):
    lab.allow(ALICE, "infer")
    assert lab.ban(ALICE, "shouted").state == "banned"
    assert lab.unban(ALICE).state == "allowed"


@pytest.mark.parametrize("peer", ["", "a/b", "tether://", "https://x"])
def test_what_would_be_another_path_is_no_peer(lab, gateway, peer):
    with pytest.raises(BadAddressError):
        lab.allow(peer, "infer")
    assert not any("peers" in call for call in gateway.calls)


def test_the_address_and_the_audit(lab):
    assert lab.address == ADDRESS
    assert [line.action for line in lab.audit(2)] == ["invite", "invite"]


def test_an_invitation_is_not_made_twice_where_the_answer_was_lost(lab, gateway):
    gateway.drop = 1
    with pytest.raises(ConnectionError):
        lab.invite("digits")
    assert gateway.calls.count("POST /tether/v1/invitations") == 1
    gateway.drop = 1
    lab.allow(ALICE, "infer")
    assert gateway.calls.count(f"PUT /tether/v1/peers/{ALICE}") == 2


def test_objects_say_what_they_are_without_a_lab():
    assert PeerInfo(peer=ALICE, revoked=2.0).state == "sent away"
    assert PeerInfo(peer=ALICE).state == "known"
    assert repr(Invitation(id="1", scopes=("infer",))) == "<Invitation 1: infer, 0 of 1 used>"
    assert "nothing from" in repr(Revoked(peer=ALICE))
