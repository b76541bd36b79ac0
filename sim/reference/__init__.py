"""The reference pages of ``sim/docs/reference``, made from the code: they cannot say what the code does not.

`keys` writes the blocks of a scenario file, `kinds` the plug-ins, `figures` metrics and tables, `commands` the command
lines. ``python -m sim.reference`` writes the pages, ``--check`` says which of them are out of date.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
_MADE = "<!-- Made by `python -m sim.reference`; change the docstrings instead. -->"


def pages() -> dict[str, str]:
    """Return the text of every page by file name."""
    from sim.reference import commands, figures, keys, kinds

    made = {
        "scenario.md": keys.page(),
        "plugins.md": kinds.page(),
        "metrics.md": figures.page(),
        "commands.md": commands.page(),
    }
    return {name: f"{_MADE}\n\n{text.strip()}\n" for name, text in made.items()}


def stale(folder: Path = FOLDER) -> list[str]:
    """Return the names of the pages whose file in ``folder`` is missing or says something else."""
    found = []
    for name, text in pages().items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            found.append(name)
    return found
