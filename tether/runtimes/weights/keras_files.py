"""Keras' files: `.keras` (a zip of a configuration and HDF5 weights) and HDF5 alone (`.h5`, `.weights.h5`).

HDF5 is read by h5py, which runs nothing of the file, but can be made to read other files (external links, external storage, virtual
datasets) and to load filters from the machine's plugin folder: all four are refused before a dataset is read. Without h5py (it comes with
TensorFlow) there are no tensors.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tether.errors import BadModelError, HostileModelError, TetherError
from tether.runtimes.weights import pickles, zips
from tether.runtimes.weights.keras_config import MAX_NBYTES, check_config
from tether.runtimes.weights.limits import DTYPES, MAX_RANK, MAX_TENSORS, tensor_nbytes
from tether.runtimes.weights.sinks import Sink
from tether.types import StoredTensor

__all__ = ["check", "index"]

_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_SMALL_NBYTES = 1 << 20
_MAX_DEPTH = 64
_MAX_OBJECTS = 4 * MAX_TENSORS
"""Groups and datasets: each layer has a group or two of its own."""
_FILTERS = frozenset({1, 2, 3})
"""deflate, shuffle, fletcher32: HDF5's own; others are loaded from files."""
_FREE_NBYTES = 64 << 20
_MAX_RATIO = 200
"""Times what is stored that a dataset may unpack to, as for archives."""
_SLAB_NBYTES = 64 << 20
"""Read at a time, unless one row of chunks is longer."""


class _Place(NamedTuple):
    """Where the bytes of an HDF5 file lie in the file on disk."""

    path: Path
    start: int
    nbytes: int
    label: str

    def bad(self, what: str) -> BadModelError:
        return BadModelError(f"{self.label} {what}: save the model again")

    def hostile(self, what: str) -> HostileModelError:
        return HostileModelError(f"{self.label} {what}; Keras does not write that, so it is refused")


def check(path: Path, label: str = "") -> None:
    """Refuse a `.keras` file that needs code or reads other files; before Keras loads it. `label` begins each message.

    Raises: HostileModelError, BadModelError.
    """
    _opened_archive(path, label or path.name)


def index(path: Path, name: str, sink: Sink) -> Iterator[StoredTensor]:
    """The datasets of the weights by their paths: `layers/dense/vars/0`; the configuration is checked first.

    Raises: BadModelError: damaged, or it needs classes of others; HostileModelError: it carries code, links elsewhere, or is a bomb.
    """
    if path.suffix.lower() == ".keras" or zips.is_zip(path):
        place = _opened_archive(path, path.name)
    else:
        place = _Place(path, 0, path.stat().st_size, path.name)
    if place is not None:
        yield from _Weights(place, name, sink).tensors()


def _opened_archive(path: Path, label: str) -> _Place | None:
    """Where the weights are, after everything else was looked at."""
    try:
        members = {member.name: member for member in zips.members(path)}
    except HostileModelError:
        raise
    except BadModelError as error:
        raise BadModelError(f"{label}: {error}") from None
    if _CONFIG not in members:
        raise BadModelError(f"{label}: it is an archive without {_CONFIG}, so none of Keras 3: save it with model.save('model.keras')")
    check_config(zips.read(path, members[_CONFIG], MAX_NBYTES), label)
    for member in members.values():
        if member.name == _METADATA:
            _check_metadata(zips.read(path, member, _SMALL_NBYTES), label)
        elif member.name not in {_CONFIG, _WEIGHTS}:
            _check_other(path, member, label)
    weights = members.get(_WEIGHTS)
    if weights is None:
        return None
    if weights.method != zips.STORED:
        raise BadModelError(f"{label}: {_WEIGHTS} is compressed in the archive, which Keras does not do: save the model again")
    return _Place(path, weights.data_offset, weights.nbytes, f"{label}: {_WEIGHTS}")


def _check_metadata(data: bytes, label: str) -> None:
    try:
        msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadModelError(f"{label}: {_METADATA} is not valid ({error}): save the model again") from None


def _check_other(path: Path, member: zips.Member, label: str) -> None:
    """Assets, such as vocabularies; and whatever somebody has put there."""
    if member.name.startswith("model.weights"):
        raise BadModelError(f"{label}: {member.name!r} is a form of weights that is not read: save it with model.save('model.keras')")
    found = pickles.planted(zips.read(path, member, MAX_NBYTES)) if member.nbytes else None
    if found is not None:
        raise HostileModelError(f"{label}: {member.name[:200]!r} is a pickle that names {found[:200]!r} where none belongs")


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, descriptor: int, place: _Place) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._place = place
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._place.nbytes}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._place.nbytes - self._at))
        read = os.preadv(self._descriptor, [view[:count]], self._place.start + self._at) if count else 0
        self._at += read
        return read


