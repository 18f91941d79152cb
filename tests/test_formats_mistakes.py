"""Mistakes of the writers and readers of cache formats: each has its name, and writes nothing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support.every_framework import put

from flashmla_cupy import errors
from flashmla_cupy.formats.cache_format import FORMATS
from flashmla_cupy.formats.quantize import dequantize_kv, quantize_kv
from flashmla_cupy.formats.write import write_kv

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KV = np.zeros((2, 4, 1, 576), np.float32)
CACHE = np.zeros((2, 4, 1, 656), np.uint8)
NEW = np.zeros((3, 1, 576), np.float32)
SLOTS = np.arange(3)


def here(framework: str, x: np.ndarray):
    """x on the CPU, as an array of the framework."""
    return put(framework, x, -1)


def torch_write(*, pages=lambda x: x, new=lambda x: x, slots=lambda x: x):
    """write_kv() of tensors with changes."""
    cache, kv, where = (here("torch", x) for x in (CACHE, NEW, SLOTS))
    return write_kv(pages(cache), new(kv), slots(where))


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (errors.OptionError, "format", lambda: quantize_kv(KV, "v41")),
        (errors.ArgTypeError, "kv", lambda: quantize_kv([1.0], "v32")),
        (errors.DTypeError, "kv", lambda: quantize_kv(KV.astype(np.float64), "v32")),
        (errors.ShapeError, "kv", lambda: quantize_kv(KV[0], "v32")),
        (errors.ShapeError, "kv", lambda: quantize_kv(KV, "v4")),
        (errors.ShapeError, "kv", lambda: quantize_kv(KV.repeat(2, 2), "v32")),
        (errors.ArgTypeError, "pow2_scales", lambda: quantize_kv(KV, "v32", pow2_scales=1)),
        (errors.OptionError, "pow2_scales", lambda: quantize_kv(KV, "e4m3", pow2_scales=False)),
        (errors.OptionError, "descale_k", lambda: quantize_kv(KV, "v32", descale_k=1.0)),
        (errors.ScalarError, "descale_k", lambda: quantize_kv(KV, "e4m3", descale_k=0.0)),
        (errors.ScalarError, "descale_k", lambda: quantize_kv(KV, "e4m3", descale_k=1e300)),
        (errors.ShapeError, "descale_k", lambda: quantize_kv(KV, "e4m3", descale_k=np.ones(2))),
        (errors.ShapeError, "k_cache", lambda: dequantize_kv(CACHE[..., :655])),
        (errors.ShapeError, "k_cache", lambda: dequantize_kv(CACHE[0])),
        (errors.ShapeError, "k_cache", lambda: dequantize_kv(CACHE.repeat(2, 2))),
        (errors.OptionError, "k_cache", lambda: dequantize_kv(CACHE, "v4")),
        (errors.DTypeError, "dtype", lambda: dequantize_kv(CACHE, dtype="int8")),
        (errors.ShapeError, "kv", lambda: write_kv(CACHE, NEW[:, 0], SLOTS)),
        (errors.ShapeError, "slot_mapping", lambda: write_kv(CACHE, NEW, SLOTS[:2])),
        (errors.DTypeError, "slot_mapping", lambda: write_kv(CACHE, NEW, SLOTS.astype("int16"))),
        (
            errors.FrameworkMismatchError,
            "slot_mapping",
            lambda: write_kv(CACHE, NEW, here("torch", SLOTS)),
        ),
        (errors.FrameworkMismatchError, "kv", lambda: write_kv(CACHE, here("torch", NEW), SLOTS)),
        (
            errors.StrideError,
            "k_cache",
            lambda: write_kv(np.zeros((2, 8, 1, 584), np.uint8)[:, ::2], NEW[..., :512], SLOTS),
        ),
        (
            errors.StrideError,
            "k_cache",
            lambda: dequantize_kv(np.zeros((2, 8, 1, 584), np.uint8)[:, ::2]),
        ),
        (
            errors.StrideError,
            "k_cache",
            lambda: dequantize_kv(here("torch", np.zeros((2, 8, 1, 584), np.uint8))[:, ::2]),
        ),
        (
            errors.ReadOnlyError,
            "k_cache",
            lambda: write_kv(np.broadcast_to(CACHE, CACHE.shape), NEW, SLOTS),
        ),
        (
            errors.StrideError,
            "k_cache",
            lambda: torch_write(pages=lambda x: x[:1].expand(2, -1, -1, -1)),
        ),
        (
            errors.DeviceMismatchError,
            "kv",
            lambda: torch_write(new=lambda x: x.to("meta")),
        ),
        (
            errors.DeviceMismatchError,
            "slot_mapping",
            lambda: torch_write(slots=lambda x: x.to("meta")),
        ),
        (errors.DTypeError, "kv", lambda: write_kv(CACHE, NEW.astype(">f2"), SLOTS)),
    ],
)
def test_mistakes_are_named(error, argument, call):
    with pytest.raises(error) as caught:
        call()
    assert caught.value.argument == argument
    assert caught.value.function in ("quantize_kv", "dequantize_kv", "write_kv")


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("format", "page", "token"),
    [
        ("v32", 4 * 656, 328),
        ("v32", 328, 656),
        ("bfloat16", 4 * 576, 288),
        ("e4m3", 576, 576),
        ("v4", 16, 584),
    ],
)
def test_slots_that_overlap_are_not_written(framework, format, page, token):
    pytest.importorskip(framework)
    form = FORMATS[format]
    dtype = BFLOAT16 if format == "bfloat16" else np.dtype(np.uint8)
    shape, strides = (2, 4, 1, form.width), (page, token, 1, 1)
    memory = np.zeros(20_000, dtype)
    if framework == "torch":
        cache = here("torch", memory).as_strided(shape, strides)
    else:
        in_bytes = [stride * dtype.itemsize for stride in strides]
        cache = np.lib.stride_tricks.as_strided(memory, shape, in_bytes)
    new, slots = here(framework, NEW[..., : form.d_qk]), here(framework, SLOTS)
    with pytest.raises(errors.StrideError, match="slots that do not overlap"):
        write_kv(cache, new, slots)
    assert not memory.any()


def test_slots_apart_are_written_however_they_lie():
    new = np.random.default_rng(0).standard_normal((3, 1, 576)).astype(np.float32)
    want = write_kv(CACHE.copy(), new, SLOTS)
    rooms = np.zeros((4, 2, 1, 700), np.uint8).swapaxes(0, 1), np.zeros((2, 4, 1, 656), np.uint8)
    for cache in (rooms[0][..., :656], rooms[1][::-1, ::-1], np.asfortranarray(CACHE)):
        assert np.array_equal(write_kv(cache, new, SLOTS), want)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_descale_k_in_host_memory_is_positive_and_finite(framework, wrong):
    kv, cache = here(framework, KV), here(framework, np.zeros((2, 4, 1, 576), np.uint8))
    new, slots = here(framework, NEW), here(framework, SLOTS)
    for descale in (wrong, here(framework, np.array([wrong], np.float32))):
        for call in (
            lambda d=descale: quantize_kv(kv, "e4m3", descale_k=d),
            lambda d=descale: dequantize_kv(cache, descale_k=d),
            lambda d=descale: write_kv(cache, new, slots, descale_k=d),
        ):
            with pytest.raises(errors.ScalarError, match="positive finite float32") as caught:
                call()
            assert caught.value.argument == "descale_k"


def test_every_positive_float32_is_a_descale():
    largest = float(np.finfo(np.float32).max)
    for descale in (2.0**-149, 1e-39, 3.3e38, largest):
        assert (quantize_kv(KV, "e4m3", descale_k=descale) == 0).all()
    for descale in (2.0**-151, 1.001 * largest, 10**5000):
        with pytest.raises(errors.ScalarError):
            quantize_kv(KV, "e4m3", descale_k=descale)


class Mute:
    """Has no words for itself."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")

    __str__ = __repr__


