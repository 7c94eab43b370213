"""Who may do what: refused unless allowed, gone at once when taken away, remembered when the process is not."""

import sqlite3
import stat
import tempfile
import threading
import timeit
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tether.errors import (
    BadAddressError,
    BadKeyError,
    BadNameError,
    ConfigError,
    ForbiddenError,
    FormatTooNewError,
    NoSpaceError,
    NotFoundError,
    ScopeStillOpenError,
    StoreError,
    UnknownModelError,
)
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.addresses import Address
from tether.security.identity import Identity
from tether.security.scopes import METHODS, Scope, Scopes

ALICE, BOB, EVE = (Identity(bytes([number]) * 32).public for number in range(1, 4))


def scopes(*texts):
    return [Scope.parse(text) for text in texts]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "access.sqlite"


@pytest.fixture
def access(path):
    file = AccessFile.open(path)
    yield Access(file)
    file.close()


def reopened(access):
    access.file.close()
    return Access(AccessFile.open(access.file.path))


def test_a_key_that_nobody_allowed_reaches_enrol_and_nothing_else(access):
    assert access.may(EVE, "enrol")
    assert not any(access.may(EVE, method, model) for method in METHODS for model in (None, "digits"))
    assert not access.may("", "infer")
    assert not access.may("enrol", "ping")


def test_what_is_allowed_holds_at_once_and_after_a_restart(access):
    assert access.allow(ALICE, scopes("infer:digits*")).texts() == ["infer:digits*"]
    assert access.allow(str(Address(ALICE)), scopes("models"), "alice").texts() == ["infer:digits*", "models"]

    for each in (access, reopened(access)):
        assert each.may(ALICE, "infer", "digits2")
        assert not each.may(ALICE, "infer", "faces")
        assert not each.may(BOB, "infer", "digits2")
        assert each.scopes(ALICE).texts() == ["infer:digits*", "models"]
        assert [peer.label for peer in each.peers()] == ["alice"]


def test_the_unknown_and_the_forbidden_are_answered_alike(access):
    access.allow(ALICE, scopes("infer:digits*"))
    access.check(ALICE, "infer", "digits")

    def answer(*call):
        with pytest.raises((ForbiddenError, UnknownModelError)) as caught:
            access.check(*call)
        return type(caught.value), str(caught.value)

    assert answer(ALICE, "publish", "digits") == answer(ALICE, "no-such-method", "digits") == answer(EVE, "infer", "digits")
    assert answer(ALICE, "infer", "secret-model") == answer(ALICE, "infer", "never-published")


@pytest.mark.parametrize("key", ["", "ab" * 31, "00" * 32, "ec" + "ff" * 30 + "7f", ALICE[:-1] + "g", "tether://" + "y" * 56])
def test_what_is_no_key_is_allowed_nothing(access, key):
    with pytest.raises((BadKeyError, BadAddressError)):
        access.allow(key, scopes("infer"))
    assert access.peers() == []


def test_what_is_taken_away_is_told_before_the_call_returns(access):
    told = []
    stop = access.listen(lambda key: told.append((key, access.may(key, "infer", "digits"), access.may(key, "models"))))
    access.allow(ALICE, scopes("infer", "models"))
    assert told == []

    access.disallow(ALICE, scopes("infer"))
    access.revoke(ALICE)
    access.allow(ALICE, scopes("infer"))
    stop()
    access.revoke(ALICE)

    assert told == [(ALICE, False, True), (ALICE, False, False)]
    assert not reopened(access).may(ALICE, "ping")


def test_a_listener_that_fails_keeps_no_other_from_hearing(access):
    told = []
    access.listen(lambda _: 1 / 0)
    access.listen(told.append)
    access.allow(ALICE, scopes("infer"))
    access.revoke(ALICE)
    assert told == [ALICE]


def test_only_a_known_key_can_lose_something(access):
    for change in (access.revoke, access.unban, lambda key: access.disallow(key, scopes("infer"))):
        with pytest.raises(NotFoundError, match="not known"):
            change(EVE)


