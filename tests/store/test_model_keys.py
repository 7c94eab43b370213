import itertools
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from store_models import COLLEAGUE, LAB, seeded

from tether.errors import (
    BadEnvelopeError,
    BadKeyError,
    ClusterKeyMissingError,
    ConflictError,
    LockedModelError,
    StoreError,
)
from tether.security.envelopes import seal_to
from tether.security.identity import Identity
from tether.security.keyring import Keyring
from tether.store.encryption.model_keys import ModelKeys, SealIndex
from tether.store.faults import ROTATION_POINTS
from tether.store.format.encrypted import ModelContext, ModelKey, Opener, Sealer
from tether.store.format.manifest import digest_of
from tether.store.index.catalog import Catalog
from tether.store.index.key_tables import KeyRow

SCRIPT = Path(__file__).with_name("rotating.py")
DIGITS = ModelContext(LAB.public, "digits")
LETTERS = ModelContext(LAB.public, "letters")
PEER = Identity(bytes(range(2, 34)))


class Lab:
    """The part of a data folder that has to do with keys."""

    def __init__(self, root):
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.ticks = itertools.count(1000)
        self.keyring = Keyring.open(root / "keys")
        self.catalog = Catalog(root / "catalog.sqlite", read_only=False)
        self.keys = ModelKeys(self.catalog, self.keyring, clock=lambda: float(next(self.ticks)))

    def rows(self):
        with self.catalog.reading() as db:
            return [KeyRow(*row) for row in db.execute("SELECT * FROM model_keys ORDER BY created").fetchall()]

    def stored(self):
        """All bytes of the data folder but the cluster keys."""
        return b"".join(path.read_bytes() for path in self.root.glob("catalog.sqlite*"))


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "lab")
    yield lab
    lab.catalog.close()


@pytest.fixture
def other(tmp_path):
    lab = Lab(tmp_path / "other")
    yield lab
    lab.catalog.close()


# --- making and finding


def test_a_model_gets_a_key_when_it_first_needs_one_and_keeps_it(lab):
    key = lab.keys.current(DIGITS)

    assert lab.keys.current(DIGITS) == key == lab.keys.get(key.id)
    assert lab.keys.current(LETTERS) != key
    assert lab.keys.current(ModelContext(COLLEAGUE.public, "digits")) != key


def test_threads_that_need_the_first_key_together_get_one(lab):
    with ThreadPoolExecutor(8) as pool:
        found = {key.id for key in pool.map(lambda _: lab.keys.current(DIGITS), range(32))}

    assert len(found) == 1


def test_a_key_is_found_again_after_a_restart_and_stored_only_wrapped(lab, tmp_path):
    key = lab.keys.current(DIGITS)
    lab.catalog.close()

    again = Lab(tmp_path / "lab")

    assert again.keys.get(key.id) == key
    assert key.secret not in again.stored()
    assert key.secret.hex().encode() not in again.stored()
    again.catalog.close()


def test_a_reader_of_the_same_folder_opens_keys(lab):
    key = lab.keys.current(DIGITS)
    reader = Catalog(lab.root / "catalog.sqlite", read_only=True)

    assert ModelKeys(reader, Keyring.open(lab.root / "keys")).get(key.id) == key
    reader.close()


def test_a_lab_without_the_key_is_told_whom_to_ask_for_what(lab):
    with pytest.raises(LockedModelError, match="tether allow") as caught:
        lab.keys.get("ab" * 16)
    assert caught.value.args[1] == "ab" * 16


def test_without_the_cluster_key_the_error_says_which_file_to_restore(lab, tmp_path):
    key = lab.keys.current(DIGITS)
    lab.catalog.close()
    (path,) = (lab.root / "keys").glob("cluster-*.key")
    path.unlink()

    again = Lab(tmp_path / "lab")

    with pytest.raises(ClusterKeyMissingError, match=path.name):
        again.keys.get(key.id)
    again.catalog.close()


def test_a_row_that_was_altered_or_moved_to_another_model_does_not_open(lab):
    one, two = lab.keys.current(DIGITS), lab.keys.current(LETTERS)
    wrapped = lab.rows()[0].wrapped
    changes = [
        ("UPDATE model_keys SET name = 'elsewhere' WHERE id = ?", (one.id,)),
        ("UPDATE model_keys SET wrapped = ? WHERE id = ?", (wrapped[:-1] + bytes([wrapped[-1] ^ 1]), one.id)),
        ("UPDATE model_keys SET wrapped = (SELECT wrapped FROM model_keys WHERE id = ?2) WHERE id = ?1", (one.id, two.id)),
        ("UPDATE model_keys SET wrapped = x'00' WHERE id = ?", (one.id,)),
    ]
    for statement, arguments in changes:
        with lab.catalog.writing() as db:
            db.execute(statement, arguments)
        with pytest.raises(StoreError, match="restore the catalog"):
            lab.keys.get(one.id)
    assert lab.keys.get(two.id) == two


