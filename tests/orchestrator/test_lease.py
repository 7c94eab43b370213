"""The writer's lease, decided without a network or a clock: one writer at a time, and never one that lacks what was acknowledged."""

import random
import time

import pytest

from tether.events import Claim
from tether.manager.tenure import Tenure
from tether.orchestrator.lease import HEARD, LEASE, Lease, Record


def claim(member, **what):
    return Claim(member, f"tls://{member}", **what)


def with_writer(*in_step):
    """A lease of term 1 that `w` holds at 0.0."""
    lease = Lease()
    lease.claim(claim("w"), 1, 0.0)
    lease.claim(claim("w", holds=1, term=1, wrote=1, in_step=in_step), 1, 0.0)
    return lease


def test_the_first_manager_of_a_new_cluster_writes_at_once():
    lease = with_writer()
    assert (lease.record.holder, lease.record.term) == ("w", 1)
    assert lease.standing().address == "tls://w"


def test_a_second_manager_is_told_whom_to_follow():
    lease = with_writer()
    lease.claim(claim("f"), 2, 1.0)
    assert lease.standing().writer == "w"


def test_a_lease_that_is_not_renewed_goes_to_the_follower_that_is_furthest_and_of_two_to_the_first_by_name():
    lease = with_writer("a", "b", "c")
    for member, change in (("c", 7), ("b", 9), ("a", 8), ("b2", 99)):
        lease.claim(claim(member, term=1, position=(1, change)), 2, LEASE - 0.1)
    assert lease.record.holder == "w"
    lease.claim(claim("a", term=1, position=(1, 8)), 2, LEASE)
    assert (lease.record.holder, lease.record.term) == ("b", 2)
    tied = with_writer("a", "b")
    for member in ("b", "a"):
        tied.claim(claim(member, term=1, position=(1, 9)), 2, LEASE - 0.1)
    tied.decide(LEASE)
    assert tied.record.holder == "a"


def test_a_follower_that_was_not_named_as_being_in_step_waits_for_the_writer_however_long():
    lease = with_writer("a")
    lease.claim(claim("late", term=1, position=(1, 99)), 2, 100.0)
    assert lease.record.holder == "w"
    lease.claim(claim("w", term=1, wrote=1), 3, 101.0)
    assert (lease.record.holder, lease.record.term) == ("w", 2)


def test_a_manager_that_a_person_forces_writes_only_when_nobody_else_can():
    lease = with_writer("a")
    lease.claim(claim("f", forced=True), 2, LEASE + 1)
    assert lease.record.holder == "w"
    lease.claim(claim("f", forced=True), 2, 2 * LEASE)
    assert lease.record.holder == "f"


def test_one_that_was_not_heard_of_lately_is_not_chosen():
    lease = with_writer("a")
    lease.claim(claim("a", term=1), 2, LEASE - HEARD)
    lease.decide(LEASE)
    assert lease.record.holder == "w"


def test_a_writer_that_gives_the_lease_back_is_followed_at_once():
    lease = with_writer("a")
    lease.claim(claim("a", term=1), 2, 0.5)
    lease.left("w", 1, released=True, now=0.6)
    assert lease.record.holder == "a"


def test_the_end_of_an_old_connection_and_what_still_comes_over_it_change_nothing():
    lease = with_writer("a")
    lease.claim(claim("w", holds=1, term=1, wrote=1, in_step=("a",)), 5, 1.0)
    lease.left("w", 1, released=True, now=1.1)
    lease.claim(claim("w", holds=1, term=1, wrote=1), 1, 1.2)
    assert (lease.record.holder, lease.record.in_step) == ("w", ("a",))


