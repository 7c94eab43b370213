"""`make demo`: Tether does its main job, on real models and real data, and every answer is checked.

Starts a lab, publishes three models of handwritten digits and Google's file-type model Magika, calls each through Python, plain HTTP and
NVIDIA's tritonclient, kills a worker while calling, rolls a version back; then a colleague in another place of the swarm (one of this
machine's own) calls the lab, copies a model, and is sent away.  Exits with 0 only if every answer was right.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tritonclient.http
from magika import Magika
from onnx import numpy_helper

import tether
from tether.testing.testnet import testnet

sys.path.insert(0, str(Path(__file__).parents[1] / "datasets"))
import digits
import train

ROWS = 12
"""Test digits that each way of calling gets."""
KILL_SECONDS = 4.0
RATE = 20
"""Requests a second while a worker is killed."""
COLLEAGUE_CHECKS = 6
"""What `a_colleague` checks: counted as not run where there is no swarm."""
REFUSED_WITHIN = 5.0
"""Seconds: calls that run are cut within one, and the next one has to be answered."""


@dataclass
class Verdict:
    """What was asked and how much of it was answered right."""

    asked: int = 0
    right: int = 0
    not_run: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, right: int, asked: int) -> None:
        self.asked += asked
        self.right += right

    def check(self, what: str, *, holds: bool) -> None:
        self.count(int(holds), 1)
        if not holds:
            self.notes.append(what)


def by_python(lab: tether.Lab, model: str, name: str, rows: np.ndarray, output: str) -> np.ndarray:
    return lab.infer(model, {name: rows}, outputs=output)


def by_http(lab: tether.Lab, model: str, name: str, rows: np.ndarray, output: str) -> np.ndarray:
    datatype = {"float32": "FP32", "int32": "INT32"}[rows.dtype.name]
    tensor = {"name": name, "shape": rows.shape, "datatype": datatype, "data": rows.ravel().tolist()}
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": output}]}).encode()
    request = urllib.request.Request(f"{lab.gateway}/v2/models/{model}/infer", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        tensor = json.load(answer)["outputs"][0]
    return np.array(tensor["data"]).reshape(tensor["shape"])


def by_tritonclient(lab: tether.Lab, model: str, name: str, rows: np.ndarray, output: str) -> np.ndarray:
    with tritonclient.http.InferenceServerClient(lab.gateway.removeprefix("http://")) as client:
        tensor = tritonclient.http.InferInput(name, list(rows.shape), {"float32": "FP32", "int32": "INT32"}[rows.dtype.name])
        tensor.set_data_from_numpy(rows)
        return client.infer(model, [tensor], outputs=[tritonclient.http.InferRequestedOutput(output)]).as_numpy(output)


WAYS: dict[str, Callable[..., np.ndarray]] = {"Python": by_python, "HTTP": by_http, "tritonclient": by_tritonclient}


@dataclass(frozen=True)
class Case:
    """One published model, what it is asked and what it should say."""

    model: str
    input: str
    output: str
    rows: np.ndarray
    expected: list[str]
    read: Callable[[np.ndarray], list[str]]
    """Turns an output into labels."""
    least: int
    """How many labels must be as expected: a classifier may err on hard digits, but each way must say the same."""


def digit_cases(data: digits.Digits) -> list[Case]:
    rows = data.images[data.test[:ROWS]]
    expected = [str(label) for label in data.labels[data.test[:ROWS]]]
    return [
        Case(f"digits-{framework}", "images", "label", rows, expected, lambda labels: list(map(str, map(int, labels.ravel()))), ROWS - 1)
        for framework in train.FILES
    ]


def magika_folder() -> Path:
    import magika

    return Path(magika.__file__).parent / "models" / "standard_v3_3"


def magika_case() -> Case:
    """Real files of this repository and this machine; the expected labels are Magika's own."""
    root = Path(__file__).parents[1]
    files = [Path(__file__), *(root / name for name in ("pyproject.toml", "README.md", "Makefile")), Path(sys.executable).resolve()]
    files.append(Path(next(iter(onnx.__path__))) / "onnx.proto")
    own = Magika()
    contents = [file.read_bytes() for file in files if file.exists()]
    expected = [str(own.identify_bytes(content).dl.label) for content in contents]
    labels = json.loads((magika_folder() / "config.min.json").read_text())["target_labels_space"]
    rows = np.stack([magika_features(content) for content in contents])
    best = lambda scores: [labels[index] for index in scores.argmax(1)]  # noqa: E731 (a field of the case)
    return Case("magika", "bytes", "target_label", rows, expected, best, len(expected))


def magika_features(content: bytes, size: int = 1024, block: int = 4096, padding: int = 256) -> np.ndarray:
    """Magika's input: the first and last `size` bytes, white space stripped off the ends, as INT32 padded with 256."""
    begin, end = content[:block].lstrip()[:size], content[-block:].rstrip()[-size:]
    padded = [*begin, *[padding] * (size - len(begin)), *[padding] * (size - len(end)), *end]
    return np.array(padded, np.int32)


