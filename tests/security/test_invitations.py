"""Who is let in by an invitation: whoever has its secret, as often as it says, and after a crash no more often than that."""

import functools
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import (
    BadAddressError,
    BadInvitationError,
    BadKeyError,
    BadNameError,
    BadScopeError,
    BadTermsError,
    ConfigError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    TetherError,
    TooManyTriesError,
)
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.addresses import Address, Secret
from tether.security.guesses import _AIMED_BURST, _BLIND_BURST, _MOST, FORGIVEN, TRIES, Guesses
from tether.security.identity import Identity
from tether.security.invitations import EXPIRES, Invitations, seconds_of
from tether.security.rates import Bucket
from tether.security.scopes import Scope


@functools.cache
def key_of(number):
    return Identity(number.to_bytes(32)).public


ALICE, BOB, EVE = (Identity(bytes([number]) * 32).public for number in range(1, 4))
INFER = [Scope.parse("infer:digits*")]


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


class Lab:
    """Access and invitations on one file, and a clock that is turned by hand."""

    def __init__(self, path):
        self.clock = Clock()
        self.path = path
        self.start()

    def start(self):
        self.access = Access(AccessFile.open(self.path), self.clock)
        self.invitations = Invitations(self.access, self.clock)

    def restart(self):
        self.access.file.close()
        self.start()

    def refusal(self, secret, peer):
        with pytest.raises(TetherError) as caught:
            self.invitations.enrol(secret, peer)
        return caught.value


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "access.sqlite")
    yield lab
    lab.access.file.close()


def test_who_was_invited_may_what_the_invitation_says_and_needs_it_no_more(lab):
    secret = lab.invitations.invite(INFER, label="for alice")

    assert lab.invitations.enrol(secret.text, ALICE).texts() == ["infer:digits*"]

    assert lab.access.may(ALICE, "infer", "digits2")
    assert not lab.access.may(ALICE, "publish", "digits2")
    lab.restart()
    assert lab.access.may(ALICE, "infer", "digits2")
    assert [peer.label for peer in lab.access.peers()] == ["for alice"]


def test_a_secret_is_good_once_and_again_for_the_one_whose_answer_was_lost(lab):
    secret = lab.invitations.invite(INFER)
    lab.invitations.enrol(secret.text, ALICE)

    for _ in range(5):
        assert lab.invitations.enrol(secret.text, ALICE).texts() == ["infer:digits*"]
        lab.restart()
    error = lab.refusal(secret.text, BOB)
    assert isinstance(error, BadInvitationError)
    assert "was used" in str(error)
    assert not lab.access.may(BOB, "ping")
    assert [(each.uses, each.peers) for each in lab.invitations.list()] == [(1, (ALICE,))]


def test_an_invitation_for_three_admits_three_keys(lab):
    secret = lab.invitations.invite(INFER, uses=3)
    keys = [Identity(bytes([number]) * 32).public for number in range(10, 20)]
    admitted = []
    for key in keys:
        try:
            lab.invitations.enrol(secret.text, key)
            admitted.append(key)
        except BadInvitationError:
            pass
    assert admitted == keys[:3]


def test_an_invitation_ends_when_it_said_and_never_where_it_said_never(lab):
    month, day, never = (lab.invitations.invite(INFER, expires=expires) for expires in (EXPIRES, 86400.0, None))
    lab.clock.now += 86400.0
    assert "has expired" in str(lab.refusal(day.text, ALICE))
    lab.clock.now += EXPIRES
    assert "has expired" in str(lab.refusal(month.text, ALICE))
    lab.clock.now += 1e9
    lab.invitations.enrol(never.text, ALICE)


def test_a_revoked_invitation_admits_nobody_and_says_who_came_by_it(lab):
    secret = lab.invitations.invite(INFER, uses=2)
    lab.invitations.enrol(secret.text, ALICE)

    assert lab.invitations.revoke(secret.id).peers == (ALICE,)

    assert "was revoked" in str(lab.refusal(secret.text, BOB))
    lab.invitations.revoke(secret.id)
    lab.invitations.enrol(secret.text, ALICE)
    assert lab.access.may(ALICE, "infer", "digits")
    with pytest.raises(NotFoundError):
        lab.invitations.revoke("00000000")


