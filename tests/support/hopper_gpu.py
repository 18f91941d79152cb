"""Whether the tests that need a GPU can run."""

from __future__ import annotations


def missing() -> str | None:
    """Why there is no Hopper GPU; None if there is one."""
    try:
        import cupy
    except Exception as error:  # CuPy raises more than ImportError where its folders are unwritable
        return f"CuPy cannot be imported: {type(error).__name__}"
    if not cupy.cuda.is_available():
        return "there is no CUDA GPU"
    capability = cupy.cuda.Device().compute_capability
    return None if capability == "90" else f"the GPU has compute capability {capability}"
