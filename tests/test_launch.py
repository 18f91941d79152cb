"""What launches hand to the kernels, read against the CUDA sources; no GPU.

The driver is replaced by one that accepts everything. That the kernels compute the right thing from
it is the business of tests/gpu.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import struct
import threading
import types
from pathlib import Path

import pytest

from flashmla_cupy import locks, sizes
from flashmla_cupy.build import compiler
from flashmla_cupy.errors import ForkedProcessError
from flashmla_cupy.frameworks import ArrayInfo
from flashmla_cupy.gpu import (
    combine_grid,
    decode_launch,
    driver,
    launch_graph,
    reports,
    tensor_maps,
)
from flashmla_cupy.gpu import engine as engine_module
from flashmla_cupy.gpu.gather_kernels import FEW_ROWS, gather_kernel
from flashmla_cupy.gpu.geometry import Addresses, Geometry
from flashmla_cupy.gpu.kernels import (
    COMBINE,
    DENSE_DECODE,
    FEW_ROWS_DECODE,
    KERNELS,
    ROWS_PER_BLOCK_OF_FEW,
    SCHEDULE,
    Variant,
    decode_kernel,
)
from flashmla_cupy.gpu.parameters import Arguments, Parameters
from flashmla_cupy.schedule import split as schedule

SOURCES = Path(__file__).parent.parent / "cuda_src"
SIZES = {"int": "i", "float": "f", "int64_t": "q", "uint64_t": "Q"}


def source(name: str) -> str:
    return (SOURCES / name).read_text()


def preprocessed(text: str, defines: tuple[str, ...]) -> str:
    """What a compiler with these macros sees of a source whose conditions are all #if defined()."""
    lines, taken = [], []  # taken: of each open condition, whether its branch is
    names = dict(define.split("=") for define in defines if "=" in define)
    for line in text.splitlines():
        words = line.split()
        asked = re.findall(r"defined\((\w+)\)", line)
        if line.startswith("#if"):
            known = all(x.startswith("defined") or x in ("#if", "||") for x in words)
            taken.append([not known or any(name in defines for name in asked)])
        elif line.startswith("#elif"):
            taken[-1].append(not any(taken[-1]) and any(name in defines for name in asked))
        elif line.startswith("#else"):
            taken[-1].append(not any(taken[-1]))
        elif line.startswith("#endif"):
            taken.pop()
        elif all(branch[-1] for branch in taken):
            if line.startswith("#define") and len(words) == 3:
                names[words[1]] = words[2]
            lines.append(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), line))
    return "\n".join(lines)


def struct_of(text: str, name: str) -> list[tuple[str, str]]:
    """(field, struct letter) of the members of a CUDA struct."""
    body = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)[1]
    fields = []
    for line in re.sub(r"//.*", "", body).split(";"):
        found = re.fullmatch(r"\s*(?:const )?(\w+)(\*?) ([\w, ]+)", line)
        if found:
            letter = "Q" if found[2] else SIZES[found[1]]
            fields += [(field.strip(), letter) for field in found[3].split(",")]
    return fields


def parameters_of(text: str, kernel: str) -> list[tuple[str, str]]:
    """(name, struct letter) of the parameters of a kernel; of a struct, (name, its type)."""
    body = re.search(rf"\b{kernel}\((.*?)\) {{", text, re.DOTALL)[1]
    found = []
    for parameter in re.sub(r"//.*", "", body).split(","):
        plain = re.sub(r"\b(const|__restrict__|__grid_constant__) ?", "", parameter)
        declared = plain.replace("*", "* ").split()
        letter = "Q" if "*" in declared[0] else SIZES.get(declared[0], declared[0])
        found.append((declared[-1], letter))
    return found


def all_sources() -> str:
    return "".join(path.read_text() for path in sorted(SOURCES.glob("*.cuh")))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.name}-{kernel.archs[0]}")
def test_parameters_are_those_of_the_kernel(kernel):
    """By name, type and order."""
    declared = parameters_of(preprocessed(source(kernel.source), kernel.defines), kernel.name)
    maps = [name for name, kind in declared if kind == "TensorMap"]
    assert declared[: len(maps)] == [(name, "TensorMap") for name in maps]
    assert len(maps) == kernel.parameters.tensor_maps
    rest = declared[len(maps) :]
    if kernel.parameters.as_struct:
        ((_, name),) = rest
        rest = struct_of(preprocessed(all_sources(), kernel.defines), name)
    assert rest == list(kernel.parameters.letters.items())


