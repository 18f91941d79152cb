"""transformers' own DeepSeek-V3 model, decoding through this library.

    pip install transformers torch
    python examples/hf_deepseek.py

The model has random weights, few layers and V3's attention: queries of 128 + 64 columns, latent
rows of 512 + 64, YaRN's scale. Its attention layers are replaced by one of thirty lines, which
takes the checkpoint's weights as they are, keeps latent rows in a PagedKVCache and attends to
those. Prompts are prefilled in the same way, one step of all their tokens. Everything else is
transformers' code.

1. With dense feed-forward layers, in float16: the greedy tokens of several prompts at once, beside
   those of the untouched model. Its head is fitted so that it continues each prompt with a given
   text: a trained model is sure of most tokens, while one of random weights has near ties in every
   sentence, which any rounding decides.
2. How far the logits of those steps are from those of the same model in float32, beside the
   untouched model's own distance.
3. The same with experts, in a prefill. All three models take the experts that the float32 one
   chooses: one rounding can send a token to another expert, and then its logits say nothing of
   attention. How many tokens would have gone elsewhere is printed.

Runs on a Hopper GPU if there is one, else on the CPU with a smaller model. The exit status is 1 if
the results differ by more than they may, 2 if a package is missing.
"""

from __future__ import annotations

import copy
import sys

from flashmla_cupy import PagedKVCache, deepseek

try:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
except ImportError as missing:
    needs = "The example needs PyTorch and transformers 5.0 or newer"
    words = f"{needs} ({missing}): pip install torch 'transformers>=5.0'."
    print("hf_deepseek.py: error:", *words.split(), file=sys.stderr)
    sys.exit(2)


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
    """The logits [prompts, steps, vocabulary] of greedy decoding: each prompt in a prefill of its
    own, then all of them together."""
    session = Session(model, sum(map(len, prompts)) + len(prompts) * (steps + 64))
    seqs = [session.cache.add() for _ in prompts]
    last = [session.read([seq], ids[None])[0, -1] for seq, ids in zip(seqs, prompts, strict=True)]
    logits = [torch.stack(last)]
    while len(logits) < steps:
        logits.append(session.read(seqs, logits[-1].argmax(-1)[:, None])[:, -1])
    session.cache.check()
    return torch.stack(logits, dim=1)


def greedy_untouched(model, prompts, steps):
    """The same by the model as it is, one prompt at a time."""
    found = []
    for ids in prompts:
        result = model(ids[None], use_cache=True)
        logits = [result.logits[0, -1]]
        while len(logits) < steps:
            # transformers has called its cache `cache` since 5.20, before it past_key_values.
            name = "cache" if hasattr(result, "cache") else "past_key_values"
            token = logits[-1].argmax(-1)[None, None]
            result = model(token, use_cache=True, **{name: getattr(result, name)})
            logits.append(result.logits[0, -1])
        found.append(torch.stack(logits))
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


def states_before(model, prompts, texts):
    """What the head makes the logits of the texts' tokens of: [prompts, steps, hidden_size]."""
    found = []
    for ids, text in zip(prompts, texts, strict=True):
        states = model.model(torch.cat([ids, text])[None]).last_hidden_state
        found.append(states[0, len(ids) - 1 : -1])
    return torch.stack(found)


def teach(model, prompts, texts):
    """Changes the head as little as possible for the logits of the texts' tokens to grow by 20."""
    states = states_before(model, prompts, texts).flatten(0, 1)
    wanted = 20.0 * torch.nn.functional.one_hot(texts.flatten(), model.config.vocab_size)
    change = states.T @ torch.linalg.solve(states @ states.T, wanted)
    model.lm_head.weight += change.T


def route_alike(exact, model):
    """Sends every token of `model` to the experts, and with the weights, that `exact` chose for it
    in the call before. Returns a list that grows by the tokens that would have gone elsewhere."""
    chosen, elsewhere = [], []

    def keep(router, inputs, outputs):
        chosen.append(outputs)

    def replace(router, inputs, outputs):
        right = chosen.pop(0)
        for own, its in zip(outputs, right, strict=True):
            if its.dtype == torch.int64:  # the numbers of the experts, in any order
                elsewhere.append((own.sort(-1).values != its.sort(-1).values).any(-1).sum().item())
        return right

    for which, hook in ((exact, keep), (model, replace)):
        for layer in which.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(hook)
    return elsewhere


def largest(difference):
    return difference.float().abs().max().item()


def dense_layers(device, layers, heads, length, steps):
    model = random_model(device, layers, heads, experts=False)
    prompts = [torch.randint(2000, (length - 7 * i,), device=device) for i in range(3)]
    # Few words, so that the next one does not follow from the last alone.
    texts = torch.randint(36, (3, steps), device=device)
    teach(model, prompts, texts)
    exact = model.lm_head(states_before(model, prompts, texts))

    half = in_float16(model)
    ours, theirs = greedy_cached(half, prompts, steps), greedy_untouched(half, prompts, steps)
    equal = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    error, own = largest(ours - exact), largest(theirs - exact)
    print(f"dense layers, float16: {equal} of {texts.numel()} greedy tokens equal the model's own")
    print(f"largest error of a logit {error:.4f}, of the untouched model {own:.4f}")
    return equal == texts.numel() and error <= 1.1 * own


def expert_layers(device, layers, heads, length):
    model = random_model(device, layers, heads, experts=True)
    prompts = [torch.randint(2000, (length - 7 * i,), device=device) for i in range(3)]
    half = in_float16(model)
    session = Session(half, 4 * length)

    def error_of(read, routed):
        exact = copy.deepcopy(model)
        elsewhere, found = route_alike(exact, routed), []
        for ids in prompts:
            right = exact(ids[None]).logits
            found.append(largest(read(ids[None]) - right))
        return max(found), sum(elsewhere)

    error, moved = error_of(lambda ids: session.read([session.cache.add()], ids), session.model)
    own, own_moved = error_of(lambda ids: half(ids).logits, half)
    print(f"experts: largest error of a logit {error:.4f}, of the untouched model {own:.4f}")
    print(f"tokens sent elsewhere, but for the same routing: {moved}, of the untouched {own_moved}")
    return error <= 1.1 * own


def main() -> int:
    on_gpu = PagedKVCache(1).device != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    sizes = (4, 16, 300, 48) if on_gpu else (2, 4, 40, 6)
    if not on_gpu:
        print("No Hopper GPU found: computing on the CPU, a smaller model.")
    torch.set_grad_enabled(False)
    ok = dense_layers(device, *sizes)
    ok = expert_layers(device, *sizes[:3]) and ok
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
