"""Presets (`scenarios/policies`): complete compositions, equal to what the models' configs say, and gates that route."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sim import yamlfile
from sim.gating import Gate, Gating
from sim.gating.balance import Sample, Seen
from sim.gating.select.group_limited import GroupLimited
from sim.kernels import plain
from sim.loading import load
from sim.model import Model
from sim.rng import stream
from sim.settings import Policy
from sim.tokens import F32, Routing, Tokens
from sim.yamlfile import ScenarioError

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
PRESETS = sorted(path.stem for path in (SCENARIOS / "policies").glob("*.yaml"))
# The models whose config.json (or paper) a preset repeats; BASE, expert choice, hash, Sinkhorn and ST-MoE have none here.
MODELS = {
    "deepseek_moe_16b": ("deepseek_moe_16b",),
    "deepseek_v2": ("deepseek_v2",),
    "deepseek_v2_lite": ("deepseek_v2_lite",),
    "deepseek_v3": ("deepseek_v3", "deepseek_v3_2"),
    "deepseek_v4": ("deepseek_v4_flash",),
    "glm_4_5": ("glm_4_5",),
    "gpt_oss": ("gpt_oss_120b",),
    "gshard": ("gshard_600b",),
    "kimi_k2": ("kimi_k2",),
    "kimi_k3": ("kimi_k3",),
    "llama_4": ("llama4_maverick",),
    "mixtral": ("mixtral_8x7b", "mixtral_8x22b"),
    "qwen3": ("qwen3_30b_a3b", "qwen3_235b_a22b"),
    "switch": ("switch_base_128", "switch_c", "switch_xxl"),
}


def preset(name: str, **changes: object) -> Policy:
    policy = yamlfile.validate(Policy, yamlfile.read(SCENARIOS / "policies" / f"{name}.yaml"))
    return Policy.model_validate({**policy.model_dump(exclude_none=True), **changes})


def model(name: str) -> Model:
    return yamlfile.validate(Model, yamlfile.read(SCENARIOS / "models" / f"{name}.yaml"))


def geometry(name: str) -> Model:
    """The preset's own model, or one of 64 experts in 8 groups."""
    if name in MODELS:
        return model(MODELS[name][0])
    k = preset(name).num_experts_per_tok
    return model("deepseek_moe_16b").model_copy(update={"num_experts_per_tok": k, "n_group": 8, "topk_group": 4})


# What the files say ----------------------------------------------------------------------------------------------


def test_all_published_gates_are_here() -> None:
    asked_for = (
        "base deepseek_moe_16b deepseek_v2 deepseek_v2_lite deepseek_v3 expert_choice glm_4_5 gpt_oss gshard hash "
    )
    asked_for += "kimi_k2 llama_4 mixtral qwen3 st_moe switch"
    assert set(asked_for.split()) <= set(PRESETS)
    assert set(MODELS) <= set(PRESETS)
    names = [preset(name).name for name in PRESETS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_complete_and_names_its_source(name: str) -> None:
    """Every part is stated, so that no model has to fill it in."""
    path = SCENARIOS / "policies" / f"{name}.yaml"
    said = yamlfile.read(path).data
    assert set(said) == {"name", *Gating.model_fields}
    rules = said["balance"] if isinstance(said["balance"], list) else [said["balance"]]
    assert all("kind" in piece for piece in (said["select"], said["capacity"], *rules))
    if said["select"]["kind"] == "group_limited":
        assert {"n_group", "topk_group", "group_score"} <= set(said["select"])
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(word in " ".join(head) for word in ("arXiv", "config"))


def differences(policy: Policy, of: Model) -> list[str]:
    """Settings in which a preset departs from its model's config."""
    groups = isinstance(policy.select, GroupLimited) and (policy.select.n_group, policy.select.topk_group)
    kind = policy.score.kind if policy.score else None
    pairs = {
        "scoring_func": (kind, of.scoring_func),
        "num_experts_per_tok": (policy.num_experts_per_tok, of.num_experts_per_tok),
        "routed_scaling_factor": (policy.routed_scaling_factor, of.routed_scaling_factor),
        "groups": (groups or (1, 1), (of.n_group, of.topk_group)),
    }
    if of.num_experts_per_tok > 1:  # of one weight there is nothing to normalise
        pairs["norm_topk_prob"] = (policy.norm_topk_prob, of.norm_topk_prob)
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]


