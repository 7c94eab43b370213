"""`python benchmarks/swarm_scale`: up to 10,000 labs in a discrete-event simulation: being found, many fetching one model, who holds what.

Deterministic but for the seconds of CPU: the same seed gives the same numbers. No network, no JavaScript; the decisions of downloads and
of replication are made by the real code, the DHT's by its rules (`lookups`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import downloads
import lookups
import planning
from downloads import Scenario

import tether

HERE = Path(__file__).parent
ALIKE = partial(Scenario, late=0.0, leaving=0.0, has_equal_lines=True)
SPARSE = partial(Scenario, neighbours=30, wake=0.5, tick=1.0)
"""What is told is heard of twice a second, and stalls are looked for once: it costs the simulation less, and the labs time."""
PARTS = ("lookups", "downloads", "planning")
NODES = {"small": (100, 300), "full": (100, 1000, 3000, 10_000)}
DOWNLOADS = {
    "small": (ALIKE(8, 64), ALIKE(8, 8), Scenario(8, 16), SPARSE(24, 4, neighbours=6)),
    "full": (
        ALIKE(1, 64),
        ALIKE(8, 64),
        ALIKE(8, 8),
        ALIKE(64, 64),
        ALIKE(512, 16, neighbours=30),
        Scenario(8, 64),
        Scenario(64, 32),
        Scenario(512, 8, neighbours=30),
        Scenario(512, 8, neighbours=30, is_origin_known=False),
        SPARSE(10_000, 4),
        SPARSE(10_000, 4, is_origin_known=False),
    ),
}
PLANS = {"small": ((50, 100),), "full": ((64, 3000), (1000, 3000), (10_000, 3000))}


def lookup_table(rows: Iterable[dict[str, object]]) -> Iterator[str]:
    """Announce and lookup, a line for each."""
    yield "| nodes | | datagrams: median, 95 of 100 | round trips | seconds: median, 95 of 100 | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        for what in ("announce", "lookup"):
            found = _figures(row[what])
            came = (
                f"stored on {found['stored']:.1f}"
                if what == "announce"
                else f"{found['found']:.0%} found, the first after {found['first after']:.2f} s"
            )
            yield (
                f"| {row['nodes']:,} | {what} | {found['sent']:.0f}, {found['sent, 95 of 100']:.0f} | {found['rounds']:.1f} "
                f"| {found['seconds']:.1f}, {found['seconds, 95 of 100']:.1f} | {came} |"
            )


def download_table(rows: Iterable[dict[str, object]]) -> Iterator[str]:
    """A line for each scenario; times are multiples of what the origin's line takes for one copy."""
    yield (
        "| labs | blobs | lines | connected to | time: half, 95 of 100, all | beside the own line | origin sends | most that a lab sends "
        "| in vain | `have` a lab |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        known = (
            "all" if row["neighbours"] is None else f"{row['neighbours']} and the origin" if row["origin known"] else f"{row['neighbours']}"
        )
        lines = "alike" if row["equal lines"] else "drawn"
        churn = ", come and go" if row["late"] or row["leaving"] else ""
        yield (
            f"| {row['labs']:,} | {row['blobs']} | {lines}{churn} | {known} "
            f"| {row['half after']:.2f}, {row['95 of 100 after']:.2f}, {row['all after']:.2f} | {row['worst of its own line']:.2f} "
            f"| **{row['origin sends']:.2f}** | {row['worst lab sends']:.2f} | {row['sent in vain']:.0%} | {row['haves a lab']:,.0f} |"
        )


def plan_table(rows: Iterable[dict[str, object]]) -> Iterator[str]:
    """A line for each event."""
    yield "| labs | models | what happens | copies lost or missing | made | CPU |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield f"| {row['labs']:,} | {row['models']:,} | {row['event']} | {row['lost']} | {row['made']} | {row['seconds']:.2f} s |"


def _figures(found: object) -> dict[str, float]:
    return found if isinstance(found, dict) else {}


def measure(part: str, size: str, seed: str) -> tuple[list[dict[str, object]], str]:
    """Rows, and the table of them."""
    rows: Iterator[dict[str, object]]
    match part:
        case "lookups":
            rows, table = lookups.rows(NODES[size], lookups.DhtOptions(), seed), lookup_table
        case "downloads":
            rows, table = downloads.rows(DOWNLOADS[size], seed), download_table
        case _:
            rows, table = planning.rows(PLANS[size], seed), plan_table
    begun, found = time.process_time(), []
    for row in rows:
        found.append(row)
        print(f"{part}: {len(found)} done after {time.process_time() - begun:.0f} s of CPU", file=sys.stderr)
    return found, "\n".join(table(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", default="tether")
    parser.add_argument("--small", action="store_true", help="in seconds")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of it; may be given again  [default: all]")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "swarm_scale.json")
    options = parser.parse_args()
    begun, found, size = time.process_time(), {}, "small" if options.small else "full"
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "tether": tether.__version__}
    print(machine)
    for part in options.only or PARTS:
        found[part], table = measure(part, size, options.seed)
        print(f"\n{part}\n\n{table}", flush=True)
    print(f"\n{time.process_time() - begun:.0f} s of CPU")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "seed": options.seed} | found, indent=1))


if __name__ == "__main__":
    main()
