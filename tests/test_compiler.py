"""Compiling with NVRTC: variants, keys, the memo and the disk cache around it, and the errors.

Most tests compile a small kernel of their own in place of the library's sources, which
test_sass.py compiles. No GPU is needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashmla_cupy import __main__
from flashmla_cupy.build import compiler, cubin_cache, nvrtc
from flashmla_cupy.build.compiler import compile_variant
from flashmla_cupy.errors import (
    KernelCacheError,
    KernelCacheWarning,
    KernelCompileError,
)
from flashmla_cupy.gpu import kernels
from flashmla_cupy.gpu.kernels import KERNELS, Kernel, Variant, all_variants
from flashmla_cupy.gpu.parameters import Parameters
from flashmla_cupy.locks import Lock

ROOT = Path(compiler.__file__).resolve().parents[2]
SMALL = {
    "schedule.cu": b"""#include "part.cuh"
extern "C" __global__ void schedule(int* a) { *a = PART; }""",
    "combine.cu": b'extern "C" __global__ void combine(int* a) { *a = 2; }',
    "part.cuh": b"#define PART 7\n",
}
SCHEDULE = Variant("schedule")


@pytest.fixture
def sources(has_nvrtc: None, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The sources that are compiled; a test may change them."""
    texts = dict(SMALL)
    monkeypatch.setattr(compiler, "_sources", lambda: dict(texts))
    return texts


@pytest.fixture
def compilations(sources: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The options of every compilation to a cubin, in their order."""
    made: list[tuple] = []
    real = nvrtc.compile_program

    def counting(source, name, headers, options, product):
        if product == "CUBIN":
            made.append(options)
        return real(source, name, headers, options, product)

    monkeypatch.setattr(nvrtc, "compile_program", counting)
    return made


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next compile_variant behave as in a new process."""
    monkeypatch.setattr(compiler, "_memo", {})


# ---- variants --------------------------------------------------------------------------------


def test_variants():
    names = [variant.name for variant in all_variants()]
    pages = ("p64", "p32", "p16")
    decode = [f"dense_decode_{dtype}_{page}" for dtype in ("bf16", "fp16") for page in pages]
    few_rows = [f"few_rows_decode_{dtype}_{page}" for dtype in ("bf16", "fp16") for page in pages]
    of_caches = ["append_bf16", "append_fp16", "copy_pages", "update_tables"]
    of_bf16 = ("v32_wide", "v4_wide", "e4m3_q_e4m3")
    formats = ("v32", "v4", *of_bf16[:2], "e4m3", of_bf16[2], "16bit", "16bit_512")
    gathering = [
        f"{name}_{dtype}"
        for name in (
            *(f"gather_{format}" for format in formats),
            *("few_rows_v32", "few_rows_v4", "few_rows_e4m3", "few_rows_e4m3_q_e4m3"),
            "combine_gathered",
        )
        for dtype in ("bf16", "fp16")
        if not (name.endswith(of_bf16) and dtype == "fp16")
    ]
    everything = [*decode, *few_rows, "combine_bf16", "combine_fp16", "schedule", *of_caches]
    assert names == [*everything, *gathering, "list_lengths"]


@pytest.mark.parametrize(
    ("variant", "macros", "source"),
    [
        (
            Variant("dense_decode", "bfloat16", 64),
            ("-DDTYPE_BF16", "-DPAGE_SIZE=64"),
            "sm90_dense_decode.cu",
        ),
        (Variant("dense_decode", "float16", 16), ("-DDTYPE_FP16", "-DPAGE_SIZE=16"), None),
        (
            Variant("few_rows_decode", "bfloat16", 32),
            ("-DDTYPE_BF16", "-DPAGE_SIZE=32"),
            "sm90_few_rows_decode.cu",
        ),
        (Variant("combine", "float16"), ("-DDTYPE_FP16",), "combine.cu"),
        (Variant("schedule"), (), "schedule.cu"),
        (
            Variant("gather_v32", "bfloat16"),
            ("-DGATHERED", "-DGATHER=gather_v32", "-DFORMAT_V32", "-DDTYPE_BF16"),
            "sm90_fp8_decode.cu",
        ),
        (Variant("combine_gathered", "float16"), ("-DGATHERED", "-DDTYPE_FP16"), "combine.cu"),
    ],
)
def test_macros(variant, macros, source):
    assert variant.macros == macros
    assert variant.entry == variant.kernel
    assert source in (None, variant.source)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("decode",), "kernel"),
        (("dense_decode", "bf16"), "dtype"),
        (("dense_decode", "float32"), "dtype"),
        (("dense_decode", "bfloat16", 128), "page_size"),
        (("dense_decode", "bfloat16"), "page_size"),
        (("dense_decode",), "dtype"),
        (("schedule", None, None, "sm_80"), "kernel"),
        (("combine", "bfloat16", 32), "page_size"),
        (("schedule", "float16"), "dtype"),
    ],
)
def test_variant_that_does_not_exist(arguments, says):
    with pytest.raises(ValueError, match=f"Variant: {says}.*expected.*got"):
        Variant(*arguments)


