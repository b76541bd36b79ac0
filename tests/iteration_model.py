"""A toy scenario, units and work for tests of iteration times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sim.deployment import Unit
from sim.engine.iteration import Work
from sim.loading import load
from sim.scenario import Scenario
from sim.tokens import I64

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"


def tiny(*more: str) -> Scenario:
    return load(SCENARIOS / "tiny.yaml", ["schedule={phase: forward}", "steps.warmup.steps=4", *more])


def work_of(
    tokens: I64, context: int = 2000, *, prompts: I64 | None = None, length: int = 512, topics: int = 3
) -> Work:
    prompts = np.zeros_like(tokens) if prompts is None else prompts
    total = int(tokens.sum() + prompts.sum() * length)
    return Work(
        decode_requests=tokens,
        decode_tokens=tokens,
        decode_kv_tokens=tokens * context,
        prefill_requests=prompts,
        prefill_tokens=prompts * length,
        prefill_pairs=prompts * length * (length + 1) / 2,
        longest=np.full(len(tokens), context),
        sampled=tokens + prompts,
        topic_tokens=np.array([total - 2 * (total // 3), total // 3, total // 3][:topics]),
    )


def unit_of(**fields: Any) -> Unit:
    return Unit.model_validate({"name": "u", "parallel": {"ep_size": 8}} | fields)
