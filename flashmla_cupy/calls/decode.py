"""Validated calls: the checks run once for each signature and leave a Plan for the next time.

The signature of a call is all that the checks look at except addresses: framework, shapes,
strides, dtypes, device and scalars. `find` takes the signature and looks its Plan up; `make` runs
every check and builds it. Addresses are looked at on every call: `Plan.accepts` tests their
alignment and that the outputs overlap nothing, and `make` says what is wrong with them.

`find` and `accepts` run for every layer of every token, so they are written for speed: an adapter
may offer `signature`, which reads the same facts as `describe` in fewer steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..bounded import Bounded
from ..frameworks import HOST, ArrayInfo, Framework, allocator, framework_of, pair_allocator
from ..gpu.geometry import Geometry
from ..schedule.sched_meta import Configuration
from ..sizes import HEAD_DIM_V, NUM_SMS_CPU, num_sm_parts
from . import checks, layouts, scalars
from . import metadata as metadata_plans
from .metadata import MAX_PLANS, MetadataPlan

if TYPE_CHECKING:
    from ..gpu.decode_launch import DecodeLaunch
    from ..gpu.engine import Engine

MAX_ADDRESSES = 4096  # of one array of one plan; a model has as many caches as layers
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
    launch: DecodeLaunch | None  # None: no engine, or nothing to do
    softmax_scale: float
    causal: bool
    is_empty: bool
    spans: tuple[tuple[int, int], ...]  # bytes that each array covers, relative to its address
    new_out: Callable[[], Any]
    new_lse: Callable[[], Any]
    new_results: Callable[[], tuple[Any, Any]]  # both
    new_scratch: Callable[[], tuple[Any, int]] | None  # with its address; None: no need
    schedule: MetadataPlan | None  # makes the metadata of a SchedMeta; None: there is none
    # Addresses that accepts() has found right; most calls come again with the same ones.
    accepted: Bounded[tuple[int, ...], None] = field(
        default_factory=functools.partial(Bounded, MAX_ADDRESSES), compare=False, repr=False
    )

    def accepts(self, pointers: tuple[int, ...]) -> bool:
        """Whether all addresses are aligned and the outputs overlap nothing."""
        if pointers in self.accepted:
            return True
        q, k_cache, block_table, cache_seqlens, metadata, num_splits, out, lse = pointers
        if (q | k_cache | metadata | out) & 15:
            return False
        if (block_table | cache_seqlens | num_splits | lse) & 3:
            return False
        if (out or lse) and self._overlap(pointers):
            return False
        self.accepted[pointers] = None
        return True

    def _overlap(self, pointers: tuple[int, ...]) -> bool:
        *_, out, lse = pointers
        *inputs, (out_low, out_high), (lse_low, lse_high) = self.spans
        out_begin, out_end, lse_begin, lse_end = (
            out + out_low, out + out_high, lse + lse_low, lse + lse_high
        )  # fmt: skip
        if out_begin < lse_end and lse_begin < out_end:
            return True
        for pointer, (low, high) in zip(pointers, inputs):  # noqa: B905, the outputs come last
            begin, end = pointer + low, pointer + high
            if (begin < out_end and out_begin < end) or (begin < lse_end and lse_begin < end):
                return True
        return False


_plans: Bounded[Any, Plan] = Bounded(MAX_PLANS)


def find(
    arrays: tuple[Any, ...],
    head_dim_v: Any,
    softmax_scale: Any,
    causal: Any,
    is_lazy: bool,
) -> tuple[Plan | None, tuple[int, ...], Any]:
    """(plan, pointers, key): the plan if this signature was seen, and the addresses of `arrays`,
    which are those of `Arrays`; key None: it cannot be kept."""
    # 1, 1.0 and True are equal as keys, so only the usual types may be keys.
    usual = type(causal) is bool and type(head_dim_v) is int
    if not usual or not (softmax_scale is None or type(softmax_scale) is float):
        return None, (), None
    try:
        framework = framework_of(arrays[0], "q")
        signature = getattr(framework, "signature", None)
        if signature is not None:
            facts, pointers = signature(*arrays)
        else:
            describe = framework.describe
            infos = [ABSENT if array is None else describe(array) for array in arrays]
            facts = framework, *[info[1:] for info in infos]
            pointers = tuple([info[0] for info in infos])
        key = facts, head_dim_v, softmax_scale, causal, is_lazy
        return _plans.get(key), pointers, key
    except Exception:  # no array, or none of this framework: `make` will find out and say so
        return None, (), None


class Valid(NamedTuple):
    """What the checks leave of a call's arguments."""

    framework: Framework
    infos: dict[str, ArrayInfo]  # of the arrays that the call has
    softmax_scale: float
    causal: bool
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]


