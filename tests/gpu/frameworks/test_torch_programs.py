"""PyTorch's CUDA graphs and compiler."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys

import pytest
from support.every_framework import decode, same_bits
from support.gpu.sides import arrays_of, cupy
from support.problems import make_problem

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata

pytestmark = pytest.mark.gpu


def in_another_process(code, *paths, **environment):
    """What a program prints that finds the tests' helpers, and the paths as sys.argv[1:]."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{code}"
    command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
    return done.stdout.split()[-1]


def test_torch_graph_is_right_for_other_lengths(torch):
    p = make_problem([300, 70, 129], s_q=2, h_q=16, causal=True)
    q, k_cache, table, lengths = arrays_of("torch", p)
    full = lengths.clone()
    decode(q, k_cache, table, lengths, causal=True)  # compiles and loads before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(q, k_cache, table, lengths, causal=True)
    for new in (full, full // 2, full * 0, torch.tensor([5, 64, 65]).int().cuda()):
        lengths.copy_(new)
        graph.replay()
        expected = decode(q, k_cache, table, new.clone(), causal=True)
        assert same_bits(out, expected[0])
        assert same_bits(lse, expected[1])


def test_torch_graph_with_outputs_of_the_caller_allocates_only_scratch(torch):
    arrays = arrays_of("torch", make_problem([300, 70], h_q=16))
    metadata = get_mla_metadata(arrays[3], 16, 1)
    out, lse = flash_mla_with_kvcache(*arrays, 512, *metadata)
    mine, my_lse = torch.empty_like(out), torch.empty_like(lse)
    pool = cupy.get_default_memory_pool().total_bytes()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_mla_with_kvcache(*arrays, 512, *metadata, out=mine, lse=my_lse)
    graph.replay()
    assert same_bits(mine, out)
    assert cupy.get_default_memory_pool().total_bytes() == pool


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(torch, mode):
    @torch.compile(fullgraph=True, dynamic=mode == "default", mode=mode)
    def step(q, k_cache, table, lengths):
        out, lse = decode(q * 2, k_cache, table, lengths, causal=True)
        return out + 0, lse + 0

    for lengths in ([300, 70, 129], [1, 64], [500]) if mode == "default" else ([300, 70],) * 4:
        q, *rest = arrays_of("torch", make_problem(lengths, s_q=2, h_q=16, causal=True))
        got = [x.clone() for x in step(q, *rest)]
        for mine, expected in zip(got, decode(q * 2, *rest, causal=True), strict=True):
            assert same_bits(mine, expected)


def test_torch_opcheck(torch):
    from flashmla_cupy.traced import torch_op  # noqa: F401 (registers the ops)

    arrays = arrays_of("torch", make_problem([70, 5], s_q=2, h_q=4))
    metadata = get_mla_metadata(arrays[3], 8, 1)
    for op, args in (
        (torch.ops.flashmla_cupy.metadata, (arrays[3], 8, 1)),
        (torch.ops.flashmla_cupy.decode, (*arrays, *metadata, 0.04, True)),
    ):
        results = torch.library.opcheck(op.default, args)
        assert set(results.values()) == {"SUCCESS"}, results


UNPICKLED = """
import pickle, torch
from flashmla_cupy import check, flash_mla_with_kvcache
arrays = [x.cuda() for x in torch.load(sys.argv[1])]
with open(sys.argv[2], "rb") as file:
    sched_meta = pickle.load(file)
assert not sched_meta.have_initialized
out, _ = flash_mla_with_kvcache(*arrays, 512, sched_meta, causal=True)
check()
print(out.float().sum().item())
"""


def test_a_bound_sched_meta_in_another_process(torch, tmp_path):
    """Its arrays, and so their addresses, stay behind."""
    arrays = arrays_of("torch", make_problem([300, 70], s_q=2, h_q=16))
    sched_meta, _ = get_mla_metadata()
    out, _ = flash_mla_with_kvcache(*arrays, 512, sched_meta, causal=True)
    assert sched_meta.have_initialized
    inputs, pickled = tmp_path / "inputs.pt", tmp_path / "sched_meta"
    torch.save([x.cpu() for x in arrays], inputs)
    pickled.write_bytes(pickle.dumps(sched_meta))
    assert float(in_another_process(UNPICKLED, inputs, pickled)) == out.float().sum().item()


LOADED = {
    "export": "program = torch.export.load(sys.argv[2]).module()",
    "aoti": "program = torch._inductor.aoti_load_package(sys.argv[2])",
}
RUN = """
import flashmla_cupy, torch
flashmla_cupy.register_torch_ops()
{loaded}
print("loaded", flush=True)
arrays = [x.cuda() for x in torch.load(sys.argv[1])]
out, _ = program(*arrays)
print("called", flush=True)
flashmla_cupy.check()
print(out.float().sum().item())
"""


def package(torch, program, path):
    """Makes a package of AOTInductor."""
    # Neither of the two is of use here, and together they take minutes.
    less = {"cpp.vec_isa_ok": True, "aot_inductor.precompile_headers": False}
    with torch._inductor.config.patch(less):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


@pytest.mark.parametrize("kind", ["export", "aoti"])
def test_a_saved_program_in_another_process(torch, tmp_path, kind):
    if kind == "aoti" and shutil.which("g++") is None:
        pytest.skip("AOTInductor needs g++")

    class Layer(torch.nn.Module):
        def forward(self, *arrays):
            return decode(*arrays, causal=True)

    arrays = arrays_of("torch", make_problem([300, 70], s_q=2, h_q=16))
    expected, _ = decode(*arrays, causal=True)
    program = torch.export.export(Layer(), tuple(arrays))
    path, inputs = tmp_path / "layer.pt2", tmp_path / "inputs.pt"
    if kind == "export":
        torch.export.save(program, path)
    else:
        package(torch, program, path)
    torch.save([x.cpu() for x in arrays], inputs)
    code = RUN.format(loaded=LOADED[kind])
    try:
        found = in_another_process(code, inputs, path)
    except AssertionError:
        if kind != "aoti":
            raise
        # Some installations load no package otherwise: docs/frameworks/pytorch.md.
        found = in_another_process(code, inputs, path, LD_PRELOAD="libstdc++.so.6")
    assert float(found) == expected.float().sum().item()
