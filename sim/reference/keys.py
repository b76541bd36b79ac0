"""Blocks of a scenario file as tables: every key with its type, default, unit and meaning."""

from __future__ import annotations

import functools
import json
import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sim.plugin import Choice, Plugin
from sim.reference.words import cell, described, markdown

UNITS = (
    ("bytes_per_s_and_sm", "B/s"), ("bytes_per_s", "B/s"), ("flops_per_s", "FLOP/s"), ("rate_per_s", "1/s"),
    ("_bytes", "B"), ("_tokens", "tokens"), ("_steps", "steps"), ("_w", "W"), ("_s", "s"), ("_hour", "USD/h"),
)  # fmt: skip


COMMON = {
    "source": "Where the numbers come from.",
    "rate_per_s": "Mean requests per second.",
}
"""Words for keys that mean the same everywhere."""


def page() -> str:
    """Return the page of all blocks that a scenario file is made of."""
    from sim.scenario import Scenario

    head = """
    # Scenario files: every key

    A scenario is a YAML file (or JSON) of the blocks below. `extends: FILE` in any block starts from that file and changes
    what stands beside it; for `model` and `cluster` the file's name alone will do. Any value can be changed on the command
    line by its path: `--set policies.2.select.topk_group=2`. `policies.*.KEY` names every policy and `gating.KEY` every
    policy whose gate has that key.

    Numbers are in SI units. Where a unit is s, B, B/s or FLOP/s, text such as `"50 GB/s"` or `"2.8 us"` will do. A key
    marked *kind* takes one of the [plug-ins](plugins.md): a name, or a mapping with `kind` and its settings. What stands
    here is checked when a file is read: unknown keys, wrong types and values out of range are refused with their line.
    `python -m sim.run --schema` prints the same as JSON Schema for an editor.
    """
    blocks = list(walk(Scenario, ""))
    text = ["\n".join(line.strip() for line in head.strip().splitlines())]
    text += ["\n".join(f"- [{title(path, cls)}](#{anchor(title(path, cls))})" for path, cls in blocks)]
    text += [section(path, cls) for path, cls in blocks]
    return "\n\n".join(text)


def title(path: str, cls: type[BaseModel]) -> str:
    return f"{path} ({cls.__name__})" if path else "The file"


def anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section(path: str, cls: type[BaseModel]) -> str:
    said = described(cls)
    parts = [f"## {title(path, cls)}", markdown(said.prose), table(cls)]
    return "\n\n".join(part for part in parts if part)


def table(cls: type[BaseModel], leave_out: frozenset[str] = frozenset()) -> str:
    """Return the keys of one class as a Markdown table; nothing for a class without any."""
    fields = {name: field for name, field in cls.model_fields.items() if name not in leave_out}
    if not fields:
        return ""
    schema = cls.model_json_schema()
    # A class that holds itself is a reference to its own definition.
    properties = schema.get("properties") or schema["$defs"][cls.__name__]["properties"]
    words = described(cls).fields
    rows = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for name, field in fields.items():
        key = field.alias or name
        meaning = words.get(name) or COMMON.get(name) or _of_what(field)
        row = (f"`{key}`", type_of(field, properties[key]), default_of(field), unit_of(name), cell(meaning))
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


def _of_what(field: FieldInfo) -> str:
    """Return the first sentence of the block or family that a key takes, for keys with no words of their own."""
    family = family_of(field)
    blocks: list[type[BaseModel]] = [family] if family else classes(field.annotation)
    text = " ".join(described(blocks[0]).prose.partition("\n\n")[0].split()) if blocks else ""
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


def unit_of(name: str) -> str:
    """Return the unit that a key's name ends with, or nothing."""
    return next((unit for end, unit in UNITS if name.endswith(end)), "")


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Plugin):
        return f"`{value.kind}`"
    if isinstance(value, BaseModel):
        return "its own defaults"
    if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], Plugin):
        return f"`{value[0].kind}`"
    if value is PydanticUndefined:
        return ""
    shown = json.dumps(plain(value), ensure_ascii=False)
    return f"`{shown}`" if len(shown) <= 60 else f"{len(value)} entries"


