"""The way between two sites, as a router: `netns_path.py JSON` passes what comes on the interface `path` on, later, or not at all.

delay    seconds that each packet takes             loss     share of packets that get lost
rate     bytes a second that pass; 0: no limit      queue    bytes that wait for that; what comes beyond them is lost
hops     by how many routers more the time to live of a packet shrinks

A line of standard input, JSON, changes them; the answer counts what became of packets so far.
"""

import collections
import fcntl
import json
import os
import random
import select
import struct
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
SIXTEEN = struct.Struct("!H")


class Path:
    def __init__(self, tun, *, delay=0.0, loss=0.0, rate=0.0, queue=1 << 20, hops=0):
        self.tun, self.fate = tun, random.Random("path")
        self.delay, self.loss, self.rate, self.queue, self.hops = delay, loss, rate, queue, hops
        self.counts = {"passed": 0, "lost": 0, "overflowed": 0, "expired": 0, "nbytes": 0}
        self.waiting = collections.deque()
        self.free_at = 0.0  # when the last packet that waits has left

    def change(self, **changes):
        vars(self).update(changes)
        return self.counts

    def take(self, packet, now):
        """Its fate, all of it, now; the deque is in order as long as the delay does not shrink."""
        if self.fate.random() < self.loss:
            self.counts["lost"] += 1
        elif self.hops and not self.live(packet):
            self.counts["expired"] += 1
        else:
            self.free_at = max(self.free_at, now)
            if self.rate:
                if (self.free_at - now) * self.rate > self.queue:
                    self.counts["overflowed"] += 1
                    return
                self.free_at += len(packet) / self.rate
            self.waiting.append((self.free_at + self.delay, packet))

    def live(self, packet):
        """IPv4: time to live is byte 8, and the header's checksum says it too (RFC 1624). IPv6: byte 7."""
        at = 8 if packet[0] >> 4 == 4 else 7
        if packet[at] <= self.hops:
            return False
        packet[at] -= self.hops
        if at == 8:
            checksum = SIXTEEN.unpack_from(packet, 10)[0] + (self.hops << 8)
            SIXTEEN.pack_into(packet, 10, (checksum & 0xFFFF) + (checksum >> 16))
        return True

    def give(self, now):
        waiting, counts = self.waiting, self.counts
        while waiting and waiting[0][0] <= now:
            packet = waiting.popleft()[1]
            counts["passed"] += 1
            counts["nbytes"] += len(packet)
            try:
                os.write(self.tun, packet)
            except OSError:  # nobody has such an address
                counts["lost"] += 1

    def run(self):
        poll, stdin = select.poll(), sys.stdin.fileno()
        poll.register(self.tun, select.POLLIN)
        poll.register(stdin, select.POLLIN)
        while True:
            now = time.monotonic()
            wait = None if not self.waiting else max(0.0, self.waiting[0][0] - now) * 1e3
            ready = poll.poll(wait)
            self.give(time.monotonic())
            for descriptor, _ in ready:
                if descriptor == stdin:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    print(json.dumps(self.change(**json.loads(line))), flush=True)
                else:
                    self.read()

    def read(self):
        for _ in range(64):
            try:
                packet = bytearray(os.read(self.tun, 65536))
            except BlockingIOError:
                return
            self.take(packet, time.monotonic())


if __name__ == "__main__":
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", b"path", IFF_TUN | IFF_NO_PI))
    print("ready", flush=True)
    Path(descriptor, **json.loads(sys.argv[1])).run()
