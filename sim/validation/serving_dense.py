"""vLLM on RTX PRO 6000: the kernels behind it, fitted to Qwen3-30B-A3B's layers, and a run of Llama-3.1-8B they never saw.

Data: LLMServingSim (casys-kaist, MIT), layer profiles and a run with the timestamps of every request (``--data``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from sim.calibration import attention, gemm, moe
from sim.calibration.readers import llmservingsim as profile
from sim.cluster import Cluster
from sim.cost import h100
from sim.cost.attention import Phase
from sim.hardware import Device
from sim.tokens import F64, Bool
from sim.validation import Figure, Inputs
from sim.yamlfile import read

FOLDER = "llmservingsim_vllm_runs"
SOURCE = "LLMServingSim layer profile, vLLM 0.19, Qwen3-30B-A3B"


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
