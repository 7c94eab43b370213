"""How fast bytes of an application that waits when it is asked to pass a simulated path: 40 ms of round trip, losses, a short queue."""

from udx_simulation import Network, Side, Simulation

from tether.swarm.udx import machine as udx

PIECE = bytes(1 << 18)
MEBIBYTE = 1 << 20


class Bulk(Simulation):
    """The left side writes whenever it may; `seconds` is when the right one has heard the end."""

    def __init__(self, nbytes, network):
        left = Side("left", udx.Machine(0.0), network, [])
        super().__init__("bulk", left, Side("right", udx.Machine(0.0), Network(delay=network.delay), []))
        self.left_over, self.got, self.seconds = nbytes, 0, 0.0
        self.at(0.0, self.feed, left)
        while not self.seconds:
            self.step()

    def end(self, side):
        if side.name == "right":
            super().end(side)

    def feed(self, side):
        while self.left_over > 0:
            self.left_over -= len(PIECE)
            if not side.machine.write(PIECE):
                break
        if self.left_over <= 0:
            side.machine.end()
        self.at(self.now, self.settle, side)

    def tell(self, side, event):
        match event:
            case udx.Drained():
                self.feed(side)
            case udx.Data(data):
                self.got += len(data)
            case udx.Ended() if side.name == "right":
                self.seconds = self.now


def path(rate, loss=0.0):
    return Network(delay=0.02, rate=rate, loss=loss, queue=int(rate / 50), mtu=[(0.0, 1500)], batched=True)


def test_on_a_path_with_losses_bytes_behind_a_hole_do_not_keep_the_application_from_writing():
    bulk = Bulk(64 * MEBIBYTE, path(25e6, 0.01))
    assert bulk.got == 64 * MEBIBYTE
    assert bulk.got / bulk.seconds > 0.75 * 25e6  # 14 MB/s when they counted as waiting


def test_the_beginning_doubles_each_round_trip():
    bulk = Bulk(4 * MEBIBYTE, path(100e6))
    assert bulk.seconds < 0.45  # eight doublings of ten packets, and the way there
