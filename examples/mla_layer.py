"""One attention layer of DeepSeek-V3 in decoding, with the absorbed weights that MLA is about.

    python examples/mla_layer.py

The layer projects each token's hidden state down to one latent vector of 512 columns and one rotary
key of 64, and caches nothing else. Attention is defined on 128 heads with keys and values of their
own, which are linear in the latent vector:

    k_h = [W_uk_h c, k_rope]        v_h = W_uv_h c
    q_h . k_h = (W_uk_h^T q_nope_h) . c + q_rope_h . k_rope

So W_uk is absorbed into the query and W_uv into the output, and the kernel attends to the latent
vectors themselves: 128 query heads over one kv head. This example runs some decoding steps that
way and compares them with the definition, heads unabsorbed, in float64.

Runs with CuPy on a Hopper GPU at full size (the projections need cuBLAS: nvidia-cublas-cu12), else
with NumPy at a smaller one.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from flashmla_cupy import PagedKVCache

BF16 = ml_dtypes.bfloat16
LATENT, ROPE, D_QK = 512, 64, 576  # what the cache holds of a token: [latent, rotary key]


@dataclass(frozen=True)
class Config:
    """Sizes of the layer, and what its softmax needs; the defaults are DeepSeek-V3's."""

    hidden: int = 7168
    heads: int = 128
    q_rank: int = 1536  # the query is projected through a low rank as well
    nope: int = 128  # columns of a head's query and key without a position
    value: int = 128  # columns of a head's value
    yarn_factor: float = 40.0  # rope_scaling of the checkpoint's config.json: "factor"
    yarn_mscale: float = 1.0  # and "mscale_all_dim"

    @property
    def softmax_scale(self) -> float:
        """0.1352 for DeepSeek-V3: 192 ** -0.5, times the square of YaRN's magnitude scale.

        A head has 192 columns before absorption; 576 ** -0.5, the default of the library, is no
        model's. Source: the attention class of DeepSeek-V3's own inference/model.py."""
        mscale = 0.1 * self.yarn_mscale * math.log(self.yarn_factor) + 1
        return (self.nope + ROPE) ** -0.5 * mscale * mscale


class MLALayer:
    """The weights, and one decoding step. Activations are bfloat16, as the model's are."""

    def __init__(self, xp, config: Config, seed: int = 0) -> None:
        c, rng = config, np.random.default_rng(seed)

        def weight(*shape):
            """[..., out, in], scaled so that activations keep their size."""
            w = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
            return xp.asarray(w.astype(BF16).astype(np.float32))

        self.xp, self.config = xp, c
        self.w_dq = weight(c.q_rank, c.hidden)
        self.w_uq = weight(c.heads * (c.nope + ROPE), c.q_rank)
        self.w_dkv = weight(LATENT + ROPE, c.hidden)
        self.w_uk = weight(c.heads, c.nope, LATENT)
        self.w_uv = weight(c.heads, c.value, LATENT)
        self.w_o = weight(c.hidden, c.heads * c.value)

    def latent(self, x, position):
        """What the cache holds of tokens x [..., hidden]: [..., 576]."""
        down = linear(x, self.w_dkv)
        c = rms_norm(self.xp, down[..., :LATENT])
        k_rope = rope(self.xp, down[..., LATENT:], position)
        return self.xp.concatenate([c, k_rope], axis=-1)

    def query(self, x, position):
        """(q_nope [batch, heads, 128], q_rope [batch, heads, 64]) of x [batch, hidden]."""
        c = self.config
        up = linear(rms_norm(self.xp, linear(x, self.w_dq)), self.w_uq)
        q = up.reshape(len(x), c.heads, c.nope + ROPE)
        return q[..., : c.nope], rope(self.xp, q[..., c.nope :], position[:, None])

    def step(self, x, cache: PagedKVCache, seqs):
        """The layer's output [batch, hidden] for the next token x [batch, hidden] of each
        sequence, which is appended to the cache."""
        xp, c = self.xp, self.config
        position = xp.asarray([cache.seqlen(seq) for seq in seqs])
        cache.append_batch(seqs, self.latent(x, position)[:, None])
        q_nope, q_rope = self.query(x, position)
        # Absorb: [batch, heads, 128] x [heads, 128, 512] -> [batch, heads, 512]
        q_latent = per_head(xp, q_nope, self.w_uk.swapaxes(1, 2))
        q = xp.concatenate([q_latent, q_rope], axis=-1)[:, None]  # [batch, 1, heads, 576]
        out, _ = cache.attend(q, seqs, softmax_scale=c.softmax_scale)
        value = per_head(xp, out[:, 0], self.w_uv)  # [batch, heads, 128]
        return linear(value.reshape(len(x), -1), self.w_o)

    def definition(self, x, latents):
        """The same output [hidden] for one sequence, by multi-head attention in float64: keys and
        values of every head from the cached latents [tokens, 576]; x [hidden] is the last token."""
        xp, c = self.xp, self.config
        q_nope, q_rope = self.query(x[None], xp.asarray([len(latents) - 1]))
        q = xp.concatenate([q_nope, q_rope], axis=-1)[0].astype(np.float64)  # [heads, 192]
        latents = latents.astype(np.float64)
        wide = [w.astype(np.float64) for w in (self.w_uk, self.w_uv, self.w_o)]
        w_uk, w_uv, w_o = wide
        heads = []
        for h in range(c.heads):
            key = xp.concatenate([latents[:, :LATENT] @ w_uk[h].T, latents[:, LATENT:]], axis=1)
            value = latents[:, :LATENT] @ w_uv[h].T
            score = key @ q[h] * c.softmax_scale
            weight = xp.exp(score - score.max())
            heads.append(weight / weight.sum() @ value)
        return w_o @ xp.concatenate(heads)


