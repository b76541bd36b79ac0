"""FLOPs, bytes and seconds of the matrix work that a run's cost laws are asked about, operation by operation.

Nothing is derived here: the engine's own classes put the questions, and `Counted` listens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics import points
from sim.cost import ComputeCost
from sim.cost.attention import attention_shape, attention_work
from sim.cost.roofline import expert_work, gemm_work
from sim.deployment import Unit
from sim.engine.durations import Durations
from sim.engine.serving_durations import TrunkTimes
from sim.hardware import Device
from sim.model import Model
from sim.pipeline.blocks import model_blocks
from sim.results import Result
from sim.settings import Policy
from sim.tokens import F64

COLUMNS = ["operation", "where", "policy", "load", "dtype", "flops", "bytes", "seconds"]


@dataclass
class Counted:
    """Stands in for a `ComputeCost` and notes what it is asked: (kind, FLOPs, bytes, seconds, number format).

    Products are timed without the quantisation of their input, which is no matrix work.
    """

    inner: ComputeCost
    model: Model
    sequence_length: int = 1
    found: list[tuple[str, float, float, float, str]] = field(default_factory=list)

    def _note(self, kind: str, work: tuple[F64, F64], seconds: F64, dtype: str) -> F64:
        flops, moved = work
        self.found.append((kind, float(np.sum(flops)), float(np.sum(moved)), float(np.sum(seconds)), dtype))
        return seconds

    def gemm_s(self, device: Device, **asked: Any) -> F64:
        asked |= {"quantise": False, "part": asked.get("part", "forward")}
        work = gemm_work(*(asked[key] for key in ("tokens", "in_features", "out_features", "dtype", "part")))
        return self._note("products", work, self.inner.gemm_s(device, **asked), asked["dtype"])

    def attention_core_s(self, device: Device, **asked: Any) -> F64:
        """The law of training knows FLOPs alone; the bytes are those of a prompt of as many positions."""
        flops = np.asarray(asked["tokens"] * asked["flops_per_token"], dtype=np.float64)
        shape, length = attention_shape(self.model, "prefill"), [self.sequence_length]
        alone, moved = attention_work(shape, "prefill", length, length)
        return self._note("core", (flops, flops * moved / alone), self.inner.attention_core_s(device, **asked), "bf16")

    def attention_s(self, device: Device, **asked: Any) -> F64:
        keys = ("shape", "phase", "query_tokens", "kv_tokens")
        more = {key: asked[key] for key in ("cache_bytes_per_element", "window") if key in asked}
        work = attention_work(*(asked[key] for key in keys), **more)
        return self._note("core", work, self.inner.attention_s(device, **asked), "bf16")

    def grouped_gemm_s(self, device: Device, **asked: Any) -> F64:
        keys = ("expert_tokens", "hidden_size", "moe_intermediate_size", "dtype", "part")
        work = expert_work(*(asked[key] for key in keys))
        return self._note("experts", work, self.inner.grouped_gemm_s(device, **asked), asked["dtype"])

    def elementwise_s(self, device: Device, **asked: Any) -> F64:
        return self.inner.elementwise_s(device, **asked)


def operations(result: Result) -> pd.DataFrame:
    """Return the matrix work of one forward pass (of one iteration of each serving unit): a row per operation, place and
    policy, with its FLOPs, HBM bytes and seconds by the run's cost law, alone on the device.

    load: ``mean``, or ``busiest`` for the experts of the most loaded rank, whose experts are all taken to have its imbalance
    (mean over layers and steps). Loads within a rank are as even as whole tokens can be.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    for indices, scenario in result.scenario.arenas():  # a policy may have a cluster or split of its own
        part = replace(result, scenario=scenario)
        for index, policy in zip(indices, scenario.policies, strict=True):
            found[index] = _served(part, policy) if scenario.serving else _stepped(part, policy)
    return pd.DataFrame([row for index in sorted(found) for row in found[index]], columns=COLUMNS)


def _stepped(result: Result, policy: Policy) -> list[dict[str, Any]]:
    scenario, model = result.scenario, result.scenario.model_of(policy)
    schedule = scenario.schedule
    counted = Counted(scenario.cost.compute, model, schedule.sequence_length)
    watched = scenario.model_copy(update={"cost": scenario.cost.model_copy(update={"compute": counted})})
    nowhere: Any = None  # transfers are not asked for
    durations = Durations(watched, policy, nowhere, overlapped=False)
    blocks = {block.kind: block for block in reversed(model_blocks(model, mtp=False))}
    rows = []
    for kind, phase, name in (
        ("moe", "attention", "projections"),
        ("dense", "attention", "projections"),
        ("moe", "shared_experts", "shared experts"),
        ("dense", "dense_ffn", "dense FFN"),
        ("head", "head", "output head"),
    ):
        if kind in blocks and not (kind == "dense" and phase == "attention" and "moe" in blocks):
            counted.found.clear()
            durations.even_ps(blocks[kind], phase, "forward")
            names = {"products": name, "core": "attention"}
            rows += _rows(counted, names, "", policy.name)
    if model.is_moe:
        table = points(result, ["device_max_over_mean"]).table.set_index("policy")
        busiest = float(table.device_max_over_mean[policy.name])
        rows += _experts(result, policy, counted, durations.tokens, "", busiest, scenario.slots(policy).slots_per_rank)
    return rows


