"""The contract of a runtime, as tests to inherit: for the ones of Tether, and for one of your own.

Subclass `RuntimeSuite`, say the framework and format, build the models it asks for:

    class TestMine(RuntimeSuite):
        framework, format = "onnx", "onnx"
        def build_echo(self, folder, datatypes): ...

With `runner = True` the same tests go through a runner process.
"""

from __future__ import annotations

import atexit
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest

from tether.errors import BadInputError, ModelFailedError
from tether.ports import LoadedModel
from tether.runtimes import inspect, load, recognise
from tether.runtimes.signatures import Signature
from tether.types import Array, Datatype, Framework, ModelFormat, ModelInfo, Tensors, TensorSpec, dtype_of
from tether.worker.runner import RunnerModel, RunnerPool

__all__ = ["LoadingSuite", "MemorySuite", "RuntimeSuite", "sample"]

_MIB = 1 << 20
_ROWS_IN, _ROWS_OUT = 4, 2


def sample(datatype: Datatype, rows: int) -> Array:
    """`(rows, 3)` values that tell a lost or swapped one apart."""
    numbers = np.arange(rows * 3).reshape(rows, 3)
    if datatype == "BYTES":
        words = np.empty((rows, 3), object)
        words.reshape(-1)[:] = [b"", b"a\xc3\xa9", *(b"w%d" % number for number in range(rows * 3 - 2))][: rows * 3]
        return words
    if datatype == "BOOL":
        return np.asarray(numbers % 2 == 1)
    if datatype in {"FP16", "BF16", "FP32", "FP64"}:
        return (numbers / 8).astype(dtype_of(datatype))
    return numbers.astype(dtype_of(datatype))


@functools.cache
def _pool() -> RunnerPool:
    pool = RunnerPool()
    atexit.register(pool.close)
    return pool


class LoadingSuite:
    """What the suites share: how a model is built, inspected and loaded."""

    needs_hints: ClassVar[bool] = False
    """Whether the format leaves shapes open, so that `inspect` is given a signature."""
    runner: ClassVar[bool] = False

    # What the tests below work with.

    @pytest.fixture(scope="class")
    @classmethod
    def pool(cls) -> RunnerPool:
        """One for all suites, so that they share its warm spares."""
        return _pool()

    @pytest.fixture(scope="class")
    @classmethod
    def bring(cls, pool: RunnerPool) -> Callable[[Path, ModelInfo], LoadedModel]:
        """Loads a model, here or in a runner."""
        return lambda path, info: RunnerModel(path, info, 1, pool) if cls.runner else load(path, info, 1)

    def hints(self, signature: Signature) -> Signature | None:
        """What `inspect` is told of a model."""
        return signature if self.needs_hints else None

    def inspect_rows(self, path: Path) -> ModelInfo:
        """The metadata of a model of rows."""
        return inspect(path, hints=self.hints(_rows_signature()))


