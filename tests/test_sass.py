"""What ptxas makes of every variant, read without a GPU: its log, and the machine code (SASS).

A tile loop is an innermost loop that contains HGMMA, QGMMA or HMMA, the matrix instructions of a
warpgroup or a warp. A spill in it (LDL, STL) or a serialised wgmma (ptxas warnings C75xx) would
leave every result right and the kernel slow, so only a look at the code finds it. Each detector has
a planted kernel that it must find, at the end of this file.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sysconfig
from typing import NamedTuple

import pytest

pytest.importorskip("cupy", reason="CuPy is not installed")

from flashmla_cupy.build import compiler, nvrtc
from flashmla_cupy.errors import NVRTCNotFoundError
from flashmla_cupy.gpu.kernels import Variant, all_variants

try:
    NVRTC = nvrtc.version()
except NVRTCNotFoundError:
    pytest.skip("NVRTC is not installed", allow_module_level=True)

VARIANTS = all_variants()
WITH_MMA = [variant for variant in VARIANTS if variant.row.mma_loops]
DECODE = [variant for variant in WITH_MMA if variant.kernel == "dense_decode"]


def identity(variant: Variant) -> str:
    return variant.name


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, compiler.Compiled]:
    """Every variant, compiled afresh: a cached log would say what an older compiler said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHMLA_CUPY_CACHE_DIR", str(tmp_path_factory.mktemp("cubins")))
        patch.setattr(compiler, "_memo", {})
        return dict(zip(VARIANTS, compiler.compile_variants(VARIANTS), strict=True))


# ---- reading SASS ----------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@!P0 " or ""
    opcode: str  # "BRA.DIV"
    operands: str

    @property
    def target(self) -> int | None:
        """Where a direct branch goes: its last operand."""
        if self.opcode.split(".")[0] not in ("BRA", "JMP", "CALL"):
            return None
        found = re.search(r"0x([0-9a-f]+)\)?$", self.operands)
        return int(found[1], 16) if found else None


class Block(NamedTuple):
    code: list[Instruction]
    successors: set[int]


Blocks = dict[int, Block]


@functools.cache
def search_path() -> str:
    """A PATH with the disassembler's wheels, which put their programs where no PATH points."""
    wheels = os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), wheels])
    for name in ("cuobjdump", "nvdisasm"):
        if shutil.which(name, path=path) is None:
            pytest.skip(f"{name} is not installed: pip install nvidia-cuda-{name}")
    return path


def disassemble(cubin: bytes, folder: os.PathLike[str]) -> list[Instruction]:
    path = search_path()
    file = os.path.join(folder, "kernel.cubin")
    with open(file, "wb") as stream:
        stream.write(cubin)
    command = [str(shutil.which("cuobjdump", path=path)), "-sass", file]
    text = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    ).stdout
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z]\S*)\s*([^;]*?)\s*;")
    code = [Instruction(int(a, 16), p, o, r) for a, p, o, r in line.findall(text)]
    assert code, "the disassembly holds no instruction"
    return code


def basic_blocks(code: list[Instruction]) -> Blocks:
    """Control flow graph. A computed branch (BRX) may reach every block that nothing else does."""
    ends = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET")
    starts = {code[0].address}
    for instruction, following in itertools.pairwise(code):
        opcode = instruction.opcode.split(".")[0]
        if instruction.target is not None:
            starts.add(instruction.target)
        if opcode in ends:
            starts.add(following.address)
    blocks: Blocks = {}
    current = Block([], set())
    for instruction in code:
        if instruction.address in starts:
            if current.code and not leaves(current.code[-1]):
                current.successors.add(instruction.address)
            current = blocks[instruction.address] = Block([], set())
        current.code.append(instruction)
        target = instruction.target
        if target is not None and not instruction.opcode.startswith("CALL"):
            current.successors.add(target)
    entered = {code[0].address}.union(*(block.successors for block in blocks.values()))
    for block in blocks.values():
        if block.code[-1].opcode.startswith(("BRX", "JMX")):
            block.successors.update(set(blocks) - entered)
    return blocks


