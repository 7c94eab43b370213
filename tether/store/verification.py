"""Reads everything again and says what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tether.errors import TetherError
from tether.store.format.manifest import decode
from tether.store.format.packs import Located, Location, missing
from tether.store.format.records import Problem, Report, VersionRecord
from tether.store.packing.blobs import Blobs
from tether.store.packing.pack_files import scan
from tether.store.packing.parallel import buffer, in_batches, threads_for
from tether.types import Digest

__all__ = ["Damage", "Line", "lines_of", "look", "problem", "survey"]


class Damage(NamedTuple):
    """What a survey found: the report for people, and what a repair starts from."""

    report: Report
    manifests: list[Digest]
    blobs: list[Digest]
    packs: list[str]
    """Those whose index can't be read."""


class Line(NamedTuple):
    """A blob to be read, and the first that needs it."""

    digest: Digest
    location: Location | None
    path: str


def survey(versions: Iterable[VersionRecord], manifest: Callable[[Digest], bytes], blobs: Blobs, packs: Iterable[Path] = ()) -> Damage:
    """Check the versions' manifests and blobs, and the packs besides (blobs that no version names any more). Never raises for damage."""
    found = _Survey(blobs)
    for version in versions:
        found.add_version(version, manifest)
    found.check(found.named())
    for pack in packs:
        found.check(found.unnamed(pack), pack)
    report = Report(len(found.sizes), sum(found.sizes.values()), tuple(found.problems))
    return Damage(report, list(found.manifests), list(found.altered), found.packs)


class _Survey:
    """What was looked at so far; each blob and manifest once."""

    def __init__(self, blobs: Blobs) -> None:
        self.sizes: dict[Digest, int] = {}
        self.problems: list[Problem] = []
        self.manifests: dict[Digest, TetherError] = {}
        self.altered: dict[Digest, TetherError] = {}
        self.packs: list[str] = []
        self._blobs = blobs
        self._users: dict[Digest, list[str]] = {}

    def add_version(self, version: VersionRecord, manifest: Callable[[Digest], bytes]) -> None:
        name = f"{version.name}:{version.version}"
        try:
            if version.digest in self.manifests:
                raise self.manifests[version.digest]
            data = manifest(version.digest)
            self.sizes[version.digest] = len(data)
            public = decode(data)
        except TetherError as error:
            self.sizes.setdefault(version.digest, 0)
            self.manifests[version.digest] = error
            self.problems.append(problem(name, version.digest, error))
            return
        for array in public.arrays:
            for digest in dict.fromkeys(segment.digest for segment in array.segments):
                self._users.setdefault(digest, []).append(f"{name}/{array.path}")
        for seal in public.encryption.private if public.encryption else ():
            self._users.setdefault(seal.digest, []).append(f"{name}, the private part of its manifest")

    def named(self) -> list[Line]:
        located = self._blobs.locate(self._users)
        lost = [digest for digest in self._users if digest not in located]
        return [Line(digest, located.get(digest), self._users[digest][0]) for digest in [*located, *lost]]

    def unnamed(self, pack: Path) -> list[Line]:
        """What else lies in a pack; of an unreadable one, what the catalog knows of it."""
        try:
            index = scan(pack)
        except TetherError as error:
            index = []
            if not self._is_collected(pack):
                self.packs.append(pack.name)
                self.problems.append(problem(pack.name, Digest(pack.stem), error))
        return [line for line in lines_of(self._blobs, pack.name, index) if line.digest not in self.sizes]

    def _is_collected(self, pack: Path) -> bool:
        """Whether it was garbage, and went meanwhile."""
        return not pack.exists() and not self._blobs.lines_of(pack.name)

    def check(self, lines: Sequence[Line], pack: Path | None = None) -> None:
        """`pack`: in which they lie, where no version names them."""
        threads = threads_for(sum(map(_nbytes, lines)))
        for line, nbytes, error in in_batches(partial(look, self._blobs), lines, _nbytes, threads):
            if error is not None and pack is not None and self._is_collected(pack):
                continue
            self.sizes[line.digest] = nbytes
            if error is not None:
                self.altered[line.digest] = error
        wrong = [line for line in lines if line.digest in self.altered]
        order = {digest: number for number, digest in enumerate(self._users)} if wrong else {}
        for line in sorted(wrong, key=lambda line: order.get(line.digest, 0)):
            for path in self._users.get(line.digest, [line.path]):
                self.problems.append(problem(path, line.digest, self.altered[line.digest]))


def _nbytes(line: Line) -> int:
    return line.location.nbytes if line.location else 0


def problem(path: str, digest: Digest, error: TetherError) -> Problem:
    """As the report has it; `path` is what is damaged."""
    return Problem(path, digest, error.code, str(error))


def lines_of(blobs: Blobs, pack: str, index: Iterable[Located]) -> list[Line]:
    """What is to be read of a pack: what the catalog says lies there; its own index where the catalog does not know the pack.

    A copy that a later pack replaced is nobody's any more: the damage in it is why it was replaced.
    """
    known = blobs.lines_of(pack)
    return [Line(line.digest, Location(pack, line.offset, line.nbytes), pack) for line in (index if known is None else known)]


def look(blobs: Blobs, line: Line) -> tuple[Line, int, TetherError | None]:
    """Read a blob: its size, and what is wrong with it."""
    try:
        if line.location is None:
            raise missing(line.digest, line.path)
        with buffer() as view:
            return line, len(blobs.read_into(line.digest, view, line.path, line.location)), None
    except TetherError as error:
        return line, 0, error
