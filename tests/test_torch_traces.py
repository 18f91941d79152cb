"""What PyTorch's tracers do to a call: threads that trace something else, fake tensors, export,
saved programs, nested tensors, and arguments that a compiled call must refuse as an eager one."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from support.every_framework import decode, put, same_bits
from support.problems import make_problem

from flashmla_cupy import (
    OptionError,
    append_mla_kv,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    merge_partials,
)
from flashmla_cupy.frameworks import HOST
from flashmla_cupy.schedule.sched_meta import SchedMeta

torch = pytest.importorskip("torch")
PROBLEM = make_problem([70, 5], s_q=2, h_q=4, causal=True)


def tensors():
    return [put("torch", x, HOST) for x in PROBLEM.arrays()]


def step(*arrays):
    return decode(*arrays, None, True)


EXPECTED = step(*tensors())


class Layer(torch.nn.Module):
    def forward(self, *arrays):
        return step(*arrays)


class Unrelated(torch.nn.Module):
    def forward(self, x):
        return torch.sin(x) + 1


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def assert_expected(results):
    for got, want in zip(results, EXPECTED, strict=True):
        assert same_bits(got, want)


# --- who is tracing ----------------------------------------------------------------------------


def test_an_eager_call_while_the_process_traces(monkeypatch):
    """PyTorch's flag speaks for all threads; a call of a thread that traces nothing stays eager."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    assert_expected(step(*tensors()))


def test_eager_calls_beside_a_thread_that_exports():
    done, failed = threading.Event(), []

    def export():
        try:
            for _ in range(3):
                torch.export.export(Unrelated(), (torch.ones(3),))
                torch.compile(Unrelated(), backend="aot_eager")(torch.ones(3))
        finally:
            done.set()

    thread = threading.Thread(target=export)
    thread.start()
    arrays = tensors()
    while not done.is_set():
        try:
            assert_expected(step(*arrays))
        except Exception as error:
            failed.append(error)
    thread.join()
    assert failed == []


def test_a_call_inside_a_custom_backend():
    def backend(graph, inputs):
        assert_expected(step(*tensors()))
        return graph.forward

    torch.compile(Unrelated(), backend=backend)(torch.ones(3))


@pytest.mark.parametrize("export", ["strict", "not strict", "draft"])
def test_exports(export):
    arrays = tuple(tensors())
    if export == "draft":
        program = torch.export.draft_export(Layer(), arrays)
    else:
        program = torch.export.export(Layer(), arrays, strict=export == "strict")
    names = [str(node.target) for node in program.graph.nodes]
    assert any("flashmla_cupy.decode" in name for name in names)
    assert_expected(program.module()(*arrays))


def test_a_trace_of_real_tensors_holds_the_op():
    from torch.fx.experimental.proxy_tensor import make_fx

    arrays = tensors()
    for _ in range(3):  # the signature was seen, and yet the call belongs to the trace
        step(*arrays)
    graph = make_fx(step)(*arrays)
    assert "flashmla_cupy.decode" in str(graph.code)
    assert_expected(graph(*arrays))