def test_a_rotated_model_has_a_new_key_for_later_versions_and_the_old_one_for_earlier(lab):
    before = lab.keys.current(DIGITS)

    after = lab.keys.rotate_model(DIGITS)

    assert before != after == lab.keys.current(DIGITS)
    assert lab.keys.get(before.id) == before
    assert [(row.id, row.retired is None) for row in lab.rows()] == [(before.id, False), (after.id, True)]


# --- sharing


def test_a_peer_opens_what_it_was_granted_and_nothing_else(lab, other):
    old, letters = lab.keys.current(DIGITS), lab.keys.current(LETTERS)
    new = lab.keys.rotate_model(DIGITS)
    seal, ciphertext = Sealer(new, DIGITS).seal(b"weights")

    envelope = lab.keys.grant(DIGITS, PEER.public)
    accepted = other.keys.accept(envelope, PEER)

    assert (accepted.context, set(accepted.keys)) == (DIGITS, {old.id, new.id})
    assert Opener(other.keys.get(new.id), DIGITS).open(seal, ciphertext) == b"weights"
    assert other.keys.get(old.id) == old
    with pytest.raises(LockedModelError):
        other.keys.get(letters.id)
    assert lab.keys.peers(DIGITS) == [PEER.public]
    assert other.keys.accept(envelope, PEER).keys == ()
    assert old.secret not in envelope


def test_a_key_that_came_from_a_peer_opens_and_never_encrypts(lab, other):
    given = lab.keys.current(DIGITS)
    other.keys.accept(lab.keys.grant(DIGITS, PEER.public), PEER)

    assert other.keys.current(DIGITS) != given


def test_keys_for_ones_own_model_are_not_taken_from_others(lab, other):
    """Else who sends them could read what is published later."""
    mine = ModelContext(PEER.public, "mine")
    lab.keys.current(mine)

    with pytest.raises(ConflictError, match="refused"):
        other.keys.accept(lab.keys.grant(mine, PEER.public), PEER)
    assert other.rows() == []


def test_an_envelope_for_another_lab_or_altered_is_refused(lab, other):
    lab.keys.current(DIGITS)
    envelope = lab.keys.grant(DIGITS, PEER.public)

    with pytest.raises(BadEnvelopeError, match="not for this lab"):
        other.keys.accept(envelope, COLLEAGUE)
    with pytest.raises(BadEnvelopeError):
        other.keys.accept(envelope[:-1] + bytes([envelope[-1] ^ 1]), PEER)
    assert other.rows() == []


def inside(**changes):
    fields = {"publisher": LAB.public, "name": "digits", "keys": [bytes(32)]} | changes
    return b"tether model keys v1\0" + msgspec.json.encode(fields)


@pytest.mark.parametrize(
    "message",
    [
        b"", b"{}", b"tether model keys v1\0", inside()[1:], inside(keys=[]), inside(keys=[bytes(31)]), inside(keys=[bytes(32)] * 1025),
        inside(name="../x"), inside(name="stats"), inside(publisher="me"), inside(extra=1), inside(keys=7),
    ],
)  # fmt: skip
def test_an_envelope_that_holds_something_else_than_keys_is_refused(lab, message):
    with pytest.raises(BadEnvelopeError, match="ask its sender"):
        lab.keys.accept(seal_to(PEER.public, message), PEER)
    assert lab.rows() == []


def test_what_there_is_no_key_of_and_who_has_no_key_can_not_be_granted(lab):
    with pytest.raises(LockedModelError, match="--encrypt"):
        lab.keys.grant(DIGITS, PEER.public)
    lab.keys.current(DIGITS)
    with pytest.raises(BadKeyError):
        lab.keys.grant(DIGITS, "me")
    assert lab.keys.peers(DIGITS) == []


