"""Archives as an attacker writes them, byte by byte: zips whose headers disagree, pickles, protobuf, tables. No framework needed."""

import struct
import zlib
from dataclasses import dataclass, field


@dataclass
class Entry:
    """A member; what `local` and `central` name is told there instead of the truth."""

    name: str | bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0
    packed: bytes | None = None
    local: dict = field(default_factory=dict)
    central: dict = field(default_factory=dict)
    offset: int | None = None
    """Its header is that of another member."""
    descriptor: bytes | None = None


def zip_of(entries, *, before=b"", count=None, comment=b"", gap=b""):
    """A zip archive; `before`, `count`, `comment` and `gap` as its writer wants them."""
    body, directory = bytearray(before), bytearray()
    for entry in entries:
        name = entry.name.encode() if isinstance(entry.name, str) else entry.name
        packed = entry.packed if entry.packed is not None else _packed(entry)
        offset = len(body) if entry.offset is None else entry.offset
        told = {"name": name, "flags": entry.flags, "method": entry.method, "crc": zlib.crc32(entry.data)}
        told |= {"packed": len(packed), "nbytes": len(entry.data), "extra": b""}
        if entry.offset is None:
            hidden = {"crc": 0, "packed": 0, "nbytes": 0} if entry.flags & 8 else {}
            body += _local(told | hidden | entry.local) + packed
            if entry.flags & 8:
                full = struct.pack("<4s3L", b"PK\x07\x08", told["crc"], told["packed"], told["nbytes"])
                body += full if entry.descriptor is None else entry.descriptor
        directory += _central(told | entry.central, offset)
    number = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, number, number, len(directory), len(body) + len(gap), len(comment))
    return bytes(body) + gap + bytes(directory) + end + comment


def _packed(entry):
    if not entry.method:
        return entry.data
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    return squeeze.compress(entry.data) + squeeze.flush()


def _local(told):
    sizes = told["crc"], told["packed"], told["nbytes"]
    head = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, told["flags"], told["method"], 0, 0, *sizes, len(told["name"]), len(told["extra"]))
    return head + told["name"] + told["extra"]


def _central(told, offset):
    numbers = told["flags"], told["method"], 0, 0, told["crc"], told["packed"], told["nbytes"], len(told["name"]), len(told["extra"])
    return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, *numbers, 0, 0, 0, 0, offset) + told["name"] + told["extra"]


def torch_zip(members, root="m"):
    """As torch writes them, but for the alignment."""
    return zip_of([Entry(f"{root}/{name}", data) for name, data in members.items()])


