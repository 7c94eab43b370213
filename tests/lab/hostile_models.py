"""The corpus of row 25: models as an attacker publishes them, each with what may become of it. List A of FAULTS.md, 1 to 34 and 36."""

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "runtimes"))  # where what is hostile in one file is made, byte by byte

import hostile_archives as archives
import hostile_files as files
import hostile_graphs as graphs
import test_weights_archives as torch_cases
import test_weights_keras as keras_cases
import test_weights_savedmodel as saved_cases
import test_weights_zips as zip_cases

BAD = frozenset({"bad_model", "hostile_model"})
"""The files are wrong. Which of the two is the readers' affair, but where the corpus says `HOSTILE`."""
HOSTILE = frozenset({"hostile_model"})
CUSTOM = b"""
class Model:
    inputs = outputs = [("x", "FP32", (None, 4))]

    def predict(self, x):
        return {"x": x}
"""


@dataclass(frozen=True, eq=False)
class Hostile:
    """A model that nobody should believe."""

    kind: str
    """What it is made for: onnx, torch, keras, savedmodel, safetensors, numpy, zip, hdf5."""
    name: str
    write: Callable[[Path], Path]
    """Makes it in an empty folder; the path to publish."""
    codes: frozenset[str]
    """Of the errors that it may be refused with; empty: it must not be refused."""
    tensors: int | None = None
    """How many it has where it is merely odd, and so accepted; None: it must be refused. With codes as well, either will do."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """What to publish it with: input → list of numbers; integers where they are larger than 1."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def corpus() -> list[Hostile]:
    """All of it; nothing large is made before it is written."""
    kinds = (_onnx(), _graphs(), _torch(), _pickles(), _exported(), _zips(), _safetensors(), _numpy(), _keras(), _hdf5(), _saved_models())
    return [case for cases in kinds for case in cases]


def chosen(cases: list[Hostile], count: int, seed: int) -> list[Hostile]:
    """`count` of them, from every kind as evenly as there are, in the corpus's order."""
    if count >= len(cases):
        return cases
    chance = random.Random(f"row 25, {seed}")
    shelves: dict[str, list[Hostile]] = {}
    for case in chance.sample(cases, len(cases)):
        shelves.setdefault(case.kind, []).append(case)
    taken = [case for case in chain.from_iterable(zip_longest(*shelves.values())) if case is not None][:count]
    return [case for case in cases if case in taken]


# --- how they lie on the disk


