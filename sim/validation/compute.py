"""Grouped GEMM beside measured kernels: what is fitted, what is left out of the fit, and GPUs reached by spec sheet.

Recorded tables (``--data``) are excerpts, of four shapes on H100 and B200; where aiconfigurator-core is installed, its
whole tables of further GPUs are read too. Skewed rows: one random draw stands behind each measured time, ours is the
mean over four draws of the published sampler; about 10 % of such a row is chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from sim.calibration import moe, readers
from sim.calibration.moe import Rows
from sim.calibration.readers import aiconfigurator
from sim.calibration.report import for_table
from sim.cluster import Cluster
from sim.cost import h100
from sim.cost.calibrated import Calibrated
from sim.cost.table import Table
from sim.hardware import Device, Kernels, PeakFlops
from sim.tokens import F64
from sim.validation import Figure, Inputs
from sim.yamlfile import read

V3 = "7168x2048 E256 k8"
PACKAGE = "aiconfigurator-core 0.12.0"
EPS = (1, 2, 8, 16, 32, 64)
LARGE_TILES = "at 8-24 tokens per expert on average the kernel's tile is too small for the hot ones"
WIDE = "TensorRT-LLM 1.3.0rc10, the constants are of rc20; below 16 tokens ours take half as long; ties of its draws are not recorded"
OVERHEAD = "one token ends in 13 us, before the overhead of H100's cutlass kernels (29 us) or of the trace's (33 us)"
FEW_SHAPES = (
    "at EP 256 most rows have a token per expert or none; of the package's 17 shapes, not four, the error is 9 %"
)
BF16 = "bf16 kernels scatter about the law on H100 too, whose rows are fitted to: 11 %; H200's own constants 12 %"
CHOSEN = "that GPUs with fp4 take H100's bf16 constants was chosen on rows of these three GPUs"
OTHER_KERNEL = "triton, not cutlass: a spec sheet does not tell which kernel a GPU gets"


# aiconfigurator-core 0.12.0 b300_sxm.yaml: no cluster file, no constants of its own; SMs as B200.
B300 = Device(
    name="NVIDIA B300 SXM",
    peak_flops_per_s=PeakFlops(bf16=2250e12, fp8=4500e12, fp4=14_000e12),
    memory_bytes=288_400_343_040,
    memory_bandwidth_bytes_per_s=7.75e12,
    n_sm=148,
    power_w=1100,
    source="aiconfigurator-core 0.12.0 b300_sxm.yaml",
)


def figures(inputs: Inputs) -> Iterator[Figure]:
    """Yield the rows of every table that is there."""

    def device(name: str) -> Device:
        return Cluster.model_validate(read(inputs.scenarios / "clusters" / f"{name}.yaml").data).device

    if inputs.data is not None:
        yield from _recorded(inputs.data, device)
    try:
        root = Table().root()
    except ValueError:
        return
    yield from _package(root, device)


def _recorded(data: Path, device: Callable[[str], Device]) -> Iterator[Figure]:
    """Excerpts beside the project."""
    tables, misc = data / "aiconfigurator", data / "kernel_tables_misc"
    h100_table, b200_table = tables / "moe_h100_sxm_trtllm.parquet", tables / "moe_b200_sxm_trtllm.parquet"
    a100_table, rtx = tables / "moe_a100_sxm_sglang.parquet", data / "llmservingsim_vllm_runs"
    wide = tables / "wideep_moe_h100_powerlaw1.01.parquet"
    if h100_table.is_file():
        yield from _h100(_rows(h100_table), device("h100"))
    if wide.is_file():
        table = pd.read_parquet(wide)
        (rows,) = aiconfigurator.read(table[table.op_name == "wideep_moe"])
        assert rows.uneven is not None
        yield _error("H100 fp8, wide EP, power law 1.01, hottest rank", f"{PACKAGE} {wide.stem}", rows.uneven, device("h100"), 0.2, reason=WIDE)  # fmt: skip
    if b200_table.is_file():
        yield from _b200(_rows(b200_table), device("b200"))
    if a100_table.is_file():
        yield from _a100(_rows(a100_table), device("a100"))
    if (rtx / "qwen3_30b_rtxpro6000_moe.csv").is_file():
        sheet = device("rtx_pro_6000").model_copy(update={"kernels": Kernels()})
        yield from _active(pd.read_csv(rtx / "qwen3_30b_rtxpro6000_moe.csv"), sheet)
    for name, bar in (("decode", 0.2), ("prefill", 0.1)):
        path = misc / f"infersim_grouped_gemm_{name}_h20.csv"
        if path.is_file():
            (rows,) = readers.read(str(path))[1]
            yield _error(
                f"H20, InferSim {name}, 8 shapes",
                "InferSim bench_data/grouped_gemm",
                rows,
                device("h20"),
                bar,
                "calibration",
            )
    path = misc / "aiter_a8w8_blockscale_tuned_fmoe_ds_v3.csv"
    if path.is_file():
        gpu = device("mi300x")
        rows = next(r for r in readers.read(str(path))[1] if r.n_sm == gpu.n_sm and r.dtype == "fp8")
        yield _error("MI300X, aiter, 15 token counts", "ROCm/aiter tuned_fmoe_ds_v3", rows, gpu, 0.1, "calibration")
        yield _error("MI300X, aiter, by spec sheet from H100", "ROCm/aiter tuned_fmoe_ds_v3", rows, gpu, 0.2, spec=True)
    path = data / "frontier_moe_profiles" / "a800_qwen3_30b_a3b_ep1-2.csv.gz"
    if path.is_file():
        (rows,) = readers.read(str(path))[1]
        source = "Frontier profiling, Qwen3-30B-A3B, recorded routing"
        yield _error("A800, vLLM fused bf16", source, rows, device("a800"), 0.1, "calibration")
        yield _error("A800 with A100's constants", source, rows, device("a100"), 0.2)
    path = data / "frontier_moe_profiles" / "h800_qwen3_next_80b_kernel_only.csv.gz"
    if path.is_file():
        (rows,) = readers.read(str(path))[1]
        source, gpu = "Frontier profiling, Qwen3-Next-80B, vLLM fused bf16, kernel time", device("h800")
        more = rows.part((rows.frame.num_tokens > 1).to_numpy())
        yield _error("H800, Qwen3-Next, 1-64 tokens", source, rows, gpu, 0.2, reason=OVERHEAD)
        yield _error("H800, Qwen3-Next, 1-64 tokens, by spec sheet", source, rows, gpu, 0.2, spec=True, reason=OVERHEAD)
        yield _error("H800, Qwen3-Next, 2-64 tokens", source, more, gpu, 0.2)
        yield _error("H800, Qwen3-Next, 2-64 tokens, by spec sheet", source, more, gpu, 0.2, spec=True)


def _rows(path: Path) -> dict[str, Rows]:
    return {rows.kernel: rows for rows in readers.read(str(path))[1]}


def _error(
    name: str, source: str, rows: Rows, device: Device, bar: float, kind: str = "prediction", *, spec: bool = False,
    reason: str = "",
) -> Figure:  # fmt: skip
    """A row that holds a mean absolute error, in %, against its bar."""
    constants = for_table(h100.grouped_gemm(device, rows.dtype, measured=not spec), rows)
    return _bounded(name, source, moe.mape(constants, rows), bar, kind, reason)


def _bounded(name: str, source: str, error: float, bar: float, kind: str = "prediction", reason: str = "") -> Figure:
    return Figure(
        f"grouped GEMM, mean error: {name}", source, 0.0, 100 * error, 100 * bar, "%", absolute=True, relation="at_most",
        kind="calibration" if kind == "calibration" else "prediction", reason=reason,
    )  # fmt: skip


def _shape(rows: Rows, shape: str = V3) -> Rows:
    return rows.part(np.array(rows.shapes) == shape)


def _h100(kernels: dict[str, Rows], device: Device) -> Iterator[Figure]:
    rows = kernels["moe_torch_flow_cutlass fp8_block"]
    source = f"{PACKAGE} moe_h100_sxm_trtllm, cutlass fp8_block"
    yield _error("H100 fp8, all shapes", source, rows, device, 0.08, "calibration")
    yield _error("H100 bf16, all shapes", f"{PACKAGE} moe_h100_sxm_trtllm, cutlass bfloat16", kernels["moe_torch_flow_cutlass bfloat16"], device, 0.12, "calibration")  # fmt: skip
    yield from _without_ep(rows, device, source, FEW_SHAPES)
    apart = moe.leave_one_out(rows, device, rows.shapes)
    yield _bounded("H100 fp8, leave one shape out", source, float(np.mean(list(apart.values()))), 0.1)
    assert rows.narrow is not None and rows.uneven is not None
    yield _error("H100 fp8, tensor-parallel rows", source, rows.narrow, device, 0.15)
    bf16 = kernels["moe_torch_flow_cutlass bfloat16"]
    assert bf16.uneven is not None
    yield _error("H100 bf16, power laws 1.01 and 1.2, hottest rank", f"{PACKAGE} moe_h100_sxm_trtllm, cutlass bfloat16", bf16.uneven, device, 0.2)  # fmt: skip
    yield from _skewed("H100", source, rows, device, (1.27, 1.28, 1.61, 1.64, 2.06, 2.44))


def _without_ep(rows: Rows, device: Device, source: str, reason: str = "") -> Iterator[Figure]:
    """One fit of all shapes, as the shipped constants are, to all EP degrees but one; DeepSeek-V3's rows of that one."""
    left = moe.leave_one_out(rows, device, [str(ep) for ep in rows.frame.ep_size], np.array(rows.shapes) == V3)
    worst, shapes = max(left, key=lambda ep: left[ep]), len(set(rows.shapes))
    name = f"H100 fp8, {shapes} shapes, leave one EP out, DeepSeek-V3"
    yield _bounded(name, source, float(np.mean(list(left.values()))), 0.06)
    yield _bounded(f"the same, worst EP ({worst})", source, left[worst], 0.1, reason=reason)