def unpacked(parameters: Parameters, arguments) -> dict[str, float]:
    """The values by name that a launch takes from its array of addresses, tensor maps left out."""
    first = parameters.tensor_maps
    pointers = arguments[first : first + len(parameters.letters)]
    if parameters.as_struct:
        pointers = [arguments[first] + offset for offset in parameters.offsets.values()]
    return {
        name: struct.unpack(letter, ctypes.string_at(pointer, struct.calcsize(letter)))[0]
        for (name, letter), pointer in zip(parameters.letters.items(), pointers, strict=True)
    }


def test_constants_are_those_of_the_kernels():
    assert f"SHARED_BYTES == {DENSE_DECODE.shared_bytes}" in all_sources()
    for kernel in (DENSE_DECODE, FEW_ROWS_DECODE):
        assert f"__launch_bounds__({kernel.threads}, 1)" in source(kernel.source)
    few_rows = source("sm90_few_rows_shared.cuh")
    assert f"SHARED_BYTES == {FEW_ROWS_DECODE.shared_bytes}" in few_rows
    assert f"constexpr int ROWS = {ROWS_PER_BLOCK_OF_FEW};" in few_rows
    assert f"constexpr int SLOT_TOKENS = {tensor_maps.SLOT_TOKENS};" in few_rows
    assert SCHEDULE.shared_bytes == schedule.MOST_SHARED_BYTES
    combine = source("combine.cu")
    assert f"constexpr int THREADS = {COMBINE.threads}," in combine
    assert f"constexpr int MAX_SPLITS = {sizes.MAX_SPLITS};" in combine
    floats, halves = (512 // units for units in combine_grid.COMBINE_UNITS)
    assert f"COLUMNS = HALVES ? {halves} : {floats}, IN_ROW = 512 / COLUMNS;" in combine
    assert "IN_FLIGHT = HALVES ? 10 : 5;" in combine  # COMBINE_AT_ONCE, a team or two a warp
    assert 10 * COMBINE.threads // 32 == combine_grid.COMBINE_AT_ONCE
    assert f"constexpr int FEW_ROWS = {combine_grid.FEW_ROWS};" in source("merge.cuh")
    reasons = re.search(r"enum Reason {(.*?)}", source("sm90_pieces.cuh"))[1].split(",")
    assert [name.strip().lower().replace("_", " ") for name in reasons] == list(reports.REASONS)


@pytest.mark.parametrize(
    ("declaration", "layout"),
    [
        ("pointer a, b\nint c, d, e", "2Q3i4x"),
        ("pointer a\nint b\npointer c, d\nfloat e", "Qi2Qf4x"),
        ("uint64 a\nint64 b\nint c\nfloat d", "Qqif"),
    ],
)
def test_offsets_are_those_of_struct(declaration, layout):
    parameters = Parameters(declaration)
    assert parameters.size == struct.calcsize(layout)
    values = {name: i for i, name in enumerate(parameters.letters, 1)}
    arguments = Arguments(parameters)
    arguments.pack(**values)
    assert arguments.buffer.raw == struct.pack(layout, *values.values())
    assert list(arguments.addresses.values()) == list(arguments._pointers)
    run = parameters.run(list(values)[1:])
    arguments.pack(**dict.fromkeys(values, 0))
    run.pack_into(arguments.buffer, run.offset, *list(values.values())[1:])
    assert arguments.buffer.raw == struct.pack(layout, 0, *list(values.values())[1:])
    with pytest.raises(ValueError, match="Not neighbours"):
        parameters.run([*reversed(values)])
    with pytest.raises(KeyError):
        arguments.pack(elsewhere=1)


def test_parameters_of_one_name_are_packed_once():
    first = Arguments(Parameters("pointer a, b\nint c"))
    second = Arguments(Parameters("int c, d\npointer a"), first)
    first.pack(a=1, b=2, c=3)
    second.pack(d=4)
    assert unpacked(Parameters("int c, d\npointer a"), second._pointers) == {"c": 3, "d": 4, "a": 1}
    with pytest.raises(KeyError):
        second.pack(c=5)  # it would be set where nobody looks


class FakeDriver:
    """Accepts every call and keeps the arguments of launches, as the driver would see them."""

    def __init__(self):
        self.maps: list[tuple] = []
        self.launches: list[tuple] = []

        def start(config, function, arguments, extra):
            seen = ctypes.cast(config, ctypes.POINTER(driver._Config)).contents
            pointers = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))
            self.launches.append(
                (tuple(seen.grid), tuple(seen.block), seen.shared_bytes, seen.stream, pointers)
            )
            return 0

        self.cuLaunchKernelEx = start
        self.cuStreamIsCapturing = lambda stream, status: 0

    def cuThreadExchangeStreamCaptureMode(self, mode):
        return 0

    def cuGraphCreate(self, graph, flags):
        return 801  # CUDA_ERROR_NOT_SUPPORTED

    def cuGetErrorString(self, code, text):
        return 0


