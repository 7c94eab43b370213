import pytest
from store_models import LAB

from tether.store import Repository


@pytest.fixture
def repository(tmp_path):
    with Repository.open(tmp_path / "store", own=LAB.public) as repository:
        yield repository
