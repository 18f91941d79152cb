"""Which NVRTC is taken or refused, and what the user is told; mostly with stand-ins for NVRTC, CuPy
and the driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashmla_cupy.build import nvrtc, nvrtc_library
from flashmla_cupy.errors import (
    MissingDependencyError,
    NVRTCNotFoundError,
    NVRTCVersionError,
)

ROOT = Path(nvrtc.__file__).resolve().parents[2]


class Installed:
    """Stands for nvrtc_library.Library. `versions`: those that can be loaded, by their path."""

    versions: dict[str, tuple[int, int]] = {}
    loaded: list[str] = []

    def __init__(self, path):
        self.loaded.append(path)
        if path not in self.versions:
            raise OSError(f"{path}: cannot open shared object file")
        self.path, self.version = path, self.versions[path]
        self.builtins = os.path.join(os.path.dirname(path), "libnvrtc-builtins.so.12.9")
        self.status, self.log = "", ""

    def compile(self, *_):
        raise nvrtc_library.NVRTCError(self.status, self.log)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """install(*versions, driver): pretend that these NVRTCs and this driver are there."""

    def put(*versions: tuple[int, int], driver: int = 0) -> None:
        files = {f"/{i}/libnvrtc.so.{version[0]}": version for i, version in enumerate(versions)}
        monkeypatch.setattr(Installed, "versions", files)
        monkeypatch.setattr(Installed, "loaded", [])
        found = [(path, version[0]) for path, version in files.items()]
        monkeypatch.setattr(nvrtc, "installed", lambda: iter(found))
        monkeypatch.setattr(nvrtc, "_driver_version", lambda: driver)
        monkeypatch.setattr(nvrtc, "cupy_cuda", lambda: None)
        monkeypatch.setattr(nvrtc, "Library", Installed)

    nvrtc._chosen.cache_clear()
    yield put
    nvrtc._chosen.cache_clear()


@pytest.mark.parametrize(
    ("version", "driver", "says"),
    [
        ((12, 3), 0, r"NVRTC 12\.3 is too old .* 12\.4 .*nvidia-cuda-nvrtc-cu12>=12\.4"),
        ((11, 8), 13000, r"NVRTC 11\.8 is too old"),
        ((13, 0), 12080, r"NVRTC 13\.0 .* driver supports CUDA 12\.8.*flashmla-cupy\[cuda12\]"),
        ((12, 9), 11080, r"NVRTC 12\.9 .* driver supports CUDA 11\.8\. Update the driver\."),
    ],
)
def test_refused_versions(install, version, driver, says):
    install(version, driver=driver)
    with pytest.raises(NVRTCVersionError, match=says):
        nvrtc.version()


@pytest.mark.parametrize(
    ("version", "driver"),
    [((12, 4), 0), ((12, 9), 12040), ((12, 4), 13000), ((13, 5), 13000), ((13, 5), 0)],
)
def test_accepted_versions(install, version, driver):
    install(version, driver=driver)
    assert nvrtc.version() == version


@pytest.mark.parametrize(
    ("versions", "driver", "chosen"),
    [
        # PyTorch for CUDA 13 brings its own beside that of flashmla-cupy[cuda12].
        ([(13, 0), (12, 9)], 12080, (12, 9)),
        ([(12, 9), (13, 0)], 12080, (12, 9)),
        ([(12, 9), (13, 0)], 13000, (13, 0)),
        ([(12, 9), (13, 0)], 0, (13, 0)),
        ([(12, 9), (12, 6)], 12040, (12, 9)),  # the first of one major version: the nearest
        ([(12, 6), (12, 9)], 12040, (12, 6)),
        ([(12, 3), (12, 9)], 12040, (12, 9)),
        ([(13, 0), (12, 3), (12, 9)], 12040, (12, 9)),
    ],
)
def test_the_newest_that_the_driver_takes(install, versions, driver, chosen):
    install(*versions, driver=driver)
    assert nvrtc.version() == chosen
    assert nvrtc.library() is nvrtc.library()


def test_errors_name_the_file(install):
    install((12, 3), (11, 8), driver=12080)
    with pytest.raises(NVRTCVersionError, match=r"NVRTC 12\.3 .*\(/0/libnvrtc\.so\.12\)"):
        nvrtc.version()
    install((13, 0), driver=12080)
    nvrtc._chosen.cache_clear()
    with pytest.raises(NVRTCVersionError, match=r"NVRTC 13\.0 \(/0/libnvrtc\.so\.13\)"):
        nvrtc.version()


def test_what_the_loader_finds_is_the_last_resort(install):
    install(driver=12080)
    Installed.versions["libnvrtc.so.12"] = (12, 6)
    assert nvrtc.version() == (12, 6)
    assert "libnvrtc.so.13" not in Installed.loaded


def test_no_nvrtc(install):
    install()
    with pytest.raises(NVRTCNotFoundError, match=r'pip install "flashmla-cupy\[cuda12\]"'):
        nvrtc.version()


def test_no_nvrtc_that_can_be_loaded(install):
    install((12, 9))
    Installed.versions.clear()
    with pytest.raises(NVRTCNotFoundError, match=r'pip install "flashmla-cupy\[cuda12\]"'):
        nvrtc.version()


@pytest.mark.parametrize(
    ("layout", "variable"),
    [
        ("target/nvidia/cuda_nvrtc/lib", "sys.path"),  # pip install --target
        ("target/nvidia/cu13/lib", "sys.path"),
        ("toolkit/lib64", "CUDA_PATH"),
        ("toolkit/lib64", "CUDA_HOME"),
        ("env/lib", "CONDA_PREFIX"),
        ("loader", "LD_LIBRARY_PATH"),
    ],
)
def test_where_it_is_looked_for(monkeypatch, tmp_path, layout, variable):
    folder = tmp_path / layout
    folder.mkdir(parents=True)
    (folder / "libnvrtc.so.12").touch()
    (folder / "libnvrtc.so.12.9.86").touch()
    (folder / "libnvrtc-builtins.so.12.9").touch()
    (folder / "libnvrtc.alt.so.12").touch()
    wanted = (str(folder / "libnvrtc.so.12"), 12)
    assert wanted not in nvrtc.installed()
    root = tmp_path / layout.split("/")[0]
    if variable == "sys.path":
        monkeypatch.syspath_prepend(str(root))
    else:
        monkeypatch.setenv(variable, str(root))
    assert [found for found in nvrtc.installed() if found[0].startswith(str(tmp_path))] == [wanted]


def test_first_use_by_many_threads(has_nvrtc, tmp_path):
    """Each in a fresh process, where nobody has used NVRTC: none misses a part of it.

    NVRTC 13.0.88 finds its builtins only if they are loaded already."""
    script = (
        "import threading; from concurrent.futures import ThreadPoolExecutor;"
        "from flashmla_cupy.build import nvrtc; ready = threading.Barrier(8);"
        "options = '-arch=sm_90', '--std=c++17';"
        "work = lambda i: ready.wait() and None or nvrtc.compile_program("
        "b'extern \"C\" __global__ void f(int* a) { *a = 1; }', 'f.cu', {}, options, 'CUBIN');"
        "print(len({cubin for cubin, _ in ThreadPoolExecutor(8).map(work, range(8))}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout == "1\n", done.stderr


def test_builtins_are_loaded_from_beside_the_library(has_nvrtc):
    beside = nvrtc.library().builtins
    if not os.path.exists(beside):
        pytest.skip("this NVRTC has its builtins elsewhere")
    assert os.path.samefile(nvrtc_library.loaded_path(os.path.basename(beside)), beside)


@pytest.mark.parametrize(
    ("status", "log"),
    [
        ("NVRTC_ERROR_BUILTIN_OPERATION_FAILURE (7)", ""),
        ("NVRTC_ERROR_COMPILATION (6)", "nvrtc: error: failed to open libnvrtc-builtins.so.12.9."),
    ],
)
def test_no_builtins(install, status, log):
    """What NVRTC wrote is shown, and the remedy is the same version of it, not another."""
    install((12, 9))
    nvrtc.library().status, nvrtc.library().log = status, log
    with pytest.raises(NVRTCNotFoundError, match=r"libnvrtc-builtins") as caught:
        nvrtc.compile_program(b"", "a.cu", {}, (), "CUBIN")
    text = str(caught.value)
    assert log in text and status in text and "/0/libnvrtc.so.12" in text
    assert 'pip install --force-reinstall "nvidia-cuda-nvrtc-cu12==12.9.*"' in text


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ImportError("No module named 'cupy'"), r'pip install "flashmla-cupy\[cuda12\]"'),
        (PermissionError(13, "Permission denied"), "CUPY_CACHE_DIR"),
    ],
)
def test_no_cupy(monkeypatch, error, says):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "cupy":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=says):
        nvrtc.cupy_cuda()
