"""Validated calls: the checks run once for each signature and leave a Plan for the next time.

The signature of a call is all that the checks look at except addresses: framework, shapes,
strides, dtypes, device and scalars. `find` describes the arguments and looks their Plan up; `make`
runs every check and builds it. Addresses are looked at on every call: `Plan.accepts` tests their
alignment and that the outputs overlap nothing, and `make` says what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from . import checks, layouts, scalars
from .frameworks import HOST, ArrayInfo, Framework, framework_of
from .geometry import HEAD_DIM_V, NUM_SMS_CPU, Geometry, num_sm_parts
from .metadata import Configuration

if TYPE_CHECKING:
    from .launch import Engine

MAX_PLANS = 1024
ABSENT = ArrayInfo(0, (), (), "", HOST)  # stands for an array the call does not have


class Arrays(NamedTuple):
    """The array arguments of one call; None where it has none. Their infos come in this order."""

    q: Any
    k_cache: Any
    block_table: Any
    cache_seqlens: Any
    tile_scheduler_metadata: Any
    num_splits: Any
    out: Any
    lse: Any


class Options(NamedTuple):
    """The other arguments of one call."""

    head_dim_v: Any
    softmax_scale: Any
    causal: Any
    is_lazy: bool  # the metadata is a SchedMeta, and not among the arrays


@dataclass(frozen=True, slots=True)
class Plan:
    """A signature that passed the checks, and what follows from it."""

    framework: Framework
    configuration: Configuration
    engine: Engine | None  # None: arrays in host memory
    geometry: Geometry | None  # None: no engine, or nothing to do
    scratch_floats: int
    dtype: str
    softmax_scale: float
    causal: bool
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    is_empty: bool
    plain_q: ArrayInfo | None  # what to launch with, but for its address, if not what came
    plain_k_cache: ArrayInfo | None
    spans: tuple[tuple[int, int], ...]  # bytes that each array covers, relative to its address

    def accepts(self, infos: list[ArrayInfo]) -> bool:
        """Whether all addresses are aligned and the outputs overlap nothing."""
        q, k_cache, block_table, cache_seqlens, metadata, num_splits, out, lse = infos
        if (q.ptr | k_cache.ptr | metadata.ptr | out.ptr) & 15:
            return False
        if (block_table.ptr | cache_seqlens.ptr | num_splits.ptr | lse.ptr) & 3:
            return False
        return (out is ABSENT and lse is ABSENT) or not self._overlap(infos)

    def _overlap(self, infos: list[ArrayInfo]) -> bool:
        covered = [
            (info.ptr + low, info.ptr + high)
            for info, (low, high) in zip(infos, self.spans, strict=True)
        ]
        (out_begin, out_end), (lse_begin, lse_end) = covered[6:]
        if out_begin < lse_end and lse_begin < out_end:
            return True
        return any(
            (begin < out_end and out_begin < end) or (begin < lse_end and lse_begin < end)
            for begin, end in covered[:6]
        )


_plans: dict[Any, Plan] = {}


def find(arrays: Arrays, options: Options) -> tuple[Plan | None, list[ArrayInfo], Any]:
    """(plan, infos, key): the plan if this signature was seen; key None: it cannot be kept."""
    head_dim_v, softmax_scale, causal, _ = options
    # 1, 1.0 and True are equal as keys, so only the usual types may be keys.
    usual = type(causal) is bool and type(head_dim_v) is int
    if not usual or not (softmax_scale is None or type(softmax_scale) is float):
        return None, [], None
    try:
        framework = framework_of(arrays.q, "q")
        describe = framework.describe
        infos = [ABSENT if array is None else describe(array) for array in arrays]
        key = (framework, options, *[info[1:] for info in infos])
        return _plans.get(key), infos, key
    except Exception:  # no array, or none of this framework: `make` will find out and say so
        return None, [], None


def make(
    arrays: Arrays, options: Options, key: Any, engine_of: Callable[[int], Engine]
) -> tuple[Plan, list[ArrayInfo]]:
    """Every check, then the plan, which is kept under the key, and the infos."""
    scalars.head_dim_v(options.head_dim_v)
    softmax_scale = scalars.softmax_scale(options.softmax_scale)
    causal = scalars.causal(options.causal)
    checks.metadata_kind(arrays.tile_scheduler_metadata, arrays.num_splits, options.is_lazy)
    may_lack = ("tile_scheduler_metadata", "num_splits", "out", "lse")
    named = {
        name: array
        for name, array in arrays._asdict().items()
        if array is not None or name not in may_lack
    }
    framework, infos = checks.describe(named, layouts.DECODE)

    q, k_cache, block_table = infos["q"], infos["k_cache"], infos["block_table"]
    checks.query(q)
    checks.cache(k_cache, q)
    batch, s_q, h_q, _ = q.shape
    _, page_size, h_kv, _ = k_cache.shape
    checks.table(block_table, batch, page_size)
    checks.lengths(infos["cache_seqlens"], batch, layouts.DECODE)
    out_shape, lse_shape = (batch, s_q, h_q, HEAD_DIM_V), (batch, h_q, s_q)
    if "out" in infos:
        checks.output("out", infos["out"], out_shape, q.dtype)
    if "lse" in infos:
        checks.output("lse", infos["lse"], lse_shape, "float32")
    checks.aliasing(infos)

    engine = None if q.device == HOST else engine_of(q.device)
    num_sms = NUM_SMS_CPU if engine is None else engine.num_sms
    parts = num_sm_parts(num_sms, max(1, s_q * h_q // h_kv), h_kv)
    if not options.is_lazy:
        checks.metadata(infos["tile_scheduler_metadata"], infos["num_splits"], batch, parts)

    is_empty = 0 in out_shape
    plain_q, plain_k_cache = layouts.plain(q), layouts.plain(k_cache)
    geometry, scratch_floats = None, 0
    if engine is not None and not is_empty:
        geometry = Geometry.of(plain_q, plain_k_cache, block_table, parts)
        scratch_floats = engine.scratch_floats(geometry)
    found = [infos.get(name, ABSENT) for name in Arrays._fields]
    plan = Plan(
        framework=framework,
        configuration=Configuration(
            framework.name, q.device, batch, s_q, h_q, h_kv, page_size, causal
        ),
        engine=engine,
        geometry=geometry,
        scratch_floats=scratch_floats,
        dtype=q.dtype,
        softmax_scale=softmax_scale,
        causal=causal and s_q > 1,
        out_shape=out_shape,
        lse_shape=lse_shape,
        is_empty=is_empty,
        plain_q=None if plain_q == q else plain_q,
        plain_k_cache=None if plain_k_cache == k_cache else plain_k_cache,
        spans=tuple(layouts.span(info) for info in found),
    )
    if key is not None:
        if len(_plans) >= MAX_PLANS:  # a bound, not a policy: a decoding loop needs a few
            _plans.clear()
        _plans[key] = plan
    return plan, found
