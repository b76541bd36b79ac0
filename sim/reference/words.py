"""Docstrings as Markdown: of modules, classes and fields, examples included."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from typing import NamedTuple

from pydantic import BaseModel

_LITERAL = re.compile(r"``(.+?)``|`([^`]+)`", re.DOTALL)


class Described(NamedTuple):
    """What a class says of itself and of its fields."""

    prose: str
    fields: dict[str, str]


def markdown(text: str) -> str:
    """Return a docstring as Markdown: code stays code, nothing else becomes markup, examples are fenced."""
    parts: list[str] = []
    for block in re.split(r"\n[ ]*\n", text.strip("\n")):
        lines = block.splitlines()
        at = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>>")), len(lines))
        if lines[:at]:
            indented = all(line.startswith("    ") for line in lines[:at])
            code, said = "\n".join(lines[:at]), line_of("\n".join(lines[:at]))
            parts.append(f"```text\n{textwrap.dedent(code)}\n```" if indented else said)
        if lines[at:]:
            parts.append("```pycon\n" + textwrap.dedent("\n".join(lines[at:])) + "\n```")
    return "\n\n".join(parts)


def line_of(text: str) -> str:
    """Return a paragraph as one line of Markdown (lists keep their lines)."""
    items = re.split(r"\n(?=[ ]*(?:\*|-|\d+\.) )", text)
    return "\n".join(_inline(" ".join(item.split())) for item in items)


def _inline(text: str) -> str:
    made, at = [], 0
    for match in _LITERAL.finditer(text):
        made += [_escaped(text[at : match.start()]), f"`{match[1] or match[2]}`"]
        at = match.end()
    return "".join([*made, _escaped(text[at:])])


def _escaped(text: str) -> str:
    text = text.replace("<", "&lt;")
    bullet = re.match(r"(?:\* )?", text)
    start = bullet[0].replace("*", "-") if bullet else ""
    return start + re.sub(r"([*$~])", r"\\\1", text[len(start) :])


def cell(text: str) -> str:
    """Return one line of Markdown for a table."""
    return line_of(text).replace("\n", " ").replace("|", "\\|")


def module_doc(cls: type) -> str:
    """Return the docstring of the module that defines ``cls``."""
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")


@functools.lru_cache(maxsize=512)
def described(cls: type[BaseModel]) -> Described:
    """Return the class's own docstring without what it says of fields, and the words for every field.

    A field is described by a string below it or, in the docstring of its class, by a sentence that begins with its name
    and a colon; parents' words count where a class has none of its own.
    """
    fields: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if isinstance(c, type) and issubclass(c, BaseModel)]):
        if base is BaseModel:
            continue
        _, inside = _cut(inspect.cleandoc(base.__doc__ or ""), frozenset(base.model_fields))
        fields |= inside | _below(base)
    prose, _ = _cut(inspect.cleandoc(cls.__doc__ or "") if "__doc__" in vars(cls) else "", frozenset(cls.model_fields))
    return Described(prose, {name: text for name, text in fields.items() if name in cls.model_fields})


def _below(cls: type) -> dict[str, str]:
    """Return the strings that stand below the fields of a class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    (node,) = tree.body
    assert isinstance(node, ast.ClassDef)
    found: dict[str, str] = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found


def _cut(text: str, names: frozenset[str]) -> tuple[str, dict[str, str]]:
    """Return ``text`` without the sentences ``name: ...`` of ``names``, and these by name."""
    kept: list[str] = []
    found: dict[str, str] = {}
    starts = re.compile(r"(?:^|(?<=[.;)] )|(?<=[.;)]\n)|(?<=\n))(\w+(?:,\s\w+)*): ", re.MULTILINE)
    for paragraph in re.split(r"\n[ ]*\n", text):
        marks = [
            (match, said)
            for match in starts.finditer(paragraph)
            if (said := re.split(r",\s", match[1])) and all(name in names for name in said)
        ]
        if paragraph.lstrip().startswith(">>>") or not marks:
            kept.append(paragraph)
            continue
        ends = [match.start() for match, _ in marks[1:]] + [len(paragraph)]
        for (match, said), end in zip(marks, ends, strict=True):
            found |= dict.fromkeys(said, paragraph[match.end() : end].strip().rstrip(";"))
        if before := paragraph[: marks[0][0].start()].strip():
            kept.append(before)
    return "\n\n".join(kept), found
