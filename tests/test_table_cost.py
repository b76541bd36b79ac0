"""``cost.compute: table``: measured points exact, monotone between them, refusals that say what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.cluster import Cluster
from sim.cost import ComputeCost
from sim.cost import table as module
from sim.cost.attention import AttentionShape
from sim.cost.calibrated import Calibrated
from sim.cost.curves import Curves
from sim.cost.table import Table, version_order
from sim.hardware import Device
from sim.plugin import make
from sim.tokens import F64
from sim.yamlfile import read

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
LAW = Calibrated()
V3 = {"hidden_size": 7168, "moe_intermediate_size": 2048, "dtype": "fp8"}
MLA = AttentionShape("mla", 128, 1, 576, 512, 576)


def device(name: str) -> Device:
    return Cluster.model_validate(read(SCENARIOS / "clusters" / f"{name}.yaml").data).device


H100 = device("h100")


def write(root: Path, kernel: str, name: str, rows: list[dict[str, object]], version: str = "1.3.0rc20") -> None:
    folder = root / "h100_sxm" / kernel / "trtllm" / version
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")


def experts(tokens: int, ep: int, latency: float, **other: object) -> dict[str, object]:
    row: dict[str, object] = {
        "kernel_source": "moe_torch_flow_cutlass", "moe_dtype": "fp8_block", "num_tokens": tokens, "hidden_size": 7168,
        "inter_size": 2048, "topk": 8, "num_experts": 256, "moe_tp_size": 1, "moe_ep_size": ep,
        "distribution": "balanced", "latency": latency,
    }  # fmt: skip
    return row | other


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder in the package's layout; latencies rise with every axis."""
    root = tmp_path_factory.mktemp("tables")
    rows = [
        experts(tokens, ep, 0.05 + tokens / ep * 0.002 + 0.004 * 256 / ep)
        for tokens in (64, 512, 4096)
        for ep in (1, 8, 64)
    ]
    rows += [experts(64, 8, 99.0, distribution="power_law_1.01"), experts(64, 8, 99.0, moe_tp_size=2)]
    rows += [experts(512, 8, 77.0, kernel_source="slower_kernel")]
    write(root, "moe", "moe_perf", rows)
    write(root, "moe", "moe_perf", [experts(512, 8, 88.0)], version="1.3.0rc9")
    rows = [
        {"gemm_dtype": name, "m": m, "n": n, "k": k, "latency": 0.01 * m**0.5 * (n * k) ** 0.3 * scale}
        for name, scale in (("bfloat16", 2.0), ("fp8_block", 1.0))
        for m in (1, 64, 4096)
        for n in (512, 7168)
        for k in (512, 2048)
    ]
    rows.append({"gemm_dtype": "bfloat16", "m": 7, "n": 512, "k": 512, "latency": 1.0})
    write(root, "gemm", "gemm_perf", rows)
    rows = [
        {
            "mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": heads, "batch_size": batch, "isl": 1,
            "step": step, "latency": 0.01 + batch * step * heads * 1e-8,
        }
        for heads in (16, 128)
        for batch in (1, 32)
        for step in (255, 4095, 65_535)
    ]  # fmt: skip
    write(root, "mla", "generation_mla_perf", rows)
    return root


@pytest.fixture(scope="module")
def cost(folder: Path) -> Table:
    return Table(path=str(folder))


def even(pairs: float, local: int) -> F64:
    used = int(min(local, pairs))
    return np.where(np.arange(local) < used, pairs / used, 0.0)


# Curves ---------------------------------------------------------------------------------------------------------------


def power(outer: F64, inner: F64) -> F64:
    return outer**0.5 * inner


def test_curves_interpolate_in_the_logarithm_and_continue_by_the_law() -> None:
    curves = Curves.of([(a, b, 3 * a**0.5 * b) for a in (1, 4, 16) for b in (1, 10, 100)] + [(4, 10, 1e9)])
    outer, inner = np.meshgrid([0.5, 1, 2, 4, 7, 16, 40], [0.1, 1, 3, 10, 100, 5000])
    np.testing.assert_allclose(curves.at(outer, inner, power), 3 * power(outer, inner), rtol=1e-12)
    scalar = curves.at(np.asarray(4.0), np.asarray(10.0), power)
    assert scalar.shape == () and scalar == pytest.approx(60)


@given(st.floats(1, 16), st.floats(1, 100), st.floats(1, 100))
def test_curves_are_monotone_where_the_table_is(outer: float, first: float, second: float) -> None:
    curves = Curves.of([(a, b, 1 + a + np.sqrt(b)) for a in (1, 4, 16) for b in (1, 7, 10, 100)])
    low, high = sorted((first, second))
    at = curves.at(np.array([outer, outer]), np.array([low, high]), power)
    assert at[0] <= at[1] * (1 + 1e-12)


