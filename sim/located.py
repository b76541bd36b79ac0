"""Located problems: every complaint about an input names file, line, column, key, rule, value and, often, the cure.

Knows pydantic and the plug-in rule, nothing about scenarios. `validate` turns plain data plus the marks of its keys
into a model, or raises one `ScenarioError` that lists every problem at once.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sim.plugin import Choice, members

KeyPath = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist = 3, 6, 8


class Mark(NamedTuple):
    """Where a key or list item stands. Lines and columns count from 1; line 0 = not from a file (``--set``, Python)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Problem(NamedTuple):
    """One complaint; its text is one line such as ``a.yaml:6:3: model.topk_grp: unknown key [got 4]``."""

    where: str
    path: str
    rule: str
    got: str = ""
    hint: str = ""

    def __str__(self) -> str:
        path = f"{self.path[:200]}: " if self.path else ""
        got = f" [got {self.got}]" if self.got else ""
        hint = f" (did you mean {self.hint}?)" if self.hint else ""
        text = _CONTROL.sub(" ", f"{self.where}: {path}{self.rule}{got}{hint}")
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


class ScenarioError(Exception):
    """Bad input. ``problems`` holds every `Problem` found; the text has one line for each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(list(problems))
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def dotted(path: Iterable[str | int]) -> str:
    """``("policies", 2, "kind")`` as ``policies.2.kind``."""
    return ".".join(map(str, path))


def short(value: Any) -> str:
    """``repr(value)`` in at most 60 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like ``word``, or ``""``."""
    return next(iter(difflib.get_close_matches(word[:200], list(known), n=1)), "")


def nearest_file(path: str) -> str:
    """The file of the same folder whose name is most like that of ``path``, or ``""``."""
    folder = os.path.dirname(path)
    return nearest(os.path.basename(path), sorted(os.listdir(folder))) if os.path.isdir(folder) else ""


def validate(model_cls: type[M], data: dict[str, Any], marks: Mapping[KeyPath, Mark]) -> M:
    """Return ``model_cls.model_validate(data)``.

    ``marks`` maps the path of each key and item to the place where it stands; missing keys are reported at the mapping
    that lacks them. A validator that checks several fields may start its ValueError with the (dotted) name of the
    field to blame: the problem is then located at that key.

    Raises ScenarioError with every problem, in the order of the files and of the lines in them.
    """
    try:
        return model_cls.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
    # Items that are wrong are missing from their list, which then may be too short for that alone.
    places = [detail["loc"] for detail in details]
    details = [
        detail
        for detail in details
        if detail["type"] != "too_short" or not any(p[: len(detail["loc"])] == detail["loc"] != p for p in places)
    ]
    found: dict[KeyPath, list[Problem]] = {}
    for detail in details:
        path, problem = _explain(model_cls, data, detail)
        found.setdefault(path, []).append(problem)
    files: dict[str, int] = {}
    for mark in marks.values():
        files.setdefault(mark.file, len(files))
    located = []
    for path, problems in found.items():
        mark = _deepest(path, marks)
        # Several errors at one path are the branches of a union: one line names them all.
        rules = list(dict.fromkeys(problem.rule for problem in problems))
        hint = next((problem.hint for problem in problems if problem.hint), "")
        merged = problems[0]._replace(where=str(mark), rule=" or ".join(rules), hint=hint)
        located.append(((files.get(mark.file, len(files)), mark.line, mark.column), merged))
    located.sort(key=lambda item: item[0])
    raise ScenarioError([problem for _, problem in located])


def problem(data: Any, marks: Mapping[KeyPath, Mark], path: KeyPath, rule: str) -> Problem:
    """The problem of breaking ``rule`` at ``path``, placed at the deepest part of the path that has a mark."""
    value = _get(data, path)
    got = "" if value is None or isinstance(value, dict | list) else short(value)
    return Problem(str(_deepest(path, marks)), dotted(path), rule, got)


def _deepest(path: KeyPath, marks: Mapping[KeyPath, Mark]) -> Mark:
    while path and path not in marks:
        path = path[:-1]
    return marks.get(path, Mark("<data>"))


# --- from a pydantic error to a path in the data, a rule and a suggestion ---


def _explain(model_cls: type[BaseModel], data: Any, detail: ErrorDetails) -> tuple[KeyPath, Problem]:
    """KeyPath (without the parts that only pydantic knows, such as union tags) and problem, still without its place."""
    kind, loc = detail["type"], detail["loc"]
    path: KeyPath = ()
    at, present = data, True
    for depth, part in enumerate(loc):
        if _has(at, part):
            path, at = (*path, part), at[part]
        elif depth == len(loc) - 1 and (kind == "missing" or part in _fields(model_cls, data, path)):
            path, present = (*path, part), False
    if kind in ("value_error", "assertion_error"):
        return _own_words(model_cls, data, path, at, present, detail)
    context = {name: _plain(value) for name, value in detail.get("ctx", {}).items()}
    if kind == "extra_forbidden":
        level = path[:-1]
        known = _fields(model_cls, data, level)
        absent = [name for name in known if not _has(_get(data, level), name)]
        key = str(path[-1]) if path else ""
        hint = nearest(key, absent) or nearest(key, known)
        rule = "unknown key" if hint or not 0 < len(known) <= 12 else f"unknown key; known here: {', '.join(known)}"
        return path, Problem("", dotted(path), rule, short(at), hint)
    if kind.startswith("plugin_"):
        return _plugin(path, at, kind, context)
    hint = ""
    if kind in ("literal_error", "enum"):
        choices = re.findall(r"'([^']*)'", context["expected"]) or re.split(r", | or ", context["expected"])
        rule = f"must be one of {', '.join(choices)}" if len(choices) > 1 else f"must be {choices[0]}"
        hint = nearest(at, choices) if isinstance(at, str) else ""
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        choices = re.findall(r"'([^']*)'", context.get("expected_tags", ""))
        tag = context["discriminator"].strip("'")
        if kind == "union_tag_not_found":
            return path, Problem("", dotted(path), f"needs the key {tag}")
        path, at = (*path, tag), _get(at, (tag,))
        rule, hint = f"must be one of {', '.join(choices)}", nearest(context["tag"], choices)
    elif kind in _RULES:
        rule = _RULES[kind].format_map(context)
    else:
        rule = detail["msg"][:1].lower() + detail["msg"][1:]
    got = "" if kind == "missing" or not present else short(at)
    return path, Problem("", dotted(path), rule, got, hint)


def _plugin(path: KeyPath, at: Any, kind: str, context: Mapping[str, str]) -> tuple[KeyPath, Problem]:
    family, kinds = context["family"], context["kinds"]
    if kind == "plugin_missing":
        return path, Problem("", dotted(path), f"a {family} needs a kind: one of {kinds}")
    if kind == "plugin_type":
        return path, Problem("", dotted(path), f"must be a mapping with a kind, or one of {kinds}", short(at))
    if _has(at, "kind"):
        path, at = (*path, "kind"), at["kind"]
    return path, Problem("", dotted(path), f"must be one of {kinds}", short(at), nearest(str(at), kinds.split(", ")))


def _own_words(
    model_cls: type[BaseModel], data: Any, path: KeyPath, at: Any, present: bool, detail: ErrorDetails
) -> tuple[KeyPath, Problem]:
    """A validator's own message; a field name at its start says which key to blame."""
    rule = re.sub(r"^(Value error|Assertion failed), ?", "", detail["msg"])
    named = re.match(r"['`]?([A-Za-z_]\w*(?:\.\w+)*)['`]?:?\s+(?=\S)", rule)
    if named and isinstance(at, dict):
        target, value, known = path, at, set(_fields(model_cls, data, path))
        for word in named[1].split("."):
            part = int(word) if isinstance(value, list) and word.isdecimal() else word
            if _has(value, part):
                target, value = (*target, part), value[part]
            elif target == path and word in known:
                target, present = (*target, word), False
                break
            else:
                break
        if target != path and dotted(target[len(path) :]) == named[1]:
            path, at, rule = target, value, rule[named.end() :]
    got = short(at) if present and not isinstance(at, dict) else ""
    return path, Problem("", dotted(path), rule or "is not valid", got)


