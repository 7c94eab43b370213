"""For the tests of garbage collection: a clock that is set by hand, models of few bytes, what is on the disk.

Run as a script it collects garbage in forks that die where they are told to: see `Collectors`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from crashing import in_fork
from store_models import LAB, manifest_of, seeded

from tether.store import Repository, digest_of, signed_message
from tether.store.index import collection_tables
from tether.types import ModelRef

HOUR = 3600.0
DAY = 24 * HOUR


class Clock:
    """Begins now, since files have real times; goes on when told to."""

    def __init__(self, now=None):
        self.now = time.time() if now is None else now

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def opened(root, clock, **options):
    return Repository.open(root, own=LAB.public, clock=clock, **options)


def content(seed, nbytes=5_000):
    return seeded(seed).randbytes(nbytes)


def publish_files(repository, files, name="digits", **options):
    return publish_manifest(repository, manifest_of(repository, files), name, **options)


def publish_manifest(repository, data, name="digits", **options):
    return repository.publish(name, data, LAB.public, LAB.sign(signed_message(data)), **options)


def packs_in(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (root / "packs").glob("*.pack")}


def nbytes_in(root: Path) -> int:
    return sum(packs_in(root).values())


def indexed(repository) -> dict[str, tuple]:
    """What the catalog says lies in each pack."""
    with repository._catalog.reading() as db:
        return collection_tables.blobs_by_pack(db)


def files_of_version(repository, name, version):
    """Its files' bytes, each verified on the way."""
    manifest = repository.manifest(repository.resolve(ModelRef(name, version=version)).digest)
    return {array.path.removeprefix("files/"): repository.read_array(array, 0, array.nbytes) for array in manifest.files()}


def damage(root, data):
    """Flip a byte of a blob where it lies in a pack."""
    for path in (root / "packs").glob("*.pack"):
        whole = path.read_bytes()
        at = whole.find(data)
        if at >= 0:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            return digest_of(data)
    raise LookupError("no pack has it")


class Collectors:
    """A process whose forks collect the garbage of a store and are killed at a named point."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate(timeout=30)

    def crash(self, root, point, now, grace):
        """Whether it was killed: not every collection passes every point."""
        self._process.stdin.write(json.dumps([str(root), point, now, grace]) + "\n")
        self._process.stdin.flush()
        status, answer = json.loads(self._process.stdout.readline())
        if status not in (0, -9):
            raise AssertionError(answer)
        return status == -9


def _collect(root, point, now, grace):
    os.environ["TETHER_CRASH_AT"] = point
    with opened(Path(root), Clock(now)) as repository:
        repository.gc(grace=grace)


def _serve():
    for line in sys.stdin:
        sys.stdout.write(json.dumps(in_fork(_collect, *json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