def test_a_key_that_was_sent_away_does_not_come_back_by_an_old_invitation_but_by_a_new_one(lab):
    old, other = lab.invitations.invite(INFER, uses=5), lab.invitations.invite(INFER)
    lab.invitations.enrol(old.text, ALICE)
    lab.clock.now += 10

    revocation = lab.access.revoke(ALICE)

    assert revocation.open_invitations == (old.id,)
    for secret in (old, other):
        assert "taken back" in str(lab.refusal(secret.text, ALICE))
        lab.restart()
    lab.clock.now += 10
    lab.invitations.enrol(lab.invitations.invite(INFER).text, ALICE)
    assert lab.access.may(ALICE, "infer", "digits")


def test_a_clock_that_went_back_brings_nobody_back_who_was_sent_away(lab):
    old = lab.invitations.invite(INFER, uses=5)
    lab.invitations.enrol(old.text, ALICE)
    lab.clock.now -= 3600
    lab.restart()

    lab.access.revoke(ALICE)

    assert "taken back" in str(lab.refusal(old.text, ALICE))
    assert not lab.access.may(ALICE, "infer", "digits")
    lab.invitations.enrol(lab.invitations.invite(INFER).text, ALICE)
    assert lab.access.may(ALICE, "infer", "digits")
    lab.access.revoke(ALICE)
    for invitation in lab.access.file.invitations():
        assert invitation.created <= lab.access.row(ALICE).revoked


def test_a_new_invitation_is_new_also_where_the_clock_was_wrong_when_the_key_was_sent_away(lab):
    lab.access.allow(ALICE, INFER)
    lab.clock.now += 3600
    lab.access.revoke(ALICE)
    lab.clock.now -= 3600
    lab.invitations.enrol(lab.invitations.invite(INFER).text, ALICE)
    assert lab.access.may(ALICE, "infer", "digits")


class Announced:
    """A lock that tells who comes to it before it lets them wait."""

    def __init__(self, lock):
        self.lock, self.came = lock, threading.Event()

    def __enter__(self):
        self.came.set()
        return self.lock.__enter__()

    def __exit__(self, *error):
        return self.lock.__exit__(*error)


def test_a_key_that_is_banned_while_it_waits_to_be_let_in_is_not(lab):
    secret, lock, errors = lab.invitations.invite(INFER), lab.access.file.lock, []

    def come():
        try:
            lab.invitations.enrol(secret.text, EVE)
        except ForbiddenError as error:
            errors.append(error)

    lab.access.file.lock = Announced(lock)
    thread = threading.Thread(target=come)
    with lock:
        thread.start()
        assert lab.access.file.lock.came.wait(30)
        lab.access.ban(EVE, "lied")
    thread.join()
    assert len(errors) == 1
    assert lab.invitations.list()[0].peers == ()


@pytest.mark.parametrize("key", ["", "00" * 32, "01" + "00" * 31, ALICE.upper(), str(Address(ALICE))])
def test_what_no_handshake_proves_is_let_in_by_nothing(lab, key):
    secret = lab.invitations.invite(INFER)
    assert isinstance(lab.refusal(secret.text, key), BadKeyError | BadAddressError)
    assert lab.invitations.list()[0].peers == ()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("45m", 2700.0), ("12h", 43200.0), ("30d", EXPIRES), ("never", None)])
def test_spans_of_time_are_said_as_people_say_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "0d", "-1d", "1.5h", "1w", "9999999999d", "٣d", "1d\n"])
def test_what_is_no_span_of_time_is_told(text):
    with pytest.raises(BadTermsError, match="span of time"):
        seconds_of(text)


def test_two_invitations_add_up(lab):
    lab.invitations.enrol(lab.invitations.invite(INFER).text, ALICE)
    lab.invitations.enrol(lab.invitations.invite([Scope.parse("models")]).text, ALICE)
    assert lab.access.scopes(ALICE).texts() == ["infer:digits*", "models"]


def test_a_banned_key_is_let_in_by_nothing(lab):
    secret = lab.invitations.invite(INFER)
    lab.access.ban(EVE, "lied")
    assert isinstance(lab.refusal(secret.text, EVE), ForbiddenError)
    assert lab.invitations.list()[0].peers == ()


