"""A custom model is a class; what it needs is found from its imports, and checked before it is loaded."""

import importlib.metadata
import sys

import numpy as np
import pytest

from tether.errors import BadModelError, MissingDependencyError, ModelFailedError
from tether.runtimes import inspect, load
from tether.runtimes.requirements import check_installed, found_requirements
from tether.types import TensorSpec

HEAD = 'inputs = [("x", "FP32", (-1, 2))]\n    outputs = [("y", "FP32", (-1, 2)), ("z", "INT64", (-1,))]\n'
BOTH = '{"y": x, "z": np.arange(len(x))}'


def write(folder, body, head=HEAD, imports="import numpy as np"):
    path = folder / "model.py"
    path.write_text(f"{imports}\n\nclass Mine:\n    {head}\n    {body}\n")
    return folder


def predict(answer):
    return f"def predict(self, x):\n        return {answer}\n"


def run(folder):
    model = load(folder, inspect(folder))
    try:
        return model.run({"x": np.ones((3, 2), np.float32)})
    finally:
        model.close()


@pytest.mark.parametrize("answer", [BOTH, "(x, np.arange(len(x)))", '{"z": np.arange(len(x), dtype="i4"), "y": x.T.copy().T, "more": 1}'])
def test_it_may_answer_a_dict_or_a_tuple(tmp_path, answer):
    found = run(write(tmp_path, predict(answer)))
    assert [(name, array.dtype, array.flags.c_contiguous) for name, array in found.items()] == [("y", "f4", True), ("z", "i8", True)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("x", "1 values for 2 outputs"),
        ('{"y": x}', "did not answer its output 'z'"),
        ('{"y": x, "z": x.sum(axis=1)}', "float32, declared as INT64"),
        ("{}[0]", "KeyError: 0"),
        ("exit(3)", "SystemExit"),
        ('1 / 0 if x.any() else "\\n"', "ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_it_does_wrong_is_an_error_of_ours(tmp_path, answer, words):
    with pytest.raises(ModelFailedError, match=words):
        run(write(tmp_path, predict(answer)))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", "exactly one class .* none"),
        ("class A:\n    def predict(self): ...\nclass B(A): ...", "A, B"),
        ("class A:\n    predict = 3", "none"),
        ("def (", "is not Python"),
        ("\0", "is not Python"),
        ("raise ValueError('no')", "ValueError: no"),
        ("class A:\n    inputs = [('x', 'FP33', (1,))]\n    def predict(self, x): ...", "is no tensor"),
        ("class A:\n    inputs = [('x', 'FP32')]\n    def predict(self, x): ...", "is no tensor"),
        ("class A:\n    inputs = [('x', complex, (1,))]\n    def predict(self, x): ...", "is no tensor"),
    ],
)
def test_a_module_that_is_no_model_says_what_is_wrong(tmp_path, source, words):
    (tmp_path / "model.py").write_text(source)
    with pytest.raises(BadModelError, match=words):
        inspect(tmp_path)


def test_an_imported_class_is_not_taken_for_the_model(tmp_path):
    (tmp_path / "neighbour.py").write_text("class Other:\n    def predict(self): ...\n")
    folder = write(tmp_path, predict(BOTH), imports="import numpy as np\nfrom neighbour import Other")
    assert set(run(folder)) == {"y", "z"}
    sys.modules.pop("neighbour")


def test_load_is_given_the_path_and_its_failure_is_a_bad_model(tmp_path):
    (tmp_path / "weights.npy").write_bytes(b"no array")
    body = "def load(self, path):\n        self.w = np.load(path / 'weights.npy')\n\n    " + predict(BOTH)
    folder = write(tmp_path, body)
    with pytest.raises(BadModelError, match=r"Mine\.load failed"):
        load(folder, inspect(folder))


def test_specs_may_be_written_in_several_ways(tmp_path):
    head = 'inputs = [("x", np.float32, (None, 2)), {"name": "n", "dtype": "int64", "shape": []}]\n    outputs = (("y", "BYTES", [None]),)'
    info = inspect(write(tmp_path, "def predict(self, x, n): ...", head))
    assert info.inputs == (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("n", "INT64", ()))
    assert (info.outputs, info.batched, info.pure, info.code) == ((TensorSpec("y", "BYTES", (-1,)),), False, False, True)


def test_flags_are_the_authors(tmp_path):
    info = inspect(write(tmp_path, predict(BOTH), HEAD + "    pure = True\n    batched = False\n    requirements = ['numpy>=2']"))
    assert (info.pure, info.batched, info.requirements) == (True, False, ("numpy>=2",))


def test_loading_and_closing_leaves_the_interpreter_as_it_was(tmp_path):
    folder = write(tmp_path, predict(BOTH))
    before = list(sys.path), set(sys.modules)
    run(folder)
    assert (list(sys.path), set(sys.modules)) == before


def test_requirements_come_from_the_imports(tmp_path):
    source = tmp_path / "model.py"
    source.write_text(
        "from __future__ import annotations\nimport os, json.decoder\nimport numpy as np\nfrom . import sibling\nimport neighbour\n"
        "import tether.types\nfrom google.protobuf import message\n"
        "try:\n    import cupy_that_is_not_here as xp\nexcept ImportError:\n    xp = np\n"
        "def late():\n    import ml_dtypes\n"
    )
    (tmp_path / "neighbour.py").write_text("import psutil\n")
    found = found_requirements(source, tmp_path)
    wanted = ["ml_dtypes", "numpy", "protobuf", "psutil"]
    assert list(found) == [f"{name}=={importlib.metadata.version(name)}" for name in wanted]


def test_what_a_worker_lacks_is_named_with_the_command_that_installs_it():
    check_installed(["numpy>=2", "nowhere==1; sys_platform == 'amiga'"])
    with pytest.raises(MissingDependencyError, match=r"pip install 'numpy==1\.0' 'nowhere==2'") as caught:
        check_installed(["numpy==1.0", "psutil", "nowhere==2"])
    assert caught.value.args[1] == ["numpy==1.0", "nowhere==2"]
    with pytest.raises(BadModelError, match="requirement"):
        check_installed(["not a requirement!"])
