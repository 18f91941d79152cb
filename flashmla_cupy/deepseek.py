"""What a DeepSeek checkpoint needs around the attention call: its scale, rotary embedding, weights.

A layer of DeepSeek-V2, V3 or R1 projects a hidden state x down to one latent vector c and one
rotary key, and its keys and values of every head h are linear in c (DeepSeek-V2, arXiv:2405.04434,
section 2.1):

    [c, k_rope] = kv_a_proj_with_mqa x;  c = kv_a_layernorm(c);  k_rope = rotate(k_rope)
    [k_h, v_h]  = kv_b_proj_h c                              k_h = W_uk_h c,  v_h = W_uv_h c
    score       = scale (q_nope_h . k_h + q_rope_h . k_rope)
                = scale ((W_uk_h^T q_nope_h) . c + q_rope_h . k_rope)
    value       = sum_j p_j v_hj = W_uv_h sum_j p_j c_j

So the cache holds rows [c, k_rope], and with W_uk absorbed into the query and W_uv applied to the
output, flash_mla_with_kvcache() attends to those rows alone:

    w_uk, w_uv = split_kv_b_proj(kv_b_proj.weight, config)            once, when loading
    cos, sin = rotary_tables(config, max_tokens)                      once; float32 [max_tokens, 32]
    rows = latent_rows(kv_a, kv_a_layernorm.weight, cos[pos], sin[pos])         append to the cache
    q = absorbed_query(q_b, w_uk, cos[pos], sin[pos])                           [batch, s_q, h, 576]
    out, lse = flash_mla_with_kvcache(q, ..., softmax_scale=softmax_scale(config), causal=True)
    y = o_proj(expanded_output(out, w_uv))

Every function is pure, takes arrays of NumPy, CuPy, PyTorch or JAX and returns what it was given.
`config` is a checkpoint's config.json as a dict, or an object with the same field names, such as
the configuration of transformers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .calls.scalars import integer
from .checkpoint_arrays import check_angles, check_eps, last_axis, namespace
from .checkpoint_config import factor_of, field, mscale_of, rope, rope_type
from .errors import OptionError, ShapeError
from .sizes import HEAD_DIM_V
from .values import written

__all__ = [
    "absorbed_query",
    "expanded_output",
    "latent_rows",
    "rms_norm",
    "rotary_frequencies",
    "rotary_tables",
    "rotate",
    "softmax_scale",
    "split_kv_b_proj",
]

Float32 = npt.NDArray[np.float32]

# --- what follows from the configuration -------------------------------------------------------


def softmax_scale(config: Any) -> float:
    """The factor of the scores: 0.1352 for DeepSeek-V3 and R1, 0.1147 for DeepSeek-V2.

    (qk_nope_head_dim + qk_rope_head_dim) ** -0.5; with YaRN and an mscale_all_dim m, times
    (0.1 m ln(factor) + 1) ** 2 (`softmax_scale` in DeepSeek-V3's inference/model.py; YaRN,
    arXiv:2309.00071, equation 22). It is not the default of flash_mla_with_kvcache(), 576 ** -0.5:
    the latent form has longer rows, but the same scores. Raises OptionError for a missing field.
    """
    name = "softmax_scale"
    width = field(config, "qk_nope_head_dim", name) + field(config, "qk_rope_head_dim", name)
    scaling = rope(config)
    mscale = 1.0
    if rope_type(scaling) == "yarn" and scaling.get("mscale_all_dim"):
        mscale = mscale_of(factor_of(config, scaling), scaling["mscale_all_dim"])
    return float(width**-0.5 * mscale**2)


def rotary_frequencies(config: Any) -> Float32:
    """Radians a token of each of the qk_rope_head_dim / 2 pairs, float32 [32].

    rope_theta ** (-2 i / qk_rope_head_dim); with YaRN, the pairs that turn fewer than beta_slow
    times in original_max_position_embeddings tokens are slowed by `factor`, those that turn more
    than beta_fast times are not, and between the two it is a linear blend (`precompute_freqs_cis`
    in DeepSeek-V3's inference/model.py; arXiv:2309.00071, section 3.2). Raises OptionError for a
    missing field or another kind of scaling.
    """
    name = "rotary_frequencies"
    width = field(config, "qk_rope_head_dim", name)
    scaling = rope(config)
    theta = scaling.get("rope_theta") or field(config, "rope_theta", name)
    pair = np.arange(width // 2)
    frequency = np.power(float(theta), -2 * pair / width)
    kind = rope_type(scaling)
    if kind == "default":
        return np.asarray(frequency, np.float32)
    if kind != "yarn":
        remedy = "Compute the tables of cosines and sines yourself; rotate() takes any."
        raise OptionError("config", "a rope type of default or yarn", repr(kind), remedy, name)
    tokens = field(scaling, "original_max_position_embeddings", name)

    def pair_that_turns(times: float) -> float:
        pairs = width / 2 / math.log(theta)
        return float(pairs * math.log(tokens / (times * 2 * math.pi)))

    low = max(0, math.floor(pair_that_turns(scaling.get("beta_fast") or 32)))
    high = min(width - 1, math.ceil(pair_that_turns(scaling.get("beta_slow") or 1)))
    slowed = np.clip((pair - low) / max(high - low, 0.001), 0, 1)
    blend = frequency / factor_of(config, scaling) * slowed + frequency * (1 - slowed)
    return np.asarray(blend, np.float32)


def rotary_tables(config: Any, num_positions: int) -> tuple[Float32, Float32]:
    """(cos, sin) of the rotary angles of positions 0 .. num_positions - 1, float32 [n, 32], NumPy.

    The angle is the float32 product of a position and its frequency, as the checkpoints were
    trained. With YaRN both are scaled by mscale(mscale) / mscale(mscale_all_dim), which is 1 for
    V2, V3 and R1 (`DeepseekV3YarnRotaryEmbedding` in the checkpoints' modeling_deepseek.py).
    """
    integer("num_positions", num_positions, "rotary_tables")
    angle = np.multiply.outer(
        np.arange(num_positions, dtype=np.float32), rotary_frequencies(config)
    )
    scaling, scale = rope(config), 1.0
    if rope_type(scaling) == "yarn":
        factor = factor_of(config, scaling)
        if scaling.get("attention_factor") is not None:
            scale = float(scaling["attention_factor"])
        elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
            scale = mscale_of(factor, scaling["mscale"]) / mscale_of(
                factor, scaling["mscale_all_dim"]
            )
        else:
            scale = mscale_of(factor, 1.0)
    wide = angle.astype(np.float64)
    return (np.cos(wide) * scale).astype(np.float32), (np.sin(wide) * scale).astype(np.float32)


# --- what is done to activations and weights ---------------------------------------------------


def rotate(x: Any, cos: Any, sin: Any, *, interleaved: bool = True) -> Any:
    """The rotary embedding of x [..., 64]: each pair (a, b) becomes (a cos - b sin, a sin + b cos).

    cos and sin are float32 [..., 32] at the positions of the rows of x, an axis of 1 where they are
    the same for all. A pair is columns
    (2i, 2i + 1) if `interleaved`, the order of DeepSeek's checkpoints (`apply_rotary_emb` in
    inference/model.py), else (i, i + 32). The result keeps the order of x; transformers' own
    interleaved form returns the halves side by side instead, which no score can tell as long as
    queries and keys agree. Computed in float32, each product and sum rounded, then rounded to x's
    dtype.
    """
    xp = namespace(x, "rotate", "x")
    half = x.shape[-1] // 2 if x.ndim else 0
    if not x.ndim or x.shape[-1] % 2:
        expected, remedy = "a last axis of pairs", "Pass the rotary columns alone."
        raise ShapeError("x", expected, f"{tuple(x.shape)}", remedy, "rotate")
    check_angles(cos, sin, half, x.shape[:-1], "rotate")
    if interleaved is not True and interleaved is not False:
        remedy = "DeepSeek's checkpoints are interleaved."
        raise OptionError("interleaved", "True or False", written(interleaved), remedy, "rotate")
    wide = _cast(xp, x, "float32")
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
    else:
        a, b = wide[..., :half], wide[..., half:]
    first, second = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        turned = xp.stack([first, second], axis=-1)
    else:
        turned = xp.concatenate([first, second], axis=-1)
    return _cast(xp, turned.reshape(x.shape), x.dtype)


def rms_norm(x: Any, weight: Any, eps: float = 1e-6) -> Any:
    """x [..., n] / sqrt(mean(x^2) + eps), in float32, rounded to x's dtype; times weight [n].

    `DeepseekV3RMSNorm` of transformers; eps is rms_norm_eps of the configuration for the norms of
    hidden states, and 1e-6 for kv_a_layernorm and q_a_layernorm, whatever it says."""
    xp = namespace(x, "rms_norm", "x")
    columns = last_axis(weight, "weight", 1, "rms_norm")
    if x.shape[-1:] != (columns,):
        expected = f"[{x.shape[-1] if x.ndim else 1}], a factor for each column of x"
        remedy = "Pass the weight of the norm of x."
        raise ShapeError("weight", expected, f"{tuple(weight.shape)}", remedy, "rms_norm")
    check_eps(eps, "rms_norm")
    wide = _cast(xp, x, "float32")
    scale = 1 / xp.sqrt((wide * wide).mean(axis=-1, keepdims=True) + eps)
    return weight * _cast(xp, wide * scale, x.dtype)


def latent_rows(
    kv_a: Any,
    norm_weight: Any,
    cos: Any,
    sin: Any,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
) -> Any:
    """The rows that the cache holds, [..., 576]: kv_a_proj_with_mqa's output, normed and rotated.

    kv_a [..., 512 + 64], norm_weight [512] is kv_a_layernorm.weight, cos and sin float32 [..., 32]
    at the tokens' positions; eps is that of rms_norm(), interleaved of rotate(). Queries need the
    same `interleaved`."""
    xp = namespace(kv_a, "latent_rows", "kv_a")
    rank = last_axis(norm_weight, "norm_weight", 1, "latent_rows")
    check_angles(cos, sin, None, kv_a.shape[:-1], "latent_rows")
    check_eps(eps, "latent_rows")
    rotary, columns = 2 * cos.shape[-1], kv_a.shape[-1] if kv_a.ndim else 0
    if columns - rotary != rank == HEAD_DIM_V or not columns > rotary:
        raise ShapeError(
            "kv_a",
            f"a last axis of {rank} latent and {rotary} rotary columns",
            f"{tuple(kv_a.shape)}",
            "Pass the output of kv_a_proj_with_mqa as it is.",
            "latent_rows",
        )
    if columns - rotary != rank:
        expected = f"[{columns - rotary}], a factor for each latent column of kv_a"
        remedy = "Pass kv_a_layernorm.weight."
        raise ShapeError("norm_weight", expected, f"({rank},)", remedy, "latent_rows")
    c = rms_norm(kv_a[..., :rank], norm_weight, eps)
    k_rope = rotate(kv_a[..., rank:], cos, sin, interleaved=interleaved)
    return xp.concatenate([c, k_rope], axis=-1)


def split_kv_b_proj(weight: Any, config: Any) -> tuple[Any, Any]:
    """(w_uk [heads, qk_nope_head_dim, 512], w_uv [heads, v_head_dim, 512]): views of the weight
    [heads * (qk_nope_head_dim + v_head_dim), 512] of kv_b_proj, a head's keys before its values
    (`wkv_b` in DeepSeek-V3's inference/model.py). Dequantise FP8 weights first."""
    name = "split_kv_b_proj"
    nope, value = field(config, "qk_nope_head_dim", name), field(config, "v_head_dim", name)
    heads, rank = field(config, "num_attention_heads", name), field(config, "kv_lora_rank", name)
    rows = tuple(weight.shape) if namespace(weight, name, "weight") else ()
    if len(rows) != 2 or rows[1] != rank or rows[0] % (nope + value):
        expected = f"[{heads} * ({nope} + {value}), {rank}], or some of its heads"
        remedy = "Pass kv_b_proj.weight as the checkpoint holds it."
        raise ShapeError("weight", expected, f"{rows}", remedy, name)
    by_head = weight.reshape(-1, nope + value, rank)
    return by_head[:, :nope], by_head[:, nope:]


def absorbed_query(q: Any, w_uk: Any, cos: Any, sin: Any, *, interleaved: bool = True) -> Any:
    """The queries of the latent form, [..., heads, 576].

    q [..., heads, qk_nope_head_dim + 64] is q_proj's or q_b_proj's output by heads, w_uk from
    split_kv_b_proj(), cos and sin float32 [..., 32] at the tokens' positions: [W_uk^T q_nope,
    rotate(q_rope)]. `interleaved` is that of rotate(), the same as for the rows of the cache."""
    xp = namespace(q, "absorbed_query", "q")
    last_axis(w_uk, "w_uk", 3, "absorbed_query")
    check_angles(cos, sin, None, q.shape[:-2], "absorbed_query")
    nope = w_uk.shape[1]
    if tuple(q.shape[-2:]) != (w_uk.shape[0], nope + 2 * cos.shape[-1]):
        raise ShapeError(
            "q",
            f"[..., {w_uk.shape[0]} heads, {nope} + {2 * cos.shape[-1]} columns]",
            f"{tuple(q.shape)}",
            "Reshape it to [..., heads, qk_nope_head_dim + qk_rope_head_dim].",
            "absorbed_query",
        )
    latent = _per_head(xp, q[..., :nope], w_uk)
    turned = rotate(q[..., nope:], cos[..., None, :], sin[..., None, :], interleaved=interleaved)
    return xp.concatenate([latent, turned], axis=-1)


def expanded_output(out: Any, w_uv: Any) -> Any:
    """What o_proj takes, [..., heads * v_head_dim], of attention's out [..., heads, 512]: W_uv out,
    head by head."""
    xp = namespace(out, "expanded_output", "out")
    rank = last_axis(w_uv, "w_uv", 3, "expanded_output")
    if tuple(out.shape[-2:]) != (w_uv.shape[0], rank):
        expected = f"[..., {w_uv.shape[0]} heads, {rank}]"
        remedy = "Pass out as the attention call returns it."
        raise ShapeError("out", expected, f"{tuple(out.shape)}", remedy, "expanded_output")
    value = _per_head(xp, out, w_uv.swapaxes(1, 2))
    return value.reshape(*out.shape[:-2], w_uv.shape[0] * w_uv.shape[1])


# --- inside ------------------------------------------------------------------------------------


def _per_head(xp: Any, x: Any, w: Any) -> Any:
    """x [..., heads, a], w [heads, a, b] -> [..., heads, b] of x's dtype, added up in float32."""
    if xp.__name__ == "torch":
        return xp.einsum("...ha,hab->...hb", x, w)
    flat = _cast(xp, x, "float32").reshape(-1, *x.shape[-2:]).swapaxes(0, 1)  # [heads, n, a]
    y = xp.matmul(flat, _cast(xp, w, "float32")).swapaxes(0, 1)
    return _cast(xp, y.reshape(*x.shape[:-1], w.shape[2]), x.dtype)


def _cast(xp: Any, x: Any, dtype: Any) -> Any:
    if xp.__name__ == "torch":
        return x.to(getattr(xp, dtype) if isinstance(dtype, str) else dtype)
    return x.astype(dtype)
