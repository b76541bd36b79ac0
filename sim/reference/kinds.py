"""Plug-ins as a page: every kind of every family, where it comes from, its settings and an example."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sim.catalogue import FAMILIES
from sim.plugin import Plugin, members
from sim.reference.keys import anchor, classes, family_of, place, places, table
from sim.reference.words import described, markdown, module_doc

HEAD = """# Plug-ins: every kind

A key that takes a *kind* accepts its name (`select: topk`) or a mapping with settings (`select: {kind: group_limited,
topk_group: 2}`). One file in the family's folder, or one class in a notebook, is one more kind: see
[the tutorial](../tutorial.md#a-policy-of-your-own). Examples are doctests."""


def shipped(base: type[Plugin]) -> dict[str, type[Plugin]]:
    """Return the members that come with the package, whatever a notebook or a test has added."""
    package = base.__module__
    return {
        kind: cls
        for kind, cls in members(base).items()
        if cls.__module__ == package or cls.__module__.startswith(package + ".")
    }


def page() -> str:
    """Return the page of all plug-ins."""
    families = {place(base): base for base in FAMILIES.values()}
    families |= {place(base): base for base in _inner_families() if base not in FAMILIES.values()}
    index = []
    for heading, base in families.items():
        links = ", ".join(f"[`{kind}`](#{anchor(_heading(heading, kind))})" for kind in shipped(base))
        index.append(f"- [{heading}](#{anchor(heading)}): {links}")
    parts = [HEAD, "\n".join(index)]
    for heading, base in families.items():
        parts += [f"## {heading}", markdown(described(base).prose), _common(base)]
        parts += [
            entry(_heading(heading, kind), cls, frozenset(base.model_fields)) for kind, cls in shipped(base).items()
        ]
    parts.append("## Blocks within plug-ins")
    for block in _inner_blocks():
        if block not in places():  # else it has its section on the other page
            parts += [f"### {block.__name__}", markdown(described(block).prose), table(block)]
    return "\n\n".join(part for part in parts if part.strip())


def entry(heading: str, cls: type[Plugin], common: frozenset[str]) -> str:
    """Return the section of one plug-in; settings of the whole family are left to the family."""
    parts = [f"### {heading}", markdown(module_doc(cls)), markdown(described(cls).prose)]
    parts.append(table(cls, common | {"kind"}))
    parts.append(f"Source: `{cls.__module__.replace('.', '/')}.py`")
    return "\n\n".join(part for part in parts if part.strip())


def _heading(family: str, kind: str) -> str:
    return f"{family.partition(':')[0].replace('policies[].', '').rpartition('.')[2].lower()}: {kind}"


def _common(base: type[Plugin]) -> str:
    rows = table(base, frozenset({"kind"}))
    return f"Settings of every kind:\n\n{rows}" if rows else ""


def _settings() -> Iterator[FieldInfo]:
    """Yield every setting of a scenario's blocks and of every plug-in, and of what these take."""
    pending: list[type[BaseModel]] = list(places())
    pending += [cls for base in FAMILIES.values() for cls in shipped(base).values()]
    seen: set[type[BaseModel]] = set()
    while pending:
        cls = pending.pop(0)
        if cls in seen:
            continue
        seen.add(cls)
        for field in cls.model_fields.values():
            yield field
            family = family_of(field)
            pending += list(shipped(family).values()) if family else classes(field.annotation)


def _inner_blocks() -> list[type[BaseModel]]:
    return list(dict.fromkeys(cls for field in _settings() for cls in classes(field.annotation)))


def _inner_families() -> list[type[Plugin]]:
    return list(dict.fromkeys(family for field in _settings() if (family := family_of(field))))
