"""Requests, their check by value, and wrk as the load: closed loop, keep-alive, one thread."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from models import row

HEADER = "Inference-Header-Content-Length"
BINARY = {"image", "large", "bert"}
"""Sent in the binary form, as every real client sends pictures."""
_DATATYPES = {"float32": "FP32", "int64": "INT64"}
_SCRIPT = """
local file = assert(io.open(os.getenv("BENCH_BODY"), "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
wrk.headers["Content-Type"] = "application/octet-stream"
local header = os.getenv("BENCH_HEADER")
if header ~= "" then wrk.headers["Inference-Header-Content-Length"] = header end
function done(summary, latency, requests)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.timeout + e.status
  local p50, p90, p99 = latency:percentile(50), latency:percentile(90), latency:percentile(99)
  io.write(string.format("RESULT %d %d %d %d %d %d %d\\n", summary.requests, summary.duration, failed, p50, p90, p99, latency.max))
end
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """What wrk saw."""

    rate: float
    """Requests a second."""
    p50: float
    """Milliseconds."""
    p90: float
    p99: float
    slowest: float
    errors: int


def body(model: str) -> tuple[bytes, int]:
    """One request and the length of its JSON; 0: all of it is JSON."""
    x = row(model)
    tensor: dict[str, object] = {"name": "x", "shape": x.shape, "datatype": _DATATYPES[x.dtype.name]}
    message: dict[str, object] = {"id": "1", "inputs": [tensor]}
    if model not in BINARY:
        tensor["data"] = [float(str(value)) for value in x.ravel()]
        return json.dumps(message).encode(), 0
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    message["outputs"] = [{"name": "y", "parameters": {"binary_data": True}}]
    head = json.dumps(message).encode()
    return head + x.tobytes(), len(head)


def check(url: str, model: str, expected: np.ndarray) -> None:
    """Raises: SystemExit: a wrong answer; a fast wrong server is worth no figure."""
    data, length = body(model)
    headers = {"Content-Type": "application/octet-stream"} | ({HEADER: str(length)} if length else {})
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v2/models/{model}/infer", data, headers), timeout=60) as answer:
        raw, length = answer.read(), int(answer.headers.get(HEADER) or 0)
    got = np.frombuffer(raw[length:], np.float32) if length else np.array(json.loads(raw)["outputs"][0]["data"], np.float32)
    tolerance = 0.05 if model == "bert" else 1e-4  # bfloat16
    if not np.allclose(got, expected.ravel(), rtol=1e-3, atol=tolerance):
        raise SystemExit(f"{url}: {model} answers {got[:4]}, expected {expected.ravel()[:4]}")


def run(url: str, model: str, clients: int, seconds: int) -> Cell:
    """One cell. Raises: SystemExit: wrk is missing."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing: apt-get install wrk")
    data, length = body(model)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "body").write_bytes(data)
        (Path(folder) / "wrk.lua").write_text(_SCRIPT)
        environment = os.environ | {"BENCH_BODY": f"{folder}/body", "BENCH_HEADER": str(length or "")}
        options = ["-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "10s", "-s", f"{folder}/wrk.lua"]
        command = ["wrk", *options, f"{url}/v2/models/{model}/infer"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    requests, duration, errors, *times = map(float, line.split()[1:])
    p50, p90, p99, slowest = (each / 1000 for each in times)
    return Cell(requests / duration * 1e6, p50, p90, p99, slowest, int(errors))