def test_revoking_gives_later_versions_new_keys_and_says_what_it_can_not_do(lab, other):
    digits, letters = lab.keys.current(DIGITS), lab.keys.current(LETTERS)
    for context in (DIGITS, LETTERS):
        lab.keys.grant(context, PEER.public)
        lab.keys.grant(context, COLLEAGUE.public)
    other.keys.accept(lab.keys.grant(DIGITS, PEER.public), PEER)

    one = lab.keys.revoke(PEER.public, DIGITS)

    assert one.models == (DIGITS,)
    assert "can't be recalled" in str(one)
    assert lab.keys.current(DIGITS) != digits
    assert lab.keys.current(LETTERS) == letters
    assert (lab.keys.peers(DIGITS), lab.keys.peers(LETTERS)) == ([COLLEAGUE.public], sorted([COLLEAGUE.public, PEER.public]))
    with pytest.raises(LockedModelError):
        other.keys.get(lab.keys.current(DIGITS).id)
    assert other.keys.get(digits.id) == digits, "what was given can't be taken back"

    assert lab.keys.revoke(PEER.public).models == (LETTERS,)
    assert lab.keys.current(LETTERS) != letters
    assert lab.keys.revoke(PEER.public).models == ()


# --- what was sealed


def test_what_was_sealed_is_found_by_the_digest_of_the_plaintext_which_is_not_stored(lab):
    key = lab.keys.current(DIGITS)
    contents = [seeded(index).randbytes(1000) for index in range(3)]
    seals = {digest_of(data): Sealer(key, DIGITS).seal(data).seal for data in contents}
    index = SealIndex(lab.catalog, key)

    index.add(seals)
    index.add(seals)

    assert index.find([*seals, digest_of(b"else"), "not a digest"]) == seals
    assert SealIndex(lab.catalog, lab.keys.current(LETTERS)).find(seals) == {}
    assert not any(bytes.fromhex(digest) in lab.stored() or digest.encode() in lab.stored() for digest in seals)


# --- rotation of the cluster key


def test_a_rotation_wraps_every_key_anew_and_leaves_the_old_one_useless(lab):
    contexts = [ModelContext(LAB.public, f"model-{index}") for index in range(250)]
    keys = {context: lab.keys.current(context) for context in contexts}
    before, wrapped = lab.keyring.current, [row.wrapped for row in lab.rows()]
    backup = (lab.root / "keys" / f"cluster-{before}.key").read_bytes()

    rotation = lab.keys.rotate_cluster()

    assert (rotation.rewrapped, rotation.resumed, rotation.cluster_key) == (250, False, lab.keyring.current)
    assert {row.cluster_key for row in lab.rows()} == {lab.keyring.current} != {before}
    assert all(lab.keys.get(key.id) == key for key in keys.values())
    assert all(lab.keys.current(context) == key for context, key in keys.items())
    assert [path.name for path in (lab.root / "keys").glob("cluster-*.key*")] == [f"cluster-{lab.keyring.current}.key"]
    assert backup.split()[1] not in b"".join(path.read_bytes() for path in (lab.root / "keys").iterdir())
    stored = lab.stored()
    assert not any(old in stored for old in wrapped), "who stole the old key finds something in the catalog that it opens"
    assert not any(old[28:] in stored for old in wrapped)


def test_no_page_of_the_catalog_keeps_an_old_key_where_rows_were_moved(tmp_path):
    """SQLite leaves a row behind in one of about ten such rotations if the file is not written anew."""
    for run in range(25):
        lab = Lab(tmp_path / f"lab-{run}")
        for index in range(250):
            lab.keys.current(ModelContext(LAB.public, f"model-{index}"))
        wrapped = [row.wrapped for row in lab.rows()]
        lab.keys.rotate_cluster()
        stored = lab.stored()
        assert not any(old[28:] in stored for old in wrapped)
        lab.catalog.close()


def test_a_key_that_is_made_while_the_cluster_key_rotates_is_not_lost(lab):
    stop, made = threading.Event(), []

    def make():
        for index in itertools.count():
            made.append(lab.keys.current(ModelContext(LAB.public, f"model-{index}")))
            if stop.is_set():
                return

    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(make)
        for _ in range(5):
            lab.keys.rotate_cluster()
        stop.set()
        making.result(30)

    assert {row.cluster_key for row in lab.rows()} == {lab.keyring.current}
    assert all(lab.keys.get(key.id) == key for key in made)
    assert len(list((lab.root / "keys").glob("cluster-*.key"))) == 1


