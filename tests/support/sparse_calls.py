"""The public functions with lists of tokens and FP8 caches, on arrays of any framework."""

from __future__ import annotations

import numpy as np
from support.every_framework import put
from support.sparse_problems import SparseProblem

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

FP8 = ("v32", "e4m3", "v4")
PUBLIC = {"extra_indices": "extra_indices_in_kvcache"}  # where reference_sparse has another name


def here(framework: str, x):
    """x on the CPU, as an array of the framework, with the strides of a padded cache kept."""
    if not isinstance(x, np.ndarray):
        return x
    if framework == "torch":
        import ml_dtypes
        import torch

        if x.dtype == ml_dtypes.float8_e4m3fn:
            return torch.from_numpy(x.view(np.uint8).copy()).view(torch.float8_e4m3fn)
        if x.dtype == np.uint8:
            return torch.from_numpy(x)
    return put(framework, x, -1)


def keywords(problem: SparseProblem, framework: str = "numpy") -> dict:
    """The arrays and scalars of flash_mla_with_kvcache(), less the metadata."""
    named = {
        PUBLIC.get(name, name): here(framework, value)
        for name, value in problem.arguments().items()
        if value is not None
    }
    return {
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "is_fp8_kvcache": problem.format in FP8,
        "wide_fp8": problem.wide_fp8,
        **named,
    }


def widths(problem: SparseProblem) -> dict:
    """What get_mla_metadata() asks for besides q's sizes."""
    extra = 0 if problem.extra is None else problem.extra.indices.shape[2]
    found = {"topk": problem.pool.indices.shape[2], "topk_length": problem.pool.topk_length}
    if extra:
        found |= {"extra_topk": extra, "extra_topk_length": problem.extra.topk_length}
    return found


def schedule_arguments(problem: SparseProblem) -> tuple:
    """The positional arguments of get_mla_metadata(): lengths, of which the batch counts, rows,
    kv heads, heads, and whether the cache is FP8."""
    batch, s_q, h_q, _ = problem.q.shape
    return np.zeros(batch, np.int32), s_q * h_q, 1, h_q, problem.format in FP8


def schedule(problem: SparseProblem, framework: str = "numpy") -> dict:
    """Both results of get_mla_metadata() for the lists."""
    lengths, *rows = schedule_arguments(problem)
    sizes = {name: here(framework, value) for name, value in widths(problem).items()}
    made = get_mla_metadata(here(framework, lengths), *rows, **sizes)
    return dict(zip(("tile_scheduler_metadata", "num_splits"), made, strict=True))


def call(problem: SparseProblem, framework: str = "numpy", **changes):
    """flash_mla_with_kvcache() with a SchedMeta, unless the changes have the metadata."""
    metadata = {"tile_scheduler_metadata": get_mla_metadata()[0]}
    return flash_mla_with_kvcache(**(keywords(problem, framework) | metadata | changes))
