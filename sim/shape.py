"""The sizes that describe a model, and the rules between them. What follows from the sizes is in `sim.model`.

Keys are Hugging Face's canonical names (DeepSeek's where spellings differ). Each broken rule is reported at the field
it concerns, all of them at once: rules are field validators that look at the fields above their own (pydantic's
``info.data``, which lacks a field whose own rule failed).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

T = TypeVar("T")

Count = Annotated[int, Field(strict=True, ge=0, le=10**7)]
Size = Annotated[int, Field(strict=True, ge=1, le=10**7)]
Experts = Annotated[int, Field(strict=True, ge=0, le=32767)]  # expert ids are int16 everywhere
Layers = Annotated[int, Field(strict=True, ge=0, le=10_000)]


class Published(BaseModel):
    """What the model's authors state, for the tests and the docs; nothing is computed from it.

    total_b, active_b: parameters in 1e9. active_excludes: which matrices that active count leaves out.
    tolerance: largest relative error of `Model` against these figures (wider where the source prints one digit).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    source: str
    total_b: float | None = Field(default=None, gt=0)
    active_b: float | None = Field(default=None, gt=0)
    active_excludes: Literal["nothing", "input_embedding", "embeddings"] = "nothing"
    tolerance: float = Field(default=0.015, gt=0, le=0.1)


