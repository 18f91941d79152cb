"""1,000 needle tests: one key takes all the weight, so out is its latent row exactly.

Random data hides a dropped or swapped token of a long request below any numerical bound; needles do
not. Every query row has a needle of its own kv head to find: a key that agrees with it in 64
columns, so that its score leads by more than exp can bridge. Needles lie where mistakes lie: at the
ends of requests, pages, tiles, splits and of what a causal query sees. Beside the last, one past
the end, may lie a decoy: the same needle twice as strong, which only later queries may find.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.gpu import problems as gpu_problems
from support.gpu.arrays import (
    DRY,
    bits,
    from_float,
    host,
    mark,
    put_tokens,
    release_memory,
    to_float,
    xp,
)
from support.gpu.problems import CACHE_LAYOUTS, EDGES, PAGE_SIZES, Q_LAYOUTS

import flashmla_cupy

pytestmark = mark

NEEDLES, CHUNK = (40, 10) if DRY else (1000, 50)
LONGEST = 300 if DRY else 20_000
VERY_LONG = 400 if DRY else 120_000
SUPPORT = 64  # columns in which a needle and its queries are +-VALUE
VALUE = 16.0  # the score of a needle is scale * 16384; of any other key less than half of that
PER_HEAD = 12  # needles of one kv head of one request, at most


def settings_of(seed: int) -> dict:
    """The arguments of make(); the same ones for the same seed."""
    rng = np.random.default_rng((7, seed))

    def pick(options):
        return options[int(rng.integers(len(options)))]

    page_size = int(pick(PAGE_SIZES))
    h_kv = int(pick((1, 1, 1, 2, 3)))
    lengths = []
    for _ in range(int(rng.integers(1, 5))):
        near = int(rng.integers(-1, 2))
        length = pick(
            (
                int(pick(EDGES)),
                page_size * int(rng.integers(1, 9)) + near,
                64 * int(rng.integers(1, 40)) + near,
                int(np.exp(rng.uniform(0, np.log(LONGEST)))),
            )
        )
        lengths.append(min(length, LONGEST))
    if rng.random() < 0.03:
        lengths[0] = int(rng.integers(VERY_LONG // 2, VERY_LONG))
    return {
        "lengths": lengths,
        "s_q": int(pick((1, 1, 1, 2, 3, 4, 9))),
        "h_q": h_kv * int(pick((1, 3, 8, 16) if DRY else (1, 3, 16, 16, 42, 64, 128))),
        "h_kv": h_kv,
        "page_size": page_size,
        "dtype": str(pick(("bfloat16", "float16"))),
        "causal": bool(rng.integers(2)),
        "softmax_scale": None if rng.random() < 0.7 else float(rng.uniform(0.03, 0.3)),
        "cache_layout": pick(CACHE_LAYOUTS) if rng.random() < 0.4 else "plain",
        "q_layout": pick(Q_LAYOUTS) if rng.random() < 0.4 else "plain",
        "seed": seed,
    }


def places(problem, request: int, cuts: np.ndarray, rng) -> np.ndarray:
    """Positions of needles in a request, ascending; 0 is always one, so all see something."""
    n, s_q, page_size = int(problem.lengths[request]), problem.q.shape[1], problem.page_size
    page = page_size * int(rng.integers(0, n // page_size + 1))
    tile = 64 * int(rng.integers(0, n // 64 + 1))
    edges = [n - 1, page - 1, page, tile - 1, tile]
    edges += [n - s_q + i for i in range(-1, s_q)]  # the last key of each causal query
    edges += [cut + side for cut in cuts.tolist() for side in (-1, 0)]
    edges += rng.integers(0, n, 4).tolist()
    edges = sorted({p for p in edges if 0 < p < n})
    chosen = rng.permutation(edges)[: PER_HEAD - 1].astype(np.int64) if edges else []
    return np.sort(np.concatenate([[0], chosen])).astype(np.int64)


class Haystack:
    """What is planted: rows of keys, patterns of queries, and which of them each row finds."""

    def __init__(self, problem, rng) -> None:
        batch, s_q, h_q, _ = problem.q.shape
        self.problem, self.rng = problem, rng
        self.metadata = problem.metadata()
        self.where: list[tuple[int, int, int]] = []  # (page, slot, kv head) of a key
        self.keys: list[np.ndarray] = []  # [576] float32
        self.strength: list[float] = []
        self.patterns: list[np.ndarray] = []  # [576] float32
        self.finds = np.full((batch, s_q, h_q), -1, np.int64)  # a key; -1: sees nothing
        self.asks = np.zeros((batch, s_q, h_q), np.int64)  # a pattern
        records = host(self.metadata[0]).astype(np.int64)
        for request in range(batch):
            cut = (records[:, 0] == request) & (records[:, 1] > 0)
            for head in range(problem.h_kv):
                self._plant(request, head, 64 * records[cut, 1])
        self._write()

    def _plant(self, request: int, head: int, cuts: np.ndarray) -> None:
        problem, rng = self.problem, self.rng
        n, s_q = int(problem.lengths[request]), problem.q.shape[1]
        group = problem.q.shape[2] // problem.h_kv
        heads = slice(head * group, (head + 1) * group)
        if n == 0:
            self.asks[request, :, heads] = self._pattern()
            return
        position = places(problem, request, cuts, rng)
        pattern = [self._pattern() for _ in position]
        strength = np.ones(len(position))
        ends = n - s_q + 1 + np.arange(s_q) if problem.causal else np.full(s_q, n)
        decoys = [j for j, p in enumerate(position.tolist()) if j and p in ends]
        if decoys and rng.random() < 0.5:
            decoy = decoys[int(rng.integers(len(decoys)))]
            pattern[decoy], strength[decoy] = pattern[int(rng.integers(decoy))], 2.0
        first = len(self.keys)
        for p, pat, s in zip(position.tolist(), pattern, strength, strict=True):
            page = int(problem.table[request, p // problem.page_size])
            key = rng.standard_normal(576, np.float32)
            key = np.where(self.patterns[pat] == 0, key, self.patterns[pat] * np.float32(s))
            self.where.append((page, p % problem.page_size, head))
            self.keys.append(key)
            self.strength.append(float(s))
        for i, end in enumerate(ends.tolist()):
            visible = int((position < end).sum())
            target = rng.integers(0, max(1, visible), group)
            asked = np.array(pattern)[target]
            self.asks[request, i, heads] = asked
            # The strongest visible key of that pattern.
            found = [
                max((j for j in range(visible) if pattern[j] == a), key=strength.__getitem__)
                for a in (asked.tolist() if visible else ())
            ]
            if visible:
                self.finds[request, i, heads] = first + np.array(found)

    def _pattern(self) -> int:
        pattern = np.zeros(576, np.float32)
        columns = self.rng.permutation(576)[:SUPPORT]
        pattern[columns] = self.rng.choice([-VALUE, VALUE], SUPPORT)
        self.patterns.append(pattern)
        return len(self.patterns) - 1

    def _write(self) -> None:
        problem, dtype = self.problem, self.problem.q.dtype.name
        patterns = bits(from_float(xp.asarray(np.stack(self.patterns)), dtype))
        bits(problem.q)[...] = patterns[xp.asarray(self.asks)]
        # An extra row, never planted, is found by those that see nothing.
        keys = np.stack([*self.keys, np.zeros(576, np.float32)])
        self.rows = from_float(xp.asarray(keys), dtype)
        for head in range(problem.h_kv):
            mine = [j for j, (_, _, h) in enumerate(self.where) if h == head]
            if mine:
                pages, slots, _ = np.array([self.where[j] for j in mine]).T
                rows = bits(self.rows)[xp.asarray(mine)].view(self.rows.dtype)
                put_tokens(problem.k_cache, pages, slots, head, rows)

    def mistakes(self, out, lse):
        """How many rows of out, and elements of lse, are wrong: on the device."""
        scale = self.problem.softmax_scale
        scale = 576**-0.5 if scale is None else scale
        want = to_float(self.rows)[xp.asarray(self.finds)][..., :512]
        score = np.array([*self.strength, np.inf]) * (scale * SUPPORT * VALUE**2)
        score = xp.asarray(score[self.finds].swapaxes(1, 2))
        with np.errstate(invalid="ignore"):
            close = xp.abs(lse.astype("float64") - score) <= 2.0**-20 * xp.abs(score)
        close = xp.where(xp.isinf(score), lse == score, close)
        return [(to_float(out) != want).any(axis=-1).sum(), (~close).sum()]


def assert_found(seed: int) -> int:
    problem = gpu_problems.make(**settings_of(seed))
    haystack = Haystack(problem, np.random.default_rng((8, seed)))
    out, lse = problem.decode(haystack.metadata)
    rows, scores = host(xp.stack(haystack.mistakes(out, lse))).tolist()
    what = f"seed {seed}: {problem.label}"
    assert not rows, f"{what}: {rows} of {haystack.finds.size} rows are not their needle's"
    assert not scores, f"{what}: {scores} of {haystack.finds.size} lse are wrong"
    return haystack.finds.size


@pytest.mark.parametrize("first", range(0, NEEDLES, CHUNK))
def test_needles(first):
    release_memory()
    failures, rows = [], 0
    for seed in range(first, first + CHUNK):
        try:
            rows += assert_found(seed)
        except AssertionError as failure:
            failures.append(str(failure))
        flashmla_cupy.check()
    print(f"\nneedles {first}..{first + CHUNK - 1}: {rows} rows, {len(failures)} failures")
    assert not failures, f"{len(failures)} of {CHUNK}:\n" + "\n".join(failures[:5])