def _served(result: Result, policy: Policy) -> list[dict[str, Any]]:
    serving, units, requests = result.scenario.serving, result.units, result.requests
    assert serving is not None
    mine = requests[(requests.policy == policy.name) & ~requests.refused.astype(bool)]
    rows: list[dict[str, Any]] = []
    for unit in serving.units:
        found = units[(units.policy == policy.name) & (units.unit == unit.name)].mean(numeric_only=True)
        if found.iteration_s > 0 and found.utilisation > 0 and len(mine):
            prompt = float(mine.input_tokens.mean())
            context = prompt + float(mine.output_tokens.mean()) / 2
            rows += _iteration(result, policy, unit, found, prompt, context)
    return rows


def _iteration(
    result: Result, policy: Policy, unit: Unit, found: pd.Series[float], prompt: float, context: float
) -> list[dict[str, Any]]:
    """Return the rows of a mean iteration of ``unit``, whose mean rates are ``found``: decodes of ``context`` tokens beside
    prompts of ``prompt`` tokens; half of it where two halves overlap."""
    scenario, tp = result.scenario, unit.parallel.tp_size
    model, device = scenario.model_of(policy), scenario.cluster.device
    counted = Counted(scenario.cost.compute, model)
    law: Any = counted
    trunk = TrunkTimes(
        model,
        device,
        law,
        dtype=scenario.cost.gemm_dtype,
        tp_size=tp,
        sm_fraction=1.0,
        cache_bytes_per_element=unit.kv_cache_bytes_per_element,
        choice_s=0.0,
    )
    busy_s = found.iteration_s / found.utilisation
    decodes = float(np.rint(found.decoding_per_rank / found.utilisation / unit.micro_batches))
    prompts = float(np.rint(found.prompt_tokens_per_s_per_gpu * tp * busy_s / unit.micro_batches))
    new = 1 + unit.speculative_tokens
    tokens = max(1.0, decodes * new + prompts)
    attention: dict[str, Any] = {
        "cache_bytes_per_element": unit.kv_cache_bytes_per_element,
        "window": model.index_topk,
    }
    rows: list[dict[str, Any]] = []

    def note(name: str) -> None:
        rows.extend(_rows(counted, {"products": name, "core": name}, unit.name, policy.name))
        counted.found.clear()

    if decodes:
        each: dict[str, Any] = {
            "query_tokens": np.full(int(decodes), new),
            "kv_tokens": np.full(int(decodes), context),
        }
        counted.attention_s(device, shape=trunk.decode_shape, phase="decode", **each, **attention)
        note("decode attention")
    if prompts:
        one: dict[str, Any] = {"query_tokens": [min(prompts, prompt)], "kv_tokens": [prompt]}
        counted.attention_s(device, shape=trunk.prefill_shape, phase="prefill", **one, **attention)
        note("prefill attention")
    for name, part in (
        ("projections", trunk.before),
        ("shared experts", trunk.shared),
        ("dense FFN", trunk.dense),
        ("output head", trunk.head),
    ):
        part.law(np.array([tokens]))
        note(name)
    if model.is_moe:
        slots = scenario.slots(policy, unit.parallel).slots_per_rank
        rows += _experts(result, policy, counted, tokens / tp, unit.name, float(found.imbalance_mean), slots)
    return rows


def _experts(
    result: Result, policy: Policy, counted: Counted, tokens: float, where: str, busiest: float, slots: int
) -> list[dict[str, Any]]:
    """Return the rows of a rank's experts, ``tokens`` of each rank of the group being in flight."""
    model, cost = counted.model, result.scenario.cost
    rows = []
    for load, factor in (("mean", 1.0), ("busiest", busiest)):
        pairs = tokens * model.num_experts_per_tok * factor
        if np.isfinite(pairs) and pairs > 0:
            counted.found.clear()
            counted.grouped_gemm_s(
                result.scenario.cluster.device,
                expert_tokens=np.diff(np.floor(np.linspace(0, pairs, slots + 1) + 1e-9)),
                ep_tokens=pairs,
                hidden_size=model.dispatch_hidden_size,
                moe_intermediate_size=model.moe_intermediate_size or 0,
                dtype=cost.gemm_dtype,
                part="forward",
                products_only=True,
            )
            rows += _rows(counted, {"experts": "experts"}, where, policy.name, load)
    return rows


def _rows(counted: Counted, names: dict[str, str], where: str, policy: str, load: str = "mean") -> list[dict[str, Any]]:
    """Return what was counted, kernels of one operation and number format together."""
    sums: dict[tuple[str, str], list[float]] = {}
    for kind, *figures, dtype in counted.found:
        total = sums.setdefault((names[kind], dtype), [0.0, 0.0, 0.0])
        for i, value in enumerate(figures):
            total[i] += value
    return [
        dict(zip(COLUMNS, (name, where, policy, load, dtype, *total), strict=True))
        for (name, dtype), total in sums.items()
        if total[0] > 0
    ]