def new_row(**of):
    """A kernel that is not there."""
    row = Kernel("fresh", "fresh.cu", ("sm_90a", "sm_90"), 64, Parameters("pointer out"), **of)
    return (*KERNELS, row)


def test_a_variant_is_a_row(monkeypatch, fresh, has_nvrtc, capsys):
    """Compiling, warmup and info know of a kernel by its row alone."""
    rows = new_row(dtypes=("float16",), page_sizes=(64, 8))
    monkeypatch.setattr(kernels, "KERNELS", rows[-1:])
    monkeypatch.setattr(
        compiler,
        "_sources",
        lambda: {"fresh.cu": b'extern "C" __global__ void fresh(int* out) { *out = PAGE_SIZE; }'},
    )
    names = [f"fresh_fp16_{page}{arch}" for arch in ("", "_sm_90") for page in ("p64", "p8")]
    assert [variant.name for variant in all_variants()] == names
    assert kernels.select.__wrapped__("fresh", "sm_90", "float16", 256).name == names[2]
    assert kernels.select.__wrapped__("fresh", "sm_90a", "float16", 8).name == names[1]
    assert __main__.main(["warmup", "--page-size", "128", "--dtype", "float16"]) == 0
    found = capsys.readouterr().out
    assert names[0] in found and names[2] in found and names[1] not in found
    assert __main__.main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    cached = {line[0]: line[-1] for line in lines if line and line[0] in names}
    assert cached == dict(zip(names, ("yes", "no", "yes", "no"), strict=True))


# ---- keys ------------------------------------------------------------------------------------


def changed_byte(texts, patch):
    texts["part.cuh"] = b"#define PART 8\n"


def moved_byte(texts, patch):
    texts["schedule.cu"], texts["part.cuh"] = texts["part.cuh"], texts["schedule.cu"]


def new_file(texts, patch):
    texts["new.cuh"] = b""


def renamed_file(texts, patch):
    texts["renamed.cuh"] = texts.pop("part.cuh")


def other_package(texts, patch):
    patch.setattr(compiler, "__version__", "99.0")


def other_schema(texts, patch):
    patch.setattr(compiler, "_KEY_SCHEMA", 99)


def other_option(texts, patch):
    patch.setattr(compiler, "_BASE_OPTIONS", (*compiler._BASE_OPTIONS, "-lineinfo"))


def other_nvrtc(texts, patch):
    patch.setattr(nvrtc, "build", lambda: nvrtc_build + "1")


MUTATIONS = [
    changed_byte,
    moved_byte,
    new_file,
    renamed_file,
    other_package,
    other_schema,
    other_option,
    other_nvrtc,
]
nvrtc_build = "12.9 V12.9.86 CL-1"


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_every_component_changes_the_key(monkeypatch, mutate):
    monkeypatch.setattr(nvrtc, "build", lambda: nvrtc_build)
    texts = dict(SMALL)
    before = compiler.cache_key(SCHEDULE, texts)
    assert compiler.cache_key(SCHEDULE, dict(reversed(texts.items()))) == before
    mutate(texts, monkeypatch)
    assert compiler.cache_key(SCHEDULE, texts) != before


def test_every_variant_has_its_own_key(monkeypatch):
    monkeypatch.setattr(nvrtc, "build", lambda: nvrtc_build)
    keys = {compiler.cache_key(variant, SMALL) for variant in all_variants()}
    assert len(keys) == len(all_variants())


def test_build_names_more_than_the_version(has_nvrtc):
    major, minor = nvrtc.version()
    assert nvrtc.build().startswith(f"{major}.{minor} V{major}.{minor}.")


