"""A small store that is made once and restored for each case, and seeded damage to all that it keeps."""

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from store_models import COLLEAGUE, INFO, LAB, seeded

from tether import store
from tether.errors import NotFoundError
from tether.store import Repository
from tether.store.format.layout import Piece
from tether.store.format.manifest import Manifest
from tether.store.format.weights import tensor_arrays
from tether.store.packing.pack_files import scan
from tether.store.sealing import Intake, PlainIntake, Sealing
from tether.types import ModelRef, StoredTensor

REFS = ("digits", "digits:1", "digits:2", "digits@prod", "alice/texts", "digits@old", "secret")
PAGE = 4096


def tensors(chance: random.Random, shift: int) -> tuple[bytes, list[StoredTensor]]:
    """A file of tensors, and where they lie; half of them are the same for every `shift`."""
    header, data, found = chance.randbytes(64 * (1 + shift)), b"", []
    for number in range(6):
        values = seeded(number if number % 2 else 100 * shift + number).randbytes(4 * (700 if number < 4 else 17_000))
        found.append(StoredTensor(f"layer{number}.weight", "float32", (len(values) // 4,), "w.bin", len(header) + len(data), len(values)))
        data += values
    return header + data, found


@dataclass
class Golden:
    """A whole store: its files, and what each reference gives."""

    root: Path
    files: dict[str, bytes] = field(default_factory=dict)
    older: dict[str, bytes] = field(default_factory=dict)
    """Its files before the last version was published."""
    manifests: dict[str, bytes] = field(default_factory=dict)
    opened: dict[str, Manifest] = field(default_factory=dict)
    """The same, as readers see them: of the encrypted version the true one."""
    contents: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tensors: dict[str, dict[str, bytes]] = field(default_factory=dict)
    meanings: dict[str, set[str]] = field(default_factory=dict)
    """Reference → the digests that it may mean: of the store as it is, and as it was before."""
    draft: tuple[bytes, bytes] = (b"", b"")
    """Manifest and signature of a version whose blobs are staged."""

    def restore(self) -> None:
        """As it was."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write(self.root, self.files)
        for name in ("packs", "staging", "manifests", "cache"):
            (self.root / name).mkdir(exist_ok=True)


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def make(root: Path) -> Golden:
    golden = Golden(root)
    with Repository.open(root, own=LAB.public) as repository:
        repository.name_publisher(COLLEAGUE.public, "alice")
        _publish(golden, repository, "digits", 0, alias=["prod", "old"])
        _publish(golden, repository, "texts", 2, by=COLLEAGUE)
        _remember(golden, repository)
    golden.older = snapshot(root)
    with Repository.open(root, own=LAB.public) as repository:
        _publish(golden, repository, "digits", 1, alias=["prod"])
        _publish(golden, repository, "secret", 4, intake=Sealing(repository, LAB.public).intake("secret"))
        _remember(golden, repository)
        golden.opened = {digest: repository.manifest(digest) for digest in golden.manifests}
        for digest in golden.manifests:
            repository.checkout(digest)
        golden.draft = _stage(golden, repository)
    golden.files = snapshot(root)
    return golden


def _remember(golden: Golden, repository: Repository) -> None:
    for ref in REFS:
        try:
            golden.meanings.setdefault(ref, set()).add(repository.resolve(ModelRef.parse(ref)).digest)
        except NotFoundError:
            continue


def _publish(golden: Golden, repository: Repository, name: str, seed: int, *, by=LAB, intake: Intake | None = None, **options) -> None:
    data, files, raw = _manifest(repository, seed, intake or PlainIntake(repository))
    published = repository.publish(name, data, by.public, by.sign(store.signed_message(data)), **options)
    golden.manifests[published.digest] = data
    golden.contents[published.digest] = files
    golden.tensors[published.digest] = raw


def _manifest(repository: Repository, seed: int, intake: Intake) -> tuple[bytes, dict[str, bytes], dict[str, bytes]]:
    chance = seeded(seed)
    weights, stored = tensors(chance, seed)
    files = {"model.onnx": chance.randbytes(3_000), "w.bin": weights, "same.bin": seeded(-1).randbytes(9_000), ".tether/x.npz": b"x" * 50}
    source = repository.root.with_name("source")
    shutil.rmtree(source, ignore_errors=True)
    write(source, {name: data for name, data in files.items() if not name.startswith(".")})
    ranges = {"w.bin": [Piece(tensor.offset, tensor.nbytes) for tensor in stored]}
    arrays = [intake.add_file(source / name, name, ranges.get(name, ())) for name in files if not name.startswith(".")]
    arrays += [intake.add_bytes(".tether/x.npz", files[".tether/x.npz"]), *tensor_arrays(arrays, stored)]
    manifest = Manifest(framework="onnx", entry="model.onnx", info=INFO, arrays=tuple(arrays), attributes={"seed": seed})
    raw = {tensor.name: weights[tensor.offset : tensor.offset + tensor.nbytes] for tensor in stored}
    return intake.finished(manifest), files, raw


def _stage(golden: Golden, repository: Repository) -> tuple[bytes, bytes]:
    data, files, raw = _manifest(repository, 3, PlainIntake(repository))
    digest = store.digest_of(data)
    golden.manifests[digest], golden.contents[digest], golden.tensors[digest] = data, files, raw
    return data, LAB.sign(store.signed_message(data))


def snapshot(root: Path) -> dict[str, bytes]:
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for name in ("writer.lock", "reserve"):  # the one is empty of meaning, the other of all
        found.pop(name, None)
    return found


# --- damage


def mutate(chance: random.Random, golden: Golden) -> str:
    """One mutation of the store in its folder; says what was done."""
    return chance.choices([_mutate_file, _swap_files, _swap_blobs, _replay, _forge_manifest, _edit_catalog], (10, 1, 2, 2, 2, 4))[0](
        chance, golden
    )


def _name(chance: random.Random, golden: Golden) -> str:
    """Of a file: a kind of file first, for there are many in the cache."""
    kinds: dict[str, list[str]] = {}
    for name in golden.files:
        kinds.setdefault(name.partition("/")[0], []).append(name)
    return chance.choice(sorted(kinds[chance.choice([*sorted(kinds), "packs", "packs", "catalog.sqlite"])]))


def _mutate_file(chance: random.Random, golden: Golden) -> str:
    name = _name(chance, golden)
    kind = chance.choice(["flip", "flip", "zero", "truncate", "delete", "append", "insert", "cut", "folder"])
    path, data = golden.root / name, golden.files[name]
    at = chance.randrange(len(data)) if data else 0
    path.unlink()
    match kind:
        case "flip" if data:
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
        case "zero":
            at -= at % PAGE
            path.write_bytes(data[:at] + bytes(min(PAGE, len(data) - at)) + data[at + PAGE :])
        case "truncate":
            path.write_bytes(data[:at])
        case "append":
            path.write_bytes(data + chance.randbytes(chance.choice([1, 44, 56, PAGE])))
        case "insert":
            path.write_bytes(data[:at] + chance.randbytes(chance.choice([1, 64])) + data[at:])
        case "cut":
            path.write_bytes(data[:at] + data[at + chance.choice([1, 64]) :])
        case "folder":
            path.mkdir()
    return f"{kind} {name} at {at}"


def _swap_files(chance: random.Random, golden: Golden) -> str:
    name = _name(chance, golden)
    others = [other for other in golden.files if other != name and other.partition("/")[0] == name.partition("/")[0]]
    other = chance.choice(sorted(others or golden.files))
    write(golden.root, {name: golden.files[other], other: golden.files[name]})
    return f"swap {name} and {other}"


def _swap_blobs(chance: random.Random, golden: Golden) -> str:
    """Of one size or not, of one pack or of two; what lies behind moves, as it would if someone put them there."""
    name = chance.choice(sorted(name for name in golden.files if name.startswith("packs/")))
    index = [line for line in scan_of(golden, name) if line.nbytes]
    one, two = sorted(chance.sample(index, 2), key=lambda line: line.offset)
    data = golden.files[name]
    first, second = data[one.offset : one.offset + one.nbytes], data[two.offset : two.offset + two.nbytes]
    if chance.random() < 0.5:  # the same length, so that nothing else moves
        second = (second * (len(first) // len(second) + 1))[: len(first)]
        write(golden.root, {name: data[: one.offset] + second + data[one.offset + one.nbytes :]})
    else:
        between = data[one.offset + one.nbytes : two.offset]
        write(golden.root, {name: data[: one.offset] + second + between + first + data[two.offset + two.nbytes :]})
    return f"swap blobs {one.digest[:8]} and {two.digest[:8]} of {name}"


def scan_of(golden: Golden, name: str) -> list:
    path = golden.root.with_name("scanned") / Path(name).name
    write(path.parent, {path.name: golden.files[name]})
    return scan(path)


def _replay(chance: random.Random, golden: Golden) -> str:
    """A file as it was before, or in the place of another."""
    name = chance.choice([*sorted(golden.older), "catalog.sqlite"])
    same = [other for other in golden.files if other.partition("/")[0] == name.partition("/")[0]]
    target = chance.choice(sorted(same))
    write(golden.root, {target: golden.older[name]})
    return f"replay {name} as {target}"


def _forge_manifest(chance: random.Random, golden: Golden) -> str:
    """A manifest that is valid in itself and not what was signed: under the old digest, or under its own with the catalog changed to it."""
    with reading_catalog(golden) as db:
        rows = db.execute("SELECT model, version, digest FROM versions").fetchall()
    model, version, digest = chance.choice(rows)
    manifest = golden.opened[digest]
    array, *rest = sorted(manifest.arrays, key=lambda _: chance.random())
    other = chance.choice(rest)
    forged = chance.choice(
        [
            {"attributes": {"seed": 7}},
            {"arrays": manifest.arrays[:1], "entry": ""},
            {"arrays": (*rest, type(array)(array.path, "uint8", (other.nbytes,), other.segments))}
            if array.path.startswith("files/")
            else {"entry": ""},
            {"arrays": (*rest, type(array)(array.path, array.dtype, array.shape, array.segments[::-1]))},
        ]
    )
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    data = store.encode(Manifest(**(fields | forged)))
    own = store.digest_of(data)
    if chance.random() < 0.5:
        write(golden.root, {f"manifests/{digest}": data})
        return f"manifest {digest[:8]} replaced by another"
    write(golden.root, {f"manifests/{own}": data})
    edit(golden.root, "UPDATE versions SET digest = ? WHERE model = ? AND version = ?", (own, model, version))
    return f"catalog names the forged manifest {own[:8]} in place of {digest[:8]}"


_EDITS = (
    "UPDATE versions SET digest = (SELECT digest FROM versions ORDER BY RANDOM() LIMIT 1) WHERE version = 1",
    "UPDATE versions SET signature = (SELECT signature FROM versions WHERE version = 2)",
    "UPDATE versions SET signature = zeroblob(64)",
    "UPDATE versions SET signature = x'00'",
    "UPDATE versions SET digest = 'nonsense'",
    "UPDATE versions SET digest = '../../../etc/passwd'",
    "UPDATE versions SET digest = x'ff'",
    "UPDATE versions SET tags = x'ff'",
    "UPDATE versions SET created = 'soon', nbytes = 'many'",
    "UPDATE versions SET version = version + 1 WHERE version = (SELECT MAX(version) FROM versions)",
    "UPDATE models SET publisher = (SELECT MIN(publisher) FROM models), name = name || id",
    "UPDATE models SET publisher = 'x' || publisher",
    "UPDATE models SET name = 'other'",
    "UPDATE models SET name = name || 'x'",
    "UPDATE aliases SET version = 99",
    "UPDATE aliases SET version = 'two'",
    "UPDATE aliases SET model = 99",
    "UPDATE aliases SET alias = 'else'",
    "DELETE FROM versions",
    "DELETE FROM versions WHERE version = 2",
    "DELETE FROM aliases",
    "DELETE FROM meta",
    "DELETE FROM publishers",
    "DELETE FROM packs",
    "UPDATE meta SET value = 'x'",
    "UPDATE publishers SET label = 'bob'",
    "UPDATE blobs SET offset = offset + 1",
    "UPDATE blobs SET offset = -1",
    "UPDATE blobs SET offset = 9223372036854775807",
    "UPDATE blobs SET offset = 'here'",
    "UPDATE blobs SET nbytes = nbytes - 1",
    "UPDATE blobs SET nbytes = 0",
    "UPDATE blobs SET nbytes = -5",
    "UPDATE blobs SET nbytes = 1000000000000",
    "UPDATE blobs SET nbytes = 'all'",
    "UPDATE blobs SET pack = 77",
    "UPDATE blobs SET offset = (SELECT MIN(offset) FROM blobs)",
    "DELETE FROM blobs WHERE digest = (SELECT MIN(digest) FROM blobs)",
    "DELETE FROM blobs",
    "UPDATE packs SET name = 'gone.pack'",
    "UPDATE packs SET name = '../catalog.sqlite'",
    "UPDATE packs SET name = x'00ff'",
    "UPDATE model_keys SET wrapped = zeroblob(length(wrapped))",
    "UPDATE model_keys SET wrapped = x'00', cluster_key = 'none'",
    "UPDATE model_keys SET name = 'digits'",
    "DELETE FROM model_keys",
    "DROP TABLE blobs",
    "DROP TABLE versions",
    "DROP TABLE aliases",
    "DROP TABLE meta",
)


def _edit_catalog(chance: random.Random, golden: Golden) -> str:
    statement = chance.choice(_EDITS)
    edit(golden.root, statement)
    return statement


def edit(root: Path, statement: str, values: tuple = ()) -> None:
    db = sqlite3.connect(root / "catalog.sqlite", isolation_level=None)
    try:
        db.execute("PRAGMA synchronous = OFF")
        db.execute(statement, values)
    except sqlite3.Error:
        pass  # a constraint refuses it: then it is no damage
    finally:
        db.close()


@contextmanager
def reading_catalog(golden: Golden) -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(golden.root / "catalog.sqlite")
    try:
        yield db
    finally:
        db.close()
