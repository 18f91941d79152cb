"""The public functions: what they take and return, and which way a call goes.

Arrays with an address go to `calls`: checks, then the kernels for arrays on a GPU, NumPy for those
on the host. Arrays without one go to `traced`: tensors that torch.compile or torch.export traces,
JAX arrays, and those of other frameworks.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Literal

from .calls import checks, decode, metadata, scalars
from .calls.arguments import DECODE, METADATA
from .calls.refusals import check
from .errors import ArgTypeError, MissingDependencyError
from .schedule.sched_meta import SchedMeta

__all__ = ["check", "flash_mla_with_kvcache", "get_mla_metadata", "register_torch_ops"]

_modules = sys.modules


def get_mla_metadata(
    cache_seqlens: Any = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int = 1,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Any, Any]:
    """The split of a batch over the multiprocessors, for flash_mla_with_kvcache().

    With arguments: cache_seqlens [batch] int32, num_q_tokens_per_head_k = s_q * h_q // h_kv and
    num_heads_k = h_kv give (tile_scheduler_metadata int32 [num_sm_parts, 8], num_splits int32
    [batch + 1]) in the framework and on the device of cache_seqlens. They depend on the values of
    cache_seqlens: make them once for each decoding step and share them between its layers. The
    work is queued on the current stream, without synchronising, so it can be captured in a graph.

    Without arguments: (SchedMeta, None), FlashMLA's newer style; the first call that uses the
    object makes the metadata and binds it to its configuration.

    num_heads_q is accepted for FlashMLA's sake and not needed. Raises an ArgumentError.
    """
    if is_fp8_kvcache is not False or topk is not None:
        scalars.dense_only(METADATA.function, is_fp8_kvcache, topk=topk)
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
    arrays, options = (cache_seqlens,), (num_q_tokens_per_head_k, num_heads_k, num_heads_q)
    compiler = _modules.get("torch.compiler")
    if compiler is not None and compiler.is_dynamo_compiling():
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
    *,
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
    softmax_scale            576 ** -0.5 by default
    causal                   query i of s_q sees keys j <= cache_seqlens - s_q + i
    out, lse                 contiguous arrays to write into, instead of new ones (not in JAX)

    Returns out [batch, s_q, h_q, 512] in q's dtype and lse [batch, h_q, s_q] float32 (natural
    logarithm). A query that sees no key gives out = 0 and lse = +inf. All arrays are of one
    framework and device, and so are the results: NumPy, CuPy, PyTorch or JAX, under torch.compile
    and JAX's transformations too. Arrays of any other framework that has __dlpack__ count as CuPy
    arrays, or NumPy's in host memory. The work is queued on the framework's current stream;
    nothing synchronises. There is no gradient.

    Raises an ArgumentError before anything is allocated or launched, an environment error where
    the GPU or its compiler is missing, and DeviceCheckError when an *earlier* call met a page
    number, a length or metadata that it had to refuse (that request's rows are NaN; see check()).
    """
    if is_fp8_kvcache is not False or indices is not None:
        scalars.dense_only(DECODE.function, is_fp8_kvcache, indices=indices)
    lazy: SchedMeta | None = None
    if type(tile_scheduler_metadata) is SchedMeta:
        lazy, tile_scheduler_metadata = tile_scheduler_metadata, None
        if num_splits is not None:  # a call that was seen before would not look at it again
            checks.metadata_kind(None, num_splits, is_lazy=True)
    arrays: tuple[Any, ...] = q, k_cache, block_table, cache_seqlens
    if out is not None or lse is not None:
        arrays = (*arrays, tile_scheduler_metadata, num_splits, out, lse)
    elif lazy is None:
        arrays = (*arrays, tile_scheduler_metadata, num_splits)
    options = head_dim_v, softmax_scale, causal, lazy is not None
    compiler = _modules.get("torch.compiler")
    if compiler is not None and compiler.is_dynamo_compiling():  # of this thread: Dynamo says so
        return _decode("torch", arrays, options, lazy)
    return decode.eager(arrays, options, lazy, _decode)


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
        from .traced import torch_op

        return torch_op
    if where == "jax":
        from .traced import jax_op

        return jax_op
    from .traced import foreign

    return foreign
