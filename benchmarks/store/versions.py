"""What a second version costs when half of the layers changed: bytes stored and bytes sent, as shares of the whole."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import models

from tether.client.publishing import DraftFile, cut_model, model_sources

CHANGES = ("last half", "every other", "random half")


def chosen(change: str, count: int) -> list[int]:
    match change:
        case "last half":
            return list(range(count // 2, count))
        case "every other":
            return list(range(0, count, 2))
        case _:
            return sorted(random.Random("half").sample(range(count), count // 2))


def sent_nbytes(before: Path, after: Path) -> tuple[int, int]:
    """What a publish of `after` has to send to a lab that has `before`, and its size."""
    known = {blob.digest for file in _cut(before) for blob in file.blobs}
    files = _cut(after)
    wanted = {blob.digest: blob.nbytes for file in files for blob in file.blobs if blob.digest not in known}
    return sum(wanted.values()), sum(file.nbytes for file in files)


def _cut(path: Path) -> list[DraftFile]:
    return cut_model(path, model_sources(path)[1])


def rows(folder: Path, count: int = 32) -> Iterator[dict[str, object]]:
    """One row for each format, kind of change and header: `share` of the bytes that are new."""
    first = models.layers(count)
    for name, write in models.FORMATS.items():
        before = write(folder / f"{name}-before", first, 0)
        for change in CHANGES:
            second = models.tuned(first, chosen(change, count))
            for more in (0, 64):
                after = write(folder / f"{name}-{change.replace(' ', '-')}-{more}", second, more)
                sent, whole = sent_nbytes(before, after)
                yield {"format": name, "changed": change, "header": more, "share": sent / whole, "nbytes": whole}
