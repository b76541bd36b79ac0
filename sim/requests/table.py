"""Requests of a plain csv file: ``t_s,input_tokens,output_tokens`` and, where topics are known, ``topic``."""

from __future__ import annotations

from typing import Literal

from sim.requests._files import content, header, table
from sim.requests._recorded import Recorded, Rows


class Table(Recorded):
    """A plain csv file of arrivals and lengths.

    t_s: seconds from any origin. topic: index into the traffic's topics, from 0. Lines may be in any order.
    """

    kind: Literal["table"] = "table"

    def read(self) -> Rows:
        data = content(self.path)
        found = table(self.path, data, {"t_s": "number", "input_tokens": "tokens", "output_tokens": "tokens"})
        topic = table(self.path, data, {"topic": "index"})["topic"] if "topic" in header(self.path, data) else None
        return Rows(found["t_s"], found["input_tokens"], found["output_tokens"], topic=topic)
