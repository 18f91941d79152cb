"""What PagedKVCache refuses, each with an error that says what was expected."""

from __future__ import annotations

import numpy as np
import pytest
from support.cache_model import latents, nearly_full, snapshot

from flashmla_cupy import PagedKVCache, errors

E = errors


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_pages": 0}, E.ScalarError, "num_pages: expected an integer from 1"),
        ({"num_pages": -1}, E.ScalarError, "got -1"),
        ({"num_pages": 4.0}, E.ArgTypeError, "num_pages: expected an integer"),
        ({"num_pages": True}, E.ArgTypeError, "num_pages"),
        ({"num_pages": 2**25}, E.ScalarError, "at most 33554431 pages of 64 tokens"),
        ({"page_size": 48}, E.ScalarError, "page_size: expected one of 16, 32, 64, 128, 256"),
        ({"page_size": 64.0}, E.ArgTypeError, "page_size"),
        ({"num_pages": np.ones(2)}, E.ArgTypeError, "num_pages: expected an integer"),
        ({"layer_axis": np.ones(2)}, E.OptionError, "layer_axis: expected 0 or 1, got numpy.nd"),
        ({"framework": np.ones(2)}, E.OptionError, "framework: expected 'numpy' or 'torch'"),
        ({"num_heads_kv": 0}, E.ScalarError, "num_heads_kv"),
        ({"dtype": "float32"}, E.DTypeError, "dtype: expected bfloat16 or float16"),
        ({"dtype": np.float32}, E.DTypeError, "float32"),
        ({"dtype": np.dtype(">f2")}, E.DTypeError, ">f2"),
        ({"device": "cuda"}, E.OptionError, "device: expected a CUDA device number, 'cpu' or None"),
        ({"device": -1}, E.ScalarError, "device"),
        ({"device": 0.5}, E.ArgTypeError, "device"),
        ({"device": 99}, (E.NoDeviceError, E.MissingDependencyError), "device"),
    ],
)
def test_a_cache_that_cannot_be(arguments, error, words):
    with pytest.raises(error) as caught:
        PagedKVCache(**{"num_pages": 4, "device": "cpu", **arguments})
    assert "PagedKVCache(): " in str(caught.value)
    assert words in str(caught.value)


def pool(shape=(4, 16, 1, 576), dtype=np.float16):
    return np.zeros(shape, dtype)


def readonly(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("storage", "error", "words"),
    [
        ([1, 2], E.ArgTypeError, "list"),
        (pool(dtype=np.float32), E.DTypeError, "float32 (4, 16, 1, 576)"),
        (pool(dtype=">f2"), E.DTypeError, "native byte order"),
        (pool((4, 16, 576)), E.ShapeError, "[num_pages, page_size, h_kv, 576]"),
        (pool((4, 16, 1, 512)), E.ShapeError, "[num_pages, page_size, h_kv, 576]"),
        (pool((0, 16, 1, 576)), E.ShapeError, "no axis empty"),
        (pool((4, 16, 0, 576)), E.ShapeError, "no axis empty"),
        (pool((4, 24, 1, 576)), E.ShapeError, "a page_size (second axis) of 16"),
        (readonly(pool()), E.ReadOnlyError, "writable"),
        (pool((4, 16, 1, 1152))[..., ::2], E.StrideError, "contiguous last axis"),
        (pool()[::-1], E.StrideError, "negative"),
        (pool((4, 16, 1, 577))[..., :576], E.AlignmentError, "multiples of 16 bytes"),
        (pool((4, 16, 1, 584))[..., 1:577], E.AlignmentError, "address"),
    ],
)
def test_storage_that_cannot_serve(storage, error, words):
    with pytest.raises(error) as caught:
        PagedKVCache.from_storage(storage)
    assert str(caught.value).startswith("PagedKVCache.from_storage(): storage: expected ")
    assert words in str(caught.value)
    assert "k_cache" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"num_pages": 5}, E.ScalarError, "num_pages: expected 4, as storage has"),
        ({"num_pages": np.ones(2)}, E.ArgTypeError, "num_pages: expected an integer"),
        ({"page_size": 64}, E.ScalarError, "page_size: expected 16"),
        ({"num_heads_kv": 2}, E.ScalarError, "num_heads_kv: expected 1"),
        ({"dtype": "bfloat16"}, E.DTypeError, "dtype: expected float16"),
        ({"device": 0}, E.DeviceMismatchError, "device: expected 'cpu'"),
        ({"framework": "torch"}, E.OptionError, "framework: expected 'numpy'"),
        ({"layer_axis": np.ones(2)}, E.OptionError, "layer_axis: expected 0 or 1"),
        ({"num_layers": 2}, E.ShapeError, "storage: expected [num_pages, 2, page_size"),
    ],
)
def test_what_contradicts_the_storage(given, error, words):
    with pytest.raises(error) as caught:
        PagedKVCache(storage=pool(), **given)
    assert words in str(caught.value)
    (name,) = given
    if name not in ("num_layers", "layer_axis"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            PagedKVCache.from_storage(pool(), **given)


def test_what_agrees_with_the_storage_may_be_given():
    given = {"num_pages": 4, "page_size": 16, "num_heads_kv": 1, "dtype": np.float16}
    cache = PagedKVCache(storage=pool(), device="cpu", framework="numpy", **given)
    assert cache.dtype == np.float16


def test_a_jax_array_is_no_storage():
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(errors.FrameworkMismatchError, match=r"append_mla_kv\(\), which"):
        PagedKVCache.from_storage(jnp.zeros((4, 16, 1, 576), jnp.float16))


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (latents(3).tolist(), E.ArgTypeError, "list"),
        (latents(3).astype(np.float32), E.DTypeError, "bfloat16, the dtype of the cache"),
        (latents(3, dtype="float16"), E.DTypeError, "float16 (3, 1, 576)"),
        (latents(3)[..., :512], E.ShapeError, "[n, 576] or [n, 1, 576]"),
        (latents(4).reshape(2, 2, 576), E.ShapeError, "got bfloat16 (2, 2, 576)"),
        (latents(1)[0, 0], E.ShapeError, "got bfloat16 (576,)"),
        (latents(2)[None], E.ShapeError, "got bfloat16 (1, 2, 1, 576)"),
    ],
)
def test_rows_that_do_not_fit(rows, error, words):
    cache, a, _ = nearly_full()
    before = snapshot(cache)
    for name, call in (
        ("rows", lambda: cache.append(a, rows)),
        ("latent", lambda: cache.add(rows)),
    ):
        with pytest.raises(error) as caught:
            call()
        assert f"(): {name}: expected " in str(caught.value)
        assert words in str(caught.value)
        assert snapshot(cache) == before


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (latents(2)[:, 0], "[batch, n, 576] or [batch, n, 1, 576], got bfloat16 (2, 576)"),
        (latents(2)[:, None, None], "got bfloat16 (2, 1, 1, 1, 576)"),
        (latents(3)[None], "a first axis of 2"),
        (latents(6)[:, 0].reshape(3, 2, 576), "one of 3"),
        (latents(0).reshape(0, 1, 576), "one of 0"),
    ],
)
def test_batched_rows_that_do_not_fit(rows, words):
    cache, a, b = nearly_full()
    before = snapshot(cache)
    with pytest.raises(errors.ShapeError) as caught:
        cache.append_batch([a, b], rows)
    assert words in str(caught.value)
    assert snapshot(cache) == before


