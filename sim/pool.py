"""Tokens of a policy, routed once through its gate and kept by topic, from which batches of any size are drawn.

A serving run has millions of iterations; their tokens are samples of one traffic, so they are routed once. Decode
batches take single tokens of many sequences, prefill batches runs of consecutive ones; topics are mixed as asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from sim.gating import Gate
from sim.gating.select.balanced import Balanced, balanced_ids
from sim.kernels.choose import choose
from sim.model import Model
from sim.rng import stream
from sim.rollout import Task, shape_of, warm_up
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tally import Tally
from sim.tokens import F64, I16, I64, Tokens
from sim.traffic import Batch, Source

Kind = Literal["decode", "prefill"]

SINGLES = 64
"""Consecutive tokens that decode batches are drawn from: a pool then holds tokens of 1/64 as many sequences."""
RUN = 256
"""Consecutive tokens that prefill batches are made of where the traffic does not tell how long its sequences are."""
PATIENCE = 16
"""Tokens looked at for each one that is kept, before rare topics have to do with what was found."""
_BLOCK = 64
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Shelf:
    """Routed tokens of one kind, topic after topic; T tokens in all.

    ids: [L, T, k] int16. first: [topics + 1] where each topic begins. starts: [runs], where each sequence (or piece)
    begins, ascending. run: tokens of a run that batches take.
    """

    ids: I16
    first: I64
    starts: I64
    run: int


@dataclass(frozen=True, slots=True)
class Pool:
    """What batches are drawn from.

    layers: [L] MoE layers (0-based, dense ones not counted). balanced: tokens are handed out in order, so that the
    loads of any batch are equal.
    """

    layers: tuple[int, ...]
    n_routed_experts: int
    decode: Shelf
    prefill: Shelf
    seed: int
    balanced: bool = False

    @classmethod
    def of(cls, scenario: Scenario, policy: Policy, replica: int, *, sampled_layers: int, pool_tokens: int) -> Pool:
        """Route ``pool_tokens`` tokens of each topic through the gate of ``policy``, as warm-up left it.

        The same tokens for every policy of a traffic shape. A topic that the traffic does not bring in time is stood in
        for by all others together. Raises ValueError for a trace without tokens.
        """
        model = scenario.model_of(policy)
        layers = spread_layers(model, sampled_layers)
        if isinstance(policy.select, Balanced):
            rule = policy.select.for_model(model)
            return cls.of_balanced(model, layers, rule.n_group or 1, rule.topk_group or 1)
        task = Task(scenario, (scenario.policies.index(policy),), replica, layers)
        kernels = choose(2 * pool_tokens * len(layers) * max(1, len(scenario.traffic.topics)))
        source = scenario.traffic.start(shape_of(scenario, policy), scenario.seed, replica)
        tallies = {layer: [Tally(scenario, task.policies[0], replica, layer, kernels)] for layer in layers}
        warm_up(task, source, tallies)
        gates = {layer: found[0].gate for layer, found in tallies.items()}
        length = min(scenario.traffic.longest_sequence or RUN, pool_tokens)
        fill = partial(_fill, scenario, source, gates, replica, pool_tokens)
        # Decoded tokens come behind the template that all prompts begin with.
        template = min(getattr(scenario.traffic, "prefix_length", 0), length - 1)
        singles = fill("decode pool", min(template + SINGLES, length), skipped=template)
        runs = fill("prefill pool", length)
        return cls(layers, model.n_routed_experts, singles, runs, scenario.seed)

    @classmethod
    def of_balanced(cls, model: Model, layers: tuple[int, ...], n_group: int, topk_group: int) -> Pool:
        """Return absolutely balanced tokens (see `sim.gating.select.balanced`): all layers alike, one topic."""
        experts = model.n_routed_experts
        ids = balanced_ids(
            experts * n_group, n_experts=experts, k=model.num_experts_per_tok, n_group=n_group, topk_group=topk_group
        )
        shelf = Shelf(ids[None], np.array([0, len(ids)]), np.zeros(1, dtype=np.int64), 1)
        return cls(layers[:1], experts, shelf, shelf, seed=0, balanced=True)

    @property
    def n_topics(self) -> int:
        return len(self.decode.first) - 1

    def batch(self, kind: Kind, shares: F64, draw: int, n_ranks: int, tokens_per_rank: int) -> I16:
        """Return [L, n_ranks, tokens_per_rank, k] int16 expert ids of a batch.

        shares: [topics] of the tokens, summing to 1; every rank gets them, as near as whole tokens and runs allow. draw:
        which of endlessly many batches; one of fewer tokens is the beginning of a larger one on every rank.
        """
        shelf = self.decode if kind == "decode" else self.prefill
        if self.balanced:
            at = np.arange(n_ranks * tokens_per_rank) % shelf.ids.shape[1]
        elif kind == "decode":
            at = self._singles(shelf, shares, draw, n_ranks, tokens_per_rank)
        else:
            at = self._runs(shelf, shares, draw, n_ranks, tokens_per_rank)
        found: I16 = shelf.ids[:, at.reshape(n_ranks, tokens_per_rank)]
        return found

    def _uniforms(self, kind: Kind, draw: int, n_ranks: int, n: int) -> F64:
        """[n_ranks, n], block by block, so that a longer one begins with a shorter one."""
        blocks = [
            stream(self.seed, "serving", kind, draw, block).random((n_ranks, _BLOCK))
            for block in range(-(-n // _BLOCK))
        ]
        return np.concatenate(blocks, axis=1)[:, :n]

    def _topics(self, shares: F64, draw: int, n_ranks: int, n: int) -> I64:
        """[n_ranks, n] topics in their shares at any n: a golden-ratio sequence instead of chance."""
        number = np.arange(n)[None, :] * n_ranks + np.arange(n_ranks)[:, None]
        place = ((number + 0.5) * _GOLDEN + draw * _GOLDEN * _GOLDEN) % 1.0
        upto = np.cumsum(shares) / np.sum(shares)
        upto[np.flatnonzero(shares)[-1] :] = 1.0
        return np.searchsorted(upto, place, side="right").astype(np.int64)

    def _singles(self, shelf: Shelf, shares: F64, draw: int, n_ranks: int, n: int) -> I64:
        topic = self._topics(shares, draw, n_ranks, n)
        size = np.diff(shelf.first)[topic]
        at: I64 = shelf.first[topic] + (self._uniforms("decode", draw, n_ranks, n) * size).astype(np.int64)
        return at

    def _runs(self, shelf: Shelf, shares: F64, draw: int, n_ranks: int, n: int) -> I64:
        n_runs = -(-n // shelf.run)
        topic = self._topics(shares, draw, n_ranks, n_runs)
        low, high = (np.searchsorted(shelf.starts, shelf.first[topic + i]) for i in (0, 1))
        chosen = low + (self._uniforms("prefill", draw, n_ranks, n_runs) * (high - low)).astype(np.int64)
        begin, size = shelf.first[topic], shelf.first[topic + 1] - shelf.first[topic]
        offset = (shelf.starts[chosen] - begin)[..., None] + np.arange(min(shelf.run, n))
        at: I64 = (begin[..., None] + offset % size[..., None]).reshape(n_ranks, -1)[:, :n]
        return at


def spread_layers(model: Model, wanted: int) -> tuple[int, ...]:
    """Return up to ``wanted`` MoE layers in the middles of as many equal parts of the model's.

    >>> from sim.model import Model
    >>> toy = Model(name="toy", num_hidden_layers=8, hidden_size=8, vocab_size=8, num_attention_heads=1,
    ...     n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    >>> spread_layers(toy, 3), spread_layers(toy, 99)
    ((1, 4, 6), (0, 1, 2, 3, 4, 5, 6, 7))
    """
    n = model.n_moe_layers
    parts = min(n, wanted)
    return tuple(int((2 * i + 1) * n / (2 * parts)) for i in range(parts))


def _fill(
    scenario: Scenario,
    source: Source,
    gates: dict[int, Gate],
    replica: int,
    wanted: int,
    phase: str,
    run: int,
    skipped: int = 0,
) -> Shelf:
    """Route pieces of ``run`` tokens until every topic has ``wanted``; of each, the first ``skipped`` are left out."""
    n_topics = len(scenario.traffic.topics)
    found: list[list[I16]] = [[] for _ in range(n_topics)]
    have = np.zeros(n_topics, dtype=np.int64)
    # A trace is what it is; generated traffic has phases of its own, before anything drifts.
    recorded = scenario.traffic.kind == "replay"
    pieces = _pieces(source, "train" if recorded else phase, run, PATIENCE * wanted * n_topics)
    for step, batch in enumerate(pieces):
        first = batch.tokens(next(iter(gates)), 0)
        topics = first.topic[skipped:]
        short = (np.bincount(topics, minlength=n_topics) > 0) & (have < wanted)
        if not short.any():
            continue
        names = (replica, phase, step)
        lot = stream(scenario.seed, "lots", *names).random(int(first.sequences.max(initial=0)) + 1)
        ids = np.stack(
            [
                _chosen(gate, batch.tokens(layer, 0), lot, partial(stream, scenario.seed, "gate", *names, layer))
                for layer, gate in gates.items()
            ]
        )[:, skipped:]
        for topic in np.flatnonzero(short).tolist():
            part = ids[:, topics == topic][:, : wanted - have[topic]]
            found[topic].append(part)
            have[topic] += part.shape[1]
        if (have >= wanted).all():
            break
    everything = [part for parts in found for part in parts]
    if not everything:
        raise ValueError("the traffic has no tokens for a pool")
    shelved = [parts or everything for parts in found]
    sizes = [part.shape[1] for parts in shelved for part in parts]
    ends = np.cumsum([0, *(sum(part.shape[1] for part in parts) for parts in shelved)])
    starts = np.cumsum([0, *sizes[:-1]])
    return Shelf(np.concatenate([part for parts in shelved for part in parts], axis=1), ends, starts, run - skipped)


def _pieces(source: Source, phase: str, run: int, most: int) -> Iterator[Batch]:
    """Yield batches of ``run`` consecutive tokens on one rank; up to ``most`` tokens, or the end of a trace."""
    for step in range(-(-most // run)):
        try:
            batch = source.batch(phase, step, n_ranks=1, tokens_per_rank=run)
        except ValueError:
            if step == 0:
                raise
            return  # the trace has ended
        yield batch


def _chosen(gate: Gate, tokens: Tokens, lot: F64, rng: partial[np.random.Generator]) -> I16:
    """Return [n, k] experts of the tokens, as serving chooses them: without the noise of training. lot: by sequence."""
    tokens = replace(tokens, lot=lot[tokens.sequences])
    if tokens.logits is None:
        return gate.keep_recorded(tokens, rng).kept
    router = gate.router(tokens.logits, tokens.topic, rng, training=False)
    return gate.choose(router.scores, rng, tokens, logits=router.logits).kept
