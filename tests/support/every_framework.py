"""What the tests of the array frameworks share: one table of cases, and ways in and out.

CASES is the table that must come out the same through NumPy, CuPy, torch and JAX: bit for bit
where the same code computes, within the oracle's bound where it does not.
"""

from __future__ import annotations

import itertools
import threading
from typing import NamedTuple

import ml_dtypes
import numpy as np
from support.problems import Problem, make_problem

FRAMEWORKS = ("numpy", "cupy", "torch", "jax")
GPU_FRAMEWORKS = FRAMEWORKS[1:]
DELAY_MS = 30  # how long tests of the order keep a stream busy


class Case(NamedTuple):
    dtype: str
    s_q: int
    h_q: int
    h_kv: int
    page_size: int
    lengths: tuple[int, ...]
    causal: bool

    def __str__(self) -> str:
        dtype, s_q, h_q, h_kv, page_size, lengths, causal = self
        tokens = "_".join(map(str, lengths))
        return f"{dtype}-s{s_q}-h{h_q}by{h_kv}-p{page_size}-{tokens}{'-causal' * causal}"

    def problem(self, seed: int = 0) -> Problem:
        dtype, s_q, h_q, h_kv, page_size, lengths, causal = self
        return make_problem(
            lengths, s_q=s_q, h_q=h_q, h_kv=h_kv, page_size=page_size, dtype=dtype,
            causal=causal, seed=seed,
        )  # fmt: skip


_LENGTHS = (
    (128, 128, 128),  # even: every request ends with a tile and a page
    (1, 65, 190),  # ragged: every request ends inside a tile
    (0, 257, 3),  # an empty request first, and one shorter than s_q
    (500,),  # one request, so that it is split
)


def _cases() -> list[Case]:
    """s_q: one token, two (speculative), four. h_q: one row, less than a row block of 64, exactly
    one, two (DeepSeek-V3). Pages: smaller than a tile of 64 tokens, equal, larger. 180 of one kv
    head, then 20 of several."""
    axes = itertools.product(
        ("bfloat16", "float16"), (1, 2, 4), (1, 8, 16, 64, 128), (16, 64, 256), (False, True)
    )
    lengths = itertools.cycle(_LENGTHS)
    cases = [
        Case(dtype, s_q, h_q, 1, page_size, next(lengths), causal)
        for dtype, s_q, h_q, page_size, causal in axes
    ]
    several = itertools.product(("bfloat16", "float16"), (1, 3), (2, 3, 4, 6, 8))
    cases += [
        Case(dtype, s_q, 24 if h_kv in (3, 6) else 16, h_kv, 64, next(lengths), s_q > 1)
        for dtype, s_q, h_kv in several
    ]
    return cases


CASES = _cases()


def put(framework: str, x: np.ndarray, device: int = 0):
    """x as an array of the framework: on that GPU, or on the CPU for device -1."""
    if framework == "numpy":
        return x
    if framework == "cupy":
        import cupy

        with cupy.cuda.Device(device):
            if x.dtype == ml_dtypes.float8_e4m3fn:
                return cupy.asarray(x.view(np.uint8)).view(x.dtype)
            return cupy.asarray(x)
    if framework == "torch":
        import torch

        kinds = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
        kind = kinds.get(x.dtype.name)
        plain = torch.from_numpy(np.array(x.view(f"int{8 * x.itemsize}") if kind else x))
        tensor = plain.view(kind) if kind else plain
        return tensor if device < 0 else tensor.cuda(device)
    import jax

    if device < 0:
        return jax.device_put(x, jax.local_devices(backend="cpu")[0])
    return jax.device_put(x, jax.local_devices(backend="gpu")[device])


def get(x) -> np.ndarray:
    """An array of any framework as a NumPy array."""
    kind = type(x).__module__.partition(".")[0]
    if kind == "cupy":
        return x.get()
    if kind == "torch":
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            import torch

            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    return np.asarray(x)


def same_bits(a, b) -> bool:
    """Whether two arrays, of any frameworks, hold the same bits."""
    a, b = get(a), get(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def first_difference(found: np.ndarray, wanted: np.ndarray) -> str:
    """'' if two arrays of bytes or bits are equal, else how many differ, where and how."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype} {found.shape} for {wanted.dtype} {wanted.shape}"
    places = np.argwhere(found != wanted)
    if not len(places):
        return ""
    shown = [f"{i}: {found[i]:#x} for {wanted[i]:#x}" for i in map(tuple, places[:4].tolist())]
    return f"{len(places)} of {found.size} differ, " + "; ".join(shown)


def decode(q, k_cache, block_table, cache_seqlens, softmax_scale=None, causal=False):
    """Both calls of one decoding step; of any framework, traced or not."""
    from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

    h_kv = k_cache.shape[2]
    metadata, num_splits = get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2] // h_kv, h_kv)
    return flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        512,
        metadata,
        num_splits,
        softmax_scale=softmax_scale,
        causal=causal,
    )


def in_threads(work, count: int) -> None:
    """Runs work(0), work(1), ... at once, and waits for all."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
