"""The contract of a lab on the swarm, held by the real engine on a testnet; `test_memory_swarm` has it for memory."""

import pytest
from engine_harness import HERE, Scenario

from tether.testing.nodes import GROUPS
from tether.testing.requirements import needs
from tether.testing.testnet import testnet

pytestmark = [pytest.mark.swarm, needs("pythonmonkey")]


class Contract(Scenario):
    script = HERE / "node_contract.py"


@pytest.fixture(scope="module")
def nodes():
    with testnet() as net:
        yield net.nodes


@pytest.mark.parametrize("groups", [("calls", "blobs"), ("admission", "dht")], ids=" and ".join)
def test_the_contract_of_a_node_on_the_real_engine(groups, nodes, measured):
    seen = Contract("cases_of", groups=groups, bootstrap=nodes).result()
    assert list(seen) == [case.__name__ for group in groups for case in GROUPS[group]]
    measured(f"contract of nodes, {' and '.join(groups)}: {sum(case['seconds'] for case in seen.values()):.1f} s for {len(seen)} cases")
    assert not "".join(case["error"] for case in seen.values())


def test_no_case_is_left_out():
    assert set(GROUPS) == {"calls", "blobs", "admission", "dht"}
