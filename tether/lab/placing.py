"""Where the versions of a model are, and why: `lab.explain("digits")`."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from tether.lab.objects import html_table

__all__ = ["Placement"]


class WorkerPlace(msgspec.Struct, frozen=True):
    """One worker, seen from one version."""

    worker: str
    holding: str
    """loaded, loading, asked: it is told to load it just now, leaving: to give it back; "": it has nothing of it."""
    why: str


class VersionPlace(msgspec.Struct, frozen=True):
    """Where one version is."""

    version: int
    state: str
    copies: int
    """Workers that are to have it."""
    why: str
    """Why so many, or why it is nowhere."""
    workers: tuple[WorkerPlace, ...] = ()


class Placement(msgspec.Struct, frozen=True):
    """Where a model is and why, when it was asked for."""

    model: str
    versions: tuple[VersionPlace, ...] = ()

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Version, worker, what it has, why. The line of the version itself has no worker."""
        for each in self.versions:
            yield str(each.version), "", each.state, each.why
            yield from (("", worker.worker, worker.holding, worker.why) for worker in each.workers)

    def __repr__(self) -> str:
        lines = (f"{version or '':>3} {worker:<12} {holding:<8} {why}".rstrip() for version, worker, holding, why in self.rows())
        return "\n".join([f"<Placement of {self.model}>", *lines])

    def _repr_html_(self) -> str:
        return html_table(self.model, ("version", "worker", "state", "why"), list(self.rows()))
