"""Megatron-LM's router tracer: JSON lines, one record per (step, layer) of one rank.

As written by ``megatron/core/transformer/moe/router_trace.py`` (``--moe-routing-trace-path``): ``layer`` and
``top_indices`` [tokens, k] are needed; ``step``, ``rank``, ``block``, ``num_tokens`` and ``topk`` are used where they
stand; hidden-state and logit sidecars are ignored. Records of the multi-token prediction (``block`` other than
``decoder``) are left out. The tracer does not record where sequences end: each record counts as one sequence, unless it
carries our own ``seqlens``. Steps and micro-batches are joined in the order of the file.
"""

from __future__ import annotations

import numpy as np

from sim.tokens import I64
from sim.traces.textfile import integer, integers, lines, parse_object
from sim.traces.trace import RecordedTrace, checked


def read_jsonl(path: str, n_routed_experts: int | None = None) -> RecordedTrace:
    """Return the trace of the JSON lines at ``path``. Raises ValueError naming file, line and field."""
    chunks: dict[int, list[I64]] = {}
    lengths: dict[int, list[list[int]]] = {}
    ranks: set[int] = set()
    for number, line in lines(path):
        where = f"{path}: line {number}"
        record = parse_object(where, line)
        if record.get("block", "decoder") != "decoder":
            continue
        for field in ("layer", "top_indices"):
            if field not in record:
                raise ValueError(
                    f"{where}: expected the field {field}, found {', '.join(sorted(record)[:8]) or 'none'}"
                )
        layer = integer(f"{where}: layer", record["layer"])
        ranks.add(integer(f"{where}: rank", record.get("rank", 0)))
        if len(ranks) > 1:
            raise ValueError(f"{where}: rank: expected one rank per file, found {sorted(ranks)}")
        ids = integers(f"{where}: top_indices", record["top_indices"], 2)
        for field, found in (("num_tokens", ids.shape[0]), ("topk", ids.shape[1])):
            if record.get(field, found) != found:
                raise ValueError(f"{where}: {field}: expected {found} (of top_indices), found {record[field]}")
        seqlens = integers(f"{where}: seqlens", record.get("seqlens", [len(ids)]), 1).tolist()
        if sum(seqlens) != len(ids):
            raise ValueError(f"{where}: seqlens: expected a sum of {len(ids)}, found {sum(seqlens)}")
        known = next(iter(chunks.values()))[0].shape[1] if chunks else ids.shape[1]
        if ids.shape[1] != known:
            raise ValueError(f"{where}: top_indices: expected {known} experts per token, found {ids.shape[1]}")
        chunks.setdefault(layer, []).append(ids)
        lengths.setdefault(layer, []).append(seqlens)
    if not chunks:
        raise ValueError(f"{path}: expected records with layer and top_indices, found none")
    first = min(chunks)
    for layer in sorted(chunks):
        if lengths[layer] != lengths[first]:
            raise ValueError(
                f"{path}: layer {layer}: expected the {len(lengths[first])} records and lengths of layer {first}, "
                f"found {len(lengths[layer])} records, {sum(map(len, chunks[layer]))} tokens"
            )
    return checked(
        path,
        np.stack([np.concatenate(chunks[layer]) for layer in sorted(chunks)]),
        ids_name="top_indices",
        seqlens=[length for record in lengths[first] for length in record],
        layers=sorted(chunks),
        n_routed_experts=n_routed_experts,
    )
