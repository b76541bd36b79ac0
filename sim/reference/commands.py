"""Command lines as a page: every option of every program, from its own parser."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from sim.reference.words import cell

_PACKAGE = Path(__file__).resolve().parents[1]


def programs() -> Iterator[str]:
    """Yield the modules that have a command line: files and ``__main__`` of packages that define ``parser()``."""
    for file in sorted([*_PACKAGE.glob("*.py"), *_PACKAGE.glob("*/__main__.py")]):
        if re.search(r"^def parser\(", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            yield ".".join(("sim", *file.relative_to(_PACKAGE).with_suffix("").parts))


def page() -> str:
    """Return the page of all programs."""
    parts = [
        "# Command lines: every option\n\nPrograms print results to stdout and progress to stderr. Exit status: 0 done, 1 "
        "internal error, 2 bad input (one line for each problem, nothing written), 130 interrupted."
    ]
    for name in programs():
        parser: argparse.ArgumentParser = importlib.import_module(name).parser()
        parts.append(program(parser))
    return "\n\n".join(parts)


def program(parser: argparse.ArgumentParser) -> str:
    """Return the section of one program."""
    rows = ["| argument | default | meaning |", "|---|---|---|"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            rows.append(f"| {_name(action)} | {_default(action)} | {cell(_help(parser, action))} |")
    return f"## {parser.prog}\n\n{cell(parser.description or '')}\n\n" + "\n".join(rows)


def _name(action: argparse.Action) -> str:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
    value = (" ".join(value) if isinstance(value, tuple) else value).replace("|", "\\|")
    if not action.option_strings:
        return f"`{value or action.dest.upper()}`"
    if action.nargs == 0:
        return ", ".join(f"`{option}`" for option in action.option_strings)
    return ", ".join(f"`{option} {value or action.dest.upper()}`" for option in action.option_strings)


def _default(action: argparse.Action) -> str:
    if action.nargs == 0 or action.default in (None, [], argparse.SUPPRESS) or action.required:
        return ""
    return f"`{action.default}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    values = {"prog": parser.prog, "default": action.default}
    return ((action.help or "") % values).replace("(default: None)", "").strip()
