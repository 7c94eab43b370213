"""A SavedModel's variables, read while TensorFlow builds the graph, and while the files come.

TensorFlow restores when everything is there, by copying all variables in one thread into memory that is new to the process. Here their
bytes are read into such memory as they come, by several threads, and the variables get that memory itself, not a copy. What the checksums
of the checkpoint are for was seen to before: the files are verified, blob by blob, against what the publisher signed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.arrivals import Arrivals
from tether.runtimes.savedmodel_objects import UnusualModelError, object_nodes, variables
from tether.runtimes.weights import savedmodel
from tether.types import Array, StoredTensor

__all__ = ["UnusualModelError", "restoring"]

_GRAPH, _INDEX = "saved_model.pb", "variables/variables.index"
_READ = (_GRAPH, "fingerprint.pb", "debug/saved_model_debug_info.pb", _INDEX)
"""What TensorFlow and we read of it before the weights; the second and the third need not be there."""
_ALIGN = 64
"""Bytes: what TensorFlow wants of memory that it uses without copying."""
_LARGE = 1 << 20
"""Bytes from which memory of its own is worth more than a copy."""
_PIECE = 4 << 20
"""Bytes read at once: as large as the blobs that come."""
_THREADS = max(1, min(4, os.cpu_count() or 1))
"""Half of the time that reading takes is the system's, which gives new memory page by page, to each thread on its own."""


@contextmanager
def restoring(tf: Any, folder: Path, arrivals: Arrivals) -> Iterator[Any]:
    """What `tf.saved_model.load` gives, without values in its variables yet: they are there when the `with` has ended.

    Raises: UnusualModelError: it has to be loaded by TensorFlow alone; BadModelError; OSError; what TensorFlow raises.
    """
    for file in _READ:
        _await(folder, file, arrivals)
    savedmodel.check(folder)  # before TensorFlow sees it
    nodes, bundle = _nodes(folder), _bundle(folder)
    with _reading(folder, arrivals, bundle.tensors) as arrays:
        options = tf.saved_model.LoadOptions(experimental_skip_checkpoint=True)
        root = tf.saved_model.load(str(folder), options=options)
        empty = _variables(tf, root, nodes)
        yield root
        values = {key: _tensor(tf, array) for key, array in arrays}
        # Which is whose is often told by the last bytes of all, so that it can't be asked before.
        for number, weight in variables(nodes, _checkpoint(folder, arrivals, bundle), bundle.tensors).items():
            empty[number].assign(values[weight.name], read_value=False)


def _await(folder: Path, file: str, arrivals: Arrivals) -> None:
    path = folder / file
    if path.is_file():
        arrivals.wait(file, path.stat().st_size)


def _nodes(folder: Path) -> Sequence[Any]:
    """The objects of the model. TensorFlow reads the file again: it is small where variables hold the weights."""
    from tensorflow.core.protobuf import saved_model_pb2  # heavy: all of TensorFlow

    return object_nodes(saved_model_pb2.SavedModel.FromString((folder / _GRAPH).read_bytes()))


def _bundle(folder: Path) -> savedmodel.Bundle:
    """What we can't read, TensorFlow may; it has better words for what is wrong."""
    try:
        return savedmodel.bundle(folder)
    except HostileModelError:
        raise
    except BadModelError as error:
        raise UnusualModelError("its checkpoint can't be read by ourselves") from error


def _checkpoint(folder: Path, arrivals: Arrivals, bundle: savedmodel.Bundle) -> Any:
    """The objects of the checkpoint, when they came."""
    from tensorflow.core.protobuf import trackable_object_graph_pb2  # heavy: all of TensorFlow

    if bundle.graph is None:
        raise UnusualModelError("its checkpoint has no objects")
    arrivals.wait(bundle.graph.file, bundle.graph.offset + bundle.graph.nbytes)
    return trackable_object_graph_pb2.TrackableObjectGraph.FromString(bundle.object_graph(folder))


def _variables(tf: Any, root: Any, nodes: Sequence[Any]) -> dict[int, Any]:
    """Number of a node → the variable that TensorFlow made of it, of all that are variables. Raises: UnusualModelError."""
    found = {0: root}
    waiting = [0]
    while waiting:
        here = waiting.pop()
        if nodes[here].WhichOneof("kind") != "user_object":
            continue  # nothing below it is a variable that is not below a user's object as well
        children = tf.train.TrackableView.children(found[here])
        for child in nodes[here].children:
            if child.local_name in children and child.node_id not in found:
                found[child.node_id] = children[child.local_name]
                waiting.append(child.node_id)
    wanted = [number for number, node in enumerate(nodes) if node.WhichOneof("kind") == "variable"]
    if not all(isinstance(found.get(number), tf.Variable) for number in wanted):
        raise UnusualModelError("TensorFlow has other names for its variables")
    return {number: found[number] for number in wanted}


