"""Where the weights of a model lie in its files: each format's tables read by ourselves, nothing executed, no framework imported.

A module of this package knows one format and has `index(path, name, sink)`: an iterator of `StoredTensor`. `path` is the file (the
folder, for a SavedModel), `name` what its tensors have as `file` (`""` for the SavedModel's folder: its files follow from there), `sink`
takes the tensors that do not lie there as plain arrays. What it yields is checked here: names, sizes, places, number, overlaps. It raises
`HostileModelError` for what only an attack writes, `BadModelError` for all else that is wrong: a custom model may hold files that merely
look like weights.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from tether.errors import BadModelError, HostileModelError, NoModelFileError, TetherError
from tether.runtimes import protobuf
from tether.runtimes import tensors as arrays
from tether.runtimes.weights.limits import CONVERTED, MAX_TENSORS, checked
from tether.runtimes.weights.sinks import Sink
from tether.types import ModelFormat, StoredTensor

__all__ = ["CONVERTED", "boundaries", "read_index"]


class _Reader(NamedTuple):
    module: str
    views: bool = False
    """Whether its tensors may be views of one storage, and so overlap."""


_ONNX, _TORCH, _KERAS = _Reader("onnx"), _Reader("torch_archives", views=True), _Reader("keras_files")
_NUMPY, _SAFETENSORS, _SAVEDMODEL = _Reader("numpy_files"), _Reader("safetensors"), _Reader("savedmodel")
_FORMATS: dict[ModelFormat, tuple[_Reader, tuple[str, ...]]] = {
    "onnx": (_ONNX, (".onnx",)),
    "pt2": (_TORCH, (".pt2", ".pt", ".pts", ".pth", ".torchscript")),
    "torchscript": (_TORCH, (".pt", ".pt2", ".pts", ".pth", ".torchscript")),
    "keras": (_KERAS, (".keras",)),
}
"""Format → its reader, and the suffixes of the one file that a model of it is, as its runtime has them."""
_SUFFIXES = {
    ".safetensors": _SAFETENSORS,
    ".npy": _NUMPY,
    ".npz": _NUMPY,
    ".onnx": _ONNX,
    **dict.fromkeys((".pt", ".pt2", ".pts", ".pth", ".torchscript", ".bin", ".ckpt"), _TORCH),
    **dict.fromkeys((".keras", ".h5"), _KERAS),
}
"""The files of a custom model that are looked into."""
_UNPACKED = 16
"""Times the model's own size that its converted tensors may take: an int64 of one byte takes eight, numbers that deflate well more."""
_UNPACKED_FLOOR = 64 << 20
"""What is allowed in any case: a small file of zeros deflates to a thousandth."""
_WAITING_FIELDS = 250_000
"""Of protobuf, that are read where the user waits for it: under a second. The largest models have a tenth of it, or are cut by the lab."""


def read_index(path: Path, format: ModelFormat, converted: BinaryIO | None = None) -> list[StoredTensor]:  # noqa: A002 (the field's name)
    """Where each weight of a model lies, read without executing or importing anything of the model's framework.

    `path` is the model's file or folder; `file` of a result is relative to the folder, or the file's name. Tensors whose bytes do not
    lie raw (C-contiguous, little-endian) in a file are written, decoded, to `converted` and given as lying in the file
    `.tether/tensors.bin` at that offset; without `converted` they are left out. So are strings, sparse tensors, and what zarr has no
    type for.

    Raises:
        BadModelError: a file can't be parsed, or breaks a rule of its format; HostileModelError (one of those): as only an attack does.
        NoModelFileError: a file can't be read.
        NoSpaceError, StoreError: `converted` can't be written.
    """
    return _index(path, format, converted)


def boundaries(path: Path, format: ModelFormat) -> dict[str, list[tuple[int, int]]]:  # noqa: A002 (the field's name)
    """File → (offset, nbytes) of the tensors that lie in it, sorted: where the publisher cuts. Empty where the model can't be parsed.

    It runs in the user's own process, before the lab has looked at the model: what is merely wrong with it is no error here, and HDF5 is
    not opened at all. Its library is too much code for files of strangers outside of the sandbox; the lab cuts those files.

    Raises: HostileModelError: nothing of it should travel; a link to a file elsewhere is known to be one on this machine only.
    """
    found: dict[str, set[tuple[int, int]]] = {}
    try:
        with protobuf.at_most(_WAITING_FIELDS):
            for tensor in _index(path, format, None, without=_KERAS):
                found.setdefault(tensor.file, set()).add((tensor.offset, tensor.nbytes))
    except HostileModelError:
        raise
    except (BadModelError, NoModelFileError):
        return {}
    return {file: sorted(ranges) for file, ranges in found.items()}


