"""Holepunch's own packages for the tests that speak with them: brought by npm once, beside the programs that use them."""

import fcntl
import os
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent / "node"


def node_folder() -> Path:
    """The folder of programs for Node, with all packages of its `package-lock.json` installed; waits for another process that installs."""
    wanted, done = FOLDER / "package-lock.json", FOLDER / "node_modules" / ".tether"
    descriptor = os.open(FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not done.exists() or done.read_bytes() != wanted.read_bytes():
            subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=FOLDER, check=True, capture_output=True)
            done.write_bytes(wanted.read_bytes())
    finally:
        os.close(descriptor)
    return FOLDER
