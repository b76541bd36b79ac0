"""Dense GEMM, attention and elementwise kernels: closed forms, scaling laws, measured tables and the fits to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.calibrate import main
from sim.calibration import attention as attention_fit
from sim.calibration import gemm as gemm_fit
from sim.calibration.loads import balanced
from sim.cluster import Cluster
from sim.cost import ComputeCost, Part, dense_gemm, h100
from sim.cost.attention import AttentionShape, attended_positions, attention_s, attention_shape, attention_work
from sim.cost.calibrated import Calibrated
from sim.cost.elementwise import CROSSINGS, expert_pair_bytes, gate_s, norm_s, permute_s, swiglu_s, trunk_bytes
from sim.cost.roofline import Roofline
from sim.hardware import AttentionKernel, Device, Kernels
from sim.model import Model
from sim.yamlfile import read

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
COST = Calibrated()
PARTS: tuple[Part, ...] = ("forward", "dgrad", "wgrad")


def device(name: str) -> Device:
    return Cluster.model_validate(read(SCENARIOS / "clusters" / f"{name}.yaml").data).device


H100 = device("h100")
V3_DECODE = AttentionShape("mla", 128, 1, 576, 512, 576)
V3_PREFILL = AttentionShape("mla", 128, 128, 192, 128, 576)
LLAMA = AttentionShape("gqa", 32, 8, 128, 128, 2048)
sizes = st.integers(1, 20_000)


# Dense GEMM -----------------------------------------------------------------------------------------------------------


@given(tokens=sizes, in_features=sizes, out_features=sizes, part=st.sampled_from(PARTS))
def test_no_product_beats_the_data_sheet(tokens: int, in_features: int, out_features: int, part: Part) -> None:
    work = {"tokens": tokens, "in_features": in_features, "out_features": out_features, "dtype": "fp8", "part": part}
    for name in ("h100", "b200", "h800"):
        assert COST.gemm_s(device(name), **work) >= Roofline().gemm_s(device(name), **work)


@given(tokens=sizes, more=sizes, in_features=sizes, out_features=sizes, share=st.floats(0.1, 1.0))
def test_more_work_or_fewer_sms_never_take_less(
    tokens: int, more: int, in_features: int, out_features: int, share: float
) -> None:
    work = {"in_features": in_features, "out_features": out_features, "dtype": "bf16"}
    few, many = COST.gemm_s(H100, tokens=[tokens, tokens + more], **work)
    # A larger tile can be the quicker one, hence the rounding of a tile's prologue.
    assert few <= many * (1 + 1e-12)
    assert COST.gemm_s(H100, tokens=tokens, sm_fraction=share, **work) >= few * (1 - 1e-12)


def test_a_wave_costs_as_much_as_a_full_one() -> None:
    """132 tiles of 128 x 256 fill H100 once; one token more starts another round of some tile."""
    fit = h100.GEMM_BF16.model_copy(update={"overhead_s": 0.0, "tile_overhead_s": 0.0, "bandwidth_bytes_per_s": 1e18})
    shape = {"n_sm": 132, "sm_fraction": 1.0, "in_features": 4096, "out_features": 256 * 12, "dtype": "bf16"}
    full, over = dense_gemm.gemm_s(fit, tokens=[128 * 11, 128 * 11 + 1], **shape)
    assert full == pytest.approx(2 * 128 * 11 * 4096 * 256 * 12 / fit.flops_per_s, rel=1e-9)
    assert over > 1.05 * full
    few = dense_gemm.gemm_s(fit, tokens=[1, 64, 65], **shape)
    assert few[0] == pytest.approx(few[1]) and few[1] < few[2], "rows are padded to a tile"


def test_gradients_are_products_of_the_swapped_sides() -> None:
    work = {"tokens": 4096, "in_features": 7168, "out_features": 2048, "dtype": "fp8"}
    dgrad = COST.gemm_s(H100, part="dgrad", **work)
    assert dgrad == COST.gemm_s(H100, tokens=4096, in_features=2048, out_features=7168, dtype="fp8")
    assert COST.gemm_s(H100, part="wgrad", **work) > dgrad
    assert COST.gemm_s(H100, tokens=[0, 4096], in_features=[7168, 0], out_features=2048, dtype="fp8").tolist() == [0, 0]


def test_quantisation_reads_bf16_and_writes_the_format() -> None:
    work = {"tokens": 16_384, "in_features": 7168, "out_features": 128}
    fp8, with_it = (COST.gemm_s(H100, dtype="fp8", quantise=flag, **work) for flag in (False, True))
    assert with_it - fp8 == pytest.approx(16_384 * 7168 * 3 / h100.GEMM_FP8.quantise_bytes_per_s)
    bf16 = [COST.gemm_s(H100, dtype="bf16", quantise=flag, **work) for flag in (False, True)]
    assert bf16[0] == bf16[1]


def test_the_gemm_fit_finds_its_law_again() -> None:
    truth = h100.GEMM_FP8.model_copy(update={"flops_per_s": 1.2e15, "overhead_s": 6e-6})
    table = pd.DataFrame(
        [
            {"gemm_dtype": "fp8_block", "m": m, "n": n, "k": k}
            for m in (1, 16, 128, 1024, 8192)
            for n in (512, 2048, 7168)
            for k in (512, 2048, 7168)
        ]
    )
    table["latency"] = 1e3 * gemm_fit.predict_s(truth, table, "fp8", 132)
    rows = gemm_fit.gemm_rows(table, "fp8")
    fit = gemm_fit.fit_gemm(rows, "fp8", H100, "test")
    ours = gemm_fit.predict_s(fit, rows, "fp8", 132)
    np.testing.assert_allclose(ours, rows.seconds, rtol=0.02)
    assert fit.overhead_s == pytest.approx(6e-6, rel=0.1)
    with pytest.raises(ValueError, match="no bf16 rows; the table has gemm_dtype fp8_block"):
        gemm_fit.gemm_rows(table, "bf16")
    with pytest.raises(ValueError, match="needs the columns k, latency"):
        gemm_fit.gemm_rows(table.drop(columns=["k", "latency"]), "fp8")


# Attention ------------------------------------------------------------------------------------------------------------


@given(q=st.integers(0, 40), before=st.integers(0, 40), window=st.none() | st.integers(1, 50))
def test_attended_positions_counts_the_mask(q: int, before: int, window: int | None) -> None:
    seen = [before + i for i in range(1, q + 1)]
    expected = sum(seen if window is None else [min(window, s) for s in seen])
    assert attended_positions(q, before + q, window) == expected


@pytest.mark.parametrize(("q", "kv", "read"), [(1, 5000, 100), (4, 5000, 103), (4, 60, 60)])
def test_a_window_bounds_what_is_read(q: int, kv: int, read: int) -> None:
    """q queries in a row see the window of the last and q - 1 positions before the first one's."""
    _, moved = attention_work(LLAMA, "decode", [q], [kv], window=100)
    assert moved == read * 2048 * 2 + q * 2 * 32 * 256
    fit = h100.ATTENTION["gqa_prefill"]
    made = H100.model_copy(update={"kernels": Kernels(gqa_prefill=fit.model_copy(update={"position_s": 1.0}))})
    longest = COST.attention_s(made, shape=LLAMA, phase="prefill", query_tokens=[q], kv_tokens=[kv], window=100)
    assert longest == pytest.approx(read, rel=1e-3)


