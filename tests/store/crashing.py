"""A publisher that dies where it is told to. Run as a script: a line of JSON on stdin is a job, done in a fork; one line answers it.

A job `kill` is done in a fork as well and killed after the given time, wherever it then is.

Another script of this file (`read`) reads the store without end until its stdin closes, and says what it saw.
"""

import json
import os
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from store_models import LAB, files_in, files_of, publish, seeded

from tether.store import Repository
from tether.store.format.manifest import digest_of
from tether.store.packing.disk import dead_partials
from tether.types import ModelRef

DIGITS = ModelRef("digits")
NBYTES = 6_000
"""Small files: what counts is how many steps there are to die between."""
UPLOADS = 30


def publish_and_check_out(root: Path, seed: int, *, noise: bool = False) -> None:
    """`noise`: the model's blobs come to lie among others, from which a publish copies them."""
    with Repository.open(root, own=LAB.public) as repository:
        if noise:
            other = seeded(f"noise {seed}").randbytes(20 * NBYTES)
            repository.put_blob(digest_of(other), other)
        publish(repository, seed, files=files_of(seed, NBYTES), alias=["prod"])
        unread = publish(repository, -2, files=files_of(-2, NBYTES), name="unread")  # else the reader might be the first to check it out
        repository.checkout(unread.digest)
        repository.discard(unread.digest)


def inspect(root: Path, whole: bool) -> list[int]:
    """What a fresh opening finds: versions, `latest`, seed of it, damage (of all, else of `latest`), leftovers."""
    with Repository.open(root) as repository:
        models = repository.models()
        if not models:
            return [0, 0, -1, len(repository.verify().problems), _leftovers(root)]
        damage = len(repository.verify(None if whole else DIGITS).problems)
        seed = repository.manifest(repository.resolve(DIGITS).digest).attributes["seed"]
        return [len(models[0].versions), models[0].aliases["latest"], seed, damage, _leftovers(root)]


def _leftovers(root: Path) -> int:
    """What nobody is writing any more; the reader builds its checkouts meanwhile."""
    half = [path for folder in ("packs", "manifests", "staging") for path in (root / folder).glob("*.partial")]
    return len(half) + len(dead_partials(root / "cache"))


def in_fork(job, *arguments) -> tuple[int, object]:
    """Exit status (negative: signal) and answer of `job` in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.write(writing, json.dumps(job(*arguments)).encode())
        except BaseException as error:  # the answer must tell, not the parent's terminal
            os.write(writing, json.dumps(repr(error)).encode())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(answer) if answer else None


def crash(root: Path, point: str, seed: int):
    os.environ["TETHER_CRASH_AT"] = point
    return publish_and_check_out(root, seed, noise=point.startswith("blob"))


def uploads(seed: int) -> dict[str, bytes]:
    """The blobs of a model that is sent, a blob at a time."""
    chance = seeded(seed)
    blobs = [chance.randbytes(chance.choice([500, 3_000, 150_000])) for _ in range(UPLOADS)]
    return {digest_of(blob): blob for blob in blobs}


def upload(root: Path, seed: int, said: int) -> None:
    with Repository.open(root, own=LAB.public) as repository:
        blobs = uploads(seed)
        repository.missing(blobs)
        for digest, data in blobs.items():
            repository.put_blob(digest, data)
            os.write(said, b".")


def missing(root: Path, seed: int) -> list[str]:
    """What would have to be sent again, asked of the next process; and whether what it has is right."""
    with Repository.open(root) as repository:
        blobs = uploads(seed)
        lacking = repository.missing(blobs)
        for digest in blobs.keys() - set(lacking):
            if repository.read_draft_blob(digest) != blobs[digest]:
                raise SystemExit(f"blob {digest} is another one")
        repository.clear_staging()
        return lacking


def kill(root: Path, name: str, seed: int, seconds: float) -> tuple[int, int]:
    """Kill a job after that time, unless it is done before; gives the status, and how many steps it said that it had done."""
    listening, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            publish_and_check_out(root, seed) if name == "publish" else upload(root, seed, said)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    os.close(said)
    steps, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and select.select([listening], [], [], left)[0] and (bytes_said := os.read(listening, 4096)):
        steps += len(bytes_said)
    os.kill(child, signal.SIGKILL)
    with os.fdopen(listening, "rb") as pipe:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), steps + len(pipe.read())


def serve() -> None:
    jobs = {"crash": crash, "publish": publish_and_check_out, "inspect": inspect, "kill": kill, "missing": missing}
    for line in sys.stdin:
        name, root, *arguments = json.loads(line)
        sys.stdout.write(json.dumps(in_fork(jobs[name], Path(root), *arguments)) + "\n")
        sys.stdout.flush()


def read(root: Path) -> None:
    """Read until stdin closes; then say how often each seed was seen, in order, and how often a version was checked out anew."""
    seen, order = Counter(), []
    lasting = Repository.open(root, read_only=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        with Repository.open(root, read_only=True) as fresh:
            for repository in (lasting, fresh):
                record = repository.resolve(DIGITS)
                seed = repository.manifest(record.digest).attributes["seed"]
                if files_in(repository.checkout(record.digest)) != files_of(seed, NBYTES):
                    raise SystemExit(f"version {record.version} is not what was published as seed {seed}")
                if sum(seen.values()) % 3 == 0:
                    repository.discard(record.digest)
                seen[seed] += 1
                if not order or order[-1] != seed:
                    order.append(seed)
    sys.stdout.write(json.dumps({"reads": sum(seen.values()), "order": order}))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        read(Path(sys.argv[2]))
