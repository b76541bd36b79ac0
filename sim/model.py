"""Geometry of a transformer with Mixture-of-Experts layers: parameters, FLOPs and cache bytes from its sizes.

Knows sizes only: nothing about devices, number formats (bytes per element are arguments) or routing decisions. The
sizes and the rules between them are in `sim.shape`; other spellings of their names are read by `sim.hf`.

Counting rules, the same everywhere. Matrices only: biases, norms and position tables are left out (below 0.1 % in every
model shipped). A matrix of P parameters costs 2 P FLOP per token forward; training costs three times the forward pass.
The input embedding is a lookup: parameters but no FLOPs. Reference: DeepSeek-V3 technical report, section 2.1, and
"Insights into DeepSeek-V3" (arXiv 2505.09343) Table 2, whose DeepSeek rows these rules reproduce.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sim import hf
from sim.shape import PATTERN, Shape, expert_layers

TRAINING_TO_FORWARD_FLOPS = 3  # backward needs the gradient of the input and of the weights: two more products


@dataclass(frozen=True, slots=True)
class Parts:
    """One figure per part of one layer, or of the whole model: parameters, or forward FLOP per token.

    attention_projection: query, key, value and output matrices (with a decoder's cross-attention, with an indexer).
    attention_core: scores and weighted values; depends on the context length, has no parameters.
    dense_ffn: the FFN of a layer without experts.
    routed_experts: parameters: all E experts; FLOP: the k experts of one token.
    shared_experts: FFN work of an MoE layer that every token does: shared experts and, if any, latent projections.
    router: the gate's matrix.
    head: output matrix over the vocabulary; embedding: input matrix (no FLOPs). Both are 0 in one layer's figures.
    """

    attention_projection: float = 0
    attention_core: float = 0
    dense_ffn: float = 0
    routed_experts: float = 0
    shared_experts: float = 0
    router: float = 0
    head: float = 0
    embedding: float = 0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, name) for name in self.__slots__))

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


class Model(Shape):
    """A `Shape` with everything that follows from it: parameters, FLOPs and cache bytes, by part and by layer."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], name: str) -> Model:
        """Read a Hugging Face ``config.json`` (already parsed) of a dense or MoE language model.

        Raises ValueError (pydantic.ValidationError is one) naming the keys looked for when a size stays unknown.
        """
        return cls(name=name, source=f"config.json, model_type {config.get('model_type')}", **hf.geometry(config))

    # -- layers -------------------------------------------------------------------------------------------------

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts, ascending; empty in a dense model."""
        return expert_layers({key: getattr(self, key) for key in PATTERN}) or ()

    @property
    def n_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts > 0

    @property
    def dispatch_hidden_size(self) -> int:
        """Elements of the vector that a token sends to a routed expert."""
        return self.moe_latent_size or self.hidden_size

    # -- parameters ---------------------------------------------------------------------------------------------

    def _ffn(self, hidden: int, width: int) -> int:
        return (3 if self.gated_ffn else 2) * hidden * width

    @property
    def expert_parameters(self) -> int:
        """One routed expert: 3 h m gated, 2 h m not; h is the latent size where there is one."""
        return self._ffn(self.dispatch_hidden_size, self.moe_intermediate_size or 0) if self.is_moe else 0

    @property
    def shared_expert_parameters(self) -> int:
        """What every token passes in an MoE layer besides the router: all shared experts, latent projections."""
        width = self.shared_expert_intermediate_size or self.moe_intermediate_size or 0
        latent = 2 * self.hidden_size * self.moe_latent_size if self.moe_latent_size else 0
        return self.n_shared_experts * self._ffn(self.hidden_size, width) + latent

    @property
    def router_parameters(self) -> int:
        return self.hidden_size * self.n_routed_experts

    @property
    def dense_ffn_parameters(self) -> int:
        """The FFN of one dense layer."""
        return self._ffn(self.hidden_size, self.intermediate_size or 0)

    @property
    def _qk_dim(self) -> int:
        if self.kv_lora_rank:
            return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def _v_dim(self) -> int:
        return self.v_head_dim or self._qk_dim

    @property
    def _kv_elements(self) -> int:
        """Cached elements per token and layer: latent and rope key (MLA), else keys and values of every KV head."""
        index = (self.index_head_dim or 0) if self.index_topk else 0
        if self.kv_lora_rank:
            return self.kv_lora_rank + (self.qk_rope_head_dim or 0) + index
        width = self._qk_dim if self.attention_k_eq_v else self._qk_dim + self._v_dim
        return (self.num_key_value_heads or self.num_attention_heads) * width + index

    @property
    def attention_parameters(self) -> int:
        """One self-attention (one cross-attention is as large).

        MLA (DeepSeek-V2, section 2.1): W_DQ, W_UQ, W_DKV with W_KR, W_UK and W_UV, W_O.
        """
        hidden, heads, v_dim = self.hidden_size, self.num_attention_heads, self._v_dim
        if self.q_lora_rank:
            query = self.q_lora_rank * (hidden + heads * self._qk_dim)
        else:
            query = hidden * heads * self._qk_dim
        index = 0
        if self.index_topk:
            index_heads, index_dim = self.index_n_heads or 0, self.index_head_dim or 0
            index = (self.q_lora_rank or hidden) * index_heads * index_dim + hidden * (index_dim + index_heads)
            key_value = hidden * (self._kv_elements - index_dim)
        else:
            key_value = hidden * self._kv_elements
        if self.kv_lora_rank:
            key_value += self.kv_lora_rank * heads * ((self.qk_nope_head_dim or 0) + v_dim)
        if self.o_lora_rank:
            output = self.o_lora_rank * (heads * v_dim + self.o_groups * hidden)
        else:
            output = heads * v_dim * hidden
        return query + key_value + output + index

    @property
    def up_projection_parameters(self) -> int:
        """MLA's W_UQ, W_UK and W_UV, which DeepSeek-V3 recomputes in the backward (report, section 3.2.3); 0 without."""
        if not self.kv_lora_rank:
            return 0
        query = (self.q_lora_rank or 0) * self._qk_dim
        return self.num_attention_heads * (query + self.kv_lora_rank * ((self.qk_nope_head_dim or 0) + self._v_dim))

    def layer_parameters(self, layer: int) -> Parts:
        """Parameters of one layer by part. Raises IndexError outside 0..num_hidden_layers-1."""
        attention = self.attention_parameters * (2 if self._has_cross_attention(layer) else 1)
        at = bisect_left(self.moe_layers, layer)
        if at < self.n_moe_layers and self.moe_layers[at] == layer:
            return Parts(
                attention_projection=attention,
                routed_experts=self.n_routed_experts * self.expert_parameters,
                shared_experts=self.shared_expert_parameters,
                router=self.router_parameters,
            )
        return Parts(attention_projection=attention, dense_ffn=self.dense_ffn_parameters)

    def _has_cross_attention(self, layer: int) -> bool:
        if not 0 <= layer < self.num_hidden_layers:
            raise IndexError(f"layer {layer} is not in 0..{self.num_hidden_layers - 1}")
        return 0 < self.num_encoder_layers <= layer

    @cached_property
    def parameters(self) -> Parts:
        """All parameters by part; a tied vocabulary matrix counts once, as the head."""
        vocabulary = self.vocab_size * self.hidden_size
        ends = Parts(head=vocabulary, embedding=0 if self.tie_word_embeddings else vocabulary)
        return sum((self.layer_parameters(layer) for layer in range(self.num_hidden_layers)), ends)

    @property
    def total_parameters(self) -> int:
        return int(self.parameters.total)

    @property
    def active_parameters(self) -> int:
        """What one token uses, both vocabulary matrices included: the total less the E - k experts not chosen."""
        idle = (self.n_routed_experts - self.num_experts_per_tok) * self.expert_parameters
        return self.total_parameters - self.n_moe_layers * idle

    @property
    def active_parameters_without_input_embedding(self) -> int:
        """As `active_parameters` without the lookup table (a tied matrix stays: it is the head)."""
        return self.active_parameters - int(self.parameters.embedding)

    @property
    def active_parameters_without_embeddings(self) -> int:
        return self.active_parameters_without_input_embedding - int(self.parameters.head)

    @property
    def mtp_parameters(self) -> int:
        """Unique parameters of the MTP modules: each one more layer and a [2h, h] projection (V3 section 2.2)."""
        module = int(self.layer_parameters(self.num_hidden_layers - 1).total) + 2 * self.hidden_size**2
        return self.num_nextn_predict_layers * module

    # -- work and memory per token ------------------------------------------------------------------------------

    @property
    def expert_flops(self) -> int:
        """Forward FLOP of one (token, expert) pair: 6 h m gated."""
        return 2 * self.expert_parameters

    def attention_core_flops(self, positions: float, *, absorbed: bool = False) -> float:
        """Forward FLOP of scores and weighted values of one token that attends to ``positions`` cached positions.

        Per head 2 (d_qk + d_v) per position. ``absorbed`` is MLA's decode form (DeepSeek-V2 section 2.1.2:
        up-projections folded into query and output), 2 (2 kv_lora_rank + qk_rope_head_dim). No window or
        indexer is applied here.
        """
        width = self._qk_dim + self._v_dim
        if absorbed and self.kv_lora_rank:
            width = 2 * self.kv_lora_rank + (self.qk_rope_head_dim or 0)
        return 2.0 * self.num_attention_heads * width * positions

    def _core(self, layer: int, sequence_length: int, causal: bool) -> float:
        context = mean_positions(sequence_length, causal)
        cross = self.attention_core_flops(sequence_length) if self._has_cross_attention(layer) else 0.0
        if self.index_topk:
            index = 2.0 * (self.index_n_heads or 0) * (self.index_head_dim or 0) * context
            return cross + index + self.attention_core_flops(mean_positions(sequence_length, causal, self.index_topk))
        windowed = self.sliding_window is not None and (layer + 1) % self.full_attention_interval != 0
        if windowed:
            context = mean_positions(sequence_length, causal, self.sliding_window)
        elif layer < self.num_encoder_layers:
            context = mean_positions(sequence_length, causal=False)  # an encoder sees both sides
        return cross + self.attention_core_flops(context)

    def layer_flops_per_token(self, layer: int, sequence_length: int, causal: bool = True) -> Parts:
        """Forward FLOP of one token in one layer, averaged over a sequence of ``sequence_length`` tokens.

        ``routed_experts`` is the work of k experts; the engine, which knows who computes what, uses `expert_flops` per
        (token, expert) pair instead. Raises IndexError for an unknown layer, ValueError for sequence_length < 1.
        """
        weights = self.layer_parameters(layer)
        return Parts(
            attention_projection=2 * weights.attention_projection,
            attention_core=self._core(layer, sequence_length, causal),
            dense_ffn=2 * weights.dense_ffn,
            routed_experts=self.num_experts_per_tok * self.expert_flops if weights.router else 0,
            shared_experts=2 * weights.shared_experts,
            router=2 * weights.router,
        )

    def forward_flops_parts(self, sequence_length: int, causal: bool = True) -> Parts:
        """Forward FLOP per token of the whole model by part, the head included."""
        head = Parts(head=2 * self.vocab_size * self.hidden_size)
        layers = (self.layer_flops_per_token(i, sequence_length, causal) for i in range(self.num_hidden_layers))
        return sum(layers, head)

    def forward_flops_per_token(self, sequence_length: int, causal: bool = True) -> float:
        return self.forward_flops_parts(sequence_length, causal).total

    def training_flops_per_token(self, sequence_length: int, causal: bool = True) -> float:
        """Three times the forward pass (no recomputation): V3 at 4096, causal, is 250.4 GFLOP."""
        return TRAINING_TO_FORWARD_FLOPS * self.forward_flops_per_token(sequence_length, causal)

    def kv_cache_bytes_per_token(self, bytes_per_element: float = 2) -> float:
        """Cache of one token over all decoder layers; windowed layers count too, so long contexts need less."""
        return self._kv_elements * (self.num_hidden_layers - self.num_encoder_layers) * bytes_per_element


def mean_positions(sequence_length: int, causal: bool, limit: int | None = None) -> float:
    """Mean positions a token of a sequence attends to: S, or S / 2 when causal, at most ``limit`` each.

    Causal is the continuous convention (token at t sees t positions, integrated over 0..S), the one that reproduces
    arXiv 2505.09343 Table 2. With a limit L < S: L - L^2 / (2 S). Raises ValueError for sequence_length < 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1 [got {sequence_length}]")
    span = float(sequence_length if limit is None else min(sequence_length, limit))
    return span - span * span / (2 * sequence_length) if causal else span
