"""What did not run is told once at the end of a run, and fails it where everything is required."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TWO_TESTS = """
import pytest

@pytest.mark.skipif(True, reason="needs a unicorn: apt install unicorn")
def test_that_needs_a_unicorn():
    pass

def test_that_runs():
    pass
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs those two tests under our conftest; gives exit status and output."""
    monkeypatch.delenv("TETHER_REQUIRE", raising=False)
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_two.py").write_text(TWO_TESTS)

    def run(tests=TWO_TESTS):
        (tmp_path / "test_two.py").write_text(tests)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(CONFTEST.parent)},
        )
        return done.returncode, done.stdout

    return run


def test_a_missing_tool_is_named_at_the_end_with_how_to_install_it(run):
    status, output = run()
    assert status == 0
    assert "needs a unicorn: apt install unicorn: 1 tests" in output


def test_a_missing_tool_fails_the_run_that_requires_all(run, monkeypatch):
    monkeypatch.setenv("TETHER_REQUIRE", "all")
    status, output = run()
    assert status == 1
    assert "an error, since TETHER_REQUIRE=all" in output


def test_a_run_that_missed_nothing_lists_nothing(run, monkeypatch):
    monkeypatch.setenv("TETHER_REQUIRE", "all")
    status, output = run("def test_that_runs(): pass")
    assert (status, "did not run" in output) == (0, False)


def test_a_skip_for_another_reason_is_not_a_missing_tool(run, monkeypatch):
    monkeypatch.setenv("TETHER_REQUIRE", "all")
    status, output = run(TWO_TESTS.replace("needs a unicorn: apt install unicorn", "unicorns have no fins"))
    assert (status, "did not run" in output) == (0, False)
