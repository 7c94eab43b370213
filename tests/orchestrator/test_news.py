"""What gateways are sent of the table: the whole once, then what changed, and never more than they ask for."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tether.orchestrator.news import News
from tether.routing.table import Table, TableChange, WorkerEntry
from tether.types import WorkerId


def worker(number):
    return WorkerEntry(WorkerId(f"w{number}"), f"tls://w{number}", number, "running", float(number))


def change(seq, *joined, gone=()):
    workers = {WorkerId(f"w{number}"): worker(number) for number in joined} | dict.fromkeys(map(WorkerId, gone))
    return TableChange(seq, seq * 10, "tls://m", {}, workers)


class Orchestrator:
    def __init__(self, most_nbytes=1 << 20):
        self.news, self.table = News(most_nbytes), Table()

    def push(self, *joined, gone=()):
        made = change(self.table.seq + 1, *joined, gone=gone)
        self.table = self.table.amended(made)
        self.news.add(made)

    def tell(self, table):
        """The table of a gateway after the next message, and how many bytes that had."""
        message = self.news.since(table and table.seq, self.table)
        if "table" in message:
            return msgspec.msgpack.decode(message["table"], type=Table), len(message["table"])
        for each in message["changes"]:
            table = table.amended(msgspec.msgpack.decode(each, type=TableChange))
        return table, sum(map(len, message["changes"]))


def test_who_has_nothing_gets_all_and_then_what_changed():
    orchestrator = Orchestrator()
    orchestrator.push(*range(100))
    table, whole = orchestrator.tell(None)
    assert table == orchestrator.table
    orchestrator.push(7, 200)
    orchestrator.push(gone=["w7", "w8"])
    table, part = orchestrator.tell(table)
    assert table == orchestrator.table
    assert part * 10 < whole
    assert orchestrator.tell(table) == (table, 0)


def test_who_is_too_far_behind_or_says_nonsense_gets_all_again():
    orchestrator = Orchestrator(most_nbytes=200)
    orchestrator.push(1)
    behind, _ = orchestrator.tell(None)
    for number in range(50):
        orchestrator.push(number)
    assert "table" in orchestrator.news.since(behind.seq, orchestrator.table)
    for nonsense in (-5, 10**9):
        assert "table" in orchestrator.news.since(nonsense, orchestrator.table)
    assert orchestrator.news._nbytes <= 200


def test_the_whole_is_encoded_once_for_all_who_ask():
    orchestrator = Orchestrator()
    orchestrator.push(1)
    first, second = (orchestrator.news.since(None, orchestrator.table)["table"] for _ in range(2))
    assert first is second


@given(st.lists(st.tuples(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)), st.sets(st.sampled_from("abc")))), st.integers(50, 2000))
def test_whenever_a_gateway_asks_it_has_the_table_afterwards(pushes, most_nbytes):
    orchestrator, gateways = Orchestrator(most_nbytes), dict.fromkeys("abc")
    for joined, gone, asking in pushes:
        orchestrator.push(*joined, gone=[f"w{number}" for number in gone - joined])
        for name in asking:
            gateways[name], _ = orchestrator.tell(gateways[name])
            assert gateways[name] == orchestrator.table
