"""The rows of the table of kernels for calls that gather tokens one by one: over FP8 caches, and by
lists."""

from __future__ import annotations

from .kernel import DECODE_FIELDS, Kernel
from .parameters import Parameters

PARAMETERS = Parameters(
    DECODE_FIELDS
    + """
    pointer cache, extra_cache, extra_indices, topk_length, extra_topk_length
    pointer attn_sink, descale_q, descale_k, max_logits, q
    int64 q_batch_stride, q_position_stride, q_head_stride
    int64 page_bytes, extra_page_bytes, extra_stride
    uint64 length_group
    int page_size, extra_page_size, extra_num_pages, page_shift, extra_page_shift
    int topk, extra_topk, lse_group, outside_is_none
    """,
    as_struct=True,
    tensor_maps=2,  # of q: for two stages, or, over few rows, the same twice
)


def _gather(
    name: str,
    source: str,
    shared_bytes: int,
    *defines: str,
    dtypes: tuple[str, ...] = ("bfloat16", "float16"),
    spill_bytes: int = 64,
    mma_loops: int = 3,  # Q K^T with softmax; P V of short and of long pieces
) -> Kernel:
    """A kernel for 64 query rows over the rows of one format of a cache."""
    return Kernel(
        name,
        source,
        ("sm_90a",),
        512,
        PARAMETERS,
        shared_bytes=shared_bytes,  # SHARED_BYTES
        dtypes=dtypes,
        defines=("GATHERED", f"GATHER={name}", *defines),
        registers=128,  # setmaxnreg shares them out anew by role
        spill_bytes=spill_bytes,
        mma_loops=mma_loops,
    )


_FP8 = "sm90_fp8_decode.cu"
_BF16 = ("bfloat16",)
_V32, _V4, _PER_TENSOR = "FORMAT_V32", "FORMAT_V4", "FORMAT_PER_TENSOR"
GATHER_V32 = _gather("gather_v32", _FP8, 231376, _V32)
GATHER_V4 = _gather("gather_v4", _FP8, 210896, _V4)
GATHER_V32_WIDE = _gather("gather_v32_wide", _FP8, 231376, _V32, "WIDE_PRODUCTS", dtypes=_BF16)
GATHER_V4_WIDE = _gather("gather_v4_wide", _FP8, 210896, _V4, "WIDE_PRODUCTS", dtypes=_BF16)
GATHER_E4M3 = _gather("gather_e4m3", _FP8, 219088, _PER_TENSOR)
GATHER_E4M3_Q_E4M3 = _gather(
    "gather_e4m3_q_e4m3", _FP8, 186320, _PER_TENSOR, "QUERY_E4M3", dtypes=_BF16
)
_16BIT = "sm90_gather_decode.cu"
GATHER_16BIT = _gather("gather_16bit", _16BIT, 226160, spill_bytes=128, mma_loops=2)
GATHER_16BIT_512 = _gather(
    "gather_16bit_512", _16BIT, 226160, "FORMAT_16BIT_512", spill_bytes=128, mma_loops=2
)


def _few_rows(
    name: str,
    shared_bytes: int,
    *defines: str,
    dtypes: tuple[str, ...] = ("bfloat16", "float16"),
    mma_loops: int = 2,  # Q K^T with softmax, and P V
) -> Kernel:
    """sm90_few_fp8_decode.cu for the rows of one format of a cache."""
    return Kernel(
        name,
        "sm90_few_fp8_decode.cu",
        ("sm_90a",),
        384,
        PARAMETERS,
        shared_bytes=shared_bytes,  # SHARED_BYTES
        dtypes=dtypes,
        defines=("GATHERED", f"FEW_ROWS_KERNEL={name}", *defines),
        registers=168,  # setmaxnreg shares them out anew by role
        spill_bytes=8,
        mma_loops=mma_loops,
    )


FEW_ROWS_V32 = _few_rows("few_rows_v32", 222008, "FORMAT_V32")
FEW_ROWS_V4 = _few_rows("few_rows_v4", 223600, "FORMAT_V4", mma_loops=3)  # P V of two kinds
FEW_ROWS_E4M3 = _few_rows("few_rows_e4m3", 215280, "FORMAT_PER_TENSOR")
FEW_ROWS_E4M3_Q_E4M3 = _few_rows(
    "few_rows_e4m3_q_e4m3", 215280, "FORMAT_PER_TENSOR", "QUERY_E4M3", dtypes=_BF16
)

COMBINE_GATHERED = Kernel(
    "combine_gathered",
    "combine.cu",
    ("sm_90a",),
    256,
    Parameters(
        """
        pointer tile_scheduler_metadata, out_partial, row_partial, out, lse, pairs
        int words, batch, s_q, h_q, group, slots, parts, slab_rows
        pointer attn_sink, max_logits
        int lse_group
        """
    ),
    dtypes=("bfloat16", "float16"),
    defines=("GATHERED",),
)

LIST_LENGTHS = Kernel(
    "list_lengths",
    "list_lengths.cu",
    ("sm_90a",),
    256,
    Parameters(
        """
        pointer topk_length, extra_topk_length, cache_seqlens
        uint64 length_group
        int batch, topk, extra_topk
        """
    ),
    registers=32,
)

GATHERING = (
    GATHER_V32,
    GATHER_V4,
    GATHER_V32_WIDE,
    GATHER_V4_WIDE,
    GATHER_E4M3,
    GATHER_E4M3_Q_E4M3,
    GATHER_16BIT,
    GATHER_16BIT_512,
    FEW_ROWS_V32,
    FEW_ROWS_V4,
    FEW_ROWS_E4M3,
    FEW_ROWS_E4M3_Q_E4M3,
    COMBINE_GATHERED,
    LIST_LENGTHS,
)

_FORMATS = {  # by the name of a CacheFormat
    "v32": GATHER_V32,
    "v4": GATHER_V4,
    "e4m3": GATHER_E4M3,
    "bfloat16": GATHER_16BIT,
    "float16": GATHER_16BIT,
    "bfloat16_512": GATHER_16BIT_512,
    "float16_512": GATHER_16BIT_512,
}
_WIDE = {"v32": GATHER_V32_WIDE, "v4": GATHER_V4_WIDE}  # products in bfloat16
_OF_E4M3_QUERIES = {"e4m3": GATHER_E4M3_Q_E4M3}
# Where all query rows of a slab fit a block. Their products need no wide variant.
_OF_FEW_ROWS = {"v32": FEW_ROWS_V32, "v4": FEW_ROWS_V4, "e4m3": FEW_ROWS_E4M3}
_OF_FEW_E4M3_QUERIES = {"e4m3": FEW_ROWS_E4M3_Q_E4M3}
FEW_ROWS = 16  # query rows of their blocks


def gather_kernel(cache_format: str, q_dtype: str, slab_rows: int, *, wide_fp8: bool) -> Kernel:
    """The kernel over a cache of a format for so many query rows of a slab; wide_fp8: for values
    beyond float16."""
    is_few = slab_rows <= FEW_ROWS
    if q_dtype == "float8_e4m3fn":
        return (_OF_FEW_E4M3_QUERIES if is_few else _OF_E4M3_QUERIES)[cache_format]
    if is_few and cache_format in _OF_FEW_ROWS:
        return _OF_FEW_ROWS[cache_format]
    usual = _FORMATS[cache_format]
    return _WIDE.get(cache_format, usual) if wide_fp8 else usual