def test_shapes_of_models() -> None:
    v3, qwen = (
        Model.model_validate(read(SCENARIOS / "models" / f"{name}.yaml").data)
        for name in ("deepseek_v3", "qwen3_30b_a3b")
    )
    assert attention_shape(v3, "decode") == V3_DECODE
    assert attention_shape(v3, "prefill") == V3_PREFILL
    assert attention_shape(v3, "decode", tp_size=8).num_heads == 16
    assert attention_shape(qwen, "decode") == AttentionShape("gqa", 32, 4, 128, 128, 1024)
    assert attention_shape(qwen, "prefill", tp_size=8).num_key_value_heads == 1
    # The work is the model's own count: S / 2 positions per token there, half a position more here.
    flops, _ = attention_work(V3_PREFILL, "prefill", [4096], [4096])
    assert flops == pytest.approx(4096 * v3.attention_core_flops(2048.5))
    flops, moved = attention_work(V3_DECODE, "decode", [1], [4096])
    assert flops == v3.attention_core_flops(4096, absorbed=True)
    assert moved == 4096 * 1152 + 2 * 128 * 1088


def equal(batch: int, tokens: int) -> list[int]:
    return [tokens] * batch


@given(
    shape=st.sampled_from([V3_DECODE, V3_PREFILL, LLAMA]),
    batch=st.integers(1, 9),
    kv=st.integers(1, 5000),
    name=st.sampled_from(["h100", "b200", "a100"]),
)
def test_the_law_of_the_fit_is_the_law(shape: AttentionShape, batch: int, kv: int, name: str) -> None:
    phase = "decode" if shape.num_key_value_heads < shape.num_heads else "prefill"
    made, queries = device(name), 1 if phase == "decode" else kv
    row = pd.DataFrame(
        {
            "batch": [batch], "heads": shape.num_heads, "kv_heads": shape.num_key_value_heads, "qk_dim": shape.qk_dim,
            "v_dim": shape.v_dim, "cache_elements": shape.cache_elements, "query_tokens": queries, "kv_tokens": kv,
            "cache_bytes": 2.0,
        }
    )  # fmt: skip
    fit = h100.attention(made, shape.family, phase)
    fitted = attention_fit.predict_s(fit, row, shape.family, phase, made.n_sm)
    ours = COST.attention_s(
        made, shape=shape, phase=phase, query_tokens=equal(batch, queries), kv_tokens=equal(batch, kv)
    )
    assert ours == pytest.approx(fitted[0], rel=1e-12)


