"""What tests of PagedKVCache share: reading a cache back, and a model of what one should hold."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from support.problems import DTYPES

from flashmla_cupy import PagedKVCache, errors

NAN = 0x7FFF  # the bits of one, in bfloat16 and in float16


def host(x):
    """A copy in host memory."""
    return x.get() if hasattr(x, "get") else np.array(x)


def beside(cache, x):
    """x where the pool of the cache is."""
    return cache._core.pool.xp.asarray(x)


def bits(x):
    return host(x).view(np.uint16)


def latents(n, seed=0, dtype="bfloat16", h_kv=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, h_kv, 576), np.float32).astype(DTYPES[dtype])


def poisoned(cache):
    """The same cache, with NaN in every slot that holds no token."""
    table, lengths = map(host, cache.tables())
    unused = np.ones(cache.storage.shape[:2], bool)
    for row, n in zip(table, lengths, strict=True):
        token = np.arange(n)
        unused[row[token // cache.page_size], token % cache.page_size] = False
    cache.storage.view(np.uint16)[beside(cache, unused)] = NAN
    return cache


def read(cache, seq):
    """The bits of a sequence's rows, [n, h_kv, 576]."""
    table, lengths = map(host, cache.tables([seq]))
    return bits(cache.storage)[table[0]].reshape(-1, *cache.storage.shape[2:])[: lengths[0]]


def snapshot(cache):
    """Everything a failed call must leave alone."""
    seqs = cache.sequences
    contents = [read(cache, seq).tobytes() for seq in seqs]
    table, lengths = map(host, cache.tables())
    return seqs, contents, table.tolist(), lengths.tolist(), cache.free_pages, repr(cache)


def nearly_full(device="cpu"):
    """Two sequences, one of 3 pages with 1 slot left, one of exactly 1 page; 2 pages are free."""
    cache = PagedKVCache(6, page_size=16, device=device)
    return cache, cache.add(latents(47, 1)), cache.add(latents(16, 2))


class Model:
    """Random operations on a small cache, and what it should hold: a list of row numbers for each
    sequence. Row number i is the 576 values of numbered([i])."""

    def __init__(self, device, seed):
        self.rng = np.random.default_rng(seed)
        self.cache = PagedKVCache(14, page_size=16, device=device)
        self.held = {}
        self.dead = []
        self.next = 0
        self.happened = dict.fromkeys(("add", "append", "batch", "free", "full", "dead"), 0)

    def numbered(self, ids):
        rows = np.repeat(np.asarray(ids, np.uint32)[..., None], 576, axis=-1)
        rows[..., 0] >>= 16
        return rows.astype(np.uint16).view(ml_dtypes.bfloat16)

    def new_ids(self, *shape):
        ids = np.arange(self.next, self.next + np.prod(shape)).reshape(shape)
        self.next += ids.size
        return ids

    def pages(self, tokens):
        return -(-tokens // 16)

    def needed(self, seqs, n):
        have = [len(self.held.get(seq, ())) for seq in seqs]
        return sum(self.pages(k + n) - self.pages(k) for k in have)

    def free_pages(self):
        return 14 - sum(self.pages(len(ids)) for ids in self.held.values())

    def attempt(self, what, needed, call):
        """(done, result) of call(), which must fail if, and only if, pages are missing."""
        free = self.free_pages()
        if needed <= free:
            self.happened[what] += 1
            return True, call()
        with pytest.raises(errors.OutOfPagesError) as caught:
            call()
        assert (caught.value.needed, caught.value.free) == (needed, free)
        self.happened["full"] += 1
        return False, None

    def step(self):
        rng, cache, seqs = self.rng, self.cache, list(self.held)
        n = int(rng.choice([0, 1, 2, 15, 16, 17, 40]))
        kind = rng.choice(["add", "append", "batch", "free", "dead"], p=[0.2, 0.3, 0.25, 0.2, 0.05])
        if kind == "add" or not seqs:
            ids = self.new_ids(n)
            latent = None if n == 0 and rng.random() < 0.5 else self.numbered(ids)
            done, seq = self.attempt("add", self.pages(n), lambda: cache.add(latent))
            if done:
                self.held[seq] = ids.tolist()
        elif kind == "append":
            seq, ids = seqs[rng.integers(len(seqs))], self.new_ids(n)
            rows = self.numbered(ids)
            if rng.random() < 0.5:
                rows = beside(cache, rows)
            done, _ = self.attempt("append", self.needed([seq], n), lambda: cache.append(seq, rows))
            if done:
                self.held[seq] += ids.tolist()
        elif kind == "batch":
            chosen = [seqs[i] for i in rng.permutation(len(seqs))[: rng.integers(len(seqs) + 1)]]
            n = min(n, 3)
            ids = self.new_ids(len(chosen), n)
            rows = self.numbered(ids)
            done, _ = self.attempt(
                "batch", self.needed(chosen, n), lambda: cache.append_batch(chosen, rows)
            )
            for seq, row in zip(chosen, ids.tolist(), strict=True):
                self.held[seq] += row if done else []
        elif kind == "free":
            seq = seqs[rng.integers(len(seqs))]
            cache.free(seq)
            del self.held[seq]
            self.dead = [*self.dead[-20:], seq]
            self.happened["free"] += 1
        elif self.dead:
            seq = self.dead[rng.integers(len(self.dead))]
            row = self.numbered(self.new_ids(1, 1))
            for call in (
                lambda: cache.free(seq),
                lambda: cache.append(seq, row[0]),
                lambda: cache.append_batch([*seqs, seq], np.repeat(row, len(seqs) + 1, 0)),
                lambda: cache.tables([*seqs, seq]),
                lambda: cache.seqlen(seq),
            ):
                with pytest.raises(errors.SequenceError, match="was freed"):
                    call()
            self.happened["dead"] += 1

    def verify(self):
        """Invariants by what is public, then by the cache's own check()."""
        cache = self.cache
        assert list(cache.sequences) == list(self.held)
        table, lengths = map(host, cache.tables())
        assert table.dtype == lengths.dtype == np.int32
        assert lengths.tolist() == [len(ids) for ids in self.held.values()]
        used = np.arange(table.shape[1]) < self.pages(lengths)[:, None]
        assert (table[~used] == 0).all()
        pages = table[used].tolist()
        assert len(set(pages)) == len(pages), "a page in two places"
        assert set(pages) <= set(range(14))
        assert len(pages) + cache.free_pages == 14
        token = np.arange(table.shape[1] * 16)
        live = token < lengths[:, None]
        found = bits(cache.storage)[table[:, token // 16], token % 16, 0][live]
        expected = self.numbered([i for ids in self.held.values() for i in ids])
        assert np.array_equal(found, bits(expected)), "rows differ from the model"
        cache.check()
