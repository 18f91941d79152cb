"""Bad arguments: each row of a table is refused by name, before anything is touched or launched.

Every row runs twice: cold, and after the valid call it was made from, so that a signature that
was seen before does not let its neighbour through. BAD_ARRAYS, in a file of their own, are real
NumPy arrays; BAD_FACTS are arrays on a pretended GPU, for what a NumPy array cannot be.
"""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
from support.bad_arrays import BAD_ARRAYS, BF16, arguments, offset_bytes, read_only, with_gap
from support.fake_device import FakeArray, forget_calls, install

import flashmla_cupy
from flashmla_cupy import reference
from flashmla_cupy.calls import refusals, scalars, wording
from flashmla_cupy.errors import (
    AliasingError,
    AlignmentError,
    ArgTypeError,
    ArgumentError,
    DeviceMismatchError,
    DTypeError,
    FrameworkMismatchError,
    OptionError,
    ReadOnlyError,
    ScalarError,
    ShapeError,
    StaleMetadataError,
    StrideError,
)
from flashmla_cupy.schedule import split as schedule


def on(name, **changes):
    """A FakeArray argument with other facts."""
    return {name: lambda a: a[name].but(**changes)}


BAD_FACTS = [
    *(
        (f"{name}-on-other-gpu", on(name, device=1), DeviceMismatchError, name, "CUDA device")
        for name in (
            "k_cache",
            "block_table",
            "cache_seqlens",
            "tile_scheduler_metadata",
            "num_splits",
            "out",
            "lse",
        )
    ),
    *(
        (f"{name}-on-the-host", on(name, device=-1), DeviceMismatchError, name, "on the CPU")
        for name in ("k_cache", "block_table", "cache_seqlens", "num_splits", "out")
    ),
    *(
        (
            f"{name}-of-numpy",
            {name: np.zeros(3, np.int32)},
            FrameworkMismatchError,
            name,
            f"a numpy array. Convert {name} to fake",
        )
        for name in ("k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "lse")
    ),
    (
        "q-of-numpy",
        {"q": np.zeros((3, 2, 16, 576), BF16)},
        FrameworkMismatchError,
        "k_cache",
        "numpy array, as q is",
    ),
    (
        "q-rows",
        on("q", shape=(2**20, 2**8, 16, 576), strides=None),
        ShapeError,
        "q",
        "batch * s_q * h_q",
    ),
    (
        "cache-page-stride-limit",
        on("k_cache", strides=(2**39, 1152, 576, 1)),
        StrideError,
        "k_cache",
        "2**40 bytes",
    ),
    (
        "table-columns",
        on("block_table", shape=(3, 2**25), strides=None),
        ShapeError,
        "block_table",
        "int32",
    ),
    (
        "out-ends-in-cache",
        {"out": lambda a: a["out"].but(ptr=a["k_cache"].ptr - 32)},
        AliasingError,
        "out",
        "apart from k_cache",
    ),
    (
        "lse-ends-in-q",
        {"lse": lambda a: a["lse"].but(ptr=a["q"].ptr + 576 * 96 * 2 - 4)},
        AliasingError,
        "lse",
        "apart from q",
    ),
    ("q-8-byte-address", on("q", ptr=(1 << 44) + 8), AlignmentError, "q", "16 bytes"),
    ("out-8-byte-address", on("out", ptr=(1 << 44) + 8), AlignmentError, "out", "16 bytes"),
    (
        "metadata-of-a-smaller-gpu",
        on("tile_scheduler_metadata", shape=(57, 8), strides=None),
        StaleMetadataError,
        "tile_scheduler_metadata",
        "this device",
    ),
    ("out-flagged-read-only", on("out", readonly=True), ReadOnlyError, "out", "read-only"),
]


def rows(table):
    return [pytest.param(*row[1:], id=row[0]) for row in table]


def changed(good: dict, bad: dict) -> dict:
    return good | {k: v(good) if callable(v) else v for k, v in bad.items()}


def assert_sentence(error: ArgumentError, argument: str, words: str) -> None:
    text = str(error)
    assert error.argument == argument
    assert text.startswith(f"{error.function}(): {argument}: expected {error.expected}, got ")
    assert text.endswith(error.remedy)
    assert error.got in text
    assert len(error.expected) > 2
    assert error.remedy[0].isupper() or error.remedy.startswith("fp8")
    assert error.remedy.endswith(".")
    assert words in text
    assert str(pickle.loads(pickle.dumps(error))) == text


@pytest.fixture
def computed(monkeypatch):
    """What the host backend was asked to do, from here on."""
    forget_calls(monkeypatch)
    monkeypatch.setattr(refusals, "_on_host", [])
    calls = []
    decode = reference.decode
    monkeypatch.setattr(reference, "decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
    return calls


@pytest.mark.parametrize("seen_before", [False, True], ids=["cold", "seen"])
@pytest.mark.parametrize(("bad", "error_class", "argument", "words"), rows(BAD_ARRAYS))
def test_bad_arrays(computed, bad, error_class, argument, words, seen_before):
    good = arguments()
    if seen_before:
        flashmla_cupy.flash_mla_with_kvcache(**good)
        good["out"][:], good["lse"][:] = 7, 7
    call = changed(good, bad)
    computed.clear()
    before = {k: v.tobytes() for k, v in (good | call).items() if isinstance(v, np.ndarray)}
    with pytest.raises(ArgumentError) as caught:
        flashmla_cupy.flash_mla_with_kvcache(**call)
    assert type(caught.value) is error_class
    assert_sentence(caught.value, argument, words)
    assert computed == []
    for name, content in before.items():
        assert (good | call)[name].tobytes() == content, f"{name} was written"
    assert (good["out"] == 7).all()
    assert (good["lse"] == 7).all()


@pytest.mark.parametrize("seen_before", [False, True], ids=["cold", "seen"])
@pytest.mark.parametrize(("bad", "error_class", "argument", "words"), rows(BAD_FACTS))
def test_bad_facts(monkeypatch, bad, error_class, argument, words, seen_before):
    fake = install(monkeypatch)
    good = fake.arguments()
    if seen_before:
        flashmla_cupy.flash_mla_with_kvcache(**good)
        assert len(fake.launches) == 1
    launched, allocated = len(fake.launches), len(fake.framework.allocated)
    with pytest.raises(ArgumentError) as caught:
        flashmla_cupy.flash_mla_with_kvcache(**changed(good, bad))
    assert type(caught.value) is error_class
    assert_sentence(caught.value, argument, words)
    assert len(fake.launches) == launched
    assert len(fake.framework.allocated) == allocated


def test_there_are_enough_distinct_errors():
    """By class, argument and words; and no row twice."""
    table = BAD_ARRAYS + BAD_FACTS
    assert len({row[0] for row in table}) == len(table)
    assert len({(row[2], row[3], row[4]) for row in table}) >= 100


LENGTHS = np.array([3, 4], np.int32)
BAD_METADATA = [
    ("list", {"cache_seqlens": [3, 4]}, ArgTypeError, "cache_seqlens", "list"),
    ("int64", {"cache_seqlens": LENGTHS.astype(np.int64)}, DTypeError, "cache_seqlens", "int64"),
    ("2d", {"cache_seqlens": LENGTHS[None]}, ShapeError, "cache_seqlens", "(batch,)"),
    ("0d", {"cache_seqlens": LENGTHS[0, ...].reshape(())}, ShapeError, "cache_seqlens", "()"),
    ("gap", {"cache_seqlens": with_gap(LENGTHS)}, StrideError, "cache_seqlens", "contiguous"),
    (
        "too-many",
        {"cache_seqlens": np.zeros(2**20, np.int32)},
        ShapeError,
        "cache_seqlens",
        "at most 1048575 requests",
    ),
    ("address", {"cache_seqlens": offset_bytes(LENGTHS, 1)}, AlignmentError, "cache_seqlens", "4"),
    (
        "rows-zero",
        {"num_q_tokens_per_head_k": 0},
        ScalarError,
        "num_q_tokens_per_head_k",
        "from 1",
    ),
    ("no-lengths", {"cache_seqlens": None}, ArgTypeError, "cache_seqlens", "no argument"),
    (
        "no-rows",
        {"num_q_tokens_per_head_k": None},
        ArgTypeError,
        "num_q_tokens_per_head_k",
        "s_q * h_q // h_kv",
    ),
    (
        "rows-float",
        {"num_q_tokens_per_head_k": 16.0},
        ArgTypeError,
        "num_q_tokens_per_head_k",
        "float 16.0",
    ),
    (
        "rows-negative",
        {"num_q_tokens_per_head_k": -1},
        ScalarError,
        "num_q_tokens_per_head_k",
        "from 1",
    ),
    (
        "rows-array",
        {"num_q_tokens_per_head_k": LENGTHS},
        ArgTypeError,
        "num_q_tokens_per_head_k",
        "ndarray",
    ),
    ("heads-zero", {"num_heads_k": 0}, ScalarError, "num_heads_k", "from 1"),
    ("heads-bool", {"num_heads_k": True}, ArgTypeError, "num_heads_k", "bool True"),
    ("heads-none", {"num_heads_k": None}, ArgTypeError, "num_heads_k", "None"),
    ("heads-huge", {"num_heads_k": 2**31}, ScalarError, "num_heads_k", "2147483647"),
    ("q-heads-string", {"num_heads_q": "16"}, ArgTypeError, "num_heads_q", "str '16'"),
    ("fp8", {"is_fp8_kvcache": 1}, OptionError, "is_fp8_kvcache", "fp8"),
    ("topk", {"topk": 2048}, ArgTypeError, "num_heads_q", "list"),
    ("topk-length", {"topk_length": LENGTHS}, OptionError, "topk_length", "without topk"),
]


@pytest.mark.parametrize(("bad", "error_class", "argument", "words"), rows(BAD_METADATA))
def test_bad_metadata_requests(monkeypatch, bad, error_class, argument, words):
    planned = []
    monkeypatch.setattr(schedule, "plan", lambda *a: planned.append(a))
    good = {"cache_seqlens": LENGTHS, "num_q_tokens_per_head_k": 16, "num_heads_k": 1}
    with pytest.raises(ArgumentError) as caught:
        flashmla_cupy.get_mla_metadata(**(good | bad))
    assert type(caught.value) is error_class
    assert caught.value.function == "get_mla_metadata"
    assert_sentence(caught.value, argument, words)
    assert planned == []


@pytest.mark.parametrize(
    ("latent", "page_size", "words"),
    [
        (256 + 32, 64, "512 latent and 64 rotary columns.*padded with zeros"),
        (256 + 64, 64, "padded with zeros, to 512 and 64 columns, in q and k_cache alike"),
        (512 + 0, 64, "padded with zeros.*softmax_scale"),
        (576, 1, "16, 32, 64, 128, 256.*one of these page sizes.$"),
        (576, 8, "one of these page sizes.$"),
        (576, 48, r"viewed as pages of 16: k_cache.reshape\(-1, 16,.*3 \* page \+ i"),
        (576, 512, "viewed as pages of 256.*2 entries"),
        (576, 1280, "viewed as pages of 256.*5 entries"),
    ],
)
def test_other_models_are_told_what_to_do(latent, page_size, words):
    arrays = arguments()
    arrays["k_cache"] = np.zeros((9, page_size, 2, latent), BF16)
    if latent != 576:
        arrays["q"] = arrays["q"][..., :latent].copy() if latent < 576 else arrays["q"]
    with pytest.raises(ShapeError, match=words):
        flashmla_cupy.flash_mla_with_kvcache(**arrays)


def test_metadata_on_a_device_that_is_not_there(monkeypatch):
    fake = install(monkeypatch)
    with pytest.raises(DTypeError, match="int64"):
        flashmla_cupy.get_mla_metadata(FakeArray((3,), "int64"), 16, 1)
    assert fake.launches == []
    assert fake.framework.allocated == []


@pytest.mark.parametrize(
    "odd",
    [
        {"softmax_scale": 1},
        {"softmax_scale": np.float32(0.04)},
        {"softmax_scale": Fraction(1, 24)},
        {"head_dim_v": np.int64(512)},
        {"q": lambda a: np.zeros((3, 4, 16, 576), BF16)[:, ::2]},
        {"k_cache": lambda a: np.zeros((9, 3, 64, 2, 584), BF16)[:, 1, ..., 8:]},
        {"k_cache": lambda a: np.zeros((9, 2, 64, 576), BF16).swapaxes(1, 2)},
        {"block_table": lambda a: np.zeros((3, 9), np.int32)[:, :5]},
        {"block_table": lambda a: np.broadcast_to(np.zeros(5, np.int32), (3, 5))},
        {
            "q": lambda a: read_only(a["q"]),
            "cache_seqlens": lambda a: read_only(a["cache_seqlens"]),
        },
        {"out": None, "lse": None},
    ],
    ids=lambda odd: "+".join(odd),
)
def test_odd_but_valid_arguments_pass(computed, odd):
    for _ in range(2):
        flashmla_cupy.flash_mla_with_kvcache(**changed(arguments(), odd))
    assert len(computed) == 2


def test_axes_of_size_one_may_have_any_stride(monkeypatch):
    fake = install(monkeypatch)
    call = fake.arguments(batch=1, s_q=1, h_q=16, h_kv=1)
    call["q"] = call["q"].but(strides=(3, 0, 576, 1))
    call["k_cache"] = call["k_cache"].but(strides=(64 * 576, 576, 7, 1))
    call["block_table"] = call["block_table"].but(strides=(-9, 1))
    call["out"] = call["out"].but(strides=(5, -5, 512, 1))
    call["lse"] = call["lse"].but(strides=(0, 1, 99))
    call["cache_seqlens"] = call["cache_seqlens"].but(strides=(4,))
    flashmla_cupy.flash_mla_with_kvcache(**call)
    (launch,) = fake.launches
    geometry = launch[3]
    assert geometry.q_strides == (16 * 576, 16 * 576, 576, 1)  # plain, as a tensor map needs them
    assert geometry.k_strides == (64 * 576, 576, 576, 1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layer", -1, "layer: expected an integer from 0 to 2147483647, got -1. The first layer"),
        ("num_q_tokens_per_head_k", 2**31, r"Pass s_q \* h_q // h_kv.$"),
        ("width", 2**31, "Pass an integer in this range.$"),
        ("counts", 1 << 16609, "got one of 16610 bits. A count"),
        ("counts", -1 << 16609, "got one of 16610 bits"),
    ],
    ids=range(5),
)
def test_an_integer_out_of_its_range_has_a_remedy_that_fits(name, value, words):
    with pytest.raises(ScalarError, match=words):
        scalars.integer(name, value, "f")


def test_an_integer_of_any_length_can_be_named():
    assert wording.kind(2**70) == "int 1180591620717411303424"
    assert wording.kind(10**5000) == "int of 16610 bits"
    assert wording.kind(True) == "bool True"
