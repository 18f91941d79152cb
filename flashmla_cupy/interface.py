"""The public functions: what they take and return, and which way a call goes.

Arrays with an address go to `calls`: checks, then the kernels for arrays on a GPU, NumPy for those
on the host. Arrays without one go to `traced`: tensors that torch.compile or torch.export traces,
JAX arrays, and those of other frameworks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

from .calls import (
    checks,
    decode,
    metadata,
    paged_prefill,
    scalars,
    sparse_metadata,
    sparse_prefill,
)
from .calls.arguments import METADATA, SPARSE_PREFILL
from .calls.refusals import check
from .errors import ArgTypeError, MissingDependencyError
from .frameworks.shapes import shape_of
from .frameworks.tracing import is_compiling
from .operations import gathered, run
from .schedule.sched_meta import SchedMeta
from .sizes import HEAD_DIM_V

__all__ = [
    "check",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "register_torch_ops",
]


def get_mla_metadata(
    cache_seqlens: Any = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int = 1,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    topk_length: Any = None,
    extra_topk: int | None = None,
    extra_topk_length: Any = None,
) -> tuple[Any, Any]:
    """The split of a batch over the multiprocessors, for flash_mla_with_kvcache().

    With arguments: cache_seqlens [batch] int32, num_q_tokens_per_head_k = s_q * h_q // h_kv and
    num_heads_k = h_kv give (tile_scheduler_metadata int32 [num_sm_parts, 8], num_splits int32
    [batch + 1]) in the framework and on the device of cache_seqlens. They depend on the values of
    cache_seqlens: make them once for each decoding step and share them between its layers. The
    work is queued on the current stream, without synchronising, so it can be captured in a graph.

    Without arguments: (SchedMeta, None), FlashMLA's newer style; the first call that uses the
    object makes the metadata and binds it to its configuration.

    With topk, the width of indices, it is the split for lists of tokens, where each query token is
    a request of its own: num_heads_q is needed, since s_q = num_q_tokens_per_head_k / num_heads_q,
    and num_splits has batch * s_q + 1 entries. Of cache_seqlens only the batch counts. topk_length,
    [batch] or [batch, s_q] int32, says how much of each list does, if the call will have it;
    extra_topk and extra_topk_length are those of the extra cache.

    Otherwise num_heads_q is accepted for FlashMLA's sake and not needed; is_fp8_kvcache makes no
    difference. Raises an ArgumentError.
    """
    if is_fp8_kvcache is not False:
        scalars.is_fp8_kvcache(is_fp8_kvcache, METADATA.function)
    if cache_seqlens is None and num_q_tokens_per_head_k is None:
        return SchedMeta(), None
    if cache_seqlens is None or num_q_tokens_per_head_k is None:
        missing = "cache_seqlens" if cache_seqlens is None else "num_q_tokens_per_head_k"
        raise ArgTypeError(
            missing,
            "both of cache_seqlens and num_q_tokens_per_head_k, or neither",
            "None",
            "Pass get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv), or no argument.",
            METADATA.function,
        )
    if topk is not None:
        lists = (cache_seqlens, topk_length, extra_topk_length, None, None)
        sizes = (
            num_q_tokens_per_head_k,
            num_heads_k,
            num_heads_q,
            topk,
            0 if extra_topk is None else extra_topk,
        )
        made: tuple[Any, Any] = run(sparse_metadata.METADATA, lists, sizes)
        return made
    if not topk_length is extra_topk is extra_topk_length is None:
        lengths = {"topk_length": topk_length, "extra_topk_length": extra_topk_length}
        scalars.without("topk", METADATA.function, extra_topk=extra_topk, **lengths)
    arrays, options = (cache_seqlens,), (num_q_tokens_per_head_k, num_heads_k, num_heads_q)
    if is_compiling(cache_seqlens):
        return _make_metadata("torch", arrays, options)
    return metadata.eager(arrays, options, _make_metadata)


def flash_mla_with_kvcache(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Any = None,
    attn_sink: Any = None,
    extra_k_cache: Any = None,
    extra_indices_in_kvcache: Any = None,
    topk_length: Any = None,
    extra_topk_length: Any = None,
    *,
    descale_q: Any = None,
    descale_k: Any = None,
    wide_fp8: bool = False,
    out: Any = None,
    lse: Any = None,
) -> tuple[Any, Any]:
    """MLA decode attention over a paged cache; `reference` holds the definition.

    q                        [batch, s_q, h_q, 576] bfloat16 or float16
    k_cache                  [num_pages, page_size, h_kv, 576] of q's dtype; page_size 16, 32, 64,
                             128 or 256; V is its first 512 columns
    block_table              [batch, max_pages] int32; entries past the length are never read
    cache_seqlens            [batch] int32, tokens of each request, the s_q new ones included
    head_dim_v               512
    tile_scheduler_metadata, num_splits
                             both results of get_mla_metadata(), of either style
    softmax_scale            the width of q to the power of -0.5 by default, as FlashMLA's; no model
                             has this one: DeepSeek-V3 needs 0.1352 (deepseek.softmax_scale)
    causal                   query i of s_q sees keys j <= cache_seqlens - s_q + i
    out, lse                 contiguous arrays to write into, instead of new ones (not in JAX)

    Also FP8 caches and lists of tokens (`reference_sparse` holds the definition):

    is_fp8_kvcache           True for a k_cache [num_pages, page_size, 1, width] of bytes: 656
                             (V3.2), 584 (V4) or 576 a token (CacheFormat); q is as wide as its keys
    descale_q, descale_k     float32 [1], positive, for 576 bytes: factors of q, which may be
                             float8_e4m3fn then, and of the keys; 1 by default
    wide_fp8                 True on a GPU, for 656 or 584 bytes: products in bfloat16 instead of
                             float16, for caches with values beyond 8188; q is bfloat16
    indices                  [batch, s_q, topk] int32, the tokens that each query token sees, by
                             page * page_size + offset, -1 for none; then block_table and
                             cache_seqlens are not looked at and may be None, causal is False,
                             k_cache is FP8 or not, of 576 or 512 columns, and pages are of any
                             size
    topk_length              [batch] or [batch, s_q] int32: how much of each list counts
    attn_sink                [h_q] float32: out is scaled by exp(lse) / (exp(lse) + exp(attn_sink))
    extra_k_cache, extra_indices_in_kvcache, extra_topk_length
                             a second cache, of the same format, and its lists; each query token
                             sees the tokens of both

    Returns out [batch, s_q, h_q, 512] in q's dtype (bfloat16 for float8_e4m3fn) and lse
    [batch, h_q, s_q] float32 (natural logarithm). A query that sees no key gives out = 0 and
    lse = +inf. All arrays are of one framework and device, and so are the results: NumPy, CuPy,
    PyTorch or JAX, under torch.compile and JAX's transformations too. Arrays of any other framework
    that has __dlpack__ count as CuPy arrays, or NumPy's in host memory. The work is queued on the
    framework's current stream; nothing synchronises. There is no gradient.

    Raises an ArgumentError before anything is allocated or launched, an environment error where
    the GPU or its compiler is missing, and DeviceCheckError when an *earlier* call met a page
    number, a length or metadata that it had to refuse (that request's rows are NaN; see check()).
    """
    lazy: SchedMeta | None = None
    if type(tile_scheduler_metadata) is SchedMeta:
        lazy, tile_scheduler_metadata = tile_scheduler_metadata, None
        if num_splits is not None:  # a call that was seen before would not look at it again
            checks.metadata_kind(None, num_splits, is_lazy=True)
    options = head_dim_v, softmax_scale, causal, lazy is not None
    if not is_fp8_kvcache is wide_fp8 is False or not (
        indices is attn_sink is extra_k_cache is extra_indices_in_kvcache is None
        and topk_length is extra_topk_length is descale_q is descale_k is None
    ):
        named = {
            "q": q,
            "k_cache": k_cache,
            "block_table": block_table,
            "cache_seqlens": cache_seqlens,
            "indices": indices,
            "tile_scheduler_metadata": tile_scheduler_metadata,
            "num_splits": num_splits,
            "topk_length": topk_length,
            "attn_sink": attn_sink,
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "extra_topk_length": extra_topk_length,
            "descale_q": descale_q,
            "descale_k": descale_k,
            "out": out,
            "lse": lse,
        }
        return gathered(named, options, is_fp8_kvcache, wide_fp8, lazy)
    arrays: tuple[Any, ...] = q, k_cache, block_table, cache_seqlens
    if out is not None or lse is not None:
        arrays = (*arrays, tile_scheduler_metadata, num_splits, out, lse)
    elif lazy is None:
        arrays = (*arrays, tile_scheduler_metadata, num_splits)
    if is_compiling(q):
        return _decode("torch", arrays, options, lazy)
    return decode.eager(arrays, options, lazy, _decode)


def flash_mla_sparse_fwd(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
    d_v: int = HEAD_DIM_V,
    attn_sink: Any = None,
    topk_length: Any = None,
    *,
    descale_q: Any = None,
    descale_k: Any = None,
    wide_fp8: bool = False,
    out: Any = None,
    max_logits: Any = None,
    lse: Any = None,
) -> tuple[Any, Any, Any]:
    """Sparse MLA attention of a prompt; `reference_sparse` holds the definition.

    q            [s_q, h_q, d_qk] bfloat16 or float16, with s_q below 2**20; d_qk is 576, or 512
                 where the rotary columns are among those of V
    kv           [s_kv, 1, d_qk] of q's dtype; V is its first 512 columns. Or a paged cache
                 [num_pages, page_size, 1, width], FP8 too, as flash_mla_with_kvcache() takes with
                 indices, and q, descale_q, descale_k and wide_fp8 as there
    indices      [s_q, 1, topk] int32, the tokens of kv that each query token sees, of pages by
                 page * page_size + offset; what is below 0 or not below s_kv is no token. For a
                 batch, add the offset of each sequence.
    sm_scale     of the scores
    d_v          512
    attn_sink    [h_q] float32: out is scaled by exp(lse) / (exp(lse) + exp(attn_sink))
    topk_length  [s_q] int32: how much of each list counts
    out, max_logits, lse
                 contiguous arrays to write into, instead of new ones (not in JAX)

    Returns out [s_q, h_q, 512] in q's dtype (bfloat16 for float8_e4m3fn), and max_logits, the
    largest score, and lse (natural logarithm), both [s_q, h_q] float32. A query token that sees
    none gives out = 0, max_logits = -inf and lse = +inf; one whose topk_length is not from 0 to
    topk gives NaN, and is reported as in flash_mla_with_kvcache(). Raises an ArgumentError.
    """
    shape = getattr(kv, "shape", None)
    if not isinstance(shape, tuple):
        shape = shape_of(kv, "kv", SPARSE_PREFILL.function)
    if len(shape) == 4:
        inputs = q, kv, indices, attn_sink, topk_length, descale_q, descale_k
        outputs, options = (out, max_logits, lse), (sm_scale, d_v, wide_fp8)
        paged: tuple[Any, Any, Any] = run(paged_prefill.PAGED_PREFILL, inputs + outputs, options)
        return paged
    if not (descale_q is descale_k is None and wide_fp8 is False):
        scalars.wide_fp8(wide_fp8, SPARSE_PREFILL.function)
        alone = {"descale_q": descale_q, "descale_k": descale_k, "wide_fp8": wide_fp8 or None}
        scalars.without("pages in kv", SPARSE_PREFILL.function, **alone)
    arrays = q, kv, indices, attn_sink, topk_length, out, max_logits, lse
    results: tuple[Any, Any, Any] = run(sparse_prefill.PREFILL, arrays, (sm_scale, d_v))
    return results


def register_torch_ops() -> None:
    """Registers the PyTorch ops, so that saved programs which hold them can be loaded.

    torch.export.load() and torch._inductor.aoti_load_package() need the ops of a program before it
    is loaded. Importing flashmla_cupy after torch registers them too, and so does the first call
    that PyTorch traces. Raises MissingDependencyError without PyTorch."""
    try:
        _traced("torch")
    except ImportError as error:
        raise MissingDependencyError(
            "register_torch_ops() needs PyTorch, which cannot be imported. Install torch."
        ) from error


Where = Literal["torch", "jax", "foreign"]


def _decode(
    where: Where, arrays: tuple[Any, ...], options: tuple[Any, ...], lazy: SchedMeta | None
) -> tuple[Any, Any]:
    results: tuple[Any, Any] = _traced(where).decode(arrays, options, lazy)
    return results


def _make_metadata(
    where: Where, arrays: tuple[Any, ...], options: tuple[Any, ...]
) -> tuple[Any, Any]:
    results: tuple[Any, Any] = _traced(where).metadata(arrays, options)
    return results


def _traced(where: Where) -> ModuleType:
    """Who makes calls of arrays without an address. Imported when it is first needed."""
    if where == "torch":
        from .traced import torch_append, torch_op, torch_operations  # noqa: F401, whose ops go with them

        return torch_op
    if where == "jax":
        from .traced import jax_op

        return jax_op
    from .traced import foreign

    return foreign