def test_the_build_is_asked_for_once(monkeypatch, fresh, has_nvrtc):
    if nvrtc._key_of_file() is None:
        pytest.skip("what NVRTC was loaded from is not known here")
    asked, real = [], nvrtc.compile_program

    def counting(*arguments):
        asked.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(nvrtc, "compile_program", counting)

    def build():
        nvrtc.build.cache_clear()
        return nvrtc.build()

    first = build()
    assert asked == ["empty.cu"]
    assert build() == first
    assert asked == ["empty.cu"]
    assert compiler.cache_entries() == []
    monkeypatch.setattr(nvrtc, "_key_of_file", lambda: "0" * 64)  # another file
    assert build() == first
    assert len(asked) == 2
    monkeypatch.setattr(nvrtc, "_key_of_file", lambda: None)
    assert build() == first
    assert len(asked) == 3
    monkeypatch.setattr(nvrtc, "_key_of_file", lambda: "1" * 64)
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", "not/absolute")  # not what it is asked about
    assert build() == first


# ---- compiling and keeping -------------------------------------------------------------------


def test_cubin_is_whole(sources):
    built = compile_variant(SCHEDULE)
    assert built.cubin[:4] == b"\x7fELF"
    segments, sections = struct.unpack_from("<QQ", built.cubin, 32)  # offsets of the ELF tables
    sizes = struct.unpack_from("<HHHH", built.cubin, 54)
    end = max(segments + sizes[0] * sizes[1], sections + sizes[2] * sizes[3])
    assert len(built.cubin) == end  # CuPy drops the last byte; it is back
    assert built.resources.registers > 0
    assert (built.resources.spill_stores, built.resources.spill_loads) == (0, 0)
    assert "schedule" in built.log and "\0" not in built.log
    assert built.seconds > 0


def test_memo_then_disk(compilations, fresh, monkeypatch):
    first = compile_variant(SCHEDULE)
    assert compile_variant(SCHEDULE) is first
    forget(monkeypatch)
    second = compile_variant(SCHEDULE)
    assert len(compilations) == 1
    assert (first.cached, second.cached) == (False, True)
    assert second.cubin == first.cubin
    assert second.resources == first.resources
    assert (second.log, second.seconds) == (first.log, first.seconds)
    assert len(os.listdir(fresh)) == 1


def test_changed_header_is_compiled_again(compilations, sources, monkeypatch):
    first = compile_variant(SCHEDULE)
    sources["part.cuh"] = b"#define PART 1234567\n"
    forget(monkeypatch)
    assert compile_variant(SCHEDULE).cubin != first.cubin
    assert len(compilations) == 2


def test_cached_variant_and_entries(compilations, monkeypatch):
    assert compiler.cached_variant(SCHEDULE) is None
    built = compile_variant(SCHEDULE)
    forget(monkeypatch)
    kept = compiler.cached_variant(SCHEDULE)
    assert kept is not None and kept.resources == built.resources
    (entry,) = compiler.cache_entries()
    assert entry.metadata["name"] == "schedule"
    assert entry.metadata["resources"]["registers"] == built.resources.registers
    assert entry.metadata["nvrtc"] == nvrtc.build()
    assert len(compilations) == 1


def test_extra_options_are_used_and_nothing_is_kept(compilations, fresh):
    built = compile_variant(SCHEDULE, extra_options=["-DPART=9"])
    assert compilations[0][-1] == "-DPART=9"
    assert not built.cached
    assert not fresh.exists()
    compile_variant(SCHEDULE)
    assert len(compilations) == 2
    with pytest.raises(TypeError, match="sequence"):
        compile_variant(SCHEDULE, extra_options="-lineinfo")


def test_refresh_replaces_what_is_kept(compilations, monkeypatch):
    first = compile_variant(SCHEDULE)
    again = compile_variant(SCHEDULE, refresh=True)
    assert len(compilations) == 2 and not again.cached
    assert compile_variant(SCHEDULE) is again
    assert again.cubin == first.cubin


def test_unwritable_directory(compilations, fresh, monkeypatch):
    fresh.touch()  # a file where the directory should be
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", str(fresh / "below"))
    with pytest.warns(RuntimeWarning, match="compiled in memory") as caught:
        compile_variant(SCHEDULE)
        compile_variant(Variant("combine", "bfloat16"))
    assert len(caught) == 1
    compile_variant(SCHEDULE)
    assert len(compilations) == 2  # the memo still serves


