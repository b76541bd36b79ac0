"""Dense GEMM, attention and elementwise kernels: closed forms, scaling laws, measured tables and the fits to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from sim.calibrate import main
from sim.calibration import attention as attention_fit
from sim.calibration import gemm as gemm_fit
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


def test_calibrate_writes_a_block_that_a_cluster_reads(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = shared / "data" / "aiconfigurator" / "generation_mla_h100.parquet"
    assert main([str(table)]) == 0
    text = capsys.readouterr().out
    block = YAML(typ="safe").load(text[text.index("\nmla_decode:\n") :])
    ours, shipped = Kernels.model_validate(block).mla_decode, h100.ATTENTION["mla_decode"]
    assert ours is not None and ours.flops_per_s == pytest.approx(shipped.flops_per_s, rel=0.01)
    assert main([str(table), "--json"]) == 0
    (fit,) = json.loads(capsys.readouterr().out)["kernels"]
    assert fit["rows"] == 1448 and 0.05 < fit["fitted_error"] < 0.105 and fit["other_shapes_error"] < 0.105


def test_calibrate_refuses_a_table_without_usable_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "gemm_h100.csv"
    pd.DataFrame([{"gemm_dtype": "int8_wo", "m": 1, "n": 512, "k": 512, "latency": 1.0}]).to_csv(table)
    assert main([str(table)]) == 2
    assert "no rows in a number format of NVIDIA H100 SXM; the table has int8_wo" in capsys.readouterr().err


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


def test_thousands_of_ranks_are_one_call() -> None:
    kv = np.arange(200 * 64).reshape(200, 64)
    seconds = attention_s(
        h100.ATTENTION["mla_decode"], n_sm=132, sm_fraction=1.0, shape=V3_DECODE, phase="decode",
        query_tokens=np.ones_like(kv), kv_tokens=kv,
    )  # fmt: skip
    alone = COST.attention_s(H100, shape=V3_DECODE, phase="decode", query_tokens=np.ones(64), kv_tokens=kv[17])
    assert seconds.shape == (200,) and seconds[17] == alone
