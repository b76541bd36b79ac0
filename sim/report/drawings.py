"""Figures of a result as inline SVG that takes its text colour and paper from the page around it, light or dark."""

from __future__ import annotations

import html
import inspect
import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from sim.results import Result

WIDE_IN, NARROW_IN = 7.0, 3.5


class Drawing(NamedTuple):
    """One figure. wide, narrow: SVG for a page's and for a telephone's width; narrow is empty where there is only one."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str


SHOWN: dict[str, tuple[str, str]] = {
    "tradeoff": (
        "What each policy gives and takes",
        "A dot per policy with its 95 % interval over replicas. Grey ticks beside MaxVio are the floor of a uniformly random "
        "gate.",
    ),
    "step_breakdown": (
        "Where the time of a step goes",
        "Mean over devices, or over the ranks of a pipeline; the number at the end is the whole step.",
    ),
    "rebalancing": (
        "What moving experts costs and brings",
        "Above: imbalance of the ranks step by step, triangles where experts moved. Below: a mean step, hatched what moves "
        "add to it.",
    ),
    "redundancy": (
        "What redundant experts buy and cost",
        "Against the number of redundant experts, a line per placement and replica choice.",
    ),
    "latency_cdf": (
        "How long requests wait",
        "Share of requests that are served within so long, warm-up and refused requests left out; grey lines are the SLO.",
    ),
    "throughput_against_latency": (
        "What a device yields against what a user gets",
        "A point per policy; up and to the right is better.",
    ),
    "over_time": (
        "What happened when",
        "Mean over replicas, a column per serving unit. Triangles: experts moved. Shaded: a fault.",
    ),
    "rank_loads": (
        "Load of every rank",
        "Expert tokens over the mean, busiest rank first. Hollow marks: the busiest rank of a single layer. Dotted: a "
        "uniformly random gate.",
    ),
    "load_heatmap": (
        "Load of every expert",
        "Layers down, experts by load across, of the first replica; bright experts get several times the mean.",
    ),
    "topic_heatmap": (
        "Which experts serve which topic",
        "Load of every expert of one layer within each topic; specialisation shows as blocks.",
    ),
    "max_vio_over_steps": (
        "Balance over steps",
        "MaxVio of each step's batch, mean over MoE layers, with 95 % intervals over replicas; dotted: the uniform floor.",
    ),
    "link_load": (
        "How busy links are",
        "Time that each link carries a step's bytes, busiest first; a flat line is a balanced class of links.",
    ),
    "node_matrix": ("Bytes from node to node", "Dispatch and combine of the last step; the diagonal stays in a node."),
    "device_matrix": ("Bytes from device to device", "Dispatch and combine of the last step; lines part the nodes."),
}
"""Title and caption by the figure's name, in the order of the page. One that a result has no data for is left out."""

_INK = "#010203"  # a colour that no figure uses for data
_RC: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    "savefig.dpi": 144,  # of images inside
}
_THEMED = {
    _INK: "currentColor",
    "#333333": "currentColor",
    "#737373": "var(--soft)",
    "#ebebeb": "var(--line)",
    "#e6e6e6": "var(--line)",
}


def drawings(result: Result) -> list[Drawing]:
    """Draw every figure of `SHOWN` that this kind of run has."""
    import matplotlib
    import matplotlib.pyplot as plt

    from analysis import figures

    found = []
    for name, (title, caption) in SHOWN.items():
        if name == "max_vio_over_steps" and result.scenario.steps.count == 1:
            continue  # a single dot, and in the table already
        draw = figures.ALL[name]
        label = f"{title}. {caption}"
        with plt.rc_context():
            matplotlib.rcdefaults()
            plt.rcParams.update(cast(Any, _RC | {"svg.hashsalt": name}))
            try:
                wide = _svg(draw, result, WIDE_IN, f"{name}-w", label)
                sized = "width_in" in inspect.signature(draw).parameters
                narrow = _svg(draw, result, NARROW_IN, f"{name}-n", label) if sized else ""
            except (ValueError, KeyError):  # how figures say that a result is not of their kind
                continue
        found.append(Drawing(name, title, caption, wide, narrow))
    return found


def _svg(draw: Callable[..., Any], result: Result, width_in: float, prefix: str, label: str) -> str:
    options = {"width_in": width_in} if "width_in" in inspect.signature(draw).parameters else {}
    figure, file = draw(result, **options), io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return inline(file.getvalue(), prefix, label)


def inline(svg: str, prefix: str, label: str) -> str:
    """Make a Matplotlib SVG part of a page: no prologue, no rules that would reach the page's other elements, ids that no
    other figure has, colours of the theme, and ``label`` for those who cannot see it."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r' xmlns(?::\w+)?="[^"]*"| version="1.1"', "", body).replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", body)
    body = re.sub(r"(\.\d\d)\d+", r"\1", body)
    body = re.sub(r"<(?!text)[^>]*>", lambda m: _paper(m[0], "<image" in svg), body)
    for colour, themed in _THEMED.items():
        body = body.replace(colour, themed)
    body = re.sub(r"\s*\n\s*", " ", body).strip()
    head = f'<svg role="img" aria-label="{html.escape(label)}" '
    return re.sub(r'^<svg width="[^"]*" height="[^"]*" ', head, body)


def _paper(tag: str, over_image: bool) -> str:
    """White between shapes is the page's paper; lines on an image stay white on any page."""
    tag = re.sub(r'fill(: |=")#ffffff("?)', r"fill\1var(--paper)\2", tag)
    return tag if over_image else tag.replace("stroke: #ffffff", "stroke: var(--paper)")
