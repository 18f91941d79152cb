"""What a paged cache costs, on a Hopper GPU with PyTorch:

    python benchmarks/cache.py [append] [order] [host]

append   GPU time of append.cu beside a device copy of the same bytes and torch's index_put_, all
         replayed as graphs: 8,192 rows of one layer, and a step's 128 rows
order    attend() and append over the two orders of a pool's axes, pages or layers first
host     host time of reserve() and commit() for 128 sequences

Times are medians of rounds in which the variants take turns. Each graph goes through so many layers
or buffers that nothing is left in the L2 cache from one use to the next. The exit status is 2 if
nothing ran.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from flashmla_cupy import FlashMLAError, PagedKVCache, deepseek
from flashmla_cupy.build import nvrtc
from flashmla_cupy.frameworks import framework
from flashmla_cupy.gpu.append_launch import NO_ROTATION, CacheLaunches, PoolGeometry, Rotary, Rows
from flashmla_cupy.gpu.engine import engine_of

try:
    import torch
except ImportError as error:  # main() says so
    torch, no_torch = None, str(error)

ROW = 1152  # bytes
WHAT = ("append", "order", "host")


class BenchmarkError(Exception):
    """Why nothing can be measured, in a sentence."""


def graphs(bodies):
    """A graph of each function, by name."""
    made = {}
    for name, body in bodies.items():
        body()
        torch.cuda.synchronize()
        made[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made[name]):
            body()
    return made


def take_turns(made, rounds=30, replays=5):
    """Median microseconds of a replay of each graph."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = {name: [] for name in made}
    for _ in range(rounds):
        for name, graph in made.items():
            graph.replay()
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / replays)
    return {name: statistics.median(of) for name, of in times.items()}


