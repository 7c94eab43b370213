"""Runs groups of the cases of `tether.testing.nodes` on the real engine, in a process of their own: as engine_scenarios.py."""

import asyncio
import dataclasses
import itertools
import time
import traceback

from engine_scenarios import main
from node_scenarios import quiet

from tether.swarm.engine.engine import EngineSettings
from tether.swarm.node.node import Node
from tether.testing.node_labs import making
from tether.testing.nodes import GROUPS

SECONDS = 30


async def cases_of(groups: list[str], bootstrap: list) -> dict:
    """By case: what it failed with, or nothing; and how long it took."""
    quiet()
    engine = EngineSettings(bootstrap=tuple((host, port) for host, port in bootstrap))
    seen = {}
    for case in itertools.chain(*(GROUPS[group] for group in groups)):
        began = time.monotonic()
        error = await run(case, engine)
        seen[case.__name__] = {"error": error, "seconds": time.monotonic() - began}
    return seen


async def run(case, engine: EngineSettings) -> str:
    async def start(lab):
        settings = dataclasses.replace(lab.settings, engine=engine)
        return await Node.start(lab.seed, lab.service, lab.shelf, lab.standing, settings)

    try:
        async with asyncio.timeout(SECONDS), making(start) as make:
            await case(make)
    except Exception:  # whatever it is, the test shows it
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main(globals())
