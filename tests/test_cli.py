"""The command line: each command in this process, with and without what it needs, and one in its
own. No GPU is needed; what `bench` measures is the business of tests/gpu.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from support import fake_timer

from flashmla_cupy import __version__, info
from flashmla_cupy.__main__ import main
from flashmla_cupy.bench import cases as bench
from flashmla_cupy.bench import timer as bench_gpu
from flashmla_cupy.build import compiler, cubin_cache, nvrtc
from flashmla_cupy.errors import (
    KernelCacheWarning,
    KernelCompileError,
    MissingDependencyError,
    NoDeviceError,
    NVRTCNotFoundError,
)
from flashmla_cupy.gpu.kernels import KERNELS, Variant, all_variants

ROOT = Path(info.__file__).resolve().parent.parent
SOURCES = {  # small kernels of the same names
    source: "".join(
        f'extern "C" __global__ void {kernel.name}(int* a) {{ *a = PAGE_SIZE; }}\n'
        for kernel in KERNELS
        if kernel.source == source
    ).encode()
    for source in dict.fromkeys(kernel.source for kernel in KERNELS)
} | {"page_size.cuh": b"#ifndef PAGE_SIZE\n#define PAGE_SIZE 0\n#endif\n"}
SOURCES = {
    name: text if name.endswith(".cuh") else b'#include "page_size.cuh"\n' + text
    for name, text in SOURCES.items()
}
KEY = "0" * 64
METADATA = {
    "name": "schedule",
    "resources": {"registers": 45, "stack_frame": 0, "spill_stores": 8, "spill_loads": 0}
    | {"shared": 0},
    "seconds": 1.234,
    "log": "",
}


@pytest.fixture
def folder(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and small kernels in place of the library's."""
    monkeypatch.setattr(compiler, "_sources", lambda: SOURCES)
    return fresh


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    nvrtc._chosen.cache_clear()
    nvrtc.build.cache_clear()
    yield
    nvrtc._chosen.cache_clear()
    nvrtc.build.cache_clear()


def raising(error: Exception):
    def call(*arguments, **options):
        raise error

    return call


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["info", "warmup", "bench", "clear-cache"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: flashmla-cupy {command}" in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("info", "warmup", "bench", "clear-cache"))


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"flashmla-cupy {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["warmup", "--page-size", "48"], ["warmup", "--dtype", "int8"]]
)
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: flashmla-cupy" in capsys.readouterr().err


def test_without_a_command_it_shows_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"  {name} " in err or f"  {name}\n" in err for name in ("info", "clear-cache"))
    assert "compile the kernels into the cache" in err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["wramup"], "warmup"),
        (["clearcache"], "clear-cache"),
        (["warmup", "--dtype", "bfloat"], "bfloat16"),
        (["warmup", "--pagesize", "64"], "--page-size"),
        (["bench", "--plto", "x.png"], "--plot"),
        (["entirely-else"], None),
        (["info", "--verbosely"], None),
    ],
)
def test_a_typo_gets_a_suggestion(capsys, arguments, meant):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith(f"Did you mean {meant}?") == (meant is not None)
    assert ("Did you mean" in last) == (meant is not None)


# ---- info ----------------------------------------------------------------------------------------


def lines_by_label(out: str) -> dict[str, str]:
    head = out.partition("\n\n")[0]
    return {line[:14].strip(): line[14:] for line in head.splitlines()}


def test_info(capsys, folder, has_nvrtc):
    compiler.compile_variant(Variant("schedule"))
    cubin_cache.store(KEY, METADATA, b"of another version")
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    found = lines_by_label(out)
    assert found["flashmla-cupy"] == __version__
    assert found["NumPy"] == np.__version__
    assert found["cache folder"] == str(folder)
    assert found["NVRTC"].startswith(nvrtc.build())
    assert "libnvrtc" in found["NVRTC"]
    rows = {line.split()[0]: line.split()[1:] for line in out.partition("\n\n")[2].splitlines()}
    assert {variant.name for variant in all_variants()} <= rows.keys()
    assert rows["schedule"][-1] == "yes"
    assert int(rows["schedule"][0]) > 0
    assert rows["combine_bf16"] == ["-", "-", "-", "no"]
    assert "1 of 2 entries" in out
    assert err == ""


def test_info_compiles_no_kernel(capsys, folder, has_nvrtc):
    assert main(["info"]) == 0
    assert not folder.exists()


def test_info_without_cupy(capsys, folder, no_cupy):
    cubin_cache.store(KEY, METADATA, b"cubin")
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    found = lines_by_label(out)
    assert found["flashmla-cupy"] == __version__
    for label in ("CuPy", "GPU", "driver", "NVRTC"):
        assert "pip install" in found[label], label
    assert "The cache holds 1 kernel;" in out
    assert err == ""