def test_a_new_orchestrator_gives_the_lease_back_to_who_holds_it_and_to_others_when_it_must_have_run_out():
    lease = Lease(Record(3, "w", ("a",)), 100.0)
    lease.claim(claim("a", term=3, position=(3, 5)), 1, 100.1)
    lease.claim(claim("w", holds=3, term=3, wrote=3, in_step=("a",)), 2, 100.2)
    assert (lease.record.holder, lease.record.term) == ("w", 3)
    other = Lease(Record(3, "w", ("a",)), 100.0)
    other.claim(claim("a", term=3), 1, 100.0 + LEASE)
    assert (other.record.holder, other.record.term) == ("a", 4)


def test_an_orchestrator_whose_record_was_lost_believes_only_who_wrote_last():
    lease = Lease()
    lease.claim(claim("f", term=7, position=(7, 9)), 1, 0.0)
    lease.claim(claim("f", term=7, position=(7, 9)), 1, 50.0)
    assert lease.record.holder is None
    lease.claim(claim("w", term=7, wrote=7), 2, 51.0)
    assert (lease.record.holder, lease.record.term) == ("w", 8)


def test_a_restarted_process_of_the_writer_gets_a_new_term_at_once():
    lease = with_writer("a")
    lease.claim(claim("w", term=1, wrote=1), 2, 1.0)
    assert (lease.record.holder, lease.record.term, lease.record.in_step) == ("w", 2, ())


def test_a_writers_store_that_was_restored_from_a_backup_does_not_take_the_place_of_a_follower_that_has_more():
    lease = with_writer("a")
    lease.claim(claim("w"), 2, 1.0)
    lease.claim(claim("a", term=1, position=(1, 5)), 3, LEASE)
    assert lease.record.holder == "a"
    alone = with_writer()
    alone.claim(claim("w"), 2, 1.0)
    assert (alone.record.holder, alone.record.term) == ("w", 2)


# --- many managers, slow links, stopped processes


class Manager:
    """A process that claims every second; what it sent and what it was answered is under way for a while. Its log outlives it."""

    def __init__(self, name, drift):
        self.name, self.drift, self.stopped_until, self.slow_until = name, drift, 0.0, 0.0
        self.log, self.position, self.wrote, self.term = [], (0, 0), 0, 0
        self.restart(0)

    def restart(self, connection):
        self.tenure = Tenure(self.name, f"tls://{self.name}", term=self.term, wrote=self.wrote)
        self.connect(connection)

    def connect(self, connection):
        self.connection, self.waiting, self.answers, self.next = connection, False, [], 0.0

    def clock(self, now):
        return now * self.drift

    def writes(self, now):
        return self.tenure.is_valid(self.clock(now))


