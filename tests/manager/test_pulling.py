"""Another lab's models come in: whole, verified, looked at, named as its feed does; whatever peers and the process do meanwhile."""

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from peering_labs import INFO, MIB, example, model_bytes

from tether.errors import (
    BadModelError,
    ChunkMissingError,
    ConflictError,
    ForbiddenError,
    LockedModelError,
    MalformedFeedError,
    NoSpaceError,
    ServiceUnavailableError,
    UntrustedCodeError,
)
from tether.manager.peering import looking, pulling
from tether.manager.peering.pulling import Wish
from tether.security.volatile import SETTING
from tether.store import Manifest, Repository, signed_message
from tether.store.format.encrypted import ModelContext
from tether.swarm.feeds.entries import Content
from tether.types import ModelInfo, ModelRef


@pytest.fixture
async def pair(labs):
    publisher, puller = labs(1), labs(2)
    publisher.allow(puller)
    return publisher, puller


async def test_a_model_comes_with_its_numbers_and_aliases_and_is_read_here(pair):
    publisher, puller = pair
    await publisher.publish("net", {"net.onnx": model_bytes(1), ".tether/example.npz": example()}, tags={"n": "1"})
    await publisher.publish("net", {"net.onnx": model_bytes(2)}, aliases=["prod"])
    told = []
    records = await puller.pull(publisher, on_progress=lambda name, progress: told.append((name, progress)))
    assert [(each.version, each.name, each.tags) for each in records] == [
        (1, f"{publisher.key[:12]}~net", {"n": "1"}),
        (2, f"{publisher.key[:12]}~net", {}),
    ]
    assert puller.says() == publisher.says()
    record = puller.repository.resolve(ModelRef.parse(f"{publisher.key[:12]}/net@prod"))
    assert (puller.repository.checkout(record.digest) / "net.onnx").read_bytes() == model_bytes(2)
    assert not puller.repository.verify().problems
    fractions = [progress.fraction for _, progress in told]
    assert fractions == sorted(fractions)
    assert [told[-1][0], fractions[-1], told[-1][1].is_finished] == ["net", 1.0, True]
    assert not puller.pulling.coming


# --- what the catalog says


async def test_what_changed_at_the_publisher_changes_here_and_nothing_comes_twice(pair):
    publisher, puller = pair
    for number in (1, 2):
        publisher.give("net", {"net.onnx": model_bytes(number)}, alias=["prod"])
    await puller.pull(publisher)
    count, came = puller.repository.change_count(), puller.connections[publisher.key].got_nbytes
    await puller.pull(publisher)
    assert (puller.repository.change_count(), puller.connections[publisher.key].got_nbytes) == (count, came)
    publisher.repository.set_alias("net", "prod", 1)
    publisher.repository.delete_version("net", 2)
    await puller.pull(publisher)
    assert (
        puller.says() == publisher.says() == {"net": ({1: publisher.repository.models()[0].versions[0].digest}, {"prod": 1, "latest": 1})}
    )
    assert puller.connections[publisher.key].got_nbytes == came


async def test_of_several_versions_those_come_that_are_asked_for(pair):
    publisher, puller = pair
    given = [publisher.give("net", {"net.onnx": model_bytes(number)}) for number in (1, 2, 3)]
    wish = publisher.wish(digests=frozenset({given[1].digest}))
    (record,) = await puller.pulling.pull(wish, [publisher.key])
    assert (record.version, record.digest) == (2, given[1].digest)
    assert puller.says()["net"] == ({2: given[1].digest}, {"latest": 2})


async def test_a_model_that_fails_stops_no_other(pair):
    publisher, puller = pair
    publisher.give("broken", {"net.onnx": b"this is none" * 100})
    publisher.give("net", {"net.onnx": model_bytes()})
    with pytest.raises(BadModelError):
        await puller.pull(publisher)
    assert set(puller.says()) == {"net"}


async def test_a_number_that_was_given_twice_is_refused_before_a_byte_comes(pair):
    publisher, puller = pair
    publisher.give("net", {"net.onnx": model_bytes(1)})
    await puller.pull(publisher)
    came, before = puller.connections[publisher.key].got_nbytes, puller.says()
    wish = publisher.wish()
    other = msgspec.structs.replace(wish.content.models["net"].versions[1], digest="ab" * 32)
    model = msgspec.structs.replace(wish.content.models["net"], versions={1: other})
    with pytest.raises(ConflictError, match="net:1"):
        await puller.pulling.pull(Wish(publisher.key, Content({"net": model})), [publisher.key])
    assert (puller.connections[publisher.key].got_nbytes, puller.says()) == (came, before)


