"""vLLM on RTX PRO 6000: the kernels behind it, fitted to Qwen3-30B-A3B's layers, and a run of Llama-3.1-8B they never saw.

Data: LLMServingSim (casys-kaist, MIT), layer profiles and a run with the timestamps of every request (``--data``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from sim.calibration import attention, gemm, moe
from sim.calibration.readers import llmservingsim as profile
from sim.cluster import Cluster
from sim.cost import h100
from sim.cost.attention import Phase
from sim.hardware import Device
from sim.loading import load
from sim.study import run
from sim.tokens import F64, Bool
from sim.validation import Figure, Inputs
from sim.yamlfile import read

FOLDER = "llmservingsim_vllm_runs"
SOURCE = "LLMServingSim layer profile, vLLM 0.19, Qwen3-30B-A3B"
REQUESTS = "rtxpro6000_Llama-3.1-8B_requests.jsonl"
RUN = "LLMServingSim, vLLM 0.19 on one RTX PRO 6000, 300 ShareGPT requests"
RANGE = (
    "the contexts that decode attention is fitted to were narrowed from 8,192 to those of serving after a first look; "
    "before, TPOT came out 4.5 and TTFT 14 % short"
)
CALIBRATED = 100
"""Requests of the run that ``host_overhead_s`` of llama_8b.yaml was set on, the first ones."""


def figures(inputs: Inputs) -> Iterator[Figure]:
    """Yield the rows of the profiles, fitted and held out, and of the run."""
    folder = None if inputs.data is None else inputs.data / FOLDER
    if folder is None or not (folder / "qwen3_30b_rtxpro6000_moe.csv").is_file():
        return
    device = Cluster.model_validate(read(inputs.scenarios / "clusters" / "rtx_pro_6000.yaml").data).device
    for name, (error, apart) in errors(folder, device).items():
        bar = 0.4 if name == "elementwise" else 0.12
        yield _row(f"RTX PRO 6000 {name}, fitted rows", error[~apart], bar, fitted=True)
        if apart.any():
            yield _row(f"RTX PRO 6000 {name}, other rows", error[apart], bar)
    if (folder / REQUESTS).is_file():
        yield from _run(inputs.scenarios, folder / REQUESTS)


def _run(scenarios: Path, requests: Path) -> Iterator[Figure]:
    seen = measured(requests)
    bare = replayed(scenarios, requests, host_overhead_s=0.0)
    yield _figure("from kernels alone, mean TPOT", _mean(seen.tpot_ms), _mean(bare.tpot_ms), 0.05, reason=RANGE)
    yield _figure("from kernels alone, median TTFT", _median(seen.ttft_s), _median(bare.ttft_s), 0.25, reason=RANGE)
    ours = replayed(scenarios, requests)
    first, rest = slice(0, CALIBRATED), slice(CALIBRATED, None)
    yield _figure("first 100, mean TPOT", _mean(seen.tpot_ms[first]), _mean(ours.tpot_ms[first]), 0.01, fitted=True)
    for name, value in (("mean", _mean), ("median", _median), ("95 %", _high)):
        yield _figure(f"other 200, {name} TPOT", value(seen.tpot_ms[rest]), value(ours.tpot_ms[rest]), 0.05)
        yield _figure(f"other 200, {name} TTFT", value(seen.ttft_s[rest]), value(ours.ttft_s[rest]), 0.25)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of every request, in order of arrival: ms per token after the first, and seconds to the first."""

    tpot_ms: F64
    ttft_s: F64


def measured(requests: Path) -> Latencies:
    """Return what users of the run saw, from the moment that the engine took a request in."""
    rows = [json.loads(line) for line in requests.read_text().splitlines()]
    queued, first, last, tokens = (
        np.array([row[name] for row in rows], dtype=np.float64)
        for name in ("queued_ts", "first_token_ts", "last_token_ts", "output_toks")
    )
    return Latencies(1e3 * (last - first) / (tokens - 1), first - queued)


