"""Bad NumPy arguments of flash_mla_with_kvcache: a table of what test_checks.py tries, and the odd
arrays that it needs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from support.problems import make_problem

import flashmla_cupy
from flashmla_cupy.errors import (
    AliasingError,
    AlignmentError,
    ArgTypeError,
    DeviceMismatchError,
    DTypeError,
    OptionError,
    ReadOnlyError,
    ScalarError,
    ShapeError,
    StaleMetadataError,
    StrideError,
)

BF16 = ml_dtypes.bfloat16


class FlashMLASchedMeta:
    """By its name, FlashMLA's own metadata object."""


class VulkanArray:
    """An array of an unknown framework, on a device that DLPack calls kDLVulkan."""

    def __dlpack_device__(self):
        return 7, 0

    def __dlpack__(self, **_):
        raise AssertionError("a bad argument was imported")


class ShyArray(VulkanArray):
    """One in host memory that cannot be exported."""

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **_):
        raise BufferError("it is being written")


def arguments() -> dict:
    """Valid arguments: batch 3, s_q 2, h_q 16, h_kv 2, pages of 64, 5 table columns."""
    p = make_problem([70, 200, 0], s_q=2, h_q=16, h_kv=2, causal=True)
    metadata, num_splits = flashmla_cupy.get_mla_metadata(p.cache_seqlens, p.rows, p.h_kv)
    return {
        "q": p.q,
        "k_cache": p.k_cache,
        "block_table": p.block_table,
        "cache_seqlens": p.cache_seqlens,
        "head_dim_v": 512,
        "tile_scheduler_metadata": metadata,
        "num_splits": num_splits,
        "softmax_scale": None,
        "causal": True,
        "out": np.full((3, 2, 16, 512), 7, BF16),
        "lse": np.full((3, 16, 2), 7, np.float32),
    }


def strided(x, strides, shape=None):
    """A view with these strides, in elements."""
    shape = x.shape if shape is None else shape
    bytes_ = tuple(s * x.itemsize for s in strides)
    return np.lib.stride_tricks.as_strided(x, shape, bytes_, writeable=False)


def shifted(x, elements=1):
    """The same array at an address that is `elements` elements past a 64-byte boundary."""
    room = np.zeros(x.size + 64, x.dtype)
    start = -room.ctypes.data % 64 // x.itemsize + elements
    return room[start : start + x.size].reshape(x.shape)


def offset_bytes(x, count):
    """The same array at an address that is `count` bytes past a 64-byte boundary."""
    room = np.zeros(x.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64 + count
    return room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)


def with_gap(x):
    """The same shape, not contiguous in the last axis."""
    return np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2]


def every_other_row(x):
    return np.zeros((2 * x.shape[0], *x.shape[1:]), x.dtype)[::2]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def lazy():
    return flashmla_cupy.get_mla_metadata()[0]


def stale():
    """Metadata bound to a call with 8 heads."""
    p = make_problem([70, 200, 0], s_q=2, h_q=8, h_kv=2)
    meta = lazy()
    flashmla_cupy.flash_mla_with_kvcache(*p.arrays(), 512, meta)
    return meta


