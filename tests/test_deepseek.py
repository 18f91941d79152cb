"""The functions of flashmla_cupy.deepseek against transformers' own modules, and against the
published numbers."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from flashmla_cupy import deepseek, errors, flash_mla_with_kvcache, get_mla_metadata

V3 = {  # what DeepSeek-V3's config.json says of attention
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    },
}
SMALL = {**V3, "hidden_size": 128, "num_attention_heads": 4, "q_lora_rank": 96}


def new_style(config):
    """The same, as transformers 5 writes it."""
    scaling = dict(config["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    rest = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    return {**rest, "rope_parameters": {**scaling, "rope_theta": config["rope_theta"]}}


def without_yarn(config):
    return {**config, "rope_scaling": None}


# --- the scale ---------------------------------------------------------------------------------


def test_softmax_scale_of_the_models():
    assert deepseek.softmax_scale(V3) == pytest.approx(0.13523377, abs=1e-7)
    v2 = {**V3, "rope_scaling": {**V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707}}
    assert deepseek.softmax_scale(v2) == pytest.approx(0.11472139, abs=1e-7)
    assert deepseek.softmax_scale(without_yarn(V3)) == 192**-0.5


@pytest.mark.parametrize("form", [new_style, lambda c: SimpleNamespace(**c)])
def test_configurations_come_in_several_forms(form):
    assert deepseek.softmax_scale(form(V3)) == deepseek.softmax_scale(V3)
    for a, b in zip(
        deepseek.rotary_tables(form(V3), 50), deepseek.rotary_tables(V3, 50), strict=True
    ):
        assert np.array_equal(a, b)


def test_a_factor_may_follow_from_the_longest_sequence():
    scaling = {**V3["rope_scaling"], "factor": None}
    assert deepseek.softmax_scale({**V3, "rope_scaling": scaling}) == deepseek.softmax_scale(V3)


def test_yarn_without_mscale_all_dim_scales_the_tables_instead():
    scaling = {k: v for k, v in V3["rope_scaling"].items() if not k.startswith("mscale")}
    config = {**V3, "rope_scaling": scaling}
    assert deepseek.softmax_scale(config) == 192**-0.5
    cos, _ = deepseek.rotary_tables(config, 1)
    assert cos == pytest.approx(0.1 * np.log(40) + 1)


@pytest.mark.parametrize("missing", ["qk_nope_head_dim", "qk_rope_head_dim"])
def test_a_missing_field_is_named(missing):
    config = {k: v for k, v in V3.items() if k != missing}
    with pytest.raises(errors.OptionError, match=f"with {missing}, got none in dict"):
        deepseek.softmax_scale(config)


@pytest.mark.parametrize("call", [deepseek.rotary_frequencies, deepseek.softmax_scale])
def test_a_missing_field_of_yarn_is_named(call):
    scaling = {**V3["rope_scaling"], "factor": None}
    del scaling["original_max_position_embeddings"]
    with pytest.raises(errors.OptionError, match="with original_max_position_embeddings, got none"):
        call({**V3, "rope_scaling": scaling})


def test_another_rope_is_refused():
    config = {**V3, "rope_scaling": {"rope_type": "linear", "factor": 2}}
    with pytest.raises(errors.OptionError, match="default or yarn, got 'linear'"):
        deepseek.rotary_frequencies(config)


# --- pure arithmetic ---------------------------------------------------------------------------


def test_rotation_by_complex_numbers():
    """Interleaved pairs are complex numbers that are turned (DeepSeek's inference code)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 64)).astype(np.float32)
    cos, sin = deepseek.rotary_tables(V3, 9)
    pos = np.array([0, 1, 8, 3, 5])
    turned = deepseek.rotate(x, cos[pos, None], sin[pos, None])
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    expected = pairs * (cos + 1j * sin)[pos, None]
    assert turned[..., 0::2] == pytest.approx(expected.real, abs=1e-6)
    assert turned[..., 1::2] == pytest.approx(expected.imag, abs=1e-6)
    order = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])
    halves = deepseek.rotate(x[..., order], cos[pos, None], sin[pos, None], interleaved=False)
    assert np.array_equal(halves, turned[..., order])


