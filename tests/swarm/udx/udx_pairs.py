"""Two ends of a stream on this machine, and what came to each."""

import asyncio

from tether.swarm.udx import Udx, UdxStream

PATIENCE = 30.0


class End:
    """A stream that remembers all that it was told."""

    def __init__(self, udx, stream_id, **callbacks):
        self.data = bytearray()
        self.messages = []
        self.events = []
        self.closed = asyncio.get_running_loop().create_future()
        told = {
            "on_data": self.data.extend,
            "on_message": self.messages.append,
            "on_end": lambda: self.events.append("end"),
            "on_drain": lambda: self.events.append("drain"),
            "on_remote_changed": lambda: self.events.append("moved"),
            "on_close": lambda code: self.closed.done() or self.closed.set_result(code),
        }
        self.stream = UdxStream(udx, stream_id, **(told | callbacks))

    async def until_closed(self):
        return await asyncio.wait_for(asyncio.shield(self.closed), PATIENCE)


async def until(condition, patience=PATIENCE):
    """Waits for a condition, which is asked at each turn of the loop."""
    deadline = asyncio.get_running_loop().time() + patience
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come to be"
        await asyncio.sleep(0.002)


class Pair:
    """Two sockets, each of its own `Udx`, and a stream between them."""

    def __init__(self, host="127.0.0.1", **options):
        self.left_udx, self.right_udx = Udx(**options), Udx(**options)
        self.left_socket, self.right_socket = self.left_udx.socket(), self.right_udx.socket()
        self.host = host
        self.left_port, self.right_port = self.left_socket.bind(0, host), self.right_socket.bind(0, host)
        self.left, self.right = End(self.left_udx, 1), End(self.right_udx, 2)

    def connect(self):
        self.left.stream.connect(self.left_socket, 2, self.right_port, self.host)
        self.right.stream.connect(self.right_socket, 1, self.left_port, self.host)
        return self

    def close(self):
        self.left_udx.close()
        self.right_udx.close()
