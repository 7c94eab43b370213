import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tether.errors import BadSignatureError, ConfigError, StoreError
from tether.security.identity import Identity, verify


def test_an_identity_is_made_once_and_found_again(tmp_path):
    path = tmp_path / "deep" / "identity"

    first, second = Identity.load_or_create(path), Identity.load_or_create(path)

    assert first.public == second.public
    assert len(bytes.fromhex(first.public)) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["identity"]
    assert repr(first) == f"Identity({first.public})"


def test_processes_that_start_together_get_the_same_identity(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = {identity.public for identity in pool.map(lambda _: Identity.load_or_create(tmp_path / "identity"), range(16))}

    assert len(made) == 1


def test_an_identity_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "identity"
    Identity.load_or_create(path)

    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            Identity.load_or_create(path)


@pytest.mark.parametrize("text", [b"", b"\xff" * 64, b"ab" * 31, b"ab" * 40, b"zz" * 32])
def test_a_file_that_is_no_identity_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "identity"
    path.write_bytes(text)
    path.chmod(0o600)

    with pytest.raises(ConfigError, match="restore"):
        Identity.load_or_create(path)
    assert path.read_bytes() == text


def test_a_folder_that_cannot_hold_it_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StoreError, match="identity"):
        Identity.load_or_create(tmp_path / "file" / "identity")


def test_a_signature_fits_its_message_and_key_only():
    one, two = Identity(os.urandom(32)), Identity(os.urandom(32))
    signature = one.sign(b"message")

    verify(one.public, b"message", signature)
    for public, message, wrong in [
        (two.public, b"message", signature),
        (one.public, b"messagf", signature),
        (one.public, b"message", signature[:-1]),
        (one.public, b"message", bytes(64)),
        (one.public, b"message", b""),
        (one.public[:-2], b"message", signature),
        ("zz" * 32, b"message", signature),
        ("00" * 32, b"message", bytes(64)),
    ]:
        with pytest.raises(BadSignatureError):
            verify(public, message, wrong)


def test_the_test_vector_of_rfc_8032():
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")

    identity = Identity(seed)

    assert identity.public == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert identity.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a")
