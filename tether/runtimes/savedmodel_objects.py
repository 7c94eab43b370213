"""Pure: which weight of a SavedModel's checkpoint belongs to which variable of its graph, where that is plain.

A SavedModel says twice what its objects are: `SavedObjectGraph` (saved_object_graph.proto) in `saved_model.pb`, and
`TrackableObjectGraph` (trackable_object_graph.proto) in the checkpoint, whose nodes know the keys of their weights. Objects are the same
where the same names lead to them from the root (tensorflow.org/guide/checkpoint, "Loading mechanics"). What is more than variables in
objects (tables, assets, savers of their own, slots of optimizers, weights in parts) is TensorFlow's to restore.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tether.runtimes.weights.savedmodel_nodes import TF_DTYPES
from tether.types import StoredTensor

__all__ = ["UnusualModelError", "object_nodes", "variables"]

_KINDS = frozenset({"user_object", "function", "variable", "bare_concrete_function", "constant", "captured_tensor"})
_VALUE = "VARIABLE_VALUE"


class UnusualModelError(Exception):
    """There is something in it that TensorFlow has to restore by itself."""


def object_nodes(saved: Any) -> Sequence[Any]:
    """The `SavedObject`s of a `SavedModel` message. Raises: UnusualModelError."""
    if len(saved.meta_graphs) != 1 or not saved.meta_graphs[0].HasField("object_graph_def"):
        raise UnusualModelError("it was written by TensorFlow 1")
    if saved.meta_graphs[0].asset_file_def:
        raise UnusualModelError("it has assets")
    nodes: Sequence[Any] = saved.meta_graphs[0].object_graph_def.nodes
    for node in nodes:
        kind = node.WhichOneof("kind")
        if kind not in _KINDS:
            raise UnusualModelError(f"it has a {kind}")
        if node.saveable_objects or node.registered_name or node.registered_saver or node.slot_variables:
            raise UnusualModelError("one of its objects restores itself")
        if kind == "variable" and node.variable.experimental_distributed_variable_components:
            raise UnusualModelError("one of its variables is distributed")
    return nodes


def variables(nodes: Sequence[Any], checkpoint: Any, tensors: Mapping[str, StoredTensor]) -> dict[int, StoredTensor]:
    """Number of a variable among the nodes → its weight. `checkpoint`: the `TrackableObjectGraph`; `tensors`: by checkpoint key.

    Raises: UnusualModelError: one has no weight of its type and shape, or what is no variable has one.
    """
    found: dict[int, StoredTensor] = {}
    for number, twin in _twins(nodes, checkpoint.nodes).items():
        attributes = checkpoint.nodes[twin].attributes
        if nodes[number].WhichOneof("kind") == "variable":
            if [attribute.name for attribute in attributes] != [_VALUE]:
                raise UnusualModelError("one of its variables has more than a value")
            found[number] = _weight(nodes[number].variable, tensors.get(attributes[0].checkpoint_key))
        elif attributes or checkpoint.nodes[twin].registered_saver.name:
            raise UnusualModelError("one of its objects that is no variable was saved")
    if len(found) != sum(node.WhichOneof("kind") == "variable" for node in nodes):
        raise UnusualModelError("one of its variables was not saved")
    return found


def _twins(nodes: Sequence[Any], others: Sequence[Any]) -> dict[int, int]:
    """Saved object → node of the checkpoint, for all that names lead to from both roots."""
    found = {0: 0}
    waiting = [0]
    while waiting:
        here = waiting.pop()
        below = {child.local_name: child.node_id for child in _children(others, found[here])}
        for child in _children(nodes, here):
            twin = below.get(child.local_name)
            if twin is None:
                continue
            if child.node_id not in found:
                found[child.node_id] = twin
                waiting.append(child.node_id)
            elif found[child.node_id] != twin:
                raise UnusualModelError("the names of its objects are ambiguous")
    return found


def _children(nodes: Sequence[Any], number: int) -> Iterator[Any]:
    if not 0 <= number < len(nodes):
        raise UnusualModelError("it names an object that is not there")
    return iter(nodes[number].children)


def _weight(variable: Any, tensor: StoredTensor | None) -> StoredTensor:
    if tensor is None or TF_DTYPES.get(variable.dtype) != tensor.dtype:
        raise UnusualModelError("one of its variables is no plain array")
    if not variable.shape.unknown_rank:
        sizes = [dim.size for dim in variable.shape.dim]
        if len(sizes) != len(tensor.shape) or any(size not in (-1, extent) for size, extent in zip(sizes, tensor.shape, strict=True)):
            raise UnusualModelError("one of its variables has another shape than its weight")
    return tensor
