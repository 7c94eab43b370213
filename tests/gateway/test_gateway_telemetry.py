"""What an operator sees of requests: metrics that callers can't swell, an access log that never holds a key."""

import asyncio
import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from gateway_rig import AUTH, KEY, ask, infer_body, make_table, running, until
from prometheus_client.parser import text_string_to_metric_families

from tether.errors import ServiceUnavailableError
from tether.gateway.door import Door, Settings
from tether.ports import HopReply
from tether.telemetry.accesslog import Access, AccessLog
from tether.telemetry.metrics import UNKNOWN, RequestMetrics

INFER = "/v2/models/ident/infer"


def samples(rig):
    text = ask(rig, "GET", "/metrics")[2].decode()
    return {(s.name, *sorted(s.labels.items())): s.value for family in text_string_to_metric_families(text) for s in family.samples}


def count(found, model, version, code):
    return found.get(("tether_requests_total", ("code", code), ("model", model), ("version", version)), 0)


def test_every_inference_is_counted_once_under_its_version_and_status(gateway):
    before = samples(gateway)
    ask(gateway, "POST", INFER, infer_body())
    ask(gateway, "POST", "/v2/models/ident@prod/infer", infer_body())
    ask(gateway, "POST", "/inference", {"model": "ident", "inputs": {"x": [[1, 2, 3, 4]]}})
    ask(gateway, "POST", INFER, b"{")
    after = samples(gateway)
    assert count(after, "ident", "1", "200") - count(before, "ident", "1", "200") == 3
    assert count(after, "ident", "1", "400") - count(before, "ident", "1", "400") == 1
    total = ("tether_request_duration_seconds_count", ("model", "ident"))
    assert after[total] - before.get(total, 0) == 4
    assert after["tether_requests_in_flight", ("model", "ident")] == 0


def test_names_that_callers_invent_make_no_series(gateway):
    before = samples(gateway)
    for i in range(20):
        ask(gateway, "POST", f"/v2/models/invented-{i}/infer", infer_body())
    after = samples(gateway)
    assert count(after, "-", "-", "404") - count(before, "-", "-", "404") == 20
    assert not [key for key in after if "invented" in str(key)]


def test_spellings_of_a_version_that_callers_invent_are_not_kept():
    door = Door(SimpleNamespace(table=make_table()), Settings())
    zeros = "0\u0660\u06f0\u07c0\u0966\u09e6\u0a66\u0ae6"
    spelt = {id(door.series(("ident", "".join(spelling) + "1"))) for spelling in itertools.product(zeros, repeat=5)}
    assert len(spelt) == 1
    assert len(door._series) <= len(zeros) ** 5 / 8


def test_a_request_that_waits_is_in_flight():
    with running() as rig:
        asker = threading.Thread(target=ask, args=(rig, "POST", "/v2/models/held/infer", infer_body()))
        asker.start()
        until(lambda: rig.dispatcher.held)
        assert samples(rig)["tether_requests_in_flight", ("model", "held")] == 1
        rig.call(rig.dispatcher.held.pop()[1], HopReply(200, b"{}"))
        asker.join()
        assert samples(rig)["tether_requests_in_flight", ("model", "held")] == 0


def test_series_are_bounded():
    metrics = RequestMetrics()
    for i in range(3000):
        metrics.series("m", str(i)).observe(200, 0.001)
    assert sum(1 for family in metrics.collect() for s in family.samples if s.name == "tether_requests_total") == 2001
    assert metrics.series("other", "1") is metrics.series(UNKNOWN, UNKNOWN)


def test_the_histogram_is_cumulative_and_ends_in_infinity():
    metrics = RequestMetrics()
    for seconds in (0.0005, 0.0006, 100.0):
        metrics.series("m", "1").observe(200, seconds)
    family = next(family for family in metrics.collect() if family.name == "tether_request_duration_seconds")
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert (buckets["0.0005"], buckets["0.001"], buckets["60.0"], buckets["+Inf"]) == (1, 2, 2, 3)


def test_one_line_a_request_on_both_lanes_and_never_a_key(tmp_path):
    path = tmp_path / "access.log"
    with running(Settings(access_log=path)) as rig:
        ask(rig, "POST", f"{INFER}?key={KEY}", infer_body(), AUTH | {"x-request-id": "one"})
        ask(rig, "GET", f"/v2?key={KEY}", headers=AUTH | {"x-request-id": "two"})
        ask(rig, "GET", f"/nothing%0d%0a%1b[31m{KEY[:0]}")
        ask(rig, "GET", "/tether/v1/models")
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert KEY not in text
    assert "\x1b" not in text
    assert [line["http.response.status_code"] for line in lines] == [200, 200, 404, 401]
    first = lines[0]
    assert (first["http.request.id"], first["user.name"], first["url.path"]) == ("one", "tester", INFER)
    assert first["http.request.body.bytes"] == len(infer_body())
    assert first["client.ip"] == "127.0.0.1"
    assert first["event.duration"] > 0
    assert lines[1]["user.name"] == "tester"
    assert lines[3]["user.name"] is None


