"""What a pipeline cuts into stages: layers, the output head, MTP modules; their work and their parameters."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from sim.model import Model
from sim.pipeline import split_layers


class Block(NamedTuple):
    """A layer or an output head. number: its place in the model. layer: the layer whose sizes and routing it has."""

    number: int
    layer: int
    kind: Literal["moe", "dense", "head", "mtp_head"]

    @property
    def is_head(self) -> bool:
        return self.kind in ("head", "mtp_head")


def layer_blocks(model: Model) -> list[Block]:
    """Return the layers of ``model`` in forward order."""
    experts = set(model.moe_layers)
    return [Block(i, i, "moe" if i in experts else "dense") for i in range(model.num_hidden_layers)]


def model_blocks(model: Model, mtp: bool) -> list[Block]:
    """Return layers and head, then with ``mtp`` each MTP module's layer and head (DeepSeek-V3 report, section 2.2).

    A module is one more layer like the last (its routing stands for the module's), a [2h, h] projection, and the shared
    output head.
    """
    blocks = layer_blocks(model)
    last = blocks[-1]
    blocks.append(Block(len(blocks), last.layer, "head"))
    for _ in range(model.num_nextn_predict_layers if mtp else 0):
        blocks.append(Block(len(blocks), last.layer, last.kind))
        blocks.append(Block(len(blocks), last.layer, "mtp_head"))
    return blocks


def head_flops(model: Model, block: Block) -> float:
    """Forward FLOP per token of an output head, and of an MTP module's projection with it."""
    return 2.0 * model.vocab_size * model.hidden_size + (
        4.0 * model.hidden_size**2 if block.kind == "mtp_head" else 0.0
    )


def block_parameters(model: Model, block: Block) -> tuple[float, float]:
    """Return the (dense, routed-expert) parameters of a block; the input embedding lies with the first layer. Over
    `model_blocks` they sum to the model's total, with the MTP modules if there are any."""
    if block.kind == "head":
        return float(model.parameters.head), 0.0
    if block.kind == "mtp_head":
        return 2.0 * model.hidden_size**2, 0.0
    parts = model.layer_parameters(block.layer)
    embedding = model.parameters.embedding if block.number == 0 else 0.0
    return parts.total - parts.routed_experts + embedding, float(parts.routed_experts)


@lru_cache(maxsize=64)
def stage_blocks(
    model: Model, pp_size: int, mtp: bool, sequence_length: int, head_weight: float
) -> tuple[tuple[Block, ...], ...]:
    """Cut the model into stages of about equal work: forward FLOPs, those of heads weighted by ``head_weight`` (2 where
    heads run in bf16 and layers in fp8). Raises ValueError for more stages than blocks."""
    blocks = model_blocks(model, mtp)
    cost = tuple(
        head_flops(model, block) * head_weight
        if block.is_head
        else model.layer_flops_per_token(block.layer, sequence_length).total
        for block in blocks
    )
    return tuple(tuple(blocks[i] for i in cut) for cut in split_layers(cost, pp_size))
