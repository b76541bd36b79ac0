"""Text files of DeepSeek's ESFT: ``expert_weights_<layer>.txt``, one line per sequence.

A line holds the top-k ids of every token, then their weights, all separated by tabs; two tabs separate ids from weights
(deepseek-ai/ESFT, ``log_expert_weights`` and ``generate_expert_config.py``). k is not written: it is the largest common
divisor of all lines' lengths that leaves the ids distinct within every token.
"""

from __future__ import annotations

import math
import os
import re

import numpy as np

from sim.tokens import F32, I16
from sim.traces.textfile import lines
from sim.traces.trace import MAX_EXPERTS, RecordedTrace, checked

_NAME = re.compile(r"expert_weights_(\d{1,5})\.txt", re.ASCII)
_MAX_K = 64
_MAX_FILES = 1024


def read_folder(folder: str, n_routed_experts: int | None = None) -> RecordedTrace:
    """Return the trace of all ``expert_weights_<layer>.txt`` in ``folder``. Raises ValueError."""
    try:
        found = [name for name in os.listdir(folder) if _NAME.fullmatch(name)]
    except OSError as error:
        raise ValueError(f"{folder}: expected a readable folder, found {error.strerror or error}") from None
    if not 0 < len(found) <= _MAX_FILES:
        raise ValueError(f"{folder}: expected 1 to {_MAX_FILES} files expert_weights_<layer>.txt, found {len(found)}")
    return read_files([os.path.join(folder, name) for name in found], folder, n_routed_experts)


def read_files(paths: list[str], where: str, n_routed_experts: int | None = None) -> RecordedTrace:
    """Return the trace of one file per layer, in the order of the layers' numbers; ``where`` begins problems.

    Raises ValueError naming file and line.
    """
    numbered: dict[int, str] = {}
    for path in paths:
        match = _NAME.fullmatch(os.path.basename(path))
        if match is None:
            raise ValueError(
                f"{path}: expected a file called expert_weights_<layer>.txt, found {os.path.basename(path)}"
            )
        layer = int(match.group(1))
        if not os.path.isfile(path) or layer in numbered:
            raise ValueError(f"{path}: expected one regular file for layer {layer}, found another")
        numbered[layer] = path
    layers = sorted(numbered)
    ids, weights, lengths = zip(*(_read_layer(numbered[layer]) for layer in layers), strict=True)
    for layer, found in zip(layers, lengths, strict=True):
        if found != lengths[0]:
            raise ValueError(
                f"{numbered[layer]}: expected {len(lengths[0])} lines as long as those of layer {layers[0]}, "
                f"found {len(found)} lines, {sum(found)} ids"
            )
    k = _experts_per_token(where, list(ids), lengths[0])
    return checked(
        where,
        np.stack(ids).reshape(len(layers), -1, k),
        topk_weights=np.stack(weights).reshape(len(layers), -1, k),
        seqlens=[length // k for length in lengths[0]],
        layers=layers,
        n_routed_experts=n_routed_experts,
    )


def _read_layer(path: str) -> tuple[I16, F32, list[int]]:
    """Return ids and weights of all lines joined, and the number of ids of each line."""
    ids, weights = [], []
    for number, line in lines(path):
        where = f"{path}: line {number}"
        left, separator, right = line.strip().partition(b"\t\t")
        if not separator:
            raise ValueError(f"{where}: expected ids, two tabs and weights, found no two tabs")
        try:
            row = np.array(left.split(b"\t"), dtype=np.bytes_).astype(np.int64)
            value = np.array(right.split(b"\t"), dtype=np.bytes_).astype(np.float32)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{where}: expected numbers separated by tabs, found {str(error)[:60]}") from None
        if len(row) != len(value):
            raise ValueError(f"{where}: expected as many weights as ids ({len(row)}), found {len(value)}")
        if row.min() < 0 or row.max() >= MAX_EXPERTS:
            raise ValueError(f"{where}: expected ids in 0..{MAX_EXPERTS - 1}, found {row.min()}..{row.max()}")
        ids.append(row.astype(np.int16))
        weights.append(value)
    if not ids:
        raise ValueError(f"{path}: expected lines of ids and weights, found none")
    return np.concatenate(ids), np.concatenate(weights), [len(row) for row in ids]


def _experts_per_token(where: str, ids: list[I16], lengths: list[int]) -> int:
    common = math.gcd(*lengths)
    for k in range(min(common, _MAX_K), 0, -1):
        if common % k == 0:
            ordered = [np.sort(layer.reshape(-1, k), axis=1) for layer in ids]
            if not any((layer[:, 1:] == layer[:, :-1]).any() for layer in ordered):
                return k
    raise ValueError(f"{where}: expected at least one id per token, found none")
