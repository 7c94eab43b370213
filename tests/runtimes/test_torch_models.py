"""What PyTorch can export, and what of it can be served."""

import numpy as np
import pytest
import runtime_models as models

from tether.errors import BadInputError, BadModelError
from tether.runtimes import inspect, load, load_arriving
from tether.runtimes.arrivals import Arrivals
from tether.runtimes.inspecting import inspect_model
from tether.runtimes.signatures import Signature
from tether.testing.requirements import needs
from tether.types import TensorSpec

pytestmark = [needs("torch"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def module(forward, **buffers):
    import torch

    made = type("Made", (torch.nn.Module,), {"forward": forward})()
    for name, value in buffers.items():
        made.register_buffer(name, value)
    return made.eval()


def served(path):
    """What the exported file answers to X for each of its inputs."""
    info = inspect(path)
    model = load(path, info)
    try:
        return info, model.run({spec.name: X for spec in info.inputs})
    finally:
        model.close()


def test_nested_arguments_keywords_and_constants_keep_their_places(tmp_path):
    import torch

    def forward(_self, x, factor, pair, *, more):
        return x * factor + pair["a"] - pair["b"], more

    tensor = torch.from_numpy(X)
    program = torch.export.export(module(forward), (tensor, 3, {"a": tensor, "b": tensor}), {"more": tensor})
    torch.export.save(program, tmp_path / "m.pt2")
    info, answer = served(tmp_path / "m.pt2")
    assert [spec.name for spec in info.inputs] == ["x", "pair_a", "pair_b", "more"]
    np.testing.assert_array_equal(answer["output_0"], X * 3)
    np.testing.assert_array_equal(answer["output_1"], X)


def test_sizes_that_were_fixed_at_export_stay_fixed_and_are_no_batch(tmp_path):
    def forward(_self, x):
        return x + 1

    import torch

    torch.export.save(torch.export.export(module(forward), (torch.from_numpy(X),)), tmp_path / "m.pt2")
    info, _ = served(tmp_path / "m.pt2")
    assert (info.inputs[0].shape, info.batched) == ((2, 3), False)


def test_an_answer_over_all_rows_is_no_batch_even_if_its_length_varies(tmp_path):
    def forward(_self, x):
        return x, x.repeat(2, 1)

    import torch

    program = torch.export.export(module(forward), (torch.from_numpy(X),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, tmp_path / "m.pt2")
    info, answer = served(tmp_path / "m.pt2")
    assert ([spec.shape for spec in info.outputs], info.batched) == ([(-1, 3), (-1, 3)], False)
    assert answer["output_1"].shape == (4, 3)


def remembers(self, x):
    self.seen.add_(1)
    return x + self.seen


def remembers_in_a_view(self, x):
    self.seen.view(1, 1)[0].add_(1)
    return x + self.seen


def draws(_self, x):
    import torch

    return x + torch.rand_like(x)


def works_in_place(_self, x):
    import torch

    return torch.nn.functional.dropout((x + 1).view(-1).relu_(), training=False)


@pytest.mark.parametrize(("forward", "pure"), [(remembers, False), (remembers_in_a_view, False), (draws, False), (works_in_place, True)])
def test_a_model_that_remembers_or_draws_is_not_pure(tmp_path, forward, pure):
    import torch

    torch.export.save(torch.export.export(module(forward, seen=torch.zeros(1)), (torch.from_numpy(X),)), tmp_path / "m.pt2")
    assert inspect(tmp_path / "m.pt2").pure is pure


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_damaged_export_is_a_bad_model(tmp_path, share):
    path = models.save_pt2(tmp_path, *models.torch_rows())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadModelError, match=r"can't be loaded by torch\.export"):
        inspect(path)


def script(folder, source):
    """A scripted module with that `forward`."""
    import torch

    scripted = type(f"Scripted{abs(hash(source))}", (torch.jit.ScriptModule,), {})()  # a class holds one forward only
    scripted.define(f"{source}\n")
    scripted.save(str(folder / "m.pt"))
    return folder / "m.pt"


def test_torchscript_takes_its_names_from_forward_and_its_shapes_from_the_example(tmp_path):
    path = script(tmp_path, "def forward(self, left, right):\n    return (left + right, left.sum(1))")
    np.savez(tmp_path / "e.npz", X, X)
    info = inspect_model({"path": str(path), "example": str(tmp_path / "e.npz")})["info"]
    assert [(spec["name"], tuple(spec["shape"])) for spec in info["inputs"]] == [("left", (-1, 3)), ("right", (-1, 3))]
    assert [(spec["name"], tuple(spec["shape"])) for spec in info["outputs"]] == [("output_0", (-1, 3)), ("output_1", (-1,))]
    assert info["batched"] is True


@pytest.mark.parametrize("form", ["pt2", "torchscript"])
def test_while_a_file_comes_that_is_imported_which_it_needs_and_no_more(tmp_path, form, monkeypatch):
    import torch

    path = getattr(models, f"save_{form}")(tmp_path, *models.torch_rows())
    info = inspect(path, hints=Signature((TensorSpec("x", "FP32", (-1, 4)),)))
    path.rename(tmp_path / "hidden")
    exported, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *given, **more: exported.append(given) or export(*given, **more))
    arrivals = Arrivals()
    monkeypatch.setattr(arrivals, "wait_whole", lambda: (tmp_path / "hidden").rename(path))
    model = load_arriving(path, info, 1, arrivals)
    assert model.run({info.inputs[0].name: np.ones((2, 4), np.float32)})
    assert bool(exported) is (form == "pt2")
    model.close()


def test_torchscript_without_an_example_asks_for_one(tmp_path):
    with pytest.raises(BadInputError, match="example="):
        inspect(script(tmp_path, "def forward(self, x):\n    return x"))


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("def forward(self, x, n: int):\n    return x * n", BadModelError, "no tensors"),
        ("def forward(self, y):\n    return y", BadInputError, "the model takes y"),
    ],
)
def test_torchscript_that_takes_something_else_says_what(tmp_path, source, error, words):
    hints = Signature((TensorSpec("x", "FP32", (-1, 3)),))
    with pytest.raises(error, match=words):
        inspect(script(tmp_path, source), hints=hints)
