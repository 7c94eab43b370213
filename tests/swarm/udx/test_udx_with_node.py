"""udx-native of npm, in Node, at the other end of the wire."""

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager

import node_packages
import pytest
from udx_pairs import PATIENCE, End, until
from udx_proxy import Proxy

from tether.swarm.udx import Udx
from tether.testing.requirements import needs

pytestmark = [pytest.mark.swarm, needs("node"), needs("npm")]
MIB = 1 << 20


def bytes_of(seed: str, nbytes: int) -> bytes:
    """What the Node program writes for this seed."""
    return b"".join(hashlib.sha256(f"{seed} {n}".encode()).digest() for n in range(-(-nbytes // 32)))[:nbytes]


class Node:
    """The program, told what to do; `until` waits for what it says."""

    def __init__(self, process, ports):
        self.process, self.ports = process, ports
        self.events = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self):
        while line := await self.process.stdout.readline():
            self.events.append(json.loads(line))

    def do(self, what, **arguments):
        self.process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")

    async def until(self, event, **known):
        """The first event of this kind with these values."""
        wanted = {"event": event, **known}
        await until(lambda: any(wanted.items() <= each.items() for each in self.events))
        return next(each for each in self.events if wanted.items() <= each.items())


@asynccontextmanager
async def node_program(host="127.0.0.1"):
    process = await asyncio.create_subprocess_exec(
        "node", "udx_peer.js", host, cwd=node_packages.node_folder(), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE):
            node = Node(process, json.loads(await process.stdout.readline())["ports"])
        yield node
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await node._reader
        process._transport.close()


class Meeting:
    """Our side: a socket, and streams whose peers are in Node."""

    def __init__(self, node, host):
        self.node, self.host, self.udx = node, host, Udx()
        self.sockets = self.udx.socket(), self.udx.socket()
        self.ports = [each.bind(0, host) for each in self.sockets]

    def stream(self, ours, theirs, *, socket=0, node_socket=0, through=None, **callbacks):
        """A connected pair. `through`: ports that stand in for Node's and for ours."""
        to_node, to_us = through or (self.node.ports[node_socket], self.ports[socket])
        end = End(self.udx, ours, **callbacks)
        end.stream.connect(self.sockets[socket], theirs, to_node, self.host)
        self.node.do("create", id=theirs)
        self.node.do("connect", id=theirs, socket=node_socket, remote=ours, port=to_us)
        return end


@asynccontextmanager
async def meeting_on(host):
    async with node_program(host) as node:
        meeting = Meeting(node, host)
        try:
            yield meeting
        finally:
            meeting.udx.close()


@pytest.fixture
async def meeting():
    async with meeting_on("127.0.0.1") as meeting:
        yield meeting


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_bytes_go_both_ways_and_both_ends_close(host):
    async with meeting_on(host) as meeting:
        end = meeting.stream(1, 2)
        ours, theirs = bytes_of("ours", 3 * MIB), bytes_of("theirs", 3 * MIB)
        end.stream.write(ours)
        end.stream.write_end()
        meeting.node.do("write", id=2, seed="theirs", nbytes=len(theirs))
        meeting.node.do("end", id=2)
        assert await end.until_closed() is None
        assert bytes(end.data) == theirs
        told = await meeting.node.until("end", id=2)
        assert (told["nbytes"], told["sha"]) == (len(ours), hashlib.sha256(ours).hexdigest())
        await meeting.node.until("close", id=2)
        assert not [event for event in meeting.node.events if event.get("event") == "error"]


async def test_one_side_may_end_while_the_other_goes_on(meeting):
    first, second = meeting.stream(1, 2), meeting.stream(3, 4)
    first.stream.write(b"ours")
    first.stream.write_end()
    meeting.node.do("end", id=4)
    await meeting.node.until("end", id=2, nbytes=4)
    await until(lambda: second.events == ["end"])
    meeting.node.do("write", id=2, seed="late", nbytes=MIB)
    second.stream.write(bytes_of("later", MIB))
    await until(lambda: len(first.data) == MIB)
    assert bytes(first.data) == bytes_of("late", MIB)
    meeting.node.do("end", id=2)
    second.stream.write_end()
    told = await meeting.node.until("end", id=4)
    assert told["sha"] == hashlib.sha256(bytes_of("later", MIB)).hexdigest()
    assert [await first.until_closed(), await second.until_closed()] == [None, None]


async def test_each_side_may_destroy(meeting):
    theirs, ours = meeting.stream(1, 2), meeting.stream(3, 4)
    for end, seed in ((theirs, 2), (ours, 4)):
        meeting.node.do("write", id=seed, seed="x", nbytes=10)
        await until(lambda end=end: len(end.data) == 10)
    meeting.node.do("destroy", id=2)
    ours.stream.destroy()
    assert await theirs.until_closed() == "ECONNRESET"
    assert await ours.until_closed() is None
    await meeting.node.until("error", id=4, code="ECONNRESET")


async def test_messages_go_both_ways(meeting):
    end = meeting.stream(1, 2)
    meeting.node.do("message", id=2, data="from node")
    await until(lambda: end.messages == [b"from node"])
    end.stream.send_message(b"from python")
    await meeting.node.until("message", id=2, data="from python")


@pytest.mark.parametrize("trouble", [{"loss": 0.01}, {"loss": 0.01, "delay": 0.005, "jitter": 0.002, "duplicates": 0.02}])
async def test_a_bad_network_costs_time_and_no_bytes(meeting, trouble):
    proxy = Proxy(meeting.ports[0], meeting.node.ports[0], **trouble)
    nbytes = 2 * MIB
    end = meeting.stream(1, 2, through=(proxy.right, proxy.left))
    end.stream.write(bytes_of("ours", nbytes))
    end.stream.write_end()
    meeting.node.do("write", id=2, seed="theirs", nbytes=nbytes)
    meeting.node.do("end", id=2)
    told = await meeting.node.until("end", id=2)
    assert told["sha"] == hashlib.sha256(bytes_of("ours", nbytes)).hexdigest()
    await until(lambda: "end" in end.events)
    assert bytes(end.data) == bytes_of("theirs", nbytes)
    assert await end.until_closed() is None
    assert proxy.lost > 10
    proxy.close()


async def test_each_answers_the_other_s_keepalive(meeting):
    ours, theirs = meeting.stream(1, 2), meeting.stream(3, 4)
    meeting.node.do("write", id=2, seed="x", nbytes=1)
    meeting.node.do("write", id=4, seed="x", nbytes=1)
    await until(lambda: ours.data and theirs.data)
    ours.stream.set_keepalive(20)
    meeting.node.do("keepalive", id=4, ms=20)
    heard = [each.stream.stats["packets_received"] for each in (ours, theirs)]
    await until(
        lambda: all(each.stream.stats["packets_received"] >= before + 5 for each, before in zip((ours, theirs), heard, strict=True))
    )
    assert ours.stream.is_connected
    assert theirs.stream.is_connected


async def test_firewalls_of_both_sides_connect_late_and_keep_what_came(meeting):
    node = meeting.node

    def firewall(socket, host, port):
        late.stream.connect(socket, 2, port, host)
        return False

    late = End(meeting.udx, 1, on_firewall=firewall)
    node.do("create", id=2)
    node.do("connect", id=2, remote=1, port=meeting.ports[0])
    node.do("write", id=2, seed="early", nbytes=MIB)
    await until(lambda: len(late.data) == MIB)
    assert bytes(late.data) == bytes_of("early", MIB)

    node.do("create", id=4, accept=3)
    early = End(meeting.udx, 3)
    early.stream.connect(meeting.sockets[0], 4, node.ports[0], meeting.host)
    early.stream.write(bytes_of("ours", MIB))
    early.stream.write_end()
    told = await node.until("end", id=4)
    assert told["sha"] == hashlib.sha256(bytes_of("ours", MIB)).hexdigest()
    assert (await node.until("asked", id=4))["port"] == meeting.ports[0]


async def test_both_sides_move_in_the_middle(meeting):
    node = meeting.node
    end = End(meeting.udx, 1, on_firewall=lambda *_: False)
    end.stream.connect(meeting.sockets[0], 2, node.ports[0], meeting.host)
    node.do("create", id=2, accept=1)
    node.do("connect", id=2, remote=1, port=meeting.ports[0])
    data = bytes_of("ours", 4 * MIB)
    end.stream.write(data[: 2 * MIB])
    node.do("write", id=2, seed="theirs", nbytes=4 * MIB)
    await until(lambda: len(end.data) > MIB // 2)
    end.stream.change_remote(meeting.sockets[1], 2, node.ports[0], meeting.host)
    node.do("change", id=2, socket=0, remote=1, port=meeting.ports[1])
    end.stream.write(data[2 * MIB :])
    end.stream.write_end()
    node.do("end", id=2)
    told = await node.until("end", id=2)
    assert told["sha"] == hashlib.sha256(data).hexdigest()
    await until(lambda: "end" in end.events)
    assert bytes(end.data) == bytes_of("theirs", 4 * MIB)
    await until(lambda: "moved" in end.events)


async def test_we_relay_between_two_streams_of_node(meeting):
    node = meeting.node
    near, far = meeting.stream(11, 1), meeting.stream(12, 2, socket=1, node_socket=1)
    near.stream.relay_to(far.stream)
    far.stream.relay_to(near.stream)
    node.do("write", id=1, seed="across", nbytes=2 * MIB)
    node.do("end", id=1)
    told = await node.until("end", id=2)
    assert told["sha"] == hashlib.sha256(bytes_of("across", 2 * MIB)).hexdigest()
    node.do("end", id=2)
    await node.until("close", id=1)
    await node.until("close", id=2)


async def test_node_relays_between_two_streams_of_ours(meeting):
    near, far = meeting.stream(1, 11), meeting.stream(2, 12, socket=1, node_socket=1)
    meeting.node.do("relay", id=11, to=12)
    meeting.node.do("relay", id=12, to=11)
    near.stream.write(bytes_of("across", 2 * MIB))
    near.stream.write_end()
    await until(lambda: far.events == ["end"])
    assert bytes(far.data) == bytes_of("across", 2 * MIB)
    far.stream.write_end()
    assert [await near.until_closed(), await far.until_closed()] == [None, None]


async def test_node_waits_for_a_reader_that_pauses(meeting):
    end = meeting.stream(1, 2)
    end.stream.pause()
    meeting.node.do("write", id=2, seed="much", nbytes=8 * MIB)
    meeting.node.do("end", id=2)
    await until(lambda: end.stream.machine.receiver.window() == 0)
    assert not end.data
    end.stream.resume()
    await until(lambda: end.events == ["end"])
    assert bytes(end.data) == bytes_of("much", 8 * MIB)