class MuteText(Mute, str):
    """A text that has none either."""


class MuteNumber(Mute, int):
    """Nor has this number."""


@pytest.mark.parametrize(
    "value",
    [KV, np.full(3, 7, np.int8), Mute(), Mute, MuteText("a"), MuteNumber(3), 10**5000, "a" * 9999],
    ids=["floats", "bytes", "object", "class", "text", "number", "long number", "long text"],
)
def test_errors_are_sentences_whatever_came(value):
    for call in (
        lambda: quantize_kv("v32", value),
        lambda: quantize_kv(KV, value),
        lambda: quantize_kv(value, "v41"),
        lambda: quantize_kv(KV, "v32", pow2_scales=value),
        lambda: quantize_kv(KV, "v32", descale_k=value),
        lambda: dequantize_kv(CACHE, dtype=value),
        lambda: dequantize_kv(CACHE, value),
        lambda: write_kv(CACHE, value, SLOTS[:0]),
        lambda: write_kv(CACHE, NEW, value),
    ):
        with pytest.raises(errors.ArgumentError) as caught:
            call()
        assert len(str(caught.value)) < 260 and "\n" not in str(caught.value)
    with pytest.raises(errors.OptionError, match=r"an array, float32 \(2, 4, 1, 576\)"):
        quantize_kv("v32", KV)
