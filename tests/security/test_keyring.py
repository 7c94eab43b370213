import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tether.errors import BadEnvelopeError, BadKeyError, ClusterKeyMissingError, ConfigError, StoreError
from tether.security.envelopes import MAX_NBYTES, seal_to
from tether.security.identity import Identity
from tether.security.keyring import Keyring, wrapped_by

SECRET = bytes(range(32))


def key_files(folder):
    return sorted(path for path in folder.iterdir() if path.name != "cluster.lock")


def test_the_first_opening_makes_a_key_for_this_user_alone_and_the_next_finds_it(tmp_path):
    folder = tmp_path / "deep" / "keys"

    first, second = Keyring.open(folder), Keyring.open(folder)

    assert first.current == second.current
    assert first.outdated == ()
    assert [path.name for path in key_files(folder)] == [f"cluster-{first.current}.key"]
    assert key_files(folder)[0].stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert second.unwrap(first.wrap(SECRET, b"here"), b"here") == SECRET


def test_a_folder_that_others_may_look_into_is_closed_to_them(tmp_path):
    tmp_path.chmod(0o755)

    Keyring.open(tmp_path)

    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_those_who_start_together_get_one_key(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = {keyring.current for keyring in pool.map(lambda _: Keyring.open(tmp_path / "keys"), range(16))}

    assert len(found) == 1
    assert len(key_files(tmp_path / "keys")) == 1


def test_nothing_that_is_printed_shows_a_key(tmp_path):
    keyring = Keyring.open(tmp_path)
    secret = key_files(tmp_path)[0].read_text().split()[1]

    shown = f"{keyring!r} {keyring} {keyring._current()!r} {keyring._keys}"

    assert secret not in shown
    assert repr(bytes.fromhex(secret)) not in shown
    assert "***" in repr(keyring)


def test_wrapping_twice_gives_other_bytes_and_hides_the_secret(tmp_path):
    keyring = Keyring.open(tmp_path)

    one, two = keyring.wrap(SECRET, b"here"), keyring.wrap(SECRET, b"here")

    assert one != two
    assert SECRET not in one
    assert wrapped_by(one) == keyring.current


def test_a_wrapped_secret_opens_whole_unaltered_and_in_its_own_context_only(tmp_path):
    keyring = Keyring.open(tmp_path)
    wrapped = keyring.wrap(SECRET, b"here")
    key = len(bytes.fromhex(keyring.current))

    for position in range(key, len(wrapped)):
        altered = bytearray(wrapped)
        altered[position] ^= 1
        with pytest.raises(StoreError, match="altered"):
            keyring.unwrap(bytes(altered), b"here")
    for wrong in (wrapped[:-1], wrapped[:30], b"", wrapped + b"\0"):
        with pytest.raises(StoreError, match="altered"):
            keyring.unwrap(wrong, b"here")
    with pytest.raises(StoreError, match="belongs to something else"):
        keyring.unwrap(wrapped, b"there")


def test_a_secret_of_another_cluster_key_says_which_key_to_restore(tmp_path):
    other = Keyring.open(tmp_path / "other")
    wrapped = other.wrap(SECRET, b"")

    with pytest.raises(ClusterKeyMissingError, match=f"cluster-{other.current}.key from a backup") as caught:
        Keyring.open(tmp_path / "keys").unwrap(wrapped, b"")
    assert caught.value.args[1] == other.current


def test_a_key_that_others_may_read_is_refused(tmp_path):
    Keyring.open(tmp_path)
    (path,) = key_files(tmp_path)

    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            Keyring.open(tmp_path)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda data: data[:-1], lambda data: data[:40], lambda data: data + b"x", bytes.upper])
def test_a_key_file_that_was_cut_or_altered_is_refused_and_kept(tmp_path, damage):
    Keyring.open(tmp_path)
    (path,) = key_files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(ConfigError, match="restore it from a backup"):
        Keyring.open(tmp_path)
    assert path.exists()


def test_one_altered_digit_is_noticed(tmp_path):
    Keyring.open(tmp_path)
    (path,) = key_files(tmp_path)
    text = path.read_text()
    path.write_text(text[:10] + ("0" if text[10] != "0" else "1") + text[11:])

    with pytest.raises(ConfigError, match="altered"):
        Keyring.open(tmp_path)


def test_a_link_in_place_of_a_key_is_not_followed(tmp_path):
    Keyring.open(tmp_path / "keys")
    (path,) = key_files(tmp_path / "keys")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(StoreError, match="mend the folder"):
        Keyring.open(tmp_path / "keys")


def test_a_key_that_is_gone_is_not_replaced_silently_for_what_it_wrapped(tmp_path):
    keyring = Keyring.open(tmp_path)
    wrapped = keyring.wrap(SECRET, b"")
    (path,) = key_files(tmp_path)
    backup = path.read_bytes()
    path.unlink()

    later = Keyring.open(tmp_path)
    with pytest.raises(ClusterKeyMissingError, match=keyring.current):
        later.unwrap(wrapped, b"")
    path.write_bytes(backup)
    path.chmod(0o600)

    assert later.unwrap(wrapped, b"") == SECRET