async def test_a_feed_that_speaks_of_another_size_than_the_manifest_is_not_believed(pair):
    publisher, puller = pair
    publisher.give("net", {"net.onnx": bytes(10 * MIB)})
    wish = publisher.wish()
    small = msgspec.structs.replace(wish.content.models["net"].versions[1], nbytes=1000)
    model = msgspec.structs.replace(wish.content.models["net"], versions={1: small})
    with pytest.raises(MalformedFeedError, match="1000 bytes"):
        await puller.pulling.pull(Wish(publisher.key, Content({"net": model})), [publisher.key])
    assert puller.connections[publisher.key].got_nbytes < MIB


# --- what may not come


async def test_code_comes_from_publishers_trusted_for_code_alone_and_else_not_a_byte_of_it(pair):
    publisher, puller = pair
    info = ModelInfo("custom", "custom", (), (), batched=False, pure=False, code=True)
    given = publisher.give("mine", {"model.py": b"class Model: ..."}, info)
    with pytest.raises(UntrustedCodeError, match=f"tether trust {publisher.key} --code"):
        await puller.pull(publisher)
    assert puller.repository.missing(publisher.repository.manifest(given.digest).blobs())
    puller.repository.trust(publisher.key, ["code"])
    (record,) = await puller.pull(publisher)
    assert (puller.repository.checkout(record.digest) / "model.py").read_bytes() == b"class Model: ..."


@pytest.fixture
def searches(monkeypatch):
    """Versions whose manifests were looked for at peers."""
    found, find = [], pulling.Finder.find

    async def noted(finder, digest, *arguments):
        found.append(digest)
        return await find(finder, digest, *arguments)

    monkeypatch.setattr(pulling.Finder, "find", noted)
    return found


async def test_what_was_refused_is_neither_fetched_nor_looked_at_again_until_a_person_asks(pair, searches, monkeypatch):
    publisher, puller = pair
    publisher.give("net", {"net.onnx": b"this is none" * 100})
    looked = []

    async def look(*arguments):
        looked.append(arguments)
        return await looking.look(*arguments)

    monkeypatch.setattr(pulling, "look", look)
    for _ in range(3):
        with pytest.raises(BadModelError, match="onnx"):
            await puller.pull(publisher)
    assert (len(looked), len(searches)) == (1, 1)
    publisher.give("net", {"net.onnx": model_bytes()})
    for name in ("", "other"):
        puller.pulling.forgive(publisher.key, name)
        with pytest.raises(BadModelError):
            await puller.pull(publisher)
        assert list(puller.says()["net"][0]) == [2], "another version of it comes all the same"
        assert len(looked) == 2
    puller.pulling.forgive(publisher.key, "net")
    with pytest.raises(BadModelError):
        await puller.pull(publisher)
    assert len(looked) == 3


async def test_code_that_was_refused_is_asked_for_again_when_its_publisher_is_trusted_otherwise(pair, searches):
    publisher, puller = pair
    publisher.give("mine", {"model.py": b"class Model: ..."}, ModelInfo("custom", "custom", (), (), batched=False, pure=False, code=True))
    for _ in range(3):
        with pytest.raises(UntrustedCodeError, match="tether trust"):
            await puller.pull(publisher)
    assert len(searches) == 1
    puller.repository.trust(publisher.key, ["code"])
    assert len(await puller.pull(publisher)) == 1


@pytest.mark.parametrize(("framework", "form", "code"), [("torch", "pt2", False), ("custom", "custom", False), ("onnx", "onnx", True)])
async def test_what_a_manifest_says_of_itself_in_two_ways_is_taken_as_code(pair, framework, form, code):
    publisher, puller = pair
    publisher.give("net", {"net.onnx": model_bytes()}, ModelInfo(framework, form, (), (), batched=False, pure=True, code=code))
    with pytest.raises(UntrustedCodeError):
        await puller.pull(publisher)


@pytest.mark.parametrize("files", [{"net.onnx": b"no model at all" * 50}, {"model.py": b"import os"}, {"weights.pt": b"PK\x03\x04" * 50}])
async def test_what_is_not_what_its_manifest_says_becomes_no_version_here(pair, files):
    publisher, puller = pair
    publisher.give("net", files)
    with pytest.raises(BadModelError):
        await puller.pull(publisher)
    assert puller.says() == {}
    assert not list((puller.folder / "pulling").iterdir())
    assert not [path for path in (puller.folder / "store" / "cache").iterdir() if len(path.name) == 64]


