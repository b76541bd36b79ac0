"""Mooncake's traces of Kimi (kvcache-ai/Mooncake, FAST25-release; Apache-2.0), with shared prefixes.

JSON lines as published: ``timestamp`` in ms, ``input_length``, ``output_length`` and ``hash_ids``, one id per block of
512 input tokens; equal ids at the start are an equal prefix. Or an excerpt as csv, ``t_s,input_tokens,output_tokens,
first_block``: requests of one first block share it, and nothing beyond it is known, so hits are a lower bound.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from sim.requests._files import content, number, objects, renumbered, table, tokens
from sim.requests._prefixes import block_tree
from sim.requests._recorded import Recorded, Rows
from sim.tokens import F64

BLOCK_TOKENS = 512


class Mooncake(Recorded):
    """Kimi's traces with exact shared prefixes: a tree of all block ids.

    Outputs are in no prefix until a later input repeats them.
    """

    kind: Literal["mooncake"] = "mooncake"
    tick_s: float = Field(default=3.0, ge=0, le=60)
    """Recorded times are those of a clock that ticks this often: requests of one time are spread evenly until the next
    time in the file, at most this long, in the file's order. The conversation trace has 3 s; 0 leaves times as they are."""

    def read(self) -> Rows:
        data = content(self.path)
        return self._lines(data) if data.lstrip().startswith(b"{") else self._table(data)

    def _lines(self, data: bytes) -> Rows:
        seconds, inputs, outputs, blocks = [], [], [], []
        for where, record in objects(self.path, data):
            seconds.append(number(where, record, "timestamp") / 1e3)
            inputs.append(tokens(where, record, "input_length"))
            outputs.append(tokens(where, record, "output_length"))
            ids = record.get("hash_ids")
            if not isinstance(ids, list) or not all(type(block) is int for block in ids):
                raise ValueError(f"{where}: hash_ids: expected a list of whole numbers, found {str(ids)[:40]}")
            blocks.append(ids)
        prefix, tree = block_tree(blocks, BLOCK_TOKENS)
        input_tokens = np.array(inputs, dtype=np.int64)
        held = np.append(tree.tokens, 0)[prefix]  # the last entry serves prefix -1
        return Rows(
            seconds=np.array(seconds, dtype=np.float64),
            input_tokens=input_tokens,
            output_tokens=np.array(outputs, dtype=np.int64),
            prefix=prefix,
            prefix_tokens=np.minimum(held, input_tokens - 1),
            tree=tree,
        )

    def _table(self, data: bytes) -> Rows:
        found = table(
            self.path,
            data,
            {"t_s": "number", "input_tokens": "tokens", "output_tokens": "tokens", "first_block": "index"},
        )
        shared = np.minimum(BLOCK_TOKENS, found["input_tokens"] - 1)
        prefix = np.where(shared > 0, renumbered(found["first_block"]), -1).astype(np.int32)
        return Rows(found["t_s"], found["input_tokens"], found["output_tokens"], prefix=prefix, prefix_tokens=shared)

    def spread(self, seconds: F64, rng: np.random.Generator) -> F64:
        ticks, tick = np.unique(seconds, return_inverse=True)
        width = np.minimum(np.diff(ticks, append=np.inf), self.tick_s)
        moved: F64 = ticks[tick] + width[tick] * rng.random(len(seconds))
        # Sorting mixes no ticks: each stays before the next one.
        return np.sort(moved)
