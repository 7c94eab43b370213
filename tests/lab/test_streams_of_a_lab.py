"""A class that generates, published and read part by part: by Python, by the command line, by any program that speaks HTTP."""

import json
import time

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from tether.cli import tether as command

BUSY = 0.06
"""Share of a core: what spins has more, also beside ten others; what waits has less."""
WRITER = '''
import os

class Writer:
    """Counts to the number, in words; spins at a negative one."""

    outputs = [("word", "BYTES", (1,))]
    pure = False

    def load(self, path):
        self.told = 0

    def generate(self, number):
        for index in range(int(abs(number[0]))):
            self.told += 1
            yield {"word": [f"{index} "]}
        yield {"word": [f"pid {os.getpid()} after {self.told}"]}
        while number[0] < 0:
            pass
'''


@pytest.fixture(scope="module")
def writer(lab, tmp_path_factory):
    path = tmp_path_factory.mktemp("writer") / "model.py"
    path.write_text(WRITER)
    version = lab.publish("writer", path, example={"number": np.array([2])})
    assert (version.streams, version.outputs[0].shape) == (True, (-1,))
    return version


def ask(lab, number):
    return [part[0].decode() for part in lab.stream("writer", np.array([number]))]


def processor(process):
    """Seconds of it that were used."""
    return sum(process.cpu_times()[:2])


def share(process):
    """Of one core, over a moment."""
    before, begun = processor(process), time.monotonic()
    time.sleep(0.3)
    return (processor(process) - before) / (time.monotonic() - begun)


@pytest.mark.usefixtures("writer")
def test_parts_are_read_one_by_one_or_joined(lab):
    assert ask(lab, 3)[:3] == ["0 ", "1 ", "2 "]
    assert lab.infer("writer", np.array([2]))[:2].tolist() == [b"0 ", b"1 "]


@pytest.mark.usefixtures("writer")
async def test_parts_are_awaited_in_any_loop(lab):
    parts = [part[0] async for part in lab.astream("writer", np.array([1]))]
    assert (len(parts), parts[0]) == (2, b"0 ")


@pytest.mark.usefixtures("writer")
def test_who_leaves_the_loop_takes_the_work_along_and_leaves_the_model_what_it_knows(lab):
    parts = lab.stream("writer", np.array([-1]))
    assert next(parts).tolist() == [b"0 "]
    model = psutil.Process(int(next(parts)[0].decode().split()[1]))
    while share(model) < BUSY:
        pass
    parts.close()
    taken = processor(model)
    while share(model) >= BUSY:
        pass
    assert processor(model) - taken < 1
    assert model.is_running()
    assert len(ask(lab, 0)) == 1


@pytest.mark.usefixtures("writer")
def test_the_command_line_writes_words_as_they_come(lab, tmp_path):
    np.save(tmp_path / "n.npy", np.array([2]))
    given = ["infer", "writer", "--stream", "--input", str(tmp_path / "n.npy"), "--url", lab.gateway]
    assert CliRunner().invoke(command, given).stdout.startswith("0 1 pid ")
    lines = CliRunner().invoke(command, [*given, "--json"]).stdout.splitlines()
    assert [json.loads(line) for line in lines][:2] == [["0 "], ["1 "]]
