"""Garbage goes, nothing else does: in order, with others in between, after a crash, on a full disk."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from collecting import (
    DAY,
    HOUR,
    Clock,
    Collectors,
    content,
    damage,
    files_of_version,
    indexed,
    nbytes_in,
    opened,
    packs_in,
    publish_files,
    publish_manifest,
)
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from store_models import LAB, manifest_of, seeded

from tether.errors import ConflictError, MissingBlobsError
from tether.ports import SignedManifest
from tether.store import Repository, decode, digest_of, signed_message, verification
from tether.store.collecting.collection import MERGE
from tether.store.faults import GC_POINTS
from tether.testing.requirements import needs
from tether.types import ModelRef

HERE = Path(__file__).parent
SHARED, OLD, NEW = content("shared"), content("old", 20_000), content("new")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    with opened(tmp_path / "store", clock) as repository:
        yield repository


def stored(repository, *blobs):
    return [repository.is_stored(digest_of(data)) for data in blobs]


def two_versions(store, clock):
    """The first is deleted two days after they were published; most of its pack is garbage then."""
    first = publish_files(store, {"a": SHARED, "b": OLD})
    publish_files(store, {"a": SHARED, "b": NEW})
    clock.advance(2 * DAY)
    store.delete_version("digits", 1)
    return first.digest


# --- what goes and what stays


def test_a_deleted_version_goes_after_the_grace_period_and_what_others_share_stays(store, clock):
    manifest = two_versions(store, clock)

    early = store.gc()
    assert stored(store, SHARED, OLD, NEW) == [True, True, True]
    assert (early.freed_nbytes, early.later_nbytes) == (0, len(OLD))

    clock.advance(DAY)
    before = nbytes_in(store.root)
    late = store.gc()
    assert stored(store, SHARED, OLD, NEW) == [True, False, True]
    assert late.freed_nbytes == before - nbytes_in(store.root) > 19_000
    assert (late.manifests, (store.root / "manifests" / manifest).exists()) == (1, False)
    assert files_of_version(store, "digits", 2) == {"a": SHARED, "b": NEW}
    assert store.verify().problems == ()
    assert store.gc().freed_nbytes == 0


def test_what_is_dropped_goes_at_once_and_nothing_else(store, clock):
    gone, kept = content("gone", 20_000), content("kept")
    first = publish_files(store, {"a": SHARED, "b": OLD, "c": kept}).digest
    publish_files(store, {"a": SHARED, "b": NEW})
    publish_files(store, {"a": gone}, name="other")
    publish_files(store, {"a": kept, "b": gone}, name="third")
    clock.advance(2 * HOUR)  # what was promised is taken back, and all is young
    for name in ("digits", "other", "third"):
        store.delete_version(name, 1)

    report = store.collect_dropped([first])

    assert stored(store, SHARED, OLD, NEW, gone, kept) == [True, False, True, True, True]
    assert (report.manifests, (store.root / "manifests" / first).exists()) == (1, False)
    assert files_of_version(store, "digits", 2) == {"a": SHARED, "b": NEW}
    assert store.verify().problems == ()
    second = publish_files(store, {"a": SHARED, "b": NEW}).digest
    assert store.collect_dropped([second, first]).freed_nbytes == 0, "it is a version"
    assert stored(store, SHARED, NEW) == [True, True]


def test_a_dry_run_says_what_and_why_and_changes_nothing(store, clock):
    two_versions(store, clock)
    publish_files(store, {"c": content("gone")}, name="other")
    store.delete_version("other", 1)
    assert store.gc(dry_run=True).lines() == [
        "kept 25.0 kB in 2 packs: named by versions that were deleted a short time ago; until "
        + time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(clock.now + DAY)),
        "would free 0 bytes now, 25.0 kB later",
    ]

    clock.advance(DAY)
    before, changes = packs_in(store.root), store.change_count()
    would = store.gc(dry_run=True)
    assert (packs_in(store.root), store.change_count()) == (before, changes)

    lines, mostly = would.lines(), max(before, key=before.get)
    assert any(line.startswith("would delete pack ") and line.endswith(" kB: nothing in it is named by a version") for line in lines)
    assert f"would rewrite pack {mostly[:12]}, 25.3 kB to 5.2 kB: less than half of it is needed" in lines
    assert lines[-1].startswith("would free 25.3 kB now")
    did = store.gc()
    assert (did.freed_nbytes, did.manifests) == (would.freed_nbytes, would.manifests)
    assert [line.replace("would delete", "deleted").replace("would rewrite", "rewrote") for line in lines[:-1]] == did.lines()[:-1]


def test_publishing_a_deleted_version_again_within_the_grace_period_needs_nothing_sent(store, clock):
    data = manifest_of(store, {"a": SHARED, "b": OLD})
    publish_manifest(store, data)
    clock.advance(2 * DAY)
    store.delete_version("digits", 1)
    clock.advance(DAY - 1)
    store.gc()

    assert store.missing(decode(data).blobs()) == []
    assert publish_manifest(store, data).version == 2

    clock.advance(2 * DAY)
    assert store.gc().freed_nbytes == 0
    assert files_of_version(store, "digits", 2) == {"a": SHARED, "b": OLD}


def test_a_version_that_no_alias_points_at_is_still_a_version(store, clock):
    for number in range(3):
        publish_files(store, {"a": content(number)}, alias=["prod"])
    clock.advance(3 * DAY)

    store.gc()
    store.rollback("digits", "prod")

    assert files_of_version(store, "digits", 2) == {"a": content(1)}
    assert files_of_version(store, "digits", 1) == {"a": content(0)}


def test_thousands_of_small_publishes_do_not_leave_thousands_of_packs(store, clock):
    for number in range(MERGE + 8):
        publish_files(store, {"a": content(number, 3_000)})
    clock.advance(2 * DAY)

    report = store.gc()

    assert len(packs_in(store.root)) == 1
    assert len(report.rewritten[0].packs) == MERGE + 8
    assert all(files_of_version(store, "digits", number + 1) == {"a": content(number, 3_000)} for number in range(MERGE + 8))
    assert store.gc().rewritten == ()


def test_what_a_failed_publish_left_goes_too(store, clock, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store._catalog, "add_version", lambda *_: (_ for _ in ()).throw(OSError(5, "no")))
        with pytest.raises(OSError, match="no"):
            publish_files(store, {"a": OLD})
    root = store.root
    store.close()

    with opened(root, clock) as again:
        assert len(packs_in(root)) == 1
        again.gc()
        assert len(packs_in(root)) == 1
        clock.advance(DAY)
        again.gc()
        assert packs_in(root) == {}
        assert not any((root / "manifests").iterdir())


def test_a_pack_that_waits_for_its_publish_to_be_tried_again_is_not_collected(store, clock, monkeypatch):
    data = manifest_of(store, {"a": OLD})
    with monkeypatch.context() as patch:
        patch.setattr(store._catalog, "add_version", lambda *_: (_ for _ in ()).throw(OSError(5, "no")))
        with pytest.raises(OSError, match="no"):
            publish_manifest(store, data)
    clock.advance(2 * DAY)
    store.gc()
    clock.advance(2 * DAY)
    store.gc()

    assert publish_manifest(store, data).created
    assert files_of_version(store, "digits", 1) == {"a": OLD}


def test_nothing_is_deleted_while_a_version_s_manifest_can_not_be_read(store, clock):
    two_versions(store, clock)
    clock.advance(2 * DAY)
    path = store.root / "manifests" / store.resolve(ModelRef("digits", version=2)).digest
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])

    report = store.gc()
    assert report.freed_nbytes == 0
    assert "it is not known what digits:2 is made of" in report.lines()[0]

    path.write_bytes(whole)
    assert store.gc().freed_nbytes > 0


def test_what_is_damaged_is_left_where_it_is_and_the_rest_moves(store, clock):
    publish_files(store, {"a": SHARED, "b": NEW})
    publish_files(store, {"a": SHARED, "b": NEW, "c": OLD}, name="large")
    store.delete_version("large", 1)
    whole = content("whole", 3_000)
    publish_files(store, {"a": whole, "b": content("bad", 3_000), "c": content("dead", 20_000)}, name="hurt")
    publish_files(store, {"a": whole, "b": content("bad", 3_000)}, name="kept")
    store.delete_version("hurt", 1)
    clock.advance(2 * DAY)
    bad = damage(store.root, content("bad", 3_000))

    report = store.gc()

    assert [problem.digest for problem in report.problems] == [bad]
    assert any(line.startswith("damaged, left where it is") for line in report.lines())
    assert stored(store, content("dead", 20_000), OLD) == [False, False]
    assert store.read_blob(digest_of(whole)) == whole
    assert {problem.digest for problem in store.verify().problems} == {bad}
    assert len(packs_in(store.root)) == 3, "the damaged blob keeps its pack"

    publish_files(store, {"a": whole, "b": content("bad", 3_000)}, name="kept")
    store.gc(grace=0)
    assert store.verify().problems == ()
    assert len(packs_in(store.root)) == 3


# --- others in between


def collectable(store, clock):
    """A store of whose first version nothing is needed any more, and that version's manifest."""
    data = manifest_of(store, {"b": OLD})
    publish_manifest(store, data)
    publish_files(store, {"a": SHARED}, name="other")
    store.delete_version("digits", 1)
    clock.advance(2 * DAY)
    return data


