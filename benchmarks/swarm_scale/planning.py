"""Who is to hold what, among many labs: what `replication.plan` costs, and how many copies move when some of the labs go."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Sequence

from tether.manager.peering.replication import Copies, Plan, Policy, Site, plan

__all__ = ["rows"]

COPIES = 3
REGIONS = ("", "eu", "us", "asia")
GO = 0.01
"""Share of the labs that leaves."""
FROM_NOTHING = 20
"""Models that only their publishers have: each missing copy has all labs drawn for, so this is timed for few."""


def rows(counts: Sequence[tuple[int, int]], seed: str) -> Iterator[dict[str, object]]:
    """Two rows for each number of labs and of models: settled, and after some left."""
    for labs, models in counts:
        drawn = random.Random(f"{seed} planning {labs} {models}")
        sites = [Site(f"{drawn.getrandbits(256):064x}", drawn.choice(REGIONS), drawn.choice((None, 10**13))) for _ in range(labs)]
        found = [_copies(f"model-{number}", drawn, sites) for number in range(models)]
        yield {"labs": labs, "models": models, "event": "nothing"} | _timed(found, sites)
        gone = set(drawn.sample(sites, max(1, round(GO * labs))))
        lost = sum(len(each.held & {site.peer for site in gone}) for each in found)
        yield {"labs": labs, "models": models, "event": f"{len(gone)} of them leave"} | _timed(
            found, [each for each in sites if each not in gone], lost
        )
        few = [Copies(each.model, each.nbytes, each.policy, frozenset(sorted(each.held)[:1])) for each in found[:FROM_NOTHING]]
        yield {"labs": labs, "models": len(few), "event": "published"} | _timed(few, sites, len(few) * (COPIES - 1))


def _copies(name: str, drawn: random.Random, sites: Sequence[Site]) -> Copies:
    """Of 4 MB to 40 GB, and there as often as wanted, wherever chance put it."""
    held = frozenset(site.peer for site in drawn.sample(sites, COPIES))
    return Copies(name, int(10 ** drawn.uniform(6.6, 10.6)), Policy(copies=COPIES), held)


def _timed(found: Sequence[Copies], sites: Collection[Site], lost: int = 0) -> dict[str, object]:
    begun = time.process_time()
    made: Plan = plan(found, sites)
    return {
        "seconds": time.process_time() - begun,
        "lost": lost,
        "made": len(made.fetch),
        "dropped": len(made.surplus),
        "short": len(made.short),
    }
