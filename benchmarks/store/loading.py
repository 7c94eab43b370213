"""One side of the load measurement, in a fresh process: every weight in memory and summed. Prints seconds and the sum.

    python loading.py tether|tether-sums STORE REF        python loading.py numpy|torch FILE

What imports cost is left out on both sides. `tether` maps the verified tensors and sums them; `tether-sums` sums each as it is verified.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def tether(store: str, ref: str, *, streaming: bool) -> tuple[float, float]:
    from tether.store import Repository
    from tether.types import ModelRef

    begun = time.perf_counter()
    with Repository.open(Path(store), read_only=True) as repository:
        digest = repository.resolve(ModelRef.parse(ref)).digest
        if streaming:
            total = sum(float(array.sum()) for _, array in repository.iter_tensors(digest))
        else:
            total = sum(float(array.sum()) for array in repository.load_tensors(digest).values())
        return time.perf_counter() - begun, total


def reference(library: str, path: str) -> tuple[float, float]:
    if library == "numpy":
        from safetensors.numpy import load_file
    else:
        from safetensors.torch import load_file
    begun = time.perf_counter()
    total = sum(float(array.sum()) for array in load_file(path).values())
    return time.perf_counter() - begun, total


def main() -> None:
    side, *arguments = sys.argv[1:]
    seconds, total = tether(*arguments, streaming=side == "tether-sums") if side.startswith("tether") else reference(side, *arguments)
    print(f"{seconds:.6f} {total:.3f}")


if __name__ == "__main__":
    main()