def validate(arrays: Arrays, options: Options) -> Valid:
    """Every check but that of the metadata's size, which depends on the device."""
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
    checks.table(block_table, batch, k_cache.shape[1])
    checks.lengths(infos["cache_seqlens"], batch, layouts.DECODE)
    out_shape, lse_shape = (batch, s_q, h_q, HEAD_DIM_V), (batch, h_q, s_q)
    if "out" in infos:
        checks.output("out", infos["out"], out_shape, q.dtype)
    if "lse" in infos:
        checks.output("lse", infos["lse"], lse_shape, "float32")
    checks.aliasing(infos)
    return Valid(framework, infos, softmax_scale, causal, out_shape, lse_shape)


def make(
    arrays: Arrays, options: Options, key: Any, engine_of: Callable[[int], Engine]
) -> tuple[Plan, tuple[int, ...]]:
    """Every check, then the plan, which is kept under the key, and the addresses of `arrays`."""
    framework, infos, softmax_scale, causal, out_shape, lse_shape = validate(arrays, options)
    q, k_cache, block_table = infos["q"], infos["k_cache"], infos["block_table"]
    batch, s_q, h_q, _ = q.shape
    _, page_size, h_kv, _ = k_cache.shape

    engine = None if q.device == HOST else engine_of(q.device)
    num_sms = NUM_SMS_CPU if engine is None else engine.num_sms
    parts = num_sm_parts(num_sms, max(1, s_q * h_q // h_kv), h_kv)
    if not options.is_lazy:
        checks.metadata(infos["tile_scheduler_metadata"], infos["num_splits"], batch, parts)

    is_empty = 0 in out_shape
    launch, scratch_floats = None, 0
    if engine is not None and not is_empty:
        launch = engine.prepare(
            Geometry.of(layouts.plain(q), layouts.plain(k_cache), block_table, parts)
        )
        scratch_floats = launch.scratch_floats

    schedule = None
    if options.is_lazy:
        rows = s_q * h_q // h_kv
        schedule = metadata_plans.make(framework, infos["cache_seqlens"], rows, h_kv, engine_of)

    new = functools.partial(allocator, framework, device=q.device)
    new_scratch = None
    if scratch_floats:
        own = getattr(framework, "scratch_allocator", None)
        if own is None:
            make_scratch, pointer = new((scratch_floats,), "float32"), framework.pointer
            new_scratch = lambda: (room := make_scratch(), pointer(room))  # noqa: E731
        else:
            new_scratch = own(scratch_floats, q.device)

    found = [infos.get(name, ABSENT) for name in Arrays._fields]
    plan = Plan(
        framework=framework,
        configuration=Configuration(
            framework.name, q.device, batch, s_q, h_q, h_kv, page_size, causal
        ),
        engine=engine,
        launch=launch,
        softmax_scale=softmax_scale,
        causal=causal and s_q > 1,
        is_empty=is_empty,
        spans=tuple(layouts.span(info) for info in found),
        new_out=new(out_shape, q.dtype),
        new_lse=new(lse_shape, "float32"),
        new_results=pair_allocator(
            framework, (out_shape, lse_shape), (q.dtype, "float32"), q.device
        ),
        new_scratch=new_scratch,
        schedule=schedule,
    )
    if key is not None:
        _plans[key] = plan
    return plan, tuple(info.ptr for info in found)
