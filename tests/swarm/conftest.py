"""One DHT of Node for all tests of a process: it takes seconds to begin."""

from collections.abc import Iterator

import pytest
from engine_harness import Testnet


@pytest.fixture(scope="session")
def testnet() -> Iterator[Testnet]:
    with Testnet() as net:
        yield net
