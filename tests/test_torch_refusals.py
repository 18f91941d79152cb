"""Traced calls refuse what eager calls refuse, with the same error: under fake tensors, under a
mode that sees every operation, and compiled."""

from __future__ import annotations

import numpy as np
import pytest

from flashmla_cupy import (
    ArgumentError,
    FrameworkMismatchError,
    ScalarError,
    append_mla_kv,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

torch = pytest.importorskip("torch")
python_dispatch = pytest.importorskip("torch.utils._python_dispatch")
int32, half = torch.int32, torch.float16
LENGTHS = torch.tensor([5, 16], dtype=int32)


def metadata():
    return {"cache_seqlens": LENGTHS, "num_q_tokens_per_head_k": 16}


def list_metadata():
    return {**metadata(), "num_heads_q": 16, "topk": 8}


def decode(lazy=False):
    made = get_mla_metadata() if lazy else get_mla_metadata(LENGTHS, 16, 1)
    return {
        "q": torch.zeros(2, 1, 16, 576, dtype=half),
        "k_cache": torch.zeros(3, 16, 1, 576, dtype=half),
        "block_table": torch.zeros(2, 1, dtype=int32),
        "cache_seqlens": LENGTHS,
        "head_dim_v": 512,
        "tile_scheduler_metadata": made[0],
        "num_splits": made[1],
    }


def lazy_decode():
    return decode(lazy=True)


def fp8_decode():
    cache = torch.zeros(3, 64, 1, 656, dtype=torch.uint8)
    q = torch.zeros(2, 1, 16, 576, dtype=torch.bfloat16)
    return {**decode(), "q": q, "k_cache": cache, "is_fp8_kvcache": True}


def sparse_decode():
    lists = torch.zeros(2, 1, 8, dtype=int32)
    return {**lazy_decode(), "block_table": None, "cache_seqlens": None, "indices": lists}


def prefill():
    return {
        "q": torch.zeros(3, 16, 576, dtype=half),
        "kv": torch.zeros(20, 1, 576, dtype=half),
        "indices": torch.zeros(3, 1, 8, dtype=int32),
        "sm_scale": 0.1,
    }


def paged_prefill():
    return {**prefill(), "kv": torch.zeros(3, 16, 1, 576, dtype=half)}


def append():
    return {
        "k_cache": torch.zeros(3, 16, 1, 576, dtype=half),
        "rows": torch.zeros(2, 576, dtype=half),
        "slot_mapping": torch.tensor([0, 5]),
    }


DECODES = (decode, fp8_decode, sparse_decode)
PREFILLS = (prefill, paged_prefill)
FUNCTIONS = {
    metadata: get_mla_metadata,
    list_metadata: get_mla_metadata,
    decode: flash_mla_with_kvcache,
    lazy_decode: flash_mla_with_kvcache,
    fp8_decode: flash_mla_with_kvcache,
    sparse_decode: flash_mla_with_kvcache,
    prefill: flash_mla_sparse_fwd,
    paged_prefill: flash_mla_sparse_fwd,
    append: append_mla_kv,
}
NO_INTEGERS = (0, -4, True, "a", 4.0, 2**70)
NO_TENSORS = (None, [1], np.zeros(3, np.int32))
NO_WIDTHS = (256, "ab", 7, True)
NO_SCALES = (None, "x", -1.0, 0.0, True)
WIDE = (fp8_decode, sparse_decode, paged_prefill)
OPTIONS = [  # arguments, which of them, what it is not
    *((of, "num_q_tokens_per_head_k", x) for of in (metadata, list_metadata) for x in NO_INTEGERS),
    *((of, "num_heads_k", x) for of in (metadata, list_metadata) for x in NO_INTEGERS),
    *((of, "num_heads_q", x) for of in (metadata, list_metadata) for x in NO_INTEGERS),
    *((list_metadata, name, -1) for name in ("topk", "extra_topk")),
    *((list_metadata, name, "a") for name in ("topk", "extra_topk")),
    *((of, "head_dim_v", x) for of in DECODES for x in NO_WIDTHS),
    *((of, "softmax_scale", x) for of in DECODES for x in NO_SCALES[1:]),
    *((of, "causal", x) for of in DECODES for x in (1, 0, None, "no")),
    *(
        (of, "wide_fp8", x)
        for of in (fp8_decode, sparse_decode, paged_prefill)
        for x in (1, 0, "a")
    ),
    *((of, "is_fp8_kvcache", x) for of in (fp8_decode, sparse_decode) for x in (1, 0, None)),
    *((of, "sm_scale", x) for of in PREFILLS for x in NO_SCALES),
    *((of, "d_v", x) for of in PREFILLS for x in NO_WIDTHS),
    *((append, "interleaved", x) for x in (1, 0, None)),
]
ARRAYS = [
    *((of, "cache_seqlens", x) for of in (metadata, list_metadata) for x in NO_TENSORS[:2]),
    *((of, name, x) for of in (decode, lazy_decode, fp8_decode)
      for name in ("q", "k_cache", "block_table", "cache_seqlens") for x in NO_TENSORS),
    *((sparse_decode, name, x) for name in ("k_cache", "indices") for x in NO_TENSORS[1:]),
    *((of, name, x) for of in PREFILLS for name in ("q", "indices")
      for x in NO_TENSORS),
    *((prefill, "kv", x) for x in NO_TENSORS),
    *((append, name, x) for name in ("k_cache", "rows", "slot_mapping") for x in NO_TENSORS),
    (append, "cos", torch.zeros(4, 32)),
    (append, "sin", np.zeros((4, 32), np.float32)),
]  # fmt: skip
FACTS = [  # what traces know but where shapes are symbolic
    (decode, "k_cache", torch.zeros(3, 16, 0, 576, dtype=half)),
    (lazy_decode, "k_cache", torch.zeros(3, 16, 0, 576, dtype=half)),
    (lazy_decode, "k_cache", torch.zeros(3, 17, 1, 576, dtype=half)),
    (decode, "k_cache", torch.zeros(3, 16, 1, 576)),
    (decode, "block_table", torch.zeros(3, 1, dtype=int32)),
    (decode, "num_splits", torch.zeros(2, dtype=int32)),
    (decode, "out", torch.zeros(2, 1, 16, 576, dtype=half)),
    (decode, "q", torch.zeros(2, 1, 16, 1152, dtype=half)[..., ::2]),
    (fp8_decode, "block_table", torch.zeros(2, 1)),
    (fp8_decode, "k_cache", torch.zeros(3, 64, 1, 655, dtype=torch.uint8)),
    (sparse_decode, "indices", torch.zeros(2, 1, 0, dtype=int32)),
    (prefill, "kv", torch.zeros(20, 1, 512, dtype=half)),
    (prefill, "lse", torch.zeros(3, 17)),
    (paged_prefill, "indices", torch.zeros(4, 1, 8, dtype=int32)),
    (append, "slot_mapping", torch.zeros(3, dtype=torch.int64)),
    (append, "rows", torch.zeros(2, 2, 576, dtype=half)),
    (metadata, "cache_seqlens", torch.zeros(2)),
    (list_metadata, "topk_length", torch.zeros(3, dtype=int32)),
]


def named(case):
    return case.__name__ if callable(case) else None


class Sees(python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def answer(call, arguments):
    """The class of the error of a call, and what it names."""
    with pytest.raises(ArgumentError) as caught:
        call(**arguments)
    of, error = type(caught.value), caught.value  # of two frameworks either may be named
    return of, of is FrameworkMismatchError or error.argument, error.function


def fake_answer(call, arguments):
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
        return answer(call, fakes)


@pytest.mark.parametrize(("of", "name", "bad"), OPTIONS + ARRAYS + FACTS, ids=named)
def test_fake_tensors_and_modes(of, name, bad):
    call, arguments = FUNCTIONS[of], {**of(), name: bad}
    expected = answer(call, arguments)
    arguments = {**of(), name: bad}
    assert fake_answer(call, arguments) == expected
    with Sees():
        assert answer(call, arguments) == expected


# One value of each option and array, since Dynamo takes half a second for each.
COMPILED = {(of, name): (of, name, x) for of, name, x in OPTIONS + ARRAYS}


@pytest.mark.parametrize(("of", "name", "bad"), COMPILED.values(), ids=named)
def test_compiled_calls(of, name, bad):
    """A trace ends where an error is raised, and the call itself raises it."""
    torch._dynamo.reset()
    call, arguments = FUNCTIONS[of], {**of(), name: bad}
    expected = answer(call, arguments)
    compiled = torch.compile(lambda arguments: call(**arguments), backend="eager")
    assert answer(lambda **given: compiled(given), {**of(), name: bad}) == expected


class Prompt(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, kv, indices):
        return flash_mla_sparse_fwd(q, kv, indices, **self.options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"sm_scale": None}, "sm_scale"), ({"sm_scale": 0.1, "d_v": 7}, "d_v")],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_whole_graphs_and_exports(options, words, dynamic):
    q, kv, indices, _ = prefill().values()
    axes = ({0: torch.export.Dim("s_q")}, None, {0: torch.export.Dim("s_q")}) if dynamic else None
    with pytest.raises(Exception, match=words):
        torch.export.export(Prompt(**options), (q, kv, indices), dynamic_shapes=axes, strict=False)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words):
        torch.compile(Prompt(**options), fullgraph=True, backend="eager", dynamic=dynamic)(
            q, kv, indices
        )