def test_a_process_that_reads_through_rotations_never_fails(lab):
    key = lab.keys.current(DIGITS)
    catalog = Catalog(lab.root / "catalog.sqlite", read_only=True)
    reader = ModelKeys(catalog, Keyring.open(lab.root / "keys"))
    stop = threading.Event()

    def read():
        count = 0
        while not stop.is_set():
            assert reader.get(key.id) == key
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for _ in range(10):
            lab.keys.rotate_cluster()
        stop.set()

        assert reading.result(30) > 0
    catalog.close()


def test_a_rotation_that_can_not_wipe_the_log_keeps_the_old_key_and_ends_later(lab):
    key, before = lab.keys.current(DIGITS), lab.keyring.current
    lab.catalog._db.execute("PRAGMA busy_timeout = 100")
    catalog = Catalog(lab.root / "catalog.sqlite", read_only=True)

    with catalog.reading() as db:
        db.execute("SELECT * FROM model_keys").fetchall()
        with pytest.raises(ConflictError, match="try again"):
            lab.keys.rotate_cluster()
        assert lab.keyring.outdated == (before,)
    catalog.close()

    assert lab.keys.rotate_cluster().resumed
    assert lab.keyring.outdated == ()
    assert lab.keys.get(key.id) == key


class Manager:
    """The script, which starts once and forks for each job."""

    def __init__(self, root):
        self.root = root
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, SCRIPT], **pipes)

    def ask(self, job, *arguments):
        self.process.stdin.write(json.dumps([job, str(self.root), *arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=30)


def kills(chance, batches, seconds):
    """Each named point, then points and moments at random, without end."""
    repeated = [*(f"catalog.{step}" for step in ("begin", "prepared", "commit")), "keys.batch"]
    points = [*ROTATION_POINTS, *(f"{point}#{batches}" for point in repeated)]
    yield from chance.sample(points, len(points))
    while True:
        yield f"{chance.choice(repeated)}#{chance.randint(1, batches)}"
        yield chance.choice(ROTATION_POINTS)
        yield f"after {chance.uniform(0.0005, seconds):.5f}"
        yield f"after {chance.uniform(0.0005, seconds):.5f}"


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_row_22_a_rotation_killed_anywhere_goes_on_where_it_was_and_loses_no_key(tmp_path, chaos):
    models, count, begun = chaos.count(1000, 150), chaos.count(100, 16), time.monotonic()
    with Manager(tmp_path / "store") as manager:
        assert manager.ask("make", models) == [0, None]
        secrets = manager.ask("inspect")[1]["secrets"]
        status, (_, rewrapped, resumed, seconds) = manager.ask("rotate")
        assert (status, rewrapped, resumed) == (0, models, False)
        assert seconds <= 5 * models / 1000 + 1

        died, points = 0, kills(seeded(chaos.seed), models // 100 + 1, seconds)
        while died < count:
            died += _kill_and_rotate(manager, next(points), models, secrets)

    chaos.record(22, f"{died} kills, {models} models rotated in {seconds:.2f} s, 0 lost", time.monotonic() - begun)


def _kill_and_rotate(manager, point, models, secrets):
    """Whether the rotation died; then it is brought to its end, after which only the new key is there and wraps all."""
    before = manager.ask("inspect")[1]["current"]
    killed, _ = manager.ask("crash", point)
    assert killed in ({0, -14} if point.startswith("after") else {-9}), point

    status, found = manager.ask("inspect")
    assert (status, found["models"], found["secrets"]) == (0, models, secrets), point
    assert set(found["wrapped_by"]) <= {found["current"], *found["outdated"]}, point
    assert found["heads"] == found["wrapped_by"], point

    if found["outdated"]:
        status, (cluster_key, _, resumed, _) = manager.ask("rotate")
        assert (status, resumed, cluster_key) == (0, True, found["current"]), point
    _, ended = manager.ask("inspect")
    assert (ended["secrets"], ended["outdated"], ended["wrapped_by"]) == (secrets, [], [ended["current"]]), point
    assert ended["files"] == [f"cluster-{ended['current']}.key", "cluster.lock"], point
    if ended["current"] == before:
        assert killed == -14, f"{point}: only a moment may come before the new key is made"
    else:
        assert bytes.fromhex(before) not in b"".join(path.read_bytes() for path in manager.root.glob("catalog.sqlite*")), point
    return killed != 0


def test_secrets_are_not_printed(lab):
    key = lab.keys.current(DIGITS)

    shown = f"{key!r} {lab.keys!r} {lab.rows()!r}"

    assert key.secret.hex() not in shown
    assert repr(key.secret)[2:-1] not in shown
    assert isinstance(key, ModelKey)
    assert os.environ.get("TETHER_CRASH_AT") is None
