"""Seeded mutations of all that a store keeps: no other bytes than the published ones are ever used, and the error says what is broken."""

import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from mutating import Golden, make, mutate
from store_models import LAB, seeded
from using import Seen, publish_draft, use_all, verify_all

from tether.errors import TetherError
from tether.store import Repository

FULL, SMALL = 10_000, 200
"""Mutations of `make chaos` and of `make test`."""
SLOWEST = 5.0
"""Seconds for all ways of using a damaged store of a few hundred KB: beyond it something hangs."""


@pytest.fixture(scope="module")
def golden():
    """In memory where there is a place for it: each case writes the whole store."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    yield make(folder / "store")
    shutil.rmtree(folder)


def use(golden: Golden, chance) -> tuple[str, Seen]:
    """Mutate, then use: sometimes through a repository that was open all the while, sometimes as the writer."""
    golden.restore()
    held = Repository.open(golden.root, read_only=True) if chance.random() < 0.3 else None
    if held is not None and chance.random() < 0.5:
        use_all(golden, held, chance)  # whatever it keeps in mind or open
    what, seen = mutate(chance, golden), Seen()
    try:
        if held is not None:
            return what, use_all(golden, held, chance)
        with Repository.open(golden.root, read_only=chance.random() < 0.6, own=LAB.public) as repository:
            seen = use_all(golden, repository, chance)
            if chance.random() < 0.3:
                verify_all(repository, seen)
            if not repository.read_only:
                publish_draft(golden, repository, seen)
    except TetherError:
        seen.attempt("open", lambda: reopens(golden))
    finally:
        if held is not None:
            held.close()
    return what, seen


def reopens(golden: Golden) -> bool:
    """It does not: this gives the error once more."""
    Repository.open(golden.root, own=LAB.public).close()
    return True


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_row_15_whatever_is_altered_only_published_bytes_are_used(golden, chaos, measured):
    count, begun, codes, right, slowest = chaos.count(FULL, SMALL), time.monotonic(), Counter(), 0, 0.0
    for number in range(count):
        chance, start = seeded(f"{chaos.seed} {number}"), time.monotonic()
        try:
            what, seen = use(golden, chance)
        except Exception as error:
            error.add_note(f"mutation {number} of seed {chaos.seed}")
            raise
        right += seen.right
        codes.update({error.code for error in seen.errors} or {"none needed"})
        slowest = max(slowest, time.monotonic() - start)
        assert slowest < SLOWEST, what
    told = ", ".join(f"{number} {code}" for code, number in codes.most_common())
    measured(f"mutations: {count} in {time.monotonic() - begun:.1f} s, {right} right uses; {told}")
    chaos.record(15, f"{count} mutations, 0 wrong of {right} uses ({told})", time.monotonic() - begun)
