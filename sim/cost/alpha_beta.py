"""One latency and one bandwidth per all-to-all from DeepEP's published tables; the network's links do not enter."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from sim.cost import CommunicationCost, Direction, Mode, checked_tokens
from sim.network import Network
from sim.tokens import F64, Bool
from sim.units import BytesPerSecond, Seconds


class Line(BaseModel):
    """t = alpha + bytes / beta for EP groups on ``nodes`` nodes or more, up to the next line's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    nodes: Annotated[int, Field(gt=0)]
    """From this many nodes on."""
    dispatch_alpha_s: Seconds
    """Latency."""
    dispatch_beta_bytes_per_s: BytesPerSecond
    """Logical bandwidth."""
    combine_alpha_s: Seconds
    """Latency."""
    combine_beta_bytes_per_s: BytesPerSecond
    """Logical bandwidth."""


def _lines(rows: list[tuple[int, float, float, float, float]]) -> tuple[Line, ...]:
    names = ("nodes", "dispatch_alpha_s", "dispatch_beta_bytes_per_s", "combine_alpha_s", "combine_beta_bytes_per_s")
    scale = (1, 1e-6, 1e9, 1e-6, 1e9)
    return tuple(
        Line.model_validate({name: value * unit for name, value, unit in zip(names, row, scale, strict=True)})
        for row in rows
    )


class AlphaBeta(CommunicationCost):
    """All pairs of a source s and a target r take alpha + n/beta, n the larger of what s sends and what r's port gets.

    n is DeepEP's logical volume: it counts the own rank and node. Normal mode across nodes counts copies per node (the
    target port is the NIC of s's peer), within one node copies per rank; low latency counts (token, expert) pairs.
    Betas: DeepEP docs/legacy.md on H800 (normal as printed; low latency such that alpha + n/beta gives the printed
    latency at 128 tokens). Alphas: the 1 and 2 node intercepts of aiconfigurator-core's DeepEP tables on H100. Good on
    that hardware and fabric only, since bandwidths of the cluster file do not enter: ``port`` transfers, this does not.
    """

    kind: Literal["alpha_beta"] = "alpha_beta"
    normal: Annotated[tuple[Line, ...], Field(min_length=1)] = _lines(
        [(1, 35, 153, 52, 158), (2, 29, 43, 55, 43), (4, 29, 58, 55, 57), (8, 29, 51, 55, 50)]
    )
    """Lines of the normal kernels."""
    low_latency: Annotated[tuple[Line, ...], Field(min_length=1)] = _lines(
        [
            (1, 15, 122.4, 11, 142.5),
            (2, 20, 77.4, 25, 86.4),
            (4, 20, 56.2, 25, 59.2),
            (8, 20, 49.6, 25, 50.8),
            (16, 20, 44.1, 25, 42.7),
            (32, 20, 43.6, 25, 43.8),
        ]
    )
    """Lines of the low-latency kernels."""
    source: str = "DeepEP docs/legacy.md (H800); alpha: aiconfigurator-core 0.12.0 DeepEP tables on H100, fit"

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
        ranks, nodes = checked_tokens(network, rank_tokens, node_tokens)
        per_node = min(network.ranks_per_node, network.n_ranks)
        if mode == "low_latency" or network.n_nodes == 1:
            sent, received = ranks.sum(axis=-1)[..., :, None], ranks.sum(axis=-2)[..., None, :]
        else:
            sent = nodes.sum(axis=-1)[..., :, None]
            # nodes summed over the sources of one position, [..., R, N], spread back to every (s, r).
            arriving = nodes.reshape(*nodes.shape[:-2], -1, per_node, network.n_nodes).sum(axis=-3)
            received = np.concatenate([np.repeat(arriving, per_node, axis=-1)] * network.n_nodes, axis=-2)
        lines = self.normal if mode == "normal" else self.low_latency
        fitting = [line for line in lines if line.nodes <= network.n_nodes]
        line = max(fitting, key=lambda line: line.nodes) if fitting else min(lines, key=lambda line: line.nodes)
        alpha, beta = (
            (line.dispatch_alpha_s, line.dispatch_beta_bytes_per_s)
            if direction == "dispatch"
            else (line.combine_alpha_s, line.combine_beta_bytes_per_s)
        )
        reaches = ranks > 0
        reaches[..., np.arange(network.n_ranks), np.arange(network.n_ranks)] = False
        seconds = alpha + np.maximum(sent, received) * bytes_per_token / beta * slowdown
        return np.where(reaches, seconds, 0.0), reaches
