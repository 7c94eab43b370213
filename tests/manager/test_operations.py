"""The manager answers while it publishes, and who gives up in the middle leaves nothing half done."""

import asyncio
import resource
import threading
import time

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tether.errors import NoSpaceError
from tether.manager.operations import Operations
from tether.security.identity import Identity
from tether.store import FILES, Repository

LAB = Identity(bytes(range(32)))
PROMPT = 20.0


class Held(Repository):
    """A store whose disk waits for `go` where `hold` says; `reached` tells that it does."""

    hold, reached, go = "", threading.Event(), threading.Event()

    def _wait(self, step):
        if step == self.hold:
            self.reached.set()
            assert self.go.wait(PROMPT)

    def read_draft_blob(self, digest):
        self._wait("assemble")
        return super().read_draft_blob(digest)

    def publish(self, *arguments, **options):
        self._wait("commit")
        return super().publish(*arguments, **options)

    def set_alias(self, *arguments):
        self._wait("alias")
        return super().set_alias(*arguments)


@pytest.fixture
def repository(tmp_path):
    with Held.open(tmp_path / "store", own=LAB.public) as repository:
        repository.reached, repository.go = threading.Event(), threading.Event()
        yield repository
        repository.go.set()


@pytest.fixture
def operations(repository, tmp_path):
    return Operations(repository, LAB, tmp_path / "publishing")


@pytest.fixture
def draft(repository, tmp_path):
    """A small model's upload."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.ones((16, 4), np.float32), "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx")
    arrays = repository.add_files(tmp_path / "model.onnx")
    files = [
        {"path": each.path.removeprefix(f"{FILES}/"), "nbytes": each.nbytes, "segments": msgspec.to_builtins(each.segments)}
        for each in arrays
    ]
    return {"files": files, "entry": "model.onnx", "aliases": ["prod"]}


async def held(repository, work):
    """The task, begun and held up at the disk."""
    task = asyncio.create_task(work)
    deadline = time.monotonic() + PROMPT
    while not repository.reached.is_set():
        assert not task.done(), task.result()
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    return task


async def given_up(repository, task):
    """Cancelled while the disk is at work, which then goes on."""
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    repository.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("step", ["assemble", "commit"])
async def test_others_are_answered_while_the_disk_works_for_a_publish(repository, operations, draft, step):
    repository.hold = step
    publishing = await held(repository, operations.publish("tiny", draft))
    assert await asyncio.wait_for(operations.models(), PROMPT / 2) == []
    repository.go.set()
    assert (await publishing)["version"] == 1
    assert (await operations.model("tiny"))["aliases"] == {"latest": 1, "prod": 1}


async def test_others_are_answered_while_the_disk_takes_an_alias(repository, operations, draft):
    await operations.publish("tiny", draft)
    repository.hold = "alias"
    moving = await held(repository, operations.set_alias("tiny", "best", 1))
    assert (await asyncio.wait_for(operations.models(), PROMPT / 2))[0]["aliases"] == {"latest": 1, "prod": 1}
    repository.go.set()
    assert await moving == {"alias": "best", "from": None, "to": 1}


async def test_a_publish_that_is_cancelled_before_its_commit_leaves_nothing(repository, operations, draft, tmp_path):
    repository.hold = "assemble"
    await given_up(repository, await held(repository, operations.publish("tiny", draft)))
    assert await operations.models() == []
    assert list((tmp_path / "publishing").iterdir()) == []


async def test_a_publish_that_is_cancelled_in_its_commit_is_whole(repository, operations, draft, tmp_path):
    repository.hold = "commit"
    await given_up(repository, await held(repository, operations.publish("tiny", draft)))
    (model,) = await operations.models()
    assert (model["aliases"], len(model["versions"])) == ({"latest": 1, "prod": 1}, 1)
    assert (await operations.verify("tiny", None))["ok"]
    assert list((tmp_path / "publishing").iterdir()) == []


async def test_a_full_disk_refuses_the_publish_by_name_and_loses_nothing(operations, draft, tmp_path):
    large = tmp_path / "large.onnx"
    large.write_bytes(np.random.default_rng(3).bytes(200_000))
    (array,) = operations._repository.add_files(large)
    files = [{"path": "large.onnx", "nbytes": array.nbytes, "segments": msgspec.to_builtins(array.segments)}]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # what a full disk is to this process
    try:
        with pytest.raises(NoSpaceError, match="free some"):
            await operations.publish("large", {"files": files, "entry": "large.onnx"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "publishing").iterdir()) == []
    assert (await operations.publish("tiny", draft))["version"] == 1
    assert [model["name"] for model in await operations.models()] == ["tiny"]
