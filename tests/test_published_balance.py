"""Published balance figures that a simulation without training can show, on short runs of the shipped scenarios.

Levels are asserted where the source's setting fixes them (the sign rule at the published rate, its analytic floor, the one
calibrated row); elsewhere the direction, at a ratio that sampling noise of the short runs cannot make. Not asserted: the
paper's order across u within the proportional and the multiplicative rows (arXiv 2408.15664, Tables 3 and 4), perplexity.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sim import rollout
from sim.gating.balance import Sample, Seen
from sim.gating.balance.aux_loss import AuxLoss
from sim.gating.piece import GateShape
from sim.gating.score.softmax import Softmax
from sim.loading import load
from sim.metrics.balance import coefficient_of_variation, max_vio, uniform_max_vio
from sim.metrics.specialisation import mutual_information_bits, topic_max_vio
from sim.scenario import Scenario
from sim.tally import Counts
from sim.tokens import F64

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"


def short(name: str, moving: int, still: int, *sets: str) -> Scenario:
    """Return a shipped scenario whose rules learn for ``moving`` steps and then stand still for ``still``."""
    scenario = load(SCENARIOS / f"{name}.yaml", [f"steps.count={moving + still}", *sets])
    policies = []
    for policy in scenario.policies:
        rules = [
            rule
            if getattr(rule, "stop_after_step", None) is None
            else rule.model_copy(update={"stop_after_step": moving})
            for rule in policy.balance
        ]
        policies.append(policy.model_copy(update={"balance": tuple(rules)}))
    return scenario.model_copy(update={"policies": tuple(policies)})


def routed(scenario: Scenario, *names: str, replica: int = 0) -> dict[str, list[Counts]]:
    """Return the counts of each policy, one per MoE layer; all see the same tokens."""
    indices = [[policy.name for policy in scenario.policies].index(name) for name in names]
    found: dict[str, list[Counts]] = {name: [] for name in names}
    layers = range(scenario.model.n_moe_layers)
    for counts in rollout.run(rollout.Task(scenario, tuple(indices), replica, layers)):
        found[scenario.policies[counts.policy].name].append(counts)
    return found


def validation(found: list[Counts], still: int) -> float:
    """MaxVio_global as the paper has it: of the whole validation set with the final state, mean over layers."""
    return float(np.mean([max_vio(counts.expert_tokens[-still:].sum(axis=0)) for counts in found]))


def affinity(found: list[Counts], still: int) -> float:
    return float(np.mean([counts.kept_affinity[-still:] for counts in found]))


# --- arXiv 2408.15664, Tables 2, 3, 4 and 6: loss-free balancing ---

MOVING, STILL = 300, 100


@cache
def loss_free() -> dict[str, float]:
    names = ("no balancing", *(f"sign u={u}" for u in ("0.0001", "0.001", "0.01")))
    names += tuple(f"proportional u={u}" for u in ("0.001", "0.01"))
    names += ("multiplicative u=0.01", "softmax proportional u=0.001")
    found = routed(short("loss_free", MOVING, STILL), *names)
    return {name: validation(counts, STILL) for name, counts in found.items()}


def test_without_balancing_a_few_experts_take_over() -> None:
    """The paper and its references say collapse, without a figure; 64 / 6 - 1 = 9.7 is the most there is."""
    assert 5.0 < loss_free()["no balancing"] < 64 / 6 - 1


def test_level_of_the_sign_rule_at_the_published_rate() -> None:
    """Table 3: 0.044, mean over nine layers at the end of training. A factor of two: this is one layer and one state that
    dithers, by 1.8 u / sigma = 0.024 and the sampling noise of 4,096-token batches."""
    assert 0.022 < loss_free()["sign u=0.001"] < 0.088


def test_a_slow_rate_is_late_and_a_fast_one_fluctuates() -> None:
    """Figure 4. At u = 0.0001 the biases have come 0.05 of the 0.2 they need; at 0.01 the dither is ten times as large."""
    found = loss_free()
    assert found["sign u=0.0001"] > 1.0 > 10 * found["sign u=0.001"]
    assert found["sign u=0.01"] > 2.5 * found["sign u=0.001"]


@pytest.mark.parametrize("u", ["0.001", "0.01"])
def test_proportional_moves_end_below_sign_moves(u: str) -> None:
    """Table 3: 0.036 and 0.028 against 0.044. Not their own order: the scale of the paper's error is unknown."""
    assert loss_free()[f"proportional u={u}"] < 0.6 * loss_free()[f"sign u={u}"]


