"""DeepEP times read from measured tables: those of the optional package aiconfigurator-core, or of a folder like them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from sim.cost import CommunicationCost, Direction, Mode, checked_tokens
from sim.cost.port import Port
from sim.cost.table import Table
from sim.network import Network
from sim.tokens import F64, Bool


class CommunicationTable(CommunicationCost):
    """Measured DeepEP times of even exchanges; who sends more or less to whom enters as ``port`` has it.

    A pair's time is that of ``port``, times measured over ``port`` for the even exchange of as many tokens: measured
    points stay exact, between and beyond them the ratio is interpolated over the logarithm of the tokens and held.
    Tables: <gpu>/comm/sglang/<version>/wideep_deepep_{normal,ll}_perf.parquet; of several versions the newest that has
    the shape and number of nodes. path: a folder of the package's layout. gpu: the device's folder there, since a
    network does not say what its devices are. hidden_size, num_experts, num_experts_per_tok: the table's rows.

    Raises ValueError where the package, the device, the node count or the SM count is missing. Two traps in the
    package: its H200 tables of 0.5.6.post2 are H100's, and 8-node normal dispatch is a third of what DeepEP publishes.
    """

    kind: Literal["table"] = "table"
    path: str | None = None
    gpu: str = "h100_sxm"
    hidden_size: Annotated[int, Field(gt=0)] = 7168
    num_experts: Annotated[int, Field(gt=0)] = 256
    num_experts_per_tok: Annotated[int, Field(gt=0)] = 8
    source: str = "DeepEP tables of aiconfigurator-core"

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
        law, p = Port(num_sms=self.num_sms), network.n_ranks
        tokens, measured = self.measured(mode, direction, network.n_nodes)
        # Copies per token that an even router makes for a rank, and for a node.
        spread = self.num_experts_per_tok / p if mode == "low_latency" else self._hit(p)
        even = {
            "rank_tokens": np.broadcast_to(tokens[:, None, None] * spread, (tokens.size, p, p)),
            "node_tokens": np.broadcast_to(
                tokens[:, None, None] * self._hit(network.n_nodes), (tokens.size, p, network.n_nodes)
            ),
        }
        how = {"bytes_per_token": bytes_per_token, "mode": mode, "direction": direction}
        plain = law.pair_times_s(network, **even, **how)[0].max(axis=(-1, -2))  # type: ignore[arg-type]
        mean = ranks.sum(axis=(-1, -2)) / (p * p * spread)
        ratio = np.exp(np.interp(np.log(np.maximum(mean, 1e-9)), np.log(tokens), np.log(measured / plain)))
        seconds, reaches = law.pair_times_s(
            network,
            rank_tokens=ranks,
            node_tokens=nodes,
            slowdown=slowdown,
            **how,  # type: ignore[arg-type]
        )
        return seconds * ratio[..., None, None], reaches

    def _hit(self, parts: int) -> float:
        """Return the chance that one of ``parts`` equal groups of experts has one of a token's, if all are alike."""
        rest, all_of = self.num_experts - self.num_experts / parts, self.num_experts
        drawn = np.arange(self.num_experts_per_tok)
        return float(1 - np.prod(np.maximum(rest - drawn, 0) / (all_of - drawn)))

    def measured(self, mode: Mode, direction: Direction, n_nodes: int) -> tuple[F64, F64]:
        """Return tokens per rank, ascending, and the seconds measured for them."""
        root = Table(path=self.path).root()
        if not (root / self.gpu).is_dir():
            raise ValueError(f"table: no tables of {self.gpu} in {root.name}; gpu names a folder such as h100_sxm")
        shape = (self.hidden_size, self.num_experts, self.num_experts_per_tok)
        sms = self.num_sms if mode == "normal" else None
        rows = _rows(root / self.gpu, mode, direction, n_nodes, shape, sms)
        if not rows:
            with_sms = "" if sms is None else f" with {sms} SMs"
            raise ValueError(
                f"table: {self.gpu} has no DeepEP {mode} rows of {n_nodes} nodes, hidden size {shape[0]}, "
                f"{shape[2]} of {shape[1]} experts{with_sms}"
            )
        tokens, seconds = np.array(rows, dtype=np.float64).T
        return tokens, seconds


@lru_cache(maxsize=32)
def _rows(
    folder: Path, mode: Mode, direction: Direction, n_nodes: int, shape: tuple[int, int, int], sms: int | None
) -> tuple[tuple[float, float], ...]:
    import pandas as pd

    from sim.cost.table import version_order

    name = f"wideep_deepep_{'normal' if mode == 'normal' else 'll'}_perf.parquet"
    column = f"{direction}_transmit_us" if mode == "normal" else f"{direction}_avg_t_us"
    files = sorted((folder / "comm" / "sglang").glob(f"*/{name}"), key=lambda file: version_order(file.parent.name))
    for file in reversed(files):
        rows = pd.read_parquet(file)
        kept = (rows.node_num == n_nodes) & (rows.hidden_size == shape[0])
        kept &= (rows.num_experts == shape[1]) & (rows.num_topk == shape[2])
        if sms is not None:
            kept &= rows[f"{direction}_sms"] == sms
        found = rows[kept].groupby("num_token")[column].median().sort_index()
        if len(found):
            return tuple(zip(found.index.to_numpy(float).tolist(), (found.to_numpy() * 1e-6).tolist(), strict=True))
    return ()
