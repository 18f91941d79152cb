"""Memory layouts: what the kernels can read and write.

q and k_cache are read by the tensor memory accelerator (cuTensorMapEncodeTiled, CUDA driver API):
the base address and every stride must be multiples of 16 bytes, strides below 2**40 bytes. A
stride of an axis of size 1 means nothing and may be anything.
"""

from __future__ import annotations

from ..errors import AlignmentError, StrideError
from ..frameworks import ArrayInfo, numpy_dtype
from .wording import strides

TMA_BYTES = 16
TMA_STRIDE_LIMIT = 2**40


def latent_rows(name: str, info: ArrayInfo) -> None:
    """Rows in the last axis that a tensor map can read, no element twice."""
    if 0 in info.shape:
        return
    copy = f"Pass a contiguous copy of {name}."
    if info.strides[-1] != 1:
        raise StrideError(name, "a contiguous last axis (stride 1)", strides(info), copy)
    size = itemsize(info)
    outer = [(s, n) for s, n in zip(info.strides[:-1], info.shape[:-1], strict=True) if n > 1]
    if any(stride == 0 for stride, _ in outer):
        raise StrideError(name, "no broadcast axis (stride 0)", strides(info), copy)
    if any(stride < 0 for stride, _ in outer):
        raise StrideError(name, "no reversed axis (negative stride)", strides(info), copy)
    if any(stride * size % TMA_BYTES for stride, _ in outer):
        raise AlignmentError(
            name, f"strides that are multiples of {TMA_BYTES} bytes", strides(info), copy
        )
    if any(stride * size >= TMA_STRIDE_LIMIT for stride, _ in outer):
        raise StrideError(name, "strides below 2**40 bytes", strides(info), copy)
    reach = info.shape[-1]
    for stride, length in sorted(outer):
        if stride < reach:
            raise StrideError(name, "rows that do not overlap", strides(info), copy)
        reach += (length - 1) * stride
    aligned(name, info, TMA_BYTES)


def contiguous(name: str, info: ArrayInfo) -> None:
    """C order without gaps."""
    if 0 in info.shape:
        return
    expected = 1
    for length, stride in zip(reversed(info.shape), reversed(info.strides), strict=True):
        if length > 1 and stride != expected:
            remedy = f"Pass a contiguous copy of {name}."
            if name in ("out", "lse"):
                remedy = f"Allocate {name} as one contiguous array, or leave it out."
            raise StrideError(name, "a C-contiguous array", strides(info), remedy)
        expected *= length


def aligned(name: str, info: ArrayInfo, alignment: int) -> None:
    """An address that is a multiple of `alignment` bytes."""
    if info.ptr % alignment and 0 not in info.shape:
        raise AlignmentError(
            name,
            f"an address that is a multiple of {alignment} bytes",
            f"{info.ptr:#x}",
            f"Pass a fresh copy of {name}, not a view that starts inside a row.",
        )


def plain(info: ArrayInfo) -> ArrayInfo:
    """The same array with the strides of its axes of size 1 made plain, for the tensor map."""
    plain_strides = list(info.strides)
    inner = 1
    for axis in reversed(range(len(plain_strides))):
        if info.shape[axis] == 1:
            plain_strides[axis] = inner
        inner = max(inner, plain_strides[axis] * info.shape[axis])
    return info._replace(strides=tuple(plain_strides))


def span(info: ArrayInfo) -> tuple[int, int]:
    """(low, high): the bytes the array covers, gaps included, relative to its address."""
    if 0 in info.shape or not info.dtype:
        return 0, 0
    reach = [(n - 1) * s for n, s in zip(info.shape, info.strides, strict=True)]
    low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
    size = itemsize(info)
    return low * size, (high + 1) * size


def itemsize(info: ArrayInfo) -> int:
    """Bytes an element."""
    return numpy_dtype(info.dtype).itemsize
