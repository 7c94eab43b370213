"""PyTorch's archives: `torch.save` of a state dict, TorchScript, `.pt2` of torch.export. Members that are pickles are read, never loaded.

All three are zip archives below one folder. Storages are members of their own, stored uncompressed and aligned to 64 bytes, so most
tensors lie in place; which tensor is which part of which storage is said by pickles (`data.pkl`, `constants.pkl`) or, in a `.pt2`, by
JSON. Every other pickle that a loader would run (sample inputs, debug information, custom objects) is held against the same list of
names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.weights import pickles, zips
from tether.runtimes.weights.limits import DTYPES, MAX_METADATA_NBYTES
from tether.runtimes.weights.pickles import Call, Global, PersistentId
from tether.runtimes.weights.sinks import Sink
from tether.runtimes.weights.strided import View, elements
from tether.types import StoredTensor

__all__ = ["index"]

_SAVE_AGAIN = "open it with the PyTorch that wrote it and save it again: torch.save(torch.load(path, weights_only=True), path)"
_STORAGE_DTYPES = {
    "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64",
    "BoolStorage": "bool", "HalfStorage": "float16", "FloatStorage": "float32", "DoubleStorage": "float64", "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_JSON_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 10: "complex64", 11: "complex128",
    12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz",
    34: "uint32", 35: "uint64",
}  # fmt: skip
"""torch._export.serde.schema.ScalarType → zarr's names."""
_STRIDED = 7
_SYNONYMS = {"half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32", "long": "int64"}
_REBUILD = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_WRAPPERS = {"_rebuild_parameter", "_rebuild_parameter_with_state", "restore_type_tag", "build_tensorlist"}
_MAX_STEPS = 400_000
"""Values that are looked at for tensors: a pickle of 1 KB can describe 2^100 of them by sharing."""
_MAX_DEPTH = 200
_SMALL_NBYTES = 1024
"""What members like `byteorder` and `version` may have."""
_STORAGE = re.compile(
    r"(?:data|constants|traced_inputs|(?:[\w.]+)_tensors)/\d+|data/(?:weights/weight|constants/tensor)_\d+|xl_model_weights/.+"
)
"""Members that are the bytes of numbers: nothing else is ever made of them."""
_CONFIG = re.compile(r"data/(?:weights/(?P<weights>.+)_weights|constants/(?P<constants>.+)_constants)_config\.json")
_NESTED = re.compile(r"data/(?:sample_inputs|weights|constants)/.+\.pt|serialized_\w+\.pt|data/constants/custom_obj_.+")
"""Members that are archives of `torch.save` themselves."""
_NESTED_WEIGHTS = re.compile(r"data/(?:weights|constants)/.+\.pt|serialized_(?:state_dict|constants)\.pt")
"""Those of them with weights: how a `.pt2` kept them before torch 2.9."""
_CODE_ON_FILES = re.compile(rb"\b(?:torch|aten|ops\s*\.\s*\w+)\s*\.\s*(?:save|from_file)\b")
"""Operations of TorchScript that read or write files."""
_GRAPH_ON_FILES = re.compile(rb"torch\.ops\.aten\.(?:save|from_file)\b|(?<!\\)(?:\\\\)*\\u00[2-7]")
"""The same in the graph of a `.pt2`; or plain letters written as escapes of JSON, which no exporter does."""
_OVERLAP = 64


class _PayloadSize(msgspec.Struct):
    as_int: int | None = None


class _PayloadTensor(msgspec.Struct):
    dtype: int
    sizes: list[_PayloadSize]
    strides: list[_PayloadSize]
    storage_offset: _PayloadSize
    layout: int


class _Payload(msgspec.Struct):
    path_name: str
    use_pickle: bool
    tensor_meta: _PayloadTensor | None = None


class _Config(msgspec.Struct):
    config: dict[str, _Payload]


class _Storage(NamedTuple):
    member: zips.Member
    dtype: str
    nbytes: int
    """Of it that are elements."""