def _package(root: Path, device: Callable[[str], Device]) -> Iterator[Figure]:
    """Whole tables: H100's for the fit, the others for constants carried to their GPUs by spec sheet."""
    fp8, bf16 = ("deepgemm", "fp8_block"), ("moe_torch_flow_cutlass", "bfloat16")
    hopper = ("moe_torch_flow_cutlass", "fp8_block")
    for name, folder, gpu, kernels in (
        ("H100", "h100_sxm", device("h100"), (hopper,)),
        ("H200", "h200_sxm", device("h200"), (hopper, bf16)),
        ("B200", "b200_sxm", device("b200"), (fp8, bf16)),
        ("GB200", "gb200", device("gb200_nvl72"), (fp8, bf16)),
        ("B300", "b300_sxm", B300, (fp8,)),
    ):
        path = root / folder / "moe" / "trtllm" / "1.3.0rc20" / "moe_perf.parquet"
        if not path.is_file():
            continue
        table = pd.read_parquet(path)
        for kernel, number in kernels:
            chosen = table[(table.kernel_source == kernel) & (table.moe_dtype == number)]
            if chosen.empty:
                continue
            (rows,) = aiconfigurator.read(chosen)
            source = f"{PACKAGE} {folder} trtllm 1.3.0rc20, {kernel} {number}"
            if name == "H100":
                yield from _without_ep(rows, gpu, source)
                continue
            # H200 differs from H100 in its memory alone.
            bar, label = 0.08 if name == "H200" else 0.2, f"{name} {rows.dtype}"
            reason = (
                (BF16 if rows.dtype == "bf16" else "") if name == "H200" else (CHOSEN if rows.dtype == "fp8" else "")
            )
            shapes = len(set(rows.shapes))
            yield _error(f"{label}, {shapes} shapes, by spec sheet from H100", source, rows, gpu, bar, spec=True, reason=reason)  # fmt: skip
            if rows.dtype == "fp8" and rows.uneven is not None:
                yield _error(
                    f"{label}, DeepSeek-V3, by spec sheet from H100",
                    source,
                    _shape(rows),
                    gpu,
                    bar,
                    spec=True,
                    reason=reason,
                )
                yield _error(f"{label}, power laws, hottest rank, by spec sheet from H100", source, rows.uneven, gpu, 0.2, spec=True, reason=reason)  # fmt: skip