def linear(x, w):
    """x [..., in], w [out, in] -> [..., out], accumulated in float32."""
    return (x.astype(np.float32) @ w.T).astype(BF16)


def per_head(xp, x, w):
    """x [batch, heads, in], w [heads, out, in] -> [batch, heads, out]."""
    y = xp.matmul(x.astype(np.float32).swapaxes(0, 1), w.swapaxes(1, 2))
    return y.swapaxes(0, 1).astype(BF16)


def rms_norm(xp, x):
    wide = x.astype(np.float32)
    return (wide / xp.sqrt((wide * wide).mean(axis=-1, keepdims=True) + 1e-6)).astype(BF16)


def rope(xp, x, position, base: float = 10000.0):
    """Rotates the pairs (x[2i], x[2i + 1]) by position * base ** (-2i / 64)."""
    angle = position[..., None] * xp.asarray(base ** (-np.arange(0, ROPE, 2) / ROPE))
    cos, sin = xp.cos(angle).astype(np.float32), xp.sin(angle).astype(np.float32)
    even, odd = x[..., 0::2].astype(np.float32), x[..., 1::2].astype(np.float32)
    turned = xp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(BF16)


def main() -> int:
    cache = PagedKVCache(num_pages=4096)  # picks the device: a Hopper GPU if there is one
    on_gpu = cache.device != "cpu"
    if on_gpu:
        import cupy as xp

        config, batch, longest, steps = Config(), 32, 4096, 4
    else:
        xp = np
        config, batch, longest, steps = Config(hidden=512, heads=16, q_rank=128), 3, 150, 2
        print("No Hopper GPU found: computing with NumPy, a smaller layer.")
    layer = MLALayer(xp, config)

    # Prompts: their latents are all that attention will ever need of them.
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, longest, batch, endpoint=True)
    seqs = []
    for n in lengths:
        x = xp.asarray(rng.standard_normal((n, config.hidden), np.float32).astype(BF16))
        seqs.append(cache.add(layer.latent(x, xp.arange(n))))

    # Decode: each step's output is the next step's token, as a residual stream would carry it.
    x = xp.asarray(rng.standard_normal((batch, config.hidden), np.float32).astype(BF16))
    worst = 0.0
    for _ in range(steps):
        y = layer.step(x, cache, seqs)
        for i in {int(lengths.argmin()), int(lengths.argmax())}:
            expected = layer.definition(x[i], latents_of(cache, seqs[i]))
            error = xp.linalg.norm(y[i].astype(np.float64) - expected)
            worst = max(worst, float(error / xp.linalg.norm(expected)))
        x = (x.astype(np.float32) + y.astype(np.float32)).astype(BF16)

    print(f"layer     {config}")
    print(f"cache     {cache}")
    print(f"absorbed against multi-head formula: relative error {worst:.1e}", end=" ")
    print("(bfloat16 rounds by 2.0e-03 on its own)")
    compare(config, int(lengths.max()))
    ok = worst < 2e-2
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


def latents_of(cache: PagedKVCache, seq):
    """The cached rows [tokens, 576] of a sequence."""
    table, lengths = cache.tables([seq])
    return cache.storage[table[0]].reshape(-1, D_QK)[: int(lengths[0])]


def compare(c: Config, tokens: int) -> None:
    """What the two forms of the same attention cost, for one query token and each cached one."""
    head = c.nope + ROPE + c.value  # columns of a head's key and value
    forms = {
        "MHA, K and V cached": (2 * c.heads * head, 2 * c.heads * head),
        "MLA, K and V remade": (2 * D_QK, 2 * c.heads * (head + LATENT * (c.nope + c.value))),
        "MLA, absorbed": (2 * D_QK, 2 * c.heads * (D_QK + LATENT)),
    }
    print(f"{'a token of the cache':24}{'bytes':>10}{'FLOPs':>14}{'FLOPs/byte':>12}")
    for name, (size, flops) in forms.items():
        print(f"{name:24}{size:10,}{flops:14,}{flops / size:12.0f}")
    mha, _, mla = (size for size, _ in forms.values())
    print(f"A cache of {tokens:,} tokens takes {mla * tokens / 2**20:.1f} MiB a layer,", end=" ")
    print(f"not {mha * tokens / 2**20:.1f} MiB: {mha / mla:.0f} times less.")


if __name__ == "__main__":
    sys.exit(main())