def test_a_publish_between_marking_and_sweeping_keeps_what_it_names(store, clock):
    data = collectable(store, clock)
    marked = store._collector.mark(0)
    assert marked.plan.drops

    publish_manifest(store, data)
    clock.advance(2 * HOUR)  # it is not for a promise that it stays
    store._collector.sweep(marked)

    assert files_of_version(store, "digits", 2) == {"b": OLD}
    clock.advance(2 * DAY)
    assert store.gc().freed_nbytes == 0


def test_a_version_that_came_and_went_between_marking_and_sweeping_has_its_grace_period(store, clock):
    data = collectable(store, clock)
    marked = store._collector.mark(DAY)
    publish_manifest(store, data)
    store.delete_version("digits", 2)
    clock.advance(2 * HOUR)

    store._collector.sweep(marked)

    assert store.missing(decode(data).blobs()) == []
    assert publish_manifest(store, data).version == 3


@pytest.mark.parametrize("ask", ["missing", "put_blob", "add_bytes", "plan"])
def test_what_a_publisher_was_told_is_here_stays_for_an_hour(store, clock, ask):
    data = collectable(store, clock)
    marked = store._collector.mark(0)

    match ask:
        case "missing":
            assert store.missing([digest_of(OLD)]) == []
        case "put_blob":
            store.put_blob(digest_of(OLD), OLD)
        case "add_bytes":
            store.add_bytes("b", OLD)
        case "plan":
            store.plan(decode(data).arrays)
    store._collector.sweep(marked)
    clock.advance(HOUR - 1)
    store.gc(grace=0)

    assert publish_manifest(store, data).version == 2
    assert files_of_version(store, "digits", 2) == {"b": OLD}