def _tensor(tf: Any, array: Array) -> Any:
    """As TensorFlow has it: the memory itself where it is large, which nobody else writes to."""
    with tf.device("CPU"):
        if array.nbytes >= _LARGE and array.dtype == ml_dtypes.bfloat16:
            return tf.bitcast(_shared(tf, array.view(np.uint16)), tf.bfloat16)
        if array.nbytes >= _LARGE and array.dtype.isbuiltin == 1:
            return _shared(tf, array)
        return tf.convert_to_tensor(array)


def _shared(tf: Any, array: Any) -> Any:
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


# --- reading


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range of a file that is read at once: a part of a large tensor, or some small ones."""

    file: str
    start: int
    end: int
    done: list[StoredTensor]
    """Those that are whole with it."""
    target: Array | None = None
    """Where the part of a large one belongs."""


@dataclass(slots=True)
class _Plan:
    """What is read in which order."""

    pieces: list[_Piece] = field(default_factory=list)
    large: dict[str, Array] = field(default_factory=dict)

    def add(self, tensor: StoredTensor) -> None:
        if tensor.nbytes >= _LARGE:
            self._add_large(tensor)
        else:
            self._add_small(tensor)

    def _add_large(self, tensor: StoredTensor) -> None:
        self.large[tensor.name] = flat = _aligned(tensor.nbytes)
        for start in range(0, tensor.nbytes, _PIECE):
            end = min(start + _PIECE, tensor.nbytes)
            done = [tensor] if end == tensor.nbytes else []
            self.pieces.append(_Piece(tensor.file, tensor.offset + start, tensor.offset + end, done, flat[start:end]))

    def _add_small(self, tensor: StoredTensor) -> None:
        last, end = self.pieces[-1] if self.pieces else None, tensor.offset + tensor.nbytes
        if last is not None and last.target is None and last.file == tensor.file and end - last.start <= _PIECE:
            self.pieces[-1] = _Piece(last.file, last.start, max(last.end, end), [*last.done, tensor])
        else:
            self.pieces.append(_Piece(tensor.file, tensor.offset, end, [tensor]))

    def arrays(self, contents: Iterable[Array]) -> Iterator[tuple[str, Array]]:
        """The tensors by name; `contents`: of the pieces, in their order."""
        for piece, data in zip(self.pieces, contents, strict=True):
            for tensor in piece.done:
                start = tensor.offset - piece.start
                flat = self.large.pop(tensor.name, None)
                if flat is None:
                    flat = data[start : start + tensor.nbytes]
                yield tensor.name, flat.view(np.dtype(getattr(ml_dtypes, tensor.dtype, tensor.dtype))).reshape(tensor.shape)


@contextmanager
def _reading(folder: Path, arrivals: Arrivals, tensors: Mapping[str, StoredTensor]) -> Iterator[Iterator[tuple[str, Array]]]:
    """Gives the tensors in the order of their bytes. They are read from the beginning of the `with` on, ahead of who takes them."""
    plan = _Plan()
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.file, tensor.offset)):
        plan.add(tensor)
    pool = ThreadPoolExecutor(_THREADS, "restore")
    try:
        yield plan.arrays(pool.map(lambda piece: _read(folder, arrivals, piece), plan.pieces))
    finally:
        # Not waited for: those that read on write to memory that is theirs, and their bytes may be far away.
        pool.shutdown(wait=False, cancel_futures=True)


def _aligned(nbytes: int) -> Array:
    room = np.empty(nbytes + _ALIGN, np.uint8)
    begin = -room.ctypes.data % _ALIGN
    return room[begin : begin + nbytes]


def _read(folder: Path, arrivals: Arrivals, piece: _Piece) -> Array:
    """The bytes of a piece, once they are there. Raises: OSError; what `arrivals` raises."""
    arrivals.wait(piece.file, piece.end)
    target = np.empty(piece.end - piece.start, np.uint8) if piece.target is None else piece.target
    descriptor = os.open(folder / piece.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(target):
            count = os.preadv(descriptor, [target.data[done:]], piece.start + done)
            if not count:
                raise BadModelError(f"{piece.file} ends before byte {piece.end}: get the model again")
            done += count
    finally:
        os.close(descriptor)
    return target