@pytest.fixture
def fake(monkeypatch):
    made = FakeDriver()

    def tensor_map(*args, nan_outside):
        made.maps.append((*args, nan_outside))
        return (ctypes.c_char * 128)()

    monkeypatch.setattr(driver, "library", lambda: made)
    monkeypatch.setattr(tensor_maps, "tensor_map", tensor_map)
    return made


def function(entry: str, block: int) -> driver.Function:
    made = object.__new__(driver.Function)
    made.handle, made.entry, made.block, made.programmatic = 1, entry, block, True
    return made


def reporting() -> reports.Reports:
    made = object.__new__(reports.Reports)
    made.forked, made.refusal, made.refused = False, 77, 88
    return made


def prepare(q, k_cache, table, parts=66):
    geometry = Geometry.of(q, k_cache, table, parts)
    kernels = decode_launch.DecodeKernels(
        *(
            function(kernel.name, kernel.threads)
            for kernel in (SCHEDULE, decode_kernel(geometry.slab_rows), COMBINE)
        )
    )
    return decode_launch.DecodeLaunch(geometry, kernels, 132, reporting(), iter(range(99, 200)))


def info(*shape, strides=None, dtype="bfloat16"):
    inner = [1]
    for length in reversed(shape[1:]):
        inner.insert(0, inner[0] * length)
    return ArrayInfo(1 << 20, shape, tuple(strides or inner), dtype, 0)


TABLE = info(3, 5, dtype="int32")


@pytest.mark.parametrize(
    ("q", "k_cache", "grid", "few"),  # few: query rows of a block, where they are few
    [
        (info(3, 1, 128, 576), info(9, 64, 1, 576), (2, 1, 66), None),
        (info(3, 2, 128, 576), info(9, 64, 1, 576), (4, 1, 66), None),  # positions in one slab
        (info(3, 2, 24, 576), info(9, 16, 8, 576), (2, 8, 66), 16),  # a slab for each position
        (info(3, 2, 192, 576), info(9, 16, 4, 576), (2, 4, 66), None),
        (info(3, 2, 8, 576), info(9, 128, 1, 576), (1, 1, 66), 16),
        (info(3, 70, 5, 576), info(9, 256, 1, 576), (6, 1, 66), None),
    ],
)
def test_grid_and_tensor_maps(fake, q, k_cache, grid, few):
    made = prepare(q, k_cache, TABLE)
    assert made.grid == grid
    made.q_maps[q.ptr]
    made.k_maps[k_cache.ptr]
    page_size, h_kv = k_cache.shape[1:3]
    for address, dtype, dims, strides, box, nan_outside in fake.maps:
        assert (address, dtype) == (1 << 20, "bfloat16")
        assert dims[0] == box[0] == 64
        assert dims[2] == 9
        assert strides[1] == 128
        assert all(stride % 16 == 0 for stride in strides)
        if nan_outside:  # k_cache: a page number of num_pages is outside
            assert dims == (64, page_size, 9, h_kv, 9)
            assert box[1] == min(page_size, 32 if few else 64)
        else:
            assert dims[1] * dims[3] == q.shape[1] * q.shape[2]
            assert box[1] == (few or 64)
    halves = [box[2] for *_, box, nan_outside in fake.maps if nan_outside]
    assert halves == ([9] if few else [4, 5] if page_size >= 64 else [1])
    before = len(fake.maps)
    made.q_maps[q.ptr]
    assert len(fake.maps) == before  # once for an address


