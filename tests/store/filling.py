"""A store on a medium that takes nothing more. A script: `unshare --mount --propagation private python filling.py FOLDER KIND …`."""

import json
import os
import random
import sys
from pathlib import Path

from crashing import in_fork
from powercuts import fresh_image, mounted, run
from store_models import LAB, files_in, files_of, publish, seeded

from tether.errors import NoSpaceError, StoreError, TetherError
from tether.store import Repository
from tether.types import ModelRef

IMAGE_NBYTES = 64 * 1024 * 1024
DIGITS = ModelRef("digits")
LARGEST = 2_000_000
"""Bytes of a file of a model; a model has six."""


class Filled:
    """A store that is filled, read, emptied by half and filled again; whatever is refused, what was acknowledged stays."""

    def __init__(self, mount: Path, chance: random.Random) -> None:
        self.root, self._filler, self._chance = mount / "store", mount / "filler", chance
        self.repository = Repository.open(self.root, own=LAB.public)
        self.alive: dict[int, tuple[int, int]] = {}
        """Version → seed and size of its files."""
        self.seed = self.published = self.refused = self.reads = 0

    def publish(self, nbytes: int) -> bool:
        self.seed += 1
        try:
            version = publish(self.repository, self.seed, files=files_of(self.seed, nbytes)).version
        except NoSpaceError as error:
            self.refused += 1
            if "free some" not in str(error):
                raise
            return False
        self.alive[version] = self.seed, nbytes
        self.published += 1
        return True

    def fill(self) -> None:
        """Until not a byte is left."""
        while self.publish(self._chance.randrange(2_000, LARGEST)):
            pass
        if self._chance.random() < 0.5:
            self.repository.clear_staging()
        with self._filler.open("wb", buffering=0) as file:
            for nbytes in (1 << 20, 4096, 1):
                while write_some(file.fileno(), nbytes):
                    pass

    def check(self) -> None:
        """All is there and right, by this process and by one that comes anew."""
        self._read(self.repository)
        in_new_process(self._read_anew)
        for _ in range(2):
            if self.publish(LARGEST):
                raise SystemExit("published what can't have been written")

    def _read_anew(self) -> None:
        with Repository.open(self.root, read_only=True) as reader:
            self._read(reader)

    def _read(self, repository: Repository) -> None:
        versions = repository.models()[0].versions
        if [record.version for record in versions] != sorted(self.alive):
            raise SystemExit("acknowledged and stored differ")
        for record in self._chance.sample(versions, min(4, len(versions))):
            files = files_of(*self.alive[record.version])
            for array in repository.manifest(record.digest).arrays:
                if repository.read_array(array, 0, array.nbytes) != files[array.path.removeprefix("files/")]:
                    raise SystemExit(f"version {record.version} is not what was published")
                self.reads += 1

    def make_room(self) -> None:
        """Delete half of the versions and collect, while nothing can be written."""
        self.repository.clear_staging()
        for version in self._chance.sample(sorted(self.alive)[:-1], len(self.alive) // 2):
            self.repository.delete_version("digits", version)
            del self.alive[version]
        self.repository.gc(dry_run=False, grace=0.0)
        if not self.publish(LARGEST // 4):
            raise SystemExit("nothing can be published after half was deleted and collected")

    def again(self) -> None:
        self._filler.unlink()
        if self._chance.random() < 0.5:
            self.repository.close()
            self.repository = Repository.open(self.root, own=LAB.public)
        problems = self.repository.verify().problems
        if problems:
            raise SystemExit(str(problems[0]))


def write_some(descriptor: int, nbytes: int) -> bool:
    try:
        return os.write(descriptor, b"\0" * nbytes) > 0
    except OSError:
        return False


def fill(mount: Path, seed: int, passes: int) -> dict[str, int]:
    filled = Filled(mount, seeded(seed))
    for _ in range(passes):
        filled.fill()
        filled.check()
        filled.make_room()
        filled.again()
    filled.repository.close()
    return {"passes": passes, "published": filled.published, "refused": filled.refused, "reads": filled.reads}


def read_only(mount: Path) -> dict[str, bool]:
    """The system makes the medium read-only under the store, as ext4 does after an error."""
    root = mount / "store"
    with Repository.open(root, own=LAB.public) as repository:
        first = publish(repository, 1).digest
        repository.checkout(first)
        second = publish(repository, 2).digest
        run("mount", "-o", "remount,abort", str(mount))
        told = [said_by(lambda: publish(repository, 3)), said_by(lambda: repository.set_alias("digits", "prod", 1))]
        reads_on(repository, first, second)
        in_new_process(reads_anew, root, first, second)
    in_new_process(reads_anew, root, first, second)
    told.append(said_by(lambda: Repository.open(root, own=LAB.public)))
    return {"told": all("writable" in text or "permissions" in text for text in told)}


def in_new_process(job, *arguments) -> None:
    status, said = in_fork(job, *arguments)
    if status:
        raise SystemExit(f"{job.__name__} in another process: {said}")


def comes_back(mount: Path) -> None:
    root = mount / "store"
    with Repository.open(root, own=LAB.public) as repository:
        whole(repository, publish(repository, 3).digest, 3)
        for record in repository.models()[0].versions:
            whole(repository, record.digest, record.version)
        if repository.verify().problems:
            raise SystemExit("damaged")
        repository.discard(repository.resolve(ModelRef("digits", version=2)).digest)


def reads_anew(root: Path, first: str, second: str) -> None:
    with Repository.open(root, read_only=True) as reader:
        reads_on(reader, first, second)


def reads_on(repository: Repository, first: str, second: str) -> None:
    """From the packs always; a checkout that exists, too; a new one can't be made and says why."""
    for seed, digest in enumerate((first, second), start=1):
        if repository.resolve(ModelRef("digits", version=seed)).digest != digest:
            raise SystemExit("resolves to another version")
        for array in repository.manifest(digest).arrays:
            if repository.read_array(array, 0, array.nbytes) != files_of(seed)[array.path.removeprefix("files/")]:
                raise SystemExit("reads other bytes")
    whole(repository, first, 1)
    said_by(lambda: repository.checkout(second))


def whole(repository: Repository, digest: str, seed: int) -> None:
    if files_in(repository.checkout(digest)) != files_of(seed):
        raise SystemExit("a checkout is not what was published")


def said_by(use) -> str:
    try:
        use()
    except StoreError as error:
        return str(error)
    raise SystemExit("it was done, on a medium that takes nothing")


def no_inodes(mount: Path) -> dict[str, bool]:
    """Bytes are left, names are not."""
    root, told = mount / "store", []
    with Repository.open(root, own=LAB.public) as repository:
        first = publish(repository, 1).digest
        fillers = []
        try:
            while True:
                fillers.append(mount / f"filler{len(fillers)}")
                fillers[-1].touch()
        except OSError:
            fillers.pop()
        for seed in (2, 3):
            try:
                publish(repository, seed)
            except NoSpaceError as error:
                told.append("free some" in str(error))
        for array in repository.manifest(first).arrays:
            repository.read_array(array, 0, array.nbytes)
        try:
            repository.checkout(first)
        except TetherError as error:
            told.append(isinstance(error, NoSpaceError))
        for filler in fillers:
            filler.unlink()
        whole(repository, publish(repository, 2).digest, 2)
        whole(repository, first, 1)
        if repository.verify().problems:
            raise SystemExit("damaged")
    return {"told": len(told) == 3 and all(told)}


def main() -> None:
    folder, kind, numbers = Path(sys.argv[1]), sys.argv[2], map(int, sys.argv[3:])
    run("mount", "-t", "tmpfs", "none", str(folder))
    (folder / "mount").mkdir()
    inodes = ("-N", "64") if kind == "no_inodes" else ()
    run("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4", *inodes, str(fresh_image(folder / "image", IMAGE_NBYTES)))
    with mounted(folder / "image", folder / "mount", "data=ordered"):
        report = {"fill": fill, "read_only": read_only, "no_inodes": no_inodes}[kind](folder / "mount", *numbers)
    if kind == "read_only":
        run("e2fsck", "-p", str(folder / "image"), allowed=(0, 1))
        with mounted(folder / "image", folder / "mount", "data=ordered"):
            comes_back(folder / "mount")
        with mounted(folder / "image", folder / "mount", "ro"):
            first, second, _ = (digest for digest in digests(folder / "mount"))
            in_new_process(reads_anew, folder / "mount" / "store", first, second)
    sys.stdout.write(json.dumps(report))


def digests(mount: Path) -> list[str]:
    with Repository.open(mount / "store", read_only=True) as reader:
        return [record.digest for record in reader.models()[0].versions]


if __name__ == "__main__":
    main()