def test_scores_depend_on_the_distance_of_positions():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 64)).astype(np.float32)
    cos, sin = deepseek.rotary_tables(V3, 400)
    scores = [
        deepseek.rotate(q, cos[p + 37], sin[p + 37]) @ deepseek.rotate(k, cos[p], sin[p])
        for p in (0, 1, 200, 360)
    ]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-3)


def test_shapes_that_do_not_fit():
    cos, sin = deepseek.rotary_tables(V3, 2)
    with pytest.raises(errors.ShapeError, match="512 latent and 64 rotary"):
        deepseek.latent_rows(np.zeros((2, 512), np.float32), np.ones(512), cos, sin)
    with pytest.raises(errors.ShapeError, match=r"128 \+ 64 columns"):
        deepseek.absorbed_query(np.zeros((2, 4, 576)), np.zeros((4, 128, 512)), cos, sin)
    with pytest.raises(errors.ShapeError, match=r"weight: expected \[128 \* \(128 \+ 128\), 512\]"):
        deepseek.split_kv_b_proj(np.zeros((512, 128 * 256)), V3)
    with pytest.raises(errors.ArgTypeError, match="x: expected an array of NumPy"):
        deepseek.rotate([1.0], cos, sin)
    twice = np.concatenate([cos, cos], axis=1)  # as transformers has them
    with pytest.raises(errors.ShapeError, match="cos: expected a column for each pair"):
        deepseek.rotate(np.zeros((2, 64), np.float32), twice, twice)
    with pytest.raises(errors.ShapeError, match="sin: expected a column for each pair"):
        deepseek.latent_rows(np.zeros((2, 576), np.float32), np.ones(512), cos, twice)
    with pytest.raises(errors.ArgTypeError, match="w_uk: expected an array"):
        deepseek.absorbed_query(np.zeros((2, 4, 192)), None, cos, sin)
    with pytest.raises(errors.ShapeError, match=r"out: expected \[..., 4 heads, 512\]"):
        deepseek.expanded_output(np.zeros((2, 8, 512)), np.zeros((4, 128, 512)))
    with pytest.raises(errors.OptionError, match="interleaved: expected True or False"):
        deepseek.rotate(np.zeros((2, 64), np.float32), cos, sin, interleaved="half")
    with pytest.raises(errors.ScalarError, match="num_positions"):
        deepseek.rotary_tables(V3, -1)


def test_tables_of_other_rows_are_refused():
    cos, sin = deepseek.rotary_tables(V3, 9)
    words = r"cos: expected rows for the leading axes \(2, 7\).* at the positions of these rows"
    kv_a, q = np.zeros((2, 7, 576), np.float32), np.zeros((2, 7, 4, 192), np.float32)
    norm, w_uk = np.ones(512, np.float32), np.zeros((4, 128, 512), np.float32)
    calls = (
        lambda cos, sin: deepseek.rotate(kv_a[..., 512:], cos, sin),
        lambda cos, sin: deepseek.latent_rows(kv_a, norm, cos, sin),
        lambda cos, sin: deepseek.absorbed_query(q, w_uk, cos, sin),
    )
    for call in calls:
        with pytest.raises(errors.ShapeError, match=words):
            call(cos, sin)
        with pytest.raises(errors.ShapeError, match="sin: expected rows for the leading axes"):
            call(cos[:7], sin)
        want = call(cos[:7], sin[:7])
        for lead in ((1,), (1, 1)):  # one table for all sequences, with any number of axes before
            same = call(cos[:7].reshape(*lead, 7, 32), sin[:7].reshape(*lead, 7, 32))
            assert np.array_equal(same, want)
        assert call(cos[3], sin[3]).shape == want.shape


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda x: deepseek.latent_rows(x, np.ones(511), x[:, :32], x[:, :32]),
            errors.ShapeError,
            r"latent_rows\(\): norm_weight: expected \[512\].* got \(511,\)",
        ),
        (
            lambda x: deepseek.latent_rows(x, np.ones(512), x[:, :32], x[:, :32], eps="a"),
            errors.ArgTypeError,
            r"latent_rows\(\): eps: expected a real number",
        ),
        (lambda x: deepseek.rms_norm(x, np.ones(1)), errors.ShapeError, r"weight: .*\[576\]"),
        (lambda x: deepseek.rms_norm(x, 1.0), errors.ArgTypeError, "weight: expected an array"),
        (lambda x: deepseek.rms_norm(x, np.ones((576, 1))), errors.ShapeError, "weight: .*1 axes"),
        (lambda x: deepseek.rms_norm(x, x[0], np.ones(2)), errors.ArgTypeError, "eps: .*ndarray"),
        (lambda x: deepseek.rms_norm(x, x[0], -1.0), errors.ScalarError, "eps: .* float -1.0"),
        (lambda x: deepseek.rms_norm(x, x[0], np.nan), errors.ScalarError, "eps: .* float nan"),
        (lambda x: deepseek.rotate(x[:, :63], x, x), errors.ShapeError, "x: expected a last axis"),
    ],
)
def test_weights_and_numbers_that_do_not_fit(call, error, words):
    with pytest.raises(error, match=words):
        call(np.zeros((2, 576), np.float32))


