"""For all tests: GPU tests skip, visibly, without a Hopper GPU; the user's kernel cache is left
alone; fixtures for tests that compile."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hopper_gpu

import flashmla_cupy
from flashmla_cupy.build import cache_folder, compiler, nvrtc
from flashmla_cupy.errors import NVRTCNotFoundError

PACKAGE = Path(flashmla_cupy.__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    reason = hopper_gpu.missing()
    if reason is not None:
        skip = pytest.mark.skip(reason=f"needs a Hopper GPU: {reason}")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that itself imports a framework which is not installed skips, visibly. If it is the
    package that imports it, the test fails: it does so only for arrays of that framework."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if error.name in ("torch", "jax") and not any(
            Path(frame.filename).is_relative_to(PACKAGE) for frame in frames
        ):
            pytest.skip(f"{error.name} is not installed")
        raise


@pytest.fixture(scope="session", autouse=True)
def _own_cubin_cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cubins")
    folder.chmod(0o700)
    before = os.environ.get("FLASHMLA_CUPY_CACHE_DIR")
    os.environ["FLASHMLA_CUPY_CACHE_DIR"] = str(folder)
    yield
    if before is None:
        del os.environ["FLASHMLA_CUPY_CACHE_DIR"]
    else:
        os.environ["FLASHMLA_CUPY_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def has_nvrtc() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        nvrtc.build()  # keeps what it finds in the cache: ahead of a test that looks into its own
    except NVRTCNotFoundError:
        pytest.skip("NVRTC is not installed")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty memo, an empty cache directory, and no settings of the user."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("FLASHMLA_CUPY_CACHE_DIR", str(tmp_path / "cubins"))
    monkeypatch.delenv("FLASHMLA_CUPY_CACHE_VERIFY", raising=False)
    monkeypatch.delenv("FLASHMLA_CUPY_VERBOSE", raising=False)
    monkeypatch.setattr(cache_folder, "_warned", set())
    monkeypatch.setattr(compiler, "_memo", {})
    return tmp_path / "cubins"


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory):
    """The kernels for the emulated GPU, each compiled when it is first launched."""
    from emulator import device

    return device.Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, kernels):
    """gpu(num_sms) -> an Emulator of that size."""
    from emulator import device

    return lambda num_sms: device.install(monkeypatch, kernels, num_sms)


@pytest.fixture(params=["few_rows_decode", "dense_decode"])
def each_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with few query rows are served by the first of these; here by each in turn. The others
    are tested once: dense_decode serves them anyway."""
    from flashmla_cupy.gpu import decode_launch
    from flashmla_cupy.gpu.kernels import DENSE_DECODE, Kernel, decode_kernel

    def few_rows_decode(slab_rows: int) -> Kernel:
        if decode_kernel(slab_rows) is DENSE_DECODE:
            pytest.skip("dense_decode serves so many rows, and is tested beside this")
        return decode_kernel(slab_rows)

    kernels = {"few_rows_decode": few_rows_decode, "dense_decode": lambda slab_rows: DENSE_DECODE}
    monkeypatch.setattr(decode_launch, "decode_kernel", kernels[request.param])