def _file(name: str, data: Callable[[], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data())
        return folder / name

    return write


def _beside_a_class(name: str, data: Callable[[], bytes]) -> Callable[[Path], Path]:
    """The weights of a custom model, the only kind that takes any file."""

    def write(folder: Path) -> Path:
        (folder / "model.py").write_bytes(CUSTOM)
        (folder / name).write_bytes(data())
        return folder

    return write


def _in_a_folder(name: str, case: files.Case) -> Callable[[Path], Path]:
    """With what the case puts beside it, and into the folder above."""

    def write(folder: Path) -> Path:
        model = folder / "model"
        model.mkdir()
        (model / name).write_bytes(case.content())
        if case.around:
            case.around(model)
        return model

    return write


def _cases(kind: str, suffix: str, table: Mapping[str, files.Case]) -> list[Hostile]:
    """Weights beside a class: what is merely damaged there is no weights, and left alone."""
    made = []
    for name, case in table.items():
        write = _beside_a_class(f"weights.{suffix}", case.content)
        if isinstance(case.outcome, int):
            made.append(Hostile(kind, name, write, frozenset(), case.outcome))
        elif case.outcome is files.HostileModelError:
            made.append(Hostile(kind, name, write, HOSTILE))
        else:
            made.append(Hostile(kind, name, write, frozenset(), 0))
    return made


# --- each kind


def _onnx() -> list[Hostile]:
    """What the reader lists without complaint, ONNX Runtime may refuse still: most of these have no graph to speak of.

    Symbolic links are merely bad: the client says how to copy what they lead to, and a draft has none.
    """
    made = []
    for name, case in files.onnx_cases().items():
        known = isinstance(case.outcome, int)
        codes = HOSTILE if case.outcome is files.HostileModelError and "symlink" not in name else BAD
        codes |= {"no_model_file"} if name == "empty" else set()
        made.append(Hostile("onnx", name, _in_a_folder("m.onnx", case), codes, case.outcome if known else None))
    return made


def _graphs() -> list[Hostile]:
    whole = graphs.fine()
    failing = BAD | {"model_failed"}
    made = [
        Hostile("graph", name, _file("m.onnx", data), failing if name in graphs.EXAMPLES else BAD, example=graphs.EXAMPLES.get(name, {}))
        for name, data in graphs.REFUSED.items()
    ]
    made += [Hostile("graph", name, _file("m.onnx", data), BAD, 1) for name, data in graphs.EITHER.items()]
    made += [Hostile("graph", name, _file("m.onnx", data), frozenset(), count) for name, (data, count) in graphs.ALLOWED.items()]
    cuts = range(1, 100, 7)
    made += [Hostile("graph", f"cut at {at} %", _file("m.onnx", lambda at=at: whole[: len(whole) * at // 100]), BAD) for at in cuts]
    return made


def _torch() -> list[Hostile]:
    made = []
    for table in (torch_cases.LIES, torch_cases.NONSENSE):
        for name, tensor in table.items():
            data = archives.archive({"w": tensor}, torch_cases.STORAGES)
            made.append(Hostile("torch", name, _file("m.pt", lambda data=data: data), BAD))
    made += [Hostile("torch", name, _file("m.pt", lambda data=data: data), HOSTILE) for name, data in torch_cases.WHOLE.items()]
    sound = archives.archive(torch_cases.STATE, torch_cases.STORAGES)
    made += [
        Hostile("torch", f"cut at {at} %", _file("m.pt", lambda at=at: sound[: len(sound) * at // 100]), BAD) for at in range(10, 100, 20)
    ]
    return made


def _pickles() -> list[Hostile]:
    """A call in every way that pickle has, of everything that was used to get past a scanner, in every member and under every name."""
    made = []
    members = {"data.pkl": archives.state_dict(torch_cases.STATE), "byteorder": b"little", "data/0": bytes(16), "data/1": bytes(8)}
    for name, planted in torch_cases.PLANTS.items():
        data = archives.torch_zip(members | planted)
        made.append(Hostile("pickle", f"planted {name}", _file("m.pt", lambda data=data: data), BAD))
    for module, name in archives.ATTACKS:
        data = archives.torch_zip({"data.pkl": archives.calling(module, name), "data/0": bytes(16)})
        made.append(Hostile("pickle", f"{module}.{name}", _file("m.pt", lambda data=data: data), BAD))
    for way in archives.WAYS:
        data = archives.calling("os", "system", way)
        made.append(Hostile("pickle", f"os.system by {way}, bare", _file("m.pt", lambda data=data: data), BAD))
    for suffix in ("bin", "ckpt", "pth", "pt"):
        write = _beside_a_class(f"weights.{suffix}", lambda: archives.PLANT)
        made.append(Hostile("pickle", f"bare, as .{suffix} beside a class", write, HOSTILE))
    return made


def _exported() -> list[Hostile]:
    return [Hostile("pt2", name, _file("m.pt2", lambda data=data: data), BAD) for name, data in torch_cases.EXPORTED.items()]


def _zips() -> list[Hostile]:
    made = [
        Hostile("zip", name, _file("m.pt", lambda entries=entries: archives.zip_of(entries)), BAD)
        for name, entries in zip_cases.HOSTILE.items()
    ]
    made += [
        Hostile("zip", name, _file("m.keras", lambda data=data: data), BAD | frozenset({"no_model_file", "unknown_framework"}))
        for name, data in zip_cases.DAMAGED.items()
    ]
    made.append(Hostile("zip", "half a million members", _file("m.pt", lambda: many_members(500_000)), BAD))
    return made


def many_members(count: int) -> bytes:
    """A directory of so many, all of them the same bytes: what lists it whole takes hundreds of megabytes."""
    one = archives.zip_of([archives.Entry("m/aaaaaaa", b"")])
    local, directory = one[:-22].split(b"PK\x01\x02")
    entry = b"PK\x01\x02" + directory
    names = (entry.replace(b"aaaaaaa", b"%07d" % number) for number in range(count))
    listed = b"".join(names)
    wide = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes(12)
    wide += count.to_bytes(8, "little") * 2 + len(listed).to_bytes(8, "little") + len(local).to_bytes(8, "little")
    locator = b"PK\x06\x07" + bytes(4) + (len(local) + len(listed)).to_bytes(8, "little") + (1).to_bytes(4, "little")
    return local + listed + wide + locator + b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2)


def _safetensors() -> list[Hostile]:
    return _cases("safetensors", "safetensors", files.safetensors_cases())


def _numpy() -> list[Hostile]:
    return _cases("npy", "npy", files.npy_cases()) + _cases("npz", "npz", files.npz_cases())


def _keras() -> list[Hostile]:
    made = [
        Hostile("keras", name, _file("m.keras", lambda config=config: keras_cases.archive(config)), HOSTILE)
        for name, config in keras_cases.HOSTILE_CONFIGS.items()
    ]
    made += [
        Hostile("keras", name, _file("m.keras", lambda config=config: keras_cases.archive(config)), BAD)
        for name, config in keras_cases.FOREIGN_CONFIGS.items()
    ]
    codes = BAD | frozenset({"unknown_framework"})
    made += [Hostile("keras", name, _file("m.keras", lambda data=data: data), codes) for name, data in keras_cases.ARCHIVES.items()]
    return made


def _hdf5() -> list[Hostile]:
    made = []
    for name, fill in keras_cases.HDF5.items():
        alone = _beside_a_class("weights.h5", lambda fill=fill: keras_cases.h5(fill))
        made.append(Hostile("hdf5", f"{name}, alone", alone, HOSTILE))
        made.append(Hostile("hdf5", f"{name}, in .keras", _file("m.keras", lambda fill=fill: keras_cases.with_weights(fill)), HOSTILE))
    return made


def _saved_models() -> list[Hostile]:
    def write(model: bytes = saved_cases.PLAIN, entries: Any = None, index: bytes | None = None) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            data = b"" if entries is None else saved_cases.FLOATS
            made = archives.write_saved_model(folder / "model", model, {} if index is not None else entries, data)
            if index is not None:
                (made / "variables/variables.index").write_bytes(index)
            return made

        return make

    made = [Hostile("savedmodel", name, write(model), HOSTILE) for name, model in saved_cases.REFUSED.items()]
    made += [Hostile("savedmodel", name, write(entries=entries), BAD) for name, entries in saved_cases.BAD_ENTRIES.items()]
    made += [Hostile("savedmodel", f"an index: {name}", write(index=index), BAD) for name, index in saved_cases.BAD_TABLES.items()]
    return made
