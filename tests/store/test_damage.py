"""No altered byte is ever handed out: seeded mutations of packs and manifests."""

import pytest
from store_models import LAB, files_in, files_of, publish, seeded

from tether.errors import ChunkAlteredError, ChunkMissingError
from tether.store import Repository
from tether.types import ModelRef

SEED = 15
MUTATIONS = 240
DIGITS = ModelRef("digits")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with one version of many blobs in one pack."""
    root = tmp_path_factory.mktemp("damage") / "store"
    with Repository.open(root, own=LAB.public) as repository:
        published = publish(repository, files={f"w{number}.bin": data for number, data in enumerate(_blobs())})
        yield repository, published.digest


def _blobs():
    chance = seeded(SEED)
    return [chance.randbytes(chance.randrange(100, 3000)) for _ in range(20)]


def _mutate(chance, data, spans):
    """One mutation of a pack's blobs; gives the new bytes and which blobs it hits."""
    at, nbytes = chance.choice(spans)
    match chance.choice(["flip", "zero", "swap", "truncate", "delete", "insert"]):
        case "flip":
            where = at + chance.randrange(nbytes)
            mutated = data[:where] + bytes([data[where] ^ (1 << chance.randrange(8))]) + data[where + 1 :]
        case "zero":
            mutated = data[:at] + bytes(nbytes) + data[at + nbytes :]
        case "swap":
            (at, nbytes), (other, more) = sorted(chance.sample(spans, 2))
            one, two = data[at : at + nbytes], data[other : other + more]
            mutated = data[:at] + two + data[at + nbytes : other] + one + data[other + more :]
        case "truncate":
            mutated = data[: at + chance.randrange(nbytes)]
        case "delete":
            mutated = data[:at] + data[at + nbytes :]
        case _:
            mutated = data[:at] + chance.randbytes(3) + data[at:]
    hit = {span for span in spans if mutated[span[0] : sum(span)] != data[span[0] : sum(span)]}
    return mutated, hit


def test_every_mutation_of_a_pack_is_detected_and_the_chunk_named(whole):
    repository, digest = whole
    chance = seeded(SEED)
    (pack,) = (repository.root / "packs").iterdir()
    original = pack.read_bytes()
    entries = {array.path: array for array in repository.manifest(digest).arrays}
    spans = {}
    for path, array in entries.items():
        location = repository._catalog.locate(array.segments[0].digest)
        spans[(location.offset, location.nbytes)] = path

    try:
        for _ in range(MUTATIONS):
            mutated, hit = _mutate(chance, original, sorted(spans))
            assert hit
            pack.write_bytes(mutated)
            damaged = {spans[span] for span in hit}
            for path, array in entries.items():
                if path in damaged:
                    with pytest.raises((ChunkAlteredError, ChunkMissingError)) as caught:
                        repository.read_array(array, 0, array.nbytes)
                    assert caught.value.args[1] == array.segments[0].digest
                    assert path in str(caught.value)
                else:
                    repository.read_array(array, 0, array.nbytes)
            problems = repository.verify(DIGITS).problems
            assert {problem.path.removeprefix("digits:1/") for problem in problems} == damaged
    finally:
        pack.write_bytes(original)
    assert repository.verify().problems == ()


def test_a_bare_name_means_all_versions_of_a_model(repository):
    first, second = publish(repository, 1), publish(repository, 2, alias=["prod"])
    assert first.digest != second.digest
    (only_first, *_) = set(repository.manifest(first.digest).blobs()) - set(repository.manifest(second.digest).blobs())
    location = repository._catalog.locate(only_first)
    pack = repository.root / "packs" / location.pack
    whole = pack.read_bytes()
    pack.write_bytes(whole[: location.offset] + bytes([whole[location.offset] ^ 1]) + whole[location.offset + 1 :])

    assert [problem.path.split("/")[0] for problem in repository.verify(ModelRef("digits")).problems] == ["digits:1"]
    assert repository.verify(ModelRef("digits", alias="prod")).problems == ()
    kept = whole[location.offset : location.offset + location.nbytes]
    assert repository.repair({only_first: kept}.get, ModelRef("digits")).repaired == (only_first,)
    assert repository.verify(ModelRef("digits")).problems == ()


