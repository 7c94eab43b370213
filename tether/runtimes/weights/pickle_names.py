"""Pure: which classes and functions a pickle of weights may name, and how the error reads for the others.

Scanners that look for bad names were bypassed time and again (pip.main, timeit, runctx, f2py's myeval, ShapeEnv.evaluate_guards), so the
rule is the other way round: whatever is not on the list is refused. Names that a list of attacks has are told as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tether.errors import BadModelError, HostileModelError

__all__ = ["Global", "Names"]

_DTYPES = frozenset({
    "bool", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "half", "float", "double",
    "short", "int", "long", "complex32", "complex64", "complex128", "uint16", "uint32", "uint64", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "quint8", "qint8", "qint32", "quint4x2", "quint2x4",
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams",
})  # fmt: skip
_STORAGES = frozenset(
    f"{kind}Storage"
    for kind in (
        "Byte",
        "Char",
        "Short",
        "Int",
        "Long",
        "Half",
        "Float",
        "Double",
        "Bool",
        "BFloat16",
        "ComplexFloat",
        "ComplexDouble",
        "QUInt8",
        "QInt8",
        "QInt32",
        "QUInt4x2",
        "QUInt2x4",
    )
)
_VALUES = frozenset(
    {("torch", name) for name in _DTYPES | _STORAGES}
    | {("torch.storage", "UntypedStorage"), ("torch.storage", "TypedStorage"), ("torch.nn.parameter", "Parameter"), ("torch", "Tensor")}
)
"""May be named, not called."""
_CALLS = frozenset({
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch.serialization", "_get_layout"),
    ("_codecs", "encode"),
    ("builtins", "bytearray"),
    ("builtins", "complex"),
    ("builtins", "frozenset"),
    ("builtins", "set"),
})  # fmt: skip
_SCRIPT_CALLS = frozenset(
    ("torch.jit._pickle", name)
    for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "build_tensor_from_id", "restore_type_tag")
)
"""What TorchScript's pickler writes for typed lists; they are names of its own format there, not functions."""
_SCRIPT_ROOT = "__torch__"
"""TorchScript's classes: their code is in the archive, in a language of its own."""
_STATEFUL = frozenset({("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")})
"""What may be given attributes: `state_dict()` has `_metadata`."""
_ATTACKS = frozenset({
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "pty", "commands", "runpy", "importlib", "imp", "pkgutil", "code",
    "codeop", "bdb", "pdb", "profile", "cProfile", "trace", "timeit", "doctest", "pip", "ctypes", "_ctypes", "pickle", "_pickle",
    "cPickle", "marshal", "operator", "_operator", "webbrowser", "asyncio", "multiprocessing", "_posixsubprocess", "ssl", "http",
    "urllib", "urllib2", "requests", "aiohttp", "httplib", "ftplib", "smtplib", "signal", "distutils", "setuptools", "idlelib",
    "lib2to3", "ensurepip", "venv", "linecache", "gc", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.execfile",
    "builtins.getattr", "builtins.setattr", "builtins.delattr", "builtins.__import__", "builtins.open", "builtins.apply",
    "builtins.input", "builtins.breakpoint", "builtins.globals", "builtins.locals", "builtins.vars", "builtins.map",
    "builtins.filter", "io.open", "io.FileIO", "_io.open", "_io.FileIO", "codecs.open", "tempfile", "types.CodeType",
    "types.FunctionType", "functools.reduce", "numpy.f2py", "numpy.testing", "numpy.distutils", "torch.fx.experimental",
    "torch.hub", "torch.jit.unsupported_tensor_ops", "torch.utils.collect_env", "torch.utils.bottleneck",
    "torch.utils.cpp_extension", "torch._inductor", "torch._dynamo", "torch.load", "torch.serialization.load", "torch.jit.load",
})  # fmt: skip
"""How the names begin that attacks use and weights never do. It says how the error reads; refused is everything that is not allowed."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Names:
    """Which globals may be named."""

    def __init__(self, label: str, *, script: bool = False, judge: bool = True) -> None:
        self._label = label
        self._script = script
        self._judge = judge
        self.refused: str | None = None
        """The first one that may not, where it is not an error at once."""

    def take(self, module: object, name: object) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        found = Global("builtins" if module == "__builtin__" else module, name)
        if not self._allowed(found):
            self.refused = self.refused or str(found)
            if self._judge:
                raise self.error(found)
        return found

    def callable(self, found: object) -> Global:
        """It, if it may be called."""
        if not isinstance(found, Global):
            raise TypeError
        if self._judge and ((found.module, found.name) in _VALUES):
            raise self.error(found)
        return found

    def check_stateful(self, found: Global) -> None:
        """Refuse one whose results may not be given attributes."""
        if self._judge and (found.module, found.name) not in _STATEFUL and not self._of_script(found):
            raise self.error(found)

    def _allowed(self, found: Global) -> bool:
        pair = (found.module, found.name)
        return pair in _CALLS or pair in _VALUES or (self._script and (pair in _SCRIPT_CALLS or self._of_script(found)))

    def _of_script(self, found: Global) -> bool:
        return self._script and found.module.partition(".")[0] == _SCRIPT_ROOT and "." not in found.name

    def error(self, found: Global) -> BadModelError:
        name = str(found)[:200]
        if "." in found.name or any(start in _ATTACKS for start in _beginnings(str(found))):
            return HostileModelError(f"{self._label} is a pickle that calls {name!r}: loading it would run code, so it is refused")
        return BadModelError(
            f"{self._label} is a pickle that needs {name!r}, which could run code: save the weights alone, "
            "torch.save(model.state_dict(), …), "
            "or export the model (torch.export.save)"
        )


def _beginnings(name: str) -> Iterator[str]:
    """Of a dotted name, at each dot; at most ten."""
    parts = name.split(".", 10)[:10]
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))
