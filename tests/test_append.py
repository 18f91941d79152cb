"""append_mla_kv() in every framework, against the definition; what it refuses; under compilers."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest
from support.foreign import Foreign
from support.whole_cache import back, places, to

from flashmla_cupy import append_mla_kv, deepseek, errors, reference_append

E = errors
CONFIG = {"qk_rope_head_dim": 64, "rope_theta": 1e4}


class Case:
    """Arrays of NumPy, and k_cache as it should become."""

    def __init__(self, seed=0, h_kv=1, rotary=True, interleaved=True, dtype=ml_dtypes.bfloat16):
        rng = np.random.default_rng(seed)

        def new(*shape):
            return rng.standard_normal(shape, np.float32).astype(dtype)

        self.k_cache, self.rows = new(5, 16, h_kv, 576), new(9, h_kv, 576)
        self.slots = rng.permutation(80)[:9].astype(np.int64)
        self.slots[[2, 5]] = -1, 80
        self.rotary = {}
        if rotary:
            cos, sin = deepseek.rotary_tables(CONFIG, 40)
            positions = rng.integers(0, 40, 9)
            positions[4] = 40
            self.rotary = {"cos": cos, "sin": sin, "positions": positions}
        self.options = {"interleaved": interleaved}
        self.expected = self.k_cache.copy()
        reference_append.append(self.expected, self.rows, self.slots, **self.rotary, **self.options)

    def there(self, place):
        """The same arrays, of a framework on a device."""
        rotary = {name: plain(x, place) for name, x in self.rotary.items()}
        arrays = to(self.k_cache, place), to(self.rows, place), plain(self.slots, place)
        return *arrays, {**rotary, **self.options}


def plain(x, place):
    """A NumPy array of numbers, of a framework on a device."""
    device, name = place
    if name == "torch":
        torch = importlib.import_module("torch")
        return torch.from_numpy(x).to("cpu" if device == "cpu" else f"cuda:{device}")
    if name == "jax":
        return importlib.import_module("jax.numpy").asarray(x)
    return x if name == "numpy" else importlib.import_module("cupy").asarray(x)


def same_bits(found, expected):
    return np.array_equal(back(found).view(np.uint16), expected.view(np.uint16))


@places
@pytest.mark.parametrize("seed", range(6))
def test_every_framework_has_the_bits_of_the_definition(place, seed):
    case = Case(
        seed,
        h_kv=1 + seed % 2,
        rotary=seed != 2,
        interleaved=seed % 3 != 1,
        dtype=ml_dtypes.bfloat16 if seed % 4 < 2 else np.float16,
    )
    for _ in range(2):  # the second call has a signature that was seen
        k_cache, rows, slots, options = case.there(place)
        result = append_mla_kv(k_cache, rows, slots, **options)
        assert same_bits(result, case.expected)
        if place[1] != "jax":
            assert result is k_cache


def test_the_definition_by_complex_numbers():
    case = Case(dtype=np.float16)
    cos, sin, positions = case.rotary.values()
    for row, slot, position in zip(
        case.rows[:, 0].astype(np.float32), case.slots, positions, strict=True
    ):
        if not 0 <= slot < 80:
            continue
        found = case.expected[slot // 16, slot % 16, 0]
        assert np.array_equal(found[:512], row[:512])
        if position == 40:
            assert np.isnan(found[512:]).all()
            continue
        turn = cos[position] + 1j * sin[position]
        pairs = (row[512::2] + 1j * row[513::2]) * turn
        assert found[512::2] == pytest.approx(pairs.real, abs=3e-3)
        assert found[513::2] == pytest.approx(pairs.imag, abs=3e-3)


def test_the_definition_is_that_of_rotate():
    """What append rotates is what `deepseek.rotate` gives, for both orders of the pairs."""
    for interleaved in (True, False):
        case = Case(3, interleaved=interleaved)
        cos, sin, positions = case.rotary.values()
        kept = (case.slots >= 0) & (case.slots < 80) & (positions < 40)
        at = positions[kept]
        turned = deepseek.rotate(
            case.rows[kept, 0, 512:], cos[at], sin[at], interleaved=interleaved
        )
        found = case.expected.reshape(80, 576)[case.slots[kept], 512:]
        assert np.array_equal(found.view(np.uint16), turned.view(np.uint16))


@places
def test_strided_pages_and_rows(place):
    if place[1] == "jax":
        pytest.skip("XLA's arrays are contiguous")
    case = Case(1)
    layers = to(np.repeat(case.k_cache[:, None], 3, axis=1), place)
    wide = to(np.concatenate([case.rows, case.rows], axis=-1)[:, :, :1160], place)
    _, _, slots, options = case.there(place)
    append_mla_kv(layers[:, 1], wide[:, 0, :576], slots, **options)
    found = back(layers)
    assert same_bits(found[:, 1].copy(), case.expected)
    assert same_bits(found[:, 2].copy(), case.k_cache)


def test_nothing_to_append():
    case = Case()
    result = append_mla_kv(case.k_cache, case.rows[:0], case.slots[:0])
    assert same_bits(result, Case().k_cache)


def test_other_frameworks_come_by_dlpack():
    case = Case(rotary=False)
    k_cache = Foreign(case.k_cache.view(np.float16))
    result = append_mla_kv(k_cache, Foreign(case.rows.view(np.float16)), Foreign(case.slots))
    assert result is k_cache
    assert same_bits(case.k_cache, case.expected)


# --- compilers ---------------------------------------------------------------------------------

TORCH = pytest.mark.parametrize(
    "place", [("cpu", "torch"), pytest.param((0, "torch"), marks=pytest.mark.gpu)]
)


@TORCH
def test_under_torch_compile(place):
    torch = pytest.importorskip("torch")
    case = Case(2, rotary=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(k_cache, rows, slots, cos, sin, positions):
        append_mla_kv(k_cache, rows * 1, slots, cos=cos, sin=sin, positions=positions)
        return k_cache[0].clone()

    k_cache, rows, slots, options = case.there(place)
    first = step(k_cache, rows, slots, options["cos"], options["sin"], options["positions"])
    assert same_bits(k_cache, case.expected)
    assert same_bits(first, case.expected[0].copy())


@TORCH
def test_the_op_keeps_its_contract(place):
    torch = pytest.importorskip("torch")
    append_mla_kv(*Case(rotary=False).there(place)[:3])
    from flashmla_cupy import register_torch_ops

    register_torch_ops()
    k_cache, rows, slots, options = Case(1).there(place)
    rotary = options["cos"], options["sin"], options["positions"]
    torch.library.opcheck(
        torch.ops.flashmla_cupy.append.default, (k_cache, rows, slots, True, *rotary)
    )


def test_fake_tensors_stay_fake():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        k_cache = torch.empty(4, 16, 1, 576, dtype=torch.float16)
        rows = torch.empty(3, 576, dtype=torch.float16)
        result = append_mla_kv(k_cache, rows, torch.empty(3, dtype=torch.int64))
    assert result is k_cache


JAX = pytest.mark.parametrize(
    "place", [("cpu", "jax"), pytest.param((0, "jax"), marks=pytest.mark.gpu)]
)


@JAX
def test_jax_donates_and_compiles(place):
    jax = pytest.importorskip("jax")
    case = Case(3)
    k_cache, rows, slots, options = case.there(place)
    jitted = jax.jit(lambda k, r, s, rotary: append_mla_kv(k, r + 0, s, **rotary), donate_argnums=0)
    rotary = {name: options[name] for name in ("cos", "sin", "positions")}
    kept = jax.numpy.array(k_cache)
    assert same_bits(jitted(k_cache, rows, slots, rotary), case.expected)
    before = np.array(back(kept))
    copied = jax.jit(lambda k: append_mla_kv(k, rows, slots, **rotary))(kept)
    assert same_bits(copied, case.expected)
    assert np.array_equal(back(kept).view(np.uint16), before.view(np.uint16))
    append_mla_kv(kept, rows, slots, **rotary)
    assert kept.is_deleted()


@JAX
def test_jax_steps_in_a_scan(place):
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    cases = [Case(seed) for seed in range(4)]
    expected = cases[0].k_cache.copy()
    for case in cases:
        reference_append.append(expected, case.rows, case.slots, **case.rotary)
    rotary = plain(cases[0].rotary["cos"], place), plain(cases[0].rotary["sin"], place)

    def step(k_cache, new):
        rows, slots, positions = new
        cos, sin = rotary
        k_cache = append_mla_kv(k_cache, rows, slots, cos=cos, sin=sin, positions=positions)
        return k_cache, 0

    news = (
        jnp.stack([to(case.rows, place) for case in cases]),
        jnp.stack([plain(case.slots, place) for case in cases]),
        jnp.stack([plain(case.rotary["positions"], place) for case in cases]),
    )
    result, _ = jax.jit(lambda k: jax.lax.scan(step, k, news))(to(cases[0].k_cache, place))
    assert same_bits(result, expected)


def test_jax_has_no_gradient():
    jax = pytest.importorskip("jax")
    case = Case(dtype=np.float16)
    k_cache, rows, slots, options = case.there(("cpu", "jax"))
    with pytest.raises(E.OptionError, match="appending has no backward pass"):
        jax.grad(lambda r: append_mla_kv(k_cache, r, slots, **options).astype("float32").sum())(
            rows
        )


# --- misuse ------------------------------------------------------------------------------------


def readonly(x):
    x = x.copy()
    x.flags.writeable = False
    return x


MISUSE = {
    "rows of another width": (
        {"rows": lambda c: c.rows[..., :512]}, E.ShapeError, r"\[n, 1, 576\]"
    ),
    "rows of other heads": (
        {"rows": lambda c: c.rows.repeat(2, 1)}, E.ShapeError, "rows: expected"
    ),
    "rows of another dtype": (
        {"rows": lambda c: c.rows.astype(np.float16)}, E.DTypeError, "bfloat16, as k_cache is"
    ),
    "a list": ({"rows": lambda c: c.rows.tolist()}, E.ArgTypeError, "rows: expected"),
    "slots of int32": (
        {"slot_mapping": lambda c: c.slots.astype(np.int32)}, E.DTypeError, "int64"
    ),
    "too few slots": ({"slot_mapping": lambda c: c.slots[:3]}, E.ShapeError, r"shape \(9,\)"),
    "slots with gaps": (
        {"slot_mapping": lambda c: np.repeat(c.slots, 2)[::2]}, E.StrideError, "contiguous"
    ),
    "a cache of float32": (
        {"k_cache": lambda c: c.k_cache.astype(np.float32)}, E.DTypeError, "write_kv"
    ),
    "rows of the other byte order": (
        {"rows": lambda c: c.rows.astype(">f2")}, E.DTypeError, "got >f2"
    ),
    "a cache of the other byte order": (
        {"k_cache": lambda c: c.k_cache.astype(">f2")}, E.DTypeError, "got >f2"
    ),
    "a cache of three axes": ({"k_cache": lambda c: c.k_cache[:, :, 0]}, E.ShapeError, "k_cache"),
    "an odd page size": (
        {"k_cache": lambda c: c.k_cache[:, :12]}, E.ScalarError, "page_size of 16, 32"
    ),
    "a cache that is read-only": (
        {"k_cache": lambda c: readonly(c.k_cache)}, E.ReadOnlyError, "may be written"
    ),
    "rows inside the cache": (
        {"rows": lambda c: c.k_cache.reshape(-1, 1, 576)[:9]}, E.AliasingError, "apart from rows"
    ),
    "no sines": ({"sin": lambda c: None}, E.OptionError, "sin: expected cos, sin and positions"),
    "positions alone": (
        {"cos": lambda c: None, "sin": lambda c: None}, E.OptionError, "together, got None"
    ),
    "tables of float64": (
        {"cos": lambda c: c.rotary["cos"].astype(float)}, E.DTypeError, "float32"
    ),
    "tables that differ": ({"sin": lambda c: c.rotary["sin"][:5]}, E.ShapeError, "alike"),
    "tables of all columns": (
        {"cos": lambda c: c.rotary["cos"].repeat(2, 1)}, E.ShapeError, "for each pair"
    ),
    "a flag that is none": ({"interleaved": lambda c: 1}, E.ArgTypeError, "True or False"),
    "reversed rows": ({"rows": lambda c: c.rows[:, :, ::-1]}, E.StrideError, "last axis"),
    "rows at odd addresses": (
        {"rows": lambda c: np.zeros((9, 1, 580), c.rows.dtype)[..., 1:577]}, E.AlignmentError, "16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISUSE)
def test_misuse_has_its_error_and_writes_nothing(what):
    changes, error, words = MISUSE[what]
    case = Case()
    arguments = {
        "k_cache": case.k_cache,
        "rows": case.rows,
        "slot_mapping": case.slots,
        **case.rotary,
        **{name: change(case) for name, change in changes.items()},
    }
    before = case.k_cache.copy()
    with pytest.raises(error, match=words) as caught:
        append_mla_kv(**arguments)
    assert str(caught.value).startswith("append_mla_kv(): ")
    assert same_bits(case.k_cache, before)


def test_frameworks_do_not_mix():
    torch = pytest.importorskip("torch")
    case = Case()
    with pytest.raises(E.FrameworkMismatchError, match="slot_mapping: expected a numpy array"):
        append_mla_kv(case.k_cache, case.rows, torch.from_numpy(case.slots))


def test_there_is_no_gradient():
    torch = pytest.importorskip("torch")
    k_cache, rows, slots, _ = Case(rotary=False).there(("cpu", "torch"))
    with pytest.raises(E.OptionError, match="no_grad"):
        append_mla_kv(k_cache, rows.requires_grad_(), slots)
    with torch.no_grad():
        append_mla_kv(k_cache, rows, slots)