def test_damage_never_reaches_a_checkout_or_an_export(whole, tmp_path):
    repository, digest = whole
    (pack,) = (repository.root / "packs").iterdir()
    original = pack.read_bytes()
    try:
        pack.write_bytes(original[:100] + b"!" + original[101:])

        with pytest.raises(ChunkAlteredError):
            repository.checkout(digest)
        with pytest.raises(ChunkAlteredError):
            repository.export(DIGITS, tmp_path / "out")
        assert list((repository.root / "cache").iterdir()) == []
        assert not (tmp_path / "out").exists()
    finally:
        pack.write_bytes(original)
    assert files_equal(repository.checkout(digest))
    repository.discard(digest)


def files_equal(folder):
    return all((folder / f"w{number}.bin").read_bytes() == data for number, data in enumerate(_blobs()))


def test_a_lost_pack_is_missing_chunks_and_verify_says_so(whole):
    repository, digest = whole
    (pack,) = (repository.root / "packs").iterdir()
    aside = pack.rename(repository.root / "aside")
    try:
        with pytest.raises(ChunkMissingError) as caught:
            repository.checkout(digest)
        assert caught.value.filename == "files/w0.bin"
        report = repository.verify()
        assert {problem.code for problem in report.problems} == {"chunk_missing"}
        assert len(report.problems) == len(_blobs())
    finally:
        aside.rename(pack)


def test_a_blob_that_no_pack_holds_is_missing(repository):
    for digest in ("00" * 32, "nonsense"):
        with pytest.raises(ChunkMissingError):
            repository.read_blob(digest)
        with pytest.raises(ChunkMissingError):
            repository.manifest(digest)


def test_every_mutation_of_a_manifest_is_detected(whole):
    repository, digest = whole
    path = repository.root / "manifests" / digest
    original = path.read_bytes()
    chance = seeded(SEED)
    try:
        for _ in range(50):
            where = chance.randrange(len(original))
            path.write_bytes(original[:where] + bytes([original[where] ^ 1]) + original[where + 1 :])
            with pytest.raises(ChunkAlteredError):
                repository.manifest(digest)
        assert [problem.code for problem in repository.verify(DIGITS).problems] == ["chunk_altered"]
        path.unlink()
        with pytest.raises(ChunkMissingError):
            repository.manifest(digest)
        assert [problem.code for problem in repository.verify(DIGITS).problems] == ["chunk_missing"]
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("damage", ["cut", "index flipped", "footer flipped", "empty", "renamed", "huge count"])
def test_a_pack_with_a_broken_index_is_reported_and_not_adopted(tmp_path, damage):
    with Repository.open(tmp_path / "store") as repository:
        publish(repository, 1)
    (pack,) = (tmp_path / "store/packs").iterdir()
    data = pack.read_bytes()
    broken = {
        "cut": data[:-1],
        "index flipped": data[:-70] + bytes([data[-70] ^ 1]) + data[-69:],
        "footer flipped": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
        "empty": b"",
        "renamed": data,
        "huge count": data[:-48] + b"\xff" * 8 + data[-40:],
    }[damage]
    other = pack.with_name("ab" * 32 + ".pack")
    other.write_bytes(broken)

    with Repository.open(tmp_path / "store") as repository:
        assert [(problem.path, problem.code) for problem in repository.verify().problems] == [(other.name, "store_failed")]
        assert repository.rebuild_index() == 1
        assert repository.verify(DIGITS).problems == ()


def test_publishing_the_files_again_heals_what_was_damaged(repository):
    published = publish(repository, 1)
    publish(repository, 2)
    for pack in (repository.root / "packs").iterdir():
        data = pack.read_bytes()
        pack.write_bytes(data[:100] + b"?" + data[101:])
    (repository.root / "manifests" / published.digest).write_bytes(b"{}")
    assert len(repository.verify().problems) > 1

    again = publish(repository, 1, alias=["prod"])

    assert (again.version, again.created) == (1, False)
    assert files_in(repository.checkout(published.digest)) == files_of(1)
    assert repository.verify(ModelRef("digits", version=1)).problems == ()
    repository.rebuild_index()
    assert repository.verify(ModelRef("digits", version=1)).problems == ()