class Shape(BaseModel):
    """Sizes of one model. ``n_routed_experts: 0`` is a dense model; ``kv_lora_rank`` set means MLA, else MHA / GQA.

    Layers are numbered from 0. With ``num_encoder_layers`` n > 0, layers 0..n-1 are an encoder and the rest a decoder
    whose layers also hold a cross-attention of the same sizes; per-token figures then count one input token through
    the encoder plus one target token through the decoder.
    Raises pydantic.ValidationError with every broken rule at the field it concerns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    # Fields stand in dependency order: a rule sees the fields above its own (pydantic's info.data).
    name: str = Field(min_length=1, max_length=100)
    """Shown in reports."""
    source: str = ""
    published: Published | None = None
    num_hidden_layers: Annotated[Layers, Field(ge=1)]
    """All layers, encoder and decoder together."""
    num_encoder_layers: Layers = 0
    """Of these, the first ones that are an encoder; 0: a decoder alone."""
    hidden_size: Size
    """h, width of the residual stream."""
    vocab_size: Count
    """Rows of the output head; 0: no head and no embedding."""
    tie_word_embeddings: bool = False
    """Whether head and input embedding are one matrix."""
    gated_ffn: bool = True
    """Three matrices per FFN (SwiGLU, GEGLU); false means two (ReLU, GELU)."""

    # Mixture of experts
    n_routed_experts: Experts = 0
    """E, routed experts of an MoE layer; 0: a dense model."""
    num_experts_per_tok: Experts = 0
    """k, routed experts of a token."""
    moe_intermediate_size: Size | None = None
    """Width of one routed expert."""
    moe_latent_size: Size | None = None
    """Routed experts work on this narrower vector between a down- and an up-projection (Kimi K3)."""
    n_shared_experts: Experts = 0
    """Experts that every token passes besides."""
    shared_expert_intermediate_size: Size | None = None
    """Width of one shared expert; null means ``moe_intermediate_size``."""
    n_group: Annotated[int, Field(strict=True, ge=1, le=32767)] = 1
    """Expert groups of the model's own gate; 1 (or null) means none."""
    topk_group: Annotated[int, Field(strict=True, ge=1, le=32767)] = 1
    """Groups that a token may reach."""
    scoring_func: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    """Softmax over the k selected logits (Mixtral, gpt-oss) is softmax with ``norm_topk_prob: true``."""
    norm_topk_prob: bool = False
    """Whether the gate weights of a token are divided by their sum."""
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    """Factor on the gate weights."""

    # Which layers hold experts: position p in its stack is MoE when p >= first_k_dense_replace,
    # p % moe_layer_freq == moe_layer_offset, and the layer is not in mlp_only_layers.
    first_k_dense_replace: Layers = 0
    """Layers at the start that are dense."""
    moe_layer_freq: Annotated[Layers, Field(ge=1)] = 1
    """Every how manyth layer has experts."""
    moe_layer_offset: Layers = 0
    """Remainder that such a layer's number leaves by moe_layer_freq."""
    mlp_only_layers: tuple[Layers, ...] = ()
    """Layers that are dense in any case."""
    intermediate_size: Size | None = None
    """Width of the FFN of layers without experts."""

    # Attention
    num_attention_heads: Size
    """Query heads."""
    num_key_value_heads: Size | None = None
    """Null means one per query head (MHA)."""
    q_lora_rank: Size | None = None
    """MLA: width of the compressed query; null: not compressed."""
    kv_lora_rank: Size | None = None
    """MLA: width of the latent that stands for keys and values; null: no MLA."""
    qk_rope_head_dim: Count | None = None
    """MLA: rotary part of a query or key."""
    qk_nope_head_dim: Size | None = None
    """MLA: the part without rotation, of each head."""
    v_head_dim: Size | None = None
    """Width of a head's value; null: that of its key."""
    head_dim: Size | None = None
    """Null means hidden_size / num_attention_heads; not used by MLA."""
    attention_k_eq_v: bool = False
    """Keys and values are one vector (DeepSeek-V4, Gemma 4)."""
    o_lora_rank: Size | None = None
    """Output projection in two steps, o_groups blocks to this rank each (DeepSeek-V4)."""
    o_groups: Size = 1
    """Blocks of the output projection with ``o_lora_rank``."""
    sliding_window: Size | None = None
    """Positions a windowed layer sees; layer i is windowed unless (i + 1) % full_attention_interval == 0."""
    full_attention_interval: Size = 1
    """Every how manyth layer attends to everything where ``sliding_window`` is set."""
    index_topk: Size | None = None
    """Sparse attention: each token attends to this many positions picked by an indexer (DeepSeek-V3.2)."""
    index_n_heads: Size | None = None
    """Heads of the indexer."""
    index_head_dim: Size | None = None
    """Width of an indexer's head."""

    num_nextn_predict_layers: Layers = 0
    """Multi-token-prediction modules; in `mtp_parameters`, not in the totals."""

    # -- rules across fields ------------------------------------------------------------------------------------

    @field_validator("n_group", "topk_group", mode="before")
    @classmethod
    def _null_is_one(cls, value: Any) -> Any:
        return 1 if value is None else value

    @field_validator("num_encoder_layers")
    @classmethod
    def _encoder(cls, value: int, info: ValidationInfo) -> int:
        layers = info.data.get("num_hidden_layers")
        fits = layers is None or value < layers
        return _rule(value, fits, "must be below num_hidden_layers ({layers})", layers=layers)

    @field_validator("num_experts_per_tok")
    @classmethod
    def _k(cls, value: int, info: ValidationInfo) -> int:
        experts = info.data.get("n_routed_experts")
        if experts is None:
            return value
        if experts == 0:
            return _rule(value, value == 0, "must be 0 in a dense model (n_routed_experts is 0)")
        _rule(value, value >= 1, "must be at least 1 when n_routed_experts is {experts}", experts=experts)
        return _rule(value, value <= experts, "must be at most n_routed_experts ({experts})", experts=experts)

    @field_validator("moe_intermediate_size")
    @classmethod
    def _expert_width(cls, value: int | None, info: ValidationInfo) -> int | None:
        experts = info.data.get("n_routed_experts")
        return _rule(value, not experts or value is not None, "is needed: the width of a routed expert")

    @field_validator("moe_latent_size", "n_shared_experts")
    @classmethod
    def _only_with_experts(cls, value: int | None, info: ValidationInfo) -> int | None:
        experts = info.data.get("n_routed_experts")
        return _rule(value, not value or experts != 0, "needs routed experts (n_routed_experts is 0)")

    @field_validator("n_group")
    @classmethod
    def _groups(cls, value: int, info: ValidationInfo) -> int:
        experts = info.data.get("n_routed_experts")
        fits = experts is None or (experts % value == 0 and (experts > 0 or value == 1))
        return _rule(value, fits, "must divide n_routed_experts ({experts})", experts=experts)

    @field_validator("topk_group")
    @classmethod
    def _kept_groups(cls, value: int, info: ValidationInfo) -> int:
        groups, experts, k = (info.data.get(key) for key in ("n_group", "n_routed_experts", "num_experts_per_tok"))
        if groups is None:
            return value
        _rule(value, value <= groups, "must be at most n_group ({groups})", groups=groups)
        if not experts or k is None:
            return value
        room = value * (experts // groups)
        rule = "leaves {room} experts to choose from, fewer than num_experts_per_tok ({k})"
        return _rule(value, k <= room, rule, room=room, k=k)

    @field_validator("moe_layer_offset")
    @classmethod
    def _offset(cls, value: int, info: ValidationInfo) -> int:
        freq = info.data.get("moe_layer_freq")
        return _rule(value, freq is None or value < freq, "must be below moe_layer_freq ({freq})", freq=freq)

    @field_validator("mlp_only_layers")
    @classmethod
    def _listed_layers(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        layers = info.data.get("num_hidden_layers")
        inside = layers is None or all(layer < layers for layer in value)
        value = _rule(value, inside, "lists a layer that is not below num_hidden_layers ({layers})", layers=layers)
        pattern = expert_layers(info.data | {"mlp_only_layers": value})
        needs_one = info.data.get("n_routed_experts", 0) > 0 and pattern is not None
        return _rule(value, not needs_one or bool(pattern), "and the layer pattern leave no layer with experts")

    @field_validator("intermediate_size")
    @classmethod
    def _dense_width(cls, value: int | None, info: ValidationInfo) -> int | None:
        pattern = expert_layers(info.data)
        if pattern is None or len(pattern) == info.data["num_hidden_layers"]:
            return value
        dense = info.data["num_hidden_layers"] - len(pattern)
        return _rule(value, value is not None, "is needed: the FFN width of {dense} dense layers", dense=dense)

    @field_validator("num_key_value_heads")
    @classmethod
    def _kv_heads(cls, value: int | None, info: ValidationInfo) -> int | None:
        heads = info.data.get("num_attention_heads")
        fits = value is None or heads is None or heads % value == 0
        return _rule(value, fits, "must divide num_attention_heads ({heads})", heads=heads)

    @field_validator("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    @classmethod
    def _mla(cls, value: int | None, info: ValidationInfo) -> int | None:
        mla = info.data.get("kv_lora_rank") is not None
        return _rule(value, not mla or value is not None, "is needed with kv_lora_rank (MLA)")

    @field_validator("head_dim")
    @classmethod
    def _head_width(cls, value: int | None, info: ValidationInfo) -> int | None:
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads")
        if value is not None or info.data.get("kv_lora_rank", 0) is not None or not hidden or not heads:
            return value
        rule = "is needed: hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})"
        return _rule(value, hidden % heads == 0, rule, hidden=hidden, heads=heads)

    @field_validator("o_groups")
    @classmethod
    def _output_groups(cls, value: int, info: ValidationInfo) -> int:
        heads = info.data.get("num_attention_heads")
        fits = heads is None or heads % value == 0
        return _rule(value, fits, "must divide num_attention_heads ({heads})", heads=heads)

    @field_validator("index_n_heads", "index_head_dim")
    @classmethod
    def _indexer(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _rule(value, info.data.get("index_topk") is None or value is not None, "is needed with index_topk")


PATTERN = (
    "num_hidden_layers",
    "num_encoder_layers",
    "n_routed_experts",
    "first_k_dense_replace",
    "moe_layer_freq",
    "moe_layer_offset",
    "mlp_only_layers",
)


def expert_layers(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Layers with experts, or None while one of the fields needed is missing (because its own rule failed)."""
    if any(key not in fields for key in PATTERN):
        return None
    layers, encoder, experts, first, freq, offset, dense = (fields[key] for key in PATTERN)
    if experts == 0:
        return ()
    listed = frozenset(dense)
    position = [layer if layer < encoder else layer - encoder for layer in range(layers)]
    return tuple(i for i, p in enumerate(position) if p >= first and p % freq == offset and i not in listed)


def _rule(value: T, holds: bool, rule: str, **context: Any) -> T:
    """Return ``value``, or fail at the field being validated with ``rule`` as the whole message."""
    if not holds:
        raise PydanticCustomError("geometry", rule, context)
    return value
