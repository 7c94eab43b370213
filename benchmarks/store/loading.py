"""One side of the load measurement, in a fresh process: every weight in memory and summed.

    python loading.py tether|tether-sums|tether-ready STORE REF        python loading.py numpy|torch FILE

Prints seconds, those of processors, the sum, and seconds that new memory took before. What imports cost is left out on both sides; what is
loaded is read once before, since some systems give up what lies in the disk cache within seconds, and first what no process has mapped.
`tether` maps the verified tensors and sums them; `tether-sums` sums each as it is verified; `tether-ready` is as `tether`, but the memory
that an encrypted version is decrypted to was touched before.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

spent: list[float] = []
"""Seconds that new memory took before the work began."""


def tether(store: str, ref: str, *, streaming: bool) -> Callable[[], float]:
    from tether.store import Repository
    from tether.types import ModelRef

    warm(*Path(store, "packs").iterdir())

    def load() -> float:
        with Repository.open(Path(store), read_only=True) as repository:
            digest = repository.resolve(ModelRef.parse(ref)).digest
            if streaming:
                return sum(float(array.sum()) for _, array in repository.iter_tensors(digest))
            return sum(float(array.sum()) for array in repository.load_tensors(digest).values())

    return load


def reference(library: str, path: str) -> Callable[[], float]:
    if library == "numpy":
        from safetensors.numpy import load_file
    else:
        from safetensors.torch import load_file
    warm(Path(path))
    return lambda: sum(float(array.sum()) for array in load_file(path).values())


def ready(store: str, ref: str) -> Callable[[], float]:
    """Tells `spent` what memory costs: the system clears it, and the host of a virtual machine may have to find it first."""
    from tether.store.packing import memory
    from tether.store.packing.parallel import threads_for

    work, real = tether(store, ref, streaming=False), memory.new_memory
    begun = time.perf_counter()
    blocks = [real(memory.TOGETHER) for _ in range(sum(path.stat().st_size for path in Path(store, "packs").iterdir()) // memory.TOGETHER)]
    with ThreadPoolExecutor(threads_for(len(blocks) * memory.TOGETHER)) as pool:
        list(pool.map(_touch, blocks))
    spent.append(time.perf_counter() - begun)

    def new_memory(nbytes: int, large: int | None = None) -> memoryview:
        return blocks.pop() if blocks and nbytes == memory.TOGETHER else real(nbytes, large)

    memory.new_memory = new_memory
    return work


def _touch(block: memoryview) -> None:
    np.frombuffer(block, np.uint8)[::4096] = 0


def warm(*paths: Path) -> None:
    """Have the files in the disk cache."""
    room = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def measured(work: Callable[[], float]) -> str:
    """What `work` answers is timed with what it leaves behind still in memory."""
    begun, before = time.perf_counter(), _processors()
    total = work()
    return f"{time.perf_counter() - begun:.6f} {_processors() - before:.6f} {total:.3f} {sum(spent):.6f}"


def _processors() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    side, *arguments = sys.argv[1:]
    works = {
        "tether": partial(tether, streaming=False),
        "tether-sums": partial(tether, streaming=True),
        "tether-ready": ready,
        "numpy": partial(reference, "numpy"),
        "torch": partial(reference, "torch"),
    }
    print(measured(works[side](*arguments)))


if __name__ == "__main__":
    main()
