"""What a worker uses of its machine is measured with its runners, and nothing is told of cards that are not its own."""

import subprocess
import sys

import psutil
import pytest

from tether.worker.vitals import card_vitals, vitals

TOLD = """\
0, GPU-8932f937-d72c, NVIDIA H100 80GB HBM3, 37, 1024, 81559
1, GPU-11111111-2222, NVIDIA L4, 0, 1, 23034
2, GPU-33333333-4444, "NVIDIA, odd", [N/A], 1, 23034
nonsense
"""
WORK = """
import sys
data = bytearray(64 << 20)
data[::4096] = b"x" * (len(data) // 4096)
print(flush=True)
sys.stdin.readline()
sum(range(30_000_000))
"""


def test_runners_count_while_they_run_and_their_time_when_they_ended():
    before = vitals(with_cards=False)
    with subprocess.Popen([sys.executable, "-c", WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runner:
        runner.stdout.readline()
        during = vitals(with_cards=False)
        assert during["memory"] > before["memory"] + (48 << 20)
        runner.stdin.write(b"go on\n")
        runner.stdin.close()
        runner.wait()
    after = vitals(with_cards=False)
    assert after["memory"] < during["memory"] - (32 << 20)
    assert after["cpu"] >= during["cpu"] + 0.1
    network = psutil.net_io_counters()
    assert network.bytes_recv >= after["received"] >= before["received"]
    assert network.bytes_sent >= after["sent"]
    assert after["cards"] == []


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]),
        ("1", ["NVIDIA L4"]),
        ("GPU-8932f937", ["NVIDIA H100 80GB HBM3"]),
        ("", []),
        ("2", []),
    ],
)
def test_a_worker_tells_of_its_own_cards_what_their_driver_says(visible, names):
    assert [card["name"] for card in card_vitals(TOLD, visible)] == names


def test_cards_are_told_in_bytes_and_shares():
    assert card_vitals(TOLD, "0") == [{"name": "NVIDIA H100 80GB HBM3", "busy": 0.37, "used": 1 << 30, "total": 81559 << 20}]
