"""The adapters: facts without copies, mixed frameworks named, and other frameworks by DLPack."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from support.every_framework import decode, get, put, same_bits
from support.fake_device import FakeEngine, forget_calls
from support.foreign import Foreign
from support.problems import make_problem

from flashmla_cupy import flash_mla_with_kvcache, frameworks, get_mla_metadata
from flashmla_cupy.errors import (
    ArgTypeError,
    DeviceMismatchError,
    FrameworkMismatchError,
    MissingDependencyError,
    NoDeviceError,
    OptionError,
    ReadOnlyError,
    StrideError,
)
from flashmla_cupy.formats import codes
from flashmla_cupy.frameworks import (
    HOST,
    cupy_arrays,
    framework,
    framework_of,
    is_foreign,
    numpy_arrays,
)
from flashmla_cupy.gpu import engine as engine_module

BF16 = np.dtype(ml_dtypes.bfloat16)
PROBLEM = make_problem([70, 5, 0], s_q=2, h_q=4, causal=True)


def foreign(x: np.ndarray) -> Foreign:
    """x as a foreign array, bfloat16 with the help of torch."""
    if x.dtype == BF16:
        pytest.importorskip("torch")
        return Foreign(put("torch", x, HOST))
    return Foreign(x)


# --- which framework ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["flashmla_cupy", "flashmla_cupy.interface"])
def test_importing_the_package_imports_no_other_framework(first):
    code = f"import sys, {first}; print([m for m in ('torch', 'jax', 'cupy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_arrays_and_their_subclasses_are_found(name):
    module = pytest.importorskip(name)
    assert framework_of(put(name, np.zeros(3, np.float32), HOST), "q") is framework(name)
    if name == "numpy":
        assert framework_of(np.zeros(3).view(np.recarray), "q") is framework(name)
        with pytest.raises(ArgTypeError, match="without a mask"):
            framework_of(np.ma.zeros(3), "q")
    if name == "torch":
        assert framework_of(module.nn.Parameter(module.zeros(3)), "q") is framework(name)
    if name == "jax":
        seen = []
        module.jit(lambda x: seen.append(framework_of(x, "q")) or x)(np.zeros(3))
        assert seen == [framework(name)]


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_the_host_has_one_stream(name):
    """A PyTorch without CUDA has no stream to ask for; one with CUDA asks for a driver."""
    module = pytest.importorskip(name)
    if name == "torch" and module.backends.cuda.is_built():
        pytest.skip("this PyTorch is built with CUDA, and nobody asks it for a stream of the host")
    assert framework(name).stream(HOST) == 0


@pytest.mark.parametrize("value", [None, 1.5, [1, 2], "q", object()])
def test_what_is_no_array(value):
    assert not is_foreign(value)
    remedy = "This call needs q: pass it" if value is None else "Put the data into an array first"
    with pytest.raises(ArgTypeError, match=remedy):
        framework_of(value, "q")


# Every ordered pair of frameworks, and each array argument in turn as the odd one out.
ODD = ("k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits", "out")


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("name", "other"), [*itertools.permutations(("numpy", "torch", "jax"), 2)])
def test_mixed_frameworks_are_both_named(name, other, odd):
    if odd == "out" and name == "jax":
        odd = "num_splits"  # out is refused as such
    pytest.importorskip(name)
    pytest.importorskip(other)
    metadata, num_splits = get_mla_metadata(PROBLEM.cache_seqlens, PROBLEM.rows, 1)
    names = ("q", "k_cache", "block_table", "cache_seqlens")
    arrays = dict(zip(names, PROBLEM.arrays(), strict=True))
    arrays |= {"tile_scheduler_metadata": metadata, "num_splits": num_splits}
    arrays["out"] = np.zeros((3, 2, 4, 512), BF16)
    call = {k: put(other if k == odd else name, v, HOST) for k, v in arrays.items()}
    if name == "jax":
        del call["out"]
    for _ in range(2):  # the pure call before must not let the mixed one through
        with pytest.raises(FrameworkMismatchError) as caught:
            flash_mla_with_kvcache(head_dim_v=512, causal=True, **call)
        assert caught.value.argument == odd
        assert f"a {name} array, as q is, got a {other} array" in str(caught.value)
        pure = {k: put(name, arrays[k], HOST) for k in call}
        flash_mla_with_kvcache(head_dim_v=512, causal=True, **pure)


# --- facts -------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_find_one_adapter(monkeypatch):
    """Another one comes in between, while the first makes it."""

    def interrupted(make, ask):
        between = [ask]

        def made(*of):
            if between:
                found.append(between.pop()("numpy"))
            return make(*of)

        return made

    found = []
    monkeypatch.setattr(frameworks, "_instances", {})
    monkeypatch.setattr(numpy_arrays, "NumPy", interrupted(numpy_arrays.NumPy, framework))
    found.append(framework("numpy"))
    monkeypatch.setattr(codes, "_found", {})
    monkeypatch.setitem(codes._KINDS, "numpy", interrupted(codes.Codes, codes.codes_of))
    found.append(codes.codes_of("numpy"))
    assert found[0] is found[1] and found[2] is found[3]


def test_a_field_of_a_structured_array_has_no_whole_strides():
    x = np.zeros(4, [("a", np.int32), ("b", np.int16)])["a"]
    with pytest.raises(StrideError, match="multiples of the itemsize"):
        framework("numpy").describe(x, "cache_seqlens")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "uint8", "int64"])
def test_torch_facts(dtype):
    torch = pytest.importorskip("torch")
    x = torch.zeros(4, 6, dtype=getattr(torch, dtype))[1:, ::2]
    info = framework("torch").describe(x, "q")
    assert (info.ptr, info.shape, info.strides) == (x.data_ptr(), (3, 3), (6, 2))
    assert (info.dtype, info.device, info.readonly) == (dtype, HOST, False)


@pytest.fixture
def cupy(monkeypatch):
    """CuPy, as far as the adapter knows it: NumPy arrays whose memory lies on device 1."""

    class Memory(NamedTuple):
        ptr: int
        mem: SimpleNamespace
        device_id: int = 1

        def __add__(self, offset):
            return self._replace(ptr=self.ptr + offset)

    class ndarray:
        def __init__(self, shape, dtype=np.float64, memory=None):
            self.array = np.zeros(shape, dtype)
            self.data = memory or SimpleNamespace(ptr=self.array.ctypes.data, device_id=1)

        shape = property(lambda self: self.array.shape)
        strides = property(lambda self: self.array.strides)
        dtype = property(lambda self: self.array.dtype)
        ndim = property(lambda self: self.array.ndim)
        size = property(lambda self: self.array.size)

    used, addresses = [], itertools.count(1 << 40, 1 << 20)
    cuda = SimpleNamespace(
        Device=lambda device: nullcontext(used.append(device)),
        runtime=SimpleNamespace(getDevice=lambda: 0, streamIsCapturing=lambda stream: 0),
        get_current_stream=lambda device: SimpleNamespace(ptr=100 + device),
        alloc=lambda size: Memory(next(addresses), cuda.memory(size)),
        memory=lambda size: SimpleNamespace(size=size),
        MemoryAsync=type("MemoryAsync", (SimpleNamespace,), {}),
        Stream=None,
    )
    fake = SimpleNamespace(ndarray=ndarray, empty=ndarray, cuda=cuda, used=used)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(frameworks, "_instances", dict(frameworks._instances))
    monkeypatch.setattr(frameworks, "by_type", dict(frameworks.by_type))
    frameworks._instances.pop("cupy", None)
    forget_calls(monkeypatch)
    return fake


def test_cupy_calls_run_on_the_device_and_the_stream_that_is_current_there(cupy, monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(engine_module, "_engines", {1: engine})
    arrays = [cupy.ndarray(x.shape, x.dtype) for x in PROBLEM.arrays()]
    metadata, num_splits = get_mla_metadata(arrays[3], PROBLEM.rows, 1)
    for given in ({}, {}, {"out": cupy.ndarray((3, 2, 4, 512), BF16)}):
        out, lse = flash_mla_with_kvcache(*arrays, 512, metadata, num_splits, **given)
        assert isinstance(out, cupy.ndarray)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
            (3, 2, 4, 512), BF16, (3, 4, 2), np.float32,
        )  # fmt: skip
        what, stream, addresses, geometry, *_ = engine.launches[-1]
        assert (what, stream) == ("decode", 101)
        q, k_cache, table, lengths = arrays
        expected = [x.data.ptr for x in (q, k_cache, metadata, lengths, table, out, lse)]
        assert list(addresses[:7]) == expected
        assert addresses.scratch >= 1 << 40
        assert geometry.q_strides == (4608, 2304, 576, 1)
        assert given.get("out", out) is out
    assert [launch[:2] for launch in engine.launches] == [("schedule", 101)] + 3 * [("decode", 101)]
    assert cupy.used == [1] * 4  # for each, since device 0 is current


@pytest.mark.parametrize(("rows", "offset"), [(1, 1024), (3, 3072), (0, 0)])
def test_a_pair_of_cupy_arrays_shares_an_allocation(cupy, rows, offset):
    shapes = (rows, 1, 512), (rows, 1)
    pair = framework("cupy").pair_allocator(shapes, ("bfloat16", "float32"), 1)
    (out, lse), (other, _) = pair(), pair()
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
        *shapes[:1],
        BF16,
        shapes[1],
        np.float32,
    )
    assert lse.data.ptr - out.data.ptr == offset
    assert out.data.mem is lse.data.mem is not other.data.mem
    assert out.data.mem.size == offset + 4 * rows


def test_the_second_of_a_pair_is_aligned(cupy):
    pair = framework("cupy").pair_allocator(((5, 8), (7,)), ("int32", "int32"), 1)
    metadata, num_splits = pair()
    assert num_splits.data.ptr - metadata.data.ptr == 512 > 5 * 8 * 4


def test_scratch_of_a_cupy_capture_is_kept(cupy, monkeypatch):
    """A replay writes to it; the pool, which does not know, must not give it to anybody else."""
    adapter = framework("cupy")
    big, small = adapter.scratch_allocator(100, 1), adapter.scratch_allocator(40, 1)
    assert big()[1] != big()[1]
    capture = {"id": 7}
    monkeypatch.setattr(adapter, "_is_capturing", lambda stream: stream == 101)
    monkeypatch.setattr(cupy_arrays, "capture_id", lambda stream: capture["id"])
    first, address = small()
    assert small() == (first, address) == (first, first.ptr)
    grown, _ = big()
    assert grown is not first
    assert big()[0] is small()[0] is grown  # one for all calls, one behind another on the stream
    capture["id"] = 8
    assert big()[0] is not grown
    kept = [id(x) for rooms in adapter._graph_scratch.values() for x in rooms]
    assert id(first) in kept
    assert id(grown) in kept


def test_a_capture_with_cupys_asynchronous_pool_owns_no_memory(cupy, monkeypatch):
    """Memory that a graph allocates and does not free keeps it from being launched again. What
    outlives a call is therefore allocated on a stream that is not captured."""
    log = []

    class Stream:
        def __init__(self, non_blocking):
            assert non_blocking
            log.append("new")

        def __enter__(self):
            log.append("enter")

        def __exit__(self, *_):
            log.append("exit")

        def synchronize(self):
            log.append("wait")

    def memory(size):
        log.append(size)
        return cupy.cuda.MemoryAsync(size=size)

    monkeypatch.setattr(cupy.cuda, "memory", memory)
    monkeypatch.setattr(cupy.cuda, "Stream", Stream)
    monkeypatch.setattr(cupy_arrays, "RelaxedCapture", nullcontext)
    monkeypatch.setattr(cupy_arrays, "capture_id", lambda stream: 7)
    adapter = framework("cupy")
    wanted = {
        2048 + 16: adapter.pair_allocator(((4, 512), (4,)), ("uint8", "float32"), 1),
        16: adapter.allocator((4,), "float32", 1),
        400: adapter.scratch_allocator(100, 1),
    }
    for size, make in wanted.items():
        log.clear()
        make()
        assert log == [size]  # as any other memory, where nothing is captured
    monkeypatch.setattr(adapter, "_is_capturing", lambda stream: stream == 101)
    for i, (size, make) in enumerate(wanted.items()):
        log.clear()
        made = make()
        assert log == [size, *["new"] * (i == 0), "enter", size, "exit", "wait"]
        log.clear()
        if size == 400:  # scratch is kept, one for all calls
            assert make() == made and log == []


def test_cupy_with_another_framework_is_mixed(cupy):
    arrays = [cupy.ndarray(x.shape, x.dtype) for x in PROBLEM.arrays()]
    for kind in ("numpy", "torch"):
        if importlib.util.find_spec(kind):
            call = arrays[0], put(kind, PROBLEM.k_cache, HOST), *arrays[2:]
            match = f"a cupy array, as q is, got a {kind} array"
            with pytest.raises(FrameworkMismatchError, match=match):
                flash_mla_with_kvcache(*call, 512, get_mla_metadata()[0])


def test_torch_views_share_memory():
    torch = pytest.importorskip("torch")
    x = torch.zeros(4, 6, dtype=torch.bfloat16)
    framework("torch").to_numpy(x[:, 1:])[2, 0] = 3
    assert x[2, 1] == 3


def test_torch_tensors_without_memory():
    torch = pytest.importorskip("torch")

    class Wrapper(torch.Tensor):
        """As DTensor is: a tensor around others, at no address."""

        @staticmethod
        def __new__(cls, x):
            return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return NotImplemented

    describe = framework("torch").describe
    for x in (Wrapper(torch.zeros(3)), torch.zeros(3).to_sparse()):
        with pytest.raises(ArgTypeError, match="memory of its own"):
            describe(x, "q")
    with pytest.raises(DeviceMismatchError, match="one on meta"):
        describe(torch.zeros(3, device="meta"), "q")
    assert describe(torch.zeros(0, 3), "q").ptr == 0  # an empty tensor has no address either


def test_torch_gradients_are_refused_with_the_reason():
    torch = pytest.importorskip("torch")
    q, *rest = (put("torch", x, HOST) for x in PROBLEM.arrays())
    expected = decode(q, *rest)
    q.requires_grad_()
    for _ in range(2):  # although this signature was seen
        with pytest.raises(OptionError, match=r"q: .* no backward pass, .* q\.detach\(\)"):
            decode(q, *rest)
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            assert same_bits(decode(q, *rest)[0], expected[0])
    assert same_bits(decode(q.detach(), *rest)[0], expected[0])
    with torch.inference_mode():
        inputs = [x.clone() for x in (q, *rest)]
    assert same_bits(decode(*inputs)[0], expected[0])


# --- DLPack ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_foreign_arrays_give_numpy_results_without_a_copy(dtype):
    p = make_problem([70, 5], h_q=4, dtype=dtype)
    arrays = [foreign(x) for x in p.arrays()]
    out, lse = decode_foreign(p, arrays)
    expected = decode(*p.arrays())
    assert type(out) is np.ndarray
    assert same_bits(out, expected[0])
    assert same_bits(lse, expected[1])
    assert all(x.exports for x in arrays)
    from flashmla_cupy.frameworks.dlpack import from_dlpack

    view = from_dlpack(arrays[1], "k_cache")
    source = arrays[1].array
    address = source.data_ptr() if hasattr(source, "data_ptr") else source.ctypes.data
    assert view.ctypes.data == address
    assert view.dtype.name == dtype
    assert view.flags.writeable  # as its owner says; so it can be an output


def decode_foreign(p, arrays, **options):
    metadata, num_splits = get_mla_metadata(arrays[3], p.rows, p.h_kv)
    return flash_mla_with_kvcache(*arrays, 512, metadata, num_splits, **options)


def test_foreign_and_numpy_arrays_may_mix_and_outputs_are_the_callers():
    p = make_problem([70, 5], h_q=4, dtype="float16")
    expected = decode(*p.arrays())
    lse = Foreign(np.zeros((2, 4, 1), np.float32))
    out, same = decode_foreign(p, [foreign(p.q), *p.arrays()[1:]], lse=lse)
    assert same is lse
    assert same_bits(out, expected[0])
    assert same_bits(lse.array, expected[1])


def test_foreign_outputs_that_are_read_only():
    p = make_problem([70, 5], h_q=4, dtype="float16")
    lse = np.zeros((2, 4, 1), np.float32)
    lse.flags.writeable = False

    class Unversioned(Foreign):
        def __dlpack__(self, **_):
            return self.array.__dlpack__(max_version=(1, 0))

    with pytest.raises(ReadOnlyError, match="lse"):
        decode_foreign(p, list(p.arrays()), lse=Unversioned(lse))


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_foreign_outputs_are_written(dtype, versioned):
    """bfloat16 too, and those of producers that cannot say whether they may be written."""
    p = make_problem([70, 5], h_q=4, dtype=dtype)
    expected = decode(*p.arrays())
    out = foreign(np.zeros_like(expected[0]))

    class Unversioned(type(out)):
        def __dlpack__(self, **options):
            if options:
                raise TypeError("no options")
            return super().__dlpack__()

    if not versioned:
        out.__class__ = Unversioned
    returned, _ = decode_foreign(p, list(p.arrays()), out=out)
    assert returned is out
    assert same_bits(get(out.array), expected[0])


@pytest.mark.parametrize(
    "producer",
    [
        lambda torch: torch.zeros(3, dtype=torch.float8_e4m3fn),
        lambda torch: torch.zeros(3, dtype=torch.complex32),
        lambda torch: None,
    ],
    ids=["fp8", "complex32", "raises"],
)
def test_foreign_producers_that_cannot_export(producer):
    torch = pytest.importorskip("torch")
    array = producer(torch)

    class Producer:
        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **options):
            if array is None:
                raise ZeroDivisionError("its own error")
            return array.__dlpack__(**options)

    with pytest.raises(ArgTypeError, match=r"cache_seqlens: expected an array that exports itself"):
        get_mla_metadata(Producer(), 16, 1)


def test_foreign_on_a_gpu_without_a_driver(monkeypatch):
    no_driver = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "cupy", no_driver)
    monkeypatch.setattr(
        "flashmla_cupy.frameworks._ADAPTERS", {"numpy": ("ndarray", "numpy_arrays", "NumPy")}
    )
    with pytest.raises(NoDeviceError, match="cache_seqlens lies on a CUDA device"):
        get_mla_metadata(Foreign(np.zeros(3, np.int32), (2, 0)), 16, 1)


def test_foreign_with_torch_is_mixed():
    torch = pytest.importorskip("torch")
    p = make_problem([70, 5], h_q=4, dtype="float16")
    arrays = [foreign(p.q), *(torch.from_numpy(x) for x in p.arrays()[1:])]
    with pytest.raises(FrameworkMismatchError, match="a numpy array, as q is, got a torch array"):
        decode_foreign(p, arrays)


def test_foreign_on_a_gpu_needs_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingDependencyError, match="cache_seqlens lies on a GPU"):
        get_mla_metadata(Foreign(np.zeros(3, np.int32), (2, 0)), 16, 1)


def test_foreign_on_another_device():
    with pytest.raises(DeviceMismatchError, match=r"get_mla_metadata\(\).* device type 8"):
        get_mla_metadata(Foreign(np.zeros(3, np.int32), (8, 0)), 16, 1)


def test_results_flow_on_through_dlpack():
    """NumPy's float32 lse, torch's and JAX's bfloat16 out, into one another without a copy."""
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    out, lse = decode(*(put("torch", x, HOST) for x in PROBLEM.arrays()))
    assert np.from_dlpack(lse).ctypes.data == lse.data_ptr()
    assert same_bits(jax.dlpack.from_dlpack(out), out)
    j_out, _ = decode(*(put("jax", x, HOST) for x in PROBLEM.arrays()))
    t_out = torch.from_dlpack(j_out)
    assert t_out.data_ptr() == j_out.unsafe_buffer_pointer()
    assert get(t_out).tobytes() == get(out).tobytes()
