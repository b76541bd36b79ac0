"""Azure's public traces of LLM inference (Azure/AzurePublicDataset, 2023 and 2024; CC-BY 4.0).

Columns as published, ``TIMESTAMP,ContextTokens,GeneratedTokens`` with ISO 8601 times, or ``t_s,input_tokens,
output_tokens``. Of prompts only lengths are known, so no prefixes. Cite Patel et al., Splitwise (ISCA 2024), for 2023,
Stojkovic et al., DynamoLLM (arXiv 2408.00741), for 2024.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sim.requests._files import content, header, refuse_first, table
from sim.requests._recorded import Recorded, Rows
from sim.tokens import F64


class Azure(Recorded):
    """Azure's traces: conversations arrive almost as Poisson (cv 1.1), code completions in bursts with long silences."""

    kind: Literal["azure"] = "azure"

    def read(self) -> Rows:
        data = content(self.path)
        if "TIMESTAMP" not in header(self.path, data):
            found = table(self.path, data, {"t_s": "number", "input_tokens": "tokens", "output_tokens": "tokens"})
            return Rows(found["t_s"], found["input_tokens"], found["output_tokens"])
        names = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
        found = table(self.path, data, {names[0]: "text", names[1]: "tokens", names[2]: "tokens"})
        return Rows(_seconds(self.path, found[names[0]]), found[names[1]], found[names[2]])


def _seconds(path: str, times: npt.NDArray[Any]) -> F64:
    """Return seconds from the first of ISO 8601 ``times`` [n], to 1 ns."""
    import pandas as pd

    parsed = pd.to_datetime(pd.Series(times), format="ISO8601", utc=True, errors="coerce")
    refuse_first(path, "TIMESTAMP", parsed.isna().to_numpy(), times, "an ISO 8601 time")
    since = (parsed - parsed.iloc[0]).to_numpy().astype("timedelta64[ns]")
    return since.astype(np.int64).astype(np.float64) / 1e9