def _b200(kernels: dict[str, Rows], device: Device) -> Iterator[Figure]:
    rows = kernels["deepgemm fp8_block"]
    source = f"{PACKAGE} moe_b200_sxm_trtllm, deepgemm fp8_block"
    yield _error("B200 fp8, DeepSeek-V3", source, _shape(rows), device, 0.08, "calibration")
    yield _error(
        "B200 fp8, DeepSeek-V3, by spec sheet from H100", source, _shape(rows), device, 0.2, spec=True, reason=CHOSEN
    )
    fp4 = kernels["moe_torch_flow_cutlass nvfp4"]
    more = f"{PACKAGE} moe_b200_sxm_trtllm, cutlass nvfp4"
    yield _error("B200 fp4, DeepSeek-V3", more, _shape(fp4), device, 0.2, "calibration")
    yield _error("B200 fp4, by spec sheet from H100's fp8", more, _shape(fp4), device, 0.2, spec=True, reason="H100 has no fp4: the kernel is another")  # fmt: skip
    yield from _skewed("B200", source, rows, device, (1.17, 1.18, 1.33, 1.45, 1.52, 1.68))


def _a100(kernels: dict[str, Rows], device: Device) -> Iterator[Figure]:
    rows = kernels["sglang_fused_moe_triton bfloat16"]
    source = f"{PACKAGE} moe_a100_sxm_sglang, triton bfloat16, EP 1"
    yield _error("A100 bf16", source, rows, device, 0.15, "calibration")
    yield _error("A100 bf16, by spec sheet from H100", source, rows, device, 0.2, spec=True, reason=OTHER_KERNEL)


