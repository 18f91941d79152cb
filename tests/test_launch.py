"""What engine, launches and prepared hand to the kernels, read against the CUDA sources; no GPU.

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

from flashmla_cupy import sizes
from flashmla_cupy.build import compiler
from flashmla_cupy.errors import ForkedProcessError
from flashmla_cupy.frameworks import ArrayInfo
from flashmla_cupy.gpu import driver, launch_graph, launches, prepared
from flashmla_cupy.gpu import engine as engine_module
from flashmla_cupy.gpu.geometry import Addresses, Geometry
from flashmla_cupy.schedule import split as schedule

SOURCES = Path(__file__).parent.parent / "cuda_src"
SIZES = {"int": "i", "float": "f", "int64_t": "q", "uint64_t": "Q"}


def source(name: str) -> str:
    return (SOURCES / name).read_text()


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


def parameters_of(text: str, kernel: str) -> list[str]:
    """Struct letters of the parameters of a kernel."""
    body = re.search(rf"\b{kernel}\((.*?)\) {{", text, re.DOTALL)[1]
    letters = []
    for parameter in re.sub(r"//.*", "", body).split(","):
        declared = parameter.replace("const ", "").split()
        letters.append("Q" if "*" in declared[0] else SIZES[declared[0]])
    return letters


def letters_of(layout: struct.Struct) -> list[str]:
    return [
        letter
        for count, letter in re.findall(r"(\d*)([a-zA-Z])", layout.format)
        if letter != "x"
        for _ in range(int(count or 1))
    ]


def test_params_are_those_of_the_kernel():
    fields = struct_of(source("sm90_pieces.cuh"), "Params")
    assert [letter for _, letter in fields] == letters_of(launches.PARAMS)
    assert launches.PARAMS.size % 8 == 0


COMBINE_PARAMS = struct.Struct(f"{len(launches.COMBINE_ARRAYS)}Q{launches.COMBINE_SIZES.format}")


@pytest.mark.parametrize(
    ("name", "layout"),
    [("combine", COMBINE_PARAMS), ("schedule", launches.SCHEDULE_PARAMS)],
)
def test_parameters_are_those_of_the_kernel(name, layout):
    assert parameters_of(source(f"{name}.cu"), name) == letters_of(layout)


def test_constants_are_those_of_the_kernels():
    assert f"SHARED_BYTES == {launches.DECODE_SHARED_BYTES}" in source("sm90_shared.cuh")
    assert f"__launch_bounds__({launches.DECODE_THREADS}, 1)" in source("sm90_dense_decode.cu")
    combine = source("combine.cu")
    assert f"constexpr int THREADS = {prepared.COMBINE_THREADS}," in combine
    assert f"constexpr int MAX_SPLITS = {sizes.MAX_SPLITS};" in combine
    floats, halves = (512 // units for units in prepared.COMBINE_UNITS)
    assert f"COLUMNS = HALVES ? {halves} : {floats}, IN_ROW = 512 / COLUMNS;" in combine
    assert "IN_FLIGHT = HALVES ? 10 : 5;" in combine  # COMBINE_AT_ONCE, a team or two a warp
    assert prepared.COMBINE_AT_ONCE == 10 * prepared.COMBINE_THREADS // 32
    assert f"constexpr int FEW_ROWS = {prepared.FEW_ROWS};" in source("merge.cuh")
    reasons = re.search(r"enum Reason {(.*?)}", source("sm90_pieces.cuh"))[1].split(",")
    assert [name.strip().lower().replace("_", " ") for name in reasons] == list(
        engine_module.REASONS
    )


def test_offsets_are_those_of_struct():
    for layout in ("5Q6i", "Q4i2Q", "9Qq12if"):
        values = range(1, len(letters_of(struct.Struct(layout))) + 1)
        packed = struct.pack(layout, *values)
        at = launches._offsets(layout)
        letters = letters_of(struct.Struct(layout))
        read = [
            struct.unpack_from(letter, packed, o)[0] for letter, o in zip(letters, at, strict=True)
        ]
        assert read == list(values)


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
    monkeypatch.setattr(prepared, "tensor_map", tensor_map)
    return made


def function(entry: str, block: int) -> driver.Function:
    made = object.__new__(driver.Function)
    made.handle, made.entry, made.block = 1, entry, block
    return made


def prepare(q, k_cache, table, parts=66):
    geometry = Geometry.of(q, k_cache, table, parts)
    kernels = function("schedule", 32), function("dense_decode", 384), function("combine", 256)
    return prepared.Prepared(geometry, *kernels, 132)


def info(*shape, strides=None, dtype="bfloat16"):
    inner = [1]
    for length in reversed(shape[1:]):
        inner.insert(0, inner[0] * length)
    return ArrayInfo(1 << 20, shape, tuple(strides or inner), dtype, 0)


TABLE = info(3, 5, dtype="int32")


@pytest.mark.parametrize(
    ("q", "k_cache", "grid"),
    [
        (info(3, 1, 128, 576), info(9, 64, 1, 576), (2, 1, 66)),
        (info(3, 2, 128, 576), info(9, 64, 1, 576), (4, 1, 66)),  # positions in one slab
        (info(3, 2, 24, 576), info(9, 16, 8, 576), (2, 8, 66)),  # a slab for each position
        (info(3, 70, 5, 576), info(9, 256, 1, 576), (6, 1, 66)),
    ],
)
def test_grid_and_tensor_maps(fake, q, k_cache, grid):
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
            assert box[1] == min(page_size, 64)
        else:
            assert dims[1] * dims[3] == q.shape[1] * q.shape[2]
            assert box[1] == 64
    halves = [box[2] for *_, box, nan_outside in fake.maps if nan_outside]
    assert halves == ([4, 5] if page_size >= 64 else [1])
    before = len(fake.maps)
    made.q_maps[q.ptr]
    assert len(fake.maps) == before  # once for an address


def engine_with(made) -> engine_module.Engine:
    engine = object.__new__(engine_module.Engine)
    engine._prepared, engine._status = {id(made.geometry): made}, (77, 88)
    engine._epochs = iter(range(99, 200))
    return engine


# In the order of Addresses: q, k_cache, metadata, lengths, table, out, lse, scratch.
CALL = Addresses(1 << 20, 1 << 20, 2, 1, 1 << 20, 4, 5, 1 << 30)


def test_decode_launches_both_kernels(fake):
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)
    engine_with(made).decode(9, CALL, made.geometry, 0.5, False)
    decode, combine = fake.launches
    assert decode[:4] == ((2, 1, 66), (384, 1, 1), launches.DECODE_SHARED_BYTES, 9)
    assert combine[:4] == ((132, 1, 1), (256, 1, 1), 0, 9)
    slots = 2 * 65
    letters = letters_of(COMBINE_PARAMS)
    read = [
        ctypes.string_at(pointer, struct.calcsize(letter))
        for pointer, letter in zip(combine[4][: len(letters)], letters, strict=True)
    ]
    row_partial = (1 << 30) + slots * 128 * 512 * 4
    pairs = row_partial + slots * 128 * 16
    assert COMBINE_PARAMS.unpack(b"".join(read)) == (
        *(2, 1 << 30, row_partial, 4, 5, pairs),
        *(132, 3, 1, 128, 128, slots, 66, 128),
    )

    names = [name for name, _ in struct_of(source("sm90_pieces.cuh"), "Params")]
    packed = ctypes.string_at(decode[4][4], launches.PARAMS.size)
    seen = dict(zip(names, launches.PARAMS.unpack(packed), strict=True))
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
    engine._kernels = {compiler.Variant("schedule"): function("schedule", 32)}
    engine._own = threading.local()
    for batch, parts in ((3, 66), (9000, 132), (1, 66)):
        engine.schedule(9, 1, batch, parts, 128, 1, 2, 3)
        grid, block, shared_bytes, stream, arguments = fake.launches[-1]
        sizes = schedule.launch_sizes(batch, parts, 128, 1)
        assert (grid, block, stream) == ((1, 1, 1), sizes.block, 9)
        assert shared_bytes == sizes.shared_bytes
        packed = ctypes.string_at(arguments[0], launches.SCHEDULE_PARAMS.size)
        cache_seqlens, *params, metadata, num_splits = launches.SCHEDULE_PARAMS.unpack(packed)
        assert (cache_seqlens, metadata, num_splits) == (1, 2, 3)
        assert params == pytest.approx(sizes.params)
        assert params[:5] == list(sizes.params[:5])


def test_no_combine_where_nothing_can_be_split(fake):
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE, parts=1)
    for _ in range(2):
        engine_with(made).decode(9, CALL, made.geometry, 0.5, False)
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

        monkeypatch.setattr(launches, "LaunchGraph", Graph)
        monkeypatch.setattr(launches, "CaptureStatus", lambda: lambda stream: self.capturing)


def test_calls_after_the_first_are_a_graph(fake, monkeypatch):
    graph = FakeGraph(monkeypatch)
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)
    engine = engine_with(made)

    def decode(call=CALL, scale=0.5, causal=False):
        graph.log.clear()
        before = len(fake.launches)
        engine.decode(9, call, made.geometry, scale, causal)
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
    engine = engine_with(made)

    def decode(*options):
        graph.log.clear()
        before = len(fake.launches)
        engine.decode(9, CALL, made.geometry, 0.5, False, *options)
        return graph.log, len(fake.launches) - before

    assert decode(1 << 30) == (["made of 3"], 3)
    (_, block, shared_bytes, _, arguments), *_ = fake.launches
    sizes = schedule.launch_sizes(3, 66, 128, 1)
    assert (block, shared_bytes) == (sizes.block, sizes.shared_bytes)
    packed = ctypes.string_at(arguments[0], launches.SCHEDULE_PARAMS.size)
    lengths, *params, metadata, num_splits = launches.SCHEDULE_PARAMS.unpack(packed)
    assert (lengths, metadata) == (CALL.cache_seqlens, CALL.tile_scheduler_metadata)
    assert num_splits == 1 << 30 and params == pytest.approx(sizes.params)
    assert decode() == (["made of 2"], 2)
    assert decode(1 << 30) == decode() == (["set", 9], 0)
    assert decode(1 << 30) == decode() == ([9], 0)
    assert decode(1 << 31) == (["set", 9], 0)


def test_without_graphs_there_are_launches(fake, monkeypatch):
    graph = FakeGraph(monkeypatch, made=False)
    made = prepare(info(3, 1, 128, 576), info(9, 64, 1, 576), TABLE)
    engine = engine_with(made)
    for _ in range(3):
        engine.decode(9, CALL, made.geometry, 0.5, False)
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
    engine = engine_with(made)
    engine.decode(9, CALL, made.geometry, 0.5, False)
    assert graph.log == []
    graph.capturing = False
    engine.decode(9, CALL, made.geometry, 0.5, False)
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
    engine.device, engine.num_sms = 1, 132
    engine._cuda = types.SimpleNamespace(Device=Device)
    engine._kernels = {compiler.Variant("schedule"): function("schedule", 32)}
    engine._prepared, engine._load_lock = {}, threading.Lock()

    def compile_variants(wanted):
        return [compiler.Compiled(v, b"", "", None, 0.0, True) for v in wanted]

    def loaded(compiled):
        loaded_on.append(current[-1])
        return function(compiled.variant.entry, 32)

    monkeypatch.setattr(engine_module, "RelaxedCapture", contextlib.nullcontext)
    monkeypatch.setattr(engine_module, "compile_variants", compile_variants)
    monkeypatch.setattr(engine_module, "_function", loaded)
    q, k_cache = info(3, 1, 128, 576), info(9, 64, 1, 576)
    assert engine.scratch_floats(Geometry.of(q, k_cache, TABLE, 66)) > 0
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
    assert prepared.combine_blocks(geometry, 132) == expected


def test_a_forked_engine_refuses():
    engine = object.__new__(engine_module.Engine)
    engine.__class__ = engine_module._Forked
    for call in (engine.schedule, engine.decode, engine.check, engine.raise_pending):
        with pytest.raises(ForkedProcessError, match="spawn"):
            call()
