"""Continuous batching in miniature, over one PagedKVCache of a few layers.

    python examples/serving_loop.py

Requests arrive and leave while others decode. Each has a prompt that begins with one of a few
system prompts, whose pages are shared once they are known. Every step decodes a token of each
running request, or three where a draft model guesses ahead, of which some are rejected and rolled
back. Now and then a request is forked into two. When the pool has no page left, the youngest
request is swapped out to host memory, and comes back when there is room.

The attention of every request and layer is compared, in every step, with a dense computation in
float64 over plain arrays that the cache never saw. At the end all pages must be there again.

Runs with CuPy on a Hopper GPU, else with NumPy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from flashmla_cupy import OutOfPagesError, PagedKVCache

BF16 = ml_dtypes.bfloat16
SCALE = 0.1352  # of DeepSeek-V3: flashmla_cupy.deepseek.softmax_scale(config)
VOCABULARY = 5000


class Model:
    """Stands in for a model: the latent row of a token in a layer is a function of all tokens up to
    it, and so are queries, as in a real one; but each is drawn at random from its seed."""

    def __init__(self, layers: int, heads: int) -> None:
        self.layers, self.heads = layers, heads

    def rows(self, tokens: list[int], first: int) -> np.ndarray:
        """Latent rows [layers, tokens, 576] of tokens[first:]."""
        drawn = [self._draw(tokens[: i + 1], 0, self.layers) for i in range(first, len(tokens))]
        return np.stack(drawn, axis=1) if drawn else np.zeros((self.layers, 0, 576), BF16)

    def queries(self, tokens: list[int], count: int) -> np.ndarray:
        """Queries [layers, count, heads, 576] of the last `count` tokens."""
        ends = range(len(tokens) - count + 1, len(tokens) + 1)
        drawn = [self._draw(tokens[:end], 1, self.layers * self.heads) for end in ends]
        return np.stack([x.reshape(self.layers, self.heads, 576) for x in drawn], axis=1)

    def _draw(self, tokens: list[int], kind: int, count: int) -> np.ndarray:
        rng = np.random.default_rng([kind, *tokens])
        return rng.standard_normal((count, 576), np.float32).astype(BF16)


@dataclass
class Request:
    """One request: its tokens, and the rows that it should have in the cache."""

    tokens: list[int]
    wanted: int  # tokens in all
    seq: object = None
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 576), BF16))


class Server:
    """The loop."""

    def __init__(self, cache: PagedKVCache, model: Model, xp) -> None:
        self.cache, self.model, self.xp = cache, model, xp
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.swapped: list[Request] = []
        self.rng = np.random.default_rng(0)
        self.done = dict.fromkeys(
            ("finished", "steps", "shared", "rejected", "forks", "swaps", "compared"), 0
        )

    # --- requests ------------------------------------------------------------------------------

    def admit(self, request: Request) -> bool:
        """Prefills a request; False if there is no room for it now."""
        seq, cached = self.cache.begin(request.tokens)
        try:
            step = self.cache.reserve([seq], len(request.tokens) - cached)
        except OutOfPagesError:
            self.cache.free(seq)
            return False
        request.seq = seq
        request.rows = self.model.rows(request.tokens, 0)
        with step:
            self.attend(step, [request], [len(request.tokens) - cached])
            step.commit()
        self.running.append(request)
        self.done["shared"] += cached
        return True

    def make_room(self) -> None:
        """Swaps out the youngest request."""
        request = self.running.pop()
        self.cache.swap_out(request.seq)
        self.swapped.append(request)
        self.done["swaps"] += 1

    def bring_back(self) -> None:
        """Swaps in whom there is room for, the oldest first, with a page to spare for each."""
        while self.swapped:
            request = self.swapped[0]
            pages = -(-len(request.tokens) // self.cache.page_size)
            counts = self.cache.page_counts
            if counts.free + counts.cached < pages + len(self.running) + 1:
                return
            self.cache.swap_in(request.seq)
            self.running.append(self.swapped.pop(0))

    # --- a step --------------------------------------------------------------------------------

    def step(self) -> None:
        """A token of each running request, or three of which some are rejected."""
        ahead = 3 if self.rng.random() < 0.3 else 1
        counts = [min(ahead, r.wanted - len(r.tokens)) for r in self.running]
        while True:
            try:
                step = self.cache.reserve([r.seq for r in self.running], counts)
                break
            except OutOfPagesError:
                self.make_room()
                counts.pop()
        for request, n in zip(self.running, counts, strict=True):
            start = len(request.tokens)
            request.tokens += self.rng.integers(0, VOCABULARY, n).tolist()
            new = self.model.rows(request.tokens, start)
            request.rows = np.concatenate([request.rows, new], axis=1)
        with step:
            self.attend(step, self.running, counts)
            kept = [int(self.rng.integers(1, n + 1)) for n in counts]
            step.commit(kept)
        for request, n, k in zip(self.running, counts, kept, strict=True):
            length = len(request.tokens) - n + k
            del request.tokens[length:]
            request.rows = request.rows[:, :length]
            self.done["rejected"] += n - k
        self.done["steps"] += 1

    def attend(self, step, requests: list[Request], counts: list[int]) -> None:
        """All layers of a step, compared with dense attention."""
        layers, most = self.model.layers, step.tokens
        rows = np.zeros((layers, len(requests), most, 576), BF16)
        q = np.zeros((layers, len(requests), most, self.model.heads, 576), BF16)
        for i, (request, n) in enumerate(zip(requests, counts, strict=True)):
            rows[:, i, most - n :] = request.rows[:, -n:]  # at the end, if others have more
            q[:, i, most - n :] = self.model.queries(request.tokens, n)
        for layer in range(layers):
            step.write(self.xp.asarray(rows[layer]), layer=layer)
            out, _ = step.attend(self.xp.asarray(q[layer]), layer=layer, softmax_scale=SCALE)
            out = out.get() if hasattr(out, "get") else out
            for i, (request, n) in enumerate(zip(requests, counts, strict=True)):
                self.compare(request.rows[layer], q[layer, i, most - n :], out[i, most - n :])

    def compare(self, rows: np.ndarray, q: np.ndarray, out: np.ndarray) -> None:
        """The attention of q [n, heads, 576], of the last n tokens, over rows [tokens, 576]."""
        keys, n = rows.astype(np.float64), len(q)
        score = SCALE * np.einsum("nhd,td->nht", q.astype(np.float64), keys)
        hidden = np.arange(len(keys)) > np.arange(len(keys) - n, len(keys))[:, None]
        score = np.where(hidden[:, None], -np.inf, score)
        weight = np.exp(score - score.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        expected = weight @ keys[:, :512]
        error = np.abs(out.astype(np.float64) - expected).max()
        if error > 0.03:  # bfloat16 of numbers up to 4 rounds by 0.008, and so do the weights
            raise AssertionError(f"attention is off by {error:.3g}")
        self.done["compared"] += 1

    # --- the loop ------------------------------------------------------------------------------

    def run(self, requests: list[Request], show) -> None:
        """Serves them all."""
        arriving = list(requests)
        total = len(arriving)
        while arriving or self.waiting or self.running or self.swapped:
            if arriving and self.rng.random() < 0.6:
                self.waiting.append(arriving.pop(0))
            self.bring_back()
            while self.waiting and not self.swapped and self.admit(self.waiting[0]):
                self.waiting.pop(0)
            if not self.running and self.swapped:
                raise AssertionError("a request is larger than the pool")
            if self.running:
                self.step()
            if self.running and self.rng.random() < 0.1:
                total += self.fork()
            for request in [r for r in self.running if len(r.tokens) >= r.wanted]:
                self.cache.free(request.seq)
                self.running.remove(request)
                self.done["finished"] += 1
            self.cache.check()
            show(self, total)

    def fork(self) -> int:
        """A second continuation of a request, from where it is; how many were made."""
        parent = self.running[int(self.rng.integers(len(self.running)))]
        child = Request(list(parent.tokens), parent.wanted)
        child.seq, child.rows = self.cache.fork(parent.seq), parent.rows
        self.running.append(child)
        self.done["forks"] += 1
        return 1


def progress(server: Server, total: int) -> None:
    """One line that is written over, if someone is watching."""
    if sys.stdout.isatty():
        counts = server.cache.page_counts
        bar = "#" * counts.active + "+" * counts.cached + "." * counts.free
        print(
            f"\r{server.done['finished']:3}/{total} done, {len(server.running):2} running,"
            f" {len(server.swapped):2} swapped, {len(server.waiting):2} waiting"
            f"  pages [{bar}]",
            end="",
            flush=True,
        )


def main() -> int:
    cache = PagedKVCache(num_pages=18, page_size=16, num_layers=2)
    xp = np
    if cache.device != "cpu":
        import cupy as xp
    server = Server(cache, Model(layers=2, heads=4), xp)
    rng = np.random.default_rng(1)
    systems = [rng.integers(0, VOCABULARY, n).tolist() for n in (40, 33)]
    requests = []
    for i in range(20):
        prompt = systems[i % 2] + rng.integers(0, VOCABULARY, rng.integers(1, 30)).tolist()
        requests.append(Request(prompt, len(prompt) + int(rng.integers(5, 25))))
    server.run(requests, progress)
    if sys.stdout.isatty():
        print()

    counts = cache.page_counts
    for what, n in server.done.items():
        print(f"{what:9} {n}")
    print(
        f"pages     {counts.free} free and {counts.cached} of known prefixes, of {cache.num_pages}"
    )
    expected = ("finished", "shared", "rejected", "forks", "swaps")
    ok = counts.free + counts.cached == cache.num_pages and all(map(server.done.get, expected))
    ok = ok and server.done["finished"] == len(requests) + server.done["forks"]
    print("PASS" if ok else "FAIL")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
