"""Sixty-odd typical mistakes: each gives its located message, status 2, no traceback, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.loading import load
from sim.run import main
from sim.scenario import Scenario
from sim.yamlfile import ScenarioError

ROOT = Path(__file__).resolve().parents[1]
BASE = """\
name: base
model:
  extends: models/deepseek_v2_lite.yaml
  num_hidden_layers: 4
cluster:
  extends: clusters/h800.yaml
  nodes: 2
parallel: {ep_size: 16}
traffic:
  kind: affinity
  tokens_per_rank: 64
  sequence_length: 32
steps:
  count: 1
schedule: {phase: forward, overlap: none}
policies:
  - name: a
    select: topk
  - name: b
    select: {kind: group_limited, n_group: 8, topk_group: 3}
"""

# (name, text to replace, replacement, line:column of the complaint, words of the complaint)
MISTAKES = [
    ("typo in a top-level key", "steps:", "step:", "13:1", "step: unknown key [got {'count': 1}] (did you mean steps?)"),
    ("typo in a nested key", "ep_size: 16", "ep_sise: 16", "8:12", "parallel.ep_sise: unknown key [got 16] (did you mean ep_size?)"),
    ("typo in a model key", "num_hidden_layers", "num_hiden_layers", "4:3", "model.num_hiden_layers: unknown key [got 4] (did you mean num_"),
    ("typo in a plug-in key", "topk_group: 3", "topk_grp: 3", "20:47", "topk_grp: unknown key [got 3] (did you mean topk_group?)"),
    ("typo in a policy key", "select: topk", "selekt: topk", "18:5", "did you mean select?"),
    ("typo in a kind", "select: topk", "select: topkk", "18:5", "(did you mean topk?)"),
    ("typo in the traffic kind", "kind: affinity", "kind: afinity", "10:3", "(did you mean affinity?)"),
    ("typo in a choice", "phase: forward", "phase: foward", "15:12", "did you mean forward?"),
    ("unknown placement", "select: topk", "placement: eplbb", "18:5", "linear, lplb, random, round_robin [got 'eplbb'] (did you mean eplb?)"),
    ("a number as text", "count: 1", "count: one", "14:3", "steps.count: must be an integer [got 'one']"),
    ("a fraction for a count", "count: 1", "count: 1.5", "14:3", "steps.count"),
    ("a list for a number", "count: 1", "count: [1]", "14:3", "steps.count: must be an integer"),
    ("a boolean for text", "name: base", "name: true", "1:1", "name: must be text [got True]"),
    ("negative count", "count: 1", "count: -1", "14:3", "steps.count: must be > 0 [got -1]"),
    ("zero tokens", "tokens_per_rank: 64", "tokens_per_rank: 0", "11:3", "must be > 0 [got 0]"),
    ("negative seed", "name: base", "name: base\nseed: -3", "2:1", "seed: must be >= 0 [got -3]"),
    ("zero replicas", "name: base", "name: base\nreplicas: 0", "2:1", "replicas: must be > 0 [got 0]"),
    ("negative rate", "select: topk", "balance: {kind: bias, bias_update_rate: -1}", "18:27", "bias_update_rate: must be >= 0 [got -1]"),
    ("NaN", "sequence_length: 32", "logit_scale: .nan", "12:16", "finite"),
    ("infinity", "sequence_length: 32", "logit_scale: .inf", "12:16", "finite"),
    ("overflow", "sequence_length: 32", "logit_scale: 1e400", "12:16", "finite"),
    ("correlation of one", "sequence_length: 32", "slow_correlation: 1.0", "12:3", "must be < 1 [got 1.0]"),
    ("wrong unit for bandwidth", "  nodes: 2", "  nodes: 2\n  intra_node: {bandwidth_bytes_per_s: 200 GB}", "8:16", "not a quantity in B/s"),
    ("wrong unit for latency", "  nodes: 2", "  nodes: 2\n  intra_node: {latency_s: 5 GB}", "8:16", "such as '2.8 us'"),
    ("bandwidth without unit text", "  nodes: 2", "  nodes: 2\n  intra_node: {bandwidth_bytes_per_s: fast}", "8:16", "not a quantity in B/s"),
    ("achievable above nominal", "  nodes: 2", "  nodes: 2\n  intra_node: {achievable_bytes_per_s: 900 GB/s}", "8", "exceeds the nominal"),
    ("k above E", "  num_hidden_layers: 4", "  num_hidden_layers: 4\n  num_experts_per_tok: 65", "5:3", "num_experts_per_tok"),
    ("zero experts per token", "  num_hidden_layers: 4", "  num_hidden_layers: 4\n  num_experts_per_tok: 0", "5:3", "num_experts_per_tok"),
    ("E not divisible by n_group", "  num_hidden_layers: 4", "  num_hidden_layers: 4\n  n_group: 7", "5:3", "n_group"),
    ("model topk_group above n_group", "  num_hidden_layers: 4", "  num_hidden_layers: 4\n  topk_group: 9", "5:3", "topk_group"),
    ("n_group of zero", "  num_hidden_layers: 4", "  num_hidden_layers: 4\n  n_group: 0", "5:3", "n_group: must be >= 1 [got 0]"),
    ("unknown score function", "  num_hidden_layers: 4", "  num_hidden_layers: 4\n  scoring_func: sigmoit", "5:3", "did you mean sigmoid?"),
    ("select group not dividing", "n_group: 8", "n_group: 7", "20:35", "policies.1.select.n_group: must divide n_routed_experts = 64 [got 7]"),
    ("select more groups than there are", "topk_group: 3", "topk_group: 9", "20:47", "topk_group: must be <= n_group = 8 [got 9]"),
    ("groups too small for k", "n_group: 8, topk_group: 3", "n_group: 64, topk_group: 3", "20:48", "3 groups hold 3 experts, fewer than num_experts_per_tok = 6"),
    ("EP not dividing E", "ep_size: 16", "ep_size: 12", "8:12", "parallel.ep_size"),
    ("EP above the devices", "ep_size: 16", "ep_size: 32", "8:12", "2 nodes x 8 = 16 [got 32]"),
    ("EP not filling nodes", "ep_size: 16", "ep_size: 10", "8:12", "must fill whole nodes of 8 devices [got 10]"),
    ("TP not dividing the node", "ep_size: 16", "ep_size: 16, tp_size: 3", "8:25", "must divide devices_per_node = 8 [got 3]"),
    ("more stages than layers", "ep_size: 16", "ep_size: 16, pp_size: 9", "8:25", "must be <= num_hidden_layers = 4 [got 9]"),
    ("micro-batches not dividing", "overlap: none", "overlap: none, micro_batches: 3", "15:43", "must divide traffic.tokens_per_rank = 64 [got 3]"),
    ("overlap without a backward", "overlap: none", "overlap: forward_backward", "15:28", "forward_backward needs phase: training"),
    ("warm-up on too many ranks", "count: 1", "count: 1\n  warmup: {steps: 2, ranks: 99}", "15:22", "must be <= parallel.ep_size = 16 [got 99]"),
    ("two policies of one name", "- name: b\n", "- name: a\n", "19:5", "another policy is called 'a' [got 'a']"),
    ("no policies", "policies:\n  - name: a\n    select: topk\n  - name: b\n    select: {kind: group_limited, n_group: 8, topk_group: 3}", "policies: []", "16:1", "policies"),
    ("policies missing", "policies:\n  - name: a\n    select: topk\n  - name: b\n    select: {kind: group_limited, n_group: 8, topk_group: 3}", "seed: 1", "1:1", "policies: is required"),
    ("policy without a name", "  - name: a\n    select: topk", "  - select: topk", "17:5", "name: is required"),
    ("traffic missing", "traffic:\n  kind: affinity\n  tokens_per_rank: 64\n  sequence_length: 32\n", "", "1:1", "traffic: is required"),
    ("model missing", "model:\n  extends: models/deepseek_v2_lite.yaml\n  num_hidden_layers: 4\n", "", "1:1", "model: is required"),
    ("replay without a trace", "kind: affinity\n  tokens_per_rank: 64\n  sequence_length: 32", "kind: replay", "9:1", "traffic.path: is required"),
    ("recorded choices of generated traffic", "select: topk", "select: recorded", "18:5", "select recorded needs ids, traffic affinity provides logits"),
    ("a gate format the device lacks", "clusters/h800.yaml", "clusters/a100.yaml", "1:1", "has no fp8 tensor peak"),
    ("two topics of one name", "sequence_length: 32", "topic_tree: [{name: x}, {name: x}]", "9:1", "traffic: two topics are called 'x'"),
    ("a topic of no weight", "sequence_length: 32", "topic_tree: [{name: x, weight: 0}]", "12:26", "must be > 0 [got 0]"),
    ("model file missing", "models/deepseek_v2_lite.yaml", "models/deepseek_v2_light.yaml", "3:3", "no such file [got 'models/deepseek_v2_light.yaml'] (did you mean deepseek_v2_lite.yaml?)"),
    ("cluster folder named", "clusters/h800.yaml", "clusters", "6:3", "cluster: is not a file [got 'clusters']"),
    ("path out of the folder", "models/deepseek_v2_lite.yaml", "../outside.yaml", "3:3", "model: leaves the folder .: files named in a file must stay inside it [got '../outside.yaml']"),
    ("absolute path", "models/deepseek_v2_lite.yaml", "/etc/hostname", "3:3", "leaves the folder .: files named in a file must stay inside it [got '/etc/hostname']"),
    ("tab indent", "  count: 1", "\tcount: 1", "14:1", "tab"),
    ("duplicate key", "name: base", "name: base\nname: again", "2:1", "name"),
    ("python tag", "count: 1", "count: !!python/object:os.system 1", "14:10", "tag"),
    ("unclosed bracket", "{ep_size: 16}", "{ep_size: 16", "", ""),
    ("not a mapping", BASE, "- 1\n- 2\n", "1:1", "mapping"),
    ("empty file", BASE, "", "1:1", ""),
    ("two documents", "name: base", "name: base\n---\nname: other", "2:1", "document"),
    ("NUL byte", "name: base", "name: ba\0se", "", "NUL"),
    ("deep nesting", "name: base", "name: " + "[" * 200, "", "deep"),
    ("typo in a device key", "  nodes: 2", "  nodes: 2\n  device: {n_sms: 100}", "8:12", "cluster.device.n_sms: unknown key [got 100] (did you mean n_sm?)"),
    ("typo in the warm-up", "count: 1", "count: 1\n  warmup: {step: 2}", "15:12", "steps.warmup.step: unknown key [got 2] (did you mean steps?)"),
    ("typo in the schedule", "overlap: none", "overlaps: none", "15:28", "schedule.overlaps: unknown key [got 'none'] (did you mean overlap?)"),
    ("typo in a rule of balance", "select: topk", "balance: [{kind: bias, rul: sign}]", "18:28", "policies.0.balance.0.rul: unknown key [got 'sign'] (did you mean rule?)"),
    ("typo in a kernel's constants", "  nodes: 2", "  nodes: 2\n  device: {kernels: {grouped_gemm_fp8: {overhead: 1 us}}}", "8:41", "unknown key [got '1 us'] (did you mean overhead_s?)"),
    ("typo in the topology", "  nodes: 2", "  nodes: 2\n  topology: full_mess", "8:3", "(did you mean full_mesh?)"),
    ("typo in a cost", "schedule:", "cost: {compute: rooflin}\nschedule:", "15:8", "(did you mean roofline?)"),
    ("an option of another kind", "select: topk", "select: {kind: topk, n_group: 2}", "18:26", "n_group: unknown key"),
    ("wrong unit for memory", "  nodes: 2", "  nodes: 2\n  device: {memory_bytes: 80 GB/s}", "8:12", "such as '80 GB' [got '80 GB/s']"),
    ("wrong unit for FLOP/s", "  nodes: 2", "  nodes: 2\n  device: {peak_flops_per_s: {bf16: 989 TB/s}}", "8:31", "such as '989 TFLOP/s' [got '989 TB/s']"),
    ("negative latency", "  nodes: 2", "  nodes: 2\n  intra_node: {latency_s: -1 us}", "8:16", "latency_s: must be >= 0"),
    ("the spine nearer than the leaf", "  nodes: 2", "  nodes: 2\n  inter_node: {cross_leaf_latency_s: 1 us}", "8", "below latency_s"),
    ("nodes without a link", "  nodes: 2", "  nodes: 2\n  inter_node: null", "8:3", "cluster.inter_node: 2 nodes need a link between them"),
    ("zero nodes", "  nodes: 2", "  nodes: 0", "7:3", "cluster.nodes: must be > 0 [got 0]"),
    ("a fraction of a node", "  nodes: 2", "  nodes: 1.5", "7:3", "cluster.nodes: must be an integer [got 1.5]"),
    ("experts beyond int16", "  num_hidden_layers: 4", "  num_hidden_layers: 4\n  n_routed_experts: 40000", "5:3", "must be <= 32767 [got 40000]"),
    ("no layer with experts", "  num_hidden_layers: 4", "  num_hidden_layers: 4\n  first_k_dense_replace: 4", "2:1", "leave no layer with experts"),
    ("a dense select of too few layers", "select: topk", "model: models/dense_37b.yaml\n    select: topk", "19:5", "takes select: dense"),
    ("a group that does not divide for one policy", "select: topk", "parallel: {ep_size: 12}", "18:16", "must fill whole nodes of 8 devices [got 12]"),
    ("replicas that do not divide", "select: topk", "placement: {kind: eplb, num_redundant_experts: 3}", "18:29", "slots must be a multiple of ep_size = 16"),
    ("a rule for seconds in a run of steps", "select: topk", "rebalance: {interval_s: 5}", "18:17", "is for runs with a serving block; set interval_steps"),
    ("TP above the group", "{ep_size: 16}", "{ep_size: 2, tp_size: 8}", "8:24", "must divide ep_size = 2 [got 8]"),
    ("warm-up batch below the micro-batches", "count: 1", "count: 1\n  warmup: {steps: 2, tokens_per_rank: 0}", "15:22", "must be > 0 [got 0]"),
    ("warm-up too small to split", "count: 1\nschedule: {", "count: 1\n  warmup: {steps: 2, tokens_per_rank: 3}\nschedule: {micro_batches: 4, ", "15:22", "must be at least schedule.micro_batches = 4 [got 3]"),
    ("a gain that shrinks", "count: 1", "count: 1\n  warmup: {gain: 0.5}", "15:12", "must be >= 1 [got 0.5]"),
    ("too many micro-batches", "overlap: none", "overlap: none, micro_batches: 4097", "15:43", "must be <= 4096 [got 4097]"),
    ("a name that is a path", "name: base", "name: ../../base", "1:1", "must match the pattern"),
    ("an empty name", "name: base", 'name: ""', "1:1", "name: must have at least 1 characters"),
    ("a policy name too long", "- name: b\n", f"- name: {'b' * 41}\n", "19:5", "must have at most 40 characters"),
    ("policies as a mapping", "policies:\n  - name: a\n    select: topk\n  - name: b\n    select: {kind: group_limited, n_group: 8, topk_group: 3}", "policies: {a: {}}", "16:1", "policies: must be a list"),
    ("null for a mapping", "  kind: affinity\n  tokens_per_rank: 64\n  sequence_length: 32\n", "", "9:1", "traffic: must be a mapping with a kind, or one of"),
    ("an unknown leaf in a shift", "sequence_length: 32", "shifts: [{weights: {chemistry: 1}}]", "12", "traffic.shifts"),
    ("an integer beyond 64 bits", "name: base", "name: base\nseed: 99999999999999999999", "2:7", "must fit 64 bits"),
    ("a seed too large", "name: base", "name: base\nseed: 9223372036854775808", "2:1", "must be < 9223372036854775808"),
    ("extends in a circle", "models/deepseek_v2_lite.yaml", "base.yaml", "3:3", "extends goes in a circle"),
    ("a merge key", "name: base", "name: base\n<<: {seed: 1}", "2:1", "merge keys (<<) are not supported: use extends"),
    ("a key that is no text", "count: 1", "1: count", "14:3", "keys must be text: quote this one [got 1]"),
    ("a key without a value mark", "  count: 1", "  count 1", "13:1", "steps: must be a mapping [got 'count 1']"),
    ("bad indentation", "  tokens_per_rank: 64", " tokens_per_rank: 64", "11:2", "the indentation fits no line above"),
    ("an alias without its anchor", "count: 1", "count: *one", "14:10", "an alias without an anchor before it [got *one]"),
    ("an invisible control character", "name: base", "name: ba\x07se", "1:9", "the character U+0007 is not allowed"),
]  # fmt: skip

OVERRIDES = [
    ("no equals sign", "steps.count", "steps.count"),
    ("unknown key", "steps.cuont=1", "(did you mean count?)"),
    ("index beyond the list", "policies.7.name=x", "policies is a list of 2"),
    ("index into a mapping", "steps.0=1", "steps.0"),
    ("empty key", "=3", "=3"),
    ("wrong type", "seed=abc", "seed: must be an integer [got 'abc']"),
    ("missing trace", "traffic={kind: replay, path: nowhere.npz, tokens_per_rank: 64}", "nowhere.npz"),
]


@pytest.fixture()
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("models", "clusters"):
        shutil.copytree(ROOT / "scenarios" / folder, tmp_path / "in" / folder)
    (tmp_path / "outside.yaml").write_text("name: x\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path


def refuse(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["base.yaml", "--out", str(place / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err and captured.err.strip()
    assert not (place / "out").exists()
    return captured.err


def test_the_base_is_good(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "in" / "base.yaml").write_text(BASE, encoding="utf-8")
    assert main(["base.yaml", "--out", "-"]) == 0
    assert len(MISTAKES) + len(OVERRIDES) >= 60


@pytest.mark.parametrize(("old", "new", "where", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistake(place: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, where: str, words: str) -> None:
    assert old in BASE
    (place / "in" / "base.yaml").write_text(BASE.replace(old, new, 1), encoding="utf-8")
    lines = refuse(place, capsys).splitlines()
    hits = [line for line in lines if words in line]
    assert hits, lines
    assert any(line.startswith(f"base.yaml:{where}") for line in hits), hits


@pytest.mark.parametrize(("override", "words"), [o[1:] for o in OVERRIDES], ids=[o[0] for o in OVERRIDES])
def test_override(place: Path, capsys: pytest.CaptureFixture[str], override: str, words: str) -> None:
    (place / "in" / "base.yaml").write_text(BASE, encoding="utf-8")
    assert words in refuse(place, capsys, "--set", override)


def test_missing_scenario_and_too_large_a_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "base.yaml" in refuse(place, capsys)
    text = BASE.replace("models/deepseek_v2_lite.yaml\n  num_hidden_layers: 4", "models/deepseek_v3.yaml")
    text = text.replace("phase: forward", "phase: training")
    (place / "in" / "base.yaml").write_text(text, encoding="utf-8")
    message = refuse(place, capsys)
    (first,) = message.splitlines()  # both policies have this model and this split: said once
    assert first.startswith("base.yaml:7:1: parallel: policy 'a' does not fit: weights ")
    assert first.endswith("what helps: schedule.recompute: selective, larger pp_size or ep_size, more micro_batches")
    sizes = [float(size) for size in re.findall(r"([\d.]+) GB", first)]
    *items, total, room, excess = [*sizes[:-3], *sizes[-3:]]
    items += [float(size) / 1e3 for size in re.findall(r"([\d.]+) MB", first)]
    assert sum(items) == pytest.approx(total, rel=0.01)  # the arithmetic shown adds up
    assert room == pytest.approx(80 * 2**30 / 1e9, rel=0.01) and excess == pytest.approx(total - room, rel=0.01)


def test_a_symlink_does_not_lead_outside(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "in" / "models" / "link.yaml").symlink_to(place / "outside.yaml")
    (place / "in" / "base.yaml").write_text(BASE.replace("deepseek_v2_lite", "link"), encoding="utf-8")
    assert refuse(place, capsys).startswith("base.yaml:3:3: model: leaves the folder")


def test_an_alias_bomb(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else '1'}]\n" for i in range(12))
    (place / "in" / "base.yaml").write_text(bomb + BASE, encoding="utf-8")
    assert "base.yaml:" in refuse(place, capsys)


def test_all_problems_at_once_in_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BASE.replace("ep_size", "ep_sise").replace("count: 1", "count: 0").replace("select: topk", "select: topq")
    (place / "in" / "base.yaml").write_text(text, encoding="utf-8")
    lines = refuse(place, capsys).splitlines()
    assert [line.split(":")[1] for line in lines] == ["8", "14", "18"]


def test_too_big_is_refused_with_the_estimate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "in" / "base.yaml").write_text(BASE, encoding="utf-8")
    message = refuse(place, capsys, "--set", "steps.count=1000000", "--set", "traffic.tokens_per_rank=4096")
    assert "too big" in message and "steps.count = 1000000" in message and "--force" in message


def test_recorded_traffic_only_for_recorded_choices(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BASE.replace("kind: affinity", "kind: replay").replace("sequence_length: 32", "path: trace.npz")
    text = text.replace("select: topk", "select: recorded\n    balance: bias")
    (place / "in" / "base.yaml").write_text(text, encoding="utf-8")
    lines = refuse(place, capsys).splitlines()
    missing = (place / "in" / "trace.npz").resolve()
    assert lines[0] == f"base.yaml:9:1: traffic: {missing}: expected a trace file, found none"
    assert lines[1].startswith("base.yaml:19:5: policies.0.balance: recorded choices cannot be balanced after the fact")
    assert lines[2].startswith("base.yaml:21:5: policies.1.select: select group_limited needs logits, traffic replay")
    assert len(lines) == 3


@pytest.mark.parametrize("path", ["../trace.npz", "/etc/hostname", "models/../../trace.npz", "away/trace.npz", '"a\\0b"'])
def test_a_trace_lies_in_the_folder(place: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    (place / "trace.npz").write_bytes(b"not a trace")
    (place / "in" / "away").symlink_to(place)
    text = BASE.replace("kind: affinity", "kind: replay").replace("sequence_length: 32", f"path: {path}")
    (place / "in" / "base.yaml").write_text(text, encoding="utf-8")
    message = refuse(place, capsys)
    assert message.startswith("base.yaml:12:3: traffic.path: ") and len(message.splitlines()) == 1
    inside = "a trace named in a file must lie in its folder"
    assert (inside in message) == ("\\0" not in path)


HF_CONFIG = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_local_experts": 64,
    "num_experts_per_tok": 6,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_local_experts": None}, "expert"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"num_local_experts": 4}, "num_experts_per_tok"),
        ({"num_local_experts": "many"}, "num_local_experts"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
    ],
)
def test_published_configs(
    place: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], words: str
) -> None:
    text = BASE.replace("models/deepseek_v2_lite.yaml\n  num_hidden_layers: 4", "config.json")
    (place / "in" / "base.yaml").write_text(text, encoding="utf-8")
    config = {key: value for key, value in (HF_CONFIG | change).items() if value is not None}
    (place / "in" / "config.json").write_text(json.dumps(HF_CONFIG), encoding="utf-8")
    assert main(["base.yaml", "--out", "-", "--dry-run"]) == 0
    capsys.readouterr()
    (place / "in" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = refuse(place, capsys)
    assert words in message and message.startswith(("config.json:", "base.yaml:"))


def test_problems_of_several_files_and_scenarios(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "in" / "base.yaml").write_text(BASE.replace("count: 1", "count: 0"), encoding="utf-8")
    (place / "in" / "other.yaml").write_text(BASE.replace("nodes: 2", "nodes: -2"), encoding="utf-8")
    assert refuse(place, capsys, "other.yaml").splitlines() == [
        "base.yaml:14:3: steps.count: must be > 0 [got 0]",
        "other.yaml:7:3: cluster.nodes: must be > 0 [got -2]",
    ]


def test_rules_between_parts_come_in_line_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BASE.replace("ep_size: 16", "ep_size: 16, tp_size: 3").replace("overlap: none", "micro_batches: 3")
    text = text.replace("- name: b\n", "- name: a\n").replace("topk_group: 3", "topk_group: 9")
    (place / "in" / "base.yaml").write_text(text, encoding="utf-8")
    lines = refuse(place, capsys).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "base.yaml:8:25", "base.yaml:15:28", "base.yaml:19:5", "base.yaml:20:47",
    ]  # fmt: skip


PARTS = [line.strip(" -") for line in BASE.splitlines()] + [
    "extends: base.yaml", "null", "~", "[]", "{}", "0", "-1", "1e400", ".nan", "1e308", "9" * 30, "5 GB/s", "''",
    "!!int x", "&a 1", "*a", "<<: *a", "\t", "---", "? x", "kind: replay", "kind: dense", "n_group: 0",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz")
    for name in ("models", "clusters"):
        shutil.copytree(ROOT / "scenarios" / name, place / name)
    return place


def ends_in_a_scenario_or_its_error(folder: Path, text: str) -> None:
    (folder / "base.yaml").write_text(text, encoding="utf-8")
    try:
        assert isinstance(load(folder / "base.yaml"), Scenario)
    except ScenarioError as error:
        assert error.problems and all(problem.where and problem.rule for problem in error.problems)
        assert len(str(error).splitlines()) == len(error.problems)


@given(st.integers(0, len(BASE)), st.integers(0, 12), st.text(max_size=4) | st.sampled_from(list(":-[]{}#&*!|>'\"%@`\n\t")))
def test_fuzzed_characters(folder: Path, position: int, cut: int, new: str) -> None:
    text = BASE[:position] + new.encode("utf-8", "replace").decode() + BASE[position + cut :]
    ends_in_a_scenario_or_its_error(folder, text)


@given(st.lists(st.tuples(st.integers(0, 19), st.booleans(), st.sampled_from(PARTS)), min_size=1, max_size=3))
def test_fuzzed_lines(folder: Path, edits: list[tuple[int, bool, str]]) -> None:
    lines = BASE.splitlines()
    for number, whole, part in edits:
        key, colon, _ = lines[number].partition(": ")
        indent = lines[number][: len(lines[number]) - len(lines[number].lstrip(" "))]
        lines[number] = indent + part if whole or not colon else f"{key}: {part}"
    ends_in_a_scenario_or_its_error(folder, "\n".join(lines) + "\n")


@pytest.mark.parametrize("k", [31, 33])
def test_experts_per_token_that_the_model_cannot_serve(k: int, capsys: pytest.CaptureFixture[str]) -> None:
    """tiny.yaml: 32 experts, of which the one kept group holds 16."""
    tiny = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
    assert main([str(tiny), "--set", f"policies.1.num_experts_per_tok={k}", "--out", "-"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "policies.1.num_experts_per_tok: " in err and f"[got {k}]" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("router_dynamics=[{kind: bias}]", "router_dynamics.0: bias balances a gate: put it into a policy's balance"),
        ("policies.1.balance=[quantile, bias]", "policies.1.balance.0: quantile ranks by its own thresholds alone: not beside bias"),
        ("policies.1.select={kind: threshold, min_experts: 99}", "min_experts: must be <= max_experts = 8"),
        ("steps.warmup.gain=1e300", "steps.warmup.gain: must be <= 1"),
    ],
)  # fmt: skip
def test_pieces_that_do_not_go_together(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
    assert main([str(tiny), "--set", override, "--out", "-"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