def test_nothing_on_the_disk_or_in_a_log_shows_a_secret(lab, capsys):
    secret = lab.invitations.invite(INFER, label="for alice")
    lab.invitations.enrol(secret.text, ALICE)
    lab.refusal(secret.text, BOB)
    lab.refusal(secret.text[:-1], BOB)
    shown = b"".join(path.read_bytes() for path in lab.path.parent.iterdir()) + "".join(capsys.readouterr()).encode()
    for form in (secret.text.encode(), secret.value, secret.value.hex().encode()):
        assert form not in shown
    assert secret.id.encode() in shown


def test_every_use_leaves_a_line(lab):
    secret = lab.invitations.invite(INFER)
    lab.invitations.enrol(secret.text, ALICE)
    lab.invitations.revoke(secret.id)
    assert [(line.action, line.subject) for line in lab.access.audit()] == [
        ("invite", secret.id),
        ("enrol", ALICE),
        ("revoke-invitation", secret.id),
    ]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"uses": 0}, BadTermsError),
        ({"uses": 10_001}, BadTermsError),
        ({"expires": 0.0}, BadTermsError),
        ({"expires": float("nan")}, BadTermsError),
        ({"expires": float("inf")}, BadTermsError),
        ({"label": "a\nb"}, BadNameError),
        ({"scopes": []}, BadScopeError),
    ],
)
def test_an_invitation_that_makes_no_sense_is_not_made(lab, options, error):
    with pytest.raises(error) as caught:
        lab.invitations.invite(**{"scopes": INFER, **options})
    assert caught.value.http_status == 400
    assert lab.invitations.list() == []


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_at_which_nothing_ever_passes_is_refused_instead_of_waited_for(rate):
    with pytest.raises(ConfigError, match="over 0"):
        Bucket(rate, 1.0)


def test_there_is_an_end_to_how_many_are_open(lab, monkeypatch):
    monkeypatch.setattr("tether.security.invitations._MAX_OPEN", 2)
    first = lab.invitations.invite(INFER)
    lab.invitations.invite(INFER)
    with pytest.raises(ConflictError, match="open"):
        lab.invitations.invite(INFER)
    lab.invitations.revoke(first.id)
    lab.invitations.invite(INFER)


# --- guessing


def test_a_key_has_three_tries_and_then_waits_even_with_the_right_secret(lab):
    secret = lab.invitations.invite(INFER)
    for _ in range(TRIES):
        assert isinstance(lab.refusal(Secret.new().text, EVE), BadInvitationError)
    error = lab.refusal(secret.text, EVE)
    assert isinstance(error, TooManyTriesError)
    assert error.args[1] == FORGIVEN
    lab.clock.now += FORGIVEN
    lab.invitations.enrol(secret.text, EVE)


@pytest.mark.parametrize("text", ["", "y" * 36, "\0", "x" * 1_000_000, "../../etc/passwd", "'; DROP TABLE peers; --", "ⅷ" * 36])
def test_what_is_no_secret_is_a_wrong_one(lab, text):
    assert isinstance(lab.refusal(text, EVE), BadInvitationError)
    assert lab.invitations._guesses.wait(EVE, None, lab.clock()) == 0.0
    for _ in range(TRIES):
        error = lab.refusal(text, EVE)
    assert isinstance(error, TooManyTriesError)


def test_a_flood_of_guesses_under_new_keys_is_held_up_and_keeps_out_nobody_who_was_invited(lab):
    secret = lab.invitations.invite(INFER)
    answers = [type(lab.refusal(Secret.new().text, key_of(number))) for number in range(1000)]

    assert answers.count(BadInvitationError) == _BLIND_BURST
    assert answers.count(TooManyTriesError) == 1000 - _BLIND_BURST
    lab.invitations.enrol(secret.text, ALICE)


def test_guesses_at_one_invitation_are_held_up_for_that_one_alone(lab):
    attacked, other = lab.invitations.invite(INFER), lab.invitations.invite(INFER)
    wrong = Secret(attacked.id, bytes(16))
    answers = [type(lab.refusal(wrong.text, key_of(number))) for number in range(100)]

    assert answers.count(BadInvitationError) == _AIMED_BURST
    assert isinstance(lab.refusal(attacked.text, ALICE), TooManyTriesError)
    lab.invitations.enrol(other.text, BOB)
    lab.clock.now += 60
    lab.invitations.enrol(attacked.text, ALICE)