# (id, {argument: bad value, or a function of all arguments}, class, argument named, words in it)
BAD_ARRAYS = [
    ("q-list", {"q": lambda a: a["q"].tolist()}, ArgTypeError, "q", "list"),
    ("q-none", {"q": None}, ArgTypeError, "q", "None"),
    ("q-scalar", {"q": 1.5}, ArgTypeError, "q", "float 1.5"),
    ("q-on-vulkan", {"q": VulkanArray()}, DeviceMismatchError, "q", "DLPack device type 7"),
    ("q-not-exported", {"q": ShyArray()}, ArgTypeError, "q", "it is being written"),
    ("table-on-vulkan", {"block_table": VulkanArray()}, DeviceMismatchError, "block_table", "GPU"),
    ("q-3d", {"q": lambda a: a["q"][:, 0]}, ShapeError, "q", "q[:, None]"),
    ("q-5d", {"q": lambda a: a["q"][None]}, ShapeError, "q", "four axes"),
    ("q-0d", {"q": lambda a: a["q"][0, 0, 0, 0, ...].reshape(())}, ShapeError, "q", "four axes"),
    ("q-float32", {"q": lambda a: a["q"].astype(np.float32)}, DTypeError, "q", "float32"),
    ("q-float64", {"q": lambda a: a["q"].astype(np.float64)}, DTypeError, "q", "float64"),
    ("q-int8", {"q": lambda a: a["q"].astype(np.int8)}, DTypeError, "q", "int8"),
    ("q-complex", {"q": lambda a: a["q"].astype(np.complex64)}, DTypeError, "q", "complex64"),
    ("q-bits", {"q": lambda a: a["q"].view(np.uint16)}, DTypeError, "q", "uint16"),
    ("q-fp16", {"q": lambda a: a["q"].astype(np.float16)}, DTypeError, "k_cache", "float16"),
    ("q-512", {"q": lambda a: a["q"][..., :512]}, ShapeError, "q", "512"),
    ("q-575", {"q": lambda a: a["q"][..., 1:]}, ShapeError, "q", "575"),
    ("q-no-columns", {"q": lambda a: a["q"][..., :0]}, ShapeError, "q", "576"),
    ("q-last-stride", {"q": lambda a: with_gap(a["q"])}, StrideError, "q", "last axis"),
    ("q-reversed", {"q": lambda a: a["q"][::-1]}, StrideError, "q", "negative"),
    ("q-reversed-columns", {"q": lambda a: a["q"][..., ::-1]}, StrideError, "q", "stride 1"),
    (
        "q-broadcast",
        {"q": lambda a: np.broadcast_to(a["q"][:, :1], a["q"].shape)},
        StrideError,
        "q",
        "stride 0",
    ),
    ("q-address", {"q": lambda a: shifted(a["q"])}, AlignmentError, "q", "16 bytes"),
    (
        "q-row-stride",
        {"q": lambda a: np.zeros((3, 2, 16, 577), BF16)[..., :576]},
        AlignmentError,
        "q",
        "16 bytes",
    ),
    (
        "q-overlap",
        {"q": lambda a: strided(a["q"], (16 * 576, 8 * 576, 576, 1))},
        StrideError,
        "q",
        "overlap",
    ),
    ("q-batch", {"q": lambda a: a["q"][:2]}, ShapeError, "block_table", "2 requests"),
    ("cache-list", {"k_cache": lambda a: [a["k_cache"]]}, ArgTypeError, "k_cache", "list"),
    ("cache-none", {"k_cache": None}, ArgTypeError, "k_cache", "None"),
    (
        "cache-3d",
        {"k_cache": lambda a: a["k_cache"][:, :, 0]},
        ShapeError,
        "k_cache",
        "k_cache[:, :, None]",
    ),
    (
        "cache-fp16",
        {"k_cache": lambda a: a["k_cache"].astype(np.float16)},
        DTypeError,
        "k_cache",
        "bfloat16, the dtype of q",
    ),
    (
        "cache-e4m3",
        {"k_cache": lambda a: a["k_cache"].astype(ml_dtypes.float8_e4m3fn)},
        DTypeError,
        "k_cache",
        "fp8",
    ),
    (
        "cache-e5m2",
        {"k_cache": lambda a: a["k_cache"].astype(ml_dtypes.float8_e5m2)},
        DTypeError,
        "k_cache",
        "float8_e5m2",
    ),
    (
        "cache-656-bytes",
        {"k_cache": lambda a: np.zeros((9, 64, 1, 656), np.uint8)},
        DTypeError,
        "k_cache",
        "fp8",
    ),
    (
        "cache-512",
        {"k_cache": lambda a: a["k_cache"][..., :512]},
        ShapeError,
        "k_cache",
        "512",
    ),
    *(
        (
            f"cache-page-{n}",
            {"k_cache": lambda a, n=n: np.zeros((9, n, 2, 576), BF16)},
            ShapeError,
            "k_cache",
            "16, 32, 64, 128, 256",
        )
        for n in (0, 1, 63, 96, 512)
    ),
    (
        "cache-no-heads",
        {"k_cache": lambda a: a["k_cache"][:, :, :0]},
        ShapeError,
        "k_cache",
        "at least 1",
    ),
    (
        "cache-3-heads",
        {"k_cache": lambda a: np.zeros((9, 64, 3, 576), BF16)},
        ShapeError,
        "k_cache",
        "divides h_q = 16",
    ),
    (
        "cache-more-heads-than-q",
        {"k_cache": lambda a: np.zeros((9, 64, 32, 576), BF16)},
        ShapeError,
        "k_cache",
        "divides h_q = 16",
    ),
    ("cache-no-pages", {"k_cache": lambda a: a["k_cache"][:0]}, ShapeError, "k_cache", "one page"),
    (
        "cache-last-stride",
        {"k_cache": lambda a: with_gap(a["k_cache"])},
        StrideError,
        "k_cache",
        "last axis",
    ),
    ("cache-reversed", {"k_cache": lambda a: a["k_cache"][::-1]}, StrideError, "k_cache", "negat"),
    (
        "cache-one-page-for-all",
        {"k_cache": lambda a: np.broadcast_to(a["k_cache"][:1], a["k_cache"].shape)},
        StrideError,
        "k_cache",
        "stride 0",
    ),
    (
        "cache-token-overlap",
        {"k_cache": lambda a: strided(a["k_cache"], (73728, 576, 512, 1))},
        StrideError,
        "k_cache",
        "overlap",
    ),
    (
        "cache-page-overlap",
        {"k_cache": lambda a: strided(a["k_cache"], (1152, 1152, 576, 1))},
        StrideError,
        "k_cache",
        "overlap",
    ),
    (
        "cache-page-stride",
        {
            "k_cache": lambda a: strided(
                np.zeros(800000, BF16), (73729, 1152, 576, 1), (9, 64, 2, 576)
            )
        },
        AlignmentError,
        "k_cache",
        "16 bytes",
    ),
    (
        "cache-address",
        {"k_cache": lambda a: shifted(a["k_cache"])},
        AlignmentError,
        "k_cache",
        "16",
    ),
    (
        "cache-one-head-address",
        {"k_cache": lambda a: a["k_cache"][:, :, 1:, 4:]},
        ShapeError,
        "k_cache",
        "572",
    ),
    (
        "table-list",
        {"block_table": lambda a: a["block_table"].tolist()},
        ArgTypeError,
        "block_table",
        "list",
    ),
    ("table-none", {"block_table": None}, ArgTypeError, "block_table", "None"),
    *(
        (
            f"table-{dtype}",
            {"block_table": lambda a, dtype=dtype: a["block_table"].astype(dtype)},
            DTypeError,
            "block_table",
            f"got {dtype} (3, 5). Convert it with block_table.astype('int32')",
        )
        for dtype in ("int64", "uint32", "float32", "bool")
    ),
    (
        "table-1d",
        {"block_table": lambda a: a["block_table"].ravel()},
        ShapeError,
        "block_table",
        "two axes",
    ),
    (
        "table-3d",
        {"block_table": lambda a: a["block_table"][None]},
        ShapeError,
        "block_table",
        "(3,",
    ),
    (
        "table-rows",
        {"block_table": lambda a: a["block_table"][:2]},
        ShapeError,
        "block_table",
        "3 requests",
    ),
    (
        "table-more-rows",
        {"block_table": lambda a: np.concatenate([a["block_table"]] * 2)},
        ShapeError,
        "block_table",
        "block_table[:3]",
    ),
    (
        "table-last-stride",
        {"block_table": lambda a: with_gap(a["block_table"])},
        StrideError,
        "block_table",
        "stride 1",
    ),
    (
        "table-transposed",
        {"block_table": lambda a: np.asfortranarray(a["block_table"])},
        StrideError,
        "block_table",
        "stride 1",
    ),
    (
        "table-reversed",
        {"block_table": lambda a: a["block_table"][::-1]},
        StrideError,
        "block_table",
        "row stride",
    ),
    (
        "table-address",
        {"block_table": lambda a: offset_bytes(a["block_table"], 2)},
        AlignmentError,
        "block_table",
        "4 bytes",
    ),
    (
        "table-field",
        {"block_table": lambda a: np.zeros((3, 5), [("x", "u1"), ("page", "i4")])["page"]},
        StrideError,
        "block_table",
        "structured",
    ),
    ("lengths-list", {"cache_seqlens": [70, 200, 0]}, ArgTypeError, "cache_seqlens", "list"),
    ("lengths-none", {"cache_seqlens": None}, ArgTypeError, "cache_seqlens", "None"),
    *(
        (
            f"lengths-{dtype}",
            {"cache_seqlens": lambda a, dtype=dtype: a["cache_seqlens"].astype(dtype)},
            DTypeError,
            "cache_seqlens",
            f"got {dtype} (3,)",
        )
        for dtype in ("int64", "float32", "bool")
    ),
    (
        "lengths-short",
        {"cache_seqlens": lambda a: a["cache_seqlens"][:2]},
        ShapeError,
        "cache_seqlens",
        "shape (3,)",
    ),
    (
        "lengths-2d",
        {"cache_seqlens": lambda a: a["cache_seqlens"][:, None]},
        ShapeError,
        "cache_seqlens",
        "(3, 1)",
    ),
    (
        "lengths-stride",
        {"cache_seqlens": lambda a: with_gap(a["cache_seqlens"])},
        StrideError,
        "cache_seqlens",
        "contiguous",
    ),
    (
        "lengths-address",
        {"cache_seqlens": lambda a: offset_bytes(a["cache_seqlens"], 1)},
        AlignmentError,
        "cache_seqlens",
        "4 bytes",
    ),
    ("dv-576", {"head_dim_v": 576}, ShapeError, "head_dim_v", "pass 512"),
    ("dv-float", {"head_dim_v": 512.0}, ArgTypeError, "head_dim_v", "float 512.0"),
    ("dv-none", {"head_dim_v": None}, ArgTypeError, "head_dim_v", "None"),
    ("dv-bool", {"head_dim_v": True}, ArgTypeError, "head_dim_v", "bool True"),
    ("dv-negative", {"head_dim_v": -512}, ScalarError, "head_dim_v", "-512"),
    ("dv-array", {"head_dim_v": np.array([512])}, ArgTypeError, "head_dim_v", "numpy.ndarray"),
    ("scale-nan", {"softmax_scale": float("nan")}, ScalarError, "softmax_scale", "finite"),
    ("scale-inf", {"softmax_scale": float("inf")}, ScalarError, "softmax_scale", "finite"),
    ("scale-minus-inf", {"softmax_scale": -float("inf")}, ScalarError, "softmax_scale", "finite"),
    ("scale-zero", {"softmax_scale": 0.0}, ScalarError, "softmax_scale", "positive"),
    ("scale-minus-zero", {"softmax_scale": -0.0}, ScalarError, "softmax_scale", "positive"),
    ("scale-negative", {"softmax_scale": -0.04}, ScalarError, "softmax_scale", "positive"),
    ("scale-1e39", {"softmax_scale": 1e39}, ScalarError, "softmax_scale", "float32"),
    ("scale-1e-39", {"softmax_scale": 1e-39}, ScalarError, "softmax_scale", "float32"),
    ("scale-huge-int", {"softmax_scale": 10**400}, ScalarError, "softmax_scale", "finite"),
    ("scale-complex", {"softmax_scale": 1j}, ArgTypeError, "softmax_scale", "complex"),
    ("scale-string", {"softmax_scale": "0.04"}, ArgTypeError, "softmax_scale", "str '0.04'"),
    ("scale-bool", {"softmax_scale": True}, ArgTypeError, "softmax_scale", "causal=True"),
    ("scale-array", {"softmax_scale": np.array(0.04)}, ArgTypeError, "softmax_scale", "ndarray"),
    ("causal-none", {"causal": None}, ArgTypeError, "causal", "None"),
    ("causal-int", {"causal": 1}, ArgTypeError, "causal", "int 1"),
    ("causal-two", {"causal": 2}, ArgTypeError, "causal", "int 2"),
    ("causal-float", {"causal": 0.04}, ArgTypeError, "causal", "float"),
    ("causal-array", {"causal": np.array([True])}, ArgTypeError, "causal", "ndarray"),
    ("fp8", {"is_fp8_kvcache": True}, OptionError, "is_fp8_kvcache", "fp8"),
    ("fp8-none", {"is_fp8_kvcache": None}, OptionError, "is_fp8_kvcache", "False"),
    ("indices", {"indices": np.zeros((3, 2, 64), np.int32)}, OptionError, "causal", "indices"),
    ("sink-alone", {"attn_sink": np.zeros(16, np.float32)}, OptionError, "attn_sink", "indices"),
    ("descale-alone", {"descale_k": np.ones(1, np.float32)}, OptionError, "descale_k", "fp8"),
    (
        "metadata-flashmla",
        {"tile_scheduler_metadata": FlashMLASchedMeta()},
        ArgTypeError,
        "tile_scheduler_metadata",
        "another package",
    ),
    (
        "metadata-tuple",
        {"tile_scheduler_metadata": lambda a: (a["tile_scheduler_metadata"], a["num_splits"])},
        ArgTypeError,
        "tile_scheduler_metadata",
        "Unpack",
    ),
    (
        "metadata-none",
        {"tile_scheduler_metadata": None, "num_splits": None},
        ArgTypeError,
        "tile_scheduler_metadata",
        "get_mla_metadata()",
    ),
    (
        "metadata-list",
        {"tile_scheduler_metadata": lambda a: a["tile_scheduler_metadata"].tolist()},
        ArgTypeError,
        "tile_scheduler_metadata",
        "list",
    ),
    (
        "metadata-int64",
        {"tile_scheduler_metadata": lambda a: a["tile_scheduler_metadata"].astype(np.int64)},
        DTypeError,
        "tile_scheduler_metadata",
        "int64",
    ),
    (
        "metadata-1d",
        {"tile_scheduler_metadata": lambda a: a["tile_scheduler_metadata"].ravel()},
        ShapeError,
        "tile_scheduler_metadata",
        "(66, 8)",
    ),
    (
        "metadata-columns",
        {"tile_scheduler_metadata": lambda a: a["tile_scheduler_metadata"][:, :7]},
        ShapeError,
        "tile_scheduler_metadata",
        "(66, 7)",
    ),
    (
        "metadata-rows",
        {"tile_scheduler_metadata": lambda a: a["tile_scheduler_metadata"][:33]},
        StaleMetadataError,
        "tile_scheduler_metadata",
        "66 rows",
    ),
    (
        "metadata-stride",
        {"tile_scheduler_metadata": lambda a: every_other_row(a["tile_scheduler_metadata"])},
        StrideError,
        "tile_scheduler_metadata",
        "contiguous",
    ),
    (
        "metadata-address",
        {"tile_scheduler_metadata": lambda a: shifted(a["tile_scheduler_metadata"])},
        AlignmentError,
        "tile_scheduler_metadata",
        "16 bytes",
    ),
    ("splits-none", {"num_splits": None}, ArgTypeError, "num_splits", "second result"),
    (
        "splits-int64",
        {"num_splits": lambda a: a["num_splits"].astype(np.int64)},
        DTypeError,
        "num_splits",
        "int64",
    ),
    ("splits-text", {"num_splits": np.array(["a"])}, DTypeError, "num_splits", "str32"),
    (
        "metadata-fields",
        {"tile_scheduler_metadata": np.zeros(2, [("a", "i4")])},
        DTypeError,
        "tile_scheduler_metadata",
        "void32",
    ),
    (
        "splits-2d",
        {"num_splits": lambda a: a["num_splits"][None]},
        ShapeError,
        "num_splits",
        "(4,)",
    ),
    (
        "splits-batch",
        {"num_splits": lambda a: a["num_splits"][:3]},
        StaleMetadataError,
        "num_splits",
        "batch + 1 = 4",
    ),
    (
        "splits-stride",
        {"num_splits": lambda a: with_gap(a["num_splits"])},
        StrideError,
        "num_splits",
        "contiguous",
    ),
    (
        "splits-address",
        {"num_splits": lambda a: offset_bytes(a["num_splits"], 2)},
        AlignmentError,
        "num_splits",
        "4 bytes",
    ),
    (
        "splits-with-lazy-metadata",
        {"tile_scheduler_metadata": lambda a: lazy()},
        OptionError,
        "num_splits",
        "Leave num_splits out",
    ),
    (
        "lazy-of-another-configuration",
        {"tile_scheduler_metadata": lambda a: stale(), "num_splits": None},
        StaleMetadataError,
        "tile_scheduler_metadata",
        "h_q 8 -> 16, causal False -> True",
    ),
    ("out-list", {"out": []}, ArgTypeError, "out", "list"),
    ("out-shape", {"out": lambda a: a["out"][..., :511]}, ShapeError, "out", "(3, 2, 16, 512)"),
    ("out-576", {"out": lambda a: np.zeros((3, 2, 16, 576), BF16)}, ShapeError, "out", "576"),
    ("out-dtype", {"out": lambda a: a["out"].astype(np.float16)}, DTypeError, "out", "bfloat16"),
    (
        "out-gap",
        {"out": lambda a: np.zeros((3, 2, 16, 576), BF16)[..., :512]},
        StrideError,
        "out",
        "contiguous",
    ),
    ("out-address", {"out": lambda a: shifted(a["out"])}, AlignmentError, "out", "16 bytes"),
    ("out-read-only", {"out": lambda a: read_only(a["out"])}, ReadOnlyError, "out", "writable"),
    (
        "out-is-in-q",
        {"out": lambda a: a["q"].ravel()[: a["out"].size].reshape(a["out"].shape)},
        AliasingError,
        "out",
        "apart from q",
    ),
    (
        "out-is-in-cache",
        {"out": lambda a: a["k_cache"].ravel()[64 : 64 + a["out"].size].reshape(a["out"].shape)},
        AliasingError,
        "out",
        "apart from k_cache",
    ),
    (
        "out-is-table",
        {"block_table": lambda a: a["out"].view(np.int32).ravel()[:15].reshape(3, 5)},
        AliasingError,
        "out",
        "apart from block_table",
    ),
    (
        "out-is-lengths",
        {"cache_seqlens": lambda a: a["out"].view(np.int32).ravel()[-3:]},
        AliasingError,
        "out",
        "apart from cache_seqlens",
    ),
    (
        "out-is-metadata",
        {
            "tile_scheduler_metadata": lambda a: (
                a["out"].view(np.int32).ravel()[: 66 * 8].reshape(66, 8)
            )
        },
        AliasingError,
        "out",
        "apart from tile_scheduler_metadata",
    ),
    (
        "out-is-lse",
        {"lse": lambda a: a["out"].view(np.float32).ravel()[:96].reshape(3, 16, 2)},
        AliasingError,
        "out",
        "apart from lse",
    ),
    ("lse-none-array", {"lse": 0}, ArgTypeError, "lse", "int 0"),
    ("lse-shape", {"lse": lambda a: a["lse"].swapaxes(1, 2)}, ShapeError, "lse", "(3, 16, 2)"),
    ("lse-dtype", {"lse": lambda a: a["lse"].astype(np.float64)}, DTypeError, "lse", "float32"),
    (
        "lse-transposed",
        {"lse": lambda a: a["lse"].swapaxes(1, 2).copy().swapaxes(1, 2)},
        StrideError,
        "lse",
        "contiguous",
    ),
    ("lse-address", {"lse": lambda a: offset_bytes(a["lse"], 2)}, AlignmentError, "lse", "4 bytes"),
    ("lse-read-only", {"lse": lambda a: read_only(a["lse"])}, ReadOnlyError, "lse", "writable"),
    (
        "lse-is-lengths",
        {"cache_seqlens": lambda a: a["lse"].view(np.int32).ravel()[:3]},
        AliasingError,
        "lse",
        "apart from cache_seqlens",
    ),
    (
        "lse-is-splits",
        {"num_splits": lambda a: a["lse"].view(np.int32).ravel()[:4]},
        AliasingError,
        "lse",
        "apart from num_splits",
    ),
]
