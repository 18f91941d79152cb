"""Any value for any argument of the functions over FP8 caches and lists of tokens: a result, or an
error of this package that names the argument; never an exception of NumPy's or Python's own."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest
from support.problems import make_problem
from support.sparse_calls import keywords, schedule
from support.sparse_problems import make_sparse_problem, prefill_problem

from flashmla_cupy import (
    ArgumentError,
    DeviceCheckError,
    MissingDependencyError,
    NoDeviceError,
    OutOfPagesError,
    PagedKVCache,
    SequenceError,
    check,
    dequantize_kv,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    quantize_kv,
    write_kv,
)

ANYTHING = {
    "none": None, "int": 3, "negative": -1, "float": 1.5, "nan": float("nan"), "text": "abc",
    "list": [1, 2], "dict": {}, "bool": True, "object": object(), "huge": 2**70, "complex": 1j,
    "number": np.float32(2), "tuple": (), "function": len, "type": int, "bytes": b"ab",
    "empty": np.zeros(0, np.float32), "no axis": np.array(1, np.float32),
    "int64": np.zeros((2, 1, 64), np.int64), "objects": np.array([None, 1], object),
    "texts": np.array(["a"]), "fields": np.zeros(2, [("a", "i4")]),
    "masked": np.ma.array(np.zeros((2, 1, 64), np.int32)), "bools": np.zeros((2, 1, 64), bool),
    "backwards": np.zeros((2, 1, 64), np.int32)[::-1], "complexes": np.zeros((2, 4, 8, 576), "c8"),
    "a page": np.zeros((3, 64, 1, 656), np.uint8), "dates": np.zeros(3, "M8[s]"),
    "no list": np.zeros((2, 1, 0), np.int32), "of nan": np.array([np.nan], np.float32),
    "enormous": 10**5000, "no character": "\ud800", "ragged": [[1], [1, 2]],
    "read only": np.frombuffer(bytes(4), np.float32), "float16": np.zeros((2, 1, 8, 576), "f2"),
}  # fmt: skip


def decoding(format: str, extra) -> dict:
    problem = make_sparse_problem(
        format, topk=64, extra=extra, lengths="request", extra_lengths="request"
    )
    given = dict.fromkeys(("num_splits", "out", "lse", "softmax_scale", "descale_q"))
    return given | keywords(problem) | schedule(problem) | {"causal": False}


def prompt(d_qk: int) -> dict:
    return prefill_problem(3, 4, d_qk, 40, 17) | dict.fromkeys(("out", "max_logits", "lse", "d_v"))


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 16, 1, 576)).astype(np.float32)


def pages(format: str) -> dict:
    q = np.zeros((3, 4, 576), ml_dtypes.bfloat16)
    arguments = {"q": q, "kv": quantize_kv(values(), format), "sm_scale": 0.1}
    arguments["indices"] = np.zeros((3, 1, 9), np.int32)
    rest = ("attn_sink", "topk_length", "descale_q", "descale_k")
    return arguments | dict.fromkeys(rest) | {"wide_fp8": False}


def dense() -> dict:
    problem = make_problem([60, 3])
    names = "q", "k_cache", "block_table", "cache_seqlens"
    arrays = dict(zip(names, problem.arrays(), strict=True)) | problem.options()
    made = get_mla_metadata(problem.cache_seqlens, problem.rows, problem.h_kv)
    metadata = dict(zip(("tile_scheduler_metadata", "num_splits"), made, strict=True))
    return arrays | metadata | {"head_dim_v": 512, "out": None, "lse": None}


UNREAD = ("block_table", "cache_seqlens")  # beside indices
LENGTHS = np.array([5, 7], np.int32)
CALLS = {
    "decode dense": (flash_mla_with_kvcache, dense),
    "decode v32": (flash_mla_with_kvcache, lambda: decoding("v32", None)),
    "decode v4": (flash_mla_with_kvcache, lambda: decoding("v4", (90, 33, 64))),
    "prompt": (flash_mla_sparse_fwd, lambda: prompt(576) | {"d_v": 512}),
    "pages": (flash_mla_sparse_fwd, lambda: pages("e4m3")),
    "metadata": (
        get_mla_metadata,
        lambda: {
            "cache_seqlens": LENGTHS, "num_q_tokens_per_head_k": 8, "num_heads_k": 1,
            "num_heads_q": 8, "is_fp8_kvcache": True, "topk": 64, "topk_length": LENGTHS,
            "extra_topk": 33, "extra_topk_length": LENGTHS,
        },
    ),
    "quantize": (
        quantize_kv,
        lambda: {"kv": values(), "format": "e4m3", "pow2_scales": True, "descale_k": None},
    ),
    "dequantize": (
        dequantize_kv,
        lambda: {"k_cache": quantize_kv(values(), "v32"), "format": "v32", "dtype": "float32"},
    ),
    "write": (
        write_kv,
        lambda: {
            "k_cache": quantize_kv(values(), "v32"), "kv": values()[0],
            "slot_mapping": np.arange(16, dtype=np.int32), "pow2_scales": True, "descale_k": None,
        },
    ),
}  # fmt: skip


def outcome(function, named: dict, argument: str, kind: str) -> str:
    """What is wrong with what a call does, or ''."""
    try:
        function(**named | {argument: ANYTHING[kind]})
    except (ArgumentError, DeviceCheckError) as error:
        return "" if len(str(error)) > 40 else f"it says only {error}"
    except Exception as error:
        return repr(error)
    return "its mask is lost" if kind == "masked" and argument not in UNREAD else ""


@pytest.mark.parametrize("name", CALLS)
def test_anything_is_a_result_or_a_named_error(name):
    function, arguments = CALLS[name]
    named = arguments()
    for _ in range(2):  # a second time behind a right call, whose checks are not made again
        for argument in named:
            for kind in ANYTHING:
                wrong = outcome(function, named, argument, kind)
                assert not wrong, f"{argument}: {kind}: {wrong}"
        with contextlib.suppress(DeviceCheckError):  # of a list that named no slot of its cache
            check()
        function(**named)
        check()


@pytest.mark.parametrize("method", ["reserve", "csr", "tables", "append_batch", "attend"])
def test_what_is_no_sequence_is_named(method):
    cache = PagedKVCache(4, page_size=16, dtype="float16", device="cpu")
    seq = cache.add(np.ones((3, 576), np.float16))
    array = np.ones((1, 1, 576), np.float16)
    for value in ANYTHING.values():
        for _ in range(2):
            with pytest.raises((ArgumentError, SequenceError)):
                if method == "append_batch":
                    cache.append_batch([value], array)
                elif method == "attend":
                    cache.attend(array[:, :, None], [value])
                else:
                    getattr(cache, method)([value])
            cache.tables([seq])
    for value in ("pages", np.ones(2), 3):
        with pytest.raises(ArgumentError):
            cache.tables([seq], framework=value)
    cache.check()


ROWS = np.ones((1, 2, 576), np.float16)
QUERIES = ROWS[:, :, None]


def in_step(cache, seq, call):
    step = cache.reserve([seq], 2)
    try:
        call(step)
    finally:
        if step._state == "open":
            step.rollback()


OF_CACHE = {
    "append seq": lambda c, s, x: c.append(x, ROWS[0]),
    "append rows": lambda c, s, x: c.append(s, x),
    "append_batch": lambda c, s, x: c.append_batch([s], x),
    "add": lambda c, s, x: c.add(x),
    "begin": lambda c, s, x: c.begin(x),
    "salt": lambda c, s, x: c.begin([1], x),
    "fork": lambda c, s, x: c.fork(x),
    "free": lambda c, s, x: c.free(x),
    "swap_in": lambda c, s, x: c.swap_in(x),
    "truncate": lambda c, s, x: c.truncate(s, x),
    "layer": lambda c, s, x: c.layer(x),
    "framework": lambda c, s, x: c.layer(0, x),
    "width": lambda c, s, x: c.tables([s], width=x),
    "queries": lambda c, s, x: c.attend(x, [s]),
    "softmax_scale": lambda c, s, x: c.attend(QUERIES, [s], softmax_scale=x),
    "causal": lambda c, s, x: c.attend(QUERIES, [s], causal=x),
    "counts": lambda c, s, x: c.reserve([s], x).rollback(),
    "write": lambda c, s, x: in_step(c, s, lambda step: step.write(x)),
    "layer of a step": lambda c, s, x: in_step(c, s, lambda step: step.write(ROWS, layer=x)),
    "attend": lambda c, s, x: in_step(c, s, lambda step: step.attend(x)),
    "accepted": lambda c, s, x: in_step(c, s, lambda step: step.commit(x)),
    "token_ids": lambda c, s, x: in_step(c, s, lambda step: step.commit(None, x)),
    "ids of one": lambda c, s, x: in_step(c, s, lambda step: step.commit(None, [x])),
    **{
        f"cache with {name}": lambda c, s, x, name=name: PagedKVCache(
            **{"num_pages": 4, "device": "cpu", name: x}
        )
        for name in ("num_pages", "page_size", "num_layers", "dtype", "num_heads_kv", "device",
                     "framework", "storage", "layer_axis", "max_seqs", "max_pages_per_seq")
    },
    **{
        f"storage with {name}": lambda c, s, x, name=name: PagedKVCache(
            storage=np.zeros((4, 16, 1, 576), np.float16), **{name: x}
        )
        for name in ("num_pages", "page_size", "num_layers", "dtype", "num_heads_kv", "device",
                     "framework", "layer_axis")
    },
}  # fmt: skip


OWN = ArgumentError, SequenceError, NoDeviceError, OutOfPagesError, MissingDependencyError


@pytest.mark.parametrize("name", OF_CACHE)
def test_anything_for_a_cache_is_taken_or_refused(name):
    cache = PagedKVCache(8, page_size=16, dtype="float16", device="cpu")
    seq = cache.add(ROWS[0])
    cache.append(seq, ROWS[0])
    for value in ANYTHING.values():
        with contextlib.suppress(*OWN):
            OF_CACHE[name](cache, seq, value)
    cache.check()