def _index(path: Path, format_: ModelFormat, converted: BinaryIO | None, *, without: _Reader | None = None) -> list[StoredTensor]:
    sink = Sink(converted, _UNPACKED_FLOOR + _UNPACKED * _model_nbytes(path) if converted else 0)
    try:
        found = _Index(path, sink, without).tensors(format_)
        sink.flush()
        return found
    except TetherError:  # some are OSErrors too, and say more
        raise
    except OSError as error:
        raise NoModelFileError(f"{path.name} can't be read ({error.strerror}): make it readable for this user") from error


class _Index:
    """Reads one model; files of the reader `without` are left closed."""

    def __init__(self, path: Path, sink: Sink, without: _Reader | None) -> None:
        self._path = path
        self._sink = sink
        self._without = without
        self._sizes: dict[str, int] = {}

    def tensors(self, format: ModelFormat) -> list[StoredTensor]:  # noqa: A002 (the field's name)
        if format == "custom":
            return self._custom() if self._path.is_dir() else []
        if format == "savedmodel":
            return self._read(_SAVEDMODEL, "", MAX_TENSORS)
        reader, suffixes = _FORMATS[format]
        file = arrays.only_file(self._path, suffixes)
        if file is None:
            raise BadModelError(f"{self._path.name}: has to be one {suffixes[0]} file, or a folder with exactly one")
        return self._read(reader, file.relative_to(self._path).as_posix() if self._path.is_dir() else file.name, MAX_TENSORS)

    def _custom(self) -> list[StoredTensor]:
        names = list(_weight_files(self._path))
        if not names:
            return []
        prefixes = _prefixes(names)
        found: list[StoredTensor] = []
        for name in names:
            start = self._sink.nbytes
            try:
                tensors = self._read(_SUFFIXES[PurePosixPath(name).suffix.lower()], name, MAX_TENSORS - len(found))
            except HostileModelError:
                raise
            except BadModelError:  # a custom model may hold anything: the suffix was a guess
                self._sink.rewind(start)
                continue
            found += [_renamed(tensor, prefixes[name], name) for tensor in tensors]
        return checked(found, self._file_nbytes, views=True)

    def _read(self, reader: _Reader, name: str, room: int) -> list[StoredTensor]:
        if reader == self._without:
            return []
        module: Any = importlib.import_module(f"tether.runtimes.weights.{reader.module}")
        file = self._path / name if self._path.is_dir() else self._path
        return checked(module.index(file, name, self._sink), self._file_nbytes, views=reader.views, room=room)

    def _file_nbytes(self, name: str) -> int:
        """Of a file of the model."""
        if name == CONVERTED:
            return self._sink.nbytes
        if name not in self._sizes:
            if not self._path.is_dir() and name != self._path.name:
                raise BadModelError(f"{self._path.name} keeps its weights in other files; publish the folder that holds both")
            self._sizes[name] = (self._path / name if self._path.is_dir() else self._path).stat().st_size
        return self._sizes[name]


def _renamed(tensor: StoredTensor, prefix: str, file: str) -> StoredTensor:
    """With its file's prefix; the one array of an .npy is called as its file, once."""
    name = prefix[:-1] if prefix and file.lower().endswith(".npy") else prefix + tensor.name
    return StoredTensor(name, tensor.dtype, tensor.shape, tensor.file, tensor.offset, tensor.nbytes)


def _prefixes(names: Sequence[str]) -> dict[str, str]:
    """What stands before the tensors of each file, so that those of two files never have one name: its path, with the suffix if need be."""
    if len(names) == 1:
        return {names[0]: ""}
    stems = {name: PurePosixPath(name).with_suffix("").as_posix() for name in names}
    taken = Counter(stems.values())
    taken.update({folder.as_posix() for name in names for folder in PurePosixPath(name).parents})
    return {name: f"{stem if taken[stem] == 1 else name}/" for name, stem in stems.items()}


def _weight_files(folder: Path) -> Iterator[str]:
    """The regular files below a folder that have a suffix of weights; sorted, links left out."""
    for base, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(base, name)
            if path.suffix.lower() in _SUFFIXES and path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix()


def _model_nbytes(path: Path) -> int:
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(entry.stat().st_size for entry in files)
