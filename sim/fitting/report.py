"""What a fit prints: the table trace | generator | error, its data, and the comment at the head of the block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sim.fitting.fit import Fitted
from sim.fitting.statistics import NEAR_ZERO, TOLERANCE, equal, plainly_equal, share_within

_HELD_OUT = {
    "halves": "half of the sequences, predicted from a fit of the other half",
    "noise": "the same two halves of the trace, one against the other (no fit)",
    "depth": "every second layer's parameters, interpolated from its neighbours (own popularity)",
    "transfer": "all parameters, from fits of the other traces (own popularity and prefix)",
}
_Statistics = Sequence[dict[str, float]]


def table(fitted: Fitted, synthetic: _Statistics, held_out: dict[str, float]) -> str:
    """Return the table of means over layers, with the share of layers within 20 %."""
    real, trace = fitted.real, fitted.trace
    names = list(dict.fromkeys(name for layer in real for name in layer))
    wide = max(map(len, names))
    k, n_experts = trace.topk_ids.shape[2], trace.n_routed_experts
    lines = [
        f"{trace.n_tokens} tokens in {len(trace.seqlens)} sequences, {len(trace.layers)} layers, top-{k} of {n_experts}",
        f"shared prefix {fitted.memory.prefix_length} tokens; correlations slow {fitted.memory.slow_correlation}, "
        f"fast {fitted.memory.fast_correlation} "
        f"(log-odds spread by {fitted.memory.correlation_spread} over factors)",
        "",
        f"{'mean over layers':{wide}} {'trace':>9} {'generator':>9} {'error':>7}  layers within {TOLERANCE:.0%}",
    ]
    for name in names:
        pairs = [(layer[name], other[name]) for layer, other in zip(real, synthetic, strict=True) if name in layer]
        mine, theirs = (float(np.mean(side)) for side in zip(*pairs, strict=True))
        error = f"{theirs / mine - 1:+7.0%}" if mine > 0 and abs(theirs / mine - 1) < 10 else f"{theirs - mine:+7.2f}"
        within = np.mean([equal(name, a, b) for a, b in pairs])
        lines.append(f"{name:{wide}} {mine:9.3f} {theirs:9.3f} {error}  {within:.0%}")
    near = ", ".join(f"{name} by {gap:g}" for name, gap in NEAR_ZERO.items())
    lines += [
        "",
        f"{share_within(real, synthetic):.0%} of (layer, statistic) pairs within {TOLERANCE:.0%} (near zero a gap counts "
        f"as equal: {near}); {share_within(real, synthetic, plain=True):.0%} without such gaps; other seeds than the fit's",
        *(
            f"{held_out[name]:.0%}, {held_out[name + '_plain']:.0%}: {what}"
            for name, what in _HELD_OUT.items()
            if name in held_out
        ),
    ]
    return "\n".join(lines)


def as_data(fitted: Fitted, synthetic: _Statistics, held_out: dict[str, float]) -> dict[str, Any]:
    """Return what `table` prints, layer by layer, as plain data."""
    return {
        "tokens": fitted.trace.n_tokens,
        "sequences": len(fitted.trace.seqlens),
        "n_routed_experts": fitted.trace.n_routed_experts,
        "num_experts_per_tok": int(fitted.trace.topk_ids.shape[2]),
        "memory": fitted.memory._asdict(),
        "within": share_within(fitted.real, synthetic),
        "within_plain": share_within(fitted.real, synthetic, plain=True),
        "held_out": dict(held_out),
        "layers": [
            {
                "layer": layer.layer,
                "trace": layer.statistics,
                "generator": other,
                "within": {name: equal(name, value, other[name]) for name, value in layer.statistics.items()},
                "within_plain": {name: plainly_equal(value, other[name]) for name, value in layer.statistics.items()},
            }
            for layer, other in zip(fitted.layers, synthetic, strict=True)
        ],
    }


def heading(fitted: Fitted, synthetic: _Statistics, source: str) -> str:
    """Return the comment lines above a written block."""
    trace = fitted.trace
    name = source if source.isprintable() else ascii(source)
    return (
        f"# Fitted by sim.fit to {name}: {trace.n_tokens} tokens, layers {', '.join(map(str, trace.layers))}, top-"
        f"{trace.topk_ids.shape[2]} of {trace.n_routed_experts}.\n# {share_within(fitted.real, synthetic):.0%} of (layer, "
        f"statistic) pairs within {TOLERANCE:.0%} of the trace, in synthetic traces of the same sequences.\n"
    )
