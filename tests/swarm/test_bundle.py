"""The bundle of JavaScript: made once, whole, without Node at run time, and carried by the wheel."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tether.testing.requirements import needs

ROOT = Path(__file__).parents[2]
JS = Path("tether") / "swarm" / "js"


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path, hook) -> Path:
    """A copy of what the bundle is made of, and of the bundle."""
    assert hook.is_current(ROOT), "the bundle is missing or old: python hatch_build.py"
    shutil.copytree(ROOT / JS, tmp_path / JS)
    return tmp_path


class App:
    """What hatchling shows warnings with."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def display_warning(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def run_hook(hook, monkeypatch):
    """Runs the build hook on a checkout; the warnings it showed."""
    monkeypatch.delenv(hook.REQUIRE, raising=False)

    def run(checkout: Path) -> list[str]:
        app = App()
        made = hook.BundleHook(str(checkout), {}, None, None, str(checkout), "wheel", app)
        made.initialize("standard", {})
        return app.warnings

    return run


@pytest.fixture
def no_npm(tmp_path, monkeypatch) -> None:
    """Nothing but npm that fails, as without a network."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("npm", "node"):
        (folder / name).write_text("#!/bin/sh\necho getaddrinfo ENOTFOUND >&2\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_a_change_of_any_source_makes_the_bundle_old_and_a_readme_does_not(checkout, hook):
    assert hook.is_current(checkout)
    (checkout / JS / "README.md").write_text("other words")
    assert hook.is_current(checkout)
    for name in ("entry.js", "package.json", "package-lock.json"):
        path = checkout / JS / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert not hook.is_current(checkout)
        path.write_bytes(before)
    assert hook.is_current(checkout)


@needs("hatchling")
@pytest.mark.usefixtures("no_npm")
def test_a_bundle_that_is_current_is_left_alone_and_needs_no_npm(checkout, run_hook, hook):
    before = (checkout / JS / "bundle.js").stat()
    assert run_hook(checkout) == []
    assert (checkout / JS / "bundle.js").stat().st_mtime_ns == before.st_mtime_ns
    assert hook.BundleHook(str(checkout), {}, None, None, "", "wheel", App()).dependencies() == []


@needs("hatchling")
def test_without_npm_the_build_brings_node_from_pypi(checkout, hook, monkeypatch):
    (checkout / JS / "bundle.js").unlink()
    monkeypatch.setenv("PATH", str(checkout))
    assert hook.BundleHook(str(checkout), {}, None, None, "", "wheel", App()).dependencies() == [hook.NODE]


@needs("hatchling")
@pytest.mark.usefixtures("no_npm")
def test_where_npm_is_out_of_reach_tether_is_built_without_the_swarm_and_says_so(checkout, run_hook):
    (checkout / JS / "bundle.js").unlink()
    why, what = run_hook(checkout)
    assert "without its swarm" in why
    assert "ENOTFOUND" in why
    assert "hatch_build.py" in what
    assert not (checkout / JS / "bundle.js").exists()


@needs("hatchling")
@pytest.mark.usefixtures("no_npm")
def test_where_everything_is_required_a_bundle_that_cannot_be_built_fails_the_build(checkout, run_hook, hook, monkeypatch):
    (checkout / JS / "bundle.js").unlink()
    monkeypatch.setenv(hook.REQUIRE, "all")
    with pytest.raises(RuntimeError, match="ENOTFOUND"):
        run_hook(checkout)


@pytest.mark.swarm
@pytest.mark.slow
@needs("npm")
def test_the_bundle_is_the_same_each_time_it_is_made(checkout, hook):
    bundle = checkout / JS / "bundle.js"
    before = bundle.read_bytes()
    bundle.unlink()
    hook.build(checkout)
    assert bundle.read_bytes() == before
    assert {path.name for path in (checkout / JS).iterdir()} == {path.name for path in (ROOT / JS).iterdir()} - {"node_modules"}


def test_a_source_that_changes_while_it_is_bundled_makes_the_bundle_old(checkout, hook, monkeypatch):
    def npm_or_esbuild(_command, work):
        (work / "meta.json").write_text('{"inputs": {}}')
        (work / "bundled.js").write_text("made of what was there before")
        (checkout / JS / "entry.js").write_text("// saved meanwhile")

    monkeypatch.setattr(hook, "_run", npm_or_esbuild)
    hook.build(checkout)
    assert not hook.is_current(checkout)


def test_the_bundle_asks_for_nothing_of_node_and_has_no_promise_but_ours(checkout):
    text = (checkout / JS / "bundle.js").read_text()
    assert "Dynamic require of" not in text
    assert "async function" not in text
    assert "prebuilds" not in text


def test_the_licences_of_what_is_bundled_are_kept(checkout):
    licences = (checkout / JS / "bundle.licences.txt").read_text()
    for name in ("hyperdht", "dht-rpc", "noise-handshake", "streamx"):
        assert f"== {name} " in licences
    assert "MIT License" in licences


@needs("hatchling")
def test_a_wheel_built_from_the_repository_carries_the_bundle(tmp_path):
    # As pip builds it, in the environment that is there.
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env=os.environ,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("tether/swarm/js/bundle.js") == (ROOT / JS / "bundle.js").read_bytes()
    assert "tether/swarm/js/bundle.licences.txt" in names
    assert [name for name in names if "node_modules" in name] == []


def test_importing_tether_or_its_swarm_starts_no_javascript():
    asked = "import sys, tether.manager, tether.gateway, tether.lab, tether.swarm.engine.engine; print('pythonmonkey' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
