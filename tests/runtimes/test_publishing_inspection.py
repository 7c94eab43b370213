"""One trip to the sandbox tells a publish all: the metadata, the example as the model takes it, and its answer."""

import numpy as np
import pytest
import runtime_models as models

from tether.errors import BadInputError, BadModelError, MissingDependencyError
from tether.runtimes.inspecting import inspect_in_sandbox, inspect_model
from tether.runtimes.signatures import Signature, fit
from tether.testing.requirements import needs
from tether.types import TensorSpec

PLAIN = """
class Doubler:
    def predict(self, x):
        return {answer}
"""


def custom(tmp_path, answer):
    path = tmp_path / "mine.py"
    path.write_text(PLAIN.format(answer=answer))
    return path


def example(tmp_path, **arrays):
    path = tmp_path / "example.npz"
    np.savez(path, **arrays)
    return path


@needs("onnx")
@needs("onnxruntime")
async def test_an_example_is_named_cast_and_answered(tmp_path):
    given = tmp_path / "example.npz"
    np.savez(given, np.ones((2, 4)))  # positional, and double where the model takes single precision
    found = await inspect_in_sandbox(models.onnx_rows(tmp_path), example=given)
    assert (found.info.inputs, found.info.batched) == ((TensorSpec("x", "FP32", (-1, 4)),), True)
    assert found.example_inputs["x"].dtype == np.float32
    assert found.example_outputs["y"].shape == (2, 2)


@needs("onnx")
@needs("onnxruntime")
async def test_without_an_example_there_is_the_metadata(tmp_path):
    found = await inspect_in_sandbox(models.onnx_rows(tmp_path))
    assert (found.info.format, found.example_inputs, found.example_outputs) == ("onnx", None, None)


@pytest.mark.parametrize(
    ("answer", "shapes", "batched"),
    [
        ("x * 2", [(-1, 3), (-1, 3)], True),
        ("x.sum(axis=1)", [(-1, 3), (-1,)], True),
        ("x.sum(axis=0)", [(2, 3), (3,)], False),
        ("x.reshape(1, 6)", [(2, 3), (1, 6)], False),
        ("x.mean()", [(2, 3), ()], False),
    ],
)
def test_a_format_that_does_not_say_is_asked_with_two_lengths_of_its_example(tmp_path, answer, shapes, batched):
    argument = {"path": str(custom(tmp_path, answer)), "example": str(example(tmp_path, x=np.ones((2, 3), np.float32)))}
    info = inspect_model(argument)["info"]
    assert [tuple(spec["shape"]) for spec in (*info["inputs"], *info["outputs"])] == shapes
    assert info["batched"] is batched


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ("x * float('nan')", BadModelError, "answers NaN on its example"),
        ("x / 0", BadModelError, "answers infinity on its example"),
        ("x.no_such_thing", BadInputError, "AttributeError"),
        ("'words'", None, None),
        ("{1: x}", None, None),
        ("x * 1j", BadInputError, "complex"),
    ],
)
def test_the_example_is_the_models_self_test(tmp_path, answer, error, words):
    argument = {"path": str(custom(tmp_path, answer)), "example": str(example(tmp_path, x=np.ones((2, 3), np.float32)))}
    if error is None:
        assert inspect_model(argument)["example_outputs"]
        return
    from tether.errors import RequestError

    with pytest.raises(RequestError, match=words), np.errstate(all="ignore"):
        inspect_model(argument)


def test_a_model_that_says_nothing_and_has_no_example_is_told_how_to(tmp_path):
    with pytest.raises(BadInputError, match="example="):
        inspect_model({"path": str(custom(tmp_path, "x"))})


def test_hints_take_the_place_of_an_example(tmp_path):
    spec = {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
    hints = {"inputs": [spec], "outputs": [{**spec, "name": "y"}], "batched": True}
    info = inspect_model({"path": str(custom(tmp_path, "x")), "hints": hints})["info"]
    assert (info["inputs"][0]["name"], info["outputs"][0]["name"], info["batched"]) == ("x", "y", True)


async def test_a_model_whose_import_is_missing_says_which(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import a_module_that_is_nowhere\n\nclass M:\n    def predict(self, x): return x\n")
    with pytest.raises(MissingDependencyError, match="pip install a_module_that_is_nowhere"):
        await inspect_in_sandbox(path)


SPECS = (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("words", "BYTES", (-1,)))
WORDS = np.array([b"a", b"b"], object)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x": np.ones((2, 2))}, "the model takes x, words"),
        ({"x": np.ones((2, 2)), "words": WORDS, "more": WORDS}, "the model takes x, words"),
        ({"x": np.ones((2, 3)), "words": WORDS}, "has shape"),
        ({"x": np.ones(2), "words": WORDS}, "has shape"),
        ({"x": np.ones((2, 2), complex), "words": WORDS}, "is complex128"),
        ({"x": np.ones((2, 2)), "words": np.ones(2)}, "the model takes BYTES"),
        ({"x": WORDS.reshape(1, 2), "words": WORDS}, "the model takes FP32"),
    ],
)
def test_an_example_that_does_not_fit_says_where(given, words):
    with pytest.raises(BadInputError, match=words):
        fit(given, SPECS)


def test_a_signature_is_plain_json():
    import msgspec

    signature = Signature(SPECS)
    assert msgspec.json.decode(msgspec.json.encode(signature), type=Signature) == signature