# --- pickles


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(max(1, (value.bit_length() + 8) // 8), "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def tensor(  # noqa: PLR0913, PLR0917 (what a tensor is made of)
    key="0", count=4, offset=0, shape=(4,), strides=(1,), storage="FloatStorage", function="_rebuild_tensor_v2", more=b""
):
    """The part of a pickle that makes a tensor."""
    identifier = b"(" + text("storage") + named("torch", storage) + text(key) + text("cpu") + number(count) + b"tQ"
    place = number(offset) + numbers(shape) + numbers(strides)
    return (
        named("torch._utils", function) + b"(" + identifier + place + b"\x89" + named("collections", "OrderedDict") + b")R" + more + b"tR"
    )


def state_dict(tensors):
    """A `data.pkl`: name → what `tensor` gives."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in tensors.items()) + b"u."


def archive(tensors, storages, **more):
    """`torch.save` of a state dict; `more` are further members, with `__` for `/`."""
    members = {"data.pkl": state_dict(tensors), "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{key}": data for key, data in storages.items()}
    return torch_zip(members | {name.replace("__", "/"): data for name, data in more.items()})


def calling(module, name, way="reduce"):
    """A pickle that calls something, in each way there is."""
    argument = text("id")
    stack = text(module) + text(name) + b"\x93"
    return (
        b"\x80\x04"
        + {
            "reduce": named(module, name) + b"(" + argument + b"tR",
            "stack global": stack + argument + b"\x85R",
            "stack global from memo": text(module) + b"\x94" + text(name) + b"\x9400h\x00h\x01\x93" + argument + b"\x85R",
            "newobj": named(module, name) + argument + b"\x85\x81",
            "newobj_ex": named(module, name) + argument + b"\x85}\x92",
            "obj": b"(" + named(module, name) + argument + b"o",
            "inst": b"(" + argument + f"i{module}\n{name}\n".encode(),
            "named only": named(module, name),
            "in a state": named("collections", "OrderedDict") + b")R}" + text("x") + named(module, name) + b"sb",
        }[way]
        + b"."
    )


WAYS = ("reduce", "stack global", "stack global from memo", "newobj", "newobj_ex", "obj", "inst", "named only", "in a state")
ATTACKS = (
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("__builtin__", "exec"),
    ("builtins", "getattr"),
    ("pip", "main"),
    ("pip._internal", "main"),
    ("timeit", "timeit"),
    ("cProfile", "runctx"),
    ("trace", "Trace.runctx"),
    ("numpy.f2py.crackfortran", "myeval"),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression"),
    ("pickle", "loads"),
    ("_pickle", "loads"),
    ("torch", "load"),
    ("operator", "attrgetter"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start"),
    ("torch.utils.collect_env", "run"),
    ("shutil", "rmtree"),
    ("webbrowser", "open"),
)
PLANT = calling("os", "system")
"""What is put where no pickle belongs, or another one."""
RAW = ("data/weights/weight_", "data/constants/tensor_", "/data/", "/constants/", "/traced_inputs/")


# --- protobuf and tables


def varint(value):
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def msg(*fields):
    """A message of (number, int or bytes or str) pairs."""
    out = b""
    for at, value in fields:
        data = value.encode() if isinstance(value, str) else value
        out += varint(at << 3) + varint(data) if isinstance(data, int) else varint(at << 3 | 2) + varint(len(data)) + data
    return out


def node(name, op, inputs=(), attributes=()):
    """A `NodeDef`; attributes are (key, AttrValue) pairs."""
    return msg((1, name), (2, op), *((3, each) for each in inputs), *((5, msg((1, key), (2, value))) for key, value in attributes))


def const_text(name, value):
    """A `Const` of one string."""
    return node(name, "Const", (), [("dtype", msg((6, 7))), ("value", msg((8, msg((1, 7), (2, b""), (8, value)))))])


def function(name, nodes):
    return msg((1, msg((1, name))), *((3, each) for each in nodes))


def saved_model(nodes=(), functions=(), output="out", *, saver=b"", assets=()):
    """A `SavedModel` with one signature, whose output is the node `output`."""
    graph = msg(*((1, each) for each in nodes), (2, msg(*((1, each) for each in functions))))
    signature = msg((1, "serving_default"), (2, msg((2, msg((1, "y"), (2, msg((1, f"{output}:0"))))))))
    files = [(6, msg((1, msg((1, f"{name}:0"))), (2, file))) for name, file in assets]
    return msg((1, 1), (2, msg((2, graph), (3, saver), (5, signature), *files)))


def bundle_entry(dtype, shape, offset, nbytes, shard=0, more=()):
    return msg((1, dtype), (2, msg(*((2, msg((1, size))) for size in shape))), (3, shard), (4, offset), (5, nbytes), *more)


def table(entries, *, compression=0, shared=0):
    """A table of one block of data."""
    blocks = b""

    def block(pairs):
        nonlocal blocks
        data = b"".join(varint(shared) + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
        data += struct.pack("<2L", 0, 1)
        handle = varint(len(blocks)) + varint(len(data))
        blocks += data + bytes([compression]) + bytes(4)
        return handle

    data = block(sorted(entries.items()))
    meta = block([])
    index = block([(b"~", data)])
    return blocks + (meta + index).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write_saved_model(folder, model, entries=None, data=b"", shards=1):
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(model)
    if entries is not None:
        (folder / "variables/variables.index").write_bytes(table({b"": msg((1, shards)), **entries}))
        (folder / f"variables/variables.data-00000-of-{shards:05d}").write_bytes(data)
    return folder
