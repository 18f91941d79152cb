"""The examples, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_decode",
        "jax_decode",
        "dlpack_any_framework",
        "mla_layer",
        "sharded_decode_jax",
        "serving_loop",
        "hf_deepseek",
    ],
)
def test_example(name):
    if "torch" in name:
        pytest.importorskip("torch")
    if "hf" in name:
        pytest.importorskip("transformers")
    if "jax" in name:
        pytest.importorskip("jax")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "PASS" in done.stdout
    assert "No Hopper GPU" not in done.stdout
    assert "no GPU" not in done.stdout
