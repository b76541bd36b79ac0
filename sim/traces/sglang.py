"""SGLang's expert distribution recorder in ``per_token`` mode, as npz or JSON (its own .pt files are pickles).

JSON: ``{"records": [...]}``, each record one forward pass with ``topk_ids_of_layer`` [layers, tokens, k] and, where
they stand, ``positions`` [tokens] or ``extend_seq_lens`` [sequences]. npz: the same names, passes joined along tokens.
An id of -1 means no expert: layers that hold nothing else (dense ones) and tokens that hold one anywhere else (padding)
are left out. A sequence ends where a position does not follow the one before it; ids are the *physical* slots that the
recorder saw, which are the experts only without redundant ones. The other modes keep counts, not tokens: refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sim.tokens import I64
from sim.traces.npzfile import Array, read_npz
from sim.traces.textfile import integers, lines, parse_object
from sim.traces.trace import RecordedTrace, checked

KEY = "topk_ids_of_layer"


def read_json(path: str, n_routed_experts: int | None = None) -> RecordedTrace:
    """Return the trace of the JSON at ``path``. Raises ValueError naming file, record and field."""
    data = parse_object(path, b"".join(line for _, line in lines(path)))
    records = data.get("records")
    if not isinstance(records, list) or not records:
        what = "logical_count, which holds no tokens" if "logical_count" in data else ", ".join(sorted(data)[:8])
        raise ValueError(f"{path}: records: expected a list of per_token records, found {what or 'nothing'}")
    passes: list[I64] = []
    lengths: list[int] = []
    for number, record in enumerate(records):
        where = f"{path}: records {number}"
        if not isinstance(record, dict) or KEY not in record:
            found = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where}: {KEY}: expected ids (mode per_token), found {found or 'nothing'}")
        ids = integers(f"{where}: {KEY}", record[KEY], 3)
        if passes and (ids.shape[0], ids.shape[2]) != (passes[0].shape[0], passes[0].shape[2]):
            raise ValueError(f"{where}: {KEY}: expected layers and k of the first record, found {ids.shape}")
        passes.append(ids)
        extra = {
            name: integers(f"{where}: {name}", record[name], 1)
            for name in ("positions", "extend_seq_lens")
            if record.get(name) is not None
        }
        lengths += _lengths(where, ids.shape[1], extra)
    return _trace(path, np.concatenate(passes, axis=1), lengths, n_routed_experts)


def read_npz_arrays(path: str, n_routed_experts: int | None = None) -> RecordedTrace:
    """Return the trace of the npz at ``path``. Raises ValueError naming file and array."""
    expected = {
        KEY: Array(kinds="iu", ndim=3),
        "positions": Array(kinds="iu", ndim=1, optional=True),
        "extend_seq_lens": Array(kinds="iu", ndim=1, optional=True),
    }
    arrays = read_npz(path, expected, lambda shapes: None)
    ids = arrays.pop(KEY)
    return _trace(path, ids, _lengths(path, ids.shape[1], arrays), n_routed_experts)


def _lengths(where: str, n_tokens: int, extra: dict[str, npt.NDArray[Any]]) -> list[int]:
    if "positions" in extra:
        positions = extra["positions"].astype(np.int64)
        if len(positions) < n_tokens:
            raise ValueError(f"{where}: positions: expected {n_tokens} (the tokens), found {len(positions)}")
        starts = np.flatnonzero(np.diff(positions[:n_tokens]) != 1) + 1
        return [int(n) for n in np.diff([0, *starts.tolist(), n_tokens])]
    if "extend_seq_lens" in extra:
        lengths = [int(n) for n in extra["extend_seq_lens"]]
        if sum(lengths) != n_tokens or min(lengths, default=0) < 0:
            raise ValueError(f"{where}: extend_seq_lens: expected a sum of {n_tokens}, found {sum(lengths)}")
        return lengths
    return [n_tokens]


def _trace(path: str, ids: npt.NDArray[Any], lengths: list[int], n_routed_experts: int | None) -> RecordedTrace:
    layers = [layer for layer in range(len(ids)) if ids[layer].size and int(ids[layer].max()) >= 0]
    if not layers:
        raise ValueError(f"{path}: {KEY}: expected experts, found none in shape {ids.shape}")
    chosen = ids[layers]
    valid = (chosen >= 0).all(axis=(0, 2))
    sequence = np.repeat(np.arange(len(lengths)), lengths)[valid]
    return checked(
        path,
        chosen[:, valid],
        ids_name=KEY,
        seqlens=np.bincount(sequence, minlength=len(lengths)),
        layers=layers,
        n_routed_experts=n_routed_experts,
    )
