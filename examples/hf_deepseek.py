"""transformers' own DeepSeek-V3 model, decoding through this library.

    pip install transformers torch
    python examples/hf_deepseek.py

The model has random weights, few layers and V3's attention: queries of 128 + 64 columns, latent
rows of 512 + 64, YaRN's scale. Its attention layers are replaced by one of thirty lines, which
takes the checkpoint's weights as they are, keeps latent rows in a PagedKVCache and attends to
those. Prompts are prefilled in the same way, one step of all their tokens. Everything else is
transformers' code.

1. With dense feed-forward layers, in float16: the greedy tokens of several prompts at once, beside
   those of the untouched model.
2. With experts: how far the logits are from those of the same model in float32, beside the
   untouched model's own distance. (Tokens would not do: a rounding can send a token to another
   expert.)

Runs on a Hopper GPU if there is one, else on the CPU with a smaller model.
"""

from __future__ import annotations

import copy
import sys

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from flashmla_cupy import PagedKVCache, deepseek


class CachedAttention(torch.nn.Module):
    """DeepseekV3Attention with its weights absorbed and its keys in a PagedKVCache."""

    def __init__(self, attention, session):
        super().__init__()
        self.of, self.session = attention, session
        weight = attention.kv_b_proj.weight
        self.w_uk, self.w_uv = deepseek.split_kv_b_proj(weight, attention.config)

    def forward(self, hidden_states, **_):
        of, layer = self.of, self.of.layer_idx
        cos, sin = self.session.angles  # [batch, tokens, 32], at the tokens' positions
        rows = deepseek.latent_rows(
            of.kv_a_proj_with_mqa(hidden_states), of.kv_a_layernorm.weight, cos, sin
        )
        q = of.q_b_proj(of.q_a_layernorm(of.q_a_proj(hidden_states)))
        q = q.unflatten(-1, (-1, of.qk_head_dim))  # [batch, tokens, heads, 192]
        step = self.session.step
        step.write(rows, layer=layer)
        out, _ = step.attend(
            deepseek.absorbed_query(q, self.w_uk, cos, sin),
            layer=layer,
            softmax_scale=self.session.softmax_scale,
        )
        return of.o_proj(deepseek.expanded_output(out, self.w_uv)), None


class Session:
    """A model whose attention is CachedAttention, with the sequences that it has read."""

    def __init__(self, model, tokens):
        config, weight = model.config, model.lm_head.weight
        self.model = copy.deepcopy(model)
        self.cache = PagedKVCache(
            num_pages=tokens // 64 + 8,
            num_layers=config.num_hidden_layers,
            dtype=weight.dtype,
            device=weight.device,
            framework="torch",
        )
        self.softmax_scale = deepseek.softmax_scale(config)
        tables = deepseek.rotary_tables(config, tokens)
        self.tables = [torch.from_numpy(table).to(weight.device) for table in tables]
        for layer in self.model.model.layers:
            layer.self_attn = CachedAttention(layer.self_attn, self)

    def read(self, seqs, input_ids):
        """The logits [batch, tokens, vocabulary] of the next tokens [batch, tokens] of sequences,
        which are kept."""
        tokens = input_ids.shape[1]
        begin = torch.tensor([self.cache.seqlen(seq) for seq in seqs], device=input_ids.device)
        positions = begin[:, None] + torch.arange(tokens, device=input_ids.device)
        self.angles = [table[positions] for table in self.tables]
        with self.cache.reserve(seqs, tokens) as self.step:
            logits = self.model(input_ids, position_ids=positions, use_cache=False).logits
            self.step.commit()
        return logits


def greedy_cached(model, prompts, steps):
    """[prompts, steps] tokens: each prompt in a prefill of its own, then all of them together."""
    session = Session(model, sum(map(len, prompts)) + len(prompts) * (steps + 64))
    seqs = [session.cache.add() for _ in prompts]
    last = [session.read([seq], ids[None])[0, -1] for seq, ids in zip(seqs, prompts, strict=True)]
    tokens = [torch.stack(last).argmax(-1)]
    while len(tokens) < steps:
        tokens.append(session.read(seqs, tokens[-1][:, None])[:, -1].argmax(-1))
    session.cache.check()
    return torch.stack(tokens, dim=1)


def greedy_untouched(model, prompts, steps):
    """The same by the model as it is, one prompt at a time."""
    found = []
    for ids in prompts:
        result = model(ids[None], use_cache=True)
        tokens = [result.logits[:, -1].argmax(-1)]
        while len(tokens) < steps:
            # transformers has called its cache `cache` since 5.20, before it past_key_values.
            name = "cache" if hasattr(result, "cache") else "past_key_values"
            result = model(tokens[-1][None], use_cache=True, **{name: getattr(result, name)})
            tokens.append(result.logits[:, -1].argmax(-1))
        found.append(torch.cat(tokens))
    return torch.stack(found)


def random_model(device, layers, heads, experts, seed=0):
    """V3's attention on a small model; in float32."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1 if experts else layers,
        max_position_embeddings=163840,
        initializer_range=0.05,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        },
    )
    return DeepseekV3ForCausalLM(config).eval().to(device)


def in_float16(model):
    """A copy, but for the routers of experts, which checkpoints keep in float32."""
    half = copy.deepcopy(model).half()
    for new, old in zip(half.modules(), model.modules(), strict=True):
        if type(old).__name__ == "DeepseekV3TopkRouter":
            new.float().load_state_dict(old.state_dict())
    return half


def main() -> int:
    on_gpu = PagedKVCache(1).device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    layers, heads, length, steps = (4, 16, 300, 48) if on_gpu else (2, 4, 40, 6)
    if not on_gpu:
        print("No Hopper GPU found: computing on the CPU, a smaller model.")
    torch.set_grad_enabled(False)

    model = random_model(device, layers, heads, experts=False)
    half = in_float16(model)
    prompts = [torch.randint(2000, (length - 7 * i,), device=device) for i in range(3)]
    ours, theirs = greedy_cached(half, prompts, steps), greedy_untouched(half, prompts, steps)
    equal = int((ours == theirs).sum())
    print(
        f"softmax scale {deepseek.softmax_scale(model.config):.4f}, {layers} layers, {heads} heads"
    )
    print(f"dense layers, float16: {equal} of {ours.numel()} greedy tokens equal the model's own")

    model = random_model(device, layers, heads, experts=True)
    half = in_float16(model)
    session, error, own = Session(half, 4 * length), 0.0, 0.0
    for ids in prompts:
        exact = model(ids[None]).logits
        found = session.read([session.cache.add()], ids[None])
        error = max(error, (found.float() - exact).abs().max().item())
        own = max(own, (half(ids[None]).logits.float() - exact).abs().max().item())
    print(f"experts: largest error of a logit {error:.4f}, of the untouched model {own:.4f}")

    ok = equal == ours.numel() and error <= 1.1 * own
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