async def test_the_files_that_were_looked_at_are_those_that_a_worker_loads(pair, monkeypatch):
    publisher, puller = pair
    publisher.give("net", {"net.onnx": model_bytes(1)})
    (first,) = await puller.pull(publisher)
    looked_at = puller.folder / "store" / "cache" / first.digest / "net.onnx"
    inode = looked_at.stat().st_ino
    with Repository.open(puller.folder / "store", read_only=True) as reader:
        assert reader.checkout(first.digest) / looked_at.name == looked_at
    assert looked_at.stat().st_ino == inode, "it was not written once more"

    monkeypatch.setattr(looking, "default_nbytes", lambda _: 0)
    publisher.give("other", {"net.onnx": model_bytes(2)})
    await puller.pull(publisher)
    assert not [path for path in (puller.folder / "store" / "cache").iterdir() if len(path.name) == 64], "there is no room for them"


async def test_who_has_no_scope_gets_nothing(labs):
    publisher, puller = labs(1), labs(2)
    publisher.give("net", {"net.onnx": model_bytes()})
    publisher.allow(puller, scopes=["infer"])
    with pytest.raises(ForbiddenError, match="scope replicate"):
        await puller.pull(publisher)
    publisher.allow(puller, scopes=["replicate:other"])
    with pytest.raises(ChunkMissingError, match="scopes are not for this model"):
        await puller.pull(publisher)
    assert puller.connections[publisher.key].got_nbytes == 0


async def test_access_that_is_taken_away_ends_what_goes_on(pair):
    publisher, puller = pair
    publisher.nbytes_per_second = 20e6
    publisher.give("net", {"net.onnx": model_bytes(rows=8000)})
    pull = asyncio.create_task(puller.pull(publisher))
    await puller.until(lambda: publisher.key in puller.connections and puller.connections[publisher.key].got_nbytes > MIB)
    publisher.access.revoke(puller.key)
    with pytest.raises((ServiceUnavailableError, ChunkMissingError)):
        await pull
    assert puller.connections[publisher.key].got_nbytes < 12 * MIB
    assert puller.says() == {}


async def test_there_is_room_for_it_before_it_begins(pair, monkeypatch):
    publisher, puller = pair
    publisher.give("net", {"net.onnx": bytes(range(256)) * 4096})
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(NoSpaceError, match="net needs 1048576 bytes more"):
        await puller.pull(publisher)


# --- many peers, and what becomes of them


class Lying:
    """A shelf that gives other bytes."""

    def __init__(self, shelf):
        self._shelf = shelf
        self.asked = 0

    def __getattr__(self, name):
        return getattr(self._shelf, name)

    async def blob(self, digest):
        self.asked += 1
        data = await self._shelf.blob(digest)
        return data and bytes([data[0] ^ 1]) + data[1:]


async def copies(labs, rows=8000, count=2):
    """A publisher, others that have the model too, and one who wants it."""
    publisher, *others = (labs(number) for number in range(1, count + 2))
    puller = others.pop()
    publisher.allow(*others, puller)
    publisher.give("net", {"net.onnx": model_bytes(rows=rows)})
    for other in others:
        await other.pull(publisher)
        other.allow(puller)
    return publisher, others, puller


async def test_a_peer_that_gives_wrong_bytes_is_told_of_and_the_others_give_the_rest(labs):
    publisher, (liar,), puller = await copies(labs)
    liar.shelf_of = Lying
    await puller.pull(publisher, peers=[liar, publisher])
    assert puller.liars == [(liar.key, "wrong_bytes")]
    assert puller.says() == publisher.says()
    assert not puller.repository.verify().problems


async def test_wrong_bytes_from_the_only_peer_make_no_version(labs):
    publisher, (liar,), puller = await copies(labs)
    liar.shelf_of = Lying
    with pytest.raises(ServiceUnavailableError):
        await puller.pull(publisher, peers=[liar])
    assert (puller.says(), [peer for peer, _ in puller.liars]) == ({}, [liar.key])
    await puller.pull(publisher)
    assert puller.says() == publisher.says()


