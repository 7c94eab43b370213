"""What a path holds is told by names and first bytes; what it does not hold, with the formats that there are."""

import zipfile

import pytest
import runtime_models as models

from tether.errors import BadModelError, NoModelFileError, UnknownFrameworkError
from tether.runtimes import FORMATS, recognise, runtime_for
from tether.testing.requirements import needs


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("files", "published", "expected"),
    [
        (["m.onnx"], "m.onnx", ("onnx", "onnx")),
        (["m.onnx", "weights.bin"], "", ("onnx", "onnx")),
        (["m.pt2"], "m.pt2", ("torch", "pt2")),
        (["m.pt"], "m.pt", ("torch", "torchscript")),
        (["saved_model.pb", "variables/variables.index"], "", ("tensorflow", "savedmodel")),
        (["m.keras"], "m.keras", ("tensorflow", "keras")),
        (["mine.py"], "mine.py", ("custom", "custom")),
        (["model.py", "m.onnx"], "", ("custom", "custom")),
    ],
)
def test_each_format_is_recognised(tmp_path, files, published, expected):
    for name in files:
        write(tmp_path / name)
    runtime, found = recognise(tmp_path / published)
    assert (runtime.framework, found) == expected


def test_an_exported_program_is_recognised_under_any_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/archive_format", "pt2")
    assert recognise(tmp_path / "m.pt")[1] == "pt2"


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("missing.onnx", None, NoModelFileError, "no such file"),
        ("empty.onnx", b"", NoModelFileError, "file is empty"),
        ("photo.jpg", b"\xff\xd8", UnknownFrameworkError, "no model that Tether knows"),
        ("two/a.onnx", b"x", UnknownFrameworkError, "no model that Tether knows"),
        ("notes/readme.txt", b"x", UnknownFrameworkError, "no model that Tether knows"),
    ],
)
def test_what_is_no_model_is_told_which_formats_there_are(tmp_path, name, content, error, words):
    if content is not None:
        write(tmp_path / name, content)
    if name.startswith("two"):
        write(tmp_path / "two/b.onnx")
    with pytest.raises(error, match=words) as caught:
        recognise(tmp_path / name.partition("/")[0])
    assert FORMATS in str(caught.value)


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(NoModelFileError, match="folder is empty"):
        recognise(tmp_path)


def test_a_framework_that_does_not_fit_the_files_is_an_error(tmp_path):
    with pytest.raises(UnknownFrameworkError, match="no model of framework 'torch'"):
        recognise(write(tmp_path / "m.onnx"), "torch")


def test_a_framework_that_there_is_not_is_an_error():
    with pytest.raises(UnknownFrameworkError, match="use one of custom, onnx, tensorflow, torch"):
        runtime_for("jax")


@needs("torch")
@pytest.mark.parametrize("kind", ["weights", "module", "garbage"])
def test_what_torch_save_writes_is_never_unpickled_and_says_how_to_export(tmp_path, kind):
    import torch

    path = tmp_path / "m.pt"
    if kind == "garbage":
        path.write_bytes(bytes(range(256)))
    else:
        torch.save({"w": torch.ones(2)} if kind == "weights" else torch.nn.Linear(2, 2), path)
    runtime, _ = recognise(path)
    with pytest.raises(BadModelError, match=r"torch\.export\.save"):
        runtime.inspect(path)


def test_hints_come_from_the_folder_where_it_has_some(tmp_path):
    from tether.runtimes import inspect

    (models.custom_rows(tmp_path) / "model.py").write_text("class M:\n    def predict(self, x): return x\n")
    spec = '{"name": "%s", "datatype": "FP32", "shape": [-1, 2]}'
    signature = f'{{"inputs": [{spec % "x"}], "outputs": [{spec % "y"}]}}'
    write(tmp_path / ".tether" / "signature.json", signature.encode())
    info = inspect(tmp_path)
    assert (info.inputs[0].name, info.outputs[0].name, info.batched) == ("x", "y", True)


def test_a_signature_file_that_is_none_is_an_error(tmp_path):
    from tether.runtimes import inspect

    write(models.custom_rows(tmp_path) / ".tether" / "signature.json", b'{"inputs": 3}')
    with pytest.raises(BadModelError, match=r"signature\.json"):
        inspect(tmp_path)
