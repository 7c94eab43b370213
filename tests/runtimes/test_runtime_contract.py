"""Every runtime keeps the contract, in the worker's process and, where the format is code, through a runner."""

import pytest
import runtime_models as models

from tether.testing.requirements import needs
from tether.testing.runtimes import MemorySuite, RuntimeSuite

TORCH_IS_WARNING = [pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]  # users still have such files
KERAS_IS_WARNED = [pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")]


class OnnxModels:
    def build_echo(self, folder, datatypes):
        return models.onnx_echo(folder, datatypes)

    def build_rows(self, folder):
        return models.onnx_rows(folder)

    def build_large(self, folder, nbytes):
        return models.onnx_rows(folder, nbytes)


class ExternalOnnxModels(OnnxModels):
    def build_rows(self, folder):
        return models.onnx_rows(folder, external=True).parent

    def build_large(self, folder, nbytes):
        return models.onnx_rows(folder, nbytes, external=True).parent


class Pt2Models:
    def build_echo(self, folder, datatypes):
        return models.save_pt2(folder, *models.torch_echo(datatypes))

    def build_rows(self, folder):
        return models.save_pt2(folder, *models.torch_rows())

    def build_large(self, folder, nbytes):
        return models.save_pt2(folder, *models.torch_rows(nbytes))


class TorchScriptModels:
    needs_hints = True

    def build_echo(self, folder, datatypes):
        return models.save_torchscript(folder, *models.torch_echo(datatypes))

    def build_rows(self, folder):
        return models.save_torchscript(folder, *models.torch_rows())

    def build_large(self, folder, nbytes):
        return models.save_torchscript(folder, *models.torch_rows(nbytes))


class SavedModelModels:
    def build_echo(self, folder, datatypes):
        return models.savedmodel_echo(folder, datatypes)

    def build_rows(self, folder):
        return models.savedmodel_rows(folder)

    def build_large(self, folder, nbytes):
        return models.savedmodel_rows(folder, nbytes)


class KerasModels:
    def build_echo(self, folder, datatypes):
        return models.keras_echo(folder, datatypes)

    def build_rows(self, folder):
        return models.keras_rows(folder)

    def build_large(self, folder, nbytes):
        return models.keras_rows(folder, nbytes)


class CustomModels:
    def build_echo(self, folder, datatypes):
        return models.custom_echo(folder, datatypes)

    def build_rows(self, folder):
        return models.custom_rows(folder)

    def build_large(self, folder, nbytes):
        return models.custom_rows(folder, nbytes)


@needs("onnx")
@needs("onnxruntime")
class TestOnnx(OnnxModels, RuntimeSuite):
    framework, format = "onnx", "onnx"
    code = False
    datatypes = ("FP32", "INT64", "BOOL", "FP64", "UINT8", "FP16", "INT8", "BYTES")


@needs("onnx")
@needs("onnxruntime")
@pytest.mark.slow
class TestOnnxMemory(OnnxModels, MemorySuite): ...


@needs("onnx")
@needs("onnxruntime")
class TestExternalOnnx(ExternalOnnxModels, RuntimeSuite):
    framework, format = "onnx", "onnx"
    code = False
    datatypes = ("FP32", "BF16", "UINT16", "INT32", "UINT64")


@needs("torch")
class TestPt2(Pt2Models, RuntimeSuite):
    framework, format = "torch", "pt2"
    datatypes = (*RuntimeSuite.datatypes, "FP16", "BF16")


@needs("torch")
class TestPt2InARunner(TestPt2):
    runner = True


@needs("torch")
@pytest.mark.slow
class TestPt2Memory(Pt2Models, MemorySuite): ...


@needs("torch")
class TestTorchScript(TorchScriptModels, RuntimeSuite):
    pytestmark = TORCH_IS_WARNING
    framework, format = "torch", "torchscript"
    pure = False


@needs("torch")
class TestTorchScriptInARunner(TestTorchScript):
    runner = True


@needs("torch")
@pytest.mark.slow
class TestTorchScriptMemory(TorchScriptModels, MemorySuite):
    pytestmark = TORCH_IS_WARNING


@needs("tensorflow")
class TestSavedModel(SavedModelModels, RuntimeSuite):
    framework, format = "tensorflow", "savedmodel"
    datatypes = (*RuntimeSuite.datatypes, "BYTES")


@needs("tensorflow")
class TestSavedModelInARunner(TestSavedModel):
    runner = True


@needs("tensorflow")
@pytest.mark.slow
class TestSavedModelMemory(SavedModelModels, MemorySuite): ...


@needs("tensorflow")
class TestKeras(KerasModels, RuntimeSuite):
    pytestmark = KERAS_IS_WARNED
    framework, format = "tensorflow", "keras"


@needs("tensorflow")
class TestKerasInARunner(TestKeras):
    runner = True


@needs("tensorflow")
@pytest.mark.slow
class TestKerasMemory(KerasModels, MemorySuite):
    pytestmark = KERAS_IS_WARNED


class TestCustom(CustomModels, RuntimeSuite):
    framework, format = "custom", "custom"
    datatypes = (*RuntimeSuite.datatypes, "BYTES")


class TestCustomInARunner(TestCustom):
    runner = True


@pytest.mark.slow
class TestCustomMemoryInARunner(CustomModels, MemorySuite):
    runner = True
