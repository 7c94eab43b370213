import pytest
from peering_labs import Lab

from tether.security.identity import Identity


@pytest.fixture
async def labs(tmp_path):
    """Makes labs that reach each other; the first one is asked for first."""
    network, made = {}, []

    def lab(number, **options):
        made.append(Lab(tmp_path / f"lab-{number}", Identity(bytes([number]) * 32), network, **options))
        return made[-1]

    yield lab
    for each in made:
        each.close()
