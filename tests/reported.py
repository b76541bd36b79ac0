"""One small run of every kind, and its page, made once for the tests of pages. Names and description are a stranger's."""

from __future__ import annotations

import functools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import sim
from sim.report.html import page
from sim.results import Result

TINY = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
EVIL = "<script>alert('x')</script>"
QUESTION = 'Which is "better"? <img src=x onerror=alert(1)> & </svg></main>'
KINDS = ("steps", "pipelined", "serving")
_MOVING: dict[str, Any] = {
    "placement": {"kind": "eplb", "num_redundant_experts": 8},
    "replicas": "round_robin",
}
_SMALL: dict[str, Any] = {
    "description": QUESTION,
    "replicas": 2,
    "traffic.tokens_per_rank": 64,
    "traffic.sequence_length": 32,
    "steps.warmup.steps": 2,
    "schedule.engine": "max_plus",
}
_SERVING: dict[str, Any] = {
    "duration_s": 8,
    "warmup_s": 1,
    "sampled_layers": 1,
    "draws": 1,
    "pool_tokens": 512,
    "requests": {"kind": "poisson", "rate_per_s": 6, "input_tokens": 256, "output_tokens": 16},
    "slo": {"ttft_s": 0.1, "tpot_s": 0.5},
    "units": [{"name": "mixed", "parallel": {"ep_size": 8}, "max_num_batched_tokens": 512, "host_overhead_s": 0.01}],
}


def run(**changes: Any) -> Result:
    """Return a small run of the tiny scenario with ``changes`` (keys with __ for dots)."""
    return sim.run(TINY, overrides=_SMALL | {key.replace("__", "."): value for key, value in changes.items()})


@functools.cache
def result(kind: str) -> Result:
    if kind == "steps":
        policies = [
            {"name": EVIL},
            {"name": "biased, and with a rather long name", "balance": "bias"},
            {"name": "moving", **_MOVING, "rebalance": {"interval_steps": 2}},
            {"name": "random", "select": "random"},
        ]
        return run(steps__count=3, steps__timed="all", schedule__phase="forward", policies=policies)
    if kind == "pipelined":
        return run(
            steps__count=1,
            parallel={"ep_size": 4, "pp_size": 2, "dp_size": 4},
            schedule={"pipeline": "1f1b", "micro_batches": 2},
            steps__warmup__ranks=4,
            policies=[{"name": "top-k"}, {"name": EVIL, "select": "group_limited"}],
        )
    policies = [{"name": "linear"}, {"name": EVIL, **_MOVING, "rebalance": {"interval_s": 3.0}}]
    return run(schedule__phase="forward", policies=policies, serving=_SERVING)


@functools.cache
def page_of(kind: str) -> str:
    return page(result(kind), command="python -m sim.run 'a b.yaml' --set name=<x>")


VOID = {"meta", "link", "img", "br", "hr", "input", "source"}


class Outline(HTMLParser):
    """Open tags must close in order; headings, ids, links and table cells are kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.rows: list[list[str]] = []
        self.cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.add(tag)
        self.handlers += [name for name in known if name.startswith("on")]
        self.ids += [known["id"] or ""] if "id" in known else []
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.cell = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing, line {self.getpos()[0]}"
        if tag in ("th", "td") and self.cell is not None:
            self.rows[-1].append(" ".join("".join(self.cell).split()))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)
