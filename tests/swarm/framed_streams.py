"""`ports.MessageStream` over TCP as tests/swarm/node/framed.js makes it: three bytes of length before each message, no secrets."""

import asyncio

from tether.errors import ServiceUnavailableError

INITIATOR, RESPONDER = "11" * 32, "22" * 32


class FramedStream(asyncio.Protocol):
    def __init__(self, peer, *, is_initiator):
        self.peer, self.is_initiator = peer, is_initiator
        self.transport = None
        self.clear = asyncio.Event()
        self.clear.set()
        self.buffer = bytearray()
        self.callbacks = None
        self.ended = self.heard_end = self.closed = False

    def connection_made(self, transport):
        self.transport = transport

    def start(self, on_message, on_end, on_close):
        self.callbacks = on_message, on_end, on_close
        asyncio.get_running_loop().call_soon(self.deliver)

    def data_received(self, data):
        self.buffer += data
        if self.callbacks is not None:
            self.deliver()

    def deliver(self):
        while len(self.buffer) >= 3:
            end = 3 + int.from_bytes(self.buffer[:3], "little")
            if len(self.buffer) < end:
                return
            message = bytes(self.buffer[3:end])
            del self.buffer[:end]
            self.callbacks[0](memoryview(message))

    def eof_received(self):
        self.heard_end = True
        if self.callbacks is not None:
            self.callbacks[1]()
        return not self.ended

    def connection_lost(self, exc):
        self.closed = True
        self.clear.set()
        if self.callbacks is not None:
            self.callbacks[2](exc)

    def pause_writing(self):
        self.clear.clear()

    def resume_writing(self):
        self.clear.set()

    def send(self, message):
        if not self.closed and not self.ended:
            self.transport.write(len(message).to_bytes(3, "little") + message)
        return self.clear.is_set()

    async def drained(self):
        await self.clear.wait()
        if self.closed:
            raise ServiceUnavailableError("closed")

    def pause(self):
        self.transport.pause_reading()

    def resume(self):
        self.transport.resume_reading()

    def end(self):
        if not self.closed and not self.ended:
            self.ended = True
            if self.heard_end:
                self.transport.close()
            else:
                self.transport.write_eof()

    def destroy(self):
        self.transport.abort()


async def connect(port):
    _, stream = await asyncio.get_running_loop().create_connection(lambda: FramedStream(RESPONDER, is_initiator=True), "127.0.0.1", port)
    return stream


async def listen(on_stream):
    """Gives the server and its port; `on_stream` gets each stream."""

    class Accepted(FramedStream):
        def connection_made(self, transport):
            super().connection_made(transport)
            on_stream(self)

    server = await asyncio.get_running_loop().create_server(lambda: Accepted(INITIATOR, is_initiator=False), "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]
