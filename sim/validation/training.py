"""Whole training steps: DeepSeek-V3 on 2,048 H800, DeepSeek-V2 and a dense 67B model, and the bubbles of schedules.

Nothing here is fitted to these tables. Compute constants of H800 come from DeepSeek's published trace of four layers
(and, in bf16, from H100 tables), communication from DeepEP's and NCCL's tables.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sim.engine.pipeline import recurrence
from sim.loading import load
from sim.pipeline import Pipeline
from sim.plugin import make
from sim.study import run
from sim.validation import Figure, Inputs

OVERRIDES: dict[str, list[str]] = {}
"""By scenario, what tests change to make it quick; none otherwise."""
ISCA = 'arXiv 2505.09343, Table 4, MPFT ("Insights into DeepSeek-V3")'
V2 = "DeepSeek-V2 report (arXiv 2405.04434), section 3.2.3"


def figures(inputs: Inputs) -> Iterator[Figure]:
    yield from _bubbles()
    yield from _v3(inputs)
    yield from _v2(inputs)


def _bubbles() -> Iterator[Figure]:
    """Idle time of 16 stages and 64 micro-batches, in units of F = dgrad = wgrad = 10, F&B = 25."""
    f, i, w, both, stages = 10, 10, 10, 25, 16
    b = i + w
    formulas = {
        "1f1b": (stages - 1) * (f + b),
        "zb1p": (stages - 1) * (f + b - 2 * w),
        "dualpipe": (stages // 2 - 1) * (both + b - 3 * w),
    }
    spent = {"forward": f, "backward": b, "input_gradients": i, "weight_gradients": w, "overlapped": both}
    for kind, published in formulas.items():
        rule = make(Pipeline, kind)
        plan = [rule.program(rank, stages, 64) for rank in range(stages)]
        times = [np.array([spent[chunk.kind] for chunk in program], dtype=np.int64) for program in plan]
        makespan = recurrence(plan, times, 0).makespan_ps
        ours = max(makespan - int(t.sum()) for t in times)
        yield Figure(f"bubble of {kind}, PP16", "DualPipe README, table of bubbles", published, ours, 0, "units")


def _means(inputs: Inputs, name: str, policies: int) -> list[dict[str, float]]:
    """Every metric of the first policies of a shipped scenario, otherwise as it stands."""
    scenario = load(inputs.scenarios / f"{name}.yaml", OVERRIDES.get(name, []))
    some = scenario.model_copy(update={"policies": scenario.policies[:policies]})
    rows = run(some, jobs=None).summary_rows
    return [
        {
            metric: mean
            for who, metric, mean in zip(rows["policy"], rows["metric"], rows["mean"], strict=True)
            if who == policy.name
        }
        for policy in scenario.policies[:policies]
    ]


def _v3(inputs: Inputs) -> Iterator[Figure]:
    (ours,) = _means(inputs, "v3_training", 1)
    split = (
        "how Table 4 divides a rank's time is not described; DeepSeek's split of layers over stages is not published"
    )
    for name, key, published, unit, reason in (
        ("step time", "step_time_s", 19.926, "s", ""),
        ("1F", "forward_s", 1.13, "s", split),
        ("1B", "backward_s", 1.99, "s", split),
        ("1W", "weight_gradients_s", 0.48, "s", split),
        ("1F1B", "overlapped_s", 13.95, "s", ""),
        ("bubble", "bubble_s", 2.06, "s", split),
        ("optimizer", "optimizer_s", 0.29, "s", split),
    ):
        yield Figure(f"V3 training: {name}", ISCA, published, ours[key], 0.10, unit, reason=reason)
    yield Figure("V3 training: tokens per day", ISCA, 272.80, ours["tokens_per_day"] / 1e9, 0.10, "1e9", kind="derived")
    causal = ours["model_flops_per_s_per_gpu"] / 1e12
    yield Figure("V3 training: causal TFLOP/s", ISCA, 385, causal, 0.10, "1e12", kind="derived")
    model = load(inputs.scenarios / "v3_training.yaml").model
    share = model.training_flops_per_token(4096, causal=False) / model.training_flops_per_token(4096)
    yield Figure("V3 training: non-causal TFLOP/s", ISCA, 432, causal * share, 0.10, "1e12", kind="derived")
    yield Figure("V3 training: causal MFU", ISCA, 38.94, 100 * ours["mfu"], 0.10, "%", kind="derived")
    report = "DeepSeek-V3 report (arXiv 2412.19437), section 1 and Table 1"
    hours = ours["gpu_hours_per_trillion"] / 1e3
    yield Figure("V3 training: GPU hours per trillion tokens", report, 180, hours, 0.10, "1e3 h")
    usd = ours["usd_per_trillion"] * 14.8 / 1e6
    yield Figure("V3 training: pre-training of 14.8T tokens", report, 5.328, usd, 0.10, "1e6 USD", kind="derived")


def _v2(inputs: Inputs) -> Iterator[Figure]:
    (moe,), (dense,) = _means(inputs, "v2_training", 1), _means(inputs, "dense_training", 1)
    mine = [row["gpu_hours_per_trillion"] / 1e3 for row in (moe, dense)]
    yield Figure("V2 training: GPU hours per trillion tokens", V2, 172.8, mine[0], 0.15, "1e3 h")
    yield Figure("dense 67B training: GPU hours per trillion tokens", V2, 300.6, mine[1], 0.15, "1e3 h")
    saved = 100 * (1 - mine[0] / mine[1])
    yield Figure("V2 against dense 67B: GPU hours saved", V2, 42.5, saved, 0.15, "%", kind="derived")