def test_multiplicative_biases_balance_too() -> None:
    """Table 4: 0.041 at u = 0.01. The whole scenario comes to 0.09 in 1,500 steps; after 300 experts with small scores, whose
    biases have the furthest to go in small steps, are still on their way: a thirtieth of the start is what is asked."""
    assert loss_free()["multiplicative u=0.01"] < loss_free()["no balancing"] / 30


def test_a_softmax_gate_is_balanced_by_the_proportional_rule() -> None:
    """Table 6: 0.027, with batches of 2.36M tokens. A softmax affinity is about 1/64, so that u = 1e-3 follows the noise of
    4,096-token batches (5 % of a load): what is asked is a bias that is left with no more than two of those."""
    assert loss_free()["softmax proportional u=0.001"] < 0.1


# --- the rate of the bias: settling time against dither ---


@cache
def rates() -> dict[str, F64]:
    """MaxVio by step."""
    names = ("u=0.001, then 0 (V3)", "u=0.003", "u=0.01", "u=0.01 falling")
    found = routed(short("update_rate", 240, 1, "traffic.tokens_per_rank=4096"), *names)
    return {name: max_vio(counts.expert_tokens) for name, (counts,) in found.items()}


def settled(series: F64, level: float) -> int:
    """Middle of the first ten steps whose mean is below ``level``."""
    return int(np.argmax(np.convolve(series, np.full(10, 0.1), mode="valid") < level)) + 5


def dither(name: str) -> float:
    """MaxVio of the last 80 batches beyond what chance alone leaves; independent deviations add in squares."""
    floor = uniform_max_vio(4096, 64, 6)
    return float(np.sqrt(rates()[name][-81:-1].mean() ** 2 - floor**2))


def test_time_to_balance_is_inverse_to_the_rate() -> None:
    """A bias moves by u a step and has the same way to go: 3 and 10 times the rate, 1/3 and 1/10 of the steps, within a
    fifth (ten-step means blur the fastest by two of its twenty steps)."""
    slow, middle, fast = (settled(rates()[name], 1.0) for name in ("u=0.001, then 0 (V3)", "u=0.003", "u=0.01"))
    assert 100 < slow < 240
    assert slow / middle == pytest.approx(3, rel=0.2)
    assert slow / fast == pytest.approx(10, rel=0.2)


def test_dither_grows_with_the_rate() -> None:
    """1.8 u / sigma for N = 64, K = 6, sigma = 0.075 the spread of an expert's score (its logit's 0.5 times the sigmoid's
    slope at -1.5): 0.24 at u = 0.01, within 1.4 as in the runs of the formula's source. At 0.003 the bias also follows
    sampling noise, so that the ratio stays below 10/3."""
    assert 1 / 1.4 < dither("u=0.01") / (1.8 * 0.01 / 0.075) < 1.4
    assert 2.0 < dither("u=0.01") / dither("u=0.003") < 10 / 3


def test_a_falling_rate_leaves_less_dither_than_a_constant_one() -> None:
    assert dither("u=0.01 falling") < 0.5 * dither("u=0.01")


# --- Table 2 and Figure 2: auxiliary losses, one calibrated constant ---

LEARN, FROZEN = 36, 12
"""As in the scenario: with fewer tokens the offsets keep more of their noise and MaxVio is higher."""


