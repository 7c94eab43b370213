import json

import pytest
from fake_gateway import ADDRESS

ALICE = "ab" * 32


def test_an_invitation_is_the_link_on_stdout_and_what_it_means_beside_it(call, gateway):
    done = call("invite", "digits", "--label", "for alice", gateway=gateway)
    assert (done.exit_code, done.stdout) == (0, f"{ADDRESS}#00000000\n")
    assert "one key in for 30d 0h: infer:digits" in done.stderr
    assert "--revoke 00000000" in done.stderr
    done = call("invite", "--scope", "infer:a*", "--scope", "models", "--uses", "3", "--expires", "12h", "--json", gateway=gateway)
    made = json.loads(done.stdout)
    assert (made["url"], made["scopes"], made["uses"]) == (f"{ADDRESS}#00000001", ["infer:a*", "models"], 3)
    assert gateway.invitations["00000001"]["terms"] == "12h"


def test_invitations_are_listed_without_their_links_and_revoked_by_their_number(call, gateway):
    call("invite", "digits", "--label", "for alice", gateway=gateway)
    gateway.invitations["00000000"]["peers"] = [ALICE]
    listed = call("invite", "--list", gateway=gateway).stdout
    assert listed.splitlines()[1].startswith("00000000  open   1/1   infer:digits  for alice")
    assert "#" not in listed
    assert json.loads(call("invite", "--list", "--json", gateway=gateway).stdout)["invitations"] == list(gateway.invitations.values())
    done = call("invite", "--revoke", "00000000", gateway=gateway)
    assert done.stdout == "invitation 00000000 lets nobody in any more\n"
    assert f"tether disallow {ALICE}" in done.stderr
    assert json.loads(call("invite", "--revoke", "00000000", "--json", gateway=gateway).stdout)["problem"] == "was revoked"
    assert call("invite", "--revoke", "11111111", gateway=gateway).stderr.endswith("[not_found]\n")


def test_allow_and_disallow_say_what_is_left(call, gateway):
    done = call("allow", ALICE, "--scope", "infer", "--scope", "models", "--label", "alice", gateway=gateway)
    assert done.stdout == f"{ALICE} may: infer, models\n"
    assert call("allow", ALICE, gateway=gateway).exit_code == 2
    done = call("allow", ALICE, "--scope", "decrypt:net", gateway=gateway)
    assert (done.stdout, "decrypt:net" in done.stderr) == ("AAAA\n", True)
    assert json.loads(call("allow", ALICE, "--scope", "events", "--json", gateway=gateway).stdout)["scopes"][-1] == "events"
    done = call("disallow", ALICE, "--scope", "infer:digits", gateway=gateway)
    assert (done.exit_code, done.stderr.endswith("[scope_still_open]\n")) == (1, True)
    done = call("disallow", ALICE, "--scope", "decrypt:net", gateway=gateway)
    assert done.stdout == f"taken\n\nnet for {'cd' * 32}:\nBBBB\n"
    assert json.loads(call("disallow", ALICE, "--json", gateway=gateway).stdout)["scopes"] == []


def test_peers_are_listed_named_banned_and_forgiven(call, gateway):
    call("allow", ALICE, "--scope", "infer:digits", "--label", "her laptop", gateway=gateway)
    said = {"versions": 4, "models": ["digits", "faces"], "region": "eu-west", "load": 30}
    gateway.peers[ALICE] |= {"route": "direct", "round_trip": 0.0215, "gpus": [{"name": "H100", "count": 2, "nbytes": 80 << 30}]} | said
    stranger = "cd" * 32
    gateway.peers[stranger] = {"peer": stranger, "scopes": [], "stranger": True, "petname": None, "versions": 1}
    done = call("peers", gateway=gateway)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "SCOPES", "CONNECTED", "ROUND", "TRIP", "HOLDS", "REGION", "GPUS", "LOAD", "KEY"]
    shown = f"her laptop allowed infer:digits direct 22 ms 4: digits, faces eu-west 2 × H100, 80.0 GiB 30 % {ALICE}"
    assert lines[1].split() == shown.split()
    assert stranger not in done.stdout
    assert done.stderr.startswith("and 1 other ")
    every = call("peers", "--all", gateway=gateway)
    assert (every.stdout.splitlines()[2].split(), every.stderr) == (["known", "1", stranger], "")
    assert json.loads(call("peers", "--json", gateway=gateway).stdout)["peers"][0]["peer"] == ALICE
    assert call("peers", "name", ALICE, "alice", gateway=gateway).stdout == "its models are alice/… now\n"
    assert call("peers", "ban", "alice", "--reason", "shouted", gateway=gateway).exit_code == 0
    assert gateway.peers[ALICE]["banned"] == "shouted"
    assert call("peers", "unban", "alice", gateway=gateway).stdout == f"{ALICE} may: infer:digits\n"
    assert call("peers", "forget", ALICE, gateway=gateway).exit_code == 2


@pytest.mark.parametrize("arguments", [("invite", "--uses", "0"), ("invite", "a", "b"), ("allow",), ("disallow",), ("peers", "name", "x")])
def test_wrong_usage_of_sharing_exits_2(call, arguments):
    assert call(*arguments).exit_code == 2
