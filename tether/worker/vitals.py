"""What a worker's processes use of their machine, for monitoring: looked up every few seconds in a thread, told with each heartbeat.

    {"cpu": seconds so far, "memory": bytes, "received": bytes so far, "sent": bytes so far,
     "cards": [{"name", "busy": 0 to 1, "used": bytes, "total": bytes}]}

Processor and memory are those of the worker and of the runners that it started, memory as PSS, so that shared pages count once. Network
is that of the whole host: the kernel counts it by interface, not by process.
"""

from __future__ import annotations

import contextlib
import csv
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import psutil

__all__ = ["PERIOD", "card_vitals", "vitals"]

PERIOD: Final = 5.0
"""Seconds between looks: one takes about 2 ms."""
_DRIVER: Final = ("nvidia-smi", "--query-gpu=index,uuid,name,utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits")
_PATIENCE: Final = 4.0
_FIELDS: Final = 6
_MIB: Final = 1 << 20


def vitals(with_cards: bool) -> dict[str, Any]:
    """What is used now. Blocks, for up to some seconds where a driver is asked for its cards."""
    me = psutil.Process()
    times = me.cpu_times()
    cpu = times.user + times.system + times.children_user + times.children_system  # of runners that ended: what was used stays used
    memory = _memory(me)
    for child in _children(me):
        with contextlib.suppress(psutil.Error):  # it just ended
            theirs = child.cpu_times()
            cpu += theirs.user + theirs.system
            memory += _memory(child)
    network = psutil.net_io_counters()
    told: dict[str, Any] = {"cpu": round(cpu, 2), "memory": memory, "received": network.bytes_recv, "sent": network.bytes_sent}
    return told | {"cards": _asked() if with_cards else []}


def _memory(process: psutil.Process) -> int:
    """PSS, in bytes, where the system tells it."""
    with contextlib.suppress(psutil.AccessDenied):
        full = process.memory_full_info()
        return int(getattr(full, "pss", 0) or full.rss)
    return int(process.memory_info().rss)


def _children(me: psutil.Process) -> list[psutil.Process]:
    """As `psutil.Process.children`, which looks through all processes of the machine; Linux has a list of each thread's."""
    lists = list(Path(f"/proc/{me.pid}/task").glob("*/children"))
    if not lists:
        return me.children()
    found: list[psutil.Process] = []
    for path in lists:
        with contextlib.suppress(OSError):  # the thread just ended
            for pid in path.read_text().split():
                with contextlib.suppress(psutil.Error):
                    found.append(psutil.Process(int(pid)))
    return found


def _asked() -> list[dict[str, Any]]:
    try:
        told = subprocess.run(_DRIVER, check=True, capture_output=True, text=True, timeout=_PATIENCE, errors="replace").stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return card_vitals(told, os.environ.get("CUDA_VISIBLE_DEVICES"))


def card_vitals(told: str, visible: str | None) -> list[dict[str, Any]]:
    """Of what `nvidia-smi` printed, the cards of this worker: those that `CUDA_VISIBLE_DEVICES` names by place or identifier; None: all.

    What the driver does not tell of a card ("[N/A]") leaves that card out.
    """
    mine = None if visible is None else {part.strip() for part in visible.split(",")}
    cards: list[dict[str, Any]] = []
    for row in csv.reader(told.splitlines(), skipinitialspace=True):
        if len(row) != _FIELDS or not all(cell.strip().isdecimal() for cell in row[3:]):
            continue
        index, uuid, name = (cell.strip() for cell in row[:3])
        if mine is None or index in mine or any(uuid.startswith(each) for each in mine if each.startswith("GPU-")):
            busy, used, total = map(int, row[3:])
            cards.append({"name": name, "busy": busy / 100, "used": used * _MIB, "total": total * _MIB})
    return cards