def test_untrusted_directory(compilations, fresh):
    fresh.mkdir()
    fresh.chmod(0o777)
    with pytest.warns(KernelCacheWarning, match="chmod go-w"):
        assert compile_variant(SCHEDULE).cubin
    assert os.listdir(fresh) == []


def test_damaged_entry_is_compiled_again(compilations, fresh, monkeypatch):
    compile_variant(SCHEDULE)
    (name,) = os.listdir(fresh)
    (fresh / name).write_bytes((fresh / name).read_bytes()[:-1])
    forget(monkeypatch)
    assert not compile_variant(SCHEDULE).cached
    forget(monkeypatch)
    assert compile_variant(SCHEDULE).cached
    assert len(compilations) == 2


# ---- FLASHMLA_CUPY_CACHE_VERIFY --------------------------------------------------------------


def test_verify_accepts_an_honest_entry(compilations, monkeypatch):
    compile_variant(SCHEDULE)
    forget(monkeypatch)
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_VERIFY", "1")
    assert compile_variant(SCHEDULE).cached
    assert "--no-cache" not in compilations[0]
    assert ("--no-cache" in compilations[1]) == (nvrtc.version() >= (12, 9))


def test_verify_replaces_an_entry_that_differs(compilations, monkeypatch):
    honest = compile_variant(SCHEDULE)
    (entry,) = compiler.cache_entries()
    cubin_cache.store(entry.key, entry.metadata, b"something else")
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_VERIFY", "1")
    forget(monkeypatch)
    with pytest.warns(KernelCacheWarning, match="differs from a fresh compilation"):
        assert compile_variant(SCHEDULE).cubin == honest.cubin
    (entry,) = compiler.cache_entries()
    assert entry.cubin == honest.cubin


# ---- threads and processes -------------------------------------------------------------------


def test_threads_compile_once(compilations):
    barrier = threading.Barrier(8)

    def work(_):
        barrier.wait()
        return compile_variant(SCHEDULE)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert len(compilations) == 1
    assert all(result is results[0] for result in results)


def test_compile_variants_keeps_the_order(compilations):
    wanted = [Variant("combine", "bfloat16"), SCHEDULE, Variant("combine", "float16"), SCHEDULE]
    assert [built.variant for built in compiler.compile_variants(wanted)] == wanted
    assert len(compilations) == 3
    assert compiler.compile_variants([]) == []


def test_threads_share_a_failure_and_the_next_call_tries_again(compilations, sources):
    sources["part.cuh"] = b"#error broken\n"
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(compile_variant, SCHEDULE) for _ in range(4)]
    assert all(isinstance(future.exception(), KernelCompileError) for future in futures)
    sources["part.cuh"] = SMALL["part.cuh"]
    assert compile_variant(SCHEDULE).cubin


def interrupted_at(line: int, code: types.CodeType, call) -> None:
    """Calls, and lets Ctrl-C come when that line of the code is reached."""

    def interrupt(frame, event, argument):
        if frame.f_code is not code:
            return None
        if event == "line" and frame.f_lineno == line:
            raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            call()
    finally:
        sys.settrace(None)


def test_an_interrupt_between_any_two_lines_leaves_nobody_waiting(compilations, monkeypatch):
    """Whoever calls next compiles it, in whichever thread."""
    code = compile_variant.__code__
    lines = sorted({line for *_, line in code.co_lines() if line})
    assert len(lines) > 8
    for line in lines:
        forget(monkeypatch)
        interrupted_at(line, code, lambda: compile_variant(SCHEDULE))
        made: list[compiler.Compiled] = []
        other = threading.Thread(
            target=lambda made=made: made.append(compile_variant(SCHEDULE)), daemon=True
        )
        other.start()
        other.join(20)
        assert made, f"an interrupt at line {line} of compiler.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_does_not_wait_for_its_parent(sources):
    held = compiler._locks[SCHEDULE] = Lock()  # a thread of the parent is compiling this
    with held, compiler._locks_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                os._exit(0 if compile_variant(SCHEDULE).cubin else 1)
            finally:
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_processes_with_an_empty_cache(fresh, has_nvrtc):
    """Eight at once: each compiles or finds a whole entry, and all get the same kernel."""
    script = (
        "import hashlib; from flashmla_cupy.build import compiler;"
        "built = compiler.compile_variant(compiler.Variant('schedule'));"
        "print(hashlib.sha256(built.cubin).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", script]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 8
    assert len(set(outputs)) == 1 and len(outputs[0]) == 65
    (entry,) = compiler.cache_entries()
    assert entry.metadata["name"] == "schedule"
    also_kept = 1 if nvrtc._key_of_file() else 0  # the build of NVRTC
    assert len(os.listdir(fresh)) == 1 + also_kept


