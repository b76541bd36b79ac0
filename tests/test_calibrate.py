"""The grouped GEMM law, its fit, the readers of measured tables, and ``python -m sim.calibrate``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.calibrate import _device, main
from sim.calibration import moe, readers, report
from sim.calibration.loads import balanced, power_law
from sim.cluster import Cluster
from sim.cost import h100
from sim.cost import table as table_module
from sim.cost.grouped_gemm import grouped_gemm_s
from sim.cost.table import Table
from sim.hardware import Device, GroupedGemm
from sim.tokens import F64
from sim.validation import Inputs, compute, groups
from sim.yamlfile import read

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
PLANTED = GroupedGemm(
    overhead_s=20e-6,
    flops_per_s=1100e12,
    bandwidth_bytes_per_s=2.9e12,
    pair_bytes_per_s=0.9e12,
    token_bytes_per_s=1.5e12,
    norm=3.0,
    tile_rows=128,
    source="planted",
)
V3 = {"hidden_size": 7168, "moe_intermediate_size": 2048, "dtype": "fp8"}


def device(name: str) -> Device:
    return Cluster.model_validate(read(SCENARIOS / "clusters" / f"{name}.yaml").data).device


def law(tokens: Any, fit: GroupedGemm = PLANTED, **more: Any) -> F64:
    return grouped_gemm_s(fit, **({"sm_fraction": 1.0, "ep_tokens": 0.0} | V3 | more), expert_tokens=tokens)


# The law ------------------------------------------------------------------------------------------------------------

loads = st.lists(st.integers(0, 3000), min_size=1, max_size=12)


@given(tokens=loads, seed=st.integers(0, 9), more=st.integers(1, 500))
def test_laws_of_time(tokens: list[int], seed: int, more: int) -> None:
    """Order and appended zeros do not matter; another token, another SM taken away or a wider expert never help."""
    base = law(tokens)
    shuffled = np.random.default_rng(seed).permutation([*tokens, 0, 0])
    assert law(shuffled) == pytest.approx(base, rel=1e-12)
    place = seed % len(tokens)
    assert law([n + more * (i == place) for i, n in enumerate(tokens)]) > base
    assert law(tokens, sm_fraction=0.5) >= base
    assert law(tokens, moe_intermediate_size=2176) >= base
    assert law(tokens, ep_tokens=100) >= base
    # Norms: the sum is the slowest, and no overlap takes less than the larger part.
    summed, overlapped = (law(tokens, PLANTED.model_copy(update={"norm": q})) for q in (1.0, 50.0))
    assert summed >= base * (1 - 1e-12) >= overlapped * (1 - 1e-12)


def test_time_of_no_one_and_many_experts() -> None:
    assert law([0, 0, 0]) == PLANTED.overhead_s
    one = law([1]) - PLANTED.overhead_s
    assert one == pytest.approx(3 * 7168 * 2048 / 2.9e12, rel=0.01)  # reading the weights
    assert law(np.ones(32)) - PLANTED.overhead_s == pytest.approx(32 * one)
    batch = np.arange(24).reshape(2, 3, 4)
    full = law(batch, ep_tokens=np.arange(6).reshape(2, 3), sm_fraction=np.full((2, 3), 0.9))
    assert full.shape == (2, 3) and full[1, 2] == law(batch[1, 2], ep_tokens=5, sm_fraction=0.9)
    counted = law([3, 700], multiplicity=[5, 2])
    assert counted == pytest.approx(law([3, 700, 3, 3, 700, 3, 3]), rel=1e-12)


def test_rows_are_padded_to_tiles_beyond_the_first() -> None:
    big = {"hidden_size": 512, "moe_intermediate_size": 65536}  # compute decides, pairs hardly move anything
    bare = PLANTED.model_copy(update={"pair_bytes_per_s": 1e18})
    assert law([129], bare, **big) == pytest.approx(law([256], bare, **big), rel=1e-3)
    assert law([127], bare, **big) < law([128], bare, **big)
    assert law([129], bare.model_copy(update={"tile_rows": 1}), **big) < law([129], bare, **big) * 0.85


def test_skew_costs_in_prefill_and_helps_in_decode() -> None:
    even, hot = np.full(8, 512.0), np.array([2048.0, 512, 512, 512, 256, 256, 0, 0])
    assert even.sum() == hot.sum()
    few, fewer = np.full(8, 4.0), np.array([20.0, 6, 3, 3, 0, 0, 0, 0])
    assert law(fewer) < law(few) * 0.7
    # Cold experts wait for weights, hot ones compute: nothing of one hides behind the other.
    mixed, alike = law([4, 1020]), law([512, 512])
    assert mixed > alike
    assert law(np.r_[hot, hot]) == pytest.approx(2 * law(hot) - PLANTED.overhead_s)


# Loads behind a table's rows ------------------------------------------------------------------------------------------


def test_balanced_loads() -> None:
    assert balanced(4096, 256, 8, 1).tolist() == [128.0] * 256
    assert balanced(1, 256, 8, 8).tolist() == [1.0] + [0.0] * 31
    assert balanced(16, 256, 8, 1).sum() == 128 and (balanced(16, 256, 8, 1) > 0).sum() == 128
    assert balanced(3, 8, 2, 4).sum() <= 3


@given(tokens=st.integers(1, 600), topk=st.integers(1, 8), seed=st.integers(0, 5))
def test_power_law_loads(tokens: int, topk: int, seed: int) -> None:
    all_ranks = power_law(tokens, 32, topk, 1, 1.2, 3, np.random.default_rng(seed))
    assert all_ranks.shape == (3, 32) and (all_ranks.sum(axis=1) == tokens * topk).all()
    assert all_ranks.min() >= 0 and all_ranks.max() <= tokens
    hottest = power_law(tokens, 32, topk, 8, 1.2, 3, np.random.default_rng(seed))
    assert (hottest.sum(axis=1) == all_ranks.reshape(3, 8, 4).sum(axis=2).max(axis=1)).all()


# Readers and fit ------------------------------------------------------------------------------------------------------


def table(noise: float = 0.0, kernel: str = "cutlass", number: str = "fp8_block") -> pd.DataFrame:
    """A table in aiconfigurator's layout whose times are the planted law's."""
    rng, rows = np.random.default_rng(0), []
    for hidden, inter, experts in ((7168, 2048, 64), (2048, 768, 64)):
        for ep in (1, 4, 16):
            for tokens in (1, 8, 64, 512, 1024, 2048, 4096, 8192):
                seconds = law(
                    balanced(tokens, experts, 8, ep), ep_tokens=tokens, hidden_size=hidden, moe_intermediate_size=inter
                )
                rows.append(
                    (
                        tokens,
                        hidden,
                        inter,
                        8,
                        experts,
                        1,
                        ep,
                        "balanced",
                        float(seconds) * 1e3 * np.exp(noise * rng.normal()),
                    )
                )
    names = [
        "num_tokens",
        "hidden_size",
        "inter_size",
        "topk",
        "num_experts",
        "moe_tp_size",
        "moe_ep_size",
        "distribution",
        "latency",
    ]
    return pd.DataFrame(rows, columns=names).assign(kernel_source=kernel, moe_dtype=number)


def test_planted_constants_are_recovered() -> None:
    (rows,) = readers.layouts()["aiconfigurator"].read(table())
    fit = moe.fit(rows, device("h100"), "made")
    assert moe.mape(fit, rows) < 1e-3 and fit.tile_rows == 128
    for name in ("overhead_s", "flops_per_s", "bandwidth_bytes_per_s", "pair_bytes_per_s", "token_bytes_per_s", "norm"):
        assert getattr(fit, name) == pytest.approx(getattr(PLANTED, name), rel=0.03), name
    # A tenth of the rows twice too slow: the robust loss keeps the rest.
    spoilt = table(noise=0.02)
    spoilt.loc[::10, "latency"] *= 2
    (rough,) = readers.layouts()["aiconfigurator"].read(spoilt)
    robust = moe.fit(rough, device("h100"), "made")
    assert moe.mape(robust, rows) < 0.06
    left = moe.leave_one_out(rows, device("h100"), [str(ep) for ep in rows.frame.ep_size])
    assert list(left) == ["1", "4", "16"] and max(left.values()) < 0.02


def test_traps_are_left_out_with_their_reason() -> None:
    walking = table(kernel="triton")
    alone = walking[walking.moe_ep_size == 1].set_index(["hidden_size", "num_tokens"]).latency
    keys = pd.MultiIndex.from_frame(walking[["hidden_size", "num_tokens"]])
    walking = walking.assign(latency=alone.reindex(keys).to_numpy() * 0.9)
    more = walking[walking.moe_ep_size == 4].assign(moe_ep_size=8)
    marlin = table().head(3).assign(moe_dtype="int4_wo")
    slower = table(kernel="odd")
    slower.loc[slower.moe_ep_size == 16, "latency"] *= 50
    found = {r.kernel: r for r in readers.layouts()["aiconfigurator"].read(pd.concat([walking, more, marlin, slower]))}
    assert set(found["triton fp8_block"].frame.ep_size) == {1}
    assert dict(found["triton fp8_block"].dropped) == {"EP above 1 of a kernel that walks all pairs": 48}
    assert dict(found["cutlass int4_wo"].dropped) == {"number format int4_wo": 3}
    assert "slower than EP 1 with a larger load" in dict(found["odd fp8_block"].dropped)
    assert 1 in set(found["odd fp8_block"].frame.ep_size)
    columns = {
        "cu_num": 304,
        "model_dim": 7168,
        "inter_dim": 2048,
        "expert": 33,
        "topk": 9,
        "q_dtype_w": "torch.float8_e4m3fnuz",
    }
    aiter = pd.DataFrame({"token": [1, 2, 4, 8], "us": [50.0, 60.0, 60.0, 70.0]}).assign(**columns)
    (rows,) = readers.layouts()["aiter"].read(aiter)
    assert rows.frame.num_tokens.tolist() == [1, 2, 8] and rows.n_sm == 304
    assert dict(rows.dropped) == {"time repeats that of fewer tokens": 1}


def test_rows_without_a_choice_are_no_rows() -> None:
    odd = table()
    odd.loc[:3, "topk"] = 0
    (rows,) = readers.layouts()["aiconfigurator"].read(odd)
    assert len(rows.frame) == 44 and rows.frame.num_experts_per_tok.min() == 8


def test_power_law_of_exponent_one_is_its_limit() -> None:
    """1.0 has a sampler of its own, between its neighbours; rows of that name are read."""
    one, near = (power_law(64, 16, 2, 4, alpha, 2, np.random.default_rng(3)) for alpha in (1.0, 1.000001))
    np.testing.assert_array_equal(one, near)
    more = table().head(5).assign(distribution="power_law_1.0")
    (rows,) = readers.layouts()["aiconfigurator"].read(pd.concat([table(), more]))
    assert rows.uneven is not None and len(rows.uneven.frame) == 5


def test_power_law_draws_end_at_four_fifths_of_the_tokens() -> None:
    """3 tokens: p(x) ~ 1/x on [1, 2.4], whose mean 1.6 is rescaled to 64 x 3 / 96 = 2; below 1.2 it rounds to one token.
    (Up to all 3 tokens instead: 0.28.)"""
    draws = power_law(3, 96, 64, 1, 1.0, 200, np.random.default_rng(0))
    assert (draws <= 1).mean() == pytest.approx(np.log(1.2) / np.log(2.4), abs=0.02)


def test_vidur_rows_keep_the_recorded_load() -> None:
    columns = {
        "num_experts": 8,
        "num_experts_per_device": 8,
        "router_topk": 2,
        "hidden_dim": 512,
        "expert_hidden_dim": 256,
    }
    profile = pd.DataFrame({"num_tokens": [50, 1], "total_routed_tokens": [100, 2], "expert_utilization": [0.5, 0.25]})
    profile = profile.assign(**columns, max_load_ratio=[4.0, 4.0]).assign(**{"time_stats.moe_grouped_gemm.median": 0.1})
    (rows,) = readers.layouts()["vidur"].read(profile)
    assert rows.expert_tokens.sum(axis=1).tolist() == [100, 2]
    assert np.count_nonzero(rows.expert_tokens, axis=1).tolist() == [4, 2]
    assert rows.expert_tokens[0].max() == 50 and rows.frame.seconds.tolist() == [1e-4, 1e-4]
    (rest,) = readers.layouts()["vidur"].read(profile.assign(num_experts_per_device=[8, 0]))
    assert len(rest.frame) == 1 and dict(rest.dropped) == {"no tokens or no time": 1}
    (odd,) = readers.layouts()["vidur"].read(profile.assign(profiling_precision="INT4"))
    assert not len(odd.frame) and dict(odd.dropped) == {"number format INT4": 2}


# The front door -------------------------------------------------------------------------------------------------------


def test_json_and_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "moe_h100_made.parquet", tmp_path / "mine.yaml"
    table(0.01).to_parquet(path)
    assert main([str(path), "--json", "--out", str(out)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {"table", "layout", "device", "cluster", "kernels", "chosen"}
    assert (data["layout"], data["device"], data["cluster"]) == ("aiconfigurator", "NVIDIA H100 SXM", "h100")
    (kernel,) = data["kernels"]
    assert kernel["mape"] < 0.02 < kernel["mape_from_h100"] and kernel["rows"] == 48
    assert set(kernel["leave_one_ep_out"]) == {"1", "4", "16"} and len(kernel["leave_one_shape_out"]) == 2
    assert kernel["mape_uneven"] is None and data["chosen"] == {"fp8": "cutlass fp8_block"}
    # A cluster that extends the shipped one takes the block as it is.
    cluster = tmp_path / "cluster.yaml"
    (tmp_path / "h100.yaml").write_text((SCENARIOS / "clusters" / "h100.yaml").read_text())
    cluster.write_text("extends: h100.yaml\n" + out.read_text())
    own = Cluster.model_validate(read(cluster).data).device
    assert own.kernels.grouped_gemm_fp8 is not None
    assert own.kernels.grouped_gemm_fp8.flops_per_s == pytest.approx(kernel["constants"]["flops_per_s"], rel=1e-4)
    assert main([str(path), "--device", str(cluster)]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("  fitted")]
    fitted, shipped, transferred = (float(number) for number in re.findall(r"\d+\.\d", line))
    assert fitted == pytest.approx(shipped, abs=0.11) and transferred > 2
    assert "leave one EP out" in text and "grouped_gemm_fp8:" in text


@pytest.mark.parametrize(
    ("path", "cluster"),
    [
        ("moe_gb200_trtllm.parquet", "gb200_nvl72"),
        ("b200-run3.csv", "b200"),
        ("qwen3_rtxpro6000_moe.csv", "rtx_pro_6000"),
        ("rtx_pro_6000_server/moe_perf.csv", "rtx_pro_6000"),
        ("h200_sxm/moe_H20.csv", "h20"),
        ("h800/moe.csv", "h800"),
    ],
)
def test_the_gpu_is_a_word_of_the_name(path: str, cluster: str) -> None:
    assert _device(None, f"/tables/{path}")[0] == cluster


@pytest.mark.parametrize("name", ["moe_h1000.csv", "notah100.csv", "gb2000.csv"])
def test_a_part_of_a_word_is_no_gpu(name: str) -> None:
    with pytest.raises(ValueError, match="the name does not tell the GPU"):
        _device(None, f"/tables/{name}")


@pytest.mark.parametrize(
    ("name", "content", "args", "says"),
    [
        ("absent.csv", None, [], "no such file"),
        ("t_h100.csv", "a,b\n1,2\n", [], "no known layout; it has a, b. Known: aiconfigurator: "),
        ("t_h100.parquet", "not parquet", [], "not a parquet or CSV table"),
        ("t.csv", "ok", [], "the name does not tell the GPU; give --device, one of a100, "),
        ("t.csv", "ok", ["--device", "h300"], "--device must be one of a100, "),
        ("t_h100.csv", "marlin", [], "nothing to fit in this aiconfigurator table (number format int4_wo)"),
        ("t_a100.csv", "ok", [], "no kernel has 6 rows to fit (NVIDIA A100 SXM has no fp8 peak)"),
        ("t_h100.csv", "timeless", [], "needs a latency or latency_ms column"),
    ],
)
def test_bad_input_is_one_line(
    name: str, content: str | None, args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    made = {"ok": table(), "marlin": table(number="int4_wo"), "timeless": table().drop(columns="latency")}
    if content in made:
        made[content].to_csv(path, index=False)
    elif content is not None:
        path.write_text(content)
    assert main([str(path), *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("python -m sim.calibrate: ") and err.count("\n") == 1 and says in err


# Measured tables ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def h100_fp8(shared: Path) -> moe.Rows:
    rows = readers.read(str(shared / "data" / "aiconfigurator" / "moe_h100_sxm_trtllm.parquet"))[1]
    return next(r for r in rows if r.kernel == "moe_torch_flow_cutlass fp8_block")


def test_other_shapes_serve_deepseek_v3(h100_fp8: moe.Rows) -> None:
    """One set of constants for several shapes: fitted without DeepSeek-V3's, it predicts DeepSeek-V3's."""
    v3 = np.array(h100_fp8.shapes) == compute.V3
    fit = moe.fit(h100_fp8.part(~v3), device("h100"), "")
    assert moe.mape(fit, h100_fp8.part(v3)) < 0.1
    roofline = PLANTED.model_copy(update={"overhead_s": 0.0, "flops_per_s": 1979e12, "bandwidth_bytes_per_s": 3.35e12, "pair_bytes_per_s": None, "token_bytes_per_s": None})  # fmt: skip
    assert moe.mape(roofline, h100_fp8.part(v3)) > 0.2


def test_spec_sheet_carries_the_constants(shared: Path) -> None:
    rows = readers.read(str(shared / "data" / "aiconfigurator" / "moe_b200_sxm_trtllm.parquet"))[1]
    deepgemm = next(r for r in rows if r.kernel == "deepgemm fp8_block")
    b200 = device("b200")
    assert moe.mape(h100.grouped_gemm(b200, "fp8", measured=False), deepgemm) < 0.2
    assert moe.mape(h100.grouped_gemm(device("h100"), "fp8"), deepgemm) > 0.4


def test_validation_rows_of_whole_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H100's own law in H200's place: its transfer is off by what the faster memory saves."""
    folder = tmp_path / "h200_sxm" / "moe" / "trtllm" / "1.3.0rc20"
    folder.mkdir(parents=True)
    rows = table(kernel="moe_torch_flow_cutlass")
    for i, row in enumerate(rows.itertuples()):
        seconds = law(
            balanced(row.num_tokens, row.num_experts, row.topk, row.moe_ep_size), h100.GROUPED_FP8,
            ep_tokens=row.num_tokens, hidden_size=row.hidden_size, moe_intermediate_size=row.inter_size,
        )  # fmt: skip
        rows.loc[i, "latency"] = 1e3 * float(seconds)
    rows.to_parquet(folder / "moe_perf.parquet")
    monkeypatch.setattr(Table, "root", lambda self: tmp_path)
    (figure,) = compute.figures(Inputs(SCENARIOS))
    assert figure.name == "grouped GEMM, mean error: H200 fp8, 2 shapes, by spec sheet from H100"
    (known,) = readers.layouts()["aiconfigurator"].read(rows)
    assert 5 < figure.ours == pytest.approx(100 * moe.mape(h100.grouped_gemm(device("h200"), "fp8", measured=False), known))


