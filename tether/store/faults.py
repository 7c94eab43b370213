"""Named points at which a test may kill the process, to prove that a crash anywhere leaves the store whole."""

from __future__ import annotations

import os
import signal
from collections import Counter

__all__ = ["GC_POINTS", "POINTS", "ROTATION_POINTS", "reach"]

POINTS = (
    "format.write",
    "format.fsync",
    "format.rename",
    "format.folder",
    "stage",
    "stage.journal",
    "blob",
    "pack.index",
    "pack.fsync",
    "pack.rename",
    "pack.folder",
    "manifest.write",
    "manifest.fsync",
    "manifest.rename",
    "manifest.folder",
    "catalog.begin",
    "catalog.prepared",
    "catalog.commit",
    "clean",
    "checkout",
    "checkout.rename",
)
"""In the order in which a first publish and a checkout pass them. `format.…` only where the store is made. `stage` and `blob` lie in
the middle of writing a blob (`stage`: or small ones that lie side by side; `blob`: of copying one that lies in a pending pack with much
else), `clean` behind the removal of each pending pack, `checkout` behind each file; the others behind what they name."""
ROTATION_POINTS = ("keys.begin", "keys.batch", "keys.rewrapped", "keys.scrubbed", "keys.retired")
"""What a rotation of the cluster key passes besides the catalog's: `keys.batch` in each transaction, the others behind what they name."""
GC_POINTS = ("gc.mark", "gc.aside", "gc.commit", "gc.delete", "gc.blob", "gc.copied", "gc.manifest")
"""What a garbage collection passes besides the catalog's: `gc.blob` in the middle of copying each blob, `gc.aside` behind taking each
pack away, `gc.commit` behind the transaction and that, the others behind what they name."""
_seen: Counter[str] = Counter()


def reach(point: str) -> None:
    """Do nothing, unless TETHER_CRASH_AT is `point`, or `point#N` and this is the N-th time: then die by SIGKILL, as a crash would."""
    wanted = os.environ.get("TETHER_CRASH_AT")
    if wanted is None:
        return
    name, _, count = wanted.partition("#")
    if name == point:
        _seen[point] += 1
        if _seen[point] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
