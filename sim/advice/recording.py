"""A scenario's traffic through its gate, written down as if it had been recorded."""

from __future__ import annotations

from functools import partial

import numpy as np

from sim.kernels.choose import choose
from sim.rng import stream
from sim.rollout import Task, shape_of, warm_up
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tally import Tally
from sim.tokens import I16
from sim.traces import RecordedTrace, checked


def record(
    scenario: Scenario, policy: Policy, layers: tuple[int, ...], n_tokens: int, run: int | None = None
) -> RecordedTrace:
    """Return ``n_tokens`` tokens, or a few more, of the train steps, step after step, in these MoE layers (from 0).

    The gate is that of ``policy`` as warm-up left it: serving teaches it nothing, adds no noise and drops nothing.
    run: tokens of a rank are so many at a time, each time of other sequences, None: all together. Raises ValueError for a trace that ends before one step, and for gates that give tokens different numbers of experts.
    """
    kernels = choose(2 * n_tokens * len(layers))
    source = scenario.traffic.start(shape_of(scenario, policy), scenario.seed, 0)
    task = Task(scenario, (scenario.policies.index(policy),), 0, layers)
    tallies = {layer: [Tally(scenario, task.policies[0], 0, layer, kernels)] for layer in layers}
    warm_up(task, source, tallies)
    per_rank = min(run or scenario.tokens_per_rank, scenario.tokens_per_rank)
    ranks = scenario.parallel.ep_size * (scenario.tokens_per_rank // per_rank)
    found: list[list[I16]] = []
    lengths: list[int] = []
    for step in range(-(-n_tokens // (ranks * per_rank))):
        try:
            batch = source.batch("train", step, n_ranks=ranks, tokens_per_rank=per_rank)
        except ValueError:
            if step == 0:
                raise
            break  # the trace has ended
        for rank in range(ranks):
            row = []
            for layer in layers:
                tokens, gate = batch.tokens(layer, rank), tallies[layer][0].gate
                draw = partial(stream, scenario.seed, "gate", 0, "train", step, layer, rank)
                if tokens.topk_ids is not None and tokens.logits is None:
                    row.append(tokens.topk_ids)
                else:
                    assert tokens.logits is not None
                    router = gate.router(tokens.logits, tokens.topic, draw, training=False)
                    row.append(gate.choose(router.scores, draw, tokens, logits=router.logits).asked)
            found.append(row)
            lengths += np.bincount(tokens.sequences).tolist()
    ids = np.stack([np.concatenate(parts) for parts in zip(*found, strict=True)])
    if (ids < 0).any():
        raise ValueError(
            f"policy {policy.name!r} gives tokens different numbers of experts: advice needs the same for all"
        )
    return checked(
        scenario.name, ids, seqlens=[n for n in lengths if n], layers=layers, n_routed_experts=gate.n_routed_experts
    )
