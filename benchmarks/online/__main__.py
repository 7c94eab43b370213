"""`python benchmarks/online`: requests a second through Tether beside the floor, in the same minutes on the same machine.

Ratios, not times: every cell of Tether stands beside a cell of the floor measured seconds before, and the table gives the median of the
paired ratios.  `floor-aa` is the floor against itself: how far from 1.00 noise alone gets.  Peers that serve the same models join with
`--peer NAME=URL`.  Beside it stands what one request costs each of the lab's processes in processor time: that hardly changes where other
work slows all of it down, so it is what to compare between two versions of the code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import load
import models
import onnxruntime
import upkeep

import tether

CELLS = (("tiny", 1), ("tiny", 32), ("image", 1), ("image", 8), ("batch", 64), ("large", 1))
HERE = Path(__file__).parent


@contextlib.contextmanager
def floor(folder: Path) -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = subprocess.Popen([sys.executable, HERE / "floor.py", folder, str(port)])
    try:
        _wait(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit("the floor does not start")


def expected(paths: dict[str, Path]) -> dict[str, object]:
    """What each model answers to its row, by ONNX Runtime itself."""
    return {
        name: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": models.row(name)})[0]
        for name, path in paths.items()
    }


def measure(
    servers: dict[str, str], rounds: int, seconds: int, cells: list[tuple[str, int]], processes: dict[str, int]
) -> list[dict[str, object]]:
    """Every cell of every round: the floor first, then each server with a floor of its own beside it. `processes`: of the lab, by name."""
    rows: list[dict[str, object]] = []
    base = servers["floor"]
    for turn in range(rounds):
        for model, clients in cells:
            for name, url in servers.items():
                reference = load.run(base, model, clients, seconds)
                load.run(url, model, clients, 1)
                before = upkeep.cpu_seconds(processes)
                cell = load.run(url, model, clients, seconds)
                after = upkeep.cpu_seconds(processes)
                cost = {each: (after[each] - before[each]) * 1e6 / (cell.rate * seconds) for each in after if name == "tether"}
                ratio = cell.rate / reference.rate
                row = {"round": turn, "model": model, "clients": clients, "server": name, "ratio": ratio, **asdict(cell)}
                rows.append(row | {"cpu_us": cost})
                times = f"p50 {cell.p50:.2f}, p90 {cell.p90:.2f}, p99 {cell.p99:.2f}, at most {cell.slowest:.0f} ms"
                costs = "".join(f", {each} {value:.0f} µs" for each, value in cost.items() if value >= 1)
                print(
                    f"round {turn + 1} {model} c{clients} {name}: {cell.rate:.0f}/s, {ratio:.2f} × floor, {times}{costs}", file=sys.stderr
                )
    return rows


def table(rows: list[dict[str, object]], servers: dict[str, str], cells: list[tuple[str, int]]) -> str:
    lines = ["| server | " + " | ".join(f"{model} c{clients}" for model, clients in cells) + " |", "|---|" + "---|" * len(cells)]
    for server in servers:
        texts = []
        for model, clients in cells:
            found = [row for row in rows if (row["server"], row["model"], row["clients"]) == (server, model, clients)]
            ratio, rate, p50, p99 = (statistics.median(float(str(row[key])) for row in found) for key in ("ratio", "rate", "p50", "p99"))
            errors = sum(int(str(row["errors"])) for row in found)
            rates = f"{rate:,.0f}/s, p50 {p50:.1f}, p99 {p99:.1f} ms"
            texts.append(f"**{ratio:.2f}** ({rates}{f', {errors} errors' if errors else ''})")
        lines.append(f"| {'floor-aa' if server == 'floor' else server} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def costs(rows: list[dict[str, object]], cells: list[tuple[str, int]]) -> str:
    """What a request costs each process of the lab."""
    lines = []
    for model, clients in cells:
        found = [row["cpu_us"] for row in rows if (row["server"], row["model"], row["clients"]) == ("tether", model, clients)]
        medians = {each: statistics.median(float(row[each]) for row in found) for each in found[0]}  # type: ignore[attr-defined,index]
        lines.append(f"{model} c{clients}: " + ", ".join(f"{each} {value:,.0f}" for each, value in medians.items() if value >= 1))
    return "µs of a core a request: " + "; ".join(lines)


def start(lab: tether.Lab, paths: dict[str, Path], begun: float, *, briefly: bool) -> dict[str, float]:
    """Publish the models. From `tether.up` to the first good answer, what cold models take (seconds), what the lab costs at rest."""
    lab.publish("tiny", paths["tiny"], example=models.row("tiny"))
    lab.infer("tiny", models.row("tiny"))
    first = time.perf_counter() - begun
    nbytes, cores = upkeep.idle(lab) if not briefly else (0, 0.0)
    for name in ("image", "batch", "large"):
        lab.publish(name, paths[name], example=models.row(name))
    asked = time.perf_counter()
    lab.infer("batch", models.row("batch"))
    large = time.perf_counter() - asked
    for name in ("image", "large"):
        lab.infer(name, models.row(name))
    if briefly:
        return {"up to first good answer": first, "cold ONNX model of 21 MB": large}
    cold = {
        "cold ONNX model": upkeep.cold_onnx(lab, paths["tiny"]),
        "of 21 MB": large,
        "cold .pt2": upkeep.cold_torch(lab, paths["tiny"].parent),
    }
    return {"up to first good answer": first, "idle MB (PSS)": nbytes / 1e6, "idle cores": cores} | cold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each cell")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="another server with the same models")
    parser.add_argument("--only", action="append", default=[], metavar="MODEL", choices=list(models.SHAPES), help="one of the models")
    parser.add_argument("--no-starts", action="store_true", help="leave out what a lab costs at rest and cold models: a minute and a half")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "online.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as folder:
        paths = models.make(Path(folder) / "models")
        begun = time.perf_counter()
        with tether.up(workers=options.workers, data=Path(folder) / "data") as lab, floor(Path(folder) / "models") as base:
            starts = start(lab, paths, begun, briefly=options.no_starts)
            servers = {"floor": base, "tether": str(lab.gateway), **dict(peer.split("=", 1) for peer in options.peer)}
            answers = expected(paths)
            for url in servers.values():
                for name, answer in answers.items():
                    load.check(url, name, answer)
            cells = [cell for cell in CELLS if not options.only or cell[0] in options.only]
            processes = {service.name: service.pid for service in lab.status().services if service.pid}
            rows = measure(servers, options.rounds, options.seconds, cells, processes)
    text = table(rows, servers, cells)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "tether": tether.__version__}
    options.out.write_text(
        json.dumps({"machine": machine, "workers": options.workers, "starts": starts, "table": text, "cells": rows}, indent=1)
    )
    print(", ".join(f"{what}: {value:.3g}" for what, value in starts.items()))
    print(f"× floor (median of {options.rounds} paired rounds), requests a second, 99th percentile; {machine}\n\n{text}")
    print(f"\n{costs(rows, cells)}")


if __name__ == "__main__":
    main()
