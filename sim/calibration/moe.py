"""Grouped GEMM: the rows of measured MoE tables, and the constants of `sim.cost.grouped_gemm` that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.cost.grouped_gemm import grouped_gemm_s
from sim.hardware import Device, Dtype, GroupedGemm
from sim.tokens import F64, Bool

TILES = (128, 64, 1)
FEWEST_ROWS = 6
POOR = 0.3


def warning(*errors: float) -> str | None:
    """Return what to say of a fit with these mean errors, None where all are at most 30 % (or NaN, not known)."""
    worst = max((error for error in errors if not np.isnan(error)), default=0.0)
    return f"mean error {100 * worst:.0f} %: the law does not describe this kernel" if worst > POOR else None


@dataclass(frozen=True, slots=True)
class Rows:
    """Measured rows of one kernel and number format.

    frame: one row each with hidden_size, moe_intermediate_size (per rank), n_routed_experts, num_experts_per_tok,
    ep_size, num_tokens (of the EP group), seconds. expert_tokens: [rows, e]. walks: whether the kernel may walk the
    tokens of the whole group; False for products timed alone. dropped: rows left out, by reason. uneven: rows of a
    skewed distribution, expert_tokens [rows, draws, e]; narrow: rows with tensor parallelism; both are never fitted to.
    n_sm: of the GPU, where the table says so.
    """

    kernel: str
    dtype: Dtype
    frame: pd.DataFrame
    expert_tokens: F64
    walks: bool = True
    dropped: tuple[tuple[str, int], ...] = ()
    uneven: Rows | None = None
    narrow: Rows | None = None
    n_sm: int | None = None

    def part(self, chosen: Bool) -> Rows:
        """Return the chosen rows."""
        return Rows(self.kernel, self.dtype, self.frame[chosen], self.expert_tokens[chosen], self.walks)

    @property
    def shapes(self) -> list[str]:
        """Hidden x width, experts and choices of every row."""
        columns = ["hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"]
        return ["{}x{} E{} k{}".format(*row) for row in self.frame[columns].itertuples(index=False)]


def predict_s(fit: GroupedGemm, rows: Rows) -> F64:
    """Return the law's seconds of every row, the mean over draws where a row has several."""
    return _law(rows)(fit)


def _law(rows: Rows) -> Callable[[GroupedGemm], F64]:
    """Return the law over these rows; equal loads of a row are counted once."""
    f, wide = rows.frame, rows.expert_tokens.ndim == 3
    loads, count = (rows.expert_tokens, None) if wide else _distinct(rows.expert_tokens)
    tokens, h, m = (
        f[name].to_numpy(np.float64)[:, None] if wide else f[name].to_numpy(np.float64)
        for name in ("num_tokens", "hidden_size", "moe_intermediate_size")
    )

    def seconds(fit: GroupedGemm) -> F64:
        t = grouped_gemm_s(
            fit,
            sm_fraction=1.0,
            expert_tokens=loads,
            multiplicity=1.0 if count is None else count,
            ep_tokens=tokens,
            hidden_size=h,
            moe_intermediate_size=m,
            dtype=rows.dtype,
        )
        return t.mean(axis=1) if wide else t

    return seconds


def _distinct(loads: F64) -> tuple[F64, F64]:
    """Return the distinct positive loads of every row and how often each occurs, zeros behind them."""
    found = [np.unique(row[row > 0], return_counts=True) for row in loads]
    width = max((len(values) for values, _ in found), default=1)
    values, counts = np.zeros((len(loads), max(width, 1))), np.zeros((len(loads), max(width, 1)))
    for i, (value, count) in enumerate(found):
        values[i, : len(value)], counts[i, : len(value)] = value, count
    return values, counts


def mape(fit: GroupedGemm, rows: Rows) -> float:
    """Return the mean absolute error of the law relative to the measured times."""
    return float(np.abs(predict_s(fit, rows) / rows.frame.seconds.to_numpy() - 1).mean())


def fit(rows: Rows, device: Device, source: str) -> GroupedGemm:
    """Return the constants that fit ``rows`` best: soft-L1 least squares on log time, the best of three M tiles.

    The free ones are the overhead, four rates as shares of the data sheet and the norm; P and B stay within it. A rate that ends beyond 20 times
    the bandwidth does nothing and is left out. ValueError with fewer than 6 rows.
    """
    if len(rows.frame) < FEWEST_ROWS:
        raise ValueError(
            f"{rows.kernel} {rows.dtype}: {len(rows.frame)} rows are too few to fit, {FEWEST_ROWS} at least"
        )
    peak, bandwidth = device.peak(rows.dtype), device.memory_bandwidth_bytes_per_s
    measured = np.log(rows.frame.seconds.to_numpy())
    smallest = float(rows.frame.seconds.min())

    def constants(x: F64, tile: int) -> GroupedGemm:
        a, p, b, q, d, c = np.exp(x)
        return GroupedGemm(
            overhead_s=a,
            flops_per_s=p * peak,
            bandwidth_bytes_per_s=b * bandwidth,
            pair_bytes_per_s=d * bandwidth if rows.walks else None,
            token_bytes_per_s=c * bandwidth if rows.walks else None,
            norm=1 + q,
            tile_rows=tile,
            source=source,
        )

    start = np.log([max(smallest / 2, 1e-6), 0.5, 0.8, 2.0, 0.4, 1.0])
    low = np.log([1e-8, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    high = np.log([max(2 * smallest, 2e-6), 1.0, 1.0, 20.0, 30.0, 30.0])
    found: list[tuple[float, GroupedGemm]] = []
    law = _law(rows)
    for tile in TILES:

        def residuals(x: F64, tile: int = tile) -> F64:
            gap: F64 = np.log(law(constants(x, tile))) - measured
            return gap

        # Times span decades; a tenth is where a row begins to count as an outlier.
        best = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=80)
        chosen = constants(best.x, tile)
        found.append((float(best.cost), _rounded(chosen, bandwidth)))
    return min(found, key=lambda pair: pair[0])[1]


def _rounded(fitted: GroupedGemm, bandwidth: float) -> GroupedGemm:
    changed: dict[str, float | None] = {}
    for name, value in fitted.model_dump(exclude={"source", "tile_rows"}).items():
        if value is not None:
            changed[name] = float(f"{value:.4g}")
    for name in ("pair_bytes_per_s", "token_bytes_per_s"):
        value = changed.get(name)
        if name == "token_bytes_per_s" and value is not None and value > 20 * bandwidth:
            changed[name] = None
    return fitted.model_copy(update=changed)


def leave_one_out(rows: Rows, device: Device, groups: list[str], judged: Bool | None = None) -> dict[str, float]:
    """Return, for every group of rows, its error under the constants fitted to all others; {} for a single group.

    judged: which rows the errors are of; all by default.
    """
    labels = np.array(groups)
    seen = np.ones(len(labels), dtype=bool) if judged is None else judged
    names = sorted(set(groups), key=lambda name: (len(name), name))
    errors: dict[str, float] = {}
    for name in names:
        rest = labels != name
        if rest.sum() >= FEWEST_ROWS and len(names) > 1 and (~rest & seen).any():
            errors[name] = mape(fit(rows.part(rest), device, ""), rows.part(~rest & seen))
    return errors
