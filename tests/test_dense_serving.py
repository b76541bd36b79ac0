"""vLLM on RTX PRO 6000: constants from layer profiles of Qwen3-30B-A3B, and the run of Llama-3.1-8B they predict.

The run is replayed twice: by a plain loop here (one engine, one request at a time) and by the serving engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sim.calibration import attention, gemm, moe
from sim.calibration.readers import llmservingsim as profile
from sim.calibration.readers import read as read_table
from sim.cluster import Cluster, build_network
from sim.cost import h100
from sim.cost.all_gather import AllGather
from sim.cost.attention import attention_shape
from sim.cost.calibrated import Calibrated
from sim.cost.elementwise import norm_s, swiglu_s
from sim.hardware import Device
from sim.loading import load
from sim.model import Model
from sim.study import run
from sim.tokens import F64, I64
from sim.validation import serving_dense
from sim.yamlfile import read

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
COST = Calibrated()


def cluster(name: str) -> Cluster:
    return Cluster.model_validate(read(SCENARIOS / "clusters" / f"{name}.yaml").data)


DEVICE = cluster("rtx_pro_6000").device
LLAMA = Model.model_validate(
    {k: v for k, v in read(SCENARIOS / "models" / "llama3_1_8b.yaml").data.items() if k != "published"}
)


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    found = shared / "data" / serving_dense.FOLDER
    if not found.is_dir():
        pytest.skip("the profiles are not here")
    return found


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"qwen3_30b_rtxpro6000_{name}")


# Constants ----------------------------------------------------------------------------------------------------------


def same(fitted: Any, shipped: Any) -> None:
    """Equal to the digits that the cluster file shows."""
    for name, value in fitted.model_dump(exclude={"source"}, exclude_none=True).items():
        assert getattr(shipped, name) == pytest.approx(value, rel=6e-3, abs=1e-12), name


def test_shipped_constants_are_the_fits(folder: Path) -> None:
    kernels, bare = DEVICE.kernels, DEVICE.model_copy(update={"kernels": type(DEVICE.kernels)()})
    (experts,) = read_table(str(folder / "qwen3_30b_rtxpro6000_moe.csv"))[1]
    assert experts.dropped == (("weights stay in the L2 cache", 12),)
    same(moe.fit(experts, bare, ""), kernels.grouped_gemm_bf16)
    rows = profile.gemm_rows(table(folder, "dense.csv"), table(folder, "per_sequence.csv"))
    same(gemm.fit_gemm(rows[~profile.held_out(rows.m)], "bf16", bare, ""), kernels.gemm_bf16)
    core = table(folder, "attention.csv.gz")
    rows = profile.attention_rows(core, "decode")
    same(
        attention.fit_attention(rows[~profile.held_out(rows.kv_tokens)], "gqa", "decode", bare, ""), kernels.gqa_decode
    )
    rows = profile.attention_rows(core, "prefill")
    rows = rows[~profile.held_out(rows.query_tokens)]
    same(attention.fit_attention(rows, "gqa", "prefill", bare, ""), kernels.gqa_prefill)
    rows = profile.mixed_rows(core)
    same(profile.fit_mixed(rows[~profile.held_out(rows.chunk)], bare, ""), kernels.gqa_mixed)
    rows = profile.elementwise_rows(table(folder, "dense.csv"))
    same(profile.fit_elementwise(rows[~profile.held_out(rows.tokens)], bare, ""), kernels.elementwise)


def test_rows_left_out_of_the_fits_are_met_too(folder: Path) -> None:
    found = serving_dense.errors(folder, DEVICE)
    bars = {
        "experts": 0.02, "dense GEMM": 0.065, "attention prefill": 0.12, "attention decode": 0.05,
        "attention of decodes beside a chunk": 0.09, "elementwise": 0.37,
    }  # fmt: skip
    assert set(found) == set(bars)
    for name, (error, apart) in found.items():
        assert np.abs(error).mean() < bars[name], name
        # A fit that follows its rows only would miss the others by far more.
        assert not apart.any() or np.abs(error[apart]).mean() < 1.3 * np.abs(error[~apart]).mean(), name


def test_experts_held_in_the_cache_are_no_measure_of_memory(folder: Path) -> None:
    """8 experts, 75 MB, take 52 us again and again; the next 8 cost as much as any others from memory: 50 us each 8."""
    rows = table(folder, "moe.csv")
    times = rows[rows.tokens == 8].set_index("activated_experts").time_us
    law = [float(COST.grouped_gemm_s(DEVICE, expert_tokens=[64 / n] * n, ep_tokens=8, hidden_size=2048, moe_intermediate_size=768, dtype="bf16")) * 1e6 for n in (8, 16, 32, 64)]  # fmt: skip
    assert times[8] < 0.7 * law[0]
    np.testing.assert_allclose(law[1:], times.to_numpy()[1:], rtol=0.05)


def test_a_decode_beside_a_chunk_costs_up_to_four_times_as_much(folder: Path) -> None:
    core = table(folder, "attention.csv.gz")
    rows = core[(core.n_decode == 128) & (core.kv_decode == 1024)]
    alone = float(rows[rows.prefill_chunk == 0].time_us.iloc[0])
    chunk = core[(core.prefill_chunk == 512) & (core.kv_prefill == 0)]
    together = float(chunk[(chunk.n_decode == 128) & (chunk.kv_decode == 1024)].time_us.iloc[0])
    prompt = float(chunk[chunk.n_decode == 0].time_us.iloc[0])
    assert together > 2.7 * (alone + prompt)
    shape = attention_shape(Model.model_validate(qwen()), "decode")
    ours = {
        phase: float(COST.attention_s(DEVICE, shape=shape, phase=phase, query_tokens=[1] * 128, kv_tokens=[1024] * 128))
        for phase in ("decode", "mixed")
    }
    assert ours["decode"] * 1e6 == pytest.approx(alone, rel=0.12)
    assert ours["mixed"] * 1e6 == pytest.approx(together - prompt, rel=0.05)


def qwen() -> dict[str, Any]:
    data: dict[str, Any] = read(SCENARIOS / "models" / "qwen3_30b_a3b.yaml").data
    return {k: v for k, v in data.items() if k != "published"}


def test_other_devices_time_mixed_batches_as_decodes() -> None:
    device = cluster("h100").device
    for family in ("gqa", "mla"):
        assert h100.attention(device, family, "mixed") == h100.attention(device, family, "decode")
    # Latent attention has no such constants here either.
    assert h100.attention(DEVICE, "mla", "mixed") == h100.attention(DEVICE, "mla", "decode")
    assert h100.attention(DEVICE, "gqa", "mixed") == DEVICE.kernels.gqa_mixed


def test_another_models_profile_is_refused() -> None:
    rows = pd.DataFrame({"tokens": [1, 8], "activated_experts": [4, 200], "time_us": [10.0, 20.0]})
    with pytest.raises(ValueError, match="not Qwen3-30B-A3B"):
        profile.read(rows)


# All-gather ---------------------------------------------------------------------------------------------------------


def test_all_gather_moves_every_token_to_every_rank() -> None:
    law, network = AllGather(), build_network(cluster("rtx_pro_6000"), 2)
    tokens = np.array([[100.0, 40.0], [10.0, 30.0]])  # 100 and 30 of two ranks, themselves included
    fixed = {"node_tokens": np.zeros((2, 1)), "bytes_per_token": 4096.0, "mode": "normal"}
    seconds, reaches = law.pair_times_s(network, rank_tokens=tokens, **fixed)  # type: ignore[arg-type]
    wire = 100 * 4096.0 / 25.7e9
    assert seconds[0, 1] == seconds[1, 0] == pytest.approx(law.start_s + law.step_s + wire)
    assert reaches.tolist() == [[False, True], [True, False]] and seconds[0, 0] == 0
    # Whom the tokens are for does not matter.
    same_rows = law.pair_times_s(network, rank_tokens=[[100, 1], [30, 0]], **fixed)[0]  # type: ignore[arg-type]
    np.testing.assert_array_equal(seconds, same_rows)
    batch, _ = law.pair_times_s(network, rank_tokens=[tokens, 2 * tokens], node_tokens=np.zeros((2, 2, 1)), bytes_per_token=4096.0, mode="normal")  # fmt: skip
    np.testing.assert_array_equal(batch[0], seconds)
    assert batch[1, 0, 1] - batch[0, 0, 1] == pytest.approx(wire)
    idle, none = law.pair_times_s(network, rank_tokens=np.zeros((2, 2)), **fixed)  # type: ignore[arg-type]
    assert not none.any() and not idle.any()
    with pytest.raises(ValueError, match="mode must be normal"):
        law.pair_times_s(network, rank_tokens=tokens, **fixed | {"mode": "low_latency"})  # type: ignore[arg-type]


# NCCL 2.29.2 on 2, 4 and 8 GPUs of a node, half precision: elements of the result, us (aiconfigurator-core 0.12.0).
NCCL = [
    (2, 256, 5.9, 5.3), (2, 524_288, 31.2, 31.2), (2, 4_194_304, 145.5, 153.6),
    (4, 256, 9.4, 9.5), (4, 4_194_304, 278.1, 280.6), (8, 256, 14.2, 14.7), (8, 4_194_304, 338.6, 347.3),
]  # fmt: skip


@pytest.mark.parametrize(("size", "elements", "gather", "scatter"), NCCL)
def test_all_gather_takes_what_nccl_takes(size: int, elements: int, gather: float, scatter: float) -> None:
    network = build_network(cluster("rtx_pro_6000"), size)
    tokens = np.full((size, size), elements / size)
    seconds, _ = AllGather().pair_times_s(network, rank_tokens=tokens, node_tokens=np.zeros((size, 1)), bytes_per_token=2.0, mode="normal")  # fmt: skip
    assert seconds.max() * 1e6 == pytest.approx((gather + scatter) / 2, rel=0.45 if elements < 1000 else 0.2)


# The run ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Of every request: tokens in and out, seconds of arrival, first and last token."""

    inputs: I64
    outputs: I64
    arrival: F64
    first: F64
    last: F64

    @property
    def tpot_ms(self) -> F64:
        return 1e3 * (self.last - self.first) / (self.outputs - 1)

    @property
    def ttft_s(self) -> F64:
        return self.first - self.arrival


