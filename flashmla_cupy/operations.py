"""Which way a call over FP8 caches or lists of tokens goes: one of `calls.operation`.

Arrays with an address go to the operation itself; others to `traced`, as in `interface`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

from .calls import fp8_decode, scalars, sparse_decode
from .calls.arguments import DECODE, FLOATS, FP8_DECODE, SPARSE_DECODE
from .calls.operation import Operation
from .errors import OptionError
from .frameworks.tracing import is_compiling
from .schedule.sched_meta import SchedMeta

Where = Literal["torch", "jax", "foreign"]


LISTS = (  # what has a meaning beside indices only
    "attn_sink",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "topk_length",
    "extra_topk_length",
)
DESCALES = ("descale_q", "descale_k")  # beside an FP8 cache only


def gathered(
    named: dict[str, Any],
    options: tuple[Any, ...],
    is_fp8_kvcache: Any,
    wide_fp8: Any,
    lazy: SchedMeta | None,
) -> tuple[Any, Any]:
    """flash_mla_with_kvcache() where tokens are looked up one by one: in an FP8 cache, or by lists.
    All its arrays by name, and the options of `arguments.DECODE`."""
    head_dim_v, softmax_scale, causal, is_lazy = options
    if named["indices"] is None:
        scalars.without("indices", DECODE.function, **{name: named[name] for name in LISTS})
        if is_fp8_kvcache is False:
            alone = {name: named[name] for name in DESCALES}
            scalars.without("is_fp8_kvcache", DECODE.function, **alone)
            if wide_fp8 is not False:
                scalars.without("is_fp8_kvcache", DECODE.function, wide_fp8=wide_fp8)
        dtype = str(getattr(named["k_cache"], "dtype", "")).removeprefix("torch.")
        scalars.says_fp8(is_fp8_kvcache, dtype not in FLOATS, f"of {dtype}")
        arrays = tuple([named[name] for name in FP8_DECODE.names])
        of_fp8 = head_dim_v, softmax_scale, causal, wide_fp8, is_lazy
        dense: tuple[Any, Any] = run(fp8_decode.FP8, arrays, of_fp8, lazy)
        return dense
    if scalars.causal(causal):
        raise OptionError(
            "causal",
            "False with indices",
            "True",
            "Name in indices only the tokens that a query token may see.",
        )
    arrays = tuple([named[name] for name in SPARSE_DECODE.names])
    options = head_dim_v, softmax_scale, is_fp8_kvcache, wide_fp8, is_lazy
    sparse: tuple[Any, Any] = run(sparse_decode.SPARSE, arrays, options, lazy)
    return sparse


def run(
    operation: Operation,
    arrays: tuple[Any, ...],
    options: tuple[Any, ...],
    lazy: SchedMeta | None = None,
) -> Any:
    """The results of one of `calls.operation`."""
    if is_compiling(arrays[0]):
        return _elsewhere("torch", operation, arrays, options, lazy)
    return operation.eager(arrays, options, lazy, _elsewhere)


def _elsewhere(
    where: Where,
    operation: Operation,
    arrays: tuple[Any, ...],
    options: tuple[Any, ...],
    lazy: SchedMeta | None,
) -> tuple[Any, ...]:
    results: tuple[Any, ...] = _traced(where).run(operation, arrays, options, lazy)
    return results


def _traced(where: Where) -> ModuleType:
    """Imported when it is first needed."""
    if where == "torch":
        from .traced import torch_operations

        return torch_operations
    if where == "jax":
        from .traced import jax_operations

        return jax_operations
    from .traced import foreign

    return foreign
