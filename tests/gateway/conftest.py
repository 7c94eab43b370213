import pytest
from gateway_rig import running


@pytest.fixture(scope="session")
def gateway():
    """One gateway for all tests that change nothing of it."""
    with running() as rig:
        yield rig