class Simulation:
    """Time goes in steps of random length; every message takes its own. What is acknowledged is in the log of whoever takes over."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.now, self.connections, self.changes = 0.0, 0, 0
        self.lease = Lease(now=0.0)
        self.managers = [Manager(name, self.random.uniform(0.95, 1.05)) for name in "abc"]
        self.inbox, self.acknowledged, self.takeovers, self.last = [], set(), 0, None

    def step(self):
        self.now += self.random.expovariate(10)
        self.disturb()
        self.deliver()
        running = [manager for manager in self.managers if self.now >= manager.stopped_until]
        for manager in running:
            self.act(manager)
        writers = [manager for manager in self.managers if manager.writes(self.now)]
        assert len(writers) <= 1, f"{[manager.name for manager in writers]} write at {self.now:.1f}"
        for writer in writers:
            if writer in running:
                self.publish(writer, [manager for manager in running if manager is not writer])

    def disturb(self):
        chance, manager = self.random.random(), self.random.choice(self.managers)
        if chance < 0.01:  # SIGSTOP for a while
            manager.stopped_until = self.now + self.random.uniform(0, 12)
        elif chance < 0.02:  # killed, back at once
            self.inbox = [each for each in self.inbox if each[2] is not manager]
            manager.term, manager.wrote = manager.tenure.term, manager.tenure.wrote
            manager.restart(self.new_connection())
        elif chance < 0.03:  # connection lost; what is under way may still come
            manager.connect(self.new_connection())
        elif chance < 0.035:  # orchestrator restarted
            self.lease, self.inbox = Lease(self.lease.record, self.now), []
            for each in self.managers:
                each.connect(self.new_connection())
        elif chance < 0.045:  # fetches something big
            manager.slow_until = self.now + self.random.uniform(0, 20)

    def new_connection(self):
        self.connections += 1
        return self.connections

    def deliver(self):
        due = sorted((each for each in self.inbox if each[0] <= self.now), key=lambda each: each[0])
        self.inbox = [each for each in self.inbox if each[0] > self.now]
        for _, connection, manager, sent in due:
            self.lease.claim(sent, connection, self.now)
            if manager.connection == connection:
                manager.answers.append((self.now + self.delay(), self.lease.standing()))

    def delay(self):
        return self.random.choice((0.001, 0.01, 0.1, 0.1, 1.0)) * self.random.uniform(0, 3)

    def act(self, manager):
        now = manager.clock(self.now)
        ready = [answer for at, answer in manager.answers if at <= self.now]
        if ready:
            manager.answers, manager.waiting = [], False
            if manager.tenure.answered(ready[0]):
                self.begin(manager, ready[0].term)
        if not manager.waiting and self.now >= manager.next:
            if manager.tenure.holds:
                manager.tenure.require(frozenset(each.name for each in self.managers if self.keeps_step(each, manager)))
            dropped = frozenset(name for name in manager.tenure.required if self.is_slow(name))
            sent = manager.tenure.claim(manager.position, dropped, now)
            self.inbox.append((self.now + self.delay(), manager.connection, manager, sent))
            manager.waiting, manager.next = True, self.now + 1.0

    def begin(self, manager, term):
        assert self.acknowledged <= set(manager.log), f"{manager.name} took over without all that was acknowledged"
        self.takeovers += self.last not in {None, manager.name}
        manager.tenure.begin(term)
        manager.position, self.last, manager.next = (term, len(manager.log)), manager.name, 0.0

    def keeps_step(self, manager, writer):
        follows = manager is not writer and not manager.tenure.holds and manager.position[0] == writer.tenure.holds
        return follows and self.acknowledged <= set(manager.log) and not self.is_slow(manager.name)

    def is_slow(self, name):
        manager = next(manager for manager in self.managers if manager.name == name)
        return self.now < max(manager.slow_until, manager.stopped_until)

    def publish(self, writer, others):
        """The writer changes something if the last change was acknowledged; who keeps up copies it; then it is acknowledged."""
        if set(writer.log[-20:]) <= self.acknowledged:
            self.changes += 1
            writer.log = [*writer.log[-50:], self.changes]
            writer.position = writer.tenure.holds, self.changes
        for manager in others:
            follows = not manager.tenure.holds and manager.tenure.term == writer.tenure.holds
            if follows and self.now >= manager.slow_until and self.random.random() < 0.7:
                manager.log, manager.position = list(writer.log), writer.position
        held = [set(manager.log) for manager in self.managers if manager.name in writer.tenure.required]
        if all(set(writer.log) <= log for log in held):
            self.acknowledged = set(writer.log[-20:])


@pytest.mark.chaos
def test_row_13_with_slow_links_stopped_processes_and_uneven_clocks_there_are_never_two_writers(chaos, measured):
    started, steps, takeovers = time.monotonic(), 0, 0
    for run in range(chaos.count(10, 1)):
        simulation = Simulation(f"{chaos.seed} {run}")
        for _ in range(chaos.count(10_000, 3_000)):
            simulation.step()
            steps += 1
        takeovers += simulation.takeovers
    assert takeovers >= chaos.count(20, 3)
    measured(f"lease: {steps} steps, {takeovers} take-overs, {simulation.changes} changes in the last run")
    chaos.record(13, f"{steps} steps of the lease's simulation, {takeovers} take-overs, never two writers", time.monotonic() - started)
