"""What `sim.calibrate` says about each kernel of a table: constants, errors of fit and of what is not fitted to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sim.calibration import moe
from sim.calibration.moe import Rows
from sim.cost import h100
from sim.hardware import Device, Dtype, GroupedGemm
from sim.units import human


@dataclass(slots=True)
class Kernel:
    """One kernel and number format. Errors are mean absolute relative ones; NaN or empty where there is nothing to say.

    error: of the rows fitted to. without_ep, without_shape: of the rows of each EP degree or shape under constants
    fitted to the others. shipped: of the constants that the device's file holds. transferred: of H100's by spec ratio.
    uneven, narrow: of skewed and of tensor-parallel rows, not fitted to. by_shape: rows fitted to, shape by shape.
    """

    name: str
    dtype: Dtype
    rows: int
    dropped: dict[str, int]
    fit: GroupedGemm | None = None
    error: float = float("nan")
    shipped: float = float("nan")
    transferred: float = float("nan")
    uneven: float = float("nan")
    narrow: float = float("nan")
    without_ep: dict[str, float] = field(default_factory=dict)
    without_shape: dict[str, float] = field(default_factory=dict)
    by_shape: dict[str, float] = field(default_factory=dict)


def calibrate(rows: list[Rows], device: Device, table: str) -> list[Kernel]:
    """Fit every kernel of a table. ValueError if ``device`` lacks the formats of all of them."""
    known = [name for name in ("bf16", "fp8", "fp4") if getattr(device.peak_flops_per_s, name) is not None]
    result = []
    for r in rows:
        kernel = Kernel(r.kernel, r.dtype, len(r.frame), dict(r.dropped))
        result.append(kernel)
        if r.dtype not in known:
            kernel.dropped[f"{device.name} has no {r.dtype} peak"] = kernel.rows
            kernel.rows = 0
        if r.n_sm is not None and r.n_sm != device.n_sm:
            kernel.dropped[f"{r.n_sm} compute units; {device.name} has {device.n_sm}"] = kernel.rows
            kernel.rows = 0
        if kernel.rows < moe.FEWEST_ROWS:
            continue
        kernel.fit = moe.fit(r, device, f"{table}, {r.kernel}, fit of {len(r.frame)} rows")
        kernel.error = moe.mape(kernel.fit, r)
        kernel.transferred = moe.mape(for_table(h100.grouped_gemm(device, r.dtype, measured=False), r), r)
        kernel.shipped = moe.mape(for_table(h100.grouped_gemm(device, r.dtype), r), r)
        shapes = np.array(r.shapes)
        kernel.by_shape = {name: moe.mape(kernel.fit, r.part(shapes == name)) for name in sorted(set(r.shapes))}
        kernel.without_ep = moe.leave_one_out(r, device, [str(ep) for ep in r.frame.ep_size])
        kernel.without_shape = moe.leave_one_out(r, device, r.shapes)
        if r.uneven is not None:
            kernel.uneven = moe.mape(kernel.fit, r.uneven)
        if r.narrow is not None:
            kernel.narrow = moe.mape(kernel.fit, r.narrow)
    if not any(kernel.fit for kernel in result):
        reasons = sorted({reason for kernel in result for reason in kernel.dropped})
        raise ValueError(
            f"{table}: no kernel has {moe.FEWEST_ROWS} rows to fit ({'; '.join(reasons) or 'too few rows'})"
        )
    return result


def for_table(constants: GroupedGemm, rows: Rows) -> GroupedGemm:
    """Return the constants as ``rows`` time kernels: whole, or the two products alone."""
    return constants if rows.walks else constants.products


def chosen(result: list[Kernel]) -> dict[Dtype, Kernel]:
    """Return the kernel that stands for each format: block-wise fp8 before other fp8, then the one with most rows."""
    best: dict[Dtype, Kernel] = {}
    for kernel in sorted(result, key=lambda k: (k.name.endswith(" fp8"), -k.rows, k.name)):
        if kernel.fit is not None:
            best.setdefault(kernel.dtype, kernel)
    return best


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def _worst(errors: dict[str, float], what: str) -> str:
    if not errors:
        return "-"
    name = max(errors, key=lambda key: errors[key])
    return f"{_percent(float(np.mean(list(errors.values()))))} (worst {what}{name}: {_percent(errors[name])})"


def table(result: list[Kernel]) -> str:
    """Return the printed report; errors in %."""
    lines = ["mean absolute errors in %; 'shipped' and 'from H100' are not fitted to this table"]
    for k in result:
        lines.append("")
        lines.append(f"{k.name} [{k.dtype}]  {k.rows} rows")
        for reason, count in k.dropped.items():
            lines.append(f"  left out: {count} rows, {reason}")
        if k.fit is None:
            continue
        f = k.fit
        rates = [("P", f.flops_per_s, "FLOP/s"), ("B", f.bandwidth_bytes_per_s, "B/s")]
        rates += [
            (name, rate, "B/s")
            for name, rate in (("D", f.pair_bytes_per_s), ("C", f.token_bytes_per_s))
            if rate is not None
        ]
        shown = ", ".join(f"{name} {human(value, unit)}" for name, value, unit in rates)
        lines.append(f"  a {human(f.overhead_s, 's')}, {shown}, norm {f.norm:g}, tile {f.tile_rows}")
        lines.append(
            f"  fitted {_percent(k.error)}   shipped {_percent(k.shipped)}   from H100 {_percent(k.transferred)}"
        )
        if said := moe.warning(k.error):
            lines.append(f"  warning: {said}")
        lines.append(f"  leave one EP out    {_worst(k.without_ep, 'EP')}")
        lines.append(f"  leave one shape out {_worst(k.without_shape, '')}")
        lines.append(f"  skewed rows {_percent(k.uneven)}   tensor-parallel rows {_percent(k.narrow)}")
    return "\n".join(lines)


def as_data(result: list[Kernel]) -> dict[str, Any]:
    """Return everything as plain data; errors as fractions, None where there is none."""

    def plain(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    kernels = [
        {
            "kernel": k.name,
            "dtype": k.dtype,
            "rows": k.rows,
            "dropped": k.dropped,
            "constants": None if k.fit is None else k.fit.model_dump(exclude_none=True),
            "mape": plain(k.error),
            "warning": moe.warning(k.error),
            "mape_shipped": plain(k.shipped),
            "mape_from_h100": plain(k.transferred),
            "mape_uneven": plain(k.uneven),
            "mape_tensor_parallel": plain(k.narrow),
            "mape_by_shape": k.by_shape,
            "leave_one_ep_out": k.without_ep,
            "leave_one_shape_out": k.without_shape,
        }
        for k in result
    ]
    return {"kernels": kernels, "chosen": {dtype: k.name for dtype, k in chosen(result).items()}}


def heading(path: str, device: Device) -> str:
    """Return the comment above the block."""
    return f"# Grouped GEMM constants of {device.name}, fitted to {path}; extend the cluster file and add these.\n"


def block(result: list[Kernel]) -> str:
    """Return the YAML that a cluster file takes: ``device: {kernels: {...}}``."""
    lines = ["device:", "  kernels:"]
    for dtype, k in sorted(chosen(result).items()):
        assert k.fit is not None
        held = _worst(k.without_ep, "EP")
        lines += [
            f"    grouped_gemm_{dtype}:",
            f"      # {k.rows} rows: {_percent(k.error)} %; leave one EP out: {held}",
        ]
        for name, value in k.fit.model_dump(exclude_none=True).items():
            lines.append(f"      {name}: {_text(value)}")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{value:g}" if isinstance(value, int) else f"{value:.5g}"
