"""`python benchmarks/residency`: ten times more models than fit; who goes to make room, decided in four ways, beside a bound."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

from simulation import POLICIES, Simulation, bound, library, trace

from tether.worker.residency import RAM

HERE = Path(__file__).parent
TRACES = ("zipf", "scan", "shift", "burst")
LINE = "| {trace} | {policy} | {hits:.1%} | {gigabytes:.0f} GB | {loading:.0f} s | {p50:.2f} s | {p99:.2f} s |"


def compared(kind: str, count: int, requests: int, rate: float, seed: str) -> list[dict[str, object]]:
    """A row for each policy, and one for the bound."""
    models = library(count, seed)
    budget = sum(model.nbytes for model in models) // 10
    arrivals = trace(kind, models, requests, rate, seed)
    rows: list[dict[str, object]] = []
    for name, policy in POLICIES.items():
        outcome = Simulation(policy({RAM: budget})).run(arrivals)
        waits = sorted(outcome.waits)
        if outcome.refused or len(waits) != len(arrivals):
            raise SystemExit(f"{kind}, {name}: {len(arrivals) - len(waits)} requests were not answered, {outcome.refused} refused")
        rows.append(
            {
                "trace": kind,
                "policy": name,
                "hits": outcome.hits / len(arrivals),
                "gigabytes": outcome.loaded_nbytes / 1e9,
                "loading": outcome.loading,
                "p50": waits[len(waits) // 2],
                "p99": waits[len(waits) * 99 // 100],
            }
        )
    hits, loading = bound(arrivals, budget)
    rows.append({"trace": kind, "policy": "bound", "hits": hits, "loading": loading})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--requests", type=int, default=15_000)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--seed", default="residency")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "residency.json")
    options = parser.parse_args()
    rows = []
    for kind in TRACES:
        for row in compared(kind, options.models, options.requests, options.rate, options.seed):
            rows.append(row)
            print(
                LINE.format(**row) if "p99" in row else f"| {kind} | bound | {row['hits']:.1%} | | {row['loading']:.0f} s | | |", flush=True
            )
    about = {"python": platform.python_version(), "models": options.models, "requests": options.requests, "rate": options.rate}
    options.output.write_text(json.dumps({"about": about | {"seed": options.seed}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
