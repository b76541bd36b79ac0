"""Figures of a result as inline SVG that takes its text colour and paper from the page around it, light or dark."""

from __future__ import annotations

import html
import inspect
import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from sim.metrics.dynamics import MIN_STEPS
from sim.results import Result
from sim.scenario import Scenario

WIDE_IN, NARROW_IN = 7.0, 3.5


class Drawing(NamedTuple):
    """One figure. wide, narrow: SVG for a page's and for a telephone's width; narrow is empty where there is only one. plate:
    whether the figure needs a light ground on a dark page."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str
    plate: bool


SHOWN: dict[str, tuple[str, str]] = {
    "tradeoff": (
        "What each policy gives and takes",
        "A dot per policy with its 95 % interval over replicas. Grey ticks beside MaxVio are the floor of a uniformly random "
        "gate.",
    ),
    "pareto": (
        "Which policies no other beats in both",
        "Time or rate against what is kept or what a user gets, with 95 % intervals; the line joins the policies of the front.",
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
    "sorted_loads": (
        "Load of experts, sorted",
        "Over the mean of their layer, all steps together; dotted: a uniformly random gate.",
    ),
    "load_heatmap": (
        "Load of every expert",
        "Layers down, experts by load across, of the first replica; bright experts get several times the mean.",
    ),
    "topic_heatmap": (
        "Which experts serve which topic",
        "Load of every expert of one layer within each topic; specialisation shows as blocks.",
    ),
    "scopes": (
        "Over what each policy balances",
        "MaxVio within a sequence, a micro-batch, a batch, over all steps and within a topic, beside the uniform floor.",
    ),
    "settling": (
        "How balance settles",
        "MaxVio of each step's batch on a logarithmic axis, mean over MoE layers and replicas; dotted: the uniform floor.",
    ),
    "collapse": (
        "Whether experts die",
        "MaxVio and the load of the least-used expert over steps, and the share of experts that starve.",
    ),
    "max_vio_over_steps": (
        "Balance over steps",
        "MaxVio of each step's batch, mean over MoE layers, with 95 % intervals over replicas; dotted: the uniform floor.",
    ),
    "link_load": (
        "How busy links are",
        "Time that each link carries a step's bytes, busiest first; a flat line is a balanced class of links.",
    ),
    "topology": ("Where in the network the bytes go", "Cables coloured and thickened by their load."),
    "node_matrix": ("Bytes from node to node", "Dispatch and combine of the last step; the diagonal stays in a node."),
    "device_matrix": ("Bytes from device to device", "Dispatch and combine of the last step; lines part the nodes."),
    "roofline": (
        "How near to the machine's limits",
        "FLOP/s against FLOPs per byte of memory traffic: the device's bandwidth and peaks, and where each operation runs.",
    ),
}
"""Title and caption by the figure's name, in the order of the page. One that a result has no data for is left out."""

_TAG = re.compile(r"<[^>]*>")  # Matplotlib escapes > in text and attributes
_INK = "#010203"  # a colour that no figure uses for data
_RC: dict[str, Any] = {
    "text.parse_math": False,  # a $ in a name is a dollar
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    "savefig.dpi": 144,  # of images inside
}
_PLATES = ("topology",)
"""Figures whose shades of load end in near black: they keep a light plate on a dark page."""


_OF_SERVING = ("roofline", "redundancy", "latency_cdf", "throughput_against_latency", "over_time")
"""Figures of runs that serve requests; the first two are of runs of steps too, and all others of those only."""


def drawings(result: Result) -> list[Drawing]:
    """Draw every figure of `SHOWN` that this kind of run has."""
    import matplotlib
    import matplotlib.pyplot as plt

    from analysis import figures
    from analysis.style import NoColumn, Unfit

    found = []
    for name, (title, caption) in SHOWN.items():
        if not _fits(name, result.scenario):
            continue
        draw = figures.ALL[name]
        label = f"{title}. {caption}"
        with plt.rc_context():
            matplotlib.rcdefaults()
            plt.rcParams.update(cast(Any, _RC | {"svg.hashsalt": name}))
            try:
                wide = _svg(draw, result, WIDE_IN, f"{name}-w", label)
                sized = "width_in" in inspect.signature(draw).parameters
                narrow = _svg(draw, result, NARROW_IN, f"{name}-n", label) if sized else ""
            except (Unfit, NoColumn):
                continue
            finally:
                plt.close("all")
        found.append(Drawing(name, title, caption, wide, narrow, name in _PLATES))
    return found


def _fits(name: str, scenario: Scenario) -> bool:
    """Whether a figure that could be drawn says something here."""
    serves, long = scenario.serving is not None, scenario.steps.count >= MIN_STEPS
    if (serves and name not in _OF_SERVING) or (not serves and name in _OF_SERVING[2:]):
        return False
    if name == "max_vio_over_steps":
        return scenario.steps.count > 1 and not long
    if name == "settling":
        return long
    if name == "collapse":
        return bool(scenario.router_dynamics)
    return name != "roofline" or serves or bool(len(scenario.timed_steps()))


def _svg(draw: Callable[..., Any], result: Result, width_in: float, prefix: str, label: str) -> str:
    options = {"width_in": width_in} if "width_in" in inspect.signature(draw).parameters else {}
    figure, file = draw(result, **options), io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return inline(file.getvalue(), prefix, label)


def inline(svg: str, prefix: str, label: str) -> str:
    """Make a Matplotlib SVG part of a page: no prologue, no rules that would reach the page's other elements, ids that no
    other figure has, colours of the theme, and ``label`` for those who cannot see it."""
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    tags = "".join(_TAG.findall(body))
    used, over_image = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', tags)), "<image" in tags
    body = _TAG.sub(lambda m: _tag(m[0], prefix, used, over_image), body)
    head = f'<svg role="img" aria-label="{html.escape(label)}" '
    return re.sub(r'^<svg width="[^"]*" height="[^"]*" ', head, re.sub(r"\s*\n\s*", " ", body).strip())


def _tag(tag: str, prefix: str, used: set[str], over_image: bool) -> str:
    """One tag of a figure as `inline` wants it. What stands between tags is the reader's text and stays as it is."""
    tag = re.sub(r' xmlns(?::\w+)?="[^"]*"| version="1.1"', "", tag).replace("xlink:href=", "href=")
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", tag)
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)
    if not tag.startswith("<text"):
        tag = _paper(tag, over_image)
    return re.sub(r"#([0-9a-f]{2})\1\1", _grey, tag.replace(_INK, "currentColor"))


def _grey(found: re.Match[str]) -> str:
    """Text and lines in grey become the page's ink, its soft ink or its rules; black, white and the grey of the data
    colours stay."""
    level = int(found[1], 16)
    if 0 < level <= 0x66:
        return "currentColor"
    if level < 0x90:
        return "var(--soft)"
    return "var(--line)" if 0xB4 < level < 0xFF else found[0]


def _paper(tag: str, over_image: bool) -> str:
    """White between shapes is the page's paper; lines on an image stay white on any page."""
    tag = re.sub(r'fill(: |=")#ffffff("?)', r"fill\1var(--paper)\2", tag)
    return tag if over_image else tag.replace("stroke: #ffffff", "stroke: var(--paper)")
