"""ONNX graphs that parse and do harm, or nothing sensible, once ONNX Runtime has them. Needs the onnx package."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20


def serialized(nodes, *, inputs=(("x", TensorProto.FLOAT, ["n"]),), outputs=("y",), weights=(), **more):
    ports = [helper.make_tensor_value_info(*each) for each in inputs]
    answers = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", ports, answers, list(weights))
    return helper.make_model(graph, **{"opset_imports": [helper.make_opsetid("", OPSET)], "ir_version": 9} | more).SerializeToString()


def scalar(name, element, value):
    return helper.make_tensor(name, element, [], [value])


def fine():
    """y = x + w, for truncations."""
    weight = numpy_helper.from_array(np.arange(64, dtype="f4"), "w")
    return serialized([helper.make_node("Add", ["x", "w"], ["y"])], weights=[weight])


def endless_loop():
    """226 bytes that never end."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", TensorProto.FLOAT, None)],
    )
    weights = [scalar("trips", TensorProto.INT64, 1 << 62), scalar("go", TensorProto.BOOL, True)]
    return serialized([helper.make_node("Loop", ["trips", "go", "x"], ["y"], body=body)], weights=weights)


def sparse_bomb(*, inside=False):
    """86 bytes that claim 1.5 GiB: one value of a sparse tensor; `inside`: as the value of a Constant."""
    value, index = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]), helper.make_tensor("i", TensorProto.INT64, [1], [0])
    sparse = helper.make_sparse_tensor(value, index, [400_000_000])
    if inside:
        return serialized([helper.make_node("Constant", [], ["y"], sparse_value=sparse)], inputs=())
    model = onnx.load_from_string(serialized([helper.make_node("Identity", ["s"], ["y"])], inputs=()))
    model.graph.sparse_initializer.append(sparse)
    return model.SerializeToString()


def filled(*extents, runtime=False):
    """A constant of that many zeros, made when the graph is optimized; or at run time, of as many as the input says."""
    if runtime:
        node = helper.make_node("ConstantOfShape", ["x"], ["y"])
        return serialized([node], inputs=[("x", TensorProto.INT64, [1])])
    shape = helper.make_tensor("shape", TensorProto.INT64, [len(extents)], extents)
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["zeros"]), helper.make_node("ReduceSum", ["zeros"], ["y"])]
    return serialized(nodes, inputs=(), weights=[shape])


def chained_functions(count):
    """Each calls the next."""
    made = []
    for number in range(count):
        inner = (
            helper.make_node("Relu", ["a"], ["b"])
            if number + 1 == count
            else helper.make_node(f"f{number + 1}", ["a"], ["b"], domain="own")
        )
        made.append(
            helper.make_function(
                "own", f"f{number}", ["a"], ["b"], [inner], [helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1)]
            )
        )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1)]
    return serialized([helper.make_node("f0", ["x"], ["y"], domain="own")], opset_imports=imports, functions=made)


def one(operator, inputs=("x",), **more):
    return serialized([helper.make_node(operator, list(inputs), ["y"], **more)])


def odd_names():
    names = ["../../etc/passwd", "<script>alert(1)</script>", "\u202eevil", "w\nx", "аdmin"]
    weights = [numpy_helper.from_array(np.ones(1, "f4"), name) for name in names]
    nodes = [helper.make_node("Sum", ["x", *names], ["y"])]
    return serialized(nodes, weights=weights)


REFUSED = {
    "a sparse initializer of 1.5 GiB": sparse_bomb,
    "a sparse constant of 1.5 GiB": lambda: sparse_bomb(inside=True),
    "a loop of 2^62 trips": endless_loop,
    "a constant of a negative size": lambda: filled(-5),
    "2^40 zeros at run time": lambda: filled(runtime=True),
    "a chain of 20,000 functions": lambda: chained_functions(20_000),
    "a function that calls itself": lambda: serialized(
        [helper.make_node("f", ["x"], ["y"], domain="own")],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("own", 1)],
        functions=[
            helper.make_function(
                "own", "f", ["a"], ["b"], [helper.make_node("f", ["a"], ["b"], domain="own")], [helper.make_opsetid("own", 1)]
            )
        ],
    ),
    "Resize without its inputs": lambda: one("Resize"),
    "Resize with too many": lambda: one("Resize", ["x"] * 9),
    "Upsample of an opset without it": lambda: one("Upsample", ["x", "x"]),
    "Upsample with one input": lambda: serialized(
        [helper.make_node("Upsample", ["x"], ["y"])], opset_imports=[helper.make_opsetid("", 9)], ir_version=8
    ),
    "an operator of a library of its own": lambda: one("Run", domain="com.evil"),
    "an operator that does not exist": lambda: one("System"),
    "an opset of tomorrow": lambda: serialized([helper.make_node("Relu", ["x"], ["y"])], opset_imports=[helper.make_opsetid("", 9999)]),
    "an IR version of tomorrow": lambda: serialized([helper.make_node("Relu", ["x"], ["y"])], ir_version=1 << 40),
    "a cycle": lambda: serialized([helper.make_node("Add", ["x", "z"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]),
    "an input from nowhere": lambda: one("Add", ["x", "nowhere"]),
    "an answer that is NaN": lambda: serialized([helper.make_node("Sub", ["x", "x"], ["o"]), helper.make_node("Div", ["o", "o"], ["y"])]),
}
"""Name → the file. Those of `EXAMPLES` show what they are when their example is run."""
EXAMPLES = {
    "a loop of 2^62 trips": {"x": [1.0]},
    "an answer that is NaN": {"x": [1.0]},
    "2^40 zeros at run time": {"x": [1 << 40]},
}
EITHER = {
    "a constant of 2^40 bytes": lambda: filled(1 << 19, 1 << 19),
    "a constant whose size overflows": lambda: filled(1 << 62, 8),
}
"""Name → the file, of one tensor. ONNX Runtime may leave to the first request what it can't do when it loads."""
ALLOWED = {
    "a loop of 2^62 trips that is not run": (endless_loop, 2),
    "names of other things": (odd_names, 5),
}
"""Name → the file, and how many tensors it has."""