@pytest.mark.parametrize("cost", [COST, Roofline()], ids=str)
@pytest.mark.parametrize("shape", [V3_DECODE, LLAMA])
def test_decode_laws(cost: ComputeCost, shape: AttentionShape) -> None:
    kv = np.array([[100, 5000, 0], [100, 5000, 3000]])
    lengths = {"query_tokens": (kv > 0).astype(int), "kv_tokens": kv, "shape": shape, "phase": "decode"}
    seconds = cost.attention_s(H100, **lengths)
    assert seconds.shape == (2,) and seconds[1] > seconds[0]
    order = [2, 0, 1]
    swapped = lengths | {name: np.asarray(lengths[name])[:, order] for name in ("query_tokens", "kv_tokens")}
    np.testing.assert_allclose(cost.attention_s(H100, **swapped), seconds, rtol=1e-14)
    assert (cost.attention_s(H100, **lengths, cache_bytes_per_element=1.0) <= seconds).all()
    assert (cost.attention_s(H100, **lengths, window=500) < seconds).all()
    assert (cost.attention_s(H100, **lengths, sm_fraction=0.5) >= seconds).all()
    assert cost.attention_s(H100, **lengths | {"query_tokens": 0}).tolist() == [0, 0]
    # Long contexts are read at memory speed: Llama's are; MLA's 128 heads compute longer on each cached token.
    long = cost.attention_s(H100, shape=shape, phase="decode", query_tokens=[1] * 64, kv_tokens=[32_768] * 64)
    read_s = 64 * 32_768 * shape.cache_elements * 2 / H100.memory_bandwidth_bytes_per_s
    assert read_s <= long <= (1.45 if shape is V3_DECODE else 1.15) * read_s


def test_a_chunk_after_a_prefix_costs_its_own_positions() -> None:
    """Chunked prefill adds up: two chunks take the whole's work, not twice it, plus one launch and its padding."""
    work = {"shape": V3_PREFILL, "phase": "prefill"}
    whole, first, second = (
        COST.attention_s(H100, query_tokens=[q], kv_tokens=[kv], **work)
        for q, kv in ((16_384, 16_384), (8192, 8192), (8192, 16_384))
    )
    assert second > 2 * first
    assert first + second == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(("phase", "name", "bar"), [("prefill", "context", 0.08), ("decode", "generation", 0.105)])
def test_mla_against_the_measured_table(shared: Path, phase: str, name: str, bar: float) -> None:
    table = pd.read_parquet(shared / "data" / "aiconfigurator" / f"{name}_mla_h100.parquet")
    rows = attention_fit.attention_rows(table, "mla", phase)
    fit = h100.ATTENTION[f"mla_{phase}"]
    ours = attention_fit.predict_s(fit, rows, "mla", phase, 132)
    assert len(rows) > 800 and np.abs(ours / rows.seconds - 1).mean() <= bar
    # Negative control: without the padding, the units and the latency of the longest context the law misses.
    bare = fit.model_copy(update={"padding_tokens": 0.0, "unit_s": 0.0, "position_s": 0.0, "overhead_s": 5e-6})
    assert np.abs(attention_fit.predict_s(bare, rows, "mla", phase, 132) / rows.seconds - 1).mean() > 2 * bar


def test_the_attention_fit_finds_its_law_again() -> None:
    table = pd.DataFrame(
        [
            {"batch_size": b, "num_heads": h, "isl": 1, "step": s, "kv_cache_dtype": "bfloat16", "latency": 1.0}
            for b in (1, 16, 256)
            for h in (16, 128)
            for s in (15, 255, 4095, 65_535)
        ]
    )
    rows = attention_fit.attention_rows(table, "mla", "decode")
    truth = AttentionKernel(
        overhead_s=9e-6, position_s=0, unit_s=1e-6, flops_per_s=5e14, bandwidth_bytes_per_s=2.5e12, padding_tokens=60,
        norm=2, source="test",
    )  # fmt: skip
    rows = rows.assign(seconds=attention_fit.predict_s(truth, rows, "mla", "decode", 132))
    fit = attention_fit.fit_attention(rows, "mla", "decode", H100, "test")
    np.testing.assert_allclose(attention_fit.predict_s(fit, rows, "mla", "decode", 132), rows.seconds, rtol=0.03)
    assert fit.flops_per_s == pytest.approx(5e14, rel=0.1)
    with pytest.raises(ValueError, match="no mla decode rows with bfloat16 activations and a fp8 cache"):
        attention_fit.attention_rows(table, "mla", "decode", "fp8")
    with pytest.raises(ValueError, match="a gqa decode table needs the columns head_dim, num_key_value_heads"):
        attention_fit.attention_rows(table, "gqa", "decode")


