"""`python benchmarks/batching`: batches that size themselves, beside twenty settings made by hand.

Three models (those of benchmarks/online) are run here with batches of 1 to 256 rows, a fourth has the cost of a transformer on a graphics
card; then requests arrive by four traces in simulated time at that cost. Nothing is tuned: the same code as in a worker learns it from
what batches took.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from simulation import LATENCY, Outcome, by_hand, simulate, trace

from tether.serving_settings import DEFAULTS

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "online"))
from models import SHAPES, make  # noqa: E402 (of the benchmark beside this one)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CARD = dict(zip(SIZES, (0.0057, 0.0057, 0.0058, 0.006, 0.0062, 0.0066, 0.007, 0.0085, 0.017), strict=True))
"""Nearly nothing for a row: in the manner of 128 tokens through a BERT on an H100."""
AROUND = 70e-6
"""Seconds a request that are not the model's: decoding and encoding (worker README)."""
GRID = [(rows, delay) for rows in (1, 8, 32, 64, 128) for delay in (0.0, 0.002, 0.01, 0.03)]
LINE = "| {model} | {trace} | {requests} | {good:.0%} ({best good:.0%}) | {p99:.3f} s | {rate:.0f} | {share:.2f} ({best}) | {rows:.1f} |"
TRACES = ("steady", "step", "bursts", "overload")


def measured(name: str, path: Path, most: float) -> dict[int, float]:
    """Rows → seconds of a batch on one thread: the best of some runs, no larger ones once one takes `most` seconds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    costs: dict[int, float] = {}
    for rows in SIZES:
        batch = np.ones((rows, *SHAPES[name]), np.float32)
        session.run(None, {"x": batch})
        costs[rows] = min(_timed(lambda batch=batch: session.run(None, {"x": batch})) for _ in range(5)) + rows * AROUND
        if costs[rows] > most:
            break
    return costs


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def curve(costs: dict[int, float]) -> Callable[[int], float]:
    """Between the measured sizes by straight lines, beyond the last one at its cost a row."""
    sizes, seconds = list(costs), list(costs.values())
    return lambda rows: float(np.interp(rows, sizes, seconds)) if rows <= sizes[-1] else seconds[-1] * rows / sizes[-1]


def compared(name: str, costs: dict[int, float], seconds: float, seed: str) -> list[dict[str, object]]:
    """A row for each trace: what was learned beside the best of the grid, both for the latency and for the answers."""
    capacity, rows = max(size / cost for size, cost in costs.items()), []
    for kind in TRACES:
        arrivals = trace(kind, capacity, seconds, seed)
        learned = simulate(arrivals, curve(costs), DEFAULTS, seed)
        fixed = {f"{size} rows, {1e3 * delay:g} ms": simulate(arrivals, curve(costs), by_hand(size, delay), seed) for size, delay in GRID}
        best = max(fixed, key=lambda each: (fixed[each].rate(), fixed[each].good_windows(LATENCY)))
        rows.append(
            {
                "model": name,
                "trace": kind,
                "requests": len(arrivals),
                "good": learned.good_windows(LATENCY),
                "p99": _percentile(learned),
                "rate": learned.rate(),
                "share": learned.rate() / fixed[best].rate(),
                "best": best,
                "best good": max(each.good_windows(LATENCY) for each in fixed.values()),
                "rows": float(np.mean(learned.batches[len(learned.batches) // 2 :])),
            }
        )
    return rows


def _percentile(outcome: Outcome) -> float:
    return float(np.percentile(np.minimum(outcome.took, 10.0), 99))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each trace")
    parser.add_argument("--seed", default="tether")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "batching.json")
    chosen = parser.parse_args()
    found: list[dict[str, object]] = []
    print(f"\nlatency wanted: {1e3 * LATENCY:g} ms\n")
    print("| model | trace | requests | windows within it (best of 20) | p99 | answers/s | of the best setting of 20 | rows a batch |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        costs = {name: measured(name, path, 2.0) for name, path in make(Path(folder)).items()} | {"card": CARD}
    for name, cost in costs.items():
        for row in compared(name, cost, chosen.seconds, chosen.seed):
            found.append(row)
            print(LINE.format(**row), flush=True)
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps({"latency": LATENCY, "machine": platform.processor() or platform.machine(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
