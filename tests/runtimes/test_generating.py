"""Models that answer in parts: a class with `generate`, or a `predict` that yields."""

import numpy as np
import pytest

from tether.errors import BadModelError, ModelFailedError
from tether.runtimes import generating, inspect, load
from tether.runtimes.inspecting import inspect_in_sandbox
from tether.types import TensorSpec

HEAD = 'inputs = [("n", "INT64", (1,))]\n    outputs = [("word", "BYTES", (1,))]'
COUNTING = """def {name}(self, n):
        try:
            for number in range(int(n[0])):
                yield {{"word": np.array([f"word {{number}}"])}}
        finally:
            self.ended = True"""


def write(folder, body, head=HEAD):
    path = folder / "model.py"
    path.write_text(f"import numpy as np\n\nclass Mine:\n    {head}\n    ended = False\n\n    {body}\n")
    return path


@pytest.fixture
def opened():
    models = []

    def begin(path):
        models.append(load(path, inspect(path)))
        return models[-1]

    yield begin
    for model in models:
        model.close()


def count(number):
    return {"n": np.array([number])}


def words(*numbers):
    return [b"word %d" % number for number in numbers]


@pytest.mark.parametrize("name", ["generate", "predict"])
def test_parts_come_one_by_one_and_joined_where_one_answer_is_asked_for(tmp_path, opened, name):
    model = opened(write(tmp_path, COUNTING.format(name=name)))
    assert (model.info.streams, model.info.batched) == (True, False)
    assert [part["word"].tolist() for part in model.stream(count(3))] == [[word] for word in words(0, 1, 2)]
    assert model.run(count(3))["word"].tolist() == words(0, 1, 2)
    assert model.run(count(0))["word"].shape == (0,)


def test_a_stream_that_is_closed_ends_the_models_generator(tmp_path, opened):
    model = opened(write(tmp_path, COUNTING.format(name="generate")))
    parts = model.stream(count(1 << 60))
    next(parts)
    assert not model._model.ended
    parts.close()
    assert model._model.ended


def test_a_class_with_both_methods_predicts_at_once_and_generates_in_parts(tmp_path, opened):
    both = COUNTING.format(name="generate") + '\n\n    def predict(self, n):\n        return np.array(["all"])'
    model = opened(write(tmp_path, both))
    assert model.run(count(2))["word"].tolist() == [b"all"]
    assert len(list(model.stream(count(2)))) == 2


def test_what_is_no_sequence_of_parts_is_the_only_one(tmp_path, opened):
    model = opened(write(tmp_path, 'def generate(self, n):\n        return {"word": ["a"]}'))
    assert [part["word"].tolist() for part in model.stream(count(1))] == [[b"a"]]


@pytest.mark.parametrize("kind", ["torch.from_numpy(whole)", "whole"])
def test_one_array_of_any_library_is_one_part_and_keeps_its_shape(tmp_path, opened, kind):
    head = 'inputs = [("n", "INT64", (1,))]\n    outputs = [("y", "FP64", (-1, 3))]'
    body = f"def generate(self, n):\n        import torch\n        whole = np.ones((2, 3))\n        return {kind}"
    model = opened(write(tmp_path, body, head))
    assert [part["y"].shape for part in model.stream(count(1))] == [(2, 3)]
    assert model.run(count(1))["y"].shape == (2, 3)


def test_a_class_that_predicts_may_have_helpers_that_generate(tmp_path, opened):
    path = write(tmp_path, 'def predict(self, n):\n        return np.array(["all"])')
    path.write_text(path.read_text() + "\nclass Helper:\n    def generate(self, tokens): return tokens\n")
    model = opened(path)
    assert (model.info.streams, model.run(count(1))["word"].tolist()) == (False, [b"all"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def generate(self, n):\n        yield ['a']\n        1 / 0", "generate failed: ZeroDivisionError"),
        ("def generate(self, n):\n        yield ['a']\n        yield [['a', 'b']]", r"don't fit together \(\[1, 2\], \[1\]\)"),
        ("def generate(self, n):\n        yield {'text': 'a'}", "did not answer its output 'word'"),
        ("def generate(self, n):\n        while True: yield [b'x' * (1 << 16)]", "over 1 MiB"),
    ],
)
def test_whatever_goes_wrong_between_parts_is_an_error_of_ours(tmp_path, opened, monkeypatch, body, said):
    monkeypatch.setattr(generating, "_MOST_NBYTES", 1 << 20)
    with pytest.raises(ModelFailedError, match=said):
        opened(write(tmp_path, body)).run(count(1))


def test_asynchronous_methods_are_refused_with_what_to_write(tmp_path):
    with pytest.raises(BadModelError, match="plain def"):
        inspect(write(tmp_path, "async def generate(self, n):\n        yield n"))


async def test_a_publish_looks_at_the_first_parts_of_one_that_never_ends(tmp_path):
    path = write(tmp_path, "def generate(self, n):\n        while True: yield {'word': n, 'other': n.reshape(1, 1)}", "")
    np.savez(tmp_path / "example.npz", n=np.ones(1, np.int64))
    found = await inspect_in_sandbox(path, example=tmp_path / "example.npz")
    assert (found.info.streams, found.info.batched) == (True, False)
    assert found.info.outputs == (TensorSpec("word", "INT64", (-1,)), TensorSpec("other", "INT64", (-1, 1)))
