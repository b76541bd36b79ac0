"""Hypothesis strategies and small builders that several test files share."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from sim.gating.select import Candidates
from sim.kernels import compiled, plain
from sim.kernels.choose import Kernels
from sim.model import Model
from sim.rng import stream
from sim.tokens import F32, F64, I16, I32

KERNELS: dict[str, Kernels] = {"numpy": plain, "numba": compiled}  # type: ignore[dict-item]
STEPS = 64
"""Dyadic scores are multiples of 1/64: sums and shifts are exact in float32, and ties are common."""

seeds = st.integers(0, 2**32 - 1)


def toy_model(n_routed_experts: int = 16, k: int = 4, **more: object) -> Model:
    """Return a small model with one MoE layer."""
    given: dict[str, object] = {
        "name": "toy",
        "num_hidden_layers": 1,
        "hidden_size": 256,
        "vocab_size": 256,
        "num_attention_heads": 2,
        "n_routed_experts": n_routed_experts,
        "num_experts_per_tok": k,
        "moe_intermediate_size": 64,
        "scoring_func": "sigmoid",
    }
    return Model.model_validate(given | more)


def dyadic(rng: np.random.Generator, n_tokens: int, n_experts: int, values: int = STEPS) -> F32:
    """Return [T, E] multiples of 1/64; with few ``values`` most rows have ties."""
    return (rng.integers(0, values, (n_tokens, n_experts)) / STEPS).astype(np.float32)


def distinct(rng: np.random.Generator, n_tokens: int, n_experts: int) -> F32:
    """Return [T, E] multiples of 1/512 without ties inside a token (n_experts <= 512)."""
    rows = [rng.permutation(512)[:n_experts] for _ in range(n_tokens)]
    return (np.array(rows, dtype=np.float32).reshape(n_tokens, n_experts)) / np.float32(512)


def candidates(
    scores: F32,
    k: int,
    *,
    scale: F32 | None = None,
    shift: F32 | None = None,
    kernels: Kernels | None = None,
    seed: int = 0,
    recorded: I16 | None = None,
    logits: F32 | None = None,
    token_ids: I32 | None = None,
    token_frequency: F64 | None = None,
) -> Candidates:
    """Return what a selection rule sees, unbiased unless told otherwise."""
    n_experts = scores.shape[1]
    return Candidates(
        scores,
        np.ones(n_experts, np.float32) if scale is None else scale,
        np.zeros(n_experts, np.float32) if shift is None else shift,
        k,
        kernels or KERNELS["numpy"],
        lambda: stream(seed, "gate"),
        recorded,
        logits,
        token_ids,
        token_frequency,
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(n_experts, n_group, topk_group, k, n_best): experts from 4 to 400 and any count of groups that divides them."""
    n_experts = draw(st.one_of(st.integers(4, 400), st.sampled_from([8, 60, 64, 128, 160, 256, 320, 384, 400])))
    n_group = draw(st.sampled_from([g for g in range(1, n_experts + 1) if n_experts % g == 0]))
    topk_group = draw(st.integers(1, n_group))
    reach = topk_group * (n_experts // n_group)
    k = draw(st.one_of(st.integers(1, min(reach, 10)), st.integers(1, reach), st.just(reach)))
    return n_experts, n_group, topk_group, k, draw(st.integers(1, 4))
