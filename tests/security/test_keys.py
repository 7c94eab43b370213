"""The lab's first API key: whole or not at all, and nobody else's to read."""

import threading

import pytest

from tether.errors import ConfigError, StoreError
from tether.security.keys import ensure_api_key


def test_the_key_is_made_once_and_private(tmp_path):
    path = tmp_path / "api-key"
    ensure_api_key(path)
    first = path.read_text()
    ensure_api_key(path)
    assert path.read_text() == first
    assert first.startswith("tk_")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["api-key"]


@pytest.mark.parametrize(
    "text", ["", "\n", "tk_", "tk_short\n", "nk_" + "a" * 43, "tk_" + "a" * 42 + "!", "tk_" + "a" * 43 + "\nmore\n", "\udcff"]
)
def test_a_file_without_a_whole_key_is_refused_with_what_to_do(tmp_path, text):
    path = tmp_path / "api-key"
    path.write_bytes(text.encode(errors="surrogateescape"))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="delete it"):
        ensure_api_key(path)


def test_a_key_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "api-key"
    ensure_api_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        ensure_api_key(path)


def test_many_that_make_it_at_once_agree(tmp_path):
    path, seen, start = tmp_path / "api-key", [], threading.Barrier(8)

    def make():
        start.wait()
        ensure_api_key(path)
        seen.append(path.read_text())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len(set(seen)) == 1


def test_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path):
    with pytest.raises(StoreError, match="mend the folder"):
        ensure_api_key(tmp_path / "missing" / "api-key")
