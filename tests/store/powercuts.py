"""Cuts the power of a store that is being published to.

A script: `unshare --mount --propagation private python powercuts.py FOLDER SEED IMAGES`.

A process publishes, rolls back, deletes and collects without end on an ext4 file system of a loop device and says each time that it was
acknowledged. What the device holds at a random instant, without what the system still keeps in memory, is what a power cut leaves: it is
copied, checked with `e2fsck`, mounted (which replays the journal), opened, and compared with what was acknowledged before the copy began.
The image lies on a tmpfs; mounts and loop devices end with this process's mount namespace, however it ends.

What it proves: everything acknowledged was flushed, and nothing becomes visible before its bytes are durable, for a device that keeps any
part of what it was sent since its last flush (the images of kind `reordered` and `running` are such parts) and on file systems that write
names and data in any order (`data=writeback`, no `auto_da_alloc`, and an fsync of another file that makes the names durable). What it does
not prove: that a device honours flushes, or keeps what it flushed.
"""

import ctypes
import json
import mmap
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from store_models import LAB, files_in, files_of, publish, seeded

from tether.store import Repository
from tether.types import ModelRef

IMAGE_NBYTES = 48 * 1024 * 1024
IMAGES_A_RUN = 10
"""Cuts of one run of the publisher; then it starts anew in an empty file system."""
LONGEST_WAIT = 0.03
"""Seconds between two cuts: some steps of the publisher, at this size of models."""
SHORT_WAIT = 0.002
"""Of two copies that are mixed: the flushes of a publish lie about this far apart."""
MOUNTS = ("data=ordered", "data=ordered,nodelalloc", "data=writeback,noauto_da_alloc", "data=writeback,noauto_da_alloc,nodelalloc")
SECTOR = 4096
ATTEMPTS = 6
DIGITS = ModelRef("digits", alias="prod")
SYNC_FILE_RANGE_WRITE = 2
FLUSHES = 15
"""Field of /sys/block/…/stat: flushes that the device has completed."""


# --- what is done: event n, and what the store is after it, are known from n alone


class Event(NamedTuple):
    """A step of the publisher, and what there is once it is done."""

    kind: str
    """`publish`, `rollback`, or `collect`: delete the version and collect the garbage."""
    version: int
    versions: tuple[int, ...]
    prod: int


def sizes(version: int) -> int:
    """Mostly small, so that many steps fit between two cuts, sometimes large enough that the system writes while we do."""
    return 200_000 if version % 7 == 5 else 5_000


def events() -> Iterator[Event]:
    """Without end."""
    versions: list[int] = []
    history: list[int] = []
    newest = 0
    for number in count():
        if number % 9 == 8:
            kind, version = "collect", next(version for version in versions if version != history[-1])
            versions.remove(version)
            history = [other for other in history if other != version]
        elif number % 4 == 3 and len(history) > 1:
            kind, version = "rollback", history.pop()
        else:
            newest += 1
            kind, version = "publish", newest
            versions.append(version)
            history.append(version)
        yield Event(kind, version, tuple(versions), history[-1])


def states(number: int) -> list[tuple[tuple[int, ...], int]]:
    """The versions, and which one `prod` is, after none, one, two … events."""
    return [((), 0), *((event.versions, event.prod) for event in islice(events(), number))]


def work(root: Path, acknowledged: int, *, synced: bool) -> None:
    """Go through the events for ever; each byte written to `acknowledged` is one that is durable."""
    if not synced:
        os.fsync = os.fdatasync = lambda _: None
    with Repository.open(root, own=LAB.public) as repository:
        for event in events():
            match event.kind:
                case "rollback":
                    repository.rollback("digits", "prod")
                case "collect":
                    repository.delete_version("digits", event.version)
                    repository.gc(grace=0.0)
                case _:
                    publish(repository, event.version, files=files_of(event.version, sizes(event.version)), alias=["prod"])
            os.write(acknowledged, b".")


class Publisher:
    """That process; `acknowledged` counts what it said so far."""

    def __init__(self, root: Path, *, synced: bool) -> None:
        self._said, saying = os.pipe()
        os.set_blocking(self._said, False)
        self.acknowledged = 0
        self.pid = os.fork()
        if self.pid == 0:
            try:
                work(root, saying, synced=synced)
            except BaseException as error:  # must not run on as a second parent
                sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os.close(saying)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self._said], [], [], left)[0]:
            self.listen()

    def listen(self) -> int:
        while select.select([self._said], [], [], 0)[0]:
            said = os.read(self._said, 65536)
            if not said:
                raise SystemExit("the publisher ended")
            self.acknowledged += len(said)
        return self.acknowledged

    def await_one_more(self) -> None:
        """Until the next event is acknowledged: the instant at which most is to be lost."""
        if not select.select([self._said], [], [], 60)[0]:
            raise SystemExit("the publisher hangs")

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._said)


