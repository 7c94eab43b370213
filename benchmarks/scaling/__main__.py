"""`python benchmarks/scaling`: workers that come with the load, and before it: reactive scaling beside scaling by forecast."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from zlib import crc32

import numpy as np
from simulation import rates, run

HERE = Path(__file__).parent
TRACES = ("daily", "flash crowd", "sawtooth")
LINE = "| {trace} | {way} | {over} s | {worker_seconds:.0f} s | {longest:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "scaling.json")
    options = parser.parse_args()
    rows = []
    for trace in TRACES:
        for seed in range(options.seeds):
            arrivals = np.random.default_rng(crc32(f"{trace} {seed}".encode())).poisson(rates(trace))
            for way in ("reactive", "forecast"):
                begun = time.process_time()
                outcome = run(arrivals, foretells=way == "forecast")
                row = {"trace": trace, "seed": seed, "way": way, **vars(outcome), "cpu": time.process_time() - begun}
                rows.append(row)
                print(LINE.format(**row), flush=True)
    saved = {way: sum(row["over"] for row in rows if row["way"] == way) for way in ("reactive", "forecast")}
    print(f"seconds over target: {saved['reactive']} reactive, {saved['forecast']} by forecast")
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps({"about": {"python": platform.python_version()}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
