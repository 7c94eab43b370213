import asyncio
import os

import pytest
from blake3 import blake3

from tether.client.publishing import Source, cut_file, draft, model_sources, publish_draft
from tether.errors import BadModelError, MissingBlobsError, NoModelFileError, RemoteError

MIB = 1 << 20


def test_a_file_is_its_own_entry(tmp_path):
    (tmp_path / "digits.onnx").write_bytes(b"m")
    entry, sources = model_sources(tmp_path / "digits.onnx")
    assert (entry, [source.path for source in sources]) == ("digits.onnx", ["digits.onnx"])


def test_a_folder_keeps_its_relative_paths_and_leaves_litter_behind(tmp_path):
    for name in (
        "saved_model.pb",
        "variables/v.index",
        "empty/__init__.py",
        "__pycache__/m.pyc",
        ".git/HEAD",
        "a/.DS_Store",
        ".tether/expected.npz",
        ".tether/signature.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.endswith("init__.py") else b"x")
    entry, sources = model_sources(tmp_path)
    assert (entry, [source.path for source in sources]) == (
        "",
        [".tether/signature.json", "empty/__init__.py", "saved_model.pb", "variables/v.index"],
    )


def test_what_is_not_there_or_empty_is_no_model(tmp_path):
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for path, words in (("nope.onnx", "no file or folder"), ("empty.onnx", "is empty"), ("folder", "holds no bytes")):
        with pytest.raises(NoModelFileError, match=words):
            model_sources(tmp_path / path)


def test_links_and_devices_are_refused_wherever_they_are(tmp_path):
    (tmp_path / "real.onnx").write_bytes(b"m")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real.onnx")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "passwords").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe.onnx")
    for path, words in (("link.onnx", "symbolic link"), ("folder", "symbolic link"), ("pipe.onnx", "not a regular file")):
        with pytest.raises(BadModelError, match=words):
            model_sources(tmp_path / path)


def test_a_name_that_a_version_can_not_hold_is_refused_with_its_reason(tmp_path):
    (tmp_path / "a\\b").write_bytes(b"m")
    with pytest.raises(BadModelError, match="backslash; rename it"):
        model_sources(tmp_path)


def test_a_file_is_cut_every_4_mib_from_its_start(tmp_path):
    data = bytes(4 * MIB) + b"tail"
    (tmp_path / "m").write_bytes(data)
    for content in (tmp_path / "m", data):
        file = cut_file(Source("m", content))
        assert file.as_json() == {
            "path": "m",
            "nbytes": len(data),
            "segments": [[blake3(bytes(4 * MIB)).hexdigest(), 0, 4 * MIB], [blake3(b"tail").hexdigest(), 0, 4]],
        }
        assert file.blobs[1].read() == b"tail"


def test_a_file_that_changes_after_it_was_cut_is_not_sent(tmp_path):
    (tmp_path / "m").write_bytes(b"before")
    blob = cut_file(Source("m", tmp_path / "m")).blobs[0]
    (tmp_path / "m").write_bytes(b"after!")
    with pytest.raises(NoModelFileError, match="changed while"):
        blob.read()
    (tmp_path / "m").unlink()
    with pytest.raises(NoModelFileError, match="can't be read"):
        blob.read()


def drafted(*contents: bytes):
    files = [cut_file(Source(f"f{index}", content)) for index, content in enumerate(contents)]
    return draft(files, "", framework=None, aliases=[], tags={}), files


async def test_only_what_is_missing_is_sent(client, gateway):
    body, files = drafted(b"one", b"two", b"two")
    gateway.blobs[blake3(b"one").hexdigest()] = b"one"
    assert (await publish_draft(client, "m", body, files))["created"] is True
    assert [call.split("/")[-1] for call in gateway.calls if call.startswith("PUT")] == [blake3(b"two").hexdigest()]


async def test_publishing_what_is_there_takes_one_round_trip(client, gateway):
    body, files = drafted(b"one")
    await publish_draft(client, "m", body, files)
    gateway.calls.clear()
    assert (await publish_draft(client, "m", body, files))["created"] is False
    assert gateway.calls == ["POST /tether/v1/models/m/versions"]


async def test_an_upload_that_broke_off_is_resumed_where_it_stopped(client, gateway, monkeypatch):
    contents = [bytes([index]) * 10 for index in range(20)]
    body, files = drafted(*contents)
    put, left, one_at_a_time = client.put_blob, iter(range(7)), asyncio.Lock()

    async def failing(digest, data, _encrypt=None):
        async with one_at_a_time:  # so that nothing is on its way when it breaks off
            if next(left, None) is None:
                raise ConnectionResetError
            await put(digest, data)

    monkeypatch.setattr(client, "put_blob", failing)
    with pytest.raises(ConnectionResetError):
        await publish_draft(client, "m", body, files)
    monkeypatch.undo()
    assert len(gateway.blobs) == 7
    gateway.calls.clear()
    await publish_draft(client, "m", body, files)
    assert sum(call.startswith("PUT") for call in gateway.calls) == 13


class Greedy:
    """A gateway that asks for blobs without end, or for others."""

    def __init__(self, *digests: str) -> None:
        self.digests = digests
        self.sent = 0

    async def put_blob(self, _digest, _data, _encrypt=None):
        self.sent += 1

    async def publish(self, _name, _draft):
        raise MissingBlobsError("missing", list(self.digests))


async def test_a_gateway_that_asks_for_other_blobs_gets_none():
    body, files = drafted(b"one")
    gateway = Greedy(blake3(b"one").hexdigest(), "f" * 64)
    with pytest.raises(RemoteError, match="not part of this model"):
        await publish_draft(gateway, "m", body, files)
    assert gateway.sent == 0


async def test_a_gateway_that_asks_again_and_again_is_given_up():
    body, files = drafted(b"one")
    with pytest.raises(RemoteError, match="keeps asking"):
        await publish_draft(Greedy(blake3(b"one").hexdigest()), "m", body, files)


async def test_a_draft_to_be_encrypted_sends_its_blobs_to_be_encrypted():
    body, files = drafted(b"one", b"two")
    sent = []

    class Lab:
        async def put_blob(self, digest, data, encrypt=None):
            sent.append((digest, data, encrypt))

        async def publish(self, _name, draft):
            if len(sent) < 2:
                raise MissingBlobsError("missing", [digest for file in draft["files"] for digest, _, _ in file["segments"]])
            return {"version": 1}

    await publish_draft(Lab(), "m", body | {"encrypt": True}, files)
    assert sorted((data, encrypt) for _, data, encrypt in sent) == [(b"one", "m"), (b"two", "m")]
    sent.clear()
    await publish_draft(Lab(), "m", body | {"encrypt": False}, files)
    assert {encrypt for *_, encrypt in sent} == {None}
    assert "encrypt" not in draft(files, "", framework=None, aliases=[], tags={})