def test_a_liar_is_not_spoken_with_whatever_it_was_allowed_until_it_is_forgiven(access):
    told = []
    access.allow(ALICE, scopes("infer"))
    access.listen(told.append)

    access.ban(ALICE, "sent a wrong blob\x1b[31m\n")
    access.ban(EVE, "the same")

    for each in (access, reopened(access)):
        assert told == [ALICE, EVE]
        assert each.is_banned(ALICE)
        assert each.is_banned(EVE)
        assert not each.is_banned(BOB)
        assert not each.may(ALICE, "infer", "digits")
        assert not each.may(EVE, "enrol")
        assert "\x1b" not in each.peers()[0].banned
        with pytest.raises(ForbiddenError, match="banned"):
            each.allow(ALICE, scopes("models"))
    again = reopened(each)
    again.unban(ALICE)
    assert again.may(ALICE, "infer", "digits")


def test_bans_of_keys_that_cost_nothing_do_not_fill_the_disk(access, monkeypatch):
    monkeypatch.setattr("tether.security.access._MAX_BANNED", 5)
    access.allow(ALICE, scopes("infer"))
    access.ban(ALICE, "lied")
    for number in range(10):
        access.ban(f"{number:064x}", "lied")
    assert len(access.peers()) == 6
    assert access.is_banned(ALICE)
    assert len(reopened(access).peers()) == 6


def test_a_ban_holds_where_nothing_can_be_written_and_an_older_one_has_to_make_room(access, monkeypatch):
    monkeypatch.setattr("tether.security.access._MAX_BANNED", 1)
    access.ban(EVE, "lied")
    access.allow(ALICE, scopes("infer"))
    access.file.close()
    with pytest.raises(StoreError, match="holds, but is forgotten"):
        access.ban(ALICE, "lied")
    assert access.is_banned(ALICE)
    assert access.is_banned(EVE)


def test_whom_people_sent_away_is_not_forgotten_among_bans(access, monkeypatch):
    monkeypatch.setattr("tether.security.access._MAX_BANNED", 2)
    access.allow(ALICE, scopes("infer"))
    access.revoke(ALICE)
    access.ban(ALICE, "lied")
    for number in range(5):
        access.ban(f"{number:064x}", "lied")
    assert reopened(access).row(ALICE).revoked is not None


def test_every_change_leaves_a_line_in_its_own_transaction(access):
    access.allow(ALICE, scopes("infer:a", "models"))
    access.disallow(ALICE, scopes("models"))
    access.revoke(ALICE)
    access.ban(BOB, "lied")

    lines = reopened(access).audit()
    assert [(line.action, line.subject, line.detail) for line in lines] == [
        ("allow", ALICE, "infer:a models"),
        ("disallow", ALICE, "models"),
        ("revoke", ALICE, "infer:a"),
        ("ban", BOB, "lied"),
    ]
    assert access.file.path.exists()


def test_labels_are_short_and_printable(access):
    for label in ("x" * 81, "a\nb", "\x1b[2J"):
        with pytest.raises(BadNameError):
            access.allow(ALICE, scopes("infer"), label)
    assert access.peers() == []


def until_full(access, change):
    """Repeat a change until the file can't grow any more. Gives the error."""
    (pages,) = access.file._db.execute("PRAGMA page_count").fetchone()
    access.file._db.execute(f"PRAGMA max_page_count = {pages}")
    for _ in range(10_000):
        try:
            change()
        except NoSpaceError as error:
            return str(error)
    raise AssertionError("it was never full")