@pytest.mark.parametrize("strict", [False, True])
def test_numbers_of_rows_bound_no_dynamic_axis(strict):
    """What is compared becomes a guard, and torch.export refuses those of an axis without a
    bound."""

    class Schedule(torch.nn.Module):
        def forward(self, q, lengths):
            return get_mla_metadata(lengths, q.shape[1] * 16, 1, 16, topk=8)

    s_q, batch = torch.export.Dim("s_q"), torch.export.Dim("batch")
    axes = {0: batch, 1: s_q}, {0: batch}
    q, lengths = torch.zeros(2, 2, 16, 576), LENGTHS
    program = torch.export.export(Schedule(), (q, lengths), dynamic_shapes=axes, strict=strict)
    made = program.module()(torch.zeros(3, 4, 16, 576), torch.tensor([5, 16, 7], dtype=int32))
    want = get_mla_metadata(torch.zeros(3, dtype=int32), 64, 1, 16, topk=8)
    assert all(map(torch.equal, made, want))


def test_symbolic_rows_below_none_are_refused():
    step = torch.compile(get_mla_metadata, backend="eager", dynamic=True)
    with pytest.raises(ScalarError, match="num_q_tokens_per_head_k"):
        step(LENGTHS, -4)


@pytest.mark.parametrize("sizes", [(16, 1, 16), (16, 1, 16, False, 8)], ids=["dense", "lists"])
def test_numpy_integers_are_rows_and_widths_in_whole_graphs(sizes):
    """Dynamo shows them as arrays."""
    want = get_mla_metadata(LENGTHS, *sizes)
    places = (0, 2) if len(sizes) == 3 else (0, 4)
    given = [np.int64(x) if i in places else x for i, x in enumerate(sizes)]
    step = torch.compile(
        lambda lengths: get_mla_metadata(lengths, *given), fullgraph=True, backend="eager"
    )
    assert all(map(torch.equal, step(LENGTHS), want))


@pytest.mark.parametrize("heads", [1, 3])
def test_symbolic_query_heads(heads):
    step = torch.compile(
        lambda q: get_mla_metadata(LENGTHS, q.shape[1], 1, q.shape[1]),
        fullgraph=True, backend="eager", dynamic=True,
    )  # fmt: skip
    for h_q in (16, heads):
        made = step(torch.zeros(2, h_q))
        assert all(map(torch.equal, made, get_mla_metadata(LENGTHS, h_q, 1, h_q)))


def test_a_nested_tensor_under_a_mode():
    arguments = decode()
    arguments["q"] = torch.nested.nested_tensor(list(arguments["q"]), layout=torch.strided)
    with Sees():
        assert answer(flash_mla_with_kvcache, arguments)[1] == "q"
