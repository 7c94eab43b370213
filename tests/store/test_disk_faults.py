"""The disk refuses: once, at any call, or for good. The error says what to do, nothing is lost, reading goes on where the medium allows."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_models import LAB, files_in, files_of, publish

from tether.errors import ConflictError, NoSpaceError, StoreError
from tether.store import Repository
from tether.testing.requirements import needs
from tether.types import ModelRef

HERE = Path(__file__).parent
DIGITS = ModelRef("digits")


def script(name, *arguments, before=()):
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [*before, sys.executable, HERE / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs("strace")
@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("job", ["publish", "read"])
def test_row_18_whichever_call_the_system_fails_it_is_told_and_nothing_is_lost(tmp_path, chaos, measured, job):
    """ENOSPC, EIO, EMFILE, EROFS at one write, fsync, rename, open or read, by strace."""
    begun = time.monotonic()

    report = script("injecting.py", tmp_path, chaos.seed, chaos.count(1000, 20), job)

    assert report["flaws"] == []
    assert {"openat", "pread64", "read"} <= set(report["calls"])
    assert report["told"].keys() >= {"store_failed"}
    told = ", ".join(f"{number} {how}" for how, number in sorted(report["told"].items()))
    measured(f"faults injected into a {job}: {told} (of {report['possible']} possible)")
    chaos.record(18, f"{job}: {sum(report['told'].values())} calls failed ({told}), 0 lost", time.monotonic() - begun)


IN_A_NAMESPACE = ("unshare", "--mount", "--propagation", "private")


@needs("mounts")
@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_row_18_filled_to_the_last_byte_again_and_again(tmp_path, chaos, measured):
    """Publish until it is full, fill what is left with other files, read, delete, collect, publish: on an ext4 of 64 MiB."""
    begun = time.monotonic()

    report = script("filling.py", tmp_path, "fill", chaos.seed, chaos.count(50, 3), before=IN_A_NAMESPACE)

    assert report["refused"] >= report["passes"]
    assert report["published"] > report["passes"]
    measured(f"filled to 100 %: {report}")
    chaos.record(
        18, f"{report['passes']} passes to 100 %, {report['refused']} refused, {report['reads']} reads, 0 lost", time.monotonic() - begun
    )


@needs("mounts")
@pytest.mark.parametrize("fault", ["read_only", "no_inodes"])
def test_a_medium_that_takes_nothing_more_still_gives(tmp_path, fault):
    assert script("filling.py", tmp_path, fault, before=IN_A_NAMESPACE) == {"told": True}


def test_without_file_descriptors_it_is_told_and_works_again_with_them(repository):
    published = publish(repository, 1)
    files = files_of(2)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = 0
    for limit in range(3, 200):  # up from where not one is free
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            publish(repository, 2, files=files)
        except StoreError as error:
            refused += 1
            told = str(error)
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert "ulimit -n" in told
        assert repository.resolve(DIGITS).digest == published.digest

    assert refused
    assert files_in(repository.checkout(repository.resolve(DIGITS).digest)) == files
    assert repository.verify().problems == ()


def test_a_folder_deleted_under_a_store_is_told_by_every_method(repository):
    published = publish(repository, 1)
    manifest = repository.manifest(published.digest)
    array = next(array for array in manifest.arrays if array.nbytes)
    shutil.rmtree(repository.root)

    uses = [
        lambda: repository.manifest(published.digest),
        lambda: repository.checkout(published.digest),
        lambda: publish(repository, 2),
        lambda: Repository.open(repository.root, read_only=True),
    ]
    for use in uses:
        with pytest.raises(StoreError) as caught:
            use()
        assert str(repository.root) in str(caught.value) or published.digest in str(caught.value)
    assert answer(lambda: repository.read_array(array, 0, array.nbytes)) in {"whole", "chunk_missing"}, "an open pack may still give it"


def answer(read):
    try:
        return "whole" if read() else "nothing"
    except StoreError as error:
        return error.code


@pytest.mark.parametrize("lock", ["dead", "garbage", "empty", "folder"])
def test_a_stale_lock_file_is_no_lock(tmp_path, lock):
    with Repository.open(tmp_path, own=LAB.public) as repository:
        publish(repository, 1)
    path = tmp_path / "writer.lock"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True).stdout
    path.unlink()
    path.mkdir() if lock == "folder" else path.write_text({"dead": dead, "garbage": "\x00\xff no number", "empty": ""}[lock])

    if lock == "folder":
        with pytest.raises(StoreError, match=r"writer\.lock|refused"):
            Repository.open(tmp_path, own=LAB.public)
        return
    with Repository.open(tmp_path, own=LAB.public) as repository:
        assert publish(repository, 2).version == 2
        with pytest.raises(ConflictError, match=str(os.getpid())):
            Repository.open(tmp_path, own=LAB.public)


WITHOUT_ROOTS_RIGHTS = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all")
FORBIDDEN = """
import sys
from pathlib import Path
from store_models import LAB, files_in, files_of, publish
from tether.errors import StoreError
from tether.store import Repository
root, folder = Path(sys.argv[1]), sys.argv[2]
with Repository.open(root, own=LAB.public) as repository:
    digest = publish(repository, 1).digest
    repository.checkout(digest)
    (root / folder).chmod(0o500)
    try:
        try:
            publish(repository, 2)
        except StoreError as error:
            assert "make the data folder writable" in str(error) and folder in str(error), error
        else:
            raise SystemExit("published into a folder that may not be written")
        assert files_in(repository.checkout(digest)) == files_of(1)
        for array in repository.manifest(digest).arrays:
            repository.read_array(array, 0, array.nbytes)
        with Repository.open(root, read_only=True) as reader:
            assert files_in(reader.checkout(digest)) == files_of(1)
    finally:
        (root / folder).chmod(0o700)
    assert publish(repository, 2).version == 2
    assert repository.verify().problems == ()
print("true")
"""


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="needs setpriv: apt install util-linux")
@pytest.mark.parametrize("folder", ["packs", "manifests", "staging"])
def test_permissions_taken_away_are_named_with_what_to_do(tmp_path, folder):
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    before = WITHOUT_ROOTS_RIGHTS if os.geteuid() == 0 else ()
    command = [*before, sys.executable, "-c", FORBIDDEN, tmp_path / "store", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})

    assert (done.returncode, done.stdout) == (0, "true\n"), done.stderr


def test_an_unpublished_draft_is_given_up_for_space(repository):
    """What a full disk asks of the user can be done."""
    publish(repository, 1)
    repository.add_bytes("model.onnx", os.urandom(3_000_000))
    before = nbytes_on_disk(repository.root)

    repository.clear_staging()

    assert before - nbytes_on_disk(repository.root) >= 3_000_000
    with pytest.raises(NoSpaceError, match="free some"):
        _publish_within(repository, 1000)
    assert publish(repository, 3).version == 2


def nbytes_on_disk(root):
    return sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())


def _publish_within(repository, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        publish(repository, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
