"""Seconds of one serving iteration of a unit's group: what its ranks bring in, one duration out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sim.tokens import F64, I64


@dataclass(frozen=True, slots=True)
class Work:
    """What the D attention data-parallel ranks of a group bring to one iteration; arrays [D] unless said.

    decode_requests, decode_tokens: requests that decode, and their query tokens (one each, more with speculation,
    padding included). decode_kv_tokens: their contexts, summed. prefill_requests, prefill_tokens: prompts, and their new
    tokens. prefill_pairs: (query, position) pairs of their causal attention. longest: longest context. sampled: rows of
    the output head. topic_tokens: [topics] tokens of the group by topic, padding left out.
    """

    decode_requests: I64
    decode_tokens: I64
    decode_kv_tokens: I64
    prefill_requests: I64
    prefill_tokens: I64
    prefill_pairs: F64
    longest: I64
    sampled: I64
    topic_tokens: I64


@dataclass(frozen=True, slots=True)
class Timed:
    """duration_ps: of the whole iteration. imbalance: max over mean tokens of the ranks' experts, mean over layers; 1
    without experts. attention_ps, experts_ps, communication_ps, other_ps: where it went on the slowest rank (exposed
    communication only); they sum to duration_ps."""

    duration_ps: int
    imbalance: float
    attention_ps: int
    experts_ps: int
    communication_ps: int
    other_ps: int


class IterationTimes(Protocol):
    """Times iterations of one group in one state (placement, dead or slow ranks). Pure: equal arguments, equal times."""

    def time(self, work: Work, number: int) -> Timed:
        """Return the time of iteration ``number``, which picks the draw of routed tokens."""
        ...
