"""Fails single system calls of a process that uses a store. A script: `python injecting.py FOLDER SEED CASES publish|read`.

`strace` first lists the calls with which a publish (or a reader) touches the store, then fails one of them in each case: the n-th `write`
with ENOSPC, the n-th `fsync` with EIO, and so on. Behind each case the store is looked at by another process, which then publishes again.
Everything runs in forks of this process, which has no threads and no connections.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from crashing import in_fork
from store_models import LAB, files_in, files_of, publish, seeded

from tether.errors import NoSpaceError, StoreError, TetherError
from tether.store import Repository
from tether.types import ModelRef

FAILURES = {
    "write": ("ENOSPC", "EIO"),
    "pwrite64": ("ENOSPC", "EIO"),
    "pwritev": ("ENOSPC", "EIO"),
    "copy_file_range": ("ENOSPC", "EIO"),
    "sendfile": ("ENOSPC", "EIO"),
    "ftruncate": ("ENOSPC", "EIO"),
    "fallocate": ("ENOSPC", "EIO"),
    "fsync": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "openat": ("EIO", "ENOSPC", "EMFILE", "EROFS"),
    "mkdir": ("ENOSPC", "EIO"),
    "unlink": ("EIO", "EROFS"),
    "fchmod": ("EIO",),
    "flock": ("EIO",),
    "pread64": ("EIO",),
    "read": ("EIO",),
}
"""System calls and what is made of them."""
TOLD = {0: "done", 10: "no_space", 11: "store_failed", 12: "another error of the tree", 13: "a foreign error"}
CASE_NBYTES = 30_000
DIGITS = ModelRef("digits")
CALL = re.compile(r"^(\d+)\s+(\w+)\((.*)$", re.MULTILINE)


def publish_second(root: Path) -> None:
    with Repository.open(root, own=LAB.public) as repository:
        publish(repository, 2, files=files_of(2, CASE_NBYTES))


def read_first(root: Path) -> None:
    """Fresh, from the packs and from the cache."""
    with Repository.open(root, read_only=True) as repository:
        digest = repository.resolve(DIGITS).digest
        for _ in range(2):
            folder = repository.checkout(digest)
            try:
                if files_in(folder) != files_of(1, CASE_NBYTES):
                    os._exit(14)
            except OSError:
                continue  # our own reading met the fault
        for array in repository.manifest(digest).arrays:
            if repository.read_array(array, 0, array.nbytes) != files_of(1, CASE_NBYTES)[array.path.removeprefix("files/")]:
                os._exit(14)


JOBS: dict[str, Callable[[Path], None]] = {"publish": publish_second, "read": read_first}


def outcome(job: Callable[[Path], None], root: Path) -> int:
    """How a job ended, as an exit status; what no test expects is printed."""
    try:
        job(root)
    except NoSpaceError as error:
        return 10 if "free some" in str(error) else 12
    except StoreError as error:
        return 11 if len(str(error)) > 40 else 12
    except TetherError as error:
        sys.stderr.write(f"{error!r}\n")
        return 12
    except Exception as error:  # to be told of
        sys.stderr.write(f"{error!r}\n")
        return 13
    return 0


def traced(job: Callable[[Path], None], root: Path, *options: str) -> tuple[int, str]:
    """Exit status of the job in a fork under strace, and what it printed."""
    listening, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(said, 2)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(outcome(job, root))
    os.close(said)
    os.waitpid(child, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(child), *options], stderr=subprocess.PIPE, text=True)
    while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text(encoding="ascii"):
        if tracer.poll() is not None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise SystemExit(f"strace: {tracer.communicate()[1]}")
    os.kill(child, signal.SIGCONT)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.communicate()
    with os.fdopen(listening) as pipe:
        return status, pipe.read()


def calls(job: Callable[[Path], None], root: Path, log: Path) -> list[tuple[str, int]]:
    """Which calls touch the store: name and number among its like in its thread, as strace counts."""
    status, said = traced(job, root, "-y", "-e", f"trace={','.join(FAILURES)}", "-o", str(log))
    if status != 0:
        raise SystemExit(f"the job fails by itself: {status} {said}")
    seen: dict[tuple[str, str], int] = defaultdict(int)
    found = set()
    for thread, name, arguments in CALL.findall(log.read_text(encoding="utf-8", errors="replace")):
        seen[thread, name] += 1
        if str(root) in arguments:
            found.add((name, seen[thread, name]))
    return sorted(found)


def problem_behind(root: Path, status: int) -> str:
    """What is wrong with the store that a case left; "" if nothing is."""
    with Repository.open(root, own=LAB.public) as repository:
        versions = repository.models()[0].versions
        if (status == 0 and len(versions) != 2) or not 1 <= len(versions) <= 2:
            return f"{len(versions)} versions"
        if status == 10 and len(versions) == 2:
            return "no_space says that nothing was changed, but the version is there"
        for seed, record in enumerate(versions, start=1):
            if files_in(repository.checkout(record.digest)) != files_of(seed, CASE_NBYTES):
                return f"version {seed} is not what was published"
        publish(repository, 2, files=files_of(2, CASE_NBYTES))
        fresh = repository.resolve(DIGITS)
        if fresh.version != 2 or files_in(repository.checkout(fresh.digest)) != files_of(2, CASE_NBYTES):
            return "publishing it again gives something else"
        return str(repository.verify().problems or "")


def inject(folder: Path, seed: int, count: int, name: str) -> dict[str, object]:
    """Run that many of the cases, drawn by the seed; all where there are fewer."""
    job, whole, root = JOBS[name], folder / "whole", folder / "store"
    prepared = in_fork(lambda: publish_to(whole))
    if prepared[0] != 0:
        raise SystemExit(prepared[1])
    restore(whole, root)
    listed = calls(job, root, folder / "log")
    cases = [(call, number, error) for call, number in listed for error in FAILURES[call]]
    seeded(seed).shuffle(cases)
    told, flaws = Counter(), []
    for call, number, error in cases[:count]:
        restore(whole, root)
        status, said = traced(job, root, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}", "-o", os.devnull)
        told[TOLD.get(status, str(status))] += 1
        flaw = said if status not in {0, 10, 11} else ""
        ended, found = in_fork(partial(problem_behind, root, status if name == "publish" else 11))
        flaw += str(found) if ended or found else ""
        if flaw:
            flaws.append(f"{error} at {call} {number}: {flaw}")
    return {"possible": len(cases), "calls": sorted({call for call, _ in listed}), "told": told, "flaws": flaws}


def publish_to(root: Path) -> None:
    with Repository.open(root, own=LAB.public) as repository:
        publish(repository, 1, files=files_of(1, CASE_NBYTES))


def restore(whole: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(inject(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
