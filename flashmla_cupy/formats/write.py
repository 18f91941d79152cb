"""write_kv: new tokens into the pages of a cache, wherever a slot mapping says."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import (
    DeviceMismatchError,
    DTypeError,
    FrameworkMismatchError,
    ScalarError,
    ShapeError,
)
from .arguments import cache_format, descale, dtype_name, library, pow2, show, values
from .codes import Codes
from .layout import new_cache, rows_and_tail
from .memory import whole_pages, writable
from .quantize import encoded

_INTEGERS = ("int32", "int64")


def write_kv(
    k_cache: Any,
    kv: Any,
    slot_mapping: Any,
    *,
    pow2_scales: bool = True,
    descale_k: Any = None,
) -> Any:
    """Writes tokens into a cache, each into its slot, in the format of the cache.

    k_cache       [num_pages, page_size, h_kv, width] of a format (see CacheFormat)
    kv            [n, h_kv, d_qk] bfloat16, float16 or float32, rotary columns last
    slot_mapping  [n] int32 or int64: page * page_size + offset for each token; -1 is no slot, and
                  its token is not written. Two tokens in one slot leave either of them there.
    pow2_scales, descale_k
                  as in quantize_kv()

    Returns k_cache itself, written; of JAX arrays, which cannot be written, a new one (under jit
    with k_cache donated XLA writes in place). Nothing waits for a device: slots are looked at in
    host memory only, where one outside the cache raises ScalarError before anything is written; on
    a GPU and in traced code its token is not written. Raises an ArgumentError.
    """
    function = "write_kv"
    codes, format = cache_format(k_cache, None, function)
    if values("kv", kv, format, "[n, h_kv, d_qk]", function) is not codes:
        remedy = "Convert kv to the framework of k_cache."
        expected = "an array of the framework of k_cache"
        raise FrameworkMismatchError("kv", expected, type(kv).__name__, remedy, function)
    if kv.shape[1] != k_cache.shape[2]:
        expected = f"h_kv = {k_cache.shape[2]} kv heads, as k_cache has"
        raise ShapeError("kv", expected, show(kv), "Pass all kv heads of a token.", function)
    pow2(pow2_scales, format, function)
    divisor = descale(descale_k, format, codes, function)
    _check_slots(codes, slot_mapping, k_cache, kv, function)
    _check_devices(codes, k_cache, {"kv": kv, "slot_mapping": slot_mapping}, function)
    whole_pages(codes, k_cache, format, function)
    writable(codes, k_cache, function)
    if 0 in kv.shape or 0 in k_cache.shape:
        return k_cache
    with codes.quiet():
        new_rows, new_tails = encoded(codes, kv, format, pow2_scales, divisor)
    rows, tails = rows_and_tail(codes, k_cache, format)
    where = _places(codes, slot_mapping, *k_cache.shape[:2])
    rows = _scatter(codes, rows, new_rows, where)
    if tails is not None:
        tails = _scatter(codes, tails, new_tails, where)
    if codes.name != "jax":
        return k_cache
    made = new_cache(codes, format, rows, tails)
    return made if made.dtype == k_cache.dtype else made.view(k_cache.dtype)


class _Places(NamedTuple):
    """Where tokens go: the token `source` of the new ones to (page, offset)."""

    page: Any
    offset: Any
    source: Any  # None: all of them, in order
    is_any: Any  # [1]: whether there is a slot at all; if not, what lies at (page, offset) stays


def _places(codes: Codes, slots: Any, num_pages: int, page_size: int) -> _Places:
    """Tokens without a slot go where the first one that has a slot goes, as that one: so the
    number of tokens depends on no value, and nothing waits for the device."""
    xp = codes.xp
    fits = (slots >= 0) & (slots < num_pages * page_size)
    if codes.name == "jax":
        page = xp.where(fits, slots // page_size, num_pages)  # past the end: dropped
        return _Places(page, slots % page_size, None, True)
    if codes.name == "numpy":
        kept = slots[fits]
        return _Places(kept // page_size, kept % page_size, fits, True)
    first = xp.argmax(codes.as_int32(fits)).reshape(1)
    is_any = fits[first]
    order = codes.arange(slots.shape[0], slots)
    source = xp.where(fits, order, first)
    slot = xp.where(is_any, slots[source], 0)
    return _Places(slot // page_size, slot % page_size, source, is_any)


def _scatter(codes: Codes, into: Any, new: Any, where: _Places) -> Any:
    """into [num_pages, page_size, h_kv, n] with the rows `new` [tokens, h_kv, n]: the same array,
    but in JAX."""
    if codes.name == "jax":
        return into.at[where.page, where.offset].set(new, mode="drop")
    bits = codes.plain_bits
    into, new = bits(into), bits(new)[where.source]
    if codes.name != "numpy":
        new = codes.xp.where(where.is_any[:, None, None], new, into[where.page, where.offset])
    into[where.page, where.offset] = new
    return into


def _check_slots(codes: Codes, slots: Any, k_cache: Any, kv: Any, function: str) -> None:
    name = "slot_mapping"
    if library(name, slots, function) is not codes:
        expected, remedy = "an array of the framework of k_cache", "Convert it."
        raise FrameworkMismatchError(name, expected, type(slots).__name__, remedy, function)
    if dtype_name(slots) not in _INTEGERS:
        raise DTypeError(name, "int32 or int64", show(slots), "Convert it to int32.", function)
    if tuple(slots.shape) != (kv.shape[0],):
        expected = f"shape ({kv.shape[0]},), one slot for each token of kv"
        raise ShapeError(name, expected, show(slots), "Pass -1 for tokens without one.", function)
    if not codes.can_look_at(slots):
        return
    total = k_cache.shape[0] * k_cache.shape[1]
    wrong = [slot for slot in slots.tolist() if not -1 <= slot < total]
    if wrong:
        expected = f"slots from 0 to {total - 1}, or -1"
        remedy = "A slot is page * page_size + offset."
        raise ScalarError(name, expected, f"{wrong[0]}", remedy, function)


def _check_devices(codes: Codes, k_cache: Any, others: dict[str, Any], function: str) -> None:
    if codes.name not in ("cupy", "torch"):
        return
    for name, x in others.items():
        if x.device != k_cache.device:
            expected = f"an array on {k_cache.device}, where k_cache is"
            remedy = f"Move {name} there; a call takes arrays of one device."
            raise DeviceMismatchError(name, expected, f"one on {x.device}", remedy, function)
