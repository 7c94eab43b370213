"""`python benchmarks/online/cards.py`: BERT-base on a graphics card, through the gateway, beside the same program called in this process.

In-process: host in and out through pinned memory, batches of 128; one sequence at a time for what a request adds. `--layers 1 --clients 8`
is for a look at the program on a machine without a card.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import load
import models
import numpy as np
import torch
from torch.nn import functional

import tether

HERE = Path(__file__).parent
WIDTH, HEADS, INNER = 768, 12, 3072
ROWS = 128
"""Sequences of a batch in this process: what runs fastest of 1, 64 and 128."""


class Layer(torch.nn.Module):
    """Attention over the sequence, then two products for each word; each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.joined = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = torch.nn.Linear(WIDTH, INNER), torch.nn.Linear(INNER, WIDTH)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.mixed(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2]).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.joined(seen))
        return self.norms[1](x + self.narrow(functional.gelu(self.wide(x))))


class Bert(torch.nn.Module):
    """Ids of words `(sequences, tokens)`, INT64 → the mean of their vectors `(sequences, 768)`, FP32; computed in bfloat16."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words, self.places = torch.nn.Embedding(models.WORDS, WIDTH), torch.nn.Embedding(models.TOKENS, WIDTH)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))
        self.register_buffer("order", torch.arange(models.TOKENS))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(x) + self.places(self.order)
        for layer in self.layers:
            x = layer(x)
        return {"y": x.float().mean(1)}


def export(layers: int, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Write the program to `path`; the result runs it here, on the card where there is one."""
    torch.manual_seed(7)
    model = Bert(layers).to(torch.bfloat16).eval()
    example = torch.from_numpy(np.repeat(models.row("bert"), 2, axis=0))
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("n", max=4096)},)), path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)

    @torch.inference_mode()
    def run(ids: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(ids)
        if device == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return np.asarray(model(tensor)["y"].cpu())

    return run


def in_process(run: Callable[[np.ndarray], np.ndarray], seconds: float) -> tuple[float, float]:
    """Sequences a second in batches, and milliseconds of one alone (median)."""
    batch = np.repeat(models.row("bert"), ROWS, axis=0)
    run(batch)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        run(batch)
        done += ROWS
    rate = done / (time.perf_counter() - begun)
    return rate, statistics.median(_timed(lambda: run(models.row("bert"))) for _ in range(50)) * 1e3


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@contextmanager
def serving(layers: int) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """A lab of one worker that has the model; its URL, and the same program in this process."""
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as folder:
        path = Path(folder) / "bert.pt2"
        run = export(layers, path)
        with tether.up(workers=1, gpus=int(torch.cuda.is_available()), data=Path(folder) / "data") as lab:
            lab.publish("bert", path, example=models.row("bert"))
            lab.infer("bert", models.row("bert"))
            load.check(str(lab.gateway), "bert", run(models.row("bert")))
            yield str(lab.gateway), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of each measurement")
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "cards.json")
    options = parser.parse_args()
    rows = []
    with serving(options.layers) as (url, run):
        for _ in range(options.rounds):
            rate, alone = in_process(run, options.seconds)
            load.run(url, "bert", options.clients, 2)
            many, one = load.run(url, "bert", options.clients, options.seconds), load.run(url, "bert", 1, options.seconds)
            if many.errors or one.errors:
                raise SystemExit(f"{many.errors + one.errors} requests failed")
            rows.append({"in process": rate, "through the gateway": many.rate, "p99": many.p99})
            rows[-1] |= {"one in process": alone, "one through the gateway": one.p50}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no card, {platform.machine()}"
    options.out.write_text(json.dumps({"card": card, "layers": options.layers, "clients": options.clients, "rounds": rows}, indent=1))
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    many, base = middle["through the gateway"], middle["in process"]
    one, alone = middle["one through the gateway"], middle["one in process"]
    print(f"{card}: BERT of {options.layers} layers, {models.TOKENS} tokens, bf16")
    print(
        f"in process, batches of {ROWS}: {base:,.0f}/s; through the gateway, {options.clients} clients: {many:,.0f}/s, {many / base:.2f} ×"
    )
    print(f"one alone: {alone:.2f} ms in process, {one:.2f} ms through the gateway: {one - alone:.2f} ms more")


if __name__ == "__main__":
    main()