def test_calibrate_writes_a_block_that_a_cluster_reads(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = shared / "data" / "aiconfigurator" / "generation_mla_h100.parquet"
    assert main([str(table), "--out", str(tmp_path / "block.yaml")]) == 0
    (tmp_path / "h100.yaml").write_text((SCENARIOS / "clusters" / "h100.yaml").read_text())
    cluster = tmp_path / "mine.yaml"
    cluster.write_text("extends: h100.yaml\n" + (tmp_path / "block.yaml").read_text())
    made = Cluster.model_validate(read(cluster).data).device
    ours, shipped = made.kernels.mla_decode, h100.ATTENTION["mla_decode"]
    assert ours is not None and ours.flops_per_s == pytest.approx(shipped.flops_per_s, rel=0.01)
    assert ours.source == "generation_mla_h100.parquet, fit" and made.n_sm == 132
    capsys.readouterr()
    assert main([str(table), "--json"]) == 0
    (fit,) = json.loads(capsys.readouterr().out)["kernels"]
    assert fit["rows"] == 1448 and 0.05 < fit["fitted_error"] < 0.105 and fit["other_shapes_error"] < 0.105
    assert fit["warning"] is None


def test_calibrate_refuses_a_table_without_usable_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "gemm_h100.csv"
    pd.DataFrame([{"gemm_dtype": "int8_wo", "m": 1, "n": 512, "k": 512, "latency": 1.0}]).to_csv(table)
    assert main([str(table)]) == 2
    assert "no rows in a number format of NVIDIA H100 SXM; the table has int8_wo" in capsys.readouterr().err


def gemm_table(rows: int, scatter: float = 0.0) -> pd.DataFrame:
    """Rows of H100's own law, every other one off by a factor exp(+-scatter)."""
    shapes = [(m, n, k) for m in (1, 64, 2048) for n in (512, 4096) for k in (512, 4096)][:rows]
    table = pd.DataFrame(shapes, columns=["m", "n", "k"]).assign(gemm_dtype="bfloat16")
    seconds = gemm_fit.predict_s(h100.GEMM_BF16, table, "bf16", 132)
    return table.assign(latency=1e3 * seconds * np.exp(scatter * (1 - 2 * (np.arange(len(table)) % 2))))


def test_calibrate_leaves_out_kernels_of_few_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gemm_h100.csv"
    gemm_table(6).to_csv(path)
    assert main([str(path)]) == 2
    assert "gemm_bf16: too few rows, 4 to fit to, 8 at least" in capsys.readouterr().err
    few = gemm_table(4).assign(gemm_dtype="fp8_block")
    pd.concat([gemm_table(12), few]).to_csv(path)
    assert main([str(path)]) == 0
    assert "gemm_fp8     left out: too few rows, 3 to fit to" in capsys.readouterr().out


def test_calibrate_warns_of_a_law_that_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gemm_h100.csv"

    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    for scatter, warned in ((0.0, False), (1.0, True)):
        gemm_table(12, scatter).to_csv(path)
        assert main([str(path)]) == 0
        assert ("warning: mean error" in capsys.readouterr().out) is warned
        assert main([str(path), "--json"]) == 0
        (fit,) = json.loads(capsys.readouterr().out, parse_constant=no_constant)["kernels"]
        assert (fit["warning"] is not None) is warned
    # One shape: nothing to hold out, which is no NaN in JSON.
    one = pd.concat([gemm_table(1).assign(m=2**i, latency=0.01 * (i + 1)) for i in range(9)])
    one.to_csv(path)
    assert main([str(path), "--json"]) == 0
    (fit,) = json.loads(capsys.readouterr().out, parse_constant=no_constant)["kernels"]
    assert fit["other_shapes_error"] is None


@pytest.mark.parametrize("gated", [True, False])
def test_calibrate_reads_vidur_mlp_profiles(
    gated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-3-8B's layer on two workers: four products in each row, timed by a law that the fit finds again."""
    sides = {
        "attn_pre_proj": (3072, 4096),
        "attn_post_proj": (4096, 2048),
        "mlp_up_proj": (14_336 if gated else 7168, 4096),
        "mlp_down_proj": (4096, 7168),
    }
    shape = {"n_head": 32, "n_kv_head": 8, "n_embd": 4096, "n_expanded_embd": 14_336, "use_gated_mlp": gated}
    rows = []
    for m in (1, 16, 128, 1024, 8192):
        row = shape | {"num_tokens": m, "num_tensor_parallel_workers": 2}
        for name, (n, k) in sides.items():
            work = {"tokens": m, "in_features": k, "out_features": n, "dtype": "bf16"}
            row[f"time_stats.{name}.median"] = 1e3 * float(COST.gemm_s(H100, **work))
        rows.append(row)
    path = tmp_path / "mlp_h100.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    assert main([str(path), "--json"]) == 0
    (fit,) = json.loads(capsys.readouterr().out)["kernels"]
    assert fit["key"] == "gemm_bf16" and fit["rows"] == 20 and fit["transferred_error"] < 1e-9
    assert fit["fitted_error"] < 0.02
    pd.DataFrame(rows).drop(columns=[f"time_stats.{name}.median" for name in sides]).to_csv(path, index=False)
    assert main([str(path)]) == 2
    assert "a Vidur mlp profile needs one of the columns time_stats.attn_pre_proj.median" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mla_context_module", "dsa_generation_module"])
def test_calibrate_refuses_tables_of_whole_modules(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"op_name": name, "batch_size": 1, "num_heads": 128, "isl": 1, "step": 1, "latency": 1.0}
    path = tmp_path / "t_h100.csv"
    pd.DataFrame([row | {"kv_cache_dtype": "bfloat16"}]).to_csv(path)
    assert main([str(path)]) == 2
    assert f"{name} is not a kernel with a law here" in capsys.readouterr().err


# Measured rows of aiconfigurator-core 0.12.0, us: gpu's tables moe_perf (tokens, hidden, width, experts, k, EP degree;
# balanced; TensorRT-LLM 1.3.0rc20, A100 SGLang 0.5.10), gemm_perf (m, n, k; SGLang), context and generation of mla and
# attention (batch, heads, key-value heads, width of queries and keys, new tokens, context; TensorRT-LLM, gqa decode vLLM).
# Of all rows that the law meets within 0.6 %, for each constant the one that it moves most: a guard of the constants, not
# a measure of the fit. A100's mla_decode is not among them: the law misses its rows by 39 %.
# fmt: off
MEASURED: list[tuple[str, str, list[tuple[float, ...]]]] = [
    ("h100", "grouped_gemm_bf16", [(2, 4096, 1536, 128, 8, 64, 41.21), (8192, 6144, 16384, 8, 2, 1, 11870), (32, 6144, 2048, 256, 8, 1, 6424), (8192, 2048, 768, 128, 8, 1, 1466), (4096, 6144, 3072, 128, 4, 64, 157.5)]),
    ("h100", "grouped_gemm_fp8", [(256, 2048, 512, 256, 8, 256, 25.65), (3072, 6144, 16384, 8, 2, 8, 617.2), (32, 4096, 1024, 512, 10, 1, 1364), (8192, 2048, 768, 128, 8, 2, 1195), (12288, 3072, 1024, 256, 8, 128, 121.2)]),
    ("h100", "gemm_bf16", [(12, 1024, 128, 3.326), (1280, 2560, 2048, 24.05), (4097, 6144, 16384, 1076), (11, 12288, 10240, 94.07)]),
    ("h100", "gemm_fp8", [(49, 4096, 128, 4.316), (224, 512, 256, 4.423), (8, 1024, 16384, 22.05), (3073, 16384, 8192, 656.1), (14, 16384, 6144, 40.07), (3329, 128, 12288, 70.78)]),
    ("h100", "mla_prefill", [(1, 4, 4, 192, 16, 16, 15.47), (1, 1, 1, 192, 8192, 8192, 144.3), (128, 32, 32, 192, 16, 16, 133.4), (1, 32, 32, 192, 32768, 32768, 18010), (128, 32, 32, 192, 256, 256, 674.1), (64, 32, 32, 192, 256, 256, 348.3)]),
    ("h100", "mla_decode", [(1, 4, 1, 576, 1, 8, 13.47), (32, 128, 1, 576, 1, 16384, 264.9), (512, 64, 1, 576, 1, 8192, 1670), (512, 2, 1, 576, 1, 16, 33.46)]),
    ("h100", "gqa_prefill", [(1, 4, 2, 128, 128, 128, 15.73), (2, 2, 1, 128, 1536, 1536, 35.7), (256, 32, 8, 64, 1, 1, 220.9), (2, 64, 1, 256, 16384, 16384, 33460), (128, 64, 64, 256, 64, 64, 969.6), (128, 48, 1, 256, 128, 128, 862.5)]),
    ("h100", "gqa_decode", [(1, 3, 1, 128, 1, 2, 11.47), (2048, 64, 8, 64, 1, 16, 348.1), (16, 64, 1, 128, 1, 8192, 38.33), (64, 1, 1, 256, 1, 65536, 1396), (2048, 1, 1, 256, 1, 2, 96.84)]),
    ("h200", "grouped_gemm_bf16", [(1, 2048, 512, 256, 8, 256, 30.23), (12288, 6144, 16384, 8, 2, 4, 4409), (16, 6144, 3072, 128, 4, 1, 1714), (8192, 2048, 768, 128, 8, 1, 1291), (6144, 4096, 1536, 128, 8, 64, 114.5)]),
    ("h200", "grouped_gemm_fp8", [(1, 3072, 1024, 256, 8, 16, 26.57), (2048, 6144, 16384, 8, 2, 4, 694.2), (64, 7168, 2048, 256, 8, 2, 1388), (6144, 2048, 768, 128, 8, 1, 1604), (12288, 3072, 1536, 256, 8, 256, 101.4)]),
    ("b200", "grouped_gemm_bf16", [(8, 2048, 768, 128, 8, 128, 30.65), (6144, 6144, 16384, 8, 2, 2, 2104), (16, 5120, 8192, 128, 1, 2, 329.1), (12288, 2048, 768, 128, 8, 2, 569.8), (12288, 2816, 704, 128, 8, 16, 155.2)]),
    ("b200", "grouped_gemm_fp8", [(384, 2048, 512, 256, 8, 256, 31.39), (8192, 6144, 16384, 8, 2, 1, 3570), (64, 5120, 8192, 128, 1, 1, 1437), (16384, 3072, 1536, 256, 8, 1, 2403), (12288, 4096, 2048, 256, 8, 256, 100)]),
    ("b200", "grouped_gemm_fp4", [(1, 4096, 1024, 512, 10, 32, 40.24), (12288, 5120, 8192, 16, 1, 16, 223.4), (32, 4096, 1024, 512, 10, 1, 465.8), (16384, 3072, 1536, 256, 8, 1, 2554), (16384, 6144, 2048, 256, 8, 256, 257.2)]),
    ("b200", "gemm_bf16", [(161, 4096, 128, 2.833), (112, 128, 512, 2.884), (113, 256, 8192, 8.884), (3585, 12288, 12288, 683.2), (15, 16384, 16384, 90.19)]),
    ("b200", "gemm_fp8", [(97, 2048, 256, 6.754), (1792, 16384, 128, 23.53), (9, 256, 16384, 17.5), (3584, 16384, 10240, 411.2), (48, 16384, 6144, 22.73), (16384, 256, 7168, 90.01)]),
    ("b200", "gemm_fp4", [(113, 128, 128, 4.709), (8192, 16384, 128, 65.97), (6, 512, 16384, 13.83), (4353, 16384, 16384, 508.8), (13, 16384, 16384, 35.14), (4097, 128, 6144, 23.89)]),
    ("b200", "mla_prefill", [(2, 8, 8, 192, 32, 32, 14.78), (1, 1, 1, 192, 16384, 16384, 234.6), (256, 128, 128, 192, 32, 32, 869.5), (4, 32, 32, 192, 10240, 10240, 3405), (128, 64, 64, 192, 64, 64, 273.5), (64, 128, 128, 192, 512, 512, 1671)]),
    ("b200", "mla_decode", [(1, 4, 1, 576, 1, 8, 10.82), (512, 128, 1, 576, 1, 8, 49.95), (16, 128, 1, 576, 1, 65536, 234.3), (512, 64, 1, 576, 1, 16384, 1801)]),
    ("b200", "gqa_prefill", [(4, 6, 1, 256, 16, 16, 14.87), (1, 2, 2, 64, 12288, 12288, 160.7), (256, 16, 1, 128, 1, 1, 101.7), (8, 32, 4, 256, 12288, 12288, 17760), (128, 64, 64, 256, 64, 64, 606.6), (256, 64, 1, 256, 128, 128, 1473)]),
    ("b200", "gqa_decode", [(1, 4, 1, 64, 1, 4, 9.264), (2048, 12, 2, 64, 1, 32, 44.12), (4, 64, 1, 64, 1, 65536, 25.08), (16, 8, 4, 128, 1, 131072, 588.9), (2048, 16, 4, 256, 1, 16, 158.7)]),
    ("gb200_nvl72", "grouped_gemm_bf16", [(8, 2048, 768, 128, 8, 128, 29.51), (8192, 6144, 16384, 8, 2, 1, 5053), (8, 6144, 16384, 8, 2, 1, 715.1), (12288, 2816, 704, 128, 8, 1, 1288), (6144, 4096, 1024, 512, 10, 128, 74.8)]),
    ("gb200_nvl72", "grouped_gemm_fp8", [(512, 2048, 512, 256, 8, 256, 31.27), (16384, 6144, 16384, 8, 2, 1, 6803), (32, 4096, 2048, 256, 8, 1, 1113), (12288, 3072, 1536, 256, 8, 1, 1761), (16384, 3072, 1024, 256, 8, 256, 93.29)]),
    ("gb200_nvl72", "grouped_gemm_fp4", [(2, 2048, 512, 256, 8, 4, 37.68), (2048, 6144, 16384, 8, 2, 2, 359.8), (48, 3072, 1536, 256, 8, 1, 380.9), (16384, 3072, 1536, 256, 8, 2, 1242), (12288, 5120, 8192, 128, 1, 128, 159.8)]),
    ("gb200_nvl72", "gemm_bf16", [(64, 128, 128, 2.428), (3841, 2560, 256, 7.317), (160, 256, 8192, 8.343), (8192, 6144, 16384, 902.4), (48, 12288, 10240, 42.83)]),
    ("gb200_nvl72", "gemm_fp8", [(160, 1024, 256, 6.223), (16384, 12288, 512, 140.5), (256, 256, 10240, 13.53), (4096, 12288, 16384, 493), (49, 16384, 5120, 19.53), (32768, 256, 2560, 64.19)]),
    ("gb200_nvl72", "gemm_fp4", [(1, 256, 128, 4.193), (2049, 16384, 128, 19.22), (80, 512, 16384, 13.59), (3073, 12288, 10240, 177.3), (4, 16384, 16384, 34.28), (2049, 128, 12288, 26.3)]),
    ("gb200_nvl72", "mla_prefill", [(1, 1, 1, 192, 16, 16, 14.9), (4, 1, 1, 192, 4096, 4096, 72.89), (128, 32, 32, 192, 1, 1, 95.53), (2, 8, 8, 192, 32768, 32768, 3915), (256, 128, 128, 192, 128, 128, 1365), (32, 32, 32, 192, 512, 512, 218)]),
    ("gb200_nvl72", "mla_decode", [(1, 16, 1, 576, 1, 2, 11.17), (1024, 8, 1, 576, 1, 32, 44.84), (16, 128, 1, 576, 1, 65536, 228.1), (512, 64, 1, 576, 1, 16384, 1756)]),
    ("gb200_nvl72", "gqa_prefill", [(1, 12, 1, 256, 16, 16, 15.02), (1, 2, 1, 64, 12288, 12288, 152.5), (256, 32, 1, 128, 1, 1, 177.9), (8, 64, 8, 256, 16384, 16384, 56660), (128, 40, 40, 256, 128, 128, 653.1), (256, 64, 1, 256, 256, 256, 3008)]),
    ("gb200_nvl72", "gqa_decode", [(1, 24, 1, 64, 1, 32, 9.979), (512, 40, 8, 64, 1, 32, 41.6), (8, 48, 1, 64, 1, 65536, 35.45), (128, 8, 8, 64, 1, 16384, 560.5), (512, 16, 2, 512, 1, 32, 45.94)]),
    ("a100", "grouped_gemm_bf16", [(1, 3072, 1536, 256, 8, 1, 183.4), (12288, 3072, 1536, 256, 8, 1, 30060), (2, 6144, 16384, 8, 2, 1, 1442), (6144, 6144, 2048, 256, 8, 1, 45510)]),
    ("a100", "gemm_bf16", [(96, 1536, 128, 5.118), (97, 1536, 128, 5.175), (3328, 4096, 12288, 1316), (15, 10240, 12288, 172.5)]),
    ("a100", "mla_prefill", [(1, 4, 4, 192, 64, 64, 15.45), (1, 1, 1, 192, 3072, 3072, 117.8), (32, 32, 32, 192, 16, 16, 57.09), (1, 128, 128, 192, 10240, 10240, 27110), (256, 16, 16, 192, 64, 64, 346.5), (64, 32, 32, 192, 256, 256, 706.3)]),
    ("a100", "gqa_prefill", [(1, 24, 24, 128, 32, 32, 13.82), (1, 4, 4, 128, 1024, 1024, 46.59), (64, 40, 2, 128, 16, 16, 85.5), (4, 96, 1, 128, 16384, 16384, 177000), (128, 96, 96, 128, 32, 32, 702.3), (128, 96, 1, 128, 128, 128, 1749)]),
    ("a100", "gqa_decode", [(16, 4, 2, 128, 1, 128, 18.52), (2048, 8, 8, 128, 1, 2, 518.8), (8, 32, 1, 128, 1, 16384, 70.47), (64, 4, 4, 128, 1, 32768, 2840)]),
]
# fmt: on
# Nothing in the tables tells these: above this P the kernel reads its cache; A100's pairs cost next to nothing.
UNSEEN = {("b200", "mla_decode", "flops_per_s"), ("gb200_nvl72", "mla_decode", "flops_per_s"), ("a100", "grouped_gemm_bf16", "pair_bytes_per_s")}  # fmt: skip


@pytest.mark.parametrize(("gpu", "kernel", "rows"), MEASURED, ids=lambda value: value if isinstance(value, str) else "")
def test_constants_fit_measured_rows_better_than_constants_off_by_a_quarter(
    gpu: str, kernel: str, rows: list[tuple[float, ...]]
) -> None:
    made = device(gpu)
    measured = np.array([row[-1] for row in rows]) * 1e-6

    def error(fit: Any) -> float:
        held = made.model_copy(update={"kernels": made.kernels.model_copy(update={kernel: fit})})
        return float(np.abs(np.log(seconds(held, kernel, rows) / measured)).mean())

    fit = shipped(made, kernel)
    assert fit.source != h100.TRANSFERRED
    assert error(fit) < 0.01
    for name, value in fit.model_dump(exclude_none=True).items():
        if name.endswith("_s") and name != "wgrad_flops_per_s" and value and (gpu, kernel, name) not in UNSEEN:
            for factor in (0.75, 1.25):
                assert error(fit.model_copy(update={name: factor * value})) > error(fit), (name, factor)


def shipped(made: Device, kernel: str) -> Any:
    family, _, last = kernel.rpartition("_")
    if family in ("mla", "gqa"):
        return h100.attention(made, family, last)
    return h100.gemm(made, last) if family == "gemm" else h100.grouped_gemm(made, last)


def seconds(made: Device, kernel: str, rows: list[tuple[float, ...]]) -> np.ndarray:
    family, _, last = kernel.rpartition("_")
    found = []
    for row in rows:
        if family == "grouped_gemm":
            tokens, hidden, width, experts, topk, ep, _ = map(int, row)
            load = balanced(tokens, experts, topk, ep)
            work = {"hidden_size": hidden, "moe_intermediate_size": width, "dtype": last}
            found.append(COST.grouped_gemm_s(made, expert_tokens=load, ep_tokens=tokens, **work))
        elif family == "gemm":
            m, n, k, _ = row
            found.append(COST.gemm_s(made, tokens=m, in_features=k, out_features=n, dtype=last, quantise=True))
        else:
            batch, heads, kv_heads, qk, new, context, _ = map(int, row)
            v = {192: 128, 576: 512}[qk] if family == "mla" else qk
            shape = AttentionShape(family, heads, kv_heads, qk, v, 576 if family == "mla" else kv_heads * 2 * qk)
            work = {"query_tokens": equal(batch, new), "kv_tokens": equal(batch, context)}
            found.append(COST.attention_s(made, shape=shape, phase=last, **work))
    return np.array(found)


# Transfer and the rest ------------------------------------------------------------------------------------------------


def test_constants_transfer_by_the_data_sheet_ratio() -> None:
    h200 = device("h200")
    assert h100.gemm(h200, "fp8").flops_per_s == h100.GEMM_FP8.flops_per_s
    assert h100.gemm(h200, "fp8").bandwidth_bytes_per_s == pytest.approx(
        h100.GEMM_FP8.bandwidth_bytes_per_s * 4.8 / 3.35
    )
    sheet = h200.model_copy(update={"peak_flops_per_s": h200.peak_flops_per_s.model_copy(update={"fp4": 4e15})})
    assert h100.gemm(sheet, "fp4").flops_per_s == pytest.approx(h100.GEMM_FP8.flops_per_s * 4000 / 1979)
    assert "elementwise transferred from H100 by spec ratio" in COST.provenance(h200)
    assert "mla prefill, mla decode, gqa prefill measured (TensorRT-LLM" in COST.provenance(H100)
    assert "dense GEMM fp8, training attention measured (DeepSeek-V3 training trace" in COST.provenance(device("h800"))
    with pytest.raises(ValueError, match="A100 SXM has no fp8"):
        COST.gemm_s(device("a100"), tokens=1, in_features=1, out_features=1, dtype="fp8")


def test_elementwise_bytes_of_the_trace_and_of_the_pairs() -> None:
    """8.53 ms per DeepSeek-V3 layer, balanced; a rank that computes nothing pays for no pair."""
    trunk, pair = (
        sum(make(direction=way) for way in CROSSINGS)
        for make in (
            lambda direction: trunk_bytes(hidden_size=7168, attention_width=81_920, direction=direction),
            lambda direction: expert_pair_bytes(hidden_size=7168, moe_intermediate_size=2048, direction=direction),
        )
    )
    seconds = COST.elementwise_s(device("h800"), bytes=4096 * trunk + np.array([0, 1, 2]) * 8 * 4096 * pair)
    assert seconds[1] == pytest.approx(8.53e-3, rel=0.01)
    assert seconds[1] - seconds[0] > 4e-3
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])