def test_on_a_full_disk_nobody_is_let_in_and_nobody_is_kept_in(access):
    told = []
    access.allow(BOB, scopes("infer"))
    access.listen(told.append)

    assert "nothing was changed" in until_full(access, lambda: access.allow(ALICE, scopes("models")))
    assert "holds, but is forgotten" in until_full(access, lambda: access.revoke(BOB))
    before = access.scopes(EVE)
    until_full(access, lambda: access.allow(EVE, scopes(f"infer:{'b' * 60}{len(access.scopes(EVE))}")))

    assert not access.may(BOB, "infer", "digits")
    assert BOB in told
    assert before == Scopes()
    access.file._db.execute("PRAGMA max_page_count = 1000000")
    assert access.scopes(EVE) == reopened(access).scopes(EVE)


def test_a_manager_that_follows_says_the_same_and_cuts_what_the_writer_took(access, tmp_path):
    follower = Access(AccessFile.open(tmp_path / "other.sqlite"))
    told = []
    follower.listen(told.append)
    access.allow(ALICE, scopes("infer", "models"))
    access.allow(BOB, scopes("register"))
    follower.mirror(access.file.state())
    assert follower.peers() == access.peers()
    assert told == []

    access.disallow(ALICE, scopes("infer"))
    follower.mirror(access.file.state())
    assert told == [ALICE]
    assert reopened(follower).peers() == access.peers()


def test_a_manager_that_follows_cuts_also_a_banned_key_that_was_allowed_nothing(access, tmp_path):
    follower = Access(AccessFile.open(tmp_path / "other.sqlite"))
    told = []
    follower.listen(told.append)
    access.ban(EVE, "lied")
    for _ in range(2):
        follower.mirror(access.file.state())
    assert told == [EVE]
    follower.file.close()