def test_import_writes_nothing_and_leaves_cupy_alone(tmp_path):
    script = "import sys, flashmla_cupy.build.compiler; print('cupy' in sys.modules)"
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert output.stdout == "False\n"
    assert os.listdir(tmp_path) == []


# ---- what is said ----------------------------------------------------------------------------


def test_one_info_line_a_compile(sources, fresh, caplog):
    with caplog.at_level(logging.INFO, "flashmla_cupy"):
        compile_variant(SCHEDULE)
        compile_variant(SCHEDULE)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith(f"0 spill bytes, cached in {fresh}")
    assert message.startswith("compiled schedule for sm_90a in ")


@pytest.mark.parametrize(
    ("verbose", "terminal", "handler", "shown"),
    [
        (None, True, False, True),
        (None, True, True, False),  # whoever set up logging has the line there
        (None, False, False, False),
        ("0", True, False, False),
        ("1", False, True, True),
    ],
)
def test_line_on_stderr(sources, monkeypatch, capsys, verbose, terminal, handler, shown):
    if verbose is not None:
        monkeypatch.setenv("FLASHMLA_CUPY_VERBOSE", verbose)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: handler)
    compile_variant(SCHEDULE)
    compile_variant(SCHEDULE)
    text = capsys.readouterr().err
    assert text.count("\n") == text.count("flashmla_cupy: compiled schedule for") == int(shown)


def test_line_in_a_notebook(sources, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    compile_variant(SCHEDULE)
    assert capsys.readouterr().err.count("compiled schedule") == 1


@pytest.mark.parametrize("variable", ["FLASHMLA_CUPY_VERBOSE", "FLASHMLA_CUPY_CACHE_VERIFY"])
@pytest.mark.parametrize("value", ["", "yes", "2"])
def test_switch_with_an_unknown_value(compilations, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(KernelCacheError, match=f"{variable}: expected 0 or 1, got"):
        compile_variant(SCHEDULE)
    assert compilations == []


def test_parse_resources():
    log = """ptxas info    : 48 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
ptxas         .     48 bytes stack frame, 160 bytes spill stores, 164 bytes spill loads
ptxas info    : Used 168 registers, used 4 barriers, 48 bytes cumulative stack size
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1056 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 3.4 ms
"""
    assert compiler.parse_resources(log) == {
        "one": compiler.Resources(168, 48, 160, 164, 0),
        "two": compiler.Resources(32, 0, 0, 0, 1056),
    }
    assert compiler.parse_resources("") == {}


# ---- errors ----------------------------------------------------------------------------------


def test_failed_compilation_carries_its_log(sources, fresh):
    sources["schedule.cu"] = b"int broken"
    with pytest.raises(KernelCompileError, match=r"cannot compile schedule\.cu") as caught:
        compile_variant(SCHEDULE)
    assert "schedule.cu(1): error" in caught.value.log and "\0" not in caught.value.log
    assert not fresh.exists()


def test_missing_source_and_missing_kernel(sources):
    with pytest.raises(KernelCompileError, match=r"no sm90_dense_decode\.cu"):
        compile_variant(Variant("dense_decode", "bfloat16", 64))
    sources["schedule.cu"] = sources["combine.cu"]
    with pytest.raises(KernelCompileError, match=r"no kernel schedule"):
        compile_variant(SCHEDULE)


def test_no_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(
        compiler, "__file__", str(tmp_path / "flashmla_cupy" / "build" / "compiler.py")
    )
    with pytest.raises(KernelCompileError, match="sources are missing"):
        compiler._sources()


def test_log_missing_from_a_compilation(sources, monkeypatch):
    """NVRTC's own cache may answer without a log: it is then asked again without that cache."""
    if nvrtc.version() < (12, 9):
        pytest.skip("this NVRTC has no cache of its own")
    real = nvrtc.compile_program

    def forgetful(source, name, headers, options, product):
        result, log = real(source, name, headers, options, product)
        return result, log if "--no-cache" in options else ""

    monkeypatch.setattr(nvrtc, "compile_program", forgetful)
    assert compile_variant(SCHEDULE).resources.registers > 0
