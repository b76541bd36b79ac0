"""Seconds of a serving step outside dispatch, experts and combine, from the cost laws."""

from __future__ import annotations

import numpy as np

from sim.advice import Serving, Setup
from sim.engine.serving_durations import TrunkTimes


def rest_s(setup: Setup, phase: Serving, tokens: int) -> float:
    """Return what attention, shared experts, dense layers and output head take of a step of ``tokens`` per rank.

    Attention is data-parallel. Decode: one token of every request, each with ``setup.context`` tokens of cache. Prefill:
    prompts of ``setup.context`` tokens, the last one shorter. Nothing overlaps.
    """
    model = setup.model
    trunk = TrunkTimes(
        model,
        setup.cluster.device,
        setup.cost.compute,
        dtype=setup.cost.gemm_dtype,
        tp_size=1,
        sm_fraction=1.0,
        cache_bytes_per_element=2.0,
        choice_s=0.0,
    )
    if phase == "decode":
        requests = tokens
        core = trunk.decode_core(np.array([tokens]), 1, np.array([tokens * setup.context])) + trunk.absorbed.at(tokens)
    else:
        requests = -(-tokens // setup.context)
        each = tokens / requests
        core = trunk.prefill_core(np.array([requests]), np.array([tokens]), np.array([tokens * (each + 1) / 2]))
    experts, dense_layers = (
        trunk.gate.at(tokens) + trunk.shared.at(tokens),
        model.num_hidden_layers - model.n_moe_layers,
    )
    layers = model.num_hidden_layers * (trunk.layer.at(tokens) - experts + float(core[0]))
    return layers + model.n_moe_layers * experts + dense_layers * trunk.dense.at(tokens) + trunk.head.at(requests)