def test_offsets_stand_still_like_a_router_on_a_validation_set() -> None:
    """MaxVio_global is of frozen rules: after the last step of learning the state does not move."""
    moving, linear = AuxLoss(), AuxLoss(stop_after_step=4, decay="linear", offset_update_rate=0.5)
    assert [linear.rate(step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert [AuxLoss(stop_after_step=1).rate(step) for step in (0, 1)] == [moving.rate(0), 0.0]
    shape, zeros = GateShape(3, 1), np.zeros(2, np.int32)
    scores = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], np.float32)
    sample = Sample(0, 0, np.log(scores), scores, np.zeros((2, 1), np.int16), zeros, zeros, Softmax())
    seen, state = Seen(np.array([[[2, 0, 0]]]), None, (sample,)), np.full((1, 3), 0.25)
    np.testing.assert_array_equal(linear.update(state, seen, shape, 4), state)
    steps = [np.abs(linear.update(state, seen, shape, step) - state).max() for step in range(4)]
    assert steps[0] > steps[1] > steps[2] > steps[3] > 0
    assert np.abs(moving.update(state, seen, shape, 10**6) - state).max() > 0


@cache
def sweep() -> dict[str, tuple[float, float]]:
    """MaxVio_global and kept affinity, in one layer of middle depth."""
    names = (
        "no balancing (alpha 0)",
        "alpha 0.0001",
        "alpha 0.001 (calibrated)",
        "alpha 0.01",
        "softmax, alpha 0.0003",
    )
    found = routed(short("aux_loss", LEARN, FROZEN, "model.num_hidden_layers=1"), *names)
    return {name: (validation(c, FROZEN), affinity(c, FROZEN)) for name, c in found.items()}


def test_the_calibrated_row() -> None:
    """alpha = 1e-3 on the 1B setting: MaxVio_global 0.72 (Table 2), the one figure that PULL_BACK was set by. The scenario
    averages 0.72 over four layers and three replicas; this is one layer of one replica (0.70; 0.59 to 1.04 with popularities
    of three other seeds). Half the pull-back shows 0.41, twice of it 1.18."""
    assert sweep()["alpha 0.001 (calibrated)"][0] == pytest.approx(0.72, rel=0.25)


def test_a_larger_alpha_balances_better_and_keeps_less_affinity() -> None:
    """Figure 2 (not tabulated): small alpha, imbalance; large alpha, worse perplexity, of which lost affinity is a proxy."""
    found = sweep()
    rows = [found[name] for name in found if not name.startswith("softmax")]
    for (vio, kept), (next_vio, next_kept) in pairwise(rows):
        assert next_vio < 0.8 * vio
        assert next_kept < kept - 0.01


def test_loss_free_balance_is_out_of_reach_of_the_calibrated_loss() -> None:
    """Table 2: 0.72 against 0.04."""
    assert sweep()["alpha 0.001 (calibrated)"][0] > 5 * loss_free()["sign u=0.001"]


def test_predicted_softmax_row() -> None:
    """Table 6: alpha = 3e-4 on a softmax gate, 0.937, more than 1e-3 on a sigmoid gate. Predicted with the constant above:
    the order, and the level within a factor of 1.6 (the scenario shows 1.26, 34 % too much)."""
    softmax, sigmoid = sweep()["softmax, alpha 0.0003"][0], sweep()["alpha 0.001 (calibrated)"][0]
    assert 1.1 * sigmoid < softmax < 1.6 * 0.937 * sigmoid / 0.72


# --- Figure 5 and "Demons in the Detail": balance against batch size ---


@cache
def by_size() -> dict[str, dict[str, float]]:
    """MaxVio over sequences (256 tokens), micro-batches (512), EP groups (8,192) and the batch (32,768)."""
    names = (
        "loss per micro-batch",
        "loss per global batch",
        "bias per micro-batch",
        "bias per global batch (loss-free)",
    )
    sets = ("model.num_hidden_layers=1", "steps.warmup.steps=40", "steps.warmup.gain=40")
    found = routed(short("batch_size", 8, 1, *sets), *names)
    return {
        name: counts.scopes[8] | {"max_vio_batch": float(max_vio(counts.expert_tokens[8]))}
        for name, (counts,) in found.items()
    }


