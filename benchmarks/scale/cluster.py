"""A control plane of any size: its state after workers joined, models were published, and a share of them was asked for and loaded."""

from __future__ import annotations

from collections.abc import Callable

from tether.events import CatalogChanged, CatalogModel, Event, Loaded, ModelWanted, WorkerJoined
from tether.orchestrator.instructions import Load, Push
from tether.orchestrator.state import ControlState
from tether.routing.table import TableChange
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId, WorkerMemory

__all__ = ["Cluster", "catalog", "joined", "version"]

MIB = 1 << 20
_IMAGE = TensorSpec("image", "FP32", (-1, 3, 224, 224))
_SCORES = TensorSpec("scores", "FP32", (-1, 1000))
_INFO = ModelInfo("onnx", "onnx", (_IMAGE,), (_SCORES,), batched=True, pure=True, code=False)
_MODEL_NBYTES = 100 * MIB
_WORKER_NBYTES = 64 << 30


def version(number: int) -> ModelVersion:
    """The only one of a model."""
    return ModelVersion(f"model-{number:05}", 1, Digest(f"{number:064x}"))


def catalog(models: int, count: int = 1) -> CatalogChanged:
    """All that is published."""
    made = map(version, range(models))
    found = {model.name: CatalogModel(model.name, 1, {"latest": 1}, {1: (model, _INFO)}) for model in made}
    return CatalogChanged("tls://127.0.0.1:8004", count, found, 1)


def joined(number: int, life: int = 0) -> WorkerJoined:
    """One of the workers, with room for some hundreds of models; eight on a host."""
    address = f"tls://10.0.{number // 8 // 256}.{number // 8 % 256}:{8001 + number % 8}"
    return WorkerJoined(WorkerId(f"worker-{number}"), address, 1000 * life + number + 1, 0, WorkerMemory(0, _WORKER_NBYTES))


def _nobody(_: TableChange) -> None:
    """Nobody follows."""


class Cluster:
    """Its workers load at once what they are told to. `push`: gets each change of the table."""

    def __init__(self, workers: int, models: int, loaded: int, state: ControlState | None = None) -> None:
        self.state, self.now = state or ControlState(), 0.0
        self.push: Callable[[TableChange], object] = _nobody
        self._has: dict[str, dict[str, int]] = {}
        self.do(catalog(models))
        for number in range(workers):
            self.do(joined(number))
        for number in range(loaded):
            self.settle(ModelWanted(version(number)))

    def do(self, event: Event) -> list[Load]:
        """What workers are to load for that."""
        self.now += 0.001
        instructions = self.state.handle(event, self.now)
        for each in instructions:
            if isinstance(each, Push):
                self.push(each.change)
        return [each for each in instructions if isinstance(each, Load)]

    def settle(self, event: Event) -> None:
        """That, and all loads that come of it."""
        loads = self.do(event)
        while loads:
            loads += self.do(self.answer(loads.pop()))

    def answer(self, load: Load) -> Loaded:
        """The worker has it."""
        has = self._has.setdefault(load.address, {})
        has[str(load.model)] = _MODEL_NBYTES
        memory = WorkerMemory(_MODEL_NBYTES * len(has), _WORKER_NBYTES, dict(has))
        return Loaded(load.address, load.pid, load.model, f"/run/{load.pid}/{load.model}", memory)