async def test_of_two_one_dies_half_way_and_the_other_gives_the_rest(labs):
    publisher, (dying,), puller = await copies(labs)
    for lab in (publisher, dying):
        lab.nbytes_per_second = 30e6
    pull = asyncio.create_task(puller.pull(publisher, peers=[dying, publisher]))
    await puller.until(lambda: dying.key in puller.connections and puller.connections[dying.key].got_nbytes > MIB)
    puller.unreachable.add(dying.key)
    puller.connections[dying.key].destroy()
    await pull
    assert puller.says() == publisher.says()
    assert puller.connections[publisher.key].got_nbytes > MIB
    assert puller.liars == []


async def test_a_connection_that_breaks_again_and_again_only_costs_time(pair):
    publisher, puller = pair
    publisher.nbytes_per_second = 100e6
    publisher.give("net", {"net.onnx": model_bytes(rows=16_000)})
    pull = asyncio.create_task(puller.pull(publisher))
    seen = set()
    while len(seen) < 3:
        await puller.until(
            lambda: pull.done() or ((now := puller.connections.get(publisher.key)) not in {None, *seen} and now.got_nbytes > 4.2 * MIB)
        )
        connection = puller.connections[publisher.key]
        seen.add(connection)
        connection.destroy()
    await pull
    assert puller.says() == publisher.says()
    assert sum(each.got_nbytes for each in (*seen, puller.connections[publisher.key])) < 3 * 25 * MIB


async def test_all_who_fetch_give_each_other_what_they_have(labs, measured):
    publisher, *pullers = (labs(number) for number in range(1, 5))
    publisher.allow(*pullers)
    publisher.nbytes_per_second = 20e6
    given = publisher.give("net", {"net.onnx": model_bytes(rows=20_000)})
    for lab in pullers:
        for other in pullers:
            lab.allow(other, scopes=[f"replicate:{publisher.key[:12]}~*"])
    await asyncio.gather(*(lab.pull(publisher, peers=[publisher, *(other for other in pullers if other is not lab)]) for lab in pullers))
    nbytes = sum(map(len, map(publisher.repository.read_blob, publisher.repository.manifest(given.digest).blobs())))
    sent = sum(each.given_nbytes for each in publisher.givers)
    measured(f"3 labs pull {nbytes / 1e6:.0f} MB at once: the publisher sends {sent / nbytes:.2f} copies")
    assert all(lab.says() == publisher.says() for lab in pullers)
    assert sent < 2 * nbytes


async def test_it_comes_when_the_publisher_is_away(labs):
    publisher, (holder,), puller = await copies(labs, rows=64)
    puller.unreachable.add(publisher.key)
    (record,) = await puller.pull(publisher, peers=[publisher, holder])
    assert record.publisher == publisher.key
    assert puller.says() == publisher.says()


async def test_who_can_be_asked_is_said_when_nobody_answers(pair):
    publisher, puller = pair
    publisher.give("net", {"net.onnx": model_bytes()})
    puller.unreachable.add(publisher.key)
    with pytest.raises(ServiceUnavailableError, match=publisher.key):
        await puller.pull(publisher)


async def test_of_a_manifest_that_two_labs_signed_the_one_counts_that_was_asked_for(labs):
    publisher, holder, puller = labs(1), labs(3), labs(2)
    files = {"net.onnx": model_bytes()}
    publisher.allow(puller)
    holder.allow(puller)
    publisher.give("net", files)
    holder.give("own", files)
    (record,) = await puller.pull(publisher, peers=[holder, publisher])
    assert (record.publisher, puller.liars) == (publisher.key, [])


# --- once, however often; and again


async def test_who_comes_second_is_told_and_has_it_and_nothing_comes_twice(pair):
    publisher, puller = pair
    publisher.nbytes_per_second = 50e6
    publisher.give("net", {"net.onnx": model_bytes(rows=8000)})
    told = [[], []]
    first, second = await asyncio.gather(
        *(puller.pull(publisher, on_progress=lambda _, progress, number=number: told[number].append(progress)) for number in range(2))
    )
    assert first == second
    assert puller.connections[publisher.key].got_nbytes < 14 * MIB
    for each in told:
        assert [progress.fraction for progress in each] == sorted(progress.fraction for progress in each)
        assert each[-1].is_finished
        assert len(each) > 2


async def test_one_who_waits_goes_on_where_the_first_was_cancelled(pair):
    publisher, puller = pair
    publisher.nbytes_per_second = 50e6
    publisher.give("net", {"net.onnx": model_bytes(rows=8000)})
    first, second = (asyncio.create_task(puller.pull(publisher)) for _ in range(2))
    await puller.until(lambda: publisher.key in puller.connections and puller.connections[publisher.key].got_nbytes > 5 * MIB)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert len(await second) == 1