def publish(lab: tether.Lab, cases: list[Case]) -> None:
    """All of them side by side, each with its first call: what takes seconds is the import of PyTorch and TensorFlow."""
    paths = {f"digits-{framework}": path for framework, path in train.build().items()} | {"magika": magika_folder() / "model.onnx"}

    def publish_one(case: Case) -> str:
        begun = time.perf_counter()
        version = lab.publish(case.model, paths[case.model], example={case.input: case.rows[:1]})
        published = time.perf_counter()
        by_python(lab, case.model, case.input, case.rows[:1], case.output)
        return f"  {version!r} in {published - begun:.1f} s, first answer {time.perf_counter() - published:.1f} s later"

    with ThreadPoolExecutor() as pool:
        for line in pool.map(publish_one, cases):
            print(line)


def call_all(lab: tether.Lab, cases: list[Case], verdict: Verdict) -> None:
    print(f"\n{'model':18}{'called by':14}{'right':>8}{'p50 ms':>9}   predicted (expected where it differs)")
    for case in cases:
        for way, call in WAYS.items():
            times, answer = [], np.empty(0)
            for _ in range(8):
                begun = time.perf_counter()
                answer = call(lab, case.model, case.input, case.rows, case.output)
                times.append(1000 * (time.perf_counter() - begun))
            said = case.read(answer)
            right = sum(one == other for one, other in zip(said, case.expected, strict=True))
            verdict.check(f"{case.model} by {way}: {right} of {len(said)} right", holds=right >= case.least)
            shown = " ".join(one if one == other else f"{one}({other})" for one, other in zip(said, case.expected, strict=True))
            print(f"{case.model:18}{way:14}{right:>5}/{len(said)}{sorted(times)[len(times) // 2]:9.1f}   {shown}")


def kill_a_worker(lab: tether.Lab, case: Case, verdict: Verdict) -> None:
    """Steady calls from threads; a worker is killed with SIGKILL in the middle of them."""
    reference = case.read(by_python(lab, case.model, case.input, case.rows, case.output))
    seconds: list[float] = []
    wrong: list[str] = []

    def ask() -> None:
        begun = time.perf_counter()
        try:
            if case.read(by_python(lab, case.model, case.input, case.rows, case.output)) != reference:
                wrong.append("another answer")
        except tether.TetherError as error:
            wrong.append(f"{error} [{error.code}]")
        seconds.append(time.perf_counter() - begun)

    threads: list[threading.Thread] = []
    begun, killed, back = time.perf_counter(), 0.0, 0.0
    victim = next(iter(lab.workers.values()))
    while (now := time.perf_counter() - begun) < KILL_SECONDS:
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        if not killed and now > KILL_SECONDS / 4:
            os.kill(victim.pid, signal.SIGKILL)
            killed = now
        if killed and not back and restarted(lab, victim):
            back = time.perf_counter() - begun
        time.sleep(max(0.0, begun + len(threads) / RATE - time.perf_counter()))
    for thread in threads:
        thread.join()
    verdict.count(len(threads) - len(wrong), len(threads))
    verdict.check(f"{victim.id} came back", holds=bool(back))
    verdict.notes += wrong[:3]
    slowest = 1000 * max(seconds)
    print(
        f"\nkilled {victim.id} (pid {victim.pid}) while calling {RATE} times a second: {len(threads) - len(wrong)} of {len(threads)} "
        f"answers right, slowest {slowest:.0f} ms, {victim.id} back after {back - killed:.1f} s"
    )


def restarted(lab: tether.Lab, victim: Any) -> bool:
    now = lab.workers.get(victim.id)
    return now is not None and now.state == "running" and now.pid != victim.pid


def roll_back(lab: tether.Lab, case: Case, folder: Path, verdict: Verdict) -> None:
    """A second version that always says the same digit is published by mistake, and taken back."""
    good = case.read(by_python(lab, case.model, case.input, case.rows, case.output))
    model = onnx.load(train.FOLDER / train.FILES["onnx"])
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32 and array.ndim == 2:
            weight.CopyFrom(numpy_helper.from_array(np.zeros_like(array), weight.name))
    onnx.save(model, folder / "blank.onnx")
    bad = lab.publish(case.model, folder / "blank.onnx")
    blank = case.read(by_python(lab, case.model, case.input, case.rows, case.output))
    moved = lab.rollback(case.model)
    again = case.read(by_python(lab, case.model, case.input, case.rows, case.output))
    verdict.check("the bad version was served after its publish", holds=len(set(blank)) == 1)
    verdict.check("the good version was served after the rollback", holds=again == good)
    print(f"\npublished {bad} by mistake: says {' '.join(blank)}\nrolled back ({moved!r}): says {' '.join(again)}")