def leaves(last: Instruction) -> bool:
    """True if control never goes on to the instruction after `last`."""
    opcode, _, suffix = last.opcode.partition(".")
    if last.predicate or suffix.startswith(("DIV", "CONV")):
        return False
    if opcode == "BRA":  # "BRA P2, 0x3fe0" and "BRA UP0, 0x40" are conditional
        return not re.match(r"!?U?P\d", last.operands)
    return opcode in ("BRX", "JMP", "JMX", "EXIT", "RET")


def components(nodes: set[int], edges: dict[int, set[int]]) -> list[set[int]]:
    """Strongly connected components that hold a cycle."""
    reach = {}
    for node in nodes:
        seen: set[int] = set()
        todo = list(edges[node])
        while todo:
            step = todo.pop()
            if step not in seen:
                seen.add(step)
                todo += edges[step]
        reach[node] = seen
    found, left = [], set(nodes)
    while left:
        node = left.pop()
        if node in reach[node]:
            cycle = {other for other in reach[node] if node in reach[other]}
            left -= cycle
            found.append(cycle)
    return found


def loops(blocks: Blocks) -> list[set[int]]:
    """Every loop as its set of blocks, the inner ones included.

    A loop is a cycle of the graph; without the branches back to where it is entered, the cycles
    left in it are the loops inside. So a detour out of line does not look like a loop of its own,
    as it would if each branch to a smaller address were taken for one.
    """
    found = []
    todo = components(set(blocks), {node: block.successors for node, block in blocks.items()})
    while todo:
        cycle = todo.pop()
        found.append(cycle)
        outside = (block.successors for node, block in blocks.items() if node not in cycle)
        heads = cycle.intersection(set().union(*outside)) or {min(cycle)}
        todo += components(cycle, {node: blocks[node].successors & cycle - heads for node in cycle})
    return found


def opcodes(blocks: Blocks, loop: set[int]) -> list[str]:
    return [instruction.opcode for node in sorted(loop) for instruction in blocks[node].code]


def count(loop: list[str], opcode: str) -> int:
    return sum(name.split(".")[0] == opcode for name in loop)


def tile_loops(code: list[Instruction]) -> list[list[str]]:
    """The opcodes of each innermost loop that contains HGMMA, QGMMA or HMMA."""
    blocks = basic_blocks(code)
    with_mma = [
        loop
        for loop in loops(blocks)
        if any(name.startswith(("HGMMA", "QGMMA", "HMMA")) for name in opcodes(blocks, loop))
    ]
    innermost = [loop for loop in with_mma if not any(other < loop for other in with_mma)]
    return [opcodes(blocks, loop) for loop in innermost]


def local_accesses(names: list[str]) -> int:
    return sum(name.startswith(("LDL", "STL")) for name in names)


def wgmma_warnings(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.search(r"\bC75\d\d\b", line)]


# ---- every variant ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=identity)
def test_wgmma_is_not_serialised(variant, compiled):
    assert wgmma_warnings(compiled[variant].log) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=identity)
def test_registers_and_spills(variant, compiled):
    found, row = compiled[variant].resources, variant.row
    assert 0 < found.registers <= row.registers
    # NVRTC 12.8 spills two registers more, before and after the tile loops, with small pages.
    more = 8 if NVRTC == (12, 8) and row.spill_bytes else 0
    assert found.spill_stores <= row.spill_bytes + more


@pytest.mark.parametrize("variant", WITH_MMA, ids=identity)
def test_tile_loops_stay_in_registers(variant, compiled, tmp_path):
    code = disassemble(compiled[variant].cubin, tmp_path)
    assert [local_accesses(loop) for loop in tile_loops(code)] == [0] * variant.row.mma_loops


@pytest.mark.parametrize("variant", DECODE, ids=identity)
def test_decode_code(variant, compiled, tmp_path):
    code = disassemble(compiled[variant].cubin, tmp_path)
    names = {instruction.opcode.split(".")[0] for instruction in code}
    assert {"HGMMA", "UTMALDG", "USETMAXREG"} <= names
    # Descriptors of QK in uniform registers: moving each there costs more than issuing its HGMMA.
    (scores,) = (loop for loop in tile_loops(code) if count(loop, "HGMMA") == 36)
    assert count(scores, "R2UR") <= 8


