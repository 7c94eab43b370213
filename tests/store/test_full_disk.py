"""What was acknowledged survives a full disk, and reading goes on."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from store_models import LAB, files_in, files_of, publish

from tether.errors import NoSpaceError, StoreError
from tether.store import Repository
from tether.types import ModelRef

HERE = Path(__file__).parent
LIMIT = 700_000
"""Bytes a file: some of the packs fit."""
FILL = """
import json, sys, random, resource
from pathlib import Path
from store_models import LAB, files_in, files_of, publish
from tether.errors import NoSpaceError, StoreError
from tether.store import Repository
root, rounds, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
chance, published, refused = random.Random(18), {}, 0
with Repository.open(root, own=LAB.public) as repository:
    for seed in range(rounds):
        try:
            published[seed] = publish(repository, seed, files=files_of(seed, chance.randrange(2_000, 400_000))).digest
        except NoSpaceError as error:
            refused += 1
            assert "free some" in str(error)
        except StoreError:
            assert limit, "SQLite says no more of a limit on file sizes"
        if chance.random() < 0.2:
            repository.clear_staging()
    versions = repository.models()[0].versions
    assert [version.digest for version in versions] == list(published.values()), "acknowledged and stored differ"
    assert repository.verify().problems == ()
    for version in versions:
        assert len(repository.manifest(version.digest).arrays) == 7
        for array in repository.manifest(version.digest).arrays:
            repository.read_array(array, 0, array.nbytes)
with Repository.open(root) as repository:
    assert [version.digest for version in repository.models()[0].versions] == list(published.values())
    assert repository.verify().problems == ()
print(json.dumps([len(published), refused]))
"""


def fill(root, rounds, *before, limit=0):
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [*before, sys.executable, "-c", FILL, str(root), str(rounds), str(limit)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.strip("[]\n ").split(",")))


def test_publishing_into_a_tiny_file_system_loses_nothing(tmp_path):
    """A tmpfs of 4 MiB where the system lets this user mount one, else a limit on the size of each file."""
    mount = f'mount -t tmpfs -o size=4m none "{tmp_path}" && exec "$@"'
    own_namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*own_namespace, "true"], capture_output=True, check=False, timeout=30).returncode == 0:
        published, refused = fill(tmp_path / "store", 40, *own_namespace)
    else:
        published, refused = fill(tmp_path / "store", 40, limit=LIMIT)

    assert published > 0
    assert refused > 0


def test_a_limit_on_file_sizes_is_no_space_either(tmp_path):
    published, refused = fill(tmp_path / "store", 12, limit=LIMIT)

    assert published > 0
    assert refused > 0


@pytest.mark.parametrize("limit", [0, 1_000, 20_000, 60_000, 100_000, 150_000, 200_000])
def test_refused_at_any_size_a_publish_leaves_the_old_version_and_can_be_repeated(repository, limit):
    old = publish(repository, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises((NoSpaceError, StoreError)):
            publish(repository, 2, files=files_of(2, 100_000) | {"big": os.urandom(250_000)})
        assert repository.resolve(ModelRef("digits")).digest == old.digest
        assert repository.verify().problems == ()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert not list(repository.root.glob("packs/*.partial"))
    assert publish(repository, 2).version == 2


@pytest.mark.parametrize("call", ["fsync", "rename", "pwrite"])
def test_an_io_error_at_any_step_is_told_and_nothing_is_lost(repository, monkeypatch, call):
    """EIO at the n-th fsync, rename or write of a publish, for each n until it gets through."""
    old = publish(repository, 1)
    files = files_of(2)
    for number in range(1, 100):
        with monkeypatch.context() as patch:
            _fail_at(patch, call, number)
            published, told = _try_publish(repository, files)
        if published:
            break
        assert str(repository.root) in told
        assert repository.resolve(ModelRef("digits")).digest == old.digest
        assert repository.verify(ModelRef("digits")).problems == ()
        repository.clear_staging()
    assert number > 2
    assert published.created
    assert files_in(repository.checkout(published.digest)) == files
    assert repository.verify().problems == ()


def _try_publish(repository, files):
    try:
        return publish(repository, 2, files=files), ""
    except StoreError as error:
        return None, str(error)


def _fail_at(patch, call, number):
    left = [number]
    owner = Path if call == "rename" else os
    real = getattr(owner, call)

    def failing(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    patch.setattr(owner, call, failing)


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(tmp_path):
    (tmp_path / "store").write_bytes(b"a file is in the way")

    with pytest.raises(StoreError, match="store"):
        Repository.open(tmp_path / "store", own=LAB.public)
