"""One timer for all calls that end at some time."""

from tether.swarm.rpc.expiry import NEVER, Expiry


class Loop:
    """A clock, and timers that fire when it is moved on."""

    def __init__(self):
        self.now, self.timers, self.made = 0.0, [], 0

    def time(self):
        return self.now

    def call_at(self, at, callback):
        self.made += 1
        timer = Timer(self, at, callback)
        self.timers.append(timer)
        return timer

    def go_to(self, now):
        self.now = now
        for timer in [timer for timer in self.timers if timer.at <= now]:
            self.timers.remove(timer)
            timer.callback()


class Timer:
    def __init__(self, loop, at, callback):
        self.loop, self.at, self.callback = loop, at, callback

    def cancel(self):
        self.loop.timers.remove(self)


class Ends:
    """Times at which something is over; those that were ended, and when."""

    def __init__(self, grain):
        self.loop, self.open, self.ended = Loop(), [], []
        self.expiry = Expiry(self.loop, self.look, grain)

    def expect(self, *ends):
        for end in ends:
            self.open.append(end)
            self.expiry.expect(end)

    def look(self, now):
        self.ended += [(end, now) for end in self.open if end <= now]
        self.open = [end for end in self.open if end > now]
        return min(self.open, default=NEVER)


def test_a_thousand_that_end_later_cost_no_timer():
    ends = Ends(0.1)
    ends.expect(*range(10, 1010))
    assert ends.loop.made == 1


def test_each_ends_whatever_the_order_in_which_they_came():
    ends = Ends(0.1)
    ends.expect(5.0, 2.0, 9.0)
    for now in (2.0, 5.0, 9.0):
        ends.loop.go_to(now)
    assert ends.ended == [(2.0, 2.0), (5.0, 5.0), (9.0, 9.0)]
    assert not ends.loop.timers


def test_it_looks_no_more_often_than_told():
    ends = Ends(0.1)
    ends.expect(*(1.0 + number / 100 for number in range(10)))
    ends.loop.go_to(1.0)
    assert [timer.at for timer in ends.loop.timers] == [1.1]
    ends.loop.go_to(1.1)
    assert len(ends.ended) == 10


def test_what_is_done_before_leaves_nothing_behind():
    ends = Ends(0.1)
    ends.expect(1.0)
    ends.open.clear()
    ends.loop.go_to(1.0)
    assert not ends.loop.timers
    ends.expect(2.0)
    ends.expiry.stop()
    assert not ends.loop.timers


def test_what_never_ends_needs_no_timer():
    ends = Ends(0.1)
    ends.expect(NEVER)
    assert not ends.loop.timers