def test_info_without_nvrtc(capsys, folder, monkeypatch):
    reason = "NVRTC, the CUDA run-time compiler, is not installed. Install it."
    monkeypatch.setattr(nvrtc, "build", raising(NVRTCNotFoundError(reason)))
    assert main(["info"]) == 0
    assert lines_by_label(capsys.readouterr().out)["NVRTC"] == reason


def test_info_with_a_damaged_installation(capsys, folder, monkeypatch):
    monkeypatch.setattr(info, "_runtime", raising(AttributeError("no runtime\nmore")))
    assert main(["info"]) == 0
    found = lines_by_label(capsys.readouterr().out)
    assert found["GPU"] == found["driver"] == "cannot be found: AttributeError: no runtime"


def test_info_with_a_bad_variable(capsys, folder, monkeypatch):
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", "relative")
    assert main(["info"]) == 0
    found = lines_by_label(capsys.readouterr().out)
    assert "expected the absolute path" in found["cache folder"]


def test_info_says_once_what_is_wrong_with_the_folder(capsys, folder, monkeypatch):
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", "relative")
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert (out + err).count("FLASHMLA_CUPY_CACHE_DIR: expected") == 1
    assert out.splitlines()[-1].startswith("cache folder")


def test_a_path_that_the_output_cannot_show(tmp_path):
    """An ASCII terminal and a folder that is not ASCII, or not even text."""
    tmp_path.chmod(0o700)
    folder = os.fsencode(tmp_path / "Zwischenablage für Kerne") + b"\xff"
    environment = os.environb | {
        b"FLASHMLA_CUPY_CACHE_DIR": folder,
        b"PYTHONIOENCODING": b"ascii",
    }
    for command in ("info", "clear-cache"):
        done = subprocess.run(
            [sys.executable, "-m", "flashmla_cupy", command],
            cwd=ROOT, env=environment, capture_output=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"f\\xfcr Kerne" in done.stdout


class _Runtime:
    """CUDA's answers on a machine with two GPUs."""

    class CUDARuntimeError(RuntimeError):
        pass

    @staticmethod
    def getDeviceCount():
        return 2

    @staticmethod
    def getDeviceProperties(number):
        facts = {"major": 9 - number, "minor": 0, "multiProcessorCount": 132 - number}
        return facts | {"name": b"GPU %d" % number, "totalGlobalMem": 80 << 30}

    @staticmethod
    def driverGetVersion():
        return 12080


def test_info_with_gpus(monkeypatch):
    monkeypatch.setattr(info, "_runtime", lambda: _Runtime)
    assert info._gpus() == [
        "0: GPU 0, compute capability 9.0, 132 SMs, 80 GiB",
        "1: GPU 1, compute capability 8.0, 131 SMs, 80 GiB; not supported, the kernels need 9.0",
    ]
    assert "CUDA 12.8" in info._driver()


@pytest.mark.parametrize("pipe", ["open", "closed"])
def test_info_in_its_own_process(tmp_path, pipe):
    """Exit status and streams; and no traceback when the reader, such as head, has left."""
    environment = {**os.environ, "FLASHMLA_CUPY_CACHE_DIR": str(tmp_path / "cubins")}
    command = [sys.executable, "-m", "flashmla_cupy", "info"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        if pipe == "closed":
            process.stdout.close()
        out = b"" if pipe == "closed" else process.stdout.read()
        err = process.stderr.read()
    assert process.returncode == (1 if pipe == "closed" else 0)
    assert pipe == "closed" or out.startswith(b"flashmla-cupy")
    assert err == b""


# ---- warmup --------------------------------------------------------------------------------------


def test_warmup_compiles_everything_once(capsys, folder, has_nvrtc, monkeypatch):
    assert main(["warmup"]) == 0
    out, err = capsys.readouterr()
    names = [line.split()[0] for line in out.splitlines()[1:-1]]
    assert names == [variant.name for variant in all_variants()]
    assert out.count("compiled") == len(names)
    assert out.splitlines()[-1].startswith(f"{len(names)} kernels in ")
    assert str(folder) in out
    assert err == ""

    monkeypatch.setattr(compiler, "_memo", {})
    assert main(["warmup"]) == 0
    assert capsys.readouterr().out.count("found in the cache") == len(names)


def serving(dtype: str, *pages: str) -> list[str]:
    """The kernels of a dtype and page sizes; most serve every page size, and some every dtype."""
    decode = ("dense_decode", "few_rows_decode")
    formats = ["v32", "v4", "v32_wide", "v4_wide", "e4m3", "e4m3_q_e4m3", "16bit", "16bit_512"]
    if dtype == "fp16":
        formats = [name for name in formats if not name.endswith(("wide", "q_e4m3"))]
    few = ["few_rows_v32", "few_rows_v4", "few_rows_e4m3"] + ["few_rows_e4m3_q_e4m3"] * (
        dtype == "bf16"
    )
    gathering = (*(f"gather_{name}" for name in formats), *few, "combine_gathered")
    return [
        *(f"{name}_{dtype}_{page}" for name in decode for page in pages),
        *(f"combine_{dtype}", "schedule"),
        *(f"append_{dtype}", "copy_pages", "update_tables"),
        *(f"{name}_{dtype}" for name in gathering),
        "list_lengths",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dtype", "float16", "--page-size", "256", "32"], serving("fp16", "p64", "p32")),
        (["--dtype", "fp16", "--page-size", "32"], serving("fp16", "p32")),  # as kernels are named
        (["--dtype", "bfloat16", "--page-size", "16"], serving("bf16", "p16")),
    ],
)
def test_warmup_of_some(capsys, folder, has_nvrtc, arguments, expected):
    assert main(["warmup", *arguments]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == expected


def test_warmup_shows_the_first_error_of_the_compiler(capsys, folder, has_nvrtc, monkeypatch):
    broken = SOURCES | {"combine.cu": b'extern "C" __global__ void combine() { nonsense; }'}
    monkeypatch.setattr(compiler, "_sources", lambda: broken)
    assert main(["warmup"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("flashmla-cupy: error: NVRTC")
    assert "nonsense" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["warmup", "bench"])
def test_without_cupy(command, capsys, folder, no_cupy):
    assert main([command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flashmla-cupy: error: CuPy is needed")
    assert err.count("\n") == 1


# ---- bench ---------------------------------------------------------------------------------------


def test_bench_without_a_gpu(capsys, tmp_path):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    results = tmp_path / "results.json"
    assert main(["bench", "--json", str(results)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "flashmla-cupy: error: bench needs a Hopper GPU, and CUDA finds no GPU on this machine.\n"
    )
    assert not results.exists()


def test_bench_lists_its_cases(capsys):
    assert main(["bench", "--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [case.name for case in bench.CASES]
    assert len(set(names)) == len(names)


def test_bench_with_page_sizes(capsys, timer):
    sizes = []
    timer.decode_us = lambda self, case: sizes.append(case.page_size) or 100.0
    assert main(["bench", "--cases", "mem.h8", "--page-size", "16", "256"]) == 0
    assert sizes == [16, 256]
    out = capsys.readouterr().out
    assert "mem.h8.b128.s4096.p16 " in out and "mem.h8.b128.s4096.p256 " in out
    assert main(["bench", "--page-size", "48"]) == 2
    assert "expected one of 16, 32, 64, 128, 256, got 48" in capsys.readouterr().err


def test_bench_with_an_unknown_case(capsys):
    assert main(["bench", "--cases", "lat", "nonsense"]) == 2
    err = capsys.readouterr().err
    assert "'nonsense'" in err
    assert err.count("\n") == 1


@pytest.fixture
def timer(monkeypatch):
    return fake_timer.install(monkeypatch)


def test_bench_prints_rows_and_writes_json(capsys, tmp_path, timer):
    results = tmp_path / "results.json"
    name = "mem.h16.b128.s4096"
    assert main(["bench", "--cases", name, "lat", "--json", str(results)]) == 0
    out, err = capsys.readouterr()
    written = json.loads(results.read_text())
    assert written["read_gbps"] == 4000
    assert len(written["cases"]) == 15
    row = next(row for row in written["cases"] if row["case"] == name)
    tokens, rows = 128 * 4096, 128 * 16
    assert row["us"] == 100
    assert row["tflops"] == pytest.approx(2 * 16 * tokens * 1088 / 1e8)
    assert row["gbps"] == pytest.approx(2 * (576 * tokens + 1088 * rows) / 1e5)
    assert row["matmul_percent"] == pytest.approx(row["tflops"] / 5)
    assert row["read_percent"] == pytest.approx(row["gbps"] / 40)
    shown = next(line for line in out.splitlines() if line.startswith(name))
    assert shown.split()[1:] == ["100.0", "182.5", "6084", "37", "152"]
    assert "[15/15]" in err


def test_bench_without_cublas(capsys, timer):
    timer.matmul = None
    assert main(["bench", "--cases", "mem.h8"]) == 0
    out = capsys.readouterr().out
    assert "nvidia-cublas-cu12" in out
    assert out.splitlines()[-1].split()[-2] == "-"


def test_bench_with_a_file_that_cannot_be_written(capsys, tmp_path, timer):
    assert main(["bench", "--json", str(tmp_path / "none" / "results.json")]) == 2
    err = capsys.readouterr().err
    assert "No such file" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_case(case):
    """flops by the definition, query by query; lengths that FlashMLA's and the other tests use."""
    assert len(case.lengths) == case.batch
    assert min(case.lengths) >= case.s_q
    seen = 0
    for n in case.lengths:
        for i in range(case.s_q):
            seen += n - case.s_q + 1 + i if case.causal else n
    assert case.flops == 2 * case.h_q * seen * (576 + 512)


def test_flashmla_group():
    """Of FlashMLA's 16 performance cases the 4 causal ones with s_q = 1 equal others."""
    found = {(c.batch, c.s_q, c.h_q, c.length, c.causal) for c in bench.select(["flashmla"])}
    lengths = (4096, 8192, 16384, 32768)
    assert found == {
        (128, s_q, 128, length, causal)
        for s_q, causal in ((1, False), (2, False), (2, True))
        for length in lengths
    }


def test_block_tables_share_no_page():
    pages = [3, 1, 2]
    tables = bench_gpu.block_tables(pages, copies=4)
    used = [
        page
        for table in tables
        for row, n in zip(table, pages, strict=True)
        for page in row[:n].tolist()
    ]
    assert sorted(used) == list(range(24))
    assert all(table.shape == (3, 3) and table.dtype == np.int32 for table in tables)


# ---- clear-cache ---------------------------------------------------------------------------------


def test_clear_cache(capsys, folder):
    cubin_cache.store(KEY, METADATA, b"cubin" * 1000)
    other = folder / "other"
    other.write_text("not ours")
    assert main(["clear-cache"]) == 0
    assert capsys.readouterr().out == f"Removed 1 file, 5 kB, from {folder}.\n"
    assert list(folder.iterdir()) == [other]


def test_clear_cache_of_a_folder_that_others_can_write(capsys, folder):
    cubin_cache.store(KEY, METADATA, b"cubin")
    folder.chmod(0o777)
    assert main(["clear-cache"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flashmla-cupy: error: The kernel cache is not used, because other users")
    assert err.count("\n") == 1
    assert len(list(folder.iterdir())) == 1


def test_clear_cache_when_an_entry_stays(capsys, folder, monkeypatch):
    cubin_cache.store(KEY, METADATA, b"cubin")

    def unlink(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "unlink", unlink)
    assert main(["clear-cache"]) == 2
    err = capsys.readouterr().err
    assert "Read-only file system" in err
    assert err.splitlines()[-1] == (
        f"flashmla-cupy: error: 1 file of {folder} could not be removed."
    )


def test_clear_cache_that_does_not_exist(capsys, folder):
    assert main(["clear-cache"]) == 0
    assert capsys.readouterr().out == f"Removed 0 files, 0 kB, from {folder}.\n"


def test_clear_cache_with_a_bad_variable(capsys, monkeypatch):
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", "relative")
    assert main(["clear-cache"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("flashmla-cupy: error: FLASHMLA_CUPY_CACHE_DIR")
    assert err.count("\n") == 1


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NoDeviceError("There is no GPU."), "There is no GPU."),
        (MissingDependencyError("one\ntwo"), "one two"),
        (KernelCompileError("NVRTC failed.", "warning: a\nx.cu(1): error: b\nx.cu(2): error: c"),
         "NVRTC failed. x.cu(1): error: b"),
        (PermissionError(13, "Permission denied", "/x"), "[Errno 13] Permission denied: '/x'"),
    ],
)  # fmt: skip
def test_errors_are_one_line(capsys, monkeypatch, error, says):
    monkeypatch.setattr(cubin_cache, "clear", raising(error))
    assert main(["clear-cache"]) == 2
    assert capsys.readouterr().err == f"flashmla-cupy: error: {says}\n"


def test_errors_that_are_not_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cubin_cache, "clear", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["clear-cache"])


def test_interrupt(monkeypatch):
    monkeypatch.setattr(cubin_cache, "clear", raising(KeyboardInterrupt()))
    assert main(["clear-cache"]) == 130


def test_warnings_are_one_line(capsys, folder, monkeypatch):
    def clear():
        warnings.warn("The cache is not used.", KernelCacheWarning, stacklevel=1)
        return 0, 0

    monkeypatch.setattr(cubin_cache, "clear", clear)
    before = warnings.showwarning
    assert main(["clear-cache"]) == 0
    assert capsys.readouterr().err == "flashmla-cupy: warning: The cache is not used.\n"
    assert warnings.showwarning is before
