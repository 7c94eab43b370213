"""Models from attackers are published under serving load: refused with a code, or taken for what they are; nothing else happens."""

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from conftest import WEIGHTS, write_model
from hostile_models import BAD, Hostile, chosen, corpus
from plaintext import files_below
from weight_reading import resident

import tether
from tether.client.publishing import EXAMPLE, Source, cut_file, cut_model, draft, model_sources, publish_draft
from tether.errors import HostileModelError, NoSpaceError, PayloadTooLargeError, TetherError
from tether.lab import loop
from tether.testing.requirements import needs
from tether.wire.npz import to_npz

pytestmark = [needs("onnx"), needs("onnxruntime"), needs("h5py")]

SMALL = 26
"""Of the corpus, in `make test`: two or three of each kind."""
CANARY = bytes(range(1, 33)) * 2
"""What a secret file beside a model holds; it must not come into the store."""
SECONDS = 10.0
"""For one model, on a machine that has nothing else to do; a busy one may take as much longer as it has work for more processors."""
MANAGER_NBYTES = 300 << 20
"""How much larger the manager may become."""
SANDBOX_NBYTES = 3584 << 20
CLIENT_SECONDS, CLIENT_NBYTES = 1.0, 100 << 20
"""Of the user's own process, to find the cuts."""
X = np.random.default_rng(25).random((3, 16), dtype=np.float32)


class Seen(NamedTuple):
    """What became of a hostile model."""

    code: str
    """Of the error; empty: it was accepted."""
    error: str
    tensors: int
    seconds: float
    busy: float
    """How many processes wanted each processor then; at least 1."""


class Load(threading.Thread):
    """Calls a good model all the while and checks each answer."""

    def __init__(self, lab: tether.Lab) -> None:
        super().__init__(daemon=True)
        self.lab = lab
        self.answered = 0
        self.flaws: list[str] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            try:
                answer = self.lab.infer("good", X)
            except Exception as error:
                self.flaws.append(repr(error))
                continue
            self.answered += 1
            if not np.allclose(answer, X @ WEIGHTS, rtol=1e-5):
                self.flaws.append("a wrong answer")


class Watch(threading.Thread):
    """Looks at the memory of the manager, and of what it started."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.manager = psutil.Process(pid)
        self.before = self.manager.memory_info().rss
        self.manager_nbytes = self.sandbox_nbytes = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.1):
            self.manager_nbytes = max(self.manager_nbytes, self.manager.memory_info().rss)
            with contextlib.suppress(psutil.Error):
                resident = sum(child.memory_info().rss for child in self.manager.children(recursive=True))
                self.sandbox_nbytes = max(self.sandbox_nbytes, resident)


@contextlib.contextmanager
def running(*threads):
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.done.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that planted code leaves: pickles call `id`, and the `id` that the lab's processes find leaves it."""
    folder, left = tmp_path / "bin", tmp_path / "left"
    folder.mkdir()
    (folder / "id").write_text(f"#!/bin/sh\necho ran >> {left}\n")
    (folder / "id").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    subprocess.run(["sh", "-c", "id"], check=True)
    assert left.exists()
    left.unlink()
    return left


def publish(lab: tether.Lab, name: str, case: Hostile, folder: Path) -> Seen:
    """As a user does; where her own process refuses, once more as curl would: the lab has to refuse as well."""
    folder.mkdir()
    path = case.write(folder)
    _mark_secrets(folder)
    example = {key: np.asarray(value, np.int64 if max(value) > 1 else np.float32) for key, value in case.example.items()}
    begun = time.monotonic()
    try:
        version = lab.publish(name, path, example=example or None)
        tensors = len(version.weights)
        return Seen("", "", tensors, time.monotonic() - begun, busy())
    except TetherError as error:
        seen = Seen(error.code, str(error), 0, time.monotonic() - begun, busy())
    raw = _publish_raw(lab, name, path) if _refuses(path) else seen
    return seen if raw.code in BAD else raw


def _mark_secrets(folder: Path) -> None:
    secret = folder / "secret"
    if secret.exists():
        secret.write_bytes(CANARY)


