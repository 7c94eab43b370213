"""Peers of a relay, and how they come to it, in one process: for the tests of relaying and of labs that relay."""

import asyncio

import framed_streams

from tether.swarm.relaying.pairs import PROTOCOL, Wish, pair_message, read_pair
from tether.swarm.udx import Udx, UdxStream
from tether.swarm.wire.line import Line
from tether.swarm.wire.protomux import Received

TOKEN = bytes(range(32))
SECONDS = 10


class Party:
    """A peer of the relay: asks over TCP in place of a secure stream, and has a UDX socket and stream, number 1."""

    def __init__(self, key, stream, heard):
        self.key, self.udx, self.heard = key, Udx(), heard
        self.socket = self.udx.socket()
        self.port = self.socket.bind(0, "127.0.0.1")
        self.data, self.codes = bytearray(), asyncio.Queue()
        self.raw = UdxStream(self.udx, 1, on_data=self.data.extend, on_close=self.codes.put_nowait, on_firewall=lambda *_: False)
        self.line = Line(stream, 1 << 20)
        self.channel = self.line.mux.open(PROTOCOL, bytes.fromhex(key))
        self.closed = asyncio.Event()
        self.line.open(self.on_event, lambda _: self.closed.set())

    def on_event(self, event):
        if isinstance(event, Received):
            self.heard.put_nowait((self.key, read_pair(event.body)))

    def ask(self, token, *, is_initiator):
        self.line.post(self.channel, pair_message(Wish(is_initiator, token, 1)))


class Meeting:
    """A relay's socket, and parties that ask at it; `arrived` is given the relay's end of each stream, with its `carrier`."""

    def __init__(self):
        self.udx, self.heard = Udx(), asyncio.Queue()
        self.parties, self._servers = [], []
        self._socket = self.udx.socket()
        self.port = self._socket.bind(0, "127.0.0.1")

    async def come(self, key, arrived):
        """One more of them."""
        coming = asyncio.get_running_loop().create_future()
        server, port = await framed_streams.listen(coming.set_result)
        self._servers.append(server)
        party = Party(key, await framed_streams.connect(port), self.heard)
        self.parties.append(party)
        stream = await coming
        stream.peer, stream.carrier = key, UdxStream(self.udx, len(self.parties))
        stream.carrier.connect(self._socket, 1, party.port, "127.0.0.1")
        arrived(stream)
        return party

    async def join(self, first, second):
        """The two ask, are joined, and connect."""
        first.ask(TOKEN, is_initiator=True)
        second.ask(TOKEN, is_initiator=False)
        async with asyncio.timeout(SECONDS):
            wishes = dict([await self.heard.get(), await self.heard.get()])
        for party in (first, second):
            party.raw.connect(party.socket, wishes[party.key].stream_id, self.port, "127.0.0.1")

    async def aclose(self):
        for party in self.parties:
            party.line.destroy()
            party.udx.close()
        self.udx.close()
        for server in self._servers:
            server.close()
        await asyncio.sleep(0)


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (what several machines do has no one event)
            await asyncio.sleep(0.005)
