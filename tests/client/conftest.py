import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_gateway import KEY, FakeGateway, Served

from tether.client.http import HttpClient
from tether.lab.lab import Lab


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with Served(FakeGateway()) as served:
        yield served


@pytest.fixture
async def client(gateway):
    async with HttpClient(gateway.url, KEY) as client:
        yield client


@pytest.fixture
def lab(gateway) -> Iterator[Lab]:
    with Lab(HttpClient(gateway.url, KEY)) as lab:
        yield lab


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "digits.onnx"
    path.write_bytes(b"a model" * 100)
    return path
