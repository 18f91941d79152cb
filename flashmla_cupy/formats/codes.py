"""Numbers and their codes: e4m3, e8m0 and bfloat16, by the arithmetic of each framework.

`Codes` is the definition, in integer arithmetic that NumPy and CuPy share; PyTorch and JAX have
conversions of their own, which give the same bits (and are tested to).

e4m3 (float8_e4m3fn: OCP 8-bit Floating Point, version 1.0): a sign, four bits of exponent with a
bias of 7, three of mantissa; the largest number is 448, 0x7f and 0xff are NaN, and there is no
infinity. A float32 is rounded to the nearest, ties to even; a finite one beyond 448 becomes 448
with its sign, as by cvt.rn.satfinite (PTX ISA); NaN and infinities, which no cache should hold,
become 0x7f, so that they show.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ..frameworks import framework

E4M3_MAX = 448.0
E4M3_NAN = 0x7F


class Codes:
    """NumPy and CuPy. Arrays are of `xp`; codes are uint8, and come in a last axis of bytes."""

    def __init__(self, name: str, xp: Any) -> None:
        self.name, self.xp = name, xp
        self.uint8: Any = np.dtype(np.uint8)
        self.float32: Any = np.dtype(np.float32)

    def quiet(self) -> AbstractContextManager[Any]:
        """NumPy warns of what overflows, which here is foreseen."""
        return np.errstate(all="ignore")

    def contiguous(self, x: Any) -> Any:
        return self.xp.ascontiguousarray(x)

    def copy(self, x: Any) -> Any:
        """The same values in new memory, row by row."""
        return self.plain_bits(x).copy(order="C").view(x.dtype)

    def view(self, x: Any, dtype: Any) -> Any:
        """The same bytes, the last axis counted anew."""
        return self.contiguous(x).view(dtype)

    def to_bytes(self, x: Any) -> Any:
        """[..., n] of any dtype -> [..., n * itemsize] uint8."""
        return self.view(x, self.uint8)

    def widen(self, x: Any) -> Any:
        """float32 of bfloat16, float16 or float32."""
        if x.dtype.name == "bfloat16":
            bits = self.view(x, np.uint16).astype(np.uint32) << 16
            return bits.view(np.float32)
        return x.astype(np.float32)

    def narrow(self, x: Any, dtype: str) -> Any:
        """float32 rounded to "bfloat16", "float16", "float32", or, in NumPy, "float64"."""
        if dtype == "bfloat16":
            ml_dtypes: Any = importlib.import_module("ml_dtypes")
            return self.view(self.bfloat16(x), np.dtype(ml_dtypes.bfloat16))
        if dtype == "float16":
            return self.view(self.float16(x), np.dtype(np.float16))
        return x.astype(dtype)

    def bfloat16(self, x: Any) -> Any:
        """The bytes of float32 [..., n], rounded to the nearest, ties to even; NaN is 0x7fc0."""
        xp = self.xp
        bits = self.view(x, np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
        return self.to_bytes(xp.where(xp.isnan(x), 0x7FC0, rounded).astype(np.uint16))

    def float16(self, x: Any) -> Any:
        """The same for float16; NaN is 0x7e00 (of which a GPU's conversion would make 0x7fff)."""
        xp = self.xp
        rounded = self.view(x.astype(np.float16), np.uint16)
        return self.to_bytes(xp.where(xp.isnan(x), 0x7E00, rounded).astype(np.uint16))

    def from_bfloat16(self, codes: Any) -> Any:
        """float32 [..., n] of bytes [..., 2 n]."""
        bits = self.view(codes, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32)

    def from_float32(self, codes: Any) -> Any:
        """float32 [..., n] of bytes [..., 4 n]."""
        return self.view(codes, np.float32)

    def e4m3(self, x: Any, source: Any = None) -> Any:
        """The codes of float32 x. source: what x was computed from, None for x itself; where it is
        finite, an infinite x is one that float32 could not hold, and is limited as well."""
        xp = self.xp
        is_number = xp.isfinite(x if source is None else source)
        size = xp.minimum(xp.abs(x), np.float32(E4M3_MAX))
        bits = self.view(size, np.uint32)
        # Of float32's mantissa three bits remain; the exponent's bias changes from 127 to 7.
        normal = ((bits + (0x7FFFF + (bits >> 20 & 1)).astype(np.uint32)) >> 20).astype(
            np.int32
        ) - (120 << 3)
        small = size < np.float32(2.0**-6)
        subnormal = xp.rint(xp.where(small, size, np.float32(0)) * np.float32(512))  # of 2^-9
        code = xp.where(small, subnormal, normal.astype(np.float32))
        code = code + np.float32(128) * xp.signbit(x)
        return xp.where(is_number, code, np.float32(E4M3_NAN)).astype(np.uint8)

    def from_e4m3(self, codes: Any) -> Any:
        """float32 of codes."""
        codes = codes.astype(np.uint32)
        where = self.xp.where
        normal = (((codes & 0x7F) << 20) + np.uint32(120 << 23)).view(np.float32)
        # No subnormal float32 comes up on the way: XLA's threads take those for 0.
        subnormal = (codes & 7).astype(np.float32) * np.float32(2.0**-9)
        size = where(codes & 0x78 == 0, subnormal, normal)
        size = where(codes & 0x7F == E4M3_NAN, np.float32(np.nan), size)
        return where(codes >= 0x80, -size, size)

    def from_e8m0(self, codes: Any) -> Any:
        """float32 of codes."""
        codes = codes.astype(np.uint32)
        value = self.xp.where(codes == 0, np.uint32(1 << 22), codes << 23).view(np.float32)
        return self.xp.where(codes == 255, np.float32(np.nan), value)

    def power_of_two_above(self, x: Any) -> Any:
        """The smallest power of two that is not below x, a positive normal float32."""
        bits = self.view(x, np.uint32)
        return ((bits + np.uint32(0x7FFFFF)) & np.uint32(0xFF800000)).view(np.float32)

    def e8m0(self, x: Any) -> Any:
        """The codes of powers of two, float32 and normal: their biased exponents."""
        return (self.view(x, np.uint32) >> 23).astype(np.uint8)

    def largest(self, x: Any) -> Any:
        """The largest finite absolute value along the last axis."""
        xp = self.xp
        return xp.where(xp.isfinite(x), xp.abs(x), np.float32(0)).max(axis=-1)

    def at_least(self, least: float, x: Any) -> Any:
        return self.xp.maximum(x, np.float32(least))

    def concatenate(self, parts: list[Any]) -> Any:
        return self.xp.concatenate(parts, axis=-1)

    def zeros(self, shape: tuple[int, ...], like: Any) -> Any:
        """New bytes beside the array `like`."""
        return self.xp.zeros(shape, self.uint8)

    # --- for writing into a cache --------------------------------------------------------------

    def plain_bits(self, x: Any) -> Any:
        """A view of a dtype that every operation takes."""
        return x.view(np.uint16) if x.dtype.itemsize == 2 else x

    def can_look_at(self, x: Any) -> bool:
        """Whether the values of x can be read without waiting for a device."""
        return self.name == "numpy"

    def arange(self, n: int, like: Any) -> Any:
        return self.xp.arange(n)

    def as_int32(self, x: Any) -> Any:
        return x.astype(np.int32)


class TorchCodes(Codes):
    """PyTorch tensors, on any device."""

    def __init__(self, name: str, xp: Any) -> None:
        self.name, self.xp = name, xp
        self.uint8, self.float32 = xp.uint8, xp.float32

    def quiet(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def contiguous(self, x: Any) -> Any:
        return x.contiguous()

    def copy(self, x: Any) -> Any:
        return x.clone(memory_format=self.xp.contiguous_format)

    def widen(self, x: Any) -> Any:
        return x.to(self.float32)

    def narrow(self, x: Any, dtype: str) -> Any:
        kind = getattr(self.xp, dtype)
        return x.to(kind) if kind == self.float32 else self.view(getattr(self, dtype)(x), kind)

    def bfloat16(self, x: Any) -> Any:
        return self._rounded(x, self.xp.bfloat16, 0x7FC0)

    def float16(self, x: Any) -> Any:
        return self._rounded(x, self.xp.float16, 0x7E00)

    def _rounded(self, x: Any, dtype: Any, nan: int) -> Any:
        xp = self.xp
        rounded = self.view(x.to(dtype), xp.int16)
        return self.to_bytes(xp.where(xp.isnan(x), nan, rounded).to(xp.int16))

    def from_bfloat16(self, codes: Any) -> Any:
        return self.view(codes, self.xp.bfloat16).to(self.float32)

    def from_float32(self, codes: Any) -> Any:
        return self.view(codes, self.float32)

    def e4m3(self, x: Any, source: Any = None) -> Any:
        xp = self.xp
        is_number = xp.isfinite(x if source is None else source)
        limited = xp.clamp(x, -E4M3_MAX, E4M3_MAX)
        codes = self.view(limited.to(xp.float8_e4m3fn), xp.uint8)
        return xp.where(is_number, codes, E4M3_NAN).to(xp.uint8)

    def from_e4m3(self, codes: Any) -> Any:
        return self.view(codes, self.xp.float8_e4m3fn).to(self.float32)

    def from_e8m0(self, codes: Any) -> Any:
        xp = self.xp
        codes = codes.to(xp.int32)
        value = self.view(xp.where(codes == 0, 1 << 22, codes << 23).to(xp.int32), xp.float32)
        return xp.where(codes == 255, float("nan"), value)

    def power_of_two_above(self, x: Any) -> Any:
        bits = self.view(x, self.xp.int32)
        return self.view((bits + 0x7FFFFF) & ~0x7FFFFF, self.float32)

    def e8m0(self, x: Any) -> Any:
        return (self.view(x, self.xp.int32) >> 23).to(self.uint8)

    def largest(self, x: Any) -> Any:
        xp = self.xp
        return xp.where(xp.isfinite(x), xp.abs(x), 0.0).amax(dim=-1)

    def at_least(self, least: float, x: Any) -> Any:
        return self.xp.clamp(x, min=least)

    def concatenate(self, parts: list[Any]) -> Any:
        return self.xp.cat(parts, dim=-1)

    def zeros(self, shape: tuple[int, ...], like: Any) -> Any:
        return self.xp.zeros(shape, dtype=self.uint8, device=like.device)

    def plain_bits(self, x: Any) -> Any:
        return x

    def can_look_at(self, x: Any) -> bool:
        if self.xp.compiler.is_compiling() or type(x).__name__ != "Tensor":
            return False
        if framework("torch").is_traced(x):  # by make_fx
            return False
        try:
            x.data_ptr()
        except RuntimeError:  # of torch.vmap, which has none
            return False
        return bool(x.device.type == "cpu")

    def arange(self, n: int, like: Any) -> Any:
        return self.xp.arange(n, device=like.device)

    def as_int32(self, x: Any) -> Any:
        return x.to(self.xp.int32)


class JaxCodes(Codes):
    """JAX arrays and tracers."""

    def __init__(self, name: str, xp: Any) -> None:
        self.name, self.xp = name, xp
        self.uint8, self.float32 = xp.dtype("uint8"), xp.dtype("float32")

    def quiet(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def contiguous(self, x: Any) -> Any:
        return x

    def copy(self, x: Any) -> Any:
        """Of its own in JAX too, where a caller may donate it."""
        return self.xp.copy(x)

    def widen(self, x: Any) -> Any:
        return x.astype(self.float32)

    def narrow(self, x: Any, dtype: str) -> Any:
        kind = self.xp.dtype(dtype)
        return x.astype(kind) if kind == self.float32 else getattr(self, dtype)(x).view(kind)

    def bfloat16(self, x: Any) -> Any:
        return self._rounded(x, self.xp.bfloat16, 0x7FC0)

    def float16(self, x: Any) -> Any:
        return self._rounded(x, self.xp.float16, 0x7E00)

    def _rounded(self, x: Any, dtype: Any, nan: int) -> Any:
        xp = self.xp
        rounded = x.astype(dtype).view(xp.uint16)
        return self.to_bytes(xp.where(xp.isnan(x), xp.uint16(nan), rounded))

    def from_bfloat16(self, codes: Any) -> Any:
        return codes.view(self.xp.bfloat16).astype(self.float32)

    def e4m3(self, x: Any, source: Any = None) -> Any:
        xp = self.xp
        is_number = xp.isfinite(x if source is None else source)
        limited = xp.clip(x, -E4M3_MAX, E4M3_MAX)
        codes = limited.astype(xp.float8_e4m3fn).view(xp.uint8)
        return xp.where(is_number, codes, xp.uint8(E4M3_NAN))

    def from_e4m3(self, codes: Any) -> Any:
        return codes.view(self.xp.float8_e4m3fn).astype(self.float32)

    def can_look_at(self, x: Any) -> bool:
        return False


_KINDS = {"numpy": Codes, "cupy": Codes, "torch": TorchCodes, "jax": JaxCodes}
_MODULES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax.numpy"}
_found: dict[str, Codes] = {}


def codes_of(framework: str) -> Codes:
    """The arithmetic of the framework "numpy", "cupy", "torch" or "jax": one object, whichever of
    several threads asks first."""
    found = _found.get(framework)
    if found is None:
        made = _KINDS[framework](framework, importlib.import_module(_MODULES[framework]))
        found = _found.setdefault(framework, made)
    return found
