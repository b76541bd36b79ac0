"""Requests of a measured vLLM run: the JSON lines of LLMServingSim (casys-kaist/LLMServingSim, MIT).

``input_toks``, ``output_toks`` and ``queued_ts``, the second at which the engine took the request in. What the run
measured of them is for a comparison, not read here.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.requests._files import content, number, objects, tokens
from sim.requests._recorded import Recorded, Rows


class VllmRun(Recorded):
    """The requests of a measured vLLM run, with outputs as long as the run produced."""

    kind: Literal["vllm_run"] = "vllm_run"

    def read(self) -> Rows:
        found = [
            (
                number(where, record, "queued_ts"),
                tokens(where, record, "input_toks"),
                tokens(where, record, "output_toks"),
            )
            for where, record in objects(self.path, content(self.path))
        ]
        if not found:
            raise ValueError(f"{self.path}: expected lines of requests, found none")
        seconds, inputs, outputs = zip(*found, strict=True)
        return Rows(np.array(seconds), np.array(inputs, dtype=np.int64), np.array(outputs, dtype=np.int64))
