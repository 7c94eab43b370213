"""Reads everything again and says what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from tether.errors import TetherError
from tether.store.blobs import Blobs
from tether.store.manifest import Manifest, decode
from tether.store.packs import Located, Location, read_at, scan
from tether.store.records import Problem, Report, VersionRecord
from tether.types import Digest

__all__ = ["verify"]


class _Tally:
    """What was checked so far; each blob once."""

    def __init__(self) -> None:
        self.sizes: dict[Digest, int] = {}
        self.bad: dict[Digest, TetherError] = {}
        self.problems: list[Problem] = []

    def check(self, digest: Digest, path: str, read: Callable[[], bytes]) -> bytes | None:
        """The bytes, if they are whole and were not read before."""
        if digest not in self.sizes:
            self.sizes[digest] = 0
            try:
                data = read()
                self.sizes[digest] = len(data)
                return data
            except TetherError as error:
                self.bad[digest] = error
        if digest in self.bad:
            self.problems.append(Problem(path, digest, self.bad[digest].code, str(self.bad[digest])))
        return None


def verify(versions: Iterable[VersionRecord], manifest: Callable[[Digest], bytes], blobs: Blobs, packs: Iterable[Path]) -> Report:
    """Check the versions' manifests and blobs, and the packs besides (blobs that no version names any more). Never raises for damage."""
    tally = _Tally()
    for version in versions:
        data = tally.check(version.digest, f"{version.name}:{version.version}", partial(manifest, version.digest))
        if data is not None:
            _check_version(tally, version, data, blobs)
    for pack in packs:
        _check_pack(tally, pack)
    return Report(len(tally.sizes), sum(tally.sizes.values()), tuple(tally.problems))


def _check_version(tally: _Tally, version: VersionRecord, data: bytes, blobs: Blobs) -> None:
    try:
        parsed: Manifest = decode(data)
    except TetherError as error:
        tally.problems.append(Problem(f"{version.name}:{version.version}", version.digest, error.code, str(error)))
        return
    for array in parsed.arrays:
        path = f"{version.name}:{version.version}/{array.path}"
        for digest in dict.fromkeys(segment.digest for segment in array.segments):
            tally.check(digest, path, partial(blobs.read, digest, path))


def _check_pack(tally: _Tally, pack: Path) -> None:
    try:
        index = scan(pack)
    except TetherError as error:
        tally.problems.append(Problem(pack.name, Digest(pack.stem), error.code, str(error)))
        return
    for line in index:
        if line.digest not in tally.sizes:
            tally.check(line.digest, pack.name, partial(_read_line, pack, line))


def _read_line(pack: Path, line: Located) -> bytes:
    return read_at(pack.parent, Location(pack.name, line.offset, line.nbytes), line.digest, pack.name)
