"""The manager as a source of blobs, over Dask's comms under mutual TLS, found through the orchestrator."""

from contextlib import asynccontextmanager

import dask.config
import pytest
from distributed import Scheduler

from tether.config import HOUSEKEEPING
from tether.errors import ServiceUnavailableError
from tether.events import CatalogChanged
from tether.manager.cluster_server import ClusterServer
from tether.manager.operations import Operations
from tether.orchestrator.plugin import OrchestratorPlugin
from tether.security.comms import dask_security
from tether.security.identity import Identity
from tether.security.tls import ensure_tls
from tether.testing.blob_sources import BlobSourceSuite
from tether.worker.manager_blobs import ManagerBlobs
from tether.worker.service import Cluster
from tether.worker.service import _Manager as Link

LAB = Identity(bytes(range(32)))


class TestManagerBlobs(BlobSourceSuite):
    @pytest.fixture(autouse=True)
    def cluster_of_tls(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tether.worker.service._CONNECT", 0.5)
        (tmp_path / "tls").mkdir()
        with dask.config.set(HOUSEKEEPING):
            self.security = dask_security(ensure_tls(tmp_path / "tls", "worker"))
            self.workspace = tmp_path / "publishing"
            yield

    @asynccontextmanager
    async def open_source(self, repository):
        arguments = self.security.get_listen_args("worker")
        options = {"host": "127.0.0.1", "port": 0, "protocol": "tls", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        async with Scheduler(security=self.security, **options) as scheduler:
            plugin = OrchestratorPlugin()
            await plugin.start(scheduler)
            scheduler.add_plugin(plugin)
            operations = Operations(repository, LAB, self.workspace)
            self.manager = ClusterServer(operations, scheduler.address, self.security)
            await self.manager.listen("tls://127.0.0.1:0", **arguments)
            plugin._handle(CatalogChanged(self.manager.address, 1, {}, 1))
            link = Link(Cluster(scheduler.address, self.security.get_connection_args("worker")))
            yield ManagerBlobs(link.ask, link.close)
            await self.manager.close()
            operations.close()

    async def cut_off(self, source):
        """As when its process dies."""
        assert source.name == "manager"
        await self.manager.close()
        for comm in list(self.manager._comms):
            comm.abort()

    async def test_before_a_manager_is_known_it_does_not_answer(self):
        link = Link(Cluster("tls://127.0.0.1:9", self.security.get_connection_args("worker")))
        with pytest.raises(ServiceUnavailableError):
            await ManagerBlobs(link.ask, link.close).fetch("0" * 64, 1)