def test_the_file_is_this_users_alone(access):
    access.allow(ALICE, scopes("infer"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in access.file.path.parent.glob("access.sqlite*")}
    assert modes == {0o600}
    access.file.path.chmod(0o644)
    reopened(access)
    assert stat.S_IMODE(access.file.path.stat().st_mode) == 0o600


def test_a_file_that_is_none_or_from_the_future_or_a_link_opens_nothing(path, tmp_path):
    path.write_bytes(b"no database at all, but long enough to be taken for one" * 100)
    with pytest.raises(ConfigError, match="restore it"):
        AccessFile.open(path)
    with sqlite3.connect(tmp_path / "new") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(FormatTooNewError, match="99"):
        AccessFile.open(tmp_path / "new")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(StoreError):
        AccessFile.open(tmp_path / "link")
    with pytest.raises(StoreError):
        AccessFile.open(tmp_path / "nowhere" / "file")


def test_what_a_wider_scope_still_opens_does_not_seem_to_be_taken(access):
    access.allow(ALICE, scopes("infer", "infer:digits", "models"))
    with pytest.raises(ScopeStillOpenError, match="it has infer,") as caught:
        access.disallow(ALICE, scopes("infer:digits"))
    assert (caught.value.args[1], caught.value.http_status) == (["infer"], 409)
    assert access.scopes(ALICE).texts() == ["infer", "infer:digits", "models"]
    assert access.disallow(ALICE, scopes("infer:digits", "infer")).texts() == ["models"]
    assert access.disallow(ALICE, scopes("infer:digits")).texts() == ["models"]  # again: it is closed, as was asked


def test_only_the_newest_lines_of_the_audit_are_kept(access, monkeypatch):
    monkeypatch.setattr("tether.security.access_file._MAX_AUDIT", 5)
    for number in range(12):
        access.allow(ALICE, scopes(f"infer:m{number}"))
    assert [line.detail for line in access.audit()] == [f"infer:m{number}" for number in range(7, 12)]


def test_a_scope_that_this_version_does_not_know_opens_nothing(access):
    access.allow(ALICE, scopes("infer:a"))
    with access.file.writing() as db:
        db.execute("UPDATE peers SET scopes = 'everything infer:a teleport:*'")
    again = reopened(access)
    assert again.scopes(ALICE).texts() == ["infer:a"]
    assert not again.may(ALICE, "events")


def test_a_check_costs_microseconds_among_thousands_of_peers(access, measured):
    with access.file.writing() as db:
        rows = [(f"{number:064x}", "", "infer:digits* models", 0.0, None, None) for number in range(5000)]
        db.executemany("INSERT INTO peers VALUES (?, ?, ?, ?, ?, ?)", rows)
    access = reopened(access)
    key = f"{4321:064x}"
    known = min(timeit.repeat(lambda: access.may(key, "infer", "digits2"), number=5000, repeat=5)) / 5000
    unknown = min(timeit.repeat(lambda: access.may(EVE, "infer", "digits2"), number=5000, repeat=5)) / 5000
    measured(f"may(key, method, model) among 5,000 peers: {known * 1e6:.2f} µs; unknown key {unknown * 1e6:.2f} µs")
    assert access.may(key, "infer", "digits2")
    assert known < 50e-6


def test_threads_that_ask_while_others_change_see_one_or_the_other(access):
    done, wrong = threading.Event(), []

    def ask():
        while not done.is_set():
            if access.may(BOB, "feed") or not access.may(ALICE, "ping"):
                wrong.append(1)

    access.allow(ALICE, scopes("events"))
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        access.allow(BOB, scopes("infer"))
        access.revoke(BOB)
        access.allow(ALICE, scopes("infer"))
        access.disallow(ALICE, scopes("infer"))
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_after_changes_at_once_memory_says_what_the_file_says(access):
    def work(number):
        for _ in range(10):
            access.allow(ALICE, scopes(f"infer:m{number}"))
            if number % 2:
                access.revoke(ALICE)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert access.scopes(ALICE) == reopened(access).scopes(ALICE)


class Peers(RuleBasedStateMachine):
    """Any order of changes and restarts: what may be done is what a plain set of scopes says."""

    keys = Bundle("keys")

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.access = Access(AccessFile.open(Path(self.folder.name) / "access.sqlite"))
        self.model, self.banned = {}, set()

    @rule(target=keys, number=st.integers(1, 3))
    def key(self, number):
        return Identity(bytes([number]) * 32).public

    @rule(key=keys, text=st.sampled_from(["infer", "infer:a*", "models", "register", "decrypt:a"]))
    def allow(self, key, text):
        if key in self.banned:
            return
        self.access.allow(key, scopes(text))
        self.model.setdefault(key, set()).add(Scope.parse(text))

    @rule(key=keys, text=st.sampled_from(["infer", "infer:a*", "models"]))
    def disallow(self, key, text):
        if key not in self.model:
            return
        try:
            self.access.disallow(key, scopes(text))
        except ScopeStillOpenError:
            assert any(scope.meets(Scope.parse(text)) for scope in self.model[key])
        else:
            self.model[key].discard(Scope.parse(text))
            assert text == "infer" or not any(scope.meets(Scope.parse(text)) for scope in self.model[key])

    @rule(key=keys)
    def revoke(self, key):
        if key in self.model:
            self.access.revoke(key)
            self.model[key] = set()

    @rule(key=keys)
    def ban(self, key):
        self.access.ban(key, "lied")
        self.banned.add(key)
        self.model.setdefault(key, set())

    @rule(key=keys)
    def unban(self, key):
        if key in self.banned:
            self.access.unban(key)
            self.banned.discard(key)

    @rule()
    def restart(self):
        self.access = reopened(self.access)

    @invariant()
    def says_the_same(self):
        for number in range(1, 4):
            key = Identity(bytes([number]) * 32).public
            plain = Scopes(() if key in self.banned else self.model.get(key, ()))
            for method, model in (("infer", "abc"), ("infer", "b"), ("models", None), ("register", None), ("envelope", "a")):
                assert self.access.may(key, method, model) is plain.may(method, model)

    def teardown(self):
        self.access.file.close()
        self.folder.cleanup()


TestPeers = Peers.TestCase
TestPeers.settings = settings(max_examples=8, stateful_step_count=12)