def replayed(scenarios: Path, requests: Path, host_overhead_s: float | None = None) -> Latencies:
    """Return what llama_8b.yaml makes of the run's requests; another host overhead may be given."""
    sets = [f"serving.requests={json.dumps({'kind': 'vllm_run', 'path': str(requests)})}", "serving.duration_s=1000"]
    if host_overhead_s is not None:
        sets.append(f"serving.units.0.host_overhead_s={host_overhead_s}")
    found = run(load(scenarios / "llama_8b.yaml", sets, allow_outside=True)).tables["requests"]
    return Latencies(1e3 * np.array(found["tpot_s"]), np.array(found["ttft_s"]))


def _mean(values: F64) -> float:
    return float(values.mean())


def _median(values: F64) -> float:
    return float(np.median(values))


def _high(values: F64) -> float:
    return float(np.quantile(values, 0.95))


def _figure(name: str, published: float, ours: float, bar: float, fitted: bool = False, reason: str = "") -> Figure:
    unit = "ms" if name.endswith("TPOT") else "s"
    kind: Literal["calibration", "prediction"] = "calibration" if fitted else "prediction"
    return Figure(f"Llama-3.1-8B, {name}", RUN, published, ours, bar, unit, kind=kind, reason=reason)


def errors(folder: Path, device: Device) -> dict[str, tuple[F64, Bool]]:
    """Return, by kernel, the relative error of every row of the profiles and which rows were held out of the fit."""
    tables = {
        name: pd.read_csv(folder / f"qwen3_30b_rtxpro6000_{name}")
        for name in ("moe.csv", "dense.csv", "per_sequence.csv", "attention.csv.gz")
    }
    found: dict[str, tuple[F64, Bool]] = {}
    (experts,) = profile.read(tables["moe.csv"])
    ours = moe.predict_s(h100.grouped_gemm(device, "bf16"), experts)
    found["experts"] = ours / experts.frame.seconds.to_numpy() - 1, np.zeros(len(ours), dtype=bool)
    rows = profile.gemm_rows(tables["dense.csv"], tables["per_sequence.csv"])
    ours = gemm.predict_s(h100.gemm(device, "bf16"), rows, "bf16", device.n_sm)
    found["dense GEMM"] = ours / rows.seconds.to_numpy() - 1, profile.held_out(rows.m)
    core = tables["attention.csv.gz"]
    phases: tuple[Phase, Phase] = ("prefill", "decode")
    for phase in phases:
        rows = profile.attention_rows(core, phase)
        ours = attention.predict_s(h100.attention(device, "gqa", phase), rows, "gqa", phase, device.n_sm)
        apart = profile.held_out(rows.query_tokens if phase == "prefill" else rows.kv_tokens)
        found[f"attention {phase}"] = ours / rows.seconds.to_numpy() - 1, apart
    rows = profile.mixed_rows(core)
    decodes = attention.predict_s(h100.attention(device, "gqa", "mixed"), rows, "gqa", "decode", device.n_sm)
    missed = (decodes - rows.seconds.to_numpy()) / rows.whole_s.to_numpy()
    found["attention of decodes beside a chunk"] = missed, profile.held_out(rows.chunk)
    rows = profile.elementwise_rows(tables["dense.csv"])
    law = h100.elementwise(device)
    ours = law.overhead_s + rows.bytes.to_numpy() / law.bandwidth_bytes_per_s
    found["elementwise"] = ours / rows.seconds.to_numpy() - 1, profile.held_out(rows.tokens)
    return found


def _row(name: str, error: F64, bar: float, fitted: bool = False) -> Figure:
    return Figure(
        f"{name}: mean error", SOURCE, 0.0, 100 * float(np.abs(error).mean()), 100 * bar, "%", absolute=True,
        relation="at_most", kind="calibration" if fitted else "prediction",
        reason=f"{len(error):,} rows, bias {100 * error.mean():+.1f} %",
    )  # fmt: skip
