"""A small UDP proxy between two ports of this machine that loses, doubles, delays and reorders, in the same way each time."""

import asyncio
import random
import socket


class Proxy:
    """`left` and `right` are the ports that stand in for the peers: who sends to `right` reaches `to_right`, from `left`."""

    def __init__(self, to_left, to_right, *, loss=0.0, delay=0.0, jitter=0.0, duplicates=0.0):
        self.loop = asyncio.get_running_loop()
        self.fate = random.Random("proxy")
        self.loss, self.delay, self.jitter, self.duplicates = loss, delay, jitter, duplicates
        self.passed = self.lost = 0
        self._sockets = [self._socket(), self._socket()]
        self.left, self.right = (each.getsockname()[1] for each in self._sockets)
        left, right = self._sockets
        # What comes to `right` is for the right peer and leaves through `left`, which is the left peer to it.
        self.loop.add_reader(right, self._pass, right, left, ("127.0.0.1", to_right))
        self.loop.add_reader(left, self._pass, left, right, ("127.0.0.1", to_left))

    def _socket(self):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        made.bind(("127.0.0.1", 0))
        return made

    def _pass(self, source, way_out, address):
        for _ in range(64):
            try:
                data = source.recv(2048)
            except BlockingIOError:
                return
            if self.fate.random() < self.loss:
                self.lost += 1
                continue
            self.passed += 1
            for _ in range(1 + (self.fate.random() < self.duplicates)):
                delay = self.delay + self.fate.random() * self.jitter
                if delay:
                    self.loop.call_later(delay, self._send, way_out, data, address)
                else:
                    self._send(way_out, data, address)

    def _send(self, way_out, data, address):
        try:
            way_out.sendto(data, address)
        except OSError:  # its buffer is full, or it was closed: one more that is lost
            self.lost += 1

    def close(self):
        for each in self._sockets:
            self.loop.remove_reader(each)
            each.close()
