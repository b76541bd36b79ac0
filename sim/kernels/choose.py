"""One name for the two implementations of the kernels, chosen per run; see `sim.kernels`."""

from __future__ import annotations

from typing import Protocol, cast

from sim.kernels import compiled_enabled
from sim.tokens import F32, I16, I32, I64


class Kernels(Protocol):
    """What `sim.kernels.plain` and `sim.kernels.compiled` both offer; shapes and meaning are documented in ``plain``."""

    @staticmethod
    def topk(scores: F32, scale: F32, shift: F32, k: int) -> I16: ...
    @staticmethod
    def group_limited_topk(
        scores: F32, scale: F32, shift: F32, k: int, n_group: int, topk_group: int, n_best: int
    ) -> I16: ...
    @staticmethod
    def sigmoid(logits: F32) -> F32: ...
    @staticmethod
    def softmax(logits: F32) -> F32: ...
    @staticmethod
    def expert_tokens(topk_ids: I16, n_experts: int) -> I64: ...
    @staticmethod
    def group_tokens(topk_ids: I16, expert_to_group: I32, n_groups: int) -> I64: ...
    @staticmethod
    def distinct_groups(topk_ids: I16, expert_to_group: I32, n_groups: int) -> int: ...
    @staticmethod
    def picked(values: F32, topk_ids: I16) -> F32: ...


def choose(token_layers: int) -> Kernels:
    """Return the kernels that suit work of ``token_layers`` tokens x layers x policies; results do not differ."""
    if compiled_enabled(token_layers):
        from sim.kernels import compiled

        return cast(Kernels, compiled)
    from sim.kernels import plain

    return cast(Kernels, plain)