def _refuses(path: Path) -> bool:
    try:
        cut_model(path, model_sources(path)[1])
    except TetherError:
        return True
    return False


def _publish_raw(lab: tether.Lab, name: str, path: Path) -> Seen:
    """The regular files, crudely cut, as a draft: of links there is nothing that could be sent."""
    root = path if path.is_dir() else path.parent
    files = [each for each in ([path] if path.is_file() else sorted(path.rglob("*"))) if each.is_file() and not each.is_symlink()]
    cut = [cut_file(Source(each.relative_to(root).as_posix(), each)) for each in files if each.stat().st_nlink == 1]
    body = draft(cut, "" if path.is_dir() else path.name, framework=None, aliases=[], tags={})
    begun = time.monotonic()
    try:
        loop.run(publish_draft(lab.operations.client, name, body, cut))
    except TetherError as error:
        return Seen(error.code, str(error), 0, time.monotonic() - begun, busy())
    return Seen("", "", len(lab.models[name].weights), time.monotonic() - begun, busy())


def busy() -> float:
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def flaw(case: Hostile, seen: Seen) -> str:
    """What is wrong with what became of it; empty if nothing is."""
    if seen.seconds > SECONDS * seen.busy:
        return f"{case}: took {seen.seconds:.1f} s"
    if not seen.code:
        if case.tensors is None:
            return f"{case}: was accepted"
        return "" if seen.tensors == case.tensors else f"{case}: has {seen.tensors} tensors, not {case.tensors}"
    if seen.code not in case.codes:
        return f"{case}: {seen.code}, not {sorted(case.codes)}: {seen.error}"
    return "" if "\n" not in seen.error and 20 < len(seen.error) < 3000 else f"{case}: says {seen.error[:300]!r}"


def holds(folder: Path, *wanted: bytes) -> list[str]:
    """The files below the folder that hold one of these."""
    pattern, found = re.compile(b"|".join(map(re.escape, wanted))), []
    for each in files_below(folder):
        with contextlib.suppress(FileNotFoundError):  # a lab that runs has files that are there for a moment
            if pattern.search(each.read_bytes()):
                found.append(str(each))
    return found


def nbytes_below(folder: Path) -> int:
    return sum(each.stat().st_size for each in files_below(folder))


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_row_25_hostile_models_are_refused_while_the_lab_serves(tmp_path, chaos, canary, measured):
    cases = corpus()
    cases = chosen(cases, chaos.count(full=len(cases), small=SMALL), chaos.seed)
    data, begun, seen = tmp_path / "data", time.monotonic(), {}
    with tether.up(workers=1, data=data) as lab:
        lab.publish("good", write_model(tmp_path / "good.onnx"), example=X[:1])
        load = [Load(lab), Load(lab)]
        watch = Watch(next(service.pid for service in lab.status().services if service.name == "manager"))
        with running(*load, watch):
            for number, case in enumerate(cases):
                seen[case] = publish(lab, f"hostile-{number}", case, tmp_path / f"{number}")
            again = [case for case in cases if seen[case].code][:3]
            staged = nbytes_below(data / "store/staging")
            for number, case in enumerate(again):
                publish(lab, "hostile", case, tmp_path / f"{len(cases) + number}")
        outside = sorted(each.name for each in tmp_path.iterdir() if not each.name.isdecimal())
        assert nbytes_below(data / "store/staging") == staged  # what was refused before is not kept a second time
        assert list((data / "run/publishing").iterdir()) == []
        verified, refused = lab.verify("good"), {f"hostile-{number}" for number, case in enumerate(cases) if seen[case].code}
        listed = set(lab.models)

    assert "\n".join(text for case in cases if (text := flaw(case, seen[case]))) == ""
    assert [text for each in load for text in each.flaws] == []
    assert not canary.exists()
    assert outside == ["bin", "data", "good.onnx"]
    assert holds(data, CANARY, b"root:x:0:0:") == []
    assert holds(data, WEIGHTS.tobytes())  # what is in the store is found by such a search
    assert not refused & listed
    assert verified.ok
    assert watch.manager_nbytes - watch.before < MANAGER_NBYTES
    assert watch.sandbox_nbytes < SANDBOX_NBYTES
    answered, slowest = sum(each.answered for each in load), max(each.seconds for each in seen.values())
    assert answered > 5 * len(cases)
    counts = (
        f"{len(cases)} hostile models, {len(refused)} refused, {len(cases) - len(refused)} harmless, slowest {slowest:.1f} s; "
        f"manager +{watch.manager_nbytes - watch.before >> 20} MiB, sandbox {watch.sandbox_nbytes >> 20} MiB; "
        f"{answered} requests meanwhile, 0 failed"
    )
    measured(f"row 25: {counts}")
    chaos.record(25, counts, time.monotonic() - begun)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_row_25_a_notebook_that_publishes_them_is_not_held_up(tmp_path, chaos, measured):
    """Finding the cuts runs in the user's own process, before the lab has seen anything."""
    cases = corpus()
    cases = chosen(cases, chaos.count(full=len(cases), small=SMALL), chaos.seed)
    costs = {}
    for number, case in enumerate(cases):
        (tmp_path / f"{number}").mkdir()
        path = case.write(tmp_path / f"{number}")
        with spent() as cost, contextlib.suppress(TetherError):
            cut_model(path, model_sources(path)[1])
        costs[case] = cost

    slowest, largest = (max(cost[what] for cost in costs.values()) for what in ("seconds", "nbytes"))
    measured(f"row 25: cutting {len(cases)} hostile models takes the client at most {slowest:.2f} s and {largest >> 20} MiB")
    assert [str(case) for case, cost in costs.items() if cost["seconds"] > CLIENT_SECONDS or cost["nbytes"] > CLIENT_NBYTES] == []


