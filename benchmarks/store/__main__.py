"""`python benchmarks/store`: the store beside the plain file, in the same minutes on the same disk.

Every figure is a ratio to a reference that was run just before it: publishing to `cp` and fsync of the file, loading to safetensors' own
loader and the same sum, each in a fresh process. Medians of `--rounds` pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import models
import streaming
import versions

import tether
from tether import store
from tether.runtimes.weights import read_index
from tether.security.identity import Identity
from tether.store.format.layout import Piece
from tether.store.format.weights import tensor_arrays
from tether.store.sealing import Sealing
from tether.types import ModelInfo

HERE = Path(__file__).parent
INFO = ModelInfo("custom", "custom", (), (), batched=True, pure=True, code=True)
LAB = Identity(bytes(range(32)))
MIB = 1 << 20
PARTS = ("large", "small", "versions", "streaming")
SIDES = {"mapped, then summed": "tether", "summed as verified": "tether-sums"}
"""Ways to use what is loaded → how `loading.py` calls them."""


ENCRYPTED = {
    "mapped, then summed": ("tether", "tether"),
    "mapped, then summed, memory touched before": ("tether", "tether-ready"),
    "summed as verified": ("tether-sums", "tether-sums"),
}
"""The same for an encrypted version: the plain one's side and its own."""


def publish(repository: store.Repository, path: Path) -> store.Published:
    """As the manager does, less the upload and the sandbox: read the index, cut, hash, write, commit. `path`: the one file of a folder."""
    index = read_index(path.parent, "custom")
    ranges = defaultdict(list)
    for tensor in index:
        ranges[tensor.file].append(Piece(tensor.offset, tensor.nbytes))
    files = repository.add_files(path.parent, ranges)
    arrays = (*files, *tensor_arrays(files, index))
    manifest = store.encode(store.Manifest(framework="custom", entry="", info=INFO, arrays=arrays))
    return repository.publish(path.stem, manifest, LAB.public, LAB.sign(store.signed_message(manifest)))


def publish_encrypted(repository: store.Repository, path: Path) -> store.Published:
    """The same, encrypted on the way in."""
    intake = Sealing(repository, LAB.public).intake(path.stem)
    index = read_index(path.parent, "custom")
    files = [intake.add_file(path, path.name, [Piece(tensor.offset, tensor.nbytes) for tensor in index])]
    arrays = (*files, *tensor_arrays(files, index))
    manifest = intake.finished(store.Manifest(framework="custom", entry="", info=INFO, arrays=arrays))
    published = repository.publish(path.stem, manifest, LAB.public, LAB.sign(store.signed_message(manifest)))
    intake.settle()
    return published


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def copy_durably(source: Path, target: Path) -> None:
    subprocess.run(["cp", source, target], check=True)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def publishing(path: Path, folder: Path, rounds: int) -> dict[str, object]:
    copies, publishes = [], []
    for turn in range(rounds):
        target, data = folder / "copy", folder / f"publish-{turn}"
        copies.append(timed(lambda target=target: copy_durably(path, target)))
        target.unlink()
        with store.Repository.open(data) as repository:
            publishes.append(timed(lambda repository=repository: publish(repository, path)))
        shutil.rmtree(data)
        os.sync()
    return row(f"publish {path.name}, durable", "cp + fsync", copies, publishes)


def loading(path: Path, folder: Path, rounds: int) -> Iterator[dict[str, object]]:
    with store.Repository.open(folder / "loading") as repository:
        publish(repository, path)
    theirs = {"safetensors.numpy": "numpy", "safetensors.torch, lazy": "torch"}
    seconds: dict[str, list[float]] = {side: [] for side in (*SIDES.values(), *theirs.values())}
    sums = set()
    for _ in range(rounds):
        for side, taken in seconds.items():
            arguments = [str(folder / "loading"), path.stem] if side.startswith("tether") else [str(path)]
            took = in_a_fresh_process(side, *arguments)
            taken.append(took.seconds)
            sums.add(round(took.total))
    if max(sums) - min(sums) > 1 + 1e-4 * max(map(abs, sums)):
        raise SystemExit(f"the sides did not sum the same weights: {sums}")
    for name, side in SIDES.items():
        for reference, other in theirs.items():
            yield row(f"load {path.name}, {name}", reference, seconds[other], seconds[side])


def loading_encrypted(path: Path, folder: Path, rounds: int) -> Iterator[dict[str, object]]:
    """Beside the plain one, which lies in `folder / "loading"`, and beside the memory that values want which can't be mapped."""
    plain, sealed = folder / "loading", folder / "encrypted" / "store"
    with store.Repository.open(sealed) as repository:
        publish_encrypted(repository, path)
    touched: list[float] = []
    for name, (theirs, ours) in ENCRYPTED.items():
        took: tuple[list[Took], list[Took]] = [], []
        for _ in range(rounds):
            took[0].append(in_a_fresh_process(theirs, str(plain), path.stem))
            took[1].append(in_a_fresh_process(ours, str(sealed), path.stem))
        yield row_of(f"load {path.name}, encrypted, {name}", "plain", *took)
        touched += [each.memory for each in took[1] if each.memory]
    yield touching(path.stat().st_size, touched)
    shutil.rmtree(folder / "encrypted")