@pytest.fixture(scope="module")
def measured(folder: Path) -> Run:
    lines = [json.loads(line) for line in (folder / "rtxpro6000_Llama-3.1-8B_requests.jsonl").read_text().splitlines()]
    column = {name: np.array([line[name] for line in lines]) for name in lines[0] if name != "request_id"}
    start = column["queued_ts"][0]
    times = (column[name] - start for name in ("queued_ts", "first_token_ts", "last_token_ts"))
    return Run(column["input_toks"], column["output_toks"], *times)


GRAPHS = np.array([1, 2, 4, *range(8, 257, 8)])


class Step:
    """Seconds of a step of the dense model."""

    def __init__(self, model: Model, device: Device, mixed: bool = True) -> None:
        self.model, self.device, self.mixed = model, device, mixed
        self.known: dict[tuple[int, int], float] = {}

    def trunk(self, tokens: int, sampled: int) -> float:
        if (tokens, sampled) not in self.known:
            m, shape = self.model, attention_shape(self.model, "decode")
            h, wide, width = (
                m.hidden_size,
                m.intermediate_size or 0,
                shape.num_heads * shape.qk_dim + shape.cache_elements,
            )

            def product(rows: int, k: int, n: int) -> float:
                return float(COST.gemm_s(self.device, tokens=rows, in_features=k, out_features=n, dtype="bf16"))

            layer = product(tokens, h, width) + product(tokens, shape.num_heads * shape.v_dim, h)
            layer += product(tokens, h, 2 * wide) + product(tokens, wide, h)
            layer += float(norm_s(COST, self.device, tokens=tokens, hidden_size=h))
            layer += float(swiglu_s(COST, self.device, pairs=tokens, moe_intermediate_size=wide, dtype="bf16"))
            layer += float(COST.elementwise_s(self.device, bytes=tokens * width * 4.0, kernels=2))
            self.known[tokens, sampled] = m.num_hidden_layers * layer + product(sampled, h, m.vocab_size)
        return self.known[tokens, sampled]

    def __call__(self, contexts: list[int], chunks: list[tuple[int, int]], sampled: int) -> float:
        tokens = len(contexts) + sum(new for new, _ in chunks)
        if tokens <= GRAPHS[-1]:
            tokens = int(GRAPHS[np.searchsorted(GRAPHS, tokens)])
        core, shape = 0.0, attention_shape(self.model, "decode")
        fixed: dict[str, Any] = {"shape": shape}
        if contexts:
            phase = "mixed" if chunks and self.mixed else "decode"
            core += float(COST.attention_s(self.device, phase=phase, query_tokens=np.ones(len(contexts)), kv_tokens=contexts, **fixed))  # type: ignore[arg-type]  # fmt: skip
        if chunks:
            new, context = zip(*chunks, strict=True)
            core += float(COST.attention_s(self.device, phase="prefill", query_tokens=new, kv_tokens=context, **fixed))
        return self.trunk(tokens, max(sampled, 1)) + self.model.num_hidden_layers * core


