import pytest
from blake3 import blake3
from peering_labs import Lab

from tether.manager import publishing
from tether.security.identity import Identity


@pytest.fixture(scope="session")
def looked_at():
    """What the sandbox said, by the bytes that it was shown."""
    return {}


@pytest.fixture(autouse=True)
def the_same_model_is_looked_at_once(looked_at, monkeypatch):
    """A process for each publish is most of what these tests would take, and how a model is looked at is shown elsewhere (tests/runtimes).

    What is encrypted is looked at each time: where that leaves files is shown here.
    """
    look = publishing.inspect_in_sandbox

    async def remembered(entry, framework, *, example, limits, **options):
        if limits.scratch or not entry.is_file():
            return await look(entry, framework, example=example, limits=limits, **options)
        shown = (entry.name, framework, *(blake3(path.read_bytes()).digest() for path in (entry, example) if path))
        if shown not in looked_at:
            looked_at[shown] = await look(entry, framework, example=example, limits=limits, **options)
        return looked_at[shown]

    monkeypatch.setattr(publishing, "inspect_in_sandbox", remembered)


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
