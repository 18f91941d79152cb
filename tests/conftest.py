"""For all tests: GPU tests skip, visibly, without a Hopper GPU; the user's cache is left alone."""

from __future__ import annotations

import os

import pytest


def _hopper() -> str | None:
    """Why there is no Hopper GPU; None if there is one."""
    try:
        import cupy
    except Exception as error:  # CuPy raises more than ImportError where its folders are unwritable
        return f"CuPy cannot be imported: {type(error).__name__}"
    if not cupy.cuda.is_available():
        return "there is no CUDA GPU"
    capability = cupy.cuda.Device().compute_capability
    return None if capability == "90" else f"the GPU has compute capability {capability}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    reason = _hopper()
    if reason is not None:
        skip = pytest.mark.skip(reason=f"needs a Hopper GPU: {reason}")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


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
