"""Our own arrays: an npz with ``topk_ids`` [L, N, k], or with every expert's ``scores`` or ``logits`` [L, N, E].

Optional beside them: ``topk_weights`` [L, N, k] floats, or ``topk_prob_u8`` (the same times 255, as bytes); ``seqlens``
[S]; ``layers`` [L]; the scalar ``n_routed_experts``; and one name per sequence, ``domain``, else ``category``, else
``dataset`` [S]. Any integer or float type; further arrays are ignored.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sim.traces.npzfile import Array, read_npz
from sim.traces.trace import RecordedTrace, checked

_DOMAINS = ("domain", "category", "dataset")
_EXPECTED = {
    "topk_ids": Array(kinds="iu", ndim=3, optional=True),
    "logits": Array(kinds="f", ndim=3, optional=True),
    "scores": Array(kinds="f", ndim=3, optional=True),
    "logical_count": Array(kinds="iu", ndim=3, optional=True),
    "topk_weights": Array(kinds="f", ndim=3, optional=True),
    "topk_prob_u8": Array(kinds="iu", ndim=3, optional=True),
    "seqlens": Array(kinds="iu", ndim=1, optional=True),
    "layers": Array(kinds="iu", ndim=1, optional=True),
    "n_routed_experts": Array(kinds="iu", ndim=0, optional=True),
    "num_experts_per_tok": Array(kinds="iu", ndim=0, optional=True),
    **{name: Array(kinds="U", ndim=1, optional=True) for name in _DOMAINS},
}


def read_arrays(path: str, n_routed_experts: int | None = None) -> RecordedTrace:
    """Return the trace of the npz at ``path``. With scores but no ids, the ids are the top ``num_experts_per_tok``.

    Raises ValueError naming file, array, what was expected and what was found.
    """

    def need(ok: bool, array: str, expected: str, found: object) -> None:
        if not ok:
            raise ValueError(f"{path}: {array}: expected {expected}, found {found}")

    def check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
        full = next((name for name in ("logits", "scores") if name in shapes), None)
        main = "topk_ids" if "topk_ids" in shapes else full
        if main is None and "logical_count" in shapes:
            raise ValueError(
                f"{path}: topk_ids: expected the experts of every token, found logical_count alone, SGLang's counts by step: "
                "record with expert_distribution_recorder_mode per_token"
            )
        if main is None:
            raise ValueError(f"{path}: topk_ids: expected an array (or scores, or logits), found none")
        n_layers, n_tokens, last = shapes[main]
        need(min(shapes[main]) > 0, main, "at least one layer and one token", shapes[main])
        if main == full:
            need("num_experts_per_tok" in shapes, "num_experts_per_tok", "a number (there are no topk_ids)", "none")
        else:
            for name in ("topk_weights", "topk_prob_u8"):
                if name in shapes:
                    need(shapes[name] == shapes[main], name, f"shape {shapes[main]}", shapes[name])
            if full is not None:
                found = shapes[full]
                need(found[:2] == (n_layers, n_tokens) and found[2] >= last, full, f"{shapes[main][:2]} + (E,)", found)
        if "layers" in shapes:
            need(shapes["layers"] == (n_layers,), "layers", f"shape {(n_layers,)}", shapes["layers"])
        for name in _DOMAINS:
            if name in shapes and "seqlens" in shapes:
                need(shapes[name] == shapes["seqlens"], name, f"shape {shapes['seqlens']}", shapes[name])

    arrays = read_npz(path, _EXPECTED, check_shapes)
    kind: Literal["logits", "scores"] | None = next((name for name in ("logits", "scores") if name in arrays), None)
    scores = arrays[kind] if kind is not None else None
    n_experts = n_routed_experts
    for name, stated in (
        ("n_routed_experts", arrays.get("n_routed_experts")),
        (kind, None if scores is None else scores.shape[2]),
    ):
        if stated is not None:
            need(n_experts in (None, int(stated)), str(name), f"{n_experts} experts", int(stated))
            n_experts = int(stated)
    if n_experts is not None:
        need(n_experts > 0, "n_routed_experts", "at least 1", n_experts)
    ids = arrays.get("topk_ids")
    if ids is None and scores is not None:
        k = int(arrays["num_experts_per_tok"])
        need(0 < k <= scores.shape[2], "num_experts_per_tok", f"a number in 1..{scores.shape[2]}", k)
        ids = np.stack([np.argsort(-layer, axis=1, kind="stable")[:, :k] for layer in scores])
    assert ids is not None
    weights = arrays.get("topk_weights")
    if weights is None and "topk_prob_u8" in arrays:
        weights = arrays["topk_prob_u8"] / np.float32(255)
    return checked(
        path,
        ids,
        topk_weights=weights,
        seqlens=arrays.get("seqlens"),
        layers=arrays.get("layers"),
        n_routed_experts=n_experts,
        domains=_domains(path, arrays),
        scores=scores,
        score_kind=kind,
    )


def _domains(path: str, arrays: dict[str, npt.NDArray[Any]]) -> list[str] | None:
    name = next((name for name in _DOMAINS if name in arrays), None)
    if name is None or "seqlens" not in arrays:
        return None
    try:
        found = [str(value) for value in arrays[name].tolist()]
    except ValueError:  # code points beyond Unicode
        raise ValueError(f"{path}: {name}: expected text, found characters outside Unicode") from None
    bad = next((value for value in found if not value or not value.isprintable()), None)
    if bad is not None:
        raise ValueError(f"{path}: {name}: expected printable names, found {bad[:40]!a}")
    return found