def test_a_new_key_wraps_and_the_old_one_still_opens_until_it_is_retired(tmp_path):
    keyring = Keyring.open(tmp_path)
    before, wrapped = keyring.current, keyring.wrap(SECRET, b"")

    after = keyring.rotate_begin()

    assert (keyring.current, keyring.outdated) == (after, (before,))
    assert wrapped_by(keyring.wrap(SECRET, b"")) == after
    assert keyring.unwrap(wrapped, b"") == SECRET
    assert (Keyring.open(tmp_path).current, Keyring.open(tmp_path).outdated) == (after, (before,))

    keyring.retire(before)
    keyring.retire(before)

    assert [path.name for path in key_files(tmp_path)] == [f"cluster-{after}.key"]
    for each in (keyring, Keyring.open(tmp_path)):
        with pytest.raises(ClusterKeyMissingError):
            each.unwrap(wrapped, b"")
    with pytest.raises(ConfigError, match="current"):
        keyring.retire(after)


def test_another_process_finds_the_new_key_when_it_first_meets_it(tmp_path):
    reader, writer = Keyring.open(tmp_path), Keyring.open(tmp_path)
    writer.rotate_begin()

    assert reader.unwrap(writer.wrap(SECRET, b""), b"") == SECRET


def test_what_a_crash_left_of_a_new_or_of_a_retired_key_is_wiped_at_the_next_opening(tmp_path):
    keyring = Keyring.open(tmp_path)
    before = keyring.current
    keyring.rotate_begin()
    old = tmp_path / f"cluster-{before}.key"
    half = tmp_path / f"cluster-{'ab' * 16}.key.1-abcd.partial"
    half.write_bytes(b"2 " + b"cd" * 16)
    retired = old.rename(f"{old}.retired")
    os.link(retired, tmp_path / "link")
    with retired.open("r+b") as file:
        file.write(b"half wiped")

    again = Keyring.open(tmp_path)

    assert (again.current, again.outdated) == (keyring.current, ())
    assert not half.exists()
    assert not retired.exists()
    assert b"half wiped" not in (tmp_path / "link").read_bytes()


def test_a_wiped_key_leaves_none_of_its_digits_in_its_blocks(tmp_path):
    keyring = Keyring.open(tmp_path)
    before = keyring.current
    secret = (tmp_path / f"cluster-{before}.key").read_bytes().split()[1]
    os.link(tmp_path / f"cluster-{before}.key", tmp_path / "link")
    keyring.rotate_begin()

    keyring.retire(before)

    assert secret[:16] not in (tmp_path / "link").read_bytes()


def test_without_any_key_left_the_error_says_so(tmp_path):
    keyring = Keyring.open(tmp_path)
    wrapped = Keyring.open(tmp_path / "other").wrap(SECRET, b"")
    for path in tmp_path.glob("cluster-*.key"):
        path.unlink()

    with pytest.raises(ClusterKeyMissingError):
        keyring.unwrap(wrapped, b"")
    with pytest.raises(ClusterKeyMissingError, match="restore"):
        keyring.wrap(SECRET, b"")


def test_a_folder_that_cannot_hold_keys_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StoreError, match="mend the folder"):
        Keyring.open(tmp_path / "file" / "keys")


# --- envelopes


def test_an_envelope_opens_for_its_reader_only():
    reader, other = Identity(os.urandom(32)), Identity(os.urandom(32))
    envelope = seal_to(reader.public, SECRET)

    assert reader.open_sealed(envelope) == SECRET
    assert SECRET not in envelope
    assert seal_to(reader.public, SECRET) != envelope
    with pytest.raises(BadEnvelopeError, match="not for this lab"):
        other.open_sealed(envelope)


def test_an_envelope_that_was_altered_cut_or_never_one_is_refused():
    reader = Identity(os.urandom(32))
    envelope = seal_to(reader.public, SECRET)

    for position in range(0, len(envelope), 7):
        altered = bytearray(envelope)
        altered[position] ^= 1
        with pytest.raises(BadEnvelopeError):
            reader.open_sealed(bytes(altered))
    for wrong in (b"", envelope[:-1], envelope[:40], bytes(100), bytes(MAX_NBYTES + 1)):
        with pytest.raises(BadEnvelopeError):
            reader.open_sealed(wrong)


@pytest.mark.parametrize("public", ["", "zz" * 32, "ab" * 31, "ab" * 33, "00" * 32, "01" + "00" * 31, "ff" * 32, "ab " * 32, "ä" * 64])
def test_nothing_is_sealed_for_what_is_no_key_or_a_weak_one(public):
    with pytest.raises(BadKeyError, match="64 hex digits"):
        seal_to(public, SECRET)


def test_a_secret_too_long_to_be_opened_is_not_sealed():
    with pytest.raises(BadEnvelopeError, match="fewer"):
        seal_to(Identity(os.urandom(32)).public, bytes(MAX_NBYTES))
