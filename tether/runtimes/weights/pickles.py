"""Pure: what a pickle says, read as data: nothing is imported, nothing called, and only the names that weights need may be in it.

A pickle is a program for a stack machine (the opcodes of Python's `pickletools`, protocols 0 to 5). This machine runs it without its side
effects: a global stays a name, a call stays a `Call`. Which globals a pickle may name is
decided by `pickle_names`.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tether.errors import BadModelError, HostileModelError, TetherError
from tether.runtimes.weights.pickle_names import Global, Names

__all__ = ["Call", "Global", "PersistentId", "check", "check_first", "planted"]

_MAX_OPERATIONS = 2_000_000
"""Twenty for each of as many tensors as a model may have, and as much again. A second of work, 300 MB in the worst case."""
_MAX_MARKS = 1000
"""Open at one time; Python's own pickler can't nest deeper by default."""
_MAX_NUMBER_NBYTES = 64
"""Of an integer: sizes need 8."""
_MAX_PROTOCOL = 5
_INT64 = range(-(1 << 63), 1 << 64)


@dataclass(slots=True, eq=False)
class Call:
    """What a function or class would have made."""

    function: Global
    args: tuple[Any, ...]
    items: list[tuple[Any, Any]] = field(default_factory=list)
    """Set in it afterwards, as in a dict."""
    state: Any = None
    """Given to it afterwards, as attributes."""

    @property
    def name(self) -> str:
        return self.function.name


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """What lies outside of the pickle: torch's storages."""

    value: Any


class _Found(NamedTuple):
    value: Any
    end: int


def check(data: bytes, label: str, *, script: bool = False) -> Any:
    """The value of a pickle: plain values, `Call`s, `Global`s, `PersistentId`s. It may share parts or contain itself: walk it with a limit.

    `script`: of a TorchScript archive. `label` names it in errors.

    Raises: HostileModelError: it names what attacks do, or is made to exhaust; BadModelError: another name; no pickle.
    """
    found = _run(data, label, _Machine(data, Names(label, script=script)))
    if found.end != len(data):
        raise HostileModelError(
            f"{label} has more behind the end of its pickle, which no library writes: export the model again from its source"
        )
    return found.value


def check_first(data: bytes, label: str, start: int = 0) -> int:
    """As `check`, of one pickle that starts at `start` and is followed by anything; where it ends."""
    machine = _Machine(data, Names(label))
    machine.at = start
    return _run(data, label, machine).end


def planted(data: bytes) -> str | None:
    """The name in `data`, which should be no pickle, that would be refused if it were read as one; None if it is harmless, or none."""
    names = Names("", judge=False)
    try:
        found = _run(data, "", _Machine(data, names))
    except BadModelError:
        # cut off or garbled: an attack may come first and garbage behind; only what begins with a pickle's own mark is held against it
        whole = data[:1] == b"\x80"
    else:
        whole = found.end == len(data) or data[:1] == b"\x80"
    return names.refused if whole else None


def _run(data: bytes, label: str, machine: _Machine) -> _Found:
    if not data:
        raise BadModelError(f"{label} is empty where a pickle should be: save the model again")
    try:
        return machine.run()
    except TetherError:
        raise
    except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error, UnicodeError):
        raise BadModelError(f"{label} is no pickle, or a damaged one (at byte {machine.at}): save the model again") from None
    except _ExhaustingError as error:
        raise HostileModelError(f"{label} is a pickle with {error}: export the model again from its source") from None


class _ExhaustingError(Exception):
    """The pickle asks for more than any model needs."""


