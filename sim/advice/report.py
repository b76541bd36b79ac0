"""Advice for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sim.advice import Serving, Setup, Verdict
from sim.advice.batches import Batches
from sim.advice.evidence import Interval
from sim.advice.placement import Judged, Row
from sim.advice.verdict import condition
from sim.aligned import grid
from sim.units import human

_HEAD = ("option", "step ms", "imbalance", "saves", "95 %", "moves", "costs", "repaid in steps", "95 %", "memory")


def section(setup: Setup, batches: Batches, phase: Serving, found: Judged | None, answer: tuple[Verdict, str]) -> str:
    """Return the text of one phase: verdict, why, how often, the table of options."""
    lines = [f"{phase}, {batches.tokens_per_rank} tokens per rank: {answer[0]}", f"  {answer[1]}"]
    if found is None:
        return "\n".join(lines)
    table = [["no balancer", f"{1e3 * found.base_s:.3f}", f"{found.base_imbalance:.2f}", *["-"] * (len(_HEAD) - 3)]]
    table += [_cells(found, row) for row in found.rows]
    return "\n".join(
        [
            *lines,
            *(f"  {sentence}" for sentence in _how_often(batches, found)),
            "",
            *(f"  {line}" for line in grid(_HEAD, table)),
            f"  of each step {human(found.other_s, 's')} are not the experts' part; planned on {found.planned} batches of "
            f"{batches.size:,} tokens ({setup.ep_size} ranks), judged on {found.batches} later ones; * best within the former",
        ]
    )


def _cells(found: Judged, row: Row) -> list[str]:
    name = row.option.name + (" *" if row is found.chosen else "")
    if math.isnan(row.saving.mean):
        return [name, "does not fit", *["-"] * (len(_HEAD) - 2)]
    kept, repaid = row.cache.batch_share / (found.base_cache.batch_share or 1.0), row.break_even
    return [
        name,
        f"{1e3 * found.base_s * (1 - row.saving.mean):.3f}",
        f"{row.imbalance:.2f}",
        _percent(row.saving.mean),
        "-" if math.isnan(row.saving.low) else f"{_percent(row.saving.low)} .. {_percent(row.saving.high)}",
        human(row.move.bytes, "B"),
        human(row.rebalance_s, "s"),
        _steps(repaid.mean),
        f"{_steps(repaid.low)} .. {_steps(repaid.high)}" if math.isfinite(repaid.low) else "-",
        human(row.cache.replica_bytes, "B") + (f" (-{100 * (1 - kept):.0f} % batch)" if kept < 1 else ""),
    ]


def _how_often(batches: Batches, found: Judged) -> list[str]:
    best, lines = found.chosen, []
    repaid = best.break_even
    if math.isfinite(repaid.mean):
        between = f" [{_steps(repaid.low)}, {_steps(repaid.high)}]" if math.isfinite(repaid.low) else ""
        lines.append(
            f"a rebalance costs {human(best.rebalance_s, 's')}, which {_steps(repaid.mean)} steps repay{between}: not more "
            "often than that"
        )
    if found.base_cache.tokens <= 0:
        lines.append("the model does not fit on these ranks at all: what replicas displace is left out")
    ages = ", ".join(f"{_percent(one.saving)} at {one.steps:.0f}" for one in found.aged)
    return [*lines, f"saving by age of the plan in steps: {ages}"]


def _percent(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f} %"


def _steps(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:,.0f}"


def as_data(batches: Batches, phase: Serving, found: Judged | None, answer: tuple[Verdict, str]) -> dict[str, Any]:
    """Return one phase as plain data; what has no finite value is None."""
    data: dict[str, Any] = {
        "phase": phase,
        "verdict": answer[0],
        "reason": answer[1],
        "condition": None,
        "ep_size": batches.ep_size,
        "tokens_per_rank": batches.tokens_per_rank,
        "batch_tokens": batches.size,
        "planned_batches": 0,
        "judged_batches": 0,
        "independent_batches": None,
        "baseline": None,
        "chosen": None,
        "interval_steps": None,
        "seen_steps": None,
        "net_saving": None,
        "saving_trend": None,
        "options": [],
        "aged": [],
        "every": [],
    }
    if found is None:
        return data
    return data | {
        "condition": condition(found) if answer[0] == "worth it if plans keep" else None,
        "planned_batches": found.planned,
        "judged_batches": found.batches,
        "independent_batches": _finite(found.times),
        "baseline": {
            "step_s": found.base_s,
            "other_s": found.other_s,
            "rank_imbalance": found.base_imbalance,
            "cache_tokens_per_rank": found.base_cache.tokens,
            "batch_share": found.base_cache.batch_share,
        },
        "chosen": found.chosen.option.name,
        "interval_steps": found.interval,
        "seen_steps": found.span,
        "net_saving": _interval(found.net),
        "saving_trend": _interval(found.trend),
        "options": [_row(row) for row in found.rows],
        "aged": [{"steps": one.steps, "saving": one.saving} for one in found.aged],
        "every": [{"steps": one.steps, "saving": one.saving, "net_saving": one.net} for one in found.every],
    }


def _row(row: Row) -> dict[str, Any]:
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
    rest = "attention, shared experts, dense layers and head by the same laws"
    if setup.other_s is not None:
        rest = f"{1e3 * setup.other_s:g} ms"
    if setup.stall:
        one = f"a rebalance stalls serving: {human(setup.solver_s, 's')} on the host, then the moves, layer after layer"
    else:
        one = "a rebalance runs beside serving: its moves take the links from dispatch and combine, the host is free"
    kernels = "" if setup.mode else "; DeepEP's normal kernels in prefill, its low-latency ones in decode"
    return [
        *notes,
        f"{setup.cluster.device.name}, experts in {setup.cost.gemm_dtype}; cost laws {setup.cost.compute.kind} and "
        f"{setup.cost.communication.kind}{kernels}",
        f"a step is {setup.model.n_moe_layers} MoE layers like those recorded, and {rest}",
        one,
        "later traffic is like window B, and plans older than it save what the oldest ones there do",
        f"a decoding request holds {setup.context:,} tokens of cache, a prompt has as many; requests that replicas displace "
        "make no step shorter",
    ]
