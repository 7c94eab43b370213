"""`saved_model.pb`, read field by field: its large constants, and whether an operation of it reaches files, the network or Python.

A SavedModel is a program. Its operations can read and write any file (TensorFlow's SECURITY.md says so), so those that no served model
needs are refused wherever they are. The saver's own (`SaveV2`, `RestoreV2`) are in every SavedModel; they may be in functions that
nothing else calls, under paths that are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tether.errors import BadModelError, HostileModelError
from tether.runtimes.protobuf import BYTES, VARINT, Source
from tether.runtimes.weights.limits import tensor_nbytes
from tether.runtimes.weights.savedmodel_nodes import (
    TF_DTYPES,
    Node,
    Part,
    all_nodes,
    check_plain_file,
    nested,
    node_name,
    nodes_of,
    parts,
    shape_of,
    text,
)
from tether.types import StoredTensor

__all__ = ["check", "constants"]

_FILE = "saved_model.pb"
_MIN_CONSTANT_NBYTES = 1024
"""Smaller ones are sizes and axes, not weights."""
_MAX_NODES = 1_000_000
_REFUSED = frozenset(
    # files
    (
        "ReadFile",
        "WriteFile",
        "MatchingFiles",
        "WholeFileReader",
        "WholeFileReaderV2",
        "TextLineReader",
        "TextLineReaderV2",
        "TFRecordReader",
        "TFRecordReaderV2",
        "FixedLengthRecordReader",
        "FixedLengthRecordReaderV2",
        "LMDBReader",
        "TextLineDataset",
        "TFRecordDataset",
        "TFRecordDatasetV2",
        "FixedLengthRecordDataset",
        "FixedLengthRecordDatasetV2",
        "CSVDataset",
        "CSVDatasetV2",
        "SqlDataset",
        "LMDBDataset",
        "MatchingFilesDataset",
        "CacheDataset",
        "CacheDatasetV2",
        "SaveDataset",
        "SaveDatasetV2",
        "LoadDataset",
        "SnapshotDataset",
        "SnapshotDatasetV2",
        "SnapshotDatasetReader",
        "SnapshotNestedDatasetReader",
        "SnapshotChunkDataset",
        "ListSnapshotChunksDataset",
        "DatasetToTFRecord",
        "DistributedSave",
        "ImmutableConst",
        "LoadAndRemapMatrix",
        "GenerateVocabRemapping",
        "FileSystemSetConfiguration",
        "CreateSummaryFileWriter",
        "CreateSummaryDbWriter",
        "WriteSummary",
        "WriteRawProtoSummary",
        "ImportEvent",
        "DebugIdentity",
        "DebugIdentityV2",
        "DebugIdentityV3",
        "DebugNanCount",
        "DebugNumericSummary",
        "DebugNumericSummaryV2",
        "PyFunc",
        "PyFuncStateless",
        "EagerPyFunc",
        "DataServiceDataset",
        "DataServiceDatasetV2",
        "DataServiceDatasetV3",
        "DataServiceDatasetV4",
        "RegisterDataset",
        "RegisterDatasetV2",
        "RpcCall",
        "RpcServer",
        "RpcClient",
        "RpcServerStart",
        "RpcServerRegister",
        "RecordInput",
        "DatasetFromGraph",
    )
)
_PREFIXES = ("Experimental", "Kafka", "IO>")
"""What may stand before the name of an operation that was refused under its present one."""
_SAVER = frozenset({
    "Save", "SaveV2", "SaveSlices", "Restore", "RestoreV2", "RestoreSlice", "MergeV2Checkpoints",
})  # fmt: skip
_TABLES = frozenset({"InitializeTableFromTextFile", "InitializeTableFromTextFileV2"})
_PASS_ON = frozenset({"Identity", "PlaceholderWithDefault"})
_PRINT = "PrintV2"


@dataclass(slots=True)
class _Function:
    """What matters of a function, or of the main graph."""

    calls: set[str] = field(default_factory=set)
    saves: bool = False
    paths: bool = False
    """Whether it has a constant that is a path of its own choosing."""
    makers: set[str] = field(default_factory=set)
    """Its nodes."""
    tables: dict[str, str] = field(default_factory=dict)
    """Table that is filled from a file → what gives the file's name."""


