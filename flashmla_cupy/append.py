"""append_mla_kv: new latent rows into the pages of a cache, on the device.

Arrays with an address go to `calls.append`, others to `traced`, as in `interface`.
"""

from __future__ import annotations

from typing import Any, Literal

from .calls import append
from .frameworks.tracing import is_compiling

Where = Literal["torch", "jax", "foreign"]


def append_mla_kv(
    k_cache: Any,
    rows: Any,
    slot_mapping: Any,
    *,
    cos: Any = None,
    sin: Any = None,
    positions: Any = None,
    interleaved: bool = True,
) -> Any:
    """Writes new latent rows into the pages of a cache; `reference_append` holds the definition.

    k_cache        [num_pages, page_size, h_kv, 576] bfloat16 or float16, strided or not; page_size
                   16, 32, 64, 128 or 256
    rows           [n, 576] if h_kv is 1, or [n, h_kv, 576], of k_cache's dtype
    slot_mapping   [n] int64: page * page_size + slot of each row, or negative: it is skipped, and
                   so is one beyond the pool. No slot comes twice.
    cos, sin       [num_positions, 32] float32, with positions [n] int64: the last 64 columns are
                   rotated on their way, (a, b) -> (a cos - b sin, a sin + b cos), in float32, each
                   product and each sum rounded. A position beyond the tables gives NaN.
    interleaved    a pair is columns (2j, 2j + 1), DeepSeek's order, or (j, j + 32)

    Returns k_cache, written in place. A JAX array cannot be: its memory is donated, so that the
    array itself is of no use any more, and the result is a new one in the same memory; under
    jax.jit donate it to the function. All arrays are of one framework and device. The work is
    queued on the framework's current stream; nothing synchronises. There is no gradient.

    Raises an ArgumentError before anything is launched, or an environment error where the GPU or
    its compiler is missing.
    """
    arrays, options = (rows, slot_mapping, cos, sin, positions, k_cache), (interleaved,)
    if is_compiling(k_cache):
        return _elsewhere("torch", arrays, options)
    return append.eager(arrays, options, _elsewhere)


def _elsewhere(where: Where, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Who makes calls of arrays without an address. Imported when it is first needed."""
    if where == "torch":
        from .traced import torch_append

        return torch_append.append(arrays, options)
    if where == "jax":
        from .traced import jax_append

        return jax_append.append(arrays, options)
    from .traced import foreign

    return foreign.append(arrays, options)