@pytest.mark.parametrize("marked_before", [True, False])
def test_what_a_follower_holds_counts_as_forgotten_from_then_on(store, clock, marked_before):
    """Its manifest was a version's that was deleted days ago, and becomes one's again a moment later."""
    first = publish_files(store, {"a": SHARED, "b": OLD})
    publish_files(store, {"a": SHARED, "b": NEW})
    data = store.manifest_bytes(first.digest)
    store.delete_version("digits", 1)
    clock.advance(3 * DAY)

    marked = store._collector.mark(DAY) if marked_before else None
    store.hold([SignedManifest(data, LAB.public, LAB.sign(signed_message(data)))])
    if marked is None:
        store.gc()
    else:
        store._collector.sweep(marked)

    assert (store.root / "manifests" / first.digest).exists()
    assert stored(store, SHARED, OLD, NEW) == [True, True, True]


def test_a_promise_that_was_forgotten_is_a_clear_error_and_not_a_version_with_a_hole(store, clock):
    data = collectable(store, clock)
    assert store.missing([digest_of(OLD)]) == []
    clock.advance(HOUR)
    store.gc(grace=0)

    with pytest.raises(MissingBlobsError) as told:
        publish_manifest(store, data)

    assert told.value.args[1] == [digest_of(OLD)]
    store.put_blob(digest_of(OLD), OLD)
    assert publish_manifest(store, data).version == 2