class _Reading(NamedTuple):
    """One run over an archive: what its parts need to know."""

    path: Path
    file: str
    sink: Sink
    budget: _Budget
    names: _Names


class _Budget:
    """Bytes that may be read to convert tensors: views may be many, each over all of a storage."""

    def __init__(self, file_nbytes: int) -> None:
        self._left = 16 * file_nbytes + (64 << 20)

    def take(self, nbytes: int, name: str) -> None:
        self._left -= nbytes
        if self._left < 0:
            raise HostileModelError(
                f"tensor {name[:200]!r} and those before it are views of far more than the file has: save contiguous tensors"
            )


class _Names:
    """Makes names of tensors differ: parts are joined by dots, and a part may have dots itself."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, name: str) -> str:
        found, count = name, 1
        while found in self._taken:
            count += 1
            found = f"{name}#{count}"
        self._taken.add(found)
        return found


def index(path: Path, name: str, sink: Sink) -> Iterator[StoredTensor]:
    """The tensors of an archive: `conv1.weight` of a state dict, attribute paths of a TorchScript module, names of parameters of a `.pt2`.

    Raises: BadModelError: no archive, the form before torch 1.6, big-endian, a pickle that needs more than weights do; HostileModelError.
    """
    if not zips.is_zip(path):
        _refuse_unzipped(path)
    reading = _Reading(path, name, sink, _Budget(path.stat().st_size), _Names())
    archive = _Archive(reading, zips.members(path))
    yield from archive.tensors()


def _refuse_unzipped(path: Path) -> None:
    """Always raises; it says more where the file is a pickle, or several of them (as torch wrote before 1.6)."""
    with path.open("rb") as file:
        data = file.read(MAX_METADATA_NBYTES)
    at = 0
    for _ in range(5):  # magic number, protocol, system, the object, its storages
        if at >= len(data):
            break
        at = pickles.check_first(data, path.name, at)
    raise BadModelError(
        f"{path.name} is not an archive of torch.save (it is pickled as before torch 1.6, or something else): {_SAVE_AGAIN}"
    )


class _Archive:
    """One archive, the file or one that is a member of it."""

    def __init__(self, reading: _Reading, members: list[zips.Member], label: str = "") -> None:
        self._reading = reading
        self._label = label or reading.path.name
        root = members[0].name.partition("/")[0] + "/" if members else ""
        if not all(member.name.startswith(root) for member in members):
            root = ""  # the first form of a .pt2
        self._members = {member.name[len(root) :]: member for member in members}
        if len({name.lower() for name in self._members}) != len(self._members):
            raise HostileModelError(
                f"{self._label} has members that differ in capitals only, which torch takes for one: export the model again"
            )
        self._values: dict[str, Any] = {}
        """Of the pickles that were read."""
        self._script = "constants.pkl" in self._members
        self._exported = "archive_format" in self._members or "serialized_exported_program.json" in self._members

    def tensors(self) -> Iterator[StoredTensor]:
        if "data.pkl" not in self._members and not self._exported:
            raise BadModelError(f"{self._label} is a zip archive, but none of torch.save, torch.jit.save or torch.export.save")
        self._check_byteorder()
        for name, member in self._members.items():
            self._check_member(name, member)
        if self._exported:
            yield from self._exported_tensors()
            return
        yield from self._pickled_tensors("data.pkl", "data/", "")
        if self._script:
            yield from self._pickled_tensors("constants.pkl", "constants/", "CONSTANTS.c")

    # --- what else is in it

    def _check_byteorder(self) -> None:
        member = self._members.get("byteorder")
        order = self._read(member, _SMALL_NBYTES).strip() if member else b"little"
        if order != b"little":
            raise BadModelError(
                f"{self._label} was saved on a big-endian machine ({order[:20]!r}): load and save it on a little-endian one"
            )

    def _check_member(self, name: str, member: zips.Member) -> None:
        """Refuse what a loader would run. Storages are numbers and nothing else; the tensors of pickles are looked for later."""
        if _STORAGE.fullmatch(name):
            return
        if name.startswith("data/aotinductor/"):
            raise BadModelError(f"{self._label} has compiled code ({name[:200]!r}): export it with torch.export.save alone")
        if _NESTED.fullmatch(name) and self._exported:
            self._check_nested(name, member)
        elif name.endswith((".pkl", "_pkl")):
            self._values[name] = self._check_pickle(name, member)
        elif name.startswith(("code/", "models/")) or name.endswith("exported_program.json"):
            self._check_operations(name, member)
        elif _CONFIG.fullmatch(name):
            self._check_payloads(name, member)
        else:
            self._check_other(name, member)

    def _check_pickle(self, name: str, member: zips.Member) -> Any:
        return pickles.check(self._read(member), f"{self._label}: {name[:200]!r}", script=self._script)

    def _check_other(self, name: str, member: zips.Member) -> None:
        """Versions, extra files and whatever somebody has put there."""
        if member.nbytes > MAX_METADATA_NBYTES:
            raise BadModelError(
                f"{self._label}: {name[:200]!r} has {member.nbytes} bytes and is no tensor: publish it in a file of its own"
            )
        found = pickles.planted(self._read(member)) if member.nbytes else None
        if found is not None:
            raise HostileModelError(f"{self._label}: {name[:200]!r} is a pickle that names {found[:200]!r} where none belongs")

    def _check_operations(self, name: str, member: zips.Member) -> None:
        """Code of TorchScript, or the graph of a `.pt2`, that reads or writes files."""
        if member.nbytes <= MAX_METADATA_NBYTES:
            self._check_other(name, member)
        pattern = _CODE_ON_FILES if name.startswith("code/") else _GRAPH_ON_FILES
        last = b""
        for chunk in zips.chunks(self._reading.path, member):
            found = pattern.search(last + chunk)
            if found:
                raise HostileModelError(f"{self._label}: {name[:200]!r} uses {found[0][:80]!r}, which reaches files: no model needs that")
            last = chunk[-_OVERLAP:]

    def _check_payloads(self, name: str, member: zips.Member) -> None:
        """Weights and constants of a `.pt2` that are pickled: subclasses of tensors, custom objects."""
        folder = name.rpartition("/")[0]
        for payload in self._config(name, member).config.values():
            part = self._members.get(f"{folder}/{payload.path_name}")
            if part is None:
                raise BadModelError(
                    f"{self._label}: {payload.path_name[:200]!r}, which {name[:200]!r} names, is not in it: save the model again"
                )
            if payload.use_pickle or not payload.path_name.startswith(("weight_", "tensor_")):
                self._check_object(payload.path_name, part)

    def _check_object(self, name: str, member: zips.Member) -> None:
        """An object of its own: an archive of torch.save, or a bare pickle."""
        if self._is_archive(member):
            self._check_nested(name, member)
        else:
            self._check_pickle(name, member)

    def _is_archive(self, member: zips.Member) -> bool:
        return next(zips.raw(self._reading.path, member), b"").startswith(b"PK\x03\x04")

    def _check_nested(self, name: str, member: zips.Member) -> None:
        """Read an archive within this one to its end, and keep nothing of it."""
        reading = self._reading._replace(names=_Names(), sink=Sink(None, 0))
        for _ in self._nested(name, member, reading):
            pass

    def _nested(self, name: str, member: zips.Member, reading: _Reading) -> Iterator[StoredTensor]:
        if self._label != reading.path.name:
            raise HostileModelError(f"{self._label} has an archive in an archive ({name[:200]!r}), which torch does not write")
        if not member.nbytes:
            return  # written where there is nothing to say
        label = f"{self._label}: {name[:200]!r}"
        if not self._is_archive(member):
            raise BadModelError(f"{label} should be an archive of torch.save and is none: save the model again")
        yield from _Archive(reading, zips.members(reading.path, member), label).tensors()

    # --- tensors

    def _exported_tensors(self) -> Iterator[StoredTensor]:
        configs = [(name, member) for name, member in self._members.items() if _CONFIG.fullmatch(name)]
        models = {match["weights"] for name, _ in configs if (match := _CONFIG.fullmatch(name)) and match["weights"]}
        for name, member in configs:
            match = _CONFIG.fullmatch(name)
            model = (match["weights"] or match["constants"]) if match else ""
            yield from self._payload_tensors(name, member, f"{model}." if len(models) > 1 else "")
        for name, member in self._members.items():
            if _NESTED_WEIGHTS.fullmatch(name):
                yield from self._nested(name, member, self._reading)

    def _config(self, name: str, member: zips.Member) -> _Config:
        try:
            return msgspec.json.decode(self._read(member), type=_Config)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadModelError(f"{self._label}: {name[:200]!r} is not valid ({error}): save the model again") from None

    def _payload_tensors(self, config: str, member: zips.Member, prefix: str) -> Iterator[StoredTensor]:
        folder = config.rpartition("/")[0]
        dtypes: dict[str, str] = {}
        for name, payload in self._config(config, member).config.items():
            meta = payload.tensor_meta
            part = self._members[f"{folder}/{payload.path_name}"]
            if payload.use_pickle or meta is None or not payload.path_name.startswith(("weight_", "tensor_")):
                continue
            if meta.layout != _STRIDED:
                raise BadModelError(f"tensor {name[:200]!r} is sparse; call .to_dense() before the export")
            dtype = _JSON_DTYPES.get(meta.dtype)
            if dtype is None:
                continue
            if dtypes.setdefault(payload.path_name, dtype) != dtype or part.nbytes % DTYPES[dtype]:
                raise HostileModelError(f"tensor {name[:200]!r} lies in bytes that are not {dtype}: export the model again from its source")
            numbers = [size.as_int for size in meta.sizes], [size.as_int for size in meta.strides], meta.storage_offset.as_int
            tensor = self._tensor(f"{prefix}{name}", _Storage(part, dtype, part.nbytes), View.of(name, numbers))
            if tensor is not None:
                yield tensor

    def _pickled_tensors(self, name: str, folder: str, prefix: str) -> Iterator[StoredTensor]:
        for label, call in _walk(self._values[name], self._label):
            tensor = self._pickled_tensor(f"{prefix}{label}" or "tensor", call, folder)
            if tensor is not None:
                yield tensor

    def _pickled_tensor(self, name: str, call: Call, folder: str) -> StoredTensor | None:
        if len(call.args) < 4 or not isinstance(call.args[0], PersistentId):  # noqa: PLR2004 (storage, offset, shape, strides)
            raise BadModelError(f"{self._label}: tensor {name[:200]!r} has no storage: save the model again")
        offset, shape, strides = (_plain(value) for value in call.args[1:4])
        storage = self._storage(name, call.args[0], folder)
        dtype = _dtype(call) or storage.dtype
        if dtype not in DTYPES:  # quantized, or an element type that zarr lacks
            return None
        return self._tensor(name, storage._replace(dtype=dtype), View.of(name, (shape, strides, offset)))

    def _storage(self, name: str, identifier: PersistentId, folder: str) -> _Storage:
        value = identifier.value
        if not isinstance(value, tuple) or len(value) < 5 or value[0] != "storage" or not isinstance(value[1], Global):  # noqa: PLR2004
            raise BadModelError(f"{self._label}: tensor {name[:200]!r} has a storage that is none: save the model again")
        _, kind, key, _, count = value[:5]
        member = self._members.get(f"{folder}{key}") if isinstance(key, str) else None
        if member is None:
            raise BadModelError(f"{self._label}: the storage {str(key)[:80]!r} of tensor {name[:200]!r} is not in it: save the model again")
        dtype = _STORAGE_DTYPES.get(kind.name, "uint8" if kind.name == "UntypedStorage" else "")
        if dtype and (type(count) is not int or member.nbytes // DTYPES[dtype] != count):
            raise HostileModelError(
                f"{self._label}: tensor {name[:200]!r} claims a storage of {str(count)[:40]} {dtype}, there are {member.nbytes} "
                "bytes: export it again"
            )
        return _Storage(member, dtype, member.nbytes)

    def _tensor(self, name: str, storage: _Storage, view: View) -> StoredTensor | None:
        """In place where it can be, else in the sink."""
        itemsize = DTYPES[storage.dtype]
        view.check(name, storage.nbytes // itemsize, itemsize)
        name = self._reading.names.unique(name)
        start, nbytes = view.offset * itemsize, view.span * itemsize
        member = storage.member
        if view.in_order and member.method == zips.STORED and (view.size or start <= member.nbytes):
            return StoredTensor(name, storage.dtype, view.shape, self._reading.file, member.data_offset + start, view.size * itemsize)
        return self._reading.sink.put(name, storage.dtype, view.shape, self._elements(name, storage, view, (start, nbytes)))

    def _elements(self, name: str, storage: _Storage, view: View, span: tuple[int, int]) -> Iterator[bytes]:
        path, member = self._reading.path, storage.member

        def load() -> bytes:
            if member.method == zips.STORED:
                self._reading.budget.take(span[1], name)
                return zips.part(path, member, *span)
            self._reading.budget.take(member.nbytes, name)
            return zips.read(path, member, member.nbytes)[span[0] : span[0] + span[1]]

        yield from elements(view, storage.dtype, load)

    def _read(self, member: zips.Member, limit: int = MAX_METADATA_NBYTES) -> bytes:
        return zips.read(self._reading.path, member, limit)


def _plain(value: Any) -> Any:
    """A `torch.Size` as a tuple."""
    if isinstance(value, Call) and value.name == "Size" and len(value.args) == 1:
        return value.args[0]
    return value


def _dtype(call: Call) -> str | None:
    """That a tensor of `_rebuild_tensor_v3` names: its storage has none."""
    if call.name != "_rebuild_tensor_v3":
        return None
    named = call.args[6] if len(call.args) > 6 else None  # noqa: PLR2004 (behind shape, strides, gradient, hooks)
    if not isinstance(named, Global):
        raise BadModelError("a tensor has no element type: save the model again")
    return _SYNONYMS.get(named.name, named.name)


def _walk(value: Any, label: str) -> Iterator[tuple[str, Call]]:
    """The tensors in a value, each with the path to it."""
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    for _ in range(_MAX_STEPS):
        if not waiting:
            return
        name, found, depth = waiting.pop()
        if isinstance(found, Call) and found.name in _REBUILD:
            yield name, found
            continue
        if depth == _MAX_DEPTH:
            raise HostileModelError(f"{label} nests its weights more than {_MAX_DEPTH} deep, or in themselves: save a plain state dict")
        parts = list(_parts(found))
        waiting += [(f"{name}.{key}" if name and key else name or key, part, depth + 1) for key, part in reversed(parts)]
    raise HostileModelError(f"{label} has more than {_MAX_STEPS} values: save a plain state dict")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, each with its name in it; nothing of values that hold no tensors."""
    match value:
        case Call(function=Global(module="torch._tensor"), args=(function, _, args, *_)) if isinstance(function, Global) and isinstance(
            args, tuple
        ):
            yield "", Call(function, args)
        case Call(args=args) if value.name in _WRAPPERS and args:
            yield "", args[0]
        case Call(items=items) if value.function.module == "collections":
            yield from _entries(iter(items))
            for given in value.args:
                yield "", given
        case Call(state=state) if value.function.module.partition(".")[0] == "__torch__":
            yield "", state
        case dict():
            yield from _entries(iter(value.items()))
        case list() | tuple():
            yield from ((str(at), part) for at, part in enumerate(value) if _may_hold(part))


def _entries(pairs: Iterator[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    return ((str(key), part) for key, part in pairs if isinstance(key, (str, int)) and _may_hold(part))


def _may_hold(value: Any) -> bool:
    return isinstance(value, (Call, dict, list, tuple))
