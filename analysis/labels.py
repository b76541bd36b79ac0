"""Names beside points, placed so that they cover neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from sim.tokens import F64

# Ways from a point [points of 1/72 inch]: to the right first, then around it, then farther away.
STEPS = tuple(
    (radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle)))
    for radius in (7, 12, 20, 30)
    for angle in (0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 338, 202)
)
FAR = 15.0
FONT = 7.5


def label_points(
    axis: Axes,
    x: F64,
    y: F64,
    texts: Sequence[str],
    avoid: tuple[F64, F64],
    *,
    room_pt: float = 4.0,
    lines: Sequence[tuple[float, float, float, float]] = (),
) -> list[str]:
    """Write ``texts`` beside the points (``x``, ``y``) [n] where there is room inside ``axis``; return those without any.

    avoid: (x, y) of all points, which stay free for ``room_pt`` around. lines: (x0, y0, x1, y1) upright and level ones,
    which are covered only where nothing else is free. Lays the figure out: call it when everything else is drawn. A text
    that stands far from its point is joined to it by a thin line.
    """
    figure = axis.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    pixels = figure.dpi / 72.0
    taken = [
        Bbox.from_extents(px - room_pt * pixels, py - room_pt * pixels, px + room_pt * pixels, py + room_pt * pixels)
        for px, py in axis.transData.transform(list(zip(*avoid, strict=True)))
    ]
    corners = axis.transData.transform([at for line in lines for at in (line[:2], line[2:])] or [(0, 0)])
    soft = [
        Bbox.from_extents(min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1)
        for a, b in zip(corners[0::2], corners[1::2], strict=False)
    ]
    inside = axis.get_window_extent()
    left_out = []
    for px, py, text in sorted(zip(x, y, texts, strict=True), key=lambda point: (-point[1], point[0])):
        note = axis.annotate(
            text, (px, py), xytext=(0, 0), textcoords="offset points", fontsize=FONT, linespacing=0.95, zorder=5
        )
        note.set_in_layout(False)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])
        for step, obstacles in [(step, others) for others in (soft, []) for step in STEPS]:
            note.set_position(step)
            note.set_horizontalalignment("left" if step[0] > 1 else "right" if step[0] < -1 else "center")
            note.set_verticalalignment("bottom" if step[1] > 1 else "top" if step[1] < -1 else "center")
            box = note.get_window_extent()
            if _within(box, inside) and not any(box.overlaps(other) for other in (*taken, *obstacles)):
                taken.append(box)
                if math.hypot(*step) > FAR:
                    line = axis.annotate(
                        "",
                        (px, py),
                        xytext=step,
                        textcoords="offset points",
                        arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
                    )
                    line.set_in_layout(False)
                break
        else:
            note.remove()
            left_out.append(text)
    return left_out


def _within(box: Bbox, outer: Bbox) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)
