"""`GET /tether/v1/events` and the log behind it: order, gaps, slow readers, the end of the gateway."""

import asyncio
import json
import time

import msgspec
import pytest
from gateway_rig import KEY, Wire, ask, make_table, running, until

from tether.errors import ServiceUnavailableError
from tether.gateway import contacts
from tether.gateway.contacts import ContactWatch
from tether.gateway.door import Settings
from tether.gateway.event_log import EventLog
from tether.routing.table import Table, WorkerEntry
from tether.types import WorkerId

PATH = "/tether/v1/events"


def table(*workers):
    """One with these workers."""
    entries = {WorkerId(name): WorkerEntry(WorkerId(name), "tls://host:1", 1, "running", 0.0) for name in workers}
    return Table(1, {}, entries)


def told(log, after):
    return [str(event) for event in log.after(after)]


class TestLog:
    async def test_the_first_table_is_how_things_are_and_no_event(self):
        log = EventLog()
        log.see(table("a"))
        assert told(log, 0) == []
        log.see(table("b"))
        assert told(log, 0) == ["worker-lost a", "worker-joined b"]
        assert told(log, log.last) == []

    async def test_numbers_grow_past_a_restart(self):
        first, second = EventLog(lambda: 1000.0), EventLog(lambda: 1001.0)
        first.see(table())
        first.see(table("a", "b"))
        assert first.last < second.last

    async def test_a_gap_is_said_and_everything_else_is_told_once(self):
        log = EventLog(most=3)
        log.see(table())
        begin = log.last
        for number in range(5):
            log.see(table(str(number)))
        assert told(log, log.last - 1) == ["worker-joined 4"]
        assert told(log, log.last - 3) == ["worker-joined 3", "worker-lost 3", "worker-joined 4"]
        assert told(log, begin) == ["missed", *told(log, log.last - 3)]
        assert told(log, 0) == told(log, log.last - 3), "who asks for all that there is misses nothing"
        seq = log.after(begin)[0].seq
        assert told(log, seq) == told(log, log.last - 3)

    async def test_numbers_of_another_gateway_are_a_gap_too(self):
        log = EventLog(lambda: 1000.0)
        log.see(table())
        log.see(table("a"))
        assert told(log, 10**15) == ["missed", "worker-joined a"]

    async def test_who_waits_is_woken_by_an_event_and_by_the_end(self):
        log = EventLog()
        log.see(table())
        waiting = asyncio.create_task(log.wait(log.last, 20.0))
        await asyncio.sleep(0)
        log.see(table("a"))
        await waiting
        waiting = asyncio.create_task(log.wait(log.last, 20.0))
        await asyncio.sleep(0)
        log.close()
        await waiting
        await log.wait(log.last, 0.0)


class Manager:
    """That tells of other labs, and is away now and then."""

    def __init__(self):
        self.asked, self.answers = 0, [{"admitted": [], "connected": []}]

    async def contacts(self):
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise ServiceUnavailableError("the manager is away")
        return answer


async def test_other_labs_are_looked_at_while_somebody_listens_and_not_before(monkeypatch):
    monkeypatch.setattr(contacts, "_LOOK", 0.01)
    monkeypatch.setattr(contacts, "_IDLE", 0.2)
    log, manager = EventLog(), Manager()
    watch = ContactWatch(log, manager)
    await asyncio.sleep(0.05)
    assert manager.asked == 0
    manager.answers += [None, {"admitted": ["b"], "connected": ["a", "b"]}, {"admitted": ["b"], "connected": ["b"]}]
    while len(log.after(0)) < 4:
        await log.wait(log.last, 20.0)
    assert told(log, 0) == ["peer-admitted b", "peer-connected a", "peer-connected b", "peer-gone a"]
    async with asyncio.timeout(20):
        await watch._looking
    asked = manager.asked
    manager.answers = [{"admitted": [], "connected": []}]
    await log.wait(log.last, 0.05)
    assert manager.asked > asked
    assert len(log.after(0)) == 4, "what was not looked at is not told"
    watch.close()