# In the order of Addresses: q, k_cache, metadata, lengths, table, out, lse, scratch.
CALL = Addresses(1 << 20, 1 << 20, 2, 1, 1 << 20, 4, 5, 1 << 30)


def test_decode_launches_both_kernels(fake):
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)
    made(9, CALL, 0.5, False)
    decode, combine = fake.launches
    assert decode[:4] == ((2, 1, 66), (384, 1, 1), 232304, 9)
    assert combine[:4] == ((132, 1, 1), (256, 1, 1), 0, 9)
    slots = 2 * 65
    row_partial = (1 << 30) + slots * 128 * 512 * 4
    pairs = row_partial + slots * 128 * 16
    assert tuple(unpacked(COMBINE.parameters, combine[4]).values()) == (
        *(2, 1 << 30, row_partial, 4, 5, pairs),
        *(132, 3, 1, 128, 128, slots, 66, 128),
    )

    seen = unpacked(DENSE_DECODE.parameters, decode[4])
    assert seen.pop("scale_log2") == pytest.approx(0.5 * 1.4426950408889634)
    assert seen == {
        "tile_scheduler_metadata": 2,
        "cache_seqlens": 1,
        "block_table": 1 << 20,
        "out": 4,
        "lse": 5,
        "out_partial": 1 << 30,
        "row_partial": row_partial,
        "pairs": pairs,
        "epoch": 99,
        "refusal": 77,
        "refused": 88,
        "table_stride": 5,
        "batch": 3,
        "s_q": 1,
        "h_q": 128,
        "group": 128,
        "slab_rows": 128,
        "blocks": 2,
        "num_pages": 9,
        "page_tiles_log2": 0,
        "max_length": 320,
        "slots": slots,
        "causal": 0,
        "border_tiles": 1,
    }


def test_schedule_launches_with_the_room_that_a_batch_needs(fake):
    engine = object.__new__(engine_module.Engine)
    engine._schedule, engine._reports = function("schedule", 32), reporting()
    engine._own = threading.local()
    for batch, parts in ((3, 66), (9000, 132), (1, 66)):
        engine.schedule(9, 1, batch, parts, 128, 1, 2, 3)
        grid, block, shared_bytes, stream, arguments = fake.launches[-1]
        sizes = schedule.launch_sizes(batch, parts, 128, 1)
        assert (grid, block, stream) == ((1, 1, 1), sizes.block, 9)
        assert shared_bytes == sizes.shared_bytes
        seen = unpacked(SCHEDULE.parameters, arguments)
        cache_seqlens, *params, metadata, num_splits = seen.values()
        assert (cache_seqlens, metadata, num_splits) == (1, 2, 3)
        assert params == pytest.approx(sizes.params)
        assert params[:5] == list(sizes.params[:5])


def test_no_combine_where_nothing_can_be_split(fake):
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE, parts=1)
    for _ in range(2):
        made(9, CALL, 0.5, False)
    assert [call[1] for call in fake.launches] == [(384, 1, 1)] * 2


class FakeGraph:
    """Counts in `log`; made=False: the driver makes no graphs."""

    def __init__(self, monkeypatch, made=True):
        self.log: list = []
        self.capturing = False
        outer = self

        class Graph:
            def __init__(self, parts):
                if not made:
                    raise RuntimeError("no graphs")
                outer.log.append(f"made of {len(parts)}")

            def set_arguments(self):
                outer.log.append("set")

            def __call__(self, stream):
                outer.log.append(stream)

        monkeypatch.setattr(decode_launch, "LaunchGraph", Graph)
        monkeypatch.setattr(decode_launch, "CaptureStatus", lambda: lambda stream: self.capturing)