def plain(value: Any) -> Any:
    """Return ``value`` as JSON has it."""
    if isinstance(value, BaseModel):
        return {
            name: plain(getattr(value, name)) for name in type(value).model_fields if name in value.model_fields_set
        }
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def type_of(field: FieldInfo, schema: dict[str, Any]) -> str:
    """Return the type in words, with its limits, and a link where it is a block or a plug-in."""
    family = family_of(field)
    many = "list of " if _is_tuple(field.annotation) else ""
    if family is not None:
        return f"{many}[*kind*](plugins.md#{anchor(place(family))})"
    blocks = classes(field.annotation)
    if blocks:
        return many + " or ".join(link(cls) for cls in blocks)
    return _words(schema).replace("|", "\\|")


@functools.lru_cache(maxsize=1)
def places() -> dict[type[BaseModel], str]:
    """Return the blocks of the scenario page and their anchors there."""
    from sim.scenario import Scenario

    return {cls: anchor(title(path, cls)) for path, cls in walk(Scenario, "")}


def link(cls: type[BaseModel]) -> str:
    """Return a link to the section of a block, on whichever page it is."""
    at = f"scenario.md#{places()[cls]}" if cls in places() else f"plugins.md#{anchor(cls.__name__)}"
    return f"[{cls.__name__}]({at})"


def place(family: type[Plugin]) -> str:
    """Return the heading of a family of plug-ins."""
    from sim.catalogue import FAMILIES

    return next((f"{where}: {base.__name__}" for where, base in FAMILIES.items() if base is family), family.__name__)


def _words(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        kinds = list(dict.fromkeys(_words(one) for one in schema["anyOf"]))
        return " or ".join(kind for kind in kinds if kind != "null") + (" or `null`" if "null" in kinds else "")
    kind = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}.get(
        schema.get("type", ""), schema.get("type", "any")
    )
    if kind == "array":
        items = schema.get("items") or {}
        inner = schema.get("prefixItems")
        if inner:
            return "[" + ", ".join(_words(one) for one in inner) + "]"
        return f"list of {_words(items)}" if items else "list"
    if kind == "object":
        return "mapping"
    low, high = (
        _bound(schema, "minimum", "exclusiveMinimum", ("≥", ">")),
        _bound(schema, "maximum", "exclusiveMaximum", ("≤", "<")),
    )
    limits = [limit for limit in (low, high) if limit]
    return f"{kind} {' and '.join(limits)}" if limits else kind


def _bound(schema: dict[str, Any], inclusive: str, exclusive: str, signs: tuple[str, str]) -> str:
    for name, sign in ((inclusive, signs[0]), (exclusive, signs[1])):
        if name in schema:
            value = schema[name]
            return f"{sign} {value:g}" if abs(value) < 1e15 else ""
    return ""


def _is_tuple(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _is_tuple(typing.get_args(annotation)[0])
    return origin in (tuple, list)


def family_of(field: FieldInfo) -> type[Plugin] | None:
    """Return the plug-in family that a field takes, if it does."""
    found = [meta.base for meta in [*field.metadata, *_metadata(field.annotation)] if isinstance(meta, Choice)]
    return found[0] if found else None


def _metadata(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        yield from typing.get_args(annotation)[1:]
    for inner in typing.get_args(annotation):
        yield from _metadata(inner)


def classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the blocks, no plug-ins, that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if issubclass(annotation, Plugin) else [annotation]
    found: list[type[BaseModel]] = []
    for inner in typing.get_args(annotation):
        found += [cls for cls in classes(inner) if cls not in found]
    return found


def walk(cls: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield ``(path, block)`` of ``cls`` and all blocks below it, each block where it is met first."""
    seen: dict[type[BaseModel], str] = {}
    pending = [(path, cls)]
    while pending:
        where, block = pending.pop(0)
        if block in seen:
            continue
        seen[block] = where
        yield where, block
        below = []
        for name, field in block.model_fields.items():
            inner = f"{where}.{name}".lstrip(".") + ("[]" if _is_tuple(field.annotation) else "")
            below += [(inner, found) for found in classes(field.annotation)]
        pending = below + pending
