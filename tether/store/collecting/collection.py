"""Pure: what garbage collection deletes, rewrites and keeps, and why, from what is stored, who names it, and a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from tether.store.format.packs import MAGIC, Located, index_bytes, place
from tether.types import Digest

__all__ = [
    "GRACE",
    "MERGE",
    "PROMISE",
    "TINY",
    "WHOLE",
    "Claim",
    "Inventory",
    "Kept",
    "Need",
    "Plan",
    "Rewrite",
    "Source",
    "StoredPack",
    "need_of",
    "placed",
    "plan",
]

GRACE = 24 * 3600.0
"""Seconds for which what nobody names any more is kept: time to take a deletion back, and longer than any publish takes."""
PROMISE = 3600.0
"""Seconds for which a blob that a publisher was told is here counts as named: it is not sent again, and the manifest comes after it."""
TINY = 1 << 20
"""Bytes under which a pack is tiny: opening it costs as much as reading it."""
MERGE = 32
"""Tiny packs that are worth one rewrite. All of them are merged, so that a byte is moved a few times until its pack is tiny no more."""
_MERGED_NBYTES = 64 << 20
"""Bytes of blobs after which a merge begins another pack: what a rewrite that is cut off has to do again, and the space that it needs."""
_FRACTION = 2
"""A pack is rewritten when it would shrink to less than 1 / this: so at most half of the disk is garbage, and a byte is moved once for
each time that as much garbage was made."""


@dataclass(frozen=True, slots=True)
class StoredPack:
    """A pack as the catalog knows it."""

    name: str
    nbytes: int
    """Of the file."""
    written: float
    blobs: tuple[Located, ...]
    """Those that the catalog says lie here, by offset. Copies that a later pack replaced are not among them."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one store needs of a pack."""

    nbytes: int
    live: str
    """Digest of the set of blobs, so that two stores can tell that they need the same ones; "": all of the pack."""


WHOLE = Need(0, "")
"""Of a store that has not looked which part it is."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What another store of a shared folder needs of a pack."""

    store: str
    """For people: whose it is, and when it was last heard of."""
    need: Need


@dataclass(frozen=True, slots=True)
class Inventory:
    """All that a plan is made from."""

    packs: tuple[StoredPack, ...]
    named: Collection[Digest] = ()
    """Blobs that the manifest of a version names. Drafts and uploads hold their bytes outside of the packs."""
    promised: Mapping[Digest, float] = field(default_factory=dict)
    """Blobs that a publisher was told are here, and when."""
    forgotten: Mapping[Digest, float] = field(default_factory=dict)
    """Manifests that no version has any more, and since when."""
    lingering: Mapping[Digest, float] = field(default_factory=dict)
    """Blobs that those name, and since when the last of them is forgotten."""
    only: Collection[Digest] | None = None
    """Blobs of which alone any may go; None: all may."""
    claims: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)
    """Of other stores, by pack."""
    unreadable: tuple[str, ...] = ()
    """Why it is not known what is named: manifests of versions, drafts, records of other stores that can't be read."""


@dataclass(frozen=True, slots=True)
class Source:
    """A pack that is rewritten."""

    pack: StoredPack
    keep: tuple[Located, ...]
    dead: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Copy what is needed of some packs to a new one, then delete them."""

    sources: tuple[Source, ...]
    name: str
    """Of the new pack. It follows from what it will hold."""
    index: tuple[Located, ...]
    """Of the new pack: the blobs of the sources, one source after the other."""
    nbytes: int
    """Of the new pack: the space that it takes before the old ones are gone."""
    reason: str

    @property
    def before_nbytes(self) -> int:
        return sum(source.pack.nbytes for source in self.sources)

    @property
    def written(self) -> float:
        """What is moved keeps its age."""
        return max(source.pack.written for source in self.sources)


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that no version names and that stay for now."""

    reason: str
    packs: int
    nbytes: int
    until: float | None = None
    """When the last of them can go; None: that depends on something else than time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in this order: `drops` need no space, `rewrites` a little."""

    manifests: tuple[Digest, ...]
    drops: tuple[StoredPack, ...]
    """Packs to delete: nothing in them is needed."""
    rewrites: tuple[Rewrite, ...]
    kept: tuple[Kept, ...]
    needs: Mapping[str, Need]
    """Packs that this store needs, as they lie before the plan is carried out."""
    unknown: tuple[str, ...] = ()
    """Why nothing at all may be deleted."""


