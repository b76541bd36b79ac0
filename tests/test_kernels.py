"""The two kernels give the bits of each other and of a stable sort, on any shape, with ties, on any CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim.kernels import compiled, plain, reference
from sim.tokens import F32, I16
from tests.strategies import KERNELS, dyadic, seeds, shapes

BOTH = pytest.mark.parametrize("kernels", [plain, compiled], ids=["numpy", "numba"])
Shape = tuple[int, int, int, int, int]


def _scores(seed: int, n_tokens: int, n_experts: int, sort: str) -> tuple[F32, F32, F32]:
    """Return scores, scale and shift of one ``sort``; all dyadic ones tie often."""
    rng = np.random.default_rng(seed)
    ones, zeros = np.ones(n_experts, np.float32), np.zeros(n_experts, np.float32)
    if sort == "equal":
        return np.full((n_tokens, n_experts), 0.5, np.float32), ones, zeros
    if sort == "signed zeros":
        scores = rng.choice(np.array([0.0, -0.0, 0.25, -0.25], np.float32), (n_tokens, n_experts))
        return scores, ones, rng.choice(np.array([0.0, -0.0], np.float32), n_experts)
    if sort == "dyadic":
        return dyadic(rng, n_tokens, n_experts, 6), ones, zeros
    if sort == "dyadic, biased":
        shift = (rng.integers(-8, 9, n_experts) / 8).astype(np.float32)
        return dyadic(rng, n_tokens, n_experts, 6), rng.choice([0.5, 1.0, 2.0], n_experts).astype(np.float32), shift
    scores = rng.standard_normal((n_tokens, n_experts), dtype=np.float32)
    return scores, 1 + rng.random(n_experts, np.float32), rng.standard_normal(n_experts, dtype=np.float32)


SORTS = ["equal", "signed zeros", "dyadic", "dyadic, biased", "normal, biased"]


@given(shapes(), seeds, st.sampled_from([0, 1, 2, 17]), st.sampled_from(SORTS))
@example((5, 5, 5, 5, 4), 0, 3, "signed zeros")
@example((400, 8, 4, 8, 2), 1, 1030, "dyadic, biased")  # more rows than one block of the NumPy kernel
@settings(max_examples=150)
def test_selection_is_the_stable_sort(shape: Shape, seed: int, n_tokens: int, sort: str) -> None:
    n_experts, n_group, topk_group, k, n_best = shape
    scores, scale, shift = _scores(seed, n_tokens, n_experts, sort)
    before = scores.copy()
    biased = plain.affine(scores, scale, shift)
    expected = reference.topk(biased, k)
    grouped = reference.group_limited_topk(biased, k, n_group, topk_group, n_best)
    for kernels in KERNELS.values():
        found = kernels.topk(scores, scale, shift, k)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, expected)
        limited = kernels.group_limited_topk(scores, scale, shift, k, n_group, topk_group, n_best)
        assert limited.dtype == np.int16
        np.testing.assert_array_equal(limited, grouped)
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("n_experts", [*range(4, 41), 63, 100, 255, 257, 300, 384, 399, 400])
def test_every_number_of_groups(n_experts: int) -> None:
    rng = np.random.default_rng(n_experts)
    scores = dyadic(rng, 9, n_experts, 12)
    ones, zeros = np.ones(n_experts, np.float32), np.zeros(n_experts, np.float32)
    for n_group in (g for g in range(1, n_experts + 1) if n_experts % g == 0):
        topk_group = 1 + n_experts * 7 % n_group
        k = max(1, min(8, topk_group * (n_experts // n_group)))
        for n_best in (1, 2, 4):
            arguments = (k, n_group, topk_group, n_best)
            expected = reference.group_limited_topk(scores, *arguments)
            for kernels in KERNELS.values():
                np.testing.assert_array_equal(
                    kernels.group_limited_topk(scores, ones, zeros, *arguments), expected, str(arguments)
                )


def test_the_comparison_sees_a_wrong_tie() -> None:
    """Negative control: partition-then-sort, which breaks ties by position in memory, differs from the reference."""
    scores = dyadic(np.random.default_rng(0), 200, 64, 6)
    part = np.argpartition(-scores, 7, axis=1)[:, :8]
    order = np.argsort(-np.take_along_axis(scores, part, axis=1), axis=1, kind="stable")
    wrong = np.take_along_axis(part, order, axis=1).astype(np.int16)
    assert not np.array_equal(wrong, reference.topk(scores, 8))
    lower_wins = reference.topk(scores[:, ::-1], 8)  # ties to the higher index instead of the lower
    assert not np.array_equal(63 - lower_wins, reference.topk(scores, 8))


def test_reference_by_hand() -> None:
    """Two groups of three; group sums of the two best tie at 1.25, so the lower group is kept."""
    scores = np.array([[0.25, 1.0, 0.0, 0.5, 0.5, 0.75]], np.float32)
    assert reference.topk(scores, 4).tolist() == [[1, 5, 3, 4]]
    assert reference.group_limited_topk(scores, 2, 2, 1, 2).tolist() == [[1, 0]]
    assert reference.group_limited_topk(scores, 2, 2, 1, 3).tolist() == [[5, 3]]


logits_lists = st.lists(st.floats(-1e4, 1e4, width=32, allow_nan=False), min_size=1, max_size=40)


@given(logits_lists)
@example([1e4, -1e4])
@example([0.0, -0.0])
@example([88.0, -88.0, 87.33655, -87.33655])
def test_score_functions_have_the_same_bits_and_stay_finite(values: list[float]) -> None:
    x = np.array([values, values[::-1]], np.float32)
    for name in ("exp", "sigmoid", "softmax"):
        left, right = getattr(plain, name)(x), getattr(compiled, name)(x)
        assert left.dtype == right.dtype == np.float32
        np.testing.assert_array_equal(left.view(np.int32), right.view(np.int32), name)
        assert np.isfinite(left).all() and (left >= 0).all(), name
    assert (plain.sigmoid(x) <= 1).all()
    np.testing.assert_allclose(plain.softmax(x).sum(axis=1), 1, rtol=3e-6)


@given(seeds, st.sampled_from([0.3, 3.0, 30.0]), st.sampled_from([(1, 1), (3, 1025), (40, 256)]))
def test_score_functions_are_near_float64(seed: int, spread: float, shape: tuple[int, int]) -> None:
    x = (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)
    wide = x.astype(np.float64)
    # The argument's own rounding, |x| 2^-24, comes out of exp as a relative error.
    np.testing.assert_allclose(
        plain.exp(x), np.exp2(np.clip(wide * np.log2(np.e), -126, 127)), rtol=3e-7 + 1.3e-7 * np.abs(wide).max()
    )
    np.testing.assert_allclose(plain.sigmoid(x), 1 / (1 + np.exp(-wide)), atol=2.5e-7)
    shifted = np.exp(wide - wide.max(axis=1, keepdims=True))
    np.testing.assert_allclose(plain.softmax(x), shifted / shifted.sum(axis=1, keepdims=True), atol=1e-6)


@BOTH
def test_exp_saturates_and_keeps_order(kernels: object) -> None:
    x = np.array([[-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4]], np.float32)
    found = kernels.exp(x)[0]  # type: ignore[attr-defined]
    assert found[0] == found[1] == np.float32(2.0**-126) and found[-1] == found[-2] == np.float32(2.0**127)
    assert found[3] == 1.0
    assert (np.diff(found) >= 0).all()


def _ids(seed: int, n_tokens: int, n_experts: int, k: int) -> I16:
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(n_experts)[:k] for _ in range(n_tokens)], np.int16).reshape(n_tokens, k)
    ids[rng.random(ids.shape) < 0.3] = -1
    return ids


@given(seeds, st.integers(0, 20), st.integers(1, 70), st.data())
def test_counts_are_those_of_naive_loops(seed: int, n_tokens: int, n_experts: int, data: st.DataObject) -> None:
    ids = _ids(seed, n_tokens, n_experts, data.draw(st.integers(1, n_experts)))
    n_groups = data.draw(st.integers(1, 130))
    rng = np.random.default_rng(seed)
    group = rng.integers(0, n_groups, n_experts).astype(np.int32)
    values = rng.random((n_tokens, n_experts), np.float32)
    per_expert, per_group = [0] * n_experts, [0] * n_groups
    gathered = np.zeros(ids.shape, np.float32)
    for t, row in enumerate(ids.tolist()):
        for i, e in enumerate(row):
            if e >= 0:
                per_expert[e] += 1
                gathered[t, i] = values[t, e]
        for g in {int(group[e]) for e in row if e >= 0}:
            per_group[g] += 1
    for kernels in KERNELS.values():
        assert kernels.expert_tokens(ids, n_experts).tolist() == per_expert
        assert kernels.group_tokens(ids, group, n_groups).tolist() == per_group
        assert kernels.distinct_groups(ids, group, n_groups) == sum(per_group)
        np.testing.assert_array_equal(kernels.picked(values, ids), gathered)


_HASH = """
import hashlib, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from sim.kernels import compiled, plain
kernels = compiled if sys.argv[2] == "numba" else plain
rng = np.random.Generator(np.random.Philox(7))
logits = (rng.integers(-2**20, 2**20, (700, 256)) / 2**18).astype(np.float32)
coarse = np.round(logits * 4) / 4
ones, shift = np.ones(256, np.float32), (rng.integers(-8, 9, 256) / 64).astype(np.float32)
digest = hashlib.sha256()
for x in (logits, coarse.astype(np.float32)):
    scores = kernels.sigmoid(x)
    digest.update(scores.tobytes())
    digest.update(kernels.softmax(x).tobytes())
    digest.update(kernels.topk(scores, ones, shift, 8).tobytes())
    digest.update(kernels.group_limited_topk(scores, ones, shift, 8, 8, 4, 2).tobytes())
print(digest.hexdigest())
"""


def _digest(kernels: str, disabled: str = "") -> str:
    environment = {k: v for k, v in os.environ.items() if k != "NPY_DISABLE_CPU_FEATURES"}
    if disabled:
        environment["NPY_DISABLE_CPU_FEATURES"] = disabled
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", _HASH, root, kernels]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_bits_do_not_depend_on_cpu_features() -> None:
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    present = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    digests = {"numba": _digest("numba"), "numpy": _digest("numpy")}
    if present:
        digests["numpy without " + " ".join(present)] = _digest("numpy", " ".join(present))
    assert len(set(digests.values())) == 1 and len(digests["numpy"]) == 64, digests
