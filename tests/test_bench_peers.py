"""`bench --peers` without a GPU: stand-ins for the peers, which compute with what they are given.

That the real ones take the same shows on a GPU where they are installed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import json
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from support import fake_timer

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.__main__ import main
from flashmla_cupy.bench import cases as bench
from flashmla_cupy.bench import peers as bench_peers
from flashmla_cupy.bench import timer as bench_gpu
from flashmla_cupy.errors import OptionError

CASE = bench.Case("two", 2, 2, 3, (300, 70), "given", causal=True)


def install(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def none_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in bench_peers.PEERS and name not in sys.modules else find(name),
    )


def problem_of(case):
    rng = np.random.default_rng(3)
    pages = [-(-n // case.page_size) for n in case.lengths]
    normal = lambda *shape: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)  # noqa: E731
    return bench_gpu.Problem(
        case=case,
        q=normal(case.batch, case.s_q, case.h_q, 576),
        k_cache=normal(3 * sum(pages), case.page_size, 1, 576),
        block_tables=bench_gpu.block_tables(pages, copies=3),
        cache_seqlens=np.array(case.lengths, np.int32),
        out=None,
        lse=None,
    )


def expected(problem, block_table):
    arrays = problem.q, problem.k_cache, block_table, problem.cache_seqlens
    metadata = get_mla_metadata(arrays[3], problem.case.s_q * problem.case.h_q, 1)
    out, _ = flash_mla_with_kvcache(*arrays, 512, *metadata, causal=problem.case.causal)
    return out


def array(x, torch):
    """The NumPy array of a tensor."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def fake_flash_mla(torch):
    def decode(q, k_cache, block_table, lengths, head_dim_v, metadata, num_splits, causal):
        assert (metadata, num_splits) == ("metadata of 6 rows", None)
        arrays = [array(x, torch) for x in (q, k_cache, block_table, lengths)]
        made = get_mla_metadata(arrays[3], 6, 1)
        out, lse = flash_mla_with_kvcache(*arrays, head_dim_v, *made, causal=causal)
        return torch.from_dlpack(out.view(np.uint16)).view(torch.bfloat16), lse

    def metadata(lengths, rows, h_kv):
        assert h_kv == 1
        return f"metadata of {rows} rows", None

    return {"flash_mla_with_kvcache": decode, "get_mla_metadata": metadata}


class FakeWrapper:
    """Stands for flashinfer.mla.BatchMLAPagedAttentionWrapper."""

    torch = None

    def __init__(self, workspace, backend):
        assert workspace.numel() >= 128 << 20
        assert backend == "fa3"

    def plan(
        self, q_ends, page_ends, indices, lengths, heads, latent, rotary, page, causal, scale, *t
    ):
        assert (latent, rotary, t) == (512, 64, (self.torch.bfloat16,) * 2)
        pages = [indices[a:b] for a, b in itertools.pairwise(page_ends)]
        self.table = np.zeros((len(pages), max(map(len, pages))), np.int32)
        for row, used in zip(self.table, pages, strict=True):
            row[: len(used)] = used
        self.s_q, self.heads, self.page = int(q_ends[1]), heads, page
        self.lengths, self.causal, self.scale = lengths.numpy(), causal, scale

    def run(self, q_latent, q_rotary, latent, rotary):
        join = lambda *x: array(self.torch.cat(x, -1), self.torch)  # noqa: E731
        q = join(q_latent, q_rotary).reshape(-1, self.s_q, self.heads, 576)
        k_cache = join(latent, rotary)[:, :, None]
        assert k_cache.shape[1] == self.page
        out, _ = flash_mla_with_kvcache(
            *(q, k_cache, self.table, self.lengths, 512),
            *get_mla_metadata(self.lengths, self.s_q * self.heads, 1),
            softmax_scale=self.scale,
            causal=self.causal,
        )
        out = self.torch.from_dlpack(out.view(np.uint16)).view(self.torch.bfloat16)
        return out.flatten(0, 1)


@pytest.fixture
def peers(monkeypatch, none_installed):
    torch = pytest.importorskip("torch")
    install(monkeypatch, "flash_mla", **fake_flash_mla(torch))
    install(monkeypatch, "flashinfer")
    monkeypatch.setattr(FakeWrapper, "torch", torch)
    install(monkeypatch, "flashinfer.mla", BatchMLAPagedAttentionWrapper=FakeWrapper)
    return bench_peers.Peers()


@pytest.mark.parametrize("name", bench_peers.PEERS)
def test_a_peer_gets_the_problem(peers, name):
    assert name in peers.names
    problem = problem_of(CASE)
    results = [call() for call in peers.calls(name, problem)]
    wanted = [expected(problem, table) for table in problem.block_tables]
    assert len(results) == 3
    for i, result in enumerate(results):
        assert [peers.agrees(result, want) for want in wanted] == [i == j for j in range(3)]


def test_pages_that_flash_mla_does_not_have(peers):
    case = bench.with_page_sizes([CASE], [16])[0]
    with pytest.raises(bench_peers.CannotRun, match="64"):
        peers.calls("flash_mla", problem_of(case))
    problem = problem_of(case)
    first = peers.calls("flashinfer", problem)[0]()
    assert peers.agrees(first, expected(problem, problem.block_tables[0]))


def test_the_columns_of_peers(monkeypatch, capsys, tmp_path, peers):
    timer = fake_timer.install(monkeypatch)
    results = tmp_path / "results.json"
    assert main(["bench", "--cases", "mem.h8", "--peers", "--json", str(results)]) == 0
    head, line = capsys.readouterr().out.splitlines()[-2:]
    assert head.split()[-4:] == ["flash_mla", "ratio", "flashinfer", "ratio"]
    assert line.split()[-4:] == ["125.0", "0.80", "125.0", "0.80"]
    row = json.loads(results.read_text())["cases"][0]
    assert row["peers_us"] == {"flash_mla": 125.0, "flashinfer": 125.0}

    timer.peers_us = lambda self, case, peers: (
        100.0,
        {"flash_mla": "it broke", "flashinfer": 50.0},
    )
    assert main(["bench", "--cases", "mem.h8", "--peers"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split()[-4:] == ["-", "-", "50.0", "2.00"]
    assert "mem.h8.b128.s4096: flash_mla: it broke" in err


def test_without_peers(none_installed, capsys):
    with pytest.raises(OptionError, match=r"--peers: .*flash_mla, flashinfer"):
        bench_peers.Peers()
    assert main(["bench", "--peers"]) == 2
    assert "leave --peers out" in capsys.readouterr().err
