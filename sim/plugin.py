"""The one registration rule: the class is the config is the registration.

A family of plug-ins is a package whose ``__init__`` defines an abstract subclass of `Plugin`. Every other module of
that package is a member: it subclasses the base, sets ``kind: Literal["name"] = "name"`` and implements the method.
Nothing else is edited: the scenario schema, ``--list``, the docs table and the contract tests read `members`.
A class defined anywhere else (a notebook cell, a user's module) joins the family as soon as it exists.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Plugin(BaseModel):
    """A frozen config with a ``kind`` and, in each family, one abstract method."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kind: str


P = TypeVar("P", bound=Plugin)


def _kind(cls: type[Plugin]) -> str | None:
    values = typing.get_args(cls.model_fields["kind"].annotation)
    return values[0] if len(values) == 1 and isinstance(values[0], str) and not inspect.isabstract(cls) else None


def members(base: type[P]) -> dict[str, type[P]]:
    """Return ``{kind: class}`` of every concrete plug-in of ``base``, sorted by kind.

    Imports the modules of the package that defines ``base``. Of two classes with one kind the later one wins, so a
    notebook cell can be run twice; within the package that is a mistake and raises TypeError.
    """
    package = importlib.import_module(base.__module__)
    for info in pkgutil.iter_modules(getattr(package, "__path__", [])):
        importlib.import_module(f"{package.__name__}.{info.name}")
    found: dict[str, type[P]] = {}
    pending = list(base.__subclasses__())
    while pending:
        cls = pending.pop(0)
        pending += cls.__subclasses__()
        kind = _kind(cls)
        if kind is None:
            continue
        twin = found.get(kind)
        if twin is not None and twin.__module__ != cls.__module__ and _inside(twin, package) and _inside(cls, package):
            raise TypeError(f"{twin.__module__} and {cls.__module__} both define {base.__name__} kind {kind!r}")
        found[kind] = cls
    return dict(sorted(found.items()))


def make(base: type[P], kind: str) -> P:
    """Return the member of ``base`` called ``kind`` with its default settings."""
    return members(base)[kind].model_validate({"kind": kind})


def _inside(cls: type[Plugin], package: Any) -> bool:
    return cls.__module__.startswith(package.__name__ + ".")


class Choice:
    """Field annotation ``Annotated[Base, Choice(Base)]``: any member of the family, chosen by its ``kind``.

    Accepts an instance, a mapping with ``kind``, or the bare kind as text (``select: topk``). Errors inside the chosen
    member keep their own paths; an unknown kind lists the known ones and suggests the nearest.
    """

    def __init__(self, base: type[Plugin]) -> None:
        self.base = base

    def _validate(self, value: Any) -> Plugin:
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        known = members(self.base)
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "plugin_type",
                "a {family} is a mapping with a kind ({kinds})",
                {"family": self.base.__name__.lower(), "kinds": ", ".join(known)},
            )
        kind = value.get("kind")
        if kind is None and "kind" not in value and (default := self.base.model_fields["kind"].default) in known:
            kind = default
        if not isinstance(kind, str) or kind not in known:
            near = difflib.get_close_matches(str(kind), known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            if kind is None:
                raise PydanticCustomError(
                    "plugin_missing",
                    "a {family} needs a kind: {kinds}",
                    {"family": self.base.__name__.lower(), "kinds": ", ".join(known)},
                )
            raise PydanticCustomError(
                "plugin_unknown",
                "unknown {family} kind [got {kind}]{hint}; known: {kinds}",
                {"family": self.base.__name__.lower(), "kind": repr(kind), "hint": hint, "kinds": ", ".join(known)},
            )
        # A nested ValidationError keeps its own field paths under this field's.
        return known[kind].model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda plugin: plugin.model_dump(mode="json")
            ),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        known = members(self.base)
        choices = [handler(cls.__pydantic_core_schema__) for cls in known.values()]
        return {"anyOf": [*choices, {"enum": list(known)}]}
