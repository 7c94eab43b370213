"""Models of random bytes for the tests of the store: the same seed gives the same files."""

import random
from pathlib import Path

from tether import store
from tether.security.identity import Identity
from tether.types import ModelInfo

INFO = ModelInfo("onnx", "onnx", (), (), batched=True, pure=True, code=False)
LAB = Identity(bytes(range(32)))
COLLEAGUE = Identity(bytes(range(1, 33)))
NAMES = ("model.onnx", "weights/a.bin", "weights/b.bin", "weights/deep/c.bin", ".tether/example.npz")


def seeded(seed: int) -> random.Random:
    return random.Random(str(seed))  # of a number it takes the magnitude only: 2 and -2 would be one


def files_of(seed: int, nbytes: int = 40_000) -> dict[str, bytes]:
    """Every seed other bytes in every file, except for one file that all share."""
    chance = seeded(seed)
    files = {name: chance.randbytes(chance.randrange(1, nbytes)) for name in NAMES}
    return files | {"weights/shared.bin": seeded(-1).randbytes(nbytes), "weights/empty": b""}


def manifest_of(repository: store.Repository, files: dict[str, bytes], seed: int = 0) -> bytes:
    arrays = tuple(repository.add_bytes(name, data) for name, data in files.items())
    return store.encode(store.Manifest(framework="onnx", entry=next(iter(files)), info=INFO, arrays=arrays, attributes={"seed": seed}))


def publish(
    repository: store.Repository,
    seed: int = 0,
    *,
    files: dict[str, bytes] | None = None,
    name: str = "digits",
    by: Identity = LAB,
    **options,
) -> store.Published:
    data = manifest_of(repository, files if files is not None else files_of(seed), seed)
    return repository.publish(name, data, by.public, by.sign(store.signed_message(data)), **options)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