def test_rows_without_heads_need_a_cache_with_one():
    cache = PagedKVCache(4, num_heads_kv=2, device="cpu")
    with pytest.raises(errors.ShapeError, match=r"expected \[n, 2, 576\], got bfloat16 \(2, 576\)"):
        cache.add(latents(2)[:, 0])


@pytest.mark.parametrize(
    ("q", "error", "words"),
    [
        (latents(12).reshape(3, 1, 4, 576), E.ShapeError, "a first axis of 2, the number of"),
        (latents(8).reshape(2, 4, 576), E.ShapeError, "four axes"),
        (latents(8, dtype="float16").reshape(2, 1, 4, 576), E.DTypeError, "k_cache"),
        (latents(8)[..., :512].reshape(2, 1, 4, 512), E.ShapeError, "576"),
        ([1], E.ArgTypeError, "attend(): q: expected a NumPy array"),
    ],
)
def test_queries_that_do_not_fit(q, error, words):
    cache, _, _ = nearly_full()
    with pytest.raises(error) as caught:
        cache.attend(q)
    assert words in str(caught.value)


def test_causal_is_a_flag():
    cache, _, _ = nearly_full()
    with pytest.raises(errors.ArgTypeError, match="causal: expected True or False"):
        cache.attend(latents(8).reshape(2, 1, 4, 576), causal=1)


# --- words and books ---------------------------------------------------------------------------


def test_repr():
    cache, a, _ = nearly_full()
    assert repr(a) == "<sequence 0>"
    assert repr(cache) == (
        "PagedKVCache(6 pages of 16 tokens, bfloat16, cpu; 2 sequences, 63 tokens, 2 pages free)"
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda books: books.states.free.append(books.states.free[0]), "is free 2 times"),
        (lambda books: books.states.free.pop(), "is free 0 times and held by 0"),
        (lambda books: books.states.free.append(0), "page 0 is free 1 times and held by 1"),
        (lambda books: books.states.refcount.__setitem__(1, 2), "page 1 .* but its count is 2"),
        (lambda books: books.table.__setitem__((0, 1), 0), "sequence 0 holds a page twice"),
        (lambda books: books.table.__setitem__((1, 0), 1), "page 1 .* held by 2 sequences"),
        (lambda books: books.states.free.append(6), "outside the pool"),
        (lambda books: books.free_rows.append(0), "row of the table"),
    ],
)
def test_check_finds_broken_books(damage, words):
    cache, _, _ = nearly_full()
    cache.check()
    damage(cache._table)
    with pytest.raises(errors.FlashMLAError, match=f"inconsistent: .*{words}"):
        cache.check()
