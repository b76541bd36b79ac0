"""Columns of text for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Align columns: those of ``left`` to the left, the others to the right, under head lines broken at spaces."""
    words = [h.split(" ") for h in head]
    depth = max(len(w) for w in words)
    lines = [[w[i - depth + len(w)] if i >= depth - len(w) else "" for w in words] for i in range(depth)]
    table = [*lines, *rows]
    widths = [max(len(row[c]) for row in table) for c in range(len(head))]
    text = []
    for i, row in enumerate(table):
        cells = [
            cell.ljust(width) if c in left else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
        if i == depth - 1:
            text.append("  ".join("-" * width for width in widths))
    return text