@contextlib.contextmanager
def spent():
    """Processor seconds, since the machine has others to serve, and memory at its peak beyond what there was."""
    cost = {"seconds": 0.0, "nbytes": 0}
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    begun, before = time.process_time(), resident("VmRSS")
    yield cost
    cost |= {"seconds": time.process_time() - begun, "nbytes": resident("VmHWM") - before}


DATA = b"\x08\x09 this is not a model"
BLOB = cut_file(Source("m.onnx", DATA)).blobs[0].digest


def lies(**changes):
    file = {"path": "m.onnx", "nbytes": len(DATA), "segments": [[BLOB, 0, len(DATA)]]} | changes
    return {"files": [file], "entry": "m.onnx"}


def two(first, second):
    return {"files": [lies(path=path)["files"][0] for path in (first, second)], "entry": ""}


PATHS = ("../m.onnx", "/tmp/m.onnx", "a/../../m.onnx", "a\\m.onnx", "a\0.onnx", "a\n.onnx", "a//m.onnx", "m.onnx/", ".", "", "n" * 5000)
DRAFTS = {
    **{f"a file {path[:20]!r}": lies(path=path) for path in PATHS},
    "a file of Tether's own": lies(path=".tether/tensors.bin"),
    "a file of Tether's own by a detour": lies(path="./.tether/tensors.bin"),
    "one file twice": two("m.onnx", "m.onnx"),
    "a file that is a folder": two("m.onnx", "m.onnx/x"),
    **{
        f"an entry {entry!r}": lies() | {"entry": entry} for entry in ("../../etc/passwd", "/etc/passwd", "nowhere.onnx", "m.onnx/..", "..")
    },
    "a segment before its blob": lies(segments=[[BLOB, -1, len(DATA)]]),
    "a segment behind its blob": lies(segments=[[BLOB, 1, len(DATA)]]),
    "a longer blob than there is": lies(nbytes=1 << 62, segments=[[BLOB, 0, 1 << 62]]),
    "segments of nothing": lies(segments=[[BLOB, 0, 0]] * 10_000),
    "another size": lies(nbytes=len(DATA) + 1),
    "a size below nothing": lies(nbytes=-1, segments=[]),
    "a size of 2^63": lies(nbytes=1 << 63),
    "a digest that is a path": lies(segments=[["../../../etc/passwd", 0, len(DATA)]]),
    "a blob that nobody has": lies(segments=[["0" * 64, 0, len(DATA)]]),
    "no files": {"files": [], "entry": ""},
    "no list": {"files": {"m.onnx": 1}},
    "a manifest that is none": {"manifest": "AAAA", "publisher": "00", "signature": "zz"},
    "more segments than a body may have": lies(nbytes=len(DATA) * 10**6, segments=[[BLOB, 0, len(DATA)]] * 10**6),
}
REFUSALS = {
    "malformed_request",
    "malformed_manifest",
    "bad_input",
    "missing_blobs",
    "bad_model",
    "no_model_file",
    "unknown_framework",
    "payload_too_large",
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_draft_that_lies_is_refused_with_a_code(lab, kind):
    client = lab.operations.client
    loop.run(client.put_blob(BLOB, DATA))
    with pytest.raises(TetherError) as caught:
        loop.run(client.publish("lies", DRAFTS[kind]))
    assert caught.value.code in REFUSALS, caught.value
    assert "lies" not in lab.models


def test_one_blob_named_so_often_that_it_fills_the_disk_is_refused_before_a_byte_is_written(lab):
    blob = cut_file(Source("m.onnx", bytes(4 << 20))).blobs[0]
    count = shutil.disk_usage(lab.status().data).free // blob.nbytes + 1000
    file = {"path": "m.onnx", "nbytes": count * blob.nbytes, "segments": [[blob.digest, 0, blob.nbytes]] * count}
    loop.run(lab.operations.client.put_blob(blob.digest, blob.read()))

    begun = time.monotonic()
    with pytest.raises(NoSpaceError if count < 500_000 else PayloadTooLargeError):
        loop.run(lab.operations.client.publish("lies", {"files": [file], "entry": "m.onnx"}))

    assert time.monotonic() - begun < SECONDS * busy()


LINKING = """
import os
from pathlib import Path

class Model:
    inputs = outputs = [("x", "FP32", (None, 4))]

    def predict(self, x):
        return {{"x": x}}

for name in ("weights.npy", ".tether/tensors.bin"):
    file = Path(__file__).parent / name
    if file.exists():
        file.unlink()
        {how}({target!r}, file)
"""


@pytest.mark.parametrize("how", ["os.symlink", "os.link"])
def test_a_class_that_puts_links_among_its_files_publishes_nothing_from_elsewhere(lab, tmp_path, how):
    (tmp_path / "secret").write_bytes(CANARY)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.py").write_text(LINKING.format(how=how, target=str(tmp_path / "secret")))
    np.save(folder / "weights.npy", np.asfortranarray(np.arange(40.0).reshape(4, 10)))  # the lab writes it out, in the order of C

    with pytest.raises(HostileModelError, match="in the place of"):
        lab.publish("linking", folder)

    assert holds(Path(lab.status().data), CANARY) == []


REWRITING = """
from pathlib import Path

class Model:
    inputs = outputs = [("x", "FP32", (None, 4))]

    def predict(self, x):
        return {"x": x}

file = Path(__file__).parent / "weights.npy"
file.write_bytes(bytes(file.stat().st_size))
"""


def test_a_class_that_writes_into_its_files_while_it_is_looked_at_changes_nothing_of_what_is_published(lab, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.py").write_text(REWRITING)
    np.save(folder / "weights.npy", np.arange(40_000.0))
    sent = (folder / "weights.npy").read_bytes()
    crude = [cut_file(Source(path.name, path)) for path in sorted(folder.iterdir())]  # so that the lab cuts it again, at its tensor

    async def publish():
        client = lab.operations.client
        for blob in (blob for file in crude for blob in file.blobs):
            await client.put_blob(blob.digest, blob.read())
        example = {"x": np.zeros((1, 4), np.float32)}
        given = cut_file(Source(EXAMPLE, to_npz(example)))
        for blob in given.blobs:
            await client.put_blob(blob.digest, blob.read())
        return await client.publish("rewriting", draft([*crude, given], "", framework=None, aliases=[], tags={}))

    loop.run(publish())

    assert (lab.export("rewriting", tmp_path / "out") / "weights.npy").read_bytes() == sent
    np.testing.assert_array_equal(lab.models["rewriting"].weights["weights"][:], np.arange(40_000.0))
