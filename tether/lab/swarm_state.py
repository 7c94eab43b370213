"""Whether a lab can be found by others, as it shows that."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["SwarmState"]


class SwarmState(msgspec.Struct, frozen=True, kw_only=True):
    """A lab on the swarm, or not."""

    state: Literal["on", "off", "failed", "unknown"] = "unknown"
    """off: there is no reason to be there, or it was started without; failed: it could not, and tries again; unknown: nobody says."""
    address: str | None = None
    """`tether://…`: how other labs find this one when it is there."""
    since: float | None = None
    """Unix time."""
    peers: int = 0
    """Labs and colleagues that are connected now."""
    reachable: Literal["ok", "note", "fail"] | None = None
    """note: not from everywhere; fail: by nobody; None: it is not there, or it is not known yet."""
    detail: str = ""
    """For people: from where it can be reached; or why it is not there, and what to do."""

    @property
    def summary(self) -> str:
        """For notebooks: nothing in it differs from one machine to another."""
        if self.state != "on":
            return f"{self.state}: {self.detail}" if self.state == "off" else self.state
        return {"ok": "on", "note": "on, not reachable from everywhere", "fail": "on, not reachable", None: "on"}[self.reachable]

    def __repr__(self) -> str:
        return f"<SwarmState {self.state}: {self.detail}>"