class _Machine:
    """Runs one pickle. Whatever it does to a value that is not of the right kind is a TypeError: no pickler writes that."""

    def __init__(self, data: bytes, names: Names) -> None:
        self.at = 0
        self._data = data
        self._names = names
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        """The stacks below each mark."""
        self._memo: dict[int, Any] = {}

    def run(self) -> _Found:
        data, operations = self._data, _OPERATIONS
        for _ in range(_MAX_OPERATIONS):
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                if len(self._stack) != 1 or self._outer:
                    raise ValueError
                return _Found(self._stack[0], self.at)
            operations[code](self)
        raise _ExhaustingError(f"more than {_MAX_OPERATIONS} operations")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def top(self) -> Any:
        return self._stack[-1]

    def take(self, nbytes: int) -> bytes:
        """The next bytes. IndexError where there are not as many."""
        end = self.at + nbytes
        if end > len(self._data):
            raise IndexError
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def line(self) -> bytes:
        end = self._data.index(b"\n", self.at)
        taken = self._data[self.at : end]
        self.at = end + 1
        return taken

    def text(self, nbytes: int) -> str:
        return self.take(nbytes).decode("utf-8", "surrogatepass")

    def mark(self) -> None:
        if len(self._outer) == _MAX_MARKS:
            raise _ExhaustingError(f"more than {_MAX_MARKS} levels")
        self._outer.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._outer.pop()
        return values

    def drop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.since_mark()

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def protocol(self) -> None:
        if self.number(1) > _MAX_PROTOCOL:
            raise ValueError

    def integer_line(self) -> None:
        line = self.line()
        if len(line) > _MAX_NUMBER_NBYTES:
            raise _ExhaustingError(f"an integer of {len(line)} digits")
        self.push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.removesuffix(b"L")))

    def integer(self, width: int) -> None:
        nbytes = self.number(width)
        if nbytes > _MAX_NUMBER_NBYTES:
            raise _ExhaustingError(f"an integer of {nbytes} bytes")
        self.push(int.from_bytes(self.take(nbytes), "little", signed=True))

    def string_line(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:  # noqa: PLR2004 (the two quotes)
            raise ValueError
        self.push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))

    def append(self, target: Any, values: list[Any]) -> None:
        if type(target) is list:
            target.extend(values)
        elif isinstance(target, Call) and target.name in {"set", "frozenset"}:
            target.items.extend((value, None) for value in values)
        else:
            raise TypeError

    def set_items(self, target: Any, values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError
        pairs = ((values[at], values[at + 1]) for at in range(0, len(values), 2))
        if type(target) is dict:
            target.update(_plain_pairs(pairs))
        elif isinstance(target, Call) and target.function in _DICTS:
            target.items.extend(pairs)
        else:
            raise TypeError

    def global_(self, module: object, name: object) -> None:
        self.push(self._names.take(module, name))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.global_(module, name)

    def call(self, function: object, args: object) -> None:
        if type(args) is not tuple:
            raise TypeError
        self.push(Call(self._names.callable(function), args))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.call(function, args)

    def new_with_names(self) -> None:
        named, args, function = self.pop(), self.pop(), self.pop()
        if named != {}:
            raise TypeError
        self.call(function, args)

    def instance(self, *, function: Global | None = None) -> None:
        args = self.since_mark()
        self.call(args.pop(0) if function is None else function, tuple(args))

    def instance_line(self) -> None:
        module, name = self.line().decode(), self.line().decode()
        self.instance(function=self._names.take(module, name))

    def build(self) -> None:
        state = self.pop()
        made = self.top()
        if not isinstance(made, Call):
            raise TypeError
        self._names.check_stateful(made.function)
        made.state = state

    def extension(self) -> None:
        """A number in a registry of the reading process: what it calls can't be told from here."""
        raise _ExhaustingError("an extension code (EXT), which stands for whatever the reader has registered")

    def persistent_line(self) -> None:
        raise _ExhaustingError("a persistent id in text form")

    def buffer(self) -> None:
        raise _ExhaustingError("an out-of-band buffer")


_DICTS = frozenset({Global("collections", "OrderedDict"), Global("collections", "Counter")})
_SET = Global("builtins", "set")
_FROZENSET = Global("builtins", "frozenset")
_STOP = ord(".")


def _plain_pairs(pairs: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Those of a dict: their keys are hashed, which an attack could make take forever (nested tuples, integers that collide)."""
    for key, value in pairs:
        parts = key if type(key) is tuple else (key,)
        for part in parts:
            if isinstance(part, int) and part not in _INT64:
                raise _ExhaustingError("a key that is a huge integer")
            if not (part is None or isinstance(part, (str, int, float, bytes, Global))):
                raise TypeError
        yield key, value


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(make(machine))


def _tuple(count: int) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)))

    return push


def _dict(machine: _Machine) -> None:
    values = machine.since_mark()
    made: dict[Any, Any] = {}
    machine.set_items(made, values)
    machine.push(made)


def _set_items(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.set_items(machine.top(), values)


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.top(), [key, value])


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.append(machine.top(), [value])


def _appends(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.append(machine.top(), values)


_OPERATIONS: dict[int, Callable[[_Machine], Any]] = {
    ord("("): _Machine.mark,
    ord("0"): _Machine.drop,
    ord("1"): _Machine.since_mark,
    ord("2"): _push(_Machine.top),
    ord("N"): _push(lambda _: None),
    0x88: _push(lambda _: True),
    0x89: _push(lambda _: False),
    ord("I"): _Machine.integer_line,
    ord("L"): _Machine.integer_line,
    ord("J"): _push(lambda machine: int.from_bytes(machine.take(4), "little", signed=True)),
    ord("K"): _push(lambda machine: machine.number(1)),
    ord("M"): _push(lambda machine: machine.number(2)),
    0x8A: lambda machine: machine.integer(1),
    0x8B: lambda machine: machine.integer(4),
    ord("F"): _push(lambda machine: float(machine.line())),
    ord("G"): _push(lambda machine: struct.unpack(">d", machine.take(8))[0]),
    ord("S"): _Machine.string_line,
    ord("T"): _push(lambda machine: machine.take(machine.number(4)).decode("latin-1")),
    ord("U"): _push(lambda machine: machine.take(machine.number(1)).decode("latin-1")),
    ord("V"): _push(lambda machine: machine.line().decode("raw-unicode-escape")),
    ord("X"): _push(lambda machine: machine.text(machine.number(4))),
    0x8C: _push(lambda machine: machine.text(machine.number(1))),
    0x8D: _push(lambda machine: machine.text(machine.number(8))),
    ord("B"): _push(lambda machine: machine.take(machine.number(4))),
    ord("C"): _push(lambda machine: machine.take(machine.number(1))),
    0x8E: _push(lambda machine: machine.take(machine.number(8))),
    0x96: _push(lambda machine: machine.take(machine.number(8))),
    ord("]"): _push(lambda _: []),
    ord("l"): _push(_Machine.since_mark),
    ord("a"): _append,
    ord("e"): _appends,
    ord(")"): _push(lambda _: ()),
    ord("t"): _push(lambda machine: tuple(machine.since_mark())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("}"): _push(lambda _: {}),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): _set_items,
    0x8F: _push(lambda _: Call(_SET, ())),
    0x90: _appends,
    0x91: _push(lambda machine: Call(_FROZENSET, (machine.since_mark(),))),
    ord("c"): lambda machine: machine.global_(machine.line().decode(), machine.line().decode()),
    0x93: _Machine.stack_global,
    ord("R"): _Machine.reduce,
    0x81: _Machine.reduce,
    0x92: _Machine.new_with_names,
    ord("o"): _Machine.instance,
    ord("i"): _Machine.instance_line,
    ord("b"): _Machine.build,
    0x82: _Machine.extension,
    0x83: _Machine.extension,
    0x84: _Machine.extension,
    ord("P"): _Machine.persistent_line,
    ord("Q"): _push(lambda machine: PersistentId(machine.pop())),
    ord("p"): lambda machine: machine.put(int(machine.line()[:20])),
    ord("q"): lambda machine: machine.put(machine.number(1)),
    ord("r"): lambda machine: machine.put(machine.number(4)),
    0x94: _Machine.memoize,
    ord("g"): lambda machine: machine.get(int(machine.line()[:20])),
    ord("h"): lambda machine: machine.get(machine.number(1)),
    ord("j"): lambda machine: machine.get(machine.number(4)),
    0x80: _Machine.protocol,
    0x95: lambda machine: machine.number(8),
    0x97: _Machine.buffer,
    0x98: _Machine.buffer,
}