def the_layer(rng, dtype):
    """Weights and activations of a small layer with V3's head sizes."""
    heads = SMALL["num_attention_heads"]
    make = lambda *shape: rng.standard_normal(shape, np.float32).astype(dtype)  # noqa: E731
    return {
        "kv_b": make(heads * 256, 512) * dtype(512**-0.5),
        "norm": make(512),
        "kv_a": make(2, 7, 576),
        "q": make(2, 7, heads, 192),
    }


def test_a_mask_is_refused():
    """It would be kept where its values are not what it hides."""
    rows = np.ma.array(np.ones((3, 512), np.float32), mask=True)
    with pytest.raises(errors.ArgTypeError, match="mask"):
        deepseek.rms_norm(rows, np.ones(512, np.float32))
    with pytest.raises(errors.ArgTypeError, match="mask"):
        deepseek.rotate(rows[:, :64], np.ones((3, 32)), np.ones((3, 32)))


@pytest.mark.parametrize("name", ["torch", "jax.numpy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_framework_agrees_with_numpy(name, dtype):
    xp = pytest.importorskip(name)
    arrays = the_layer(np.random.default_rng(2), dtype)
    tables = deepseek.rotary_tables(SMALL, 7)

    def there(x):
        if name != "torch":
            return xp.asarray(x)
        if x.dtype != ml_dtypes.bfloat16:
            return xp.from_numpy(x)
        return xp.from_numpy(x.view(np.int16)).view(xp.bfloat16)

    def wide(x):
        return x.float().numpy() if name == "torch" else np.asarray(x, np.float32)

    def results(arrays, cos, sin):
        w_uk, w_uv = deepseek.split_kv_b_proj(arrays["kv_b"], SMALL)
        rows = deepseek.latent_rows(arrays["kv_a"], arrays["norm"], cos, sin)
        q = deepseek.absorbed_query(arrays["q"], w_uk, cos, sin)
        return rows, q, deepseek.expanded_output(q[..., :512], w_uv)

    expected = results(arrays, *tables)
    found = results({k: there(v) for k, v in arrays.items()}, *map(there, tables))
    step = float(ml_dtypes.finfo(dtype).eps)
    for one, other in zip(expected, found, strict=True):
        assert str(other.dtype).removeprefix("torch.") == np.dtype(dtype).name == one.dtype.name
        size = np.abs(one.astype(np.float32)).max()
        assert np.abs(wide(other) - one.astype(np.float32)).max() <= 4 * max(step, 1e-6) * size


# --- transformers' own modules -----------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("transformers", minversion="5.0")
    torch = importlib.import_module("torch")
    modeling = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    configuration = importlib.import_module(
        "transformers.models.deepseek_v3.configuration_deepseek_v3"
    )
    sizes = {**new_style(SMALL), "num_key_value_heads": 4, "num_hidden_layers": 1}
    config = configuration.DeepseekV3Config(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = modeling.DeepseekV3Attention(config, 0).float().eval()
    return SimpleNamespace(torch=torch, modeling=modeling, config=config, attention=attention)


def test_scale_and_tables_are_those_of_transformers(theirs):
    assert deepseek.softmax_scale(theirs.config) == pytest.approx(theirs.attention.scaling)
    assert theirs.attention.scaling == pytest.approx(0.13523377, abs=1e-7)
    rotary = theirs.modeling.DeepseekV3RotaryEmbedding(theirs.config)
    inverse = rotary.inv_freq.numpy()
    assert deepseek.rotary_frequencies(theirs.config) == pytest.approx(inverse, rel=3e-7)
    positions = theirs.torch.arange(5000)[None]
    expected = rotary(theirs.torch.zeros(1), positions)
    for ours, table in zip(deepseek.rotary_tables(theirs.config, 5000), expected, strict=True):
        assert np.abs(ours - table[0, :, :32].numpy()).max() < 1e-3  # 5000 rad * 2 ** -24


def test_norm_and_rotation_are_those_of_transformers(theirs):
    torch = theirs.torch
    torch.manual_seed(1)
    x = torch.randn(3, 5, 512)
    norm = theirs.attention.kv_a_layernorm
    norm.weight.data.normal_()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = deepseek.rms_norm(x.to(dtype), norm.weight.data.to(dtype), norm.variance_epsilon)
        own = norm.to(dtype)(x.to(dtype))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, own, rtol=torch.finfo(dtype).eps * 4, atol=0)
    norm.float()
    cos, sin = map(torch.from_numpy, deepseek.rotary_tables(theirs.config, 5))
    q, k = torch.randn(2, 3, 1, 5, 64).unbind()
    both = torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    order = [*range(0, 64, 2), *range(1, 64, 2)]  # theirs returns the halves side by side
    for ours, own in zip(
        (deepseek.rotate(q, cos, sin), deepseek.rotate(k, cos, sin)),
        theirs.modeling.apply_rotary_pos_emb_interleave(q, k, *both),
        strict=True,
    ):
        torch.testing.assert_close(ours[..., order], own, rtol=1e-6, atol=1e-6)
    for ours, own in zip(
        (deepseek.rotate(x, cos, sin, interleaved=False) for x in (q, k)),
        theirs.modeling.apply_rotary_pos_emb(q, k, *both),
        strict=True,
    ):
        torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-6)


def test_a_layer_gives_what_the_layer_of_transformers_gives(theirs):
    """The whole path, prefill with a causal mask: kv_a_proj to o_proj through the public call."""
    torch, attention, config = theirs.torch, theirs.attention, theirs.config
    torch.manual_seed(2)
    tokens = 70
    x = torch.randn(1, tokens, config.hidden_size)
    cos, sin = map(torch.from_numpy, deepseek.rotary_tables(config, tokens))
    both = torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = attention(x, both, mask)
        kv_a = attention.kv_a_proj_with_mqa(x)
        rows = deepseek.latent_rows(kv_a, attention.kv_a_layernorm.weight, cos, sin)
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x)))
        w_uk, w_uv = deepseek.split_kv_b_proj(attention.kv_b_proj.weight, config)
        q = deepseek.absorbed_query(q.reshape(1, tokens, -1, 192), w_uk, cos, sin)
        k_cache = torch.zeros(2, 64, 1, 576, dtype=torch.float16)
        k_cache.view(1, 128, 576)[:, :tokens] = rows
        table = torch.arange(2, dtype=torch.int32)[None]
        metadata, _ = get_mla_metadata()
        out, _ = flash_mla_with_kvcache(
            q.half(),
            k_cache,
            table,
            torch.tensor([tokens], dtype=torch.int32),
            512,
            metadata,
            softmax_scale=deepseek.softmax_scale(config),
            causal=True,
        )
        found = attention.o_proj(deepseek.expanded_output(out.float(), w_uv))
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-3, error  # float16 rounds q, the cache and out