def test_a_pack_that_somebody_deleted_makes_no_version_with_a_hole(store):
    manifest = manifest_of(store, {"b": OLD})
    publish_manifest(store, manifest)
    for path in (store.root / "packs").glob("*.pack"):
        path.unlink()

    with pytest.raises(MissingBlobsError):
        publish_manifest(store, manifest, "other")


def test_a_publish_that_wants_the_garbage_of_a_pack_that_is_being_rewritten_stops_that(store, clock):
    manifest = manifest_of(store, {"a": SHARED, "b": OLD})
    two_versions(store, clock)
    clock.advance(2 * DAY)
    marked = store._collector.mark(0)
    assert marked.plan.rewrites
    publish_manifest(store, manifest)
    clock.advance(2 * HOUR)

    before = packs_in(store.root)
    report = store._collector.sweep(marked)

    assert report.rewritten == ()
    assert packs_in(store.root) == before, "the copy was taken back"
    assert files_of_version(store, "digits", 3) == {"a": SHARED, "b": OLD}
    assert files_of_version(store, "digits", 2) == {"a": SHARED, "b": NEW}


def test_an_index_that_is_rebuilt_between_marking_and_sweeping_loses_nothing(store, clock):
    two_versions(store, clock)
    clock.advance(2 * DAY)
    marked = store._collector.mark(0)
    store.rebuild_index()

    store._collector.sweep(marked)
    store.rebuild_index()

    assert files_of_version(store, "digits", 2) == {"a": SHARED, "b": NEW}
    assert store.verify().problems == ()
    store.gc(grace=0)
    assert stored(store, OLD) == [False]


def test_two_collections_do_not_run_at_once(store, clock):
    two_versions(store, clock)
    clock.advance(2 * DAY)
    marking, go_on = threading.Event(), threading.Event()
    real = store._collector._marker.mark

    def slow(*arguments, **options):
        marking.set()
        go_on.wait(10)
        return real(*arguments, **options)

    store._collector._marker.mark = slow
    first = threading.Thread(target=store.gc)
    first.start()
    assert marking.wait(10)
    with pytest.raises(ConflictError, match="already runs"):
        store.gc()
    go_on.set()
    first.join(10)

    assert stored(store, OLD) == [False]


def test_readers_that_were_there_before_go_on_whatever_moves(store, clock):
    two_versions(store, clock)
    clock.advance(2 * DAY)
    digest = store.resolve(ModelRef("digits")).digest
    with Repository.open(store.root, read_only=True) as reader:
        manifest = reader.manifest(digest)
        mapped = reader.load_file(manifest, "a")

        store.gc()

        assert bytes(mapped) == SHARED
        assert bytes(reader.load_file(manifest, "a")) == SHARED
        assert [reader.read_array(array, 0, array.nbytes) for array in manifest.files()] == [SHARED, NEW]
        assert (reader.checkout(digest) / "b").read_bytes() == NEW
        assert reader.verify().problems == ()


class Busy(threading.Thread):
    """Keeps what its work raised."""

    def __init__(self, work):
        super().__init__(daemon=True)
        self.work = work
        self.error = None

    def run(self):
        try:
            self.work()
        except BaseException as error:
            self.error = error


def publish_patiently(store, files, name):
    for _ in range(20):
        try:
            return publish_files(store, files, name=name).version
        except MissingBlobsError:
            continue
    raise AssertionError("collected again and again")