async def test_what_came_before_it_was_cancelled_does_not_come_again(pair, labs):
    publisher, puller = pair
    publisher.nbytes_per_second = 50e6
    publisher.give("net", {"net.onnx": model_bytes(rows=16_000)})
    pull = asyncio.create_task(puller.pull(publisher))
    await puller.until(lambda: publisher.key in puller.connections and puller.connections[publisher.key].got_nbytes > 10 * MIB)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    puller.close()
    again = labs(2)
    (blobs,) = [publisher.repository.manifest(each.versions[0].digest).blobs() for each in publisher.repository.models()]
    lacking = again.repository.missing(blobs)
    assert 0 < len(lacking) <= len(blobs) - 2
    told = []
    await again.pull(publisher, on_progress=lambda _, progress: told.append(progress))
    assert told[0].fraction > 0
    assert again.connections[publisher.key].got_nbytes < (len(lacking) + 1) * 4 * MIB + MIB
    assert again.says() == publisher.says()


KILLED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from peering_labs import Lab, model_bytes
from tether.security.identity import Identity

async def main(root):
    network = {}
    publisher, puller = (Lab(root / f"lab-{n}", Identity(bytes([n]) * 32), network) for n in (1, 2))
    publisher.allow(puller)
    publisher.nbytes_per_second = 30e6
    publisher.give("net", {"net.onnx": model_bytes(rows=16_000)})
    await puller.pull(publisher, on_progress=lambda _, progress: print("came", progress.done, flush=True))

asyncio.run(main(Path(sys.argv[2])))
"""


async def test_a_process_that_is_killed_goes_on_where_it_was(tmp_path, labs):
    here = Path(__file__).parent
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, str(here), str(tmp_path), stdout=asyncio.subprocess.PIPE)
    async for line in child.stdout:
        if line.startswith(b"came ") and int(line[5:]) > 8 * MIB:
            break
    child.kill()
    await child.wait()
    publisher, puller = labs(1), labs(2)
    await puller.pull(publisher)
    assert puller.says() == publisher.says()
    assert puller.connections[publisher.key].got_nbytes < 25_600_000 - 7 * MIB


# --- encrypted


@pytest.fixture
def memory(monkeypatch):
    base = Path(tempfile.mkdtemp(prefix="tether-test-", dir="/dev/shm"))
    monkeypatch.setenv(SETTING, str(base))
    yield base
    shutil.rmtree(base)


@pytest.mark.usefixtures("memory")
async def test_an_encrypted_version_comes_as_it_is_and_is_passed_on_without_its_key(labs):
    publisher, holder, puller = labs(1), labs(3), labs(2)
    publisher.allow(holder, puller)
    holder.allow(puller)
    await publisher.publish("net", {"net.onnx": model_bytes()}, encrypt=True)
    await holder.pull(publisher)
    puller.unreachable.add(publisher.key)
    envelope = publisher.repository.keys.grant(ModelContext(publisher.key, "net"), puller.key)
    puller.repository.keys.accept(envelope, puller.identity)
    (record,) = await puller.pull(publisher, peers=[holder])
    with pytest.raises(LockedModelError):
        holder.repository.manifest(record.digest)
    assert (puller.repository.checkout(record.digest) / "net.onnx").read_bytes() == model_bytes()
    puller.repository.discard(record.digest)
    stored = [path.read_bytes() for path in (puller.folder).rglob("*") if path.is_file()]
    assert not any(model_bytes()[10_000:10_032] in data for data in stored)


@pytest.mark.usefixtures("memory")
async def test_an_encrypted_version_is_looked_at_by_those_who_can_open_it(labs):
    publisher, holder, puller = labs(1), labs(3), labs(2)
    publisher.allow(holder, puller)
    intake = publisher.publisher.sealing.intake("net")
    arrays = (intake.add_bytes("net.onnx", b"no model at all" * 50),)
    data = intake.finished(Manifest(framework="onnx", entry="net.onnx", info=INFO, arrays=arrays))
    publisher.repository.publish("net", data, publisher.key, publisher.identity.sign(signed_message(data)))
    puller.repository.keys.accept(publisher.repository.keys.grant(ModelContext(publisher.key, "net"), puller.key), puller.identity)
    assert len(await holder.pull(publisher)) == 1
    with pytest.raises(BadModelError):
        await puller.pull(publisher)
    assert puller.says() == {}