@pytest.mark.parametrize(("name", "of"), [(name, of) for name, models in MODELS.items() for of in models])
def test_preset_repeats_the_config(name: str, of: str) -> None:
    assert differences(preset(name), model(of)) == []


def test_a_departure_from_the_config_is_noticed() -> None:
    v3 = model("deepseek_v3")
    for change, found in (
        ({"score": "softmax"}, "scoring_func"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"routed_scaling_factor": 1.0}, "routed_scaling_factor"),
        ({"select": {"kind": "group_limited", "n_group": 8, "topk_group": 3}}, "groups"),
        ({"select": "topk"}, "groups"),
    ):
        assert differences(preset("deepseek_v3", **change), v3) == [found]


# What they do ----------------------------------------------------------------------------------------------------


def tokens_for(of: Model, n_tokens: int = 256, sd: float = 1.0) -> Tokens:
    rng = stream(0, "test presets", of.n_routed_experts)
    return Tokens(
        rank=0,
        logits=(sd * rng.standard_normal((n_tokens, of.n_routed_experts))).astype(np.float32),
        topic=np.zeros(n_tokens, np.int32),
        sequence=np.repeat(np.arange(8, dtype=np.int32), n_tokens // 8),
        token_ids=rng.integers(0, 100, n_tokens).astype(np.int32),
    )


def gate_of(policy: Policy, of: Model) -> Gate:
    frequency = np.full(100, 0.01) if policy.select.needs == "token_ids" else None
    return Gate(policy, of, token_frequency=frequency)


def rng() -> np.random.Generator:
    return stream(1, "test presets")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_routes_and_learns(name: str) -> None:
    policy, of = preset(name), geometry(name)
    assert [rule for _, piece in policy.pieces() for rule in piece.for_model(of).problems(of)] == []
    gate, tokens = gate_of(policy, of), tokens_for(of)
    routing = gate.route(tokens, rng)
    ids, weights, experts = routing.topk_ids, routing.topk_weights, of.n_routed_experts
    assert ids.min() >= -1 and ids.max() < experts and (ids >= 0).any()
    assert all(len(set(row[row >= 0].tolist())) == np.count_nonzero(row >= 0) for row in ids)
    assert policy.select.varies or ids.shape[1] == policy.num_experts_per_tok
    assert np.isfinite(weights).all() and (weights >= 0).all() and (weights[ids < 0] == 0).all()
    if policy.norm_topk_prob:
        total, scale = weights.sum(axis=1), policy.routed_scaling_factor
        full = (ids >= 0).all(axis=1)
        np.testing.assert_allclose(total[full], scale, rtol=1e-5)
        assert (total[~full] < scale * 1.00001).all()  # what is dropped takes its share along
    router = gate.router(tokens.logits, tokens.topic, rng)
    asked = gate.choose(router.scores, rng, tokens, logits=router.logits).asked
    counts = plain.expert_tokens(asked, experts)
    sample = Sample(0, 0, router.logits, router.scores, asked, tokens.topic, tokens.sequence, gate.score)
    before = [state.copy() for state in gate.states]
    gate.update(Seen(counts[None, None], samples=(sample,)), step=0)
    assert all(np.isfinite(state).all() for state in gate.states)
    for rule, old, new in zip(gate.rules, before, gate.states, strict=True):
        assert np.array_equal(old, new) != rule.learns
    again = gate.route(tokens, rng)
    assert np.isfinite(again.topk_weights).all()


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-z))


def best(s: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-s, axis=1, kind="stable")[:, :k]


