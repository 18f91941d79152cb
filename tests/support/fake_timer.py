"""A pretended H200 for `bench`: ceilings, and a time for every decode call."""

from __future__ import annotations

from flashmla_cupy.bench import run as bench_run
from flashmla_cupy.bench import timer as bench_gpu
from flashmla_cupy.build import nvrtc


class Timer:
    """Stands for bench_gpu.GPUTimer: every decode call takes 100 us."""

    matmul: float | None = 500.0

    def __init__(self, num_sms):
        assert num_sms == 132

    def read_gbps(self):
        return 4000.0

    def matmul_tflops(self):
        return self.matmul

    def decode_us(self, case):
        return 100.0

    def peers_us(self, case, peers):
        return 100.0, dict.fromkeys(peers.names, 125.0)


def install(monkeypatch) -> type[Timer]:
    """Makes `bench` use a class of its own, which is returned: a test may change it."""
    kind = type("Timer", (Timer,), {})
    facts = {"name": b"H200", "multiProcessorCount": 132}
    monkeypatch.setattr(bench_run, "current_gpu", lambda: facts)
    monkeypatch.setattr(bench_gpu, "GPUTimer", kind)
    monkeypatch.setattr(nvrtc, "build", lambda: "13.0")
    return kind