def test_publishing_reading_and_collecting_at_once_lose_nothing(store, clock):
    """Real threads, no grace period and a fast clock: all that is not needed is garbage at once, and no promise lasts."""
    stop = threading.Event()

    def publish_and_delete():
        for number in range(25):
            name = f"model{number % 3}"
            files = {"a": SHARED, "b": content(number % 5, 20_000), "c": content(number, 2_000)}
            version = publish_patiently(store, files, name)
            assert files_of_version(store, name, version) == files
            if number % 2:
                store.delete_version(name, version)

    def collect():
        while not stop.is_set():
            store.gc(grace=0)
            clock.advance(HOUR / 10)

    publisher, collector = Busy(publish_and_delete), Busy(collect)
    publisher.start()
    collector.start()
    publisher.join(60)
    stop.set()
    collector.join(60)

    assert (publisher.error, collector.error) == (None, None)
    assert store.verify().problems == ()


# --- crashes


@pytest.fixture(scope="module")
def collectors():
    with Collectors() as process:
        yield process


@pytest.mark.chaos
@pytest.mark.parametrize("point", [*GC_POINTS, "catalog.begin", "catalog.prepared", "catalog.commit"])
def test_killed_anywhere_the_store_is_whole_and_the_next_collection_finishes(tmp_path, clock, collectors, point):
    root = tmp_path / "store"
    with opened(root, clock) as store:
        two_versions(store, clock)
        publish_files(store, {"c": content("gone", 9_000)}, name="other")
        store.delete_version("other", 1)
    clock.advance(2 * DAY)

    assert collectors.crash(root, point, clock.now, 0.0)

    with opened(root, clock) as store:
        assert store.verify().problems == ()
        assert files_of_version(store, "digits", 2) == {"a": SHARED, "b": NEW}
        for _ in range(2):
            store.gc(grace=HOUR)
            clock.advance(HOUR)
        assert stored(store, SHARED, OLD, NEW, content("gone", 9_000)) == [True, False, True, False]
        assert nbytes_in(root) < 2 * (len(SHARED) + len(NEW))
        assert not list((root / "packs").glob("*.partial"))
        assert files_of_version(store, "digits", 2) == {"a": SHARED, "b": NEW}


# --- a full disk

FULL = """
import sys
from pathlib import Path
from collecting import *
root, clock = Path(sys.argv[1]) / "store", Clock()
live, mostly = content("live", 300_000), content("mostly", 900_000)
with opened(root, clock) as store:
    publish_files(store, {"a": live}, name="kept")
    publish_files(store, {"a": content("small", 30_000), "b": mostly}, name="half")
    publish_files(store, {"a": content("small", 30_000)}, name="small")
    for number in range(4):
        publish_files(store, {"a": content(number, 400_000)})
    clock.advance(2 * DAY)
    for number in range(4):
        store.delete_version("digits", number + 1)
    store.delete_version("half", 1)
    clock.advance(2 * DAY)
    if sys.argv[2] == "without a reserve":
        (root / "reserve").unlink()
    with (Path(sys.argv[1]) / "ballast").open("wb", buffering=0) as ballast:
        for size in (65536, 4096, 512, 1):
            try:
                while ballast.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
    assert files_of_version(store, "kept", 1) == {"a": live}
    if sys.argv[2] == "opened":
        store.close()
        store = opened(root, clock)
    before = nbytes_in(root)
    report = store.gc()
    assert report.freed_nbytes > 1_600_000, report
    assert before - nbytes_in(root) == report.freed_nbytes
    store.gc()
    assert nbytes_in(root) < 340_000, packs_in(root)
    assert files_of_version(store, "kept", 1) == {"a": live}
    assert files_of_version(store, "small", 1) == {"a": content("small", 30_000)}
    assert store.verify().problems == ()
    publish_files(store, {"a": content("next", 200_000)})
print("done")
"""


