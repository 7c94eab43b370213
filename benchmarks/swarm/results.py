"""Where the swarm's benchmarks write what they found."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def write(name: str, **figures: Any) -> None:
    """`benchmarks/results/<name>.json`: the figures, and on what machine."""
    RESULTS.mkdir(exist_ok=True)
    load = [round(each, 1) for each in os.getloadavg()]
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load when it ended": load}
    (RESULTS / f"{name}.json").write_text(json.dumps({**machine, **figures}, indent=2) + "\n", encoding="utf-8")