def test_calls_after_the_first_are_a_graph(fake, monkeypatch):
    graph = FakeGraph(monkeypatch)
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)

    def decode(call=CALL, scale=0.5, causal=False):
        graph.log.clear()
        before = len(fake.launches)
        made(9, call, scale, causal)
        return graph.log, len(fake.launches) - before

    assert decode() == (["made of 2"], 2)
    assert decode() == (["set", 9], 0)
    assert decode() == ([9], 0)  # nothing has changed
    other = CALL._replace(k_cache=1 << 21)
    assert decode(other) == (["set", 9], 0)
    assert decode(other, scale=0.25) == (["set", 9], 0)
    assert decode(other, 0.25, True) == (["set", 9], 0)
    graph.capturing = True
    assert decode(other, 0.25, True) == ([], 2)
    graph.capturing = False
    assert decode(other, 0.25, True) == (["set", 9], 0)  # the capture had another number


def test_a_call_may_make_its_metadata(fake, monkeypatch):
    """Its graph is another one: neither knows what the other was set to."""
    graph = FakeGraph(monkeypatch)
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)

    def decode(*options):
        graph.log.clear()
        before = len(fake.launches)
        made(9, CALL, 0.5, False, *options)
        return graph.log, len(fake.launches) - before

    assert decode(1 << 30) == (["made of 3"], 3)
    (_, block, shared_bytes, _, arguments), *_ = fake.launches
    sizes = schedule.launch_sizes(3, 66, 128, 1)
    assert (block, shared_bytes) == (sizes.block, sizes.shared_bytes)
    lengths, *params, metadata, num_splits = unpacked(SCHEDULE.parameters, arguments).values()
    assert (lengths, metadata) == (CALL.cache_seqlens, CALL.tile_scheduler_metadata)
    assert num_splits == 1 << 30 and params == pytest.approx(sizes.params)
    assert decode() == (["made of 2"], 2)
    assert decode(1 << 30) == decode() == (["set", 9], 0)
    assert decode(1 << 30) == decode() == ([9], 0)
    assert decode(1 << 31) == (["set", 9], 0)


def test_without_graphs_there_are_launches(fake, monkeypatch):
    graph = FakeGraph(monkeypatch, made=False)
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)
    for _ in range(3):
        made(9, CALL, 0.5, False)
    assert len(fake.launches) == 6
    assert graph.log == []


@pytest.mark.parametrize("driver_has", [False, True])
def test_a_driver_that_makes_no_graph_says_so(fake, monkeypatch, driver_has):
    if not driver_has:
        monkeypatch.delattr(FakeDriver, "cuGraphCreate")
    with pytest.raises(RuntimeError, match="makes no graph" if driver_has else "too old"):
        launch_graph.LaunchGraph([])


def test_a_first_call_in_a_capture_makes_no_graph(fake, monkeypatch):
    graph = FakeGraph(monkeypatch)
    graph.capturing = True
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)
    made(9, CALL, 0.5, False)
    assert graph.log == []
    graph.capturing = False
    made(9, CALL, 0.5, False)
    assert graph.log == ["made of 2"]


def test_kernels_are_loaded_on_the_device_of_their_arrays(monkeypatch):
    """Whichever is current: a launch on another device would find no kernel in its context."""
    current, loaded_on = [0], []

    class Device(contextlib.AbstractContextManager):
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            current.append(self.number)

        def __exit__(self, *_):
            current.pop()

    engine = object.__new__(engine_module.Engine)
    engine.device, engine.num_sms, engine.arch = 1, 132, "sm_90a"
    engine._cuda = types.SimpleNamespace(Device=Device)
    engine._kernels = {Variant("schedule"): function("schedule", 32)}
    engine._load_lock, engine._reports = locks.Lock(), reporting()
    engine._programmatic, engine._epochs = True, iter(())

    def compile_variants(wanted):
        return [compiler.Compiled(v, b"", "", None, 0.0, True) for v in wanted]

    def loaded(cubin, entry, **of):
        loaded_on.append(current[-1])
        return function(entry, 32)

    monkeypatch.setattr(engine_module, "RelaxedCapture", contextlib.nullcontext)
    monkeypatch.setattr(engine_module, "compile_variants", compile_variants)
    monkeypatch.setattr(engine_module, "Function", loaded)
    q, k_cache = info(3, 1, 128, 576), info(9, 64, 1, 576)
    assert engine.prepare(Geometry.of(q, k_cache, TABLE, 66)).scratch_floats > 0
    assert set(loaded_on) == {1} and len(loaded_on) == 2
    assert current == [0]


