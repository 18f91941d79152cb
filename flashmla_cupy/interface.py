"""The public functions: checks, then the kernels for arrays on a GPU, NumPy for those on the host.

A call whose signature was seen before goes to the launch after one look-up (see `plans`), which
keeps the host time of a layer at a few microseconds. Arrays without an address to launch with take
another way (see `routes`).
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, cast

from . import reference
from .calls import checks, scalars
from .calls import decode as plans
from .calls import metadata as metadata_plans
from .calls.layouts import DECODE
from .errors import ArgTypeError, DeviceCheckError
from .frameworks import HERE, is_foreign
from .gpu.geometry import Addresses
from .schedule.sched_meta import SchedMeta, stale_requests
from .traced import foreign as routes

if TYPE_CHECKING:
    from .calls.metadata import MetadataPlan
    from .gpu.decode_launch import DecodeLaunch
    from .gpu.engine import Engine

METADATA = "get_mla_metadata"
_modules = sys.modules
_engines: dict[int, Engine] = {}  # those used so far, for check()
_host_violations: list[DeviceCheckError] = []  # at most one: what check() has yet to raise
_bind_lock = threading.Lock()


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
    function = METADATA
    if is_fp8_kvcache is not False or topk is not None:
        scalars.dense_only(function, is_fp8_kvcache, topk=topk)
    if cache_seqlens is None and num_q_tokens_per_head_k is None:
        return SchedMeta(), None
    if cache_seqlens is None or num_q_tokens_per_head_k is None:
        missing = "cache_seqlens" if cache_seqlens is None else "num_q_tokens_per_head_k"
        raise ArgTypeError(
            missing,
            "both of cache_seqlens and num_q_tokens_per_head_k, or neither",
            "None",
            "Pass get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv), or no argument.",
            function,
        )
    compiler = _modules.get("torch.compiler")
    if (compiler is not None and compiler.is_compiling()) or routes.is_fake(cache_seqlens):
        from .traced import torch_op

        return torch_op.traced_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k)
    if is_foreign(cache_seqlens):
        cache_seqlens = routes.imported("cache_seqlens", cache_seqlens, function)
    arguments = num_q_tokens_per_head_k, num_heads_k, num_heads_q
    plan, address, key = metadata_plans.find(cache_seqlens, *arguments)
    if plan is not None:
        return plan(cache_seqlens, address)
    framework, infos = checks.describe({"cache_seqlens": cache_seqlens}, function)
    lengths = infos["cache_seqlens"]
    checks.lengths(lengths, None, function)
    rows = scalars.integer("num_q_tokens_per_head_k", num_q_tokens_per_head_k, function)
    h_kv = scalars.integer("num_heads_k", num_heads_k, function, least=1)
    if num_heads_q is not None:
        scalars.integer("num_heads_q", num_heads_q, function)
    if framework.name == "jax":
        from .traced import jax_op

        return jax_op.metadata(cache_seqlens, rows, h_kv)
    plan = metadata_plans.make(framework, lengths, rows, h_kv, _engine, key)
    return plan(cache_seqlens, lengths.ptr)


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
        scalars.dense_only(DECODE, is_fp8_kvcache, indices=indices)
    compiler = _modules.get("torch.compiler")
    if compiler is not None and compiler.is_compiling():
        from .traced import torch_op

        return torch_op.traced_decode(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            tile_scheduler_metadata,
            num_splits,
            softmax_scale,
            causal,
            out,
            lse,
        )
    lazy: SchedMeta | None = None
    if type(tile_scheduler_metadata) is SchedMeta:
        lazy, tile_scheduler_metadata = tile_scheduler_metadata, None
        if num_splits is not None:  # which a signature may not tell
            checks.metadata_kind(None, num_splits, is_lazy=True)
    arrays = (
        q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, out, lse
    )  # fmt: skip
    plan, pointers, key = plans.find(arrays, head_dim_v, softmax_scale, causal, lazy is not None)
    if plan is None or not plan.accepts(pointers):
        named = plans.Arrays(*arrays)
        options = plans.Options(head_dim_v, softmax_scale, causal, lazy is not None)
        results = routes.without_address(named, options, lazy, key)
        if results is not None:
            return results
        plan, pointers = plans.make(named, options, key, _engine)
    engine, framework = plan.engine, plan.framework
    if engine is None:
        _raise_host_violation()
    else:
        engine.raise_pending()
    if plan.is_empty:
        with framework.device_guard(plan.configuration.device):
            return (
                plan.new_out() if out is None else out,
                plan.new_lse() if lse is None else lse,
            )
    if engine is None:
        return _on_host(plan, plans.Arrays(*arrays), lazy)
    guard = framework.device_guard(plan.configuration.device)
    if lazy is not None:
        with guard:
            return _launch_lazy(engine, plan, pointers, out, lse, lazy)
    if guard is HERE:  # the usual case; entering a context that does nothing takes time
        return _launch(engine, plan, pointers, out, lse)
    with guard:
        return _launch(engine, plan, pointers, out, lse)


def check() -> None:
    """Waits for the work queued so far; raises DeviceCheckError if a call since the last time had
    to refuse a request, and then forgets it. The next call of flash_mla_with_kvcache() raises the
    same, without waiting, as soon as the device has reported it."""
    for engine in list(_engines.values()):
        engine.check()
    _raise_host_violation()


def _launch(
    engine: Engine,
    plan: plans.Plan,
    pointers: tuple[int, ...],
    out: Any,
    lse: Any,
    new_splits: int = 0,
) -> tuple[Any, Any]:
    """Allocates what is missing and launches; nothing here waits for the device. new_splits: the
    address of num_splits, if it and the metadata are yet to be made."""
    framework = plan.framework
    pointer = framework.pointer
    q, k_cache, table, cache_seqlens, metadata, _splits, out_pointer, lse_pointer = pointers
    if out is None and lse is None:
        out, lse = plan.new_results()
        out_pointer, lse_pointer = pointer(out), pointer(lse)
    elif out is None:
        out = plan.new_out()
        out_pointer = pointer(out)
    elif lse is None:
        lse = plan.new_lse()
        lse_pointer = pointer(lse)
    scratch = 0
    if plan.new_scratch is not None:  # freed at the end of this call, in the order of the stream
        _room, scratch = plan.new_scratch()
    cast("DecodeLaunch", plan.launch)(
        framework.stream(plan.configuration.device),
        Addresses(q, k_cache, metadata, cache_seqlens, table, out_pointer, lse_pointer, scratch),
        plan.softmax_scale,
        plan.causal,
        new_splits,
    )
    return out, lse


def _launch_lazy(
    engine: Engine,
    plan: plans.Plan,
    pointers: tuple[int, ...],
    out: Any,
    lse: Any,
    lazy: SchedMeta,
) -> tuple[Any, Any]:
    """With the metadata of a SchedMeta: its first call makes it, and binds it."""
    if lazy.bound is None:
        with _bind_lock:  # to the end: the stream has to see this call before any other one
            if lazy.bound is None:
                made = cast("MetadataPlan", plan.schedule).new()
                metadata, num_splits = map(plan.framework.pointer, made)
                pointers = _with_metadata(pointers, metadata)
                results = _launch(engine, plan, pointers, out, lse, num_splits)
                lazy.bind(plan.configuration, *made, metadata)
                return results
    lazy.require(plan.configuration)
    return _launch(engine, plan, _with_metadata(pointers, lazy.address), out, lse)


def _with_metadata(pointers: tuple[int, ...], metadata: int) -> tuple[int, ...]:
    return (*pointers[:4], metadata, *pointers[5:])


def _on_host(plan: plans.Plan, arrays: plans.Arrays, lazy: SchedMeta | None) -> tuple[Any, Any]:
    """The reference, on views of the arrays."""
    view = plan.framework.to_numpy
    if lazy is not None:
        with _bind_lock:
            if lazy.bound is None:
                made = cast("MetadataPlan", plan.schedule)(arrays.cache_seqlens, 0)
                lazy.bind(plan.configuration, *made, plan.framework.pointer(made[0]))
        lazy.require(plan.configuration)
    out = plan.new_out() if arrays.out is None else arrays.out
    lse = plan.new_lse() if arrays.lse is None else arrays.lse
    lengths = view(arrays.cache_seqlens)
    metadata = arrays.tile_scheduler_metadata if lazy is None else lazy.tile_scheduler_metadata
    result = reference.decode(
        view(arrays.q),
        view(arrays.k_cache),
        view(arrays.block_table),
        lengths,
        plan.softmax_scale,
        plan.causal,
        stale=stale_requests(view(metadata), lengths),
        out=view(out),
        lse=view(lse),
    )
    report(result.violation)
    return out, lse


def raise_pending() -> None:
    """Raises what earlier calls are known to have refused, on any device; does not wait."""
    for engine in list(_engines.values()):
        engine.raise_pending()
    _raise_host_violation()


def report(violation: DeviceCheckError | None) -> None:
    """Keeps what the reference refused, for the next call or check() to raise."""
    if violation is not None:
        _host_violations[:] = [violation]


def _raise_host_violation() -> None:
    if _host_violations:
        raise _host_violations.pop()


def _engine(device: int) -> Engine:
    """The engine of a CUDA device, remembered for check()."""
    from .gpu.engine import engine_of  # not needed, and so not imported, without a GPU

    engine = _engines[device] = engine_of(device)
    return engine