def replayed(asked: Run, step: Step, host_s: float, seats: int = 128, budget: int = 2048) -> Run:
    """vLLM's scheduler on one GPU: running requests first, then waiting ones in order, prompts cut at the budget."""
    n = len(asked.arrival)
    computed, given = [0] * n, [0] * n
    first, last = np.zeros(n), np.zeros(n)
    waiting, running, coming, now = list[int](), list[int](), 0, 0.0
    while coming < n or waiting or running:
        if not waiting and not running:
            now = max(now, float(asked.arrival[coming]))
        while coming < n and asked.arrival[coming] <= now:
            waiting.append(coming)
            coming += 1
        contexts, chunks, plan = list[int](), list[tuple[int, int]](), list[tuple[int, int]]()
        left, at = budget, 0
        while left:
            if at == len(running):
                if not waiting or len(running) == seats:
                    break
                running.append(waiting.pop(0))
            i, at = running[at], at + 1
            new = 1 if given[i] else min(int(asked.inputs[i]) - computed[i], left)
            left -= new
            plan.append((i, new))
            if given[i]:
                contexts.append(int(asked.inputs[i]) + given[i])
            else:
                chunks.append((new, computed[i] + new))
        sampled = sum(given[i] > 0 or computed[i] + new == asked.inputs[i] for i, new in plan)
        now += step(contexts, chunks, sampled) + host_s
        for i, new in plan:
            if not given[i]:
                computed[i] += new
                if computed[i] < asked.inputs[i]:
                    continue
                first[i] = now
            given[i] += 1
            if given[i] == asked.outputs[i]:
                last[i] = now
                running.remove(i)
    return Run(asked.inputs, asked.outputs, asked.arrival, first, last)