@pytest.mark.parametrize(
    ("h_q", "batch", "parts", "tokens", "expected"),
    [
        (16, 1, 132, 1 << 20, 64),  # a block a unit, shared by its warps
        (1, 2, 132, 1 << 20, 131),  # each request has one
        (16, 8, 132, 1 << 20, 132),
        (16, 66, 132, 1 << 20, 158),
        (128, 1, 66, 512, 132),
        (128, 1, 66, 1 << 20, 212),  # all of 66 pieces at once
        (128, 65, 66, 1 << 20, 264),
    ],
)
def test_blocks_of_combine(h_q, batch, parts, tokens, expected):
    q_strides, k_strides = (h_q * 576, h_q * 576, 576, 1), (64 * 576, 576, 576, 1)
    cache = (64, 64, k_strides, tokens // 64, tokens // 64)
    geometry = Geometry("bfloat16", batch, 1, h_q, 1, q_strides, *cache, parts)
    assert combine_grid.combine_blocks(geometry, 132) == expected


def test_a_forked_engine_refuses(fake):
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)
    made(9, CALL, 0.5, False)
    engine = object.__new__(engine_module.Engine)
    engine._reports, engine.arch = made.reports, "sm_90a"
    engine._reports.after_fork()
    calls = (
        lambda: engine.schedule(9, 1, 3, 66, 128, 1, 2, 3),
        lambda: made(9, CALL, 0.5, False),
        lambda: engine.prepare(made.geometry),
        engine._reports.check,
        engine._reports.raise_pending,
    )
    before = len(fake.launches)
    for call in calls:
        with pytest.raises(ForkedProcessError, match="spawn"):
            call()
    assert len(fake.launches) == before


def test_tensor_maps_promote_128_bytes_into_the_l2_cache(monkeypatch):
    """256 cost an H200 a tenth of its bandwidth. 2 is CU_TENSOR_MAP_L2_PROMOTION_L2_128B."""
    seen = []

    def encode(*arguments):
        seen.append(arguments)
        return 0

    monkeypatch.setattr(
        driver, "library", lambda: types.SimpleNamespace(cuTensorMapEncodeTiled=encode)
    )
    driver.tensor_map(0, "bfloat16", (64, 64), (128,), (64, 64), nan_outside=True)
    interleave, swizzle, promotion, fill = seen[0][-4:]
    assert (interleave, swizzle, promotion, fill) == (0, 3, 2, 1)


@pytest.mark.parametrize(
    ("slab_rows", "kernel"),
    [
        (1, FEW_ROWS_DECODE),
        (16, FEW_ROWS_DECODE),
        (17, DENSE_DECODE),
        (64, DENSE_DECODE),
        (1000, DENSE_DECODE),
    ],
)
def test_which_kernel_decodes(slab_rows, kernel):
    assert decode_kernel(slab_rows) is kernel


@pytest.mark.parametrize(
    ("cache_format", "q_dtype", "slab_rows", "wide_fp8", "name"),
    [
        ("v32", "bfloat16", 16, False, "few_rows_v32"),
        ("v32", "float16", 1, True, "few_rows_v32"),
        ("e4m3", "float16", 16, False, "few_rows_e4m3"),
        ("v32", "bfloat16", 17, False, "gather_v32"),
        ("v32", "bfloat16", 17, True, "gather_v32_wide"),
        ("v4", "bfloat16", 8, True, "few_rows_v4"),
        ("v4", "bfloat16", 20, True, "gather_v4_wide"),
        ("e4m3", "float8_e4m3fn", 16, False, "few_rows_e4m3_q_e4m3"),
        ("e4m3", "float8_e4m3fn", 17, False, "gather_e4m3_q_e4m3"),
        ("bfloat16", "bfloat16", 1, False, "gather_16bit"),
    ],
)
def test_which_kernel_gathers(cache_format, q_dtype, slab_rows, wide_fp8, name):
    assert gather_kernel(cache_format, q_dtype, slab_rows, wide_fp8=wide_fp8).name == name
    assert f"constexpr int ROWS = {FEW_ROWS};" in source("sm90_few_fp8_shared.cuh")
