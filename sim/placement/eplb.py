"""DeepSeek's expert-parallel load balancer (EPLB): replicate the hottest experts, pack replicas evenly.

Follows the algorithm of github.com/deepseek-ai/EPLB (README and V3 report, section 3.4), written for all layers at once.
Upstream computes in float32, and so does this file: where two candidates differ by less than float32 can hold, a finer
sum would choose otherwise and end with another load. Weights are rounded once, on entry, so whole numbers of tokens up to
2^24 are exact; an expert's load per replica is a float32 quotient, a pack's load a float32 sum in order of arrival.
Ties, which upstream leaves to an unstable sort, go to the lowest index.
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from sim.placement import Evidence, Observed, Placement
from sim.slots import Slots
from sim.tokens import F32, F64, I32, I64

T = TypeVar("T", bound=np.generic)


def rebalance_experts(
    weight: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[I64, I64, I64]:
    """Return ``(physical_to_logical_map, logical_to_physical_map, logical_count)`` for every layer.

    weight: [L, E] load of each expert, >= 0. num_replicas: slots of a layer, numbered GPU after GPU, node after node.
    num_groups: groups of consecutive experts. Where ``num_nodes`` divides it, groups are packed whole onto nodes and
    their experts replicated within the node (hierarchical); otherwise groups and nodes are ignored (global).

    physical_to_logical_map: [L, num_replicas] int64, the expert of each slot.
    logical_to_physical_map: [L, E, X] int64, the slots of each expert in the order in which its replicas were made,
    padded with -1; X is the largest count. logical_count: [L, E] int64, replicas of each expert.

    Raises ValueError if an argument has no such meaning or does not divide.

    The example of upstream's README:

    >>> weight = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    ...           [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    >>> for row in rebalance_experts(weight, 16, num_groups=4, num_nodes=2, num_gpus=8)[0]:
    ...     print(*row)
    5 6 5 7 8 4 3 4 10 9 10 2 0 1 11 1
    7 10 6 8 6 11 8 9 2 4 5 1 5 0 3 1
    """
    loads = _checked(weight, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers, experts = loads.shape
    # Experts in node order: whole groups, packed by their load. [L, E], the expert at each place.
    group_size = experts // num_groups
    group_at = balanced_packing(loads.reshape(layers, num_groups, group_size).sum(axis=-1), num_nodes)
    expert_at = (group_at[..., None] * group_size + np.arange(group_size)).reshape(layers, experts)
    # Replicas within each node, then onto its GPUs: nodes of all layers are rows of one array.
    in_node = _pick(loads, expert_at).reshape(layers * num_nodes, -1)
    local, made, count = replicate_experts(in_node, num_replicas // num_nodes)
    per_replica: F32 = np.divide(in_node, count.astype(np.float32))
    replica_at = balanced_packing(_pick(per_replica, local), num_gpus // num_nodes)
    first = np.arange(num_nodes)[:, None] * (experts // num_nodes)
    places = _pick(local, replica_at).reshape(layers, num_nodes, -1) + first
    physical = _pick(expert_at, places.reshape(layers, -1))
    made = _pick(made, replica_at).reshape(layers, -1)
    row = np.arange(layers)[:, None]
    logical_count = np.empty_like(expert_at)
    logical_count[row, expert_at] = count.reshape(layers, experts)
    logical = np.full((layers, experts, int(count.max())), -1, dtype=np.int64)
    logical[row, physical, made] = np.arange(num_replicas)
    return physical, logical, logical_count


def balanced_packing(weight: F32 | F64, num_packs: int) -> I64:
    """Return [X, n]: the items pack after pack, n / num_packs in each, within a pack in order of arrival.

    weight: [X, n], every row a problem of its own. Heaviest first, each item goes to the lightest pack with room, whose
    load is summed in the precision given. One item per pack: item i goes to pack i, whatever it weighs.
    """
    rows, n = weight.shape
    room = n // num_packs
    if room == 1:
        return np.broadcast_to(np.arange(n), (rows, n))
    order = np.argsort(-weight, axis=-1, kind="stable")
    heaviest, order = np.ascontiguousarray(_pick(weight, order).T), np.ascontiguousarray(order.T)
    load = np.zeros((rows, num_packs), dtype=weight.dtype)
    packs, first = load.reshape(-1), np.arange(rows) * num_packs
    free = np.arange(rows * num_packs) * room  # the next place of each pack, of all rows together
    closing = np.zeros(rows * n + 1, dtype=weight.dtype)
    closing[room::room] = np.inf  # where a pack ends: nothing is lighter than a full one
    packed = np.empty(rows * n, dtype=np.int64)
    for item, its_weight in zip(order, heaviest, strict=True):
        pack = load.argmin(axis=1)
        pack += first
        place = free[pack]
        packed[place] = item
        place += 1
        free[pack] = place
        packs[pack] += its_weight + closing[place]
    return packed.reshape(rows, n)


def replicate_experts(weight: F32 | F64, num_replicas: int, most: int | None = None) -> tuple[I64, I64, I64]:
    """Return the expert [X, num_replicas] of each replica, which of its expert's it is, and the counts [X, n].

    weight: [X, n], every row a problem of its own. One replica each, then the next to the largest load per replica, a
    quotient in the precision given. most: replicas that an expert may have (at least num_replicas / n), by default any number.
    """
    rows, n = weight.shape
    expert = np.empty((num_replicas, rows), dtype=np.int64)
    made = np.zeros((num_replicas, rows), dtype=np.int64)
    expert[:n] = np.arange(n)[:, None]
    count = np.ones(rows * n, dtype=np.int64)
    share = weight.copy()
    shares, weights, first = share.reshape(-1), weight.reshape(-1), np.arange(rows) * n
    for i in range(n, num_replicas):
        hottest = share.argmax(axis=1)
        expert[i] = hottest
        hottest += first
        made[i] = count[hottest]
        count[hottest] += 1
        shares[hottest] = weights[hottest] / count[hottest].astype(weight.dtype)
        if most is not None:
            shares[hottest[count[hottest] >= most]] = -1.0
    return np.ascontiguousarray(expert.T), np.ascontiguousarray(made.T), count.reshape(rows, n)


class Eplb(Placement):
    """EPLB on the load of all windows together.

    policy: ``hierarchical`` keeps expert groups inside a node and needs a number of groups that the nodes divide;
    ``global`` ignores both; ``auto`` takes the first where it can, as upstream does. A layer without traffic counts as
    evenly loaded. Nothing of the map in force is kept: a rebalance moves most experts (vLLM issue 24069).
    """

    kind: Literal["eplb"] = "eplb"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"expert_tokens"})
    policy: Literal["auto", "hierarchical", "global"] = "auto"

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        groups, nodes = (1, 1) if self.policy == "global" else (slots.n_group, slots.n_nodes)
        if self.policy == "hierarchical" and groups % nodes:
            raise ValueError(f"policy hierarchical needs n_group = {groups} to be a multiple of n_nodes = {nodes}")
        return rebalance_experts(seen_load(observed), slots.n_slots, groups, nodes, slots.ep_size)[0].astype(np.int32)


def seen_load(observed: Observed) -> F64:
    """Return [L, E]: the load of all windows, ones for a layer that saw no token."""
    load = observed.load
    return np.where(load.sum(axis=-1, keepdims=True) > 0, load, 1.0)


def _pick(values: npt.NDArray[T], at: I64) -> npt.NDArray[T]:
    """Return ``values[x, at[x, i]]`` [X, m]; twice as fast as take_along_axis."""
    picked: npt.NDArray[T] = values.reshape(-1)[at + np.arange(len(values))[:, None] * values.shape[1]]
    return picked


def _checked(weight: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> F32:
    """Return ``weight`` as float32; raise ValueError unless all arguments make sense together."""
    given = np.asarray(weight)
    if given.ndim != 2 or not given.size:
        raise ValueError(f"weight must be [layers, experts], both at least 1, has shape {given.shape}")
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, is {size}")
    with np.errstate(over="ignore", invalid="ignore"):
        loads = given.astype(np.float32)
        total = loads.sum(axis=-1)
    if not (loads >= 0).all() or not np.isfinite(total).all():
        raise ValueError("weight must be finite in float32, summed over a layer too, and not negative")
    experts = given.shape[1]
    if num_replicas < experts:
        raise ValueError(f"num_replicas = {num_replicas} must be at least the number of experts, {experts}")
    _divides("num_replicas", num_replicas, "num_gpus", num_gpus)
    if num_groups % num_nodes == 0:
        _divides("the number of experts", experts, "num_groups", num_groups)
        _divides("num_gpus", num_gpus, "num_nodes", num_nodes)
    return loads


def _divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    if whole % part:
        raise ValueError(f"{whole_name} = {whole} must be a multiple of {part_name} = {part}")
