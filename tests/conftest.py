"""For every test: hypothesis' profile, and at the end of the run one list of what was missing on this machine."""

import dataclasses
import datetime as dt
import inspect
import itertools
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import hypothesis
import leaks
import pytest

REQUIRE = "TETHER_REQUIRE"
"""`all`: what a test needs and does not find fails the run instead of skipping the test; .ci/run sets it."""

os.environ["TETHER_BOOTSTRAP"] = "127.0.0.1:9"  # no test speaks with Hyperswarm's public nodes; those that need a DHT make one

# The same examples on every run and no deadline: a test fails for what the code does, not for the luck of the draw or a busy machine.
hypothesis.settings.register_profile("here", derandomize=True, deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("here"), max_examples=30)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


CHAOS_RESULTS = Path(__file__).parent / "chaos" / "RESULTS.md"


@dataclasses.dataclass(frozen=True)
class Chaos:
    """How large a row of faults is run: `make chaos` sets seed and scale, `make test` runs the same code small."""

    seed: int
    scale: float

    def count(self, full: int, small: int) -> int:
        """How many of something: `full` at scale 1, never under `small`, which is what `make test` runs."""
        return max(small, round(full * self.scale))

    def record(self, row: int, counts: str, seconds: float) -> None:
        """Append what was seen to the project's record; a small run leaves none."""
        if not self.scale:
            return
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        with CHAOS_RESULTS.open("a", encoding="utf-8") as file:
            today = dt.datetime.now(tz=dt.UTC).date()
            file.write(f"| {today} | {commit} | {row} | {self.seed} | {self.scale:g} | {counts} | {seconds:.0f} |\n")


@pytest.fixture(scope="session")
def chaos() -> Chaos:
    return Chaos(int(os.environ.get("TETHER_CHAOS_SEED") or 20_260_801), float(os.environ.get("TETHER_CHAOS_SCALE") or 0))


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """What a test measured and does not judge: printed once more, with all the others, at the end of the run."""
    return lambda text: request.node.user_properties.append(("measured", text))


class Measurements:
    """Collects them; with several pytest processes they travel in the reports."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.texts += [str(text) for name, text in report.user_properties if name == "measured"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.texts:
            terminalreporter.section("measured")
            for text in self.texts:
                terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def nothing_is_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """Looks after all other fixtures of the test, and the loop of the async ones, were closed, and it let go of what it held."""
    before = leaks.Held.now()
    yield
    if request.node.get_closest_marker("leaks"):
        return
    request.node.funcargs.clear()
    if request.instance is not None:
        vars(request.instance).clear()
    if lost := before.lost_since(alone=not _shares(request)):
        pytest.fail(f"left open: {', '.join(lost)}", pytrace=False)


def _shares(request: pytest.FixtureRequest) -> bool:
    """Whether it uses fixtures of ours that others use as well: those open and close what they like, when they like."""
    found = request.node._fixtureinfo.name2fixturedefs.values()
    return any(each.scope != "function" and each.baseid.startswith("tests/") for each in itertools.chain.from_iterable(found))


@pytest.fixture
async def no_task_is_left() -> AsyncIterator[None]:
    yield
    if left := await leaks.unfinished():
        pytest.fail(f"nobody ended: {', '.join(left)}", pytrace=False)


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
        names = item.fixturenames
        names.insert(names.index(nothing_is_left_open.__name__) + 1, no_task_is_left.__name__)


MISSING = ("needs ", "could not import ")
"""How the reasons of `tether.testing.requirements.needs` and of `pytest.importorskip` begin."""


class Missing:
    """Collects what tests needed and did not find; all of it is told once, before pytest's closing line."""

    def __init__(self, *, required: bool) -> None:
        self.required = required
        self.tests_by_reason: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._add(report)

    def _add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if reason.startswith(MISSING):
            self.tests_by_reason.setdefault(reason, []).append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.required and self.tests_by_reason and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.tests_by_reason:
            return
        verdict = f"an error, since {REQUIRE}=all" if self.required else f"{REQUIRE}=all makes it an error"
        terminalreporter.section(f"did not run ({verdict})", red=self.required, yellow=not self.required)
        for reason, tests in sorted(self.tests_by_reason.items()):
            terminalreporter.write_line(f"{reason}: {len(tests)} tests, {tests[0]}{' …' if tests[1:] else ''}")


def pytest_configure(config: pytest.Config) -> None:
    leaks.begin()
    config.pluginmanager.register(Measurements(), "tether-measurements")
    config.pluginmanager.register(Missing(required=os.environ.get(REQUIRE) == "all"), "tether-missing")