def test_serving_kernels_are_bytes_and_launches() -> None:
    fit = h100.elementwise(H100)
    count = np.array([0, 1, 1000])
    norms = norm_s(COST, H100, tokens=count, hidden_size=7168)
    np.testing.assert_allclose(norms, 2 * fit.overhead_s + count * 2 * 8 * 7168 / fit.bandwidth_bytes_per_s)
    moved = permute_s(COST, H100, pairs=count, hidden_size=7168, dtype="fp8")
    np.testing.assert_allclose(moved, 2 * fit.overhead_s + count * 6 * 7168 / fit.bandwidth_bytes_per_s)
    glu = swiglu_s(COST, H100, pairs=count, moe_intermediate_size=2048, dtype="fp8")
    np.testing.assert_allclose(glu, fit.overhead_s + count * 5 * 2048 / fit.bandwidth_bytes_per_s)
    gate = gate_s(COST, H100, tokens=count, hidden_size=7168, n_routed_experts=256, num_experts_per_tok=8)
    router = COST.gemm_s(H100, tokens=count, in_features=7168, out_features=256, dtype="bf16")
    np.testing.assert_allclose(gate - router, fit.overhead_s + count * (1024 + 64) / fit.bandwidth_bytes_per_s)


def test_elementwise_against_measured_quantisation() -> None:
    """aiconfigurator-core 0.12.0, h100_sxm scale_matrix_perf (TensorRT-LLM 1.3.0rc20): m, k, us; bf16 in, fp8 out."""
    for m, k, measured in ((1, 32, 1.310), (3, 2048, 1.359), (513, 64, 1.398), (3584, 65_536, 230.8), (32_768, 51_200, 1684)):
        assert COST.elementwise_s(H100, bytes=3 * m * k, kernels=1) * 1e6 == pytest.approx(measured, rel=0.1)


def test_thousands_of_ranks_are_one_call() -> None:
    kv = np.arange(200 * 64).reshape(200, 64)
    seconds = attention_s(
        h100.ATTENTION["mla_decode"], n_sm=132, sm_fraction=1.0, shape=V3_DECODE, phase="decode",
        query_tokens=np.ones_like(kv), kv_tokens=kv,
    )  # fmt: skip
    alone = COST.attention_s(H100, shape=V3_DECODE, phase="decode", query_tokens=np.ones(64), kv_tokens=kv[17])
    assert seconds.shape == (200,) and seconds[17] == alone
