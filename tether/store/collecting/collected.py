"""Pure: what a garbage collection did, or would do, as values and as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from tether.store.collecting.collection import Kept, Plan
from tether.store.format.records import Problem

__all__ = ["GcReport", "PackChange", "planned", "readable"]

_SHOWN = 10
"""Lines of one kind; what is beyond is counted."""
_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_STEP = 1000


@dataclass(frozen=True, slots=True)
class PackChange:
    """A pack that was deleted, or packs that were rewritten as one."""

    packs: tuple[str, ...]
    nbytes: int
    """On the disk before."""
    left_nbytes: int
    """On the disk after; 0: deleted."""
    reason: str


@dataclass(frozen=True, slots=True)
class GcReport:
    """What became of a garbage collection; of a dry run: what would."""

    dry_run: bool
    deleted: tuple[PackChange, ...]
    rewritten: tuple[PackChange, ...]
    manifests: int
    """That were deleted: of versions that were."""
    kept: tuple[Kept, ...]
    """What no version names and stays for now."""
    skipped: tuple[str, ...] = ()
    """What was not done that would have been right, and what to do about it."""
    seals: int = 0
    """Notes of what was encrypted that were forgotten: their blobs are gone."""
    problems: tuple[Problem, ...] = ()
    """Damage that was met; what is damaged stays where it is."""

    @property
    def freed_nbytes(self) -> int:
        return sum(change.nbytes - change.left_nbytes for change in (*self.deleted, *self.rewritten))

    @property
    def later_nbytes(self) -> int:
        """What time alone will make free."""
        return sum(kept.nbytes for kept in self.kept if kept.until is not None)

    def lines(self) -> list[str]:
        """For people: what and why, the sum last."""
        return [*self._changes(), *self._stays(), self._sum()]

    def _changes(self) -> Iterator[str]:
        delete, rewrite = ("would delete", "would rewrite") if self.dry_run else ("deleted", "rewrote")
        for change in self.deleted[:_SHOWN]:
            yield f"{delete} pack {_short(change.packs)}, {readable(change.nbytes)}: {change.reason}"
        if rest := self.deleted[_SHOWN:]:
            yield f"{delete} {len(rest)} more packs, {readable(sum(change.nbytes for change in rest))}"
        for change in self.rewritten[:_SHOWN]:
            sizes = f"{readable(change.nbytes)} to {readable(change.left_nbytes)}"
            yield f"{rewrite} pack {_short(change.packs)}, {sizes}: {change.reason}"
        if rest := self.rewritten[_SHOWN:]:
            yield f"{rewrite} {len(rest)} more packs, {readable(sum(change.nbytes - change.left_nbytes for change in rest))} less"
        if self.manifests:
            yield f"{delete} {self.manifests} manifests of versions that were deleted"
        if self.seals:
            yield f"{'would forget' if self.dry_run else 'forgot'} {self.seals} notes of what was encrypted: it is stored no more"

    def _stays(self) -> Iterator[str]:
        for kept in self.kept:
            until = f"; until {datetime.fromtimestamp(kept.until, UTC):%Y-%m-%d %H:%M} UTC" if kept.until is not None else ""
            packs = "1 pack" if kept.packs == 1 else f"{kept.packs} packs"
            yield f"kept {readable(kept.nbytes)} in {packs}: {kept.reason}{until}"
        yield from self.skipped
        for problem in self.problems:
            yield f"damaged, left where it is: {problem.path}: {problem.message}"

    def _sum(self) -> str:
        verb = "would free" if self.dry_run else "freed"
        return f"{verb} {readable(self.freed_nbytes)} now, {readable(self.later_nbytes)} later"


def planned(plan: Plan, seals: int = 0) -> GcReport:
    """What carrying out the plan would do."""
    return GcReport(
        dry_run=True,
        deleted=tuple(PackChange((pack.name,), pack.nbytes, 0, UNNEEDED) for pack in plan.drops),
        rewritten=tuple(
            PackChange(tuple(source.pack.name for source in rewrite.sources), rewrite.before_nbytes, rewrite.nbytes, rewrite.reason)
            for rewrite in plan.rewrites
        ),
        manifests=len(plan.manifests),
        kept=plan.kept,
        skipped=plan.unknown,
        seals=seals,
    )


UNNEEDED = "nothing in it is named by a version"


def readable(nbytes: int) -> str:
    """For people.

    >>> readable(999), readable(1_234_567)
    ('999 bytes', '1.2 MB')
    """
    value = float(nbytes)
    for unit in _UNITS[:-1]:
        if value < _STEP:
            return f"{nbytes} bytes" if unit == _UNITS[0] else f"{value:.1f} {unit}"
        value /= _STEP
    return f"{value:.1f} {_UNITS[-1]}"


def _short(packs: tuple[str, ...]) -> str:
    return packs[0][:12] if len(packs) == 1 else f"{packs[0][:12]} and {len(packs) - 1} others"
