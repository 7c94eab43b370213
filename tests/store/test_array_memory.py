"""Memory that arrays leave is used by later ones, never while anybody can still see what was in it."""

import copy
import ctypes
import gc
import mmap
import pickle
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sealed_models import publish_sealed, tensor_file

from tether.errors import ChunkAlteredError
from tether.store.packing import memory as room
from tether.store.packing.memory import APART, TOGETHER, ArrayMemory
from tether.store.packing.parallel import new_memory

MIB = 1 << 20


@pytest.fixture
def memory():
    found = ArrayMemory(APART, 1 << 30)
    yield found
    found.close()


@pytest.fixture
def taken(monkeypatch):
    """The sizes of all that the system was asked for."""
    sizes, real = [], room.new_memory

    def counting(nbytes, large=None):
        sizes.append(nbytes)
        return real(nbytes, large)

    monkeypatch.setattr(room, "new_memory", counting)
    return sizes


def filled(memory, nbytes, value):
    array = memory.take(nbytes)
    array[:] = value
    return array


def address_of(array):
    return array.__array_interface__["data"][0]


def flags_at(address):
    """What the system says of the mapping that is there; None where there is none."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, *more = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(more)
    return None


def is_there(address):
    """Whether memory for arrays is there, which no core dump shows: what was given back the interpreter may have for its own by now."""
    return "dd" in (flags_at(address) or ())


@pytest.mark.parametrize("nbytes", [APART // 4, 1_000_003, 2 * MIB, 5 * MIB])
def test_what_an_array_leaves_the_next_one_gets(memory, taken, nbytes):
    first = filled(memory, nbytes, 1)
    before = address_of(first)
    del first

    assert address_of(filled(memory, nbytes, 2)) == before
    assert len(taken) == 1


class Holder:
    def __init__(self, array):
        self.array, self.itself = array, self


KEEPERS = {
    "itself": lambda array: array,
    "a slice": lambda array: array[10:500:3],
    "another type": lambda array: array.view(np.float32).reshape(-1, 16)[2:],
    "transposed": lambda array: array.reshape(64, -1).T,
    "a memoryview": memoryview,
    "a part of a memoryview": lambda array: memoryview(array).cast("d")[5:7],
    "over a memoryview": lambda array: np.frombuffer(memoryview(array)[64:], np.int16),
    "an iterator": lambda array: array.flat,
    "its base": lambda array: array.base,
    "a pickle's buffer": pickle.PickleBuffer,
    "a ctypes array": (ctypes.c_uint8 * 100).from_buffer,
    "a pointer": lambda array: array.ctypes.data_as(ctypes.c_void_p),
    "a subclass": lambda array: array.view(np.recarray),
    "masked": np.ma.masked_array,
    "a window": lambda array: np.lib.stride_tricks.sliding_window_view(array, 8),
    "a list in a tuple": lambda array: ([array],),
    "a cycle": Holder,
    "a generator": lambda array: (value for value in array),
    "another thread's": lambda array: threading.local().__dict__.setdefault("kept", array),
    "another library's": np.from_dlpack,
}


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_memory_is_not_used_again_while_anything_of_an_array_is_kept(memory, keep):
    array = filled(memory, MIB, 7)
    address = address_of(array)
    kept = keep(array)
    del array
    gc.collect()

    others = [filled(memory, MIB, 9) for _ in range(4)]

    assert address not in map(address_of, others)
    assert ctypes.string_at(address, MIB) == b"\7" * MIB
    del kept
    gc.collect()
    assert address_of(memory.take(MIB)) == address


@pytest.mark.parametrize("copied", [np.copy, copy.deepcopy, lambda array: pickle.loads(pickle.dumps(array)), bytes])  # noqa: S301 (our own)
def test_a_copy_stays_what_it_was_when_the_memory_is_used_again(memory, copied):
    array = filled(memory, MIB, 7)
    address, kept = address_of(array), copied(array)
    del array

    assert address_of(filled(memory, MIB, 9)) == address
    assert bytes(kept) == b"\7" * MIB


def test_small_arrays_share_memory_and_none_reaches_another(memory, taken):
    arrays = [filled(memory, 1_000, number) for number in range(100)]

    assert taken == [APART]
    assert all(address_of(array) % 64 == 0 for array in arrays)
    assert all(bytes(array) == bytes([number]) * 1_000 for number, array in enumerate(arrays))
    for array in arrays:
        array.flags.writeable = False
        assert np.asarray(array.base).nbytes == 1_000
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            array.flags.writeable = True


def test_shared_memory_is_used_again_when_the_last_of_those_who_share_it_is_gone(memory, taken):
    kept = filled(memory, 50_000, 1)
    others = [filled(memory, 50_000, 2) for _ in range(50)]
    assert bytes(kept) == b"\1" * 50_000
    del kept, others
    count = len(taken)

    for _ in range(100):
        filled(memory, 50_000, 3)
    assert len(taken) == count


@pytest.mark.parametrize("sizes", [[MIB], [MIB, 3 * MIB], [MIB, MIB + 1, 70_000, 5 * MIB, 100]])
def test_never_more_is_taken_than_was_held_at_one_time(memory, taken, sizes):
    held = []
    for turn in range(60):
        held.append(filled(memory, sizes[turn % len(sizes)], turn % 256))
        if len(held) > 3:
            held.pop(0)

    assert len(taken) <= 4 * len(sizes)


def test_of_memory_that_many_arrays_leave_at_once_most_goes_back_to_the_system(memory):
    held = [filled(memory, 4 * MIB, 1) for _ in range(40)]
    addresses = [address_of(array) for array in held]
    held.clear()

    assert sum(map(is_there, addresses)) <= (1 << 26) // (4 * MIB)
    memory.take(5 * MIB)  # which may lie where two of them were
    assert sum(map(is_there, addresses)) <= 2


def test_closing_gives_idle_memory_back_and_what_is_held_when_it_is_dropped(memory):
    idle, held, small = filled(memory, 4 * MIB, 1), filled(memory, 4 * MIB, 2), filled(memory, 100, 3)
    places = address_of(idle), address_of(held), address_of(small)
    del idle

    memory.close()
    assert list(map(is_there, places)) == [False, True, True]
    assert (held[-1], small[-1]) == (2, 3)
    del held, small
    assert not any(map(is_there, places))


@pytest.mark.parametrize("shared", [APART, TOGETHER])
@pytest.mark.parametrize("nbytes", [100, 200_000, 3 * MIB, 20 * MIB])
def test_no_core_dump_shows_what_was_decrypted_and_no_child_shares_it(shared, nbytes):
    memory = ArrayMemory(shared, 64 * MIB)
    array = filled(memory, nbytes, 1)

    flags = flags_at(address_of(array))
    assert "dd" in flags
    assert "sh" not in flags
    memory.close()


def test_a_system_that_knows_no_large_pages_gives_small_ones(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 1 << 20)  # as a kernel without them takes the right number
    memory = new_memory(4 * MIB)

    memory[:] = b"x" * 4 * MIB
    assert "dd" in flags_at(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


def test_arrays_that_are_held_together_lie_in_few_mappings(taken):
    memory = ArrayMemory(TOGETHER, 100 * 3 * MIB + 5)
    held = [memory.take(3 * MIB) for _ in range(100)]
    held.append(memory.take(5))

    assert len(taken) == 10
    few = ArrayMemory(TOGETHER, 300)
    few.take(100)
    assert taken[-1] == 4096  # and what little there is takes no more than it needs
    del held
    memory.close()
    few.close()


def test_arrays_that_end_in_other_threads_and_in_cycles_are_never_mixed_up(memory):
    """Each thread looks at what it was given until it drops it, in whatever way."""
    chance, wrong = random.Random("ends"), []

    def look(array, number, turns, *, cycle):
        holder = Holder(array) if cycle else None
        wrong.extend(number for _ in range(turns) if (array[:: len(array) // 50] != number).any())
        del holder, array

    for batch in range(30):
        threads = []
        for number in range(8):
            array = filled(memory, chance.choice([100, 30_000, 70_000, MIB]), number + batch)
            arguments = array, number + batch, chance.randrange(5, 50)
            threads.append(threading.Thread(target=look, args=arguments, kwargs={"cycle": chance.random() < 0.3}))
            threads[-1].start()
            del array, arguments
        if batch % 3:
            for thread in threads:
                thread.join()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)
    assert wrong == []


class Arrays(RuleBasedStateMachine):
    """Any order of taking, keeping parts and dropping: what is kept never changes."""

    def __init__(self):
        super().__init__()
        self.memory, self.kept, self.number = ArrayMemory(APART, 1 << 22), [], 0

    @rule(nbytes=st.one_of(st.integers(0, 5_000), st.sampled_from([65_535, 65_536, 65_537, 200_000, 1 << 21])))
    def take(self, nbytes):
        self.number += 1
        array = self.memory.take(nbytes)
        assert array.nbytes == nbytes
        array[:] = self.number % 251
        self.kept.append((array, self.number % 251))

    @rule(data=st.data())
    def keep_a_part(self, data):
        if self.kept:
            index = data.draw(st.integers(0, len(self.kept) - 1))
            array, value = self.kept[index]
            self.kept[index] = (array[array.size // 3 :], value)

    @rule(data=st.data())
    def drop(self, data):
        if self.kept:
            del self.kept[data.draw(st.integers(0, len(self.kept) - 1))]

    @rule()
    def close(self):
        self.memory.close()

    @invariant()
    def nothing_kept_has_changed(self):
        assert all((array == value).all() for array, value in self.kept)


TestAnyOrder = Arrays.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# --- encrypted versions


WEIGHTS = {
    f"layer{number:02}": np.random.default_rng(number).standard_normal(extent).astype(np.float32)
    for number, extent in enumerate([300_000, 40, 300_000, 9_000, 1_200_000, 300_000, 0, 17_000, 300_000, 1_200_000, 300_000, 5] * 2)
}


@pytest.fixture
def digest(repository):
    data, tensors = tensor_file(WEIGHTS)
    return publish_sealed(repository, {"model.bin": data}, tensors).digest


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_consumer_that_keeps_some_tensors_keeps_them_as_they_are(repository, digest, seed, threads):
    chance, kept = random.Random(f"keeps {seed}"), {}
    keepers = [lambda array: array, lambda array: array[::7], memoryview, lambda array: array.view(np.int32)]
    for name, array in repository.iter_tensors(digest, threads=threads):
        np.testing.assert_array_equal(array, WEIGHTS[name])
        if chance.random() < 0.4:
            kept[name] = (keep := chance.choice(keepers))(array), keep(WEIGHTS[name])
        if kept and chance.random() < 0.2:
            del kept[chance.choice(list(kept))]
        del array

    for found, expected in kept.values():
        np.testing.assert_array_equal(found, expected)


def test_what_a_consumer_dropped_is_not_held_for_it_when_the_next_is_made(repository, taken):
    data, tensors = tensor_file({f"layer{number:02}": np.full(2 * MIB, number, np.uint8) for number in range(12)})
    for _, array in repository.iter_tensors(publish_sealed(repository, {"model.bin": data}, tensors).digest, threads=1):
        del array

    assert len(taken) == 2  # for that and for the one behind it


def test_a_stream_of_tensors_takes_the_memory_of_a_few(repository, digest, taken):
    for _, array in repository.iter_tensors(digest, threads=2):
        del array

    assert sum(taken) < sum(array.nbytes for array in WEIGHTS.values())
    taken.clear()
    held = repository.load_tensors(digest)
    assert len(taken) == 1
    assert len(held) == len(WEIGHTS)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_stream_that_is_closed_midway_leaves_what_was_given_and_nothing_else(repository, digest, threads):
    found = repository.iter_tensors(digest, threads=threads)
    held = [next(found) for _ in range(6)]
    places = [address_of(array) for _, array in held if array.nbytes]
    found.close()
    assert all(map(is_there, places))

    for name, array in held:
        np.testing.assert_array_equal(array, WEIGHTS[name])
    del held, array
    assert not any(map(is_there, places))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_altered_blob_ends_the_stream_and_what_was_given_stays(repository, digest, threads):
    manifest = repository.manifest(digest)
    blob = next(array for array in manifest.tensors() if array.path.endswith("layer17")).segments[0].digest
    location = repository._catalog.locate(blob)
    with (repository.root / "packs" / location.pack).open("r+b") as pack:
        pack.seek(location.offset + 100)
        byte = pack.read(1)
        pack.seek(location.offset + 100)
        pack.write(bytes([byte[0] ^ 1]))

    held = {}
    with pytest.raises(ChunkAlteredError, match=blob):
        held.update(repository.iter_tensors(digest, threads=threads))
    assert "layer16" in held
    assert "layer17" not in held
    for name, array in held.items():
        np.testing.assert_array_equal(array, WEIGHTS[name])
