"""The fields of a checkpoint's configuration: config.json as a dict, or an object that has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import OptionError

_MISSING = object()


def _get(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name, _MISSING)
    return getattr(config, name, _MISSING)


def field(config: Any, name: str, function: str) -> Any:
    value = _get(config, name)
    if value is _MISSING or value is None:
        expected = f"the configuration of a checkpoint, with {name}"
        remedy = "Pass the contents of its config.json as a dict, or transformers' configuration."
        raise OptionError("config", expected, f"none in {type(config).__name__}", remedy, function)
    return value


def rope(config: Any) -> Mapping[str, Any]:
    """rope_scaling of config.json, or rope_parameters as transformers has called it since 5.0."""
    for name in ("rope_parameters", "rope_scaling"):
        found = _get(config, name)
        if found is not _MISSING and found:
            scaling: Mapping[str, Any] = found
            return scaling
    return {}


def rope_type(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def factor_of(config: Any, scaling: Mapping[str, Any]) -> float:
    """How many times longer than in pretraining a sequence may be."""
    if scaling.get("factor") is not None:
        return float(scaling["factor"])
    longest: float = field(config, "max_position_embeddings", "softmax_scale")
    return longest / float(field(scaling, "original_max_position_embeddings", "softmax_scale"))


def mscale_of(factor: float, mscale: float) -> float:
    """YaRN's growth of the attention logits (arXiv:2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
