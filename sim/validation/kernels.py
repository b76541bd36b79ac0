"""Dense GEMM, attention and elementwise kernels beside measured ones: mean absolute errors over whole tables.

Three sorts of rows: the DeepSeek-V3 training trace that H800's constants come from; an excerpt of H100's MLA tables and
a profile of another GPU, framework and model (``--data``); and the tables of aiconfigurator-core, where it
is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from sim.calibration import attention, gemm
from sim.calibration.attention import Family
from sim.cluster import Cluster
from sim.cost import Pass, h100
from sim.cost.attention import AttentionShape, Phase
from sim.cost.calibrated import Calibrated
from sim.cost.elementwise import expert_pair_bytes, trunk_bytes
from sim.cost.table import version_order
from sim.hardware import Device, Dtype, Kernels, PeakFlops
from sim.tokens import F64
from sim.validation import Figure, Inputs
from sim.yamlfile import read

COST = Calibrated()
# Shares of the SMs that compute has in the trace (20 of 132 communicate).
TRACE_SMS = 112 / 132
TABLES = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "a100": "a100_sxm"}
FRAMEWORK = {"mla": "trtllm", "gqa prefill": "trtllm", "gqa decode": "vllm"}
# Data sheet as aiconfigurator-core 0.12.0 rtx_pro_6000_server.yaml scales it; SM count from memory.
RTX_PRO_6000 = Device(
    name="NVIDIA RTX PRO 6000",
    peak_flops_per_s=PeakFlops(bf16=467.8e12, fp8=935.6e12),
    memory_bytes=96e9,
    memory_bandwidth_bytes_per_s=1.792e12,
    n_sm=188,
    power_w=600,
    source="aiconfigurator-core 0.12.0 rtx_pro_6000_server.yaml",
)


def figures(inputs: Inputs) -> Iterator[Figure]:
    """Yield the rows of every source that is there."""
    devices = {
        name: Cluster.model_validate(read(inputs.scenarios / "clusters" / f"{name}.yaml").data).device
        for name in (*TABLES, "h800")
    }
    yield from _trace(devices["h800"])
    if inputs.data is not None:
        yield from _excerpt(inputs.data / "aiconfigurator", devices["h100"])
        yield from _rtx(inputs.data / "llmservingsim_vllm_runs")
    found = find_spec("aiconfigurator_core")
    if found is not None and found.submodule_search_locations:
        yield from _package(Path(next(iter(found.submodule_search_locations))) / "systems" / "data", devices)


def _error(
    name: str,
    source: str,
    ours: npt.ArrayLike,
    measured: npt.ArrayLike,
    bar: float,
    fitted: bool = False,
    why: str = "",
) -> Figure:
    ratio = np.asarray(ours, np.float64) / np.asarray(measured, np.float64)
    error = 100 * float(np.abs(ratio - 1).mean())
    rows = f"{ratio.size:,} rows, bias {100 * (ratio.mean() - 1):+.1f} %"
    kind: Literal["calibration", "prediction"] = "calibration" if fitted else "prediction"
    return Figure(
        f"{name}: mean error", source, 0.0, error, bar, "%", absolute=True, relation="at_most", kind=kind,
        reason=f"{rows}; {why}" if why else rows,
    )  # fmt: skip


RECOMPUTED = 54.5e6  # parameters of W_UQ, W_UK and W_UV (DeepSeek-V3 report, section 3.2.3)


def _trace(h800: Device) -> Iterator[Figure]:
    """Per MoE layer, 4,096 tokens a rank, EP64, balanced: the classes of published trace times."""
    source = "profile-data train.json"
    dense = [
        float(
            COST.gemm_s(
                h800, tokens=4096, in_features=7168, out_features=233e6 / 7168, dtype="fp8", sm_fraction=TRACE_SMS,
                part=part,
            )
        )
        for part in ("forward", "dgrad", "wgrad")
    ]  # fmt: skip
    again = float(
        COST.gemm_s(
            h800, tokens=4096, in_features=7168, out_features=RECOMPUTED / 7168, dtype="fp8", sm_fraction=TRACE_SMS
        )
    )
    passes: tuple[Pass, Pass] = ("forward", "backward")
    forward, backward = (
        float(
            COST.attention_core_s(
                h800, tokens=4096, flops_per_token=128 * 2048.5 * 320 * 2, dtype="bf16", sm_fraction=TRACE_SMS,
                direction=direction,
            )
        )
        for direction in passes
    )  # fmt: skip
    per_token = sum(
        trunk_bytes(hidden_size=7168, attention_width=81_920, direction=direction)
        + 8 * expert_pair_bytes(hidden_size=7168, moe_intermediate_size=2048, direction=direction)
        for direction in passes
    )
    rest = float(COST.elementwise_s(h800, bytes=4096 * per_token))
    for name, published, ours in (
        ("dense forward and dgrad, recomputation", 4.71, dense[0] + dense[1] + again),
        ("dense wgrad", 3.26, dense[2]),
        ("attention forward", 1.24, forward),
        ("attention backward", 4.25, backward),
        ("everything elementwise", 8.53, rest),
    ):
        yield Figure(f"H800 training, {name}", source, published, ours * 1e3, 0.02, "ms", kind="calibration")


def _attention(rows: pd.DataFrame, device: Device, family: Family, phase: Phase) -> F64:
    return attention.predict_s(h100.attention(device, family, phase), rows, family, phase, device.n_sm)


def _excerpt(folder: Path, device: Device) -> Iterator[Figure]:
    phases: tuple[tuple[Phase, str], ...] = (("prefill", "context"), ("decode", "generation"))
    for phase, name in phases:
        file = folder / f"{name}_mla_h100.parquet"
        if not file.is_file():
            continue
        table, source = pd.read_parquet(file), f"TensorRT-LLM 1.3.0rc20, {file.stem}"
        rows = attention.attention_rows(table, "mla", phase)
        ours, measured, apart = (
            _attention(rows, device, "mla", phase),
            rows.seconds.to_numpy(),
            attention.held_out(rows),
        )
        yield _error(f"H100 MLA {phase}, fitted shapes", source, ours[~apart], measured[~apart], 11, fitted=True)
        yield _error(f"H100 MLA {phase}, other shapes", source, ours[apart], measured[apart], 11)
        rows = attention.attention_rows(table, "mla", phase, "fp8")
        yield _error(
            f"H100 MLA {phase}, fp8 cache", source, _attention(rows, device, "mla", phase), rows.seconds, 15,
            why="fitted to bf16 caches; the law's prefill does not read the cache",
        )  # fmt: skip


def _rtx(folder: Path) -> Iterator[Figure]:
    """Qwen3-30B-A3B on an RTX PRO 6000, a GPU, framework and kernels that no constant has seen."""
    if not (folder / "qwen3_30b_rtxpro6000_dense.csv").is_file():
        return
    source, device = "LLMServingSim profile, vLLM", RTX_PRO_6000
    dense = pd.read_csv(folder / "qwen3_30b_rtxpro6000_dense.csv")
    head = pd.read_csv(folder / "qwen3_30b_rtxpro6000_per_sequence.csv").rename(columns={"sequences": "tokens"})
    for layer, width, out, rows, bar in (
        ("qkv_proj", 2048, 5120, dense, 20),
        ("o_proj", 4096, 2048, dense, 20),
        ("lm_head", 2048, 151_936, head, 20),
    ):
        rows = rows[rows.layer == layer]
        ours = COST.gemm_s(device, tokens=rows.tokens, in_features=width, out_features=out, dtype="bf16")
        why = "small products here run from the 128 MB L2 cache" if layer == "o_proj" else ""
        yield _error(f"RTX PRO 6000 {layer}, by spec ratio", source, ours, rows.time_us / 1e6, bar, why=why)
    norm = dense[dense.layer == "final_layernorm"]
    yield _error(
        "RTX PRO 6000 final_layernorm, by spec ratio", source,
        COST.elementwise_s(device, bytes=norm.tokens * 2048 * 8.0, kernels=1), norm.time_us / 1e6, 20,
        why="up to 1,000 tokens its data stay in the 128 MB L2 cache",
    )  # fmt: skip
    core = pd.read_csv(folder / "qwen3_30b_rtxpro6000_attention.csv.gz")
    shape = AttentionShape("gqa", 32, 4, 128, 128, 1024)
    decode = core[core.prefill_chunk == 0]
    place = np.arange(int(decode.n_decode.max()))
    there = (place < decode.n_decode.to_numpy()[:, None]).astype(np.float64)
    ours = COST.attention_s(
        device, shape=shape, phase="decode", query_tokens=there, kv_tokens=there * decode.kv_decode.to_numpy()[:, None]
    )
    yield _error("RTX PRO 6000 attention decode, by spec ratio", source, ours, decode.time_us / 1e6, 20)
    prefill = core[core.n_decode == 0]
    new = prefill.prefill_chunk.to_numpy()[:, None]
    ours = COST.attention_s(
        device, shape=shape, phase="prefill", query_tokens=new, kv_tokens=new + prefill.kv_prefill.to_numpy()[:, None]
    )
    yield _error(
        "RTX PRO 6000 attention prefill in chunks, by spec ratio", source, ours, prefill.time_us / 1e6, 20,
        why="small chunks on short contexts end before the H100 kernel's overhead of 14 us; above 1,024 tokens 18 %",
    )  # fmt: skip


def _newest(folder: Path, table: str) -> pd.DataFrame | None:
    files = sorted(folder.glob(f"*/{table}_perf.parquet"), key=lambda file: version_order(file.parent.name))
    return pd.read_parquet(files[-1]) if files else None


def _package(root: Path, devices: dict[str, Device]) -> Iterator[Figure]:
    """Every table that the constants were fitted to, and those that H100's constants are carried to."""
    formats: tuple[tuple[Dtype, float, float], ...] = (("bf16", 11, 15), ("fp8", 12, 15), ("fp4", 12, 15))
    cores: tuple[tuple[Family, Phase, str, str, float], ...] = (
        ("mla", "prefill", "mla", "context_mla", 11),
        ("mla", "decode", "mla", "generation_mla", 11),
        ("gqa", "prefill", "attention", "context_attention", 11),
        ("gqa", "decode", "attention", "generation_attention", 12),
    )
    for name, gpu in TABLES.items():
        device = devices[name]
        sheet = device.model_copy(update={"kernels": Kernels()})
        table = _newest(root / gpu / "gemm" / "sglang", "gemm")
        for dtype, bar, far in formats:
            if table is None or getattr(device.peak_flops_per_s, dtype) is None:
                continue
            try:
                rows = gemm.gemm_rows(table, dtype)
            except ValueError:
                continue
            apart, label = gemm.held_out(rows), f"{name.upper()} dense GEMM {dtype}"
            for made, says in ((device, ""), (sheet, ", by spec ratio")):
                fit = h100.gemm(made, dtype)
                ours, seen = gemm.predict_s(fit, rows, dtype, device.n_sm), rows.seconds.to_numpy()
                if not says and fit.source != h100.TRANSFERRED:
                    yield _error(f"{label}, fitted shapes", "SGLang", ours[~apart], seen[~apart], bar, fitted=True)
                    yield _error(f"{label}, other shapes", "SGLang", ours[apart], seen[apart], bar)
                elif says and fit.source == h100.TRANSFERRED:
                    yield _error(f"{label}{says}", "SGLang", ours, seen, far)
        for family, phase, kernel, file, bar in cores:
            framework = FRAMEWORK.get(family) or FRAMEWORK[f"{family} {phase}"]
            table = _newest(root / gpu / kernel / framework, file)
            if table is None:
                continue
            rows = attention.attention_rows(table, family, phase)
            apart, label = attention.held_out(rows), f"{name.upper()} {family} {phase}"
            for made in (device, sheet):
                fit_at = h100.attention(made, family, phase)
                ours, seen = _attention(rows, made, family, phase), rows.seconds.to_numpy()
                if made is device and fit_at.source != h100.TRANSFERRED:
                    yield _error(f"{label}, fitted shapes", framework, ours[~apart], seen[~apart], bar, fitted=True)
                    yield _error(f"{label}, other shapes", framework, ours[apart], seen[apart], bar)
                elif made is sheet and fit_at.source == h100.TRANSFERRED:
                    yield _error(f"{label}, by spec ratio", framework, ours, seen, 15)
