"""Which NVRTC is refused, and what the user is told; with stand-ins for CuPy and the driver."""

from __future__ import annotations

import sys

import pytest

from flashmla_cupy.build import nvrtc
from flashmla_cupy.errors import (
    MissingDependencyError,
    NVRTCNotFoundError,
    NVRTCVersionError,
)


class Binding:
    """Stands for cupy.cuda.nvrtc."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self, version=(12, 9), error=None, status="", log=""):
        self.version, self.error, self.status, self.log = version, error, status, log

    def getVersion(self):
        if self.error:
            raise self.error
        return self.version

    def createProgram(self, *arguments):
        return 1

    def compileProgram(self, program, options):
        raise self.NVRTCError(self.status)

    def getProgramLog(self, program):
        return self.log + "\0"

    def destroyProgram(self, program):
        pass


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """install(binding, driver): pretend that this NVRTC and this driver are there."""

    def put(binding: Binding, driver: int = 0) -> None:
        monkeypatch.setattr(nvrtc, "binding", lambda: binding)
        monkeypatch.setattr(nvrtc, "_driver_version", lambda: driver)

    nvrtc.version.cache_clear()
    yield put
    nvrtc.version.cache_clear()


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
    install(Binding(version), driver)
    with pytest.raises(NVRTCVersionError, match=says):
        nvrtc.version()


@pytest.mark.parametrize(
    ("version", "driver"),
    [((12, 4), 0), ((12, 9), 12040), ((12, 4), 13000), ((13, 5), 13000), ((13, 5), 0)],
)
def test_accepted_versions(install, version, driver):
    install(Binding(version), driver)
    assert nvrtc.version() == version


@pytest.mark.parametrize("error", [RuntimeError("libnvrtc.so.12"), OSError(2, "no file")])
def test_no_nvrtc(install, error):
    install(Binding(error=error))
    with pytest.raises(NVRTCNotFoundError, match=r'pip install "flashmla-cupy\[cuda12\]"'):
        nvrtc.version()


@pytest.mark.parametrize(
    ("status", "log"),
    [
        ("NVRTC_ERROR_BUILTIN_OPERATION_FAILURE (7)", ""),
        ("NVRTC_ERROR_COMPILATION (6)", "nvrtc: error: failed to open libnvrtc-builtins.so.12.9."),
    ],
)
def test_no_builtins(install, status, log):
    install(Binding(status=status, log=log))
    with pytest.raises(NVRTCNotFoundError, match=r"libnvrtc-builtins"):
        nvrtc.compile_program(b"", "a.cu", {}, (), "CUBIN")


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
        nvrtc.binding()
