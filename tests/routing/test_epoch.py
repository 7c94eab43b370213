"""How a gateway knows another orchestrator: by the epoch of its tables, which each change of them keeps."""

from tether.events import CatalogChanged, CatalogModel, WorkerJoined
from tether.orchestrator.state import ControlState
from tether.routing.table import Table, TableChange
from tether.types import Digest, ModelInfo, ModelVersion, WorkerId

DIGITS = ModelVersion("digits", 1, Digest("1" * 64))
INFO = ModelInfo("onnx", "onnx", (), (), batched=True, pure=True, code=False)
CATALOG = CatalogChanged("tls://m", 1, {"digits": CatalogModel("digits", 1, {}, {1: (DIGITS, INFO)})}, 1)


def lab(epoch, workers=1):
    state = ControlState(2, epoch)
    for event in (CATALOG, *(WorkerJoined(WorkerId(f"w{number}"), f"tls://w{number}", number, 0) for number in range(workers))):
        state.handle(event, 0.0)
    return state.table


def test_all_tables_of_one_orchestrator_follow_each_other():
    first, second = lab(7), lab(7, workers=3)
    assert (first.epoch, second.epoch) == (7, 7)
    assert second.follows(first)
    assert not first.follows(second)
    assert not first.follows(first)


def test_one_that_counts_further_is_another_one_all_the_same():
    assert lab(8, workers=9).seq > lab(7).seq
    assert not lab(8, workers=9).follows(lab(7))


def test_a_change_and_a_part_keep_it():
    table = lab(7)
    change = TableChange(table.seq + 1, models={"digits": None})
    assert table.amended(change).follows(table)
    assert table.amended(change).part(change).follows(table.part(change))
    assert Table().epoch == 0