# Measured points ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "ep"), [(64, 1), (512, 8), (4096, 64), (64, 64), (4096, 1)])
def test_experts_are_exact_at_the_rows(cost: Table, tokens: int, ep: int) -> None:
    """The newest version's quickest kernel, of the balanced rows without tensor parallelism."""
    load = even(tokens * 8 / ep, 256 // ep)
    seconds = cost.grouped_gemm_s(H100, expert_tokens=load, ep_tokens=tokens, **V3)
    assert seconds == pytest.approx((0.05 + tokens / ep * 0.002 + 0.004 * 256 / ep) / 1e3, rel=1e-9)


def test_experts_follow_the_rank_s_own_load(cost: Table) -> None:
    pairs = np.array([0, 300, 512, 700, 4000, 40_000])
    loads = np.stack([even(n, 4) if n else np.zeros(4) for n in pairs])
    seconds = cost.grouped_gemm_s(H100, expert_tokens=loads, ep_tokens=pairs, **V3)
    assert (np.diff(seconds[1:]) > 0).all()
    uneven = cost.grouped_gemm_s(H100, expert_tokens=[[2000, 0, 0, 0], [500, 500, 500, 500]], ep_tokens=2000, **V3)
    assert uneven[0] < uneven[1], "one expert's weights are read instead of four"
    more, lent = (
        cost.grouped_gemm_s(H100, expert_tokens=loads[4], ep_tokens=4000, sm_fraction=f, **V3) for f in (1, 0.5)
    )
    law = [LAW.grouped_gemm_s(H100, expert_tokens=loads[4], ep_tokens=4000, sm_fraction=f, **V3) for f in (1, 0.5)]
    assert lent / more == pytest.approx(law[1] / law[0])


@pytest.mark.parametrize("m", [1, 64, 4096])
def test_products_are_exact_at_the_rows_and_monotone_between(cost: Table, m: int) -> None:
    work = {"tokens": m, "in_features": 2048, "out_features": 7168}
    expected = 0.01 * m**0.5 * (7168 * 2048) ** 0.3 / 1e3
    assert cost.gemm_s(H100, **work, dtype="bf16") == pytest.approx(2 * expected, rel=1e-9)
    assert cost.gemm_s(H100, **work, dtype="fp8", quantise=True) == pytest.approx(expected, rel=1e-9)
    assert cost.gemm_s(H100, **work, dtype="fp8") < expected
    sizes = np.geomspace(512, 7168, 9)
    assert (np.diff(cost.gemm_s(H100, tokens=m, in_features=700, out_features=sizes, dtype="bf16")) > 0).all()
    far, end = cost.gemm_s(H100, tokens=m, in_features=2048, out_features=[14_336, 7168], dtype="bf16")
    law = LAW.gemm_s(H100, tokens=m, in_features=2048, out_features=[14_336, 7168], dtype="bf16")
    assert far / end == pytest.approx(law[0] / law[1])
    assert cost.gemm_s(H100, tokens=0, in_features=2048, out_features=512, dtype="bf16") == 0


def test_decode_is_exact_at_the_rows_and_follows_lengths(cost: Table) -> None:
    work = {"shape": MLA, "phase": "decode"}
    for batch, kv in ((1, 256), (32, 4096), (32, 65_536)):
        seconds = cost.attention_s(H100, query_tokens=np.ones(batch), kv_tokens=np.full(batch, kv), **work)
        assert seconds == pytest.approx((0.01 + batch * (kv - 1) * 128e-8) / 1e3, rel=1e-9)
    lengths = np.array([[1000, 3000, 0], [1000, 3000, 5000]])
    ragged = cost.attention_s(H100, query_tokens=lengths > 0, kv_tokens=lengths, **work)
    assert ragged.shape == (2,) and ragged[1] > ragged[0]
    assert cost.attention_s(H100, query_tokens=[0, 0], kv_tokens=[5, 5], **work) == 0


# What is not there ----------------------------------------------------------------------------------------------------


def test_refusals_say_what_there_is(cost: Table, folder: Path, tmp_path: Path) -> None:
    load = np.ones(4)
    for call, says in (
        (
            lambda: cost.grouped_gemm_s(H100, expert_tokens=load, ep_tokens=4, **V3 | {"hidden_size": 4096}),
            "no fp8 experts of 4096 x 2048 in h100_sxm trtllm; it has 7168 x 2048",
        ),
        (
            lambda: cost.grouped_gemm_s(H100, expert_tokens=load, ep_tokens=4, **V3 | {"dtype": "bf16"}),
            "no bf16 experts of 7168 x 2048 in h100_sxm trtllm; it has none",
        ),
        (
            lambda: Table(path=str(folder), num_experts=384).grouped_gemm_s(
                H100, expert_tokens=load, ep_tokens=4, **V3
            ),
            "experts of 7168 x 2048 as 256 with k = 8: choose num_experts and num_experts_per_tok",
        ),
        (
            lambda: cost.attention_s(
                H100, shape=AttentionShape("mla", 40, 1, 576, 512, 576), phase="decode", query_tokens=[1], kv_tokens=[9]
            ),
            "no decode attention of 40 heads with a bfloat16 cache in h100_sxm trtllm; it has 16, 128",
        ),
        (
            lambda: cost.attention_s(
                H100, shape=MLA, phase="decode", query_tokens=[1], kv_tokens=[9], cache_bytes_per_element=1
            ),
            "no decode attention of 128 heads with a fp8 cache in h100_sxm trtllm; it has none",
        ),
        (
            lambda: cost.gemm_s(device("b200"), tokens=1, in_features=1, out_features=1, dtype="bf16"),
            "no tables of b200_sxm; gpu must be one of h100_sxm",
        ),
        (lambda: Table(path=str(tmp_path / "none")).provenance(H100), "none is not a folder of measured tables"),
        (lambda: Table(path=str(folder), framework="sglang", gpu="h800_sxm").provenance(H100), "no tables of h800_sxm"),
        (lambda: cost.gemm_s(H100, tokens=1, in_features=1, out_features=1, dtype="fp4"), "H100 SXM has no fp4"),
    ):
        with pytest.raises(ValueError, match=r"^(table: )?\w") as refused:
            call()
        message = str(refused.value)
        assert says in message and "\n" not in message


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "gatesim\[tables\]", or give path'):
        make(ComputeCost, "table").gemm_s(H100, tokens=1, in_features=1, out_features=1, dtype="bf16")


def test_a_folder_is_found_by_words_of_the_device_s_name(tmp_path: Path) -> None:
    for name in (".cache", "rtx_pro_6000_server", "h100_sxm", "h100_pcie", "gb200"):
        (tmp_path / name).mkdir()
    cost = Table(path=str(tmp_path))
    found = {name: cost.folder(device(name)).name for name in ("rtx_pro_6000", "h100", "gb200_nvl72")}
    assert found == {"rtx_pro_6000": "rtx_pro_6000_server", "h100": "h100_sxm", "gb200_nvl72": "gb200"}
    with pytest.raises(ValueError, match="no tables of h200_sxm; gpu must be one of gb200, h100_pcie, h100_sxm, rtx"):
        cost.folder(device("h200"))


def test_two_shapes_of_one_width_must_be_told_apart(tmp_path: Path) -> None:
    write(tmp_path, "moe", "moe_perf", [experts(64, 8, 1.0), experts(64, 8, 2.0, num_experts=384)])
    work = {"expert_tokens": even(64, 32), "ep_tokens": 64} | V3
    with pytest.raises(ValueError, match="as 256 with k = 8, 384 with k = 8: choose num_experts"):
        Table(path=str(tmp_path)).grouped_gemm_s(H100, **work)
    assert Table(path=str(tmp_path), num_experts=256).grouped_gemm_s(H100, **work) == pytest.approx(1e-3)


def test_kernels_without_a_table_are_the_calibrated_law(cost: Table) -> None:
    prefill = {"shape": AttentionShape("gqa", 32, 8, 128, 128, 2048), "phase": "prefill"}
    work = {"query_tokens": [100, 20], "kv_tokens": [100, 300]} | prefill
    assert cost.attention_s(H100, **work) == LAW.attention_s(H100, **work)
    assert cost.elementwise_s(H100, bytes=1e6, kernels=2) == LAW.elementwise_s(H100, bytes=1e6, kernels=2)
    core = {"tokens": 4096, "flops_per_token": 1e8, "dtype": "bf16", "direction": "backward"}
    assert cost.attention_core_s(H100, **core) == LAW.attention_core_s(H100, **core)
    says = cost.provenance(H100)
    assert "grouped GEMM h100_sxm trtllm 1.3.0rc20" in says and "mla decode h100_sxm trtllm 1.3.0rc20" in says
    assert "gqa prefill calibrated: no table" in says


def test_versions_sort_by_number() -> None:
    names = ["1.3.0rc9", "0.5.10", "1.3.0", "0.5.9", "1.3.0rc20", "0.5.6.post2"]
    expected = ["0.5.6.post2", "0.5.9", "0.5.10", "1.3.0rc9", "1.3.0rc20", "1.3.0"]
    assert sorted(names, key=version_order) == expected


def test_the_shared_excerpt_read_as_a_table(shared: Path, tmp_path: Path) -> None:
    """H100's 243 balanced DeepSeek-V3 rows, and a rank of 4 experts between the measured EP degrees' tokens."""
    rows = pd.read_parquet(shared / "data" / "aiconfigurator" / "moe_h100_sxm_trtllm.parquet")
    rows = rows.rename(columns={"latency_ms": "latency"})
    write(tmp_path, "moe", "moe_perf", rows.to_dict("records"))
    rows = rows[(rows.hidden_size == 7168) & (rows.inter_size == 2048) & (rows.num_experts == 256) & (rows.topk == 8)]
    rows = rows[(rows.moe_dtype == "fp8_block") & (rows.distribution == "balanced") & (rows.moe_tp_size == 1)]
    cost, seen = Table(path=str(tmp_path), num_experts=256, num_experts_per_tok=8), 0
    for row in rows.itertuples():
        pairs = row.num_tokens * 8 / row.moe_ep_size
        if pairs >= 1:
            load = even(pairs, 256 // row.moe_ep_size)
            ours = cost.grouped_gemm_s(H100, expert_tokens=load, ep_tokens=row.num_tokens, **V3)
            assert ours == pytest.approx(row.latency / 1e3, rel=1e-9)
            seen += 1
    assert seen > 200
