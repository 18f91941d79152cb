"""One attention layer of DeepSeek-V3 in decoding, with the absorbed weights that MLA is about.

    python examples/mla_layer.py

The layer projects each token's hidden state down to one latent vector of 512 columns and one rotary
key of 64, and caches nothing else. Attention is defined on 128 heads with keys and values of their
own, which are linear in the latent vector:

    k_h = [W_uk_h c, k_rope]        v_h = W_uv_h c
    q_h . k_h = (W_uk_h^T q_nope_h) . c + q_rope_h . k_rope

So W_uk is absorbed into the query and W_uv into the output, and the kernel attends to the latent
vectors themselves: 128 query heads over one kv head. flashmla_cupy.deepseek has these steps as
functions. This example runs some decoding steps that way, with the softmax scale and the rotary
frequencies of V3's configuration and random weights, and compares them with the definition, heads
unabsorbed, in float64.

Runs with CuPy on a Hopper GPU at full size (the projections need cuBLAS: nvidia-cublas-cu12), else
with NumPy at a smaller one.
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np

from flashmla_cupy import PagedKVCache, deepseek

BF16 = ml_dtypes.bfloat16
LATENT, ROPE, D_QK = 512, 64, 576  # what the cache holds of a token: [latent, rotary key]

# What the layer needs of DeepSeek-V3's config.json.
V3 = {
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,  # the query is projected through a low rank as well
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": 128,  # columns of a head's query and key without a position
    "qk_rope_head_dim": ROPE,
    "v_head_dim": 128,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


class MLALayer:
    """The weights, and one decoding step. Activations are bfloat16, as the model's are."""

    def __init__(self, xp, config: dict, max_tokens: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def weight(*shape):
            """[..., out, in], scaled so that activations keep their size."""
            w = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
            return xp.asarray(w.astype(BF16).astype(np.float32))

        self.xp, self.scale = xp, deepseek.softmax_scale(config)
        hidden, q_rank = config["hidden_size"], config["q_lora_rank"]
        self.heads = heads = config["num_attention_heads"]
        self.nope, self.value = config["qk_nope_head_dim"], config["v_head_dim"]
        self.q_a = weight(q_rank, hidden)
        self.q_b = weight(heads * (self.nope + ROPE), q_rank)
        self.kv_a = weight(LATENT + ROPE, hidden)
        kv_b = weight(heads * (self.nope + self.value), LATENT)
        self.w_uk, self.w_uv = deepseek.split_kv_b_proj(kv_b, config)
        self.o = weight(hidden, heads * self.value)
        self.q_norm = xp.ones(q_rank, BF16)
        self.kv_norm = xp.ones(LATENT, BF16)
        self.cos, self.sin = map(xp.asarray, deepseek.rotary_tables(config, max_tokens))

    def latent(self, x, position):
        """What the cache holds of tokens x [..., hidden]: [..., 576]."""
        kv = linear(x, self.kv_a)
        return deepseek.latent_rows(kv, self.kv_norm, self.cos[position], self.sin[position])

    def query(self, x):
        """Queries of x [batch, hidden] by heads: [batch, heads, 128 + 64], not yet rotated."""
        low = deepseek.rms_norm(linear(x, self.q_a), self.q_norm)
        return linear(low, self.q_b).reshape(len(x), self.heads, self.nope + ROPE)

    def step(self, x, cache: PagedKVCache, seqs):
        """The layer's output [batch, hidden] for the next token x [batch, hidden] of each
        sequence, which is appended to the cache."""
        position = self.xp.asarray([cache.seqlen(seq) for seq in seqs])
        cache.append_batch(seqs, self.latent(x, position)[:, None])
        cos, sin = self.cos[position], self.sin[position]
        q = deepseek.absorbed_query(self.query(x), self.w_uk, cos, sin)  # [batch, heads, 576]
        out, _ = cache.attend(q[:, None], seqs, softmax_scale=self.scale)
        return linear(deepseek.expanded_output(out[:, 0], self.w_uv), self.o)

    def definition(self, x, latents):
        """The same output [hidden] for one sequence, by multi-head attention in float64: keys and
        values of every head from the cached latents [tokens, 576]; x [hidden] is the last token."""
        xp, position = self.xp, len(latents) - 1
        q = self.query(x[None])[0]  # [heads, 192]
        q_rope = deepseek.rotate(q[:, self.nope :], self.cos[position], self.sin[position])
        q = xp.concatenate([q[:, : self.nope], q_rope], axis=-1).astype(np.float64)
        latents = latents.astype(np.float64)
        w_uk, w_uv, o = (w.astype(np.float64) for w in (self.w_uk, self.w_uv, self.o))
        heads = []
        for h in range(self.heads):
            key = xp.concatenate([latents[:, :LATENT] @ w_uk[h].T, latents[:, LATENT:]], axis=1)
            value = latents[:, :LATENT] @ w_uv[h].T
            score = key @ q[h] * self.scale
            weight = xp.exp(score - score.max())
            heads.append(weight / weight.sum() @ value)
        return o @ xp.concatenate(heads)


def linear(x, w):
    """x [..., in], w [out, in] -> [..., out], accumulated in float32."""
    return (x.astype(np.float32) @ w.T).astype(BF16)


def main() -> int:
    cache = PagedKVCache(num_pages=4096)  # picks the device: a Hopper GPU if there is one
    on_gpu = cache.device != "cpu"
    if on_gpu:
        import cupy as xp

        config, batch, longest, steps = V3, 32, 4096, 4
    else:
        xp = np
        config = {**V3, "hidden_size": 512, "num_attention_heads": 16, "q_lora_rank": 128}
        batch, longest, steps = 3, 150, 2
        print("No Hopper GPU found: computing with NumPy, a smaller layer.")
    layer = MLALayer(xp, config, longest + steps)

    # Prompts: their latents are all that attention will ever need of them.
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, longest, batch, endpoint=True)
    seqs = []
    for n in lengths:
        x = xp.asarray(rng.standard_normal((n, config["hidden_size"]), np.float32).astype(BF16))
        seqs.append(cache.add(layer.latent(x, xp.arange(n))))

    # Decode: each step's output is the next step's token, as a residual stream would carry it.
    x = xp.asarray(rng.standard_normal((batch, config["hidden_size"]), np.float32).astype(BF16))
    worst = 0.0
    for _ in range(steps):
        y = layer.step(x, cache, seqs)
        for i in {int(lengths.argmin()), int(lengths.argmax())}:
            expected = layer.definition(x[i], latents_of(cache, seqs[i]))
            error = xp.linalg.norm(y[i].astype(np.float64) - expected)
            worst = max(worst, float(error / xp.linalg.norm(expected)))
        x = (x.astype(np.float32) + y.astype(np.float32)).astype(BF16)

    heads, hidden = layer.heads, config["hidden_size"]
    print(f"layer     {heads} heads, {hidden} hidden columns, softmax_scale {layer.scale:.4f}")
    print(f"cache     {cache}")
    print(f"absorbed against multi-head formula: relative error {worst:.1e}", end=" ")
    print("(bfloat16 rounds by 2.0e-03 on its own)")
    compare(layer, int(lengths.max()))
    ok = worst < 2e-2
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


