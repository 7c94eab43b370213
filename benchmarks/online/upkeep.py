"""What a lab costs before and between requests: cold models, and doing nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import models
import numpy as np
import psutil

import tether

_COLD = 10
"""Models of which each is asked once."""
_SPARE = 20.0
"""Seconds for the runner to come that waits for the next PyTorch model, its library imported."""


def cold_onnx(lab: tether.Lab, path: Path) -> float:
    """Seconds from asking for a small model that nobody has in memory to its answer; the median."""
    seconds = []
    for index in range(_COLD):
        name = f"cold-{index}"
        lab.publish(name, path)
        seconds.append(_asked(lab, name, models.row("tiny")))
    return statistics.median(seconds)


def cold_torch(lab: tether.Lab, folder: Path) -> float:
    """The same of small `.pt2` models, once PyTorch is loaded."""
    import torch

    x = torch.zeros(2, 16)
    program = torch.export.export(torch.nn.Linear(16, 4), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.export.save(program, folder / "linear.pt2")
    seconds = []
    for index in range(3):
        name = f"code-{index}"
        lab.publish(name, folder / "linear.pt2")
        seconds.append(_asked(lab, name, np.zeros((1, 16), np.float32)))
        time.sleep(_SPARE)
    return statistics.median(seconds[1:])


def _asked(lab: tether.Lab, name: str, x: np.ndarray) -> float:
    begun = time.perf_counter()
    lab.infer(name, x)
    return time.perf_counter() - begun


def idle(lab: tether.Lab, seconds: float = 30.0) -> tuple[int, float]:
    """Bytes (PSS) of all of the lab's processes, and cores that they use, while nobody asks anything."""
    services = [psutil.Process(service.pid) for service in lab.status().services if service.pid]
    (supervisor,) = {process.ppid() for process in services}
    tree = [psutil.Process(supervisor), *psutil.Process(supervisor).children(recursive=True)]
    before, begun = _cpu(tree), time.perf_counter()
    time.sleep(seconds)
    cores = (_cpu(tree) - before) / (time.perf_counter() - begun)
    return sum(process.memory_full_info().pss for process in tree), cores


def cpu_seconds(processes: Mapping[str, int]) -> dict[str, float]:
    """So far, by name; to the nanosecond, where `cpu_times` counts hundredths of a second. A thread that ends takes its time with it."""
    return {name: sum(map(_thread_seconds, Path(f"/proc/{pid}/task").glob("*/schedstat"))) for name, pid in processes.items()}


def _thread_seconds(path: Path) -> float:
    try:
        return int(path.read_text().split()[0]) / 1e9
    except OSError:  # it just ended
        return 0.0


def _cpu(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))
