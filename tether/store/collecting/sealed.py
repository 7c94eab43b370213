"""Forgets what was sealed once its blob is gone: a note that says "this was encrypted already" is of no use then.

The note of a blob that is staged, or that a publisher was told is here, stays: a publish in progress finds its blobs by these notes.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from sqlite3 import Connection

from tether.errors import NoSpaceError
from tether.store.collecting.collection import Plan
from tether.store.collecting.marking import Surroundings
from tether.store.index import key_tables
from tether.store.index.key_tables import SealRow
from tether.types import Digest

__all__ = ["count_stray_seals", "forget_stray_seals"]


def count_stray_seals(store: Surroundings, plan: Plan) -> int:
    """How many notes will be of no use once the plan is carried out."""
    if plan.unknown:
        return 0
    going = {blob.digest for pack in plan.drops for blob in pack.blobs}
    going |= {digest for rewrite in plan.rewrites for source in rewrite.sources for digest in source.dead}
    with store.promises.held() as promised, store.catalog.reading() as db:
        return len(_stray(db, store, promised, going))


def forget_stray_seals(store: Surroundings, plan: Plan) -> int:
    """Forget the notes that are of no use now; gives how many. On a full disk the next collection does it.

    Nothing is committed meanwhile, so that no blob is between staging and its pack. A blob that is staged meanwhile gets its note after
    this transaction: notes are written down behind their blobs.
    """
    if plan.unknown:
        return 0
    with store.publishing, store.promises.held() as promised:
        with store.catalog.reading() as db:
            if not _stray(db, store, promised):
                return 0  # nearly always; a transaction counts as a change of the catalog
        with suppress(NoSpaceError), store.catalog.writing() as db:
            stray = _stray(db, store, promised)
            key_tables.forget_seals(db, stray)
            return len(stray)
    return 0


def _stray(db: Connection, store: Surroundings, promised: Collection[Digest], going: Collection[Digest] = ()) -> list[SealRow]:
    rows = key_tables.stray_seals(db, going)
    return [row for row in rows if row.digest not in promised and store.staged(row.digest) is None]