def plan(inventory: Inventory, now: float, grace: float = GRACE) -> Plan:
    """Needed is what a version names, what was promised in the last hour, what a version named that was deleted within
    the grace period, and all of a pack that is younger than that. A pack of which nothing is needed is deleted; one that would shrink to
    less than half is rewritten; tiny ones, where there are many, are merged. Other stores' claims hold all three back.
    """
    holds = _Holds(inventory, now, grace)
    needs = {pack.name: need for pack in inventory.packs if (need := need_of(holds.needed(pack)))}
    if inventory.unreadable:
        return Plan((), (), (), (), needs, inventory.unreadable)
    sources = [Source(pack, *holds.divided(pack)) for pack in inventory.packs]
    unneeded = [source.pack for source in sources if not source.keep and not holds.is_young(source.pack)]
    mixed = [source for source in sources if source.keep and (source.dead or inventory.only is None)]
    rewrites = tuple(_rewrites(mixed, inventory.claims))
    return Plan(
        manifests=tuple(digest for digest, since in inventory.forgotten.items() if since + grace <= now),
        drops=tuple(pack for pack in unneeded if pack.name not in inventory.claims),
        rewrites=rewrites,
        kept=_explained(sources, unneeded, rewrites, holds, inventory.claims),
        needs=needs,
    )


def placed(blobs: Iterable[Located]) -> list[Located]:
    """Where blobs lie in a new pack: in this order, neighbours still neighbours, aligned as they were.

    >>> placed([Located(Digest("a"), 64, 10), Located(Digest("b"), 74, 5), Located(Digest("c"), 1000, 5)])
    [Located(digest='a', offset=64, nbytes=10), Located(digest='b', offset=74, nbytes=5), Located(digest='c', offset=104, nbytes=5)]
    """
    lines, end = [], len(MAGIC)
    for blob in blobs:
        offset = place(end, blob.offset)
        lines.append(Located(blob.digest, offset, blob.nbytes))
        end = offset + blob.nbytes
    return lines


def need_of(blobs: Sequence[Located]) -> Need | None:
    """What to claim of a pack of which these are needed; None: nothing."""
    if not blobs:
        return None
    digests = sorted(blob.digest for blob in blobs)
    return Need(sum(blob.nbytes for blob in blobs), blake3("".join(digests).encode()).hexdigest()[:32])


class _Holds:
    """What keeps a blob, and until when."""

    def __init__(self, inventory: Inventory, now: float, grace: float) -> None:
        self._now, self._grace = now, grace
        self._named = frozenset(inventory.named)
        self._only = None if inventory.only is None else frozenset(inventory.only)
        self._promised = {digest: since + PROMISE for digest, since in inventory.promised.items()}
        self._lingering = {digest: since + grace for digest, since in inventory.lingering.items()}

    def until(self, digest: Digest) -> float:
        if digest in self._named or (self._only is not None and digest not in self._only):
            return math.inf
        return max(self._promised.get(digest, -math.inf), self._lingering.get(digest, -math.inf))

    def is_young(self, pack: StoredPack) -> bool:
        return pack.written + self._grace > self._now

    def needed(self, pack: StoredPack) -> list[Located]:
        """By someone: the pack's youth does not count."""
        return [blob for blob in pack.blobs if self.until(blob.digest) > self._now]

    def divided(self, pack: StoredPack) -> tuple[tuple[Located, ...], tuple[Digest, ...]]:
        keep = pack.blobs if self.is_young(pack) else tuple(self.needed(pack))
        kept = {blob.digest for blob in keep}
        return keep, tuple(blob.digest for blob in pack.blobs if blob.digest not in kept)

    def reason(self, blob: Digest, pack: StoredPack) -> tuple[str, float] | None:
        """Why a blob of `keep` stays although no version names it, and until when; None: one does."""
        until = self.until(blob)
        if until == math.inf:
            return None
        if self.is_young(pack) and pack.written + self._grace > until:
            return _YOUNG, pack.written + self._grace
        return (_PROMISED if self._promised.get(blob) == until else _LINGERING), until


