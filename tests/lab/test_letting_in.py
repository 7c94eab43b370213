"""A colleague is let in, and sent away again, in a real lab: from Python and from the command line, kept over a restart of its manager."""

import json
import os
import signal
import time

import pytest
from click.testing import CliRunner

import tether
from tether.cli import tether as command
from tether.errors import ScopeStillOpenError, UnauthenticatedError, UnsupportedError
from tether.lab.lab import connect
from tether.security.addresses import Address, Link
from tether.security.identity import Identity
from tether.testing.requirements import needs

ALICE, BOB = (Identity(bytes([number]) * 32).public for number in (11, 12))
PROMPT = 30.0


@pytest.fixture
def own_lab(tmp_path):
    """One that may be on the swarm: another one invites nobody."""
    with tether.up(workers=1, data=tmp_path / "data") as lab:
        yield lab


@needs("pythonmonkey")
def test_who_is_let_in_is_known_to_python_and_the_command_line_and_after_the_manager_was_killed(own_lab, tmp_path):
    lab = own_lab

    def tether_(*arguments):
        done = CliRunner().invoke(command, [*arguments, "--data", str(tmp_path / "data")], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    made = lab.invite("digits", label="for carol")
    assert str(Link.parse(made.url).address) == lab.address == lab.status().address
    assert f"address  {lab.address}\n" in tether_("status")
    link = Link.parse(tether_("invite", "digits", "--uses", "2").strip())
    lab.allow(ALICE, ["infer", "models"], "alice")
    tether_("peers", "name", ALICE, "al")
    with pytest.raises(ScopeStillOpenError, match="has infer,"):
        lab.disallow("al", "infer:digits")
    assert tether_("allow", BOB, "--scope", "infer:digits").startswith(BOB)
    lab.ban(BOB, "shouted")

    manager = next(service for service in lab.status().services if service.role == "manager")
    os.kill(manager.pid, signal.SIGKILL)
    deadline = time.monotonic() + PROMPT
    while next(service for service in lab.status().services if service.role == "manager").pid in {manager.pid, None}:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    assert {each.id: each.label for each in lab.invitations()} == {made.id: "for carol", link.secret.id: ""}
    assert (lab.peers["al"].scopes, lab.peers[BOB].state) == (("infer", "models"), "banned")
    assert {each["peer"]: each["petname"] for each in json.loads(tether_("peers", "--json"))["peers"]} == {ALICE: "al", BOB: None}
    assert lab.disallow("al").taken == ("infer", "models")
    assert lab.revoke_invitation(made.id).problem == "was revoked"
    assert [line.action for line in lab.audit(3)] == ["ban", "revoke", "revoke-invitation"]
    files = {path.name: path.stat().st_mode & 0o077 for path in (tmp_path / "data").glob("access.sqlite*")}
    assert "access.sqlite" in files
    assert set(files.values()) == {0}


def test_a_lab_that_speaks_with_no_other_one_says_so_to_whoever_wants_to_let_somebody_in_or_go_elsewhere(lab):
    address = str(Address(ALICE))
    for call, *arguments in ((lab.invite, "digits"), (lab.join, address), (lab.hold, address), (lab.replicate, "digits", address)):
        with pytest.raises(UnsupportedError, match="--no-swarm"):
            call(*arguments)
    assert lab.invitations() == []
    assert "--no-swarm" in lab.allow(ALICE, "infer:digits").note
    assert lab.disallow(ALICE).scopes == ()
    swarm = lab.status().swarm
    assert (swarm.state, "--no-swarm" in swarm.detail) == ("off", True)


def test_a_caller_without_the_key_learns_and_changes_nothing(lab):
    with connect(lab.gateway, api_key="tk_" + "x" * 43) as stranger:
        for call in (stranger.invitations, lambda: stranger.allow(ALICE, "infer"), lambda: stranger.address, lambda: list(stranger.peers)):
            with pytest.raises(UnauthenticatedError):
                call()