def _skewed(gpu: str, source: str, rows: Rows, device: Device, published: tuple[float, ...]) -> Iterator[Figure]:
    """Rows of hot experts, DeepSeek-V3 shape: their error, and their time over that of balanced rows."""
    assert rows.uneven is not None
    uneven, even, constants = _shape(rows.uneven), _shape(rows), h100.grouped_gemm(device, rows.dtype)
    for alpha in ("1.01", "1.2"):
        part = uneven.part((uneven.frame.distribution == f"power_law_{alpha}").to_numpy())
        yield _error(f"{gpu}, power law {alpha}, hottest rank", source, part, device, 0.2)
    ratio = {}
    for ours, table in ((False, "measured"), (True, "ours")):
        seconds = []
        for part in (even, uneven.part((uneven.frame.distribution == "power_law_1.01").to_numpy())):
            values = moe.predict_s(constants, part) if ours else part.frame.seconds.to_numpy()
            index = pd.MultiIndex.from_frame(part.frame[["num_tokens", "ep_size"]])
            seconds.append(pd.Series(values, index=index))
        ratio[table] = seconds[1] / seconds[0]
    for ep, value in zip(EPS, published, strict=True):
        ours_ratio = float(ratio["ours"][4096, ep])
        yield Figure(f"{gpu}, 4,096 tokens, EP{ep}: power law over balanced", source, value, ours_ratio, 0.2)
    decode = [float(np.mean([ratio[table][256, ep] for ep in EPS])) for table in ("measured", "ours")]
    yield Figure(f"{gpu}, 256 tokens, mean over EP: power law over balanced", source, decode[0], decode[1], 0.2, reason=LARGE_TILES)  # fmt: skip
    highest = max(float(ratio["ours"][256, ep]) for ep in EPS)
    yield Figure(f"{gpu}, 256 tokens, any EP: skew costs at most", source, 1.13, highest, 0.05, relation="at_most")


def _active(table: pd.DataFrame, device: Device) -> Iterator[Figure]:
    rows = table[table.tokens == 64].sort_values("activated_experts")
    experts = rows.activated_experts.to_numpy()
    place = np.arange(int(experts.max()))
    each: F64 = np.where(place < experts[:, None], 512 / experts[:, None], 0.0)
    seconds = Calibrated().grouped_gemm_s(
        device, expert_tokens=each, ep_tokens=64, hidden_size=2048, moe_intermediate_size=768, dtype="bf16"
    )
    for count, measured, ours in zip(experts, rows.time_us, seconds, strict=True):
        yield Figure(
            f"Qwen3-30B, 64 tokens on {count} experts, by spec sheet", "LLMServingSim vLLM runs, RTX PRO 6000",
            float(measured), float(ours) * 1e6, 0.2, "us",
            reason="vLLM's launch overhead, not TensorRT-LLM's" if count == 8 else "",
        )  # fmt: skip