@pytest.mark.chaos
@needs("namespaces")
@pytest.mark.parametrize("start", ["running", "opened", "without a reserve"])
def test_row_18_garbage_collection_frees_a_disk_that_is_full_to_the_last_byte(tmp_path, start):
    mount = f'mount -t tmpfs -o size=5m none "{tmp_path}" && exec "$@"'
    own_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [*own_namespace, sys.executable, "-c", FULL, str(tmp_path), start],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_rewrite_that_does_not_fit_is_left_and_said_to(store, clock, monkeypatch):
    two_versions(store, clock)
    clock.advance(2 * DAY)
    with monkeypatch.context() as patch:
        patch.setattr("tether.store.collecting.collector.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        report = store.gc()

    assert report.freed_nbytes == 0
    assert any(
        (line.startswith("not rewritten for want of space: 1 pack") and "1000 bytes are free" in line) or "1.0 kB are free" in line
        for line in report.lines()
    )
    assert store.gc().freed_nbytes > 0


# --- anything in any order

NAMES, POOL = ("alpha", "beta"), 30


def blob_of(number):
    return content(f"pool {number}", 500 + 2_000 * (number % 5))


def pick(*values):
    return lambda chance: chance.choice(values)


def numbers_of(chance):
    return frozenset(chance.sample(range(POOL), chance.randint(1, 3)))


which, again, grace = (lambda chance: chance.randrange(100)), pick(0, 0, 1, 2, 3), pick(0.0, 0.0, HOUR, DAY)
between = pick("publish", "ask", "upload", "rebuild", "come and go")
point = pick(*GC_POINTS, "catalog.begin", "catalog.prepared", "catalog.commit")
ACTIONS = [
    (2, "upload", {"number": pick(*range(POOL))}),
    (8, "publish", {"numbers": numbers_of, "again": again, "name": pick(*NAMES), "prod": pick(True, False, False, False, False)}),
    (2, "ask", {"numbers": numbers_of, "again": again}),
    (2, "publish_what_was_promised", {"which": pick(0, 1, 2), "name": pick(*NAMES)}),
    (1, "alias", {"which": which}),
    (1, "roll_back", {"name": pick(*NAMES)}),
    (8, "delete", {"which": which, "later": pick(True, False)}),
    (2, "wait", {"hours": pick(0.3, 2, 13)}),
    (3, "collect", {"grace": grace}),
    (1, "mark", {"grace": grace}),
    (1, "sweep", {}),
    (5, "do_something_between_marking_and_sweeping", {"numbers": numbers_of, "again": again, "grace": grace, "do": between}),
    (1, "crash", {}),
    (2, "crash_in_a_collection", {"point": point, "times": pick(1, 2, 3), "grace": grace}),
    (1, "rebuild_the_index", {}),
    (2, "a_reader_of_another_process_sees_it", {"which": which}),
    (1, "garbage_is_gone_after_two_collections", {}),
]
WEIGHTS = [weight for weight, _, _ in ACTIONS]


class Store(RuleBasedStateMachine):
    """A store and what must be in it. `root` and `collectors` are set by the test."""

    root: Path
    collectors: Collectors
    runs = 0

    def __init__(self):
        super().__init__()
        type(self).runs += 1
        self.folder = self.root / f"store {self.runs}"
        self.clock = Clock()
        self.store = opened(self.folder, self.clock)
        self.reader = Repository.open(self.folder, read_only=True)
        self.left_open = []
        self.versions = {}
        """(name, version) → numbers of its blobs."""
        self.deleted = {}
        """Numbers of the blobs of a deleted version → when."""
        self.promised = {}
        """Numbers of blobs → when they were said to be here, by the process that runs now."""
        self.marked = None
        self.steps = 0

    def teardown(self):
        for repository in (self.store, self.reader, *self.left_open):
            repository.close()

    def files(self, numbers):
        return {str(number): blob_of(number) for number in numbers}

    # --- what publishers do

    def upload(self, number):
        self.store.put_blob(digest_of(blob_of(number)), blob_of(number))

    def chosen(self, numbers, again):
        """`again`: rather what a version named that was deleted, and what may be garbage by now."""
        return sorted(self.deleted, key=sorted)[again % len(self.deleted)] if self.deleted and again else numbers

    def publish(self, numbers, again, name, prod):
        numbers = self.chosen(numbers, again)
        known = {version for (model, version), of in self.versions.items() if model == name and of == numbers}
        published = publish_files(self.store, self.files(sorted(numbers)), name, alias=["prod"] if prod else [])
        assert published.created == (not known)
        self.versions[name, published.version] = numbers

    def ask(self, numbers, again):
        numbers = self.chosen(numbers, again)
        missing = set(self.store.missing([digest_of(blob_of(number)) for number in numbers]))
        self.promised |= {number: self.clock.now for number in numbers if digest_of(blob_of(number)) not in missing}

    def publish_what_was_promised(self, which, name):
        """Nothing is uploaded."""
        numbers = frozenset(sorted(self.promised)[which::3][:3])
        if not numbers:
            return
        sure = all(self.clock.now - self.promised[number] < HOUR for number in numbers)
        with opened(self.folder / "scratch", self.clock) as scratch:
            manifest = manifest_of(scratch, self.files(sorted(numbers)))
        try:
            published = publish_manifest(self.store, manifest, name)
        except MissingBlobsError:
            assert not sure, "a promise was broken"
            return
        self.versions[name, published.version] = numbers

    def picked(self, which):
        return sorted(self.versions)[which % len(self.versions)] if self.versions else None

    def alias(self, which):
        if picked := self.picked(which):
            self.store.set_alias(picked[0], "prod", picked[1])

    def roll_back(self, name):
        try:
            change = self.store.rollback(name)
        except (ConflictError, LookupError):
            return
        assert (name, change.after) in self.versions

    def delete(self, which, later):
        """`later`: when its packs are no longer young."""
        self.clock.advance(2 * DAY if later else 0)
        picked = self.picked(which)
        try:
            if picked:
                self.store.delete_version(*picked)
        except ConflictError:
            return
        if picked:
            self.deleted[self.versions.pop(picked)] = self.clock.now

    # --- time, collections, mishaps

    def wait(self, hours):
        self.clock.advance(hours * HOUR)

    def kept(self, grace):
        """Digests that are here and that a collection with this grace period must leave."""
        numbers = {number for of, since in self.deleted.items() if self.clock.now - since < grace for number in of}
        numbers |= {number for number, since in self.promised.items() if self.clock.now - since < HOUR}
        digests = [digest_of(blob_of(number)) for number in numbers]
        return [digest for digest in digests if self.store.is_stored(digest)]

    def collect(self, grace):
        kept = self.kept(grace)
        planned = self.store.gc(dry_run=True, grace=grace)
        report = self.store.gc(grace=grace)
        assert all(self.store.is_stored(digest) for digest in kept)
        assert report.problems == ()
        assert report.lines()
        assert planned.manifests <= report.manifests + len(self.deleted)

    def mark(self, grace):
        self.marked = self.store._collector.mark(grace)

    def do_something_between_marking_and_sweeping(self, numbers, again, grace, do):
        self.mark(grace)
        match do:
            case "publish":
                self.publish(numbers, again, "alpha", False)
            case "ask":
                self.ask(numbers, again)
            case "upload":
                self.upload(min(numbers))
            case "rebuild":
                self.rebuild_the_index()
            case "come and go":
                self.publish(numbers, again, "gamma", False)
                (version,) = [version for name, version in self.versions if name == "gamma"]
                self.store.delete_version("gamma", version)
                self.deleted[self.versions.pop(("gamma", version))] = self.clock.now
        self.every_version_is_whole()
        self.sweep()

    def sweep(self):
        if self.marked is None:
            return
        promised = self.kept(0.0)
        self.store._collector.sweep(self.marked)
        self.marked = None
        assert all(self.store.is_stored(digest) for digest in promised)

    def crash(self):
        """The lock goes with the process; nothing else of it ends in good order."""
        self.store._lock.release()
        self.left_open.append(self.store)
        self.reopen()

    def reopen(self):
        self.store, self.marked, self.promised = opened(self.folder, self.clock), None, {}

    def crash_in_a_collection(self, point, times, grace):
        self.store.close()
        self.collectors.crash(self.folder, f"{point}#{times}", self.clock.now, grace)
        self.reopen()

    def rebuild_the_index(self):
        self.store.rebuild_index()

    # --- what must hold

    @invariant()
    def every_version_is_whole(self):
        assert {(model.name, record.version) for model in self.store.models() for record in model.versions} == set(self.versions)
        for (name, version), numbers in self.versions.items():
            assert files_of_version(self.store, name, version) == self.files(numbers)

    def a_reader_of_another_process_sees_it(self, which):
        if picked := self.picked(which):
            assert files_of_version(self.reader, *picked) == self.files(self.versions[picked])

    def garbage_is_gone_after_two_collections(self):
        """Which are a grace period apart."""
        self.clock.advance(HOUR)
        for _ in range(2):
            self.store.gc(grace=HOUR)
            self.clock.advance(HOUR)
        self.store.gc(grace=HOUR)  # the deletions are so long ago now that this one only deletes what the one before copied from
        live = {digest_of(blob_of(number)) for numbers in self.versions.values() for number in numbers}
        self.deleted, self.marked = {}, None
        for lines in indexed(self.store).values():
            alive = sum(line.nbytes for line in lines if line.digest in live)
            assert alive
            assert 2 * (alive + 72 + 108 * len(lines)) >= sum(line.nbytes for line in lines)
        sizes = {digest: len(data) for data in map(blob_of, range(POOL)) for digest in [digest_of(data)]}
        packs = packs_in(self.folder)
        assert set(packs) == set(indexed(self.store))
        assert sum(packs.values()) <= 2 * sum(sizes[digest] + 180 for digest in live) + 72 * len(packs)
        assert {path.name for path in (self.folder / "manifests").iterdir()} == {
            record.digest for model in self.store.models() for record in model.versions
        }

    @rule(entropy=st.integers(0, 2**32))
    def act(self, entropy):
        """Anything. hypothesis alone would do the simplest again and again, and there would never be much garbage."""
        chance = seeded(f"{self.steps} {entropy}")
        self.steps += 1
        ((_, name, arguments),) = chance.choices(ACTIONS, WEIGHTS)
        chosen = {key: draw(chance) for key, draw in arguments.items()}
        note(f"{name}({chosen})")
        getattr(self, name)(**chosen)


STEPS = 50
"""Of one run: then it begins with a new store."""


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_row_19_whatever_happens_in_whatever_order_no_live_blob_is_lost_and_garbage_goes(tmp_path, chaos, collectors):
    count, begun = chaos.count(10_000, 200), time.monotonic()
    Store.root, Store.collectors, Store.runs = tmp_path, collectors, 0

    run_state_machine_as_test(
        seed(chaos.seed)(Store),
        settings=settings(
            max_examples=-(-count // STEPS),
            stateful_step_count=STEPS,
            derandomize=False,
            phases=[Phase.generate],  # what fails is told step by step, and shrinking chance takes minutes
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

    chaos.record(19, f"{count} steps in {Store.runs} stores, 0 live blobs lost, garbage gone in 2 cycles", time.monotonic() - begun)


@pytest.mark.parametrize("moment", ["scan", "look"])
def test_a_pack_that_is_collected_while_all_is_verified_is_no_damage(store, clock, monkeypatch, moment):
    publish_files(store, {"b": OLD})
    publish_files(store, {"a": SHARED})
    store.delete_version("digits", 1)
    clock.advance(2 * DAY)
    original, collected = getattr(verification, moment), []

    def late(first, *more):
        of_garbage = moment == "scan" or more[0].digest == digest_of(OLD)
        if of_garbage and not collected:
            collected.append(store.gc().freed_nbytes)
        return original(first, *more)

    monkeypatch.setattr(verification, moment, late)
    assert store.verify().problems == ()
    assert collected[0] > 0