SIZES = ("max_vio_sequence", "max_vio_micro_batch", "max_vio_ep_group", "max_vio_batch")


def test_loss_free_balance_keeps_improving_with_the_batch_and_an_auxiliary_loss_flattens() -> None:
    free, loss = by_size()["bias per global batch (loss-free)"], by_size()["loss per global batch"]
    assert all(free[b] < 0.9 * free[a] for a, b in pairwise(SIZES))
    # From 8,192 to 32,768 tokens chance would halve it; 0.45 to 0.58 and 0.72 to 0.96 with four seeds.
    ratio = [row["max_vio_batch"] / row["max_vio_ep_group"] for row in (free, loss)]
    assert ratio[0] < 0.65 < 0.68 < ratio[1]
    assert loss["max_vio_batch"] > 2 * free["max_vio_batch"]
    assert free["max_vio_batch"] > uniform_max_vio(32_768, 64, 6)


def test_a_scope_of_micro_batches_balances_them_and_not_the_whole() -> None:
    """arXiv 2501.11873: a loss over micro-batches spends its push inside each; a bias moved by the average vote of small
    batches ends worse globally (aux-free rows of its Table 1, in perplexity)."""
    found = by_size()
    assert (
        found["loss per micro-batch"]["max_vio_micro_batch"]
        < 0.9 * found["loss per global batch"]["max_vio_micro_batch"]
    )
    small, whole = found["bias per micro-batch"], found["bias per global batch (loss-free)"]
    assert small["max_vio_batch"] > 1.3 * whole["max_vio_batch"]


# --- DeepSeek-V3 report, 4.5.3 and Figure 9: sequence-wise against batch-wise ---

DOMAINS = {
    "none": "no balancing",
    "sequence": "sequence-wise loss, alpha 0.01",
    "batch": "batch-wise loss, alpha 0.01",
    "bias": "loss-free bias",
}


@cache
def domains() -> dict[str, Counts]:
    scenario = short("domains", 8, 1, "model.num_hidden_layers=1", "steps.warmup.steps=40", "steps.warmup.gain=40")
    found = routed(scenario, *DOMAINS.values())
    return {short_name: found[name][0] for short_name, name in DOMAINS.items()}


def test_sequence_wise_balance_destroys_specialisation_and_batch_wise_does_not() -> None:
    bits = {name: float(mutual_information_bits(c.topic_tokens[8])) for name, c in domains().items()}
    within = {name: float(topic_max_vio(c.topic_tokens[8])) for name, c in domains().items()}
    for kind in ("batch", "bias"):
        assert bits["sequence"] < 0.3 * bits[kind]
        assert within["sequence"] < 0.5 * within[kind]
        assert bits[kind] > 0.4 * bits["none"]
        assert domains()[kind].kept_affinity[8] > domains()["sequence"].kept_affinity[8] + 0.01
    for kind in ("sequence", "batch", "bias"):  # and all three balance the whole
        vio = float(max_vio(domains()[kind].expert_tokens[8]))
        assert vio < 0.15 * float(max_vio(domains()["none"].expert_tokens[8])), kind


def test_mixing_domains_lowers_imbalance_by_less_than_one_over_root_k() -> None:
    """DeepSeek-V2-Lite: CV 0.83 of single tasks, 0.51 of four pooled, where independent domains would give 0.41."""
    topic_tokens = domains()["none"].topic_tokens[8]
    single = float(coefficient_of_variation(topic_tokens).mean())
    pooled = float(coefficient_of_variation(topic_tokens.sum(axis=0)))
    assert len(topic_tokens) ** -0.5 < pooled / single < 1.0


def test_mixing_unrelated_domains_does_lower_it_by_that() -> None:
    """The negative control: equally frequent domains without shared experts or neighbours."""
    rng = np.random.default_rng(0)
    single = 1000.0 * np.exp(0.3 * rng.standard_normal((6, 4096)))
    pooled = float(coefficient_of_variation(single.sum(axis=0)))
    assert pooled / coefficient_of_variation(single).mean() == pytest.approx(6**-0.5, rel=0.05)