def missed(ours: Run, theirs: Run) -> dict[str, float]:
    """Relative error of mean TPOT and of median TTFT."""
    tpot = ours.tpot_ms.mean() / theirs.tpot_ms.mean() - 1
    return {"tpot": float(tpot), "ttft": float(np.median(ours.ttft_s) / np.median(theirs.ttft_s) - 1)}


def test_a_plain_loop_predicts_the_run_from_kernels_alone(measured: Run) -> None:
    """Nothing of the run enters: neither its host overhead nor its model was fitted."""
    error = missed(replayed(measured, Step(LLAMA, DEVICE), 0.0), measured)
    assert abs(error["tpot"]) < 0.05 and abs(error["ttft"]) < 0.25, error


def test_the_engine_predicts_the_run(measured: Run, folder: Path) -> None:
    """The bars of the project, without any host overhead and with the one set on the first hundred requests; and the
    engine, which knows contexts only as sums, follows the plain loop."""
    plain = replayed(measured, Step(LLAMA, DEVICE), 0.0)
    bare = serving_dense.replayed(SCENARIOS, folder / serving_dense.REQUESTS, host_overhead_s=0.0)
    np.testing.assert_allclose(bare.tpot_ms.mean(), plain.tpot_ms.mean(), rtol=0.01)
    np.testing.assert_allclose(np.median(bare.ttft_s), np.median(plain.ttft_s), rtol=0.02)
    np.testing.assert_allclose(bare.tpot_ms, plain.tpot_ms, rtol=0.08)
    ours, seen = serving_dense.replayed(SCENARIOS, folder / serving_dense.REQUESTS), measured
    for found in (bare, ours):
        assert found.tpot_ms.mean() == pytest.approx(seen.tpot_ms.mean(), rel=0.05)
        assert np.median(found.ttft_s) == pytest.approx(np.median(seen.ttft_s), rel=0.25)
    rest = slice(serving_dense.CALIBRATED, None)
    assert ours.tpot_ms[rest].mean() == pytest.approx(seen.tpot_ms[rest].mean(), rel=0.02)
    assert ours.tpot_ms[:100].mean() == pytest.approx(seen.tpot_ms[:100].mean(), rel=0.01)


def test_the_run_needs_mixed_batches(measured: Run) -> None:
    """Decodes beside prompts at the price of decodes alone would make the run 4 % faster, and worse predicted."""
    whole, apart = (missed(replayed(measured, Step(LLAMA, DEVICE, mixed), 0.0), measured) for mixed in (True, False))
    assert apart["tpot"] < whole["tpot"] - 0.03 and abs(apart["ttft"]) > abs(whole["ttft"])


# Qwen3-30B-A3B on two devices ----------------------------------------------------------------------------------------


def test_two_devices_serve_qwen() -> None:
    """What was predicted before any run of this model was seen: 43 ms per token, half of it experts. Per layer the wire
    carries the tokens of the other rank twice; of two ranks the one with more counts, which has at most all of them."""
    found = run(load(SCENARIOS / "qwen3_30b_ep2.yaml"))
    service = {name: values[0] for name, values in found.tables["service"].items()}
    assert service["tpot_mean_s"] == pytest.approx(42.9e-3, rel=0.05)
    assert service["ttft_p50_s"] == pytest.approx(0.09, rel=0.25)
    assert 0.4 < service["experts_s"] / service["iteration_s"] < 0.6
    law, layers = AllGather(), 48
    tokens = (service["prompt_tokens_per_s_per_gpu"] + service["output_tokens_per_s_per_gpu"]) * service["iteration_s"]
    start, wire = 2 * layers * (law.start_s + law.step_s), 2 * layers * tokens * 4096 / 25.7e9
    assert start + wire < service["communication_s"] < start + 2 * wire
