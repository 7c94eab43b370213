"""A manager that dies while it rotates the cluster key. A script: a line of JSON on stdin is a job, done in a fork; one line answers."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from crashing import in_fork
from store_models import LAB

from tether.security.keyring import Keyring
from tether.store.encryption.model_keys import ModelKeys
from tether.store.format.encrypted import ModelContext
from tether.store.index.catalog import Catalog


def opened(root: Path) -> tuple[Catalog, Keyring, ModelKeys]:
    root.mkdir(exist_ok=True)
    catalog, keyring = Catalog(root / "catalog.sqlite", read_only=False), Keyring.open(root / "keys")
    return catalog, keyring, ModelKeys(catalog, keyring)


def make(root: Path, models: int) -> None:
    catalog, _, keys = opened(root)
    with catalog.writing() as db:  # one transaction for all: making them is not what is tested
        for index in range(models):
            keys._added(ModelContext(LAB.public, f"model-{index}"), db)
    catalog.close()


def rotate(root: Path) -> list[object]:
    catalog, _, keys = opened(root)
    begun = time.monotonic()
    rotation = keys.rotate_cluster()
    seconds = time.monotonic() - begun
    catalog.close()
    return [rotation.cluster_key, rotation.rewrapped, rotation.resumed, seconds]


def crash(root: Path, point: str) -> list[object]:
    """`point`: of the crash points, or `after SECONDS`: then an alarm that nothing handles ends the process."""
    word, _, seconds = point.partition(" ")
    if word != "after":
        os.environ["TETHER_CRASH_AT"] = point
        return rotate(root)
    catalog, _, keys = opened(root)
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    rotation = keys.rotate_cluster()
    signal.setitimer(signal.ITIMER_REAL, 0)
    catalog.close()
    return [rotation.cluster_key, rotation.rewrapped]


def inspect(root: Path) -> dict[str, object]:
    """What a fresh opening finds: a digest of all secrets, by what they are wrapped, which keys there are, what lies in the folder."""
    catalog, keyring, keys = opened(root)
    with catalog.reading() as db:
        rows = db.execute("SELECT id, cluster_key, wrapped FROM model_keys ORDER BY id").fetchall()
    secrets = hashlib.sha256(b"".join(keys.get(key).secret for key, _, _ in rows)).hexdigest()
    found = {
        "models": len(rows),
        "secrets": secrets,
        "wrapped_by": sorted({by for _, by, _ in rows}),
        "heads": sorted({wrapped[:16].hex() for _, _, wrapped in rows}),
        "current": keyring.current,
        "outdated": keyring.outdated,
        "files": sorted(path.name for path in (root / "keys").iterdir()),
    }
    catalog.close()
    return found


def serve() -> None:
    jobs = {"make": make, "rotate": rotate, "crash": crash, "inspect": inspect}
    for line in sys.stdin:
        name, root, *arguments = json.loads(line)
        sys.stdout.write(json.dumps(in_fork(jobs[name], Path(root), *arguments)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
