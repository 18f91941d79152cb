"""What a call costs the host, and what a compiled one adds on the device."""

from __future__ import annotations

import statistics
import time

import pytest
from support.gpu.sides import arrays_of, cupy
from support.problems import make_problem

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

pytestmark = pytest.mark.gpu


def host_microseconds(call, synchronize, bursts=200, burst=50) -> float:
    """The median over bursts into an idle queue, once the host runs at its speed."""
    times, begin = [], time.perf_counter()
    while time.perf_counter() < begin + 0.5:
        call()
    for _ in range(bursts):
        synchronize()
        start = time.perf_counter()
        for _ in range(burst):
            call()
        times.append((time.perf_counter() - start) / burst * 1e6)
    synchronize()
    return statistics.median(times)


@pytest.mark.parametrize("name", ["cupy", "torch"])
@pytest.mark.parametrize("outputs", ["new", "given"])
def test_host_time_of_an_eager_call(name, outputs):
    """Beside what the framework itself takes: for an addition, and to make the two results."""
    library = pytest.importorskip(name)
    arrays = arrays_of(name, make_problem([300, 70], h_q=128))
    metadata = get_mla_metadata(arrays[3], 128, 1)
    out, lse = flash_mla_with_kvcache(*arrays, 512, *metadata)
    given = {"out": out, "lse": lse} if outputs == "given" else {}
    synchronize = cupy.cuda.Device().synchronize
    took = host_microseconds(
        lambda: flash_mla_with_kvcache(*arrays, 512, *metadata, **given), synchronize
    )
    x = arrays[3] + 0
    add = host_microseconds(lambda: x.__iadd__(1), synchronize)
    place = {"device": "cuda"} if name == "torch" else {}
    make = host_microseconds(
        lambda: (
            library.empty(out.shape, dtype=out.dtype, **place),
            library.empty(lse.shape, dtype=lse.dtype, **place),
        ),
        synchronize,
    )
    inside = host_microseconds(
        lambda: flash_mla_with_kvcache(*arrays, 512, get_mla_metadata()[0], **given), synchronize
    )
    print(
        f"\n{name}, outputs {outputs}: {took:.1f} us of host time a call, {inside:.1f} with the "
        f"schedule made inside; {add:.1f} for x += 1, {make:.1f} to make out and lse"
    )
    assert took <= 15
    assert inside <= 25


def test_host_time_of_a_compiled_call(torch):
    """In a graph, the whole program against the bare calls: what the op adds on the device. As in a
    server, all arrays but q stay where they are, or the graph would copy them, the cache too."""
    arrays = arrays_of("torch", make_problem([300, 70], h_q=128))
    metadata = get_mla_metadata(arrays[3], 128, 1)
    for x in (*arrays[1:], *metadata):
        torch._dynamo.mark_static_address(x)

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def step(*arrays):
        return flash_mla_with_kvcache(*arrays[:4], 512, *arrays[4:])

    for _ in range(5):
        step(*arrays, *metadata)
    flash_mla_with_kvcache(*arrays, 512, *metadata)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_mla_with_kvcache(*arrays, 512, *metadata)

    def device_microseconds(call, repeats=20):
        """Behind a delay of the stream, so that the host, however slow, is ahead."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)  # some 50 ms
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / repeats

    compiled = device_microseconds(lambda: step(*arrays, *metadata))
    bare = device_microseconds(graph.replay)
    print(f"\ncompiled {compiled:.1f} us a call, the bare graph {bare:.1f} us")
    assert compiled <= bare + 12