def latents_of(cache: PagedKVCache, seq):
    """The cached rows [tokens, 576] of a sequence."""
    table, lengths = cache.tables([seq])
    return cache.storage[table[0]].reshape(-1, D_QK)[: int(lengths[0])]


def compare(layer: MLALayer, tokens: int) -> None:
    """What the two forms of the same attention cost, for one query token and each cached one."""
    heads, nope, value = layer.heads, layer.nope, layer.value
    head = nope + ROPE + value  # columns of a head's key and value
    forms = {
        "MHA, K and V cached": (2 * heads * head, 2 * heads * head),
        "MLA, K and V remade": (2 * D_QK, 2 * heads * (head + LATENT * (nope + value))),
        "MLA, absorbed": (2 * D_QK, 2 * heads * (D_QK + LATENT)),
    }
    print(f"{'a token of the cache':24}{'bytes':>10}{'FLOPs':>14}{'FLOPs/byte':>12}")
    for name, (size, flops) in forms.items():
        print(f"{name:24}{size:10,}{flops:14,}{flops / size:12.0f}")
    mha, _, mla = (size for size, _ in forms.values())
    print(f"A cache of {tokens:,} tokens takes {mla * tokens / 2**20:.1f} MiB a layer,", end=" ")
    print(f"not {mha * tokens / 2**20:.1f} MiB: {mha / mla:.0f} times less.")


if __name__ == "__main__":
    sys.exit(main())
