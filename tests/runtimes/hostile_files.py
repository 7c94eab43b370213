"""Model files that nobody should believe, made byte by byte: ONNX, safetensors, numpy. Each says which error it deserves, if any."""

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tether.errors import BadModelError, HostileModelError

FLOAT, INT32, INT64, STRING, INT8 = 1, 6, 7, 8, 3


@dataclass(frozen=True)
class Case:
    """A file (or a folder around it) and what reading its index comes to: an error, or the number of tensors."""

    data: bytes | Callable[[], bytes]
    """Large ones are made when they are asked for."""
    outcome: type[BadModelError] | int
    around: Callable[[Path], None] | None = None
    """Makes what lies beside it, in its folder."""

    def content(self) -> bytes:
        return self.data() if callable(self.data) else self.data


def varint(number):
    number &= (1 << 64) - 1
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def field(number, value):
    """A field of a protobuf message: bytes, or a number as varint."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name, dims, element=FLOAT, raw=None, more=b""):
    head = b"".join(field(1, extent) for extent in dims) + field(2, element) + field(8, name.encode())
    return head + (field(9, raw) if raw is not None else b"") + more


def model(*tensors, nodes=()):
    graph = b"".join(field(1, node) for node in nodes) + field(2, b"g") + b"".join(field(5, each) for each in tensors)
    return field(1, 9) + field(7, graph) + field(8, field(2, 20))


def constant(output, value, name=b"value", operator=b"Constant"):
    return field(2, output) + field(4, operator) + field(5, field(1, name) + field(5, value) + field(20, 4))


def external(name, dims, **said):
    entries = b"".join(field(13, field(1, key.encode()) + field(2, value.encode())) for key, value in said.items())
    return tensor(name, dims, more=entries + field(14, 1))


def deep_graph(levels):
    graph = b""
    for _ in range(levels):
        graph = field(1, field(5, field(6, graph)))
    return graph


def nested(levels):
    """`deep_graph` for any depth: in linear time, from the inside out."""
    parts, nbytes = [], 0
    for level in range(levels * 3):
        head = varint((1, 5, 6)[2 - level % 3] << 3 | 2) + varint(nbytes)
        parts.append(head)
        nbytes += len(head)
    return field(7, b"".join(reversed(parts)))


def _weights(folder):
    (folder / "w.bin").write_bytes(bytes(64))


def _elsewhere(folder):
    (folder.parent / "secret").write_bytes(bytes(64))


def _symlink(folder):
    _elsewhere(folder)
    (folder / "w.bin").symlink_to(folder.parent / "secret")


def _symlinked_folder(folder):
    (folder.parent / "outside").mkdir(exist_ok=True)
    _weights(folder.parent / "outside")
    (folder / "sub").symlink_to(folder.parent / "outside")


def _hardlink(folder):
    _elsewhere(folder)
    os.link(folder.parent / "secret", folder / "w.bin")


def onnx_cases():
    good = tensor("w", [2, 2], raw=bytes(16))
    digits = random.Random("onnx").randbytes(4096)
    cases = {
        "empty": Case(b"", BadModelError),
        "random": Case(digits, BadModelError),
        "text": Case(b"<!DOCTYPE html><title>404</title>", BadModelError),
        "no graph": Case(field(1, 9), BadModelError),
        "a length of 2^63": Case(b"\x3a" + varint(1 << 63), BadModelError),
        "a length of 3 GB": Case(b"\x3a" + varint(3 << 30) + bytes(10), BadModelError),
        "a length without end": Case(b"\x3a" + b"\xff" * 12, BadModelError),
        "a group": Case(field(7, b"\x0b\x0c"), BadModelError),
        "raw data longer than the file": Case(field(7, b"\x2a\x7f" + tensor("w", [4]) + b"\x4a\x7f"), BadModelError),
        "dims that overflow": Case(model(tensor("w", [1 << 62, 8], raw=b"")), BadModelError),
        "dims that overflow to the right size": Case(model(tensor("w", [1 << 62, 1 << 2], raw=b"")), BadModelError),
        "negative dims": Case(model(tensor("w", [-1, -4], raw=bytes(16))), BadModelError),
        "33 axes": Case(model(tensor("w", [1] * 33, raw=bytes(4))), BadModelError),
        "a million axes": Case(model(tensor("w", [1] * 1_000_000, raw=bytes(4))), BadModelError),
        "packed dims of a megabyte": Case(model(field(1, b"\x01" * (1 << 20)) + good), BadModelError),
        "packed dims that are cut off": Case(model(field(1, b"\x81\x81") + good), BadModelError),
        "less data than dims": Case(model(tensor("w", [5], raw=bytes(16))), BadModelError),
        "more data than dims": Case(model(tensor("w", [3], raw=bytes(16))), BadModelError),
        "no data at all": Case(model(tensor("w", [1 << 40])), BadModelError),
        "an empty tensor": Case(model(tensor("w", [0, 1 << 40])), 1),
        "two of one name": Case(model(good, good), BadModelError),
        "a name of 1 MB": Case(model(tensor("n" * (1 << 20), [4], raw=bytes(16))), BadModelError),
        "a name of 5,000 characters": Case(model(tensor("n" * 5000, [4], raw=bytes(16))), BadModelError),
        "a name that is not UTF-8": Case(model(field(8, b"\xff\xfe") + tensor("w", [4], raw=bytes(16))[:-3]), BadModelError),
        "names of paths and control characters": Case(
            model(*(tensor(name, [4], raw=bytes(16)) for name in ("../../etc/passwd", "\0\n", "<script>", "", "\u202e"))), 5
        ),
        "an element type of tomorrow": Case(model(tensor("w", [4], 99, raw=bytes(16)), good), 1),
        "strings": Case(model(tensor("w", [1], STRING, more=field(6, b"text"))), 0),
        "typed data in the field of another type": Case(model(tensor("w", [4], INT64, more=field(4, bytes(16)))), 0),
        "nested 10,000 graphs deep": Case(lambda: nested(10_000), 0),
        "deep graphs in an attribute": Case(field(7, deep_graph(60) + field(5, good)), 1),
        "a million tensors": Case(lambda: field(7, field(5, field(2, FLOAT) + field(1, 0)) * 1_000_000), BadModelError),
        "70,000 tensors with names": Case(lambda: model(*(tensor(f"w{n}", [0]) for n in range(70_000))), BadModelError),
        "a million nodes": Case(lambda: field(7, field(1, b"\x22\x03Add") * 1_000_000 + field(5, good)), 1),
        "five million fields": Case(lambda: field(7, b"\x08\x01" * 5_000_000), BadModelError),
        "a sparse tensor that claims gigabytes": Case(field(7, field(15, field(1, good) + field(3, 1 << 40))), 0),
        "a constant of many attributes": Case(model(nodes=[field(4, b"Constant") + field(5, field(1, bytes(64))) * 1000]), 0),
        "sixteen keys and more": Case(model(tensor("w", [4], more=field(13, b"") * 1000 + field(14, 1))), BadModelError),
    }
    return cases | _external_cases()


def _external_cases():
    def case(outcome, around=_weights, dims=(4,), more=(), **said):
        return Case(model(external("w", dims, **said), *more), outcome, around)

    hostile = HostileModelError
    return {
        "external: fine": case(1, location="w.bin"),
        "external: fine, with unknown keys": case(1, location="w.bin", __class__="os", checksum="x", basepath="/etc"),
        "external: the same range twice": case(2, location="w.bin", more=[external("v", [4], location="w.bin")]),
        "external: above": case(hostile, _elsewhere, location="../secret"),
        "external: above by a detour": case(hostile, _elsewhere, location="sub/../../secret"),
        "external: absolute": case(hostile, location="/etc/hostname"),
        "external: backslashes": case(hostile, location="..\\secret"),
        "external: no name": case(hostile),
        "external: NUL": case(hostile, location="w.bin\0"),
        "external: a name of 1 MB": case(hostile, location="w" * (1 << 20)),
        "external: the folder": case(BadModelError, location="."),
        "external: symlink": case(hostile, _symlink, location="w.bin"),
        "external: symlinked folder": case(hostile, _symlinked_folder, location="sub/w.bin"),
        "external: hardlink": case(hostile, _hardlink, location="w.bin"),
        "external: absent": case(BadModelError, None, location="w.bin"),
        "external: offset beyond the file": case(BadModelError, location="w.bin", offset="64"),
        "external: offset of 2^63": case(BadModelError, location="w.bin", offset=str(1 << 63)),
        "external: offset of 5,000 digits": case(hostile, location="w.bin", offset="9" * 4000),
        "external: negative offset": case(hostile, location="w.bin", offset="-16"),
        "external: offset in words": case(hostile, location="w.bin", offset="٣"),
        "external: longer than the file": case(BadModelError, location="w.bin", length="128"),
        "external: another length than the shape": case(BadModelError, location="w.bin", length="32"),
        "external: negative length": case(hostile, location="w.bin", length="-1"),
        "external: dims that overflow": case(BadModelError, location="w.bin", dims=(1 << 62, 4)),
        "external: overlapping in part": case(hostile, location="w.bin", more=[external("v", [4], location="w.bin", offset="8")]),
        "external: overlapping under two spellings": case(
            hostile, location="w.bin", more=[external("v", [4], location="./w.bin", offset="8")]
        ),
    }


def safetensors_file(table, data=b""):
    """A file with this table: a value for JSON, or its text."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def safetensors_cases():
    one = b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    hostile = HostileModelError
    return {
        "empty": Case(b"", BadModelError),
        "random": Case(random.Random("safetensors").randbytes(4096), BadModelError),
        "a header of 2^63 bytes": Case(struct.pack("<Q", 1 << 63) + b"{}", BadModelError),
        "a header of 101 MB": Case(lambda: struct.pack("<Q", 101 << 20) + b"{" + bytes(101 << 20), BadModelError),
        "a header beyond the file": Case(struct.pack("<Q", 3) + b"{}", BadModelError),
        "no JSON": Case(safetensors_file(b"{'a'}"), BadModelError),
        "a list": Case(safetensors_file(b"[]"), BadModelError),
        "no UTF-8": Case(safetensors_file(b'{"\xff":1}'), BadModelError),
        "a byte-order mark": Case(safetensors_file(b"\xef\xbb\xbf{}"), BadModelError),
        "a lone surrogate": Case(safetensors_file(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), BadModelError),
        "nested 100,000 deep": Case(safetensors_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), hostile),
        "64 MiB of brackets": Case(lambda: safetensors_file(b'{"a":[' + b"[]," * 20_000_000 + b"[]]}"), BadModelError),
        "a number of 5,000 digits": Case(safetensors_file(b'{"a":' + b"9" * 5000 + b"}"), BadModelError),
        "no tensors": Case(safetensors_file({}), 0),
        "padded with spaces": Case(safetensors_file(b"{" + one + b"}     ", bytes(4)), 1),
        "overlap": Case(safetensors_file({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), hostile),
        "the same range twice": Case(safetensors_file({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), hostile),
        "a hole": Case(safetensors_file({"a": entry(0, 4), "b": entry(5, 6)}, bytes(6)), hostile),
        "a hole at the start": Case(safetensors_file({"a": entry(1, 4)}, bytes(4)), hostile),
        "bytes behind the end": Case(safetensors_file({"a": entry(0, 4)}, bytes(5)), hostile),
        "cut off": Case(safetensors_file({"a": entry(0, 4)}, bytes(3)), BadModelError),
        "one name twice": Case(safetensors_file(b"{" + one + b"," + one + b"}", bytes(4)), hostile),
        "one key twice": Case(safetensors_file(b"{" + one.replace(b'"dtype"', b'"dtype":"I8","dtype"') + b"}", bytes(4)), hostile),
        "an unknown key": Case(safetensors_file({"a": entry(0, 4) | {"code": "x"}}, bytes(4)), BadModelError),
        "no shape": Case(safetensors_file({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4)), BadModelError),
        "an unknown type": Case(safetensors_file({"a": entry(0, 4, dtype="O")}, bytes(4)), BadModelError),
        "a type that is a list": Case(safetensors_file({"a": entry(0, 4, dtype=["U8"])}, bytes(4)), BadModelError),
        "the wrong size": Case(safetensors_file({"a": entry(0, 4, [1], "F64")}, bytes(4)), BadModelError),
        "a shape that overflows": Case(safetensors_file({"a": entry(0, 0, [1 << 62, 4])}), BadModelError),
        "a negative shape": Case(safetensors_file({"a": entry(0, 4, [-2, -2])}, bytes(4)), BadModelError),
        "a fraction": Case(safetensors_file({"a": entry(0, 4, [4.0])}, bytes(4)), BadModelError),
        "true": Case(safetensors_file({"a": entry(0, 1, [True])}, bytes(1)), BadModelError),
        "33 axes": Case(safetensors_file({"a": entry(0, 1, [1] * 33)}, bytes(1)), BadModelError),
        "end before begin": Case(safetensors_file({"a": entry(4, 0, [4])}, bytes(4)), BadModelError),
        "three offsets": Case(safetensors_file({"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, bytes(4)), BadModelError),
        "metadata that is no text": Case(safetensors_file({"__metadata__": {"a": [1]}}), BadModelError),
        "metadata that is a list": Case(safetensors_file({"__metadata__": ["a"]}), BadModelError),
        "70,000 tensors": Case(lambda: safetensors_file({f"{n}": entry(0, 0) for n in range(70_000)}), BadModelError),
        "a name of 1 MB": Case(safetensors_file({"n" * (1 << 20): entry(0, 0)}), BadModelError),
        "names of paths and control characters": Case(safetensors_file({"../x": entry(0, 0), "\0\n": entry(0, 0), "": entry(0, 0)}), 3),
    }


def npy(header, data=b"", version=b"\1\0"):
    text = header.encode("latin-1")
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def npy_header(descr="'<f4'", shape="(4,)", fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def npz(members, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def npy_cases():
    hostile = HostileModelError
    return {
        "empty": Case(b"", BadModelError),
        "random": Case(random.Random("npy").randbytes(4096), BadModelError),
        "only the magic": Case(b"\x93NUMPY", BadModelError),
        "version 9": Case(npy(npy_header(), bytes(16), b"\x09\0"), BadModelError),
        "a header of 4 GB": Case(b"\x93NUMPY\2\0\xff\xff\xff\xff{}", BadModelError),
        "a header cut off": Case(npy(npy_header())[:40], BadModelError),
        "data cut off": Case(npy(npy_header(), bytes(15)), BadModelError),
        "pickled objects": Case(npy(npy_header("'|O'"), b"\x80\x04cos\nsystem\n(X\x02\0\0\0idtR."), hostile),
        "objects in a record": Case(npy(npy_header("[('a', '<f4'), ('b', '|O')]"), bytes(99)), hostile),
        "a record": Case(npy(npy_header("[('a', '<f4'), ('b', '<i4')]"), bytes(32)), 0),
        "text": Case(npy(npy_header("'<U5'"), bytes(80)), 0),
        "times": Case(npy(npy_header("'<M8[ns]'"), bytes(32)), 0),
        "code in the header": Case(npy(npy_header("__import__('os').system('id')"), bytes(16)), BadModelError),
        "a header of brackets": Case(npy("{" + "(" * 9000, bytes(16)), BadModelError),
        "one key twice": Case(npy("{'shape': (4,), 'shape': (1,), 'descr': '<f4', 'fortran_order': False}", bytes(16)), BadModelError),
        "one key missing": Case(npy("{'shape': (4,), 'descr': '<f4'}", bytes(16)), BadModelError),
        "another order, double quotes": Case(npy('{"shape":(4,),"fortran_order":False,"descr":"<f4"}', bytes(16)), 1),
        "numbers of Python 2": Case(npy(npy_header(shape="(4L,)"), bytes(16)), 1),
        "a shape that overflows": Case(npy(npy_header(shape=f"({1 << 62}, 4)"), bytes(16)), BadModelError),
        "a shape of 5,000 digits": Case(npy(npy_header(shape=f"({'9' * 5000},)"), bytes(16)), BadModelError),
        "a negative shape": Case(npy(npy_header(shape="(-4, -1)"), bytes(16)), BadModelError),
        "33 axes": Case(npy(npy_header(shape=f"({'1, ' * 33})"), bytes(16)), BadModelError),
        "in Fortran order, larger than the file": Case(
            npy(npy_header(shape="(1000000, 1000000)", fortran="True"), bytes(16)), BadModelError
        ),
    }


def npz_cases():
    hostile, good = HostileModelError, npy(npy_header(), bytes(16))
    bomb = npy_header("'<f8'", "(12500000,)")
    lying = npz([("a.npy", good)]).replace(struct.pack("<LL", len(good), len(good)), struct.pack("<LL", len(good), 1 << 30))
    return {
        "fine": Case(npz([("a.npy", good), ("b.npy", good)]), 2),
        "fine, deflated": Case(npz([("a.npy", good)], zipfile.ZIP_DEFLATED), 1),
        "a bomb": Case(lambda: npz([("a.npy", npy(bomb, bytes(100_000_000)))], zipfile.ZIP_DEFLATED), hostile),
        "sizes that lie": Case(lying, hostile),
        "two of one name": Case(npz_twice(good), hostile),
        "a name that leads out": Case(npz([("../a.npy", good)]), hostile),
        "pickled objects": Case(npz([("a.npy", npy(npy_header("'|O'"), b"cos\nsystem\n"))]), hostile),
        "pickled objects, deflated": Case(npz([("a.npy", npy(npy_header("'|O'"), b"cos\nsystem\n"))], zipfile.ZIP_DEFLATED), hostile),
        "less than the shape, deflated": Case(npz([("a.npy", good[:-1])], zipfile.ZIP_DEFLATED), BadModelError),
        "more than the shape, deflated": Case(npz([("a.npy", good + b"x")], zipfile.ZIP_DEFLATED), BadModelError),
        "an array larger than its member": Case(npz([("a.npy", npy(npy_header(shape="(9,)"), bytes(16)))]), BadModelError),
        "an array with the next one's bytes": Case(
            npz([("a.npy", npy(npy_header(shape="(40,)"), bytes(16))), ("b.npy", good)]), BadModelError
        ),
        "no arrays": Case(npz([("readme.txt", b"hello")]), 0),
        "cut off": Case(npz([("a.npy", good)])[:-5], BadModelError),
    }


def npz_twice(good):
    data = npz([("a.npy", good), ("b.npy", good)])
    return data.replace(b"b.npy", b"a.npy")
