"""Files that come while somebody reads them: one tells how far they are, others wait, and a folder that is moved keeps its name."""

import threading

import pytest

from tether.runtimes.arrivals import Arrivals

PROMPT = 10.0


def in_thread(work):
    """Its answer, or its error, when it is joined."""
    got = []

    def run():
        try:
            got.append(work())
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def joined():
        thread.join(PROMPT)
        assert not thread.is_alive(), "it still waits"
        return got[0]

    return joined


def test_who_waits_for_bytes_goes_on_when_they_are_there():
    arrivals = Arrivals()
    arrivals.grew("a", 10)
    arrivals.wait("a", 10)
    answer = in_thread(lambda: arrivals.wait("a", 11))
    arrivals.grew("b", 100)
    arrivals.grew("a", 11)
    assert answer() is None


def test_at_the_end_nobody_waits():
    arrivals = Arrivals()
    waiting = [in_thread(lambda: arrivals.wait("a", 1)), in_thread(arrivals.wait_whole)]
    arrivals.finish()
    assert [joined() for joined in waiting] == [None, None]
    Arrivals(whole=True).wait("anything", 5)


def test_what_went_wrong_is_told_to_all_who_wait():
    arrivals = Arrivals()
    waiting = [in_thread(lambda: arrivals.wait("a", 1)), in_thread(arrivals.wait_whole), in_thread(lambda: list(arrivals.changes()))]
    arrivals.fail(LookupError("gone"))
    assert [str(joined()) for joined in waiting] == ["gone"] * 3
    with pytest.raises(LookupError):
        arrivals.wait("b", 1)


def test_changes_come_together_where_nobody_asked_in_between(tmp_path):
    arrivals = Arrivals()
    arrivals.begun(tmp_path)
    for nbytes in range(1, 6):
        arrivals.grew("a", nbytes)
    arrivals.grew("b", 1)
    changes = arrivals.changes()
    assert next(changes) == (tmp_path, {"a": 5, "b": 1})
    arrivals.grew("b", 2)
    assert next(changes) == (tmp_path, {"b": 2})
    arrivals.finish()
    assert list(changes) == []


def test_a_folder_that_is_renamed_under_its_reader_is_still_read(tmp_path):
    coming, there = tmp_path / "coming", tmp_path / "there"
    coming.mkdir()
    (coming / "a").write_bytes(b"a")
    (coming / "b").write_bytes(b"b")
    arrivals = Arrivals()
    arrivals.begun(coming)
    answer = in_thread(arrivals.finish)  # where folders keep no names, who reads waits for this
    with arrivals.folder(there) as folder:
        coming.rename(there)
        answer()
        assert [(folder / name).read_bytes() for name in "ab"] == [b"a", b"b"] or folder == there


def test_a_folder_that_was_renamed_before_is_found_where_it_is(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_bytes(b"a")
    arrivals = Arrivals()
    arrivals.begun(tmp_path / "coming")
    answer = in_thread(lambda: _content(arrivals, tmp_path / "there"))
    arrivals.finish()
    assert answer() == b"a"


def _content(arrivals, path):
    with arrivals.folder(path) as folder:
        return (folder / "a").read_bytes()