def a_colleague(lab: tether.Lab, case: Case, folder: Path, bootstrap: str, verdict: Verdict) -> None:
    """Another key in another data folder: invited, it calls and copies the model, runs the copy in a lab of its own, and is sent away."""
    invitation = lab.invite(case.model, scope=["infer", "replicate"], label="colleague")
    own = by_python(lab, case.model, case.input, case.rows, case.output)
    begun = time.perf_counter()
    with tether.connect(str(invitation), data=folder, bootstrap=bootstrap) as there:
        connected = time.perf_counter() - begun
        verdict.check("the colleague sees what it was invited to, and no more", holds=list(there.models) == [case.model])
        times, answers = [], []
        for _ in range(8):
            asked = time.perf_counter()
            answers.append(by_python(there, case.model, case.input, case.rows, case.output))
            times.append(1000 * (time.perf_counter() - asked))
        verdict.check("the colleague gets the answers of the lab's own people", holds=all(np.array_equal(each, own) for each in answers))
        begun = time.perf_counter()
        replica = there.replicate(case.model)
        copied = time.perf_counter() - begun
        print(f"\na colleague, let in after {connected:.1f} s: {case.model} called in the lab, p50 {sorted(times)[len(times) // 2]:.1f} ms")
        with tether.up(workers=1, data=folder, bootstrap=bootstrap) as here:
            same = digests(here.models[replica.name]) == digests(lab.models[case.model])
            verdict.check("the copy has the digests of the model", holds=same)
            answer = by_python(here, replica.name, case.input, case.rows, case.output)
            verdict.check("the copy answers as the model", holds=np.array_equal(answer, own))
            print(f"copied in {copied:.2f} s: {replica}, {'the same digests' if same else 'OTHER DIGESTS'}; answers in the colleague's lab")
            send_away(lab, there, case, verdict)


def digests(model: Any) -> list[str]:
    return sorted(version.digest for version in model.versions)


def send_away(lab: tether.Lab, there: tether.Lab, case: Case, verdict: Verdict) -> None:
    begun = time.perf_counter()
    lab.disallow("colleague")
    refused = refusal(there, case)
    seconds = time.perf_counter() - begun
    verdict.check(f"the colleague is refused once it is sent away ({refused!r})", holds=isinstance(refused, tether.errors.ForbiddenError))
    own = by_python(lab, case.model, case.input, case.rows, case.output)
    verdict.check("the lab's own people still get answers", holds=len(own) == len(case.rows))
    print(f"sent away: {'refused' if refused else 'NOT REFUSED'} after {seconds:.2f} s")


def refusal(lab: tether.Lab, case: Case) -> tether.TetherError | None:
    """Why it may not call any more. The call during which the connection is cut fails as one, the next one is told."""
    end = time.perf_counter() + REFUSED_WITHIN
    while time.perf_counter() < end:
        try:
            by_python(lab, case.model, case.input, case.rows, case.output)
        except tether.errors.UnavailableError:
            continue
        except tether.TetherError as error:
            return error
    return None


@contextmanager
def swarm() -> Iterator[str | None]:
    """By which nodes the two labs find each other: of a DHT within this machine, so that nothing of a demo is announced to the world.

    None: this installation has no swarm.
    """
    if importlib.util.find_spec("pythonmonkey") is None:
        yield None
        return
    with testnet() as net:
        yield net.bootstrap


def main() -> int:
    begun = time.perf_counter()
    verdict = Verdict()
    data = digits.load()
    with tempfile.TemporaryDirectory(prefix="tether-demo-") as folder, ThreadPoolExecutor() as pool, swarm() as bootstrap:
        training = pool.submit(train.build)
        with tether.up(workers=2, data=Path(folder, "lab"), swarm=bootstrap is not None, bootstrap=bootstrap) as lab:
            print(f"{lab!r} up after {time.perf_counter() - begun:.1f} s")
            cases = [*digit_cases(data), magika_case()]
            training.result()
            print(f"models trained after {time.perf_counter() - begun:.1f} s; publishing:")
            publish(lab, cases)
            call_all(lab, cases, verdict)
            kill_a_worker(lab, cases[0], verdict)
            roll_back(lab, cases[0], Path(folder), verdict)
            if bootstrap is None:
                verdict.not_run += COLLEAGUE_CHECKS
                print("\nno colleague: PythonMonkey is missing, with which labs find each other (pip install 'tether[swarm]')")
            else:
                a_colleague(lab, cases[0], Path(folder, "colleague"), bootstrap, verdict)
    ok = verdict.right == verdict.asked
    for note in verdict.notes:
        print(f"wrong: {note}")
    left_out = f", {verdict.not_run} not run" if verdict.not_run else ""
    print(f"\n{verdict.right} of {verdict.asked} checks right{left_out}, {time.perf_counter() - begun:.1f} s{'' if ok else ': FAILED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
