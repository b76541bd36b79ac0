"""A fitted generator as a traffic block: plain data that ``traffic:`` accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from sim.fitting.fit import MAX_RANK, Fitted

KNOTS = (0.0, 0.1, 0.25, 0.45, 0.7, 1.0)
_PROFILE = ("logit_scale", "latent_rank", "basis_tail", "sequence_variance", "slow_variance", "fast_variance", "token_variance", "iid_variance", "memory_spread", "scale_spread")  # fmt: skip


def traffic_block(fitted: Fitted) -> dict[str, Any]:
    """Return the block for a model with the trace's layers and experts: one knot per layer, popularity by expert."""
    block = _common(fitted)
    block["popularity"] = [[round(x, 3) for x in layer.values.popularity or ()] for layer in fitted.layers]
    n_layers = len(fitted.layers)
    if n_layers == 1:  # a profile has at least two knots
        return block | {"layer_profile": _profile([_values(fitted, 0)] * 2, [0.0, 1.0], fitted)}
    at = [row / (n_layers - 1) for row in range(n_layers)]
    return block | {"layer_profile": _profile([_values(fitted, row) for row in range(n_layers)], at, fitted)}


def portable_block(fitted: Fitted, n_moe_layers: int | None = None) -> dict[str, Any]:
    """Return the block for any model: popularity as a standard deviation, a few knots over the depth.

    n_moe_layers: MoE layers of the traced model, whose first the trace's first layer is (default: the trace is whole).
    A knot is the mean of the layers around it, weighted by a triangle as wide as the knots are apart; beyond the trace
    the last value stays.
    """
    first = fitted.layers[0].layer
    n_layers = n_moe_layers or len(fitted.layers)
    depths = np.array(
        [
            (layer.layer - first if n_moe_layers else row) / max(1, n_layers - 1)
            for row, layer in enumerate(fitted.layers)
        ]
    )
    if depths.max() > 1:
        raise ValueError(f"n_moe_layers: expected at least {fitted.layers[-1].layer - first + 1}, found {n_moe_layers}")
    values = [
        _values(fitted, row) | {"popularity_sd": fitted.layers[row].values.popularity_sd} for row in range(len(depths))
    ]
    knots = []
    for knot, wide in zip(KNOTS, (0.1, 0.15, 0.2, 0.25, 0.3, 0.3), strict=True):
        weight = np.maximum(1 - np.abs(depths - min(knot, depths.max())) / wide, 0.0)
        weight = weight if weight.sum() > 0 else (np.abs(depths - knot) == np.abs(depths - knot).min()).astype(float)
        knots.append({name: float(np.average([v[name] for v in values], weights=weight)) for name in values[0]})
    return _common(fitted) | {"layer_profile": _profile(knots, list(KNOTS), fitted)}


def _common(fitted: Fitted) -> dict[str, Any]:
    trace, memory = fitted.trace, fitted.memory
    names = trace.domain_of_sequence or ()
    sizes = {
        name: sum(int(n) for n, own in zip(trace.seqlens, names, strict=True) if own == name) for name in fitted.domains
    }
    topics = [{"name": name, "weight": size, "popularity_sd": 1.0} for name, size in sizes.items() if size > 0]
    return {
        "kind": "affinity",
        "sequence_length": max(1, round(float(trace.seqlens.mean()))),
        "prefix_length": memory.prefix_length,
        "topic_tree": topics or [{"name": "general", "popularity_sd": 0.0}],
        "latent_rank": MAX_RANK,
        "slow_correlation": memory.slow_correlation,
        "fast_correlation": memory.fast_correlation,
        "correlation_spread": memory.correlation_spread,
        "logit_scale": 1.0,
    }


def _values(fitted: Fitted, row: int) -> dict[str, float]:
    values = fitted.layers[row].values
    return {name: getattr(values, name) for name in _PROFILE} | {"topic": values.topic_factor}


def _profile(knots: list[dict[str, float]], depth: list[float], fitted: Fitted) -> dict[str, list[float]]:
    columns = {name: [round(knot[name], 4) for knot in knots] for name in knots[0]}
    return {"depth": [round(x, 6) for x in depth], "temporal": [1.0] * len(depth), **columns}


def to_yaml(block: Mapping[str, Any], indent: str = "") -> str:
    """Return ``block`` as YAML 1.2 with lists of numbers on one line; reading it gives the same data back."""
    lines = []
    for key, value in block.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", to_yaml(value, indent + "  ").rstrip("\n")]
        elif isinstance(value, list) and value and isinstance(value[0], list | dict):
            lines += [f"{indent}{key}:", *(f"{indent}  - {json.dumps(item, ensure_ascii=False)}" for item in value)]
        else:
            lines.append(f"{indent}{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return "\n".join(lines) + "\n"
