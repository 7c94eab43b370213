"""A gateway as a source of blobs: a real one on a real socket, before a manager's operations on a real store."""

import asyncio
import base64
import pickle
from contextlib import asynccontextmanager

import pytest
from gateway_rig import KEY, running

from tether.client.blob_sources import GatewayBlobs
from tether.errors import RemoteError, ServiceUnavailableError, UnauthenticatedError
from tether.manager.operations import Operations
from tether.security.identity import Identity
from tether.store import Repository
from tether.store.replicas.fetching import FetchRules
from tether.store.replicas.replicated import Replicated
from tether.testing.blob_sources import BlobSourceSuite, publish_bytes

LAB = Identity(bytes(range(32)))


class TestGatewayBlobs(BlobSourceSuite):
    @asynccontextmanager
    async def open_source(self, repository):
        with running() as self.rig:
            self.rig.dispatcher.management = Operations(repository, LAB, repository.root / "publishing")
            yield GatewayBlobs(f"http://127.0.0.1:{self.rig.port}", KEY)

    async def cut_off(self, source):
        assert str(self.rig.port) in source.name
        self.rig.call(self.rig.stop.set)
        await asyncio.to_thread(self.rig.thread.join, 20)


async def test_without_a_key_that_may_manage_it_says_so(gateway):
    source = GatewayBlobs(f"http://127.0.0.1:{gateway.port}")
    with pytest.raises(UnauthenticatedError):
        await source.fetch("0" * 64, 1)
    await source.aclose()


async def test_an_answer_that_is_no_manifest_is_a_gateways_fault(monkeypatch):
    source = GatewayBlobs("http://127.0.0.1:9", KEY)
    for answer in (
        {},
        {"manifest": "?", "publisher": "p", "signature": "00"},
        {"manifest": "", "publisher": "p", "signature": "xy"},
        {"manifest": 1},
    ):

        async def answered(_, answer=answer):
            return answer

        monkeypatch.setattr(source._client, "signed_manifest", answered)
        with pytest.raises(RemoteError, match="no signed manifest"):
            await source.manifest("0" * 64)
    assert base64.b64decode("", validate=True) == b""


def test_it_travels_to_another_process_and_shows_no_key():
    source = pickle.loads(pickle.dumps(GatewayBlobs("http://127.0.0.1:8000", KEY)))  # noqa: S301 (our own)
    assert (source.name, source._api_key) == ("http://127.0.0.1:8000", KEY)
    assert KEY not in repr(source)


def test_a_notebook_reads_one_layer_of_a_model_that_lies_behind_a_gateway(tmp_path):
    files = {"model.onnx": b"a graph", "weights.bin": bytes(range(256)) * 20_000}
    with Repository.open(tmp_path / "origin", own=LAB.public) as origin, running() as rig:
        digest = publish_bytes(origin, files)
        rig.dispatcher.management = Operations(origin, LAB, tmp_path / "publishing")
        sources = [GatewayBlobs(f"http://127.0.0.1:{rig.port}", KEY)]
        with Repository.open(tmp_path / "local") as local, Replicated(local, sources, FetchRules(give_up=1.0)) as replica:
            with pickle.loads(pickle.dumps(replica)) as again:  # noqa: S301 (our own)
                array = next(array for array in again.manifest(digest).arrays if array.path == "files/weights.bin")
                assert again.read_array(array, 4, 9) == files["weights.bin"][4:9]
                assert again.local.read_only
                again.local.close()
            rig.call(rig.stop.set)
            rig.thread.join(20)
            with pytest.raises(ServiceUnavailableError, match="did not give it within 1 s"):
                replica.replicate(digest, "digits")