@dataclass(slots=True)
class _Graph:
    """One meta graph of the file."""

    nodes: dict[str, Node] = field(default_factory=dict)
    functions: dict[str, _Function] = field(default_factory=dict)
    roots: set[str] = field(default_factory=set)
    """Nodes that signatures ask for."""
    saver: set[str] = field(default_factory=set)
    """Nodes that the saver asks for."""
    assets: set[str] = field(default_factory=set)
    """Nodes that hold paths of assets, which the loader sets."""


def check(folder: Path, label: str = "") -> None:
    """Refuse a SavedModel whose graph reaches out. `label` begins the message for a damaged file.

    Raises: HostileModelError: an operation on files, Python or the network; a path of an asset that leads out. BadModelError: no protobuf.
    """
    check_plain_file(folder, _FILE)
    with (folder / _FILE).open("rb") as file:
        source = Source(label or f"{folder.name}/{_FILE}", file.fileno())
        for graph in nested(source, 0, source.nbytes, 2):
            _check_graph(_graph(source, graph))


def constants(folder: Path, prefix: str) -> Iterator[StoredTensor]:
    """The constants of 1 KiB or more that are stored as plain bytes; the graph is checked first."""
    check(folder)
    taken: set[str] = set()
    with (folder / _FILE).open("rb") as file:
        source = Source(f"{folder.name}/{_FILE}", file.fileno())
        for path, node in all_nodes(source):
            tensor = _constant(source, path, node, prefix + _FILE)
            if tensor is not None and tensor.name not in taken:
                taken.add(tensor.name)
                yield tensor


def _graph(source: Source, message: Part) -> _Graph:
    graph = _Graph()
    for part in parts(source, message.value, message.end):
        if part.wire_type != BYTES:
            continue
        match part.number:
            case 2:
                _read_definition(source, part, graph)
            case 3:
                graph.saver |= {
                    node_name(text(source, each))
                    for each in parts(source, part.value, part.end)
                    if each.number in {1, 2, 3} and each.wire_type == BYTES
                }
            case 5:
                graph.roots |= set(_signature_nodes(source, part))
            case 6:
                graph.assets |= set(_assets(source, part))
    return graph


def _read_definition(source: Source, definition: Part, graph: _Graph) -> None:
    count = 0
    for function, node in nodes_of(source, definition):
        count += 1
        if count > _MAX_NODES:
            raise HostileModelError(f"the SavedModel has more than {_MAX_NODES} operations; no model has")
        _check_operation(node)
        if not function:
            graph.nodes[node.name] = node
            continue
        known = graph.functions.setdefault(function, _Function())
        known.calls |= {*node.calls, node.op}
        known.saves |= node.op in _SAVER
        known.paths |= _is_path(node)
        known.makers.add(node.name)
        if node.op in _TABLES and len(node.inputs) > 1:
            known.tables[node.name] = node_name(node.inputs[1])


def _check_operation(node: Node) -> None:
    op = node.op
    for prefix in _PREFIXES:
        op = op.removeprefix(prefix)
    if node.op in _REFUSED or op in _REFUSED:
        raise HostileModelError(
            f"the SavedModel's operation {node.name[:200]!r} is a {node.op[:80]}, which reaches out of the model: export it without"
        )
    if node.op == _PRINT and any(b"file:" in text for text in node.texts):
        raise HostileModelError(f"the SavedModel's operation {node.name[:200]!r} prints to a file: export it without")


def _is_path(node: Node) -> bool:
    """Not every `..`: a key of a checkpoint has two dots where the name of its object has one."""
    return node.op == "Const" and any(
        text[:1] in {b"/", b"~"} or b".." in text.replace(b"\\", b"/").split(b"/") or b"://" in text for text in node.texts
    )


def _signature_nodes(source: Source, entry: Part) -> Iterator[str]:
    """The nodes of the outputs of one entry of the map of signatures."""
    for signature in nested(source, entry.value, entry.end, 2):
        for output in nested(source, signature.value, signature.end, 2):
            for tensor in nested(source, output.value, output.end, 2):
                for name in nested(source, tensor.value, tensor.end, 1):
                    yield node_name(text(source, name))


