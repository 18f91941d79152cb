"""The examples: facts of DeepSeek's checkpoints in them. `.ci/run` runs the programs themselves."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import flashmla_cupy

EXAMPLES = Path(flashmla_cupy.__file__).resolve().parents[1] / "examples"
if not EXAMPLES.exists():
    pytest.skip("the package is not in its checkout", allow_module_level=True)


def test_mla_layer_has_the_softmax_scale_of_deepseek_v3():
    """YaRN's factor of 40 with mscale_all_dim 1.0: without it attention is wrong in silence."""
    example = runpy.run_path(str(EXAMPLES / "mla_layer.py"))
    config = {**example["V3"], "hidden_size": 8, "num_attention_heads": 2, "q_lora_rank": 8}
    layer = example["MLALayer"](np, config, max_tokens=4)
    assert layer.scale == pytest.approx(0.13523377, rel=1e-6)


def test_the_notebook_has_the_outputs_of_a_gpu():
    """Who only reads it sees them: every cell ran, in order, without an error, on a Hopper GPU."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    printed = "".join("".join(output.get("text", [])) for output in outputs)
    assert "Computing on NVIDIA H" in printed
    assert printed.count("the same bits: True") == 3  # FlashMLA's interface, PyTorch, JAX
    drawn = [output for output in outputs if "image/svg+xml" in output.get("data", {})]
    assert len(drawn) == 3  # what is cached, the schedule, the roofline


@pytest.mark.parametrize("name", ["serving_loop", "hf_deepseek"])
def test_it_passes_on_the_cpu(name, capsys):
    if name == "hf_deepseek":
        pytest.importorskip("torch")
        pytest.importorskip("transformers", minversion="5.0")
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert example["main"]() == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_what_the_model_of_transformers_needs_is_said(missing, capsys, monkeypatch):
    if missing == "transformers":
        pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "hf_deepseek.py"))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("hf_deepseek.py: error: The example needs PyTorch and transformers")
    assert missing in err and err.count("\n") == 1
