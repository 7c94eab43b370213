"""Where a lab's files lie, and that nobody else of the machine can put theirs in the way."""

import os
import tempfile

import pytest

from tether.config import DataFolder
from tether.errors import ConfigError


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """The machine's folder for temporary files, with no session folder."""
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def mode(path):
    return path.stat().st_mode & 0o777


def test_the_folders_for_sockets_are_this_users_alone_whatever_the_umask(temp, tmp_path):
    before = os.umask(0)
    try:
        data = DataFolder(tmp_path / "data").create()
    finally:
        os.umask(before)
    assert data.runtime.parent == temp / f"tether-{os.getuid()}"
    assert {mode(data.runtime), mode(data.runtime.parent), mode(data.root), mode(data.keys)} == {0o700}
    assert data.create() is data


def test_a_link_where_the_shared_folder_belongs_is_refused(temp, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    (temp / f"tether-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="set TMPDIR"):
        DataFolder(tmp_path / "data").create()


def test_a_shared_folder_that_others_can_enter_is_refused(temp, tmp_path):
    shared = temp / f"tether-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o770)
    with pytest.raises(ConfigError, match="chmod 700"):
        DataFolder(tmp_path / "data").create()


def test_a_shared_folder_of_another_user_is_refused(temp, tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    shared = temp / "tether-0"
    shared.mkdir(mode=0o700)
    os.chown(shared, 65534, 65534)
    with pytest.raises(ConfigError, match="not a folder of this user"):
        DataFolder(tmp_path / "data").create()