def touching(nbytes: int, seconds: list[float]) -> dict[str, object]:
    what = f"memory: touching {nbytes // MIB} MiB, in the same minutes"
    text = f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
    print(f"{what}: {text}", file=sys.stderr)
    return {"what": what, "reference": "", "ratio": None, "text": text, "ours": seconds}


class Took(NamedTuple):
    """What a process that loads measured of itself."""

    seconds: float
    processors: float
    """Seconds of all its threads."""
    total: float
    """The sum of all weights."""
    memory: float
    """Seconds for new memory that was touched before."""


def median(runs: list[Took]) -> Took:
    """Of each figure."""
    return Took(*map(statistics.median, zip(*runs, strict=True)))


def in_a_fresh_process(side: str, *arguments: str) -> Took:
    said = subprocess.run([sys.executable, HERE / "loading.py", side, *arguments], check=True, capture_output=True, text=True)
    return Took(*map(float, said.stdout.split()))


def row_of(what: str, reference: str, theirs: list[Took], ours: list[Took]) -> dict[str, object]:
    text = f"; processors {median(ours).processors:.3f} s against {median(theirs).processors:.3f} s"
    return row(what, reference, [each.seconds for each in theirs], [each.seconds for each in ours], text)


def verifying(path: Path, folder: Path, rounds: int) -> dict[str, object]:
    with store.Repository.open(folder / "loading", read_only=True) as repository:
        took = [timed(repository.verify) for _ in range(rounds)]
    rate = path.stat().st_size / statistics.median(took) / 1e9
    return {"what": f"verify {path.name}", "reference": "", "ratio": None, "text": f"{rate:.2f} GB/s on {os.cpu_count()} cores"}


def row(what: str, reference: str, theirs: list[float], ours: list[float], more: str = "") -> dict[str, object]:
    """`ratio`: speed as a multiple of the reference's."""
    ratio = statistics.median(one / two for one, two in zip(theirs, ours, strict=True))
    text = f"{statistics.median(ours):.3f} s against {statistics.median(theirs):.3f} s{more}"
    print(f"{what}: {ratio:.2f} × {reference} ({text})", file=sys.stderr)
    return {"what": what, "reference": reference, "ratio": ratio, "text": text, "theirs": theirs, "ours": ours}


def second_versions(folder: Path) -> Iterator[dict[str, object]]:
    for found in versions.rows(folder):
        what = f"second version, {found['changed']} changed, header {found['header']} B longer, {found['format']}"
        print(f"{what}: {found['share']:.1%} sent", file=sys.stderr)
        yield {"what": what, "reference": "full size", "ratio": found["share"], "text": f"of {int(str(found['nbytes'])) // MIB} MiB"}


def streamed(folder: Path, nbytes: int) -> Iterator[dict[str, object]]:
    for found in streaming.rows(folder, nbytes):
        print(f"{found['what']}: {found['ratio']:.2f} × {found['reference']} ({found['text']})", file=sys.stderr)
        yield found


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| what | reference | × | |", "|---|---|---|---|"]
    for each in rows:
        ratio = "" if each["ratio"] is None else f"**{float(str(each['ratio'])):.2f}**"
        lines.append(f"| {each['what']} | {each['reference']} | {ratio} | {each['text']} |")
    return "\n".join(lines)


def beside_the_file(path: Path, folder: Path, rounds: int) -> Iterator[dict[str, object]]:
    yield publishing(path, folder, min(rounds, 5))
    yield from loading(path, folder, rounds)
    yield verifying(path, folder, 3)


def large(folder: Path, nbytes: int, rounds: int) -> Iterator[dict[str, object]]:
    path = models.write_safetensors(folder / "large" / "large.safetensors", models.large(nbytes))
    yield from beside_the_file(path, folder, rounds)
    yield from loading_encrypted(path, folder, rounds)
    shutil.rmtree(folder / "loading")


def small(folder: Path, rounds: int) -> Iterator[dict[str, object]]:
    path = models.write_safetensors(folder / "small" / "small.safetensors", models.small())
    yield from beside_the_file(path, folder, rounds)
    shutil.rmtree(folder / "loading")


def measure(folder: Path, nbytes: int, rounds: int, parts: Collection[str]) -> Iterator[dict[str, object]]:
    if "large" in parts:
        yield from large(folder, nbytes, rounds)
    if "small" in parts:
        yield from small(folder, rounds)
    if "versions" in parts:
        yield from second_versions(folder)
    if "streaming" in parts:
        yield from streamed(folder, nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nbytes", type=int, default=1 << 30, help="of the large model")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of it; may be given again  [default: all]")
    parser.add_argument("--folder", type=Path, help="on the disk to measure  [default: a temporary one]")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "store.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tether-bench-", dir=options.folder) as folder:
        rows = list(measure(Path(folder), options.nbytes, options.rounds, options.only or PARTS))
    text = table(rows)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "tether": tether.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "table": text, "rows": rows}, indent=1))
    print(f"{machine}\n\n{text}")


if __name__ == "__main__":
    main()
