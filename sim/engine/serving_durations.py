"""Seconds of everything in a serving iteration that does not depend on routing, from the tokens that a rank holds.

Kernels are counted one by one: products with the quantisation of their input, attention, norms, gate, activations.
What depends on a number of tokens alone is tabulated at every whole number, so that a run's iterations look it up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sim.cost import ComputeCost
from sim.cost.attention import Phase, attention_shape
from sim.cost.elementwise import gate_s, norm_s, swiglu_s
from sim.hardware import Device, Dtype
from sim.model import Model
from sim.tokens import F64, I64, Bool

_BLOCK = 1024
_CONTEXT = 512
"""Positions between neighbouring contexts in the table of decode attention, whose law is all but linear between them."""


class Lookup:
    """Values of a law at whole numbers, computed in blocks when first asked for.

    Blocks are always the same ones, because the last bits of array functions may depend on an array's length.
    """

    def __init__(self, law: Callable[[F64], F64]) -> None:
        self.law, self._values = law, np.zeros(0)

    def upto(self, most: int) -> F64:
        """Return the law at 0, 1, ... at least to ``most``; 0 at 0."""
        known = len(self._values)
        if most >= known:
            starts = range(known, most + 1, _BLOCK)
            blocks = [self.law(np.arange(start, start + _BLOCK, dtype=np.float64)) for start in starts]
            self._values = np.concatenate([self._values, *blocks])
            self._values[0] = 0.0
        return self._values

    def at(self, count: int) -> float:
        return float(self.upto(count)[count])


class TrunkTimes:
    """Laws of one device for ``model`` split over ``tp_size`` ranks; ``sm_fraction`` of its SMs are left to compute."""

    def __init__(
        self,
        model: Model,
        device: Device,
        cost: ComputeCost,
        *,
        dtype: Dtype,
        tp_size: int,
        sm_fraction: float,
        cache_bytes_per_element: float,
        choice_s: float,
    ) -> None:
        self.model, self.device, self.cost, self.dtype, self.tp = model, device, cost, dtype, tp_size
        self.sm_fraction, self.cache_bytes, self.choice_s = sm_fraction, cache_bytes_per_element, choice_s
        self.decode_shape = attention_shape(model, "decode", tp_size)
        self.prefill_shape = attention_shape(model, "prefill", tp_size)
        self.mla = model.kv_lora_rank is not None
        self.heads = max(1, model.num_attention_heads // tp_size)
        self.before, self.shared = Lookup(self._before), Lookup(self._shared)
        self.dense, self.head = Lookup(self._dense), Lookup(self._head)
        self.absorbed, self.expanded = Lookup(self._absorbed), Lookup(self._expanded)
        self.gate, self.merge = Lookup(self._gate), Lookup(self._merge)
        self.layer = Lookup(lambda n: self._before(n) + self._after(n) + self._gate(n) + self._shared(n))
        """All of a layer that depends on its tokens alone."""
        self._decode: dict[tuple[Phase, int], F64] = {}

    def product(self, tokens: F64, in_features: float, out_features: float, dtype: Dtype | None = None) -> F64:
        """Seconds of one dense product, the quantisation of its input included."""
        return self.cost.gemm_s(
            self.device,
            tokens=tokens,
            in_features=in_features,
            out_features=out_features,
            dtype=dtype or self.dtype,
            sm_fraction=self.sm_fraction,
            quantise=True,
        )

    def moved(self, tokens: F64, elements: float, kernels: int = 1) -> F64:
        """Seconds of elementwise kernels that read and write ``elements`` bf16 numbers per token."""
        return self.cost.elementwise_s(self.device, bytes=tokens * elements * 4.0, kernels=kernels)

    def _before(self, n: F64) -> F64:
        """Norm, query and key-value projections, rotation and the write into the cache."""
        model, h = self.model, self.model.hidden_size
        seconds = norm_s(self.cost, self.device, tokens=n, hidden_size=h, kernels=1)
        if not self.mla:
            shape = self.decode_shape
            width = shape.num_heads * shape.qk_dim + shape.cache_elements
            return seconds + self.product(n, h, width) + self.moved(n, width)
        latent, rope = model.kv_lora_rank or 0, model.qk_rope_head_dim or 0
        qk = (model.qk_nope_head_dim or 0) + rope
        query = model.q_lora_rank or 0
        if query:
            seconds = seconds + self.product(n, h, query + latent + rope) + self.moved(n, query + latent, 2)
            seconds = seconds + self.product(n, query, self.heads * qk)
        else:
            seconds = seconds + self.product(n, h, self.heads * qk + latent + rope) + self.moved(n, latent)
        return seconds + self.moved(n, self.heads * rope + latent + rope)

    def _absorbed(self, n: F64) -> F64:
        """MLA's decode: W_UK into the query and W_UV into the output, one product per head, in bf16."""
        if not self.mla:
            return np.zeros_like(n)
        latent, nope = self.model.kv_lora_rank or 0, self.model.qk_nope_head_dim or 0
        value = self.model.v_head_dim or nope
        # FLOPs, weights and output of a batch of products [n, d] x [d, latent] are those of one [n, d] x [d, heads latent].
        return self.product(n, nope, self.heads * latent, "bf16") + self.product(n, latent, self.heads * value, "bf16")

    def _expanded(self, n: F64) -> F64:
        """MLA's prefill: keys and values of every head from the latent cache of ``n`` positions."""
        if not self.mla:
            return np.zeros_like(n)
        nope = self.model.qk_nope_head_dim or 0
        width = self.heads * (nope + (self.model.v_head_dim or nope))
        return self.product(n, self.model.kv_lora_rank or 0, width)

    def _after(self, n: F64) -> F64:
        """Output projection and second norm."""
        h = self.model.hidden_size
        value = self.prefill_shape.v_dim
        seconds = self.product(n, self.heads * value, h)
        return seconds + norm_s(self.cost, self.device, tokens=n, hidden_size=h, kernels=1)

    def _gate(self, n: F64) -> F64:
        """The gate and the choice of replicas; every tensor-parallel rank does it for all tokens."""
        model = self.model
        if not model.is_moe:
            return np.zeros_like(n)
        return self.choice_s + gate_s(
            self.cost,
            self.device,
            tokens=n,
            hidden_size=model.hidden_size,
            n_routed_experts=model.n_routed_experts,
            num_experts_per_tok=model.num_experts_per_tok,
        )

    def _merge(self, n: F64) -> F64:
        """What an MTP module does before its layer: a norm each of hidden state and embedding, and their projection."""
        h = self.model.hidden_size
        seconds = norm_s(self.cost, self.device, tokens=n, hidden_size=h, kernels=2)
        return seconds + self.product(n, 2 * h, h)

    def _ffn(self, n: F64, width: float) -> F64:
        h = self.model.hidden_size
        seconds = self.product(n, h, (2 if self.model.gated_ffn else 1) * width)
        seconds = seconds + swiglu_s(
            self.cost, self.device, pairs=n, moe_intermediate_size=int(width), dtype=self.dtype
        )
        return seconds + self.cost.gemm_s(
            self.device,
            tokens=n,
            in_features=width,
            out_features=h,
            dtype=self.dtype,
            sm_fraction=self.sm_fraction,
        )

    def _shared(self, n: F64) -> F64:
        """Shared experts, whose tokens are split over the tensor-parallel ranks."""
        model, n = self.model, np.ceil(n / self.tp)
        seconds = np.zeros_like(n)
        if model.n_shared_experts:
            width = model.shared_expert_intermediate_size or model.moe_intermediate_size or 0
            seconds = seconds + self._ffn(n, model.n_shared_experts * width)
        if model.moe_latent_size:
            seconds = seconds + self.product(n, model.hidden_size, model.moe_latent_size)
            seconds = seconds + self.product(n, model.moe_latent_size, model.hidden_size)
        return seconds

    def _dense(self, n: F64) -> F64:
        if not self.model.intermediate_size:
            return np.zeros_like(n)
        return self._ffn(n, self.model.intermediate_size / self.tp)

    def _head(self, n: F64) -> F64:
        """Last norm, the output matrix in bf16, the logits read once by the sampler."""
        h, words = self.model.hidden_size, self.model.vocab_size / self.tp
        seconds = norm_s(self.cost, self.device, tokens=n, hidden_size=h, kernels=1)
        return seconds + self.product(n, h, words, "bf16") + self.moved(n, words / 2)

    def decode_core(self, requests: I64, queries_each: int, kv_tokens: I64, prompts: Bool | None = None) -> F64:
        """Attention [D] of ``requests`` with ``queries_each`` query tokens and contexts of ``kv_tokens`` in all, taken to be
        of equal length; 0 where there are none. prompts: [D] ranks that have prompts beside them, if any do."""
        if prompts is None:
            return self._decodes("decode", requests, queries_each, kv_tokens)
        beside = self._decodes("mixed", requests * prompts, queries_each, kv_tokens * prompts)
        return beside + self._decodes("decode", requests * ~prompts, queries_each, kv_tokens * ~prompts)

    def _decodes(self, phase: Phase, requests: I64, queries_each: int, kv_tokens: I64) -> F64:
        place = kv_tokens / (np.maximum(requests, 1) * _CONTEXT)
        low = place.astype(np.int64)
        known = self._decode_table(phase, queries_each, int(requests.max()), int(low.max()) + 1)
        at = requests * known.shape[1] + low
        left, right = known.take(at), known.take(at + 1)
        seconds: F64 = left + (place - low) * (right - left)
        if np.isnan(seconds.max()):
            self._fill(known, phase, queries_each, np.union1d(at, at + 1))
            return self._decodes(phase, requests, queries_each, kv_tokens)
        return seconds

    def _decode_table(self, phase: Phase, queries_each: int, requests: int, contexts: int) -> F64:
        """[requests, contexts in steps of _CONTEXT], NaN where not known yet; large enough for the arguments."""
        known = self._decode.get((phase, queries_each), np.zeros((1, 1)))
        if requests >= known.shape[0] or contexts >= known.shape[1]:
            larger = np.full((max(known.shape[0], requests + 1), max(known.shape[1], contexts + 1)), np.nan)
            larger[: known.shape[0], : known.shape[1]] = known
            larger[0] = 0.0
            self._decode[phase, queries_each] = known = larger
        return known

    def _fill(self, known: F64, phase: Phase, queries_each: int, places: I64) -> None:
        for place in places.tolist():
            requests, context = divmod(place, known.shape[1])
            if np.isnan(known[requests, context]):
                new, held = np.full(requests, float(queries_each)), np.full(requests, max(1.0, context * _CONTEXT))
                known[requests, context] = self._attention(phase, new, held)

    def _attention(self, phase: Phase, query_tokens: F64, kv_tokens: F64) -> F64:
        """Attention of requests [..., r], mean over the layers with a window and those without."""
        model = self.model

        def law(window: int | None) -> F64:
            return self.cost.attention_s(
                self.device,
                shape=self.prefill_shape if phase == "prefill" else self.decode_shape,
                phase=phase,
                query_tokens=query_tokens,
                kv_tokens=kv_tokens,
                cache_bytes_per_element=self.cache_bytes,
                window=window,
                sm_fraction=self.sm_fraction,
            )

        every = model.full_attention_interval if model.sliding_window else 1
        whole = law(model.index_topk)
        return whole if every == 1 else (whole + (every - 1) * law(model.sliding_window)) / every

    def prefill_core(self, requests: I64, tokens: I64, pairs: F64) -> F64:
        """Attention [D] of prompts taken to be equal, with ``tokens`` new tokens and ``pairs`` (query, position) pairs in
        all; MLA's keys and values of their whole contexts are expanded first."""
        seconds = np.zeros(requests.shape)
        busy = np.flatnonzero(tokens)
        many = np.maximum(requests[busy], 1)
        new = tokens[busy] / many
        context = np.maximum(pairs[busy] / tokens[busy] + (new - 1) / 2, new)
        there = np.arange(int(many.max())) < many[:, None]
        core = self._attention("prefill", np.where(there, new[:, None], 0.0), np.where(there, context[:, None], 0.0))
        positions = np.rint(context * many).astype(np.int64)
        seconds[busy] = core + self.expanded.upto(int(positions.max()))[positions]
        return seconds