def test_validation_rows_hold(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "find_spec", lambda name: None)
    assert list(compute.figures(Inputs(SCENARIOS))) == [] and "compute" in groups()
    rows = list(compute.figures(Inputs(SCENARIOS, shared / "data")))
    predicted = [row for row in rows if row.kind == "prediction"]
    assert len(predicted) >= 30 and len(rows) - len(predicted) >= 7
    missed = [row for row in rows if not row.passed]
    assert {row.name.removeprefix("grouped GEMM, mean error: ") for row in missed} == {
        "the same, worst EP (256)",
        "H100 fp8, wide EP, power law 1.01, hottest rank",
        "B200 fp4, by spec sheet from H100's fp8",
        "A100 bf16, by spec sheet from H100",
        "Qwen3-30B, 64 tokens on 8 experts, by spec sheet",
        "H800, Qwen3-Next, 1-64 tokens",
        "H800, Qwen3-Next, 1-64 tokens, by spec sheet",
    }
    assert all(row.reason for row in missed)


def test_report_chooses_block_wise_fp8() -> None:
    kernels = [
        report.Kernel(name, "fp8", n, {}, PLANTED)
        for name, n in (("x fp8", 90), ("x fp8_block", 9), ("y fp8_block", 10))
    ]
    assert report.chosen(kernels)["fp8"].name == "y fp8_block"
