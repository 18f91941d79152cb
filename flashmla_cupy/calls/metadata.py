"""get_mla_metadata() for arrays with an address: validated calls, and what follows from them.

Like `plans`, for the smaller call that every decoding step makes: the checks run once for each
signature, which is all of the arguments but the address of cache_seqlens. `interface` looks plans
up and makes them; `plans` makes one for calls with a SchedMeta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..bounded import Bounded
from ..frameworks import HERE, HOST, ArrayInfo, Framework, framework_of, pair_allocator
from ..schedule import split as schedule
from ..sizes import METADATA_COLUMNS, NUM_SMS_CPU, num_sm_parts

if TYPE_CHECKING:
    from ..gpu.engine import Engine

MAX_PLANS = 1024
_plans: Bounded[Any, MetadataPlan] = Bounded(MAX_PLANS)


class MetadataPlan(NamedTuple):
    """A signature that passed the checks."""

    framework: Framework
    engine: Engine | None  # None: arrays in host memory
    device: int
    batch: int
    parts: int
    rows: int
    h_kv: int
    new: Callable[[], tuple[Any, Any]]

    def __call__(self, cache_seqlens: Any, address: int) -> tuple[Any, Any]:
        """(tile_scheduler_metadata [parts, 8], num_splits [batch + 1]), int32, for cache_seqlens
        [batch] int32 at this address, beside it; queued on the current stream."""
        guard = self.framework.device_guard(self.device)
        if guard is HERE:  # the usual case; entering a context that does nothing takes time
            return self._queue(cache_seqlens, address)
        with guard:
            return self._queue(cache_seqlens, address)

    def _queue(self, cache_seqlens: Any, address: int) -> tuple[Any, Any]:
        framework, engine, batch = self.framework, self.engine, self.batch
        metadata, num_splits = self.new()
        if engine is None:
            view = framework.to_numpy
            view(metadata)[:], view(num_splits)[:] = schedule.plan(
                view(cache_seqlens), self.parts, self.rows, self.h_kv
            )
        elif batch:
            pointer = framework.pointer
            engine.schedule(
                framework.stream(self.device),
                address,
                batch,
                self.parts,
                self.rows,
                self.h_kv,
                pointer(metadata),
                pointer(num_splits),
            )
        else:  # nothing to plan, and no launch of nothing
            metadata[...] = 0
            num_splits[...] = 0
        return metadata, num_splits


def find(
    cache_seqlens: Any, rows: Any, h_kv: Any, h_q: Any
) -> tuple[MetadataPlan | None, int, Any]:
    """(plan, address, key): the plan if this signature was seen; key None: it cannot be kept."""
    # 1, 1.0 and True are equal as keys, so only the usual types may be keys.
    usual = type(rows) is int and type(h_kv) is int and (h_q is None or type(h_q) is int)
    if not usual:
        return None, 0, None
    try:
        framework = framework_of(cache_seqlens, "cache_seqlens")
        address, *facts = framework.describe(cache_seqlens)
    except Exception:  # no array, or none with an address: the checks will say so
        return None, 0, None
    key = framework, *facts, rows, h_kv, h_q
    plan = _plans.get(key)
    return (None if address & 3 else plan), address, key


def make(
    framework: Framework,
    lengths: ArrayInfo,
    rows: int,
    h_kv: int,
    engine_of: Callable[[int], Engine],
    key: Any = None,
) -> MetadataPlan:
    """The plan for checked arguments, which is kept under the key."""
    device, batch, rows = lengths.device, lengths.shape[0], max(1, rows)
    engine = None if device == HOST else engine_of(device)
    parts = num_sm_parts(NUM_SMS_CPU if engine is None else engine.num_sms, rows, h_kv)

    shapes = (parts, METADATA_COLUMNS), (batch + 1,)
    new = pair_allocator(framework, shapes, ("int32", "int32"), device)
    plan = MetadataPlan(framework, engine, device, batch, parts, rows, h_kv, new)
    if key is not None:
        _plans[key] = plan
    return plan
