"""`python benchmarks/scale`: the control plane with 1,000 workers and 10,000 models, and with less and more of both."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import msgspec
from cluster import Cluster
from deciding import events, routing
from heartbeats import heartbeats
from pushing import pushed

from tether.routing.table import Table

RESULTS = Path(__file__).parents[1] / "results" / "scale.json"


def measure(workers: int, models: int, loaded: int) -> dict[str, Any]:
    """In one process; times are of CPU."""
    begun = time.process_time()
    cluster = Cluster(workers, models, loaded)
    filled = time.process_time() - begun
    found: dict[str, Any] = {"workers": workers, "models": models, "loaded": loaded, "seconds to load all": filled}
    found |= {"microseconds to a route": routing(cluster.state.table, workers), "table": _table(cluster.state.table)}
    return found | {"milliseconds an event": events(cluster, models, loaded)}


def _table(table: Table) -> dict[str, float]:
    begun = time.process_time()
    encoded = msgspec.msgpack.encode(table)
    middle = time.process_time()
    msgspec.msgpack.decode(encoded, type=Table)
    return {"nbytes": len(encoded), "encoded in": (middle - begun) * 1e3, "decoded in": (time.process_time() - middle) * 1e3}


def _print(found: dict[str, Any]) -> None:
    print(f"\n{found['workers']} workers, {found['models']} models, {found['loaded']} of them on two workers each")
    print("  a route in µs:", ", ".join(f"{kind} {took:.1f}" for kind, took in found["microseconds to a route"].items()))
    print("  table: {nbytes:,.0f} bytes, encoded in {encoded in:.0f} ms, decoded in {decoded in:.0f} ms".format(**found["table"]))
    for kind, took in found["milliseconds an event"].items():
        print(f"  {kind:28} {took['median']:8.3f} ms, at most {took['longest']:.3f}")


def main() -> None:
    """Prints a table and writes results/scale.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--loaded", type=int, default=1000, help="models that were asked for")
    parser.add_argument("--changes", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    logging.getLogger("distributed").setLevel(logging.ERROR)
    sizes = [(asked.workers * part // 10, asked.models * part // 10, asked.loaded * part // 10) for part in (1, 10)]
    sizes.append((4 * asked.workers, 4 * asked.models, asked.loaded))
    rows = []
    for size in sizes:
        rows.append(measure(*size))
        _print(rows[-1])
    pushing = pushed(*sizes[1], changes=asked.changes)
    print(
        "\nA change to the last of 3 gateways: median {median:.1f} ms, p99 {p99:.1f} ms; {requests a second:.0f} requests/s".format(
            **pushing
        )
    )
    beating = {workers: heartbeats(workers) for workers, _, _ in sizes[:2]}
    for workers, took in beating.items():
        print("{workers} workers' heartbeats: {milliseconds:.2f} ms each, {cores:.3f} cores".format(workers=workers, **took))
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load when it ended": [round(each, 1) for each in os.getloadavg()]}
    asked.output.write_text(json.dumps({**machine, "sizes": rows, "push": pushing, "heartbeats": beating}, indent=1) + "\n")


if __name__ == "__main__":
    main()