# --- the device


@contextmanager
def mounted(image: Path, at: Path, options: str):
    run("mount", "-o", f"loop,{options}", str(image), str(at))
    try:
        yield at
    except BaseException:
        run("umount", "--lazy", str(at))  # what failed may still hold files of it
        raise
    run("umount", str(at))


def run(*command: str, allowed=(0,)) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in allowed:
        raise SystemExit(f"{' '.join(command)}: {done.returncode} {done.stdout} {done.stderr}")
    return done.stdout


class Device:
    """The loop device behind a mounted image."""

    def __init__(self, image: Path, mount: Path) -> None:
        self._image = image
        source = run("findmnt", "-n", "-o", "SOURCE", str(mount)).strip()
        self._stat = Path("/sys/block", Path(source).name, "stat")

    def flushes(self) -> int:
        return int(self._stat.read_text().split()[FLUSHES])

    def copy(self, target: Path) -> bool:
        """Whether the copy is one that a power cut can leave: so it is if no flush ended while it was made."""
        before = self.flushes()
        copy_sparse(self._image, target)
        return self.flushes() == before


def copy_sparse(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        end, at = os.fstat(reading.fileno()).st_size, 0
        os.truncate(writing.fileno(), end)
        while at < end:
            try:
                at = os.lseek(reading.fileno(), at, os.SEEK_DATA)
            except OSError:  # only a hole is left
                return
            until = os.lseek(reading.fileno(), at, os.SEEK_HOLE)
            os.pwrite(writing.fileno(), os.pread(reading.fileno(), until - at, at), at)
            at = until


def mix(chance: random.Random, older: Path, newer: Path) -> int:
    """Bring some of the sectors that differ from `newer` into `older`; gives how many differ."""
    share, differing = chance.random(), 0
    with older.open("r+b") as one, newer.open("rb") as two:
        before = mmap.mmap(one.fileno(), 0)
        after = mmap.mmap(two.fileno(), 0, prot=mmap.PROT_READ)
        for at in range(0, len(before), SECTOR):
            if before[at : at + SECTOR] != after[at : at + SECTOR]:
                differing += 1
                if chance.random() < share:
                    before[at : at + SECTOR] = after[at : at + SECTOR]
        before.close()
        after.close()
    return differing


# --- cutting


class Cutter:
    """Makes images of one run of the publisher."""

    def __init__(self, folder: Path, mount: Path, publisher: Publisher, chance: random.Random) -> None:
        self._mount, self._publisher, self._chance = mount, publisher, chance
        self._device = Device(folder / "image", mount)
        self._cut, self._other = folder / "cut", folder / "other"
        self._unrelated = os.open(mount / "unrelated", os.O_RDWR | os.O_CREAT)
        self._sync_file_range = ctypes.CDLL(None, use_errno=True).sync_file_range

    def close(self) -> None:
        os.close(self._unrelated)

    def cut(self) -> tuple[str, int, int]:
        """Leave an image in `cut`, the publisher stopped; gives its kind and bounds of how many events the device may know."""
        self._publisher.go_on()
        self._publisher.wait(self._chance.random() * LONGEST_WAIT)
        if self._chance.random() < 0.5:
            self._publisher.await_one_more()
        if self._chance.random() < 0.3:
            os.pwrite(self._unrelated, self._chance.randbytes(8), 0)
            os.fsync(self._unrelated)
        kind = self._chance.choice(["running", "stopped", "reordered"])
        if kind == "running":
            for _ in range(ATTEMPTS):
                surely = self._publisher.listen()
                if self._device.copy(self._cut):
                    self._publisher.stop()
                    return kind, surely, self._publisher.listen() + 1
        return self._cut_stopped(reordered=kind == "reordered")

    def _cut_stopped(self, *, reordered: bool) -> tuple[str, int, int]:
        """Of a publisher that stands still; the system goes on writing, so that a copy may have to be made again."""
        self._publisher.stop()
        while True:
            surely = self._publisher.listen()
            flushes = self._device.flushes()
            if self._device.copy(self._cut):
                break
        if reordered:
            self._write_back()
            if self._chance.random() < 0.5:
                self._publisher.go_on()
                self._publisher.wait(self._chance.random() * SHORT_WAIT)
                self._publisher.stop()
            copy_sparse(self._cut.with_name("image"), self._other)
            if self._device.flushes() == flushes and mix(self._chance, self._cut, self._other):
                return "reordered", surely, self._publisher.listen() + 1
        return "stopped", surely, surely + 1

    def _write_back(self) -> None:
        """Make the system send some of what it keeps of the store, as it does by itself after a while; no flush follows."""
        for path in self._mount.rglob("*"):
            if path.is_file() and self._chance.random() < 0.5:
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    continue
                self._sync_file_range(descriptor, ctypes.c_long(0), ctypes.c_long(0), SYNC_FILE_RANGE_WRITE)
                os.close(descriptor)


# --- what a cut left


def lost(image: Path, at: Path, surely: int, at_most: int) -> str:
    """Mount and open it and publish to it again: what is wrong, "" if nothing is."""
    run("e2fsck", "-p", str(image), allowed=(0, 1))
    with mounted(image, at, "data=ordered"):
        try:
            with Repository.open(at / "store", own=LAB.public) as repository:
                return problem_of(repository, surely, at_most)
        except Exception as error:  # whatever it is, it is what the test looks for
            return f"{surely} acknowledged: {error!r}"


def problem_of(repository: Repository, surely: int, at_most: int) -> str:
    models = repository.models()
    versions = models[0].versions if models else ()
    found = tuple(record.version for record in versions), models[0].aliases["prod"] if models else 0
    if found not in states(at_most)[surely:]:
        return f"{surely} acknowledged, at most {at_most} can be: found {found}, may be {states(at_most)[surely:]}"
    problems = repository.verify().problems
    if problems:
        return f"{surely} acknowledged: {problems[0]}"
    for record in versions:
        if not is_whole(repository, record.version, record.digest):
            return f"version {record.version} is not what was published"
    return "" if goes_on(repository, newest_of(at_most)) else "what is published after the cut is wrong"


def newest_of(number: int) -> int:
    """The version that was published last, or was being published, when so many events were done at most."""
    return max((event.version for event in islice(events(), number) if event.kind == "publish"), default=1)


def goes_on(repository: Repository, version: int) -> bool:
    """Publish what was being published when the power was cut; blobs of it may be staged, whole or not. Then collect."""
    files = files_of(version, sizes(version))
    fresh = publish(repository, version, files=files)
    repository.gc(grace=0.0)
    return files_in(repository.checkout(fresh.digest)) == files and not repository.verify().problems


def is_whole(repository: Repository, version: int, digest: str) -> bool:
    arrays = repository.manifest(digest).arrays
    data = {array.path.removeprefix("files/"): repository.read_array(array, 0, array.nbytes) for array in arrays}
    return data == files_of(version, sizes(version))


def cut_power(folder: Path, seed: int, images: int, *, synced: bool) -> dict[str, object]:
    """Cut `images` times; gives how many of each kind, the flawed ones, how many events were acknowledged before the last of each run."""
    chance, kinds, flaws, acknowledged = seeded(seed), Counter(), [], 0
    mount, look = folder / "mount", folder / "look"
    for number in range(0, images, IMAGES_A_RUN):
        run("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4", str(fresh_image(folder / "image")))
        with mounted(folder / "image", mount, chance.choice(MOUNTS)):
            publisher = Publisher(mount / "store", synced=synced)
            cutter = Cutter(folder, mount, publisher, chance)
            try:
                for cut in range(number, min(number + IMAGES_A_RUN, images)):
                    kind, surely, at_most = cutter.cut()
                    kinds[kind] += 1
                    flaw = lost(folder / "cut", look, surely, at_most)
                    if flaw:
                        flaws.append(f"cut {cut}, {kind}: {flaw}")
                acknowledged += publisher.listen()
            finally:
                publisher.end()
                cutter.close()
    return {"kinds": kinds, "flaws": flaws, "acknowledged": acknowledged}


def fresh_image(path: Path, nbytes: int = IMAGE_NBYTES) -> Path:
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, nbytes)
    return path


def main() -> None:
    folder, seed, images = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    run("mount", "-t", "tmpfs", "none", str(folder))
    for name in ("mount", "look"):
        (folder / name).mkdir()
    try:
        sys.stdout.write(json.dumps(cut_power(folder, seed, images, synced="--without-fsync" not in sys.argv)))
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
