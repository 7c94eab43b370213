"""Pure: what happened in a lab, as people and programs are told of it, in order."""

from __future__ import annotations

import enum

import msgspec

__all__ = ["Kind", "LabEvent"]


class Kind(enum.StrEnum):
    """What can happen. There may be more kinds one day: pass over what you do not know."""

    PUBLISHED = "version-published"
    """A version is in the catalog: `model`, `version`."""
    DELETED = "version-deleted"
    """It is there no more: `model`, `version`."""
    ALIAS = "alias-moved"
    """`alias` of `model` means `version` from now on, or nothing, where that is None."""
    LOADING = "version-loading"
    """A worker was asked to load it: `model`, `version`."""
    LOADED = "version-loaded"
    """It answers: `model`, `version`; `seconds`: what that took, fetching and a first run included."""
    FAILED = "version-failed"
    """It can't be loaded: `model`, `version`, `reason`."""
    UNLOADED = "version-unloaded"
    """No worker has it any more; it is loaded again for the next request: `model`, `version`."""
    ISOLATED = "version-isolated"
    """It runs in a process of its own, since it may be what ended workers: `model`, `version`."""
    ROLLOUT_BEGUN = "rollout-begun"
    """A version is to take the place of what the name means, step by step: `model`, `version`."""
    ROLLOUT_PROMOTED = "rollout-promoted"
    """It did: `model`, `version`."""
    ROLLOUT_REVERTED = "rollout-reverted"
    """It did worse, and the name means what it meant: `model`, `version`, `reason`."""
    ROLLOUT_ABORTED = "rollout-aborted"
    """Somebody ended it: `model`, `version`, `reason`."""
    CONDEMNED = "input-condemned"
    """An input ended the process of its model twice and is not run for an hour: `model`, `version`, `reason`: the input's mark."""
    LABELLED = "answers-labelled"
    """Labels came for answers of `model`, `version`: `right` and `wrong` so many since the gateway told it last."""
    WORKER_JOINED = "worker-joined"
    """`worker` runs."""
    WORKER_LOST = "worker-lost"
    """`worker` ended, or can't be reached."""
    WORKER_EJECTED = "worker-ejected"
    """The gateway that tells it sends `worker` no requests for `model`, `version` for a while; `reason`: errors, slow, silent."""
    WORKER_BACK = "worker-back"
    """It gets them again: `worker`, `model`, `version`."""
    PEER_ADMITTED = "peer-admitted"
    """Another lab may do something here that it might not before: `peer`."""
    PEER_CONNECTED = "peer-connected"
    """`peer` has a connection with this lab."""
    PEER_GONE = "peer-gone"
    """`peer` has none any more."""
    MISSED = "missed"
    """What happened before this can't be told any more, or by who told the last one: look at the lab itself."""


class LabEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened."""

    seq: int
    """Grows from one to the next, past restarts of the gateway that tells them, and not by one. Never 0."""
    at: float
    """Unix seconds."""
    kind: str
    """A `Kind`."""
    model: str | None = None
    """Its name as in a URL."""
    version: int | None = None
    alias: str | None = None
    worker: str | None = None
    peer: str | None = None
    """Public key of a lab, hex."""
    reason: str | None = None
    seconds: float | None = None
    right: int | None = None
    wrong: int | None = None

    def __str__(self) -> str:
        """The same in each run of a notebook: how long something took is not in it."""
        what = f"{self.worker} {self.model}" if self.worker and self.model else self.model or self.worker or self.peer or ""
        if self.alias is not None:
            what += f"@{self.alias}" + ("" if self.version is None else f" is {self.version}")
        elif self.version is not None:
            what += f":{self.version}"
        more = self.reason if self.right is None else f"{self.right} right, {self.wrong} wrong"
        return " ".join(part for part in (self.kind, what) if part) + (f" ({more})" if more else "")