_YOUNG = "stored a short time ago, and not named by a version yet"
_PROMISED = "promised to a publish that goes on"
_LINGERING = "named by versions that were deleted a short time ago"
_SCATTERED = "garbage in packs of which half or more is needed"


def _explained(
    sources: Iterable[Source],
    unneeded: Iterable[StoredPack],
    rewrites: Iterable[Rewrite],
    holds: _Holds,
    claims: Mapping[str, tuple[Claim, ...]],
) -> tuple[Kept, ...]:
    tally, moved = _Tally(), {source.pack.name for rewrite in rewrites for source in rewrite.sources}
    for pack in unneeded:
        if pack.name in claims:
            tally.add(_for_others(claims[pack.name]), pack.name, pack.nbytes)
    for source in sources:
        for blob in source.keep:
            if reason := holds.reason(blob.digest, source.pack):
                tally.add(reason[0], source.pack.name, blob.nbytes, reason[1])
        if source.keep and source.dead and source.pack.name not in moved:
            nbytes = sum(blob.nbytes for blob in source.pack.blobs) - sum(blob.nbytes for blob in source.keep)
            others = claims.get(source.pack.name)
            tally.add(_for_others(others) if others else _SCATTERED, source.pack.name, nbytes)
    return tally.lines()


class _Tally:
    """Adds up what is kept, by reason."""

    def __init__(self) -> None:
        self._nbytes: dict[str, int] = defaultdict(int)
        self._packs: dict[str, set[str]] = defaultdict(set)
        self._until: dict[str, float] = {}

    def add(self, reason: str, pack: str, nbytes: int, until: float | None = None) -> None:
        self._nbytes[reason] += nbytes
        self._packs[reason].add(pack)
        if until is not None:
            self._until[reason] = max(until, self._until.get(reason, until))

    def lines(self) -> tuple[Kept, ...]:
        return tuple(Kept(reason, len(self._packs[reason]), nbytes, self._until.get(reason)) for reason, nbytes in self._nbytes.items())


def _for_others(claims: Iterable[Claim]) -> str:
    return "needed by " + ", ".join(sorted({claim.store for claim in claims}))


def _rewrites(sources: Iterable[Source], claims: Mapping[str, tuple[Claim, ...]]) -> Iterator[Rewrite]:
    tiny = []
    for source in sources:
        others = claims.get(source.pack.name, ())
        if _shrinks(source, others):
            yield _rewrite([source], "less than half of it is needed")
        elif source.pack.nbytes < TINY and all(claim.need == need_of(source.keep) for claim in others):
            tiny.append(source)
    if len(tiny) >= MERGE:
        yield from (_rewrite(batch, f"{len(batch)} packs of less than {TINY >> 20} MiB become one") for batch in _batches(tiny))


def _rewrite(sources: Sequence[Source], reason: str) -> Rewrite:
    index = placed(blob for source in sources for blob in source.keep)
    end = index[-1].offset + index[-1].nbytes
    name, tail = index_bytes(index, end)
    return Rewrite(tuple(sources), name, tuple(index), end + len(tail), reason)


def _shrinks(source: Source, others: Iterable[Claim]) -> bool:
    """Whether the disk wins once every store that needs some of the pack has moved to a copy of that.

    The same set of blobs makes the same pack, whoever writes it: it counts once.
    """
    own, needs = need_of(source.keep), {claim.need for claim in others}
    if own is None or any(not need.live for need in needs):
        return False
    elsewhere = sum(need.nbytes for need in needs if need != own)
    most = source.pack.nbytes // _FRACTION
    return own.nbytes + elsewhere < most and _rewrite([source], "").nbytes + elsewhere < most


def _batches(sources: Iterable[Source]) -> Iterator[list[Source]]:
    """Of two or more. By name: stores that share a folder and need the same make the same packs."""
    batch: list[Source] = []
    nbytes = 0
    for source in sorted(sources, key=lambda source: source.pack.name):
        batch.append(source)
        nbytes += sum(blob.nbytes for blob in source.keep)
        if nbytes >= _MERGED_NBYTES and len(batch) > 1:
            yield batch
            batch, nbytes = [], 0
    if len(batch) > 1:
        yield batch
