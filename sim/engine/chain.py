"""The order of a step's operations on the two streams of every device, without their durations.

One MoE layer, forward: attention (projections, core, norms, gate) -> dispatch -> experts -> combine, the shared experts
while the dispatch is in flight. Backward mirrors it: the gradients are dispatched to the experts, these run dgrad, the
results are combined, and wgrad fills the time that the combine takes (as in DualPipe and ZB1P). A dense layer is compute
only; tensor parallelism adds all-reduces. After the last layer comes the output head, where the caller asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from sim.cost import Part
from sim.engine.durations import Way
from sim.engine.plan import Stream
from sim.pipeline.blocks import Block

# How one layer's phases of two interleaved chains share the streams: phases of equal slot stand side by side.
_SLOT = {
    "attention": 0, "dense_ffn": 1, "head": 1, "tensor_parallel": 2, "dispatch": 2, "shared_experts": 3, "experts": 4,
    "combine": 5,
}  # fmt: skip
_SLOT_BACKWARD = {
    "dispatch": 0, "shared_experts": 1, "dense_ffn": 1, "head": 1, "experts": 2, "experts_wgrad": 3, "combine": 3,
    "attention": 4, "tensor_parallel": 5,
}  # fmt: skip
_COMMUNICATION = ("dispatch", "combine", "tensor_parallel")


class Key(NamedTuple):
    """An operation's name: chain (micro-batch), direction, block and phase."""

    chain: int
    way: Way
    block: Block
    phase: str


@dataclass(frozen=True, slots=True)
class Item:
    """An operation before it has a place in the program: its slot within the layer and the items it waits for."""

    slot: int
    key: Key
    after: tuple[Key, ...]

    @property
    def stream(self) -> Stream:
        return "communication" if self.key.phase in _COMMUNICATION else "compute"


def chain(
    number: int, way: Way, blocks: Sequence[Block], *, shared: bool, tensor_parallel: bool, before: tuple[Key, ...] = ()
) -> list[list[Item]]:
    """Return the operations of one chain through ``blocks`` (given in forward order), block by block.

    shared: MoE layers have shared experts. before: what must end first.
    """
    found = []
    for block in blocks if way == "forward" else reversed(blocks):
        items = _items(number, way, block, before, shared, tensor_parallel)
        before = ends(items)
        found.append(items)
    return found


def ends(items: Sequence[Item]) -> tuple[Key, ...]:
    """Return the keys nobody in ``items`` waits for: what comes next has to wait for them."""
    waited = {key for item in items for key in item.after}
    return tuple(item.key for item in items if item.key not in waited)


def interleave(chains: Sequence[list[list[Item]]]) -> list[Item]:
    """Merge chains block by block; within a block by slot, earlier chains first. Keeps every chain's own order."""
    merged: list[Item] = []
    for blocks in zip_longest(*chains, fillvalue=[]):
        merged += sorted((item for block in blocks for item in block), key=lambda item: item.slot)
    return merged


def expert_part(key: Key) -> Part:
    """Return which pass over the routed experts the operation is."""
    return "wgrad" if key.phase == "experts_wgrad" else "forward" if key.way == "forward" else "dgrad"


def _items(
    number: int, way: Way, block: Block, before: tuple[Key, ...], shared: bool, tensor_parallel: bool
) -> list[Item]:
    slots = _SLOT if way == "forward" else _SLOT_BACKWARD
    forward = way == "forward"

    def key(phase: str) -> Key:
        return Key(number, way, block, phase)

    def item(phase: str, after: tuple[Key, ...]) -> Item:
        return Item(slots[phase], key(phase), after)

    if way == "weights":  # put off: nothing to exchange, nothing between the products
        phases = {
            "moe": ["shared_experts"] * shared + ["experts_wgrad", "attention"],
            "dense": ["dense_ffn", "attention"],
        }
        return [item(phase, before) for phase in phases.get(block.kind, ["head"])]
    if block.is_head:
        return [item("head", before)]
    items: list[Item] = []
    if block.kind == "moe":
        first = before
        if forward:
            items.append(item("attention", before))
            first = (key("attention"),)
        items.append(item("dispatch", first))
        if shared:
            items.append(item("shared_experts", first))
        items.append(item("experts", (key("dispatch"),)))
        items.append(item("combine", (key("experts"),)))
        if way == "backward":
            items.append(item("experts_wgrad", (key("experts"),)))
        last: tuple[Key, ...] = (key("combine"), key("shared_experts")) if shared else (key("combine"),)
        if not forward:
            items.append(item("attention", last))
            last = (key("attention"),)
    else:
        order = ("attention", "dense_ffn") if forward else ("dense_ffn", "attention")
        items += [item(order[0], before), item(order[1], (key(order[0]),))]
        last = (key(order[1]),)
    if tensor_parallel:
        items.append(Item(6, key("tensor_parallel"), last))
    return items