def test_a_flood_takes_bounded_memory():
    guesses = Guesses()
    for number in range(20_000):
        guesses.wrong(f"{number:064x}", None if number % 2 else f"{number:08x}", float(number))
    assert len(guesses) <= 2 * _MOST


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.001, 100)), max_size=50), st.floats(0.01, 100), st.floats(0.01, 1000))
def test_a_bucket_never_gives_more_than_its_rate_and_its_burst(asked, rate, burst):
    bucket = Bucket(rate, burst)
    times = sorted(time for time, _ in asked)
    taken = [amount for time, (_, amount) in zip(times, asked, strict=True) if bucket.take(amount, time)]
    if times:
        assert sum(taken) <= burst + rate * (times[-1] - times[0]) + 1e-6 * max(1.0, burst + rate * times[-1])


def test_a_bucket_counts_a_clock_that_goes_back_as_one_that_stands_still():
    bucket = Bucket(1.0, 10.0)
    assert bucket.take(10.0, 100.0)
    assert not bucket.take(1.0, 50.0)
    assert not bucket.take(1.0, 100.5)
    assert bucket.take(1.0, 101.0)
    assert bucket.wait(1.0, 101.0) == 1.0


# --- races and crashes


def test_of_many_who_come_at_once_with_one_secret_one_is_let_in(lab):
    for _ in range(3):
        secret = lab.invitations.invite(INFER)
        barrier, admitted = threading.Barrier(8), []

        def come(number, secret=secret, barrier=barrier, admitted=admitted):
            barrier.wait()
            try:
                lab.invitations.enrol(secret.text, key_of(number))
                admitted.append(number)
            except BadInvitationError:
                pass

        threads = [threading.Thread(target=come, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(admitted) == 1


ENROL_UNTIL_KILLED = """
import sys
from pathlib import Path
from tether.security.access import Access
from tether.security.access_file import AccessFile
from tether.security.identity import Identity
from tether.security.invitations import Invitations
invitations = Invitations(Access(AccessFile.open(Path(sys.argv[1]))))
for number, line in enumerate(sys.stdin):
    invitations.enrol(line.strip(), Identity(number.to_bytes(32)).public)
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def test_what_was_answered_before_a_kill_is_there_and_no_secret_is_good_twice(tmp_path):
    for round_ in range(2):
        lab = Lab(tmp_path / f"access-{round_}.sqlite")
        secrets = [lab.invitations.invite(INFER) for _ in range(20)]
        lab.access.file.close()
        answered = kill_after(lab.path, secrets, 5 + 7 * round_)
        lab.clock.now += 1
        lab.start()
        enrolled = {peer.key for peer in lab.access.peers() if peer.scopes}
        assert {key_of(number) for number in answered} <= enrolled
        for number, secret in enumerate(secrets):
            key = key_of(number)
            if key in enrolled:
                assert isinstance(lab.refusal(secret.text, BOB if number % 2 else ALICE), BadInvitationError)
                assert lab.invitations.enrol(secret.text, key).texts() == ["infer:digits*"]
        assert all(len(each.peers) == int(each.peers != ()) for each in lab.invitations.list())
        lab.access.file.close()


def kill_after(path, secrets, count):
    """Feed secrets to a process and kill it once it answered so many; gives the numbers that it answered."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENROL_UNTIL_KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    with process:
        process.stdin.write("".join(f"{secret.text}\n" for secret in secrets))
        process.stdin.flush()
        lines = [process.stdout.readline() for _ in range(count)]
        process.kill()
        lines += process.stdout.readlines()
        process.stdin.close()
    return [int(line) for line in lines if re.fullmatch(r"\d+\n", line)]


@settings(max_examples=10)
@given(st.data())
def test_an_invitation_admits_as_many_keys_as_it_says_whatever_the_order(tmp_path_factory, data):
    lab = Lab(tmp_path_factory.mktemp("any-order") / "access.sqlite")
    uses = data.draw(st.integers(1, 3))
    secret = lab.invitations.invite(INFER, uses=uses)
    came = set()
    for key in data.draw(st.lists(st.sampled_from([ALICE, BOB, EVE]), max_size=8)):
        try:
            lab.invitations.enrol(secret.text, key)
            came.add(key)
        except BadInvitationError:
            assert len(came) == uses
        if data.draw(st.booleans()):
            lab.restart()
    assert {key for key in (ALICE, BOB, EVE) if lab.access.may(key, "infer", "digits")} == came
    assert len(came) <= uses
    lab.access.file.close()
