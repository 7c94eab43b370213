import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "client"))
from fake_gateway import KEY, FakeGateway, Served

from tether.cli import tether


@pytest.fixture
def gateway():
    with Served(FakeGateway()) as served:
        yield served


@pytest.fixture
def call(tmp_path):
    """Run a command in this process; no lab runs on its data folder."""

    def run(*arguments, gateway=None):
        at = ["--url", gateway.url, "--api-key", KEY] if gateway else []
        return CliRunner().invoke(
            tether, [str(each) for each in arguments] + at, env={"TETHER_HOME": str(tmp_path / "home")}, prog_name="tether"
        )

    return run


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "digits.onnx"
    path.write_bytes(b"a model")
    return path