class MemorySuite(LoadingSuite):
    """Unloading gives memory back. Loading a large model twenty times takes a while: most will mark it `slow`."""

    cycles: ClassVar[int] = 20
    large_nbytes: ClassVar[int] = 200 * _MIB

    def build_large(self, folder: Path, nbytes: int) -> Path:
        """As `build_rows`, with that much weight."""
        raise NotImplementedError

    def test_memory_comes_back_when_models_are_unloaded(
        self, tmp_path_factory: pytest.TempPathFactory, bring: Callable[[Path, ModelInfo], LoadedModel]
    ) -> None:
        """After many cycles this process is no larger than after the first, but for 20 MB."""
        path = self.build_large(tmp_path_factory.mktemp("large"), self.large_nbytes)
        info = self.inspect_rows(path)
        resident = [self._cycle(path, info, bring) for _ in range(self.cycles)]
        assert resident[-1] <= resident[0] + 20 * _MIB, [size // _MIB for size in resident]

    def _cycle(self, path: Path, info: ModelInfo, bring: Callable[[Path, ModelInfo], LoadedModel]) -> int:
        model = bring(path, info)
        model.run({"x": np.ones((1, _ROWS_IN), np.float32)})
        pid = model.pid if isinstance(model, RunnerModel) else None
        model.close()
        assert pid is None or not psutil.pid_exists(pid)
        del model
        gc.collect()
        return int(psutil.Process().memory_info().rss)


class RuntimeSuite(LoadingSuite):
    """What every runtime promises (`tether.ports.Runtime`)."""

    framework: ClassVar[Framework]
    format: ClassVar[ModelFormat]
    datatypes: ClassVar[Sequence[Datatype]] = ("FP32", "INT64", "BOOL", "FP64", "UINT8")
    code: ClassVar[bool] = True
    pure: ClassVar[bool] = True

    def build_echo(self, folder: Path, datatypes: Sequence[Datatype]) -> Path:
        """A model that answers what it is given: for each datatype an input `x_fp32` and an output `y_fp32`, both `(-1, 3)`."""
        raise NotImplementedError

    def build_rows(self, folder: Path) -> Path:
        """A model with one FP32 input `x`, `(-1, 4)`, and one FP32 output `y`, `(-1, 2)`, that treats each row by itself."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def echo(cls, tmp_path_factory: pytest.TempPathFactory, bring: Callable[[Path, ModelInfo], LoadedModel]) -> Iterator[LoadedModel]:
        """The loaded echo model."""
        path = cls().build_echo(tmp_path_factory.mktemp("echo"), cls.datatypes)
        model = bring(path, inspect(path, hints=cls().hints(_echo_signature(cls.datatypes))))
        yield model
        model.close()

    @pytest.fixture(scope="class")
    @classmethod
    def rows_path(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Where the model of rows lies."""
        return cls().build_rows(tmp_path_factory.mktemp("rows"))

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, rows_path: Path, bring: Callable[[Path, ModelInfo], LoadedModel]) -> Iterator[LoadedModel]:
        """The loaded model of rows."""
        model = bring(rows_path, cls().inspect_rows(rows_path))
        yield model
        model.close()

    # The contract.

    def test_its_files_are_recognised(self, rows_path: Path) -> None:
        """By file names and first bytes, with and without the framework given."""
        for given in (None, self.framework):
            runtime, found = recognise(rows_path, given)
            assert (runtime.framework, found) == (self.framework, self.format)

    def test_metadata_says_names_datatypes_and_shapes(self, echo: LoadedModel) -> None:
        """As the model was built, -1 where a size may vary."""
        info = echo.info
        assert (info.framework, info.format, info.code, info.pure, info.batched) == (
            self.framework,
            self.format,
            self.code,
            self.pure,
            True,
        )
        signature = _echo_signature(self.datatypes)
        assert sorted(info.inputs, key=_name) == sorted(signature.inputs, key=_name)
        assert sorted(info.outputs, key=_name) == sorted(signature.outputs, key=_name)

    @pytest.mark.parametrize("rows", [1, 2, 7])
    def test_values_of_every_datatype_survive_the_trip_for_any_number_of_rows(self, echo: LoadedModel, rows: int) -> None:
        """Exactly, with dtype and shape."""
        given = {f"x_{datatype.lower()}": sample(datatype, rows) for datatype in self.datatypes}
        answered = echo.run(given)
        assert list(answered) == [spec.name for spec in echo.info.outputs]
        for datatype in self.datatypes:
            array = answered[f"y_{datatype.lower()}"]
            assert (array.dtype, array.shape) == (dtype_of(datatype), (rows, 3))
            assert array.flags.c_contiguous
            np.testing.assert_array_equal(array, sample(datatype, rows))

    def test_an_answer_is_not_changed_by_the_next_one(self, rows: LoadedModel) -> None:
        """Outputs belong to the caller."""
        first = rows.run({"x": np.ones((2, _ROWS_IN), np.float32)})["y"]
        kept = first.copy()
        rows.run({"x": np.full((2, _ROWS_IN), 9, np.float32)})
        np.testing.assert_array_equal(first, kept)

    def test_rows_run_together_equal_rows_run_alone(self, rows: LoadedModel) -> None:
        """So requests may share a batch."""
        batch = np.random.default_rng(7).standard_normal((9, _ROWS_IN), dtype=np.float32)
        together = rows.run({"x": batch})["y"]
        alone = np.concatenate([rows.run({"x": batch[index : index + 1]})["y"] for index in range(len(batch))])
        assert together.shape == (9, _ROWS_OUT)
        np.testing.assert_allclose(together.astype(np.float64), alone.astype(np.float64), rtol=1e-5, atol=1e-6)

    def test_an_input_that_it_cannot_take_is_a_clear_error_and_the_model_lives_on(self, rows: LoadedModel) -> None:
        """The error is of Tether's tree, in one line."""
        good: Tensors = {"x": np.ones((1, _ROWS_IN), np.float32)}
        before = rows.run(good)["y"]
        bad: Tensors = {"x": np.ones((1, _ROWS_IN + 3), np.float32)}
        with pytest.raises((ModelFailedError, BadInputError)) as caught:
            rows.run(bad)
        assert str(caught.value).strip()
        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(rows.run(good)["y"], before)

    def test_closing_twice_does_nothing(self, rows_path: Path, bring: Callable[[Path, ModelInfo], LoadedModel]) -> None:
        """And a runner's process is gone after the first time."""
        model = bring(rows_path, self.inspect_rows(rows_path))
        pid = model.pid if isinstance(model, RunnerModel) else None
        model.close()
        model.close()
        assert pid is None or not psutil.pid_exists(pid)


def _name(spec: TensorSpec) -> str:
    return spec.name


def _echo_signature(datatypes: Sequence[Datatype]) -> Signature:
    return Signature(
        tuple(TensorSpec(f"x_{datatype.lower()}", datatype, (-1, 3)) for datatype in datatypes),
        tuple(TensorSpec(f"y_{datatype.lower()}", datatype, (-1, 3)) for datatype in datatypes),
    )


def _rows_signature() -> Signature:
    return Signature((TensorSpec("x", "FP32", (-1, _ROWS_IN)),), (TensorSpec("y", "FP32", (-1, _ROWS_OUT)),))