# ---- kernels for all GPUs --------------------------------------------------------------------

FOR_ALL_GPUS = [variant for variant in VARIANTS if not variant.source.startswith("sm90_")]


def test_kernels_without_a_prefix_are_those_for_all_gpus():
    changing_a_cache = {"append", "copy_pages", "update_tables"}
    assert {variant.kernel for variant in FOR_ALL_GPUS} == {
        "schedule",
        "combine",
        "combine_gathered",
        "list_lengths",
        *changing_a_cache,
    }
    prefix = re.compile(r'#include "(sm90_\w+\.cuh|wgmma\.cuh)"')
    for name, text in compiler._sources().items():
        if not name.startswith("sm90_"):
            assert not prefix.search(text.decode()), f"{name} includes code for one architecture"


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("variant", FOR_ALL_GPUS, ids=identity)
def test_kernels_for_all_gpus_compile_for_each(variant, arch):
    """From sm_90 on they are launched programmatically, and wait for the kernel ahead."""
    if arch not in nvrtc.library().supported_archs():
        pytest.skip(f"NVRTC {NVRTC} does not compile for sm_{arch}")
    sources = compiler._sources()
    headers = {name: text for name, text in sources.items() if name.endswith(".cuh")}
    made = {
        product: nvrtc.compile_program(
            sources[variant.source],
            variant.source,
            headers,
            (f"-arch={kind}_{arch}", "--std=c++17", *variant.macros),
            product,
        )[0]
        for product, kind in (("CUBIN", "sm"), ("PTX", "compute"))
    }
    assert made["CUBIN"].startswith(b"\x7fELF")
    assert (b"griddepcontrol.wait" in made["PTX"]) == (arch >= 90)


# ---- the detectors find what is planted ------------------------------------------------------

WGMMA = """
#define WGMMA(d)                                                                              \\
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, "   \\
               "%4, 1, 1, 1, 0, 0;"                                                           \\
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(descriptor))
#define FENCE asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define COMMIT asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
#define WAIT asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory")
"""

SPILLED = """
extern "C" __global__ void planted(float* out, const int* in, int n) {
  float local[24];
  for (int i = 0; i < 24; ++i) local[i] = in[i];
  for (int i = 0; i < n; ++i) local[in[i]] += out[i];  // indexed at run time: not in registers
  out[n] = local[in[n]];
}
"""

SPILLED_TILE = """
extern "C" __global__ void planted(float* out, const int* in, int n, long long descriptor) {
  float d[4] = {}, local[24];
  for (int i = 0; i < 24; ++i) local[i] = in[i];
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    FENCE; WGMMA(d); COMMIT; WAIT;
    local[in[i]] += 1.0f;
  }
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3] + local[in[n]];
}
"""

SERIALISED = """
extern "C" __global__ void planted(float* out, int n, long long descriptor) {
  float d[4] = {};
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    FENCE; WGMMA(d); COMMIT;
    d[0] += out[i];  // touches an accumulator in flight
    WAIT;
  }
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


def plant(source: str) -> tuple[bytes, str]:
    options = ("-arch=sm_90a", "--ptxas-options=-v")
    cubin, log = nvrtc.compile_program((WGMMA + source).encode(), "p.cu", {}, options, "CUBIN")
    return cubin, log


def test_planted_local_array_in_a_loop_is_found(tmp_path):
    code = disassemble(plant(SPILLED)[0], tmp_path)
    blocks = basic_blocks(code)
    assert any(local_accesses(opcodes(blocks, loop)) for loop in loops(blocks))
    assert tile_loops(code) == []


def test_planted_local_array_in_a_tile_loop_is_found(tmp_path):
    cubin, log = plant(SPILLED_TILE)
    (tile_loop,) = tile_loops(disassemble(cubin, tmp_path))
    assert local_accesses(tile_loop) >= 2
    assert wgmma_warnings(log) == []


def test_planted_serialisation_is_found():
    assert wgmma_warnings(plant(SERIALISED)[1])
