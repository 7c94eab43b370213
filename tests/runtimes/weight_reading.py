"""What the tests of weight indexes share: read an index with its converted tensors, bounded; compare; damage."""

import time
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st

from tether.errors import BadModelError
from tether.runtimes.weights import CONVERTED, read_index
from tether.runtimes.weights.limits import tensor_nbytes


def read_tensors(path, model_format, folder):
    """The index and a function that gives a tensor's bytes."""
    with (folder / "converted.bin").open("w+b") as converted:
        found = read_index(path, model_format, converted)

    def data(tensor):
        file = folder / "converted.bin" if tensor.file == CONVERTED else path / tensor.file if path.is_dir() else path
        with file.open("rb") as opened:
            opened.seek(tensor.offset)
            return opened.read(tensor.nbytes)

    return found, data


def check_ranges(found, nbytes):
    """Whether an index of one file of this size is sound; converted tensors aside."""
    for tensor in found:
        assert tensor.offset >= 0
        assert tensor.nbytes == tensor_nbytes(tensor.name, tensor.dtype, tensor.shape)
        assert tensor.file == CONVERTED or tensor.offset + tensor.nbytes <= nbytes


def survives(path, model_format, folder):
    """The index, or None where it is refused; anything else that is raised, or found, is a failure."""
    try:
        found, _ = read_tensors(path, model_format, folder)
    except BadModelError as error:
        message = str(error)
    else:
        check_ranges(found, path.stat().st_size)
        return found
    assert "\n" not in message
    assert len(message) < 2000
    return None


@contextmanager
def bounded(seconds=10.0, nbytes=200 << 20):
    """Limits on a hostile file: time, and memory beyond what there was (where the system tells: Linux)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # starts the peak anew
    before = resident("VmRSS")
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds
    assert resident("VmHWM") - before < nbytes


def resident(what):
    """Bytes of this process: `VmRSS`, or `VmHWM`, the most since it was last reset."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), 0)


@st.composite
def mutations(draw, good):
    """A valid file with a few bytes changed, taken out, put in or doubled."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.one_of(st.binary(min_size=1, max_size=10), st.sampled_from([b"\xff" * 9, b"\0" * 8, b"\x80", b"-1", b'"', b"}"])))
        match draw(st.sampled_from(["change", "insert", "delete", "double"])):
            case "change":
                data[at : at + len(piece)] = piece
            case "insert":
                data[at:at] = piece
            case "delete":
                del data[at : at + len(piece)]
            case "double":
                data[at:at] = data[at : at + 8 * len(piece)]
    return bytes(data)
