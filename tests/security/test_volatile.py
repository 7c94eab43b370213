"""Folders in memory vanish: when they are closed, when their process ends, and when it was killed, at the next one's start."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tether.errors import ConfigError, NoSpaceError, StoreError
from tether.security.volatile import SETTING, VolatileFolder, sweep

MAKER = """
import sys, time
from pathlib import Path
from tether.security.volatile import VolatileFolder
folder = VolatileFolder.create("test", Path(sys.argv[1]))
(folder.path / "inner").mkdir()
(folder.path / "inner" / "secret").write_bytes(b"plaintext")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory():
    """A folder of the tmpfs for one test."""
    base = Path("/dev/shm") / f"tether-test-{os.getpid()}-{os.urandom(4).hex()}"
    base.mkdir(mode=0o700)
    yield base
    subprocess.run(["rm", "-rf", base], check=True)


def other_process(base):
    child = subprocess.Popen([sys.executable, "-c", MAKER, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return child, Path(child.stdout.readline().strip())


def test_it_is_for_this_user_alone_and_gone_when_closed(memory):
    with VolatileFolder.create("test", memory) as folder:
        (folder.path / "secret").write_bytes(b"plaintext")
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder.path, folder.path.parent)}
        assert (modes, folder.path.name.startswith("test-")) == ({0o700}, True)
    folder.close()
    assert [path.name for path in folder.path.parent.iterdir()] == ["lock"]


def test_what_is_mapped_stays_readable_when_the_folder_is_gone(memory):
    with VolatileFolder.create("test", memory) as folder:
        (folder.path / "weights").write_bytes(b"plaintext")
        opened = (folder.path / "weights").open("rb")
    with opened:
        assert opened.read() == b"plaintext"


def test_it_goes_with_its_process(memory):
    child, path = other_process(memory)
    assert (path / "inner" / "secret").exists()
    child.communicate("")
    assert not path.exists()


def test_what_a_killed_process_left_goes_when_the_next_one_comes_and_the_living_keep_theirs(memory):
    living, kept = other_process(memory)
    killed, left = other_process(memory)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (left / "inner" / "secret").exists()
    with VolatileFolder.create("test", memory):
        assert (left.exists(), kept.exists()) == (False, True)
    assert sweep(memory) == 0
    living.communicate("")


def test_a_child_does_not_empty_what_is_its_parents(memory):
    with VolatileFolder.create("test", memory) as folder:
        sweeping = "import sys, pathlib, tether.security.volatile as volatile; volatile.sweep(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", sweeping, str(memory)], check=True)
        assert folder.path.exists()


def test_where_there_is_no_tmpfs_it_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=SETTING):
        VolatileFolder.create("test", tmp_path)
    monkeypatch.setenv(SETTING, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="tmpfs"):
        VolatileFolder.create("test")
    assert sweep() == 0


def test_the_setting_names_another_tmpfs(memory, monkeypatch):
    monkeypatch.setenv(SETTING, str(memory))
    with VolatileFolder.create("test") as folder:
        assert memory in folder.path.parents


def test_a_folder_that_others_can_enter_is_not_used(memory):
    (memory / f"tether-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="alone"):
        VolatileFolder.create("test", memory)


def test_full_memory_is_told_with_what_helps(memory):
    with VolatileFolder.create("test", memory) as folder:
        with pytest.raises(NoSpaceError, match="shm-size"), folder.errors():
            raise OSError(28, "No space left on device")
        with pytest.raises(NoSpaceError, match="shm-size"), folder.errors():
            raise NoSpaceError(f"no space to write {folder.path}/model, as the store says it")
        with pytest.raises(NoSpaceError, match="elsewhere"), folder.errors():
            raise NoSpaceError("no space to write elsewhere")
        with pytest.raises(StoreError, match=SETTING), folder.errors():
            raise OSError(5, "Input/output error")