def append(rows, buffers):
    """`rows` rows into each of `buffers` layers of a pool."""
    pages = 2 * rows // 64 + 1
    pool = torch.empty(buffers, pages, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    new = torch.randn(buffers, rows, 576, device="cuda").bfloat16()
    slots = torch.randperm(pages * 64, device="cuda")[:rows]
    spans = torch.arange(rows, device="cuda") + 64 * torch.randint(pages // 2, (1,), device="cuda")
    to = torch.empty_like(new)
    cos, sin = (torch.from_numpy(x).cuda() for x in deepseek.rotary_tables(
        {"qk_rope_head_dim": 64, "rope_theta": 1e4}, 8192))  # fmt: skip
    positions = torch.arange(rows, device="cuda")
    launches = CacheLaunches(engine_of(torch.cuda.current_device()), "bfloat16")
    stream = framework("torch").stream
    geometry = PoolGeometry(0, 0, 64 * ROW, ROW, ROW, pages, 64, 1, ROW)
    rotary = Rotary(cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), 8192, True)

    def ours(where, rotation=NO_ROTATION):
        def body():
            for i in range(buffers):
                of = Rows(new[i].data_ptr(), 0, ROW, ROW, ROW, 1, rows, 1)
                to = geometry._replace(address=pool[i].data_ptr())
                launches.append(stream(0), to, of, where.data_ptr(), rotation)

        return body

    def copies():
        for i in range(buffers):
            to[i].copy_(new[i])

    def index_put():
        for i in range(buffers):
            pool[i].view(-1, 576).index_put_((slots,), new[i])

    bodies = {
        "device copy": copies,
        "append": ours(slots),
        "append, runs": ours(spans),
        "append, rotary": ours(slots, rotary),
        "index_put_": index_put,
    }
    times = {name: us / buffers for name, us in take_turns(graphs(bodies)).items()}
    for name, us in times.items():
        share = times["device copy"] / us
        rate = 2 * rows * ROW / us / 1000
        print(f"{rows:6} rows  {name:16}{us:8.2f} us{rate:8.0f} GB/s{share:8.2f} of the copy")


def order(layers=61, batch=128, tokens=4096):
    """The two orders of axes, for as large a pool as a model has."""
    pages = batch * tokens // 64 + batch
    caches, steps = {}, {}
    ids = np.random.default_rng(0).permutation(pages).tolist()
    for name, axis in (("pages first", 1), ("layers first", 0)):
        cache = caches[name] = PagedKVCache(
            pages, num_layers=layers, framework="torch", layer_axis=axis, max_seqs=batch
        )
        for part in cache.storage:
            part.uniform_(-1, 1)
        cache._core.states.free[:] = ids  # pages as a long life would have scattered them
        seqs = [cache.add() for _ in range(batch)]
        for seq in seqs:
            cache.reserve([seq], tokens - 1).commit()
        steps[name] = cache.reserve(seqs)
    for heads in (16, 128):
        q = torch.randn(batch, 1, heads, 576, device="cuda").bfloat16()
        rows = torch.randn(batch, 1, 576, device="cuda").bfloat16()
        out = {}

        def attend(step, q=q, out=out):
            for i in range(0, layers, 4):
                out[i] = step.attend(q, layer=i)

        def write(step, rows=rows):
            for i in range(layers):
                step.write(rows, layer=i)

        for what, body, count in (
            ("attend", attend, len(range(0, layers, 4))),
            ("append", write, layers),
        ):
            bodies = {name: lambda step=step, body=body: body(step) for name, step in steps.items()}
            times = {name: us / count for name, us in take_turns(graphs(bodies), 10, 2).items()}
            first = times["pages first"]
            shown = "".join(f"{name}: {us:8.2f} us   " for name, us in times.items())
            print(
                f"{what} {heads:4} heads   {shown}layers/pages {times['layers first'] / first:.3f}"
            )


def host(batch=128):
    """Median host time of reserve() and commit()."""
    for layers in (1, 61):
        for options in ({"max_seqs": batch, "max_pages_per_seq": 128}, {}):
            cache = PagedKVCache(1500, num_layers=layers, framework="torch", **options)
            rng = np.random.default_rng(0)
            seqs = [cache.add() for _ in range(batch)]
            for seq in seqs:
                cache.reserve([seq], int(rng.integers(1, 500))).commit()
            whole, parts = [], []
            for _ in range(300):
                begin = time.perf_counter()
                step = cache.reserve(seqs)
                middle = time.perf_counter()
                step.commit()
                whole.append(time.perf_counter() - begin)
                parts.append(middle - begin)
            kind = "lasting arrays" if options else "new arrays"
            reserve, both = (1e6 * statistics.median(x) for x in (parts, whole))
            print(f"{layers:3} layers, {kind:15} reserve {reserve:6.1f} us, both {both:6.1f} us")


def prepare(asked) -> None:
    """Raises BenchmarkError or a FlashMLAError for what is not known or missing."""
    for word in asked:
        if word not in WHAT:
            raise BenchmarkError(f"{word!r} is none of {', '.join(WHAT)}.")
    if torch is None:
        raise BenchmarkError(f"The benchmark needs PyTorch ({no_torch}): pip install torch.")
    if not torch.cuda.is_available():
        raise BenchmarkError("The benchmark needs a Hopper GPU, and PyTorch finds no GPU here.")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        raise BenchmarkError(
            f"The benchmark needs a Hopper GPU (compute capability 9.0), and "
            f"{torch.cuda.get_device_name()} has {major}.{minor}."
        )
    nvrtc.cupy_cuda()  # says what is missing of CuPy


def main(argv=None) -> int:
    asked = (sys.argv[1:] if argv is None else argv) or WHAT
    try:
        prepare(asked)
    except (BenchmarkError, FlashMLAError) as error:
        print("cache.py: error:", *str(error).split(), file=sys.stderr)
        return 2
    print(torch.cuda.get_device_name())
    if "append" in asked:
        append(8192, 12)
        append(128, 61)
    if "host" in asked:
        host()
    if "order" in asked:
        order()
    return 0


if __name__ == "__main__":
    sys.exit(main())