def _assets(source: Source, message: Part) -> Iterator[str]:
    """The node of an `AssetFileDef`, its file name checked."""
    for part in parts(source, message.value, message.end):
        if part.wire_type != BYTES:
            continue
        if part.number == 1:
            yield from (node_name(text(source, name)) for name in nested(source, part.value, part.end, 1))
        elif part.number == 2:  # noqa: PLR2004 (filename)
            name = text(source, part)
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
                raise HostileModelError(
                    f"the SavedModel has an asset {name[:200]!r} outside of its folder: export it again from its source"
                )


# --- judging


def _check_graph(graph: _Graph) -> None:
    for node in graph.nodes.values():
        if node.op in _TABLES and len(node.inputs) > 1:
            _check_table(graph, node)
    saving = {name for name, function in graph.functions.items() if function.saves}
    for name, function in graph.functions.items():
        for table, given in function.tables.items():
            if given in function.makers:  # not from outside of the function, as an asset is: a path of the publisher's
                raise _foreign_table(table)
        if function.saves and function.paths:
            raise HostileModelError(
                f"the SavedModel's function {name[:200]!r} saves or restores under a path of its own: export it again from its source"
            )
        if called := function.calls & saving:
            raise HostileModelError(
                f"the SavedModel's function {name[:200]!r} calls {min(called)[:200]!r}, which saves or restores files: export it without"
            )
    for name in _reached(graph):
        node = graph.nodes[name]
        if node.op in _SAVER or not saving.isdisjoint({*node.calls, node.op}):
            raise HostileModelError(f"the SavedModel's signature runs {name[:200]!r}, which saves or restores files: export it without")


def _check_table(graph: _Graph, node: Node) -> None:
    """A table of the main graph: its file name comes from an asset, at most through operations that pass it on."""
    given = node_name(node.inputs[1])
    for _ in range(len(graph.nodes)):
        maker = graph.nodes.get(given)
        if given in graph.assets or maker is None or maker.op not in _PASS_ON or not maker.inputs:
            break
        given = node_name(maker.inputs[0])
    if given not in graph.assets:
        raise _foreign_table(node.name)


def _foreign_table(name: str) -> HostileModelError:
    return HostileModelError(
        f"the SavedModel's table {name[:200]!r} reads a file that is none of its assets: export it with its vocabulary"
    )


def _reached(graph: _Graph) -> set[str]:
    """The nodes of the main graph that a signature runs."""
    waiting = [name for name in graph.roots if name in graph.nodes]
    seen = set(waiting)
    while waiting:
        for given in map(node_name, graph.nodes[waiting.pop()].inputs):
            if given not in seen and given in graph.nodes:
                seen.add(given)
                waiting.append(given)
    return seen


def _constant(source: Source, function: str, node: Node, file: str) -> StoredTensor | None:
    if node.op != "Const" or node.constant is None or node.constant.end - node.constant.value < _MIN_CONSTANT_NBYTES:
        return None
    dtype: str | None = None
    shape: tuple[int, ...] | None = ()
    content: Part | None = None
    for part in parts(source, node.constant.value, node.constant.end):
        if part.number == 1 and part.wire_type == VARINT:
            dtype = TF_DTYPES.get(part.value)
        elif part.number == 2 and part.wire_type == BYTES:  # noqa: PLR2004 (tensor_shape)
            shape = shape_of(source, part)
        elif part.number == 4 and part.wire_type == BYTES:  # noqa: PLR2004 (tensor_content)
            content = part
    if dtype is None or shape is None or content is None or content.end - content.value < _MIN_CONSTANT_NBYTES:
        return None
    name = f"{function}/{node.name}" if function else node.name
    nbytes = tensor_nbytes(name, dtype, shape)
    if nbytes != content.end - content.value:
        raise BadModelError(
            f"the SavedModel's constant {name[:200]!r} has {content.end - content.value} bytes, not {nbytes}: export it again"
        )
    return StoredTensor(name, dtype, shape, file, content.value, nbytes)