_RULES = {
    "missing": "is required",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "must be an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "must be a mapping"),
    "string_type": "must be text",
    "none_required": "must be null",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "finite_number": "must be a finite number",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
}


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and 0 <= part < len(value)


def _get(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part] if _has(data, part) else None
    return data


# --- which keys are valid at a path ---


def _fields(model_cls: type[BaseModel], data: Any, path: KeyPath) -> list[str]:
    """Names of the keys that the model reached by ``path`` accepts, for the plug-ins that ``data`` chose."""
    level: list[Any] = [model_cls]
    for part in path:
        level = [child for annotation in level for child in _children(annotation, part, data)]
        data = data[part] if _has(data, part) else None
    models = [cls for annotation in level for cls in _alternatives(annotation, data) if _is_model(cls)]
    return list(dict.fromkeys(name for cls in models for key in cls.model_fields for name in _names(cls, key)))


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _names(cls: type[BaseModel], key: str) -> list[str]:
    alias = cls.model_fields[key].validation_alias
    if alias is None:
        return [key]
    found = alias.choices if isinstance(alias, AliasChoices) else [alias]
    return [name for name in found if isinstance(name, str)]


def _alternatives(annotation: Any, value: Any) -> Iterator[Any]:
    """The plain types behind ``Annotated``, unions and plug-in families."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for choice in arguments[1:]:
            if isinstance(choice, Choice):
                default = choice.base.model_fields["kind"].default
                kind = value.get("kind", default) if isinstance(value, dict) else value
                yield from (cls for name, cls in members(choice.base).items() if name == kind)
                return
        yield from _alternatives(arguments[0], value)
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _alternatives(argument, value)
    else:
        yield annotation


def _children(annotation: Any, part: str | int, value: Any) -> Iterator[Any]:
    for plain in _alternatives(annotation, value):
        arguments = typing.get_args(plain)
        if _is_model(plain):
            yield from (_annotation(info) for key, info in plain.model_fields.items() if part in _names(plain, key))
        elif isinstance(part, int) and typing.get_origin(plain) is tuple and arguments[-1] is not Ellipsis:
            yield from arguments[part : part + 1]
        elif arguments and typing.get_origin(plain) is not Callable:
            yield arguments[0] if isinstance(part, int) else arguments[-1]


def _annotation(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
