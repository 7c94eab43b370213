"""Writes scikit-learn's handwritten digits as a zarr store, and reads it back: `python datasets/digits.py [FOLDER]`."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zarr

STORE = Path(__file__).with_name("digits.zarr")
SEED = 20
TEST_ROWS = 360
CHUNK_ROWS = 256
ATTRIBUTES = {
    "title": "Optical Recognition of Handwritten Digits (test part), 8 x 8 pixels",
    "source": "UCI Machine Learning Repository, as shipped by scikit-learn (sklearn.datasets.load_digits)",
    "licence": "CC BY 4.0",
    "citation": "E. Alpaydin, C. Kaynak (1998). Optical Recognition of Handwritten Digits. UCI ML Repository. doi:10.24432/C50P49",
    "scale": "pixels divided by 16: 0 is paper, 1 is ink",
}


@dataclass(frozen=True, slots=True)
class Digits:
    """The data set in memory."""

    images: npt.NDArray[np.float32]
    """`(1797, 8, 8)`, 0–1."""
    labels: npt.NDArray[np.int64]
    """`(1797,)`, 0–9."""
    test: npt.NDArray[np.int64]
    """Rows held out: no model of this folder is trained on them."""

    @property
    def train(self) -> npt.NDArray[np.int64]:
        """The other rows."""
        return np.setdiff1d(np.arange(len(self.labels)), self.test)


def make(folder: Path = STORE) -> Path:
    """Write the store, where there is none yet, and return its path. The same bytes each time."""
    from sklearn.datasets import load_digits  # here: it takes a second, and only the first use needs it

    images, labels = load_digits(return_X_y=True)
    test = np.sort(np.random.default_rng(SEED).choice(len(labels), TEST_ROWS, replace=False))
    arrays = {
        "images": (images.reshape(-1, 8, 8) / 16).astype("f4"),
        "labels": labels.astype("i8"),
        "test": test.astype("i8"),
    }
    # Written aside and renamed: a run that is broken off leaves no half a store, and of two at once the first one's stays.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        draft = Path(scratch, folder.name)
        _write(draft, arrays)
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / "zarr.json").exists():
                raise
    return folder


def _write(folder: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> None:
    group = zarr.create_group(str(folder), attributes=ATTRIBUTES)
    dimensions = {"images": ("row", "y", "x"), "labels": ("row",), "test": ("held_out",)}
    for name, values in arrays.items():
        chunks = (CHUNK_ROWS, *values.shape[1:])
        group.create_array(name, data=values, chunks=chunks, dimension_names=dimensions[name])


def load(folder: Path = STORE) -> Digits:
    """The data set; the store is made first where it is not there yet."""
    if not (folder / "zarr.json").exists():
        make(folder)
    group = zarr.open_group(str(folder), mode="r")
    return Digits(group["images"][:], group["labels"][:], group["test"][:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=STORE)
    folder = parser.parse_args().folder
    digits = load(folder)
    print(
        f"{folder}: images {digits.images.shape} {digits.images.dtype}, {len(digits.train)} rows to train on, {len(digits.test)} held out"
    )


if __name__ == "__main__":
    main()