def in_groups(s: np.ndarray, m: int, n_best: int) -> np.ndarray:
    """Mask with -inf what lies outside the m of 8 groups with the largest sum of n_best scores."""
    grouped = np.sort(s.reshape(len(s), 8, -1), axis=2)[:, :, ::-1]
    keep = np.zeros((len(s), 8), dtype=bool)
    np.put_along_axis(keep, best(grouped[:, :, :n_best].sum(axis=2), m), True, axis=1)
    return np.where(np.repeat(keep, s.shape[1] // 8, axis=1), s, -np.inf)


def take(s: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(s, ids, axis=1)


def deepseek_v3(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = sigmoid(z)
    ids = best(in_groups(s, 4, 2), 8)
    return ids, take(s, ids) / take(s, ids).sum(axis=1, keepdims=True) * 2.5


def deepseek_v2(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = softmax(z)
    ids = best(in_groups(s, 3, 1), 6)
    return ids, take(s, ids) * 16.0


def of_the_chosen(k: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Softmax over the k largest logits (Mixtral, gpt-oss; the same as Qwen3's softmax, top-k, normalise)."""

    def gate(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = best(z, k)
        return ids, softmax(take(z, ids))

    return gate


def top_probabilities(k: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def gate(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = best(z, k)
        return ids, take(softmax(z), ids)

    return gate


def normalised(score: Callable[[np.ndarray], np.ndarray], k: int, scale: float):  # type: ignore[no-untyped-def]
    def gate(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = best(z, k)
        s = take(score(z), ids)
        return ids, s / s.sum(axis=1, keepdims=True) * scale

    return gate


def llama_4(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = best(z, 1)
    return ids, sigmoid(take(z, ids))


EQUATIONS = {
    "deepseek_v3": deepseek_v3,
    "deepseek_v2": deepseek_v2,
    "deepseek_v2_lite": top_probabilities(6),
    "deepseek_moe_16b": top_probabilities(6),
    "deepseek_v4": normalised(lambda z: np.sqrt(np.log1p(np.exp(z))), 6, 1.5),
    "kimi_k2": normalised(sigmoid, 8, 2.827),
    "kimi_k3": normalised(sigmoid, 16, 1.0),
    "glm_4_5": normalised(sigmoid, 8, 2.5),
    "mixtral": of_the_chosen(2),
    "gpt_oss": of_the_chosen(4),
    "qwen3": of_the_chosen(8),
    "llama_4": llama_4,
    "switch": top_probabilities(1),
}


def untouched(name: str, of: Model) -> tuple[F32, Routing]:
    """Logits, and where the preset sends them before anything was learned, with room for all and no noise."""
    policy = preset(name, capacity="none", router_jitter_noise=0.0)
    tokens = tokens_for(of)
    return tokens.logits, gate_of(policy, of).route(tokens, rng)


@pytest.mark.parametrize("name", EQUATIONS)
def test_untrained_preset_is_the_published_equation(name: str) -> None:
    """`reference` equations in float64, written down a second time; compared as weights per expert, order aside."""
    logits, routing = untouched(name, geometry(name))
    ids, weights = EQUATIONS[name](logits.astype(np.float64))
    ours, theirs = np.zeros(logits.shape), np.zeros(logits.shape)
    np.put_along_axis(ours, routing.topk_ids.astype(np.int64), routing.topk_weights.astype(np.float64), axis=1)
    np.put_along_axis(theirs, ids, weights, axis=1)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_the_wrong_equation_is_noticed() -> None:
    logits, routing = untouched("deepseek_v3", model("deepseek_v3"))
    ids, _ = normalised(sigmoid, 8, 2.5)(logits.astype(np.float64))
    assert (np.sort(ids, axis=1) != np.sort(routing.topk_ids, axis=1)).any()


# Independent logits: what a limit of groups costs, with no training in sight ----------------------------------------


def kept_mass(policy: Policy, of: Model, logits: F32) -> tuple[float, float]:
    """Chosen affinity over that of the unrestricted top-k, and groups touched per token."""
    gate = gate_of(policy, of)
    scores = gate.score.scores(logits, gate.kernels)
    ids = gate.choose(scores, rng, logits=logits).asked
    kept = plain.picked(scores, ids).sum(axis=1) / take(scores, best(scores, ids.shape[1])).sum(axis=1)
    groups = [len(set(row)) for row in (ids // (of.n_routed_experts // 8)).tolist()]
    return float(kept.mean()), float(np.mean(groups))


def test_device_limit_has_its_knee_at_three() -> None:
    """V2's rule on N(0, 1) logits of 160 experts in 8 groups, top-6: 0.607, 0.836, 0.944, 0.988, 0.999 for M = 1..5
    (two independent computations agree); DeepSeek-V2 calls M >= 3 "roughly aligned" with no limit."""
    of = model("deepseek_v2")
    logits = stream(2, "test presets").standard_normal((4000, 160), dtype=np.float32)
    found = []
    for m in range(1, 9):
        select = {"kind": "group_limited", "n_group": 8, "topk_group": m, "group_score": "max"}
        kept, groups = kept_mass(preset("deepseek_v2", select=select, capacity="none"), of, logits)
        assert groups <= m
        found.append(kept)
    np.testing.assert_allclose(found[:5], [0.607, 0.836, 0.944, 0.988, 0.999], atol=0.004)
    assert found[5:] == sorted(found[5:]) and found[-1] == pytest.approx(1.0, abs=1e-6)
    gains = np.diff(found)
    assert gains[1] > 0.1 > 0.05 > gains[2]  # the third device is worth a tenth, the fourth less than half of that


def test_node_limit_of_v3_costs_little() -> None:
    """4 of 8 nodes on N(0, 1) logits: 99.4 % of the affinity, 3.97 nodes per token."""
    of = model("deepseek_v3")
    logits = stream(3, "test presets").standard_normal((4000, 256), dtype=np.float32)
    kept, nodes = kept_mass(preset("deepseek_v3"), of, logits)
    assert kept == pytest.approx(0.994, abs=0.001) and nodes == pytest.approx(3.97, abs=0.01)


# As entries of a scenario's list ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scenario with two presets as policies, in a folder of its own."""
    for name in ("models", "clusters", "policies"):
        (tmp_path / name).mkdir()
    for name in ("models/deepseek_moe_16b", "clusters/h800", "policies/deepseek_v3", "policies/switch"):
        text = (SCENARIOS / f"{name}.yaml").read_text(encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "here.yaml").write_text(
        "name: here\n"
        "model: {extends: models/deepseek_moe_16b.yaml, n_group: 8, topk_group: 4}\n"
        "cluster: {extends: clusters/h800.yaml, nodes: 1}\n"
        "parallel: {ep_size: 8}\n"
        "traffic: {kind: affinity, tokens_per_rank: 64}\n"
        "policies:\n"
        "  - {extends: policies/deepseek_v3.yaml}\n"
        "  - {extends: policies/deepseek_v3.yaml, name: M=2, select: {topk_group: 2}, balance: none}\n"
        "  - extends: policies/switch.yaml\n"
        "    capacity: {capacity_factor: 2.0}\n",
        encoding="utf-8",
    )
    return tmp_path


def test_policy_of_a_preset_keeps_its_name_and_takes_changes(folder: Path) -> None:
    v3, limited, switch = load(folder / "here.yaml").policies
    assert [v3.name, limited.name, switch.name] == ["DeepSeek-V3", "M=2", "Switch"]
    assert v3.model_dump() == preset("deepseek_v3").model_dump()
    assert limited.select.model_dump() == v3.select.model_dump() | {"topk_group": 2}
    assert [rule.kind for rule in limited.balance] == ["none"]
    assert switch.capacity.model_dump() == preset("switch").capacity.model_dump() | {"capacity_factor": 2.0}
    changed = load(folder / "here.yaml", ["policies.0.select.topk_group=3", "policies.2.balance.aux_loss_alpha=0.1"])
    assert changed.policies[0].select.model_dump() == v3.select.model_dump() | {"topk_group": 3}
    assert changed.policies[2].balance[0].model_dump()["aux_loss_alpha"] == 0.1


@pytest.mark.parametrize(
    ("file", "old", "new", "where"),
    [
        ("here.yaml", "topk_group: 2}", "topk_grp: 2}", "here.yaml:8:62: policies.1.select.topk_grp: unknown key"),
        ("here.yaml", "M=2", "DeepSeek-V3", "here.yaml:8:42: policies.1.name: another policy is called"),
        ("here.yaml", "policies/switch", "policies/swich", "here.yaml:9:5: policies.2: no such file"),
        ("policies/switch.yaml", "position", "postion", "policies/switch.yaml:9:58: policies.2.capacity.drop_policy"),
        ("policies/switch.yaml", "name: Switch\n", "", "here.yaml:9:5: policies.2.name: is required"),
        ("policies/deepseek_v3.yaml", "n_group: 8", "n_group: 7", "policies/deepseek_v3.yaml:7:31: policies.0.select.n_group"),
    ],
)  # fmt: skip
def test_mistakes_are_found_where_they_are_written(folder: Path, file: str, old: str, new: str, where: str) -> None:
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ScenarioError) as caught:
        load(folder / "here.yaml")
    assert f"{folder}/{where}" in str(caught.value)
