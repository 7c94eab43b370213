"""The element types of machine learning as zarr data types: bfloat16 and float8, over `ml_dtypes`.

Names and fill values are those of the zarr-extensions registry (bfloat16, float8_e4m3fn, …), which other readers (tensorstore) follow too:
a number, "NaN", "Infinity", "-Infinity", or the bits as "0x…". They reach zarr through the entry points `zarr.data_type`, and through
`register` where Tether was not installed with them. zarr v2 has no names for these types, so neither have these classes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard

import ml_dtypes
import numpy as np
from zarr.core.dtype import ZDType, data_type_registry

# zarr ≤ 3.1 has these names in `core` only; an entry of `zarr.dtype` would be the same class
from zarr.core.dtype.common import HasEndianness, HasItemSize

try:
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # zarr ≤ 3.3
    from zarr.core.dtype.common import DataTypeValidationError

__all__ = ["BFloat16", "Float8E4M3FN", "Float8E4M3FNUZ", "Float8E5M2", "Float8E5M2FNUZ", "register"]

_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclass(frozen=True, kw_only=True)
class _MLFloat(ZDType[Any, Any], HasItemSize):
    """A float of `ml_dtypes`; the classes below differ in their numpy dtype only."""

    scalar_cls: ClassVar[type[Any]]

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """Raises: DataTypeValidationError: it is another type (zarr asks each class in turn)."""
        if not cls._check_native_dtype(dtype):
            raise DataTypeValidationError(f"{dtype} is not {cls._zarr_v3_name}")
        return cls._of(dtype)

    @classmethod
    def _of(cls, _dtype: np.dtype[Any]) -> Self:
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.scalar_cls)

    @property
    def item_size(self) -> int:
        return np.dtype(self.scalar_cls).itemsize

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"zarr format 2 has no name for {cls._zarr_v3_name}, so {data!r} is none")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"{data!r} is not {cls._zarr_v3_name}")
        return cls()

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        """Raises: ValueError: for zarr format 2, which has no such type."""
        if zarr_format != 3:  # noqa: PLR2004 (zarr's format number)
            raise ValueError(f"zarr format 2 has no {self._zarr_v3_name}: write the array with zarr_format=3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> TypeGuard[Any]:
        return isinstance(data, int | float | np.floating | np.integer | self.scalar_cls) or (isinstance(data, str) and data in _SPECIAL)

    def cast_scalar(self, data: object) -> Any:
        """Raises: TypeError: it is no number."""
        if not self._check_scalar(data):
            raise TypeError(f"{data!r} can't be a {self._zarr_v3_name}: give a number")
        return self.scalar_cls(_SPECIAL.get(data, data) if isinstance(data, str) else data)

    def default_scalar(self) -> Any:
        return self.scalar_cls(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> Any:  # noqa: ARG002 (zarr's signature)
        """Raises: TypeError: it is none of the four forms."""
        if isinstance(data, str) and data.startswith("0x"):
            return self._of_bits(data)
        if isinstance(data, bool):
            raise TypeError(f"{data!r} can't be a {self._zarr_v3_name}: give a number")
        return self.cast_scalar(data)

    def _of_bits(self, text: str) -> Any:
        try:
            bits = bytes.fromhex(text[2:])
        except ValueError:
            bits = b""
        if len(bits) != self.item_size:
            raise TypeError(f"{text!r} are not the bits of a {self._zarr_v3_name}: give 0x and {2 * self.item_size} hex digits")
        return np.frombuffer(bits if sys.byteorder == "big" else bits[::-1], self.scalar_cls)[0]

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> float | str:  # noqa: ARG002
        """A number is exact: each of these floats is a double too."""
        value = float(self.cast_scalar(data))
        return next((name for name, special in _SPECIAL.items() if repr(special) == repr(value)), value)


@dataclass(frozen=True, kw_only=True)
class BFloat16(_MLFloat, HasEndianness):
    """The upper half of a float32."""

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    scalar_cls = ml_dtypes.bfloat16
    _zarr_v3_name = "bfloat16"

    @classmethod
    def _of(cls, dtype: np.dtype[Any]) -> Self:
        native: Literal["little", "big"] = sys.byteorder
        swapped: Literal["little", "big"] = "big" if native == "little" else "little"
        return cls(endianness=native if dtype == np.dtype(cls.scalar_cls) else swapped)

    def to_native_dtype(self) -> np.dtype[Any]:
        native = np.dtype(self.scalar_cls)
        # numpy takes this type with the order spelled out for another one than without, so it is spelled where it differs only
        swapped: np.dtype[Any] = native.newbyteorder("S")
        return native if self.endianness == sys.byteorder else swapped


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(_MLFloat):
    """4 bits of exponent, 3 of mantissa, no infinity."""

    dtype_cls = type(np.dtype(ml_dtypes.float8_e4m3fn))
    scalar_cls = ml_dtypes.float8_e4m3fn
    _zarr_v3_name = "float8_e4m3fn"


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FNUZ(_MLFloat):
    """The same with one NaN and no negative zero."""

    dtype_cls = type(np.dtype(ml_dtypes.float8_e4m3fnuz))
    scalar_cls = ml_dtypes.float8_e4m3fnuz
    _zarr_v3_name = "float8_e4m3fnuz"


@dataclass(frozen=True, kw_only=True)
class Float8E5M2(_MLFloat):
    """5 bits of exponent, 2 of mantissa, as IEEE 754 would have it."""

    dtype_cls = type(np.dtype(ml_dtypes.float8_e5m2))
    scalar_cls = ml_dtypes.float8_e5m2
    _zarr_v3_name = "float8_e5m2"


@dataclass(frozen=True, kw_only=True)
class Float8E5M2FNUZ(_MLFloat):
    """The same with one NaN, no infinity and no negative zero."""

    dtype_cls = type(np.dtype(ml_dtypes.float8_e5m2fnuz))
    scalar_cls = ml_dtypes.float8_e5m2fnuz
    _zarr_v3_name = "float8_e5m2fnuz"


def register() -> None:
    """Make zarr know them; a name that has an implementation already (zarr's own, one day) keeps it."""
    # Not left to the entry points: zarr 3.1 collects those and never loads them. Registering a class again changes nothing.
    for cls in (BFloat16, Float8E4M3FN, Float8E4M3FNUZ, Float8E5M2, Float8E5M2FNUZ):
        if cls._zarr_v3_name not in data_type_registry.contents:
            data_type_registry.register(cls._zarr_v3_name, cls)
