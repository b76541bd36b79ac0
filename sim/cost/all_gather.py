"""Every rank gets every token: all-gather before the experts, reduce-scatter after them, as NCCL's rings do them.

What vLLM does where no DeepEP runs (``all2all_backend: allgather_reducescatter``, its default). Volume: a rank receives
the tokens of all others, whoever chose its experts, and sends as many partial sums back.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from sim.cost import CommunicationCost, Direction, Mode, checked_tokens
from sim.network import Network
from sim.tokens import F64, Bool
from sim.units import Seconds


class AllGather(CommunicationCost):
    """t = start + step (P - 1) + bytes of all other ranks' tokens / the slowest link of the ring 0 -> 1 -> ... -> 0.

    Ranks may bring different numbers of tokens (vLLM's all_gatherv); of a rank as many as go to the rank that most of
    them go to, itself included. All pairs end together. Only ``mode: normal``: low-latency counts are of pairs.
    Defaults: aiconfigurator-core 0.12.0, NCCL 2.29.2 all-gathers and reduce-scatters of 2 to 8 RTX PRO 6000 on PCIe.
    """

    kind: Literal["all_gather"] = "all_gather"
    start_s: Seconds = 6e-6
    """Start of a collective."""
    step_s: Seconds = 2e-6
    """Of each step of the ring."""

    def pair_times_s(
        self,
        network: Network,
        *,
        rank_tokens: npt.ArrayLike,
        node_tokens: npt.ArrayLike,
        bytes_per_token: float,
        mode: Mode,
        direction: Direction = "dispatch",
        slowdown: float = 1.0,
    ) -> tuple[F64, Bool]:
        if mode != "normal":
            raise ValueError(f"all_gather moves whole tokens, mode must be normal [got {mode}]")
        ranks, _ = checked_tokens(network, rank_tokens, node_tokens)
        tokens, p = ranks.max(axis=-1), network.n_ranks
        place = np.arange(p)
        hops = network.paths[place, (place + 1) % p]
        rate = np.append(network.link_bandwidth_bytes_per_s, np.inf)[hops].min(initial=np.inf)
        others = (tokens.sum(axis=-1, keepdims=True) - tokens).max(axis=-1)
        seconds = self.start_s + self.step_s * (p - 1) + others * bytes_per_token * slowdown / rate
        reaches = np.broadcast_to((tokens > 0)[..., None] & (place != place[:, None]), ranks.shape)
        return np.where(reaches, seconds[..., None, None], 0.0), reaches