def access(n=0):
    return Access(1.0, 0.1, "POST", b"/%d?key=x" % n, 200, 1, 2, None, None, b"id")


async def test_lines_are_written_within_a_second(tmp_path):
    log = AccessLog(tmp_path / "a.log")
    log.write(access())
    assert (tmp_path / "a.log").read_bytes() == b""
    deadline = asyncio.get_running_loop().time() + 5
    while not (tmp_path / "a.log").read_bytes():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)
    log.close()


async def test_a_burst_is_written_at_once_and_the_rest_at_the_end(tmp_path):
    log = AccessLog(tmp_path / "a.log")
    for n in range(600):
        log.write(access(n))
    assert len((tmp_path / "a.log").read_bytes().splitlines()) == 512
    log.close()
    log.close()
    assert len((tmp_path / "a.log").read_bytes().splitlines()) == 600


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
async def test_a_full_disk_costs_lines_and_says_so_once(caplog):
    log = AccessLog(Path("/dev/full"))
    for _ in range(3):
        log.write(access())
        log.flush()
    log.close()
    assert caplog.text.count("loses lines") == 1


WORKER = {
    "cpu": 12.5,
    "memory": 1 << 30,
    "received": 10,
    "sent": 20,
    "used": 4096,
    "budget": 1 << 30,
    "cards": [{"name": "NVIDIA L4", "busy": 0.5, "used": 1 << 20, "total": 1 << 30}],
    "models": {
        "alice/ident:3": {
            "requests": 7,
            "failures": 1,
            "batches": 2,
            "rows": 9,
            "busy": 0.25,
            "waiting": 4,
            "load_seconds": 1.5,
            "nbytes": 4096,
        }
    },
}


def test_what_workers_told_is_scraped_with_the_gateways_own(gateway):
    gateway.dispatcher.told = {"worker-1": WORKER, "worker-2": {"models": {}}}
    found = samples(gateway)
    of_model = (("model", "alice/ident"), ("version", "3"), ("worker", "worker-1"))
    assert found["tether_worker_cpu_seconds_total", ("worker", "worker-1")] == 12.5
    assert found["tether_worker_memory_bytes", ("worker", "worker-1")] == 1 << 30
    assert found["tether_worker_gpu_utilization_ratio", ("gpu", "0"), ("name", "NVIDIA L4"), ("worker", "worker-1")] == 0.5
    assert found["tether_model_rows_total", *of_model] == 9
    assert found["tether_model_inference_seconds_total", *of_model] == 0.25
    assert found["tether_model_queue_length", *of_model] == 4
    assert found["tether_model_load_seconds", *of_model] == 1.5
    assert found["tether_model_memory_bytes", *of_model] == 4096
    assert found["tether_worker_models_memory_bytes", ("worker", "worker-1")] == 4096
    assert not any(("worker", "worker-2") in key for key in found)


def test_while_no_orchestrator_answers_the_gateways_own_metrics_are_there(gateway, monkeypatch):
    async def away():
        raise ServiceUnavailableError("the orchestrator does not answer")

    monkeypatch.setattr(gateway.dispatcher, "vitals", away)
    assert "tether_worker_cpu_seconds" not in {name for name, *_ in samples(gateway)}


def test_labels_that_are_fed_back_become_a_versions_accuracy(gateway):
    feed = "/tether/v1/models/ident@prod/feedback"
    before = ask(gateway, "POST", feed, {})[2]
    assert ask(gateway, "POST", feed, {"right": 93, "wrong": 7})[0] == 200
    assert ask(gateway, "POST", "/tether/v1/models/ident/versions/1/feedback", {"right": 1})[0] == 200
    assert [(str(entry.model), *counts) for entry, *counts in gateway.dispatcher.labels[-2:]] == [("ident:1", 93, 7), ("ident:1", 1, 0)]
    found = samples(gateway)
    for outcome, more in (("right", 94), ("wrong", 7)):
        key = ("tether_model_feedback_total", ("model", "ident"), ("outcome", outcome), ("version", "1"))
        assert found[key] == before[outcome] + more


@pytest.mark.parametrize("body", [{"right": -1}, {"right": True}, {"wrong": 1.5}, {"correct": 1}, {"right": 1 << 53}, []])
def test_feedback_that_makes_no_sense_is_refused(gateway, body):
    status, _, answer = ask(gateway, "POST", "/tether/v1/models/ident/feedback", body)
    assert status == 400, answer
    assert ask(gateway, "POST", "/tether/v1/models/nobody/feedback", {"right": 1})[0] == 404
