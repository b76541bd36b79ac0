"""Tables of single kernels, dense GEMM and attention: which kernel a table is of, its fit, and the YAML block of it.

Each kernel is fitted to two thirds of its shapes and judged on the other third and beside H100's constants carried over
by spec ratio; of more than ``MOST_ROWS`` rows a fixed sample is fitted to, all are judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sim.calibration import attention, gemm, moe
from sim.calibration.attention import Family
from sim.cost import h100
from sim.cost.attention import Phase
from sim.hardware import AttentionKernel, DenseGemm, Device, Kernels
from sim.tokens import F64, Bool
from sim.units import human

MOST_ROWS = 4000
# The laws have up to seven constants.
FEWEST_ROWS = 8
KERNELS = {"gemm", "mla_context", "mla_generation", "context_attention", "generation_attention"}


@dataclass(frozen=True, slots=True)
class KernelFit:
    """One fitted kernel. key: its name in a cluster's ``kernels`` block. Errors are mean absolute relative ones."""

    key: str
    constants: DenseGemm | AttentionKernel
    rows: int
    fitted_error: float
    other_shapes_error: float
    transferred_error: float

    @property
    def warning(self) -> str | None:
        """Return what is wrong with a fit that misses too much."""
        return moe.warning(self.fitted_error, self.other_shapes_error)


def knows(table: pd.DataFrame) -> bool:
    """Return whether ``table`` is one of dense products or attention."""
    columns = set(table.columns)
    known = ({"gemm_dtype", "m", "n", "k"}, {"batch_size", "num_heads", "isl", "step"})
    return any(needed <= columns for needed in known)


def load(path: str) -> pd.DataFrame | None:
    """Return the table at ``path`` if it is one of these kernels, else None, for another reader to say what it is."""
    file = Path(path)
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    except (ValueError, OSError):
        return None
    if set(table.columns) >= gemm.VIDUR:
        return gemm.from_vidur(table)
    if not knows(table):
        return None
    other = sorted(set(map(str, table.op_name.unique())) - KERNELS) if "op_name" in table else []
    if other:
        raise ValueError(
            f"{path}: {', '.join(other)} is not a kernel with a law here; those are {', '.join(sorted(KERNELS))}"
        )
    return table


def fit_table(table: pd.DataFrame, device: Device, source: str) -> tuple[list[KernelFit], dict[str, str]]:
    """Return the fits of all kernels that a table holds and ``device`` has formats for, and why others are left out.

    ValueError: no known columns, or nothing to fit.
    """
    if not knows(table):
        raise ValueError(
            "no table of dense products (gemm_dtype, m, n, k) or attention (batch_size, num_heads, isl, step)"
        )
    left_out: dict[str, str] = {}
    make = _gemms if "gemm_dtype" in table else _attention
    fits = list(make(table, device, source, left_out))
    if not fits and left_out:
        raise ValueError("; ".join(f"{key}: {reason}" for key, reason in left_out.items()))
    if not fits:
        raise ValueError(f"no rows in a number format of {device.name}; the table has {_formats(table)}")
    return fits, left_out


def _too_few(rows: pd.DataFrame) -> str | None:
    """Return why ``rows`` are not fitted to, if they are too few."""
    return f"too few rows, {len(rows)} to fit to, {FEWEST_ROWS} at least" if len(rows) < FEWEST_ROWS else None


def _formats(table: pd.DataFrame) -> str:
    return ", ".join(sorted(map(str, table.gemm_dtype.unique()))) if "gemm_dtype" in table else "no attention rows"


def _gemms(table: pd.DataFrame, device: Device, source: str, left_out: dict[str, str]) -> Iterator[KernelFit]:
    bare = device.model_copy(update={"kernels": Kernels()})
    for name, dtype in gemm.DTYPES.items():
        if getattr(device.peak_flops_per_s, dtype) is None or name not in set(table.gemm_dtype):
            continue
        rows = gemm.gemm_rows(table, dtype)
        apart = gemm.held_out(rows)
        if reason := _too_few(rows[~apart]):
            left_out[f"gemm_{dtype}"] = reason
            continue
        fit = gemm.fit_gemm(_sample(rows[~apart]), dtype, device, source)
        yield _judged(
            f"gemm_{dtype}", fit, rows, apart,
            gemm.predict_s(fit, rows, dtype, device.n_sm),
            gemm.predict_s(h100.gemm(bare, dtype), rows, dtype, device.n_sm),
        )  # fmt: skip


def _attention(table: pd.DataFrame, device: Device, source: str, left_out: dict[str, str]) -> Iterator[KernelFit]:
    family: Family = "gqa" if "num_key_value_heads" in table else "mla"
    # Decode tables have one query per request; a prefill table has longer ones too.
    phase: Phase = "decode" if (table.isl == 1).all() else "prefill"
    bare = device.model_copy(update={"kernels": Kernels()})
    rows = attention.attention_rows(table, family, phase)
    apart = attention.held_out(rows)
    if reason := _too_few(rows[~apart]):
        left_out[f"{family}_{phase}"] = reason
        return
    fit = attention.fit_attention(_sample(rows[~apart]), family, phase, device, source)
    yield _judged(
        f"{family}_{phase}", fit, rows, apart,
        attention.predict_s(fit, rows, family, phase, device.n_sm),
        attention.predict_s(h100.attention(bare, family, phase), rows, family, phase, device.n_sm),
    )  # fmt: skip


def _sample(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sample(min(MOST_ROWS, len(rows)), random_state=0)


def _judged(
    key: str, fit: DenseGemm | AttentionKernel, rows: pd.DataFrame, apart: Bool, ours: F64, transferred: F64
) -> KernelFit:
    seconds = rows.seconds.to_numpy(np.float64)
    miss, carried = np.abs(ours / seconds - 1), np.abs(transferred / seconds - 1)
    # A table of one or two shapes has nothing to hold out.
    other = float(miss[apart].mean()) if apart.any() else float("nan")
    return KernelFit(key, fit, len(rows), float(miss[~apart].mean()), other, float(carried.mean()))


_UNIT: dict[str, Callable[[float], str]] = {
    "flops_per_s": lambda value: human(value, "FLOP/s"),
    "bytes_per_s": lambda value: human(value, "B/s"),
    "_s": lambda value: f"{value * 1e6:.4g} us",
}


def block(fits: list[KernelFit]) -> str:
    """Return the fits as entries of a cluster file's ``device.kernels``, errors in a comment."""
    lines = []
    for fit in fits:
        lines += [f"{fit.key}:", f"  # {summary(fit)}"]
        if fit.warning:
            lines.append(f"  # warning: {fit.warning}")
        for name, value in fit.constants.model_dump(exclude_none=True).items():
            if isinstance(value, float):
                unit = next((write for end, write in _UNIT.items() if name.endswith(end)), lambda value: f"{value:.4g}")
                value = unit(value)
            lines.append(f"  {name}: {json.dumps(value) if name == 'source' else value}")
    return "\n".join(["device:", "  kernels:", *(f"    {line}" for line in lines)]) + "\n"


def summary(fit: KernelFit) -> str:
    """Return one line of rows and errors."""
    other = "none" if np.isnan(fit.other_shapes_error) else f"{100 * fit.other_shapes_error:.1f} %"
    return (
        f"{fit.rows:,} rows: mean error {100 * fit.fitted_error:.1f} %, other shapes {other}; H100's constants by spec "
        f"ratio {100 * fit.transferred_error:.1f} %."
    )