class _Weights:
    """The datasets of one HDF5 file."""

    def __init__(self, place: _Place, file: str, sink: Sink) -> None:
        self._place = place
        self._file = file
        self._sink = sink

    def tensors(self) -> Iterator[StoredTensor]:
        try:
            h5py: Any = importlib.import_module("h5py")  # heavy (0.2 s), and it may be missing
        except ImportError:
            return
        with (
            self._place.path.open("rb", buffering=0) as raw,
            _failures(self._place),
            h5py.File(_Window(raw.fileno(), self._place), "r") as file,
        ):
            if file.userblock_size:
                raise self._place.hostile("has something before its beginning")
            self._check_model_config(file)
            for name, dataset in self._datasets(h5py, file):
                tensor = self._tensor(h5py, name, dataset)
                if tensor is not None:
                    yield tensor

    def _check_model_config(self, file: Any) -> None:
        """An `.h5` of Keras has the configuration in an attribute."""
        if "model_config" not in file.attrs:
            return
        config = file.attrs["model_config"]
        if not isinstance(config, (str, bytes)):
            raise self._place.bad("has a configuration that is no text")
        check_config(config, self._place.label)

    def _datasets(self, h5py: Any, file: Any) -> Iterator[tuple[str, Any]]:
        """Each dataset by its path; hard links only, and each object once."""
        waiting = [("", file, 0)]
        seen = {h5py.h5o.get_info(file.id).addr}
        while waiting:
            path, group, depth = waiting.pop()
            if depth > _MAX_DEPTH:
                raise self._place.hostile(f"has groups more than {_MAX_DEPTH} deep")
            found = []
            for key in group.id:
                if group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                    raise self._place.hostile(f"has a link ({key[:200]!r}) that leads elsewhere, maybe to another file")
                child = group[key]
                address = h5py.h5o.get_info(child.id).addr
                if address in seen or isinstance(child, h5py.Datatype):
                    continue
                seen.add(address)
                if len(seen) > _MAX_OBJECTS:
                    raise self._place.hostile(f"has more than {_MAX_OBJECTS} groups and datasets")
                name = f"{path}/{key.decode('utf-8', 'replace')}" if path else key.decode("utf-8", "replace")
                if isinstance(child, h5py.Dataset):
                    yield name, child
                else:
                    found.append((name, child, depth + 1))
            waiting += reversed(found)

    def _tensor(self, h5py: Any, name: str, dataset: Any) -> StoredTensor | None:
        plan = dataset.id.get_create_plist()
        layout = plan.get_layout()
        if layout == h5py.h5d.VIRTUAL or plan.get_external_count():
            raise self._place.hostile(f"has a dataset {name[:200]!r} whose numbers are in other files")
        kinds = {plan.get_filter(at)[0] for at in range(plan.get_nfilters())} if layout == h5py.h5d.CHUNKED else set()
        if not kinds <= _FILTERS:
            raise self._place.hostile(f"has a dataset {name[:200]!r} packed by a filter that HDF5 loads from elsewhere")
        dtype = _dtype(dataset)
        if dtype is None or dataset.shape is None or len(dataset.shape) > MAX_RANK:
            return None
        shape = tuple(int(size) for size in dataset.shape)
        nbytes = tensor_nbytes(name, dtype, shape)
        offset = dataset.id.get_offset() if layout == h5py.h5d.CONTIGUOUS else None
        if offset is not None and _is_plain(dataset.dtype):
            if offset + nbytes > self._place.nbytes:
                raise self._place.bad(f"is cut off in the dataset {name[:200]!r}")
            return StoredTensor(name, dtype, shape, self._file, self._place.start + offset, nbytes)
        self._check_bomb(name, dataset, nbytes)
        return self._sink.put(name, dtype, shape, _pieces(dataset, dtype))

    def _check_bomb(self, name: str, dataset: Any, nbytes: int) -> None:
        stored = int(dataset.id.get_storage_size())
        if stored > self._place.nbytes:
            raise self._place.bad(f"is cut off in the dataset {name[:200]!r}")
        chunk = int(np.prod(dataset.chunks, dtype=object)) * dataset.dtype.itemsize if dataset.chunks else 0
        if max(nbytes, chunk) > _FREE_NBYTES + _MAX_RATIO * stored:
            raise self._place.hostile(f"has a dataset {name[:200]!r} that unpacks from {stored} bytes to {max(nbytes, chunk)}")


@contextmanager
def _failures(place: _Place) -> Iterator[None]:
    """h5py's errors for damaged files, of which there are many kinds."""
    try:
        yield
    except TetherError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        NotImplementedError,
        SystemError,
    ) as error:
        text = str(error).splitlines() or [type(error).__name__]
        raise place.bad(f"is damaged or cut off ({text[0][:200]})") from None


def _dtype(dataset: Any) -> str | None:
    """The element type by zarr's name; None for texts, structures and the like."""
    kind = dataset.dtype
    if kind.kind == "V" and kind.itemsize == 2 and kind.names is None and _label(dataset) == "bfloat16":  # noqa: PLR2004 (bytes)
        return "bfloat16"
    name = str(kind.newbyteorder("=").name)
    return name if name in DTYPES and kind.kind in "biufc" else None


def _label(dataset: Any) -> str:
    """Keras notes there what HDF5 has no type for."""
    label = dataset.attrs.get("dtype", "")
    return label if isinstance(label, str) else ""


def _is_plain(kind: np.dtype[Any]) -> bool:
    return kind.kind == "V" or kind.newbyteorder("<") == kind


def _pieces(dataset: Any, dtype: str) -> Iterator[bytes]:
    """The numbers in C order, little-endian, by whole rows of chunks, so that none is unpacked twice."""
    little = None if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
    if not dataset.shape or dataset.nbytes <= _SLAB_NBYTES:
        yield _bytes(dataset[()], little)
        return
    row = max(1, dataset.nbytes // dataset.shape[0])
    step = dataset.chunks[0] if dataset.chunks else 1
    rows = max(step, _SLAB_NBYTES // row // step * step)
    for start in range(0, dataset.shape[0], rows):
        yield _bytes(dataset[start : start + rows], little)


def _bytes(values: Any, little: np.dtype[Any] | None) -> bytes:
    array = np.asarray(values)
    return (array if little is None else array.astype(little, copy=False)).tobytes()