# --- saved programs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        "import torch, flashmla_cupy",
        "import flashmla_cupy, torch; flashmla_cupy.register_torch_ops()",
    ],
)
def test_a_saved_program_loads_in_another_process(tmp_path, first):
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(Layer(), tuple(tensors())), path)
    inputs = tmp_path / "inputs.pt"
    torch.save(tensors(), inputs)
    code = (
        f"{first}; program = torch.export.load({str(path)!r}).module();"
        f"out, _ = program(*torch.load({str(inputs)!r})); print(out.float().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == EXPECTED[0].float().sum().item()


# --- compiled calls refuse what eager calls refuse ---------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"softmax_scale": True}, "ArgTypeError.*'softmax_scale'"),
        ({"softmax_scale": -1.0}, "ScalarError.*'softmax_scale'"),
        ({"causal": 1}, "ArgTypeError.*'causal'"),
        ({"causal": 2}, "ArgTypeError.*'causal'"),
        ({"causal": None}, "ArgTypeError.*'causal'"),
        ({"head_dim_v": 576}, "ShapeError.*'head_dim_v'"),
        ({"num_splits": None}, "ArgTypeError.*'num_splits'"),
        ({"q": lambda a: a[0][0]}, "ShapeError.*'q'"),
        ({"k_cache": lambda a: a[1][:, :, 0]}, "ShapeError.*'k_cache'"),
        ({"block_table": lambda a: a[2][0]}, "ShapeError.*'block_table'"),
        ({"cache_seqlens": lambda a: a[3][None]}, "ShapeError.*'cache_seqlens'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_compiled_call_refuses_it_by_name(bad, words):
    arrays = tensors()
    metadata, num_splits = get_mla_metadata(arrays[3], 8, 1)
    call = dict(zip(("q", "k_cache", "block_table", "cache_seqlens"), arrays, strict=True))
    call |= {"head_dim_v": 512, "tile_scheduler_metadata": metadata, "num_splits": num_splits}
    call |= {name: value(arrays) if callable(value) else value for name, value in bad.items()}
    compiled = torch.compile(flash_mla_with_kvcache, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=words):
        compiled(**call)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words.partition(".*")[2].strip("'")):  # the eager error
        torch.compile(flash_mla_with_kvcache, backend="aot_eager")(**call)


# --- torch.jit.trace, which would record nothing of a call --------------------------------------


@pytest.mark.parametrize("calls_before", [0, 3])
def test_a_jit_trace_is_refused(calls_before):
    q, k_cache, table, lengths = tensors()
    rows, slots = torch.zeros(1, 576, dtype=k_cache.dtype), torch.tensor([0])
    lists = torch.zeros(2, 1, 8, dtype=torch.int32)
    calls = {
        "get_mla_metadata": (lambda x: get_mla_metadata(x, 8, 1), lengths),
        "flash_mla_with_kvcache": (
            lambda x: flash_mla_with_kvcache(x, k_cache, table, lengths, 512, SchedMeta()),
            q,
        ),
        "flash_mla_sparse_fwd": (
            lambda x: flash_mla_sparse_fwd(x, k_cache[:1, 0], lists, 0.1),
            q[0],
        ),
        "append_mla_kv": (lambda x: append_mla_kv(x, rows, slots), k_cache.clone()),
    }
    for function, (call, x) in calls.items():
        for _ in range(calls_before):  # one that is known is refused, too
            call(x)
        with pytest.raises(OptionError, match=r"inside of torch\.jit\.trace") as caught:
            torch.jit.trace(call, x)
        assert caught.value.function == function
        call(x)


def test_fake_tensors_and_export_merge_partials():
    outs = torch.rand(2, 1, 1, 4, 512)
    lses = torch.rand(2, 1, 4, 1)
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        out, lse = merge_partials(mode.from_tensor(outs), mode.from_tensor(lses))
    assert (out.shape, lse.shape) == ((1, 1, 4, 512), (1, 4, 1))

    class Merge(torch.nn.Module):
        def forward(self, outs, lses):
            return merge_partials(outs, lses)

    program = torch.export.export(Merge(), (outs, lses), strict=False)
    assert same_bits(program.module()(outs, lses)[0], merge_partials(outs, lses)[0])


# --- tensors that have no strides --------------------------------------------------------------

NESTED = """
import sys, torch
sys.path[:0] = {path!r}
from support.every_framework import put
from support.problems import make_problem
from flashmla_cupy import ArgumentError, flash_mla_with_kvcache, get_mla_metadata
arrays = [put("torch", x, -1) for x in make_problem([70, 70], s_q=1, h_q=4).arrays()]
metadata = get_mla_metadata(arrays[3], 4, 1)
def decode(*arrays):
    return flash_mla_with_kvcache(*arrays, 512, *metadata)
for _ in range(3):
    decode(*arrays)
for i in range(4):
    bad = list(arrays)
    bad[i] = torch.nested.nested_tensor(list(arrays[i]), layout=torch.strided)
    try:
        decode(*bad)
    except ArgumentError as error:
        print(error.argument)
"""


def test_nested_tensors_are_refused_after_ordinary_calls():
    """In another process, since a C++ guard that met one ended the process."""
    code = NESTED.format(path=sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["q", "k_cache", "block_table", "cache_seqlens"]


def test_other_strides_of_contiguous_arguments_are_another_signature():
    """The signature holds the strides of all arrays, of the lengths too."""
    q, k_cache, table, lengths = tensors()
    for _ in range(3):
        step(q, k_cache, table, lengths)
    gaps = torch.zeros(4, dtype=torch.int32)[::2]
    gaps[:] = lengths
    metadata = get_mla_metadata(lengths, 8, 1)
    for _ in range(3):
        flash_mla_with_kvcache(q, k_cache, table, lengths, 512, *metadata)
    with pytest.raises(ValueError, match="cache_seqlens: expected a C-contiguous array"):
        flash_mla_with_kvcache(q, k_cache, table, gaps, 512, *metadata)
    assert np.isfinite(EXPECTED[1].numpy()).all()


MODULES_THAT_LOAD = """
import itertools, sys, types
import torch
from flashmla_cupy import get_mla_metadata

class Lazy(types.ModuleType):  # as importlib's lazy modules: to look at one is to load it
    numbers = itertools.count()

    @property
    def __class__(self):
        name = f"loaded_by_a_look_{next(Lazy.numbers)}"
        sys.modules[name] = types.ModuleType(name)
        return types.ModuleType

def step(lengths):
    return get_mla_metadata(lengths, 16, 1)

sys.modules["lazy"] = Lazy("lazy")
torch.compile(step, fullgraph=True, backend="eager")(torch.tensor([5, 6], dtype=torch.int32))
"""


def test_modules_that_load_when_they_are_looked_at():
    """A trace does not go through sys.modules, where CuPy keeps cupyx unloaded, for one."""
    subprocess.run([sys.executable, "-c", MODULES_THAT_LOAD], check=True)