def see(rig, *workers):
    rig.call(rig.dispatcher.events.see, table(*workers))


@pytest.fixture
def rig(gateway):
    see(gateway)
    until(lambda: gateway.dispatcher.events._table is not None)
    return gateway


def authorized(**headers):
    return {"Authorization": f"Bearer {KEY}", **headers}


def asked(rig, query):
    status, _, body = ask(rig, "GET", f"{PATH}?{query}", headers=authorized())
    return status, body


def test_it_needs_a_key_and_is_in_the_documents(rig):
    assert ask(rig, "GET", PATH)[0] == 401
    _, _, document = ask(rig, "GET", "/openapi.json")
    assert "get" in document["paths"][PATH]


def test_asking_again_and_again_misses_nothing(rig):
    status, answer = asked(rig, "wait=0")
    assert (status, answer["events"]) == (200, [])
    see(rig, "a")
    _, after = asked(rig, f"wait=10&after={answer['seq']}")
    assert [(event["kind"], event["worker"]) for event in after["events"]] == [("worker-joined", "a")]
    assert after["seq"] == after["events"][-1]["seq"]
    _, nothing = asked(rig, f"wait=0.01&after={after['seq']}")
    assert nothing == {"events": [], "seq": after["seq"]}
    assert asked(rig, "wait=0&after=0")[1]["events"][-1:] == after["events"]


@pytest.mark.parametrize("query", ["after=x", "wait=-1", "wait=nan", "after=1e300", "after=inf"])
def test_numbers_that_are_none(rig, query):
    status, answer = asked(rig, query)
    assert (status, answer["code"]) == (400, "malformed_request")


def request(last=""):
    resume = f"Last-Event-ID: {last}\r\n" if last else ""
    return f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n{resume}\r\n".encode()


def lines_until(wire, text):
    while text not in wire.buffer:
        wire._more()
    return wire.buffer


def test_a_stream_begins_with_where_it_is_tells_what_comes_and_resumes(rig):
    with Wire(rig) as wire:
        wire.send(request())
        lines_until(wire, b"\nid: ")
        see(rig, "a")
        sent = lines_until(wire, b'"worker-joined"')
    assert b"content-type: text/event-stream" in sent
    number = rig.dispatcher.events.last - 1
    with Wire(rig) as wire:
        wire.send(request(str(number)))
        lines_until(wire, b'"worker":"a"')
    with Wire(rig) as wire:
        wire.send(request("7"))
        lines_until(wire, b'"missed"')


def test_it_ends_with_the_gateway_and_does_not_hold_it_up():
    with running() as rig:
        with Wire(rig) as wire:
            wire.send(request())
            lines_until(wire, b"\nid: ")
            began = time.monotonic()
            rig.call(rig.stop.set)
            rig.thread.join(20)
            assert not rig.thread.is_alive()
        assert time.monotonic() - began < Settings().drain


def test_a_reader_that_does_not_read_is_cut_off_and_nothing_is_kept_for_it():
    with running(Settings(patience=0.2)) as rig, Wire(rig) as wire:
        see(rig)
        wire.send(request())
        lines_until(wire, b"\nid: ")
        names = ["w" * 4000 + str(number) for number in range(500)]  # two megabytes at each change
        for count in range(60):
            see(rig, *names[count % 2 :: 2])
        until(lambda: gone(wire), 20)
        assert len(rig.dispatcher.events._events) == 4096
        assert ask(rig, "GET", "/healthz")[0] == 200


def gone(wire):
    """Whether the connection was cut, with what lay in it unread."""
    try:
        return wire.socket.send(b"\r\n") == 0
    except OSError:
        return True


def test_a_table_of_the_rig_is_told_in_full():
    """The events of a real table can be encoded."""
    log = EventLog()
    log.see(Table())
    log.see(make_table())
    assert json.loads(msgspec.json.encode(log.after(0)))
