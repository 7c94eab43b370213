"""A writer whose lock file was deleted or replaced writes no more: there are never two."""

import fcntl
import os
from contextlib import ExitStack

import pytest
from collecting import DAY, Clock, content, files_of_version, opened, publish_files
from store_models import publish, seeded

from tether.errors import ConflictError, LockLostError, StoreError
from tether.store import BLOB_NBYTES, digest_of
from tether.store.collecting.collector import Collector
from tether.store.index.catalog import Catalog
from tether.store.packing.writer_lock import WriterLock


def delete(path):
    path.unlink()


def replace(path):
    other = path.with_name("other")
    other.write_text("restored from a backup\n")
    other.replace(path)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.mark.parametrize("lose", [delete, replace])
def test_who_lost_its_lock_refuses_to_write_and_the_next_writer_has_all_that_was_acknowledged(root, lose):
    with opened(root, Clock()) as first:
        publish(first, 1)
        lose(root / "writer.lock")
        calls = (
            lambda: publish(first, 2),
            lambda: first.put_blob(digest_of(b"x"), b"x"),
            lambda: first.set_alias("digits", "prod", 1),
            lambda: first.delete_version("digits", 1),
            first.gc,
            first.rebuild_index,
            first.footing,
        )
        with opened(root, Clock()) as second:
            for call in calls:
                with pytest.raises(LockLostError, match="deleted or replaced while process"):
                    call()
            assert first.verify().problems == ()  # reading goes on
            assert [version.version for version in second.models()[0].versions] == [1]
            assert publish(second, 2).version == 2
            first.close()
            with pytest.raises(ConflictError, match="already writes"):  # closing the first did not give up the second's
                opened(root, Clock())
            assert publish(second, 3).version == 3
            assert second.verify().problems == ()


@pytest.mark.parametrize("step", ["_write_manifest", "_seal"])
def test_a_lock_that_is_lost_in_the_middle_of_a_publish_is_noticed_before_it_is_committed(root, monkeypatch, step):
    first = opened(root, Clock())
    publish(first, 1)
    original, others = getattr(first, step), []

    def interrupted(*arguments):
        done = original(*arguments)
        if not others:
            (root / "writer.lock").unlink()
            others.append(opened(root, Clock()))
        return done

    monkeypatch.setattr(first, step, interrupted)
    with pytest.raises(LockLostError):
        publish(first, 2)
    (second,) = others
    with second:
        assert len(second.models()[0].versions) == 1
        assert publish(second, 2).version == 2
        assert second.verify().problems == ()
        first.close()


def test_a_lock_that_is_lost_while_a_large_file_is_added_stops_the_adding(root, tmp_path, monkeypatch):
    (tmp_path / "model").write_bytes(seeded("large").randbytes(10 * BLOB_NBYTES))
    with opened(root, Clock()) as first:
        reserve = first._staging.reserve

        def lose(*arguments):
            (root / "writer.lock").unlink(missing_ok=True)
            return reserve(*arguments)

        monkeypatch.setattr(first._staging, "reserve", lose)
        with pytest.raises(LockLostError):
            first.add_files(tmp_path / "model")


def at_once(monkeypatch, before, name, deed):
    """Let a first call of `before.name` find that `deed` was done just before."""
    original, done = getattr(before, name), []

    def late(*arguments, **options):
        if not done:
            done.append(True)
            deed()
        return original(*arguments, **options)

    monkeypatch.setattr(before, name, late)


def test_a_collection_that_lost_its_lock_deletes_no_manifest_that_the_next_writer_is_about_to_name(root, monkeypatch):
    clock, files = Clock(), {"a": content("a")}
    with opened(root, clock) as first, ExitStack() as stack:
        publish_files(first, files)
        publish_files(first, {"b": content("b")})
        first.delete_version("digits", 1)
        clock.advance(2 * DAY)
        marked, collector, published = first._collector.mark(DAY), first._collector, []
        assert marked.plan.manifests
        deleting = collector._delete_manifests

        def late():
            with pytest.raises(LockLostError):
                deleting(marked)

        def in_between(_):
            (root / "writer.lock").unlink()
            second = stack.enter_context(opened(root, clock))
            at_once(monkeypatch, second._catalog, "add_version", late)  # when the manifest is written, and not yet a version's
            published.append((second, publish_files(second, files).version))
            return deleting(marked)

        monkeypatch.setattr(collector, "_delete_manifests", in_between)
        with pytest.raises(LockLostError):
            collector.sweep(marked)
        ((second, version),) = published
        assert files_of_version(second, "digits", version) == files
        assert second.verify().problems == ()


def test_a_rewrite_that_lost_its_lock_deletes_no_pack_that_the_next_writer_is_about_to_enter(root, monkeypatch):
    clock, kept, gone = Clock(), {"a": content("a")}, {"b": content("b", 50_000)}
    with opened(root, clock) as first, ExitStack() as stack:
        publish_files(first, kept | gone)
        publish_files(first, kept)
        first.delete_version("digits", 1)
        clock.advance(2 * DAY)
        withdraw, others = Collector._withdraw, []

        def in_between(collector, copy):
            def late():
                with pytest.raises(LockLostError):
                    withdraw(collector, copy)

            at_once(monkeypatch, Catalog, "add_packs", late)
            others.append(stack.enter_context(opened(root, clock)))
            return withdraw(collector, copy)

        monkeypatch.setattr(Collector, "_withdraw", in_between)
        at_once(monkeypatch, first._collector, "_commit_copy", (root / "writer.lock").unlink)
        with pytest.raises(LockLostError):
            first.gc()
        (second,) = others
        assert files_of_version(second, "digits", 2) == kept
        assert second.verify().problems == ()


def test_of_two_who_open_while_the_file_is_replaced_one_gets_it(root, monkeypatch):
    root.mkdir()
    flock, seen = fcntl.flock, []

    def late(file, how):
        if not seen:
            seen.append(file)
            replace(root / "writer.lock")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = WriterLock.take(root / "writer.lock")
    lock.check()
    assert (root / "writer.lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(ConflictError, match=f"process {os.getpid()} already writes"):
        WriterLock.take(root / "writer.lock")
    lock.release()
    lock.release()

    monkeypatch.setattr(fcntl, "flock", lambda file, how: (replace(root / "writer.lock"), flock(file, how)))
    with pytest.raises(ConflictError, match="again and again"):
        WriterLock.take(root / "writer.lock")


def test_who_could_not_look_at_its_new_lock_gives_it_up(root, monkeypatch):
    root.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output error") as kept:  # and with it all that it held
            WriterLock.take(root / "writer.lock")
    WriterLock.take(root / "writer.lock").release()
    assert kept.value.errno == 5


def test_a_store_that_was_moved_away_is_written_no_more_and_whole_where_it_is(root):
    first = opened(root, Clock())
    published = publish(first, 1)
    root.rename(root.with_name("moved"))
    with pytest.raises(StoreError, match="No such file"):
        publish(first, 2)
    first.close()
    assert not root.exists()
    with opened(root.with_name("moved"), Clock()) as moved:
        assert moved.models()[0].versions[0].digest == published.digest


def test_a_lock_that_can_not_be_looked_at_is_an_error_of_the_disk(root, monkeypatch):
    with opened(root, Clock()) as first:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            with pytest.raises(StoreError, match="Input/output error"):
                first.put_blob(digest_of(b"x"), b"x")
        assert publish(first, 1).version == 1
