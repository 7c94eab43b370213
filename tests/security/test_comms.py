"""No connection of the cluster outlives who wanted it: cancelled in any turn of the loop, or when the loop ends."""

import asyncio
import socket
import time
from pathlib import Path

import dask.config
import pytest
from distributed.core import Server, connect

from tether.config import HOUSEKEEPING
from tether.security.comms import dask_security
from tether.security.tls import ensure_tls

PROMPT = 20.0
TURNS = 24
"""More than a connection takes from the first call to the last answer."""


@pytest.fixture(scope="module")
def security(tmp_path_factory):
    with dask.config.set(HOUSEKEEPING):
        yield dask_security(ensure_tls(tmp_path_factory.mktemp("tls"), "gateway"))


def sockets():
    names = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    return {name for name in names if name.startswith("socket:")}


async def all_closed_but(before):
    deadline = time.monotonic() + PROMPT
    while left := sockets() - before:
        assert time.monotonic() < deadline, f"{len(left)} sockets stay open"
        await asyncio.sleep(0.01)


async def test_a_connection_that_came_to_be_in_the_turn_of_the_loop_in_which_its_caller_was_cancelled_is_closed(security):
    """In each turn once the loop comes late: to what came meanwhile, and to the cancellation after it."""
    server = Server({})
    await server.listen("tls://127.0.0.1:0", **security.get_listen_args("worker"))
    comm = await connect(server.address, **security.get_connection_args("client"))
    comm.abort()  # before it is counted what is open: the server holds something for the first one
    await asyncio.sleep(0.1)
    before = sockets()
    for turn in range(TURNS):
        connecting = asyncio.create_task(connect(server.address, **security.get_connection_args("client")))
        for _ in range(turn):
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0, connecting.cancel)
        time.sleep(0.002)  # noqa: ASYNC251 (the loop comes late)
        for comm in await asyncio.gather(connecting, return_exceptions=True):
            if not isinstance(comm, BaseException):
                comm.abort()
    await all_closed_but(before)
    await server.close()


def test_a_caller_that_is_in_the_handshake_when_the_loop_ends_leaves_nothing_open(security):
    before = sockets()

    async def serve():
        server = Server({})
        await server.listen("tls://127.0.0.1:0", **security.get_listen_args("worker"))
        host, port = server.listener.get_host_port()
        caller = socket.create_connection((host, port))
        for _ in range(TURNS):
            await asyncio.sleep(0)
        await server.close()
        return caller

    asyncio.run(serve()).close()
    assert not sockets() - before


async def test_the_next_address_of_a_host_is_tried_where_one_does_not_answer(security, monkeypatch):
    server = Server({})
    await server.listen("tls://127.0.0.1:0", **security.get_listen_args("worker"))
    port = server.listener.get_host_port()[1]
    with socket.create_server(("127.0.0.2", 0), backlog=0) as silent:
        addresses = [(socket.AF_INET, silent.getsockname()), (socket.AF_INET, ("127.0.0.3", port)), (socket.AF_INET, ("127.0.0.1", port))]

        async def resolve(*_):
            return addresses

        monkeypatch.setattr("tether.security.comms._Connector.client.resolver.resolve", resolve)
        comm = await connect(f"tls://localhost:{port}", timeout=PROMPT, **security.get_connection_args("client"))
    comm.abort()
    await server.close()


async def test_an_address_whose_handshake_is_slow_is_waited_for_where_the_last_one_does_not_answer(security, monkeypatch):
    server = Server({})
    await server.listen("tls://127.0.0.1:0", **security.get_listen_args("worker"))
    port = server.listener.get_host_port()[1]
    monkeypatch.setattr("tether.security.comms._NEXT", 0.0)  # the first one has no time at all before the next is tried
    addresses = [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET, ("127.0.0.3", port))]

    async def resolve(*_):
        return addresses

    monkeypatch.setattr("tether.security.comms._Connector.client.resolver.resolve", resolve)
    before = sockets()
    comm = await connect(f"tls://localhost:{port}", timeout=PROMPT, **security.get_connection_args("client"))
    comm.abort()
    await all_closed_but(before)
    await server.close()
