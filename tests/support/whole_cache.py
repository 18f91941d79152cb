"""A cache of several layers beside plain arrays that it never saw, in any framework."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest
from support.oracle import assert_within_bound, oracle

from flashmla_cupy import PagedKVCache

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PLACES = [  # (device, framework)
    ("cpu", "numpy"),
    ("cpu", "torch"),
    ("cpu", "jax"),
    pytest.param((0, "cupy"), marks=pytest.mark.gpu),
    pytest.param((0, "torch"), marks=pytest.mark.gpu),
    pytest.param((0, "jax"), marks=pytest.mark.gpu),
]
places = pytest.mark.parametrize(
    "place",
    PLACES,
    ids=[f"{p[0]}-{p[1]}" for p in [("cpu", "numpy"), ("cpu", "torch"), ("cpu", "jax")]]
    + ["gpu-cupy", "gpu-torch", "gpu-jax"],
)


def to(x, place):
    """A NumPy array as one of a framework, on its device."""
    device, name = place
    if name == "numpy":
        return x
    if name == "cupy":
        return importlib.import_module("cupy").asarray(x)
    if name == "jax":
        return pytest.importorskip("jax.numpy").asarray(x)
    torch = pytest.importorskip("torch")
    raw = torch.from_numpy(np.ascontiguousarray(x).view(np.int16))
    typed = raw.view(torch.bfloat16 if x.dtype == ml_dtypes.bfloat16 else torch.float16)
    return typed.cuda(device) if device != "cpu" else typed


def back(x):
    """A NumPy array of an array of any framework."""
    if hasattr(x, "get"):
        return x.get()
    if type(x).__module__.startswith("torch"):
        x = x.cpu()
        if str(x.dtype) == "torch.bfloat16":
            torch = importlib.import_module("torch")
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    return np.asarray(x)


def root(x):
    return type(x).__module__.partition(".")[0].replace("jaxlib", "jax")


class WholeCache:
    """A cache and, for each sequence, the rows [layers, tokens, 576] that it should have."""

    def __init__(self, place, layers=3, dtype="float16", seed=0, **options):
        options = {"num_pages": 40, "page_size": 16, "num_layers": layers, **options}
        device, self.place = place[0], place
        self.cache = PagedKVCache(device=device, dtype=dtype, **options)
        self.layers, self.dtype = layers, DTYPES[dtype]
        self.rng = np.random.default_rng(seed)
        self.rows = {}

    def new(self, *shape):
        return self.rng.standard_normal((*shape, 576), np.float32).astype(self.dtype)

    def add(self, tokens):
        rows = self.new(self.layers, tokens)
        seq = self.cache.add(to(rows if self.layers > 1 else rows[0], self.place))
        self.rows[seq] = rows
        return seq

    def step(self, seqs, counts, accepted=None, *, softmax_scale=None, heads=4):
        """A step of all layers whose results are compared, committed or rolled back (-1)."""
        step = self.cache.reserve(seqs, counts)
        counts, most = step.counts.tolist(), step.tokens
        new = self.new(self.layers, len(seqs), most)
        q = self.new(self.layers, len(seqs), most, heads)
        both = [
            np.concatenate([self.rows[seq], new[:, i, most - n :]], axis=1)
            for i, (seq, n) in enumerate(zip(seqs, counts, strict=True))
        ]
        for layer in range(self.layers):
            step.write(to(new[layer], self.place), layer=layer)
            out, lse = step.attend(
                to(q[layer], self.place), layer=layer, softmax_scale=softmax_scale
            )
            assert root(out) == root(lse) == self.place[1]
            self.compare(
                q[layer], [rows[layer] for rows in both], out, lse, softmax_scale=softmax_scale
            )
        if accepted == -1:
            step.rollback()
            accepted = [0] * len(seqs)
        else:
            step.commit(accepted)
        kept = counts if accepted is None else np.broadcast_to(accepted, len(seqs))
        for seq, rows, n, k in zip(seqs, both, counts, kept, strict=True):
            self.rows[seq] = rows[:, : rows.shape[1] - n + int(k)]
        return step

    def attend_all(self, heads=4):
        """attend() outside of a step, over all sequences, layer by layer."""
        seqs = self.cache.sequences
        for layer in range(self.layers):
            q = self.new(len(seqs), 1, heads)
            out, lse = self.cache.attend(to(q, self.place), layer=layer)
            self.compare(q, [self.rows[seq][layer] for seq in seqs], out, lse)
        self.cache.check()

    def compare(self, q, rows, out, lse, softmax_scale=None):
        longest = max([1, *map(len, rows)])
        pages = np.zeros((len(rows), longest, 1, 576), q.dtype)
        for page, of in zip(pages, rows, strict=True):
            page[: len(of), 0] = of
        table = np.arange(len(rows), dtype=np.int32)[:, None]
        expected = oracle(
            q, pages, table, list(map(len, rows)), causal=True, softmax_scale=softmax_scale
        )
        assert_within_bound(back(out), back(lse), expected)
