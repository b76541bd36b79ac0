"""Advice for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sim.advice import Serving, Setup, Verdict
from sim.advice.batches import Batches
from sim.advice.evidence import Interval
from sim.advice.placement import Judged, Row
from sim.report import grid
from sim.units import human


def section(setup: Setup, batches: Batches, phase: Serving, found: Judged | None, answer: tuple[Verdict, str]) -> str:
    """Return the text of one phase: verdict, why, how often, the table of options."""
    lines = [f"{phase}: {answer[0]}", f"  {answer[1]}"]
    if found is None:
        return "\n".join(lines)
    best = found.chosen
    lines += [f"  {sentence}" for sentence in _how_often(setup, batches, found)]
    table = [["no balancer", f"{1e3 * found.base_s:.3f}", f"{found.base_imbalance:.2f}", *["-"] * 6]]
    table += [_cells(found, row, row is best) for row in found.rows]
    head = [
        "option (* best inside window A)", "step, ms", "rank imbalance", "saving", "95 %", "moved per rebalance",
        "one rebalance", "pays in steps", "cache lost",
    ]  # fmt: skip
    sizes = (
        f"{batches.tokens_per_rank} tokens per rank, {setup.ep_size} ranks, batches of {batches.size:,} tokens; "
        f"planned on {found.planned} batches, judged on {found.batches} later ones"
    )
    return "\n".join([*lines, "", f"  {sizes}", *("  " + line for line in grid(head, table))])


def _cells(found: Judged, row: Row, best: bool) -> list[str]:
    name = row.option.name + (" *" if best else "")
    if math.isnan(row.saving.mean):
        return [name, "does not fit", *["-"] * 7]
    kept = 1 - row.cache.batch_share
    pays = row.break_even
    return [
        name,
        f"{1e3 * found.base_s * (1 - row.saving.mean):.3f}",
        f"{row.imbalance:.2f}",
        _percent(row.saving.mean),
        f"{_percent(row.saving.low)} .. {_percent(row.saving.high)}",
        human(row.move.bytes, "B"),
        human(row.rebalance_s, "s"),
        f"{_steps(pays.mean)} ({_steps(pays.low)} .. {_steps(pays.high)})",
        f"{human(row.cache.replica_bytes, 'B')}" + (f", {100 * kept:.0f} % of the batch" if kept > 0 else ""),
    ]


def _how_often(setup: Setup, batches: Batches, found: Judged) -> list[str]:
    best, window = found.chosen, batches.per_window
    lines = []
    pays = best.break_even
    if math.isfinite(pays.mean):
        lines.append(
            f"how often: not more than every {_steps(pays.mean)} steps ({_steps(pays.low)} .. {_steps(pays.high)}): one "
            f"rebalance takes {human(best.rebalance_s, 's')}"
        )
    ages = " ".join(f"{_percent(one.saving)} ({one.steps:.0f})" for one in found.aged)
    lines.append(f"as a plan ages it saves, at its age in steps: {ages}")
    last, first = found.aged[-1].saving, found.aged[0].saving
    if first > 0:
        seen = "nothing is left" if last <= 0 else f"{100 * min(1.0, last / first):.0f} % of the first saving is left"
        lines.append(f"after {window * (len(found.aged) - 1)} steps, the oldest plan seen, {seen}")
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _steps(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:,.0f}"


def as_data(
    setup: Setup, batches: Batches, phase: Serving, found: Judged | None, answer: tuple[Verdict, str]
) -> dict[str, Any]:
    """Return one phase as plain data; what has no finite value is None."""
    data: dict[str, Any] = {
        "phase": phase,
        "verdict": answer[0],
        "reason": answer[1],
        "tokens_per_rank": batches.tokens_per_rank,
        "batch_tokens": batches.size,
        "planned_batches": 0,
        "judged_batches": 0,
        "chosen": None,
        "net_saving": None,
        "independent_batches": None,
        "baseline": None,
        "options": [],
        "aged": [],
        "every": [],
    }
    if found is None:
        return data
    return data | {
        "planned_batches": found.planned,
        "judged_batches": found.batches,
        "chosen": found.chosen.option.name,
        "net_saving": _interval(found.net),
        "independent_batches": _finite(found.times),
        "baseline": {"step_s": found.base_s, "rank_imbalance": found.base_imbalance},
        "options": [_row(found, row) for row in found.rows],
        "aged": [{"steps": one.steps, "saving": one.saving} for one in found.aged],
        "every": [{"steps": one.steps, "saving": one.saving, "net_saving": one.net} for one in found.every],
    }


def _row(found: Judged, row: Row) -> dict[str, Any]:
    return {
        "option": row.option.name,
        "policy": row.option.policy,
        "saving": _interval(row.saving),
        "rank_imbalance": _finite(row.imbalance),
        "moved_slots": row.move.slots,
        "moved_bytes": row.move.bytes,
        "move_s": row.move.seconds,
        "rebalance_s": _finite(row.rebalance_s),
        "break_even_steps": _interval(row.break_even),
        "replica_bytes_per_rank": row.cache.replica_bytes,
        "cache_tokens_per_rank": row.cache.tokens,
        "batch_share": row.cache.batch_share,
    }


def _interval(value: Interval) -> dict[str, float | None]:
    return {name: _finite(number) for name, number in value._asdict().items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def assumptions(setup: Setup, notes: Sequence[str]) -> list[str]:
    """Return what a reader must know that is not in the traffic, one sentence each."""
    other = f"{1e3 * setup.other_s:g} ms" if setup.other_s else "nothing else: shares are of the MoE part alone"
    if setup.stall:
        one = f"one rebalance stalls serving: {human(setup.solver_s, 's')} on the host, then the moves, layer after layer"
    else:
        one = "one rebalance runs beside serving: its moves take links from dispatch and combine, the host is free"
    return [
        *notes,
        f"{setup.cluster.device.name}, experts in {setup.cost.gemm_dtype}; cost laws {setup.cost.compute.kind} and "
        f"{setup.cost.communication.kind}; prefill with DeepEP's normal kernels, decode with the low-latency ones",
        f"a step is {setup.model.n_moe_layers} MoE layers like those recorded, and {other}",
        f"a rebalance every {setup.interval:,} steps; what window B shows is taken to last that long",
        one,
        f"a decoding request holds {setup.context:,} tokens of cache; requests that replicas displace make no step shorter",
    ]
