"""Whole labs on several machines behind NATs: they find each other, punch or are relayed; models come whole though a holder is killed."""

import hashlib
import json
import time

import numpy as np
import onnx
import pytest
from lab_hosts import ConsoleError, LabHost
from nat_harness import dht
from netns import Internet, Nat, wait_until
from onnx import TensorProto, helper, numpy_helper

from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, pytest.mark.slow, needs("pythonmonkey"), needs("ip"), needs("nft"), needs("namespaces")]
COLUMNS = 256
SECONDS_A_GIB = 1200


@pytest.fixture
def hosts(tmp_path):
    """Makes people at hosts; what they began ends with the test, all at once."""
    made = []

    def make(host, name, bootstrap, **environment):
        made.append(LabHost(host, tmp_path / name, bootstrap, **environment))
        return made[-1]

    yield make
    for each in made:
        each.leave()
    for each in made:
        each.left()


def write_model(path, mebibytes):
    """A table of so much noise, and which of its rows are wanted; the table."""
    table = np.random.default_rng(7).standard_normal((mebibytes << 18 >> 8, COLUMNS), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "rows"], ["found"])],
        "table",
        [helper.make_tensor_value_info("rows", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, ["batch", COLUMNS])],
        [numpy_helper.from_array(table, "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return table


def digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def peers(host):
    return json.loads(host.tether("peers", "--json"))["peers"]


@pytest.mark.chaos
@pytest.mark.timeout(2 * SECONDS_A_GIB)
def test_row_103_three_labs_two_of_them_behind_nats_and_a_holder_killed_half_way(chaos, measured, hosts, tmp_path):
    """Ann publishes behind a NAT, Cho holds it in public, Bob behind another NAT fetches it; 20 ms each way, 1 % lost."""
    mebibytes, began = chaos.count(1024, 32), time.monotonic()
    with Internet(delay=0.02, loss=0.01) as internet:
        bootstrap = dht(internet.host(5))
        ann, bob = (hosts(internet.router(Nat.PRESERVING).host(), name, bootstrap) for name in ("ann", "bob"))
        cho = hosts(internet.host(), "cho", bootstrap)
        for each in (ann, bob, cho):
            each.up()
        table = write_model(tmp_path / "table.onnx", mebibytes)
        for each in (ann, bob, cho):
            each.ready()
        ann.run("lab.publish('table', {path!r}) and None", path=str(tmp_path / "table.onnx"))
        address = ann.run("lab.address")
        invitation = ann.run("str(lab.invite('table', scope='replicate', uses=2))")
        for each in (bob, cho):
            each.find("lab.join({url!r})", url=invitation)
            each.run("lab.name_peer({address!r}, 'ann')", address=address)
        assert "1 version here" in cho.tether("replicate", "ann/table", seconds=SECONDS_A_GIB)
        bob.find("lab.join({url!r})", url=cho.run("str(lab.invite('ann~table', scope='replicate'))"))

        if not chaos.scale:
            internet.path(rate=8e6)  # so that there is a half-way
        asked = time.monotonic()
        with pytest.raises(ConsoleError, match="DeadlineExceeded"):
            bob.run("lab.replicate('ann/table', via={cho!r}, timeout=0.1)", cho=cho.run("lab.address"))
        seen = [(0.0, 0)]

        def come():
            seen.append(tuple(bob.run("[(each.fraction, each.peers) for each in lab.replicas()][0]")))
            return seen[-1][0]

        wait_until(lambda: come() >= 0.5, SECONDS_A_GIB)
        cho.kill()
        wait_until(lambda: come() == 1.0, SECONDS_A_GIB)
        seconds = time.monotonic() - asked
        routes = {row["petname"]: row["route"] for row in peers(bob)}
        rows = [0, 1, len(table) // 2, len(table) - 1]
        found = bob.run("lab.infer('ann/table', np.array({rows!r})).tolist()", rows=rows)
        bob.run("lab.export('ann/table', data + '/exported') and None")
    assert max(count for _, count in seen) == 2
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
    assert routes["ann"] == "punched"
    np.testing.assert_array_equal(np.float32(found), table[rows])
    assert digest(next((bob.folder / "exported").rglob("table.onnx"))) == digest(tmp_path / "table.onnx")
    said = f"labs behind NATs, {mebibytes} MiB from two holders, one of them killed half-way: {seconds:.1f} s, whole"
    measured(f"nat: {said}")
    chaos.record(103, f"swarm: {said}", time.monotonic() - began)


def test_two_labs_that_no_hole_can_be_punched_between_meet_through_a_third(measured, hosts, tmp_path):
    """Rita relays in public. Ann finds that out by herself, since she knows Rita; her colleague Bob, who has no lab, was told so."""
    with Internet(delay=0.01) as internet:
        bootstrap = dht(internet.host(5))
        rita = hosts(internet.host(), "rita", bootstrap)
        rita.up("--relay")
        rita.ready()
        address = rita.run("lab.address")
        ann = hosts(internet.router(Nat.RANDOM).host(), "ann", bootstrap)
        bob = hosts(internet.router(Nat.RANDOM).host(), "bob", bootstrap, TETHER_RELAY_THROUGH=address)
        ann.up()
        invitation = rita.run("str(lab.invite('nothing', uses=2))")
        table = write_model(tmp_path / "table.onnx", 1)
        ann.ready()
        wait_until(lambda: "relays between labs" in rita.run("lab.status().swarm.detail"), 60)
        ann.find("lab.join({url!r})", url=invitation)
        ann.run("lab.name_peer({address!r}, 'rita')", address=address)
        bob.tether("enrol", invitation)
        ann.run("lab.publish('table', {path!r}) and None", path=str(tmp_path / "table.onnx"))
        invitation = ann.run("str(lab.invite('table', scope=['infer', 'replicate']))")
        wait_until(lambda: "through a relay" in ann.run("lab.status().swarm.detail"), 60)
        began = time.monotonic()
        bob.find("far = connect({url!r})", url=invitation)
        measured(f"nat: a colleague is let in through a third lab in {time.monotonic() - began:.1f} s")
        found = bob.run("far.infer('table', np.arange(4)).tolist()")
        np.testing.assert_array_equal(np.float32(found), table[:4])
        ((bob_key, route),) = [(row["peer"], row["route"]) for row in peers(ann) if row["scopes"]]
        assert route == "relayed"
        assert "(pairs now: 0)" not in rita.run("lab.status().swarm.detail")
        assert "come through a relay" in ann.tether("doctor", "--swarm")
        rita.run("lab.disallow({key!r}) and None", key=bob_key)
        wait_until(lambda: "(pairs now: 0)" in rita.run("lab.status().swarm.detail"), 10)  # of silence it would be thirty
