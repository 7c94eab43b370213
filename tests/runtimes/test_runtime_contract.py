"""Every runtime keeps the contract, in the worker's process and, where the format is code, through a runner."""

import pytest
import runtime_models as models

from tether.testing.requirements import needs
from tether.testing.runtimes import RuntimeSuite

TORCH_IS_WARNING = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch 2.13 deprecates TorchScript; users have such files
]


@needs("onnx")
@needs("onnxruntime")
class TestOnnx(RuntimeSuite):
    framework, format, code = "onnx", "onnx", False
    datatypes = ("FP32", "INT64", "BOOL", "FP64", "UINT8", "FP16", "INT8", "BYTES")

    def build_echo(self, folder, datatypes):
        return models.onnx_echo(folder, datatypes)

    def build_rows(self, folder):
        return models.onnx_rows(folder)

    def build_large(self, folder, nbytes):
        return models.onnx_rows(folder, nbytes)


class TestOnnxWithExternalData(TestOnnx):
    cycles = 5
    datatypes = ("FP32", "BF16", "UINT16", "INT32", "UINT64")

    def build_rows(self, folder):
        return models.onnx_rows(folder, external=True).parent

    def build_large(self, folder, nbytes):
        return models.onnx_rows(folder, nbytes, external=True).parent


@needs("torch")
class TestPt2(RuntimeSuite):
    framework, format = "torch", "pt2"
    datatypes = (*RuntimeSuite.datatypes, "FP16", "BF16")

    def build_echo(self, folder, datatypes):
        return models.save_pt2(folder, *models.torch_echo(datatypes))

    def build_rows(self, folder):
        return models.save_pt2(folder, *models.torch_rows())

    def build_large(self, folder, nbytes):
        return models.save_pt2(folder, *models.torch_rows(nbytes))


class TestPt2InARunner(TestPt2):
    runner, cycles, large_nbytes = True, 2, 1 << 20


@needs("torch")
class TestTorchScript(RuntimeSuite):
    pytestmark = TORCH_IS_WARNING
    framework, format, pure, needs_hints = "torch", "torchscript", False, True

    def build_echo(self, folder, datatypes):
        return models.save_torchscript(folder, *models.torch_echo(datatypes))

    def build_rows(self, folder):
        return models.save_torchscript(folder, *models.torch_rows())

    def build_large(self, folder, nbytes):
        return models.save_torchscript(folder, *models.torch_rows(nbytes))


class TestTorchScriptInARunner(TestTorchScript):
    runner, cycles, large_nbytes = True, 2, 1 << 20


@needs("tensorflow")
class TestSavedModel(RuntimeSuite):
    framework, format = "tensorflow", "savedmodel"
    datatypes = (*RuntimeSuite.datatypes, "BYTES")

    def build_echo(self, folder, datatypes):
        return models.savedmodel_echo(folder, datatypes)

    def build_rows(self, folder):
        return models.savedmodel_rows(folder)

    def build_large(self, folder, nbytes):
        return models.savedmodel_rows(folder, nbytes)


class TestSavedModelInARunner(TestSavedModel):
    runner, cycles, large_nbytes = True, 2, 1 << 20


@needs("tensorflow")
class TestKeras(RuntimeSuite):
    framework, format = "tensorflow", "keras"

    def build_echo(self, folder, datatypes):
        return models.keras_echo(folder, datatypes)

    def build_rows(self, folder):
        return models.keras_rows(folder)

    def build_large(self, folder, nbytes):
        return models.keras_rows(folder, nbytes)


class TestKerasInARunner(TestKeras):
    runner, cycles, large_nbytes = True, 2, 1 << 20


class TestCustom(RuntimeSuite):
    framework, format = "custom", "custom"
    datatypes = (*RuntimeSuite.datatypes, "BYTES")

    def build_echo(self, folder, datatypes):
        return models.custom_echo(folder, datatypes)

    def build_rows(self, folder):
        return models.custom_rows(folder)

    def build_large(self, folder, nbytes):
        return models.custom_rows(folder, nbytes)


class TestCustomInARunner(TestCustom):
    runner = True
